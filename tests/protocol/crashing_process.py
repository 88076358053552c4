"""A process that runs through everything the engine does, on any storage, and may be killed anywhere on the way.

`python crashing_process.py URL`: see `test_engine_failpoints.py`, which arms the failpoints and looks at what
remains.
Every transaction moves an amount from an account to the stock with the same number, or fails and moves nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys

from protocol_world import ABORTED, ACCOUNT, COMMITTED, STOCK, World, key

from infra.consensus_commit.commit import commit
from infra.consensus_commit.errors import TransactionConflictError
from infra.consensus_commit.intents import Intent, IntentLog, new_intended_id
from infra.consensus_commit.participant import ParticipantTransaction
from infra.consensus_commit.states import Isolation
from infra.consensus_commit.transaction import Transaction
from infra.storage.connect import connect

PAIRS = 7
AMOUNT = 5


async def move(transaction: Transaction | ParticipantTransaction, number: int) -> None:
    held = await transaction.get(ACCOUNT, key(number))
    owed = await transaction.get(STOCK, key(number))
    assert held is not None
    assert owed is not None
    await transaction.update(ACCOUNT, key(number), {"balance": held["balance"] - AMOUNT})  # type: ignore[operator]
    await transaction.update(STOCK, key(number), {"balance": owed["balance"] + AMOUNT})  # type: ignore[operator]


async def commit_with_intent(world: World, number: int) -> None:
    intents = IntentLog(world.plain_storage)
    await intents.create_tables()
    participant = world.participant(tx_id=new_intended_id(world.clock))
    await move(participant, number)
    await participant.get(ACCOUNT, key(99))  # something to validate
    partitions = tuple(participant.written_partitions())
    now_ms = world.clock.now_ms()
    await intents.record([Intent(participant.tx_id, "coordinator-0", "1", "home", "1", partitions, (), now_ms)])
    await commit(participant.tx_id, [participant], world.states, world.clock)
    await intents.remove("coordinator-0", [participant.tx_id])


async def lose_a_conflict(world: World, number: int) -> None:
    """Reaches the abort path with one of two records prepared."""
    transaction = world.begin(Isolation.SNAPSHOT)
    await move(transaction, number)
    await world.commits(lambda other: other.update(STOCK, key(number), {"note": "changed"}))
    with contextlib.suppress(TransactionConflictError):
        await transaction.commit()


async def commit_in_one_phase(world: World, number: int) -> None:
    transaction = world.process(one_phase_commit=True).begin()
    await transaction.update(ACCOUNT, key(number), {"note": "in one phase"})
    await transaction.commit()


async def recover_what_others_left(world: World, first: int) -> None:
    await world.orphan(lambda dead: move(dead, first), COMMITTED)
    await world.orphan(lambda dead: move(dead, first + 1), ABORTED)
    await world.orphan(lambda dead: move(dead, first + 2))
    world.expire()
    for number in range(first, first + 3):
        reader = world.begin(Isolation.SNAPSHOT)
        await reader.get(ACCOUNT, key(number))
        await reader.get(STOCK, key(number))
    await world.settled()


async def main(url: str) -> None:
    world = World(connect(url))
    await commit_with_intent(world, 1)
    await lose_a_conflict(world, 2)
    await commit_in_one_phase(world, 3)
    await recover_what_others_left(world, 4)
    await world.plain_storage.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
