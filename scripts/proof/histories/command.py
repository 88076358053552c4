"""`python -m scripts.proof histories`: long runs of all workloads, on a storage that is named or given by its URL.

A storage that is named is started for the proof, in a directory of its own, and stopped at its end.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from infra.consensus_commit.states import Isolation
from infra.storage.connect import connect
from infra.storage.memory import MemoryStorage
from infra.storage.port import Storage
from infra.storage.sqlite import SqliteStorage
from scripts.proof.histories.running import Plan, run_all
from scripts.proof.histories.workloads import Workload

NAMED = ("memory", "sqlite", "cassandra", "dynamodb", "multi")

_ONE_RUN = 2_500
"""Transactions of one run at most: longer proofs are several runs with seeds of their own."""


def prove_histories(
    storage: str, work: Path, *, transactions: int, seed: int, isolations: tuple[Isolation, ...] = tuple(Isolation)
) -> dict[str, Any]:
    """Run every workload at every level, `transactions` attempts in all; the report.

    Raises InvalidOperationError for a `storage` that is neither one of NAMED nor a URL.
    """
    with _silent("infra", "asyncio"):
        return asyncio.run(_prove(storage, work, plans(transactions, seed, isolations)))


@contextmanager
def _silent(*names: str) -> Iterator[None]:
    """Without what they log below CRITICAL: a dying process leaves much unsaid, and that is part of the weather."""
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def plans(transactions: int, seed: int, isolations: tuple[Isolation, ...]) -> list[Plan]:
    """`transactions` divided among all workloads and levels, in runs that are not too long."""
    kinds = [(workload, isolation) for isolation in isolations for workload in Workload]
    share = max(transactions // len(kinds), 50)
    rounds = -(-share // _ONE_RUN)
    return [
        Plan(workload, isolation, max(share // rounds, 50), seed * 1_000 + round)
        for round in range(rounds)
        for workload, isolation in kinds
    ]


async def _prove(name: str, work: Path, chosen: list[Plan]) -> dict[str, Any]:
    async with _opened(name, work) as storage:
        return await run_all(storage, chosen)


@asynccontextmanager
async def _opened(name: str, work: Path) -> AsyncIterator[Storage]:
    if name == "multi":
        async with _cassandra(work / "cassandra") as cassandra, _closing(SqliteStorage(work / "sqlite")) as sqlite:
            from infra.storage.multi import MultiStorage

            yield MultiStorage({"cassandra": cassandra, "sqlite": sqlite}, {"shop": "sqlite"}, default="cassandra")
        return
    match name:
        case "memory":
            opening = _closing(MemoryStorage())
        case "sqlite":
            opening = _closing(SqliteStorage(work / "sqlite"))
        case "cassandra":
            opening = _cassandra(work / "cassandra")
        case "dynamodb":
            opening = _dynamodb()
        case _:
            opening = _closing(connect(name))
    async with opening as storage:
        yield storage


@asynccontextmanager
async def _closing(storage: Storage) -> AsyncIterator[Storage]:
    try:
        yield storage
    finally:
        await storage.close()


@asynccontextmanager
async def _cassandra(directory: Path) -> AsyncIterator[Storage]:
    from infra.servers.cassandra import LocalCassandra
    from infra.storage.cassandra import CassandraStorage

    server = LocalCassandra(directory)
    await server.start()
    try:
        async with _closing(CassandraStorage([server.contact_point], server.port, replication_factor=1)) as storage:
            yield storage
    finally:
        await server.stop()


@asynccontextmanager
async def _dynamodb() -> AsyncIterator[Storage]:
    from infra.servers.dynamodb import LocalDynamoDb
    from infra.storage.dynamodb import DynamoDbStorage

    server = LocalDynamoDb(None)
    await server.start()
    try:
        # A local server takes any credentials, but some it must have.
        local = DynamoDbStorage(region="us-west-2", endpoint=server.endpoint_url, credentials=("local", "local"))
        async with _closing(local) as storage:
            yield storage
    finally:
        await server.stop()
