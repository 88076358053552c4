"""Scenarios 39 to 46: transactions in each other's way, one step at a time, and many at random."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable

import pytest
from faults import FaultyStorage, following, reads_of, writes_to
from protocol_world import ACCOUNT, STOCK, World, key, row, whole

from infra.consensus_commit.errors import (
    PreparationConflictError,
    TransactionConflictError,
    ValidationConflictError,
)
from infra.consensus_commit.metadata import transactional
from infra.consensus_commit.states import Isolation
from infra.consensus_commit.transaction import Transaction
from infra.storage.operations import Bound, ColumnCondition, IfExists, Operator, Row, Scan

each_isolation = pytest.mark.parametrize("isolation", list(Isolation))


async def race(*transactions: Transaction) -> list[Transaction]:
    """Those that committed, of transactions committing at once."""
    results = await asyncio.gather(*(each.commit() for each in transactions), return_exceptions=True)
    for result in results:
        assert result is None or isinstance(result, TransactionConflictError), result
    return [each for each, result in zip(transactions, results, strict=True) if result is None]


@each_isolation
@pytest.mark.parametrize("read_first", [True, False])
async def test_scenario_39_of_two_writers_of_one_record_one_commits(
    world: World, isolation: Isolation, read_first: bool
) -> None:
    await world.given({1: 10})
    one, other = world.begin(isolation), world.begin(isolation)
    for number, transaction in enumerate((one, other)):
        if read_first:
            await transaction.get(ACCOUNT, key(1))
        await transaction.update(ACCOUNT, key(1), {"balance": 100 + number})

    committed = await race(one, other)

    assert len(committed) == 1
    assert await world.balances() == {("account", 1, 1): 100 if committed == [one] else 101}


@each_isolation
async def test_scenario_40_of_two_inserters_of_one_key_one_commits(world: World, isolation: Isolation) -> None:
    one, other = world.begin(isolation), world.begin(isolation)
    await one.insert(ACCOUNT, key(1), {"balance": 100})
    await other.insert(ACCOUNT, key(1), {"balance": 101})

    committed = await race(one, other)

    assert len(committed) == 1
    assert await world.balances() == {("account", 1, 1): 100 if committed == [one] else 101}


@each_isolation
async def test_scenario_41_of_a_delete_and_an_update_one_commits(world: World, isolation: Isolation) -> None:
    await world.given({1: 10})
    deleting, updating = world.begin(isolation), world.begin(isolation)
    await updating.update(ACCOUNT, key(1), {"balance": 11})
    await deleting.get(ACCOUNT, key(1))
    await deleting.delete(ACCOUNT, key(1))

    committed = await race(deleting, updating)

    assert len(committed) == 1
    assert await world.balances() == ({} if committed == [deleting] else {("account", 1, 1): 11})


async def test_scenario_41_a_record_that_was_deleted_and_inserted_again_is_another_record(world: World) -> None:
    """Both have version 1: the versions would not tell (ABA), the transaction ids do."""
    await world.given({1: 10})
    transaction = world.begin(Isolation.SNAPSHOT)
    await transaction.update(ACCOUNT, key(1), {"balance": 11})
    await world.commits(lambda other: other.delete(ACCOUNT, key(1)))
    await world.given({1: 10})

    with pytest.raises(PreparationConflictError):
        await transaction.commit()


@each_isolation
async def test_scenario_42_writers_of_different_records_both_commit(world: World, isolation: Isolation) -> None:
    await world.given({1: 10, 2: 20})
    one, other = world.begin(isolation), world.begin(isolation)
    await one.update(ACCOUNT, key(1), {"balance": 11})
    await other.update(ACCOUNT, key(2), {"balance": 21})

    assert len(await race(one, other)) == 2
    assert list((await world.balances()).values()) == [11, 21]


async def reading_existing(transaction: Transaction, number: int) -> None:
    await transaction.get_many(ACCOUNT, [key(1), key(2)])
    await transaction.update(ACCOUNT, key(number), {"balance": 0})


async def reading_absent(transaction: Transaction, number: int) -> None:
    await transaction.get_many(ACCOUNT, [key(11), key(12)])
    await transaction.insert(ACCOUNT, key(10 + number), {"balance": 0})


async def scanning(transaction: Transaction, number: int) -> None:
    await transaction.scan(Scan(ACCOUNT, (1,), where=(ColumnCondition("balance", Operator.EQ, 0),)))
    await transaction.insert(ACCOUNT, key(10 + number), {"balance": 0})


@pytest.mark.parametrize("skew", [reading_existing, reading_absent, scanning])
@pytest.mark.parametrize("at_once", [True, False])
@each_isolation
async def test_scenario_43_write_skew_is_allowed_unless_serializable(
    world: World, isolation: Isolation, at_once: bool, skew: Callable[[Transaction, int], Awaitable[None]]
) -> None:
    await world.given({1: 10, 2: 20})
    one, other = world.begin(isolation), world.begin(isolation)
    await skew(one, 1)
    await skew(other, 2)

    committed = await race(one, other) if at_once else await race(one) + await race(other)

    if isolation is not Isolation.SERIALIZABLE:
        assert len(committed) == 2
    else:
        assert len(committed) <= 1
        assert at_once or committed == [one]


async def test_scenario_44_a_scanned_record_that_another_has_changed_is_refused(world: World) -> None:
    await world.given({1: 10, 2: 20})
    transaction = world.begin()
    await transaction.scan(whole())
    await transaction.insert(STOCK, key(1), {"balance": 1})
    await world.commits(lambda other: other.update(ACCOUNT, key(2), {"balance": 21}))

    with pytest.raises(ValidationConflictError):
        await transaction.commit()


async def test_scenario_44_a_scanned_record_that_another_has_prepared_is_refused(world: World) -> None:
    await world.given({1: 10, 2: 20})
    transaction = world.begin()
    await transaction.scan(whole())
    await transaction.insert(STOCK, key(1), {"balance": 1})
    await world.orphan(lambda other: other.update(ACCOUNT, key(2), {"balance": 21}))

    with pytest.raises(ValidationConflictError):
        await transaction.commit()


async def test_scenario_44_a_read_record_that_another_has_prepared_is_refused(world: World) -> None:
    await world.given({1: 10, 2: 20})
    transaction = world.begin()
    await transaction.get(ACCOUNT, key(2))
    await transaction.insert(STOCK, key(1), {"balance": 1})
    await world.orphan(lambda other: other.update(ACCOUNT, key(2), {"balance": 21}))

    with pytest.raises(ValidationConflictError):
        await transaction.commit()


async def test_scenario_44_a_scanned_record_that_another_has_deleted_is_refused(world: World) -> None:
    await world.given({1: 10, 2: 20})
    transaction = world.begin()
    await transaction.scan(whole())
    await transaction.insert(STOCK, key(1), {"balance": 1})
    await world.commits(lambda other: other.delete(ACCOUNT, key(2)))

    with pytest.raises(ValidationConflictError):
        await transaction.commit()


async def test_scenario_44_a_scanned_record_that_no_longer_matches_is_refused(world: World) -> None:
    await world.given({1: 10, 2: 20})
    transaction = world.begin()
    await transaction.scan(Scan(ACCOUNT, (1,), where=(ColumnCondition("balance", Operator.GE, 20),)))
    await transaction.insert(STOCK, key(1), {"balance": 1})
    await world.commits(lambda other: other.update(ACCOUNT, key(2), {"balance": 19}))

    with pytest.raises(ValidationConflictError):
        await transaction.commit()


async def test_scenario_44_a_record_that_matches_neither_before_nor_after_disturbs_nobody(world: World) -> None:
    await world.given({1: 10, 2: 20})
    transaction = world.begin()
    await transaction.scan(Scan(ACCOUNT, (1,), where=(ColumnCondition("balance", Operator.GE, 20),)))
    await transaction.insert(STOCK, key(1), {"balance": 1})
    await world.commits(lambda other: other.update(ACCOUNT, key(1), {"balance": 11}))

    await transaction.commit()


async def test_scenario_44_a_record_that_came_to_match_is_seen_though_another_is_changing_it_again(
    world: World,
) -> None:
    """Whether the last change holds is undecided, so its old values may be those that a reader must have seen.

    Otherwise: the record came to match together with record 2, whose new value was read; then this transaction is
    after the change by the one, and before it by the other.
    """
    await world.given({1: 10, 2: 20})
    transaction = world.begin()
    assert await transaction.scan(Scan(ACCOUNT, (1,), where=(ColumnCondition("balance", Operator.EQ, 77),))) == []

    async def change_both(other: Transaction) -> None:
        await other.update(ACCOUNT, key(1), {"balance": 77})
        await other.update(ACCOUNT, key(2), {"balance": 21})

    await world.commits(change_both)
    assert await transaction.get(ACCOUNT, key(2)) == row(2, 21)
    await transaction.insert(STOCK, key(1), {"balance": 1})
    await world.orphan(lambda other: other.update(ACCOUNT, key(1), {"balance": 10}))

    with pytest.raises(ValidationConflictError):
        await transaction.commit()


@pytest.mark.parametrize("read_first", [True, False])
async def test_scenario_44_a_record_that_came_to_match_is_not_hidden_by_the_transactions_own_write(
    world: World, read_first: bool
) -> None:
    """A scan that found nothing, and a write of what it would find now, are not one moment's view."""
    await world.given({1: 10})
    transaction = world.begin()
    assert await transaction.scan(Scan(ACCOUNT, (1,), where=(ColumnCondition("balance", Operator.EQ, 77),))) == []
    await world.commits(lambda other: other.update(ACCOUNT, key(1), {"balance": 77}))
    if read_first:
        await transaction.get(ACCOUNT, key(1))
    await transaction.upsert(ACCOUNT, key(1), {"balance": 78})

    with pytest.raises(ValidationConflictError):
        await transaction.commit()

    assert await world.balances() == {("account", 1, 1): 77}


