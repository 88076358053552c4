"""Committed records that this process has seen or written last, so that a transaction need not read them.

A cached record may be stale: somebody else may have written it since. That is safe under SERIALIZABLE alone, where
nothing commits on what was merely believed: a record that is written is compared by its `tx_id` when it is prepared,
and one that is only read is read again after that. What was stale then shows as a conflict, its records are dropped,
and the transaction runs again. A transaction that gives up without committing has no such check; what it saw may be
old.

Worth having where this process writes most of what it reads. Absences are not kept. Never touches storage.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from infra.consensus_commit.metadata import version_of
from infra.consensus_commit.snapshot import RecordId
from infra.storage.operations import Row


class RecordCache:
    """At most `most` records; the one that was used least recently goes first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._records: OrderedDict[RecordId, Row] = OrderedDict()

    def get(self, record_id: RecordId) -> Row | None:
        record = self._records.get(record_id)
        if record is not None:
            self._records.move_to_end(record_id)
        return record

    def put(self, record_id: RecordId, record: Row) -> None:
        """Keep a committed record, unless a later version of it is kept: reads may come in late."""
        kept = self.get(record_id)
        if kept is not None and version_of(kept) > version_of(record):
            return
        self._records[record_id] = record
        self._records.move_to_end(record_id)
        if len(self._records) > self._most:
            self._records.popitem(last=False)

    def drop(self, record_ids: Iterable[RecordId]) -> None:
        for record_id in record_ids:
            self._records.pop(record_id, None)
