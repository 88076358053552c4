"""Transfers on a real Cassandra that is killed, paused past every deadline, and whose answers are swallowed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest
import pytest_asyncio

from infra.consensus_commit.errors import TransactionConflictError, UnknownTransactionStatusError
from infra.consensus_commit.manager import TransactionManager
from infra.consensus_commit.metadata import transactional
from infra.consensus_commit.states import TransactionState
from infra.servers.cassandra import LocalCassandra
from infra.storage.cassandra import CassandraStorage
from infra.storage.errors import StorageError
from infra.storage.operations import DataType, Key, Row, ScanAll, TableSchema
from infra.storage.port import Storage
from scripts.proof.tcp_proxy import TcpProxy

ACCOUNTS = TableSchema("bank", "accounts", {"id": DataType.INT, "balance": DataType.INT}, ("id",))
STORED = transactional(ACCOUNTS)
OPENING = 1_000

REQUEST_TIMEOUT_S = 2.0


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCassandra]:
    """A Cassandra of this file's own, since it is killed. Each test has accounts of its own in it."""
    node = LocalCassandra(tmp_path_factory.mktemp("cassandra"), heap_mb=768)
    await node.start()
    try:
        yield node
    finally:
        await node.stop()


@dataclass
class Load:
    """Transfers at random, for ever; what became of each."""

    manager: TransactionManager
    numbers: range
    seed: int
    committed: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    cut_off: list[str] = field(default_factory=list)
    """Under way when the load was ended."""
    conflicts: int = 0
    outages: int = 0

    async def run(self) -> None:
        randomness = random.Random(self.seed)
        while True:
            giver, taker = randomness.sample(self.numbers, 2)
            transaction = self.manager.begin()
            try:
                for number, change in ((giver, -1), (taker, 1)):
                    row = await transaction.get(ACCOUNTS, Key((number,)))
                    assert row is not None
                    await transaction.update(ACCOUNTS, Key((number,)), {"balance": row["balance"] + change})  # type: ignore[operator]
                await transaction.commit()
                self.committed.append(transaction.tx_id)
            except TransactionConflictError:
                self.conflicts += 1
                await asyncio.sleep(randomness.uniform(0, 0.05))
            except UnknownTransactionStatusError:
                self.unknown.append(transaction.tx_id)
            except StorageError:
                self.outages += 1
                await asyncio.sleep(0.1)
            except asyncio.CancelledError:
                self.cut_off.append(transaction.tx_id)
                raise

    @property
    def troubles(self) -> int:
        return self.outages + len(self.unknown)


@asynccontextmanager
async def judge_of(
    server: LocalCassandra, numbers: range
) -> AsyncIterator[tuple[CassandraStorage, TransactionManager]]:
    """Makes the accounts, and looks at them in the end: with all the time that it wants, and past any proxy."""
    storage = CassandraStorage([server.contact_point], server.port, request_timeout_s=60.0)
    manager = TransactionManager(storage, name="judge")
    await manager.create_coordinator_tables()
    await manager.create_table(ACCOUNTS)
    async with manager.begin() as opening:
        for number in numbers:
            await opening.insert(ACCOUNTS, Key((number,)), {"balance": OPENING})
        await opening.commit()
    await manager.drain()
    try:
        yield storage, manager
    finally:
        await storage.close()


def hasty(port: int, names: list[str]) -> tuple[CassandraStorage, list[TransactionManager]]:
    storage = CassandraStorage(["127.0.0.1"], port, request_timeout_s=REQUEST_TIMEOUT_S)
    return storage, [TransactionManager(storage, name=name) for name in names]


async def more_commits(loads: list[Load], count: int) -> None:
    """Until `count` more transfers were committed: then whatever was broken works again."""
    goal = sum(len(load.committed) for load in loads) + count
    async with asyncio.timeout(120):
        while sum(len(load.committed) for load in loads) < goal:  # noqa: ASYNC110 - several writers
            await asyncio.sleep(0.02)


async def broken_for(seconds: float, loads: list[Load]) -> None:
    """So long at least, and until somebody has noticed that something is broken."""
    before = sum(load.troubles for load in loads)
    await asyncio.sleep(seconds)
    async with asyncio.timeout(120):
        while sum(load.troubles for load in loads) == before:  # noqa: ASYNC110 - several writers
            await asyncio.sleep(0.02)


