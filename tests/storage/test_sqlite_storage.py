"""The SQLite adapter keeps the storage contract, and what SQLite adds to it: files, processes, disks."""

# ruff: noqa: ASYNC230, ASYNC240 - nothing else runs on the loop while a test prepares its files

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from sqlite_process import COUNTERS, LANES, ROWS_A_LANE, generation_of
from storage_contract import DAYS, INSTANTS, LOCAL_INSTANTS, TIMES, AdministrationContract, StorageContract

from infra.storage.errors import (
    InvalidOperationError,
    NoMutationError,
    StorageError,
    UnavailableStorageError,
)
from infra.storage.operations import Atomicity, DataType, Delete, IfNotExists, Key, Put, Scan, TableSchema
from infra.storage.sqlite import MAX_BATCHES_PER_GROUP, SqliteStorage

ROOT = Path(__file__).parents[2]


class TestSqliteStorage(StorageContract):
    @pytest.fixture
    async def storage(self, tmp_path: Path) -> AsyncIterator[SqliteStorage]:
        storage = SqliteStorage(tmp_path / "data")
        yield storage
        await storage.close()


class TestSqliteStorageIsAdministrable(AdministrationContract):
    @pytest.fixture
    async def storage(self, tmp_path: Path) -> AsyncIterator[SqliteStorage]:
        storage = SqliteStorage(tmp_path / "data")
        yield storage
        await storage.close()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
async def storage(directory: Path) -> AsyncIterator[SqliteStorage]:
    storage = SqliteStorage(directory, lock_timeout_ms=60_000)
    yield storage
    await storage.close()


def count(name: str, value: int = 0) -> list[Put]:
    return [Put(COUNTERS, Key((name,)), {"value": value})]


