"""A look at what the engine asks of a storage: statements by phase of the protocol, and a brake at any of them.

The counterpart in Java, for ScalarDB, is `scripts/java_peer/java/WatchedCassandra.java`: same phases, same names.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from infra.storage.forwarding import ForwardingStorage
from infra.storage.operations import (
    CrossPartition,
    Delete,
    If,
    Key,
    Mutation,
    Row,
    Scan,
    TableSchema,
)
from infra.storage.port import Storage, peek

_COMMITTED = 3
_UNCOMMITTED = {1, 2}
_DELETED = 2


def phase_of(mutations: Sequence[Mutation]) -> str:
    """Which step of the protocol writes `mutations`, which are one batch: told by the columns of the first."""
    first = mutations[0]
    if isinstance(first, Delete):
        conditions = first.condition.conditions if isinstance(first.condition, If) else ()
        deleted = any(condition.column == "tx_state" and condition.value == _DELETED for condition in conditions)
        return "commit_records" if deleted else "rollback_records"
    if "tx_created_at" in first.columns:
        return "commit_state" if first.columns["tx_state"] == _COMMITTED else "abort_state"
    if first.columns.get("tx_state") in _UNCOMMITTED:
        return "prepare_records"
    if "tx_version" not in first.columns:
        return "commit_records"
    # Both write a whole committed record; only a roll-back is sure of finding the record as its own.
    mine = isinstance(first.condition, If) and any(c.column == "tx_state" for c in first.condition.conditions)
    return "rollback_records" if mine else "one_phase"


class WatchedStorage(ForwardingStorage):
    """Storage that passes everything on to `storage` and counts statements by phase.

    Whoever reaches `hold_at` stays there for ever, and `on_held` is told.
    """

    def __init__(self, storage: Storage, on_held: Callable[[str], None] = lambda phase: None) -> None:
        super().__init__(storage)
        self._on_held = on_held
        self.counts: Counter[str] = Counter()
        self.hold_at = ""

    async def get(self, table: TableSchema, key: Key) -> Row | None:
        await self._pass("get")
        return await super().get(table, key)

    async def peek(self, table: TableSchema, key: Key) -> Row | None:
        await self._pass("peek")
        return await peek(self.storage, table, key)

    async def scan(self, scan: Scan) -> list[Row]:
        await self._pass("scan")
        return await super().scan(scan)

    def pages(self, selection: CrossPartition, page_size: int = 256) -> AsyncIterator[list[Row]]:
        self.counts["scan"] += 1
        return super().pages(selection, page_size)

    async def mutate(self, mutations: Sequence[Mutation]) -> None:
        await self._pass(phase_of(mutations))
        await super().mutate(mutations)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.storage, name)

    async def _pass(self, phase: str) -> None:
        self.counts[phase] += 1
        if phase == self.hold_at:
            self._on_held(phase)
            await asyncio.get_running_loop().create_future()
