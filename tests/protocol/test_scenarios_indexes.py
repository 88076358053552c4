"""Scenarios 20 to 22, and what else is peculiar to reading by an index or across partitions."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from faults import Call
from protocol_world import ABORTED, ACCOUNT, COMMITTED, INDEXED, STOCK, World, key, row

from infra.consensus_commit.errors import IllegalOperationError, ValidationConflictError
from infra.consensus_commit.metadata import transactional
from infra.consensus_commit.states import Isolation, TransactionState
from infra.consensus_commit.transaction import Transaction
from infra.storage.errors import InvalidOperationError
from infra.storage.memory import MemoryStorage
from infra.storage.operations import (
    ColumnCondition,
    IndexScan,
    Operator,
    Row,
    Scan,
    ScanAll,
    Selection,
    StorageInfo,
)
from infra.storage.port import Storage

STORED = transactional(INDEXED)


def indexed(value: int, **more: Any) -> IndexScan:
    return IndexScan(INDEXED, "balance", value, **more)


def isolation_for(world: World) -> Isolation:
    """The highest isolation at which the world's storage may be read by index."""
    sees_all = world.plain_storage.info_of(INDEXED.namespace).sees_all_indexed
    return Isolation.SERIALIZABLE if sees_all else Isolation.SNAPSHOT


def index_reads(call: Call) -> bool:
    return call.method == "pages"


async def left_behind(world: World, decided: TransactionState) -> None:
    """A record whose balance somebody was about to change from 10 to 99, and died when that was decided."""
    await world.given({1: 10}, table=INDEXED)
    await world.orphan(lambda dead: dead.update(INDEXED, key(1), {"balance": 99}), decided)


async def test_scenario_20_an_index_finds_a_record_by_its_old_value_once_the_new_one_is_rolled_back(
    world: World,
) -> None:
    await left_behind(world, ABORTED)
    await world.given({2: 20}, table=INDEXED)

    assert await world.begin(isolation_for(world)).scan(indexed(10)) == [row(1, 10)]
    await world.settled()
    assert await world.in_doubt() == 0


async def test_scenario_20_an_index_does_not_find_a_record_by_a_value_that_was_rolled_back(world: World) -> None:
    await left_behind(world, ABORTED)

    assert await world.begin(isolation_for(world)).scan(indexed(99)) == []
    assert await world.begin(isolation_for(world)).get_by_index(INDEXED, "balance", 99) is None


async def test_scenario_20_an_index_finds_a_committed_value_though_its_record_still_says_prepared(
    world: World,
) -> None:
    await left_behind(world, COMMITTED)

    assert await world.begin(isolation_for(world)).scan(indexed(10)) == []
    assert await world.begin(isolation_for(world)).scan(indexed(99)) == [row(1, 99)]


@pytest.mark.parametrize("look", [1, 2, 3])
async def test_scenario_20_a_record_that_is_rolled_back_between_two_looks_at_the_indexes_is_not_missed(
    world: World, look: int
) -> None:
    """It is found by the new value before, and by the old one after: a reader that looks at each once finds neither."""
    await left_behind(world, ABORTED)
    looks = itertools.count(1)

    async def somebody_rolls_back() -> None:
        await world.balances([INDEXED])

    world.storage.visit_before(lambda call: index_reads(call) and next(looks) == look, somebody_rolls_back)

    assert await world.begin(isolation_for(world)).scan(indexed(10)) == [row(1, 10)]


async def replace_one_by_two(transaction: Any) -> None:
    await transaction.delete(INDEXED, key(1))
    await transaction.insert(INDEXED, key(2), {"balance": 10})


@pytest.mark.parametrize(
    ("decided", "found"),
    [(None, row(1, 10)), (ABORTED, row(1, 10)), (COMMITTED, row(2, 10))],
    ids=["expired", "aborted", "committed"],
)
async def test_scenario_21_an_index_read_across_a_deletion_and_an_insertion_sees_one_record(
    world: World, decided: TransactionState | None, found: Row
) -> None:
    """Two stored rows have the value, one DELETED and one PREPARED; one of them counts."""
    await world.given({1: 10}, table=INDEXED)
    await world.orphan(replace_one_by_two, decided)
    world.expire()
    assert len([r for r in await world.everything() if r["balance"] == 10]) == 2

    assert await world.begin(isolation_for(world)).scan(indexed(10)) == [found]
    await world.settled()
    assert await world.begin(isolation_for(world)).get_by_index(INDEXED, "balance", 10) == found


