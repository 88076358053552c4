"""The gate lets one batch at a time into an atomic unit, in order, and keeps the contract of what it wraps."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from storage_contract import COUNTERS, THINGS, StorageContract, key

from infra.consensus_commit.manager import TransactionManager
from infra.consensus_commit.states import Isolation
from infra.storage.errors import (
    InvalidOperationError,
    NoMutationError,
    StorageError,
    UnavailableStorageError,
    UnknownOutcomeError,
)
from infra.storage.gate import MAX_ROWS_TOGETHER, PartitionGate
from infra.storage.memory import MemoryStorage
from infra.storage.operations import (
    Atomicity,
    ColumnCondition,
    If,
    IfExists,
    Key,
    Mutation,
    Operator,
    Put,
    Row,
    Scan,
    StorageInfo,
    TableSchema,
)
from infra.storage.port import atomic_unit, mutate_when_convenient, peek


class ContendingStorage(MemoryStorage):
    """Memory that, like Cassandra, leaves it to its callers to come one at a time; it notes who came together."""

    def __init__(self, atomicity: Atomicity = Atomicity.PARTITION) -> None:
        super().__init__(atomicity)
        self.inside: list[object] = []
        self.most_in_one_unit = 0
        self.most_at_all = 0
        self.order: list[Key] = []
        self.on_batch: Callable[[Sequence[Mutation]], object] = lambda mutations: None
        self.fail_batches_of: tuple[int, StorageError] | None = None  # so many rows, and what is raised for them
        self.failing: Callable[[], bool] = lambda: False
        self.names_the_blamed = True  # as Cassandra does
        self.batches = 0

    @property
    def info(self) -> StorageInfo:
        return replace(super().info, serializes_batches=False)

    async def mutate(self, mutations: Sequence[Mutation]) -> None:
        unit = atomic_unit(self.info, mutations[0].table, mutations[0].key) if mutations else None
        self.inside.append(unit)
        self.most_in_one_unit = max(self.most_in_one_unit, self.inside.count(unit))
        self.most_at_all = max(self.most_at_all, len(self.inside))
        self.order += [mutation.key for mutation in mutations]
        self.batches += 1
        self.on_batch(mutations)
        try:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            if self.fail_batches_of is not None and len(mutations) == self.fail_batches_of[0]:
                raise self.fail_batches_of[1]
            if self.failing():
                raise UnavailableStorageError("not applied")
            try:
                await super().mutate(mutations)
            except NoMutationError as refusal:
                raise refusal if self.names_the_blamed else NoMutationError(str(refusal)) from None
            if self.failing():
                raise UnknownOutcomeError("applied, but not answered")
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

    assert not gate._queues


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


def is_small(value: int) -> If:
    return If((ColumnCondition("small", Operator.EQ, value),))


async def test_batches_that_wait_for_a_unit_go_together(contending: ContendingStorage):
    gate = PartitionGate(contending)
    batches: list[int] = []
    contending.on_batch = lambda mutations: batches.append(len(mutations))

    await asyncio.gather(*(gate.mutate(put(n)) for n in range(MAX_ROWS_TOGETHER + 10)))

    assert batches == [1, MAX_ROWS_TOGETHER, 9]


async def test_only_batches_of_one_kind_on_different_records_go_together(contending: ContendingStorage):
    gate = PartitionGate(contending)
    await gate.mutate([each for n in range(3) for each in put(n)])
    batches: list[int] = []
    contending.on_batch = lambda mutations: batches.append(len(mutations))

    def conditional(number: int, small: int) -> list[Mutation]:
        return [Put(THINGS, key(number=number), {"small": small + 1}, is_small(small))]

    await asyncio.gather(
        gate.mutate(conditional(0, 0)),
        gate.mutate(conditional(1, 1)),
        gate.mutate(conditional(2, 2)),
        gate.mutate(conditional(1, 2)),  # the same record again: in the next batch, and after the first
        gate.mutate(put(3)),  # without a condition: apart
        gate.mutate(conditional(2, 3)),
    )

    assert batches == [1, 2, 1, 1, 1]
    rows = await contending.scan(Scan(THINGS, (0,)))
    assert [row["small"] for row in rows] == [1, 3, 4, 3]


@pytest.mark.parametrize(("named", "batches"), [(True, 3), (False, 5)])
async def test_of_batches_that_went_together_only_the_one_to_blame_is_refused(
    contending: ContendingStorage, named: bool, batches: int
):
    """Three where the storage names it: the first, the others together, and the others without it."""
    contending.names_the_blamed = named
    gate = PartitionGate(contending)
    await gate.mutate([each for n in range(4) for each in put(n)])

    def conditional(number: int, small: int) -> list[Mutation]:
        return [Put(THINGS, key(number=number), {"small": 100}, is_small(small))]

    contending.batches = 0
    answers = await asyncio.gather(
        gate.mutate(conditional(0, 0)),
        gate.mutate(conditional(1, 1)),
        gate.mutate(conditional(2, 99)),
        gate.mutate(conditional(3, 3)),
        return_exceptions=True,
    )

    assert [type(answer) for answer in answers] == [type(None), type(None), NoMutationError, type(None)]
    rows = await contending.scan(Scan(THINGS, (0,)))
    assert [row["small"] for row in rows] == [100, 100, 2, 100]
    assert contending.batches == batches


async def test_a_leader_to_blame_lets_its_company_go_on_before_it_is_refused(contending: ContendingStorage):
    gate = PartitionGate(contending)
    await gate.mutate([each for n in range(4) for each in put(n)])
    contending.batches = 0

    answers = await asyncio.gather(
        gate.mutate(put(0)),
        gate.mutate([Put(THINGS, key(number=1), {"small": 100}, is_small(99))]),
        gate.mutate([Put(THINGS, key(number=2), {"small": 100}, is_small(2))]),
        gate.mutate([Put(THINGS, key(number=3), {"small": 100}, is_small(3))]),
        return_exceptions=True,
    )

    assert [type(answer) for answer in answers] == [type(None), NoMutationError, type(None), type(None)]
    assert contending.batches == 3
    assert not gate._queues


@pytest.mark.parametrize("error", [UnknownOutcomeError("not answered"), UnavailableStorageError("down", remedy="wait")])
async def test_an_error_of_a_batch_is_everybodys_who_was_in_it(contending: ContendingStorage, error: StorageError):
    gate = PartitionGate(contending)
    contending.fail_batches_of = (2, error)

    answers = await asyncio.gather(*(gate.mutate(put(n)) for n in range(3)), return_exceptions=True)

    assert answers[0] is None
    assert [(type(answer), str(answer)) for answer in answers[1:]] == [(type(error), str(error))] * 2
    assert getattr(answers[2], "remedy", None) == getattr(error, "remedy", None)
    contending.fail_batches_of = None
    await gate.mutate(put(4))


async def test_when_the_leader_is_cancelled_its_company_knows_nothing_and_the_queue_goes_on(
    contending: ContendingStorage,
):
    gate = PartitionGate(contending, rows_together=2)
    tasks = [asyncio.create_task(gate.mutate(put(n))) for n in range(4)]
    while contending.order != [key(number=0), key(number=1), key(number=2)]:  # noqa: ASYNC110 - turns of the loop
        await asyncio.sleep(0)

    tasks[1].cancel()  # It leads, and 2 is with it.
    answers = await asyncio.gather(*tasks, return_exceptions=True)

    assert [type(answer) for answer in answers] == [
        type(None),
        asyncio.CancelledError,
        UnknownOutcomeError,
        type(None),
    ]
    assert not gate._queues


async def test_whoever_is_cancelled_when_told_to_lead_passes_the_lead_on(contending: ContendingStorage):
    gate = PartitionGate(contending, rows_together=1)
    first, second, third = (asyncio.create_task(gate.mutate(put(n))) for n in range(3))
    await asyncio.sleep(0)
    queue = next(iter(gate._queues.values()))
    told = queue[0].turn
    told.add_done_callback(lambda turn: second.cancel())

    await asyncio.wait_for(asyncio.gather(first, third), timeout=10)

    assert second.cancelled()
    assert not gate._queues


@pytest.mark.parametrize("seed", range(30))
async def test_whatever_meets_at_the_gate_everyone_gets_the_answer_that_is_true(seed: int):
    chance = random.Random(seed)
    storage = ContendingStorage()
    storage.names_the_blamed = bool(seed % 3)
    await storage.create_table(COUNTERS)
    await storage.create_table(THINGS)
    gate = PartitionGate(storage, rows_together=chance.choice([1, 3, 50]))
    storage.failing = lambda: chance.random() < 0.1
    keys = [key(number=n) for n in range(6)]
    for each in keys:
        await MemoryStorage.mutate(storage, [Put(THINGS, each, {"small": 0})])
    applied = dict.fromkeys(keys, 0)
    unknown = dict.fromkeys(keys, 0)

    async def client() -> None:
        for _ in range(30):
            touched = chance.sample(keys, chance.randint(1, 3))
            seen = {each: (await storage.get(THINGS, each) or {})["small"] for each in touched}
            if chance.random() < 0.3:
                await asyncio.sleep(0)
            write = gate.mutate_when_convenient if chance.random() < 0.3 else gate.mutate
            try:
                await write([Put(THINGS, k, {"small": v + 1}, is_small(v)) for k, v in seen.items()])
            except (NoMutationError, UnavailableStorageError):
                pass
            except UnknownOutcomeError:
                for each in touched:
                    unknown[each] += 1
            else:
                for each in touched:
                    applied[each] += 1

    await asyncio.gather(*(client() for _ in range(8)))

    assert storage.most_in_one_unit == 1
    assert sum(applied.values()) > 50
    for each in keys:
        row = await storage.get(THINGS, each)
        assert row is not None
        assert applied[each] <= row["small"] <= applied[each] + unknown[each]
    assert not gate._queues
    assert not gate._lingering


async def test_a_batch_in_no_hurry_goes_along_with_the_next_one(contending: ContendingStorage):
    gate = PartitionGate(contending)

    first = asyncio.create_task(gate.mutate_when_convenient(put(1)))
    second = asyncio.create_task(gate.mutate_when_convenient(put(2)))
    await asyncio.sleep(0)
    assert not contending.batches
    await asyncio.gather(gate.mutate(put(3)), first, second)

    assert contending.batches == 1
    assert not gate._lingering
    assert not gate._queues


async def test_a_batch_in_no_hurry_goes_by_itself_when_nobody_comes(contending: ContendingStorage):
    gate = PartitionGate(contending)

    await asyncio.wait_for(asyncio.gather(*(gate.mutate_when_convenient(put(n)) for n in range(3))), timeout=10)

    assert contending.batches == 1
    assert not gate._lingering
    assert not gate._queues


async def test_a_batch_in_no_hurry_goes_before_whatever_touches_its_records(contending: ContendingStorage):
    gate = PartitionGate(contending)
    await gate.mutate(put(1))
    lingering = asyncio.create_task(
        gate.mutate_when_convenient([Put(THINGS, key(number=1), {"small": 5}, is_small(1))])
    )
    await asyncio.sleep(0)

    await gate.mutate([Put(THINGS, key(number=1), {"small": 6}, is_small(5))])

    await lingering
    row = await gate.get(THINGS, key(number=1))
    assert row is not None
    assert row["small"] == 6


async def test_a_batch_in_no_hurry_that_is_cancelled_is_not_written(contending: ContendingStorage):
    gate = PartitionGate(contending)
    lingering = asyncio.create_task(gate.mutate_when_convenient(put(1)))
    await asyncio.sleep(0)

    lingering.cancel()
    await asyncio.gather(lingering, return_exceptions=True)
    await gate.mutate(put(2))

    assert contending.order == [key(number=2)]
    assert not gate._lingering


async def test_a_gate_that_stands_open_hurries_everybody():
    storage = MemoryStorage()
    await storage.create_table(THINGS)
    await PartitionGate(storage).mutate_when_convenient(put(1))
    await mutate_when_convenient(storage, put(2))  # A storage without such a way has the usual one.
    assert len(await storage.scan(Scan(THINGS, (0,)))) == 2
