"""Transactions of one process stand in line for the records at which they have collided."""

from __future__ import annotations

import asyncio

import pytest
from protocol_world import ACCOUNT, World, key

from infra.clock import ManualClock
from infra.consensus_commit.errors import TransactionConflictError
from infra.consensus_commit.hot_records import HotRecords
from infra.consensus_commit.manager import TransactionManager

A, B = ("bank.account", key(1)), ("bank.account", key(2))


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def hot(clock: ManualClock) -> HotRecords:
    """Two records that were in the way a moment ago."""
    made = HotRecords(clock, hot_for_s=10, patience_s=60)
    made.note([A, B])
    return made


async def waits(entering: asyncio.Task[None]) -> bool:
    for _ in range(5):
        await asyncio.sleep(0)
    return not entering.done()


async def test_the_second_waits_until_the_first_is_decided_and_the_third_for_the_second(hot: HotRecords) -> None:
    await hot.enter(A, "first")
    second = asyncio.create_task(hot.enter(A, "second"))
    third = asyncio.create_task(hot.enter(A, "third"))
    assert await waits(second)

    hot.leave("first")
    assert not await waits(second)
    assert await waits(third)
    hot.leave("second")
    await third


async def test_whoever_has_a_place_enters_again_at_once(hot: HotRecords) -> None:
    await hot.enter(A, "first")
    await hot.enter(A, "first")


async def test_records_that_were_in_nobodys_way_have_no_lines(clock: ManualClock) -> None:
    hot = HotRecords(clock)
    await hot.enter(A, "first")
    await hot.enter(A, "second")


async def test_a_record_cools_down(hot: HotRecords, clock: ManualClock) -> None:
    await hot.enter(A, "first")
    clock.advance(10_001)
    await hot.enter(A, "second")
    assert not hot.is_hot(A)


async def test_two_who_would_wait_for_each_other_do_not(hot: HotRecords) -> None:
    await hot.enter(A, "first")
    await hot.enter(B, "second")
    first = asyncio.create_task(hot.enter(B, "first"))
    assert await waits(first)

    await hot.enter(A, "second")

    hot.leave("second")
    await first


async def test_three_who_would_wait_in_a_ring_do_not(hot: HotRecords) -> None:
    c = ("bank.account", key(3))
    hot.note([c])
    for record, holder in ((A, "first"), (B, "second"), (c, "third")):
        await hot.enter(record, holder)
    waiting = [asyncio.create_task(hot.enter(B, "first")), asyncio.create_task(hot.enter(c, "second"))]
    assert await waits(waiting[1])

    await hot.enter(A, "third")

    for holder in ("third", "second", "first"):
        hot.leave(holder)
    await asyncio.gather(*waiting)


async def test_a_holder_that_others_have_waited_for_too_long_loses_its_place(clock: ManualClock) -> None:
    hot = HotRecords(clock, patience_s=0.01)
    hot.note([A])
    await hot.enter(A, "forgotten")

    await hot.enter(A, "second")
    third = asyncio.create_task(hot.enter(A, "third"))
    hot.leave("second")
    await third


async def test_whoever_is_cancelled_in_the_line_leaves_it(hot: HotRecords) -> None:
    await hot.enter(A, "first")
    second = asyncio.create_task(hot.enter(A, "second"))
    third = asyncio.create_task(hot.enter(A, "third"))
    assert await waits(third)

    second.cancel()
    hot.leave("first")
    await third
    assert second.cancelled()


async def test_nothing_is_kept_of_those_who_left(hot: HotRecords) -> None:
    tasks = [asyncio.create_task(hot.enter(A, str(number))) for number in range(20)]
    for number, task in enumerate(tasks):
        await task
        hot.leave(str(number))

    assert not hot._lines
    assert not hot._places


@pytest.mark.parametrize("queue", [True, False])
async def test_increments_of_one_record_stop_colliding_once_they_have(world: World, queue: bool) -> None:
    await world.given({1: 0})
    manager = TransactionManager(world.plain_storage, world.clock, one_phase_commit=False, queue_at_hot_records=queue)
    conflicts = 0

    async def increment() -> None:
        nonlocal conflicts
        while True:
            try:
                async with manager.begin() as transaction:
                    record = await transaction.get(ACCOUNT, key(1))
                    await asyncio.sleep(0)
                    assert record is not None
                    await transaction.update(ACCOUNT, key(1), {"balance": record["balance"] + 1})  # type: ignore[operator]
                    await transaction.commit()
                    return
            except TransactionConflictError:
                conflicts += 1
                await asyncio.sleep(0)

    for _ in range(3):
        await asyncio.gather(*(increment() for _ in range(10)))
    await manager.close()

    stored = await world.stored(1)
    assert stored is not None
    assert (stored["balance"], stored["tx_version"]) == (30, 31)
    # The first round collides before anybody knows.
    assert conflicts <= 15 if queue else conflicts > 30


async def test_a_reader_takes_no_place(world: World) -> None:
    await world.given({1: 0})
    manager = TransactionManager(world.plain_storage, world.clock)
    assert manager._hot_records is not None
    manager._hot_records.note([("bank.account", key(1))])
    writer = manager.begin()
    await writer.get(ACCOUNT, key(1))

    reader = manager.begin(read_only=True)
    assert await asyncio.wait_for(reader.get(ACCOUNT, key(1)), timeout=10) is not None
    await writer.rollback()
