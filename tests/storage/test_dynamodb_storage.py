"""The DynamoDB adapter keeps the storage contract on DynamoDB Local, writes what ScalarDB writes, and knows its limits.

Tables are made once and emptied between tests.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from storage_contract import (
    COUNTERS,
    DAYS,
    ELSEWHERE,
    HOSTILE_TEXTS,
    INDEXED,
    NAMES,
    NUMBERS,
    THINGS,
    AdministrationContract,
    StorageContract,
    key,
    row_of,
    rows_of,
)

from infra.storage.dynamodb import DynamoDbStorage
from infra.storage.errors import InvalidOperationError
from infra.storage.operations import (
    Atomicity,
    ColumnCondition,
    IndexScan,
    Key,
    Operator,
    Put,
    Scan,
    ScanAll,
    Value,
)
from infra.storage.port import AdministrableStorage, Storage

if TYPE_CHECKING:
    from infra.servers.dynamodb import LocalDynamoDb

REGION, CREDENTIALS, PREFIX = "local", ("local", "local"), "of_these_tests_"
STANDING = (COUNTERS, ELSEWHERE, THINGS)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def shared(dynamodb: LocalDynamoDb) -> AsyncIterator[DynamoDbStorage]:
    storage = DynamoDbStorage(region=REGION, endpoint=dynamodb.endpoint_url, credentials=CREDENTIALS, prefix=PREFIX)
    for table in STANDING:
        await storage.create_table(table)
    yield storage
    await asyncio.gather(*(storage.drop_table(table) for table in await storage.tables()))
    await storage.close()


class TestDynamoDbStorage(StorageContract):
    @pytest.fixture
    async def storage(self, shared: DynamoDbStorage) -> AsyncIterator[Storage]:
        yield shared
        await asyncio.gather(*(shared.truncate_table(table) for table in await shared.tables()))

    @pytest.fixture(autouse=True)
    async def _tables(self) -> None:
        """They are made once, by `shared`."""

    async def test_a_value_reads_as_it_was_written(self, storage: Storage, column: str, value: Value):
        """A number of DynamoDB's is no larger than 9.99e125 and no smaller than 1e-130; ScalarDB has the same limit."""
        if isinstance(value, float) and value and not 1e-130 < abs(value) < 1e125:
            with pytest.raises(InvalidOperationError, match=column):
                await storage.mutate([Put(THINGS, key(), {column: value})])
            assert await storage.get(THINGS, key()) is None
        else:
            await super().test_a_value_reads_as_it_was_written(storage, column, value)

    test_a_value_reads_as_it_was_written.pytestmark = (  # type: ignore[attr-defined]
        StorageContract.test_a_value_reads_as_it_was_written.pytestmark  # type: ignore[attr-defined]
    )

    async def test_a_comparison_with_null_is_false_and_others_follow_the_types_order(
        self, storage: Storage, operator: Operator, column: str, low: Value, high: Value
    ):
        if column == "double":
            low, high = -9e125, 1e-129  # as far as numbers go here
        await super().test_a_comparison_with_null_is_false_and_others_follow_the_types_order(
            storage, operator, column, low, high
        )

    test_a_comparison_with_null_is_false_and_others_follow_the_types_order.pytestmark = (  # type: ignore[attr-defined]
        StorageContract.test_a_comparison_with_null_is_false_and_others_follow_the_types_order.pytestmark  # type: ignore[attr-defined]
    )

    async def test_hostile_texts_are_data_wherever_they_stand(self, storage: Storage, monkeypatch: pytest.MonkeyPatch):
        """NUL is data, but not in a key: there it is refused, as ScalarDB does, because it ends a TEXT."""
        hostile = [text for text in HOSTILE_TEXTS if "\0" in text]
        for text in hostile:
            with pytest.raises(InvalidOperationError, match="NUL"):
                await storage.mutate([Put(THINGS, key(text), {"note": text})])
            with pytest.raises(InvalidOperationError, match="NUL"):
                await storage.get(COUNTERS, Key((text,)))
            await storage.mutate([Put(THINGS, key(bucket=1), {"note": text})])
            assert await storage.get(THINGS, key(bucket=1)) == row_of(key(bucket=1), note=text)
        monkeypatch.setattr("storage_contract.HOSTILE_TEXTS", [text for text in HOSTILE_TEXTS if "\0" not in text])

        await super().test_hostile_texts_are_data_wherever_they_stand(storage)

    async def test_a_batch_may_hold_hundreds_of_rows(self, storage: Storage):
        """A transaction of DynamoDB's has at most 100 items."""
        batch = [Put(THINGS, key(number=n), {"small": n}) for n in range(101)]

        with pytest.raises(InvalidOperationError, match="101 mutations: dynamodb takes 100"):
            await storage.mutate(batch)
        assert await storage.partitions(THINGS) == []
        await storage.mutate(batch[:100])

        assert len(await storage.scan(Scan(THINGS, (0,)))) == 100

    async def test_a_batch_of_two_atomic_units_is_refused(self, storage: Storage):
        """All of DynamoDB is one unit: rows of several namespaces are written together."""
        assert storage.info.atomicity is Atomicity.STORAGE
        batch = [Put(THINGS, key(), {"small": 1}), Put(ELSEWHERE, key(), {"small": 2}), Put(COUNTERS, Key(("a",)), {})]

        await storage.mutate(batch)

        assert [await storage.get(put.table, put.key) is not None for put in batch] == [True] * 3

    async def test_a_long_scan_returns_every_row_and_stops_at_its_limit(self, storage: Storage):
        """Of more than the megabyte that one answer of DynamoDB's holds."""
        note = "x" * 1_000
        for first in range(0, 1_200, 100):
            batch = [Put(THINGS, key("n", n), {"small": n % 2, "note": note}) for n in range(first, first + 100)]
            await storage.mutate(batch)

        everything = await storage.scan(Scan(THINGS, (0,)))
        odd = await storage.scan(Scan(THINGS, (0,), where=(ColumnCondition("small", Operator.EQ, 1),), limit=500))
        pages = [page async for page in storage.pages(ScanAll(THINGS), 10_000)]

        assert [row["number"] for row in everything] == list(range(1_200))
        assert [row["number"] for row in odd] == list(range(1, 1_000, 2))
        assert [row["number"] for page in pages for row in page] == list(range(1_200))
        assert len(pages) > 1

    async def test_an_index_finds_the_rows_that_hold_the_value(self, storage: Storage):
        """An index of DynamoDB's holds no empty TEXT: it is refused, before anything is sent."""
        await storage.create_table(INDEXED)
        for value in ("", "x" * 2049):
            with pytest.raises(InvalidOperationError, match="colour"):
                await storage.mutate([Put(INDEXED, Key((1,), (1,)), {"colour": value})])
            with pytest.raises(InvalidOperationError, match="colour"):
                await anext(storage.pages(IndexScan(INDEXED, "colour", value)))
        for bucket in range(3):
            colours = {0: "red", 1: "blue", 2: None}
            await storage.mutate(
                [Put(INDEXED, Key((bucket,), (n,)), {"colour": colours[n % 3], "day": DAYS[n]}) for n in range(6)]
            )

        red = await rows_of(storage, IndexScan(INDEXED, "colour", "red"), 2)
        assert sorted((row["id"], row["n"]) for row in red) == [(b, n) for b in range(3) for n in (0, 3)]
        assert len(await rows_of(storage, IndexScan(INDEXED, "day", DAYS[4]))) == 3
        assert await rows_of(storage, IndexScan(INDEXED, "size", 7)) == []
        where = (ColumnCondition("n", Operator.GT, 0),)
        assert len(await rows_of(storage, IndexScan(INDEXED, "colour", "red", where, limit=2), 1)) == 2

    @pytest.fixture
    async def keys(self, storage: Storage) -> list[tuple[str, int]]:
        """As the contract's, without the name that holds NUL: a TEXT key of DynamoDB cannot."""
        clusterings = list(itertools.product((name for name in NAMES if "\0" not in name), NUMBERS))
        await storage.mutate([Put(THINGS, key(*c), {"small": c[1] % 2}) for c in reversed(clusterings)])
        await storage.mutate([Put(THINGS, key("other", bucket=1), {"small": 1})])
        return sorted(clusterings, key=lambda c: (c[0].encode(), c[1]))


class TestAdministrationOfDynamoDb(AdministrationContract):
    @pytest.fixture
    async def storage(self, shared: DynamoDbStorage) -> AdministrableStorage:
        return shared
