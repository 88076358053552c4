"""Transactions that commit at once and share a state row: who comes along, who is left out, what failing does.

Played on memory behind a gate that is shut, as in front of Cassandra: one batch at a time into a partition, and every
statement gives way to other tasks. Nothing here waits for time to pass but the patience of a group that leaves
somebody behind, and then for a member that is held until the test lets it go.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from faults import Call, Crashed, FaultyStorage, Kind, Matcher, gets_of
from protocol_world import ABORTED, ACCOUNT, COMMITTED, World, at_once, key, row

from infra.consensus_commit import group_commit
from infra.consensus_commit.coordinator import CHILD_IDS, CoordinatorStates, Pruned, StateRow, group_and_child
from infra.consensus_commit.errors import (
    CommitConflictError,
    PreparationConflictError,
    TransactionConflictError,
    UnknownTransactionStatusError,
    ValidationConflictError,
)
from infra.consensus_commit.group_commit import PREPARING_AT_MOST, GroupCommit, new_group_id
from infra.consensus_commit.intents import IntentLog
from infra.consensus_commit.manager import TransactionManager
from infra.consensus_commit.metadata import transactional
from infra.consensus_commit.transaction import Transaction
from infra.storage.errors import InvalidOperationError, UnavailableStorageError
from infra.storage.forwarding import ForwardingStorage
from infra.storage.memory import MemoryStorage
from infra.storage.operations import Atomicity, DataType, StorageInfo, TableSchema
from infra.storage.port import Storage, add_column
from scripts.bench.watched import phase_of

HOUR_MS = 3_600_000
ACCOUNTS = 6


class Contending(FaultyStorage):
    """A storage whose batches must come one at a time, and which takes its time (turns of the loop) for each."""

    @property
    def info(self) -> StorageInfo:
        return replace(self.storage.info, serializes_batches=False)

    def info_of(self, namespace: str) -> StorageInfo:
        return self.info

    async def add_column(self, table: TableSchema, column: str, data_type: DataType) -> None:
        await add_column(self.storage, table, column, data_type)

    async def _give_way(self) -> None:
        await asyncio.sleep(0)


def writes(phase: str, *, partition: int | None = None) -> Matcher:
    """Batches of one step of the protocol; `partition`: that one's only."""

    def matches(call: Call) -> bool:
        if call.method != "mutate" or "coordinator.intents" in call.tables:
            return False
        here = partition is None or call.mutations[0].key.partition == (partition,)
        return here and phase_of(call.mutations) == phase

    return matches


class Groups(World):
    """A world whose own process commits in groups; other processes have never heard of them unless they are told."""

    def __init__(self, storage: Storage) -> None:
        super().__init__(storage)
        self.storage = Contending(storage)
        self.manager = self.grouping()
        self.states = self.manager.states

    def grouping(self, storage: Storage | None = None, *, name: str | None = None) -> TransactionManager:
        return TransactionManager(
            storage or self.storage,
            self.clock,
            one_phase_commit=False,
            async_commit=False,
            name=name,
            group_commit=True,
            sleep=at_once,
        )

    async def changing(
        self, number: int, *, partition: int = 1, manager: TransactionManager | None = None
    ) -> Transaction:
        """A transaction that wants to add 1 to an account, and has not been told to commit."""
        transaction = (manager or self.manager).begin()
        found = await transaction.get(ACCOUNT, key(number, partition=partition))
        assert found is not None
        await transaction.update(ACCOUNT, key(number, partition=partition), {"balance": found["balance"] + 1})
        return transaction

    def batches(self, phase: str) -> list[Call]:
        return [call for call in self.storage.calls if writes(phase)(call)]

    async def stored_states(self) -> dict[str, StateRow]:
        """Every row of the state table by its id, looked at by a process of its own."""
        states = self.process().states
        await states.create_tables()
        ids = [str(partition[0]) for partition in await self.plain_storage.partitions(states.table)]
        rows = {tx_id: await states._get(tx_id) for tx_id in ids}
        return {tx_id: found for tx_id, found in rows.items() if found is not None}


