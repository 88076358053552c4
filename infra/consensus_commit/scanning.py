"""Scans as storage does them for a transaction: page by page, conditions and limits left to the reader.

A stored row may be PREPARED, and then other values count than those stored. So neither the user's conditions nor the
limit can be left to the storage; asking for a page at a time keeps a limited scan from reading a whole partition.

An index is asked for the new value, for the value before, and for the new one again: a record whose transaction is
rolled back between the first two is in neither.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, cast

from infra.consensus_commit.metadata import BEFORE, Layout
from infra.storage.operations import (
    Bound,
    ColumnCondition,
    IndexScan,
    Key,
    Operator,
    Row,
    Scan,
    ScanAll,
    Selection,
)
from infra.storage.port import Storage

PAGE_SIZE = 256


async def stored_pages(
    storage: Storage, layout: Layout, selection: Selection, page_size: int
) -> AsyncIterator[list[Row]]:
    """The stored rows that `selection` may turn out to name, in an order of which every repetition is the same.

    `page_size` 0 reads those of one partition in one go.
    """
    match selection:
        case Scan():
            pages = _partition_pages(storage, layout, selection, page_size)
        case ScanAll():
            pages = storage.pages(ScanAll(layout.stored), page_size or PAGE_SIZE)
        case IndexScan():
            pages = _indexed(storage, layout, selection)
    async for page in pages:
        yield page


async def _indexed(storage: Storage, layout: Layout, selection: IndexScan) -> AsyncIterator[list[Row]]:
    found: dict[Key, Row] = {}
    for column in (selection.column, BEFORE + selection.column, selection.column):
        async for page in storage.pages(IndexScan(layout.stored, column, selection.value)):
            for row in page:
                found.setdefault(layout.key_of(row), row)
    yield [row for _, row in sorted(found.items(), key=lambda item: cast(Any, item[0].partition + item[0].clustering))]


async def _partition_pages(storage: Storage, layout: Layout, scan: Scan, page_size: int) -> AsyncIterator[list[Row]]:
    start, end = scan.start, scan.end
    descends = {column in layout.stored.descending for column in layout.stored.clustering_key}
    if len(descends) > 1:
        page_size = 0  # Some columns ascend and some descend: no bound by value says "after this row".
    backwards = scan.reverse != (descends == {True})
    while True:
        rows = await storage.scan(
            Scan(layout.stored, scan.partition, start, end, limit=page_size, reverse=scan.reverse)
        )
        yield rows
        if not page_size or len(rows) < page_size or not layout.stored.clustering_key:
            return
        after = Bound(layout.key_of(rows[-1]).clustering, inclusive=False)
        start, end = (start, after) if backwards else (after, end)


def conditions_of(selection: Selection) -> tuple[ColumnCondition, ...]:
    """What a record must meet to be one of those that `selection` names, once it lies within its bounds."""
    if isinstance(selection, IndexScan):
        return (ColumnCondition(selection.column, Operator.EQ, selection.value), *selection.where)
    return selection.where


def page_size_for(scan: Selection) -> int:
    """How many rows at a time serve `scan` best: all, or as many as it wants, or a page while it is choosing."""
    if not scan.limit:
        return 0
    return max(scan.limit, PAGE_SIZE) if scan.where else scan.limit
