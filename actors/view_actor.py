"""The actor behind the read views, and what else touches their tables: rebuilding and reading.

A batch of events becomes one transaction over the rows that it changes and the position that it reaches. So a batch
that is sent again, after any fault, changes nothing; and the view lies in a namespace of its own, where a storage with
that atomicity commits in one phase. Elsewhere the batch's intent is recorded, and the actor itself brings to rest what
it, its predecessors or an interrupted rebuilding left: nobody may ever read those records again.

Nothing here knows Kafka: batches come from the stream processor with the identity of the log they are from.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from actors.domain import Table
from actors.history_view import (
    ORDER_HISTORY,
    POSITIONS,
    PROJECTION,
    VIEW_BUCKETS,
    Applied,
    EventBatch,
    OrderHistoryRow,
    PositionRow,
    newest_rows,
    not_yet_applied,
    position_after,
    row_of,
    row_of_event,
    starts_at,
    supersedes,
)
from actors.incarnations import Incarnations
from actors.messages import Health
from actors.orders.tables import ORDERS
from actors.pausing import PauseRenewal, PauseRequest, Pausing
from infra.clock import Clock, SystemClock
from infra.consensus_commit.errors import CrudConflictError
from infra.consensus_commit.manager import TransactionManager
from infra.consensus_commit.metadata import TX_VERSION, transactional
from infra.consensus_commit.transaction import Transaction
from infra.storage.operations import Bound, Key, Row, Scan, TableSchema, Value
from infra.storage.port import Storage
from infra.tracing import APPLY, OFF, Attributes, Tracer
from schemas.envelope import DeadLetterError, parse_event
from schemas.orders import OrderSummary

log = structlog.get_logger()

REBUILDING = "views-rebuild"
"""Under which name `concord rebuild` records intents."""

PAGE_ROWS = 200
IN_DOUBT_PAUSE_S = 0.5


class ViewActor:
    """Holds the views' tables. `start` must have returned before it is asked anything."""

    def __init__(
        self, *, name: str, storage: Storage, incarnations: Incarnations, clock: Clock, tracer: Tracer = OFF
    ) -> None:
        self.name = name
        self._tracer = tracer
        self._storage = storage
        self._incarnations = incarnations
        self._clock = clock
        self._incarnation = ""
        self._manager: TransactionManager | None = None
        self._sweeping: asyncio.Task[None] | None = None
        self._busy = 0
        self._pausing = Pausing(name)

    async def start(self) -> None:
        """Create the tables where they are absent, and begin to clean up."""
        await self._incarnations.create_tables()
        self._incarnation = await self._incarnations.register(self.name)
        self._manager = _manager(self._storage, self._clock, self.name, self._incarnation)
        await create_view_tables(self._manager)
        self._sweeping = asyncio.ensure_future(self._manager.sweeper.run())

    async def stop(self) -> None:
        if self._sweeping is not None:
            self._sweeping.cancel()
        if self._manager is not None:
            await self._manager.close()

    async def apply(self, batches: list[EventBatch]) -> list[Applied]:
        """Apply each batch in a transaction of its own. Raises TransactionError and StorageError: send it again."""
        self._busy += len(batches)
        try:
            return list(await asyncio.gather(*map(self._apply, batches)))
        finally:
            self._busy -= len(batches)

    async def drain(self, within_s: list[float]) -> list[bool]:
        """Whether nothing is being applied now: a batch that a restart interrupts is simply sent again."""
        return [not self._busy for _ in within_s]

    async def pause(self, requests: list[PauseRequest]) -> list[bool]:
        return [await self._pausing.pause(request) for request in requests]

    async def renew_pause(self, renewals: list[PauseRenewal]) -> list[bool]:
        return [self._pausing.renew(renewal) for renewal in renewals]

    async def resume(self, names: list[str]) -> list[bool]:
        return [self._pausing.resume(name) for name in names]

    async def health(self, batch: list[Any]) -> list[Health]:
        return [Health(self.name, self._incarnation, os.getpid(), self._busy) for _ in batch]

    async def _apply(self, batch: EventBatch) -> Applied:
        if not batch.messages:
            return Applied(0, 0, 0, 0)
        assert self._manager is not None, "start must have returned"
        manager = self._manager
        told: Attributes = {"concord.actor": self.name, "messaging.batch.message_count": len(batch.messages)}
        async with self._pausing.command():
            with self._tracer.under(batch.trace, APPLY, batch.topic, told):
                return await manager.run(lambda transaction: _apply_in(transaction, batch))