class Held:
    """Keeps whoever comes along until it is let go; `reached` says that somebody did."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.let_go = asyncio.Event()

    async def __call__(self) -> None:
        self.reached.set()
        await self.let_go.wait()


@pytest.fixture
def patience_s() -> float:
    """Groups wait for their members however slow the machine is. A test of those left behind says otherwise."""
    return 60.0


@pytest.fixture
def turn_s() -> float:
    """And a group goes before the next however long it takes. A test of groups that hang says otherwise."""
    return 60.0


@pytest.fixture
async def groups(patience_s: float, turn_s: float, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Groups]:
    monkeypatch.setattr(group_commit, "SHORTEST_PATIENCE_S", patience_s)
    monkeypatch.setattr(group_commit, "LONGEST_TURN_S", turn_s)
    made = Groups(MemoryStorage(Atomicity.PARTITION))
    await made.create()
    await made.given({number: 10 * number for number in range(1, ACCOUNTS + 1)})
    for partition in range(2, 2 + PREPARING_AT_MOST):
        await made.given({1: 100}, partition=partition)
    made.storage.calls.clear()
    yield made
    made.storage.heal()
    async with asyncio.timeout(5):
        await made.manager.drain()


async def commit_all(transactions: Sequence[Transaction]) -> list[BaseException | None]:
    async with asyncio.timeout(5):
        return await asyncio.gather(*(each.commit() for each in transactions), return_exceptions=True)


def group_of(*transactions: Transaction) -> str:
    """The group that they are all in."""
    (group,) = {parts[0] if (parts := group_and_child(each.tx_id)) else None for each in transactions}
    assert group is not None
    return group


# -- who comes along


async def test_transactions_that_commit_at_once_share_a_state_row(groups: Groups) -> None:
    transactions = [await groups.changing(number) for number in range(1, 6)]
    began_as = [each.tx_id for each in transactions]

    assert await commit_all(transactions) == [None] * 5

    group = group_of(*transactions)
    assert [each.tx_id for each in transactions] == [f"{group}${tx_id}" for tx_id in began_as]
    states = await groups.stored_states()
    assert list(states) == [group]
    assert (states[group].state, sorted(states[group].child_ids)) == (COMMITTED, sorted(began_as))
    assert len(groups.batches("commit_state")) == 1
    assert [len(call.mutations) for call in groups.batches("prepare_records")] == [1, 4], "those who wait go together"
    for number, each in enumerate(transactions, 1):
        stored = await groups.stored(number)
        assert stored is not None
        assert (stored["tx_id"], stored["balance"], stored["tx_state"]) == (each.tx_id, 10 * number + 1, COMMITTED)
        assert stored["tx_committed_at"] == states[group].created_at_ms


async def test_whoever_is_alone_keeps_its_id_and_has_a_row_of_its_own(groups: Groups) -> None:
    for number in (1, 2):  # One after the other: neither meets anybody.
        transaction = await groups.changing(number)
        began_as = transaction.tx_id

        await transaction.commit()

        assert transaction.tx_id == began_as
        assert (await groups.stored_states())[began_as] == StateRow(began_as, COMMITTED, groups.clock.now_ms())
    assert len(await groups.stored_states()) == 2


async def test_a_group_has_no_more_members_than_it_may(groups: Groups) -> None:
    forming = GroupCommit(groups.states, groups.clock, members_at_most=2)

    members = await asyncio.gather(*(forming.join(f"child-{number}") for number in range(5)))
    await asyncio.gather(*(member.commit_state() for member in members))

    states = (await groups.stored_states()).values()
    assert sorted(len(state.child_ids) for state in states) == [0, 2, 2], "whoever is left over is alone"


async def test_the_next_group_gathers_while_the_ones_before_prepare(groups: Groups) -> None:
    forming = GroupCommit(groups.states, groups.clock, preparing_at_most=1)
    first = await forming.join("first")
    others = [asyncio.ensure_future(forming.join(name)) for name in ("second", "third")]
    for _ in range(10):
        await asyncio.sleep(0)
    assert not any(other.done() for other in others)

    await first.commit_state()

    second, third = await asyncio.gather(*others)
    await asyncio.gather(second.commit_state(), third.commit_state())
    states = await groups.stored_states()
    assert len(states) == 2
    assert states["first"].child_ids == ()
    (together,) = [state for state in states.values() if state.child_ids]
    assert together.child_ids == ("second", "third")


async def test_reading_and_one_phase_commits_join_no_group(groups: Groups) -> None:
    manager = TransactionManager(groups.storage, groups.clock, group_commit=True, async_commit=False)
    writing = [await groups.changing(number, manager=manager) for number in (1, 2)]
    reading = manager.begin()
    await reading.get(ACCOUNT, key(3))

    assert await commit_all([*writing, reading]) == [None] * 3

    assert await groups.stored_states() == {}


def test_the_id_of_a_group_looks_like_one_and_no_two_are_the_same() -> None:
    world = World(MemoryStorage())
    ids = {new_group_id(world.clock) for _ in range(100)}
    assert len(ids) == 100
    assert all(group_and_child(f"{group}$child") == (group, "child") for group in ids)


# -- who is left out


@pytest.mark.parametrize("patience_s", [1.0])
async def test_a_slow_member_is_left_out_and_commits_by_a_row_of_its_own(groups: Groups) -> None:
    slow, *others = [await groups.changing(1, partition=2), await groups.changing(1), await groups.changing(2)]
    held = Held()
    groups.storage.visit_before(writes("prepare_records", partition=2), held)
    slowly = asyncio.ensure_future(slow.commit())

    assert await commit_all(others) == [None, None]

    assert held.reached.is_set()
    group = group_of(slow, *others)
    assert {tx_id: len(state.child_ids) for tx_id, state in (await groups.stored_states()).items()} == {group: 2}

    held.let_go.set()
    await slowly
    states = await groups.stored_states()
    assert set(states) == {group, slow.tx_id}
    assert (states[slow.tx_id].state, states[slow.tx_id].child_ids) == (COMMITTED, ())
    balances = await groups.balances([ACCOUNT])
    assert (balances["account", 2, 1], balances["account", 1, 1], balances["account", 1, 2]) == (101, 11, 21)


@pytest.mark.parametrize("what", ["cannot prepare", "is not valid"])
async def test_a_member_that_fails_leaves_and_the_others_commit(groups: Groups, what: str) -> None:
    failing = await groups.changing(1)
    others = [await groups.changing(2), await groups.changing(3)]
    expected: type[TransactionConflictError] = PreparationConflictError
    in_the_way = 1
    if what == "is not valid":
        await failing.get(ACCOUNT, key(4))
        expected, in_the_way = ValidationConflictError, 4
    await groups.commits(lambda other: other.update(ACCOUNT, key(in_the_way), {"balance": 77}))

    failure, *rest = await commit_all([failing, *others])

    assert type(failure) is expected
    assert rest == [None, None]
    group = group_of(failing, *others)
    states = await groups.stored_states()
    assert {group_and_child(each.tx_id)[1] for each in others} == {*states[group].child_ids}  # type: ignore[index]
    assert states[failing.tx_id].state is ABORTED
    balances = await groups.balances([ACCOUNT])
    assert [balances["account", 1, number] for number in (2, 3)] == [21, 31]
    assert balances["account", 1, 1] == (10 if in_the_way == 4 else 77)
    assert await groups.in_doubt() == 0


async def test_who_is_the_only_one_left_in_its_group_has_a_row_of_its_own(groups: Groups) -> None:
    failing, other = await groups.changing(1), await groups.changing(2)
    await groups.commits(lambda another: another.update(ACCOUNT, key(1), {"balance": 77}))

    failure, success = await commit_all([failing, other])

    assert (type(failure), success) == (PreparationConflictError, None)
    states = await groups.stored_states()
    assert group_of(failing, other) not in states
    assert (states[other.tx_id].state, states[failing.tx_id].state) == (COMMITTED, ABORTED)
    assert await groups.in_doubt() == 0


@pytest.mark.parametrize("turn_s", [group_commit.LONGEST_TURN_S])
async def test_members_that_hang_do_not_hold_up_the_next_group(groups: Groups) -> None:
    """As many groups as may prepare at a time, each with a member whose prepare is not answered."""
    stuck, hanging = [], []
    for partition in range(2, 2 + PREPARING_AT_MOST):
        held = Held()
        groups.storage.visit_before(writes("prepare_records", partition=partition), held)
        stuck.append(held)
        hanging.append(asyncio.ensure_future((await groups.changing(1, partition=partition)).commit()))
        async with asyncio.timeout(5):
            await held.reached.wait()

    assert await commit_all([await groups.changing(1), await groups.changing(2)]) == [None, None]

    assert not any(task.done() for task in hanging)
    for held in stuck:
        held.let_go.set()
    await asyncio.gather(*hanging)
    balances = await groups.balances([ACCOUNT])
    assert [balances["account", partition, 1] for partition in range(2, 2 + PREPARING_AT_MOST)] == [101] * 3
    assert await groups.in_doubt() == 0


# -- who gives up


async def test_whoever_is_cancelled_before_its_group_starts_leaves_it(groups: Groups) -> None:
    forming = GroupCommit(groups.states, groups.clock, preparing_at_most=1)
    first = await forming.join("first")
    impatient, patient = (asyncio.ensure_future(forming.join(name)) for name in ("impatient", "patient"))
    await asyncio.sleep(0)

    impatient.cancel()
    await asyncio.wait([impatient])
    first.leave()

    member = await patient
    assert member.tx_id == "patient", "it is alone"
    await member.commit_state()
    assert list(await groups.stored_states()) == ["patient"]


async def test_a_group_that_everybody_has_left_does_not_hold_up_the_next(groups: Groups) -> None:
    forming = GroupCommit(groups.states, groups.clock, preparing_at_most=1)
    for _ in range(3):
        (await forming.join("nobody")).leave()

    member = await forming.join("somebody")
    await member.commit_state()
    member.leave()

    assert list(await groups.stored_states()) == ["somebody"]


async def test_a_commit_that_is_cancelled_while_it_prepares_leaves_its_group(groups: Groups) -> None:
    given_up = await groups.changing(1, partition=2)
    others = [await groups.changing(1), await groups.changing(2)]
    held = Held()
    groups.storage.visit_before(writes("prepare_records", partition=2), held)
    giving_up = asyncio.ensure_future(given_up.commit())
    committing = [asyncio.ensure_future(each.commit()) for each in others]
    await held.reached.wait()

    giving_up.cancel()

    async with asyncio.timeout(5):
        await asyncio.gather(*committing)
    with pytest.raises(asyncio.CancelledError):
        await giving_up
    group = group_of(given_up, *others)
    assert {tx_id: len(state.child_ids) for tx_id, state in (await groups.stored_states()).items()} == {group: 2}
    groups.expire()
    assert (await groups.balances([ACCOUNT]))["account", 2, 1] == 100, "nothing of it took effect"


async def test_who_is_cancelled_while_its_group_decides_is_committed_like_the_others(groups: Groups) -> None:
    transactions = [await groups.changing(number) for number in (1, 2)]
    held = Held()
    groups.storage.visit_before(writes("commit_state"), held)
    given_up, waiting = (asyncio.ensure_future(each.commit()) for each in transactions)
    await held.reached.wait()

    given_up.cancel()
    await asyncio.wait([given_up])
    held.let_go.set()
    await waiting

    assert given_up.cancelled()
    state = await groups.state(transactions[0].tx_id)
    assert state is not None
    assert state.state is COMMITTED
    balances = await groups.balances([ACCOUNT])
    assert [balances["account", 1, number] for number in (1, 2)] == [11, 21]


# -- what others, and storage, do to a group


async def test_an_aborted_group_loses_only_the_member_that_was_meant(groups: Groups) -> None:
    meant, *others = [await groups.changing(number) for number in (1, 2, 3)]

    async def abort() -> None:
        await groups.process().states.abort_state(meant.tx_id)  # It was taken for dead.

    groups.storage.visit_before(writes("commit_state"), abort)

    failure, *rest = await commit_all([meant, *others])

    assert type(failure) is CommitConflictError
    assert rest == [None, None]
    group = group_of(meant, *others)
    assert {tx_id: state.state for tx_id, state in (await groups.stored_states()).items()} == {
        group: ABORTED,
        meant.tx_id: ABORTED,
        others[0].tx_id: COMMITTED,
        others[1].tx_id: COMMITTED,
    }
    balances = await groups.balances([ACCOUNT])
    assert [balances["account", 1, number] for number in (1, 2, 3)] == [10, 21, 31]
    assert await groups.in_doubt() == 0


async def test_a_put_that_was_applied_and_not_answered_is_found_committed(groups: Groups) -> None:
    transactions = [await groups.changing(number) for number in (1, 2)]
    groups.storage.fail(Kind.UNANSWERED, writes("commit_state"))

    assert await commit_all(transactions) == [None, None]

    assert list(await groups.stored_states()) == [group_of(*transactions)]
    assert len(groups.batches("commit_state")) == 2, "it was put again"


@pytest.mark.parametrize("applied", [True, False], ids=["applied", "not applied"])
async def test_a_put_that_nobody_answers_is_unknown_to_every_member_by_its_own_id(
    groups: Groups, applied: bool
) -> None:
    transactions = [await groups.changing(number) for number in (1, 2, 3)]
    if applied:
        groups.storage.fail(Kind.UNANSWERED, writes("commit_state"))
        groups.storage.fail(Kind.UNAVAILABLE, gets_of(groups.states.table), times=None)
    else:
        groups.storage.fail(Kind.LOST, writes("commit_state"), times=None)

    failures = await commit_all(transactions)

    for transaction, failure in zip(transactions, failures, strict=True):
        assert isinstance(failure, UnknownTransactionStatusError)
        assert failure.tx_id == transaction.tx_id
    assert len({id(failure) for failure in failures}) == 3, "each has an error of its own"
    groups.storage.heal()
    groups.expire()
    for transaction in transactions:
        decided = await groups.manager.states.get_state(transaction.tx_id)
        assert (decided is not None) is applied
    balances = await groups.balances([ACCOUNT])
    assert [balances["account", 1, number] for number in (1, 2, 3)] == ([11, 21, 31] if applied else [10, 20, 30])
    assert await groups.in_doubt() == 0


async def test_a_put_that_surely_was_not_written_aborts_every_member(groups: Groups) -> None:
    transactions = [await groups.changing(number) for number in (1, 2, 3)]
    groups.storage.fail(Kind.UNAVAILABLE, writes("commit_state"), times=None)

    failures = await commit_all(transactions)

    assert [type(failure) for failure in failures] == [UnavailableStorageError] * 3
    assert len({id(failure) for failure in failures}) == 3, "each has an error of its own"
    states = await groups.stored_states()
    assert {tx_id: state.state for tx_id, state in states.items()} == {each.tx_id: ABORTED for each in transactions}
    assert await groups.in_doubt() == 0
    balances = await groups.balances([ACCOUNT])
    assert [balances["account", 1, number] for number in (1, 2, 3)] == [10, 20, 30]


async def test_what_storage_says_besides_is_told_to_every_member() -> None:
    class Refusing(ForwardingStorage):
        async def mutate(self, mutations: Sequence[Any]) -> None:
            raise UnavailableStorageError("no room", remedy="make room")

    world = Groups(MemoryStorage(Atomicity.PARTITION))
    await world.create()
    states = CoordinatorStates(Refusing(world.plain_storage), world.clock, group_commit=True, tries=1, sleep=at_once)
    forming = GroupCommit(states, world.clock)
    members = await asyncio.gather(*(forming.join(name) for name in ("one", "other")))

    failures = await asyncio.gather(*(member.commit_state() for member in members), return_exceptions=True)

    assert [getattr(failure, "remedy", None) for failure in failures] == ["make room"] * 2
    assert failures[0] is not failures[1]


# -- the state table


async def put_together(world: World) -> World:
    """A world whose state table was made by a process that knows no groups, and has a row."""
    await world.create()
    await world.given({1: 10, 2: 20})
    return world


async def test_a_state_table_without_the_column_is_given_it() -> None:
    world = Groups(MemoryStorage(Atomicity.PARTITION))
    await put_together(before := World(world.plain_storage))
    old = await before.commits(lambda other: other.update(ACCOUNT, key(1), {"balance": 5}))
    assert CHILD_IDS not in before.states.table.columns

    await world.manager.create_coordinator_tables()
    await world.manager.create_coordinator_tables()  # Again, as every process does when it starts.

    transactions = [await world.changing(number) for number in (1, 2)]
    assert await commit_all(transactions) == [None, None]
    states = await world.stored_states()
    assert set(states) == {old, group_of(*transactions)}
    assert states[old].child_ids == ()


class WithoutChanges(Contending):
    """A storage that has no way to add a column."""

    add_column = None  # type: ignore[assignment]


async def test_a_storage_that_cannot_add_the_column_says_so() -> None:
    storage = MemoryStorage(Atomicity.PARTITION)
    await put_together(World(storage))
    world = Groups(storage)
    manager = world.grouping(WithoutChanges(storage))

    with pytest.raises(InvalidOperationError, match=r"coordinator\.state has no column tx_child_ids"):
        await manager.create_coordinator_tables()


async def test_a_table_that_cannot_hold_groups_is_noticed_before_anything_is_prepared() -> None:
    storage = MemoryStorage(Atomicity.PARTITION)
    await put_together(World(storage))
    world = Groups(storage)  # And nobody has asked it to create its tables.

    failures = await commit_all([await world.changing(number) for number in (1, 2)])

    for failure in failures:
        assert isinstance(failure, InvalidOperationError)
        assert "create_coordinator_tables" in str(failure)
    assert world.batches("prepare_records") == []
    assert await world.in_doubt() == 0


class OfTheirTime(Contending):
    """Like Cassandra, where a program that knows fewer columns than there are reads and writes those that it knows."""

    async def get(self, table: TableSchema, key: Any) -> Any:
        whole = await self._whole(table)
        found = await super().get(whole, key)
        return found and {name: value for name, value in found.items() if name in table.columns}

    async def mutate(self, mutations: Sequence[Any]) -> None:
        await super().mutate([replace(each, table=await self._whole(each.table)) for each in mutations])

    async def _whole(self, table: TableSchema) -> TableSchema:
        return next(each for each in await self.storage.tables() if each.full_name == table.full_name)


async def test_a_process_from_before_the_column_looks_again_when_it_meets_a_member() -> None:
    """Else it would find the group decided without the member, and abort what is committed."""
    storage = MemoryStorage(Atomicity.PARTITION)
    world = Groups(storage)
    older = world.process(OfTheirTime(storage))
    await put_together(World(storage))
    async with older.begin() as transaction:  # It knows the table as it was.
        await transaction.update(ACCOUNT, key(1), {"balance": 11})
        await transaction.update(ACCOUNT, key(2), {"balance": 21})
        await transaction.commit()
    assert CHILD_IDS not in older.states.table.columns
    await world.manager.create_coordinator_tables()
    world.storage.fail(Kind.CRASH_BEFORE, writes("commit_records"))
    died = await commit_all([await world.changing(number) for number in (1, 2)])
    assert [type(outcome) for outcome in died] == [Crashed, Crashed]
    world.expire()

    async with older.begin() as transaction:
        assert await transaction.get(ACCOUNT, key(1)) == row(1, 12)
        assert await transaction.get(ACCOUNT, key(2)) == row(2, 22)
        await transaction.commit()
    await older.recovery.drain()
    assert [state.state for state in (await world.stored_states()).values() if state.child_ids] == [COMMITTED]


# -- crashes, and who cleans up


Crash = tuple[Kind, str]
BEFORE, AFTER = (Kind.CRASH_BEFORE, "commit_state"), (Kind.CRASH_AFTER, "commit_state")


async def leftovers(groups: Groups, manager: TransactionManager, crash_at: Crash) -> list[Transaction]:
    """Three members of one group, all prepared, whose process dies before or after the group's row."""
    kind, phase = crash_at
    transactions = [await groups.changing(number, manager=manager) for number in (1, 2, 3)]
    groups.storage.fail(kind, writes(phase))
    tasks = [asyncio.ensure_future(each.commit()) for each in transactions]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    return transactions


