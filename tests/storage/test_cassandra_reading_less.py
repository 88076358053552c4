"""A read that was too much is made again of less, and brings every row once: against a server that is a list."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from infra.storage.cassandra import FIRST_TOKEN, LAST_TOKEN, CassandraStorage, _Table
from infra.storage.cassandra_session import Page
from infra.storage.cassandra_statements import Statement, TableStatements
from infra.storage.errors import TooMuchToReadError, UnusableStorageError
from infra.storage.operations import DataType, ScanAll, TableSchema
from infra.storage.validation import TableRules

REFUSED_AT = 20
TABLE = TableSchema("shop", "things", {"place": DataType.INT, "id": DataType.INT}, ("place",), ("id",))
LONE = TableSchema("shop", "lone", {"id": DataType.INT, "value": DataType.INT}, ("id",))


def token(place: int) -> int:
    """Spread over the ring, and the same for the same place."""
    return (place * 0x9E3779B97F4A7C15) % (2**64 - 1) + FIRST_TOKEN + 1


@dataclass
class Server:
    """What was written: (place, id) and whether it still lives. Refuses a page that passes over too much."""

    cells: list[tuple[int, int, bool]]
    requests: int = 0
    descends: bool = False

    async def read(
        self, statement: Statement, what: str, *, consistency: int, page_size: int, page: bytes | None = None
    ) -> Page:
        self.requests += 1
        sign = -1 if self.descends else 1
        cells = sorted(
            ((token(place), place, id, lives) for place, id, lives in self.cells),
            key=lambda cell: (cell[0], sign * cell[2]),
        )
        if "token(" in statement.cql:
            after, upto = statement.parameters
            cells = [cell for cell in cells if after < cell[0] <= upto]
        else:
            place, id = statement.parameters
            cells = [cell for cell in cells if cell[1] == place and sign * cell[2] > sign * id]
            assert (") < (?)" if self.descends else ") > (?)") in statement.cql
        distinct = "DISTINCT" in statement.cql
        first = int(page or b"0")
        rows: list[Any] = []
        seen: set[int] = {place for _, place, _, lives in cells[:first] if lives} if distinct else set()
        deleted = 0
        for number in range(first, len(cells)):
            where, place, id, lives = cells[number]
            if distinct and place in seen:
                continue  # The server goes on with the next partition.
            if not lives:
                deleted += 1
                if deleted > REFUSED_AT:
                    raise TooMuchToReadError(what)
                continue
            if len(rows) == page_size:
                return Page(rows, str(number).encode(), ())
            seen.add(place)
            row = (place,) if distinct else (place, id)
            rows.append((*row, where) if "token(" in statement.cql else row)
        return Page(rows, None, ())


def storage_on(server: Server, table: TableSchema = TABLE) -> CassandraStorage:
    storage = CassandraStorage(["nowhere"])
    storage._session = server  # type: ignore[assignment]
    storage._tables[table] = _Table(table, TableRules(table), TableStatements(table))
    return storage


async def all_rows(server: Server, page_size: int = 8) -> list[tuple[Any, Any]]:
    pages = storage_on(server).pages(ScanAll(TABLE), page_size)
    return [(row["place"], row["id"]) async for page in pages for row in page]


def living(server: Server) -> list[tuple[int, int]]:
    return sorted((place, id) for place, id, lives in server.cells if lives)


PARTITIONS = st.lists(st.lists(st.booleans(), max_size=REFUSED_AT + 5), max_size=30)


@settings(max_examples=60, deadline=None)
@given(partitions=PARTITIONS, page_size=st.sampled_from([1, 3, 8, 1000]))
def test_every_row_comes_once_unless_one_partition_is_too_much(partitions: list[list[bool]], page_size: int) -> None:
    server = Server([(place, id, lives) for place, each in enumerate(partitions) for id, lives in enumerate(each)])
    assume(all(each.count(False) <= REFUSED_AT for each in partitions))
    assert sorted(asyncio.run(all_rows(server, page_size))) == living(server)
    found = asyncio.run(storage_on(server).partitions(TABLE))
    assert sorted(found, key=repr) == sorted({(place,) for place, _ in living(server)}, key=repr)


async def test_a_table_without_many_deletions_takes_as_many_requests_as_pages() -> None:
    server = Server([(place, 0, True) for place in range(20)])
    assert sorted(await all_rows(server, 8)) == living(server)
    assert server.requests == 3


async def test_deletions_everywhere_take_a_request_for_every_few_of_them() -> None:
    server = Server([(place, id, False) for place in range(500) for id in range(10)])
    assert await all_rows(server) == []
    assert server.requests < 3 * 500


async def test_what_is_deleted_in_a_row_in_one_partition_is_told() -> None:
    server = Server([(place, id, place != 3) for place in range(5) for id in range(REFUSED_AT + 1)])
    with pytest.raises(TooMuchToReadError):
        await all_rows(server)


async def test_after_the_last_row_of_a_partition_the_next_one_follows() -> None:
    """What was too much begins in the midst of a partition, and goes on in many others."""
    cells = [(0, 0, True), (0, 1, True), *((0, id, False) for id in range(2, 15)), (0, 15, True)]
    server = Server([*cells, *((place, id, False) for place in range(1, 40) for id in range(10)), (41, 0, True)])
    assert sorted(await all_rows(server)) == living(server)


async def test_rows_that_descend_are_gone_on_with_too() -> None:
    down = replace(TABLE, descending=frozenset({"id"}))
    cells = [(0, 99, True), *((0, 98 - id, False) for id in range(15)), (0, 1, True)]
    server = Server([*cells, *((place, id, False) for place in range(1, 40) for id in range(10))], descends=True)
    storage = storage_on(server, down)
    found = [(row["place"], row["id"]) async for page in storage.pages(ScanAll(down)) for row in page]
    assert found == [(0, 99), (0, 1)]


async def test_the_whole_ring_is_read() -> None:
    assert (FIRST_TOKEN, LAST_TOKEN) == (-(2**63), 2**63 - 1)
    statement = TableStatements(LONE).ring_rows(FIRST_TOKEN, LAST_TOKEN)
    assert statement.cql == (
        'SELECT "id", "value", token("id") FROM "shop"."lone" WHERE token("id") > ? AND token("id") <= ?'
    )
    assert TableStatements(TABLE).ring_partitions(1, 2) == Statement(
        'SELECT DISTINCT "place", token("place") FROM "shop"."things" WHERE token("place") > ? AND token("place") <= ?',
        (1, 2),
    )


@pytest.mark.parametrize("name", ["RandomPartitioner", "ByteOrderedPartitioner"])
def test_a_cluster_with_tokens_of_another_kind_is_refused(name: str) -> None:
    metadata = SimpleNamespace(partitioner=f"org.apache.cassandra.dht.{name}")
    with pytest.raises(UnusableStorageError, match=name) as refused:
        CassandraStorage(["nowhere"])._session._check_partitioner(SimpleNamespace(metadata=metadata))
    assert "Murmur3Partitioner" in refused.value.remedy
