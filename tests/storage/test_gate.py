"""The gate lets one batch at a time into an atomic unit, in order, and keeps the contract of what it wraps."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest
from storage_contract import COUNTERS, THINGS, StorageContract, key

from infra.consensus_commit.manager import TransactionManager
from infra.consensus_commit.states import Isolation
from infra.storage.errors import InvalidOperationError, NoMutationError
from infra.storage.gate import PartitionGate
from infra.storage.memory import MemoryStorage
from infra.storage.operations import Atomicity, IfExists, Key, Mutation, Put, Row, StorageInfo, TableSchema
from infra.storage.port import atomic_unit, peek


class ContendingStorage(MemoryStorage):
    """Memory that, like Cassandra, leaves it to its callers to come one at a time; it notes who came together."""

    def __init__(self, atomicity: Atomicity = Atomicity.PARTITION) -> None:
        super().__init__(atomicity)
        self.inside: list[object] = []
        self.most_in_one_unit = 0
        self.most_at_all = 0
        self.order: list[Key] = []

    @property
    def info(self) -> StorageInfo:
        return replace(super().info, serializes_batches=False)

    async def mutate(self, mutations: Sequence[Mutation]) -> None:
        unit = atomic_unit(self.info, mutations[0].table, mutations[0].key) if mutations else None
        self.inside.append(unit)
        self.most_in_one_unit = max(self.most_in_one_unit, self.inside.count(unit))
        self.most_at_all = max(self.most_at_all, len(self.inside))
        self.order += [mutation.key for mutation in mutations]
        try:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            await super().mutate(mutations)
        finally:
            self.inside.remove(unit)


class TestPartitionGate(StorageContract):
    @pytest.fixture
    async def storage(self):
        return PartitionGate(ContendingStorage())


@pytest.fixture
async def contending():
    storage = ContendingStorage()
    await storage.create_table(THINGS)
    await storage.create_table(COUNTERS)
    return storage


def put(number: int, *, bucket: int = 0) -> list[Mutation]:
    return [Put(THINGS, key(number=number, bucket=bucket), {"small": number})]


async def test_without_a_gate_batches_meet_in_one_unit(contending: ContendingStorage):
    await asyncio.gather(*(contending.mutate(put(n)) for n in range(5)))

    assert contending.most_in_one_unit == 5


async def test_a_unit_lets_in_one_batch_at_a_time_in_the_order_they_came(contending: ContendingStorage):
    gate = PartitionGate(contending)

    await asyncio.gather(*(gate.mutate(put(n)) for n in range(10)))

    assert contending.most_in_one_unit == 1
    assert contending.order == [key(number=n) for n in range(10)]


async def test_different_units_do_not_wait_for_each_other(contending: ContendingStorage):
    gate = PartitionGate(contending)

    await asyncio.gather(
        *(gate.mutate(put(n, bucket=bucket)) for n in range(3) for bucket in range(4)),
        *(gate.mutate([Put(COUNTERS, Key(("0",)), {"value": n})]) for n in range(3)),
    )

    assert contending.most_in_one_unit == 1
    assert contending.most_at_all == 5


async def test_the_unit_is_as_large_as_the_storage_says():
    contending = ContendingStorage(Atomicity.NAMESPACE)
    await contending.create_table(THINGS)
    gate = PartitionGate(contending)

    await asyncio.gather(*(gate.mutate(put(n, bucket=n)) for n in range(5)))

    assert contending.most_at_all == 1


async def test_a_failure_reaches_its_caller_and_lets_the_next_one_in(contending: ContendingStorage):
    gate = PartitionGate(contending)
    refused = [Put(THINGS, key(number=9), {"small": 1}, IfExists())]
    invalid = [Put(THINGS, key(), {"small": "1"})]
    unhashable = [Put(THINGS, Key(([],), ("n", 0)), {})]  # type: ignore[arg-type]

    answers = await asyncio.gather(
        *map(gate.mutate, [refused, invalid, unhashable, put(1)]),
        return_exceptions=True,
    )

    assert [type(answer) for answer in answers] == [
        NoMutationError,
        InvalidOperationError,
        InvalidOperationError,
        type(None),
    ]
    assert await gate.get(THINGS, key(number=1)) is not None


async def test_whoever_is_cancelled_in_the_queue_lets_the_next_one_in(contending: ContendingStorage):
    gate = PartitionGate(contending)
    first, second, third = (asyncio.create_task(gate.mutate(put(n))) for n in range(3))
    await asyncio.sleep(0)

    second.cancel()
    await asyncio.wait_for(asyncio.gather(first, third), timeout=10)

    assert second.cancelled()
    assert contending.order == [key(number=0), key(number=2)]


async def test_nothing_is_kept_of_units_that_nobody_uses(contending: ContendingStorage):
    gate = PartitionGate(contending)

    await asyncio.gather(*(gate.mutate(put(n, bucket=n % 50)) for n in range(200)))

    assert not gate._turnstiles


async def test_a_storage_that_serializes_by_itself_is_not_held_up():
    class Serializing(ContendingStorage):
        @property
        def info(self) -> StorageInfo:
            return replace(super().info, serializes_batches=True)

    serializing = Serializing()
    await serializing.create_table(THINGS)
    gate = PartitionGate(serializing)

    await asyncio.gather(*(gate.mutate(put(n)) for n in range(5)))

    assert serializing.most_in_one_unit == 5


async def test_a_gate_promises_what_it_adds(contending: ContendingStorage):
    assert PartitionGate(contending).info == replace(contending.info, serializes_batches=True)


class PeekableStorage(MemoryStorage):
    """A storage with a cheaper way to read; it notes which way was taken."""

    def __init__(self) -> None:
        super().__init__()
        self.ways: list[str] = []

    async def get(self, table: TableSchema, key: Key) -> Row | None:
        self.ways.append("get")
        return await super().get(table, key)

    async def peek(self, table: TableSchema, key: Key) -> Row | None:
        self.ways.append("peek")
        return await super().get(table, key)


async def test_the_gate_passes_a_peek_on_and_makes_it_a_get_where_there_is_none():
    storage = PeekableStorage()
    await storage.create_table(COUNTERS)

    assert await peek(PartitionGate(storage), COUNTERS, Key(("a",))) is None
    plain = MemoryStorage()
    await plain.create_table(COUNTERS)
    await plain.mutate([Put(COUNTERS, Key(("a",)), {"value": 1})])

    assert storage.ways == ["peek"]
    assert await peek(PartitionGate(plain), COUNTERS, Key(("a",))) == {"id": "a", "value": 1}


@pytest.mark.parametrize(
    ("isolation", "ways"),
    [
        (Isolation.SERIALIZABLE, ["peek", "get"]),  # then validation
        (Isolation.SNAPSHOT, ["get"]),
        (Isolation.READ_COMMITTED, ["get"]),
    ],
)
async def test_only_a_transaction_that_validates_what_it_read_peeks(isolation: Isolation, ways: list[str]):
    storage = PeekableStorage()
    manager = TransactionManager(storage)
    await manager.create_table(COUNTERS)

    transaction = manager.begin(isolation)
    await transaction.get(COUNTERS, Key(("a",)))
    await transaction.commit()

    assert storage.ways == ways
