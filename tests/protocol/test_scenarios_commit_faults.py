"""Scenarios 47 to 58: commits that something goes wrong in, and what they leave for others to find."""

from __future__ import annotations

import asyncio

import pytest
from faults import Kind, Matcher, reads_of, writes_to
from protocol_world import ABORTED, ACCOUNT, COMMITTED, STOCK, World, key, row, whole

from infra.consensus_commit.commit import commit
from infra.consensus_commit.errors import (
    CommitConflictError,
    IllegalOperationError,
    PreparationConflictError,
    TransactionConflictError,
    UnknownTransactionStatusError,
    ValidationConflictError,
)
from infra.consensus_commit.metadata import transactional
from infra.consensus_commit.states import Isolation
from infra.consensus_commit.transaction import Transaction
from infra.storage.errors import StorageError, UnavailableStorageError
from infra.storage.operations import Atomicity, Delete, If, Key, Put
from infra.storage.port import Storage
from tests.storages import RememberingStorage

STORED_ACCOUNT = transactional(ACCOUNT)
STORED_STOCK = transactional(STOCK)


async def move(transaction: Transaction) -> None:
    """The transaction that things go wrong in: one record updated in the bank, one in the shop, one inserted there."""
    await transaction.update(ACCOUNT, key(1), {"balance": 9})
    await transaction.update(STOCK, key(1), {"balance": 101})
    await transaction.insert(STOCK, key(2), {"balance": 102})


BEFORE_MOVE = {("account", 1, 1): 10, ("stock", 1, 1): 100}
AFTER_MOVE = {("account", 1, 1): 9, ("stock", 1, 1): 101, ("stock", 1, 2): 102}


@pytest.fixture
async def moving(world: World) -> Transaction:
    await world.given({1: 10})
    await world.given({1: 100}, table=STOCK)
    transaction = world.begin()
    await move(transaction)
    return transaction


def state_writes(world: World) -> Matcher:
    return writes_to(world.states.table)


async def test_scenario_47_when_the_second_participant_cannot_prepare_both_are_rolled_back(world: World) -> None:
    await world.given({1: 10})
    await world.given({1: 100}, table=STOCK)
    before = await world.everything()
    tx_id = world.clock.new_id()
    first, second = world.participant(tx_id=tx_id), world.participant(tx_id=tx_id)
    await first.update(ACCOUNT, key(1), {"balance": 9})
    await second.update(STOCK, key(1), {"balance": 101})
    await world.commits(lambda other: other.update(STOCK, key(1), {"balance": 100}))
    before = [
        await world.stored(1),
        await world.stored(1, table=STOCK),
    ]

    with pytest.raises(PreparationConflictError):
        await commit(tx_id, [first, second], world.states, world.clock)

    state = await world.state(tx_id)
    assert state is not None
    assert state.state is ABORTED
    assert [await world.stored(1), await world.stored(1, table=STOCK)] == before


@pytest.mark.parametrize("kind", [Kind.UNAVAILABLE, Kind.LOST, Kind.UNANSWERED])
@pytest.mark.parametrize("stored", [STORED_ACCOUNT, STORED_STOCK], ids=["first", "second"])
async def test_scenario_47_a_prepare_that_fails_or_is_not_answered_aborts_and_rolls_back(
    world: World, moving: Transaction, stored: object, kind: Kind
) -> None:
    before = await world.everything()
    world.storage.fail(kind, writes_to(stored))  # type: ignore[arg-type]

    with pytest.raises(StorageError):
        await moving.commit()

    state = await world.state(moving.tx_id)
    assert state is not None
    assert state.state is ABORTED
    assert await world.everything() == before


async def test_scenario_48_a_transaction_that_recovery_has_aborted_rolls_back_and_is_a_conflict(
    world: World, moving: Transaction
) -> None:
    before = await world.everything()

    async def somebody_aborts_it() -> None:
        await world.process().states.abort_state(moving.tx_id)

    world.storage.visit_before(state_writes(world), somebody_aborts_it)

    with pytest.raises(CommitConflictError):
        await moving.commit()

    assert await world.everything() == before
    assert (await world.state_rows())[moving.tx_id] is ABORTED


