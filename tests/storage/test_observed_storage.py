"""An observed storage is the storage, and tells of each call how long it took and how it failed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from storage_contract import THINGS, StorageContract, key

from infra.storage.errors import InvalidOperationError, NoMutationError, UnavailableStorageError, UnknownOutcomeError
from infra.storage.memory import MemoryStorage
from infra.storage.multi import MultiStorage
from infra.storage.observed import ERRORS, OPERATIONS, ObservedStorage, error_of
from infra.storage.operations import IfExists, Mutation, Put, Scan, ScanAll, TableSchema
from infra.storage.port import Storage

Told = list[tuple[str, str, str, str]]


class FailingStorage(MemoryStorage):
    failure: Exception | None = None

    async def mutate(self, mutations: Sequence[Mutation]) -> None:
        if self.failure is not None:
            raise self.failure
        await super().mutate(mutations)


def observed(storage: Storage) -> tuple[ObservedStorage, Told]:
    told: Told = []

    def note(name: str, namespace: str, operation: str, seconds: float, error: str) -> None:
        assert seconds == 1.0
        told.append((name, namespace, operation, error))

    ticks = iter(range(10**9))
    return ObservedStorage(storage, note, monotonic_s=lambda: float(next(ticks))), told


class TestObservedStorage(StorageContract):
    @pytest.fixture
    async def storage(self) -> Storage:
        return ObservedStorage(MemoryStorage(), lambda *call: None)


async def test_every_operation_is_told_with_its_storage_and_its_namespace() -> None:
    storage, told = observed(MemoryStorage())
    await storage.create_table(THINGS)

    await storage.mutate([Put(THINGS, key(), {"small": 1})])
    await storage.get(THINGS, key())
    await storage.peek(THINGS, key())
    await storage.scan(Scan(THINGS, key().partition))
    await storage.partitions(THINGS)
    assert [row async for page in storage.pages(ScanAll(THINGS)) for row in page]

    assert [(name, namespace, error) for name, namespace, _, error in told] == [("memory", THINGS.namespace, "")] * 6
    assert {operation for _, _, operation, _ in told} == set(OPERATIONS)


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (UnavailableStorageError("away"), "unavailable"),
        (UnknownOutcomeError("late"), "unknown"),
        (InvalidOperationError("wrong"), "invalid"),
        (RuntimeError("bug"), "broken"),
        (NoMutationError("no"), ""),
    ],
)
async def test_a_failure_is_told_by_its_kind_and_raised_as_it_is(failure: Exception, error: str) -> None:
    failing = FailingStorage()
    storage, told = observed(failing)
    await storage.create_table(THINGS)
    failing.failure = failure

    with pytest.raises(type(failure)) as raised:
        await storage.mutate([Put(THINGS, key(), {"small": 1})])

    assert raised.value is failure
    assert [call[3] for call in told] == [error]
    assert error_of(failure) in ("", *ERRORS)


async def test_a_condition_that_does_not_hold_is_an_answer() -> None:
    storage, told = observed(MemoryStorage())
    await storage.create_table(THINGS)

    with pytest.raises(NoMutationError):
        await storage.mutate([Put(THINGS, key(), {"small": 1}, IfExists())])

    assert told == [("memory", THINGS.namespace, "mutate", "")]


async def test_a_call_that_nobody_waits_for_any_more_is_not_told() -> None:
    class SlowStorage(MemoryStorage):
        async def mutate(self, mutations: Sequence[Mutation]) -> None:
            await asyncio.sleep(3600)

    storage, told = observed(SlowStorage())
    await storage.create_table(THINGS)
    calling = asyncio.ensure_future(storage.mutate([Put(THINGS, key(), {"small": 1})]))
    await asyncio.sleep(0)

    calling.cancel()
    await asyncio.gather(calling, return_exceptions=True)

    assert told == []


async def test_storages_behind_one_are_told_apart_by_their_aliases() -> None:
    elsewhere = TableSchema("elsewhere", "things", THINGS.columns, THINGS.partition_key, THINGS.clustering_key)
    storage, told = observed(MultiStorage({"a": MemoryStorage(), "b": MemoryStorage()}, {"elsewhere": "b"}, "a"))
    for table in (THINGS, elsewhere):
        await storage.create_table(table)
        await storage.get(table, key())

    assert [name for name, *_ in told] == ["a", "b"]
