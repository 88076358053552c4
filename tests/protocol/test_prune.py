"""Pruning the state table (rule 8): a decision may be forgotten once nobody can need it, and not before."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from faults import Crashed, Kind, writes_to
from protocol_world import ABORTED, ACCOUNT, COMMITTED, World, key

from infra.consensus_commit import coordinator
from infra.consensus_commit.coordinator import Pruned
from infra.consensus_commit.errors import CommitConflictError
from infra.consensus_commit.intents import Intent, IntentLog, new_intended_id

HOUR_MS = 3_600_000


@pytest.fixture
async def log(world: World) -> IntentLog:
    log = IntentLog(world.plain_storage)
    await log.create_tables()
    return log


def an_intent(world: World, tx_id: str) -> Intent:
    return Intent(
        tx_id=tx_id,
        coordinator="coordinator-0",
        coordinator_incarnation="c1",
        home="orders-0",
        home_incarnation="h1",
        partitions=(("bank", "account", (1,)),),
        participants=("orders-0",),
        created_at_ms=world.clock.now_ms(),
    )


def everybody_is_gone(intent: Intent) -> bool:
    return True


def nobody_is_gone(intent: Intent) -> bool:
    return False


async def prune(world: World, log: IntentLog, gone: Callable[[Intent], bool] = everybody_is_gone) -> Pruned:
    return await world.states.prune(log, older_than_ms=HOUR_MS, writer_is_gone=gone)


async def committed(world: World, tx_id: str) -> None:
    await world.states.commit_state(tx_id, world.clock.now_ms())


async def aborted(world: World, tx_id: str) -> None:
    await world.states.abort_state(tx_id)


async def test_a_committed_transaction_whose_records_were_all_settled_is_forgotten(
    world: World, log: IntentLog
) -> None:
    tx_id = new_intended_id(world.clock)
    await log.record([an_intent(world, tx_id)])
    await committed(world, tx_id)
    await log.remove("coordinator-0", [tx_id])
    world.clock.advance(HOUR_MS + 1)

    assert await prune(world, log) == Pruned(committed=1, aborted=0)
    assert await world.state_rows() == {}


async def test_however_many_decisions_are_old_a_pruning_takes_them_all_a_part_at_a_time(
    world: World, log: IntentLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator, "PRUNED_AT_ONCE", 3)
    ids = [new_intended_id(world.clock) for _ in range(10)]
    for tx_id in ids:
        await committed(world, tx_id)
    await log.record([an_intent(world, ids[4])])
    world.clock.advance(HOUR_MS + 1)

    assert await prune(world, log) == Pruned(committed=9, aborted=0)
    assert await world.state_rows() == {ids[4]: COMMITTED}


async def test_a_young_decision_is_kept(world: World, log: IntentLog) -> None:
    old, young = new_intended_id(world.clock), new_intended_id(world.clock)
    await committed(world, old)
    world.clock.advance(HOUR_MS)
    assert await prune(world, log) == Pruned(0, 0), "exactly that old is not older"

    world.clock.advance(1)
    await committed(world, young)

    assert await prune(world, log) == Pruned(1, 0)
    assert await world.state_rows() == {young: COMMITTED}


async def test_a_committed_transaction_that_an_intent_names_is_kept(world: World, log: IntentLog) -> None:
    """Some record of it may still be PREPARED, and would be rolled back without this row."""
    tx_id = new_intended_id(world.clock)
    await log.record([an_intent(world, tx_id)])
    await committed(world, tx_id)
    world.clock.advance(HOUR_MS + 1)

    assert await prune(world, log) == Pruned(0, 0)
    assert await world.state_rows() == {tx_id: COMMITTED}


@pytest.mark.parametrize("decide", [committed, aborted])
async def test_a_foreign_transaction_is_kept(
    world: World, log: IntentLog, decide: Callable[[World, str], Awaitable[None]]
) -> None:
    """A Java program's, or of a manager without intents: nobody here knows whether its records are settled."""
    tx_id = world.clock.new_id()
    await decide(world, tx_id)
    world.clock.advance(HOUR_MS + 1)

    assert await prune(world, log) == Pruned(0, 0)
    assert list(await world.state_rows()) == [tx_id]


