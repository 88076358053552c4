"""Storage in SQLite files, one for each namespace, shared by any number of processes of one machine.

Theory of operation
    A namespace is a file in WAL mode with `synchronous=FULL`; a table is a WITHOUT ROWID table of that file, and
    the file itself says which tables it holds. One `mutate` is atomic within its file (Atomicity.NAMESPACE), and
    SQLite lets one writer at a time into a file, so batches are serialized.

    Writes: group commit. While one group is being flushed, further batches wait; then all of them go into the
    next `BEGIN IMMEDIATE … COMMIT` and share one fsync. Each batch has a savepoint: a batch whose condition fails
    is rolled back to it and refused, the others stay. Nothing is answered before COMMIT has returned.
    Who does what: statements run on the event loop, since they only touch memory and a loop busy with other
    work would make a thread wait for the interpreter lock at every row; COMMIT (the fsync), waiting for another
    process's lock, and opening files run on the file's own thread.

    Reads run on the event loop, on a connection of their own. Each is one statement in its own snapshot of what
    is committed, so it sees everything answered before it began and waits for no writer.

What SQLite reports becomes one of four things
    refused      the batch's condition did not hold (NoMutationError), the call was wrong (InvalidOperationError)
    unavailable  nothing was written: locked, full, unreadable. The error says what to do about the file; the
                 connection is opened anew by the next call, so a cured cause needs no restart.
    unknown      COMMIT itself failed on the disk. SQLite takes such a transaction back in memory, but its last
                 frame may have reached the log and a recovery after a crash would honour it. Only a full disk is
                 certain: the frame that commits is the last one written, and it was not.

Never here: transactions over two files, and any retry of a write.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from infra.storage.errors import (
    InvalidOperationError,
    NoMutationError,
    StorageError,
    UnavailableStorageError,
    UnknownOutcomeError,
)
from infra.storage.operations import (
    Atomicity,
    CrossPartition,
    DataType,
    Key,
    Mutation,
    Row,
    Scan,
    StorageInfo,
    TableSchema,
    Value,
)
from infra.storage.sqlite_statements import Parameters, TableStatements, Write
from infra.storage.validation import (
    TableRules,
    check_identifier,
    check_one_unit,
    difference,
    is_identifier,
    is_same_table,
    needs_creation,
    with_column,
    with_index,
)

Result = TypeVar("Result")

# Written into each file's header, so that a foreign database is recognized before anything is changed in it.
APPLICATION_ID = int.from_bytes(b"Cncd", "big")
FORMAT_VERSION = 1

# A group must not hold the event loop or the file's lock for long: about 4 µs a row.
MAX_BATCHES_PER_GROUP = 256
MAX_ROWS_PER_GROUP = 2_000

_LOCK_POLL_S = 0.001

# The name is outside what a table may be called, so it can never collide with one.
_CREATE_CATALOGUE = 'CREATE TABLE "tables$" (name TEXT PRIMARY KEY, definition TEXT NOT NULL) WITHOUT ROWID'
_READ_CATALOGUE = 'SELECT name, definition FROM "tables$" ORDER BY name'
_REMOVE_FROM_CATALOGUE = 'DELETE FROM "tables$" WHERE name = ?'
_ADD_TO_CATALOGUE = 'INSERT INTO "tables$" (name, definition) VALUES (?, ?)'

# In this order: our mark is written together with the first object, so whoever saw an object must see the mark.
_HEADER_QUERIES = ("SELECT count(*) FROM sqlite_master", "PRAGMA application_id", "PRAGMA user_version")

_CONNECTION_PRAGMAS = (
    "PRAGMA busy_timeout = 0",  # waiting is done where it blocks nobody
    "PRAGMA synchronous = FULL",
    "PRAGMA cache_size = -8000",  # KiB
    "PRAGMA temp_store = MEMORY",
    "PRAGMA journal_size_limit = 67108864",
)

_BUSY = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL})

_REMEDIES = {
    sqlite3.SQLITE_BUSY: "another process keeps {path} locked: end it, or wait for it",
    sqlite3.SQLITE_LOCKED: "another process keeps {path} locked: end it, or wait for it",
    sqlite3.SQLITE_PROTOCOL: "another process keeps {path} locked: end it, or wait for it",
    sqlite3.SQLITE_FULL: "the disk that holds {path} is full: free some space on it",
    sqlite3.SQLITE_IOERR: "reading or writing {path} failed: check the disk, its free space and its limits",
    sqlite3.SQLITE_READONLY: "make {path} and its directory writable for this user",
    sqlite3.SQLITE_PERM: "make {path} and its directory writable for this user",
    sqlite3.SQLITE_CANTOPEN: "make {path} and its directory readable and writable for this user",
    sqlite3.SQLITE_NOTADB: "{path} is not a SQLite database: move it away, or restore it from a backup",
    sqlite3.SQLITE_CORRUPT: "{path} is damaged: restore it from a backup",
}


class SqliteStorage:
    """The storage port on SQLite files in `directory`, which is created when the first table is.

    Belongs to one event loop at a time. `lock_timeout_ms`: how long a call waits for a file that another process
    keeps locked before it raises UnavailableStorageError. `max_pages`: the size that a file may grow to, in pages
    of 4096 bytes; beyond it a write is refused as on a full disk. None leaves it to the disk.
    """

    def __init__(self, directory: Path, *, lock_timeout_ms: int = 10_000, max_pages: int | None = None) -> None:
        if "\0" in str(directory):
            raise InvalidOperationError("a directory's name cannot contain NUL")
        self._directory = directory.absolute()
        self._lock_timeout_ms = lock_timeout_ms
        self._max_pages = max_pages
        self._info = StorageInfo(
            name="sqlite",
            atomicity=Atomicity.NAMESPACE,
            serializes_batches=True,
            options={"directory": str(self._directory)},
        )
        self._files: dict[str, _NamespaceFile] = {}
        self._tables: dict[TableSchema, _Table] = {}
        self._closed = False

    @property
    def info(self) -> StorageInfo:
        return self._info

    def info_of(self, namespace: str) -> StorageInfo:
        return self.info

    async def create_table(self, table: TableSchema) -> None:
        TableRules(table)
        file = self._file(table.namespace)
        if not needs_creation(table, await file.catalogue()):
            return
        await self._change(file, lambda connection: _create_in(connection, file.path, table))

    async def tables(self) -> list[TableSchema]:
        found: list[TableSchema] = []
        for namespace in _namespaces(self._directory):
            found += await self._file(namespace).catalogue()
        return sorted(found, key=lambda table: table.full_name)

    async def get(self, table: TableSchema, key: Key) -> Row | None:
        held = self._tables.get(table) or await self._learn(table)
        held.rules.check_key(key)
        rows = await held.file.read(held.statements.get, held.statements.key(key))
        return held.statements.row(rows[0]) if rows else None

    async def scan(self, scan: Scan) -> list[Row]:
        held = self._tables.get(scan.table) or await self._learn(scan.table)
        held.rules.check_scan(scan)
        rows = await held.file.read(*held.statements.scan(scan))
        return [held.statements.row(row) for row in rows]

    async def pages(self, selection: CrossPartition, page_size: int = 256) -> AsyncIterator[list[Row]]:
        """Each page is one statement: rows written meanwhile behind the current position are not returned."""
        held = self._tables.get(selection.table) or await self._learn(selection.table)
        held.rules.check_cross_partition(selection)
        after: Key | None = None
        left = selection.limit
        while True:
            size = min(page_size, left) if selection.limit else page_size
            found = await held.file.read(*held.statements.page(selection, after, size))
            rows = [held.statements.row(values) for values in found]
            if rows:
                yield rows
            left -= len(rows)
            if len(rows) < size or (selection.limit and not left):
                return
            after = _key(selection.table, rows[-1])

    async def partitions(self, table: TableSchema) -> list[tuple[Value, ...]]:
        held = self._tables.get(table) or await self._learn(table)
        found = []
        following = held.statements.next_partition()
        rows = await held.file.read(held.statements.first_partition(), ())
        while rows:
            found.append(held.statements.partition(rows[0]))
            rows = await held.file.read(following, rows[0])
        return found

    async def mutate(self, mutations: Sequence[Mutation]) -> None:
        writes: dict[Write, list[Parameters]] = {}
        for mutation in mutations:
            held = self._tables.get(mutation.table) or await self._learn(mutation.table)
            held.rules.check_mutation(mutation)
            statement, parameters = held.statements.write(mutation)
            writes.setdefault(statement, []).append(parameters)
        check_one_unit(mutations, self.info)
        if mutations:
            await self._file(mutations[0].table.namespace).write(list(writes.items()), len(mutations))

    async def close(self) -> None:
        self._closed = True
        for file in self._files.values():
            await file.close()
        self._files.clear()
        self._tables.clear()

    # -- administration

    async def namespaces(self) -> list[str]:
        return _namespaces(self._directory)

    async def create_namespace(self, namespace: str) -> None:
        await self._change(self._file(namespace), lambda connection: _stock_in(connection))

    async def drop_namespace(self, namespace: str) -> None:
        file = self._file(namespace)
        if await file.catalogue():
            raise InvalidOperationError(f"namespace {namespace} still has tables")
        await file.close()
        del self._files[namespace]
        for name in (file.path, *(file.path.with_name(file.path.name + end) for end in ("-wal", "-shm"))):
            name.unlink(missing_ok=True)

    async def drop_table(self, table: TableSchema) -> None:
        await self._alter(table, lambda held: [held.drop_table()], None)

    async def truncate_table(self, table: TableSchema) -> None:
        known = await self._known(table)
        await self._alter(known, lambda held: [held.truncate_table()], known)

    async def add_column(self, table: TableSchema, column: str, data_type: DataType) -> None:
        known = await self._known(table)
        changed = with_column(known, column, data_type)
        if changed is not known:
            await self._alter(known, lambda held: [held.add_column(column, data_type)], changed)

    async def create_index(self, table: TableSchema, column: str) -> None:
        known = await self._known(table)
        await self._alter(known, lambda held: [held.create_index(column)], with_index(known, column))

    async def drop_index(self, table: TableSchema, column: str) -> None:
        known = await self._known(table)
        changed = replace(known, indexes=known.indexes - {column})
        await self._alter(known, lambda held: [held.drop_index(column)], changed)

    async def _known(self, table: TableSchema) -> TableSchema:
        for known in await self._file(table.namespace).catalogue():
            if known.name == table.name:
                return known
        raise InvalidOperationError(f"there is no table {table.full_name}")

    async def _alter(
        self, table: TableSchema, statements: Callable[[TableStatements], Iterable[str]], changed: TableSchema | None
    ) -> None:
        """Run `statements` and write down what the table is from now on (None: gone), in one transaction."""
        file = self._file(table.namespace)
        if not await file.catalogue():
            return

        def work(connection: sqlite3.Connection) -> None:
            for sql in statements(TableStatements(table)):
                connection.execute(sql)
            connection.execute(_REMOVE_FROM_CATALOGUE, (table.name,))
            if changed is not None:
                connection.execute(_ADD_TO_CATALOGUE, (changed.name, _definition(changed)))

        await self._change(file, work)
        self._tables = {known: held for known, held in self._tables.items() if known.full_name != table.full_name}

    async def _change(self, file: _NamespaceFile, work: Callable[[sqlite3.Connection], None]) -> None:
        await file.in_thread(self._change_in_thread, file.path, work)

    def _file(self, namespace: str) -> _NamespaceFile:
        if self._closed:
            raise InvalidOperationError("this storage was closed")
        file = self._files.get(namespace)
        if file is None:
            path = self._directory / f"{check_identifier(namespace)}.db"
            file = self._files[namespace] = _NamespaceFile(path, self._lock_timeout_ms, self._max_pages)
        return file

    async def _learn(self, table: TableSchema) -> _Table:
        """Look a table up in its file. Only found ones are remembered: another process may yet create the others."""
        rules = TableRules(table)
        file = self._file(table.namespace)
        for known in await file.catalogue():
            if known.name == table.name:
                if not is_same_table(table, known):
                    raise InvalidOperationError(f"{table.full_name} exists otherwise: {difference(table, known)}")
                held = self._tables[table] = _Table(file, rules, TableStatements(table))
                return held
        raise InvalidOperationError(f"there is no table {table.full_name}")

    def _change_in_thread(self, path: Path, work: Callable[[sqlite3.Connection], None]) -> None:
        """One transaction that changes tables, on a connection of its own: it competes like another process."""
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unusable_directory(self._directory, error) from error
        for namespace in _namespaces(self._directory):
            if namespace != path.stem and namespace.lower() == path.stem.lower():
                raise InvalidOperationError(f"namespaces {path.stem} and {namespace} differ only by case")
        patience = _Patience(self._lock_timeout_ms)
        try:
            connection = patience.retry(lambda: _connect(path, "rwc", self._max_pages))
            try:
                patience.retry(lambda: _prepare_file(connection, path))
                patience.retry(lambda: connection.execute("BEGIN IMMEDIATE"))
                _stock_in(connection)
                work(connection)
                connection.execute("COMMIT")
            finally:
                connection.close()
        except sqlite3.Error as error:
            raise _translated(error, path) from error


@dataclass(frozen=True, slots=True)
class _Table:
    """A table that is known to exist in its file."""

    file: _NamespaceFile
    rules: TableRules
    statements: TableStatements


@dataclass(slots=True, eq=False)
class _Batch:
    """One `mutate` on its way: statements with the parameters of each row, and who waits for the answer."""

    writes: list[tuple[Write, list[Parameters]]]
    row_count: int
    answer: asyncio.Future[None]

    def settle(self, error: BaseException | None) -> None:
        if self.answer.done() or self.answer.get_loop().is_closed():
            return  # The caller was cancelled; it knows no more than after an unknown outcome.
        if error is None:
            self.answer.set_result(None)
        else:
            self.answer.set_exception(error)


class _NamespaceFile:
    """One file: a connection that reads, a connection that writes group by group, and a thread for what blocks."""

    def __init__(self, path: Path, lock_timeout_ms: int, max_pages: int | None) -> None:
        self.path = path
        self._lock_timeout_ms = lock_timeout_ms
        self._max_pages = max_pages
        self._reader: sqlite3.Connection | None = None
        self._writer: sqlite3.Connection | None = None
        self._waiting: deque[_Batch] = deque()
        self._task: asyncio.Task[None] | None = None
        self._written_file: tuple[int, int] | None = None  # device and number of the file that the writer has open
        self._shift: object = None  # whose turn it is to write: one for each run of the task
        self._is_suspect = False  # the writing connection was left in the middle of something
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"sqlite-{path.stem}")

    async def in_thread(self, work: Callable[..., Result], *arguments: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    # Reading

    async def read(self, sql: str, parameters: Parameters) -> list[tuple[Any, ...]]:
        """All rows of one statement. SQLite makes readers wait only while a file is recovered or closed."""
        patience: _Patience | None = None
        while True:
            try:
                if self._reader is None:
                    self._reader = _connect(self.path, "rw", None)
                return self._reader.execute(sql, parameters).fetchall()
            except sqlite3.Error as error:
                patience = patience or _Patience(self._lock_timeout_ms)
                if not _is_busy(error):
                    self._drop_reader()
                if not _is_busy(error) or patience.is_over():
                    raise _translated(error, self.path) from error
            await asyncio.sleep(_LOCK_POLL_S)

    async def catalogue(self) -> list[TableSchema]:
        """The tables that the file holds at this moment; none if there is no file yet."""
        try:
            self.path.stat()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _unusable_directory(self.path.parent, error) from error
        header = [(await self.read(query, ()))[0][0] for query in _HEADER_QUERIES]
        if _is_new(self.path, *header):
            return []  # Another process is about to fill it.
        rows = await self.read(_READ_CATALOGUE, ())
        return [_schema(self.path.stem, name, definition) for name, definition in rows]

    def _drop_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    # Writing

    async def write(self, writes: list[tuple[Write, list[Parameters]]], row_count: int) -> None:
        """Wait until the group that holds these writes is committed, or raise what became of them."""
        loop = asyncio.get_running_loop()
        self._leave_closed_loop()
        if self._task is not None and self._task.get_loop() is not loop:
            raise InvalidOperationError(f"{self.path.name} is being written from another event loop")
        batch = _Batch(writes, row_count, loop.create_future())
        self._waiting.append(batch)
        if self._task is None:
            self._shift = object()
            self._task = loop.create_task(self._write_groups(self._shift))
        await batch.answer

    async def close(self) -> None:
        self._leave_closed_loop()
        if self._task is not None:
            await asyncio.wait([self._task])
        self._drop_reader()
        # The last connection to leave a file moves the log into it, which takes time: not on the loop.
        await self.in_thread(self._drop_writer)
        self._thread.shutdown(wait=False)

    async def _write_groups(self, shift: object) -> None:
        try:
            while self._waiting:
                await self._write_group()
            self._task = None
        except BaseException:
            # The loop is going away, or there is a mistake in this file: nobody must wait for ever. A task that a
            # closed loop left behind ends when it is collected; by then another may be at work.
            if self._shift is shift:
                self._abandon()
            raise

    async def _write_group(self) -> None:
        """One transaction of SQLite, and the answers to everyone whose batch was in it."""
        waiting = len(self._waiting)
        try:
            connection = await self._begin()
        except sqlite3.Error as error:
            for batch in [self._waiting.popleft() for _ in range(waiting)]:
                batch.settle(_translated(error, self.path))
            return
        group = self._next_group()
        try:
            refusals = [_apply(connection, batch, self.path) for batch in group]
        except sqlite3.Error as error:
            await self._fail(group, error)
            return
        try:
            if all(refusals):
                connection.execute("ROLLBACK")
            else:
                await self.in_thread(connection.execute, "COMMIT")
        except sqlite3.Error as error:
            nothing_written = await self.in_thread(_took_back, connection, error)
            await self._fail(group, error if nothing_written else None)
            return
        except BaseException:
            for batch in group:
                batch.settle(_unknown(self.path))
            raise
        for batch, refusal in zip(group, refusals, strict=True):
            batch.settle(refusal)

    async def _begin(self) -> sqlite3.Connection:
        """Take the file's write lock: at once if it is free, else on the thread, where waiting blocks nobody."""
        if self._writer is not None and not self._is_suspect:
            try:
                if self._identity() != self._written_file:
                    raise _ReplacedFileError("the file was removed or replaced while it was in use")
                self._writer.execute("BEGIN IMMEDIATE")
                return self._writer
            except sqlite3.Error as error:
                if not _is_busy(error):
                    self._drop_reader()
                    await self.in_thread(self._drop_writer)
                    raise
        connection = await self.in_thread(self._open_and_begin)
        self._is_suspect = False
        return connection

    def _open_and_begin(self) -> sqlite3.Connection:
        patience = _Patience(self._lock_timeout_ms)
        if self._writer is None:
            self._writer = patience.retry(self._open_writer)
        writer = self._writer
        try:
            patience.retry(lambda: writer.execute("BEGIN IMMEDIATE"))
        except sqlite3.Error as error:
            if not _is_busy(error):
                self._drop_writer()
            raise
        return writer

    def _open_writer(self) -> sqlite3.Connection:
        """A connection to a file that is still ours: its tables were looked up on another connection."""
        connection = _connect(self.path, "rw", self._max_pages)
        try:
            self._written_file = self._identity()
            if connection.execute("PRAGMA application_id").fetchone() != (APPLICATION_ID,):
                raise _ReplacedFileError("the file was replaced by another while it was in use")
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    def _identity(self) -> tuple[int, int] | None:
        """Which file the path leads to: a removed one would swallow writes without a word."""
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def _next_group(self) -> list[_Batch]:
        """The batches that waited longest, as many as one group may hold. The cancelled ones are passed over."""
        group: list[_Batch] = []
        rows = 0
        while self._waiting and len(group) < MAX_BATCHES_PER_GROUP:
            if group and rows + self._waiting[0].row_count > MAX_ROWS_PER_GROUP:
                break
            batch = self._waiting.popleft()
            if not batch.answer.done():
                group.append(batch)
                rows += batch.row_count
        return group

    async def _fail(self, group: list[_Batch], error: sqlite3.Error | None) -> None:
        """Nothing of the group was written because of `error`; without one, nobody knows. Then start afresh."""
        for batch in group:
            batch.settle(_unknown(self.path) if error is None else _translated(error, self.path))
        await self.in_thread(self._drop_writer)

    def _drop_writer(self) -> None:
        """Runs on the thread. Closing takes back what was not committed."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _leave_closed_loop(self) -> None:
        if self._task is not None and self._task.get_loop().is_closed():
            self._abandon()

    def _abandon(self) -> None:
        """Let go of the file in whatever state it is; the thread may still be at work in it."""
        self._task = self._shift = None
        self._is_suspect = True
        with suppress(RuntimeError):  # the interpreter is shutting down, and closes the connection with it
            self._thread.submit(self._drop_writer)
        for batch in self._waiting:
            batch.settle(UnavailableStorageError(f"writing {self.path} was interrupted before this batch"))
        self._waiting.clear()


class _ReplacedFileError(sqlite3.Error):
    """What SQLite does not notice by itself."""


class _Patience:
    """How much longer to wait for a lock that another process holds."""

    def __init__(self, timeout_ms: int) -> None:
        self._ends_at_s = time.monotonic() + timeout_ms / 1000

    def is_over(self) -> bool:
        return time.monotonic() >= self._ends_at_s

    def retry(self, attempt: Callable[[], Result]) -> Result:
        """Call `attempt` until it finds the file unlocked. Short naps: SQLite's own grow to 100 ms."""
        while True:
            try:
                return attempt()
            except sqlite3.Error as error:
                if not _is_busy(error) or self.is_over():
                    raise
            time.sleep(_LOCK_POLL_S)


