"""The Cassandra adapter keeps the storage contract on a real server, and what Cassandra adds to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from storage_contract import (
    COUNTERS,
    DEPOT,
    ELSEWHERE,
    MORE,
    SHOP,
    THINGS,
    AdministrationContract,
    StorageContract,
    rows_of,
    tables_of,
)

from infra.storage.cassandra import CassandraStorage
from infra.storage.cassandra_statements import Statement, _encoded_all
from infra.storage.errors import InvalidOperationError
from infra.storage.operations import IfNotExists, IndexScan, Key, Mutation, Put, Value
from infra.storage.port import AdministrableStorage, Storage

if TYPE_CHECKING:
    from infra.servers.cassandra import LocalCassandra


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def shared(cassandra: LocalCassandra) -> AsyncIterator[NotingStorage]:
    """The storage of this module's tests; the tables that it made are dropped at the end."""
    storage = NotingStorage([cassandra.contact_point], cassandra.port)
    yield storage
    await drop(storage, SHOP, DEPOT, MORE)
    await storage.close()


class NotingStorage(CassandraStorage):
    """Notes the partitions that were written, so that a test's rows can be deleted without looking for them."""

    written: set[tuple[str, str, tuple[str, ...], tuple[Value, ...]]]

    async def mutate(self, mutations: Sequence[Mutation]) -> None:
        try:
            await super().mutate(mutations)
        except InvalidOperationError:  # Nothing was written, and keys may be of any type.
            raise
        except BaseException:
            self._note(mutations)
            raise
        self._note(mutations)

    def _note(self, mutations: Sequence[Mutation]) -> None:
        self.written |= {
            (m.table.namespace, m.table.name, m.table.partition_key, m.key.partition)
            for m in mutations
            if isinstance(m, Put)
        }

    async def empty(self) -> None:
        async def delete(namespace: str, name: str, columns: tuple[str, ...], partition: tuple[Value, ...]) -> None:
            where = " AND ".join(f'"{column}" = ?' for column in columns)
            statement = Statement(f'DELETE FROM "{namespace}"."{name}" WHERE {where}', _encoded_all(partition))
            with suppress(InvalidOperationError):  # The table was dropped.
                await self._session.write([statement], "emptying a table")

        written, self.written = self.written, set()
        await asyncio.gather(*(delete(*one) for one in written))


async def drop(storage: CassandraStorage, *namespaces: str) -> None:
    for table in await storage.tables():
        if table.namespace in namespaces:
            await storage.drop_table(table)
    for namespace in namespaces:
        await storage.drop_namespace(namespace)


class TestCassandraStorage(StorageContract):
    @pytest.fixture
    async def storage(self, shared: NotingStorage) -> NotingStorage:
        return shared

    @pytest.fixture(autouse=True)
    async def _tables(self, storage: NotingStorage) -> AsyncIterator[None]:
        storage.written = set()
        for table in (THINGS, COUNTERS, ELSEWHERE):
            if table not in storage._tables:
                await storage.create_table(table)
        yield
        await storage.empty()

    async def test_tables_are_listed_with_their_columns_in_order(self, storage: Storage):
        """Cassandra knows the order of key columns, and lists the others by name."""
        for listed in await tables_of(storage):
            others = [column for column in listed.columns if column not in listed.key_columns]
            assert list(listed.columns) == [*listed.key_columns, *sorted(others)]


class TestCassandraStorageIsAdministrable(AdministrationContract):
    @pytest.fixture
    async def storage(self, shared: NotingStorage) -> NotingStorage:
        shared.written = set()
        return shared

    async def test_a_table_that_lacks_an_index_is_another_table(self, storage: AdministrableStorage):
        """Cassandra makes a table and its indexes one after the other, so that what lacks some may be half made."""
        indexed = replace(self.TABLE, indexes=frozenset({"value"}))
        await storage.create_table(self.TABLE)
        await storage.mutate([Put(self.TABLE, Key(("a",)), {"value": 1}, IfNotExists())])

        await storage.create_table(indexed)

        assert indexed in await storage.tables()
        assert len(await rows_of(storage, IndexScan(indexed, "value", 1))) == 1
