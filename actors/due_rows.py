"""Which rows of a timer's table are due: found without passing over those that are gone.

Theory of operation
    A table of timers is cut into periods of the time that its rows are due at (`Table.period_ms`), so that a partition
    holds the timers of one bucket and one period. Rows leave it as their timers are done with, and a storage may keep
    what was deleted for days and pass over it in every read: so a partition that is done with must not be read again
    and again, and no read may cover more than one.

          done with                walk ──►  due at     soon ─┐
        ┊         ┊     ┊  late ┊                             ▼
    ────┼─────────┼─────┼───────┼──────────────────────┼───────────┼────────► time
        │         again └ pending: not empty yet       now - SOON_MS   now
        └ a minute, two, four … after its end

    In each look and bucket: the periods that had rows in them at the last look (`pending`), those that time has passed
    over since (the walk, at most WALKED_AT_ONCE of them), and those from SOON_MS ago until now. When these are found
    empty they are done with.

    A row may still land there later: its transaction took long, its process was paused, a clock was wrong. Nobody is
    told of that, so a period is read again when it ended one period ago, two, four, eight, and so on for three weeks:
    a row that lands late is found before its lateness has doubled, whoever wrote it, and that costs sixteen reads a
    period and bucket, however long the history is.

    Before which time nothing is pending is remembered in storage, every REMEMBERED_EVERY periods: a new process begins
    there. It may be too early, by a crash or by two processes that take themselves for the owner of a bucket; then
    empty periods are read once more. Where nothing is remembered, the partitions that there are tell.

    A period in which more was deleted than a read may pass over is asked for again in every look, and keeps no other
    waiting.

Reads committed rows alone, and writes none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import structlog

from actors.domain import Record, Table
from infra.consensus_commit.errors import CrudConflictError
from infra.consensus_commit.metadata import transactional
from infra.consensus_commit.recovery import RecoveryHandler
from infra.storage.errors import StorageError, TooMuchToReadError
from infra.storage.operations import Bound, DataType, Key, Put, Row, Scan, TableSchema, Value
from infra.storage.port import Storage

log = structlog.get_logger()

R = TypeVar("R", bound=Record)

SOON_MS = 15_000
"""A period is read in every look until so long after its end: most rows that land late are in time for that."""

WALKED_AT_ONCE = 240
"""How many periods that have passed are read in one look. A system that was off for a day is done in seven looks."""

READ_AT_ONCE = 16

REMEMBERED_EVERY = 10
"""Periods. How many a new process reads in vain at most, after an orderly end."""

LATE_AT_MOST = 2**15
"""Periods: for how long rows that land late are looked for."""

TIMERS = TableSchema(
    "coordinator",
    "timers",
    {"table_name": DataType.TEXT, "bucket": DataType.INT, "pending_from_ms": DataType.BIGINT},
    ("table_name",),
    ("bucket",),
)
"""Of each table of timers and bucket: nothing that is due before `pending_from_ms` is pending."""


@dataclass
class _Progress:
    """Of one bucket, by number of period: everything before `walk` was read, all but `pending` was found empty.

    `again` are still to be read once more, as `looked_in` says for which time.
    """

    walk: int
    remembered: int | None
    pending: set[int] = field(default_factory=set)
    again: set[int] = field(default_factory=set)
    looked_in: int | None = None

    @property
    def pending_from(self) -> int:
        return min((*self.pending, self.walk))


class DueRows:
    """Implements actors.domain.Reader over some buckets. One look at a time."""

    def __init__(self, storage: Storage, recovery: RecoveryHandler, buckets: Sequence[int]) -> None:
        self._storage = storage
        self._recovery = recovery
        self._buckets = buckets
        self._progress: dict[str, dict[int, _Progress]] = {}
        self._looking = asyncio.Lock()

    async def until(self, table: Table[R], limit_ms: int, *, limit: int) -> list[R]:
        """See actors.domain.Reader. Storage errors pass through; the next look goes on where this one stood."""
        assert table.period_ms, f"{table.full_name} is not cut into periods of time"
        async with self._looking:
            known = await self._known(table, limit_ms)
            records: list[R] = []
            for bucket, progress in known.items():
                if len(records) < limit:
                    records += await self._look(table, bucket, progress, limit_ms, limit - len(records))
                    await self._remember(table, bucket, progress)
            return records[:limit]

    async def _look(self, table: Table[R], bucket: int, progress: _Progress, now_ms: int, limit: int) -> list[R]:
        period, soon = now_ms // table.period_ms, (now_ms - SOON_MS) // table.period_ms
        if progress.looked_in != period:
            progress.looked_in = period
            progress.again |= {late for late in _late(soon) if late < progress.walk}
        passed = range(progress.walk, max(progress.walk, min(soon, progress.walk + WALKED_AT_ONCE)))
        recent = range(soon, period + 1)
        again = progress.again - progress.pending
        # Of a clock that was set back, what is pending may be in the present.
        ordered = list(dict.fromkeys((*sorted(progress.pending), *passed, *recent, *sorted(again, reverse=True))))
        records: list[R] = []
        for first in range(0, len(ordered), READ_AT_ONCE):
            periods = ordered[first : first + READ_AT_ONCE]
            found = await asyncio.gather(*(self._read(table, (bucket, each), now_ms, limit) for each in periods))
            for each, rows in zip(periods, found, strict=True):
                if len(records) >= limit:
                    return records[:limit]  # Those behind it are read in a later look.
                progress.again.discard(each)
                progress.walk = max(progress.walk, each + 1) if each in passed else progress.walk
                if rows != [] and each < soon:
                    progress.pending.add(each)
                else:
                    progress.pending.discard(each)
                for row in rows or ():
                    record = await self._resolved(table, (bucket, each), row)
                    if record is not None:
                        records.append(record)
        return records[:limit]

    async def _read(self, table: Table[Any], partition: tuple[int, int], now_ms: int, limit: int) -> list[Row] | None:
        """What is due in one period; None if it cannot be read, since too much was deleted in it."""
        schema = transactional(table.schema)
        try:
            return await self._storage.scan(Scan(schema, partition, end=Bound((now_ms,)), limit=limit))
        except TooMuchToReadError as error:
            log.error("timers wait", table=table.full_name, bucket=partition[0], period=partition[1], error=str(error))
            return None

    async def _resolved(self, table: Table[R], partition: tuple[int, int], row: Row) -> R | None:
        key = Key(partition, tuple(row[name] for name in table.key))
        try:
            resolved = await self._recovery.resolve(table.schema, key, row)
        except CrudConflictError:
            return None  # A transaction has it in hand: it may be there at the next look.
        return None if resolved is None else table.from_row(resolved)

    # ---- what is remembered ----------------------------------------------------------------------------------

    async def _known(self, table: Table[Any], now_ms: int) -> dict[int, _Progress]:
        known = self._progress.get(table.full_name)
        if known is None:
            rows = await self._storage.scan(Scan(TIMERS, (table.full_name,)))
            remembered = {_int(row["bucket"]): _int(row["pending_from_ms"]) // table.period_ms for row in rows}
            begin = dict.fromkeys(self._buckets, (now_ms - SOON_MS) // table.period_ms)
            if not begin.keys() <= remembered.keys():
                for bucket, period in await self._storage.partitions(transactional(table.schema)):
                    begin[_int(bucket)] = min(begin.get(_int(bucket), _int(period)), _int(period))
            known = self._progress[table.full_name] = {
                bucket: _Progress(remembered.get(bucket, begin[bucket]), remembered.get(bucket))
                for bucket in self._buckets
            }
        return known

    async def _remember(self, table: Table[Any], bucket: int, progress: _Progress) -> None:
        pending_from, remembered = progress.pending_from, progress.remembered
        if remembered is not None and remembered <= pending_from < remembered + REMEMBERED_EVERY:
            return
        columns = {"pending_from_ms": pending_from * table.period_ms}
        try:
            await self._storage.mutate([Put(TIMERS, Key((table.full_name,), (bucket,)), columns)])
        except StorageError as error:  # What is remembered is a lower limit, and holds until it can be raised.
            log.warning("timers are remembered later", table=table.full_name, bucket=bucket, error=str(error))
        else:
            progress.remembered = pending_from


def _int(value: Value) -> int:
    assert isinstance(value, int)
    return value


def _late(soon: int) -> Iterator[int]:
    """The periods that ended one, two, four … periods before `soon` began."""
    ago = 1
    while ago <= LATE_AT_MOST:
        yield soon - ago
        ago *= 2
