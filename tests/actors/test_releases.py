"""Two releases on the same tables: what the later one has added survives whatever the earlier one does to the row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from harness import Fate, Foreigner, System, order

from actors.domain import Table, carry_stored_columns
from actors.local_runtime import LocalRuntime
from actors.order_domains import ORDER_DOMAINS
from actors.orders.tables import ORDERS, Order
from actors.outcomes import outcomes_of
from actors.payment.tables import WALLETS, Wallet
from infra.consensus_commit.metadata import transactional
from infra.storage.errors import InvalidOperationError
from infra.storage.operations import TableSchema
from infra.storage.port import Storage
from schemas.orders import OrderLine, ShipOrder
from schemas.payment import TopUpWallet


class LaterWallet(Wallet):
    """A wallet of the later release: with a note."""

    note: str | None = None


class LaterLine(OrderLine):
    """A line of the later release: it may be a gift."""

    gift_for: str | None = None


class LaterOrder(Order):
    lines: tuple[LaterLine, ...]


LATER_WALLETS = Table("payment", "wallets", LaterWallet, key=("customer_id",), routing="customer_id")
LATER_ORDERS = Table(
    ORDERS.namespace,
    ORDERS.name,
    LaterOrder,
    key=ORDERS.key,
    routing=ORDERS.routing,
    sliced_by=ORDERS.sliced_by,
    slices=ORDERS.slices,
)


@pytest.fixture(autouse=True)
def forget_what_was_carried() -> Iterator[None]:
    yield
    carry_stored_columns([*(table for domain in ORDER_DOMAINS for table in domain.tables)], [])


async def test_a_column_of_a_later_release_survives_the_commits_of_this_one(storage: Storage) -> None:
    await storage.create_table(transactional(LATER_WALLETS.schema))
    async with System(storage) as system:
        await system.open_shop()
        later = Foreigner(system)
        await later.change(LATER_WALLETS, "c0", by=lambda purse: purse.with_(note="a good customer"))

        answer = await system.send(order("o1"), "x1")
        topped_up = await system.send(TopUpWallet(customer_id="c0", payment_id="t1", amount=5, currency="GBP"), "x2")

        assert (answer.status, topped_up.status) == ("committed", "committed")
        purse = await later.read(LATER_WALLETS, "c0")
        assert purse is not None
        assert (purse.note, purse.balance) == ("a good customer", 10**9 - answer.result["total"] + 5)  # type: ignore[index]
        await system.check_at_rest()


async def test_a_column_of_a_later_release_survives_what_this_one_prepares_and_rolls_back(storage: Storage) -> None:
    await storage.create_table(transactional(LATER_WALLETS.schema))
    async with System(storage) as system:
        await system.open_shop()
        later = Foreigner(system)
        await later.change(LATER_WALLETS, "c0", by=lambda purse: purse.with_(note="a good customer"))
        system.intercept("payment-0", "prepare", Fate.KILLS_AFTER)

        answer = await system.send(order("o1"), "x1")

        assert answer.status == "committed"
        purse = await later.read(LATER_WALLETS, "c0")
        assert purse is not None
        assert purse.note == "a good customer"
        await system.check_at_rest()


async def test_what_a_later_release_prepared_is_rolled_back_by_this_one_with_the_column(storage: Storage) -> None:
    await storage.create_table(transactional(LATER_WALLETS.schema))
    async with System(storage) as system:
        await system.open_shop()
        later = Foreigner(system)
        await later.change(LATER_WALLETS, "c0", by=lambda purse: purse.with_(note="first"))
        transaction = later.manager.begin()
        where = LATER_WALLETS.storage_key(("c0",), buckets=system.config.placement.buckets)
        row = await transaction.get(LATER_WALLETS.schema, where)
        assert row is not None
        changed = LATER_WALLETS.from_row(row).with_(note="never committed")
        await transaction.update(LATER_WALLETS.schema, where, LATER_WALLETS.to_columns(changed))
        await prepare_and_die(transaction)
        system.advance(60)

        answer = await system.send(order("o1"), "x1")

        assert answer.status == "committed"
        purse = await later.read(LATER_WALLETS, "c0")
        assert purse is not None
        assert purse.note == "first"
        await system.check_at_rest()


async def test_what_a_later_release_puts_into_a_column_of_json_survives_changes_of_others(storage: Storage) -> None:
    async with System(storage) as system:
        await system.open_shop()
        placed = await system.send(order("o1"), "x1")
        later = Foreigner(system)
        await later.change(
            LATER_ORDERS,
            "c0",
            "o1",
            by=lambda one: one.with_(lines=tuple(line.model_copy(update={"gift_for": "Ada"}) for line in one.lines)),
        )

        shipped = await system.send(ShipOrder(customer_id="c0", order_id="o1"), "x2")

        assert (placed.status, shipped.status) == ("committed", "committed")
        [row] = await system.dump("orders.orders")
        assert row["status"] == "shipped"
        assert {line["gift_for"] for line in json.loads(str(row["lines"]))} == {"Ada"}
        await system.check_at_rest()


async def test_a_table_without_a_column_of_this_release_is_refused_by_name(memory: Storage) -> None:
    declared = WALLETS.declared
    missing = {name: kind for name, kind in declared.columns.items() if name != "balance"}
    narrow = TableSchema("payment", "wallets", missing, declared.partition_key, declared.clustering_key)
    await memory.create_table(transactional(narrow))
    runtime = LocalRuntime(System(memory).config, memory, names=["payment-0"])

    with pytest.raises(InvalidOperationError, match="no column balance"):
        await runtime.start()


def test_only_a_table_that_is_this_one_with_more_columns_is_carried() -> None:
    declared = WALLETS.declared
    other_key = TableSchema(
        "payment", "wallets", {**declared.columns, "more": declared.columns["balance"]}, ("bucket",)
    )

    carry_stored_columns([WALLETS], [transactional(other_key)])
    assert WALLETS.schema == declared
    carry_stored_columns([WALLETS], [transactional(LATER_WALLETS.schema)])
    assert dict(WALLETS.schema.columns) == dict(LATER_WALLETS.declared.columns)
    carry_stored_columns([WALLETS], [])
    assert WALLETS.schema == declared
    assert outcomes_of("payment") is outcomes_of("payment")


async def prepare_and_die(transaction: Any) -> None:
    """Write the prepared records of a transaction, and nothing more ever."""
    await transaction._participant.prepare_records(1)
