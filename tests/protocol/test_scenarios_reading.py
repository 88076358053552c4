"""Scenarios 1 to 6: what a transaction reads when nobody leaves records in doubt."""

from __future__ import annotations

import asyncio

import pytest
from protocol_world import ABORTED, ACCOUNT, COMMITTED, World, key, row, whole

from infra.consensus_commit.errors import IllegalOperationError, UncommittedRecordError, ValidationConflictError
from infra.consensus_commit.states import Isolation, TransactionState
from infra.consensus_commit.transaction import Transaction
from infra.storage.operations import Bound, ColumnCondition, Operator, Row, Scan, ScanAll, Selection

EVERY_SCAN = {
    "whole": whole(),
    "range": Scan(ACCOUNT, (1,), Bound((2,)), Bound((4,), inclusive=False)),
    "reversed": Scan(ACCOUNT, (1,), reverse=True),
    "limited": Scan(ACCOUNT, (1,), limit=2),
    "reversed and limited": Scan(ACCOUNT, (1,), limit=3, reverse=True),
    "conditional": Scan(ACCOUNT, (1,), where=(ColumnCondition("balance", Operator.GT, 25),)),
    "conditional and limited": Scan(ACCOUNT, (1,), where=(ColumnCondition("balance", Operator.GT, 15),), limit=1),
    "empty": Scan(ACCOUNT, (9,)),
}


async def test_scenario_01_a_committed_record_is_read_with_its_values(world: World) -> None:
    await world.given({1: 10})

    assert await world.begin().get(ACCOUNT, key(1)) == row(1, 10)


async def test_scenario_02_an_absent_record_is_read_as_none(world: World) -> None:
    assert await world.begin().get(ACCOUNT, key(1)) is None


@pytest.mark.parametrize("isolation", list(Isolation))
async def test_scenario_03_a_repeated_get_sees_anothers_commit_under_read_committed_only(
    world: World, isolation: Isolation
) -> None:
    await world.given({1: 10})
    transaction = world.begin(isolation)
    assert await transaction.get(ACCOUNT, key(1)) == row(1, 10)

    await world.commits(lambda other: other.update(ACCOUNT, key(1), {"balance": 11}))

    afresh = isolation is Isolation.READ_COMMITTED
    assert await transaction.get(ACCOUNT, key(1)) == row(1, 11 if afresh else 10)
    assert await transaction.get_many(ACCOUNT, [key(1)]) == [row(1, 11 if afresh else 10)]
    await ends(transaction)


async def ends(transaction: Transaction) -> None:
    """Commits, or is refused under SERIALIZABLE, for what was read has changed."""
    if transaction.isolation is Isolation.SERIALIZABLE:
        with pytest.raises(ValidationConflictError):
            await transaction.commit()
    else:
        await transaction.commit()


async def test_scenario_03_an_absence_once_read_stays_absent(world: World) -> None:
    transaction = world.begin(Isolation.SNAPSHOT)
    assert await transaction.get(ACCOUNT, key(1)) is None

    await world.given({1: 10})

    assert await transaction.get(ACCOUNT, key(1)) is None


async def test_scenario_03_of_two_gets_at_once_the_first_to_be_answered_counts_for_both(world: World) -> None:
    await world.given({1: 10})
    transaction = world.begin(Isolation.SNAPSHOT)

    other_is_answered = asyncio.Event()

    async def be_overtaken() -> None:
        await other_is_answered.wait()
        await world.commits(lambda other: other.update(ACCOUNT, key(1), {"balance": 11}))

    async def other_get() -> Row | None:
        found = await transaction.get(ACCOUNT, key(1))
        other_is_answered.set()
        return found

    world.storage.visit_before(lambda call: call.method == "get", be_overtaken)

    found = await asyncio.gather(transaction.get(ACCOUNT, key(1)), other_get())

    assert found == [row(1, 10), row(1, 10)]


@pytest.mark.parametrize("isolation", list(Isolation))
@pytest.mark.parametrize("scan", [whole(), ScanAll(ACCOUNT)], ids=["partition", "all"])
async def test_scenario_04_a_repeated_scan_sees_anothers_insert_under_read_committed_only(
    world: World, isolation: Isolation, scan: Selection
) -> None:
    await world.given({1: 10})
    transaction = world.begin(isolation)
    assert await transaction.scan(scan) == [row(1, 10)]

    await world.given({2: 20})

    afresh = isolation is Isolation.READ_COMMITTED
    assert await transaction.scan(scan) == ([row(1, 10), row(2, 20)] if afresh else [row(1, 10)])
    async with transaction.scanner(scan) as scanner:
        assert len([record async for record in scanner]) == (2 if afresh else 1)
    await ends(transaction)


