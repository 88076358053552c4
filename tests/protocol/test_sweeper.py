"""What a dead process leaves behind is settled although nobody reads it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from faults import Crashed, Kind, writes_to
from protocol_world import ABORTED, ACCOUNT, COMMITTED, STOCK, World, key

from infra.clock import ManualClock
from infra.consensus_commit.coordinator import CoordinatorStates, group_and_child
from infra.consensus_commit.errors import CrudConflictError, TransactionConflictError, UnknownTransactionStatusError
from infra.consensus_commit.intents import Intent, IntentLog
from infra.consensus_commit.manager import TransactionManager
from infra.consensus_commit.metadata import transactional
from infra.consensus_commit.recovery import TRANSACTION_LIFETIME_MS
from infra.consensus_commit.sweeper import LOOKED_AT_AGAIN, Sweeper
from infra.consensus_commit.transaction import Transaction
from infra.storage.memory import MemoryStorage
from infra.storage.operations import DataType, Key, Put, TableSchema, Value
from infra.storage.port import Storage

STORED_ACCOUNT = transactional(ACCOUNT)
STORED_STOCK = transactional(STOCK)
STATES = CoordinatorStates(MemoryStorage(), ManualClock()).table
INTENTS = IntentLog(MemoryStorage()).table


async def named(world: World, name: str = "billing", storage: Storage | None = None) -> TransactionManager:
    """A process of that name, just started. It waits for nothing."""
    manager = TransactionManager(
        storage or world.plain_storage, world.clock, name=name, one_phase_commit=False, sleep=_give_way
    )
    await manager.create_coordinator_tables()
    return manager


async def _give_way(seconds: float) -> None:
    await asyncio.sleep(0)


async def move_money(transaction: Transaction) -> None:
    await transaction.update(ACCOUNT, key(1), {"balance": 5})
    await transaction.update(STOCK, key(1), {"balance": 15})


async def given_money(world: World) -> None:
    await world.given({1: 10})
    await world.given({1: 10}, table=STOCK)


async def dies(world: World, *, at: TableSchema, kind: Kind = Kind.CRASH_AFTER, name: str = "billing") -> str:
    """A named process that moves money and dies around its write to the table `at`; the transaction's id."""
    manager = await named(world, name, world.storage)
    world.storage.fail(kind, writes_to(at))
    transaction = manager.begin()
    await move_money(transaction)
    with pytest.raises(Crashed):
        await transaction.commit()
    return transaction.tx_id


async def balances(world: World) -> list[object]:
    rows = [await world.stored(1), await world.stored(1, table=STOCK)]
    return [row and row["balance"] for row in rows]


async def test_a_successor_rolls_back_at_once_what_its_predecessor_had_prepared(world: World) -> None:
    await given_money(world)
    tx_id = await dies(world, at=STORED_STOCK)
    assert await world.in_doubt() >= 1

    successor = await named(world)
    swept = await successor.sweeper.sweep()

    assert swept.transactions == 1
    assert swept.records >= 1
    assert await world.in_doubt() == 0
    assert await balances(world) == [10, 10]
    state = await world.state(tx_id)
    assert state is not None
    assert state.state is ABORTED, "the predecessor may only be paused"


async def test_a_successor_rolls_forward_at_once_what_its_predecessor_had_committed(world: World) -> None:
    await given_money(world)
    await dies(world, at=STATES)
    assert await world.in_doubt() == 2

    successor = await named(world)
    await successor.sweeper.sweep()

    assert await world.in_doubt() == 0
    assert await balances(world) == [5, 15]
    assert await successor.sweeper.sweep() == type(await successor.sweeper.sweep())(), "the intent is gone"


async def test_what_another_name_left_is_settled_once_it_was_watched_for_a_lifetime(world: World) -> None:
    await given_money(world)
    await dies(world, at=STORED_STOCK, name="dead")
    other = await named(world, "alive")

    assert (await other.sweeper.sweep()).waiting == 1
    world.clock.advance(TRANSACTION_LIFETIME_MS)
    assert (await other.sweeper.sweep()).waiting == 1, "not a moment too early"
    assert await world.in_doubt() >= 1
    world.clock.advance(1)
    assert (await other.sweeper.sweep()).transactions == 1

    assert await world.in_doubt() == 0
    assert await balances(world) == [10, 10]