def start(what: str, directory: Path, argument: int = 0) -> subprocess.Popen[str]:
    script = Path(__file__).with_name("sqlite_process.py")
    return subprocess.Popen(
        [sys.executable, str(script), what, str(directory), str(argument)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def reports_of(what: str, directory: Path, argument: int = 0) -> list[dict[str, object]]:
    """What a process that runs to its end has to say."""
    with start(what, directory, argument) as process:
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return [json.loads(line) for line in output.splitlines()]


def commits_in_log(directory: Path, namespace: str = "shop") -> int:
    """How many transactions the write-ahead log holds: frames that carry the size of the database after a commit."""
    log = (directory / f"{namespace}.db-wal").read_bytes()
    page_size = int.from_bytes(log[8:12], "big")
    salt = log[16:24]
    frames = [log[at : at + 24] for at in range(32, len(log), 24 + page_size)]
    return sum(frame[8:16] == salt and frame[4:8] != b"\0\0\0\0" for frame in frames)


# Files


async def test_each_namespace_is_a_file_and_reading_creates_none(storage: SqliteStorage, directory: Path):
    assert await storage.tables() == []
    with pytest.raises(InvalidOperationError):
        await storage.get(COUNTERS, Key(("a",)))
    assert not directory.exists()

    await storage.create_table(COUNTERS)
    await storage.create_table(replace(COUNTERS, namespace="depot"))

    assert {path.name for path in directory.glob("*.db")} == {"shop.db", "depot.db"}
    assert storage.info.atomicity is Atomicity.NAMESPACE
    assert storage.info.serializes_batches


async def test_tables_and_rows_outlive_the_storage_object(directory: Path):
    table = TableSchema("shop", "all_types", {t.lower(): t for t in DataType}, ("text",), ("boolean", "blob"))
    first = SqliteStorage(directory)
    await first.create_table(table)
    times = {
        "date": DAYS[0],
        "time": TIMES[-1],
        "timestamp": LOCAL_INSTANTS[-1],
        "timestamptz": INSTANTS[1],
    }
    await first.mutate([Put(table, Key(("x",), (True, b"\0")), {"int": 1, "float": 0.5, **times})])
    await first.close()

    second = SqliteStorage(directory)
    assert await second.tables() == [table]
    row = {"boolean": True, "int": 1, "bigint": None, "float": 0.5, "double": None, "text": "x", "blob": b"\0"}
    assert await second.get(table, Key(("x",), (True, b"\0"))) == row | times
    await second.close()


async def test_what_others_create_is_seen_by_whoever_was_there_before(storage: SqliteStorage, directory: Path):
    await storage.create_table(COUNTERS)
    elsewhere = replace(COUNTERS, namespace="depot")
    for absent in (LANES, elsewhere):
        with pytest.raises(InvalidOperationError):
            await storage.scan(Scan(absent, (1 if absent is LANES else "a",)))

    other = SqliteStorage(directory)
    await other.create_table(LANES)
    await other.create_table(elsewhere)
    await other.mutate(generation_of(1, 0))
    await other.close()

    assert await storage.tables() == [elsewhere, COUNTERS, LANES]
    assert len(await storage.scan(Scan(LANES, (1,)))) == ROWS_A_LANE
    assert await storage.get(elsewhere, Key(("a",))) is None


async def test_a_storage_serves_one_event_loop_after_another(directory: Path):
    """Also when a loop ended in the middle of a write; each loop runs in a thread, since this test has its own."""
    storage = SqliteStorage(directory)

    async def first_loop() -> None:
        await storage.create_table(COUNTERS)
        await storage.mutate(count("a", 1))
        left_behind = asyncio.create_task(storage.mutate(count("b", 1)))
        await asyncio.sleep(0)
        assert not left_behind.done()

    async def second_loop() -> None:
        await storage.mutate(count("a", 2))
        assert await storage.get(COUNTERS, Key(("a",))) == {"id": "a", "value": 2}
        await storage.close()

    await asyncio.to_thread(asyncio.run, first_loop())
    await asyncio.to_thread(asyncio.run, second_loop())


async def test_a_write_left_behind_by_a_closed_loop_does_not_keep_the_file_locked(directory: Path):
    storage = SqliteStorage(directory, lock_timeout_ms=5_000)
    other = SqliteStorage(directory, lock_timeout_ms=5_000)
    await other.create_table(COUNTERS)

    def abandon() -> None:
        loop = asyncio.new_event_loop()
        left_behind = loop.create_task(storage.mutate(count("a")))
        loop.run_until_complete(asyncio.sleep(0))  # far enough to hand work to the file's thread, no further
        assert not left_behind.done()
        loop.close()

    await asyncio.to_thread(abandon)
    await storage.mutate(count("b"))
    await other.mutate(count("c"))
    assert {("b",), ("c",)} <= set(await storage.partitions(COUNTERS))

    await asyncio.to_thread(abandon)
    await storage.close()
    await other.mutate(count("d"))
    await other.close()
    gc.collect()


async def test_the_remains_of_a_closed_loop_disturb_no_later_write(directory: Path):
    storage = SqliteStorage(directory, lock_timeout_ms=5_000)
    await storage.create_table(COUNTERS)

    def abandon() -> asyncio.Task[None]:
        loop = asyncio.new_event_loop()
        left_behind = loop.create_task(storage.mutate(count("a")))
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
        return left_behind

    with closing(sqlite3.connect(directory / "shop.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        remains = await asyncio.to_thread(abandon)
        later = asyncio.create_task(storage.mutate(count("b")))
        await asyncio.sleep(0)
        del remains
        gc.collect()
        other.execute("ROLLBACK")
    await later

    assert ("b",) in await storage.partitions(COUNTERS)
    await storage.close()
    gc.collect()


async def test_closing_finishes_the_writes_that_wait(storage: SqliteStorage, directory: Path):
    await storage.create_table(COUNTERS)
    writes = [asyncio.create_task(storage.mutate(count(f"c{n}", n))) for n in range(2 * MAX_BATCHES_PER_GROUP)]
    await asyncio.sleep(0)

    await storage.close()

    assert await asyncio.gather(*writes) == [None] * len(writes)
    again = SqliteStorage(directory)
    assert len(await again.partitions(COUNTERS)) == len(writes)
    await again.close()


async def test_a_closed_storage_refuses_further_calls(storage: SqliteStorage):
    await storage.create_table(COUNTERS)
    await storage.close()

    with pytest.raises(InvalidOperationError, match="closed"):
        await storage.get(COUNTERS, Key(("a",)))
    with pytest.raises(InvalidOperationError, match="closed"):
        await storage.mutate(count("a"))


async def test_the_log_is_flushed_at_every_commit(directory: Path):
    """Nothing less than FULL survives a loss of power; processes that are killed cannot tell the difference."""
    storage = SqliteStorage(directory)
    await storage.create_table(COUNTERS)
    await storage.mutate(count("a"))

    [file] = storage._files.values()
    assert file._writer is not None
    assert file._writer.execute("PRAGMA synchronous").fetchone() == (2,)
    assert file._writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    await storage.close()


# Group commit


async def test_concurrent_batches_share_one_commit(storage: SqliteStorage, directory: Path):
    await storage.create_table(COUNTERS)
    await storage.mutate(count("first"))
    before = commits_in_log(directory)

    await asyncio.gather(*(storage.mutate(count(f"c{n}", n)) for n in range(100)))
    together = commits_in_log(directory) - before
    for n in range(10):
        await storage.mutate(count(f"d{n}", n))
    one_by_one = commits_in_log(directory) - before - together

    assert (together, one_by_one) == (1, 10)


async def test_a_group_is_bounded(storage: SqliteStorage, directory: Path):
    await storage.create_table(COUNTERS)
    await storage.mutate(count("first"))
    before = commits_in_log(directory)

    await asyncio.gather(*(storage.mutate(count(f"c{n}")) for n in range(2 * MAX_BATCHES_PER_GROUP + 1)))

    assert commits_in_log(directory) - before == 3


async def test_a_group_of_which_every_batch_fails_writes_nothing(storage: SqliteStorage, directory: Path):
    await storage.create_table(COUNTERS)
    await storage.mutate(count("a"))
    before = commits_in_log(directory)

    again = [replace(put, condition=IfNotExists()) for put in count("a", 1)]
    answers = await asyncio.gather(*(storage.mutate(again) for _ in range(5)), return_exceptions=True)

    assert [type(answer) for answer in answers] == [NoMutationError] * 5
    assert commits_in_log(directory) == before


async def test_a_batch_cancelled_before_its_group_began_is_not_written(storage: SqliteStorage, directory: Path):
    await storage.create_table(COUNTERS)
    await storage.mutate(count("first"))
    with closing(sqlite3.connect(directory / "shop.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        cancelled = asyncio.create_task(storage.mutate(count("cancelled")))
        kept = asyncio.create_task(storage.mutate(count("kept")))
        await asyncio.sleep(0.02)
        cancelled.cancel()
        other.execute("ROLLBACK")
    await kept

    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert sorted(await storage.partitions(COUNTERS)) == [("first",), ("kept",)]


# Locks


async def test_a_locked_file_is_unavailable_to_writers_while_readers_go_on(directory: Path):
    storage = SqliteStorage(directory, lock_timeout_ms=50)
    await storage.create_table(COUNTERS)
    await storage.mutate(count("a", 1))
    with closing(sqlite3.connect(directory / "shop.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(UnavailableStorageError) as caught:
            await storage.mutate(count("a", 2))
        with pytest.raises(UnavailableStorageError):
            await storage.create_table(LANES)
        assert str(directory / "shop.db") in caught.value.remedy
        assert await storage.get(COUNTERS, Key(("a",))) == {"id": "a", "value": 1}
        other.execute("ROLLBACK")

    await storage.mutate(count("a", 3))

    assert await storage.get(COUNTERS, Key(("a",))) == {"id": "a", "value": 3}
    await storage.close()


async def test_a_writer_that_waits_for_a_lock_holds_up_nothing_else(storage: SqliteStorage, directory: Path):
    elsewhere = replace(COUNTERS, namespace="depot")
    await storage.create_table(COUNTERS)
    await storage.create_table(elsewhere)
    with closing(sqlite3.connect(directory / "shop.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        waiting = asyncio.create_task(storage.mutate(count("a", 1)))
        for n in range(5):
            await storage.mutate([Put(elsewhere, Key(("a",)), {"value": n})])
            assert await storage.get(COUNTERS, Key(("a",))) is None
        assert not waiting.done()
        other.execute("ROLLBACK")

    await waiting

    assert await storage.get(COUNTERS, Key(("a",))) == {"id": "a", "value": 1}


# Several processes


async def test_many_may_create_the_same_file_at_once(tmp_path: Path):
    for attempt in range(5):
        storages = [SqliteStorage(tmp_path / str(attempt)) for _ in range(8)]
        await asyncio.gather(*(each.create_table(table) for each in storages for table in (COUNTERS, LANES)))
        for each in storages:
            assert await each.tables() == [COUNTERS, LANES]
        await asyncio.gather(*(each.close() for each in storages))


async def test_increments_of_several_processes_are_all_counted(directory: Path):
    """They also start at once on a directory that does not exist yet, and create the same table."""
    processes = [start("increment", directory, 25) for _ in range(3)]
    for process in processes:
        with process:
            process.communicate(timeout=60)
        assert process.returncode == 0

    storage = SqliteStorage(directory)
    for name in ("a", "b"):
        assert await storage.get(COUNTERS, Key((name,))) == {"id": name, "value": 75}
    await storage.close()


async def test_a_killed_writer_leaves_whole_batches_and_all_that_was_answered(directory: Path):
    lanes = 8
    for _ in range(3):
        answered: Counter[int] = Counter()
        with start("advance_lanes", directory, lanes) as process:
            assert process.stdout is not None
            for number, line in enumerate(process.stdout):
                report = json.loads(line)
                answered[report["lane"]] = report["generation"]
                if number == 200:
                    process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL

        storage = SqliteStorage(directory)
        for lane in range(lanes):
            rows = await storage.scan(Scan(LANES, (lane,)))
            [generation] = {row["generation"] for row in rows}
            assert len(rows) == ROWS_A_LANE
            assert generation in (answered[lane], answered[lane] + 1)
        assert set(answered) == set(range(lanes))
        await storage.close()


# Disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path | None]:
    """A file system of 2 MiB, or None where one cannot be mounted."""
    directory = tmp_path / "small_disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(directory)]
    try:
        is_mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        is_mounted = False
    yield directory if is_mounted else None
    if is_mounted:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


async def fill(storage: SqliteStorage) -> tuple[int, list[StorageError]]:
    """Write lanes, four at a time, until it fails: how many lanes were answered, and what the last four were told."""
    for first in range(0, 10_000, 4):
        lanes = range(first, first + 4)
        answers = await asyncio.gather(
            *(storage.mutate(generation_of(lane, 0, body="x" * 2_000)) for lane in lanes), return_exceptions=True
        )
        if any(answers):
            return first + answers.count(None), [answer for answer in answers if isinstance(answer, StorageError)]
    raise AssertionError("it never filled")


async def whole_lanes(storage: SqliteStorage) -> int:
    """How many lanes there are; none may be there in part."""
    partitions = await storage.partitions(LANES)
    for partition in partitions:
        assert len(await storage.scan(Scan(LANES, partition))) == ROWS_A_LANE
    return len(partitions)


async def test_a_full_disk_refuses_writes_serves_reads_and_recovers_when_space_is_back(
    small_disk: Path | None, directory: Path
):
    """Where no small disk can be mounted, the limit on pages stands in for it and deleted rows for the freed space."""
    data = (small_disk or directory) / "data"
    storage = SqliteStorage(data, max_pages=None if small_disk else 100)
    await storage.create_table(LANES)
    if small_disk:
        (small_disk / "ballast").write_bytes(b"x" * 1_000_000)

    answered, errors = await fill(storage)

    assert {type(error) for error in errors} == {UnavailableStorageError}
    for error in errors:
        assert isinstance(error, UnavailableStorageError)
        assert str(data / "shop.db") in error.remedy
        assert "space" in error.remedy
    assert answered > 4
    assert await whole_lanes(storage) == answered

    if small_disk:
        (small_disk / "ballast").unlink()
    else:
        await free_space(storage)
    for lane in range(20_000, 20_004):
        await storage.mutate(generation_of(lane, 0, body="x" * 2_000))
    await storage.close()

    again = SqliteStorage(data)
    assert await again.get(LANES, Key((20_003,), (0,))) is not None
    await whole_lanes(again)
    await again.close()


async def free_space(storage: SqliteStorage) -> None:
    for lane in range(4):
        await storage.mutate([Delete(LANES, Key((lane,), (row,))) for row in range(ROWS_A_LANE)])


async def test_a_file_at_its_limit_of_pages_refuses_writes_until_rows_are_deleted(directory: Path):
    storage = SqliteStorage(directory, max_pages=100)
    await storage.create_table(LANES)

    answered, errors = await fill(storage)
    assert {type(error) for error in errors} == {UnavailableStorageError}
    assert await whole_lanes(storage) == answered
    await free_space(storage)
    await storage.mutate(generation_of(20_000, 0, body="x" * 2_000))

    assert await whole_lanes(storage) == answered - 4 + 1
    assert (directory / "shop.db").stat().st_size <= 100 * 4096
    await storage.close()


def test_a_commit_that_the_disk_broke_off_is_unknown_and_the_next_one_works(directory: Path):
    """A limit on the size of files makes the log's last write fail halfway."""
    stopped, while_limited, lifted, at_the_end = reports_of("outgrow_limit", directory, 300_000)

    answered = stopped["answered"]
    assert isinstance(answered, int)
    assert stopped["error"] == "UnknownOutcomeError"
    assert answered > 0
    assert while_limited == lifted == {"generations": [answered]}
    assert at_the_end == {"generations": [answered + 1]}


@pytest.mark.parametrize("is_used_already", [False, True])
async def test_a_directory_without_write_permission_is_named_with_its_remedy(is_used_already: bool):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        if is_used_already:
            storage = SqliteStorage(path)
            await storage.create_table(LANES)
            await storage.mutate(generation_of(0, 0))
            await storage.close()
            (path / "shop.db").chmod(0o444)
        path.chmod(0o555)
        reports = {report.pop("attempt"): report for report in reports_of("use_as_nobody", path)}
        path.chmod(0o755)

    if is_used_already:
        broken = ["create_table", "tables", "get", "mutate"]
    else:
        broken = ["create_table"]
        assert reports["tables"] == {"error": None}
    for attempt in broken:
        assert reports[attempt]["error"] == "UnavailableStorageError"
        assert directory in str(reports[attempt]["remedy"])


async def expect_unavailable(storage: SqliteStorage, path: Path) -> None:
    """Every kind of call names `path` and says what to do."""
    for call in (
        storage.tables(),
        storage.create_table(COUNTERS),
        storage.get(COUNTERS, Key(("a",))),
        storage.scan(Scan(COUNTERS, ("a",))),
        storage.mutate(count("a")),
    ):
        with pytest.raises(UnavailableStorageError) as caught:
            await call
        assert str(path) in str(caught.value)
        assert str(path) in caught.value.remedy


async def test_a_directory_that_is_a_file_is_named_with_its_remedy(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        storage = SqliteStorage(directory)
        await expect_unavailable(storage, directory)
        await storage.close()


@pytest.mark.parametrize("content", [b"not a database at all\n" * 100, b"SQLite format 3\0" + b"\xff" * 5000])
async def test_a_file_that_is_no_database_is_named_and_left_alone(
    storage: SqliteStorage, directory: Path, content: bytes
):
    directory.mkdir()
    (directory / "shop.db").write_bytes(content)

    await expect_unavailable(storage, directory / "shop.db")

    assert (directory / "shop.db").read_bytes() == content
    (directory / "shop.db").rename(directory / "moved away")
    await storage.create_table(COUNTERS)
    await storage.mutate(count("a", 1))
    assert await storage.get(COUNTERS, Key(("a",))) == {"id": "a", "value": 1}


async def test_another_programs_database_is_named_and_left_alone(storage: SqliteStorage, directory: Path):
    directory.mkdir()
    with closing(sqlite3.connect(directory / "shop.db", isolation_level=None)) as other:
        other.execute("CREATE TABLE counters (id TEXT PRIMARY KEY, value INTEGER)")
    content = (directory / "shop.db").read_bytes()

    await expect_unavailable(storage, directory / "shop.db")

    assert (directory / "shop.db").read_bytes() == content


async def test_a_file_of_a_future_format_is_refused(directory: Path):
    storage = SqliteStorage(directory)
    await storage.create_table(COUNTERS)
    await storage.close()
    with closing(sqlite3.connect(directory / "shop.db", isolation_level=None)) as other:
        other.execute("PRAGMA user_version = 2")

    later = SqliteStorage(directory)
    await expect_unavailable(later, directory)
    await later.close()


@pytest.mark.parametrize("replacement", [None, b"", b"something else"])
async def test_a_file_that_was_taken_away_swallows_no_write(
    storage: SqliteStorage, directory: Path, replacement: bytes | None
):
    await storage.create_table(COUNTERS)
    await storage.mutate(count("a", 1))
    for file in directory.iterdir():
        file.rename(file.with_name(f"away-{file.name}"))
    if replacement is not None:
        (directory / "shop.db").write_bytes(replacement)

    for _ in range(2):
        with pytest.raises(UnavailableStorageError) as caught:
            await storage.mutate(count("a", 2))
        assert str(directory / "shop.db") in caught.value.remedy

    (directory / "shop.db").unlink(missing_ok=True)
    for file in directory.glob("away-*"):
        file.rename(file.with_name(file.name.removeprefix("away-")))
    await storage.mutate(count("b", 3))
    assert await storage.get(COUNTERS, Key(("a",))) == {"id": "a", "value": 1}


async def test_a_damaged_file_is_named_with_its_remedy(directory: Path):
    storage = SqliteStorage(directory)
    await storage.create_table(COUNTERS)
    await asyncio.gather(*(storage.mutate(count(f"c{n}")) for n in range(2_000)))
    await storage.close()
    with open(directory / "shop.db", "r+b") as file:
        file.seek(4096 * 2)
        file.write(b"\xa5" * (directory / "shop.db").stat().st_size)

    damaged = SqliteStorage(directory)
    with pytest.raises(UnavailableStorageError) as caught:
        await damaged.get(COUNTERS, Key(("c1",)))
    assert "backup" in caught.value.remedy
    with pytest.raises(UnavailableStorageError):
        await damaged.mutate(count("c1"))
    await damaged.close()


async def test_a_value_that_sqlite_cannot_hold_is_the_callers_mistake(storage: SqliteStorage):
    """Neighbours in the same group are written."""
    await storage.create_table(LANES)
    huge = Put(LANES, Key((1,), (0,)), {"body": "x" * 1_000_000_001})

    refused, written = await asyncio.gather(
        storage.mutate([*generation_of(2, 0), huge]), storage.mutate(generation_of(3, 0)), return_exceptions=True
    )

    assert isinstance(refused, InvalidOperationError)
    assert written is None
    assert await storage.partitions(LANES) == [(3,)]
