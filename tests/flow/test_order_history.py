"""The projection's actor: rows by version, positions beside them, and the same view rebuilt from the tables."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from flow_world import until
from order_events import goods_returned, message, placed, shipped, summary

from actors.history_view import ORDER_HISTORY, Applied, EventBatch
from actors.incarnations import Incarnations
from actors.orders.tables import ORDERS, Order
from actors.pausing import PauseRenewal, PauseRequest
from actors.view_actor import VIEW_BUCKETS, Rebuilt, ViewActor, order_history, positions, rebuild_order_history
from infra.clock import ManualClock
from infra.consensus_commit.coordinator import CoordinatorStates
from infra.consensus_commit.intents import IntentLog
from infra.consensus_commit.manager import TransactionManager
from infra.consensus_commit.metadata import transactional
from infra.consensus_commit.states import TransactionState
from infra.consensus_commit.transaction import Transaction
from infra.storage.connect import connect
from infra.storage.memory import MemoryStorage
from infra.storage.operations import Atomicity, ScanAll
from infra.storage.port import Storage
from schemas.common import Address
from schemas.envelope import RawMessage
from schemas.orders import OrderLine, OrderStatus
from tests.protocol.faults import FaultyStorage, Kind, writes_to

LOG = "cluster-1"
BUCKETS = 16


@pytest_asyncio.fixture(params=["memory", "sqlite"])
async def storage(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Storage]:
    opened = connect("memory:" if request.param == "memory" else f"sqlite://{tmp_path}")
    yield opened
    await opened.close()


@pytest_asyncio.fixture
async def actor(storage: Storage) -> AsyncIterator[ViewActor]:
    view = await started(storage)
    yield view
    await view.stop()


async def started(storage: Storage) -> ViewActor:
    clock = ManualClock()
    view = ViewActor(name="views-0", storage=storage, incarnations=Incarnations(storage, clock), clock=clock)
    await view.start()
    return view


def batch(*messages: RawMessage, log_identity: str = LOG) -> EventBatch:
    return EventBatch("orders.events", messages[0].partition, log_identity, messages)


async def only_row(storage: Storage):  # type: ignore[no-untyped-def]
    (row,) = await order_history(storage, "customer-1")
    return row


async def test_an_event_becomes_a_row_and_a_position(storage: Storage, actor: ViewActor) -> None:
    (applied,) = await actor.apply([batch(message(placed(), offset=7))])

    assert applied == Applied(written=1, skipped=0, unreadable=0, next_offset=8)
    row = await only_row(storage)
    assert (row.order_id, row.status, row.total, row.tracking_number, row.record_version) == (
        "order-1", "placed", 1250, "T-1", 1,
    )  # fmt: skip
    (position,) = await positions(storage)
    assert (position.topic, position.partition, position.log_identity, position.next_offset) == (
        "orders.events", 0, LOG, 8,
    )  # fmt: skip


async def test_a_batch_that_comes_again_changes_nothing(storage: Storage, actor: ViewActor) -> None:
    events = batch(message(placed(), offset=0), message(shipped(), offset=1, version=2))
    await actor.apply([events])
    before = await only_row(storage)

    (again,) = await actor.apply([events])

    assert again.written == 0
    assert again.next_offset == 2
    assert await only_row(storage) == before


async def test_the_newest_version_counts_in_whatever_order_events_come(storage: Storage, actor: ViewActor) -> None:
    await actor.apply([batch(message(shipped(), offset=0, version=2))])

    (applied,) = await actor.apply([batch(message(placed(), offset=1, version=1))])

    assert applied.written == 0
    assert (await only_row(storage)).status == "shipped"
    assert (await positions(storage))[0].next_offset == 2


async def test_of_several_versions_in_one_batch_the_newest_is_written(storage: Storage, actor: ViewActor) -> None:
    await actor.apply([batch(message(shipped(), offset=0, version=2), message(placed(), offset=1, version=1))])

    assert (await only_row(storage)).status == "shipped"


async def test_a_position_never_goes_back_in_the_same_log(storage: Storage, actor: ViewActor) -> None:
    await actor.apply([batch(message(placed(), offset=9))])

    await actor.apply([batch(message(placed("order-2"), offset=3))])

    assert (await positions(storage))[0].next_offset == 10
    assert len(await order_history(storage, "customer-1")) == 1, "an event before the position was applied"


@pytest.mark.parametrize("by", ["itself", "its successor"])
async def test_what_a_batch_left_in_doubt_comes_to_rest_though_nobody_reads_it(by: str) -> None:
    """Where a batch is more than one write, as in Cassandra."""
    memory = MemoryStorage(atomicity=Atomicity.PARTITION)
    weather = FaultyStorage(memory)
    rows = transactional(ORDER_HISTORY.schema)
    view = await started(weather)
    fault = weather.fail(Kind.UNAVAILABLE, writes_to(rows), nth=2)  # the first prepares, the second commits

    async def states() -> list[object]:
        return [row["tx_state"] async for page in memory.pages(ScanAll(rows)) for row in page]

    (applied,) = await view.apply([batch(message(placed(), offset=7))])
    assert applied.written == 1
    await until(lambda: fault.seen >= 2)
    if by == "its successor":
        await view.stop()
        assert await states() == [TransactionState.PREPARED]
        view = await started(weather)

    async def at_rest() -> bool:
        return await states() == [TransactionState.COMMITTED] and not await IntentLog(memory).all()

    await until(at_rest)
    await view.stop()


async def test_a_paused_view_decides_nothing_and_applies_at_the_end_of_the_pause_what_came_meanwhile() -> None:
    """A backup's copy must not meet its decisions, where a batch is more than one write."""
    storage = MemoryStorage(atomicity=Atomicity.PARTITION)
    view = await started(storage)
    states = CoordinatorStates(storage, ManualClock()).table

    async def decided() -> int:
        return sum([len(page) async for page in storage.pages(ScanAll(states))])

    await view.apply([batch(message(placed(), offset=7))])
    before = await decided()
    assert before
    assert await view.pause([PauseRequest("backup", 60.0, 10.0)]) == [True]

    applying = asyncio.ensure_future(view.apply([batch(message(shipped(), offset=8, version=2))]))
    await asyncio.sleep(0.1)  # many turns of the loop: in memory an unpaused batch needs no time
    assert not applying.done()
    assert await decided() == before
    assert (await view.health([None]))[0].actor == "views-0"

    assert await view.renew_pause([PauseRenewal("backup", 60.0)]) == [True]
    assert await view.resume(["backup"]) == [True]
    (applied,) = await applying
    assert applied.written == 1
    assert await decided() > before
    await view.stop()


