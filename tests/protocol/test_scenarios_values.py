"""Values of every type through transactions, tables whose rows run downwards, and transactions that only read.

Scenarios 7, 8, 13 and 23 again, with everything that a column can hold: a before-image that came back changed would be
a roll-back that loses data.
"""

from __future__ import annotations

import datetime
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from protocol_world import ABORTED, ACCOUNT, COMMITTED, World, key, row, whole

from infra.consensus_commit.errors import IllegalOperationError, ValidationConflictError
from infra.consensus_commit.metadata import BEFORE, transactional
from infra.consensus_commit.states import Isolation
from infra.consensus_commit.transaction import Transaction
from infra.storage.operations import (
    Bound,
    ColumnCondition,
    DataType,
    IfExists,
    Key,
    Operator,
    Row,
    Scan,
    TableSchema,
    Value,
)

UTC = datetime.UTC

LOW: dict[DataType, Value] = {
    DataType.BOOLEAN: False,
    DataType.INT: -(2**31),
    DataType.BIGINT: -(2**53),
    DataType.FLOAT: -1.5,
    DataType.DOUBLE: -2.5e-100,
    DataType.TEXT: "",
    DataType.BLOB: b"",
    DataType.DATE: datetime.date(1000, 1, 1),
    DataType.TIME: datetime.time(0, 0),
    DataType.TIMESTAMP: datetime.datetime(1000, 1, 1),
    DataType.TIMESTAMPTZ: datetime.datetime(1000, 1, 1, tzinfo=UTC),
}
HIGH: dict[DataType, Value] = {
    DataType.BOOLEAN: True,
    DataType.INT: 2**31 - 1,
    DataType.BIGINT: 2**53,
    DataType.FLOAT: 16_777_216.0,
    DataType.DOUBLE: 1.7976931348623e100,
    DataType.TEXT: "straße\u0000 日本 \U0001f600 'quoted'",
    DataType.BLOB: bytes(range(256)),
    DataType.DATE: datetime.date(9999, 12, 31),
    DataType.TIME: datetime.time(23, 59, 59, 999_999),
    DataType.TIMESTAMP: datetime.datetime(9999, 12, 31, 23, 59, 59, 999_000),
    DataType.TIMESTAMPTZ: datetime.datetime(9999, 12, 31, 23, 59, 59, 999_000, tzinfo=UTC),
}
COMMON: dict[DataType, Value] = {
    DataType.BOOLEAN: True,
    DataType.INT: 0,
    DataType.BIGINT: 1_700_000_000_123,
    DataType.FLOAT: 0.1 + 2**-5 - 0.1,
    DataType.DOUBLE: 3.141592653589793,
    DataType.TEXT: "common",
    DataType.BLOB: b"\x00",
    DataType.DATE: datetime.date(1969, 12, 31),
    DataType.TIME: datetime.time(12, 30, 15, 1),
    DataType.TIMESTAMP: datetime.datetime(1969, 12, 31, 23, 59, 59, 999_000),
    DataType.TIMESTAMPTZ: datetime.datetime(2026, 2, 28, 1, 2, 3, 4_000, tzinfo=UTC),
}
NULLS: dict[DataType, Value] = dict.fromkeys(DataType)
IMAGES = {"low": LOW, "high": HIGH, "common": COMMON, "null": NULLS}
IMAGES_IN_PAIRS = [("low", "high"), ("high", "null"), ("null", "common"), ("common", "low")]


@pytest.fixture
async def everything(world: World) -> TableSchema:
    """A table with a column of each type that the storage has."""
    types = world.plain_storage.info_of("bank").data_types
    columns = {"id": DataType.INT} | {f"a_{kind.lower()}": kind for kind in DataType if kind in types}
    table = TableSchema("bank", "everything", columns, ("id",))
    await world.manager.create_table(table)
    return table


def image(table: TableSchema, name: str) -> Row:
    """The values of one image, by the names of the columns."""
    return {column: IMAGES[name][kind] for column, kind in table.columns.items() if column != "id"}


ONE = Key((1,))


async def read(world: World, table: TableSchema) -> Row | None:
    found = await world.begin(Isolation.SNAPSHOT).get(table, ONE)
    await world.settled()
    return found


