"""The storages of the test run: their names, and how a test opens one.

    memory      this process's memory, atomic within a partition as Cassandra is
    sqlite      files in the test's own directory
    cassandra   one real server for the whole run (fixture `cassandra`)
    dynamodb    one DynamoDB Local for the whole run (fixture `dynamodb`)
    multi       `bank` in Cassandra, `shop` in DynamoDB, `coordinator` and what else there is in SQLite

A test's own storage takes a fixture of two halves, since only a plain fixture may ask for a server by name:

    @pytest.fixture(params=STORAGES)
    def opening(request, tmp_path):
        return opened(request.param, request, tmp_path)

    @pytest.fixture
    async def storage(opening):
        async with opening as storage:
            yield storage

`cassandra_storage` and `dynamodb_storage` are one connection each for the whole run.

Tables in a server outlive the test, since making one costs up to a second: `create_table` of one that was made
before costs nothing. Every test finds them empty, for what it put through its storage is deleted behind it. So tables
that share a name must share their columns, too. What another process wrote, a test deletes itself.

Drivers and adapters are imported when one is opened, so that a run on memory needs none of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from infra.storage.errors import InvalidOperationError, NoMutationError
from infra.storage.forwarding import ForwardingStorage
from infra.storage.memory import MemoryStorage
from infra.storage.operations import (
    Atomicity,
    Delete,
    IfExists,
    Key,
    Mutation,
    Put,
    Row,
    StorageInfo,
    TableSchema,
)
from infra.storage.port import Storage, peek
from infra.storage.sqlite import SqliteStorage

LOCAL = ("memory", "sqlite")
SERVERS = ("cassandra", "dynamodb", "multi")
STORAGES = (*LOCAL, *SERVERS)

_CLEANING_AT_ONCE = 16


def opened(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> AbstractAsyncContextManager[Storage]:
    """The storage `name`, empty, for one test. To be called outside the event loop: it may start a server."""
    return _OPENERS[name](request, tmp_path)


def in_namespaces(storage: Storage) -> Storage:
    """`storage`, whose atomic units reach no further than a namespace.

    DynamoDB writes a whole transaction at once; with this, one over two namespaces is in two units there, too.
    """
    if isinstance(storage, RememberingStorage) and storage.info.atomicity is Atomicity.STORAGE:
        storage.unit = Atomicity.NAMESPACE
    return storage


def _memory(request: pytest.FixtureRequest, tmp_path: Path) -> AbstractAsyncContextManager[Storage]:
    return _closing(MemoryStorage(atomicity=Atomicity.PARTITION))


def _sqlite(request: pytest.FixtureRequest, tmp_path: Path) -> AbstractAsyncContextManager[Storage]:
    return _closing(SqliteStorage(tmp_path))


def _cassandra(request: pytest.FixtureRequest, tmp_path: Path) -> AbstractAsyncContextManager[Storage]:
    return _emptied(request.getfixturevalue("cassandra_storage"))


def _dynamodb(request: pytest.FixtureRequest, tmp_path: Path) -> AbstractAsyncContextManager[Storage]:
    return _emptied(request.getfixturevalue("dynamodb_storage"))


def _multi(request: pytest.FixtureRequest, tmp_path: Path) -> AbstractAsyncContextManager[Storage]:
    bank, shop = request.getfixturevalue("cassandra_storage"), request.getfixturevalue("dynamodb_storage")

    @asynccontextmanager
    async def opening() -> AsyncIterator[Storage]:
        from infra.storage.multi import MultiStorage

        async with _emptied(bank) as cassandra, _emptied(shop) as dynamodb, _closing(SqliteStorage(tmp_path)) as sqlite:
            yield MultiStorage(
                {"cassandra": cassandra, "dynamodb": dynamodb, "sqlite": sqlite},
                {"bank": "cassandra", "shop": "dynamodb"},
                default="sqlite",
            )

    return opening()


_OPENERS: Mapping[str, Callable[[pytest.FixtureRequest, Path], AbstractAsyncContextManager[Storage]]] = {
    "memory": _memory,
    "sqlite": _sqlite,
    "cassandra": _cassandra,
    "dynamodb": _dynamodb,
    "multi": _multi,
}


@asynccontextmanager
async def _closing(storage: Storage) -> AsyncIterator[Storage]:
    try:
        yield storage
    finally:
        await storage.close()


@asynccontextmanager
async def _emptied(storage: Storage) -> AsyncIterator[Storage]:
    """`storage` of a server, whose new rows are deleted at the end; it stays open."""
    remembering = RememberingStorage(storage)
    try:
        yield remembering
    finally:
        await remembering.forget()


@dataclass
class _Known:
    """What the tests have learnt about one server: the tables they made, and all there are."""

    created: dict[str, TableSchema] = field(default_factory=dict)
    tables: list[TableSchema] | None = None


_known: dict[int, _Known] = {}


class RememberingStorage(ForwardingStorage):
    """A storage that remembers which tables there are, and which keys were put through it, to delete their rows.

    `unit`, if set, is the atomic unit that it admits to: a smaller one than it has, where a test wants a transaction
    to be in several.
    """

    def __init__(self, storage: Storage) -> None:
        super().__init__(storage)
        self.unit: Atomicity | None = None
        self._known = _known.setdefault(id(storage), _Known())
        self._touched: dict[tuple[str, Key], TableSchema] = {}

    @property
    def info(self) -> StorageInfo:
        return self._divided(super().info)

    def info_of(self, namespace: str) -> StorageInfo:
        return self._divided(super().info_of(namespace))

    def _divided(self, info: StorageInfo) -> StorageInfo:
        return info if self.unit is None else replace(info, atomicity=self.unit)

    async def create_table(self, table: TableSchema) -> None:
        if self._known.created.get(table.full_name) != table:
            self._known.tables = None
            await super().create_table(table)
            self._known.created[table.full_name] = table

    async def tables(self) -> list[TableSchema]:
        """Asked once: only what goes through here changes them, as long as no other process makes tables."""
        if self._known.tables is None:
            self._known.tables = await super().tables()
        return list(self._known.tables)

    async def peek(self, table: TableSchema, key: Key) -> Row | None:
        return await peek(self.storage, table, key)

    async def mutate(self, mutations: Sequence[Mutation]) -> None:
        self._touched.update(
            ((mutation.table.full_name, mutation.key), mutation.table)
            for mutation in mutations
            if isinstance(mutation, Put)
        )
        await super().mutate(mutations)

    async def close(self) -> None:
        """The server's storage is the run's, and stays open."""

    async def forget(self) -> None:
        """Delete what was put. Conditionally, so that the deletes take their place among other conditional writes."""
        at_once = asyncio.Semaphore(_CLEANING_AT_ONCE)

        async def delete(table: TableSchema, key: Key) -> None:
            async with at_once:
                try:
                    await self.storage.mutate([Delete(table, key, IfExists())])
                except (NoMutationError, InvalidOperationError):
                    return  # The row is gone already, or the table.

        touched, self._touched = self._touched, {}
        await asyncio.gather(*(delete(table, key) for (_, key), table in touched.items()))

    def __getattr__(self, name: str) -> Any:
        """Administration: it changes tables, so none is known any more."""
        self._known.created.clear()
        self._known.tables = None
        return getattr(self.storage, name)
