"""Keys keep their order and come back, values read as they were written, and both are ScalarDB's bytes."""

from __future__ import annotations

import datetime
import functools
import json
import math
import struct
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.storage.dynamodb_encoding import (
    clustering_key,
    clustering_prefix,
    clustering_values,
    decoded,
    encoded,
    following,
    partition_key,
    partition_values,
)
from infra.storage.dynamodb_statements import TableRequests
from infra.storage.errors import InvalidOperationError
from infra.storage.operations import Bound, DataType, Key, Put, Row, Scan, TableSchema, Value

T = DataType
UTC = datetime.UTC

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=3) | st.sampled_from(
    ["", "a", "a\1", "ab", "b", "\u00e9", "\uffff", "\U0001f600", "\U0010ffff"]
)
milliseconds = st.datetimes(datetime.datetime(1000, 1, 1), datetime.datetime(9999, 12, 31)).map(
    lambda moment: moment.replace(microsecond=moment.microsecond // 1000 * 1000)
)
KEY_VALUES: dict[DataType, st.SearchStrategy[Any]] = {
    T.BOOLEAN: st.booleans(),
    T.INT: st.integers(-(2**31), 2**31 - 1) | st.integers(-2, 2),
    T.BIGINT: st.integers(-(2**53), 2**53) | st.integers(-2, 2),
    T.TEXT: texts,
    T.DATE: st.dates(datetime.date(1000, 1, 1)),
    T.TIME: st.times(),
    T.TIMESTAMP: milliseconds,
    T.TIMESTAMPTZ: milliseconds.map(lambda moment: moment.replace(tzinfo=UTC)),
}
VALUES: dict[DataType, st.SearchStrategy[Any]] = {
    **KEY_VALUES,
    T.TEXT: st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    T.BLOB: st.binary(max_size=5),
    T.FLOAT: st.floats(allow_nan=False, allow_infinity=False, width=32),
    T.DOUBLE: st.floats(-9e125, 9e125).filter(lambda value: not value or abs(value) > 1e-130),
}


@st.composite
def tables(draw: st.DrawFn) -> TableSchema:
    """Tables of one to three clustering columns of any type, each ascending or descending."""
    types = draw(st.lists(st.sampled_from(list(KEY_VALUES)), min_size=1, max_size=3))
    columns = tuple(f"c{place}" for place in range(len(types)))
    descending = frozenset(draw(st.sets(st.sampled_from(columns))))
    return TableSchema(
        "shop", "things", {"id": T.INT, **dict(zip(columns, types, strict=True))}, ("id",), columns, descending
    )


@st.composite
def tables_with_keys(draw: st.DrawFn) -> tuple[TableSchema, list[tuple[Value, ...]]]:
    table = draw(tables())
    one = st.tuples(*(KEY_VALUES[table.columns[column]] for column in table.clustering_key))
    return table, draw(st.lists(one, min_size=2, max_size=8))


def _in_order(table: TableSchema, keys: list[tuple[Value, ...]]) -> list[tuple[Value, ...]]:
    """The keys in clustering order, by comparing values."""

    def compared(one: tuple[Any, ...], other: tuple[Any, ...]) -> int:
        for column, a, b in zip(table.clustering_key, one, other, strict=True):
            if a != b:
                return (-1 if a < b else 1) * (-1 if column in table.descending else 1)
        return 0

    return sorted(keys, key=functools.cmp_to_key(compared))


@settings(max_examples=150, deadline=None)
@given(tables_with_keys())
def test_the_bytes_of_clustering_keys_are_in_the_order_of_the_rows(drawn: tuple[TableSchema, list[tuple[Value, ...]]]):
    table, keys = drawn

    by_bytes = sorted(keys, key=lambda key: clustering_key(table, key))

    assert by_bytes == _in_order(table, keys)


@settings(max_examples=100, deadline=None)
@given(tables_with_keys())
def test_a_clustering_key_comes_back_from_its_bytes(drawn: tuple[TableSchema, list[tuple[Value, ...]]]):
    table, keys = drawn
    for key in keys:
        found = clustering_values(table, clustering_key(table, key))

        assert found == key
        assert [type(value) for value in found] == [type(value) for value in key]


@settings(max_examples=100, deadline=None)
@given(tables_with_keys(), st.data())
def test_exactly_the_keys_with_a_prefix_lie_between_its_bytes_and_those_that_follow(
    drawn: tuple[TableSchema, list[tuple[Value, ...]]], data: st.DataObject
):
    table, keys = drawn
    length = data.draw(st.integers(1, len(table.clustering_key)))
    prefix = data.draw(st.sampled_from(keys))[:length]
    first = clustering_prefix(table, prefix)
    last = following(first)

    for key in keys:
        encoded_key = clustering_key(table, key)
        is_between = first <= encoded_key and (last is None or encoded_key < last)
        assert is_between == (key[:length] == prefix)


@settings(max_examples=150, deadline=None)
@given(tables_with_keys(), st.data())
def test_a_scan_asks_for_every_row_within_its_bounds_and_knows_them_from_the_others(
    drawn: tuple[TableSchema, list[tuple[Value, ...]]], data: st.DataObject
):
    table, keys = drawn
    prefixes = st.sampled_from(keys).flatmap(lambda key: st.integers(0, len(key)).map(lambda length: key[:length]))
    bounds = st.none() | st.builds(Bound, prefixes, st.booleans())
    scan = Scan(table, (1,), data.draw(bounds), data.draw(bounds))
    requests = TableRequests(table)

    def is_wanted(key: tuple[Any, ...]) -> bool:
        start, end = scan.start, scan.end
        after = start is None or key[: len(start.values)] > start.values
        before = end is None or key[: len(end.values)] < end.values
        at_start = start is not None and start.inclusive and key[: len(start.values)] == start.values
        at_end = end is not None and end.inclusive and key[: len(end.values)] == end.values
        return (after or at_start) and (before or at_end)

    request = requests.scan(scan)
    for key in keys:
        row: Row = {"id": 1, **dict(zip(table.clustering_key, key, strict=True))}
        assert requests.is_within(scan, row) == is_wanted(key)
        if is_wanted(key):
            assert request is not None
            assert _is_asked_for(request, clustering_key(table, key))


def _is_asked_for(request: dict[str, Any], key: bytes) -> bool:
    """Whether the query's range of sort keys takes `key` in."""
    _, _, asked = request["KeyConditionExpression"].partition(" AND ")
    edges = [request["ExpressionAttributeValues"][word]["B"] for word in asked.split() if word.startswith(":")]
    match asked.split()[1:2]:
        case []:
            return True
        case ["BETWEEN"]:
            return bool(edges[0] <= key <= edges[1])
        case [">="]:
            return bool(key >= edges[0])
        case ["<="]:
            return bool(key <= edges[0])
        case _:
            raise AssertionError(asked)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(list(KEY_VALUES)), min_size=1, max_size=3), st.booleans(), st.data())
