"""What every storage adapter must do: the sentences of the port, each as a test.

An adapter's test file inherits `StorageContract` and says how to make the storage. Where an adapter cannot keep a
sentence it overrides that test and says why. Where tables are slow to make, an adapter overrides `_tables` to make
them once, and leaves them empty after each test: THINGS, COUNTERS and ELSEWHERE are always there, tables of the
namespace MORE are made by the tests that need them (creating one again does nothing).
"""

from __future__ import annotations

import asyncio
import datetime
import itertools
import math
import struct
from collections.abc import AsyncIterator
from dataclasses import replace
from enum import IntEnum, StrEnum

import pytest

from infra.storage.errors import InvalidOperationError, NoMutationError
from infra.storage.operations import (
    Atomicity,
    Bound,
    ColumnCondition,
    DataType,
    Delete,
    If,
    IfExists,
    IfNotExists,
    IndexScan,
    Key,
    Operator,
    Put,
    Row,
    Scan,
    ScanAll,
    Selection,
    TableSchema,
    Value,
)
from infra.storage.port import AdministrableStorage, Storage

T = DataType

# A server that is shared with others has their namespaces, too.
SHOP = "contract_shop"
DEPOT = "contract_depot"
MORE = "contract_more"

THINGS = TableSchema(
    namespace=SHOP,
    name="things",
    columns={
        "bucket": T.INT,
        "name": T.TEXT,
        "number": T.BIGINT,
        "flag": T.BOOLEAN,
        "small": T.INT,
        "big": T.BIGINT,
        "single": T.FLOAT,
        "double": T.DOUBLE,
        "note": T.TEXT,
        "raw": T.BLOB,
        "day": T.DATE,
        "clock": T.TIME,
        "instant": T.TIMESTAMPTZ,
    },
    partition_key=("bucket",),
    clustering_key=("name", "number"),
)

COUNTERS = TableSchema(SHOP, "counters", {"id": T.TEXT, "value": T.BIGINT}, ("id",))

ELSEWHERE = replace(THINGS, namespace=DEPOT)

# One of each kind of clustering order besides the usual one: descending first, descending last, all descending.
ORDERED = [
    TableSchema(
        MORE, f"ordered{n}", {"id": T.INT, "a": T.TEXT, "b": T.INT, "v": T.INT}, ("id",), ("a", "b"), descending
    )
    for n, descending in enumerate((frozenset("a"), frozenset("b"), frozenset("ab")))
]

INDEXED = TableSchema(
    MORE,
    "indexed",
    {"id": T.INT, "n": T.INT, "colour": T.TEXT, "size": T.BIGINT, "day": T.DATE, "note": T.TEXT},
    ("id",),
    ("n",),
    indexes=frozenset({"colour", "size", "day"}),
)

CALENDAR = TableSchema(
    MORE,
    "calendar",
    {"day": T.DATE, "clock": T.TIME, "instant": T.TIMESTAMPTZ, "of": T.DATE, "at": T.TIME, "v": T.INT},
    ("day", "clock"),
    ("instant", "of", "at"),
)

UTC = datetime.UTC

NULLS = dict.fromkeys(("flag", "small", "big", "single", "double", "note", "raw", "day", "clock", "instant"))

HOSTILE_TEXTS = [
    "'; DROP TABLE things; --",
    '"; DROP TABLE things; --',
    "$$",
    "don\u2019t",
    "a\0b",
    "\0",
    "%_?:1",
    "\\",
]

# Rows whose keys try the order of each type: negative numbers, case, and a character that UTF-16 would misplace.
NAMES = ["", "A", "a", "a\0", "ab", "\u00e9", "\uffff", "\U0001f600"]
NUMBERS = [-(2**53), -1, 0, 7, 2**53]


DAYS = [
    datetime.date(1000, 1, 1),
    datetime.date(1582, 10, 10),  # the calendar of Java's old dates leaves it out
    datetime.date(1969, 12, 31),
    datetime.date(1970, 1, 1),
    datetime.date(2024, 2, 29),
    datetime.date(9999, 12, 31),
]
TIMES = [
    datetime.time(0),
    datetime.time(0, 0, 0, 1),
    datetime.time(12, 34, 56, 789012),
    datetime.time(23, 59, 59, 999999),
]
LOCAL_INSTANTS = [
    datetime.datetime(1000, 1, 1),
    datetime.datetime(1969, 12, 31, 23, 59, 59, 999_000),
    datetime.datetime(1970, 1, 1),
    datetime.datetime(2024, 2, 29, 12, 34, 56, 7_000),
    datetime.datetime(9999, 12, 31, 23, 59, 59, 999_000),
]
INSTANTS = [instant.replace(tzinfo=UTC) for instant in LOCAL_INSTANTS]
NO_INSTANTS = [
    "2024-02-29T00:00:00Z",
    0,
    datetime.date(2024, 2, 29),
    datetime.datetime(2024, 2, 29),
    datetime.datetime(2024, 2, 29, tzinfo=datetime.timezone(datetime.timedelta(hours=9))),
    datetime.datetime(2024, 2, 29, 0, 0, 0, 1, tzinfo=UTC),
    datetime.datetime(999, 12, 31, tzinfo=UTC),
]


# operator: does it hold for (held, asked)? For every pair of the columns' low and high values and NULL.
TRUTH = {
    Operator.EQ: {("low", "low"), ("high", "high")},
    Operator.NE: {("low", "high"), ("high", "low")},
    Operator.LT: {("low", "high")},
    Operator.LE: {("low", "low"), ("low", "high"), ("high", "high")},
    Operator.GT: {("high", "low")},
    Operator.GE: {("low", "low"), ("high", "low"), ("high", "high")},
    Operator.IS_NULL: {("null", "null"), ("null", "low"), ("null", "high")},
    Operator.IS_NOT_NULL: {(held, asked) for held in ("low", "high") for asked in ("null", "low", "high")},
}


def key(name: str = "n", number: int = 0, *, bucket: int = 0) -> Key:
    return Key((bucket,), (name, number))


def row_of(where: Key, **columns: Value) -> Row:
    return {
        "bucket": where.partition[0],
        "name": where.clustering[0],
        "number": where.clustering[1],
        **NULLS,
        **columns,
    }


def condition(column: str, operator: Operator, value: Value = None) -> If:
    return If((ColumnCondition(column, operator, value),))


def counter_is(value: int) -> If:
    return condition("value", Operator.EQ, value)


async def tables_of(storage: Storage) -> list[TableSchema]:
    """The tables that are always there."""
    return [table for table in await storage.tables() if table.namespace.lower() in (SHOP, DEPOT)]


async def rows_of(storage: Storage, selection: Selection, page_size: int = 256) -> list[Row]:
    """The rows of all pages; no page is empty."""
    if isinstance(selection, Scan):
        return await storage.scan(selection)
    pages = [page async for page in storage.pages(selection, page_size)]
    assert all(pages)
    return [row for page in pages for row in page]


