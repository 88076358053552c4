"""Scenarios 7 to 19: records that a transaction left prepared, met by every way to read them."""

from __future__ import annotations

import asyncio

import pytest
from faults import Matcher, following, gets_of, reads_of, writes_to
from protocol_world import ABORTED, ACCOUNT, COMMITTED, World, key, row, whole
from readers import BY_GET, Reader, each_read

from infra.consensus_commit.errors import CrudConflictError, PreparationConflictError, UncommittedRecordError
from infra.consensus_commit.metadata import BEFORE, transactional
from infra.consensus_commit.participant import ParticipantTransaction
from infra.consensus_commit.recovery import RECOVERIES_AT_ONCE
from infra.consensus_commit.states import Isolation, TransactionState
from infra.storage.operations import Delete, IfNotExists, Key, Put, TableSchema


def second_look(world: World, table: TableSchema = ACCOUNT) -> Matcher:
    """The reader's next look at a record for which it has found no state row."""
    return following(reads_of(world.states.table), gets_of(transactional(table)))


@each_read
async def test_scenario_07_a_prepared_record_whose_state_is_committed_is_read_as_its_after_image_and_rolled_forward(
    world: World, read: Reader
) -> None:
    await world.given({1: 10}, table=read.table)
    tx_id = await world.orphan(read.update, COMMITTED)

    assert await read(read.begin(world)) == row(1, 99)

    await world.settled()
    stored, state = await world.stored(1, table=read.table), await world.state(tx_id)
    assert stored is not None
    assert state is not None
    assert (stored["tx_id"], stored["tx_state"], stored["tx_version"]) == (tx_id, 3, 2)
    assert stored["tx_committed_at"] == state.created_at_ms
    assert all(value is None for name, value in stored.items() if name.startswith(BEFORE))
    assert world.recovered == ["rolled_forward"]


@each_read
async def test_scenario_08_a_prepared_record_whose_state_is_aborted_is_read_as_its_before_image_and_rolled_back(
    world: World, read: Reader
) -> None:
    await world.given({1: 10}, table=read.table)
    before = await world.stored(1, table=read.table)
    await world.orphan(read.update, ABORTED)

    assert await read(read.begin(world)) == row(1, 10)

    await world.settled()
    assert await world.stored(1, table=read.table) == before
    assert world.recovered == ["rolled_back"]


@each_read
async def test_scenario_09_a_freshly_prepared_undecided_record_is_a_conflict_and_stays_as_it_is(
    world: World, read: Reader
) -> None:
    await world.given({1: 10}, table=read.table)
    tx_id = await world.orphan(read.update)
    before = await world.stored(1, table=read.table)

    with pytest.raises(UncommittedRecordError) as raised:
        await read(read.begin(world))

    assert raised.value.tx_id == tx_id
    await world.settled()
    assert await world.stored(1, table=read.table) == before
    assert await world.state(tx_id) is None


@each_read
async def test_scenario_10_an_expired_undecided_record_is_aborted_and_read_as_its_before_image(
    world: World, read: Reader
) -> None:
    await world.given({1: 10}, table=read.table)
    before = await world.stored(1, table=read.table)
    tx_id = await world.orphan(read.update)
    world.expire()

    assert await read(read.begin(world)) == row(1, 10)

    state = await world.state(tx_id)
    assert state is not None
    assert state.state is ABORTED
    await world.settled()
    assert await world.stored(1, table=read.table) == before


async def test_scenario_10_a_record_expires_only_after_its_transactions_lifetime(world: World) -> None:
    await world.given({1: 10})
    await world.orphan(BY_GET.update)
    world.clock.advance(15_000)

    with pytest.raises(UncommittedRecordError):
        await BY_GET(world.begin())

    world.clock.advance(1)
    assert await BY_GET(world.begin()) == row(1, 10)


async def test_scenario_10_a_record_stamped_in_the_future_expires_once_it_was_observed_for_a_lifetime(
    world: World,
) -> None:
    """A writer whose clock is years ahead must not keep a record in doubt for years."""
    await world.given({1: 10})
    dead = world.participant()
    await BY_GET.update(dead)
    await dead.prepare_records(world.clock.now_ms() + 10**12)
    with pytest.raises(UncommittedRecordError):
        await BY_GET(world.begin())

    world.clock.advance(15_001)

    assert await BY_GET(world.begin()) == row(1, 10)


@each_read
async def test_scenario_11_an_inserted_record_of_an_aborted_transaction_vanishes(world: World, read: Reader) -> None:
    await world.orphan(read.insert, ABORTED)

    assert await read(read.begin(world)) is None

    await world.settled()
    assert await world.stored(1, table=read.table) is None