def _apply(connection: sqlite3.Connection, batch: _Batch, path: Path) -> StorageError | None:
    """Write the whole batch into the open transaction, or nothing of it and return why.

    Raises sqlite3.Error when the transaction itself is lost.
    """
    refusal: StorageError | None = None
    one_row = batch.row_count == 1  # a single statement is taken back by SQLite itself
    try:
        if not one_row:
            connection.execute("SAVEPOINT batch")
        for (sql, conditional), rows in batch.writes:
            # Each row is named by its whole key, so one that is not changed is missing from the sum.
            changed = connection.executemany(sql, rows).rowcount
            if conditional and changed != len(rows):
                refusal = NoMutationError(f"a condition of the batch did not hold in {path.name}")
                break
    except (sqlite3.Error, OverflowError) as error:
        if not connection.in_transaction:
            raise
        refusal = _translated(error, path)
    if not one_row:
        if refusal is not None:
            connection.execute("ROLLBACK TO batch")
        connection.execute("RELEASE batch")
    return refusal


def _took_back(connection: sqlite3.Connection, error: sqlite3.Error) -> bool:
    """After a failed COMMIT: whether it is certain that nothing was written."""
    if not connection.in_transaction:
        return _code(error) == sqlite3.SQLITE_FULL  # see "unknown" at the top
    try:
        connection.execute("ROLLBACK")
    except sqlite3.Error:
        return False
    return True


