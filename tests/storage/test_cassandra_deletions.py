"""Cassandra remembers what was deleted, and counts it in reads: what keeps those below its limit (decision 30)."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from infra.consensus_commit.intents import Intent, IntentLog
from infra.storage.cassandra import CassandraStorage
from infra.storage.cassandra_statements import SHORT_LIVED
from infra.storage.operations import DataType, Key, Put, Scan, TableSchema

if TYPE_CHECKING:
    from infra.servers.cassandra import LocalCassandra

KEYSPACE = "deletions"
MANY = 300
PATIENT_S = 30

Session = Any
"""The driver's, which has no types."""
Run = Callable[..., Awaitable[Any]]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def run(cassandra: LocalCassandra) -> AsyncIterator[Run]:
    """Statements past the adapter; with `trace=True` what the server says that it did, else the rows."""
    from cassandra.cluster import Cluster

    cluster = Cluster([cassandra.contact_point], cassandra.port)
    session: Session = await asyncio.to_thread(cluster.connect)

    def execute(statement: str, trace: bool = False) -> Any:
        result = session.execute(statement, trace=trace, timeout=30)
        return [event.description for event in result.get_query_trace(60).events] if trace else list(result)

    async def run(statement: str, *, trace: bool = False) -> Any:
        return await asyncio.to_thread(execute, statement, trace)

    yield run
    await run(f"DROP KEYSPACE IF EXISTS {KEYSPACE}")
    await asyncio.to_thread(cluster.shutdown)


@pytest.fixture
async def table(cassandra_storage: CassandraStorage, run: Run) -> AsyncIterator[TableSchema]:
    """The table of intents, not made yet."""
    table = IntentLog(cassandra_storage, namespace=KEYSPACE).table
    yield table
    await run(f"DROP TABLE IF EXISTS {table.full_name}")


async def options(run: Run, table: TableSchema) -> dict[str, int]:
    where = f"keyspace_name = '{table.namespace}' AND table_name = '{table.name}'"
    (row,) = await run(f"SELECT {', '.join(SHORT_LIVED)} FROM system_schema.tables WHERE {where}")
    return dict(row._asdict())


async def test_a_table_of_short_lived_rows_forgets_deletions_soon_and_no_other_table_does(
    cassandra_storage: CassandraStorage, run: Run, table: TableSchema
) -> None:
    other = replace(table, name="other", short_lived=False)
    await cassandra_storage.create_table(table)
    await cassandra_storage.create_table(other)

    assert await options(run, table) == SHORT_LIVED
    assert (await options(run, other))["gc_grace_seconds"] == 864_000


async def test_a_table_that_was_made_before_is_altered_when_it_is_created_again(
    cassandra_storage: CassandraStorage, run: Run, table: TableSchema
) -> None:
    await cassandra_storage.create_table(replace(table, short_lived=False))
    await cassandra_storage.create_table(table)

    assert await options(run, table) == SHORT_LIVED


async def test_what_an_operator_has_chosen_stays(
    cassandra_storage: CassandraStorage, run: Run, table: TableSchema
) -> None:
    await cassandra_storage.create_table(table)
    await run(f"ALTER TABLE {table.full_name} WITH gc_grace_seconds = 3600")
    await cassandra_storage.create_table(table)

    assert (await options(run, table))["gc_grace_seconds"] == 3600


async def test_a_read_of_the_intents_meets_the_deletions_of_the_last_while_and_no_older_ones(
    cassandra_storage: CassandraStorage, run: Run, table: TableSchema
) -> None:
    log = IntentLog(cassandra_storage, namespace=KEYSPACE)
    await log.create_tables()
    intents = [Intent(f"tx-{number:04}", "billing", "1", "home", "1", (), (), 0) for number in range(MANY)]
    await log.record(intents)
    await log.remove("billing", [intent.tx_id for intent in intents])

    async def met() -> int:
        said = await run(f"SELECT * FROM {table.full_name} WHERE coordinator = 'billing'", trace=True)
        (counts,) = [re.findall(r"\d+", line) for line in said if re.match(r"Read \d+ live rows", line)]
        assert counts[0] == "0"
        return sum(map(int, counts))

    assert await met() == MANY, "they are young"
    await run(f"ALTER TABLE {table.full_name} WITH gc_grace_seconds = 1")
    async with asyncio.timeout(PATIENT_S):
        while await met():
            pass  # Asking for the trace takes a while, too.
    assert await log.all() == []


async def test_a_scan_of_a_wide_table_reads_so_few_rows_at_a_time_that_their_nulls_are_not_too_many(
    cassandra_storage: CassandraStorage, run: Run, table: TableSchema
) -> None:
    """A page of 2,000 rows would meet 120,000 of them, and the server refuses at 100,000."""
    nulls = {f"c{number}": None for number in range(60)}
    columns = {"place": DataType.INT, "id": DataType.INT, **dict.fromkeys(nulls, DataType.INT)}
    wide = TableSchema(KEYSPACE, "wide", columns, ("place",), ("id",))
    await cassandra_storage.create_table(wide)
    puts = [Put(wide, Key((1,), (number,)), nulls) for number in range(2_000)]
    await asyncio.gather(*(cassandra_storage.mutate(puts[first : first + 100]) for first in range(0, len(puts), 100)))

    rows = await cassandra_storage.scan(Scan(wide, (1,)))

    assert [row["id"] for row in rows] == list(range(2_000))