async def test_another_log_is_read_from_its_own_offsets(storage: Storage, actor: ViewActor) -> None:
    await actor.apply([batch(message(placed(), offset=9))])

    await actor.apply([batch(message(placed("order-2"), offset=0), log_identity="cluster-2")])

    (position,) = await positions(storage)
    assert (position.log_identity, position.next_offset) == ("cluster-2", 1)
    assert {row.order_id for row in await order_history(storage, "customer-1")} == {"order-1", "order-2"}


async def test_another_log_does_not_turn_rows_back(storage: Storage, actor: ViewActor) -> None:
    await actor.apply([batch(message(shipped(), offset=9, version=2))])

    await actor.apply([batch(message(placed(), offset=0, version=1), log_identity="cluster-2")])

    assert (await only_row(storage)).status == "shipped"


async def test_an_event_nobody_can_read_is_passed_over(storage: Storage, actor: ViewActor) -> None:
    broken = RawMessage("orders.events", 0, 0, 0, b"customer-1", (), b"\x80")

    (applied,) = await actor.apply([batch(broken, message(placed(), offset=1))])

    assert (applied.written, applied.unreadable, applied.next_offset) == (1, 1, 2)


async def test_an_event_without_an_order_moves_only_the_position(storage: Storage, actor: ViewActor) -> None:
    (applied,) = await actor.apply([batch(message(goods_returned(), offset=0))])

    assert (applied.written, applied.skipped, applied.next_offset) == (0, 1, 1)
    assert await order_history(storage, "customer-1") == []


async def test_partitions_have_positions_of_their_own(storage: Storage, actor: ViewActor) -> None:
    await actor.apply(
        [
            batch(message(placed(), offset=4)),
            batch(message(placed("order-2", "customer-2"), offset=8, partition=1)),
        ]
    )

    assert {(one.partition, one.next_offset) for one in await positions(storage)} == {(0, 5), (1, 9)}


async def test_a_history_is_newest_first(storage: Storage, actor: ViewActor) -> None:
    await actor.apply([batch(*(message(placed(f"order-{n}", created_at_ms=1_000 + n), offset=n) for n in (0, 1, 2)))])

    assert [row.order_id for row in await order_history(storage, "customer-1")] == ["order-2", "order-1", "order-0"]


# --- Rebuilding


