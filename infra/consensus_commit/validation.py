"""Is everything that a transaction relied on still so? (ScalarDB's EXTRA_READ validation, for SERIALIZABLE.)

After every record is prepared and before the state is committed, whatever was read but not written is read again and
compared by `tx_id`: presence and absence of records, and the ordered results of scans. What the transaction itself has
written is left out, since preparing checked it. A record that another transaction has meanwhile prepared carries that
one's `tx_id` and so counts as changed: of two transactions that read what the other writes, at least one is refused.

Reads records; writes nothing.
"""

from __future__ import annotations

from infra.consensus_commit.errors import ValidationConflictError
from infra.consensus_commit.metadata import TX_ID, Layout
from infra.consensus_commit.parallel import in_parallel
from infra.consensus_commit.scanning import PAGE_SIZE, conditions_of, stored_pages
from infra.consensus_commit.snapshot import RecordId, ScanRead, Snapshot
from infra.storage.conditions import all_hold
from infra.storage.operations import Row, Value
from infra.storage.port import Storage


async def validate(snapshot: Snapshot, storage: Storage) -> None:
    """Raises ValidationConflictError if a read of `snapshot` would come out differently now."""
    checks = [_validate_get(snapshot, storage, record_id, layout) for record_id, layout in snapshot.gets_to_validate()]
    checks += [_validate_scan(snapshot, storage, read) for read in snapshot.scans_to_validate()]
    await in_parallel(checks)


async def _validate_get(snapshot: Snapshot, storage: Storage, record_id: RecordId, layout: Layout) -> None:
    key = record_id[1]
    now = await storage.get(layout.stored, key)
    then = snapshot.reads[record_id]
    if (now is None) != (then is None) or (now is not None and then is not None and now[TX_ID] != then[TX_ID]):
        raise ValidationConflictError(f"{layout.full_name} {key} has changed since it was read")


async def _validate_scan(snapshot: Snapshot, storage: Storage, read: ScanRead) -> None:
    expected = [entry for row in read.rows if (entry := _entry(snapshot, read.layout, row)) is not None]
    # Enough rows to see one more than expected, if nothing of it is our own; further pages come only if needed.
    page_size = 0 if read.complete else min(len(read.rows) or 1, PAGE_SIZE)
    conditions = conditions_of(read.scan)
    matched = 0
    async for rows in stored_pages(storage, read.layout, read.scan, page_size):
        for row in rows:
            entry = _entry(snapshot, read.layout, row)
            if entry is None or not all_hold(conditions, row):
                continue
            if matched == len(expected):
                if read.complete:
                    raise _changed(read)
                return
            if entry != expected[matched]:
                raise _changed(read)
            matched += 1
        if matched == len(expected) and not read.complete:
            return
    if matched < len(expected):
        raise _changed(read)


def _entry(snapshot: Snapshot, layout: Layout, row: Row) -> tuple[RecordId, Value] | None:
    """What is compared of a row; None if this transaction has written it."""
    record_id = (layout.full_name, layout.key_of(row))
    return None if record_id in snapshot.writes else (record_id, row[TX_ID])


def _changed(read: ScanRead) -> ValidationConflictError:
    return ValidationConflictError(f"a scan of {read.layout.full_name} would return other rows now")
