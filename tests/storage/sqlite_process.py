"""A process of its own that uses SqliteStorage, for the tests that kill, limit and demote it.

    python sqlite_process.py WHAT DIRECTORY [ARGUMENT]

Reports on stdout, a line at a time.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from infra.storage.errors import NoMutationError, StorageError
from infra.storage.operations import ColumnCondition, DataType, If, IfNotExists, Key, Mutation, Operator, Put, Scan
from infra.storage.operations import TableSchema as Table
from infra.storage.sqlite import SqliteStorage

COUNTERS = Table("shop", "counters", {"id": DataType.TEXT, "value": DataType.BIGINT}, ("id",))
LANES = Table(
    "shop",
    "lanes",
    {"lane": DataType.INT, "row": DataType.INT, "generation": DataType.BIGINT, "body": DataType.TEXT},
    ("lane",),
    ("row",),
)
ROWS_A_LANE = 5
NOBODY = 65534


def report(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


def generation_of(lane: int, generation: int, body: str = "") -> list[Mutation]:
    """A batch that moves every row of a lane on, given that all are at the generation before."""
    before = ColumnCondition("generation", Operator.EQ, generation - 1)
    condition = If((before,)) if generation else IfNotExists()
    columns = {"generation": generation, "body": body}
    return [Put(LANES, Key((lane,), (row,)), columns, condition) for row in range(ROWS_A_LANE)]


async def increment(storage: SqliteStorage, times: int) -> None:
    """Add 1 to two counters, `times` times each, by compare-and-set."""
    await storage.create_table(COUNTERS)

    async def one(name: str) -> None:
        for _ in range(times):
            while True:
                row = await storage.get(COUNTERS, Key((name,)))
                seen = int(row["value"] or 0) if row else 0
                condition = If((ColumnCondition("value", Operator.EQ, seen),)) if row else IfNotExists()
                try:
                    await storage.mutate([Put(COUNTERS, Key((name,)), {"value": seen + 1}, condition)])
                    break
                except NoMutationError:
                    continue

    await asyncio.gather(one("a"), one("b"))


async def advance_lanes(storage: SqliteStorage, lanes: int) -> None:
    """Move lanes on for ever, side by side, and report each generation once it is answered."""
    await storage.create_table(LANES)

    async def one(lane: int) -> None:
        rows = await storage.scan(Scan(LANES, (lane,)))
        generation = int(rows[0]["generation"] or 0) + 1 if rows else 0
        while True:
            await storage.mutate(generation_of(lane, generation, body="x" * 200))
            report(lane=lane, generation=generation)
            generation += 1

    await asyncio.gather(*map(one, range(lanes)))


async def outgrow_limit(storage: SqliteStorage, file_size: int) -> None:
    """Run into the limit on the size of a file, read, then lift the limit and go on."""
    await storage.create_table(LANES)
    await storage.mutate(generation_of(0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, resource.RLIM_INFINITY))
    generation = 0
    while True:
        try:
            await storage.mutate(generation_of(0, generation + 1, body="x" * 2000))
            generation += 1
        except StorageError as error:
            report(answered=generation, error=type(error).__name__)
            break
    await report_lane(storage)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    [generation] = await report_lane(storage)
    await storage.mutate(generation_of(0, generation + 1))
    await report_lane(storage)


async def report_lane(storage: SqliteStorage) -> list[int]:
    generations = sorted({int(row["generation"] or 0) for row in await storage.scan(Scan(LANES, (0,)))})
    report(generations=generations)
    return generations


async def use_as_nobody(storage: SqliteStorage, _: int) -> None:
    """Try every kind of access without any rights of root."""
    if os.geteuid() == 0:
        os.setuid(NOBODY)
    attempts: dict[str, Callable[[], Awaitable[object]]] = {
        "create_table": lambda: storage.create_table(COUNTERS),
        "tables": storage.tables,
        "get": lambda: storage.get(LANES, Key((0,), (0,))),
        "mutate": lambda: storage.mutate(generation_of(0, 1)),
    }
    for name, attempt in attempts.items():
        try:
            await attempt()
            report(attempt=name, error=None)
        except StorageError as error:
            report(attempt=name, error=type(error).__name__, remedy=getattr(error, "remedy", ""))


WHAT = {
    "increment": increment,
    "advance_lanes": advance_lanes,
    "outgrow_limit": outgrow_limit,
    "use_as_nobody": use_as_nobody,
}


async def main(what: str, directory: str, argument: str = "0") -> None:
    storage = SqliteStorage(Path(directory))
    try:
        await WHAT[what](storage, int(argument))
    finally:
        await storage.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
