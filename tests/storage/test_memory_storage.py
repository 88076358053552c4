"""The memory adapter keeps the storage contract at both of its atomicities."""

from __future__ import annotations

import pytest
from storage_contract import AdministrationContract, StorageContract

from infra.storage.memory import MemoryStorage
from infra.storage.operations import Atomicity


class TestMemoryStorageAtomicInAPartition(StorageContract):
    @pytest.fixture
    async def storage(self):
        return MemoryStorage()


class TestMemoryStorageAtomicInANamespace(StorageContract):
    @pytest.fixture
    async def storage(self):
        return MemoryStorage(Atomicity.NAMESPACE)


class TestMemoryStorageIsAdministrable(AdministrationContract):
    @pytest.fixture
    async def storage(self):
        return MemoryStorage()


def test_the_memory_says_what_it_promises():
    assert MemoryStorage().info.atomicity is Atomicity.PARTITION
    assert MemoryStorage(Atomicity.NAMESPACE).info.atomicity is Atomicity.NAMESPACE