async def test_a_transaction_under_way_is_left_alone_by_its_own_sweeper(world: World) -> None:
    await given_money(world)
    manager = await named(world, storage=world.storage)
    swept = []

    async def sweep() -> None:
        swept.append(await manager.sweeper.sweep())

    world.storage.visit_before(writes_to(STATES), sweep)
    await manager.run(move_money)
    await manager.close()

    assert (swept[0].waiting, swept[0].transactions) == (1, 0)
    assert await balances(world) == [5, 15]


async def test_records_that_could_not_be_committed_at_once_are_committed_by_the_sweeper(world: World) -> None:
    await given_money(world)
    manager = await named(world, storage=world.storage)
    world.storage.fail(Kind.UNAVAILABLE, writes_to(STORED_STOCK), nth=2, times=None)
    await manager.run(move_money)
    await manager.drain()
    assert await world.in_doubt() == 1
    world.storage.heal()

    assert (await manager.sweeper.sweep()).records == 1

    assert await world.in_doubt() == 0
    assert await balances(world) == [5, 15]


async def test_prepares_of_a_paused_writer_that_arrive_late_are_rolled_back_in_a_later_round(world: World) -> None:
    await given_money(world)
    paused = await named(world, storage=world.storage)
    transaction = paused.begin()
    await move_money(transaction)
    successors: list[TransactionManager] = []

    async def everything_happens_meanwhile() -> None:
        successors.append(await named(world))
        assert (await successors[0].sweeper.sweep()).transactions == 1

    world.storage.visit_before(writes_to(STORED_ACCOUNT), everything_happens_meanwhile)
    world.storage.fail(Kind.CRASH_AFTER, writes_to(STORED_STOCK))
    with pytest.raises((Crashed, TransactionConflictError)):
        await transaction.commit()
    assert await world.in_doubt() >= 1, "what was swept is in doubt again"

    await successors[0].sweeper.sweep()

    assert await world.in_doubt() == 0
    assert await balances(world) == [10, 10]


async def test_a_round_looks_again_at_some_of_many_aborted_transactions_and_at_all_of_them_in_turn(
    world: World,
) -> None:
    manager = await named(world, storage=world.storage)
    assert manager._journal is not None
    log = manager._journal.log
    intents = [_rolled_back(f"former-{number}") for number in range(LOOKED_AT_AGAIN * 2 + 5)]
    fresh = replace(_rolled_back("fresh"), aborted=False)
    await log.record([*intents, fresh])
    rounds: list[set[Value]] = []

    for _ in range(3):
        world.storage.calls.clear()
        swept = await manager.sweeper.sweep()
        decided = [call for call in world.storage.calls if writes_to(STATES)(call)]
        rounds.append({mutation.key.partition[0] for call in decided for mutation in call.mutations})
        assert len(rounds[-1]) == swept.transactions <= LOOKED_AT_AGAIN + 1
        assert swept.transactions + swept.waiting == len(intents) + 1

    assert "fresh" in rounds[0], "what was not seen at rest yet has no turn to wait for"
    assert set().union(*rounds) == {intent.tx_id for intent in (*intents, fresh)}


def _rolled_back(tx_id: str) -> Intent:
    """What remains of a transaction of the former life of `billing`."""
    return Intent(tx_id, "billing", "former", "billing", "former", (("bank", "account", (1,)),), (), 0, aborted=True)


async def test_an_aborted_intent_goes_with_its_state_row_once_its_writer_is_known_to_be_gone(world: World) -> None:
    await given_money(world)
    tx_id = await dies(world, at=STORED_STOCK)
    successor = await named(world)
    await successor.sweeper.sweep()
    assert await world.state(tx_id) is not None
    gone: list[Intent] = []

    def is_gone(intent: Intent) -> bool:
        gone.append(intent)
        return True

    knowing = Sweeper(
        world.plain_storage,
        successor.states,
        successor.recovery,
        world.clock,
        journal=successor._journal,
        transaction_lifetime_ms=TRANSACTION_LIFETIME_MS,
        is_gone=is_gone,
    )
    await knowing.sweep()

    assert [intent.tx_id for intent in gone] == [tx_id]
    assert await world.state(tx_id) is None
    assert (await knowing.sweep()).transactions == 0