@pytest.mark.parametrize("isolation", list(Isolation))
async def test_scenario_04_a_scan_after_the_same_scanner_sees_anothers_insert_under_read_committed_only(
    world: World, isolation: Isolation
) -> None:
    await world.given({1: 10})
    transaction = world.begin(isolation)
    async with transaction.scanner(whole()) as scanner:
        assert [record async for record in scanner] == [row(1, 10)]

    await world.given({2: 20})

    assert len(await transaction.scan(whole())) == (2 if isolation is Isolation.READ_COMMITTED else 1)
    await ends(transaction)


@pytest.mark.parametrize("scan", EVERY_SCAN.values(), ids=EVERY_SCAN.keys())
async def test_scenario_05_a_scanner_returns_what_a_scan_returns(world: World, scan: Scan) -> None:
    await world.given({number: number * 10 for number in range(1, 6)})
    scanned = await world.begin().scan(scan)
    transaction = world.begin()

    async with transaction.scanner(scan) as scanner:
        returned = [record async for record in scanner]

    assert returned == scanned
    assert await transaction.scan(scan) == scanned, "what a scanner has read to its end answers the scan too"
    await transaction.commit()


async def test_scenario_05_scans_return_what_their_bounds_conditions_and_limits_say(world: World) -> None:
    await world.given({number: number * 10 for number in range(1, 6)})

    found = {name: [record["id"] for record in await world.begin().scan(scan)] for name, scan in EVERY_SCAN.items()}

    assert found == {
        "whole": [1, 2, 3, 4, 5],
        "range": [2, 3],
        "reversed": [5, 4, 3, 2, 1],
        "limited": [1, 2],
        "reversed and limited": [5, 4, 3],
        "conditional": [3, 4, 5],
        "conditional and limited": [2],
        "empty": [],
    }


async def test_scenario_05_a_limit_counts_records_that_are_there(world: World) -> None:
    """The stored rows before the limit may be inserts of aborted transactions: further rows take their place."""
    await world.given({2: 20, 4: 40})
    await world.orphan(lambda dead: dead.insert(ACCOUNT, key(1), {"balance": 10}))
    await world.orphan(lambda dead: dead.insert(ACCOUNT, key(3), {"balance": 30}))
    world.expire()

    assert await world.begin().scan(Scan(ACCOUNT, (1,), limit=2)) == [row(2, 20), row(4, 40)]


@pytest.mark.parametrize(("decided", "expected"), [(ABORTED, [row(2, 60)]), (COMMITTED, [row(1, 99)])])
async def test_scenario_05_a_condition_is_asked_of_the_image_that_counts(
    world: World, decided: TransactionState, expected: list[Row]
) -> None:
    """Of a PREPARED record neither image may be filtered by the storage: only the state row says which counts."""
    await world.given({1: 10, 2: 60})

    async def swap(dead: Transaction) -> None:
        await dead.update(ACCOUNT, key(1), {"balance": 99})
        await dead.update(ACCOUNT, key(2), {"balance": 5})

    await world.orphan(swap, decided)

    scan = Scan(ACCOUNT, (1,), where=(ColumnCondition("balance", Operator.GE, 50),))
    assert await world.begin().scan(scan) == expected


async def test_scenario_05_a_record_that_a_scanner_returned_is_what_a_write_is_conditional_on(world: World) -> None:
    """Lost update otherwise: the write is computed from what the scanner returned, not from what is stored by then."""
    await world.given({1: 10})
    transaction = world.begin(Isolation.SNAPSHOT)
    async with transaction.scanner(whole()) as scanner:
        seen = await scanner.one()
        assert seen is not None
        await world.commits(lambda other: other.update(ACCOUNT, key(1), {"balance": 15}))
    await transaction.update(ACCOUNT, key(1), {"balance": seen["balance"] + 1})  # type: ignore[operator]

    with pytest.raises(Exception, match="not as it was read"):
        await transaction.commit()
    assert await world.balances() == {("account", 1, 1): 15}


async def test_scenario_05_a_scanner_that_has_failed_is_not_taken_for_one_that_has_seen_everything(
    world: World,
) -> None:
    await world.given({1: 10, 2: 20, 3: 30})
    await world.orphan(lambda dead: dead.update(ACCOUNT, key(2), {"balance": 21}))
    transaction = world.begin(Isolation.SNAPSHOT)
    async with transaction.scanner(whole()) as scanner:
        assert await scanner.one() == row(1, 10)
        with pytest.raises(UncommittedRecordError):
            await scanner.one()
        with pytest.raises(IllegalOperationError, match="failed"):
            await scanner.one()
    world.expire()

    assert await transaction.scan(whole()) == [row(1, 10), row(2, 20), row(3, 30)]


async def test_scenario_06_a_commit_with_an_open_scanner_is_refused(world: World) -> None:
    await world.given({1: 10})
    transaction = world.begin()
    scanner = transaction.scanner(whole())
    await scanner.one()
    await transaction.insert(ACCOUNT, key(2, partition=2), {"balance": 5})

    with pytest.raises(IllegalOperationError, match="scanner"):
        await transaction.commit()

    assert await world.balances() == {("account", 1, 1): 10}
    await scanner.close()
