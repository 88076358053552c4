"""Intents: what is under way is written down before it begins, and settled by whoever comes after (rules 6 to 8)."""

from __future__ import annotations

import pytest
from faults import Kind, writes_to
from protocol_world import ABORTED, ACCOUNT, COMMITTED, STOCK, World, key

from infra.consensus_commit.coordinator import StateRow
from infra.consensus_commit.intents import Intent, IntentLog, new_intended_id, records_intent
from infra.consensus_commit.metadata import layout_of, transactional
from infra.consensus_commit.participant import ParticipantTransaction
from infra.storage.errors import StorageError
from infra.storage.operations import TableSchema


@pytest.fixture
async def log(world: World) -> IntentLog:
    log = IntentLog(world.plain_storage)
    await log.create_tables()
    return log


def intent_of(participant: ParticipantTransaction, *, coordinator: str = "coordinator-0") -> Intent:
    return Intent(
        tx_id=participant.tx_id,
        coordinator=coordinator,
        coordinator_incarnation="c1",
        home="orders-0",
        home_incarnation="h1",
        partitions=tuple(participant.written_partitions()),
        participants=("orders-0", "inventory-1"),
        created_at_ms=1_600_000_000_000,
    )


async def prepared(world: World) -> ParticipantTransaction:
    """A transaction over two namespaces whose coordinator dies after preparing."""
    participant = world.participant(tx_id=new_intended_id(world.clock))
    await participant.update(ACCOUNT, key(1), {"balance": 9})
    await participant.delete(ACCOUNT, key(2))
    await participant.insert(STOCK, key(1), {"balance": 1})
    await participant.prepare_records(world.clock.now_ms())
    return participant


async def test_an_intent_is_read_back_as_it_was_recorded(log: IntentLog) -> None:
    intent = Intent(
        tx_id="t1",
        coordinator="coordinator-0",
        coordinator_incarnation="c1",
        home="orders-0",
        home_incarnation="h1",
        partitions=(("bank", "account", (1, "東京", True, 2**62)), ("shop", "stock", (b"\x00\xff",))),
        participants=("orders-0", "inventory-1"),
        created_at_ms=1_600_000_000_000,
    )

    await log.record([intent])

    assert await log.of("coordinator-0") == [intent]


async def test_each_coordinator_has_its_own_intents(world: World, log: IntentLog) -> None:
    mine = [intent_of(world.participant()) for _ in range(3)]
    others = [intent_of(world.participant(), coordinator="coordinator-1")]

    await log.record([*mine, *others])

    assert await log.of("coordinator-0") == sorted(mine, key=lambda intent: intent.tx_id)
    assert await log.of("coordinator-1") == others
    assert await log.of("coordinator-2") == []
    assert await log.all() == [*mine, *others]


async def test_removing_intents_leaves_the_others_and_may_be_repeated(world: World, log: IntentLog) -> None:
    kept, settled = intent_of(world.participant()), intent_of(world.participant())
    await log.record([kept, settled])

    for _ in range(2):
        await log.remove("coordinator-0", [settled.tx_id])

    assert await log.of("coordinator-0") == [kept]
    await log.remove("coordinator-0", [])


async def test_an_aborted_transactions_intent_stays_and_says_so(world: World, log: IntentLog) -> None:
    intent = intent_of(world.participant())
    await log.record([intent])

    await log.mark_aborted([intent])

    (marked,) = await log.of("coordinator-0")
    assert marked.aborted
    assert (marked.partitions, marked.participants) == (intent.partitions, intent.participants)


async def test_ids_with_intents_are_uuids_that_scalardb_would_never_make(world: World) -> None:
    with_intent, without = new_intended_id(world.clock), world.clock.new_id()

    assert records_intent(with_intent)
    assert not records_intent(without)
    assert not records_intent("")
    assert len(with_intent) == 36