async def test_an_intent_stays_as_long_as_one_of_its_tables_cannot_be_reached(world: World) -> None:
    await given_money(world)
    tx_id = await dies(world, at=STATES)
    successor = await named(world)
    assert successor._journal is not None
    log = successor._journal.log
    (intent,) = await log.all()
    await log.record([replace(intent, partitions=(("elsewhere", "stock", (1,)), *intent.partitions))])

    await successor.sweeper.sweep()

    assert [left.tx_id for left in await log.all()] == [tx_id]
    await log.record([intent])
    await successor.sweeper.sweep()
    assert await log.all() == []
    assert await world.in_doubt() == 0


async def test_a_commit_whose_row_was_pruned_before_it_could_be_looked_at_is_not_called_aborted(world: World) -> None:
    """Its first put was applied and not answered; its second met the row, which was gone when it was to be read."""
    await given_money(world)
    manager = await named(world, storage=world.storage)
    transaction = manager.begin()
    await move_money(transaction)
    states = world.process().states
    world.storage.fail(Kind.UNANSWERED, writes_to(STATES))

    async def prune() -> None:
        row = await states.get_state(transaction.tx_id)
        assert row is not None
        assert await states.forget(row) == 1

    world.storage.visit_before(lambda call: call.method == "get" and STATES.full_name in call.tables, prune)

    with pytest.raises(UnknownTransactionStatusError, match="pruned"):
        await transaction.commit()


async def test_a_commit_leaves_no_intent_and_an_abort_neither_intent_nor_state_row(world: World) -> None:
    await given_money(world)
    manager = await named(world)
    committed = manager.begin()
    await move_money(committed)
    late = manager.begin()
    await move_money(late)
    await committed.commit()
    await manager.drain()
    with pytest.raises(TransactionConflictError):
        await late.commit()
    await manager.close()

    assert manager._journal is not None
    assert await manager._journal.log.all() == []
    assert set(await world.state_rows()) == {committed.tx_id}


async def test_intents_of_transactions_that_begin_together_are_written_together(world: World) -> None:
    await world.given(dict.fromkeys(range(20), 10))
    manager = await named(world, storage=world.storage)

    async def spend(number: int) -> None:
        transaction = manager.begin()
        await transaction.update(ACCOUNT, key(number), {"balance": 0})
        await transaction.commit()

    await asyncio.gather(*(spend(number) for number in range(20)))
    await manager.close()

    batches = [call for call in world.storage.calls if INTENTS.full_name in call.tables and call.method == "mutate"]
    written = [mutation for call in batches for mutation in call.mutations if isinstance(mutation, Put)]
    assert len(written) == 20
    assert len(batches) < 20


async def test_a_prepare_that_may_not_begin_because_its_intent_was_not_stored_prepares_nothing(world: World) -> None:
    await given_money(world)
    manager = await named(world, storage=world.storage)
    world.storage.fail(Kind.UNAVAILABLE, writes_to(INTENTS))
    transaction = manager.begin()
    await move_money(transaction)

    with pytest.raises(Exception, match="not applied"):
        await transaction.commit()

    assert await world.in_doubt() == 0
    assert await world.state_rows() == {}


async def test_sweeping_goes_on_by_itself_and_through_an_outage(world: World) -> None:
    await given_money(world)
    await dies(world, at=STORED_STOCK)
    world.storage.heal()
    world.storage.dead = False
    successor = TransactionManager(world.storage, world.clock, name="billing")
    sweeper = Sweeper(
        world.storage,
        successor.states,
        successor.recovery,
        world.clock,
        journal=successor._journal,
        transaction_lifetime_ms=TRANSACTION_LIFETIME_MS,
        interval_ms=1,
    )
    world.storage.fail(Kind.UNAVAILABLE, lambda call: INTENTS.full_name in call.tables, times=3)
    running = asyncio.create_task(sweeper.run())
    try:
        async with asyncio.timeout(20):
            while await world.in_doubt():  # noqa: ASYNC110 - nothing tells us
                await asyncio.sleep(0.005)
    finally:
        running.cancel()
        await asyncio.wait([running])

    assert await balances(world) == [10, 10]


