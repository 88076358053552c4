"""Scenarios 59 to 66: one coordinator and many participants, groups that Java programs commit, and cleaning up by id.

64 is the reading side alone: groups are understood, and never formed here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from faults import Call, FaultyStorage, writes_to
from protocol_world import ABORTED, ACCOUNT, COMMITTED, STOCK, World, key, row, whole

from infra.consensus_commit.coordinator import CoordinatorStates
from infra.consensus_commit.errors import (
    CommitConflictError,
    CrudConflictError,
    IllegalOperationError,
    PreparationConflictError,
    TransactionNotFoundError,
    UncommittedRecordError,
    ValidationConflictError,
)
from infra.consensus_commit.metadata import transactional
from infra.consensus_commit.recovery import RecoveryHandler
from infra.consensus_commit.states import Isolation, TransactionState
from infra.consensus_commit.transaction import Transaction
from infra.consensus_commit.two_phase import TwoPhaseCoordinator, TwoPhaseParticipant
from infra.storage.errors import NoMutationError
from infra.storage.memory import MemoryStorage
from infra.storage.operations import DataType, IfNotExists, Key, Put
from infra.storage.port import Storage

STORED_ACCOUNT = transactional(ACCOUNT)
STORED_STOCK = transactional(STOCK)


class Places:
    """A coordinator, and two places that know nothing of each other: the bank's storage is not the shop's.

    The bank and the state table are in the world's storage, the shop has its own.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.bank_storage = world.storage
        self.shop_storage = FaultyStorage(MemoryStorage())
        self.bank = self._place("bank", self.bank_storage)
        self.shop = self._place("shop", self.shop_storage)
        self.coordinator = TwoPhaseCoordinator(world.states, world.clock, one_phase_commit=False)

    async def create(self) -> None:
        await self.shop_storage.create_table(STORED_STOCK)

    async def given(self) -> None:
        """10 in the bank and 100 in the shop."""
        await self.world.given({1: 10})
        tx_id = self.coordinator.begin()
        await self.coordinator.enlist(tx_id, self.shop).insert(STOCK, key(1), {"balance": 100})
        await self.coordinator.commit(tx_id)
        self.shop_storage.calls.clear()
        self.bank_storage.calls.clear()

    async def balances(self) -> tuple[object, object]:
        """What a transaction over both reads now."""
        tx_id = self.coordinator.begin()
        held = await self.coordinator.enlist(tx_id, self.bank).get(ACCOUNT, key(1))
        owed = await self.coordinator.enlist(tx_id, self.shop).get(STOCK, key(1))
        await self.coordinator.commit(tx_id)
        return held and held["balance"], owed and owed["balance"]

    def _place(self, name: str, storage: Storage) -> TwoPhaseParticipant:
        recovery = RecoveryHandler(storage, self.world.states, self.world.clock)
        return TwoPhaseParticipant(name, storage, recovery, self.world.clock)


@pytest.fixture
async def places(world: World) -> Places:
    made = Places(world)
    await made.create()
    await made.given()
    return made


def mutations(storage: FaultyStorage) -> list[Call]:
    return [call for call in storage.calls if call.method == "mutate"]


async def test_scenario_59_enlisting_a_participant_again_changes_nothing(places: Places) -> None:
    tx_id = places.coordinator.begin()
    part = places.coordinator.enlist(tx_id, places.bank)
    await part.update(ACCOUNT, key(1), {"balance": 9})

    assert places.coordinator.enlist(tx_id, places.bank) is part
    assert places.bank.join(tx_id) is part
    await places.coordinator.commit(tx_id)

    assert await places.balances() == (9, 100)
    stored = await places.world.stored(1)
    assert stored is not None
    assert stored["tx_version"] == 2, "it was written once"


async def test_scenario_59_two_participants_may_not_go_by_one_name(places: Places) -> None:
    tx_id = places.coordinator.begin()
    places.coordinator.enlist(tx_id, places.bank)

    with pytest.raises(IllegalOperationError, match="two participants"):
        places.coordinator.enlist(tx_id, Places(places.world).bank)


