"""Dividing what a transaction writes into batches that a storage applies atomically (ScalarDB's MutationsGrouper)."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator

from infra.consensus_commit.snapshot import PendingWrite
from infra.storage.operations import StorageInfo
from infra.storage.port import atomic_unit


def unit_of(info: StorageInfo, write: PendingWrite) -> Hashable:
    """The atomic unit that a write lies in."""
    return atomic_unit(info.atomicity, write.layout.stored, write.key)


def batches(info: StorageInfo, writes: Iterable[PendingWrite]) -> Iterator[list[PendingWrite]]:
    """Batches of one atomic unit each, none larger than the storage takes; units and writes keep their order."""
    by_unit: dict[Hashable, list[PendingWrite]] = {}
    for write in writes:
        by_unit.setdefault(unit_of(info, write), []).append(write)
    for unit in by_unit.values():
        size = info.max_mutations or len(unit)
        for first in range(0, len(unit), size):
            yield unit[first : first + size]