@pytest.mark.parametrize("scans", [False, True], ids=["get", "scan"])
async def test_scenario_44_an_absence_that_was_over_for_a_while_is_not_taken_for_one_that_lasted(
    world: World, scans: bool
) -> None:
    """A record inserted and deleted again is as absent as before: nothing in it tells that time has passed.

    Another transaction inserts 5 and changes 2, whose new value is read: this one comes after it. A third deletes 5
    and changes 1, whose old value was read: this one comes before it. In between, 5 was there. That only shows if
    absences are looked at before what is there.
    """
    await world.given({1: 10, 2: 20})
    transaction = world.begin()
    if scans:
        assert len(await transaction.scan(Scan(ACCOUNT, (1,), end=Bound((1,))))) == 1
    else:
        await transaction.get(ACCOUNT, key(1))
    assert await transaction.get(ACCOUNT, key(5)) is None

    async def insert(other: Transaction) -> None:
        await other.insert(ACCOUNT, key(5), {"balance": 50})
        await other.update(ACCOUNT, key(2), {"balance": 21})

    async def delete(other: Transaction) -> None:
        await other.delete(ACCOUNT, key(5))
        await other.update(ACCOUNT, key(1), {"balance": 11})

    await world.commits(insert)
    assert await transaction.get(ACCOUNT, key(2)) == row(2, 21)
    await transaction.insert(STOCK, key(1), {"balance": 1})
    looks = following(writes_to(transactional(STOCK)), reads_of(transactional(ACCOUNT)))
    looked = itertools.count()
    world.storage.visit_before(lambda call: looks(call) and next(looked) == 1, lambda: world.commits(delete))

    with pytest.raises(ValidationConflictError):
        await transaction.commit()