async def test_scenario_21_an_index_get_across_a_deletion_and_an_insertion_does_not_take_them_for_two(
    world: World,
) -> None:
    await world.given({1: 10}, table=INDEXED)
    await world.orphan(replace_one_by_two, COMMITTED)

    assert await world.begin(isolation_for(world)).get_by_index(INDEXED, "balance", 10) == row(2, 10)


async def test_scenario_22_an_index_get_that_matches_two_records_is_an_error(world: World) -> None:
    await world.given({1: 10, 2: 10, 3: 30}, table=INDEXED)
    transaction = world.begin(isolation_for(world))

    with pytest.raises(IllegalOperationError, match="2 records"):
        await transaction.get_by_index(INDEXED, "balance", 10)

    assert await transaction.get_by_index(INDEXED, "balance", 30) == row(3, 30)
    assert await transaction.get_by_index(INDEXED, "balance", 40) is None


async def test_an_index_scan_finds_records_of_every_partition_and_obeys_conditions_and_limits(world: World) -> None:
    for partition in (1, 2, 3):
        await world.given({1: 10, 2: 20, 3: 10}, table=INDEXED, partition=partition)
    isolation = isolation_for(world)

    async def found(scan: Selection) -> list[tuple[object, object]]:
        return [(record["branch"], record["id"]) for record in await world.begin(isolation).scan(scan)]

    assert await found(indexed(10)) == [(1, 1), (1, 3), (2, 1), (2, 3), (3, 1), (3, 3)]
    assert await found(indexed(10, limit=3)) == [(1, 1), (1, 3), (2, 1)]
    not_first = (ColumnCondition("branch", Operator.GT, 1),)
    assert await found(indexed(10, where=not_first)) == [(2, 1), (2, 3), (3, 1), (3, 3)]
    assert await found(indexed(10, where=not_first, limit=1)) == [(2, 1)]
    assert await found(indexed(30)) == []
    transaction = world.begin(isolation)
    async with transaction.scanner(indexed(20)) as scanner:
        assert [record["branch"] async for record in scanner] == [1, 2, 3]
    await transaction.commit()


async def test_a_scan_of_all_partitions_obeys_conditions_and_limits(world: World) -> None:
    for partition in (1, 2, 3):
        await world.given({1: 10, 2: 20}, partition=partition)

    async def found(scan: Selection) -> list[tuple[object, object]]:
        return [(record["branch"], record["id"]) for record in await world.begin().scan(scan)]

    assert sorted(await found(ScanAll(ACCOUNT)), key=str) == [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)]
    twenty = (ColumnCondition("balance", Operator.EQ, 20),)
    assert sorted(await found(ScanAll(ACCOUNT, twenty)), key=str) == [(1, 2), (2, 2), (3, 2)]
    assert len(await found(ScanAll(ACCOUNT, twenty, limit=2))) == 2
    assert await found(ScanAll(STOCK)) == []


# -- what SERIALIZABLE sees change


async def changed(other: Transaction) -> None:
    await other.update(INDEXED, key(1), {"note": "changed"})


async def moved_away(other: Transaction) -> None:
    await other.update(INDEXED, key(1), {"balance": 11})


async def moved_in(other: Transaction) -> None:
    await other.update(INDEXED, key(2), {"balance": 10})


async def inserted(other: Transaction) -> None:
    await other.insert(INDEXED, key(3, partition=3), {"balance": 10})


async def deleted(other: Transaction) -> None:
    await other.delete(INDEXED, key(1))


async def elsewhere(other: Transaction) -> None:
    await other.update(INDEXED, key(2), {"balance": 21})


async def moved_in_and_out_again(other: Transaction) -> None:
    await other.update(INDEXED, key(2), {"balance": 30})


CHANGES = [changed, moved_away, moved_in, inserted, deleted]
READS: dict[str, Callable[[Transaction], Awaitable[object]]] = {
    "index scan": lambda transaction: transaction.scan(indexed(10)),
    "index get": lambda transaction: transaction.get_by_index(INDEXED, "balance", 10),
    "scan all": lambda transaction: transaction.scan(ScanAll(INDEXED, (ColumnCondition("balance", Operator.EQ, 10),))),
}
each_read = pytest.mark.parametrize("read", READS.values(), ids=READS.keys())


def refuses(world: World, read: object) -> bool:
    """Whether the storage may lag behind in this read, so that SERIALIZABLE refuses it."""
    info = world.plain_storage.info_of(INDEXED.namespace)
    return not (info.sees_all_partitions if read is READS["scan all"] else info.sees_all_indexed)