def test_a_partition_key_comes_back_from_its_bytes(types: list[DataType], ends_in_blob: bool, data: st.DataObject):
    types = [*types, T.BLOB] if ends_in_blob else types
    columns = {f"c{place}": data_type for place, data_type in enumerate(types)}
    table = TableSchema("shop", "things", columns, tuple(columns))
    values = tuple(data.draw(VALUES[t] if t is T.BLOB else KEY_VALUES[t]) for t in types)

    found = partition_values(table, partition_key(table, values))

    assert found == values
    assert [type(value) for value in found] == [type(value) for value in values]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(list(VALUES)).flatmap(lambda data_type: st.tuples(st.just(data_type), VALUES[data_type])))
def test_a_value_comes_back_from_its_attribute(drawn: tuple[DataType, Value]):
    data_type, value = drawn

    found = decoded(encoded(value, data_type), data_type)

    assert found == value
    assert type(found) is type(value)


@settings(max_examples=100, deadline=None)
@given(milliseconds, milliseconds)
def test_timestamps_are_numbers_in_their_order(one: datetime.datetime, other: datetime.datetime):
    numbers = [int(encoded(moment, T.TIMESTAMP)["N"]) for moment in (one, other)]

    assert (numbers[0] < numbers[1]) == (one < other)
    assert (numbers[0] == numbers[1]) == (one == other)


# As ScalarDB's encoders, from their rules.
@pytest.mark.parametrize(
    ("data_type", "value", "ascending", "descending"),
    [
        (T.BOOLEAN, False, "00", "ff"),
        (T.BOOLEAN, True, "01", "fe"),
        (T.INT, 1, "80000001", "7ffffffe"),
        (T.INT, -1, "7fffffff", "80000000"),
        (T.BIGINT, -(2**53), "7fe0000000000000", "801fffffffffffff"),
        (T.TEXT, "", "00", "ff"),
        (T.TEXT, "aé", "61c3a900", "9e3c56ff"),
        (T.DATE, datetime.date(1969, 12, 31), "7fffffff", "80000000"),
        (T.TIME, datetime.time(0, 0, 1), "800000003b9aca00", "7fffffffc46535ff"),
        (T.TIMESTAMP, datetime.datetime(1970, 1, 1, 0, 0, 1), "80000000000003e8", "7ffffffffffffc17"),
        (
            T.TIMESTAMPTZ,
            datetime.datetime(1969, 12, 31, 23, 59, 59, tzinfo=UTC),
            "7ffffffffffff831",
            "80000000000007ce",
        ),
    ],
    ids=repr,
)
def test_a_key_column_has_the_bytes_that_scalardb_gives_it(
    data_type: DataType, value: Value, ascending: str, descending: str
):
    table = TableSchema("shop", "things", {"id": T.INT, "c": data_type}, ("id",), ("c",))
    reversed_table = TableSchema("shop", "things", {"id": T.INT, "c": data_type}, ("id",), ("c",), frozenset({"c"}))

    assert clustering_key(table, (value,)).hex() == ascending
    assert clustering_key(reversed_table, (value,)).hex() == descending


