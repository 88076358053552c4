"""The Cassandra adapter keeps the storage contract on a real server, and what Cassandra adds to it."""

from __future__ import annotations

import asyncio
import datetime
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
from infra.storage.errors import InvalidOperationError, NoMutationError
from infra.storage.gate import PartitionGate
from infra.storage.operations import (
    ColumnCondition,
    DataType,
    Delete,
    If,
    IfExists,
    IfNotExists,
    IndexScan,
    Key,
    Mutation,
    Operator,
    Put,
    TableSchema,
    Value,
)
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

    async def test_a_batch_that_fails_leaves_its_neighbours_alone(self, storage: Storage):
        """Thirty at once into one partition may outlast Paxos's own deadline; the engine sends them by the gate."""
        await super().test_a_batch_that_fails_leaves_its_neighbours_alone(PartitionGate(storage))


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


async def test_a_refused_batch_names_the_rows_whose_conditions_did_not_hold(cassandra_storage: CassandraStorage):
    table = TableSchema("blame", "rows", {"p": DataType.INT, "c": DataType.DATE, "v": DataType.INT}, ("p",), ("c",))
    await cassandra_storage.create_table(table)
    days = [datetime.date(2026, 11, number) for number in range(1, 6)]
    keys = [Key((1,), (day,)) for day in days]
    await cassandra_storage.mutate([Put(table, each, {"v": 1}) for each in keys[:3]])

    def is_now(value: int) -> If:
        return If((ColumnCondition("v", Operator.EQ, value),))

    async def blamed(*mutations: Mutation) -> frozenset[Key]:
        with pytest.raises(NoMutationError) as refusal:
            await cassandra_storage.mutate(mutations)
        return refusal.value.unmet

    holds, wrong = Put(table, keys[0], {"v": 2}, is_now(1)), Put(table, keys[1], {"v": 2}, is_now(7))
    taken, free = Put(table, keys[2], {"v": 2}, IfNotExists()), Put(table, keys[3], {"v": 2}, IfNotExists())
    absent, gone = Put(table, keys[4], {"v": 2}, is_now(1)), Delete(table, keys[3], IfExists())
    assert await blamed(holds, wrong) == {keys[1]}
    assert await blamed(holds, wrong, absent) == {keys[1], keys[4]}
    assert await blamed(holds, taken, free) == {keys[2]}
    assert await blamed(holds, gone) == {keys[3]}
    assert await blamed(absent, gone) == {keys[3], keys[4]}  # None of the rows exists.
    assert await blamed(wrong) == frozenset()  # A statement that is no batch says nothing of keys.
    await cassandra_storage.drop_table(table)
    await cassandra_storage.drop_namespace("blame")
