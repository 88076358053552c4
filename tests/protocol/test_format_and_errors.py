"""The format on disk, the pieces that compose it, and errors that cross processes."""

from __future__ import annotations

import pickle
import random

import pytest
from faults import FaultyStorage
from protocol_world import ACCOUNT, World, at_once, key, row

from infra.clock import ManualClock
from infra.consensus_commit import grouping
from infra.consensus_commit.errors import (
    IllegalOperationError,
    PreparationConflictError,
    TransactionConflictError,
    UncommittedRecordError,
    UnknownTransactionStatusError,
    ValidationConflictError,
)
from infra.consensus_commit.manager import TransactionManager
from infra.consensus_commit.metadata import is_transactional, layout_of, transactional
from infra.consensus_commit.retry import RetryPolicy
from infra.consensus_commit.snapshot import PendingWrite
from infra.consensus_commit.transaction import Transaction
from infra.storage.memory import MemoryStorage
from infra.storage.operations import Atomicity, DataType, StorageInfo, TableSchema


def test_a_table_gains_exactly_the_columns_that_scalardb_adds() -> None:
    """As seen in Cassandra after ScalarDB 3.19 had created `bank.t(id INT, v INT, note TEXT)`."""
    table = TableSchema("bank", "t", {"id": DataType.INT, "v": DataType.INT, "note": DataType.TEXT}, ("id",))

    assert {name: str(kind) for name, kind in transactional(table).columns.items()} == {
        "id": "INT",
        "v": "INT",
        "note": "TEXT",
        "tx_id": "TEXT",
        "tx_state": "INT",
        "tx_version": "INT",
        "tx_prepared_at": "BIGINT",
        "tx_committed_at": "BIGINT",
        "before_v": "INT",
        "before_note": "TEXT",
        "before_tx_id": "TEXT",
        "before_tx_state": "INT",
        "before_tx_version": "INT",
        "before_tx_prepared_at": "BIGINT",
        "before_tx_committed_at": "BIGINT",
    }


def test_the_state_table_has_exactly_scalardbs_columns() -> None:
    table = TransactionManager(MemoryStorage()).states.table

    assert table.full_name == "coordinator.state"
    assert dict(table.columns) == {"tx_id": "TEXT", "tx_state": "INT", "tx_created_at": "BIGINT"}
    assert table.partition_key == ("tx_id",)


@pytest.mark.parametrize("name", ["tx_id", "tx_state", "before_tx_version", "before_v"])
def test_user_columns_with_the_names_of_transaction_columns_are_refused(name: str) -> None:
    table = TableSchema("bank", "bad", {"id": DataType.INT, "v": DataType.INT, name: DataType.INT}, ("id",))

    with pytest.raises(IllegalOperationError, match=name):
        transactional(table)


def test_a_column_that_only_looks_like_a_before_image_is_the_users() -> None:
    columns = {"id": DataType.INT, "before_noon": DataType.BOOLEAN}
    table = TableSchema("bank", "hours", columns, ("id",))

    stored = transactional(table)

    assert layout_of(table).value_columns == {"before_noon"}
    assert stored.columns["before_before_noon"] is DataType.BOOLEAN
    assert layout_of(stored) is layout_of(table)


def test_tables_of_transactions_are_told_from_others() -> None:
    assert is_transactional(transactional(ACCOUNT))
    assert not is_transactional(ACCOUNT)
    assert not is_transactional(TransactionManager(MemoryStorage()).states.table)


def write(number: int, partition: int) -> PendingWrite:
    return PendingWrite(layout_of(ACCOUNT), key(number, partition=partition), {"balance": number})


def test_writes_are_grouped_by_atomic_unit_and_by_what_the_storage_takes_at_once() -> None:
    writes = [write(number, number % 2) for number in range(10)]
    storage = MemoryStorage(Atomicity.PARTITION, max_mutations=2)

    batches = [[each.key.clustering[0] for each in batch] for batch in grouping.batches(storage, writes)]

    assert batches == [[0, 2], [4, 6], [8], [1, 3], [5, 7], [9]]