async def test_scenario_48_a_reader_that_finds_it_expired_may_be_the_one_who_aborts(
    world: World, moving: Transaction
) -> None:
    """The writer was paused after preparing for longer than a transaction may live."""

    async def pause_while_a_reader_recovers() -> None:
        world.expire()
        assert await world.balances() == BEFORE_MOVE

    world.storage.visit_before(state_writes(world), pause_while_a_reader_recovers)

    with pytest.raises(CommitConflictError):
        await moving.commit()

    assert await world.balances() == BEFORE_MOVE
    assert await world.in_doubt() == 0


async def test_scenario_48_a_transaction_whose_abort_has_been_forgotten_meanwhile_is_not_said_to_be_anything(
    world: World, moving: Transaction
) -> None:
    """Its put was refused, so there was a row; which one, its own perhaps, nobody can tell. (ScalarDB: aborted.)"""
    states = world.process().states

    async def forget() -> None:
        await world.plain_storage.mutate([Delete(states.table, Key((moving.tx_id,)))])

    world.storage.visit_before(state_writes(world), lambda: states.abort_state(moving.tx_id))
    world.storage.visit_before(reads_of(states.table), forget)

    with pytest.raises(UnknownTransactionStatusError, match="pruned"):
        await moving.commit()

    world.expire()
    assert await world.balances() == BEFORE_MOVE


async def test_scenario_48_whoever_aborts_decides_again_if_the_decision_is_forgotten_meanwhile(world: World) -> None:
    states = world.process().states

    async def forget() -> None:
        await world.plain_storage.mutate([Delete(states.table, Key(("t1",)))])

    await states.abort_state("t1")
    world.storage.visit_before(reads_of(states.table), forget)

    assert (await world.states.abort_state("t1")).state is ABORTED
    assert await world.state_rows() == {"t1": ABORTED}


@pytest.mark.parametrize("kind", [Kind.LOST, Kind.UNANSWERED])
async def test_scenario_49_a_commit_state_that_is_not_answered_is_unknown_and_left_to_readers(
    world: World, moving: Transaction, kind: Kind
) -> None:
    world.storage.fail(kind, state_writes(world), times=None)
    if kind is Kind.UNANSWERED:  # A second try would meet the row that the first has put, and know.
        world.storage.fail(Kind.UNAVAILABLE, reads_of(world.states.table), times=None)

    with pytest.raises(UnknownTransactionStatusError) as raised:
        await moving.commit()

    assert raised.value.tx_id == moving.tx_id
    assert await world.in_doubt() == 3, "nothing is rolled back on a guess"
    world.storage.heal()
    world.expire()
    applied = kind is Kind.UNANSWERED
    assert await world.balances() == (AFTER_MOVE if applied else BEFORE_MOVE)
    assert (await world.state_rows())[moving.tx_id] is (COMMITTED if applied else ABORTED)
    assert await world.in_doubt() == 0


@pytest.mark.parametrize("kind", [Kind.UNAVAILABLE, Kind.LOST, Kind.UNANSWERED])
async def test_scenario_49_a_commit_state_that_is_answered_at_a_later_try_commits(
    world: World, moving: Transaction, kind: Kind
) -> None:
    world.storage.fail(kind, state_writes(world), times=2)

    await moving.commit()

    assert await world.balances() == AFTER_MOVE
    assert (await world.state_rows())[moving.tx_id] is COMMITTED


async def test_scenario_49_an_unavailable_state_table_decides_nothing_and_says_so(
    world: World, moving: Transaction
) -> None:
    world.storage.fail(Kind.UNAVAILABLE, state_writes(world), times=None)

    with pytest.raises(UnavailableStorageError):
        await moving.commit()

    assert await world.state_rows() == {}
    world.expire()
    assert await world.balances() == BEFORE_MOVE


async def test_scenario_49_what_was_surely_not_committed_is_aborted_as_soon_as_the_state_table_serves_again(
    world: World, moving: Transaction
) -> None:
    world.storage.fail(Kind.UNAVAILABLE, state_writes(world), times=5)

    with pytest.raises(UnavailableStorageError):
        await moving.commit()

    assert await world.state_rows() == {moving.tx_id: ABORTED}
    assert await world.in_doubt() == 0
    assert await world.balances() == BEFORE_MOVE


