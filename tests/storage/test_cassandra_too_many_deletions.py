"""What was deleted must stop nobody: a Cassandra that refuses reads at 200 deletions, where others do at 100,000.

Everything here deletes more than that, and then reads as the system does. Nothing has been forgotten by then: that
takes ten days.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

import pytest
import pytest_asyncio

from actors.due_rows import TIMERS, DueRows
from actors.inventory.tables import EXPIRIES, Expiry
from actors.outcomes import ONE_IN, Outcome, outcomes_of, prune_outcomes
from infra.clock import ManualClock
from infra.consensus_commit.coordinator import CoordinatorStates, Pruned
from infra.consensus_commit.intents import IntentLog, new_intended_id
from infra.consensus_commit.metadata import transactional
from infra.consensus_commit.recovery import RecoveryHandler
from infra.servers.cassandra import LocalCassandra
from infra.storage.cassandra import CassandraStorage
from infra.storage.errors import TooMuchToReadError
from infra.storage.gate import PartitionGate
from infra.storage.operations import DataType, Delete, Key, Mutation, Put, Scan, ScanAll, TableSchema
from schemas.partitioning import slot

REFUSED_AT = 200
COMMITTED = 3
THINGS = TableSchema(
    "shop",
    "things",
    {"place": DataType.INT, "slice": DataType.INT, "id": DataType.TEXT, "value": DataType.INT},
    ("place", "slice"),
    ("id",),
)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def strict(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[CassandraStorage]:
    settings = {"tombstone_warn_threshold": REFUSED_AT // 2, "tombstone_failure_threshold": REFUSED_AT}
    node = LocalCassandra(tmp_path_factory.mktemp("strict"), heap_mb=512, settings=settings)
    await node.start()
    storage = CassandraStorage([node.contact_point], node.port)
    try:
        yield storage
    finally:
        await storage.close()
        await node.stop()


@pytest.fixture
def storage(strict: CassandraStorage) -> CassandraStorage:
    return strict


async def write(storage: CassandraStorage, mutations: Iterable[Mutation], *, together: int = 200) -> None:
    """Plain writes, those of one partition in batches."""
    by_partition: dict[Any, list[Mutation]] = {}
    for mutation in mutations:
        by_partition.setdefault(mutation.key.partition, []).append(mutation)
    await asyncio.gather(
        *(
            storage.mutate(batch[first : first + together])
            for batch in by_partition.values()
            for first in range(0, len(batch), together)
        )
    )


def ids(count: int) -> list[str]:
    return [f"{number:05}" for number in range(count)]


async def put_and_delete(
    storage: CassandraStorage, table: TableSchema, partition: tuple[int, ...], names: Sequence[str], *, but: set[str]
) -> None:
    await write(storage, [Put(table, Key(partition, (name,)), {"value": 1}) for name in names])
    await write(storage, [Delete(table, Key(partition, (name,))) for name in names if name not in but])


async def test_a_server_refuses_what_meets_too_many_deletions_and_the_storage_says_what_it_is(
    storage: CassandraStorage,
) -> None:
    """The premise of all that follows."""
    await storage.create_table(THINGS)
    await put_and_delete(storage, THINGS, (1, 1), ids(REFUSED_AT + 100), but=set())
    with pytest.raises(TooMuchToReadError) as refused:
        await storage.scan(Scan(THINGS, (1, 1)))
    assert "gc_grace_seconds" in refused.value.remedy
    await storage.truncate_table(THINGS)


async def test_a_scan_passes_over_many_deletions_in_smaller_pages(storage: CassandraStorage) -> None:
    await storage.create_table(THINGS)
    left = {name for name in ids(4 * REFUSED_AT) if int(name) % 80 == 0}
    await put_and_delete(storage, THINGS, (1, 1), ids(4 * REFUSED_AT), but=left)

    assert {row["id"] for row in await storage.scan(Scan(THINGS, (1, 1), limit=10))} == left
    assert {row["id"] for row in await storage.scan(Scan(THINGS, (1, 1), limit=3))} == set(sorted(left)[:3])
    await storage.truncate_table(THINGS)


async def test_reads_of_all_partitions_pass_over_many_deletions_in_smaller_parts_of_the_ring(
    storage: CassandraStorage,
) -> None:
    await storage.create_table(THINGS)
    left = {(number, 1): {"00007", "00140"} if number % 5 == 0 else set() for number in range(20)}
    for partition, but in left.items():
        await put_and_delete(storage, THINGS, partition, ids(150), but=but)

    found: dict[Any, set[Any]] = {}
    async for page in storage.pages(ScanAll(THINGS)):
        for row in page:
            names = found.setdefault((row["place"], row["slice"]), set())
            assert row["id"] not in names, "twice"
            names.add(row["id"])
    assert found == {partition: but for partition, but in left.items() if but}
    assert sorted(await storage.partitions(THINGS), key=repr) == sorted(found, key=repr)
    await storage.truncate_table(THINGS)


async def test_timers_are_found_however_many_have_been_deleted(storage: CassandraStorage) -> None:
    stored = transactional(EXPIRIES.schema)
    await storage.create_table(stored)
    await storage.create_table(TIMERS)
    clock = ManualClock(1_600_000_050_000)
    begin_ms = clock.now_ms()
    columns = {"tx_id": "t", "tx_state": COMMITTED, "tx_version": 1}
    a_minute = REFUSED_AT * 6 // 10  # as 60,000 are of 100,000
    expiries = [
        Expiry(expires_at_ms=begin_ms + number * EXPIRIES.period_ms // a_minute, category="art", order_id=f"o{number}")
        for number in range(5 * a_minute)
    ]
    keys = {expiry.order_id: EXPIRIES.storage_key(EXPIRIES.key_of(expiry), buckets=1) for expiry in expiries}
    await write(storage, [Put(stored, key, columns) for key in keys.values()])
    last = expiries[-1].order_id

    def looks() -> DueRows:
        recovery = RecoveryHandler(storage, CoordinatorStates(storage, clock), clock)
        return DueRows(storage, recovery, [0])

    async def due(rows: DueRows) -> list[str]:
        return [expiry.order_id for expiry in await rows.until(EXPIRIES, clock.now_ms(), limit=500)]

    rows = looks()
    assert await due(rows) == ["o0"]
    await write(storage, [Delete(stored, key) for name, key in keys.items() if name != last])
    for _ in range(6):
        clock.advance(EXPIRIES.period_ms)
        assert await due(rows) == ([last] if clock.now_ms() >= expiries[-1].expires_at_ms else [])
    assert await due(looks()) == [last], "a new process"
    await storage.truncate_table(TIMERS)
    assert await due(looks()) == [last], "one that does not know where to begin"


async def test_decisions_are_pruned_however_many_have_been(storage: CassandraStorage) -> None:
    clock = ManualClock()
    states, log = CoordinatorStates(storage, clock), IntentLog(storage)
    await states.create_tables()
    await log.create_tables()
    columns = {"tx_state": COMMITTED, "tx_created_at": clock.now_ms()}
    old = [new_intended_id(clock) for _ in range(2 * REFUSED_AT)]
    await write(storage, [Put(states.table, Key((tx_id,)), columns) for tx_id in old])
    await write(storage, [Delete(states.table, Key((tx_id,))) for tx_id in old])
    last = [new_intended_id(clock) for _ in range(20)]
    await write(storage, [Put(states.table, Key((tx_id,)), columns) for tx_id in last])
    clock.advance(1)

    pruned = await states.prune(log, older_than_ms=0, writer_is_gone=lambda intent: True)

    assert pruned == Pruned(committed=20, aborted=0)
    assert await states.prune(log, older_than_ms=0, writer_is_gone=lambda intent: True) == Pruned(0, 0)


async def test_outcomes_are_pruned_and_answer_while_there_is_much_that_was_deleted(storage: CassandraStorage) -> None:
    table = outcomes_of("orders")
    stored = transactional(table.schema)
    await storage.create_table(stored)
    outcome = Outcome(
        key="c1",
        id="",
        type="PlaceOrder",
        status="committed",
        reason="",
        digest="",
        transaction_id="",
        received_at_ms=0,
        committed_at_ms=1,
        answer="{}",
    )
    more = {"tx_id": "t", "tx_state": COMMITTED, "tx_version": 1}

    def puts(names: Sequence[str], committed_at_ms: int) -> list[Mutation]:
        made = [outcome.with_(id=name, committed_at_ms=committed_at_ms) for name in names]
        return [
            Put(stored, table.storage_key(table.key_of(each), buckets=1), table.to_columns(each) | more)
            for each in made
        ]

    old = puts([f"{number:05}-old" for number in range(8 * REFUSED_AT)], 1)
    young = puts([f"{number:05}-young" for number in range(0, 8 * REFUSED_AT, 50)], 2)
    await write(storage, old + young)
    await write(storage, [Delete(stored, put.key) for put in old[: 7 * REFUSED_AT]])

    gated = PartitionGate(storage)  # as actors have it
    pruned = [put for put in old[7 * REFUSED_AT :] if slot(str(put.key.clustering[1]), ONE_IN)]
    assert await prune_outcomes(gated, table, [0], before_ms=2) == len(pruned) > 0
    assert await prune_outcomes(gated, table, [0], before_ms=2) == 0
    for put in (*young[:3], *young[-3:]):
        assert await storage.get(stored, put.key) is not None