async def test_scenario_59_a_participant_may_not_be_joined_at_two_isolations(places: Places) -> None:
    tx_id = places.coordinator.begin(Isolation.SNAPSHOT)
    assert places.coordinator.enlist(tx_id, places.bank).isolation is Isolation.SNAPSHOT

    with pytest.raises(IllegalOperationError, match="SNAPSHOT"):
        places.bank.join(tx_id, Isolation.SERIALIZABLE)


async def test_scenario_60_both_of_two_participants_that_commit_at_once_succeed(world: World) -> None:
    """As in ScalarDB's older interface: each participant puts the COMMITTED row itself, and the loser sees it there."""
    await world.given({1: 10})
    await world.given({1: 100}, table=STOCK)
    tx_id = world.clock.new_id()
    one, other = world.participant(tx_id=tx_id), world.participant(tx_id=tx_id)
    await one.update(ACCOUNT, key(1), {"balance": 9})
    await other.update(STOCK, key(1), {"balance": 101})
    await asyncio.gather(one.prepare_records(world.clock.now_ms()), other.prepare_records(world.clock.now_ms()))
    await asyncio.gather(one.validate_records(), other.validate_records())

    async def commit(participant: Any, committed_at_ms: int) -> None:
        await world.process().states.commit_state(tx_id, committed_at_ms)
        assert await participant.commit_records(committed_at_ms)

    await asyncio.gather(commit(one, world.clock.now_ms()), commit(other, world.clock.now_ms()))

    assert await world.state_rows() == {tx_id: COMMITTED}
    assert await world.balances() == {("account", 1, 1): 9, ("stock", 1, 1): 101}
    assert await world.in_doubt() == 0


async def test_scenario_60_a_transaction_over_two_storages_is_committed_in_both(places: Places) -> None:
    tx_id = places.coordinator.begin()
    await places.coordinator.enlist(tx_id, places.bank).update(ACCOUNT, key(1), {"balance": 9})
    await places.coordinator.enlist(tx_id, places.shop).update(STOCK, key(1), {"balance": 101})
    await places.coordinator.commit(tx_id)

    assert await places.balances() == (9, 101)
    state = await places.world.state(tx_id)
    assert state is not None
    held = await places.bank_storage.get(STORED_ACCOUNT, key(1))
    owed = await places.shop_storage.get(STORED_STOCK, key(1))
    assert [(r["tx_id"], r["tx_state"], r["tx_committed_at"]) for r in (held, owed) if r] == [
        (tx_id, 3, state.created_at_ms)
    ] * 2


async def test_scenario_60_a_conflict_in_one_storage_takes_back_what_was_prepared_in_the_other(places: Places) -> None:
    tx_id = places.coordinator.begin()
    await places.coordinator.enlist(tx_id, places.bank).update(ACCOUNT, key(1), {"balance": 9})
    await places.coordinator.enlist(tx_id, places.shop).update(STOCK, key(1), {"balance": 101})
    other = places.coordinator.begin()
    await places.coordinator.enlist(other, places.shop).update(STOCK, key(1), {"balance": 200})
    await places.coordinator.commit(other)

    with pytest.raises(PreparationConflictError):
        await places.coordinator.commit(tx_id)

    assert await places.balances() == (10, 200)
    assert (await places.world.state_rows())[tx_id] is ABORTED
    assert await places.world.in_doubt() == 0


async def test_scenario_60_participants_prepare_and_commit_side_by_side(places: Places) -> None:
    """Each waits for the other in the middle of its work: one after the other, they would wait for ever."""
    together = asyncio.Barrier(2)

    async def wait() -> None:
        await asyncio.wait_for(together.wait(), 60)

    places.bank_storage.visit_before(writes_to(STORED_ACCOUNT), wait, times=2)
    places.shop_storage.visit_before(writes_to(STORED_STOCK), wait, times=2)
    tx_id = places.coordinator.begin()
    await places.coordinator.enlist(tx_id, places.bank).update(ACCOUNT, key(1), {"balance": 9})
    await places.coordinator.enlist(tx_id, places.shop).update(STOCK, key(1), {"balance": 101})

    await places.coordinator.commit(tx_id)

    assert await places.balances() == (9, 101)