@pytest.mark.parametrize("crash_at", [BEFORE, AFTER], ids=["undecided", "committed"])
async def test_a_process_without_groups_reads_and_recovers_their_members(groups: Groups, crash_at: Crash) -> None:
    transactions = await leftovers(groups, groups.manager, crash_at)
    assert await groups.in_doubt() == 3
    groups.expire()

    other = groups.process()
    async with other.begin() as reading:
        found = [await reading.get(ACCOUNT, key(number)) for number in (1, 2, 3)]
        await reading.commit()
    await other.recovery.drain()

    assert found == [row(1, 11), row(2, 21), row(3, 31)] if crash_at is AFTER else [row(1, 10), row(2, 20), row(3, 30)]
    assert await groups.in_doubt() == 0
    group = group_of(*transactions)
    states = {tx_id: state.state for tx_id, state in (await groups.stored_states()).items()}
    if crash_at is AFTER:
        assert states == {group: COMMITTED}
    else:
        assert states == {group: ABORTED, **{each.tx_id: ABORTED for each in transactions}}


@pytest.mark.parametrize("crash_at", [BEFORE, AFTER], ids=["undecided", "committed"])
async def test_a_sweeper_settles_what_a_group_left_behind(groups: Groups, crash_at: Crash) -> None:
    named = groups.grouping(name="billing")
    await named.create_coordinator_tables()
    transactions = await leftovers(groups, named, crash_at)
    log = IntentLog(groups.plain_storage)
    assert {intent.tx_id for intent in await log.all()} == {each.tx_id for each in transactions}

    again = groups.grouping(groups.plain_storage, name="billing")
    swept = await again.sweeper.sweep()

    assert (swept.transactions, swept.records) == (3, 3)
    assert await groups.in_doubt() == 0
    balances = await groups.balances([ACCOUNT])
    assert [balances["account", 1, number] for number in (1, 2, 3)] == (
        [11, 21, 31] if crash_at is AFTER else [10, 20, 30]
    )
    assert [intent.aborted for intent in await log.all()] == ([] if crash_at is AFTER else [True] * 3)
    await again.close()