async def accounts_at_rest(storage: Storage) -> list[Row]:
    """All accounts, once one scan finds none in doubt: what the sweepers have to bring about, for nobody else reads.

    The rows are those of that scan. A statement that was in flight when its transfer was cut off may yet arrive, and
    put a record in doubt after a scan that found none.
    """
    async with asyncio.timeout(60):
        while True:
            rows = [row async for page in storage.pages(ScanAll(STORED)) for row in page]
            if all(row["tx_state"] == TransactionState.COMMITTED.value for row in rows):
                return rows
            await asyncio.sleep(0.2)


async def under_load(
    storage: Storage,
    managers: list[TransactionManager],
    numbers: range,
    trouble: Callable[[list[Load]], Awaitable[None]],
) -> tuple[list[Load], list[Row]]:
    """Run transfers and sweepers while `trouble` makes trouble, then stop; what was done, and the accounts at rest."""
    loads = [Load(manager, numbers, seed) for seed in range(4) for manager in managers]
    sweeping = [asyncio.create_task(manager.sweeper.run()) for manager in managers]
    running = [asyncio.create_task(load.run()) for load in loads]
    try:
        await more_commits(loads, 20)
        await trouble(loads)
        await more_commits(loads, 20)
        for task in running:
            task.cancel()
        await asyncio.wait(running)
        for manager in managers:
            await manager.drain()
        rows = await accounts_at_rest(storage)  # Transfers cut off in the middle are the sweepers' now.
    finally:
        for task in (*running, *sweeping):
            task.cancel()
        await asyncio.wait([*running, *sweeping])
        for task in (*running, *sweeping):
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error
    return loads, [row for row in rows if row["id"] in numbers]


async def check(manager: TransactionManager, loads: list[Load], rows: list[Row]) -> int:
    """Every acknowledged transfer happened once, no other did; how many there were."""
    decided = [await manager.states.get_state(tx_id) for load in loads for tx_id in (*load.unknown, *load.cut_off)]
    came_true = [state for state in decided if state is not None and state.state is TransactionState.COMMITTED]
    versions = sum(row["tx_version"] for row in rows)  # type: ignore[misc]
    committed = sum(len(load.committed) for load in loads)

    assert sum(row["balance"] for row in rows) == OPENING * len(rows)  # type: ignore[misc]
    assert versions == len(rows) + 2 * (committed + len(came_true))
    return committed


async def test_transfers_survive_a_server_that_is_killed_and_paused_past_every_deadline(
    server: LocalCassandra,
) -> None:
    async def kill_and_pause(loads: list[Load]) -> None:
        server.kill()
        await server.wait()
        await broken_for(1, loads)
        await server.start()
        await more_commits(loads, 20)
        for _ in range(2):
            # Statements in flight are answered to nobody, and applied when the server goes on.
            server.pause()
            await broken_for(1.5 * REQUEST_TIMEOUT_S, loads)
            server.resume()
            await more_commits(loads, 20)

    numbers = range(8)
    async with judge_of(server, numbers) as (patient, judge):
        storage, managers = hasty(server.port, ["one", "two"])
        loads, rows = await under_load(patient, managers, numbers, kill_and_pause)

        assert await check(judge, loads, rows) >= 100
        assert any(load.troubles for load in loads), "nobody noticed a thing"
        with suppress(StorageError):
            await storage.close()


async def test_transfers_survive_answers_that_are_swallowed(server: LocalCassandra) -> None:
    numbers = range(100, 108)
    async with judge_of(server, numbers) as (patient, judge), TcpProxy("127.0.0.1", server.port) as proxy:

        async def swallow(loads: list[Load]) -> None:
            for _ in range(3):
                proxy.swallow_answers()
                await proxy.lost_an_answer()
                await broken_for(1.5 * REQUEST_TIMEOUT_S, loads)
                proxy.pass_on()
                await more_commits(loads, 20)

        storage, managers = hasty(proxy.port, ["three", "four"])
        loads, rows = await under_load(patient, managers, numbers, swallow)

        assert await check(judge, loads, rows) >= 100
        assert sum(len(load.unknown) + len(load.cut_off) for load in loads) >= 1, "no outcome was ever unknown"
        await storage.close()