@pytest.mark.parametrize(
    ("data_type", "value", "attribute"),
    [
        (T.BOOLEAN, True, {"BOOL": True}),
        (T.INT, -7, {"N": "-7"}),
        (T.FLOAT, struct.unpack("f", struct.pack("f", 0.1))[0], {"N": "0.1"}),
        (T.FLOAT, 16777216.0, {"N": "16777216.0"}),
        (T.DOUBLE, 0.1, {"N": "0.1"}),
        (T.DOUBLE, -0.0, {"N": "0.0"}),
        (T.TEXT, "", {"S": ""}),
        (T.BLOB, b"\0", {"B": b"\0"}),
        (T.DATE, datetime.date(1970, 1, 2), {"N": "1"}),
        (T.TIME, datetime.time(0, 0, 0, 1), {"N": "1000"}),
        (T.TIMESTAMP, datetime.datetime(1970, 1, 1, 3, 25, 45, 789_000), {"N": "12345789"}),
        (T.TIMESTAMPTZ, datetime.datetime(1969, 12, 31, 20, 34, 15, 789_000, tzinfo=UTC), {"N": "-12345210"}),
    ],
    ids=repr,
)
def test_a_value_is_the_attribute_that_scalardb_makes_of_it(data_type: DataType, value: Value, attribute: object):
    assert encoded(value, data_type) == attribute


# What ScalarDB 3.19 itself put into DynamoDB Local: `Put`s without condition through its storage API, of the rows that
# `_put_by_scalardb` gives, in the order in which its scan returned them. Bytes are written in hexadecimal.
STORED_BY_SCALARDB = json.loads(
    (Path(__file__).parent / "scalardb_3_19_dynamodb_items.json").read_text(encoding="utf-8"),
    object_hook=lambda read: {"B": bytes.fromhex(read["B"])} if read.keys() == {"B"} else read,
)
SCALARDBS = TableSchema(
    "javans",
    "t",
    {
        **{"p": T.TEXT, "q": T.INT, "a": T.TEXT, "b": T.BIGINT, "c": T.TIMESTAMPTZ, "d": T.DATE, "e": T.BOOLEAN},
        **{"vb": T.BOOLEAN, "vi": T.INT, "vl": T.BIGINT, "vf": T.FLOAT, "vd": T.DOUBLE, "vt": T.TEXT, "vx": T.BLOB},
        **{"vdate": T.DATE, "vtime": T.TIME, "vts": T.TIMESTAMP, "vtz": T.TIMESTAMPTZ},
    },
    ("p", "q"),
    ("a", "b", "c", "d", "e"),
    frozenset("ace"),
    frozenset({"vt"}),
)
TAKEN_IN_ORDER = (3, 1, 5, 0, 4, 2)


def _put_by_scalardb(n: int) -> tuple[Key, dict[str, Value]]:
    epoch = datetime.datetime(1970, 1, 1, tzinfo=UTC)
    clustering = (
        "xy" if n % 2 else "x",
        n % 3 - 1,
        epoch + datetime.timedelta(milliseconds=n * 1001 - 2500),
        datetime.date(1970, 1, 1) + datetime.timedelta(days=n - 3),
        n % 2 == 0,
    )
    if n == 5:
        return Key(("é", -7), clustering), {}
    return Key(("é", -7), clustering), {
        "vb": n % 2 == 0,
        "vi": -n,
        "vl": 2**53 - n,
        "vf": struct.unpack("f", struct.pack("f", n / 10))[0],
        "vd": math.pi * 10.0 ** (n * 20),
        "vt": f"t{n % 2}",
        "vx": bytes([0, n, 255]),
        "vdate": datetime.date(1000 + n, 2, 28),
        "vtime": (datetime.datetime.min + datetime.timedelta(microseconds=n * 1_234_567)).time(),
        "vts": datetime.datetime(1969 - n * 100, 12, 31, 23, 59, 59, 7_000 * n),
        "vtz": datetime.datetime(1969, 12, 31, 23, 59, 58, 1_000 * n, tzinfo=UTC),
    }


