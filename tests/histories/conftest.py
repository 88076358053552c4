"""A storage with the tables of the workloads, for each kind of storage there is."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from infra.storage.port import Storage
from scripts.proof.histories.running import create_tables
from tests.storages import opened


@pytest.fixture
def opening(request: pytest.FixtureRequest, tmp_path: Path) -> AbstractAsyncContextManager[Storage]:
    return opened(request.param, request, tmp_path)


@pytest.fixture
async def storage(opening: AbstractAsyncContextManager[Storage]) -> AsyncIterator[Storage]:
    async with opening as made:
        await create_tables(made)
        yield made