@pytest.mark.parametrize("kind", [Kind.UNAVAILABLE, Kind.LOST, Kind.UNANSWERED])
@pytest.mark.parametrize("stored", [STORED_ACCOUNT, STORED_STOCK], ids=["first", "second"])
async def test_scenario_50_when_committing_records_fails_the_commit_stands_and_a_reader_completes_it(
    world: World, moving: Transaction, stored: object, kind: Kind
) -> None:
    world.storage.fail(kind, writes_to(stored), nth=2)  # type: ignore[arg-type]

    await moving.commit()

    assert await world.in_doubt() == (0 if kind is Kind.UNANSWERED else 1 if stored is STORED_ACCOUNT else 2)
    assert await world.balances() == AFTER_MOVE, "at once, not only after it has expired"
    assert await world.in_doubt() == 0


@pytest.mark.parametrize("settled_by_others", [1, 3])
async def test_scenario_50_a_rejected_batch_of_commits_is_settled_row_by_row(
    world: World, moving: Transaction, settled_by_others: int
) -> None:
    """A reader rolls some records forward just before the writer does: its batch no longer holds as a whole."""

    async def a_reader_recovers() -> None:
        process = world.process()
        reader = process.begin(Isolation.SNAPSHOT)
        await reader.get(STOCK, key(1))
        if settled_by_others == 3:
            await reader.get(STOCK, key(2))
            await reader.get(ACCOUNT, key(1))
        await process.recovery.drain()

    def commits_of_stock() -> Matcher:
        seen = 0

        def matches(call: object) -> bool:
            nonlocal seen
            seen += writes_to(STORED_STOCK)(call)  # type: ignore[arg-type]
            return seen == 2

        return matches

    world.storage.visit_before(commits_of_stock(), a_reader_recovers)

    await moving.commit()

    assert await world.in_doubt() == 0
    assert await world.balances() == AFTER_MOVE


@pytest.mark.parametrize("kind", [Kind.LOST, Kind.UNANSWERED])
async def test_scenario_51_when_the_abort_is_not_answered_the_status_is_unknown_and_the_transaction_over(
    world: World, moving: Transaction, kind: Kind
) -> None:
    world.storage.fail(Kind.UNAVAILABLE, writes_to(STORED_STOCK))
    world.storage.fail(kind, state_writes(world), times=None)
    world.storage.fail(Kind.UNAVAILABLE, reads_of(world.states.table), times=None)

    with pytest.raises(UnknownTransactionStatusError):
        await moving.commit()

    assert await world.in_doubt() == 1, "no roll-back without an abort"
    with pytest.raises(IllegalOperationError):
        await moving.get(ACCOUNT, key(1))
    world.storage.heal()
    world.expire()
    assert await world.balances() == BEFORE_MOVE
    assert (await world.state_rows())[moving.tx_id] is ABORTED


async def test_scenario_52_a_hook_that_fails_aborts_the_transaction(world: World) -> None:
    await world.given({1: 10})
    before = await world.everything()
    prepared = asyncio.Event()

    async def hook() -> None:
        await prepared.wait()
        raise RuntimeError("the hook failed")

    async def note_prepared() -> None:
        prepared.set()

    transaction = world.manager.begin(before_commit_state=hook)
    await transaction.update(ACCOUNT, key(1), {"balance": 11})
    world.storage.visit_before(writes_to(STORED_ACCOUNT), note_prepared)

    with pytest.raises(RuntimeError, match="the hook failed"):
        await transaction.commit()

    assert await world.everything() == before
    assert await world.state_rows() == {transaction.tx_id: ABORTED}


async def test_scenario_52_a_hook_has_ended_before_the_state_is_committed(world: World) -> None:
    steps: list[str] = []

    async def hook() -> None:
        for _ in range(50):
            await asyncio.sleep(0)
        steps.append("hook")

    async def note_commit() -> None:
        steps.append("commit state")

    transaction = world.manager.begin(before_commit_state=hook)
    await transaction.insert(ACCOUNT, key(1), {"balance": 1})
    world.storage.visit_before(state_writes(world), note_commit)
    await transaction.commit()

    assert steps == ["hook", "commit state"]


async def test_scenario_52_a_hook_is_waited_for_when_preparing_fails(world: World, moving: Transaction) -> None:
    ended = False

    async def hook() -> None:
        nonlocal ended
        for _ in range(50):
            await asyncio.sleep(0)
        ended = True

    transaction = world.manager.begin(before_commit_state=hook)
    await transaction.insert(ACCOUNT, key(1), {"balance": 1})

    with pytest.raises(PreparationConflictError):
        await transaction.commit()

    assert ended