@pytest.mark.parametrize("reads_more", [False, True], ids=["only what it writes", "more than it writes"])
async def test_scenario_61_a_serializable_participant_commits_only_what_was_validated(
    world: World, reads_more: bool
) -> None:
    await world.given({1: 10, 2: 20})
    participant = world.participant()
    if reads_more:
        await participant.get(ACCOUNT, key(2))
    await participant.update(ACCOUNT, key(1), {"balance": 9})
    await participant.prepare_records(world.clock.now_ms())

    if reads_more:
        with pytest.raises(IllegalOperationError, match="must be validated"):
            await participant.commit_records(world.clock.now_ms())
        assert await world.in_doubt() == 1
        await participant.validate_records()
    await world.states.commit_state(participant.tx_id, world.clock.now_ms())

    assert await participant.commit_records(world.clock.now_ms())
    assert await world.balances() == {("account", 1, 1): 9, ("account", 1, 2): 20}


async def test_scenario_61_the_coordinator_validates_what_each_participant_has_read(places: Places) -> None:
    tx_id = places.coordinator.begin()
    await places.coordinator.enlist(tx_id, places.shop).get(STOCK, key(1))
    await places.coordinator.enlist(tx_id, places.bank).update(ACCOUNT, key(1), {"balance": 9})
    other = places.coordinator.begin()
    await places.coordinator.enlist(other, places.shop).update(STOCK, key(1), {"balance": 200})
    await places.coordinator.commit(other)

    with pytest.raises(ValidationConflictError):
        await places.coordinator.commit(tx_id)

    assert await places.balances() == (10, 200)


async def test_scenario_62_a_transaction_that_nobody_knows_is_not_found(places: Places) -> None:
    with pytest.raises(TransactionNotFoundError):
        places.bank.resume("unknown")
    with pytest.raises(TransactionNotFoundError):
        places.coordinator.enlist("unknown", places.bank)
    with pytest.raises(TransactionNotFoundError):
        await places.coordinator.commit("unknown")
    await places.coordinator.rollback("unknown")
    places.bank.release("unknown")


async def test_scenario_62_a_transaction_is_resumed_by_its_id_until_it_ends(places: Places) -> None:
    tx_id = places.coordinator.begin()
    await places.coordinator.enlist(tx_id, places.bank).update(ACCOUNT, key(1), {"balance": 9})

    await places.bank.resume(tx_id).update(ACCOUNT, key(1), {"note": "resumed"})
    await places.coordinator.commit(tx_id)

    assert await places.world.begin().get(ACCOUNT, key(1)) == row(1, 9, "resumed")
    with pytest.raises(TransactionNotFoundError):
        places.bank.resume(tx_id)
    with pytest.raises(TransactionNotFoundError):
        await places.coordinator.commit(tx_id)


async def test_scenario_62_a_transaction_that_was_rolled_back_is_not_found_and_has_written_nothing(
    places: Places,
) -> None:
    tx_id = places.coordinator.begin()
    await places.coordinator.enlist(tx_id, places.bank).update(ACCOUNT, key(1), {"balance": 9})
    await places.coordinator.rollback(tx_id)

    for ended in (places.bank.resume, lambda tx_id: places.coordinator.enlist(tx_id, places.bank)):
        with pytest.raises(TransactionNotFoundError):
            ended(tx_id)
    assert mutations(places.bank_storage) == []


async def test_scenario_62_a_participant_that_has_forgotten_its_part_lets_nothing_be_committed(places: Places) -> None:
    """It was restarted, or had too many transactions: what the caller wrote there is lost, so all of it must be."""
    tx_id = places.coordinator.begin()
    await places.coordinator.enlist(tx_id, places.bank).update(ACCOUNT, key(1), {"balance": 9})
    await places.coordinator.enlist(tx_id, places.shop).update(STOCK, key(1), {"balance": 101})
    places.shop.release(tx_id)

    with pytest.raises(TransactionNotFoundError):
        await places.coordinator.commit(tx_id)

    assert await places.balances() == (10, 100)
    assert mutations(places.bank_storage) == []


