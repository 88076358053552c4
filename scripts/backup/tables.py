"""Tables from and to files, by way of the storage port: so the same for every storage, and from one into another.

Reading goes a page at a time and writing a few hundred rows at a time, so memory does not grow with the tables.
Rows are written as they were stored, transaction columns included, plainly: the tables are new, and nobody else writes
to them. In Cassandra plain writes and conditional ones are ordered by clocks; the first conditional write comes when
the system is started, which takes longer than clocks may differ (seconds).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Hashable, Sequence
from contextlib import aclosing
from pathlib import Path

from infra.storage.errors import UnavailableStorageError, UnknownOutcomeError
from infra.storage.operations import Atomicity, Key, Mutation, Put, Row, ScanAll, TableSchema
from infra.storage.port import Storage, atomic_unit
from scripts.backup.form import (
    DamagedBackupError,
    LineFile,
    RowDigest,
    StoredTable,
    columns_of,
    read_lines,
    row_line,
    row_of,
)

PAGE_ROWS = 1_000

ROWS_AT_ONCE = {Atomicity.PARTITION: 50, Atomicity.NAMESPACE: 500, Atomicity.STORAGE: 500}
"""Rows of one write, by what a write can hold: some dozens in a partition, or one transaction of a file."""

WRITES_AT_ONCE = 32
TRIES = 6


async def count_rows(storage: Storage, table: TableSchema) -> RowDigest:
    """How many rows a table has, and their digest."""
    digest = RowDigest()
    async for lines in _lines(storage, table):
        await asyncio.to_thread(digest.add, lines)
    return digest


async def copy_out(storage: Storage, table: TableSchema, directory: Path) -> StoredTable:
    """Write every row of a table into a file of the backup in `directory`. Raises storage errors and OSError."""
    digest = RowDigest()
    file = LineFile(directory, f"tables/{table.full_name}.ndjson.gz")

    def write(lines: list[bytes]) -> None:
        digest.add(lines)
        file.write(lines)

    try:
        async for lines in _lines(storage, table):
            await asyncio.to_thread(write, lines)
        stored = await asyncio.to_thread(file.finish)
    except BaseException:
        file.abandon()
        raise
    return StoredTable.of(table, rows=digest.rows, digest=digest.value, file=stored)


async def _lines(storage: Storage, table: TableSchema) -> AsyncIterator[list[bytes]]:
    columns = columns_of(table)
    async with aclosing(storage.pages(ScanAll(table), PAGE_ROWS)) as pages:  # type: ignore[type-var]
        async for rows in pages:
            yield [row_line(columns, row) for row in rows]


async def copy_in(storage: Storage, stored: StoredTable, directory: Path) -> int:
    """Write the rows of a table's file into its table, which exists and is empty; how many.

    Raises DamagedBackupError, and UnavailableStorageError for a storage that stays away.
    """
    assert stored.file is not None
    table, columns = stored.schema_of, columns_of(stored.schema_of)
    batches = read_lines(directory, stored.file)
    written = 0
    while (lines := await asyncio.to_thread(next, batches, None)) is not None:
        try:
            rows = [row_of(table, columns, line) for line in lines]
        except ValueError as error:
            raise DamagedBackupError(f"{directory / stored.file.name} has a line that is no row: {error}.") from error
        await _write(storage, table, rows)
        written += len(rows)
    return written


async def _write(storage: Storage, table: TableSchema, rows: Sequence[Row]) -> None:
    info = storage.info_of(table.namespace)
    size = min(ROWS_AT_ONCE[info.atomicity], info.max_mutations or PAGE_ROWS)
    units: dict[Hashable, list[Mutation]] = {}
    for row in rows:
        key = Key(tuple(row[name] for name in table.partition_key), tuple(row[name] for name in table.clustering_key))
        filled = {
            name: value for name, value in row.items() if value is not None and name not in table.key_columns
        }  # what was never written reads as NULL, too, and costs no storage a marker
        units.setdefault(atomic_unit(info, table, key), []).append(Put(table, key, filled))
    permits = asyncio.Semaphore(WRITES_AT_ONCE)

    async def write(mutations: list[Mutation]) -> None:
        async with permits:
            await _write_patiently(storage, mutations)

    try:
        async with asyncio.TaskGroup() as group:
            for mutations in units.values():
                for first in range(0, len(mutations), size):
                    group.create_task(write(mutations[first : first + size]))
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None  # The first is what callers know how to tell.


async def _write_patiently(storage: Storage, mutations: list[Mutation]) -> None:
    """Writing a row twice does no harm, so a write of which nothing is known is done again."""
    for left in reversed(range(TRIES)):
        try:
            await storage.mutate(mutations)
        except (UnavailableStorageError, UnknownOutcomeError):
            if not left:
                raise
            await asyncio.sleep(0.2 * 2 ** (TRIES - left))
        else:
            return


async def is_empty(storage: Storage, table: TableSchema) -> bool:
    """Whether a table that exists has no row."""
    async with aclosing(storage.pages(ScanAll(table, limit=1), 1)) as pages:  # type: ignore[type-var]
        async for rows in pages:
            if rows:
                return False
    return True
