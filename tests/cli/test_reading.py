"""Commands that read the tables of a resting system: status, table, history, rebuild, check.

The tables are made by the real actors in this process; a record in doubt is planted by hand.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from actors.history_view import EventBatch
from actors.local_runtime import LocalRuntime
from actors.payment.tables import WALLETS
from infra.config import load_settings
from infra.consensus_commit.metadata import transactional
from infra.storage.connect import connect
from infra.storage.operations import Put
from infra.storage.port import Storage
from schemas.envelope import RawMessage, build_event_message
from schemas.outcome import Answer
from scripts.cli.main import app
from scripts.cli.send_command import outgoing
from scripts.wiring import stored_tables, system_config

COMMANDS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    (
        "register",
        "RegisterProduct",
        {"category": "220", "product_id": "22001", "name": "MUG", "quantity": 10, "unit_price": 250, "currency": "GBP"},
    ),
    ("open", "OpenWallet", {"customer_id": "alice", "currency": "GBP", "initial_balance": 1000}),
    (
        "order",
        "PlaceOrder",
        {
            "customer_id": "alice",
            "order_id": "1",
            "lines": [{"category": "220", "product_id": "22001", "quantity": 2, "unit_price": 250}],
            "currency": "GBP",
            "shipping_address": {"region": "UK"},
        },
    ),
    ("too-much", "TakePayment", {"customer_id": "alice", "payment_id": "p", "amount": 100_000, "currency": "GBP"}),
)


def in_storage(directory: Path, work: Callable[[Storage], Awaitable[None]]) -> None:
    async def run() -> None:
        storage = connect(load_settings(data_dir=directory, environment={}).storage_url)
        try:
            await work(storage)
        finally:
            await storage.close()

    asyncio.run(run())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory whose system has carried out COMMANDS, and whose order history has followed."""
    directory = tmp_path_factory.mktemp("resting")

    async def work(storage: Storage) -> None:
        async with LocalRuntime(system_config(load_settings(data_dir=directory, environment={})), storage) as runtime:
            for offset, (id, type, body) in enumerate(COMMANDS):
                sent = outgoing(type, json.dumps(body).encode(), key=None, id=id, time_ms=1)
                message = sent.message
                raw = RawMessage(message.topic, 0, offset, 1, message.key, message.headers, message.value)
                domain = message.topic.partition(".")[0]
                actor = runtime.config.placement.actor_of(domain, message.key or b"")
                [answer] = await runtime.ask(actor, "execute", [raw])
                await follow(runtime, answer, offset)

    in_storage(directory, work)
    return directory


async def follow(runtime: LocalRuntime, answer: Answer, offset: int) -> None:
    events = [build_event_message(event, answer=answer) for event in answer.events if event.domain == "orders"]
    if events:
        raws = tuple(RawMessage(e.topic, 0, offset, 1, e.key, e.headers, e.value) for e in events)
        await runtime.ask("views-0", "apply", [EventBatch("orders.events", 0, "a log", raws)])