def _manager(storage: Storage, clock: Clock, name: str, incarnation: str) -> TransactionManager:
    """One whose leftovers the view actor settles, whoever it is."""
    return TransactionManager(storage, clock, name=name, incarnation=incarnation, sweeps_only=(name, REBUILDING))


async def create_view_tables(manager: TransactionManager) -> None:
    """Create what the views need where it is absent."""
    await manager.create_coordinator_tables()
    for table in (ORDER_HISTORY, POSITIONS):
        await manager.create_table(table.schema)


async def _apply_in(transaction: Transaction, batch: EventBatch) -> Applied:
    position_key = _key(POSITIONS, (PROJECTION, batch.topic, batch.partition))
    stored = await transaction.get(POSITIONS.schema, position_key)
    position = None if stored is None else POSITIONS.from_row(stored)
    rows, unreadable = [], 0
    fresh = not_yet_applied(batch, position)
    if fresh and fresh[0].offset > starts_at(batch, position):
        # Only said: the log may have lost its oldest messages, and then the tables are the only ones to ask.
        log.warning("events_missing", topic=batch.topic, partition=batch.partition, remedy="concord rebuild")
    for raw in fresh:
        try:
            row = row_of_event(parse_event(raw))
        except DeadLetterError as error:
            unreadable += 1
            log.error("event_unreadable", topic=raw.topic, partition=raw.partition, offset=raw.offset, error=str(error))
            continue
        if row is not None:
            rows.append(row)
    newest = newest_rows(rows)
    keys = {key: _key(ORDER_HISTORY, key) for key in newest}
    known = await transaction.get_many(ORDER_HISTORY.schema, list(keys.values()))
    written = 0
    for (key, row), before in zip(newest.items(), known, strict=True):
        if supersedes(row, None if before is None else ORDER_HISTORY.from_row(before)):
            await transaction.upsert(ORDER_HISTORY.schema, keys[key], ORDER_HISTORY.to_columns(row))
            written += 1
    after = position_after(batch, position)
    if after != position:
        await transaction.upsert(POSITIONS.schema, position_key, POSITIONS.to_columns(after))
    return Applied(written, len(batch.messages) - unreadable - written, unreadable, after.next_offset)


def _key(table: Table[Any], values: Sequence[Value]) -> Key:
    return table.storage_key(values, buckets=VIEW_BUCKETS)


# --- Rebuilding ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """Orders found, rows written because they were missing or wrong, rows removed because no order is behind them."""

    orders: int
    written: int
    removed: int


async def rebuild_order_history(storage: Storage, *, buckets: int, clock: Clock | None = None) -> Rebuilt:
    """Make the history what the orders table says, while the system runs or rests. `buckets` is the orders table's.

    Works by version, as events do, so a row that the projection makes newer meanwhile stays. An order in doubt is
    waited for until it is decided. Positions stay as they are: the projection goes on from where it was.
    Raises TransactionError and StorageError: run it again.
    """
    clock = clock or SystemClock()
    incarnations = Incarnations(storage, clock)
    await incarnations.create_tables()
    manager = _manager(storage, clock, REBUILDING, await incarnations.register(REBUILDING))
    await create_view_tables(manager)
    await storage.create_table(transactional(ORDERS.schema))
    orders = _Orders(storage, manager, buckets)
    try:
        found = written = removed = 0
        async for page in _pages(storage, transactional(ORDERS.schema)):
            rows = [row for stored in page if (row := await orders.as_history(stored)) is not None]
            found += len(rows)
            written += await manager.run(lambda transaction, rows=rows: _write(transaction, rows, orders))
        async for page in _pages(storage, transactional(ORDER_HISTORY.schema)):
            for stored in page:
                key = (str(stored["customer_id"]), str(stored["order_id"]))
                removed += await manager.run(lambda transaction, key=key: _remove(transaction, key, orders))
        return Rebuilt(found, written, removed)
    finally:
        await manager.close()


