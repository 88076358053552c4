"""A storage whose calls are spans, where they are a part of something that is traced. It changes nothing.

It stands before the gate that joins batches (`infra.storage.gate`), so that each transaction has a span for what it
asked itself, with the time that it queued for its partition, and not for what it travelled with. Tables and counts
are said, keys and values never.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial

from infra.storage.errors import NoMutationError
from infra.storage.forwarding import ForwardingStorage
from infra.storage.operations import CrossPartition, Key, Mutation, Row, Scan, TableSchema, Value
from infra.storage.port import Storage, mutate_when_convenient, peek
from infra.tracing import STORAGE, Span, Tracer

NO_MUTATION = "no_mutation"
"""The `error.type` of a write whose condition did not hold: a conflict, which is an answer of the storage."""


class TracedStorage(ForwardingStorage):
    """Implements infra.storage.port.Storage."""

    def __init__(self, storage: Storage, tracer: Tracer) -> None:
        super().__init__(storage)
        self._tracer = tracer

    async def get(self, table: TableSchema, key: Key) -> Row | None:
        if not self._tracer.active:
            return await self.storage.get(table, key)
        with self._span("get", table) as span:
            row = await self.storage.get(table, key)
            span.note({"db.response.returned_rows": 0 if row is None else 1})
            return row

    async def peek(self, table: TableSchema, key: Key) -> Row | None:
        if not self._tracer.active:
            return await peek(self.storage, table, key)
        with self._span("get", table) as span:
            row = await peek(self.storage, table, key)
            span.note({"db.response.returned_rows": 0 if row is None else 1})
            return row

    async def scan(self, scan: Scan) -> list[Row]:
        if not self._tracer.active:
            return await self.storage.scan(scan)
        with self._span("scan", scan.table) as span:
            rows = await self.storage.scan(scan)
            span.note({"db.response.returned_rows": len(rows)})
            return rows

    async def pages(self, selection: CrossPartition, page_size: int = 256) -> AsyncIterator[list[Row]]:
        # The time between two pages is that of whoever reads them: a span for each would say little, one for all less.
        async for page in self.storage.pages(selection, page_size):
            yield page

    async def partitions(self, table: TableSchema) -> list[tuple[Value, ...]]:
        with self._span("partitions", table):
            return await self.storage.partitions(table)

    async def mutate(self, mutations: Sequence[Mutation]) -> None:
        await self._mutate(self.storage.mutate, mutations)

    async def mutate_when_convenient(self, mutations: Sequence[Mutation]) -> None:
        await self._mutate(partial(mutate_when_convenient, self.storage), mutations)

    async def _mutate(
        self, write: Callable[[Sequence[Mutation]], Awaitable[None]], mutations: Sequence[Mutation]
    ) -> None:
        if not self._tracer.active:
            return await write(mutations)
        with self._span("mutate", *(mutation.table for mutation in mutations)) as span:
            span.note({"db.operation.batch.size": len(mutations)})
            try:
                await write(mutations)
            except NoMutationError:
                span.fail(NO_MUTATION)
                raise

    def _span(self, operation: str, *tables: TableSchema) -> Span:
        names = {table.full_name for table in tables}
        one = names.pop() if len(names) == 1 else ""
        span = self._tracer.child(STORAGE, f"{operation} {one}" if one else operation)
        if span.recording:
            namespace = tables[0].namespace if tables else ""
            span.note(
                {
                    "db.system.name": self.storage.info_of(namespace).name,
                    "db.operation.name": operation,
                    "db.namespace": namespace,
                    "concord.tables": len(names) + bool(one),
                    **({"db.collection.name": one} if one else {}),
                }
            )
        return span