async def test_an_unsettled_foreign_commit_survives_pruning_and_is_rolled_forward(world: World, log: IntentLog) -> None:
    await world.given({1: 10})
    await world.orphan(lambda dead: dead.update(ACCOUNT, key(1), {"balance": 11}), COMMITTED)
    world.clock.advance(HOUR_MS + 1)

    await prune(world, log)

    assert await world.balances() == {("account", 1, 1): 11}


async def test_an_aborted_transaction_is_forgotten_with_its_intent_once_its_writer_is_gone(
    world: World, log: IntentLog
) -> None:
    tx_id = new_intended_id(world.clock)
    intent = an_intent(world, tx_id)
    await log.record([intent])
    await aborted(world, tx_id)
    await log.mark_aborted([intent])
    world.clock.advance(HOUR_MS + 1)

    assert await prune(world, log, nobody_is_gone) == Pruned(0, 0)
    assert await world.state_rows() == {tx_id: ABORTED}

    assert await prune(world, log, lambda found: found.home_incarnation == "h1") == Pruned(0, 1)
    assert await world.state_rows() == {}
    assert await log.all() == []


async def test_an_aborted_transaction_that_is_not_settled_is_kept(world: World, log: IntentLog) -> None:
    tx_id = new_intended_id(world.clock)
    await log.record([an_intent(world, tx_id)])
    await aborted(world, tx_id)
    world.clock.advance(HOUR_MS + 1)

    assert await prune(world, log) == Pruned(0, 0)
    assert await world.state_rows() == {tx_id: ABORTED}


async def test_an_aborted_row_without_an_intent_is_kept(world: World, log: IntentLog) -> None:
    tx_id = new_intended_id(world.clock)
    await aborted(world, tx_id)
    world.clock.advance(HOUR_MS + 1)

    assert await prune(world, log) == Pruned(0, 0)
    assert await world.state_rows() == {tx_id: ABORTED}


async def test_a_paused_writer_meets_the_aborted_row_that_was_kept_for_it(world: World, log: IntentLog) -> None:
    """What the rule is for: with the row gone, the writer that wakes up would commit what was rolled back."""
    await world.given({1: 10})
    tx_id = new_intended_id(world.clock)
    paused = world.participant(tx_id=tx_id)
    await paused.update(ACCOUNT, key(1), {"balance": 11})
    await log.record([an_intent(world, tx_id)])
    await paused.prepare_records(world.clock.now_ms())
    world.clock.advance(HOUR_MS)
    assert await world.balances() == {("account", 1, 1): 10}
    await log.mark_aborted(await log.all())
    world.clock.advance(HOUR_MS + 1)

    await prune(world, log, nobody_is_gone)

    with pytest.raises(CommitConflictError):
        await world.states.commit_state(tx_id, world.clock.now_ms())
    assert await world.balances() == {("account", 1, 1): 10}


@pytest.mark.parametrize("kind", [Kind.CRASH_BEFORE, Kind.CRASH_AFTER])
@pytest.mark.parametrize("nth", [1, 2])
async def test_a_pruning_that_crashes_is_finished_by_the_next(
    world: World, log: IntentLog, kind: Kind, nth: int
) -> None:
    """Of a transaction's row and intent the row goes first: an intent without a row can still be recognized."""
    tx_id = new_intended_id(world.clock)
    intent = replace(an_intent(world, tx_id), aborted=True)
    await log.record([intent])
    await aborted(world, tx_id)
    world.clock.advance(HOUR_MS + 1)
    dying = IntentLog(world.storage)
    world.storage.fail(kind, writes_to(world.states.table) if nth == 1 else writes_to(log.table))
    with pytest.raises(Crashed):
        await world.states.prune(dying, older_than_ms=HOUR_MS, writer_is_gone=everybody_is_gone)

    await world.process().states.prune(log, older_than_ms=HOUR_MS, writer_is_gone=everybody_is_gone)

    assert await world.state_rows() == {}
    assert await log.all() == []


async def test_an_intent_that_is_not_yet_decided_is_never_pruned(world: World, log: IntentLog) -> None:
    await log.record([an_intent(world, new_intended_id(world.clock))])
    world.clock.advance(HOUR_MS + 1)

    await prune(world, log)

    assert len(await log.all()) == 1