@pytest.mark.parametrize("isolation", list(Isolation))
async def test_scenario_54_a_transaction_that_wrote_nothing_leaves_no_state_row(
    world: World, isolation: Isolation
) -> None:
    await world.given({1: 10})
    transaction = world.begin(isolation)
    await transaction.get(ACCOUNT, key(1))
    await transaction.scan(whole())
    await transaction.update(ACCOUNT, key(5), {"balance": 1})

    await transaction.commit()

    assert await world.state_rows() == {}
    assert [call for call in world.storage.calls if call.method == "mutate"] == []


async def test_scenario_54_a_transaction_that_wrote_nothing_is_validated_all_the_same(world: World) -> None:
    """Read skew would show to read-only transactions otherwise."""
    await world.given({1: 10, 2: 20})
    transaction = world.begin()
    await transaction.get(ACCOUNT, key(1))

    async def shift(other: Transaction) -> None:
        await other.update(ACCOUNT, key(1), {"balance": 0})
        await other.update(ACCOUNT, key(2), {"balance": 30})

    await world.commits(shift)
    await transaction.get(ACCOUNT, key(2))

    with pytest.raises(ValidationConflictError):
        await transaction.commit()


async def test_scenario_55_a_transaction_within_one_unit_commits_by_one_write(world: World) -> None:
    await world.given({1: 10, 2: 20, 3: 30})
    transaction = world.process(world.storage, one_phase_commit=True).begin()
    await transaction.update(ACCOUNT, key(1), {"balance": 11})
    await transaction.insert(ACCOUNT, key(4), {"balance": 40})
    await transaction.upsert(ACCOUNT, key(5), {"balance": 50})
    await transaction.delete(ACCOUNT, key(3))
    await transaction.commit()

    assert [call.method for call in world.storage.calls].count("mutate") == 1
    assert await world.state_rows() == {}
    assert list((await world.balances()).values()) == [11, 20, 40, 50]
    stored = [await world.stored(number) for number in (1, 4, 5)]
    assert [(r["tx_id"], r["tx_state"], r["tx_version"]) for r in stored if r] == [
        (transaction.tx_id, 3, 2),
        (transaction.tx_id, 3, 1),
        (transaction.tx_id, 3, 1),
    ]


async def test_scenario_55_a_storage_that_is_one_unit_commits_over_namespaces_by_one_write(storage: Storage) -> None:
    """DynamoDB, when it is not kept from it (`in_namespaces`); any other decides by a state row."""
    if isinstance(storage, RememberingStorage):
        storage.unit = None
    world = World(storage)
    await world.create()
    await world.given({1: 10})
    await world.given({1: 100}, table=STOCK)
    transaction = world.process(world.storage, one_phase_commit=True).begin()
    await move(transaction)
    await transaction.commit()

    one_unit = storage.info.atomicity is Atomicity.STORAGE
    assert await world.state_rows() == ({} if one_unit else {transaction.tx_id: COMMITTED})
    assert [call.method for call in world.storage.calls].count("mutate") == (1 if one_unit else 5)
    assert await world.balances() == AFTER_MOVE
    assert await world.in_doubt() == 0


async def changes_and_validates(transaction: Transaction) -> None:
    await transaction.get(ACCOUNT, key(2))
    await transaction.update(ACCOUNT, key(1), {"balance": 11})


async def changes_two_namespaces(transaction: Transaction) -> None:
    await transaction.update(ACCOUNT, key(1), {"balance": 11})
    await transaction.insert(STOCK, key(1), {"balance": 1})


async def deletes_what_is_not_there(transaction: Transaction) -> None:
    await transaction.update(ACCOUNT, key(1), {"balance": 11})
    await transaction.delete(ACCOUNT, key(9))


@pytest.mark.parametrize("work", [changes_and_validates, changes_two_namespaces, deletes_what_is_not_there])
async def test_scenario_55_a_transaction_that_needs_more_than_one_write_goes_through_both_phases(
    world: World, work: object
) -> None:
    await world.given({1: 10, 2: 20})
    transaction = world.process(world.storage, one_phase_commit=True).begin()
    await work(transaction)  # type: ignore[operator]
    await transaction.commit()

    assert await world.state_rows() == {transaction.tx_id: COMMITTED}
    assert (await world.balances())[("account", 1, 1)] == 11


