"""Every scenario plays on memory (atomic within a partition, as Cassandra is) and on SQLite (within a namespace)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
from protocol_world import World

from infra.storage.port import Storage
from tests.storages import LOCAL, opened


@pytest.fixture(params=LOCAL)
def opening(request: pytest.FixtureRequest, tmp_path: Path) -> AbstractAsyncContextManager[Storage]:
    return opened(request.param, request, tmp_path)


@pytest.fixture
async def storage(opening: AbstractAsyncContextManager[Storage]) -> AsyncIterator[Storage]:
    async with opening as made:
        yield made


@pytest.fixture
async def world(storage: Storage) -> AsyncIterator[World]:
    made = World(storage)
    await made.create()
    yield made
    made.storage.heal()
    await made.settled()