def _connect(path: Path, mode: str, max_pages: int | None) -> sqlite3.Connection:
    """A connection in autocommit; `mode` is SQLite's: rw needs the file to exist, rwc creates it."""
    connection = sqlite3.connect(
        f"{path.as_uri()}?mode={mode}",
        uri=True,
        isolation_level=None,
        check_same_thread=False,
        cached_statements=256,
    )
    try:
        for pragma in _CONNECTION_PRAGMAS:
            connection.execute(pragma)
        if max_pages is not None:
            connection.execute(f"PRAGMA max_page_count = {int(max_pages)}")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _prepare_file(connection: sqlite3.Connection, path: Path) -> None:
    """Turn a new file into one of ours, as far as that happens outside of a transaction."""
    [journal_mode] = connection.execute("PRAGMA journal_mode = WAL").fetchone()
    if journal_mode != "wal":
        raise UnavailableStorageError(
            f"{path} cannot have a write-ahead log", remedy=f"put {path.parent} on a local disk"
        )


def _is_new(path: Path, objects: int, application_id: int, version: int) -> bool:
    """Whether a database is still empty, from the answers to `_HEADER_QUERIES`. Refuses what is not ours to use."""
    if application_id == APPLICATION_ID:
        if version != FORMAT_VERSION:
            raise UnavailableStorageError(
                f"{path} has format {version}, this program reads {FORMAT_VERSION}",
                remedy=f"run the version of the program that wrote {path}, or use another directory",
            )
        return False
    if application_id or objects:
        raise UnavailableStorageError(
            f"{path} belongs to another program", remedy=f"move {path} away, or use another directory"
        )
    return True