async def test_scenario_44_scanned_records_that_the_transaction_itself_has_changed_are_fine(world: World) -> None:
    await world.given({1: 10, 2: 20, 3: 30})
    transaction = world.begin()
    await transaction.scan(whole())
    await transaction.update(ACCOUNT, key(1), {"balance": 11})
    await transaction.delete(ACCOUNT, key(2))
    await transaction.insert(ACCOUNT, key(4), {"balance": 40})

    await transaction.commit()

    assert list((await world.balances()).values()) == [11, 30, 40]


async def test_scenario_45_a_phantom_inside_the_limit_is_refused(world: World) -> None:
    await world.given({1: 10, 3: 30})
    transaction = world.begin()
    assert len(await transaction.scan(Scan(ACCOUNT, (1,), limit=2))) == 2
    await transaction.insert(STOCK, key(1), {"balance": 1})
    await world.given({2: 20})

    with pytest.raises(ValidationConflictError):
        await transaction.commit()


async def test_scenario_45_a_phantom_within_an_unfilled_limit_is_refused(world: World) -> None:
    await world.given({1: 10})
    transaction = world.begin()
    assert len(await transaction.scan(Scan(ACCOUNT, (1,), limit=2))) == 1
    await transaction.insert(STOCK, key(1), {"balance": 1})
    await world.given({2: 20})

    with pytest.raises(ValidationConflictError):
        await transaction.commit()