def record(order_id: str, **changes: object) -> Order:
    told = summary(order_id)
    order = Order(
        customer_id=told.customer_id,
        order_id=told.order_id,
        lines=(OrderLine(category="851", product_id="85123A", quantity=5, unit_price=250),),
        total=told.total,
        currency=told.currency,
        payment_method=told.payment_method,
        shipping_address=Address(region=told.region),
        status=told.status,
        steps={},
        payment_id="payment-1",
        shipment_id="shipment-1",
        tracking_number=told.tracking_number,
        carrier=told.carrier,
        estimated_delivery_at_ms=told.estimated_delivery_at_ms,
        returned=(),
        created_at_ms=told.created_at_ms,
        updated_at_ms=told.updated_at_ms,
        content_digest="",
    )
    return order.with_(**changes)


async def store(storage: Storage, *records: Order) -> None:
    """Write orders as transactions do; each write makes the record's version one higher."""
    manager = TransactionManager(storage, ManualClock())
    await manager.create_coordinator_tables()
    await manager.create_table(ORDERS.schema)
    for order in records:
        key = ORDERS.storage_key(ORDERS.key_of(order), buckets=BUCKETS)
        await manager.run(lambda tx, k=key, o=order: tx.upsert(ORDERS.schema, k, ORDERS.to_columns(o)))
    await manager.close()


async def insert_at_once(storage: Storage, records: list[Order]) -> None:
    manager = TransactionManager(storage, ManualClock())

    async def insert(transaction: Transaction) -> None:
        for order in records:
            key = ORDERS.storage_key(ORDERS.key_of(order), buckets=BUCKETS)
            await transaction.insert(ORDERS.schema, key, ORDERS.to_columns(order))

    await manager.run(insert)
    await manager.close()


async def test_a_rebuild_makes_the_view_from_the_tables(storage: Storage) -> None:
    await store(storage, record("order-1"), record("order-1", status=OrderStatus.SHIPPED), record("order-2"))

    rebuilt = await rebuild_order_history(storage, buckets=BUCKETS)

    assert rebuilt == Rebuilt(orders=2, written=2, removed=0)
    rows = {row.order_id: row for row in await order_history(storage, "customer-1")}
    assert (rows["order-1"].status, rows["order-1"].record_version) == ("shipped", 2)
    assert (rows["order-2"].status, rows["order-2"].record_version) == ("placed", 1)


async def test_a_rebuilt_view_equals_the_one_that_events_made(storage: Storage, actor: ViewActor) -> None:
    await actor.apply([batch(message(placed("order-1"), offset=0), message(placed("order-2"), offset=1))])
    by_events = await order_history(storage, "customer-1")
    await store(storage, record("order-1"), record("order-2"))

    rebuilt = await rebuild_order_history(storage, buckets=BUCKETS)

    assert (rebuilt.written, rebuilt.removed) == (0, 0)
    assert await order_history(storage, "customer-1") == by_events


async def test_a_rebuild_removes_rows_without_an_order(storage: Storage, actor: ViewActor) -> None:
    await actor.apply([batch(message(placed("order-1"), offset=0), message(placed("order-9"), offset=1))])
    await store(storage, record("order-1"))

    rebuilt = await rebuild_order_history(storage, buckets=BUCKETS)

    assert rebuilt.removed == 1
    assert [row.order_id for row in await order_history(storage, "customer-1")] == ["order-1"]


async def test_a_rebuild_corrects_a_row_that_claims_a_version_the_table_never_had(
    storage: Storage, actor: ViewActor
) -> None:
    await actor.apply([batch(message(shipped(), offset=0, version=7))])
    await store(storage, record("order-1"))

    await rebuild_order_history(storage, buckets=BUCKETS)

    row = await only_row(storage)
    assert (row.status, row.record_version) == ("placed", 1)


async def test_a_rebuild_reads_on_where_a_page_ends(storage: Storage) -> None:
    await store(storage, record("order-0"))
    await insert_at_once(storage, [record(f"order-{n}") for n in range(1, 450)])

    rebuilt = await rebuild_order_history(storage, buckets=BUCKETS)

    assert (rebuilt.orders, rebuilt.written) == (450, 450)
    assert len(await order_history(storage, "customer-1")) == 450
    assert len({row.order_id for row in await order_history(storage, "customer-1")}) == 450


async def test_rows_of_one_customer_are_spread_over_the_slices(storage: Storage, actor: ViewActor) -> None:
    await actor.apply([batch(*(message(placed(f"order-{n}"), offset=n) for n in range(40)))])

    partitions = ORDER_HISTORY.partitions_of("customer-1", buckets=VIEW_BUCKETS)
    assert len(partitions) == 4
    assert len(await order_history(storage, "customer-1")) == 40
