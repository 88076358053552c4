"""A real Cassandra for tests, as plain functions; `tests/conftest.py` makes fixtures of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from infra.servers.cassandra import LocalCassandra


@asynccontextmanager
async def running_cassandra(directory: Path) -> AsyncIterator[LocalCassandra]:
    """A Cassandra in `directory`, stopped at the end. One for all tests of a session is enough: 6 s and 1 GB.

    Tests must neither stop, kill nor pause it: those that do start one of their own.
    """
    cassandra = LocalCassandra(directory, heap_mb=1024)
    await cassandra.start()
    try:
        yield cassandra
    finally:
        await cassandra.stop()
