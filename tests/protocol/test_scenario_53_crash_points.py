"""Scenario 53: a process that dies, or is left without an answer, at every single storage call of a transaction.

The transaction spans two namespaces (two atomic units, so really two phases): it updates, inserts and deletes, and
relies on a record that it only reads. It is run once undisturbed to count its calls. Then for each call and each way
to fail, a new world is made, the fault strikes, and another process recovers. Whatever happened: all of it or none,
nothing left in doubt, and what the caller was told is true.

On memory the recovering process is killed too, at each of its own calls, and a third one finishes. On servers, where
every call takes its time, one kind of fault strikes every third call.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
from faults import Crashed, FaultyStorage, Kind
from protocol_world import ACCOUNT, COMMITTED, STOCK, World, key, whole

from infra.consensus_commit.errors import TransactionConflictError, UnknownTransactionStatusError
from infra.consensus_commit.manager import TransactionManager
from infra.consensus_commit.states import Isolation
from infra.storage.errors import StorageError
from tests.storages import SERVERS, in_namespaces, opened

BEFORE = {("account", 1, 1): 10, ("account", 1, 2): 20, ("stock", 1, 1): 100, ("stock", 1, 9): 900}
AFTER = {("account", 1, 1): 9, ("stock", 1, 1): 101, ("stock", 1, 2): 102, ("stock", 1, 9): 900}

NewWorld = Callable[[], AbstractAsyncContextManager[World]]


@pytest.fixture
def new_world(request: pytest.FixtureRequest, tmp_path: Path) -> NewWorld:
    opened(request.param, request, tmp_path)  # Servers are started here, outside the event loop.
    count = itertools.count(1)

    @asynccontextmanager
    async def make() -> AsyncIterator[World]:
        async with opened(request.param, request, tmp_path / str(next(count))) as storage:
            world = World(in_namespaces(storage))
            await world.create()
            await world.given({1: 10, 2: 20})
            await world.given({1: 100, 9: 900}, table=STOCK)
            yield world

    return make


async def transact(process: TransactionManager) -> str:
    """The transaction; its id if it says that it has committed."""
    transaction = process.begin()
    assert (await transaction.get(STOCK, key(9))) is not None
    await transaction.update(ACCOUNT, key(1), {"balance": 9})
    await transaction.delete(ACCOUNT, key(2))
    await transaction.update(STOCK, key(1), {"balance": 101})
    await transaction.insert(STOCK, key(2), {"balance": 102})
    await transaction.commit()
    return transaction.tx_id


async def told(process: TransactionManager) -> str:
    """What the caller of the transaction is told."""
    try:
        await transact(process)
    except UnknownTransactionStatusError:
        return "unknown"
    except (TransactionConflictError, StorageError):
        return "not committed"
    except Crashed:
        return "nothing"
    return "committed"


async def recover(process: TransactionManager) -> None:
    """What the next readers do."""
    for table in (STOCK, ACCOUNT):
        await process.begin(Isolation.SNAPSHOT).scan(whole(table))
    await process.recovery.drain()


async def count_calls(new_world: NewWorld, work: Callable[[TransactionManager], Awaitable[object]]) -> int:
    async with new_world() as world:
        await work(world.manager)
        return len(world.storage.calls)


async def check(world: World, answer: str) -> dict[tuple[str, int, int], object]:
    """All or nothing, as told, and nothing in doubt; what there is."""
    found = await world.balances()
    assert found in (BEFORE, AFTER)
    if answer == "committed":
        assert found == AFTER
    if answer == "not committed":
        assert found == BEFORE
    assert await world.in_doubt() == 0
    if found == AFTER:
        assert COMMITTED in (await world.state_rows()).values()
        versions = {(record["tx_state"], record["tx_id"]) for record in await world.everything()}
        assert len(versions) == 2, "the four written records by one transaction, the one it read by another"
    else:
        assert COMMITTED not in (await world.state_rows()).values()
    return found


@pytest.mark.parametrize("kind", list(Kind))
async def test_scenario_53_all_or_nothing_whichever_call_fails(
    new_world: NewWorld, kind: Kind, request: pytest.FixtureRequest
) -> None:
    calls = await count_calls(new_world, transact)
    outcomes = []
    step = 3 if request.node.callspec.params["new_world"] in SERVERS else 1
    for number in range(1, calls + 1, step):
        async with new_world() as world:
            fault = world.storage.fail(kind, nth=number)
            answer = await told(world.manager)
            assert fault.seen >= number, "the fault must have struck"
            await world.settled()
            world.expire()
            outcomes.append(await check(world, answer) == AFTER)

    assert True in outcomes, "some faults come after the commit"
    assert False in outcomes, "some faults come before the commit"


CRASHES = [Kind.CRASH_BEFORE, Kind.CRASH_AFTER]


@pytest.mark.parametrize("first_crash", CRASHES)
@pytest.mark.parametrize("second_crash", CRASHES)
@pytest.mark.parametrize("new_world", ["memory"], indirect=True)
async def test_scenario_53_all_or_nothing_though_the_recoverer_crashes_too(
    new_world: NewWorld, first_crash: Kind, second_crash: Kind
) -> None:
    pairs = 0
    for first in range(1, await count_calls(new_world, transact) + 1):
        for second in itertools.count(1):
            async with new_world() as world:
                world.storage.fail(first_crash, nth=first)
                answer = await told(world.manager)
                world.expire()
                recoverer = FaultyStorage(world.plain_storage)
                recoverer.fail(second_crash, nth=second)
                with contextlib.suppress(Crashed):
                    await recover(world.process(recoverer))
                await check(world, answer)
            if not recoverer.dead:
                break  # It had no such call: this was its whole life.
            pairs += 1

    assert pairs > 50, f"only {pairs} pairs"
