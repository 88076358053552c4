"""The ways to read one record: scenarios of recovery are played with each of them.

All find the record with key 1 and nothing else, as long as its balance is one of `BALANCES`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest
from protocol_world import ACCOUNT, INDEXED, World, key, whole

from infra.consensus_commit.manager import TransactionManager
from infra.consensus_commit.states import Isolation
from infra.consensus_commit.transaction import Transaction
from infra.storage.operations import IndexScan, Row, ScanAll, StorageInfo, TableSchema

BALANCES = (10, 50, 99)


@dataclass(frozen=True)
class Reader:
    """A way to read the record with key 1 of `table`. `sees_all`: whether SERIALIZABLE allows it on a storage."""

    name: str
    table: TableSchema
    read: Callable[[Transaction], Awaitable[Row | None]]
    sees_all: Callable[[StorageInfo], bool] = lambda info: True

    async def __call__(self, transaction: Transaction) -> Row | None:
        return await self.read(transaction)

    def begin(self, world: World, process: TransactionManager | None = None) -> Transaction:
        """A transaction of the highest isolation under which this can be read."""
        allowed = self.sees_all(world.plain_storage.info_of(self.table.namespace))
        return (process or world.manager).begin(Isolation.SERIALIZABLE if allowed else Isolation.SNAPSHOT)

    # -- what others do to the record

    async def update(self, transaction: Any) -> None:
        await transaction.upsert(self.table, key(1), {"balance": 99})

    async def insert(self, transaction: Any) -> None:
        await transaction.insert(self.table, key(1), {"balance": 99})

    async def delete(self, transaction: Any) -> None:
        await transaction.delete(self.table, key(1))


def _one(rows: list[Row]) -> Row | None:
    assert len(rows) <= 1
    return rows[0] if rows else None


async def _get(transaction: Transaction) -> Row | None:
    return await transaction.get(ACCOUNT, key(1))


async def _scan(transaction: Transaction) -> Row | None:
    return _one(await transaction.scan(whole()))


async def _scanner(transaction: Transaction) -> Row | None:
    async with transaction.scanner(whole()) as scanner:
        return await scanner.one()


async def _scan_all(transaction: Transaction) -> Row | None:
    return _one(await transaction.scan(ScanAll(ACCOUNT)))


async def _index_scan(transaction: Transaction) -> Row | None:
    found = []
    for balance in BALANCES:
        found += await transaction.scan(IndexScan(INDEXED, "balance", balance))
        if found and transaction.isolation is Isolation.READ_COMMITTED:
            break  # By the next look it may have been recovered, and be found by another value.
    return _one(found)


async def _index_get(transaction: Transaction) -> Row | None:
    found = []
    for balance in BALANCES:
        record = await transaction.get_by_index(INDEXED, "balance", balance)
        found += [record] if record is not None else []
        if found and transaction.isolation is Isolation.READ_COMMITTED:
            break
    return _one(found)


BY_GET = Reader("get", ACCOUNT, _get)
BY_SCAN = Reader("scan", ACCOUNT, _scan)
BY_SCANNER = Reader("scanner", ACCOUNT, _scanner)
BY_SCAN_ALL = Reader("scan all", ACCOUNT, _scan_all, lambda info: info.sees_all_partitions)
BY_INDEX_SCAN = Reader("index scan", INDEXED, _index_scan, lambda info: info.sees_all_indexed)
BY_INDEX_GET = Reader("index get", INDEXED, _index_get, lambda info: info.sees_all_indexed)
READERS = (BY_GET, BY_SCAN, BY_SCANNER, BY_SCAN_ALL, BY_INDEX_SCAN, BY_INDEX_GET)

each_read = pytest.mark.parametrize("read", READERS, ids=[reader.name for reader in READERS])