def is_exactly(found: Row | None, expected: Row) -> bool:
    """Equal, and of the same types: True is not 1 here, nor 1.0."""
    return found == expected and [type(value) for value in found.values()] == [
        type(value) for value in expected.values()
    ]


each_pair = pytest.mark.parametrize(("before", "after"), IMAGES_IN_PAIRS)


@each_pair
async def test_scenario_08_a_roll_back_restores_values_of_every_type_exactly(
    world: World, everything: TableSchema, before: str, after: str
) -> None:
    await world.commits(lambda other: other.insert(everything, ONE, image(everything, before)))
    stored = await world.plain_storage.get(transactional(everything), ONE)
    await world.orphan(lambda dead: dead.update(everything, ONE, image(everything, after)), ABORTED)
    in_doubt = await world.plain_storage.get(transactional(everything), ONE)
    assert in_doubt is not None
    assert {name: in_doubt[BEFORE + name] for name in image(everything, before)} == image(everything, before)

    assert is_exactly(await read(world, everything), {"id": 1, **image(everything, before)})
    assert await world.plain_storage.get(transactional(everything), ONE) == stored


@each_pair
async def test_scenario_07_a_roll_forward_keeps_values_of_every_type_exactly(
    world: World, everything: TableSchema, before: str, after: str
) -> None:
    await world.commits(lambda other: other.insert(everything, ONE, image(everything, before)))
    await world.orphan(lambda dead: dead.update(everything, ONE, image(everything, after)), COMMITTED)

    for _ in range(2):  # In doubt, and at rest.
        assert is_exactly(await read(world, everything), {"id": 1, **image(everything, after)})
    stored = await world.plain_storage.get(transactional(everything), ONE)
    assert stored is not None
    assert all(value is None for name, value in stored.items() if name.startswith(BEFORE))


@pytest.mark.parametrize("before", list(IMAGES))
async def test_scenario_13_a_deletion_that_is_rolled_back_restores_values_of_every_type_exactly(
    world: World, everything: TableSchema, before: str
) -> None:
    await world.commits(lambda other: other.insert(everything, ONE, image(everything, before)))
    stored = await world.plain_storage.get(transactional(everything), ONE)
    await world.orphan(lambda dead: dead.delete(everything, ONE), ABORTED)

    assert is_exactly(await read(world, everything), {"id": 1, **image(everything, before)})
    assert await world.plain_storage.get(transactional(everything), ONE) == stored


@each_pair
@pytest.mark.parametrize("one_phase_commit", [False, True])
async def test_scenario_23_values_of_every_type_are_written_and_read_in_one_transaction_and_the_next(
    world: World, everything: TableSchema, one_phase_commit: bool, before: str, after: str
) -> None:
    process = world.process(one_phase_commit=one_phase_commit)
    for name in (before, after):
        transaction = process.begin()
        await transaction.upsert(everything, ONE, image(everything, name))
        assert is_exactly(await transaction.get(everything, ONE), {"id": 1, **image(everything, name)})
        await transaction.commit()
        assert is_exactly(await read(world, everything), {"id": 1, **image(everything, name)})


async def test_scenario_28_conditions_compare_values_of_every_type(world: World, everything: TableSchema) -> None:
    await world.commits(lambda other: other.insert(everything, ONE, image(everything, "common")))
    transaction = world.begin()
    for column, value in image(everything, "common").items():
        equal = [ColumnCondition(column, Operator.EQ, value)]
        assert await transaction.get(everything, ONE, equal) is not None
        assert await transaction.get(everything, ONE, [ColumnCondition(column, Operator.NE, value)]) is None
        low, high = (IMAGES[name][everything.columns[column]] for name in ("low", "high"))
        between = [ColumnCondition(column, Operator.GE, low), ColumnCondition(column, Operator.LE, high)]
        assert await transaction.get(everything, ONE, between) is not None, column
        await transaction.update(everything, ONE, {column: value}, equal)
    await transaction.commit()


# -- rows that run downwards


LEDGER = TableSchema(
    "bank",
    "ledger",
    {"account": DataType.INT, "day": DataType.INT, "amount": DataType.INT},
    partition_key=("account",),
    clustering_key=("day",),
    descending=frozenset({"day"}),
)
DIARY = TableSchema(
    "bank",
    "diary",
    {"account": DataType.INT, "month": DataType.INT, "day": DataType.INT, "amount": DataType.INT},
    partition_key=("account",),
    clustering_key=("month", "day"),
    descending=frozenset({"day"}),
)


