"""What a commit whose sync failed is to SQLite: unknown, until the next commit of the file or a crash decides."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from infra.storage.operations import DataType, Key, TableSchema
from infra.storage.sqlite import SqliteStorage
from scripts.proof.disks.injury import Trace, traced

TABLE = TableSchema("shop", "things", {"id": DataType.TEXT, "v": DataType.INT}, ("id",))

WRITER = """
import asyncio, sys
from pathlib import Path
from infra.storage.errors import StorageError
from infra.storage.operations import DataType, IfNotExists, Key, Put, TableSchema
from infra.storage.sqlite import SqliteStorage

TABLE = TableSchema("shop", "things", {"id": DataType.TEXT, "v": DataType.INT}, ("id",))
storage = SqliteStorage(Path(sys.argv[1]))

async def does(what, name):
    if what == "get":
        return "there" if await storage.get(TABLE, Key((name,))) else "absent"
    try:
        await storage.mutate([Put(TABLE, Key((name,)), {"v": 1}, IfNotExists())])
        return "written"
    except StorageError as error:
        return type(error).__name__

async def main():
    await storage.create_table(TABLE)
    while line := await asyncio.to_thread(sys.stdin.readline):
        print(await does(*line.split()), flush=True)

asyncio.run(main())
"""


class Writer:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    async def __call__(self, what: str, name: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{what} {name}\n".encode())
        return (await self._process.stdout.readline()).decode().strip()

    async def killed(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        await self._process.wait()


@pytest.fixture
async def writer(tmp_path: Path) -> AsyncIterator[Writer]:
    """A process with a storage; the first thing is written."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", WRITER, str(tmp_path / "data")),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    writer = Writer(process)
    assert await writer("put", "first") == "written"
    yield writer
    await writer.killed()


async def there(directory: Path) -> set[str]:
    """What a process finds that opens the file after a crash."""
    storage = SqliteStorage(directory)
    found = {name for name in ("first", "second", "third") if await storage.get(TABLE, Key((name,))) is not None}
    await storage.close()
    return found


async def test_it_is_unknown_and_comes_true_when_the_process_dies_before_another_commit(
    tmp_path: Path, tools: None, writer: Writer
) -> None:
    async with traced(writer.pid, tmp_path / "log", calls=["fdatasync"], tamper="error=EIO"):
        assert await writer("put", "second") == "UnknownOutcomeError"
        assert await writer("get", "second") == "absent"
        await writer.killed()

    assert await there(tmp_path / "data") == {"first", "second"}


async def test_the_next_commit_takes_its_place_in_the_log_and_then_it_never_was(
    tmp_path: Path, tools: None, writer: Writer
) -> None:
    wal = tmp_path / "data" / "shop.db-wal"
    calls = ["pwrite64", "fdatasync"]
    async with traced(writer.pid, tmp_path / "log", calls=["fdatasync"], tamper="error=EIO:when=1"):
        assert await writer("put", "second") == "UnknownOutcomeError"
    async with traced(writer.pid, tmp_path / "log", calls=calls, path=wal) as trace:
        assert await writer("put", "third") == "written"
        assert await writer("get", "second") == "absent"
        await writer.killed()

    assert [call.name for call in trace.calls()][-1] == "fdatasync", "it was answered before it was synced"
    assert writes(trace) >= 2  # a frame: its header and its page
    assert await there(tmp_path / "data") == {"first", "third"}


def writes(trace: Trace) -> int:
    return trace.count()["pwrite64"]


async def test_a_commit_that_was_acknowledged_before_it_is_not_touched_by_it(
    tmp_path: Path, tools: None, writer: Writer
) -> None:
    async with traced(writer.pid, tmp_path / "log", calls=["fdatasync"], tamper="error=EIO:when=2+2"):
        assert await writer("put", "second") == "written"
        assert await writer("put", "third") == "UnknownOutcomeError"
        await writer.killed()

    assert {"first", "second"} <= await there(tmp_path / "data")