async def test_scenario_55_a_delete_that_was_not_read_has_no_one_phase_unit_until_it_is(world: World) -> None:
    await world.given({1: 10})
    participant = world.participant()
    await participant.delete(ACCOUNT, key(1))
    assert participant.one_phase_unit() is None
    with pytest.raises(IllegalOperationError):
        await world.participant().commit_one_phase(world.clock.now_ms())

    await participant.pre_read()

    assert participant.one_phase_unit() is not None
    await participant.commit_one_phase(world.clock.now_ms())
    assert await world.stored(1) is None


@pytest.mark.parametrize("isolation", list(Isolation))
async def test_scenario_55_what_was_only_read_keeps_a_serializable_transaction_from_one_phase(
    world: World, isolation: Isolation
) -> None:
    participant = world.participant(isolation=isolation)
    await participant.get(ACCOUNT, key(2))
    await participant.insert(ACCOUNT, key(1), {"balance": 1})

    assert (participant.one_phase_unit() is None) == (isolation is Isolation.SERIALIZABLE)


async def test_scenario_55_two_partitions_are_two_units_where_the_storage_says_so(world: World) -> None:
    participant = world.participant()
    await participant.insert(ACCOUNT, key(1, partition=1), {"balance": 1})
    await participant.insert(ACCOUNT, key(1, partition=2), {"balance": 1})

    one_unit = participant.one_phase_unit() is not None

    assert one_unit == (world.storage.info.atomicity is not Atomicity.PARTITION)


@pytest.mark.parametrize("kind", [Kind.LOST, Kind.UNANSWERED])
async def test_scenario_55_a_one_phase_commit_that_is_not_answered_is_unknown(world: World, kind: Kind) -> None:
    await world.given({1: 10})
    transaction = world.process(world.storage, one_phase_commit=True).begin()
    await transaction.update(ACCOUNT, key(1), {"balance": 11})
    world.storage.fail(kind, writes_to(STORED_ACCOUNT))

    with pytest.raises(UnknownTransactionStatusError):
        await transaction.commit()

    assert await world.balances() == {("account", 1, 1): 11 if kind is Kind.UNANSWERED else 10}
    assert await world.in_doubt() == 0


async def test_scenario_55_a_one_phase_commit_over_a_changed_record_is_a_conflict(world: World) -> None:
    await world.given({1: 10})
    transaction = world.process(one_phase_commit=True).begin()
    await transaction.update(ACCOUNT, key(1), {"balance": 11})
    await world.commits(lambda other: other.update(ACCOUNT, key(1), {"balance": 12}))

    with pytest.raises(CommitConflictError):
        await transaction.commit()

    assert await world.balances() == {("account", 1, 1): 12}


async def test_scenario_55_a_one_phase_commit_over_a_record_not_yet_rolled_forward_leaves_no_before_image(
    world: World,
) -> None:
    """What was read is decided, though its record still says PREPARED because the recovery was not served."""
    await world.given({1: 10})
    await world.orphan(lambda dead: dead.update(ACCOUNT, key(1), {"balance": 20}), COMMITTED)
    process = world.process(world.storage, one_phase_commit=True)
    transaction = process.begin()
    world.storage.fail(Kind.UNAVAILABLE, writes_to(STORED_ACCOUNT))
    assert await transaction.get(ACCOUNT, key(1)) == row(1, 20)
    await process.drain()
    await transaction.update(ACCOUNT, key(1), {"balance": 21})

    await transaction.commit()

    stored = await world.stored(1)
    assert stored is not None
    assert (stored["balance"], stored["tx_id"], stored["tx_state"], stored["tx_version"]) == (
        21,
        transaction.tx_id,
        3,
        3,
    )
    assert all(value is None for name, value in stored.items() if name.startswith("before_"))


async def test_scenario_56_rolling_back_touches_only_the_own_records(world: World) -> None:
    """Of four records, one was never prepared, one is somebody else's by now, and one was recovered by a reader."""
    await world.given({1: 10, 2: 20, 3: 30, 4: 40})
    one_by_one = world.participant()
    for number in (1, 2, 3):
        await one_by_one.update(ACCOUNT, key(number), {"balance": 0})
    await one_by_one.prepare_records(world.clock.now_ms())
    await world.process().states.abort_state(one_by_one.tx_id)
    await world.manager.recovery.recover_record(ACCOUNT, key(1))
    await world.commits(lambda other: other.update(ACCOUNT, key(2), {"balance": 21}))
    await world.commits(lambda other: other.update(ACCOUNT, key(4), {"balance": 41}))

    assert await one_by_one.rollback_records()

    assert list((await world.balances()).values()) == [10, 21, 30, 41]
    assert await world.in_doubt() == 0