def _stock_in(connection: sqlite3.Connection) -> None:
    """Make the open file one of ours, under its write lock, unless it is."""
    if connection.execute("PRAGMA application_id").fetchone() != (APPLICATION_ID,):
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
        connection.execute(_CREATE_CATALOGUE)


def _create_in(connection: sqlite3.Connection, path: Path, table: TableSchema) -> None:
    """Create `table` under the file's write lock, unless somebody just has."""
    existing = [_schema(path.stem, *row) for row in connection.execute(_READ_CATALOGUE)]
    if needs_creation(table, existing):
        statements = TableStatements(table)
        connection.execute(statements.create_table())
        for column in sorted(table.indexes):
            connection.execute(statements.create_index(column))
        connection.execute(_ADD_TO_CATALOGUE, (table.name, _definition(table)))


def _key(table: TableSchema, row: Row) -> Key:
    return Key(tuple(row[c] for c in table.partition_key), tuple(row[c] for c in table.clustering_key))


def _definition(table: TableSchema) -> str:
    return json.dumps(
        {
            "columns": list(table.columns.items()),
            "partition_key": table.partition_key,
            "clustering_key": table.clustering_key,
            "descending": sorted(table.descending),
            "indexes": sorted(table.indexes),
        }
    )


def _schema(namespace: str, name: str, definition: str) -> TableSchema:
    read = json.loads(definition)
    return TableSchema(
        namespace=namespace,
        name=name,
        columns={column: DataType(data_type) for column, data_type in read["columns"]},
        partition_key=tuple(read["partition_key"]),
        clustering_key=tuple(read["clustering_key"]),
        # Files of the first release have tables without these.
        descending=frozenset(read.get("descending", ())),
        indexes=frozenset(read.get("indexes", ())),
    )