class StorageContract:
    @pytest.fixture
    async def storage(self) -> Storage:
        """The adapter under test, empty."""
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    async def _tables(self, storage: Storage) -> None:
        await storage.create_table(THINGS)
        await storage.create_table(COUNTERS)
        await storage.create_table(ELSEWHERE)

    # Tables

    async def test_tables_are_listed_with_their_columns_and_keys_in_order_of_their_names(self, storage: Storage):
        assert await tables_of(storage) == [ELSEWHERE, COUNTERS, THINGS]

    async def test_tables_are_listed_with_their_columns_in_order(self, storage: Storage):
        listed = await tables_of(storage)

        assert [list(table.columns) for table in listed] == [list(t.columns) for t in (ELSEWHERE, COUNTERS, THINGS)]

    async def test_creating_a_table_again_keeps_its_rows(self, storage: Storage):
        await storage.mutate([Put(COUNTERS, Key(("a",)), {"value": 1})])

        await storage.create_table(replace(COUNTERS, columns=dict(COUNTERS.columns)))

        assert await storage.get(COUNTERS, Key(("a",))) == {"id": "a", "value": 1}

    @pytest.mark.parametrize(
        "other",
        [
            replace(COUNTERS, columns={**COUNTERS.columns, "more": T.INT}),
            replace(COUNTERS, columns={"id": T.TEXT, "value": T.INT}),
            replace(COUNTERS, columns={"id": T.TEXT}),
            replace(COUNTERS, clustering_key=("value",)),
        ],
        ids=["another column", "another type", "a column less", "another key"],
    )
    async def test_a_table_that_exists_with_other_columns_or_keys_is_refused(
        self, storage: Storage, other: TableSchema
    ):
        with pytest.raises(InvalidOperationError, match="exists otherwise"):
            await storage.create_table(other)
        with pytest.raises(InvalidOperationError, match="exists otherwise"):
            await storage.get(other, Key(("a",), (1,) * len(other.clustering_key)))

        assert COUNTERS in await tables_of(storage)

    @pytest.mark.parametrize(
        "name", [*HOSTILE_TEXTS, "", "1a", "a b", "a.b", "../up", "\u00e9", "a\n", "sqlite_x", "x" * 49]
    )
    async def test_a_name_that_is_no_identifier_is_refused_everywhere(self, storage: Storage, name: str):
        for table in (replace(COUNTERS, namespace=name), replace(COUNTERS, name=name)):
            with pytest.raises(InvalidOperationError):
                await storage.create_table(table)
            with pytest.raises(InvalidOperationError):
                await storage.get(table, Key(("a",)))
        with pytest.raises(InvalidOperationError):
            await storage.mutate([Put(COUNTERS, Key(("a",)), {name: 1})])

        assert len(await tables_of(storage)) == 3

    @pytest.mark.parametrize("name", HOSTILE_TEXTS)
    async def test_a_column_that_is_no_identifier_is_refused_everywhere(self, storage: Storage, name: str):
        with pytest.raises(InvalidOperationError):
            await storage.create_table(TableSchema(SHOP, "fresh", {"id": T.TEXT, name: T.TEXT}, ("id",)))
        with pytest.raises(InvalidOperationError):
            await storage.mutate([Put(COUNTERS, Key(("a",)), {}, condition(name, Operator.EQ, 1))])
        with pytest.raises(InvalidOperationError):
            await storage.scan(Scan(COUNTERS, ("a",), where=(ColumnCondition(name, Operator.EQ, 1),)))

        assert len(await tables_of(storage)) == 3

    @pytest.mark.parametrize(
        "table",
        [
            replace(COUNTERS, name="Counters"),
            replace(COUNTERS, namespace=SHOP.upper(), name="other"),
            TableSchema(SHOP, "fresh", {"id": T.TEXT, "ID": T.TEXT}, ("id",)),
        ],
        ids=["table", "namespace", "column"],
    )
    async def test_names_that_differ_only_by_case_are_refused(self, storage: Storage, table: TableSchema):
        with pytest.raises(InvalidOperationError, match="only by case"):
            await storage.create_table(table)

    @pytest.mark.parametrize(
        "table",
        [
            TableSchema(SHOP, "fresh", {"id": T.TEXT}, ()),
            TableSchema(SHOP, "fresh", {"id": T.TEXT}, ("other",)),
            TableSchema(SHOP, "fresh", {"id": T.TEXT}, ("id",), ("id",)),
            TableSchema(SHOP, "fresh", {"id": T.DOUBLE}, ("id",)),
            TableSchema(SHOP, "fresh", {"id": T.TEXT, "at": T.FLOAT}, ("id",), ("at",)),
            TableSchema(SHOP, "fresh", {"id": "TEXT) --"}, ("id",)),  # type: ignore[dict-item]
        ],
        ids=["no key", "key is no column", "key column twice", "DOUBLE key", "FLOAT key", "no type"],
    )
    async def test_a_table_that_no_storage_could_hold_is_refused(self, storage: Storage, table: TableSchema):
        with pytest.raises(InvalidOperationError):
            await storage.create_table(table)

    @pytest.mark.parametrize("table", [replace(COUNTERS, name="absent"), replace(COUNTERS, namespace="absent")])
    async def test_a_table_that_was_not_created_is_refused(self, storage: Storage, table: TableSchema):
        where = Key(("a",))
        for call in (
            storage.get(table, where),
            storage.scan(Scan(table, ("a",))),
            storage.partitions(table),
            storage.mutate([Put(table, where, {"value": 1})]),
        ):
            with pytest.raises(InvalidOperationError, match="no table"):
                await call

        assert len(await tables_of(storage)) == 3

    # Single rows

    async def test_an_absent_row_reads_as_none(self, storage: Storage):
        assert await storage.get(THINGS, key()) is None
        assert await storage.scan(Scan(THINGS, (0,))) == []

    async def test_columns_that_were_never_written_read_as_none(self, storage: Storage):
        await storage.mutate([Put(THINGS, key(), {"note": "x"})])

        assert await storage.get(THINGS, key()) == row_of(key(), note="x")
        assert list(await storage.get(THINGS, key()) or {}) == list(THINGS.columns)

    async def test_a_put_without_columns_makes_a_row_of_its_key(self, storage: Storage):
        await storage.mutate([Put(THINGS, key(), {})])
        await storage.mutate([Put(THINGS, key(), {})])

        assert await storage.get(THINGS, key()) == row_of(key())

    async def test_an_upsert_keeps_the_columns_it_does_not_name(self, storage: Storage):
        await storage.mutate([Put(THINGS, key(), {"note": "x", "small": 1})])
        await storage.mutate([Put(THINGS, key(), {"small": 2, "big": 3})])
        await storage.mutate([Put(THINGS, key(), {"note": None})])

        assert await storage.get(THINGS, key()) == row_of(key(), small=2, big=3)

    async def test_a_deleted_row_is_gone_with_all_its_columns(self, storage: Storage):
        await storage.mutate([Put(THINGS, key(), {"note": "x"})])
        await storage.mutate([Delete(THINGS, key())])
        assert await storage.get(THINGS, key()) is None
        assert await storage.partitions(THINGS) == []

        await storage.mutate([Put(THINGS, key(), {"small": 1})])

        assert await storage.get(THINGS, key()) == row_of(key(), small=1)

    async def test_deleting_an_absent_row_does_nothing(self, storage: Storage):
        await storage.mutate([Delete(THINGS, key())])

        assert await storage.partitions(THINGS) == []

    async def test_rows_given_and_taken_are_the_callers_own(self, storage: Storage):
        columns = {"note": "x"}
        await storage.mutate([Put(THINGS, key(), columns)])
        columns["note"] = "changed"
        for rows in ([await storage.get(THINGS, key())], await storage.scan(Scan(THINGS, (0,)))):
            assert rows[0] is not None
            rows[0]["note"] = "changed"

        assert await storage.get(THINGS, key()) == row_of(key(), note="x")

    # Values

    @pytest.mark.parametrize(
        ("column", "value"),
        [
            *itertools.product(["flag"], [True, False]),
            *itertools.product(["small"], [0, -1, -(2**31), 2**31 - 1]),
            *itertools.product(["big"], [0, -1, -(2**53), 2**53]),
            *itertools.product(["single"], [0.0, -1.5, 3.0, struct.unpack("f", b"\xff\xff\x7f\x7f")[0], math.inf]),
            *itertools.product(["double"], [0.0, 3.0, 0.1, 5e-324, 1.7976931348623157e308, 2.0**53 + 2, -math.inf]),
            *itertools.product(["note"], ["", "plain", "\u00e9\uffff\U0001f600", "x" * 100_000, *HOSTILE_TEXTS]),
            *itertools.product(["raw"], [b"", b"\0", bytes(range(256)), b"'; DROP", b"x" * 100_000]),
            *itertools.product(["day"], DAYS),
            *itertools.product(["clock"], TIMES),
            *itertools.product(["instant"], INSTANTS),
        ],
        ids=lambda value: repr(value)[:60],
    )
    async def test_a_value_reads_as_it_was_written(self, storage: Storage, column: str, value: Value):
        await storage.mutate([Put(THINGS, key(), {column: value})])
        await storage.mutate([Put(THINGS, key(), {column: value}, condition(column, Operator.EQ, value))])

        row = await storage.get(THINGS, key())

        assert row == row_of(key(), **{column: value})
        assert row is not None
        assert type(row[column]) is type(value)
        assert await storage.scan(Scan(THINGS, (0,))) == [row]
        assert len(await tables_of(storage)) == 3

    @pytest.mark.parametrize(
        ("column", "value"),
        [
            *itertools.product(["flag"], [0, 1, "true"]),
            *itertools.product(["small"], [True, 1.0, "1", 2**31, -(2**31) - 1]),
            *itertools.product(["big"], [False, 1.0, 2**53 + 1, -(2**53) - 1]),
            *itertools.product(["single"], [1, 0.1, 1e39, math.nan, "1"]),
            *itertools.product(["double"], [1, math.nan, "1"]),
            *itertools.product(["note"], [1, b"x", "\ud800", "x\udfff", ["x"]]),
            *itertools.product(["raw"], ["x", bytearray(b"x"), 1]),
            *itertools.product(["day"], ["2024-02-29", 0, datetime.date(999, 12, 31), LOCAL_INSTANTS[2], INSTANTS[2]]),
            *itertools.product(["clock"], ["12:00", 0, datetime.time(12, tzinfo=UTC), LOCAL_INSTANTS[2]]),
            *itertools.product(["instant"], NO_INSTANTS),
            ("missing", 1),
            ("name", "key column"),
        ],
        ids=repr,
    )
    async def test_a_value_that_is_not_of_its_columns_type_is_refused(
        self, storage: Storage, column: str, value: Value
    ):
        with pytest.raises(InvalidOperationError, match=column):
            await storage.mutate([Put(THINGS, key(), {column: value})])
        if column != "name":
            with pytest.raises(InvalidOperationError, match=column):
                await storage.mutate([Put(THINGS, key(), {}, condition(column, Operator.EQ, value))])
            with pytest.raises(InvalidOperationError, match=column):
                await storage.scan(Scan(THINGS, (0,), where=(ColumnCondition(column, Operator.EQ, value),)))

        assert await storage.partitions(THINGS) == []

    @pytest.mark.parametrize(
        "bad",
        [
            Key((0,), ("n",)),
            Key((), ("n", 0)),
            Key((0, 0), ("n", 0)),
            Key((0,), ("n", 0, 0)),
            Key((None,), ("n", 0)),
            Key((0,), ("n", None)),
            Key((True,), ("n", 0)),
            Key((0,), (0, "n")),
            Key((0,), ("\ud800", 0)),
            Key((0,), ("n", 2**53 + 1)),
            Key([0], ("n", 0)),  # type: ignore[arg-type]
        ],
        ids=repr,
    )
    async def test_a_key_that_does_not_fit_its_table_is_refused(self, storage: Storage, bad: Key):
        with pytest.raises(InvalidOperationError):
            await storage.get(THINGS, bad)
        with pytest.raises(InvalidOperationError):
            await storage.mutate([Put(THINGS, bad, {})])
        with pytest.raises(InvalidOperationError):
            await storage.mutate([Delete(THINGS, bad)])

        assert await storage.partitions(THINGS) == []

    async def test_enumerations_are_stored_as_their_plain_values(self, storage: Storage):
        class State(IntEnum):
            PREPARED = 1

        class Colour(StrEnum):
            RED = "red"

        where = Key((State.PREPARED,), (Colour.RED, State.PREPARED))
        await storage.mutate([Put(THINGS, where, {"small": State.PREPARED, "note": Colour.RED, "double": -0.0})])

        row = await storage.get(THINGS, Key((1,), ("red", 1)))
        assert row == row_of(where, small=1, note="red", double=0.0)
        assert row is not None
        assert {type(value) for value in row.values()} == {int, str, float, type(None)}
        assert math.copysign(1, row["double"]) == 1  # type: ignore[arg-type]

    async def test_hostile_texts_are_data_wherever_they_stand(self, storage: Storage):
        for number, text in enumerate(HOSTILE_TEXTS):
            await storage.mutate([Put(COUNTERS, Key((text,)), {"value": number}, IfNotExists())])
            await storage.mutate([Put(THINGS, key(text), {"note": text}, IfNotExists())])

        assert sorted(await storage.partitions(COUNTERS)) == sorted((text,) for text in HOSTILE_TEXTS)
        for number, text in enumerate(HOSTILE_TEXTS):
            assert await storage.get(COUNTERS, Key((text,))) == {"id": text, "value": number}
            by_bound = Scan(THINGS, (0,), start=Bound((text,)), end=Bound((text,)))
            by_where = Scan(THINGS, (0,), where=(ColumnCondition("note", Operator.EQ, text),))
            for scan in (by_bound, by_where):
                assert await storage.scan(scan) == [row_of(key(text), note=text)]
        assert len(await tables_of(storage)) == 3

    # Conditions

    async def test_if_not_exists_writes_an_absent_row_only(self, storage: Storage):
        await storage.mutate([Put(THINGS, key(), {"note": "first"}, IfNotExists())])

        with pytest.raises(NoMutationError):
            await storage.mutate([Put(THINGS, key(), {"note": "second"}, IfNotExists())])
        with pytest.raises(NoMutationError):
            await storage.mutate([Put(THINGS, key(), {}, IfNotExists())])

        assert await storage.get(THINGS, key()) == row_of(key(), note="first")

    @pytest.mark.parametrize("present", [IfExists(), If(())], ids=["IF EXISTS", "IF without conditions"])
    async def test_if_exists_writes_a_present_row_only(self, storage: Storage, present: IfExists | If):
        for absent in (Put(THINGS, key(), {"note": "x"}, present), Delete(THINGS, key(), present)):
            with pytest.raises(NoMutationError):
                await storage.mutate([absent])
        assert await storage.get(THINGS, key()) is None

        await storage.mutate([Put(THINGS, key(), {"small": 1})])
        await storage.mutate([Put(THINGS, key(), {"note": "x"}, present)])
        await storage.mutate([Put(THINGS, key(), {}, present)])
        assert await storage.get(THINGS, key()) == row_of(key(), small=1, note="x")

        await storage.mutate([Delete(THINGS, key(), present)])
        assert await storage.get(THINGS, key()) is None

    async def test_a_delete_cannot_ask_for_an_absent_row(self, storage: Storage):
        with pytest.raises(InvalidOperationError):
            await storage.mutate([Delete(THINGS, key(), IfNotExists())])  # type: ignore[arg-type]

    async def test_an_operator_must_be_one_of_the_ports(self, storage: Storage):
        forged = ColumnCondition("note", "= '' OR 1 = 1 --", "x")  # type: ignore[arg-type]
        with pytest.raises(InvalidOperationError):
            await storage.mutate([Delete(THINGS, key(), If((forged,)))])
        with pytest.raises(InvalidOperationError):
            await storage.scan(Scan(THINGS, (0,), where=(forged,)))

    async def test_an_absent_row_meets_no_condition_not_even_is_null(self, storage: Storage):
        for operator in Operator:
            with pytest.raises(NoMutationError):
                await storage.mutate([Put(THINGS, key(), {"small": 1}, condition("small", operator, 1))])

        assert await storage.get(THINGS, key()) is None

    @pytest.mark.parametrize(
        ("column", "low", "high"),
        [
            ("flag", False, True),
            ("small", -1, 2),
            ("big", -(2**53), 2**53),
            ("single", -1.5, 2.0),
            ("double", -math.inf, 1e-300),
            ("note", "a", "\u00e9"),
            ("note", "\uffff", "\U0001f600"),
            ("note", "a\0b", "a\0c"),
            ("raw", b"\x7f", b"\x80"),
            ("day", DAYS[0], DAYS[2]),
            ("clock", TIMES[1], TIMES[2]),
            ("instant", INSTANTS[1], INSTANTS[2]),
        ],
    )
    @pytest.mark.parametrize("operator", list(Operator), ids=lambda operator: operator.name)
    async def test_a_comparison_with_null_is_false_and_others_follow_the_types_order(
        self, storage: Storage, operator: Operator, column: str, low: Value, high: Value
    ):
        values = {"low": low, "high": high, "null": None}
        for number, (held, asked) in enumerate(itertools.product(values, values)):
            where = key(held, number)
            asked_condition = ColumnCondition(column, operator, values[asked])
            await storage.mutate([Put(THINGS, where, {column: values[held]})])

            filtered = await storage.scan(
                Scan(THINGS, (0,), Bound(where.clustering), Bound(where.clustering), (asked_condition,))
            )
            try:
                await storage.mutate([Delete(THINGS, where, If((asked_condition,)))])
                deleted = True
            except NoMutationError:
                deleted = False

            assert deleted == ((held, asked) in TRUTH[operator]), (held, operator, asked)
            assert filtered == ([row_of(where, **{column: values[held]})] if deleted else []), (held, operator, asked)

    async def test_conditions_may_speak_of_key_columns(self, storage: Storage):
        await storage.mutate([Put(THINGS, key("n", 7), {"small": 1})])

        for unmet in (
            condition("number", Operator.LT, 7),
            condition("name", Operator.IS_NULL),
            If((ColumnCondition("small", Operator.EQ, 1), ColumnCondition("bucket", Operator.NE, 0))),
        ):
            for mutation in (Put(THINGS, key("n", 7), {"small": 2}, unmet), Delete(THINGS, key("n", 7), unmet)):
                with pytest.raises(NoMutationError):
                    await storage.mutate([mutation])
        with pytest.raises(NoMutationError):
            await storage.mutate([Put(THINGS, key("absent", 7), {"small": 2}, condition("number", Operator.EQ, 7))])
        await storage.mutate([Put(THINGS, key("n", 7), {"small": 2}, condition("number", Operator.GE, 7))])

        assert await storage.scan(Scan(THINGS, (0,))) == [row_of(key("n", 7), small=2)]

    async def test_is_null_holds_for_a_present_row_and_in_a_batch(self, storage: Storage):
        await storage.mutate([Put(THINGS, key("a"), {"note": "x"}), Put(THINGS, key("b"), {"small": 1})])
        null = condition("big", Operator.IS_NULL)

        with pytest.raises(NoMutationError):
            await storage.mutate([Put(THINGS, key("a"), {"small": 2}, null), Delete(THINGS, key("absent"), null)])
        await storage.mutate([Put(THINGS, key("a"), {"small": 2}, null), Delete(THINGS, key("b"), null)])

        assert await storage.scan(Scan(THINGS, (0,))) == [row_of(key("a"), small=2, note="x")]

    async def test_every_condition_must_hold(self, storage: Storage):
        await storage.mutate([Put(THINGS, key(), {"small": 1, "note": "x"})])
        one, x, null = (
            ColumnCondition("small", Operator.EQ, 1),
            ColumnCondition("note", Operator.EQ, "x"),
            ColumnCondition("big", Operator.IS_NULL),
        )

        for unmet in (replace(one, value=2), replace(x, value="y"), replace(null, operator=Operator.IS_NOT_NULL)):
            for conditions in itertools.permutations((one, x, null, unmet)):
                with pytest.raises(NoMutationError):
                    await storage.mutate([Put(THINGS, key(), {"small": 9}, If(conditions))])
        await storage.mutate([Put(THINGS, key(), {"small": 9}, If((one, x, null)))])

        assert await storage.get(THINGS, key()) == row_of(key(), small=9, note="x")

    # Batches

    async def test_a_batch_inserts_updates_and_deletes_together(self, storage: Storage):
        await storage.mutate([Put(THINGS, key("b"), {"small": 1}), Put(THINGS, key("c"), {"small": 1})])

        await storage.mutate(
            [
                Put(THINGS, key("a"), {"small": 2}, IfNotExists()),
                Put(THINGS, key("b"), {"small": 2}, condition("small", Operator.EQ, 1)),
                Delete(THINGS, key("c"), IfExists()),
                Put(THINGS, key("d"), {"note": "x"}),
                Delete(THINGS, key("e")),
            ]
        )

        assert await storage.scan(Scan(THINGS, (0,))) == [
            row_of(key("a"), small=2),
            row_of(key("b"), small=2),
            row_of(key("d"), note="x"),
        ]

    @pytest.mark.parametrize("place", range(5))
    async def test_one_condition_that_fails_takes_the_whole_batch_back(self, storage: Storage, place: int):
        before = [Put(THINGS, key(name), {"small": 1}) for name in ("b", "c")]
        await storage.mutate(before)
        batch: list[Put | Delete] = [
            Put(THINGS, key("a"), {"small": 2}, IfNotExists()),
            Put(THINGS, key("b"), {"small": 2}, condition("small", Operator.EQ, 1)),
            Delete(THINGS, key("c")),
            Put(THINGS, key("d"), {"small": 2}),
        ]
        batch.insert(place, Put(THINGS, key("z"), {"small": 2}, IfExists()))

        with pytest.raises(NoMutationError):
            await storage.mutate(batch)

        assert await storage.scan(Scan(THINGS, (0,))) == [row_of(put.key, small=1) for put in before]

    async def test_a_batch_of_one_shape_fails_as_a_whole(self, storage: Storage):
        await storage.mutate([Put(THINGS, key(number=7), {"small": 7})])

        with pytest.raises(NoMutationError):
            await storage.mutate([Put(THINGS, key(number=n), {"small": 0}, IfNotExists()) for n in range(10)])

        assert await storage.scan(Scan(THINGS, (0,))) == [row_of(key(number=7), small=7)]

    async def test_a_batch_may_hold_hundreds_of_rows(self, storage: Storage):
        await storage.mutate([Put(THINGS, key(number=n), {"small": n}, IfNotExists()) for n in range(600)])
        await storage.mutate(
            [
                Put(THINGS, key(number=n), {"small": n + 1}, condition("small", Operator.EQ, n))
                if n % 2
                else Delete(THINGS, key(number=n), condition("small", Operator.EQ, n))
                for n in range(600)
            ]
        )

        rows = await storage.scan(Scan(THINGS, (0,)))
        assert [(row["number"], row["small"]) for row in rows] == [(n, n + 1) for n in range(1, 600, 2)]

    async def test_an_empty_batch_does_nothing(self, storage: Storage):
        await storage.mutate([])

        assert await storage.partitions(THINGS) == []

    async def test_a_batch_of_two_atomic_units_is_refused(self, storage: Storage):
        second = {
            Atomicity.PARTITION: Put(THINGS, key(bucket=1), {"small": 1}),
            Atomicity.NAMESPACE: Put(ELSEWHERE, key(), {"small": 1}),
        }[storage.info.atomicity]

        with pytest.raises(InvalidOperationError, match="two atomic units"):
            await storage.mutate([Put(THINGS, key(), {"small": 1}), second])

        assert await storage.get(THINGS, key()) is None
        assert await storage.get(second.table, second.key) is None

    async def test_a_batch_may_use_all_of_one_atomic_unit(self, storage: Storage):
        within = [Put(THINGS, key(), {"small": 1}), Put(THINGS, key(number=1), {"small": 2})]
        if storage.info.atomicity is not Atomicity.PARTITION:
            within += [Put(THINGS, key(bucket=1), {"small": 3}), Put(COUNTERS, Key(("a",)), {"value": 4})]

        await storage.mutate(within)

        assert [await storage.get(put.table, put.key) is not None for put in within] == [True] * len(within)

    async def test_a_batch_that_names_a_key_twice_is_refused(self, storage: Storage):
        for second in (Put(THINGS, key(), {"big": 2}), Delete(THINGS, key())):
            with pytest.raises(InvalidOperationError, match="twice"):
                await storage.mutate([Put(THINGS, key(), {"small": 1}), second])

        assert await storage.get(THINGS, key()) is None

    async def test_an_invalid_mutation_keeps_its_whole_batch_out(self, storage: Storage):
        with pytest.raises(InvalidOperationError):
            await storage.mutate([Put(THINGS, key(), {"small": 1}), Put(THINGS, key("o"), {"small": "1"})])

        assert await storage.get(THINGS, key()) is None

    # Concurrency

    async def test_concurrent_compare_and_set_loses_no_increment(self, storage: Storage):
        names = ("a", "b")
        for name in names:
            await storage.mutate([Put(COUNTERS, Key((name,)), {"value": 0}, IfNotExists())])

        async def increment(name: str) -> None:
            for _ in range(5):
                while True:
                    row = await storage.get(COUNTERS, Key((name,)))
                    assert row is not None
                    seen = row["value"]
                    assert isinstance(seen, int)
                    await asyncio.sleep(0)
                    try:
                        await storage.mutate([Put(COUNTERS, Key((name,)), {"value": seen + 1}, counter_is(seen))])
                        break
                    except NoMutationError:
                        continue

        await asyncio.gather(*(increment(name) for name in names for _ in range(8)))

        for name in names:
            assert await storage.get(COUNTERS, Key((name,))) == {"id": name, "value": 40}

    async def test_of_many_that_insert_one_key_exactly_one_succeeds(self, storage: Storage):
        answers = await asyncio.gather(
            *(storage.mutate([Put(COUNTERS, Key(("a",)), {"value": n}, IfNotExists())]) for n in range(20)),
            return_exceptions=True,
        )

        [winner] = [n for n, answer in enumerate(answers) if answer is None]
        assert {type(answer) for answer in answers} == {type(None), NoMutationError}
        assert await storage.get(COUNTERS, Key(("a",))) == {"id": "a", "value": winner}

    async def test_a_batch_that_fails_leaves_its_neighbours_alone(self, storage: Storage):
        """Concurrent batches may share a flush; each still stands or falls by itself."""
        await storage.mutate([Put(THINGS, key("taken"), {"small": 0})])

        def batch(n: int) -> list[Put]:
            last = key("taken") if n % 3 == 0 else key("free", n)
            return [
                Put(THINGS, key("first", n), {"small": n}, IfNotExists()),
                Put(THINGS, last, {"small": n}, IfNotExists()),
            ]

        answers = await asyncio.gather(*(storage.mutate(batch(n)) for n in range(30)), return_exceptions=True)

        assert [type(answer) for answer in answers] == [
            NoMutationError if n % 3 == 0 else type(None) for n in range(30)
        ]
        expected = [(name, n) for name in ("first", "free") for n in range(30) if n % 3]
        rows = await storage.scan(Scan(THINGS, (0,)))
        assert [(row["name"], row["small"]) for row in rows] == [*expected, ("taken", 0)]

    async def test_a_read_sees_every_write_answered_before_it(self, storage: Storage):
        async def write_and_read(name: str) -> None:
            for n in range(10):
                await storage.mutate([Put(COUNTERS, Key((name,)), {"value": n})])
                assert await storage.get(COUNTERS, Key((name,))) == {"id": name, "value": n}
                assert await storage.scan(Scan(COUNTERS, (name,))) == [{"id": name, "value": n}]

        await asyncio.gather(*(write_and_read(f"c{n}") for n in range(8)))

    # Scans

    @pytest.fixture
    async def keys(self, storage: Storage) -> list[tuple[str, int]]:
        """The clustering keys of a partition that holds every NAME with every NUMBER, in the order they must have."""
        clusterings = list(itertools.product(NAMES, NUMBERS))
        await storage.mutate([Put(THINGS, key(*c), {"small": c[1] % 2}) for c in reversed(clusterings)])
        await storage.mutate([Put(THINGS, key("other", bucket=1), {"small": 1})])
        return sorted(clusterings, key=lambda c: (c[0].encode(), c[1]))

    async def test_a_scan_returns_one_partition_in_clustering_order(
        self, storage: Storage, keys: list[tuple[str, int]]
    ):
        forth = await storage.scan(Scan(THINGS, (0,)))
        back = await storage.scan(Scan(THINGS, (0,), reverse=True))

        assert [(row["name"], row["number"]) for row in forth] == keys
        assert back == forth[::-1]
        assert await storage.scan(Scan(THINGS, (1,))) == [row_of(key("other", bucket=1), small=1)]
        assert await storage.scan(Scan(THINGS, (2,))) == []

    async def test_bounds_take_in_or_leave_out_every_row_with_their_prefix(
        self, storage: Storage, keys: list[tuple[str, int]]
    ):
        def comparable(values: tuple[Value, ...]) -> tuple[object, ...]:
            return tuple(value.encode() if isinstance(value, str) else value for value in values)

        def is_after(key: tuple[str, int], bound: Bound | None) -> bool:
            if bound is None:
                return True
            prefix, values = comparable(key[: len(bound.values)]), comparable(bound.values)
            return prefix >= values if bound.inclusive else prefix > values

        def is_before(key: tuple[str, int], bound: Bound | None) -> bool:
            if bound is None:
                return True
            prefix, values = comparable(key[: len(bound.values)]), comparable(bound.values)
            return prefix <= values if bound.inclusive else prefix < values

        prefixes: list[tuple[Value, ...]] = [
            (),
            ("a",),
            ("aa",),
            ("a", 0),
            ("a", 5),
            ("\uffff",),
            ("\U0001f600", 2**53),
        ]
        bounds = [None, *(Bound(prefix, inclusive) for prefix in prefixes for inclusive in (True, False))]
        for start, end in itertools.product(bounds, bounds):
            expected = [c for c in keys if is_after(c, start) and is_before(c, end)]
            for reverse in (False, True):
                rows = await storage.scan(Scan(THINGS, (0,), start, end, reverse=reverse))
                found = [(row["name"], row["number"]) for row in rows]
                assert found == (expected[::-1] if reverse else expected), (start, end, reverse)

    async def test_where_filters_before_limit_counts(self, storage: Storage, keys: list[tuple[str, int]]):
        odd = (ColumnCondition("small", Operator.EQ, 1),)
        expected = [c for c in keys if c[1] % 2]
        for limit in (1, 2, 3, len(expected), len(expected) + 1):
            forth = await storage.scan(Scan(THINGS, (0,), where=odd, limit=limit))
            back = await storage.scan(Scan(THINGS, (0,), where=odd, limit=limit, reverse=True))

            assert [(row["name"], row["number"]) for row in forth] == expected[:limit]
            assert [(row["name"], row["number"]) for row in back] == expected[::-1][:limit]

    async def test_where_may_speak_of_key_columns(self, storage: Storage, keys: list[tuple[str, int]]):
        rows = await storage.scan(Scan(THINGS, (0,), where=(ColumnCondition("number", Operator.LT, -1),)))

        assert [(row["name"], row["number"]) for row in rows] == [c for c in keys if c[1] < -1]

    async def test_limit_zero_means_no_limit(self, storage: Storage, keys: list[tuple[str, int]]):
        assert len(await storage.scan(Scan(THINGS, (0,), limit=0))) == len(keys)

    @pytest.mark.parametrize(
        "scan",
        [
            Scan(THINGS, (0,), limit=-1),
            Scan(THINGS, (0,), limit=True),
            Scan(THINGS, ()),
            Scan(THINGS, ("0",)),
            Scan(THINGS, (None,)),
            Scan(THINGS, (0,), start=Bound(("a", 1, 2))),
            Scan(THINGS, (0,), start=Bound((1,))),
            Scan(THINGS, (0,), end=Bound(("a", None))),
            Scan(THINGS, (0,), end=Bound("a")),  # type: ignore[arg-type]
            Scan(COUNTERS, ("a",), start=Bound(("a",))),
        ],
        ids=repr,
    )
    async def test_a_scan_that_does_not_fit_its_table_is_refused(self, storage: Storage, scan: Scan):
        with pytest.raises(InvalidOperationError):
            await storage.scan(scan)

    async def test_a_table_without_clustering_key_has_one_row_a_partition(self, storage: Storage):
        for name in ("a", "b"):
            await storage.mutate([Put(COUNTERS, Key((name,)), {"value": 1})])

        assert await storage.scan(Scan(COUNTERS, ("a",))) == [{"id": "a", "value": 1}]

    @pytest.mark.parametrize("table", ORDERED, ids=lambda table: "+".join(sorted(table.descending)))
    async def test_descending_columns_run_from_the_largest_value_and_bounds_compare_by_value(
        self, storage: Storage, table: TableSchema
    ):
        await storage.create_table(table)
        keys = list(itertools.product(["", "a", "\U0001f600"], [-1, 0, 5]))
        await storage.mutate([Put(table, Key((0,), c), {"v": 1}) for c in keys])
        for position in (1, 0):
            keys.sort(key=lambda c: c[position], reverse="ab"[position] in table.descending)  # type: ignore[arg-type, return-value]
        bounds = [
            None,
            *(
                Bound(prefix, inclusive)
                for prefix in ((), ("a",), ("aa",), ("a", 0), ("a", 3), ("\U0001f600", 5))
                for inclusive in (True, False)
            ),
        ]

        def inside(c: tuple[Value, ...], start: Bound | None, end: Bound | None) -> bool:
            after = start is None or c[: len(start.values)] > start.values  # type: ignore[operator]
            before = end is None or c[: len(end.values)] < end.values  # type: ignore[operator]
            on_start = start is not None and start.inclusive and c[: len(start.values)] == start.values
            on_end = end is not None and end.inclusive and c[: len(end.values)] == end.values
            return (after or on_start) and (before or on_end)

        async def check(start: Bound | None, end: Bound | None) -> None:
            expected = [c for c in keys if inside(c, start, end)]
            for reverse in (False, True):
                rows = await storage.scan(Scan(table, (0,), start, end, reverse=reverse))
                found = [(row["a"], row["b"]) for row in rows]
                assert found == (expected[::-1] if reverse else expected), (start, end, reverse)

        await asyncio.gather(*(check(start, end) for start, end in itertools.product(bounds, bounds)))

        first = await storage.scan(Scan(table, (0,), limit=2))
        last = await storage.scan(Scan(table, (0,), limit=2, reverse=True))
        assert [(row["a"], row["b"]) for row in first] == keys[:2]
        assert [(row["a"], row["b"]) for row in last] == keys[::-1][:2]

    async def test_a_long_scan_returns_every_row_and_stops_at_its_limit(self, storage: Storage):
        for first in range(0, 2_500, 500):
            await storage.mutate([Put(THINGS, key("n", n), {"small": n % 2}) for n in range(first, first + 500)])

        everything = await storage.scan(Scan(THINGS, (0,)))
        odd = await storage.scan(Scan(THINGS, (0,), where=(ColumnCondition("small", Operator.EQ, 1),), limit=1_100))

        assert [row["number"] for row in everything] == list(range(2_500))
        assert [row["number"] for row in odd] == list(range(1, 2_200, 2))

    # Reads across partitions

    async def test_a_scan_of_all_returns_the_rows_of_every_partition(self, storage: Storage):
        assert await rows_of(storage, ScanAll(THINGS)) == []
        for bucket in range(5):
            await storage.mutate([Put(THINGS, key(number=n, bucket=bucket), {"small": n}) for n in range(bucket)])
        expected = {(bucket, n) for bucket in range(5) for n in range(bucket)}

        for page_size in (1, 3, 256):
            rows = await rows_of(storage, ScanAll(THINGS), page_size)
            assert sorted((row["bucket"], row["number"]) for row in rows) == sorted(expected)  # type: ignore[type-var]
        assert {tuple(row) for row in rows} == {tuple(THINGS.columns)}

    async def test_a_scan_of_all_filters_before_its_limit_counts(self, storage: Storage):
        for bucket in range(4):
            await storage.mutate([Put(THINGS, key(number=n, bucket=bucket), {"small": n}) for n in range(3)])
        where = (ColumnCondition("small", Operator.GE, 1), ColumnCondition("bucket", Operator.NE, 0))

        assert {row["small"] for row in await rows_of(storage, ScanAll(THINGS, where), 2)} == {1, 2}
        for limit, page_size in itertools.product((1, 2, 5, 6, 7), (1, 2, 256)):
            assert len(await rows_of(storage, ScanAll(THINGS, where, limit), page_size)) == min(limit, 6)

    async def test_a_scan_of_all_sees_every_write_answered_before_it(self, storage: Storage):
        for n in range(20):
            await storage.mutate([Put(COUNTERS, Key((f"c{n}",)), {"value": n}, IfNotExists())])

            assert len(await rows_of(storage, ScanAll(COUNTERS))) == n + 1

    async def test_an_index_finds_the_rows_that_hold_the_value(self, storage: Storage):
        await storage.create_table(INDEXED)
        for bucket in range(3):
            await storage.mutate(
                [
                    Put(INDEXED, Key((bucket,), (n,)), {"colour": ["red", "", None][n % 3], "size": n, "day": DAYS[n]})
                    for n in range(6)
                ]
            )

        red = await rows_of(storage, IndexScan(INDEXED, "colour", "red"), 2)
        assert sorted((row["id"], row["n"]) for row in red) == [(b, n) for b in range(3) for n in (0, 3)]  # type: ignore[type-var]
        assert len(await rows_of(storage, IndexScan(INDEXED, "colour", ""))) == 6
        assert len(await rows_of(storage, IndexScan(INDEXED, "day", DAYS[4]))) == 3
        assert await rows_of(storage, IndexScan(INDEXED, "size", 7)) == []

        where = (ColumnCondition("n", Operator.GT, 0),)
        assert len(await rows_of(storage, IndexScan(INDEXED, "colour", "red", where))) == 3
        assert len(await rows_of(storage, IndexScan(INDEXED, "colour", "red", where, limit=2), 1)) == 2

    async def test_an_index_follows_every_write(self, storage: Storage):
        await storage.create_table(INDEXED)
        where = Key((0,), (0,))

        async def found(colour: str) -> int:
            return len(await rows_of(storage, IndexScan(INDEXED, "colour", colour)))

        await storage.mutate([Put(INDEXED, where, {"colour": "red"}, IfNotExists())])
        assert (await found("red"), await found("blue")) == (1, 0)
        await storage.mutate([Put(INDEXED, where, {"colour": "blue"}, IfExists())])
        assert (await found("red"), await found("blue")) == (0, 1)
        await storage.mutate([Put(INDEXED, where, {"colour": None}, IfExists())])
        assert (await found("red"), await found("blue")) == (0, 0)
        await storage.mutate([Put(INDEXED, where, {"colour": "red"}, IfExists())])
        await storage.mutate([Delete(INDEXED, where, IfExists())])
        assert await found("red") == 0

    @pytest.mark.parametrize(
        "selection",
        [
            pytest.param(ScanAll(THINGS, limit=-1), id="a negative limit"),
            pytest.param(ScanAll(THINGS, (ColumnCondition("missing", Operator.EQ, 1),)), id="an unknown column"),
            pytest.param(ScanAll(THINGS, (ColumnCondition("small", Operator.EQ, "1"),)), id="a value of another type"),
            pytest.param(ScanAll(replace(THINGS, name="absent")), id="no such table"),
            pytest.param(IndexScan(THINGS, "small", 1), id="a table without indexes"),
            pytest.param(IndexScan(INDEXED, "note", "x"), id="a column without index"),
            pytest.param(IndexScan(INDEXED, "id", 1), id="the partition key"),
            pytest.param(IndexScan(INDEXED, "colour", None), id="NULL"),
            pytest.param(IndexScan(INDEXED, "colour", 1), id="an indexed value of another type"),
            pytest.param(IndexScan(INDEXED, "colour", "red", limit=-1), id="an index and a negative limit"),
            pytest.param(
                IndexScan(INDEXED, "colour", "red", (ColumnCondition("missing", Operator.EQ, 1),)),
                id="an index and an unknown column",
            ),
        ],
    )
    async def test_a_read_across_partitions_that_does_not_fit_its_table_is_refused(
        self, storage: Storage, selection: ScanAll | IndexScan
    ):
        await storage.create_table(INDEXED)
        with pytest.raises(InvalidOperationError):
            await rows_of(storage, selection)

    # Partitions

    async def test_partitions_are_those_that_hold_a_row(self, storage: Storage):
        for bucket in (3, -1, 2, 2**31 - 1):
            await storage.mutate([Put(THINGS, key(number=n, bucket=bucket), {}) for n in range(3)])
        await storage.mutate([Delete(THINGS, key(number=n, bucket=2)) for n in range(3)])
        await storage.mutate([Delete(THINGS, key(bucket=3))])

        assert sorted(await storage.partitions(THINGS)) == [(-1,), (3,), (2**31 - 1,)]  # type: ignore[type-var]

    async def test_a_key_may_have_several_columns_of_any_type_but_floats(self, storage: Storage):
        columns = {"flag": T.BOOLEAN, "raw": T.BLOB, "text": T.TEXT, "day": T.INT, "on": T.BOOLEAN, "value": T.DOUBLE}
        table = TableSchema(MORE, "mixed", columns, ("text", "flag", "raw"), ("on", "day"))
        await storage.create_table(table)
        partitions = list(itertools.product(("", "x"), (False, True), (b"", b"\0", b"\xff")))
        for partition in partitions:
            await storage.mutate([Put(table, Key(partition, (on, 1)), {"value": 0.5}) for on in (True, False)])

        found = await storage.partitions(table)

        assert sorted(found) == partitions  # type: ignore[type-var]
        assert {tuple(map(type, partition)) for partition in found} == {(str, bool, bytes)}
        rows = await storage.scan(Scan(table, ("x", True, b"\0"), start=Bound((True,))))
        assert rows == [{"flag": True, "raw": b"\0", "text": "x", "day": 1, "on": True, "value": 0.5}]
        assert rows[0]["on"] is True

    async def test_days_and_times_may_be_keys_and_keep_their_order(self, storage: Storage):
        await storage.create_table(CALENDAR)
        clusterings = list(itertools.product(INSTANTS, DAYS[:3], TIMES[:2]))
        partition = (DAYS[0], TIMES[-1])
        await storage.mutate([Put(CALENDAR, Key(partition, c), {"v": 1}) for c in reversed(clusterings)])
        await storage.mutate([Put(CALENDAR, Key((DAYS[-1], TIMES[0]), clusterings[0]), {"v": 2})])

        assert sorted(await storage.partitions(CALENDAR)) == [partition, (DAYS[-1], TIMES[0])]  # type: ignore[type-var]
        rows = await storage.scan(Scan(CALENDAR, partition))
        assert [(row["instant"], row["of"], row["at"]) for row in rows] == clusterings
        after = await storage.scan(Scan(CALENDAR, partition, Bound((INSTANTS[2], DAYS[1]), inclusive=False)))
        assert [(row["instant"], row["of"], row["at"]) for row in after] == clusterings[16:]
        assert await storage.get(CALENDAR, Key(partition, clusterings[3])) == rows[3]

    async def test_a_time_without_zone_is_held_to_the_millisecond_or_refused_as_a_type(self, storage: Storage):
        table = TableSchema(MORE, "local", {"id": T.INT, "at": T.TIMESTAMP, "on": T.TIMESTAMP}, ("id",), ("at",))
        if T.TIMESTAMP not in storage.info.data_types:
            with pytest.raises(InvalidOperationError, match="TIMESTAMP"):
                await storage.create_table(table)
            return

        await storage.create_table(table)
        for instant in reversed(LOCAL_INSTANTS):
            equal = condition("on", Operator.EQ, instant)
            await storage.mutate([Put(table, Key((0,), (instant,)), {"on": instant})])
            await storage.mutate([Put(table, Key((0,), (instant,)), {"on": instant}, equal)])
        rows = await storage.scan(Scan(table, (0,), end=Bound((LOCAL_INSTANTS[3],))))
        assert [(row["at"], row["on"]) for row in rows] == [(instant, instant) for instant in LOCAL_INSTANTS[:4]]
        for bad in ("2024-02-29", 0, DAYS[0], INSTANTS[0], datetime.datetime(999, 1, 1), datetime.datetime.max):
            with pytest.raises(InvalidOperationError, match="TIMESTAMP"):
                await storage.mutate([Put(table, Key((0,), (LOCAL_INSTANTS[0],)), {"on": bad})])