async def reader_and_writer(world: World, read: Callable[[Transaction], Awaitable[object]]) -> Transaction | None:
    """A transaction that has read 10 and 20 by `read` and writes elsewhere; None where it was rightly refused."""
    await world.given({1: 10, 2: 20}, table=INDEXED)
    transaction = world.begin()
    if refuses(world, read):
        with pytest.raises(IllegalOperationError, match="lag"):
            await read(transaction)
        return None
    await read(transaction)
    await transaction.insert(STOCK, key(1), {"balance": 1})
    return transaction


@each_read
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("only_prepared", [False, True], ids=["committed", "prepared"])
async def test_scenario_44_what_an_index_or_a_scan_of_all_has_read_may_not_change(
    world: World,
    read: Callable[[Transaction], Awaitable[object]],
    change: Callable[[Transaction], Awaitable[None]],
    only_prepared: bool,
) -> None:
    transaction = await reader_and_writer(world, read)
    if transaction is None:
        return
    await (world.orphan(change) if only_prepared else world.commits(change))

    with pytest.raises(ValidationConflictError):
        await transaction.commit()


@each_read
async def test_scenario_44_a_change_among_records_with_other_values_disturbs_nobody(
    world: World, read: Callable[[Transaction], Awaitable[object]]
) -> None:
    transaction = await reader_and_writer(world, read)
    if transaction is None:
        return
    await world.commits(elsewhere)

    await transaction.commit()


@each_read
async def test_scenario_44_a_record_that_came_to_match_is_seen_though_another_is_moving_it_out_again(
    world: World, read: Callable[[Transaction], Awaitable[object]]
) -> None:
    """Its new value hides it from the index; its old value, which may yet hold, must have been seen."""
    transaction = await reader_and_writer(world, read)
    if transaction is None:
        return
    await world.commits(moved_in)
    await world.orphan(moved_in_and_out_again)

    with pytest.raises(ValidationConflictError):
        await transaction.commit()


@each_read
async def test_scenario_44_what_the_transaction_itself_has_changed_is_fine(
    world: World, read: Callable[[Transaction], Awaitable[object]]
) -> None:
    await world.given({1: 10, 2: 20, 3: 30}, table=INDEXED)
    transaction = world.begin(Isolation.SNAPSHOT if refuses(world, read) else Isolation.SERIALIZABLE)
    await read(transaction)
    await transaction.update(INDEXED, key(1), {"balance": 11})
    await transaction.update(INDEXED, key(2), {"balance": 10})
    await transaction.delete(INDEXED, key(3))
    await transaction.insert(INDEXED, key(4), {"balance": 10})

    await transaction.commit()

    assert list((await world.balances([INDEXED])).values()) == [11, 10, 10]


@pytest.mark.parametrize("phantom", [1, 2, 3, 4])
async def test_scenario_45_a_phantom_of_a_scan_of_all_is_refused_if_it_comes_inside_the_limit(
    world: World, phantom: int
) -> None:
    """Where it comes is the storage's business: such a scan has no particular order, but it keeps the one it has."""
    await world.given({2: 20, 4: 40} if phantom % 2 else {1: 10, 3: 30})
    transaction = world.begin()
    found = await transaction.scan(ScanAll(ACCOUNT, limit=2))
    assert len(found) == 2
    await transaction.insert(STOCK, key(1), {"balance": 1})
    await world.given({phantom: 5})

    if await world.process().begin().scan(ScanAll(ACCOUNT, limit=2)) == found:
        await transaction.commit()
    else:
        with pytest.raises(ValidationConflictError):
            await transaction.commit()


@pytest.mark.parametrize("limit", [0, 5], ids=["unlimited", "unfilled"])
async def test_scenario_45_a_phantom_in_another_partition_is_refused(world: World, limit: int) -> None:
    await world.given({1: 10})
    transaction = world.begin()
    assert len(await transaction.scan(ScanAll(ACCOUNT, limit=limit))) == 1
    await transaction.insert(STOCK, key(1), {"balance": 1})
    await world.given({1: 10}, partition=7)

    with pytest.raises(ValidationConflictError):
        await transaction.commit()


async def test_scenario_45_a_phantom_beyond_what_a_scanner_of_all_returned_is_fine(world: World) -> None:
    await world.given({1: 10, 3: 30})
    transaction = world.begin()
    async with transaction.scanner(ScanAll(ACCOUNT)) as scanner:
        assert await scanner.one() == row(1, 10)
    await transaction.insert(STOCK, key(1), {"balance": 1})
    await world.given({2: 20})  # Behind the first in any storage: partitions are ordered, or rows as they come.

    await transaction.commit()


# -- own writes