@pytest.mark.parametrize(("item", "n"), list(zip(STORED_BY_SCALARDB, TAKEN_IN_ORDER, strict=True)))
def test_what_scalardb_stored_is_read_and_would_be_stored_the_same(item: dict[str, Any], n: int):
    key, columns = _put_by_scalardb(n)
    requests = TableRequests(SCALARDBS)
    names = SCALARDBS.key_columns

    row = requests.row(item)
    write = requests.write(Put(SCALARDBS, key, columns))

    expected = {
        **dict.fromkeys(SCALARDBS.columns),
        **dict(zip(names, key.partition + key.clustering, strict=True)),
        **columns,
    }
    assert row == expected
    assert write is not None
    written = dict(write.request["Key"])
    assignments = write.request["UpdateExpression"].removeprefix("SET ").split(", ")
    for name, value in (assignment.split(" = ") for assignment in assignments):
        column = write.request["ExpressionAttributeNames"][name]
        written[column] = write.request["ExpressionAttributeValues"][value]
    assert _by_value(written) == _by_value(item)


def test_rows_stored_by_scalardb_lie_in_the_order_that_keys_give_them():
    keys = [clustering_key(SCALARDBS, _put_by_scalardb(n)[0].clustering) for n in TAKEN_IN_ORDER]

    assert keys == sorted(keys)
    assert keys == [item["concatenatedClusteringKey"]["B"] for item in STORED_BY_SCALARDB]


def _by_value(item: dict[str, Any]) -> dict[str, Any]:
    """The attributes of an item, numbers by what they are worth: DynamoDB compares them so."""
    return {name: Decimal(held["N"]) if "N" in held else held for name, held in item.items()}


@pytest.mark.parametrize("data_type", list(T))
def test_no_attribute_and_a_null_attribute_are_null(data_type: DataType):
    assert decoded(None, data_type) is None
    assert decoded({"NULL": True}, data_type) is None


@pytest.mark.parametrize("value", [1e126, -1e126, 1e-131, 5e-324, float("inf"), float("-inf")])
def test_a_number_that_dynamodb_cannot_hold_is_refused(value: float):
    with pytest.raises(InvalidOperationError, match="between 1e-130"):
        encoded(value, T.DOUBLE)


@pytest.mark.parametrize(
    ("partition", "clustering", "error"),
    [
        (("x" * 2048,), ("c",), "partition key of DynamoDB has at most 2048 bytes"),
        (("p",), ("x" * 1024,), "clustering key of DynamoDB has at most 1024 bytes"),
        (("a\0b",), ("c",), "NUL"),
        (("p",), ("a\0b",), "NUL"),
    ],
)
def test_a_key_that_dynamodb_cannot_hold_is_refused(partition: tuple[Value], clustering: tuple[Value], error: str):
    table = TableSchema("shop", "things", {"p": T.TEXT, "c": T.TEXT}, ("p",), ("c",))

    with pytest.raises(InvalidOperationError, match=error):
        TableRequests(table).get(Key(partition, clustering))


def test_an_empty_partition_key_is_refused():
    table = TableSchema("shop", "things", {"p": T.BLOB}, ("p",))

    with pytest.raises(InvalidOperationError, match="cannot be empty"):
        partition_key(table, (b"",))


def test_a_bound_may_be_longer_than_any_key():
    table = TableSchema("shop", "things", {"p": T.TEXT, "c": T.TEXT}, ("p",), ("c",))
    long = Bound(("x" * 5_000,))

    for scan in (Scan(table, ("p",), start=long), Scan(table, ("p",), end=long)):
        request = TableRequests(table).scan(scan)
        assert request is not None
        [_, edge] = request["ExpressionAttributeValues"].values()
        assert len(edge["B"]) <= 1024


@pytest.mark.parametrize(
    ("table", "error"),
    [
        (TableSchema("s", "t", {"a": T.BLOB, "b": T.INT}, ("a", "b")), "last column of a partition key"),
        (TableSchema("s", "t", {"a": T.INT, "b": T.BLOB}, ("a",), ("b",)), "last column of a partition key"),
        (TableSchema("s", "t", {"a": T.INT, "b": T.BOOLEAN}, ("a",), indexes=frozenset({"b"})), "BOOLEAN"),
        (TableSchema("s", "t", {"a": T.INT, "concatenatedPartitionKey": T.INT}, ("a",)), "attribute of DynamoDB's"),
        (TableSchema("s", "t", {"a": T.INT, "x" * 250: T.INT}, ("a",), indexes=frozenset({"x" * 250})), "255"),
    ],
)
def test_a_table_that_dynamodb_cannot_hold_is_refused(table: TableSchema, error: str):
    with pytest.raises(InvalidOperationError, match=error):
        TableRequests(table).check()
