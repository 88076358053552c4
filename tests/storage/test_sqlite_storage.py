"""The SQLite adapter keeps the storage contract, and what SQLite adds to it: files, processes, disks."""

from __future__ import annotations

import pytest
from storage_contract import StorageContract

from infra.storage.sqlite import SqliteStorage


class TestSqliteStorage(StorageContract):
    @pytest.fixture
    async def storage(self, tmp_path):
        storage = SqliteStorage(tmp_path / "data")
        yield storage
        await storage.close()
