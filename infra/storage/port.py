"""The storage port: what the engine asks of a database, and nothing more."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol

from infra.storage.operations import Atomicity, Key, Mutation, Row, Scan, StorageInfo, TableSchema, Value


class Storage(Protocol):
    """Linearizable reads and conditional writes of single records, atomic within one unit.

    Every read sees every write that was answered before the read began. Every method may raise
    UnavailableStorageError; only `mutate` may raise NoMutationError and UnknownOutcomeError.
    """

    @property
    def info(self) -> StorageInfo: ...

    async def create_table(self, table: TableSchema) -> None:
        """Create `table` if it is absent; InvalidOperationError if it exists with other columns or keys."""

    async def tables(self) -> list[TableSchema]:
        """Every table of every namespace, as its storage has it, ordered by full name."""

    async def get(self, table: TableSchema, key: Key) -> Row | None:
        """The row under `key`, or None."""

    async def scan(self, scan: Scan) -> list[Row]:
        """The rows that `scan` names, in order."""

    async def partitions(self, table: TableSchema) -> list[tuple[Value, ...]]:
        """The partition keys that hold at least one row, in no particular order (inspection and pruning)."""

    async def mutate(self, mutations: Sequence[Mutation]) -> None:
        """Apply all mutations or none. All must lie in one atomic unit, each key at most once.

        Raises NoMutationError if a condition does not hold, UnknownOutcomeError if the storage did not say.
        """

    async def close(self) -> None:
        """Release files and threads; pending writes are finished first."""


def atomic_unit(atomicity: Atomicity, table: TableSchema, key: Key) -> Hashable:
    """The unit that `key` lies in: two mutations may share a `mutate` exactly when their units are equal."""
    match atomicity:
        case Atomicity.PARTITION:
            return (table.namespace, table.name, key.partition)
        case Atomicity.NAMESPACE:
            return table.namespace
        case Atomicity.STORAGE:
            return ""
