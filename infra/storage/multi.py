"""Several storages as one: each namespace lives in exactly one of them.

A transaction may touch namespaces of several storages: the engine groups its writes by atomic unit, and `info_of`
names every storage by its alias, so that no unit reaches over two. One `mutate` never does; it is refused, not split,
because two writes to two storages are not atomic. Nothing here reads or writes by itself, and nothing is retried.

As ScalarDB's multi-storage (MultiStorage, MultiStorageAdmin): storages by alias, namespaces mapped to aliases, a
default for the others. A table that a storage holds in a namespace mapped elsewhere cannot be reached, and is not
listed either.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import cast

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
from infra.storage.port import AdministrableStorage, Storage, peek
from infra.storage.validation import check_identifier


class MultiStorage:
    """Storage that passes every call on to the storage of its namespace.

    `storages` by alias; `namespaces` says which alias holds a namespace, `default` which one holds all the others.
    Raises InvalidOperationError for an alias that is no storage and for namespaces that differ only by case.
    """

    def __init__(self, storages: Mapping[str, Storage], namespaces: Mapping[str, str], default: str) -> None:
        for name in (*storages, *namespaces):
            check_identifier(name)
        for alias in (default, *namespaces.values()):
            if alias not in storages:
                raise InvalidOperationError(f"there is no storage {alias!r} among {', '.join(sorted(storages))}")
        self._storages = dict(storages)
        self._aliases = dict(namespaces)
        self._default = default
        self._spellings = {namespace.lower(): namespace for namespace in namespaces}
        if len(self._spellings) != len(namespaces):
            raise InvalidOperationError("two namespaces differ only by case")

    @property
    def info(self) -> StorageInfo:
        """What holds in every namespace: the smallest unit, the smallest batch, what all of them see and hold."""
        infos = [storage.info for storage in self._storages.values()]
        atomicities = [info.atomicity for info in infos]
        if len(infos) > 1:
            atomicities.append(Atomicity.NAMESPACE)  # Nothing larger lies within one storage.
        return StorageInfo(
            name="multi",
            atomicity=min(atomicities, key=lambda atomicity: atomicity.value),
            max_mutations=min((info.max_mutations for info in infos if info.max_mutations), default=0),
            serializes_batches=all(info.serializes_batches for info in infos),
            sees_all_partitions=all(info.sees_all_partitions for info in infos),
            sees_all_indexed=all(info.sees_all_indexed for info in infos),
            data_types=frozenset.intersection(*(info.data_types for info in infos)),
            options={alias: storage.info.name for alias, storage in self._storages.items()},
        )

    def info_of(self, namespace: str) -> StorageInfo:
        """What the storage of `namespace` promises, under its alias."""
        alias = self._alias(namespace)
        return replace(self._storages[alias].info_of(namespace), name=alias)

    async def create_table(self, table: TableSchema) -> None:
        check_identifier(table.namespace)
        await self._storage(table.namespace).create_table(table)

    async def tables(self) -> list[TableSchema]:
        listed = await asyncio.gather(*(storage.tables() for storage in self._storages.values()))
        reachable = [
            table
            for alias, tables in zip(self._storages, listed, strict=True)
            for table in tables
            if self._aliases.get(table.namespace, self._default) == alias
        ]
        return sorted(reachable, key=lambda table: table.full_name)

    async def get(self, table: TableSchema, key: Key) -> Row | None:
        return await self._storage(table.namespace).get(table, key)

    async def peek(self, table: TableSchema, key: Key) -> Row | None:
        return await peek(self._storage(table.namespace), table, key)

    async def scan(self, scan: Scan) -> list[Row]:
        return await self._storage(scan.table.namespace).scan(scan)

    def pages(self, selection: CrossPartition, page_size: int = 256) -> AsyncIterator[list[Row]]:
        return self._storage(selection.table.namespace).pages(selection, page_size)

    async def partitions(self, table: TableSchema) -> list[tuple[Value, ...]]:
        return await self._storage(table.namespace).partitions(table)

    async def mutate(self, mutations: Sequence[Mutation]) -> None:
        aliases = {self._alias(mutation.table.namespace) for mutation in mutations}
        if len(aliases) > 1:
            raise InvalidOperationError(f"one batch, two atomic units: the storages {' and '.join(sorted(aliases))}")
        for alias in aliases:
            await self._storages[alias].mutate(mutations)

    async def close(self) -> None:
        """Close every storage once, whatever becomes of the others; raises what the first of them raised."""
        once = {id(storage): storage for storage in self._storages.values()}
        results = await asyncio.gather(*(storage.close() for storage in once.values()), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    # -- administration

    async def namespaces(self) -> list[str]:
        listed = await asyncio.gather(*(self._administrable(alias).namespaces() for alias in self._storages))
        return sorted(
            namespace
            for alias, namespaces in zip(self._storages, listed, strict=True)
            for namespace in namespaces
            if self._aliases.get(namespace, self._default) == alias
        )

    async def create_namespace(self, namespace: str) -> None:
        await self._administrator(check_identifier(namespace)).create_namespace(namespace)

    async def drop_namespace(self, namespace: str) -> None:
        await self._administrator(namespace).drop_namespace(namespace)

    async def drop_table(self, table: TableSchema) -> None:
        await self._administrator(table.namespace).drop_table(table)

    async def truncate_table(self, table: TableSchema) -> None:
        await self._administrator(table.namespace).truncate_table(table)

    async def add_column(self, table: TableSchema, column: str, data_type: DataType) -> None:
        await self._administrator(table.namespace).add_column(table, column, data_type)

    async def create_index(self, table: TableSchema, column: str) -> None:
        await self._administrator(table.namespace).create_index(table, column)

    async def drop_index(self, table: TableSchema, column: str) -> None:
        await self._administrator(table.namespace).drop_index(table, column)

    def _alias(self, namespace: str) -> str:
        """The alias of the storage that holds `namespace`.

        A spelling that differs from a mapped one by case would silently go to the default; it is refused.
        """
        alias = self._aliases.get(namespace)
        if alias is not None:
            return alias
        mapped = self._spellings.get(namespace.lower())
        if mapped is not None:
            raise InvalidOperationError(f"namespaces {mapped} and {namespace} differ only by case")
        return self._default

    def _storage(self, namespace: str) -> Storage:
        return self._storages[self._alias(namespace)]

    def _administrator(self, namespace: str) -> AdministrableStorage:
        return self._administrable(self._alias(namespace))

    def _administrable(self, alias: str) -> AdministrableStorage:
        storage = self._storages[alias]
        if not hasattr(storage, "drop_table"):
            raise InvalidOperationError(f"the tables of storage {alias} cannot be changed through this program")
        return cast(AdministrableStorage, storage)