# -- foreign transactions


async def test_the_walk_settles_foreign_records_that_are_decided_or_expired_and_no_others(world: World) -> None:
    await world.given({1: 10, 2: 20, 3: 30})
    await world.orphan(lambda dead: dead.update(ACCOUNT, key(1), {"balance": 11}), COMMITTED)
    await world.orphan(lambda dead: dead.update(ACCOUNT, key(2), {"balance": 21}), ABORTED)
    await world.orphan(lambda dead: dead.update(ACCOUNT, key(3), {"balance": 31}))

    assert await world.manager.sweeper.walk() == 2
    assert await world.in_doubt() == 1
    world.expire()
    assert await world.manager.sweeper.walk() == 1

    assert await world.in_doubt() == 0
    assert await world.balances() == {("account", 1, 1): 11, ("account", 1, 2): 20, ("account", 1, 3): 30}


async def test_the_walk_keeps_to_its_pace(world: World) -> None:
    await world.given(dict.fromkeys(range(450), 1))
    waits: list[float] = []

    async def note(seconds: float) -> None:
        waits.append(seconds)

    sweeper = Sweeper(
        world.plain_storage,
        world.states,
        world.manager.recovery,
        world.clock,
        journal=None,
        transaction_lifetime_ms=TRANSACTION_LIFETIME_MS,
        rows_per_s=100,
        sleep=note,
    )
    await sweeper.walk()

    assert sum(waits) == pytest.approx(4.5)
    assert max(waits) <= 2.0, "in pieces, not at the end"


async def test_a_walk_without_a_pace_reads_nothing(world: World) -> None:
    await world.orphan(lambda dead: dead.insert(ACCOUNT, key(1), {"balance": 1}), COMMITTED)
    sweeper = Sweeper(
        world.storage,
        world.states,
        world.manager.recovery,
        world.clock,
        journal=None,
        transaction_lifetime_ms=TRANSACTION_LIFETIME_MS,
        rows_per_s=0,
    )
    assert await sweeper.walk() == 0
    assert world.storage.calls == []


# -- by id


@pytest.mark.parametrize("decided", [COMMITTED, ABORTED])
async def test_finishing_a_decided_transaction_settles_its_records_and_forgets_it(world: World, decided) -> None:
    await given_money(world)
    tx_id = await world.orphan(move_money, decided)

    assert await world.manager.sweeper.finish(tx_id, (ACCOUNT, STOCK))

    assert await world.in_doubt() == 0
    assert await world.state(tx_id) is None
    assert await balances(world) == ([5, 15] if decided is COMMITTED else [10, 10])
    assert await world.manager.sweeper.finish(tx_id), "finishing again is harmless"


async def test_finishing_leaves_everything_alone_where_nobody_knows_what_the_transaction_wrote(world: World) -> None:
    await given_money(world)
    tx_id = await world.orphan(move_money, COMMITTED)

    assert not await world.manager.sweeper.finish(tx_id)

    assert await world.in_doubt() == 2
    assert await world.state(tx_id) is not None


async def test_finishing_by_intent_needs_no_tables(world: World) -> None:
    await given_money(world)
    tx_id = await dies(world, at=STATES)
    successor = await named(world)

    assert await successor.sweeper.finish(tx_id)

    assert await balances(world) == [5, 15]
    assert (await successor.sweeper.sweep()).transactions == 0


async def test_an_undecided_transaction_is_recovered_only_when_aborting_it_is_asked_for(world: World) -> None:
    await given_money(world)
    tx_id = await world.orphan(move_money)

    with pytest.raises(CrudConflictError, match="undecided"):
        await world.manager.sweeper.recover(tx_id, (ACCOUNT, STOCK))
    assert await world.in_doubt() == 2

    assert await world.manager.sweeper.recover(tx_id, (ACCOUNT, STOCK), abort=True) == 2
    assert await balances(world) == [10, 10]