@pytest.mark.parametrize("isolation", list(Isolation))
async def test_scenario_63_a_participant_that_wrote_nothing_takes_no_part_in_the_commit(
    places: Places, isolation: Isolation
) -> None:
    tx_id = places.coordinator.begin(isolation)
    await places.coordinator.enlist(tx_id, places.shop).get(STOCK, key(1))
    await places.coordinator.enlist(tx_id, places.bank).update(ACCOUNT, key(1), {"balance": 9})
    await places.coordinator.commit(tx_id)

    assert mutations(places.shop_storage) == []
    validated = isolation is Isolation.SERIALIZABLE
    assert [call.method for call in places.shop_storage.calls] == ["get"] * (2 if validated else 1)
    assert await places.balances() == (9, 100)


async def test_scenario_63_a_transaction_that_wrote_nothing_anywhere_leaves_no_state_row(places: Places) -> None:
    before = await places.world.state_rows()

    assert await places.balances() == (10, 100)

    assert await places.world.state_rows() == before
    assert mutations(places.bank_storage) == mutations(places.shop_storage) == []


# -- groups of Java programs


GROUP = "0123456789abcdef01234567"
ONE, OTHER = f"{GROUP}$one", f"{GROUP}$other"


@pytest.fixture
async def grouped(storage: Storage) -> AsyncIterator[World]:
    """A world whose state table a Java program has made that commits in groups."""
    made = World(storage, coordinator_namespace="grouped")
    plain = CoordinatorStates(storage, made.clock, namespace="grouped").table
    await storage.create_table(replace(plain, columns={**plain.columns, "tx_child_ids": DataType.TEXT}))
    await made.create()
    await made.given({1: 10, 2: 20})
    yield made
    made.storage.heal()
    await made.settled()


async def put_state(world: World, tx_id: str, state: TransactionState, *children: str) -> None:
    """What a Java program writes."""
    await world.states.create_tables()
    columns = {
        "tx_state": state.value,
        "tx_created_at": world.clock.now_ms() + 7,
        "tx_child_ids": ",".join(children) or None,
    }
    await world.plain_storage.mutate([Put(world.states.table, Key((tx_id,)), columns, IfNotExists())])


async def change_one(dead: Transaction) -> None:
    await dead.update(ACCOUNT, key(1), {"balance": 11})


async def change_other(dead: Transaction) -> None:
    await dead.update(ACCOUNT, key(2), {"balance": 22})


async def found(world: World) -> list[object]:
    return list((await world.balances()).values())


async def test_scenario_64_all_children_of_a_group_are_committed_by_its_row(grouped: World) -> None:
    await grouped.orphan(change_one, tx_id=ONE)
    await grouped.orphan(change_other, tx_id=OTHER)
    await put_state(grouped, GROUP, COMMITTED, "one", "other")

    assert await found(grouped) == [11, 22]

    stored = await grouped.stored(1)
    assert stored is not None
    assert (stored["tx_id"], stored["tx_state"]) == (ONE, 3)
    assert stored["tx_committed_at"] == grouped.clock.now_ms() + 7, "that of the group's row"
    assert await grouped.in_doubt() == 0


async def test_scenario_64_a_slow_member_of_a_group_is_committed_by_a_row_of_its_own(grouped: World) -> None:
    await grouped.orphan(change_one, tx_id=ONE)
    await grouped.orphan(change_other, tx_id=OTHER)
    await put_state(grouped, GROUP, COMMITTED, "one")
    grouped.expire()
    await put_state(grouped, OTHER, COMMITTED)

    assert await found(grouped) == [11, 22]
    assert await grouped.in_doubt() == 0