async def test_scenario_45_a_phantom_beyond_the_limit_is_fine(world: World) -> None:
    await world.given({1: 10, 2: 20})
    transaction = world.begin()
    await transaction.scan(Scan(ACCOUNT, (1,), limit=2))
    await transaction.insert(STOCK, key(1), {"balance": 1})
    await world.given({3: 30})

    await transaction.commit()


async def test_scenario_45_a_phantom_beyond_what_a_scanner_returned_is_fine(world: World) -> None:
    await world.given({1: 10, 3: 30})
    transaction = world.begin()
    async with transaction.scanner(whole()) as scanner:
        assert await scanner.one() == row(1, 10)
    await transaction.insert(STOCK, key(1), {"balance": 1})
    await world.given({2: 20})

    await transaction.commit()


async def test_scenario_45_a_phantom_before_what_a_scanner_returned_is_refused(world: World) -> None:
    await world.given({1: 10, 3: 30})
    transaction = world.begin()
    async with transaction.scanner(whole()) as scanner:
        assert await scanner.one() == row(1, 10)
        assert await scanner.one() == row(3, 30)
    await transaction.insert(STOCK, key(1), {"balance": 1})
    await world.given({2: 20})

    with pytest.raises(ValidationConflictError):
        await transaction.commit()


async def test_scenario_45_a_scanner_read_to_its_end_has_seen_that_nothing_follows(world: World) -> None:
    await world.given({1: 10})
    transaction = world.begin()
    async with transaction.scanner(whole()) as scanner:
        assert [record async for record in scanner] == [row(1, 10)]
    await transaction.insert(STOCK, key(1), {"balance": 1})
    await world.given({2: 20})

    with pytest.raises(ValidationConflictError):
        await transaction.commit()


async def test_scenario_45_own_inserts_do_not_count_towards_a_validated_limit(world: World) -> None:
    await world.given({2: 20, 3: 30, 4: 40})
    transaction = world.begin()
    await transaction.scan(Scan(ACCOUNT, (1,), limit=2))
    await transaction.insert(ACCOUNT, key(1), {"balance": 10})
    await transaction.delete(ACCOUNT, key(2))

    await transaction.commit()

    assert list((await world.balances()).values()) == [10, 30, 40]


async def by_get(transaction: Transaction) -> object:
    held = await transaction.get(ACCOUNT, key(1))
    return held and held["balance"]


async def by_scan(transaction: Transaction) -> object:
    return (await transaction.scan(whole()))[0]["balance"]


async def by_scanner(transaction: Transaction) -> object:
    async with transaction.scanner(whole()) as scanner:
        (record,) = [record async for record in scanner]
    return record["balance"]


async def by_update(transaction: Transaction) -> None:
    await transaction.update(ACCOUNT, key(1), {"balance": 11})


async def by_upsert(transaction: Transaction) -> None:
    await transaction.upsert(ACCOUNT, key(1), {"balance": 11})


async def by_conditional_put(transaction: Transaction) -> None:
    await transaction.put(ACCOUNT, key(1), {"balance": 11}, IfExists())


@each_isolation
@pytest.mark.parametrize("write", [by_update, by_upsert, by_conditional_put])
@pytest.mark.parametrize("read", [by_get, by_scan, by_scanner])
async def test_scenario_46_an_update_of_what_was_read_is_not_lost(
    world: World,
    isolation: Isolation,
    read: Callable[[Transaction], Awaitable[object]],
    write: Callable[[Transaction], Awaitable[None]],
) -> None:
    """Under READ_COMMITTED, too: the write is conditional on what it was worked out from, not on what is there now."""
    await world.given({1: 10})
    transaction = world.begin(isolation)
    assert await read(transaction) == 10
    await world.commits(lambda other: other.update(ACCOUNT, key(1), {"balance": 100}))
    await write(transaction)

    with pytest.raises(PreparationConflictError):
        await transaction.commit()

    assert await world.balances() == {("account", 1, 1): 100}


