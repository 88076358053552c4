"""One conditional batch in flight for each atomic unit.

A storage whose conditional batches contend (Cassandra's Paxos rounds) answers two batches on one partition more
slowly than one after the other, and may refuse both. The gate lets them through in the order they came. It guards
this process only; batches of others are what conditions are for.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Hashable, Sequence
from dataclasses import dataclass, field, replace

from infra.storage.errors import InvalidOperationError
from infra.storage.operations import CrossPartition, Key, Mutation, Row, Scan, StorageInfo, TableSchema, Value
from infra.storage.port import Storage, atomic_unit, peek


@dataclass(slots=True)
class _Turnstile:
    """The lock of one unit (asyncio's is first come, first served) and how many hold it or wait for it."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0


class PartitionGate:
    """Storage that passes everything on to `storage`, but one `mutate` at a time into an atomic unit.

    In front of a storage that serializes batches by itself it stands open.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._turnstiles: dict[Hashable, _Turnstile] = {}
        self._infos: dict[str, tuple[StorageInfo, StorageInfo]] = {}

    @property
    def info(self) -> StorageInfo:
        return replace(self._storage.info, serializes_batches=True)

    def info_of(self, namespace: str) -> StorageInfo:
        behind = self._storage.info_of(namespace)
        known = self._infos.get(namespace)
        if known is None or known[0] is not behind:  # Asked for every write: not to be made anew each time.
            known = self._infos[namespace] = (behind, replace(behind, serializes_batches=True))
        return known[1]

    async def create_table(self, table: TableSchema) -> None:
        await self._storage.create_table(table)

    async def tables(self) -> list[TableSchema]:
        return await self._storage.tables()

    async def get(self, table: TableSchema, key: Key) -> Row | None:
        return await self._storage.get(table, key)

    async def peek(self, table: TableSchema, key: Key) -> Row | None:
        return await peek(self._storage, table, key)

    async def scan(self, scan: Scan) -> list[Row]:
        return await self._storage.scan(scan)

    def pages(self, selection: CrossPartition, page_size: int = 256) -> AsyncIterator[list[Row]]:
        return self._storage.pages(selection, page_size)

    async def partitions(self, table: TableSchema) -> list[tuple[Value, ...]]:
        return await self._storage.partitions(table)

    async def mutate(self, mutations: Sequence[Mutation]) -> None:
        info = self._storage.info_of(mutations[0].table.namespace) if mutations else None
        if info is None or info.serializes_batches:
            await self._storage.mutate(mutations)
            return
        # A batch of two units is the storage's to refuse; until then it queues for the first.
        unit = atomic_unit(info, mutations[0].table, mutations[0].key)
        try:
            turnstile = self._turnstiles.setdefault(unit, _Turnstile())
        except TypeError as error:
            raise InvalidOperationError(
                f"{mutations[0].table.full_name}: a key holds plain values ({error})"
            ) from error
        turnstile.users += 1
        try:
            async with turnstile.lock:
                await self._storage.mutate(mutations)
        finally:
            turnstile.users -= 1
            if not turnstile.users:
                del self._turnstiles[unit]

    async def close(self) -> None:
        await self._storage.close()
