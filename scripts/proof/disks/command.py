"""`python -m scripts.proof disks`: every scene on every storage, on SQLite several rounds of most; the report.

A scene holds if nothing is wrong and it was not played in vain: syncs did fail, transfers were refused, the server did
end. What this machine does not allow (no root, no strace, no libfaketime) keeps the proof from holding, and is named.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from infra.messaging.errors import MessagingError
from infra.servers.errors import ServerError
from infra.storage.errors import InvalidOperationError, StorageError
from infra.storage.sqlite import SqliteStorage
from scripts.proof.disks import clocks, on_cassandra, on_kafka, on_sqlite
from scripts.proof.disks.injury import ToolMissingError

Scene = Callable[[Path], Awaitable[dict[str, Any]]]


def prove_disks(work: Path, *, only: str = "", rounds: int = 3) -> dict[str, Any]:
    """Play the scenes whose name contains `only` in directories below `work`; `holds`, and what each showed.

    Raises InvalidOperationError if there are none.
    """
    logging.getLogger().setLevel(logging.CRITICAL)
    scenes = {name: scene for name, scene in _scenes(rounds).items() if only in name}
    if not scenes:
        raise InvalidOperationError(f"there is no scene with {only!r} in its name: {', '.join(_scenes(rounds))}")
    reports = asyncio.run(_play(scenes, work))
    return {"holds": not any(report["wrong"] for report in reports.values()), "scenes": reports}


async def _play(scenes: Mapping[str, Scene], work: Path) -> dict[str, dict[str, Any]]:
    reports: dict[str, dict[str, Any]] = {}
    for number, (name, scene) in enumerate(scenes.items()):
        directory = work / f"{number:02d}"
        directory.mkdir(parents=True)
        try:
            reports[name] = await scene(directory)
        except ToolMissingError as missing:
            reports[name] = {"wrong": [f"not shown here: {missing}"]}
        except (AssertionError, ServerError, StorageError, MessagingError) as failed:
            reports[name] = {"wrong": [f"{type(failed).__name__}: {failed}"]}
    return reports


def _scenes(rounds: int) -> dict[str, Scene]:
    return {
        "sqlite: disk full, two files": partial(on_sqlite.disk_full, rounds=rounds),
        "sqlite: disk full, one file": partial(on_sqlite.disk_full, one_file=True, rounds=rounds),
        "sqlite: sync error, two files": partial(on_sqlite.sync_error, rounds=rounds),
        "sqlite: sync error, one file": partial(on_sqlite.sync_error, one_file=True, rounds=rounds),
        "sqlite: slow disk, two files": partial(on_sqlite.slow_disk, one_file=False, commits=5),
        "sqlite: slow disk, one file": partial(on_sqlite.slow_disk, delay_ms=500, commits=10),
        **{f"sqlite: clock {name}": partial(_clock_on_sqlite, name) for name in clocks.CLOCKS},
        "cassandra: disk of the commit log full": partial(_disk_full_on_cassandra, "commitlog"),
        "cassandra: disk of the data full": partial(_disk_full_on_cassandra, "data"),
        "cassandra: sync error": partial(_on_cassandra, on_cassandra.sync_error),
        "cassandra: slow disk": partial(_on_cassandra, partial(on_cassandra.slow_disk, delay_ms=200, commits=10)),
        "cassandra: disk slower than any deadline": partial(
            _on_cassandra, partial(on_cassandra.slow_disk, delay_ms=5_000)
        ),
        **{f"cassandra: clock {name}": partial(_clock_on_cassandra, name) for name in clocks.CLOCKS},
        **{
            f"cassandra: clock of the server {name}": partial(clocks.wrong_clock_of_cassandra, name=name)
            for name in clocks.CLOCKS
        },
        "kafka: disk full": partial(_on_kafka, lambda below, work: on_kafka.disk_full(below)),
        "kafka: sync error": partial(_on_kafka, on_kafka.sync_error),
        "kafka: slow disk": partial(_on_kafka, partial(on_kafka.slow_disk, delay_ms=200, messages=40)),
        "kafka: disk slower than any deadline": partial(_on_kafka, partial(on_kafka.slow_disk, delay_ms=8_000)),
    }


async def _clock_on_sqlite(name: str, work: Path) -> dict[str, Any]:
    directory = work / "tables"
    return await clocks.wrong_clock(
        partial(SqliteStorage, directory), f"sqlite://{directory.absolute()}", work, name=name, commits=40
    )


async def _on_cassandra(scene: Callable[..., Awaitable[dict[str, Any]]], work: Path) -> dict[str, Any]:
    async with on_cassandra.running(work) as below:
        return await scene(below, work)


async def _disk_full_on_cassandra(what: str, work: Path) -> dict[str, Any]:
    async with on_cassandra.running(work) as below:
        return await on_cassandra.disk_full(below, what=what)


async def _clock_on_cassandra(name: str, work: Path) -> dict[str, Any]:
    async with on_cassandra.running(work) as below:
        server = below.server
        return await clocks.wrong_clock(
            on_cassandra.cassandra_at(server), on_cassandra.url_of(server), work, name=name, commits=40
        )


async def _on_kafka(scene: Callable[..., Awaitable[dict[str, Any]]], work: Path) -> dict[str, Any]:
    async with on_kafka.running(work) as below:
        return await scene(below, work)