@each_read
async def test_scenario_11_an_expired_insert_vanishes_too(world: World, read: Reader) -> None:
    tx_id = await world.orphan(read.insert)
    world.expire()

    assert await read(read.begin(world)) is None

    await world.settled()
    assert await world.stored(1, table=read.table) is None
    assert await world.state_rows() == {tx_id: ABORTED}


@each_read
async def test_scenario_12_a_deleted_record_of_a_committed_transaction_is_absent_and_removed(
    world: World, read: Reader
) -> None:
    await world.given({1: 10}, table=read.table)
    await world.orphan(read.delete, COMMITTED)

    assert await read(read.begin(world)) is None

    await world.settled()
    assert await world.stored(1, table=read.table) is None


@each_read
async def test_scenario_13_a_deleted_record_of_an_aborted_transaction_is_restored(world: World, read: Reader) -> None:
    await world.given({1: 10}, table=read.table)
    before = await world.stored(1, table=read.table)
    await world.orphan(read.delete, ABORTED)

    assert await read(read.begin(world)) == row(1, 10)

    await world.settled()
    assert await world.stored(1, table=read.table) == before


@each_read
async def test_scenario_14_an_expired_deleted_record_is_restored(world: World, read: Reader) -> None:
    await world.given({1: 10}, table=read.table)
    before = await world.stored(1, table=read.table)
    tx_id = await world.orphan(read.delete)
    world.expire()

    assert await read(read.begin(world)) == row(1, 10)

    await world.settled()
    assert await world.stored(1, table=read.table) == before
    assert await world.state_rows() == {tx_id: ABORTED}


async def test_scenario_14_the_deletion_of_an_absent_record_leaves_nothing_when_it_is_rolled_back(
    world: World,
) -> None:
    await world.orphan(BY_GET.delete, ABORTED)

    assert await BY_GET(world.begin()) is None

    await world.settled()
    assert await world.stored(1) is None


@each_read
async def test_scenario_15_an_abort_that_loses_to_the_commit_is_obeyed(world: World, read: Reader) -> None:
    """The slow writer commits between the reader's look at the state table and its ABORTED row."""
    await world.given({1: 10}, table=read.table)
    tx_id = await world.orphan(read.update)
    world.expire()
    slow_writer = world.process().states
    world.storage.visit_before(
        writes_to(world.states.table), lambda: slow_writer.commit_state(tx_id, world.clock.now_ms())
    )

    assert await read(read.begin(world)) == row(1, 99)

    await world.settled()
    assert await world.state_rows() == {tx_id: COMMITTED}
    stored = await world.stored(1, table=read.table)
    assert stored is not None
    assert (stored["tx_id"], stored["tx_state"]) == (tx_id, 3)


@each_read
async def test_scenario_16_a_record_that_another_has_written_meanwhile_is_resolved_again(
    world: World, read: Reader
) -> None:
    """Between the reader's two looks, somebody else rolls the orphan back and prepares the record anew."""
    await world.given({1: 10}, table=read.table)
    await world.orphan(read.update)
    world.expire()

    async def another_recovers_and_prepares() -> None:
        await world.balances([read.table])
        await world.orphan(lambda other: other.update(read.table, key(1), {"balance": 50}), COMMITTED)

    world.storage.visit_before(second_look(world, read.table), another_recovers_and_prepares)

    assert await read(read.begin(world)) == row(1, 50)


@pytest.mark.parametrize("instant", ["before the reader looks again", "before the reader aborts"])
async def test_scenario_16_a_transaction_that_was_committed_settled_and_forgotten_meanwhile_stays_committed(
    world: World, instant: str
) -> None:
    """No state row any more is not the same as none yet: only the record tells."""
    await world.given({1: 10})
    slow = world.participant()
    await slow.upsert(ACCOUNT, key(1), {"balance": 99})
    await slow.prepare_records(world.clock.now_ms())
    world.expire()

    async def commit_settle_and_forget() -> None:
        states = world.process().states
        await states.commit_state(slow.tx_id, world.clock.now_ms())
        await slow.validate_records()
        assert await slow.commit_records(world.clock.now_ms())
        await world.plain_storage.mutate([Delete(states.table, Key((slow.tx_id,)))])

    looks_again = instant == "before the reader looks again"
    moment = second_look(world) if looks_again else writes_to(world.states.table)
    world.storage.visit_before(moment, commit_settle_and_forget)

    assert await BY_GET(world.begin()) == row(1, 99)
    assert await world.state_rows() == ({} if looks_again else {slow.tx_id: ABORTED}), "nobody is aborted for nothing"