class _Orders:
    """The orders table as the history sees it: committed records, with their versions."""

    def __init__(self, storage: Storage, manager: TransactionManager, buckets: int) -> None:
        self._storage = storage
        self._manager = manager
        self._buckets = buckets

    async def now(self, key: tuple[str, str]) -> OrderHistoryRow | None:
        """The row that the order (customer, order) stands for now."""
        place = ORDERS.storage_key(key, buckets=self._buckets)
        stored = await self._storage.get(transactional(ORDERS.schema), place)
        return None if stored is None else await self.as_history(stored)

    async def as_history(self, stored: Row) -> OrderHistoryRow | None:
        """The row that a stored order stands for once it is decided; None if no order comes of it."""
        schema = ORDERS.schema
        key = Key(
            tuple(stored[name] for name in schema.partition_key), tuple(stored[name] for name in schema.clustering_key)
        )
        row: Row | None = stored
        while True:
            try:
                record = await self._manager.recovery.resolve(schema, key, row)
            except CrudConflictError:
                await asyncio.sleep(IN_DOUBT_PAUSE_S)
                row = await self._storage.get(transactional(schema), key)
                continue
            if record is None:
                return None
            version = record[TX_VERSION]
            return row_of(OrderSummary.of(ORDERS.from_row(record)), version if isinstance(version, int) else 0)


async def _write(transaction: Transaction, rows: list[OrderHistoryRow], orders: _Orders) -> int:
    """Bring the history in line with `rows`; how many had to be written."""
    keys = [_key(ORDER_HISTORY, (row.customer_id, row.order_id)) for row in rows]
    written = 0
    for row, key, before in zip(rows, keys, await transaction.get_many(ORDER_HISTORY.schema, keys), strict=True):
        known = None if before is None else ORDER_HISTORY.from_row(before)
        wanted: OrderHistoryRow | None = row
        if known is not None and known.record_version > row.record_version:
            # The projection was faster than this page, or the row is wrong: the table can tell.
            wanted = await orders.now((row.customer_id, row.order_id))
        if wanted is not None and wanted != known:
            await transaction.upsert(ORDER_HISTORY.schema, key, ORDER_HISTORY.to_columns(wanted))
            written += 1
    return written


async def _remove(transaction: Transaction, key: tuple[str, str], orders: _Orders) -> int:
    """Delete the row if there is no order behind it; how many were deleted.

    The row is read before the order: if the order is placed after that look, its event's row is in the way of this
    transaction, or comes after it.
    """
    place = _key(ORDER_HISTORY, key)
    if await transaction.get(ORDER_HISTORY.schema, place) is None or await orders.now(key) is not None:
        return 0
    await transaction.delete(ORDER_HISTORY.schema, place)
    return 1


async def _pages(storage: Storage, schema: TableSchema) -> AsyncIterator[list[Row]]:
    """Every stored row of a table, a page at a time. Rows that come or go meanwhile may be seen or not."""
    for partition in sorted(await storage.partitions(schema), key=repr):
        start: Bound | None = None
        while True:
            page = await storage.scan(Scan(schema, partition, start=start, limit=PAGE_ROWS))
            if page:
                yield page
            if len(page) < PAGE_ROWS:
                break
            start = Bound(tuple(page[-1][name] for name in schema.clustering_key), inclusive=False)


# --- Reading -------------------------------------------------------------------------------------------------------


async def order_history(storage: Storage, customer_id: str, *, clock: Clock | None = None) -> list[OrderHistoryRow]:
    """The customer's orders, newest first, as one transaction sees them."""
    clock = clock or SystemClock()
    incarnations = Incarnations(storage, clock)
    await incarnations.create_tables()
    manager = _manager(storage, clock, REBUILDING, await incarnations.register(REBUILDING))
    await create_view_tables(manager)
    bound = Bound((customer_id,))

    async def read(transaction: Transaction) -> list[OrderHistoryRow]:
        rows: list[OrderHistoryRow] = []
        for partition in ORDER_HISTORY.partitions_of(customer_id, buckets=VIEW_BUCKETS):
            scan = Scan(ORDER_HISTORY.schema, partition, start=bound, end=bound)
            rows += (ORDER_HISTORY.from_row(row) for row in await transaction.scan(scan))
        return rows

    try:
        return sorted(await manager.run(read), key=lambda row: (-row.created_at_ms, row.order_id))
    finally:
        await manager.close()


async def positions(storage: Storage) -> list[PositionRow]:
    """How far the projection has read each partition, committed state only."""
    manager = TransactionManager(storage)
    await create_view_tables(manager)
    bound = Bound((PROJECTION,))

    async def read(transaction: Transaction) -> list[PositionRow]:
        (partition,) = POSITIONS.partitions_of(PROJECTION, buckets=VIEW_BUCKETS)
        scan = Scan(POSITIONS.schema, partition, start=bound, end=bound)
        return [POSITIONS.from_row(row) for row in await transaction.scan(scan)]

    try:
        return await manager.run(read)
    finally:
        await manager.close()
