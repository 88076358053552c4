"""What one transaction has read and written so far. No I/O.

The *read set* holds every record that was read, absences included; the first read of a record wins and is the one
that its write will be conditional on. The *get set* names the records read by key, the *scan set* and the *scanner
set* hold scans with their results: these three are validated under SERIALIZABLE. The *write set* holds what will be
prepared, deletions included.

ScalarDB keys its get set by the whole Get with its conditions; here conditions are evaluated on the record of the
read set, so that every Get of a record is repeatable.

Which operation may follow which on one record (ScalarDB's Snapshot and CrudHandler):

    first \\ then    get              put, upsert, update        insert     delete
    ──────────────────────────────────────────────────────────────────────────────
    put, …          put over read    columns merge              illegal    deleted
    insert          the insert       columns merge              illegal    illegal
    delete          absent           put, other columns NULL    as put     deleted

and a scan may neither cover what its own transaction has put nor return what it has deleted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

from infra.consensus_commit.errors import IllegalOperationError
from infra.consensus_commit.metadata import Layout
from infra.storage.conditions import all_hold
from infra.storage.operations import Bound, ColumnCondition, IndexScan, Key, Row, Scan, ScanAll, Selection, Value

RecordId: TypeAlias = tuple[str, Key]
"""A table's full name and a key."""


@dataclass(frozen=True, slots=True)
class Savepoint:
    """A point to which the writes of a transaction can be taken back."""

    changes: int


@dataclass(frozen=True, slots=True, eq=False)
class PendingWrite:
    """One record's place in the write set. `columns` None deletes it.

    `insert`: the record must be absent, whatever was read. `pre_read`: it must be read before preparing.
    """

    layout: Layout
    key: Key
    columns: Mapping[str, Value] | None
    insert: bool = False
    pre_read: bool = False

    @property
    def id(self) -> RecordId:
        return (self.layout.full_name, self.key)

    @property
    def deleted(self) -> bool:
        return self.columns is None


@dataclass(frozen=True, slots=True, eq=False)
class ScanRead:
    """What a scan returned, in order. Not `complete`: more rows may follow (a limit, a scanner closed early)."""

    layout: Layout
    scan: Selection
    rows: tuple[Row, ...]
    complete: bool