@pytest.mark.parametrize("decided", [COMMITTED, ABORTED])
async def test_scenario_56_settling_late_leaves_alone_what_another_has_prepared_meanwhile(
    world: World, decided: object
) -> None:
    """The record is PREPARED, as this transaction left it, but it is not this transaction's any more."""
    await world.given({1: 10})
    late = world.participant(isolation=Isolation.SNAPSHOT)
    await late.update(ACCOUNT, key(1), {"balance": 11})
    await late.prepare_records(world.clock.now_ms())
    if decided is COMMITTED:
        await world.states.commit_state(late.tx_id, world.clock.now_ms())
    else:
        await world.states.abort_state(late.tx_id)
    await world.manager.recovery.recover_record(ACCOUNT, key(1))
    await world.orphan(lambda other: other.update(ACCOUNT, key(1), {"balance": 50}))
    before = await world.stored(1)

    settled = await (late.commit_records(world.clock.now_ms()) if decided is COMMITTED else late.rollback_records())

    assert settled
    assert await world.stored(1) == before


async def test_scenario_56_a_reader_that_recovers_late_leaves_alone_what_another_has_prepared_meanwhile(
    world: World,
) -> None:
    await world.given({1: 10})
    await world.orphan(lambda dead: dead.update(ACCOUNT, key(1), {"balance": 11}), COMMITTED)
    remains: list[object] = []

    async def others_are_faster() -> None:
        await world.process().recovery.recover_record(ACCOUNT, key(1))
        await world.orphan(lambda other: other.update(ACCOUNT, key(1), {"balance": 50}))
        remains.append(await world.stored(1))

    world.storage.visit_before(writes_to(STORED_ACCOUNT), others_are_faster)
    assert await world.begin().get(ACCOUNT, key(1)) == row(1, 11)
    await world.settled()

    assert [await world.stored(1)] == remains


async def test_scenario_56_a_rollback_restores_what_was_committed_though_it_still_said_prepared(world: World) -> None:
    """Prepared over a record whose roll-forward was not served: its before-image is the decided after-image."""
    await world.given({1: 10})
    earlier = await world.orphan(lambda dead: dead.update(ACCOUNT, key(1), {"balance": 20}), COMMITTED)
    participant = world.participant(storage=world.storage)
    world.storage.fail(Kind.UNAVAILABLE, writes_to(STORED_ACCOUNT))
    assert await participant.get(ACCOUNT, key(1)) == row(1, 20)
    await asyncio.sleep(0)  # The recovery in the background takes the fault.
    await participant.update(ACCOUNT, key(1), {"balance": 21})
    state = await world.state(earlier)
    assert state is not None
    await participant.prepare_records(world.clock.now_ms())
    await world.states.abort_state(participant.tx_id)

    assert await participant.rollback_records()

    stored = await world.stored(1)
    assert stored is not None
    assert (stored["balance"], stored["tx_id"], stored["tx_state"], stored["tx_version"]) == (20, earlier, 3, 2)
    assert stored["tx_committed_at"] == state.created_at_ms


async def test_scenario_56_a_rollback_before_preparing_does_nothing_in_storage(world: World) -> None:
    participant = world.participant(storage=world.storage)
    await participant.insert(ACCOUNT, key(1), {"balance": 1})

    assert await participant.rollback_records()

    assert world.storage.calls == []


async def test_scenario_56_a_participant_says_so_when_a_prepare_may_still_arrive(world: World) -> None:
    """The prepare was not answered and is not there now: it may be under way, so its intent must be kept."""
    participant = world.participant(storage=world.storage)
    await participant.insert(ACCOUNT, key(1), {"balance": 1})
    world.storage.fail(Kind.LOST, writes_to(STORED_ACCOUNT))
    with pytest.raises(StorageError):
        await participant.prepare_records(world.clock.now_ms())

    assert not await participant.rollback_records()


