"""Committed rows, read straight from storage through the engine: works while the system runs and while it rests.

A record that is in doubt is brought to rest first, by the rules that every reader follows: its transaction's decision
is asked for, and a transaction that is still under way is waited for. Nothing else is ever written.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from actors.domain import Table, carry_stored_columns
from actors.outcomes import outcomes_of
from infra.clock import Clock, SystemClock
from infra.config import Settings
from infra.consensus_commit.errors import CrudConflictError
from infra.consensus_commit.manager import TransactionManager
from infra.consensus_commit.metadata import is_committed, is_transactional, layout_of
from infra.storage.operations import ColumnCondition, Key, Operator, Row, Scan, TableSchema, Value
from infra.storage.port import Storage
from schemas.outcome import Answer
from schemas.partitioning import slot
from schemas.registry import DOMAINS
from scripts.connections import open_storage
from scripts.wiring import domain_tables

PATIENCE_S = 20.0
"""How long a record of a transaction under way is waited for; longer than a transaction can stay undecided."""

_PAUSE_S = 0.05


class NoTablesError(Exception):
    """There is nothing to read: no system has been started on this storage."""


class StillInDoubtError(Exception):
    """A record stayed in doubt for as long as its reader was patient."""


class CommittedReader:
    """Reads one storage. `close` must be called; `reading` does."""

    def __init__(self, storage: Storage, *, clock: Clock | None = None, patience_s: float = PATIENCE_S) -> None:
        self.storage = storage
        self._clock = clock or SystemClock()
        self._patience_s = patience_s
        self.manager = TransactionManager(storage, self._clock)

    async def __aenter__(self) -> CommittedReader:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.manager.close()
        await self.storage.close()

    async def resolve(self, table: TableSchema, stored: Row) -> Row | None:
        """The committed record behind a stored row, with its transaction columns; None where there is none.

        Raises StillInDoubtError.
        """
        if is_committed(stored):
            return stored
        key = layout_of(table).key_of(stored)
        row: Row | None = stored
        until_s = self._clock.monotonic_s() + self._patience_s
        while True:
            try:
                return await self.manager.recovery.resolve(table, key, row)
            except CrudConflictError as error:
                if self._clock.monotonic_s() > until_s:
                    raise StillInDoubtError(f"{table.full_name} {key.partition + key.clustering}: {error}") from error
            await asyncio.sleep(_PAUSE_S)
            row = await self.storage.get(layout_of(table).stored, key)

    async def scan(self, table: TableSchema, partition: tuple[Value, ...]) -> AsyncIterator[Row]:
        """The committed records of one partition, with their transaction columns."""
        for stored in await self.storage.scan(Scan(layout_of(table).stored, partition)):
            record = await self.resolve(table, stored)
            if record is not None:
                yield record

    async def rows(self, table: TableSchema) -> AsyncIterator[Row]:
        """Every committed record of a table, partition by partition."""
        for partition in sorted(await self.storage.partitions(layout_of(table).stored), key=repr):
            async for record in self.scan(table, partition):
                yield record

    async def committed_rows(
        self, table: Table[Any], routing_key: str | None = None, *, buckets: int
    ) -> AsyncIterator[Row]:
        """The committed rows of a domain's table, all or those of one routing key."""
        if routing_key is None:
            async for row in self.rows(table.schema):
                yield row
            return
        for partition in await self._partitions_of(table, routing_key, buckets):
            async for row in self.scan(table.schema, partition):
                if row[table.routing] == routing_key:
                    yield row

    async def _partitions_of(self, table: Table[Any], routing_key: str, buckets: int) -> list[tuple[Value, ...]]:
        if not table.period_ms:
            return table.partitions_of(routing_key, buckets=buckets)
        found = await self.storage.partitions(layout_of(table.schema).stored)
        return sorted((each for each in found if each[0] == slot(routing_key, buckets)), key=repr)

    async def answers(self, command_id: str, key: str | None, *, buckets: int) -> list[Answer]:
        """The durable answers under an id: of the key, or without one of every bucket of every domain.

        An answer whose transaction is undecided is none yet.
        """
        return [answer for domain in DOMAINS for answer in await self._answers(domain, command_id, key, buckets)]

    async def _answers(self, domain: str, command_id: str, key: str | None, buckets: int) -> Sequence[Answer]:
        table = outcomes_of(domain)
        layout = layout_of(table.schema)
        if key is not None:
            place = table.storage_key((key, command_id), buckets=buckets)
            row = await self.storage.get(layout.stored, place)
            found = [] if row is None else [row]
        else:
            wanted = (ColumnCondition("id", Operator.EQ, command_id),)
            slice_ = table.storage_key(("", command_id), buckets=buckets).partition[1]
            found = []
            for bucket in range(buckets):
                found += await self.storage.scan(Scan(layout.stored, (bucket, slice_), where=wanted))
        answers = []
        for row in found:
            try:
                record = await self.manager.recovery.resolve(table.schema, layout.key_of(row), row)
            except CrudConflictError:
                continue
            if record is not None:
                answers.append(Answer.from_json(str(record["answer"])))
        return answers

    async def in_doubt(self) -> list[tuple[str, Key, str]]:
        """(table, key, transaction) of every record at doubt in any namespace."""
        found = []
        for stored in await self.storage.tables():
            if is_transactional(stored):
                records = await self.manager.recovery.in_doubt(stored)
                found += [(stored.full_name, record.key, record.tx_id) for record in records]
        return found


async def open_reader(settings: Settings) -> CommittedReader:
    """A reader of the system's storage. Raises NoTablesError where no system has ever been started."""
    storage = open_storage(settings)
    try:
        stored = await storage.tables()
        if not stored:
            raise NoTablesError(f"No system has been started in {settings.data_dir}")
        carry_stored_columns(domain_tables(settings), stored)
    except BaseException:
        await storage.close()
        raise
    return CommittedReader(storage)