@dataclass(slots=True)
class Snapshot:
    """The sets of one transaction."""

    reads: dict[RecordId, Row | None] = field(default_factory=dict)
    gets: dict[RecordId, Layout] = field(default_factory=dict)
    scans: dict[Selection, ScanRead] = field(default_factory=dict)
    scanners: list[ScanRead] = field(default_factory=list)
    writes: dict[RecordId, PendingWrite] = field(default_factory=dict)
    _undo: list[tuple[RecordId, PendingWrite | None]] = field(default_factory=list)

    # -- reading

    def remember_get(self, layout: Layout, key: Key, record: Row | None, *, latest: bool = False) -> None:
        """Keep the outcome of reading one record by key, unless an earlier read of it was kept.

        `latest` (READ_COMMITTED): it takes the place of an earlier one, unless the record has been written since: what
        was written may have been worked out from that one, so the write stays conditional on it.
        """
        record_id = (layout.full_name, key)
        self._remember(record_id, record, latest=latest)
        self.gets[record_id] = layout

    def remember_scan(self, read: ScanRead) -> ScanRead:
        """Keep a scan's outcome, unless that of the same scan was kept; the one that is kept."""
        kept = self.scans.setdefault(read.scan, read)
        if kept is read:
            self.remember_rows(read.layout, read.rows)
        return kept

    def remember_scanner(self, read: ScanRead) -> None:
        """Keep what a scanner returned; a whole one also answers the same scan later."""
        self.scanners.append(read)
        self.remember_rows(read.layout, read.rows)
        if read.complete:
            self.scans.setdefault(read.scan, read)

    def remember_rows(self, layout: Layout, rows: Iterable[Row], *, latest: bool = False) -> None:
        """Keep rows that a scan found, as `remember_get` keeps records."""
        for row in rows:
            self._remember((layout.full_name, layout.key_of(row)), row, latest=latest)

    def view(self, layout: Layout, key: Key) -> Row | None:
        """The record as this transaction sees it: what it has written over what it has read."""
        record_id = (layout.full_name, key)
        write = self.writes.get(record_id)
        if write is None:
            return self.reads.get(record_id)
        if write.columns is None:
            return None
        read = None if write.insert else self.reads.get(record_id)
        if read is not None:
            return {**read, **write.columns}
        return {**dict.fromkeys(layout.user_columns), **layout.key_columns(key), **write.columns}

    def needs_reading(self, record_id: RecordId) -> bool:
        """Whether only storage knows how this transaction sees the record."""
        if record_id in self.reads:
            return False
        write = self.writes.get(record_id)
        return write is None or not (write.insert or write.deleted)

    # -- writing

    def put(
        self, layout: Layout, key: Key, columns: Mapping[str, Value], *, insert: bool = False, pre_read: bool = False
    ) -> None:
        """Write columns of one record, after what was written to it before (see the table above)."""
        record_id = (layout.full_name, key)
        previous = self.writes.get(record_id)
        if previous is None:
            write = PendingWrite(layout, key, dict(columns), insert, pre_read)
        elif previous.columns is None:
            replaced = dict.fromkeys(layout.value_columns) | dict(columns)
            write = PendingWrite(layout, key, replaced, insert=False, pre_read=True)
        elif insert:
            raise IllegalOperationError(
                f"insert into {layout.full_name} {key}: this transaction has written it already"
            )
        else:
            merged = {**previous.columns, **columns}
            # What was inserted stays an insert: it will not look at the read set, so there is nothing to read.
            pre_read = previous.pre_read or (pre_read and not previous.insert)
            write = PendingWrite(layout, key, merged, previous.insert, pre_read)
        self._write(record_id, write)

    def delete(self, layout: Layout, key: Key) -> None:
        """Delete one record; a put of it is dropped."""
        record_id = (layout.full_name, key)
        previous = self.writes.get(record_id)
        if previous is not None and previous.insert:
            raise IllegalOperationError(f"delete from {layout.full_name} {key}: this transaction has inserted it")
        self._write(record_id, PendingWrite(layout, key, None, pre_read=True))

    def savepoint(self) -> Savepoint:
        return Savepoint(len(self._undo))

    def restore(self, savepoint: Savepoint) -> None:
        """Take back every write made after `savepoint`. Reads are kept: what was learnt was learnt."""
        if savepoint.changes > len(self._undo):
            raise IllegalOperationError("the savepoint was made after one that has been restored")
        while len(self._undo) > savepoint.changes:
            record_id, previous = self._undo.pop()
            if previous is None:
                del self.writes[record_id]
            else:
                self.writes[record_id] = previous

    # -- questions before the commit

    def unread_writes(self) -> list[PendingWrite]:
        """Writes whose record must be read before they can be prepared."""
        return [write for record_id, write in self.writes.items() if write.pre_read and record_id not in self.reads]

    def gets_to_validate(self) -> list[tuple[RecordId, Layout]]:
        """Records read by key and not written: nothing else checks that they have not changed."""
        return [(record_id, layout) for record_id, layout in self.gets.items() if record_id not in self.writes]

    def scans_to_validate(self) -> Iterator[ScanRead]:
        yield from self.scans.values()
        yield from (read for read in self.scanners if self.scans.get(read.scan) is not read)

    def needs_validation(self) -> bool:
        """Whether anything was read that preparing the writes does not check."""
        return bool(self.scans or self.scanners) or any(record_id not in self.writes for record_id in self.gets)

    def check_scan(self, layout: Layout, scan: Selection) -> None:
        """Raises IllegalOperationError if `scan` covers, or may cover, a record that this transaction has put."""
        for write in self.writes.values():
            if write.layout.full_name == layout.full_name and not write.deleted and self._may_cover(scan, write):
                raise IllegalOperationError(f"scan of {layout.full_name}: it covers {write.key}, which was written")

    def check_scanned(self, layout: Layout, rows: Iterable[Row]) -> None:
        """Raises IllegalOperationError if a scan returned a record that this transaction has written or deleted."""
        if not self.writes:
            return
        for row in rows:
            key = layout.key_of(row)
            if (layout.full_name, key) in self.writes:
                raise IllegalOperationError(f"scan of {layout.full_name}: it returned {key}, which was written")

    def _may_cover(self, scan: Selection, write: PendingWrite) -> bool:
        match scan:
            case Scan():
                reached = covers(scan, write.key)
            case IndexScan():
                # One that has the value already is returned, and refused then.
                reached = write.columns is not None and write.columns.get(scan.column) == scan.value
            case ScanAll():
                reached = True
        return reached and self._may_meet(scan.where, write)

    def _may_meet(self, where: tuple[ColumnCondition, ...], write: PendingWrite) -> bool:
        view = self.view(write.layout, write.key)
        if view is None or (self.needs_reading(write.id) and not _is_known(where, write)):
            return True
        return all_hold(where, view)

    def _remember(self, record_id: RecordId, record: Row | None, *, latest: bool) -> None:
        if latest and record_id not in self.writes:
            self.reads[record_id] = record
        else:
            self.reads.setdefault(record_id, record)

    def _write(self, record_id: RecordId, write: PendingWrite) -> None:
        self._undo.append((record_id, self.writes.get(record_id)))
        self.writes[record_id] = write


def _is_known(where: tuple[ColumnCondition, ...], write: PendingWrite) -> bool:
    """Whether every column that `where` looks at is written or belongs to the key."""
    known = {*(write.columns or ()), *write.layout.stored.key_columns}
    return all(condition.column in known for condition in where)


def covers(scan: Scan, key: Key) -> bool:
    """Whether `key` lies in the partition and between the bounds of `scan`."""
    return (
        key.partition == scan.partition
        and (scan.start is None or _within(scan.start, key, lower=True))
        and (scan.end is None or _within(scan.end, key, lower=False))
    )


def _within(bound: Bound, key: Key, *, lower: bool) -> bool:
    prefix = cast("tuple[Any, ...]", key.clustering[: len(bound.values)])
    limit = cast("tuple[Any, ...]", bound.values)
    if prefix == limit:
        return bound.inclusive
    return prefix > limit if lower else prefix < limit