OVERLAPPING: dict[str, Selection] = {
    "all": ScanAll(INDEXED),
    "all that match the write": ScanAll(INDEXED, (ColumnCondition("balance", Operator.GT, 20),)),
    "all, by a column not known": ScanAll(INDEXED, (ColumnCondition("note", Operator.IS_NULL),)),
    "the value written": indexed(25),
    "the value written, and a condition met": indexed(25, where=(ColumnCondition("id", Operator.EQ, 2),)),
    "the value replaced": indexed(20),
}
DISJOINT: dict[str, Selection] = {
    "all that do not match the write": ScanAll(INDEXED, (ColumnCondition("balance", Operator.EQ, 10),)),
    "all of another table": ScanAll(ACCOUNT),
    "another value": indexed(30),
    "the value written, and a condition unmet": indexed(25, where=(ColumnCondition("id", Operator.EQ, 3),)),
    "a partition's records that do not match": Scan(
        INDEXED, (1,), where=(ColumnCondition("balance", Operator.EQ, 10),)
    ),
}


async def among_three(world: World) -> Transaction:
    """A transaction that is about to write one of three records."""
    await world.given({1: 10, 2: 20, 3: 30}, table=INDEXED)
    return world.begin(isolation_for(world))


@pytest.mark.parametrize("scan", OVERLAPPING.values(), ids=OVERLAPPING.keys())
async def test_scenario_37_a_scan_across_partitions_that_overlaps_an_own_put_is_refused(
    world: World, scan: Selection
) -> None:
    transaction = await among_three(world)
    await transaction.put(INDEXED, key(2), {"balance": 25})

    with pytest.raises(IllegalOperationError, match="written"):
        await transaction.scan(scan)


@pytest.mark.parametrize("scan", DISJOINT.values(), ids=DISJOINT.keys())
async def test_scenario_37_a_scan_across_partitions_beside_an_own_put_is_fine(world: World, scan: Selection) -> None:
    transaction = await among_three(world)
    await transaction.upsert(INDEXED, key(2), {"balance": 25})

    found = await transaction.scan(scan)
    await transaction.commit()

    assert all(record["balance"] in (10, 30) for record in found)


@pytest.mark.parametrize("scan", [ScanAll(INDEXED), indexed(20)], ids=["all", "index"])
async def test_scenario_37_a_scan_across_partitions_that_returns_an_own_deletion_is_refused(
    world: World, scan: Selection
) -> None:
    transaction = await among_three(world)
    await transaction.delete(INDEXED, key(2))

    with pytest.raises(IllegalOperationError, match="written"):
        await transaction.scan(scan)


# -- refusals


class LaggingStorage(MemoryStorage):
    """A storage whose reads across partitions may miss what was just written, as DynamoDB's global indexes do."""

    @property
    def info(self) -> StorageInfo:
        return StorageInfo(
            super().info.name,
            super().info.atomicity,
            serializes_batches=True,
            sees_all_partitions=False,
            sees_all_indexed=False,
        )


async def test_serializable_refuses_reads_in_which_the_storage_may_lag_behind() -> None:
    world = World(LaggingStorage())
    await world.create()
    await world.given({1: 10}, table=INDEXED)

    transaction = world.begin()
    for scan in (ScanAll(INDEXED), indexed(10)):
        with pytest.raises(IllegalOperationError, match="may lag behind"):
            await transaction.scan(scan)
        with pytest.raises(IllegalOperationError, match="may lag behind"):
            transaction.scanner(scan)
    with pytest.raises(IllegalOperationError, match="may lag behind"):
        await transaction.get_by_index(INDEXED, "balance", 10)
    assert await transaction.scan(Scan(INDEXED, (1,))) == [row(1, 10)]
    for isolation in (Isolation.SNAPSHOT, Isolation.READ_COMMITTED):
        assert await world.begin(isolation).scan(ScanAll(INDEXED)) == [row(1, 10)]
        assert await world.begin(isolation).scan(indexed(10)) == [row(1, 10)]


async def test_a_column_that_is_not_indexed_cannot_be_asked_for(world: World) -> None:
    with pytest.raises(InvalidOperationError, match="not indexed"):
        await world.begin(isolation_for(world)).scan(IndexScan(ACCOUNT, "balance", 10))


async def test_a_table_whose_old_values_are_not_indexed_cannot_be_read_by_index(storage: Storage) -> None:
    """As ScalarDB refuses it under SERIALIZABLE; here at every isolation, since the record in doubt would be missed."""
    plain = MemoryStorage()
    await plain.create_table(replace(STORED, indexes=frozenset({"balance"})))
    world = World(plain)

    with pytest.raises(InvalidOperationError, match="before_balance is not indexed"):
        await world.begin(Isolation.SNAPSHOT).scan(indexed(10))