@each_read
async def test_scenario_17_a_record_that_keeps_changing_hands_is_a_conflict(world: World, read: Reader) -> None:
    await world.given({1: 10}, table=read.table)
    await world.orphan(read.update)
    world.expire()
    hands = 0

    async def change_hands() -> None:
        nonlocal hands
        hands += 1
        await world.balances([read.table])
        await world.orphan(read.update)
        world.expire()

    world.storage.visit_before(second_look(world, read.table), change_hands, times=None)

    with pytest.raises(CrudConflictError, match="changed hands"):
        await read(read.begin(world))
    assert hands == 5


@each_read
@pytest.mark.parametrize(("decided", "balance", "kind"), [(COMMITTED, 99, "rolled_forward"), (None, 10, "rolled_back")])
async def test_scenario_18_two_readers_that_recover_at_once_have_one_effect(
    world: World, read: Reader, decided: object, balance: int, kind: str
) -> None:
    await world.given({1: 10}, table=read.table)
    await world.orphan(read.update, decided)  # type: ignore[arg-type]
    world.expire()
    one, other = world.process(), world.process()

    found = await asyncio.gather(read(read.begin(world, one)), read(read.begin(world, other)))

    assert found == [row(1, balance), row(1, balance)]
    await asyncio.gather(one.recovery.drain(), other.recovery.drain())
    assert world.recovered == [kind], "the second found its condition unmet"
    assert await world.balances([read.table]) == {(read.table.name, 1, 1): balance}


async def test_scenario_18_two_readers_of_one_process_share_a_recovery(world: World) -> None:
    await world.given({1: 10})
    await world.orphan(BY_GET.update, COMMITTED)
    both_have_read = asyncio.Event()
    world.storage.visit_before(writes_to(ACCOUNT), both_have_read.wait)

    await asyncio.gather(BY_GET(world.begin()), BY_GET(world.begin()))
    both_have_read.set()
    await world.settled()

    writes = [call for call in world.storage.calls if call.method == "mutate"]
    assert len(writes) == 1


LEFT_BEHIND = {"undecided": None, "committed": COMMITTED, "aborted": ABORTED}


@each_read
@pytest.mark.parametrize("decided", LEFT_BEHIND.values(), ids=LEFT_BEHIND.keys())
async def test_scenario_19_read_committed_reads_the_before_image_and_asks_nobody(
    world: World, read: Reader, decided: TransactionState | None
) -> None:
    await world.given({1: 10}, table=read.table)
    await world.orphan(read.update, decided)
    reader = world.manager.begin(Isolation.READ_COMMITTED, read_only=True)

    assert await read(reader) == row(1, 10)

    await reader.commit()
    await world.settled()
    assert not [call for call in world.storage.calls if world.states.table.full_name in call.tables]
    assert not [call for call in world.storage.calls if call.method == "mutate"], "one that only reads recovers nothing"


@each_read
@pytest.mark.parametrize(("decided", "balance"), [(COMMITTED, 99), (ABORTED, 10)], ids=["committed", "aborted"])
async def test_scenario_19_read_committed_has_the_record_recovered_in_the_background(
    world: World, read: Reader, decided: TransactionState, balance: int
) -> None:
    await world.given({1: 10}, table=read.table)
    await world.orphan(read.update, decided)

    assert await read(world.begin(Isolation.READ_COMMITTED)) == row(1, 10)

    await world.settled()
    assert await world.in_doubt() == 0
    assert await read(world.begin(Isolation.READ_COMMITTED)) == row(1, balance)


async def test_a_scan_under_read_committed_starts_so_many_recoveries_and_leaves_the_rest_to_the_next(
    world: World,
) -> None:
    records = range(1, RECOVERIES_AT_ONCE + 11)
    await world.given(dict.fromkeys(records, 10))

    async def touch_all(dead: ParticipantTransaction) -> None:
        for number in records:
            await dead.update(ACCOUNT, key(number), {"balance": 99})

    await world.orphan(touch_all, COMMITTED)

    assert len(await world.begin(Isolation.READ_COMMITTED).scan(whole())) == len(records)
    await world.settled()
    assert await world.in_doubt() == 10

    await world.begin(Isolation.READ_COMMITTED).scan(whole())
    await world.settled()
    assert await world.in_doubt() == 0


@each_read
async def test_scenario_19_an_insert_in_doubt_is_absent_under_read_committed(world: World, read: Reader) -> None:
    await world.orphan(read.insert)
    assert await read(world.begin(Isolation.READ_COMMITTED)) is None

    await world.settled()
    stored = await world.stored(1, table=read.table)
    assert stored is not None
    assert stored["tx_state"] == 1, "it is young: nobody may abort it"