def test_a_storage_without_a_limit_gets_a_unit_at_once() -> None:
    writes = [write(number, number % 2) for number in range(10)]

    sizes = {
        atomicity: [len(batch) for batch in grouping.batches(MemoryStorage(atomicity), writes)]
        for atomicity in Atomicity
    }

    assert sizes == {Atomicity.PARTITION: [5, 5], Atomicity.NAMESPACE: [10], Atomicity.STORAGE: [10]}


class LimitedStorage(FaultyStorage):
    """A storage that takes at most three mutations at once."""

    @property
    def info(self) -> StorageInfo:
        return StorageInfo("limited", Atomicity.PARTITION, max_mutations=3)

    def info_of(self, namespace: str) -> StorageInfo:
        return self.info


async def test_a_transaction_larger_than_what_the_storage_takes_at_once_commits_in_several_batches() -> None:
    storage = LimitedStorage(MemoryStorage(atomicity=Atomicity.PARTITION))
    manager = TransactionManager(storage, ManualClock())
    await manager.create_coordinator_tables()
    await manager.create_table(ACCOUNT)

    async def work(transaction: Transaction) -> None:
        for number in range(8):
            await transaction.insert(ACCOUNT, key(number), {"balance": number})

    await manager.run(work)

    assert max(len(call.mutations) for call in storage.calls) == 3
    assert await manager.begin().get(ACCOUNT, key(7)) == row(7, 7)
    await manager.drain()
    assert await manager.recovery.in_doubt(ACCOUNT) == []
    assert len(await storage.partitions(manager.states.table)) == 1, "two phases, though it is one partition"


@pytest.mark.parametrize(
    "error",
    [
        UncommittedRecordError("held", "t1"),
        UnknownTransactionStatusError("lost", "t2"),
        PreparationConflictError("changed"),
        ValidationConflictError("changed"),
    ],
)
def test_errors_survive_pickling(error: Exception) -> None:
    """They travel between processes."""
    copy = pickle.loads(pickle.dumps(error))

    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert getattr(copy, "tx_id", None) == getattr(error, "tx_id", None)


async def test_run_tries_again_after_a_conflict_with_a_new_id(world: World) -> None:
    await world.given({1: 10})
    ids: list[str] = []

    async def increment(transaction: Transaction) -> None:
        ids.append(transaction.tx_id)
        record = await transaction.get(ACCOUNT, key(1))
        assert record is not None
        if len(ids) < 3:
            await world.commits(lambda other: other.update(ACCOUNT, key(1), {"balance": 10 * len(ids)}))
        await transaction.update(ACCOUNT, key(1), {"balance": record["balance"] + 1})  # type: ignore[operator]

    await world.manager.run(increment)

    assert len(set(ids)) == 3
    assert await world.balances() == {("account", 1, 1): 21}


async def test_run_gives_up_after_its_tries_and_raises_the_conflict(world: World) -> None:
    await world.given({1: 10})
    waits: list[float] = []

    async def note(seconds: float) -> None:
        waits.append(seconds)

    manager = TransactionManager(
        world.plain_storage, world.clock, randomness=random.Random(1), sleep=note, one_phase_commit=False
    )

    async def always_late(transaction: Transaction) -> None:
        await transaction.update(ACCOUNT, key(1), {"balance": 1})
        await world.commits(lambda other: other.update(ACCOUNT, key(1), {"balance": 2}))

    with pytest.raises(TransactionConflictError):
        await manager.run(always_late, retry=RetryPolicy(tries=4, first_ms=15, jitter=2 / 3))

    assert len(waits) == 3
    for attempt, seconds in enumerate(waits):
        assert 0.005 * 2**attempt <= seconds <= 0.015 * 2**attempt, "doubled each time, give or take the jitter"


async def test_run_does_not_try_again_what_may_have_committed(world: World) -> None:
    attempts = 0

    async def work(transaction: Transaction) -> None:
        nonlocal attempts
        attempts += 1
        raise UnknownTransactionStatusError("who knows", transaction.tx_id)

    manager = TransactionManager(world.plain_storage, world.clock, sleep=at_once)
    with pytest.raises(UnknownTransactionStatusError):
        await manager.run(work)

    assert attempts == 1