async def test_asking_to_abort_a_committed_transaction_rolls_it_forward(world: World) -> None:
    await given_money(world)
    tx_id = await world.orphan(move_money, COMMITTED)

    assert await world.manager.sweeper.recover(tx_id, (ACCOUNT, STOCK), abort=True) == 2

    assert await balances(world) == [5, 15]


# -- the state table of Java programs


GROUP = "0123456789abcdefABCDEFgh"


async def java_states(storage: Storage) -> TableSchema:
    """The state table as ScalarDB makes it with group commit and write-set logging on."""
    table = TableSchema(
        "coordinator",
        "state",
        {
            "tx_id": DataType.TEXT,
            "tx_child_ids": DataType.TEXT,
            "tx_write_set": DataType.BLOB,
            "tx_state": DataType.INT,
            "tx_created_at": DataType.BIGINT,
        },
        ("tx_id",),
    )
    await storage.create_table(table)
    return table


def test_ids_of_groups_are_told_from_others() -> None:
    assert group_and_child(f"{GROUP}$child") == (GROUP, "child")
    assert group_and_child("f81d4fae-7dec-41d0-a765-00a0c91e6bf6") is None
    assert group_and_child(GROUP) is None


async def test_a_state_table_with_more_columns_is_used_as_it_is(storage: Storage) -> None:
    await java_states(storage)
    world = World(storage)
    await world.create()
    await given_money(world)

    tx_id = await world.commits(move_money)

    state = await world.state(tx_id)
    assert state is not None
    assert state.state is COMMITTED
    assert await balances(world) == [5, 15]


async def test_a_child_is_committed_by_its_groups_row_or_by_its_own(storage: Storage) -> None:
    table = await java_states(storage)
    world = World(storage)
    await world.create()
    await given_money(world)
    in_group = await world.orphan(lambda dead: dead.update(ACCOUNT, key(1), {"balance": 1}), tx_id=f"{GROUP}$in")
    alone = await world.orphan(lambda dead: dead.update(STOCK, key(1), {"balance": 2}), tx_id=f"{GROUP}$alone")
    await storage.mutate([Put(table, Key((GROUP,)), {"tx_child_ids": "other,in", "tx_state": 3, "tx_created_at": 7})])
    await storage.mutate([Put(table, Key((alone,)), {"tx_state": 3, "tx_created_at": 8})])

    states = world.process().states
    found = [await states.get_state(tx_id) for tx_id in (in_group, alone, f"{GROUP}$absent")]

    assert [state and (state.tx_id, state.state, state.created_at_ms) for state in found] == [
        (in_group, COMMITTED, 7),
        (alone, COMMITTED, 8),
        None,
    ]
    assert await world.balances() == {("account", 1, 1): 1, ("stock", 1, 1): 2}


async def test_aborting_a_child_first_bars_its_group_and_then_the_child(storage: Storage) -> None:
    table = await java_states(storage)
    world = World(storage)
    await world.create()
    await given_money(world)
    tx_id = await world.orphan(lambda dead: dead.update(ACCOUNT, key(1), {"balance": 1}), tx_id=f"{GROUP}$late")
    world.expire()

    assert await world.balances() == {("account", 1, 1): 10, ("stock", 1, 1): 10}

    group = await storage.get(table, Key((GROUP,)))
    own = await storage.get(table, Key((tx_id,)))
    assert group is not None
    assert own is not None
    assert (group["tx_state"], group["tx_child_ids"], own["tx_state"]) == (4, None, 4)


async def test_a_child_whose_group_has_committed_cannot_be_aborted(storage: Storage) -> None:
    table = await java_states(storage)
    world = World(storage)
    await world.create()
    await storage.mutate([Put(table, Key((GROUP,)), {"tx_child_ids": "in", "tx_state": 3, "tx_created_at": 7})])

    winner = await world.process().states.abort_state(f"{GROUP}$in")

    assert winner.state is COMMITTED
    assert await storage.get(table, Key((f"{GROUP}$in",))) is None