@each_read
async def test_scenario_19_a_deletion_in_doubt_has_not_happened_under_read_committed(
    world: World, read: Reader
) -> None:
    await world.given({1: 10}, table=read.table)
    await world.orphan(read.delete)

    assert await read(world.begin(Isolation.READ_COMMITTED)) == row(1, 10)


async def test_scenario_19_a_write_under_read_committed_waits_for_the_recovery_of_what_it_read(world: World) -> None:
    await world.given({1: 10})
    await world.orphan(BY_GET.update, ABORTED)
    transaction = world.begin(Isolation.READ_COMMITTED)
    assert await BY_GET(transaction) == row(1, 10)

    await transaction.update(ACCOUNT, key(1), {"balance": 11})
    await transaction.commit()

    assert await world.balances() == {("account", 1, 1): 11}


async def test_scenario_19_a_write_under_read_committed_over_a_commit_it_has_not_seen_is_a_conflict(
    world: World,
) -> None:
    await world.given({1: 10})
    await world.orphan(BY_GET.update, COMMITTED)
    transaction = world.begin(Isolation.READ_COMMITTED)
    assert await BY_GET(transaction) == row(1, 10)
    await transaction.update(ACCOUNT, key(1), {"balance": 11})

    with pytest.raises(PreparationConflictError):
        await transaction.commit()

    assert await world.balances() == {("account", 1, 1): 99}


async def test_a_write_waits_for_the_recovery_of_what_it_read(world: World) -> None:
    """Otherwise its prepare would still find the orphan's tx_id and conflict."""
    await world.given({1: 10})
    await world.orphan(BY_GET.update, ABORTED)
    transaction = world.begin(Isolation.SNAPSHOT)
    assert await BY_GET(transaction) == row(1, 10)

    await transaction.update(ACCOUNT, key(1), {"balance": 11})
    await transaction.commit()

    stored = await world.stored(1)
    assert stored is not None
    assert (stored["balance"], stored["tx_version"]) == (11, 2)


async def test_a_serializable_reader_waits_for_the_recovery_of_what_it_read(world: World) -> None:
    await world.given({1: 10, 2: 20})
    await world.orphan(BY_GET.update, ABORTED)
    transaction = world.begin()
    assert await BY_GET(transaction) == row(1, 10)

    await transaction.update(ACCOUNT, key(2), {"balance": 21})
    await transaction.commit()

    assert await world.balances() == {("account", 1, 1): 10, ("account", 1, 2): 21}


async def test_an_orphan_in_the_way_of_a_blind_insert_is_recovered_for_the_next_try(world: World) -> None:
    """A hole in ScalarDB (PR 3868): an insert reads nothing, so nobody would ever recover what blocks it."""
    await world.orphan(BY_GET.insert)
    world.expire()
    inserting = world.begin()
    await BY_GET.insert(inserting)
    with pytest.raises(Exception, match="not as it was read"):
        await inserting.commit()
    await world.settled()

    await world.given({1: 7})

    assert await world.balances() == {("account", 1, 1): 7}


async def test_a_record_that_was_prepared_by_hand_with_scalardbs_columns_is_recovered(world: World) -> None:
    """The columns as ScalarDB 3.19 writes them, spelled out: the format on disk is a contract."""
    columns = {
        "balance": 99,
        "note": None,
        "tx_id": "6c5a9f6c-8a0e-4f0e-9c0b-3d6f5e3a1b2c",
        "tx_state": 1,
        "tx_version": 4,
        "tx_prepared_at": world.clock.now_ms(),
        "tx_committed_at": None,
        "before_balance": 10,
        "before_note": "ten",
        "before_tx_id": "0f8fad5b-d9cb-469f-a165-70867728950e",
        "before_tx_state": 3,
        "before_tx_version": 3,
        "before_tx_prepared_at": 1_500_000_000_000,
        "before_tx_committed_at": 1_500_000_000_001,
    }
    await world.plain_storage.mutate([Put(transactional(ACCOUNT), key(1), columns, IfNotExists())])
    world.expire()

    assert await BY_GET(world.begin()) == row(1, 10, "ten")

    await world.settled()
    assert await world.stored(1) == {
        **row(1, 10, "ten"),
        "tx_id": "0f8fad5b-d9cb-469f-a165-70867728950e",
        "tx_state": 3,
        "tx_version": 3,
        "tx_prepared_at": 1_500_000_000_000,
        "tx_committed_at": 1_500_000_000_001,
        **{name: None for name in columns if name.startswith("before_")},
    }
    assert await world.state_rows() == {"6c5a9f6c-8a0e-4f0e-9c0b-3d6f5e3a1b2c": ABORTED}