@pytest.mark.parametrize("decided", [COMMITTED, ABORTED])
async def test_a_successor_settles_what_its_predecessors_intents_name(
    world: World, log: IntentLog, decided: object
) -> None:
    """At once, without waiting for anything to expire: the predecessor is known to be gone."""
    await world.given({1: 10, 2: 20})
    participant = await prepared(world)
    await log.record([intent_of(participant)])
    if decided is COMMITTED:
        await world.states.commit_state(participant.tx_id, world.clock.now_ms())

    tables = {(table.namespace, table.name): table for table in (ACCOUNT, STOCK)}
    successor = world.process()
    settled = 0
    for intent in await log.of("coordinator-0"):
        winner = await successor.states.abort_state(intent.tx_id)
        assert winner.state is decided, "nobody aborts by looking: a decision that stands is obeyed"
        for namespace, table, partition in intent.partitions:
            settled += await successor.recovery.settle_partition(
                tables[(namespace, table)], partition, intent.tx_id, winner
            )
        await log.remove(intent.coordinator, [intent.tx_id])

    assert settled == 3
    assert await world.in_doubt() == 0
    assert await world.balances() == (
        {("account", 1, 1): 9, ("stock", 1, 1): 1}
        if decided is COMMITTED
        else {("account", 1, 1): 10, ("account", 1, 2): 20}
    )
    assert sorted(world.recovered) == ["rolled_forward" if decided is COMMITTED else "rolled_back"] * 3


async def test_settling_a_partition_again_finds_nothing_and_leaves_others_alone(world: World) -> None:
    await world.given({1: 10, 2: 20, 3: 30})
    participant = await prepared(world)
    await world.orphan(lambda other: other.update(ACCOUNT, key(3), {"balance": 31}))
    winner = await world.states.abort_state(participant.tx_id)

    first = await world.manager.recovery.settle_partition(ACCOUNT, (1,), participant.tx_id, winner)
    second = await world.manager.recovery.settle_partition(ACCOUNT, (1,), participant.tx_id, winner)

    assert (first, second) == (2, 0)
    assert await world.in_doubt() == 2, "another transaction's record, and ours in another partition"


async def test_settling_passes_over_records_that_a_reader_settles_meanwhile(world: World) -> None:
    """The batch no longer holds as a whole, so each of its rows is settled by itself."""
    await world.given({1: 10, 2: 20})
    participant = await prepared(world)
    winner = await world.states.abort_state(participant.tx_id)

    async def a_reader_is_faster() -> None:
        await world.process().recovery.recover_record(ACCOUNT, key(1))

    world.storage.visit_before(writes_to(transactional(ACCOUNT)), a_reader_is_faster)
    await world.manager.recovery.settle_partition(ACCOUNT, (1,), participant.tx_id, winner)

    assert await world.in_doubt() == 1, "the record in the shop"
    assert list((await world.balances([ACCOUNT])).values()) == [10, 20]


async def test_settling_tells_when_the_storage_does_not_serve(world: World) -> None:
    await world.given({1: 10, 2: 20})
    participant = await prepared(world)
    winner = StateRow(participant.tx_id, ABORTED, world.clock.now_ms())
    world.storage.fail(Kind.UNAVAILABLE, writes_to(transactional(ACCOUNT)))

    with pytest.raises(StorageError):
        await world.manager.recovery.settle_partition(ACCOUNT, (1,), participant.tx_id, winner)


async def test_records_in_doubt_are_listed_with_whose_they_are_and_since_when(world: World) -> None:
    await world.given({1: 10, 2: 20, 3: 30})
    participant = await prepared(world)

    found = await world.manager.recovery.in_doubt(ACCOUNT)

    prepared_at_ms = world.clock.now_ms()
    assert [(record.key, record.tx_id, record.tx_state.name, record.prepared_at_ms) for record in found] == [
        (key(1), participant.tx_id, "PREPARED", prepared_at_ms),
        (key(2), participant.tx_id, "DELETED", prepared_at_ms),
    ]


async def test_recovering_one_record_says_whether_it_is_at_rest(world: World) -> None:
    await world.given({1: 10})
    await world.orphan(lambda dead: dead.update(ACCOUNT, key(1), {"balance": 11}))
    recovery = world.manager.recovery

    assert not await recovery.recover_record(ACCOUNT, key(1)), "its transaction may be under way"
    world.expire()
    assert await recovery.recover_record(ACCOUNT, key(1))
    assert await recovery.recover_record(ACCOUNT, key(1))
    assert await recovery.recover_record(ACCOUNT, key(9))
    assert await world.in_doubt() == 0


async def test_a_table_is_known_by_its_users_columns_and_by_its_stored_ones(world: World) -> None:
    """Intents and inspection find tables in storage, where they have the transaction columns."""
    by_name = {table.full_name: table for table in await world.plain_storage.tables()}
    stored: TableSchema = by_name[ACCOUNT.full_name]

    assert layout_of(stored) is layout_of(ACCOUNT)
    assert transactional(stored) is transactional(ACCOUNT)
