"""What stands in front of a storage, and passes on what it does not do itself."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from infra.storage.operations import CrossPartition, Key, Mutation, Row, Scan, StorageInfo, TableSchema, Value
from infra.storage.port import Storage


class ForwardingStorage:
    """The storage port by way of `storage`: a base for those that change a few of its methods.

    It has no `peek`, on purpose: what counts, fails or forbids reads by overriding `get` is then not passed by. One
    that wants the cheaper read adds it.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    @property
    def info(self) -> StorageInfo:
        return self.storage.info

    def info_of(self, namespace: str) -> StorageInfo:
        return self.storage.info_of(namespace)

    async def create_table(self, table: TableSchema) -> None:
        await self.storage.create_table(table)

    async def tables(self) -> list[TableSchema]:
        return await self.storage.tables()

    async def get(self, table: TableSchema, key: Key) -> Row | None:
        return await self.storage.get(table, key)

    async def scan(self, scan: Scan) -> list[Row]:
        return await self.storage.scan(scan)

    def pages(self, selection: CrossPartition, page_size: int = 256) -> AsyncIterator[list[Row]]:
        return self.storage.pages(selection, page_size)

    async def partitions(self, table: TableSchema) -> list[tuple[Value, ...]]:
        return await self.storage.partitions(table)

    async def mutate(self, mutations: Sequence[Mutation]) -> None:
        await self.storage.mutate(mutations)

    async def close(self) -> None:
        await self.storage.close()