def concord(directory: Path, *arguments: str) -> tuple[int, list[Any]]:
    """(exit code, the JSON lines printed)."""
    done = CliRunner().invoke(app, [*arguments, "--data", str(directory), "--output", "json"])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.stderr == ""
    return done.exit_code, [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("key", [(), ("--key", "alice")])
def test_the_status_of_a_command_is_found_with_and_without_its_key(made: Path, key: tuple[str, ...]) -> None:
    code, [status] = concord(made, "status", "order", *key)

    assert code == 0
    assert (status["id"], status["type"], status["key"], status["status"]) == (
        "order",
        "PlaceOrder",
        "alice",
        "committed",
    )
    assert status["events"]
    assert status["committed_at"].endswith("Z")


@pytest.mark.parametrize(
    ("id", "key", "code", "status", "reason"),
    [
        ("too-much", None, 3, "refused", "insufficient_funds"),
        ("never-sent", None, 5, "unknown", None),
        ("order", "bob", 5, "unknown", None),
    ],
)
def test_the_exit_code_tells_the_status(
    made: Path, id: str, key: str | None, code: int, status: str, reason: str | None
) -> None:
    ended, [found] = concord(made, "status", id, *(("--key", key) if key else ()))

    assert (ended, found["status"], found["reason"]) == (code, status, reason)


def test_tables_are_listed_with_their_keys(made: Path) -> None:
    code, tables = concord(made, "table", "list")

    assert code == 0
    listed = {table["table"]: table for table in tables}
    assert listed["inventory.products"]["key"] == ["bucket", "category", "product_id"]
    assert listed["inventory.products"]["transactional"]
    assert not listed["coordinator.state"]["transactional"]
    assert {f"{domain}.outcomes" for domain in ("inventory", "payment", "shipping", "orders")} <= listed.keys()


def test_a_dump_shows_what_a_domain_keeps_and_nothing_of_transactions(made: Path) -> None:
    _, [product] = concord(made, "table", "dump", "inventory.products")
    _, [order] = concord(made, "table", "dump", "orders.orders")

    assert (product["category"], product["product_id"], product["quantity"], product["reserved"]) == (
        "220",
        "22001",
        10,
        2,
    )
    assert not [name for name in product if name.startswith(("tx_", "before_")) or name == "bucket"]
    assert order["lines"][0]["quantity"] == 2  # structured columns as what they hold


def test_metadata_adds_place_and_transaction(made: Path) -> None:
    _, [wallet] = concord(made, "table", "dump", "payment.wallets", "--metadata")

    assert wallet["tx_state"] == 3
    assert wallet["tx_version"] == 2  # opened, then paid from
    assert isinstance(wallet["bucket"], int)
    assert not [name for name in wallet if name.startswith("before_")]


def test_a_dump_of_one_key_has_its_rows_only(made: Path) -> None:
    assert len(concord(made, "table", "dump", "payment.wallets", "--key", "alice")[1]) == 1
    assert concord(made, "table", "dump", "payment.wallets", "--key", "bob")[1] == []


def test_tables_without_transactions_can_be_dumped_too(made: Path) -> None:
    code, rows = concord(made, "table", "dump", "coordinator.incarnations")

    assert code == 0
    assert {row["actor"] for row in rows} >= {"orders-0", "coordinator-0"}


def test_a_table_that_is_not_there_is_bad_usage(made: Path) -> None:
    done = CliRunner().invoke(app, ["table", "dump", "orders.nonsense", "--data", str(made)])

    assert done.exit_code == 2
    assert "There is no table orders.nonsense" in done.stderr
    assert "orders.orders" in done.stderr


def test_history_shows_a_customers_orders(made: Path) -> None:
    _, [order] = concord(made, "history", "alice")

    assert (order["order_id"], order["status"], order["total"]) == ("1", "placed", 500)
    assert concord(made, "history", "bob") == (0, [])


def test_the_history_can_be_rebuilt_from_the_tables(made: Path) -> None:
    assert concord(made, "rebuild", "order-history") == (0, [{"orders": 1, "written": 0, "removed": 0}])


def test_a_resting_system_whose_books_add_up_passes(made: Path) -> None:
    code, [report] = concord(made, "check")

    assert (code, report["ok"], report["offenders"]) == (0, True, [])
    assert report["counted"]["outcomes"] == 4
    assert report["counted"]["outcomes_refused"] == 1
    assert report["counted"]["orders.orders"] == 1
    assert report["counted"]["topics_not_verified_because_the_system_rests"] == 1


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A directory with one wallet, in doubt: prepared by a transaction that was left long ago and never decided."""

    async def work(storage: Storage) -> None:
        for table in stored_tables(load_settings(data_dir=tmp_path, environment={}), storage):
            await storage.create_table(table)
        stored = transactional(WALLETS.schema)
        columns = {
            "balance": 5,
            "currency": "GBP",
            "created_at_ms": 1,
            "updated_at_ms": 1,
            "content_digest": "",
            "tx_id": "left",
            "tx_state": 1,
            "tx_version": 1,
            "tx_prepared_at": 1,
        }
        await storage.mutate([Put(stored, WALLETS.storage_key(("mallory",), buckets=16), columns)])

    in_storage(tmp_path, work)
    return tmp_path


def test_a_record_in_doubt_is_an_offender(damaged: Path) -> None:
    code, [report] = concord(damaged, "check")

    assert (code, report["ok"]) == (1, False)
    assert report["counted"]["records_in_doubt"] == 1
    assert any("payment.wallets" in offender and "in doubt" in offender for offender in report["offenders"])


def test_a_dump_resolves_a_record_in_doubt_first(damaged: Path) -> None:
    assert concord(damaged, "table", "dump", "payment.wallets") == (0, [])

    code, [report] = concord(damaged, "check")
    assert (code, report["counted"]["records_in_doubt"]) == (0, 0)
