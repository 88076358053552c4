"""Every test gets a storage; where it makes a difference, both: memory (atomic in a partition) and SQLite."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import structlog

from infra.storage.memory import MemoryStorage
from infra.storage.operations import Atomicity
from infra.storage.port import Storage
from infra.storage.sqlite import SqliteStorage

pytest.register_assert_rewrite("harness")

import harness  # noqa: E402


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """No log: faults make it long. And no script of another test."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.configure(**before)
    harness._scripts.clear()


@pytest.fixture
def memory() -> Storage:
    return MemoryStorage(atomicity=Atomicity.PARTITION)


@pytest.fixture(params=["memory", "sqlite"])
async def storage(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Storage]:
    made: Storage = (
        MemoryStorage(atomicity=Atomicity.PARTITION) if request.param == "memory" else SqliteStorage(tmp_path)
    )
    yield made
    await made.close()
