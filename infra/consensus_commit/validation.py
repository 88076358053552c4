"""Is everything that a transaction relied on still so? (ScalarDB's EXTRA_READ validation, for SERIALIZABLE.)

After every record is prepared and before the state is committed, whatever was read but not written is read again and
compared by `tx_id`: presence and absence of records, and the ordered results of scans. A record that another
transaction has meanwhile prepared carries that one's `tx_id` and so counts as changed: of two transactions that read
what the other writes, at least one is refused.

Records read by key that the transaction has written are left out: preparing checked them. In a scan they count as
they were before, since a scan may have missed what the write then found. A record that another has prepared counts if
its new or its old values meet the scan's conditions: whichever of them will hold, the scan must have seen it. (ScalarDB
leaves out the one, and looks for the other in indexes only.)

Absences come first, then scans, then what is there. A record that is there has not changed since it was read, so it was
so at every time in between; an absence only says how it is now, for a record may have come and gone. Looked at first,
one absence (or one scan) and all that is there hold at one time: when it was looked at. Of several absences that were
each interrupted during this very look, no order could tell; ScalarDB looks at everything at once.

Reads records; writes nothing.
"""

from __future__ import annotations

from infra.consensus_commit.errors import ValidationConflictError
from infra.consensus_commit.metadata import TX_ID, Layout, before_image, is_committed
from infra.consensus_commit.parallel import in_parallel
from infra.consensus_commit.scanning import PAGE_SIZE, conditions_of, stored_pages
from infra.consensus_commit.snapshot import RecordId, ScanRead, Snapshot
from infra.storage.conditions import all_hold
from infra.storage.operations import ColumnCondition, Row, Value
from infra.storage.port import Storage


async def validate(snapshot: Snapshot, storage: Storage, tx_id: str) -> None:
    """Raises ValidationConflictError if a read of `snapshot`, transaction `tx_id`'s, would come out differently now."""
    gets = snapshot.gets_to_validate()
    absent = [get for get in gets if snapshot.reads[get[0]] is None]
    present = [get for get in gets if snapshot.reads[get[0]] is not None]
    await in_parallel([_validate_get(snapshot, storage, *get) for get in absent])
    await in_parallel([_validate_scan(storage, read, tx_id) for read in snapshot.scans_to_validate()])
    await in_parallel([_validate_get(snapshot, storage, *get) for get in present])


async def _validate_get(snapshot: Snapshot, storage: Storage, record_id: RecordId, layout: Layout) -> None:
    key = record_id[1]
    now = await storage.get(layout.stored, key)
    then = snapshot.reads[record_id]
    if (now is None) != (then is None) or (now is not None and then is not None and now[TX_ID] != then[TX_ID]):
        raise ValidationConflictError(f"{layout.full_name} {key} has changed since it was read")


async def _validate_scan(storage: Storage, read: ScanRead, tx_id: str) -> None:
    expected = [_entry(read.layout, row) for row in read.rows]
    # Enough rows to see one more than expected, if nothing of it is our own; further pages come only if needed.
    page_size = 0 if read.complete else min(len(read.rows) or 1, PAGE_SIZE)
    conditions = conditions_of(read.scan)
    matched = 0
    async for rows in stored_pages(storage, read.layout, read.scan, page_size):
        for row in rows:
            found = _found(read.layout, row, conditions, tx_id)
            if found is None:
                continue
            if matched == len(expected):
                if read.complete:
                    raise _changed(read)
                return
            if _entry(read.layout, found) != expected[matched]:
                raise _changed(read)
            matched += 1
        if matched == len(expected) and not read.complete:
            return
    if matched < len(expected):
        raise _changed(read)


def _found(layout: Layout, row: Row, conditions: tuple[ColumnCondition, ...], tx_id: str) -> Row | None:
    """What of a stored row counts in a scan with `conditions`, now that transaction `tx_id` has prepared its writes."""
    if is_committed(row):
        return row if all_hold(conditions, row) else None
    before = before_image(layout, row)
    matched_before = before is not None and all_hold(conditions, before)
    if row[TX_ID] == tx_id:
        return before if matched_before else None
    return row if matched_before or all_hold(conditions, row) else None


def _entry(layout: Layout, row: Row) -> tuple[RecordId, Value]:
    """What is compared of a row."""
    return (layout.full_name, layout.key_of(row)), row[TX_ID]


def _changed(read: ScanRead) -> ValidationConflictError:
    return ValidationConflictError(f"a scan of {read.layout.full_name} would return other rows now")
