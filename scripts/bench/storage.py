"""Micro benchmark of the SQLite storage: conditional batches a second, one process, one namespace.

    python -m scripts.bench.storage [--data DIR] [--seconds S]

Method: N coroutines ("at once") each write a batch and wait for its answer, over and over, for S seconds. Rows are
like a transaction's: a 36-character id, a state, a version, a body of 150 bytes and its before-image. `insert` is
IF NOT EXISTS on fresh keys; `update` rewrites rows IF tx_id is the one that was read. Reads are single gets of
existing rows, awaited one by one. Nothing is asserted; figures mean something only beside others of the same run.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from itertools import count
from pathlib import Path

from infra.storage.operations import (
    ColumnCondition,
    DataType,
    If,
    IfNotExists,
    Key,
    Mutation,
    Operator,
    Put,
    TableSchema,
)
from infra.storage.port import Storage
from infra.storage.sqlite import SqliteStorage

TABLE = TableSchema(
    namespace="bench",
    name="record",
    columns={
        "bucket": DataType.INT,
        "id": DataType.TEXT,
        "body": DataType.TEXT,
        "tx_id": DataType.TEXT,
        "tx_state": DataType.INT,
        "tx_version": DataType.INT,
        "tx_prepared_at": DataType.BIGINT,
        "tx_committed_at": DataType.BIGINT,
        "before_body": DataType.TEXT,
        "before_tx_id": DataType.TEXT,
        "before_tx_state": DataType.INT,
        "before_tx_version": DataType.INT,
        "before_tx_prepared_at": DataType.BIGINT,
        "before_tx_committed_at": DataType.BIGINT,
    },
    partition_key=("bucket",),
    clustering_key=("id",),
)

BUCKETS = 16
BODY = "x" * 150
AT_ONCE = (1, 32, 256)
ROWS_A_BATCH = (1, 50)

WriteBatch = Callable[[int, int], Awaitable[None]]


def columns(version: int) -> dict[str, str | int | None]:
    return {
        "body": BODY,
        "tx_id": f"{version:036}",
        "tx_state": 1,
        "tx_version": version,
        "tx_prepared_at": 1_600_000_000_000,
        "tx_committed_at": None,
        "before_body": BODY,
        "before_tx_id": f"{version - 1:036}",
        "before_tx_state": 3,
        "before_tx_version": version - 1,
        "before_tx_prepared_at": 1_600_000_000_000,
        "before_tx_committed_at": 1_600_000_000_001,
    }


def key(number: int) -> Key:
    return Key((number % BUCKETS,), (f"{number:012}",))


def insertion(number: int) -> Mutation:
    return Put(TABLE, key(number), columns(1), IfNotExists())


def update(number: int, version: int) -> Mutation:
    read = ColumnCondition("tx_id", Operator.EQ, f"{version - 1:036}")
    return Put(TABLE, key(number), columns(version), If((read,)))


async def rate(at_once: int, seconds: float, write_batch: WriteBatch) -> tuple[float, list[float]]:
    """Batches a second, and how long each took in seconds. `write_batch(worker, round)` writes one."""
    ends_at = time.perf_counter() + seconds
    latencies_s: list[float] = []

    async def worker(number: int) -> None:
        for turn in count(1):
            started_at = time.perf_counter()
            if started_at >= ends_at:
                return
            await write_batch(number, turn)
            latencies_s.append(time.perf_counter() - started_at)

    started_at = time.perf_counter()
    await asyncio.gather(*map(worker, range(at_once)))
    return len(latencies_s) / (time.perf_counter() - started_at), latencies_s


def report(what: str, rows: int, at_once: int, batches_a_second: float, latencies_s: list[float]) -> None:
    latencies_s.sort()
    p50, p99 = (latencies_s[int(len(latencies_s) * q)] * 1000 for q in (0.5, 0.99))
    print(
        f"{what:<8} {rows:>4} {at_once:>8} {batches_a_second:>10,.0f} {batches_a_second * rows:>10,.0f}"
        f" {p50:>8.2f} {p99:>8.2f}",
        flush=True,
    )


async def run(storage: Storage, seconds: float) -> None:
    await storage.create_table(TABLE)
    fresh = count()
    print(f"{'what':<8} {'rows':>4} {'at once':>8} {'batches/s':>10} {'rows/s':>10} {'p50 ms':>8} {'p99 ms':>8}")
    for rows in ROWS_A_BATCH:
        for at_once in AT_ONCE:

            async def insert(worker: int, turn: int, rows: int = rows) -> None:
                await storage.mutate([insertion(next(fresh)) for _ in range(rows)])

            report("insert", rows, at_once, *await rate(at_once, seconds, insert))

            mine = {worker: [next(fresh) for _ in range(rows)] for worker in range(at_once)}
            for numbers in mine.values():
                await storage.mutate([insertion(number) for number in numbers])

            async def change(worker: int, turn: int, mine: dict[int, list[int]] = mine) -> None:
                await storage.mutate([update(number, turn + 1) for number in mine[worker]])

            report("update", rows, at_once, *await rate(at_once, seconds, change))

    async def get(worker: int, turn: int) -> None:
        await storage.get(TABLE, key(turn * 7919 % 1000))

    report("get", 1, 1, *await rate(1, seconds, get))


def main() -> None:
    parser = argparse.ArgumentParser(description="Micro benchmark of the SQLite storage.")
    parser.add_argument("--data", type=Path, help="directory for the files (default: a temporary one)")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long each measurement takes")
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="storage-bench-", dir=arguments.data))
    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} cores, {directory}")
    storage = SqliteStorage(directory)

    async def measure() -> None:
        try:
            await run(storage, arguments.seconds)
        finally:
            await storage.close()

    try:
        asyncio.run(measure())
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