async def test_scenario_64_a_slow_member_whose_group_has_committed_may_still_be_under_way(grouped: World) -> None:
    await grouped.orphan(change_other, tx_id=OTHER)
    await put_state(grouped, GROUP, COMMITTED, "one")

    with pytest.raises(UncommittedRecordError):
        await grouped.begin().get(ACCOUNT, key(2))


async def test_scenario_64_a_member_that_failed_and_left_its_group_is_rolled_back(grouped: World) -> None:
    await grouped.orphan(change_one, tx_id=ONE)
    await grouped.orphan(change_other, tx_id=OTHER)
    await put_state(grouped, GROUP, COMMITTED, "one")
    await put_state(grouped, OTHER, ABORTED)

    assert await found(grouped) == [11, 20]
    assert await grouped.in_doubt() == 0


async def test_scenario_64_a_group_of_one_that_waited_in_vain_is_a_group_all_the_same(grouped: World) -> None:
    await grouped.orphan(change_one, tx_id=ONE)
    await put_state(grouped, GROUP, COMMITTED, "one")

    assert await found(grouped) == [11, 20]
    assert await grouped.in_doubt() == 0


async def test_scenario_64_a_child_whose_group_was_barred_may_have_committed_by_itself(grouped: World) -> None:
    await grouped.orphan(change_one, tx_id=ONE)
    await put_state(grouped, GROUP, ABORTED)
    await put_state(grouped, ONE, COMMITTED)

    assert await found(grouped) == [11, 20]


def state_writes(world: World) -> Any:
    return writes_to(world.states.table)


async def test_scenario_65_whoever_recovers_a_child_of_an_open_group_bars_the_group_first(grouped: World) -> None:
    await grouped.orphan(change_one, tx_id=ONE)
    grouped.expire()

    assert await grouped.begin().get(ACCOUNT, key(1)) == row(1, 10)

    await grouped.settled()
    barred = [call.mutations[0].key for call in grouped.storage.calls if state_writes(grouped)(call)]
    assert barred == [Key((GROUP,)), Key((ONE,))], "the group, then the child"
    group = await grouped.plain_storage.get(grouped.states.table, Key((GROUP,)))
    assert group is not None
    assert (group["tx_state"], group["tx_child_ids"]) == (4, None)
    with pytest.raises(NoMutationError):  # The Java program, late, finds that its group cannot commit.
        await put_state(grouped, GROUP, COMMITTED, "one", "other")
    with pytest.raises(NoMutationError):  # And neither can the child alone.
        await put_state(grouped, ONE, COMMITTED)


async def test_scenario_65_a_group_that_commits_just_before_it_is_barred_has_committed(grouped: World) -> None:
    await grouped.orphan(change_one, tx_id=ONE)
    grouped.expire()
    grouped.storage.visit_before(state_writes(grouped), lambda: put_state(grouped, GROUP, COMMITTED, "one", "other"))

    assert await grouped.begin().get(ACCOUNT, key(1)) == row(1, 11)

    await grouped.settled()
    assert await grouped.state_rows() == {GROUP: COMMITTED}, "nobody was aborted"


async def test_scenario_65_a_slow_member_that_commits_while_its_group_is_being_barred_has_committed(
    grouped: World,
) -> None:
    await grouped.orphan(change_one, tx_id=ONE)
    grouped.expire()

    async def commit_alone() -> None:
        await put_state(grouped, ONE, COMMITTED)

    grouped.storage.visit_before(lambda call: state_writes(grouped)(call) and of(call, ONE), commit_alone)

    assert await grouped.begin().get(ACCOUNT, key(1)) == row(1, 11)
    assert await grouped.state_rows() == {GROUP: ABORTED, ONE: COMMITTED}


def of(call: Call, tx_id: str) -> bool:
    return any(mutation.key == Key((tx_id,)) for mutation in call.mutations)


async def test_scenario_65_a_group_that_has_committed_without_the_child_is_left_as_it_is(grouped: World) -> None:
    await grouped.orphan(change_other, tx_id=OTHER)
    await put_state(grouped, GROUP, COMMITTED, "one")
    grouped.expire()

    assert await grouped.begin().get(ACCOUNT, key(2)) == row(2, 20)

    await grouped.settled()
    assert await grouped.state_rows() == {GROUP: COMMITTED, OTHER: ABORTED}


