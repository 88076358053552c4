"""The storage port: what the engine asks of a database, and nothing more."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Sequence
from typing import Protocol

from infra.storage.errors import InvalidOperationError
from infra.storage.operations import (
    Atomicity,
    CrossPartition,
    DataType,
    Key,
    Mutation,
    Row,
    Scan,
    StorageInfo,
    TableSchema,
    Value,
)


class Storage(Protocol):
    """Linearizable reads and conditional writes of single records, atomic within one unit.

    Every read sees every write that was answered before the read began. Every method may raise
    UnavailableStorageError; only `mutate` may raise NoMutationError and UnknownOutcomeError.
    """

    @property
    def info(self) -> StorageInfo:
        """What holds for every namespace."""

    def info_of(self, namespace: str) -> StorageInfo:
        """What holds for one namespace: more than `info` where several storages stand behind this one."""

    async def create_table(self, table: TableSchema) -> None:
        """Create `table` if it is absent; InvalidOperationError if it exists with other columns, keys or indexes."""

    async def tables(self) -> list[TableSchema]:
        """Every table of every namespace, as its storage has it, ordered by full name."""

    async def get(self, table: TableSchema, key: Key) -> Row | None:
        """The row under `key`, or None."""

    async def scan(self, scan: Scan) -> list[Row]:
        """The rows that `scan` names, in order."""

    def pages(self, selection: CrossPartition, page_size: int = 256) -> AsyncIterator[list[Row]]:
        """The rows that `selection` names, in pages of about `page_size` rows as the storage cuts them."""

    async def partitions(self, table: TableSchema) -> list[tuple[Value, ...]]:
        """The partition keys that hold at least one row, in no particular order (inspection and pruning)."""

    async def mutate(self, mutations: Sequence[Mutation]) -> None:
        """Apply all mutations or none. All must lie in one atomic unit, each key at most once.

        Raises NoMutationError if a condition does not hold, UnknownOutcomeError if the storage did not say.
        """

    async def close(self) -> None:
        """Release files and threads; pending writes are finished first."""


async def peek(storage: Storage, table: TableSchema, key: Key) -> Row | None:
    """The row under `key`, by the storage's cheaper way to read (`peek`) where it has one, else by `get`.

    It is as every answered write left it; a write that is not answered yet may show or not, and two such reads need not
    agree on it, as reads by `get` do. For what is read again, or compared, before it counts.
    """
    look: Callable[[TableSchema, Key], Awaitable[Row | None]] = getattr(storage, "peek", storage.get)
    return await look(table, key)


async def mutate_when_convenient(storage: Storage, mutations: Sequence[Mutation]) -> None:
    """`mutate`, perhaps a moment later with another's batch, where the storage has a way to (`PartitionGate`)."""
    write: Callable[[Sequence[Mutation]], Awaitable[None]] = getattr(storage, "mutate_when_convenient", storage.mutate)
    await write(mutations)


async def add_column(storage: Storage, table: TableSchema, column: str, data_type: DataType) -> None:
    """Add a column, if the storage has a way to (`AdministrableStorage`); InvalidOperationError if it has none."""
    add: Callable[[TableSchema, str, DataType], Awaitable[None]] | None = getattr(storage, "add_column", None)
    if add is None:
        raise InvalidOperationError(
            f"{table.full_name} has no column {column}, and this storage cannot be asked to add one: use its own tools"
        )
    await add(table, column, data_type)


class AdministrableStorage(Storage, Protocol):
    """What the schema manager asks besides: changes of tables, for which no program may be writing to them.

    Each raises InvalidOperationError for what does not exist or cannot be, and storage errors as they come. Repeating
    one that was interrupted is harmless.
    """

    async def namespaces(self) -> list[str]:
        """Every namespace that exists, with or without tables, ordered."""

    async def create_namespace(self, namespace: str) -> None:
        """Create `namespace` if it is absent; `create_table` does it too."""

    async def drop_namespace(self, namespace: str) -> None:
        """Remove an empty namespace; InvalidOperationError while it has tables."""

    async def drop_table(self, table: TableSchema) -> None:
        """Remove a table with its rows and indexes; nothing happens if it is absent."""

    async def truncate_table(self, table: TableSchema) -> None:
        """Remove all rows of a table."""

    async def add_column(self, table: TableSchema, column: str, data_type: DataType) -> None:
        """Add a column, NULL in every row; nothing happens if it is there with this type."""

    async def create_index(self, table: TableSchema, column: str) -> None:
        """Index a column, rows that are there included; nothing happens if it is indexed."""

    async def drop_index(self, table: TableSchema, column: str) -> None:
        """Remove the index of a column; nothing happens if there is none."""


def atomic_unit(info: StorageInfo, table: TableSchema, key: Key) -> Hashable:
    """The unit that `key` lies in: two mutations may share a `mutate` exactly when their units are equal.

    `info` is that of the table's namespace.
    """
    match info.atomicity:
        case Atomicity.PARTITION:
            return (info.name, table.namespace, table.name, key.partition)
        case Atomicity.NAMESPACE:
            return (info.name, table.namespace)
        case Atomicity.STORAGE:
            return info.name