def _namespaces(directory: Path) -> list[str]:
    """The namespaces that have a file in `directory`; none if it does not exist."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unusable_directory(directory, error) from error
    stems = (name.removesuffix(".db") for name in names if name.endswith(".db"))
    return sorted(stem for stem in stems if is_identifier(stem))


def _code(error: Exception) -> int:
    """SQLite's primary result code; 0 for an error that Python's module raised by itself."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def _is_busy(error: sqlite3.Error) -> bool:
    return _code(error) in _BUSY


def _translated(error: Exception, path: Path) -> StorageError:
    """What an error of SQLite means to the caller, given that nothing was written."""
    code = _code(error)
    if code == sqlite3.SQLITE_TOOBIG or isinstance(error, OverflowError):
        return InvalidOperationError("a value is larger than SQLite can hold")
    if isinstance(error, _ReplacedFileError):
        return UnavailableStorageError(f"{path}: {error}", remedy=f"put {path} back, or start again with what is there")
    remedy = _REMEDIES.get(code, "see what SQLite reports about {path}").format(path=path)
    return UnavailableStorageError(f"{path}: {error}", remedy=remedy)


def _unknown(path: Path) -> UnknownOutcomeError:
    return UnknownOutcomeError(f"{path}: the disk failed while the batch was being committed")


def _unusable_directory(directory: Path, error: OSError) -> UnavailableStorageError:
    return UnavailableStorageError(
        f"{directory} cannot hold data: {error.strerror}",
        remedy=f"make {directory} a directory that this user may write, or choose another",
    )