async def test_a_groups_row_is_forgotten_only_when_every_child_is_settled(groups: Groups) -> None:
    named = groups.grouping(name="billing")
    await named.create_coordinator_tables()
    log = IntentLog(groups.plain_storage)
    unlucky = await groups.changing(1, partition=2, manager=named)
    others = [await groups.changing(number, manager=named) for number in (1, 2)]
    groups.storage.fail(Kind.UNAVAILABLE, writes("commit_records", partition=2), times=None)
    assert await commit_all([unlucky, *others]) == [None] * 3
    await named.close()
    groups.clock.advance(HOUR_MS + 1)

    async def prune() -> Pruned:
        return await groups.process().states.prune(log, older_than_ms=HOUR_MS, writer_is_gone=lambda intent: True)

    assert [intent.tx_id for intent in await log.all()] == [unlucky.tx_id]
    assert await prune() == Pruned(committed=0, aborted=0)
    assert list(await groups.stored_states()) == [group_of(unlucky, *others)]

    again = groups.grouping(groups.plain_storage, name="billing")
    await again.sweeper.sweep()
    await again.close()
    assert await prune() == Pruned(committed=1, aborted=0)
    assert await groups.stored_states() == {}
    assert (await groups.balances([ACCOUNT]))["account", 2, 1] == 101


