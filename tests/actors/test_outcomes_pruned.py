"""Pruning outcomes: each partition once, a page at a time, and one that cannot be read keeps no other waiting."""

from __future__ import annotations

import pytest

from actors.outcomes import KEPT_LONGER_MS, ONE_IN, Outcome, outcomes_of, prune_outcomes
from infra.consensus_commit.metadata import transactional
from infra.storage.errors import TooMuchToReadError, UnavailableStorageError
from infra.storage.forwarding import ForwardingStorage
from infra.storage.memory import MemoryStorage
from infra.storage.operations import Put, Row, Scan
from schemas.partitioning import slot

TABLE = outcomes_of("orders")
STORED = transactional(TABLE.schema)
BUCKETS = 2
NOW_MS = 1_000_000
COMMITTED, PREPARED = 3, 1


class Scans(ForwardingStorage):
    """Counts the rows that scans bring, and fails those of some partitions."""

    def __init__(self, storage: MemoryStorage) -> None:
        super().__init__(storage)
        self.rows = 0
        self.failing: dict[tuple[int, int], Exception] = {}

    async def scan(self, scan: Scan) -> list[Row]:
        if scan.partition in self.failing:
            raise self.failing[scan.partition]  # type: ignore[index]
        rows = await super().scan(scan)
        self.rows += len(rows)
        return rows


@pytest.fixture
async def storage() -> Scans:
    storage = Scans(MemoryStorage())
    await storage.create_table(STORED)
    return storage


async def put(storage: Scans, number: int, *, committed_at_ms: int, tx_state: int = COMMITTED) -> tuple[int, int]:
    """The partition that it lies in."""
    outcome = Outcome(
        key=f"c{number % 7}",
        id=f"x{number}",
        type="PlaceOrder",
        status="committed",
        reason="",
        digest="",
        transaction_id="",
        received_at_ms=0,
        committed_at_ms=committed_at_ms,
        answer="{}",
    )
    key = TABLE.storage_key((outcome.key, outcome.id), buckets=BUCKETS)
    columns = TABLE.to_columns(outcome) | {"tx_id": "t", "tx_state": tx_state, "tx_version": 1}
    await storage.mutate([Put(STORED, key, columns)])
    bucket, number = key.partition
    assert isinstance(bucket, int)
    assert isinstance(number, int)
    return bucket, number


async def left(storage: Scans) -> set[str]:
    partitions = await storage.partitions(STORED)
    return {str(row["id"]) for each in partitions for row in await storage.storage.scan(Scan(STORED, each))}


async def prune(storage: Scans, *, batch: int = 3) -> int:
    return await prune_outcomes(storage, TABLE, list(range(BUCKETS)), before_ms=NOW_MS, batch=batch)


async def test_old_outcomes_go_and_young_ones_and_those_in_doubt_stay(storage: Scans) -> None:
    for number in range(40):
        await put(storage, number, committed_at_ms=NOW_MS - (number % 2))
    await put(storage, 41, committed_at_ms=0, tx_state=PREPARED)

    assert await prune(storage) == 20
    assert await left(storage) == {"x41", *(f"x{number}" for number in range(0, 40, 2))}


async def test_one_in_a_thousand_stays_until_what_was_deleted_around_it_is_forgotten(storage: Scans) -> None:
    """A reader is thus never led over more deletions in a row than Cassandra lets him pass."""
    stays = [f"x{number}" for number in range(6_000) if slot(f"x{number}", ONE_IN) == 0]
    assert len(stays) in range(2, 15)
    for number in range(6_000):
        await put(storage, number, committed_at_ms=NOW_MS - 1)

    assert await prune(storage, batch=500) == 6_000 - len(stays)
    assert await left(storage) == {*stays}
    for later_ms, pruned in ((KEPT_LONGER_MS - 1, 0), (KEPT_LONGER_MS, len(stays))):
        buckets = list(range(BUCKETS))
        assert await prune_outcomes(storage, TABLE, buckets, before_ms=NOW_MS + later_ms) == pruned
    assert await left(storage) == set()


async def test_every_row_is_read_once_however_many_are_old(storage: Scans) -> None:
    for number in range(100):
        await put(storage, number, committed_at_ms=NOW_MS - (number % 3))
    await prune(storage)
    assert storage.rows == 100


async def test_a_partition_with_too_much_deleted_is_left_for_later_and_keeps_no_other_waiting(storage: Scans) -> None:
    by_partition: dict[tuple[int, int], set[str]] = {}
    for number in range(40):
        by_partition.setdefault(await put(storage, number, committed_at_ms=0), set()).add(f"x{number}")
    full = min(by_partition)
    storage.failing[full] = TooMuchToReadError("too many deletions")

    assert await prune(storage) == 40 - len(by_partition[full])
    assert await left(storage) == by_partition[full]

    storage.failing.clear()
    assert await prune(storage) == len(by_partition[full])


async def test_a_storage_that_does_not_serve_ends_the_pruning(storage: Scans) -> None:
    storage.failing[(1, 0)] = UnavailableStorageError("away")
    with pytest.raises(UnavailableStorageError, match="away"):
        await prune(storage)
