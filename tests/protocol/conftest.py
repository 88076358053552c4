"""Every scenario plays on memory (atomic within a partition, as Cassandra is) and on SQLite (within a namespace)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from protocol_world import World

from infra.storage.memory import MemoryStorage
from infra.storage.operations import Atomicity
from infra.storage.port import Storage
from infra.storage.sqlite import SqliteStorage


@pytest.fixture(params=["memory", "sqlite"])
async def storage(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Storage]:
    made: Storage = (
        MemoryStorage(atomicity=Atomicity.PARTITION) if request.param == "memory" else SqliteStorage(tmp_path)
    )
    yield made
    await made.close()


@pytest.fixture
async def world(storage: Storage) -> AsyncIterator[World]:
    made = World(storage)
    await made.create()
    yield made
    made.storage.heal()
    await made.settled()