async def test_a_groups_row_with_a_child_that_records_no_intents_is_kept(groups: Groups) -> None:
    log = IntentLog(groups.plain_storage)
    await log.create_tables()
    assert await commit_all([await groups.changing(number) for number in (1, 2)]) == [None, None]
    groups.clock.advance(HOUR_MS + 1)

    pruned = await groups.process().states.prune(log, older_than_ms=HOUR_MS, writer_is_gone=lambda intent: True)

    assert pruned == Pruned(0, 0)


@pytest.mark.parametrize("named", [True, False], ids=["by intents", "by scanning"])
async def test_finishing_a_group_settles_every_member_before_its_row_is_forgotten(groups: Groups, named: bool) -> None:
    """Without the row, they would be taken for undecided, and be rolled back."""
    manager = groups.grouping(name="billing" if named else None)
    await manager.create_coordinator_tables()
    transactions = await leftovers(groups, manager, AFTER)
    group = group_of(*transactions)
    again = groups.grouping(groups.plain_storage, name="billing" if named else None)

    if not named:
        assert await again.sweeper.finish(group) is False, "nothing says where to look"
        assert list(await groups.stored_states()) == [group]
    assert await again.sweeper.finish(group, () if named else (transactional(ACCOUNT),)) is True

    assert await groups.in_doubt() == 0
    assert await groups.stored_states() == {}
    balances = await groups.balances([ACCOUNT])
    assert [balances["account", 1, number] for number in (1, 2, 3)] == [11, 21, 31]
    if named:
        assert await IntentLog(groups.plain_storage).all() == []
    await again.close()


async def test_finishing_a_member_leaves_its_groups_row_to_the_others(groups: Groups) -> None:
    one, *others = await leftovers(groups, groups.manager, AFTER)
    again = groups.grouping(groups.plain_storage)

    assert await again.sweeper.finish(one.tx_id, (transactional(ACCOUNT),)) is True

    assert list(await groups.stored_states()) == [group_of(one, *others)]
    assert await groups.in_doubt() == 2
    balances = await groups.balances([ACCOUNT])
    assert [balances["account", 1, number] for number in (1, 2, 3)] == [11, 21, 31]