async def test_scenario_56_a_failed_rollback_is_told_and_left_to_readers(world: World) -> None:
    await world.given({1: 10})
    participant = world.participant(storage=world.storage)
    await participant.update(ACCOUNT, key(1), {"balance": 1})
    await participant.prepare_records(world.clock.now_ms())
    await world.states.abort_state(participant.tx_id)
    world.storage.fail(Kind.UNAVAILABLE, writes_to(STORED_ACCOUNT))

    assert not await participant.rollback_records()

    assert await world.in_doubt() == 1
    assert await world.balances() == {("account", 1, 1): 10}


async def test_scenario_57_the_state_row_and_the_records_share_the_time_of_the_commit(
    world: World, moving: Transaction
) -> None:
    async def let_time_pass() -> None:
        world.clock.advance(7)

    world.storage.visit_before(lambda call: call.method == "mutate", let_time_pass, times=None)

    await moving.commit()

    state = await world.state(moving.tx_id)
    assert state is not None
    records = await world.everything()
    assert {record["tx_committed_at"] for record in records} == {state.created_at_ms}
    (prepared_at_ms,) = {record["tx_prepared_at"] for record in records}
    assert prepared_at_ms < state.created_at_ms  # type: ignore[operator]


async def import_row(world: World, number: int, balance: int) -> None:
    """A row that no transaction ever wrote: all its metadata is NULL."""
    await world.plain_storage.mutate([Put(STORED_ACCOUNT, key(number), {"balance": balance})])


async def test_scenario_58_a_row_without_metadata_is_read_updated_and_deleted(world: World) -> None:
    await import_row(world, 1, 10)
    await import_row(world, 2, 20)
    transaction = world.begin()
    assert await transaction.scan(whole()) == [row(1, 10), row(2, 20)]
    await transaction.update(ACCOUNT, key(1), {"balance": 11})
    await transaction.delete(ACCOUNT, key(2))
    await transaction.commit()

    stored = await world.stored(1)
    assert stored is not None
    assert (stored["balance"], stored["tx_version"], stored["tx_state"]) == (11, 1, 3)
    assert await world.stored(2) is None


@pytest.mark.parametrize("change", ["update", "delete"])
async def test_scenario_58_a_row_without_metadata_has_none_again_after_a_rollback(world: World, change: str) -> None:
    await import_row(world, 1, 10)
    before = await world.stored(1)
    dead = world.participant()
    await (dead.update(ACCOUNT, key(1), {"balance": 11}) if change == "update" else dead.delete(ACCOUNT, key(1)))
    await dead.prepare_records(world.clock.now_ms())
    prepared = await world.stored(1)
    assert prepared is not None
    assert (prepared["before_tx_id"], prepared["before_tx_version"], prepared["tx_version"]) == (None, 0, 1)

    world.expire()
    assert await world.begin().get(ACCOUNT, key(1)) == row(1, 10)
    await world.settled()

    assert await world.stored(1) == before


async def test_scenario_58_a_row_without_metadata_is_rolled_back_by_its_own_transaction_too(world: World) -> None:
    await import_row(world, 1, 10)
    before = await world.stored(1)
    participant = world.participant()
    await participant.update(ACCOUNT, key(1), {"balance": 11})
    await participant.prepare_records(world.clock.now_ms())
    await world.states.abort_state(participant.tx_id)

    assert await participant.rollback_records()

    assert await world.stored(1) == before


async def test_scenario_58_two_writers_of_a_row_without_metadata_conflict(world: World) -> None:
    await import_row(world, 1, 10)
    one, other = world.begin(), world.begin()
    await one.update(ACCOUNT, key(1), {"balance": 11})
    await other.update(ACCOUNT, key(1), {"balance": 12})
    await one.commit()

    with pytest.raises(TransactionConflictError):
        await other.commit()


async def test_every_write_to_a_transactional_table_is_conditional(world: World, moving: Transaction) -> None:
    """Cassandra orders plain writes and conditional ones by different clocks: mixed, either may be lost."""
    await moving.commit()
    deleting = world.begin()
    await deleting.delete(ACCOUNT, key(1))
    await deleting.delete(STOCK, key(7))
    await deleting.commit()
    one_phase = world.process(world.storage, one_phase_commit=True).begin()
    await one_phase.upsert(STOCK, key(1), {"balance": 0})
    await one_phase.delete(STOCK, key(2))
    await one_phase.commit()

    mutations = [mutation for call in world.storage.calls for mutation in call.mutations]
    assert len(mutations) > 10
    for mutation in mutations:
        assert mutation.condition is not None
        if isinstance(mutation, Delete):
            assert isinstance(mutation.condition, If)