@pytest.fixture
async def ledger(world: World) -> TableSchema:
    await world.manager.create_table(LEDGER)
    return LEDGER


@pytest.fixture
async def diary(world: World) -> TableSchema:
    await world.manager.create_table(DIARY)
    return DIARY


async def enter(world: World, *days: int) -> None:
    async def work(transaction: Transaction) -> None:
        for day in days:
            await transaction.insert(LEDGER, Key((1,), (day,)), {"amount": day * 10})

    await world.commits(work)


def positive(amount: int) -> tuple[ColumnCondition, ...]:
    return (ColumnCondition("amount", Operator.GE, amount),)


DOWNWARDS: dict[str, tuple[Scan, list[int]]] = {
    "whole": (Scan(LEDGER, (1,)), [5, 4, 3, 2, 1]),
    "reversed": (Scan(LEDGER, (1,), reverse=True), [1, 2, 3, 4, 5]),
    "limited": (Scan(LEDGER, (1,), limit=2), [5, 4]),
    "reversed and limited": (Scan(LEDGER, (1,), limit=2, reverse=True), [1, 2]),
    "from a value on": (Scan(LEDGER, (1,), Bound((3,))), [5, 4, 3]),
    "below a value": (Scan(LEDGER, (1,), end=Bound((3,), inclusive=False), limit=1), [2]),
    "conditional and limited": (Scan(LEDGER, (1,), where=positive(20), limit=3), [5, 4, 3]),
}


@pytest.mark.parametrize(("scan", "days"), DOWNWARDS.values(), ids=DOWNWARDS.keys())
async def test_scenario_05_a_table_that_runs_downwards_is_scanned_downwards(
    world: World, ledger: TableSchema, scan: Scan, days: list[int]
) -> None:
    await enter(world, 1, 2, 3, 4, 5)
    transaction = world.begin()

    assert [record["day"] for record in await transaction.scan(scan)] == days
    async with world.process().begin().scanner(scan) as scanner:
        assert [record["day"] async for record in scanner] == days
    await transaction.commit()


@pytest.mark.parametrize("reverse", [False, True])
async def test_scenario_05_a_limit_on_a_table_that_runs_downwards_counts_records_that_are_there(
    world: World, ledger: TableSchema, reverse: bool
) -> None:
    """Further pages follow in the direction of the scan."""
    await enter(world, 2, 4)
    for day in (1, 3, 5):
        await world.orphan(lambda dead, day=day: dead.insert(LEDGER, Key((1,), (day,)), {"amount": 0}))
    world.expire()

    found = await world.begin().scan(Scan(LEDGER, (1,), limit=2, reverse=reverse))

    assert [record["day"] for record in found] == ([2, 4] if reverse else [4, 2])


@pytest.mark.parametrize(("phantom", "refused"), [(5, True), (3, True), (1, False)])
async def test_scenario_45_a_phantom_is_inside_the_limit_if_it_comes_before_its_end(
    world: World, ledger: TableSchema, phantom: int, refused: bool
) -> None:
    await enter(world, 2, 4)
    transaction = world.begin()
    await transaction.scan(Scan(LEDGER, (1,), limit=2))
    await transaction.insert(ACCOUNT, key(1), {"balance": 1})
    await enter(world, phantom)

    if refused:
        with pytest.raises(ValidationConflictError):
            await transaction.commit()
    else:
        await transaction.commit()


@pytest.mark.parametrize("day", [2, 4])
async def test_scenario_37_a_range_covers_an_own_put_by_its_value_though_rows_run_downwards(
    world: World, ledger: TableSchema, day: int
) -> None:
    transaction = world.begin()
    await transaction.put(LEDGER, Key((1,), (day,)), {"amount": 1})

    beside = Scan(LEDGER, (1,), Bound((3,))) if day == 2 else Scan(LEDGER, (1,), end=Bound((3,)))
    across = Scan(LEDGER, (1,), end=Bound((3,))) if day == 2 else Scan(LEDGER, (1,), Bound((3,)))
    assert await transaction.scan(beside) == []
    with pytest.raises(IllegalOperationError, match="written"):
        await transaction.scan(across)


