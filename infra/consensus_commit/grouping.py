"""Dividing what a transaction writes into batches that a storage applies atomically (ScalarDB's MutationsGrouper)."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator

from infra.consensus_commit.snapshot import PendingWrite
from infra.storage.port import Storage, atomic_unit


def unit_of(storage: Storage, write: PendingWrite) -> Hashable:
    """The atomic unit that a write lies in."""
    return atomic_unit(storage.info_of(write.layout.stored.namespace), write.layout.stored, write.key)


def batches(storage: Storage, writes: Iterable[PendingWrite]) -> Iterator[list[PendingWrite]]:
    """Batches of one atomic unit each, none larger than the storage takes; units and writes keep their order."""
    by_unit: dict[Hashable, list[PendingWrite]] = {}
    for write in writes:
        by_unit.setdefault(unit_of(storage, write), []).append(write)
    for unit in by_unit.values():
        size = storage.info_of(unit[0].layout.stored.namespace).max_mutations or len(unit)
        for first in range(0, len(unit), size):
            yield unit[first : first + size]
