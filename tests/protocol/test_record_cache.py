"""A manager that keeps records reads less, and is never believed more."""

from __future__ import annotations

import asyncio
import random

import pytest
from faults import FaultyStorage, reads_of
from protocol_world import ACCOUNT, World, at_once, key, row

from infra.consensus_commit.errors import PreparationConflictError, TransactionConflictError, ValidationConflictError
from infra.consensus_commit.manager import TransactionManager
from infra.consensus_commit.metadata import transactional
from infra.consensus_commit.record_cache import RecordCache
from infra.consensus_commit.retry import RetryPolicy
from infra.consensus_commit.states import Isolation
from infra.consensus_commit.transaction import Transaction

STORED = transactional(ACCOUNT)


def caching(world: World, *, records: int = 100, seed: int = 1) -> TransactionManager:
    return TransactionManager(
        FaultyStorage(world.plain_storage, randomness=random.Random(seed)),
        world.clock,
        one_phase_commit=False,
        cache_records=records,
        sleep=at_once,
        randomness=random.Random(seed),
    )


def reads(manager: TransactionManager) -> int:
    storage = manager._storage.storage  # behind the gate
    assert isinstance(storage, FaultyStorage)
    return sum(map(reads_of(STORED), storage.calls))


async def add_one(transaction: Transaction) -> None:
    record = await transaction.get(ACCOUNT, key(1))
    assert record is not None
    await transaction.update(ACCOUNT, key(1), {"balance": record["balance"] + 1})  # type: ignore[operator]


async def test_what_was_read_or_written_once_is_not_read_again(world: World) -> None:
    await world.given({1: 10})
    manager = caching(world)

    for _ in range(5):
        await manager.run(add_one)
        await manager.drain()

    assert reads(manager) == 1
    stored = await world.stored(1)
    assert stored is not None
    assert (stored["balance"], stored["tx_version"]) == (15, 6)


async def test_a_stale_record_is_found_out_when_it_is_written_and_read_anew(world: World) -> None:
    await world.given({1: 10})
    manager = caching(world)
    await manager.run(add_one)
    await manager.drain()
    await world.commits(lambda other: other.update(ACCOUNT, key(1), {"balance": 50}))

    stale = manager.begin()
    await add_one(stale)
    with pytest.raises(PreparationConflictError):
        await stale.commit()
    await manager.run(add_one)
    await manager.drain()

    stored = await world.stored(1)
    assert stored is not None
    assert stored["balance"] == 51


async def test_a_stale_record_that_is_only_read_keeps_even_a_reader_from_committing(world: World) -> None:
    await world.given({1: 10})
    manager = caching(world)
    await manager.run(lambda transaction: transaction.get(ACCOUNT, key(1)))
    await world.commits(lambda other: other.update(ACCOUNT, key(1), {"balance": 50}))

    reader = manager.begin(read_only=True)
    assert await reader.get(ACCOUNT, key(1)) == row(1, 10)
    with pytest.raises(ValidationConflictError):
        await reader.commit()

    assert await manager.run(lambda transaction: transaction.get(ACCOUNT, key(1))) == row(1, 50)


@pytest.mark.parametrize("isolation", [Isolation.SNAPSHOT, Isolation.READ_COMMITTED])
async def test_isolation_levels_that_do_not_validate_read_the_storage(world: World, isolation: Isolation) -> None:
    await world.given({1: 10})
    manager = caching(world)
    await manager.run(lambda transaction: transaction.get(ACCOUNT, key(1)))
    await world.commits(lambda other: other.update(ACCOUNT, key(1), {"balance": 50}))

    assert await manager.begin(isolation).get(ACCOUNT, key(1)) == row(1, 50)


async def test_a_deleted_record_is_not_remembered(world: World) -> None:
    await world.given({1: 10})
    manager = caching(world)
    await manager.run(add_one)
    await manager.run(lambda transaction: transaction.delete(ACCOUNT, key(1)))
    await manager.drain()

    assert await manager.run(lambda transaction: transaction.get(ACCOUNT, key(1))) is None
    await manager.run(lambda transaction: transaction.insert(ACCOUNT, key(1), {"balance": 1, "note": "new"}))
    assert await manager.run(lambda transaction: transaction.get(ACCOUNT, key(1))) == row(1, 1, "new")


def test_the_cache_keeps_the_records_used_last_and_of_one_record_the_later_version() -> None:
    cache = RecordCache(2)
    ids = [("bank.account", key(number)) for number in range(3)]

    def version(number: int) -> dict[str, object]:
        return {"tx_id": str(number), "tx_version": number}

    cache.put(ids[0], version(2))
    cache.put(ids[1], version(1))
    cache.put(ids[0], version(1))
    cache.put(ids[2], version(1))

    assert cache.get(ids[0]) == version(2)
    assert cache.get(ids[1]) is None
    assert cache.get(ids[2]) == version(1)
    cache.drop(ids)
    assert cache.get(ids[0]) is None


@pytest.mark.parametrize("seed", range(5))
async def test_transfers_of_caching_managers_keep_the_sum_and_count_every_commit(world: World, seed: int) -> None:
    accounts = range(4)
    await world.given(dict.fromkeys(accounts, 100))
    managers = [caching(world, seed=seed * 10 + number) for number in range(3)]
    commits = 0

    async def transfers(manager: TransactionManager, randomness: random.Random) -> None:
        nonlocal commits
        for _ in range(30):
            giver, taker = randomness.sample(accounts, 2)

            async def move(transaction: Transaction, giver: int = giver, taker: int = taker) -> None:
                for number, change in ((giver, -1), (taker, 1)):
                    record = await transaction.get(ACCOUNT, key(number))
                    assert record is not None
                    await transaction.update(ACCOUNT, key(number), {"balance": record["balance"] + change})  # type: ignore[operator]

            try:
                await manager.run(move, retry=RetryPolicy(tries=30))
                commits += 1
            except TransactionConflictError:
                pass

    await asyncio.gather(*(transfers(m, random.Random(seed * 100 + n)) for n, m in enumerate(managers)))
    for manager in managers:
        await manager.drain()

    rows = [await world.stored(number) for number in accounts]
    assert commits >= 40
    assert sum(stored["balance"] for stored in rows if stored) == 400  # type: ignore[misc]
    assert sum(stored["tx_version"] for stored in rows if stored) == len(accounts) + 2 * commits  # type: ignore[misc]
