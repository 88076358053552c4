"""Scans as storage does them for a transaction: page by page, conditions and limits left to the reader.

A stored row may be PREPARED, and then other values count than those stored. So neither the user's conditions nor the
limit can be left to the storage; asking for a page at a time keeps a limited scan from reading a whole partition.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from infra.consensus_commit.metadata import Layout
from infra.storage.operations import Bound, Row, Scan
from infra.storage.port import Storage

PAGE_SIZE = 256


async def stored_pages(storage: Storage, layout: Layout, scan: Scan, page_size: int) -> AsyncIterator[list[Row]]:
    """The stored rows between the bounds of `scan`, in its order; `page_size` 0 reads them in one go."""
    start, end = scan.start, scan.end
    while True:
        rows = await storage.scan(
            Scan(layout.stored, scan.partition, start, end, limit=page_size, reverse=scan.reverse)
        )
        yield rows
        if not page_size or len(rows) < page_size or not layout.stored.clustering_key:
            return
        after = Bound(layout.key_of(rows[-1]).clustering, inclusive=False)
        start, end = (start, after) if scan.reverse else (after, end)


def page_size_for(scan: Scan) -> int:
    """How many rows at a time serve `scan` best: all, or as many as it wants, or a page while it is choosing."""
    if not scan.limit:
        return 0
    return max(scan.limit, PAGE_SIZE) if scan.where else scan.limit
