"""Scenarios 23 to 38: what one transaction may write, in which order, and what it leaves in storage."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from protocol_world import ACCOUNT, STOCK, World, at_once, key, row, whole

from infra.consensus_commit.errors import (
    IllegalOperationError,
    PreparationConflictError,
    TransactionConflictError,
    UnsatisfiedConditionError,
)
from infra.consensus_commit.manager import TransactionManager
from infra.consensus_commit.metadata import BEFORE
from infra.consensus_commit.states import Isolation
from infra.consensus_commit.transaction import Transaction
from infra.storage.operations import Bound, ColumnCondition, IfExists, IfNotExists, Operator, Row, Scan


def balance_is(value: int) -> ColumnCondition:
    return ColumnCondition("balance", Operator.EQ, value)


async def test_scenario_23_an_inserted_record_has_version_1(world: World) -> None:
    transaction = world.begin()
    await transaction.insert(ACCOUNT, key(1), {"balance": 10, "note": "new"})
    await transaction.commit()

    stored = await world.stored(1)
    assert stored is not None
    assert (stored["tx_id"], stored["tx_state"], stored["tx_version"]) == (transaction.tx_id, 3, 1)
    assert all(value is None for name, value in stored.items() if name.startswith(BEFORE))
    assert await world.begin().get(ACCOUNT, key(1)) == row(1, 10, "new")


@pytest.mark.parametrize("one_phase_commit", [False, True])
async def test_scenario_24_inserting_an_existing_record_is_a_conflict(world: World, one_phase_commit: bool) -> None:
    await world.given({1: 10})
    before = await world.everything()
    transaction = world.process(one_phase_commit=one_phase_commit).begin()
    await transaction.insert(ACCOUNT, key(1), {"balance": 99})

    with pytest.raises(TransactionConflictError):
        await transaction.commit()

    assert await world.everything() == before


async def test_scenario_24_reading_a_record_does_not_make_its_insert_an_update(world: World) -> None:
    await world.given({1: 10})
    transaction = world.begin()
    await transaction.get(ACCOUNT, key(1))
    await transaction.insert(ACCOUNT, key(1), {"balance": 99})

    with pytest.raises(PreparationConflictError):
        await transaction.commit()


@pytest.mark.parametrize("one_phase_commit", [False, True])
async def test_scenario_25_a_blind_put_on_an_existing_record_is_a_conflict(
    world: World, one_phase_commit: bool
) -> None:
    await world.given({1: 10})
    before = await world.everything()
    transaction = world.process(one_phase_commit=one_phase_commit).begin()
    await transaction.put(ACCOUNT, key(1), {"balance": 99})

    with pytest.raises(TransactionConflictError):
        await transaction.commit()

    assert await world.everything() == before


@pytest.mark.parametrize("one_phase_commit", [False, True])
async def test_scenario_26_an_upsert_writes_present_and_absent_records(world: World, one_phase_commit: bool) -> None:
    await world.given({1: 10})
    transaction = world.process(one_phase_commit=one_phase_commit).begin()
    await transaction.upsert(ACCOUNT, key(1), {"note": "was there"})
    await transaction.upsert(ACCOUNT, key(2), {"balance": 20})
    await transaction.commit()

    assert await world.begin().scan(whole()) == [row(1, 10, "was there"), row(2, 20)]
    present, absent = await world.stored(1), await world.stored(2)
    assert present is not None
    assert absent is not None
    assert (present["tx_version"], absent["tx_version"]) == (2, 1)


async def test_scenario_27_updating_an_absent_record_does_nothing(world: World) -> None:
    transaction = world.begin()
    await transaction.update(ACCOUNT, key(1), {"balance": 10})
    await transaction.commit()

    assert await world.everything() == []
    assert await world.state_rows() == {}


@pytest.mark.parametrize("change", ["update", "delete", "put"])
async def test_scenario_28_an_unmet_condition_is_told_at_once_and_nothing_is_written(world: World, change: str) -> None:
    await world.given({1: 10})
    before = await world.everything()
    transaction = world.begin()

    changes = {
        "update": lambda: transaction.update(ACCOUNT, key(1), {"balance": 11}, [balance_is(9)]),
        "delete": lambda: transaction.delete(ACCOUNT, key(1), [balance_is(9)]),
        "put": lambda: transaction.put(ACCOUNT, key(1), {"balance": 11}, IfNotExists()),
    }
    with pytest.raises(UnsatisfiedConditionError):
        await changes[change]()

    await transaction.commit()
    assert await world.everything() == before


async def test_scenario_28_a_met_condition_lets_the_write_through(world: World) -> None:
    await world.given({1: 10, 2: 20, 3: 30})
    transaction = world.begin()
    await transaction.update(ACCOUNT, key(1), {"balance": 11}, [balance_is(10)])
    await transaction.delete(ACCOUNT, key(2), [balance_is(20)])
    await transaction.put(ACCOUNT, key(3), {"balance": 31}, IfExists())
    await transaction.put(ACCOUNT, key(4), {"balance": 40}, IfNotExists())
    await transaction.commit()

    assert await world.begin().scan(whole()) == [row(1, 11), row(3, 31), row(4, 40)]


async def test_scenario_28_an_empty_list_of_conditions_asks_that_the_record_is_there(world: World) -> None:
    transaction = world.begin()

    with pytest.raises(UnsatisfiedConditionError):
        await transaction.update(ACCOUNT, key(1), {"balance": 10}, [])
    with pytest.raises(UnsatisfiedConditionError):
        await transaction.delete(ACCOUNT, key(1), [])


async def test_scenario_28_a_condition_sees_the_transactions_own_writes(world: World) -> None:
    await world.given({1: 10})
    transaction = world.begin()
    await transaction.update(ACCOUNT, key(1), {"balance": 11})

    await transaction.update(ACCOUNT, key(1), {"balance": 12}, [balance_is(11)])
    with pytest.raises(UnsatisfiedConditionError):
        await transaction.update(ACCOUNT, key(1), {"balance": 13}, [balance_is(10)])

    await transaction.commit()
    assert await world.balances() == {("account", 1, 1): 12}


@pytest.mark.parametrize("rolls_back", [False, True])
async def test_scenario_28_a_condition_unmet_by_what_was_remembered_is_met_at_the_next_try(
    world: World, rolls_back: bool
) -> None:
    """A manager that keeps records would refuse for ever otherwise: who gives up is not validated."""
    await world.given({1: 10})
    manager = TransactionManager(world.plain_storage, world.clock, cache_records=10, sleep=at_once)
    await manager.run(lambda transaction: transaction.get(ACCOUNT, key(1)))
    await world.commits(lambda other: other.update(ACCOUNT, key(1), {"balance": 100}))

    async def attempt() -> None:
        async with manager.begin() as transaction:
            try:
                await transaction.update(ACCOUNT, key(1), {"balance": 50}, [balance_is(100)])
            except UnsatisfiedConditionError:
                if rolls_back:
                    await transaction.rollback()
                raise
            await transaction.commit()

    with pytest.raises(UnsatisfiedConditionError):
        await attempt()
    await attempt()
    await manager.close()

    assert await world.balances() == {("account", 1, 1): 50}


@pytest.mark.parametrize("one_phase_commit", [False, True])
async def test_scenario_29_a_record_is_deleted_without_being_read_first(world: World, one_phase_commit: bool) -> None:
    await world.given({1: 10})
    transaction = world.process(one_phase_commit=one_phase_commit).begin()
    await transaction.delete(ACCOUNT, key(1))
    await transaction.commit()

    assert await world.stored(1) is None


@pytest.mark.parametrize("one_phase_commit", [False, True])
async def test_scenario_30_deleting_an_absent_record_commits(world: World, one_phase_commit: bool) -> None:
    transaction = world.process(one_phase_commit=one_phase_commit).begin()
    await transaction.delete(ACCOUNT, key(1))
    await transaction.commit()

    assert await world.stored(1) is None


async def test_scenario_31_two_puts_merge_their_columns(world: World) -> None:
    transaction = world.begin()
    await transaction.put(ACCOUNT, key(1), {"balance": 1, "note": "first"})
    await transaction.put(ACCOUNT, key(1), {"balance": 2})
    await transaction.commit()

    assert await world.begin().get(ACCOUNT, key(1)) == row(1, 2, "first")


@pytest.mark.parametrize("change", ["upsert", "update", "put"])
async def test_scenario_31_what_follows_an_insert_stays_an_insert(world: World, change: str) -> None:
    transaction = world.begin()
    await transaction.insert(ACCOUNT, key(1), {"balance": 1, "note": "inserted"})
    await getattr(transaction, change)(ACCOUNT, key(1), {"balance": 2})
    await world.given({1: 10})

    with pytest.raises(PreparationConflictError):
        await transaction.commit()


async def test_scenario_32_a_put_and_a_delete_leave_the_record_deleted(world: World) -> None:
    await world.given({1: 10})
    transaction = world.begin()
    await transaction.upsert(ACCOUNT, key(1), {"balance": 11})
    await transaction.delete(ACCOUNT, key(1))
    await transaction.commit()

    assert await world.stored(1) is None


async def test_scenario_33_a_delete_and_a_put_leave_the_new_values_and_null_elsewhere(world: World) -> None:
    await world.commits(lambda other: other.insert(ACCOUNT, key(1), {"balance": 10, "note": "old"}))
    transaction = world.begin()
    await transaction.delete(ACCOUNT, key(1))
    await transaction.put(ACCOUNT, key(1), {"balance": 20})
    assert await transaction.get(ACCOUNT, key(1)) == row(1, 20)
    await transaction.commit()

    assert await world.begin().get(ACCOUNT, key(1)) == row(1, 20)
    stored = await world.stored(1)
    assert stored is not None
    assert stored["tx_version"] == 2, "it was replaced, not inserted anew"


async def test_scenario_33_an_insert_after_a_delete_replaces_the_record(world: World) -> None:
    await world.commits(lambda other: other.insert(ACCOUNT, key(1), {"balance": 10, "note": "old"}))
    transaction = world.begin()
    await transaction.delete(ACCOUNT, key(1))
    await transaction.insert(ACCOUNT, key(1), {"balance": 20})
    await transaction.commit()

    assert await world.begin().get(ACCOUNT, key(1)) == row(1, 20)


async def test_scenario_34_an_insert_after_a_write_of_the_same_record_is_refused(world: World) -> None:
    transaction = world.begin()
    await transaction.insert(ACCOUNT, key(1), {"balance": 1})
    with pytest.raises(IllegalOperationError):
        await transaction.insert(ACCOUNT, key(1), {"balance": 2})

    await transaction.upsert(ACCOUNT, key(2), {"balance": 1})
    with pytest.raises(IllegalOperationError):
        await transaction.insert(ACCOUNT, key(2), {"balance": 2})


async def test_scenario_34_a_delete_after_an_insert_of_the_same_record_is_refused(world: World) -> None:
    transaction = world.begin()
    await transaction.insert(ACCOUNT, key(1), {"balance": 1})

    with pytest.raises(IllegalOperationError):
        await transaction.delete(ACCOUNT, key(1))


async def test_scenario_35_a_get_sees_the_transactions_own_put(world: World) -> None:
    await world.commits(lambda other: other.insert(ACCOUNT, key(1), {"balance": 10, "note": "old"}))
    transaction = world.begin()
    await transaction.upsert(ACCOUNT, key(1), {"balance": 20})
    await transaction.insert(ACCOUNT, key(2), {"balance": 30})

    assert await transaction.get(ACCOUNT, key(1)) == row(1, 20, "old")
    assert await transaction.get(ACCOUNT, key(2)) == row(2, 30)
    assert await transaction.get_many(ACCOUNT, [key(2), key(3), key(1)]) == [row(2, 30), None, row(1, 20, "old")]


async def test_scenario_35_a_condition_that_the_own_put_does_not_match_finds_nothing(world: World) -> None:
    await world.given({1: 10})
    transaction = world.begin()
    await transaction.upsert(ACCOUNT, key(1), {"balance": 20})

    assert await transaction.get(ACCOUNT, key(1), [balance_is(10)]) is None
    assert await transaction.get(ACCOUNT, key(1), [balance_is(20)]) == row(1, 20)


async def test_scenario_36_a_get_after_a_delete_finds_nothing(world: World) -> None:
    await world.given({1: 10})
    transaction = world.begin()
    await transaction.delete(ACCOUNT, key(1))

    assert await transaction.get(ACCOUNT, key(1)) is None


async def by_scan(transaction: Transaction, scan: Scan) -> list[Row]:
    return await transaction.scan(scan)


async def by_scanner(transaction: Transaction, scan: Scan) -> list[Row]:
    async with transaction.scanner(scan) as scanner:
        return [record async for record in scanner]


Read = Callable[[Transaction, Scan], Awaitable[list[Row]]]

OVERLAPPING = {
    "whole partition": whole(),
    "range": Scan(ACCOUNT, (1,), Bound((2,)), Bound((2,))),
    "open end": Scan(ACCOUNT, (1,), Bound((1,), inclusive=False)),
    "reversed": Scan(ACCOUNT, (1,), end=Bound((3,), inclusive=False), reverse=True),
}
DISJOINT = {
    "below": Scan(ACCOUNT, (1,), end=Bound((2,), inclusive=False)),
    "above": Scan(ACCOUNT, (1,), Bound((2,), inclusive=False)),
    "other partition": whole(partition=2),
    "other table": whole(STOCK),
}


@pytest.mark.parametrize("scan", OVERLAPPING.values(), ids=OVERLAPPING.keys())
@pytest.mark.parametrize("read", [by_scan, by_scanner])
async def test_scenario_37_a_scan_that_overlaps_an_own_put_is_refused(world: World, scan: Scan, read: Read) -> None:
    transaction = world.begin()
    await transaction.put(ACCOUNT, key(2), {"balance": 20})

    with pytest.raises(IllegalOperationError):
        await read(transaction, scan)


@pytest.mark.parametrize("read", [by_scan, by_scanner])
async def test_scenario_37_a_scan_that_returns_an_own_deletion_is_refused(world: World, read: Read) -> None:
    await world.given({1: 10, 2: 20})
    transaction = world.begin()
    await transaction.delete(ACCOUNT, key(2))

    with pytest.raises(IllegalOperationError):
        await read(transaction, whole())


@pytest.mark.parametrize("scan", DISJOINT.values(), ids=DISJOINT.keys())
async def test_scenario_37_a_scan_beside_own_writes_is_fine(world: World, scan: Scan) -> None:
    await world.given({1: 10, 2: 20, 3: 30})
    transaction = world.begin()
    await transaction.upsert(ACCOUNT, key(2), {"balance": 21})

    found = await transaction.scan(scan)
    await transaction.commit()

    assert all(record["balance"] in (10, 30) for record in found)


async def test_scenario_37_writing_what_was_scanned_is_fine_and_scanning_it_again_is_not(world: World) -> None:
    await world.given({1: 10})
    transaction = world.begin()
    await transaction.scan(whole())
    await transaction.update(ACCOUNT, key(1), {"balance": 11})

    with pytest.raises(IllegalOperationError):
        await transaction.scan(whole())

    await transaction.commit()
    assert await world.balances() == {("account", 1, 1): 11}


async def test_scenario_38_one_key_in_two_tables_is_two_records(world: World) -> None:
    transaction = world.begin()
    await transaction.insert(ACCOUNT, key(1), {"balance": 10})
    await transaction.insert(STOCK, key(1), {"balance": 20})
    await transaction.commit()

    transaction = world.begin()
    await transaction.delete(ACCOUNT, key(1))
    assert await transaction.get(STOCK, key(1)) == {"shelf": 1, "id": 1, "balance": 20, "note": None}
    await transaction.commit()

    assert await world.balances() == {("stock", 1, 1): 20}


# -- beyond the scenarios: savepoints, refusals, versions, mistakes


async def test_a_savepoint_takes_back_the_writes_made_after_it_and_keeps_the_reads(world: World) -> None:
    await world.given({1: 10, 2: 20})
    transaction = world.begin(Isolation.SNAPSHOT)
    await transaction.update(ACCOUNT, key(1), {"balance": 11})
    await transaction.insert(ACCOUNT, key(3), {"balance": 30})
    savepoint = transaction.savepoint()
    await transaction.update(ACCOUNT, key(1), {"balance": 12, "note": "late"})
    await transaction.delete(ACCOUNT, key(2))
    await transaction.upsert(ACCOUNT, key(3), {"balance": 31})
    await transaction.insert(ACCOUNT, key(4), {"balance": 40})

    transaction.restore(savepoint)

    assert await transaction.get_many(ACCOUNT, [key(number) for number in range(1, 5)]) == [
        row(1, 11),
        row(2, 20),
        row(3, 30),
        None,
    ]
    await transaction.commit()
    assert list((await world.balances()).values()) == [11, 20, 30]


async def test_a_savepoint_that_an_earlier_restore_undid_is_refused(world: World) -> None:
    transaction = world.begin()
    early = transaction.savepoint()
    await transaction.insert(ACCOUNT, key(1), {"balance": 1})
    late = transaction.savepoint()
    transaction.restore(early)

    with pytest.raises(IllegalOperationError):
        transaction.restore(late)


async def test_what_a_refused_command_read_is_validated_though_its_writes_are_gone(world: World) -> None:
    """Rule 3: "out of stock" must be true in the order that is committed."""
    await world.given({1: 0})
    refused = world.participant()
    await refused.get(ACCOUNT, key(1))
    await refused.update(ACCOUNT, key(1), {"balance": -1})
    assert not refused.needs_validation, "preparing the write would check the read"

    refused.drop_writes()

    assert not refused.has_writes
    assert refused.needs_validation
    await world.commits(lambda other: other.update(ACCOUNT, key(1), {"balance": 5}))
    with pytest.raises(TransactionConflictError):
        await refused.validate_records()


async def test_the_version_after_the_commit_is_known_before_it(world: World) -> None:
    await world.given({1: 10, 2: 20, 3: 30})
    await world.commits(lambda other: other.update(ACCOUNT, key(2), {"balance": 21}))
    participant = world.participant()
    await participant.update(ACCOUNT, key(1), {"balance": 11})
    await participant.upsert(ACCOUNT, key(2), {"balance": 22})
    await participant.insert(ACCOUNT, key(4), {"balance": 40})
    await participant.put(ACCOUNT, key(5), {"balance": 50})
    await participant.upsert(ACCOUNT, key(6), {"balance": 60})

    versions = {number: await participant.version_after_commit(ACCOUNT, key(number)) for number in range(1, 8)}
    assert versions == {1: 2, 2: 3, 3: 1, 4: 1, 5: 1, 6: 1, 7: 0}

    await participant.prepare_records(world.clock.now_ms())
    await participant.validate_records()
    await participant.commit_records(world.clock.now_ms())
    for number in range(1, 7):
        stored = await world.stored(number)
        assert stored is not None
        assert stored["tx_version"] == versions[number]


async def test_written_partitions_names_each_once(world: World) -> None:
    participant = world.participant()
    await participant.insert(ACCOUNT, key(1), {"balance": 1})
    await participant.insert(ACCOUNT, key(2), {"balance": 2})
    await participant.delete(ACCOUNT, key(1, partition=2))
    await participant.insert(STOCK, key(1), {"balance": 3})

    assert participant.written_partitions() == [
        ("bank", "account", (1,)),
        ("bank", "account", (2,)),
        ("shop", "stock", (1,)),
    ]


async def test_calls_that_cannot_be_meant_are_refused(world: World) -> None:
    transaction = world.begin()

    with pytest.raises(IllegalOperationError, match="no writable column"):
        await transaction.insert(ACCOUNT, key(1), {"colour": 1})
    with pytest.raises(IllegalOperationError, match="no writable column"):
        await transaction.insert(ACCOUNT, key(1), {"id": 1})
    with pytest.raises(IllegalOperationError, match="no writable column"):
        await transaction.insert(ACCOUNT, key(1), {"tx_state": 3})
    with pytest.raises(IllegalOperationError, match="no column"):
        await transaction.get(ACCOUNT, key(1), [ColumnCondition("tx_state", Operator.EQ, 3)])
    with pytest.raises(IllegalOperationError, match="is INT, not str"):
        await transaction.scan(Scan(ACCOUNT, (1,), where=(ColumnCondition("balance", Operator.GT, "1"),)))


async def test_a_transaction_that_has_ended_takes_no_more_operations(world: World) -> None:
    committed, rolled_back = world.begin(), world.begin()
    await committed.commit()
    await rolled_back.rollback()
    async with world.begin() as left:
        await left.insert(ACCOUNT, key(1), {"balance": 1})

    for transaction in (committed, rolled_back, left):
        with pytest.raises(IllegalOperationError, match="has ended"):
            await transaction.get(ACCOUNT, key(1))
    assert await world.everything() == [], "leaving without a commit rolls back"
