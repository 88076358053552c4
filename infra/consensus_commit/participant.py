"""The participant side of one transaction: its reads and writes, then the phases over its own records.

    get scan scanner     insert upsert update delete put       pre_read
           │                           │                          │
           └────────► snapshot ◄───────┴──────────────────────────┘
                         │
     prepare_records ──► validate_records ──► commit_records         one atomic unit, nothing to validate:
              │                  │            (best effort)          commit_one_phase
              └──────────────────┴──────────► rollback_records

Nothing is written before `prepare_records`. Between preparing and the last two phases somebody decides: the
coordinator side, which this side never touches (except through recovery, when it meets another's record). After the
decision nothing can fail any more: a record that cannot be settled now is settled by whoever meets it.

Source: ScalarDB's CrudHandler and ParticipantCommitHandler.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from types import TracebackType
from typing import Any, TypeAlias, TypeVar

from infra.clock import Clock
from infra.consensus_commit import compose, grouping
from infra.consensus_commit.errors import (
    CommitConflictError,
    IllegalOperationError,
    PreparationConflictError,
    UncommittedRecordError,
    UnknownTransactionStatusError,
    UnsatisfiedConditionError,
)
from infra.consensus_commit.hot_records import HotRecords
from infra.consensus_commit.metadata import (
    TX_COMMITTED_AT,
    TX_ID,
    TX_PREPARED_AT,
    TX_STATE,
    TX_VERSION,
    Layout,
    is_committed,
    layout_of,
    version_of,
)
from infra.consensus_commit.parallel import in_parallel
from infra.consensus_commit.record_cache import RecordCache
from infra.consensus_commit.recovery import RecoveryHandler
from infra.consensus_commit.scanning import PAGE_SIZE, conditions_of, page_size_for, stored_pages
from infra.consensus_commit.snapshot import PendingWrite, RecordId, Savepoint, ScanRead, Snapshot
from infra.consensus_commit.states import Isolation, TransactionState
from infra.consensus_commit.validation import validate
from infra.failpoints import reach
from infra.storage.conditions import all_hold
from infra.storage.errors import NoMutationError, StorageError, UnknownOutcomeError
from infra.storage.operations import (
    ColumnCondition,
    If,
    IfExists,
    IfNotExists,
    IndexScan,
    Key,
    Mutation,
    Row,
    ScanAll,
    Selection,
    TableSchema,
    Value,
    WriteCondition,
)
from infra.storage.port import Storage, mutate_when_convenient, peek

logger = logging.getLogger(__name__)

Conditions: TypeAlias = Sequence[ColumnCondition]
_Write: TypeAlias = Callable[[Storage, Sequence[Mutation]], Awaitable[None]]
T = TypeVar("T")


class _Phase(Enum):
    ACTIVE = "active"
    PREPARING = "preparing"
    ENDED = "ended"


class _Prepared(Enum):
    """What is known of one batch of prepared records."""

    NO = "no"
    YES = "yes"
    UNKNOWN = "unknown"


@dataclass(slots=True, eq=False)
class _Batch:
    """Records of one atomic unit, prepared, committed and rolled back together."""

    writes: list[PendingWrite]
    prepared: _Prepared = _Prepared.NO


class ParticipantTransaction:
    """One transaction's part in one place. Not for use by two tasks at once, except that reads may be gathered.

    Every read may raise UncommittedRecordError (another transaction holds the record) and storage errors; every
    operation raises IllegalOperationError once preparing has begun.
    """

    def __init__(
        self,
        tx_id: str,
        *,
        isolation: Isolation,
        storage: Storage,
        recovery: RecoveryHandler,
        clock: Clock,
        read_only: bool = False,
        cache: RecordCache | None = None,
        hot_records: HotRecords | None = None,
    ) -> None:
        self.tx_id = tx_id
        self.isolation = isolation
        self._storage = storage
        self._recovery = recovery
        self._clock = clock
        self._read_only = read_only
        # Only what is validated before it counts may come from a cache.
        self._cache = cache if isolation is Isolation.SERIALIZABLE else None
        self._prepared_at_ms = 0
        self._hot_records = hot_records
        self._place = tx_id  # in the lines at hot records, which know it from the beginning
        self._snapshot = Snapshot()
        self._phase = _Phase.ACTIVE
        self._batches: list[_Batch] = []
        self._recovered: set[RecordId] = set()
        self._open_scanners: set[Scanner] = set()
        self._validated = False

    # -- reading

    async def get(self, table: TableSchema, key: Key, conditions: Conditions = ()) -> Row | None:
        """The record as this transaction sees it (the user's columns, key included); None if absent or unmatched."""
        layout = self._open(table)
        layout.check_conditions(conditions)
        if self._must_read((layout.full_name, key)):
            await self._read(layout, key)
        record = self._snapshot.view(layout, key)
        if record is None or not all_hold(conditions, record):
            return None
        return layout.user_row(record)

    async def get_by_index(self, table: TableSchema, column: str, value: Value) -> Row | None:
        """The one record whose indexed `column` equals `value`; IllegalOperationError if there are several."""
        rows = await self.scan(IndexScan(table, column, value))
        if len(rows) > 1:
            raise IllegalOperationError(f"{table.full_name}: {len(rows)} records have this {column}; scan for them")
        return rows[0] if rows else None

    async def get_many(self, table: TableSchema, keys: Sequence[Key]) -> list[Row | None]:
        """What `get` returns for each key, read side by side."""
        layout = self._open(table)
        unread = [key for key in dict.fromkeys(keys) if self._must_read((layout.full_name, key))]
        await in_parallel([self._read(layout, key) for key in unread])
        records = [self._snapshot.view(layout, key) for key in keys]
        return [None if record is None else layout.user_row(record) for record in records]

    async def scan(self, scan: Selection) -> list[Row]:
        """The records that `scan` names, in order; its conditions and limit count what this transaction may see.

        Raises IllegalOperationError if it overlaps what this transaction has written, or if it reads across
        partitions under SERIALIZABLE and the storage may lag behind there (`StorageInfo`).
        """
        layout, scan = self._open_scan(scan)
        read = self._kept(scan)
        if read is None:
            rows = [row async for row in self._committed_rows(layout, scan, page_size_for(scan))]
            complete = not scan.limit or len(rows) < scan.limit
            read = ScanRead(layout, scan, tuple(rows), complete)
            if self._reads_afresh:
                self._snapshot.remember_rows(layout, rows, latest=True)
            else:
                read = self._snapshot.remember_scan(read)
        self._snapshot.check_scan(layout, scan)
        self._snapshot.check_scanned(layout, read.rows)
        return [layout.user_row(row) for row in read.rows]

    def scanner(self, scan: Selection) -> Scanner:
        """Like `scan`, a record at a time; it must be closed before preparing. Only what it returned is validated."""
        layout, scan = self._open_scan(scan)
        kept = self._kept(scan)
        rows = self._committed_rows(layout, scan, PAGE_SIZE) if kept is None else _replay(kept.rows)
        on_close = self._scanner_closed if kept is None else self._open_scanners.discard
        scanner = Scanner(layout, scan, rows, on_row=self._scanned, on_close=on_close)
        self._open_scanners.add(scanner)
        return scanner

    # -- writing

    async def insert(self, table: TableSchema, key: Key, columns: Mapping[str, Value]) -> None:
        """Write a record that must be absent. One that is there is found while preparing: PreparationConflictError."""
        layout = self._open_write(table, key, columns)
        self._snapshot.put(layout, key, columns, insert=True)

    async def upsert(self, table: TableSchema, key: Key, columns: Mapping[str, Value]) -> None:
        """Write these columns of a record, present or not; it is read before preparing."""
        layout = self._open_write(table, key, columns)
        self._snapshot.put(layout, key, columns, pre_read=True)

    async def update(
        self, table: TableSchema, key: Key, columns: Mapping[str, Value], conditions: Conditions | None = None
    ) -> None:
        """Write these columns of a record that is present; nothing happens if it is absent.

        With `conditions` (an empty sequence: only that it is present) UnsatisfiedConditionError if they do not hold.
        """
        layout = self._open_write(table, key, columns)
        if await self._check(layout, key, If(tuple(conditions)) if conditions is not None else None):
            self._snapshot.put(layout, key, columns, pre_read=True)

    async def delete(self, table: TableSchema, key: Key, conditions: Conditions | None = None) -> None:
        """Delete a record, present or not.

        With `conditions` (an empty sequence: only that it is present) UnsatisfiedConditionError if they do not hold.
        """
        layout = self._open_write(table, key, {})
        if conditions is not None:
            await self._check(layout, key, If(tuple(conditions)))
        self._snapshot.delete(layout, key)

    async def put(
        self, table: TableSchema, key: Key, columns: Mapping[str, Value], condition: WriteCondition | None = None
    ) -> None:
        """Write these columns without reading: a record that was not read must be absent (ScalarDB's blind put).

        With `condition` the record is read, and UnsatisfiedConditionError raised if it does not hold.
        """
        layout = self._open_write(table, key, columns)
        if condition is not None:
            await self._check(layout, key, condition)
        self._snapshot.put(layout, key, columns, pre_read=condition is not None)

    def savepoint(self) -> Savepoint:
        """A point that `restore` can take the writes back to."""
        return self._snapshot.savepoint()

    def restore(self, savepoint: Savepoint) -> None:
        """Take back every write made since `savepoint`. Reads are kept, and will be validated."""
        self._check_active()
        self._snapshot.restore(savepoint)

    def drop_writes(self) -> None:
        """Take back every write: what a refused command does, whose reads must still hold when it is answered."""
        self.restore(Savepoint(0))

    # -- questions before the commit

    @property
    def has_writes(self) -> bool:
        return bool(self._snapshot.writes)

    @property
    def needs_validation(self) -> bool:
        """Whether `validate_records` has anything to read: under SERIALIZABLE, what was read and not written."""
        return self.isolation is Isolation.SERIALIZABLE and self._snapshot.needs_validation()

    def written_partitions(self) -> list[tuple[str, str, tuple[Value, ...]]]:
        """(namespace, table, partition key values) of everything written, each once."""
        partitions: dict[tuple[str, str, tuple[Value, ...]], None] = {}
        for write in self._snapshot.writes.values():
            partitions[(write.layout.stored.namespace, write.layout.stored.name, write.key.partition)] = None
        return list(partitions)

    async def version_after_commit(self, table: TableSchema, key: Key) -> int:
        """The `tx_version` that a record will carry if this commits; 0 for one that is absent and not written.

        Reads the record where that is needed to tell.
        """
        layout = layout_of(table)
        record_id = (layout.full_name, key)
        write = self._snapshot.writes.get(record_id)
        blind = write is not None and not write.pre_read and record_id not in self._snapshot.reads
        if write is not None and (write.insert or blind):
            return 1
        if record_id not in self._snapshot.reads:
            await self._read(layout, key)
        record = self._snapshot.reads[record_id]
        version = 0 if record is None else version_of(record)
        return version if write is None else version + 1

    async def pre_read(self) -> None:
        """Read what is written but must be read before preparing (upserted and deleted records); once.

        `prepare_records` and `commit_one_phase` do it too; doing it before asking `one_phase_unit` lets deletes
        of present records commit in one phase.
        """
        self._check_active()
        unread = self._snapshot.unread_writes()
        if unread:
            await in_parallel([self._read(write.layout, write.key) for write in unread])

    def one_phase_unit(self) -> Hashable | None:
        """The atomic unit that holds everything written, if that may be committed by one write; else None.

        It may if nothing needs validation, the storage takes it in one batch, and every deleted record was read as
        present: deleting an absent one cannot be made conditional on its absence.
        """
        writes = self._snapshot.writes
        if not writes or self.needs_validation:
            return None
        reads = self._snapshot.reads
        if any(write.deleted and reads.get(record_id) is None for record_id, write in writes.items()):
            return None
        batches = list(grouping.batches(self._storage, writes.values()))
        return grouping.unit_of(self._storage, batches[0][0]) if len(batches) == 1 else None

    # -- the phases

    async def prepare_records(self, prepared_at_ms: int) -> None:
        """Write every record as PREPARED or DELETED, beside what it was before.

        Raises PreparationConflictError if a record is not as it was read, a CrudConflictError if one cannot be read,
        and storage errors as they come. However it fails, some records may be prepared: decide, then roll back.
        """
        await self._end_reading()
        self._phase = _Phase.PREPARING
        self._prepared_at_ms = prepared_at_ms
        writes = self._snapshot.writes.values()
        self._batches = [_Batch(batch) for batch in grouping.batches(self._storage, writes)]
        await reach("prepare.before_records")
        await self._for_each_batch("prepare.between_units", lambda batch: self._prepare(batch, prepared_at_ms))
        await reach("prepare.after_records")

    async def validate_records(self) -> None:
        """Raises ValidationConflictError if something read and not written has changed (SERIALIZABLE only)."""
        if self._phase is _Phase.ACTIVE:
            await self._end_reading()
        if self.needs_validation:
            await validate(self._snapshot, self._storage, self.tx_id)
        self._validated = True
        await reach("validate.after_records")

    async def commit_records(self, committed_at_ms: int, *, at_leisure: bool = False) -> bool:
        """Make the prepared records committed; whether every one was seen to be. The decision must be COMMITTED.

        `at_leisure`: nobody waits for it, so that it may wait for company (`PartitionGate`). Never raises for storage:
        what is left PREPARED is rolled forward by whoever meets it.
        """
        if self.needs_validation and not self._validated:
            raise IllegalOperationError(f"transaction {self.tx_id} must be validated before it commits")
        assert self._phase is not _Phase.ACTIVE or not self.has_writes, "records are prepared before they are committed"
        assert all(batch.prepared is _Prepared.YES for batch in self._batches), "every record was prepared"
        self._phase = _Phase.ENDED
        await reach("commit_records.before")
        settled = await self._for_each_batch(
            "commit_records.between_units", lambda batch: self._commit(batch, committed_at_ms, at_leisure)
        )
        await reach("commit_records.after")
        return all(settled)

    async def rollback_records(self) -> bool:
        """Put the prepared records back to what they were; whether every one was seen to be. Decide ABORTED before.

        Writes nothing if nothing was prepared. Never raises for storage: what is left is rolled back by whoever
        meets it. False also where a prepare was not answered and may still arrive.
        """
        begun = [batch for batch in self._batches if batch.prepared is not _Prepared.NO]
        self._phase = _Phase.ENDED
        await reach("rollback.before_records")
        settled = await in_parallel([self._roll_back(batch) for batch in begun]) if begun else []
        await reach("rollback.after_records")
        return all(settled)

    async def commit_one_phase(self, committed_at_ms: int) -> None:
        """Commit everything by one conditional write. Ask `one_phase_unit` before.

        Raises CommitConflictError if a record is not as it was read, UnknownTransactionStatusError if storage did
        not say (no state row will tell either: read the records), and other storage errors as they come: then
        nothing was written.
        """
        await self._end_reading()
        if self.one_phase_unit() is None:
            raise IllegalOperationError(f"transaction {self.tx_id} cannot commit in one phase")
        self._phase = _Phase.ENDED
        mutations = [self._composed_at_once(write, committed_at_ms) for write in self._snapshot.writes.values()]
        await reach("one_phase.before")
        try:
            await self._storage.mutate(mutations)
        except NoMutationError:
            self._recover_later(self._snapshot.writes.values())
            raise CommitConflictError(f"transaction {self.tx_id}: a record has changed since it was read") from None
        except UnknownOutcomeError as error:
            raise UnknownTransactionStatusError(f"transaction {self.tx_id} was not answered", self.tx_id) from error
        await reach("one_phase.after")

    def take_id(self, tx_id: str) -> None:
        """Go on under another id. Only before preparing, while no record carries the old one."""
        assert self._phase is _Phase.ACTIVE, self._phase
        self.tx_id = tx_id

    # -- what the process remembers

    def note_committed(self, committed_at_ms: int) -> None:
        """This transaction is committed, as of `committed_at_ms`: what it wrote is what others should read."""
        if self._hot_records is not None:
            self._hot_records.leave(self._place)
        if self._cache is None:
            return
        for record_id, write in self._snapshot.writes.items():
            if write.columns is None:
                self._cache.drop([record_id])
                continue
            before = self._before(write)
            self._cache.put(
                record_id,
                {
                    **dict.fromkeys(write.layout.after_columns),
                    **write.layout.key_columns(write.key),
                    **(before or {}),
                    **write.columns,
                    TX_ID: self.tx_id,
                    TX_STATE: TransactionState.COMMITTED.value,
                    TX_VERSION: 1 if before is None else version_of(before) + 1,
                    TX_PREPARED_AT: self._prepared_at_ms or committed_at_ms,
                    TX_COMMITTED_AT: committed_at_ms,
                },
            )

    def note_failed(self) -> None:
        """This transaction did not commit, perhaps because something that it believed was old."""
        if self._hot_records is not None:
            self._hot_records.leave(self._place)
        if self._cache is not None:
            self._cache.drop([*self._snapshot.reads, *self._snapshot.writes])

    # -- steps of reading

    def _check_active(self) -> None:
        if self._phase is not _Phase.ACTIVE:
            raise IllegalOperationError(f"transaction {self.tx_id} takes no more operations: it is {self._phase.value}")

    def _open(self, table: TableSchema) -> Layout:
        self._check_active()
        return layout_of(table)

    def _must_read(self, record_id: RecordId) -> bool:
        """Whether only storage knows how this transaction sees the record now."""
        read_again = self._reads_afresh and record_id not in self._snapshot.writes
        return read_again or self._snapshot.needs_reading(record_id)

    @property
    def _reads_afresh(self) -> bool:
        return self.isolation is Isolation.READ_COMMITTED

    def _kept(self, scan: Selection) -> ScanRead | None:
        """What the same scan has returned before, if that is what it must return again."""
        return None if self._reads_afresh else self._snapshot.scans.get(scan)

    def _open_scan(self, scan: Selection) -> tuple[Layout, Selection]:
        layout = self._open(scan.table)
        layout.check_conditions(scan.where)
        if self.isolation is Isolation.SERIALIZABLE:
            info = self._storage.info_of(scan.table.namespace)
            behind = (isinstance(scan, ScanAll) and not info.sees_all_partitions) or (
                isinstance(scan, IndexScan) and not info.sees_all_indexed
            )
            if behind:
                raise IllegalOperationError(
                    f"{layout.full_name}: {info.name} may lag behind in a {type(scan).__name__}, which SERIALIZABLE"
                    " forbids: scan one partition, or use SNAPSHOT"
                )
        self._snapshot.check_scan(layout, scan)
        return layout, replace(scan, table=layout.stored)

    def _open_write(self, table: TableSchema, key: Key, columns: Mapping[str, Value]) -> Layout:
        layout = self._open(table)
        if self._read_only:
            raise IllegalOperationError(f"transaction {self.tx_id} is read-only")
        layout.check_written(columns)
        return layout

    async def _read(self, layout: Layout, key: Key) -> None:
        record_id = (layout.full_name, key)
        if self._hot_records is not None and not self._read_only:
            await self._hot_records.enter(record_id, self._place)
        cached = None if self._cache is None else self._cache.get(record_id)
        if cached is not None:
            return self._snapshot.remember_get(layout, key, cached)
        if self.isolation is Isolation.SERIALIZABLE:
            # Whatever is read so is compared again by preparing it or by validation, and those are linearizable.
            row = await peek(self._storage, layout.stored, key)
        else:
            row = await self._storage.get(layout.stored, key)
        record = await self._resolved(layout, key, row)
        self._snapshot.remember_get(layout, key, record, latest=self._reads_afresh)
        if self._cache is not None and record is not None:
            self._cache.put(record_id, record)

    async def _resolved(self, layout: Layout, key: Key, row: Row | None) -> Row | None:
        if row is None or is_committed(row):
            return row
        if self._reads_afresh:
            self._recovered.add((layout.full_name, key))
            return self._recovery.last_committed(layout.stored, key, row, recover=not self._read_only)
        try:
            record = await self._recovery.resolve(layout.stored, key, row)
        except UncommittedRecordError:
            if self._hot_records is not None:
                self._hot_records.note([(layout.full_name, key)])
            raise
        if record is None or record[TX_ID] != row[TX_ID]:
            # What is stored must change before it agrees with what was read; a PREPARED record that is committed
            # agrees already, since conditions and validation look at the tx_id.
            self._recovered.add((layout.full_name, key))
        return record

    async def _committed_rows(self, layout: Layout, scan: Selection, page_size: int) -> AsyncGenerator[Row, None]:
        """The records of a scan as recovery sees them, up to its limit."""
        returned = 0
        conditions = conditions_of(scan)
        async for page in stored_pages(self._storage, layout, scan, page_size):
            for stored in page:
                row: Row | None = stored
                if not is_committed(stored):
                    row = await self._resolved(layout, layout.key_of(stored), stored)
                if row is None or not all_hold(conditions, row):
                    if not is_committed(stored):  # Validation will look at its old values, too, while it is in doubt.
                        self._recovered.add((layout.full_name, layout.key_of(stored)))
                    continue
                yield row
                returned += 1
                if returned == scan.limit:
                    return

    def _scanned(self, layout: Layout, row: Row) -> None:
        self._snapshot.check_scanned(layout, [row])
        self._snapshot.remember_rows(layout, [row], latest=self._reads_afresh)

    def _scanner_closed(self, scanner: Scanner) -> None:
        self._open_scanners.discard(scanner)
        if not self._reads_afresh:
            self._snapshot.remember_scanner(scanner.read())

    async def _check(self, layout: Layout, key: Key, condition: WriteCondition | None) -> bool:
        """Whether the record is present (None), or True if `condition` holds, else UnsatisfiedConditionError."""
        if isinstance(condition, If):
            layout.check_conditions(condition.conditions)
        # What was read is not read again, under any isolation: the write may have been worked out from it.
        if self._snapshot.needs_reading((layout.full_name, key)):
            await self._read(layout, key)
        record = self._snapshot.view(layout, key)
        match condition:
            case None:
                return record is not None
            case IfNotExists():
                holds = record is None
            case IfExists():
                holds = record is not None
            case If(conditions=conditions):
                holds = record is not None and all_hold(conditions, record)
        if not holds:
            raise UnsatisfiedConditionError(f"{layout.full_name} {key}: the condition of the write does not hold")
        return True

    async def _end_reading(self) -> None:
        """Read what must be read before preparing, and wait for the recoveries that would be in the way."""
        self._check_active()
        if self._open_scanners:
            raise IllegalOperationError(f"transaction {self.tx_id} has a scanner that is not closed")
        await self.pre_read()
        if self._recovered:
            serializable = self.isolation is Isolation.SERIALIZABLE
            in_the_way = self._recovered if serializable else self._recovered & self._snapshot.writes.keys()
            if self._reads_afresh:  # Nobody has looked yet whether they can be recovered.
                writes = [write for record_id, write in self._snapshot.writes.items() if record_id in in_the_way]
                await in_parallel([self._recovery.recover_record(w.layout.stored, w.key) for w in writes])
            else:
                await self._recovery.wait_for(in_the_way)

    # -- steps of writing

    async def _for_each_batch(self, between: str, work: Callable[[_Batch], Coroutine[Any, Any, T]]) -> list[T]:
        """`work` on every batch, side by side, passing the failpoint `between` before each but the first."""

        async def after_the_first(batch: _Batch) -> T:
            await reach(between)
            return await work(batch)

        if not self._batches:
            return []
        first, *others = self._batches
        return await in_parallel([work(first), *(after_the_first(batch) for batch in others)])

    async def _prepare(self, batch: _Batch, prepared_at_ms: int) -> None:
        mutations = [self._composed_prepare(write, prepared_at_ms) for write in batch.writes]
        batch.prepared = _Prepared.UNKNOWN
        try:
            await self._storage.mutate(mutations)
        except NoMutationError:
            batch.prepared = _Prepared.NO
            if self._hot_records is not None:
                self._hot_records.note(write.id for write in batch.writes)
            self._recover_later(batch.writes)
            raise PreparationConflictError(f"transaction {self.tx_id}: a record is not as it was read") from None
        except UnknownOutcomeError:
            raise
        except StorageError:
            batch.prepared = _Prepared.NO
            raise
        batch.prepared = _Prepared.YES

    def _composed_prepare(self, write: PendingWrite, prepared_at_ms: int) -> Mutation:
        return compose.prepare(
            write.layout, write.key, write.columns, self._before(write), tx_id=self.tx_id, prepared_at_ms=prepared_at_ms
        )

    def _composed_at_once(self, write: PendingWrite, committed_at_ms: int) -> Mutation:
        return compose.commit_at_once(
            write.layout,
            write.key,
            write.columns,
            self._before(write),
            tx_id=self.tx_id,
            committed_at_ms=committed_at_ms,
        )

    def _before(self, write: PendingWrite) -> Row | None:
        """The committed record that a write replaces, None if it must be absent."""
        return None if write.insert else self._snapshot.reads.get(write.id)

    async def _commit(self, batch: _Batch, committed_at_ms: int, at_leisure: bool) -> bool:
        def composed(write: PendingWrite) -> Mutation:
            return compose.commit(
                write.layout, write.key, deleted=write.deleted, tx_id=self.tx_id, committed_at_ms=committed_at_ms
            )

        return await self._settle(batch, composed, mutate_when_convenient if at_leisure else _mutate)

    async def _roll_back(self, batch: _Batch) -> bool:
        def composed(write: PendingWrite) -> Mutation:
            return compose.roll_back(
                write.layout, write.key, deleted=write.deleted, tx_id=self.tx_id, before=self._before(write)
            )

        return await self._settle(batch, composed, _mutate)

    async def _settle(self, batch: _Batch, composed: Callable[[PendingWrite], Mutation], write_all: _Write) -> bool:
        """Bring a batch to rest; whether it was seen to be. A rejected batch is settled row by row."""
        known = batch.prepared is _Prepared.YES
        try:
            if known:
                try:
                    await write_all(self._storage, [composed(write) for write in batch.writes])
                    return True
                except NoMutationError:
                    pass
            settled = [await self._settle_one(write, composed(write), known) for write in batch.writes]
            return all(settled)
        except StorageError as error:
            logger.warning("records of transaction %s stay in doubt for now: %s", self.tx_id, error)
            return False

    async def _settle_one(self, write: PendingWrite, settlement: Mutation, known: bool) -> bool:
        try:
            await self._storage.mutate([settlement])
            return True
        except NoMutationError:
            # Somebody who met the record has settled it, or it was never prepared (and then may yet be).
            row = await self._storage.get(write.layout.stored, write.key)
            return known and (row is None or row[TX_ID] != self.tx_id or is_committed(row))

    def _recover_later(self, writes: Iterable[PendingWrite]) -> None:
        """Have records recovered that were to be absent and were not looked at.

        Nobody else might: a blind insert reads nothing, so an orphan in its place would block it for ever (a hole
        that ScalarDB has, its PR 3868).
        """
        unread = [write for write in writes if self._before(write) is None and write.id not in self._snapshot.reads]
        self._recovery.recover_later([(write.layout.stored, write.key) for write in unread])


async def _mutate(storage: Storage, mutations: Sequence[Mutation]) -> None:
    await storage.mutate(mutations)


class Scanner:
    """Records of one scan, one after another: `async for`, or `one()` until None. Close it, or use `async with`."""

    def __init__(
        self,
        layout: Layout,
        scan: Selection,
        rows: AsyncGenerator[Row, None],
        *,
        on_row: Callable[[Layout, Row], None],
        on_close: Callable[[Scanner], None],
    ) -> None:
        self._layout = layout
        self._scan = scan
        self._rows = rows
        self._on_row = on_row
        self._on_close = on_close
        self._returned: list[Row] = []
        self._exhausted = False
        self._failed = False
        self._closed = False

    async def one(self) -> Row | None:
        """The next record, None after the last. Raises what `get` raises."""
        if self._failed:
            raise IllegalOperationError(f"a scanner of {self._layout.full_name} has failed before: scan again")
        try:
            row = await anext(self._rows, None)
        except BaseException:
            self._failed = True  # A generator that has raised would say that there are no more rows.
            raise
        if row is None:
            self._exhausted = True
            return None
        self._on_row(self._layout, row)
        self._returned.append(row)
        return self._layout.user_row(row)

    async def close(self) -> None:
        """Read no further. Closing again does nothing."""
        if not self._closed:
            self._closed = True
            await self._rows.aclose()
            self._on_close(self)

    def read(self) -> ScanRead:
        """What was returned so far."""
        complete = self._exhausted and (not self._scan.limit or len(self._returned) < self._scan.limit)
        return ScanRead(self._layout, self._scan, tuple(self._returned), complete)

    def __aiter__(self) -> Scanner:
        return self

    async def __anext__(self) -> Row:
        row = await self.one()
        if row is None:
            raise StopAsyncIteration
        return row

    async def __aenter__(self) -> Scanner:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


async def _replay(rows: Sequence[Row]) -> AsyncGenerator[Row, None]:
    for row in rows:
        yield row