async def test_scenario_65_a_writer_whose_group_was_barred_is_refused(grouped: World) -> None:
    """Seen from a writer of this engine, were it in a group: what recovery put under its full id stands."""
    await grouped.orphan(change_one, tx_id=ONE)
    grouped.expire()
    await grouped.begin(Isolation.SNAPSHOT).get(ACCOUNT, key(1))

    with pytest.raises(CommitConflictError):
        await grouped.process().states.commit_state(ONE, grouped.clock.now_ms())


# -- by id


@pytest.mark.parametrize(("decided", "balance"), [(COMMITTED, 11), (ABORTED, 10)], ids=["committed", "aborted"])
async def test_scenario_66_finishing_a_decided_transaction_settles_it_and_forgets_its_state_row(
    world: World, decided: TransactionState, balance: int
) -> None:
    await world.given({1: 10})
    await world.given({1: 100}, table=STOCK)

    async def change_both(dead: Transaction) -> None:
        await dead.update(ACCOUNT, key(1), {"balance": 11})
        await dead.delete(STOCK, key(1))

    tx_id = await world.orphan(change_both, decided)

    assert await world.process().sweeper.finish(tx_id, [ACCOUNT, STOCK])

    assert await world.in_doubt() == 0
    assert await world.state_rows() == {}
    after = {("account", 1, 1): balance}
    assert await world.balances() == (after if decided is COMMITTED else after | {("stock", 1, 1): 100})


async def test_scenario_66_finishing_a_transaction_without_a_state_row_does_nothing(world: World) -> None:
    await world.given({1: 10})
    tx_id = await world.orphan(change_one)
    before = await world.everything()

    assert await world.process().sweeper.finish(tx_id, [ACCOUNT])
    assert await world.process().sweeper.finish("never begun", [ACCOUNT])

    assert await world.everything() == before
    assert await world.state_rows() == {}


async def test_scenario_66_recovering_a_record_brings_it_to_rest_as_soon_as_it_can_be(world: World) -> None:
    await world.given({1: 10, 2: 20})
    recovery = world.process().recovery
    await world.orphan(change_one)
    assert not await recovery.recover_record(ACCOUNT, key(1)), "its transaction may be under way"
    assert await recovery.recover_record(ACCOUNT, key(2)), "it is at rest"
    assert await recovery.recover_record(ACCOUNT, key(3)), "it is absent"

    world.expire()

    assert await recovery.recover_record(ACCOUNT, key(1))
    assert await world.in_doubt() == 0
    assert await world.balances() == {("account", 1, 1): 10, ("account", 1, 2): 20}


@pytest.mark.parametrize(("decided", "balance"), [(COMMITTED, 11), (ABORTED, 10)], ids=["committed", "aborted"])
async def test_scenario_66_recovering_a_record_obeys_the_decision(
    world: World, decided: TransactionState, balance: int
) -> None:
    await world.given({1: 10})
    tx_id = await world.orphan(change_one, decided)

    assert await world.process().recovery.recover_record(ACCOUNT, key(1))

    stored = await world.stored(1)
    assert stored is not None
    assert (stored["balance"], stored["tx_state"]) == (balance, 3)
    assert await world.state_rows() == {tx_id: decided}, "it takes finishing to forget it"


async def test_scenario_66_recovering_a_transaction_by_id_leaves_an_undecided_one_alone(world: World) -> None:
    await world.given({1: 10})
    tx_id = await world.orphan(change_one)
    sweeper = world.process().sweeper

    with pytest.raises(CrudConflictError):
        await sweeper.recover(tx_id, [ACCOUNT])
    assert await world.in_doubt() == 1

    assert await sweeper.recover(tx_id, [ACCOUNT], abort=True) == 1
    assert await world.in_doubt() == 0
    assert await world.begin().scan(whole()) == [row(1, 10)]