class AdministrationContract:
    """What `AdministrableStorage` adds. An adapter's test file says how to make the storage; tables are dropped."""

    NAMESPACE = "contract_admin"
    TABLE = TableSchema(NAMESPACE, "goods", {"id": T.TEXT, "value": T.INT, "note": T.TEXT}, ("id",))

    @pytest.fixture
    async def storage(self) -> AdministrableStorage:
        """The adapter under test."""
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    async def _nothing_left(self, storage: AdministrableStorage) -> AsyncIterator[None]:
        yield
        for table in await storage.tables():
            if table.namespace == self.NAMESPACE:
                await storage.drop_table(table)
        await storage.drop_namespace(self.NAMESPACE)

    async def test_a_namespace_exists_from_its_creation_until_it_is_dropped(self, storage: AdministrableStorage):
        assert self.NAMESPACE not in await storage.namespaces()
        await storage.create_namespace(self.NAMESPACE)
        await storage.create_namespace(self.NAMESPACE)
        assert self.NAMESPACE in await storage.namespaces()
        assert self.NAMESPACE not in {table.namespace for table in await storage.tables()}

        await storage.create_table(self.TABLE)
        with pytest.raises(InvalidOperationError, match="still has tables"):
            await storage.drop_namespace(self.NAMESPACE)
        assert self.TABLE in await storage.tables()

        await storage.drop_table(self.TABLE)
        await storage.drop_namespace(self.NAMESPACE)
        await storage.drop_namespace(self.NAMESPACE)
        assert self.NAMESPACE not in await storage.namespaces()
        for name in ("", "a b", "../up", '"'):
            with pytest.raises(InvalidOperationError):
                await storage.create_namespace(name)
            with pytest.raises(InvalidOperationError):
                await storage.drop_namespace(name)

    async def test_a_dropped_table_leaves_nothing_behind(self, storage: AdministrableStorage):
        indexed = replace(self.TABLE, indexes=frozenset({"note"}))
        await storage.drop_table(self.TABLE)
        await storage.create_table(indexed)
        await storage.mutate([Put(indexed, Key(("a",)), {"note": "x"})])

        await storage.drop_table(indexed)
        await storage.drop_table(indexed)

        assert self.TABLE.full_name not in {table.full_name for table in await storage.tables()}
        with pytest.raises(InvalidOperationError, match="no table"):
            await storage.get(indexed, Key(("a",)))
        changed = replace(indexed, columns={"id": T.TEXT, "value": T.BIGINT, "note": T.TEXT})
        await storage.create_table(changed)
        assert await rows_of(storage, ScanAll(changed)) == []
        await storage.mutate([Put(changed, Key(("a",)), {"value": 2**40, "note": "x"})])
        assert len(await rows_of(storage, IndexScan(changed, "note", "x"))) == 1

    async def test_a_truncated_table_is_empty_and_takes_rows_again(self, storage: AdministrableStorage):
        await storage.create_table(self.TABLE)
        for name in ("a", "b"):
            await storage.mutate([Put(self.TABLE, Key((name,)), {"value": 1}, IfNotExists())])

        await storage.truncate_table(self.TABLE)
        await storage.truncate_table(self.TABLE)

        assert await storage.partitions(self.TABLE) == []
        await storage.mutate([Put(self.TABLE, Key(("a",)), {"value": 2}, IfNotExists())])
        assert await storage.get(self.TABLE, Key(("a",))) == {"id": "a", "value": 2, "note": None}

    async def test_an_added_column_is_null_until_it_is_written(self, storage: AdministrableStorage):
        wider = replace(self.TABLE, columns={**self.TABLE.columns, "on": T.DATE})
        await storage.create_table(self.TABLE)
        await storage.mutate([Put(self.TABLE, Key(("a",)), {"value": 1})])

        await storage.add_column(self.TABLE, "on", T.DATE)
        await storage.add_column(self.TABLE, "on", T.DATE)
        await storage.add_column(wider, "on", T.DATE)

        assert wider in await storage.tables()
        assert await storage.get(wider, Key(("a",))) == {"id": "a", "value": 1, "note": None, "on": None}
        await storage.mutate([Put(wider, Key(("a",)), {"on": DAYS[0]}, condition("on", Operator.IS_NULL))])
        assert await storage.get(wider, Key(("a",))) == {"id": "a", "value": 1, "note": None, "on": DAYS[0]}
        with pytest.raises(InvalidOperationError, match="exists otherwise"):
            await storage.get(self.TABLE, Key(("a",)))
        for column, data_type in (("value", T.TEXT), ("id", T.INT), ("NOTE", T.TEXT), ("a b", T.INT)):
            with pytest.raises(InvalidOperationError):
                await storage.add_column(self.TABLE, column, data_type)
        assert wider in await storage.tables()

    async def test_an_index_that_is_added_finds_rows_that_were_there(self, storage: AdministrableStorage):
        indexed = replace(self.TABLE, indexes=frozenset({"value"}))
        await storage.create_table(self.TABLE)
        for name in ("a", "b"):
            await storage.mutate([Put(self.TABLE, Key((name,)), {"value": 1})])

        await storage.create_index(self.TABLE, "value")
        await storage.create_index(self.TABLE, "value")

        assert indexed in await storage.tables()
        assert len(await rows_of(storage, IndexScan(indexed, "value", 1))) == 2
        assert await storage.get(self.TABLE, Key(("a",))) is not None
        for column in ("id", "missing", "a b"):
            with pytest.raises(InvalidOperationError):
                await storage.create_index(self.TABLE, column)

        await storage.drop_index(indexed, "value")
        await storage.drop_index(indexed, "value")
        await storage.drop_index(indexed, "note")
        assert self.TABLE in await storage.tables()
        with pytest.raises(InvalidOperationError):
            await rows_of(storage, IndexScan(indexed, "value", 1))

    async def test_a_table_that_lacks_an_index_is_another_table(self, storage: AdministrableStorage):
        await storage.create_table(self.TABLE)
        with pytest.raises(InvalidOperationError, match="not indexed"):
            await storage.create_table(replace(self.TABLE, indexes=frozenset({"value"})))

    async def test_a_table_that_does_not_exist_cannot_be_changed(self, storage: AdministrableStorage):
        await storage.create_namespace(self.NAMESPACE)
        for table in (self.TABLE, replace(self.TABLE, namespace="contract_absent")):
            for call in (
                storage.truncate_table(table),
                storage.add_column(table, "more", T.INT),
                storage.create_index(table, "value"),
                storage.drop_index(table, "value"),
            ):
                with pytest.raises(InvalidOperationError, match="no table"):
                    await call
            await storage.drop_table(table)
        assert "contract_absent" not in await storage.namespaces()

    async def test_of_many_that_create_one_table_all_succeed(self, storage: AdministrableStorage):
        indexed = replace(self.TABLE, indexes=frozenset({"value"}))

        await asyncio.gather(*(storage.create_table(indexed) for _ in range(4)))

        assert indexed in await storage.tables()
        await storage.mutate([Put(indexed, Key(("a",)), {"value": 1}, IfNotExists())])
        assert len(await rows_of(storage, IndexScan(indexed, "value", 1))) == 1