@pytest.mark.parametrize("read", [by_get, by_scan, by_scanner])
async def test_scenario_46_a_write_under_read_committed_follows_the_latest_read(
    world: World, read: Callable[[Transaction], Awaitable[object]]
) -> None:
    await world.given({1: 10})
    transaction = world.begin(Isolation.READ_COMMITTED)
    assert await by_get(transaction) == 10
    await world.commits(lambda other: other.update(ACCOUNT, key(1), {"balance": 100}))
    assert await read(transaction) == 100

    await transaction.update(ACCOUNT, key(1), {"balance": 101})
    await transaction.commit()

    assert await world.balances() == {("account", 1, 1): 101}


async def test_scenario_46_a_get_of_what_was_written_does_not_move_the_write_to_a_later_version(world: World) -> None:
    await world.given({1: 10})
    transaction = world.begin(Isolation.READ_COMMITTED)
    assert await by_get(transaction) == 10
    await transaction.update(ACCOUNT, key(1), {"balance": 11})
    await world.commits(lambda other: other.update(ACCOUNT, key(1), {"balance": 100}))
    assert await by_get(transaction) == 11

    with pytest.raises(PreparationConflictError):
        await transaction.commit()


async def test_scenario_46_under_read_committed_a_write_of_what_was_not_read_replaces_what_is_there(
    world: World,
) -> None:
    """What is allowed: nobody has read what is lost."""
    await world.given({1: 10})
    transaction = world.begin(Isolation.READ_COMMITTED)
    await world.commits(lambda other: other.update(ACCOUNT, key(1), {"balance": 100}))
    await transaction.update(ACCOUNT, key(1), {"balance": 11})

    await transaction.commit()

    assert await world.balances() == {("account", 1, 1): 11}


ACCOUNTS = 10
BALANCE = 10_000


@each_isolation
@pytest.mark.parametrize("one_phase_commit", [False, True])
@pytest.mark.parametrize("partitions", [1, ACCOUNTS])
async def test_scenario_46_random_transfers_keep_the_sum_and_count_every_commit_in_the_versions(
    world: World, isolation: Isolation, one_phase_commit: bool, partitions: int
) -> None:
    """The version sum catches lost and doubled commits alike: `sum(tx_version) = accounts + 2 × commits`."""
    dice = random.Random(f"{isolation} {one_phase_commit} {partitions}")
    keys = [key(number, partition=number % partitions) for number in range(ACCOUNTS)]
    for partition in range(partitions):
        held = {number: BALANCE for number in range(ACCOUNTS) if number % partitions == partition}
        await world.given(held, partition=partition)
    process = world.process(FaultyStorage(world.plain_storage, randomness=dice), one_phase_commit=one_phase_commit)
    commits = conflicts = 0

    async def transfer_now_and_then() -> None:
        nonlocal commits, conflicts
        for _ in range(12):
            source, target = dice.sample(keys, 2)
            amount = dice.randrange(1, 100)
            transaction = process.begin(isolation)
            try:
                held = await transaction.get(ACCOUNT, source)
                await asyncio.sleep(0)
                owed = await transaction.get(ACCOUNT, target)
                assert held is not None
                assert owed is not None
                await transaction.update(ACCOUNT, source, {"balance": held["balance"] - amount})  # type: ignore[operator]
                await transaction.update(ACCOUNT, target, {"balance": owed["balance"] + amount})  # type: ignore[operator]
                await transaction.commit()
                commits += 1
            except TransactionConflictError:
                conflicts += 1

    await asyncio.gather(*(transfer_now_and_then() for _ in range(5)))
    await process.recovery.drain()

    rows: list[Row] = await world.everything()
    assert sum(record["balance"] for record in rows) == ACCOUNTS * BALANCE  # type: ignore[misc]
    assert sum(record["tx_version"] for record in rows) == ACCOUNTS + 2 * commits  # type: ignore[misc]
    assert commits >= 20, f"hardly anything committed ({conflicts} conflicts): the test has shown nothing"
    assert conflicts > 0, "nobody was in anybody's way: the test has shown nothing"
