"""A storage whose calls are told to somebody: how long each took, and how it failed. It changes nothing."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar

from infra.storage.errors import (
    InvalidOperationError,
    NoMutationError,
    UnavailableStorageError,
    UnknownOutcomeError,
)
from infra.storage.forwarding import ForwardingStorage
from infra.storage.operations import CrossPartition, Key, Mutation, Row, Scan, TableSchema, Value
from infra.storage.port import Storage, peek

T = TypeVar("T")

OnCall = Callable[[str, str, str, float, str], None]
"""Told of each call: storage, namespace, operation, seconds, and one of ERRORS, or "" when it was served."""

ERRORS = ("unavailable", "unknown", "invalid", "broken")
"""Ways to fail: not served, not answered in time, asked wrongly, anything else. A condition that did not hold is an
answer and no failure."""

OPERATIONS = ("get", "peek", "scan", "pages", "partitions", "mutate")


def error_of(error: Exception) -> str:
    """Which of ERRORS an exception is, or "" for what is an answer."""
    match error:
        case NoMutationError():
            return ""
        case UnavailableStorageError():
            return "unavailable"
        case UnknownOutcomeError():
            return "unknown"
        case InvalidOperationError():
            return "invalid"
        case _:
            return "broken"


class ObservedStorage(ForwardingStorage):
    """Storage that tells `on_call` of reads and writes. Several storages behind it are told apart by their names."""

    def __init__(
        self, storage: Storage, on_call: OnCall, *, monotonic_s: Callable[[], float] = time.perf_counter
    ) -> None:
        super().__init__(storage)
        self._on_call = on_call
        self._monotonic_s = monotonic_s
        self._names: dict[str, str] = {}

    async def get(self, table: TableSchema, key: Key) -> Row | None:
        return await self._timed(table.namespace, "get", self.storage.get(table, key))

    async def peek(self, table: TableSchema, key: Key) -> Row | None:
        return await self._timed(table.namespace, "peek", peek(self.storage, table, key))

    async def scan(self, scan: Scan) -> list[Row]:
        return await self._timed(scan.table.namespace, "scan", self.storage.scan(scan))

    async def pages(self, selection: CrossPartition, page_size: int = 256) -> AsyncIterator[list[Row]]:
        # Only the first page: the time between two others is that of whoever reads them.
        pages = self.storage.pages(selection, page_size)
        try:
            first = await self._timed(selection.table.namespace, "pages", anext(pages, None))
            if first is not None:
                yield first
                async for page in pages:
                    yield page
        finally:
            if isinstance(pages, AsyncGenerator):  # left early: what it holds open is closed now
                await pages.aclose()

    async def partitions(self, table: TableSchema) -> list[tuple[Value, ...]]:
        return await self._timed(table.namespace, "partitions", self.storage.partitions(table))

    async def mutate(self, mutations: Sequence[Mutation]) -> None:
        namespace = mutations[0].table.namespace if mutations else ""
        await self._timed(namespace, "mutate", self.storage.mutate(mutations))

    async def _timed(self, namespace: str, operation: str, call: Awaitable[T]) -> T:
        started_s = self._monotonic_s()
        try:
            result = await call
        except Exception as raised:
            self._tell(namespace, operation, started_s, error_of(raised))
            raise
        self._tell(namespace, operation, started_s, "")
        return result

    def _tell(self, namespace: str, operation: str, started_s: float, error: str) -> None:
        name = self._names.get(namespace)
        if name is None:
            name = self._names[namespace] = self.storage.info_of(namespace).name
        self._on_call(name, namespace, operation, self._monotonic_s() - started_s, error)