@pytest.mark.parametrize("reverse", [False, True])
async def test_scenario_05_a_table_that_runs_both_ways_keeps_its_order_under_a_limit(
    world: World, diary: TableSchema, reverse: bool
) -> None:
    async def work(transaction: Transaction) -> None:
        for month in (1, 2):
            for day in (1, 2, 3):
                await transaction.insert(DIARY, Key((1,), (month, day)), {"amount": 1})

    await world.commits(work)
    await world.orphan(lambda dead: dead.insert(DIARY, Key((1,), (1, 4)), {"amount": 0}), ABORTED)
    await world.orphan(lambda dead: dead.insert(DIARY, Key((1,), (2, 0)), {"amount": 0}), ABORTED)
    order = [(1, 3), (1, 2), (1, 1), (2, 3), (2, 2), (2, 1)]

    transaction = world.begin()
    found = await transaction.scan(Scan(DIARY, (1,), limit=4, reverse=reverse))
    await transaction.commit()

    assert [(record["month"], record["day"]) for record in found] == (order[::-1] if reverse else order)[:4]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("table", [ACCOUNT, LEDGER], ids=["upwards", "downwards"])
async def test_a_scanner_goes_on_from_page_to_page(world: World, table: TableSchema, reverse: bool) -> None:
    await world.manager.create_table(LEDGER)
    value, (clustering,) = "balance" if table is ACCOUNT else "amount", table.clustering_key

    async def work(transaction: Transaction) -> None:
        for number in range(600):
            await transaction.insert(table, Key((1,), (number,)), {value: number % 3})

    await world.commits(work)
    upwards = reverse if table is LEDGER else not reverse
    transaction = world.begin()
    async with transaction.scanner(Scan(table, (1,), reverse=reverse)) as scanner:
        seen = [record[clustering] async for record in scanner]
    every_third = Scan(table, (1,), where=(ColumnCondition(value, Operator.EQ, 0),), limit=190, reverse=reverse)
    chosen = [record[clustering] for record in await transaction.scan(every_third)]
    await transaction.commit()

    assert seen == sorted(range(600), reverse=not upwards)
    assert chosen == [number for number in seen if number % 3 == 0][:190]


# -- only reading


WRITES: dict[str, Callable[[Any], Awaitable[object]]] = {
    "insert": lambda transaction: transaction.insert(ACCOUNT, key(2), {"balance": 1}),
    "upsert": lambda transaction: transaction.upsert(ACCOUNT, key(1), {"balance": 1}),
    "update": lambda transaction: transaction.update(ACCOUNT, key(1), {"balance": 1}),
    "conditional update": lambda transaction: transaction.update(ACCOUNT, key(1), {"balance": 1}, []),
    "delete": lambda transaction: transaction.delete(ACCOUNT, key(1)),
    "put": lambda transaction: transaction.put(ACCOUNT, key(1), {"balance": 1}),
    "conditional put": lambda transaction: transaction.put(ACCOUNT, key(1), {"balance": 1}, IfExists()),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
async def test_scenario_54_a_transaction_that_only_reads_refuses_to_write_and_goes_on(
    world: World, write: Callable[[Any], Awaitable[object]]
) -> None:
    await world.given({1: 10})
    transaction = world.manager.begin(read_only=True)

    with pytest.raises(IllegalOperationError, match="read-only"):
        await write(transaction)

    assert await transaction.scan(whole()) == [row(1, 10)]
    await transaction.commit()
    assert await world.balances() == {("account", 1, 1): 10}
    assert await world.state_rows() == {}


async def test_scenario_54_a_serializable_transaction_that_only_reads_is_validated(world: World) -> None:
    await world.given({1: 10})
    transaction = world.manager.begin(read_only=True)
    await transaction.scan(whole())
    await world.given({2: 20})

    with pytest.raises(ValidationConflictError):
        await transaction.commit()


async def test_scenario_54_a_transaction_that_only_reads_recovers_what_it_meets(world: World) -> None:
    """Except under READ_COMMITTED (scenario 19): there is no other way to its answer."""
    await world.given({1: 10})
    await world.orphan(lambda dead: dead.update(ACCOUNT, key(1), {"balance": 11}), ABORTED)
    transaction = world.manager.begin(read_only=True)

    assert await transaction.get(ACCOUNT, key(1)) == row(1, 10)
    await transaction.commit()

    await world.settled()
    assert await world.in_doubt() == 0
