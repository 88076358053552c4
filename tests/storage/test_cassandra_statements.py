"""The CQL that is composed, what is left to the server of a condition, and what its schema tables mean. No server."""

from __future__ import annotations

import datetime
from collections.abc import Mapping

import pytest
from cassandra.query import UNSET_VALUE
from cassandra.util import Date, Time
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.storage.cassandra import CassandraStorage
from infra.storage.cassandra_schema import quorum_shortfall, read_indexes, read_tables
from infra.storage.cassandra_statements import (
    Statement,
    TableStatements,
    create_keyspace,
    simplified,
    wants_pin,
)
from infra.storage.errors import InvalidOperationError
from infra.storage.operations import (
    Bound,
    ColumnCondition,
    DataType,
    Delete,
    If,
    IfExists,
    IfNotExists,
    Key,
    Mutation,
    Operator,
    Put,
    Scan,
    TableSchema,
    WriteCondition,
)

T = DataType
TABLE = TableSchema(
    "Shop", "things", {"k": T.INT, "a": T.TEXT, "b": T.INT, "v": T.INT, "w": T.TEXT}, ("k",), ("a", "b"), frozenset("b")
)
STATEMENTS = TableStatements(TABLE)
KEY = Key((1,), ("x", 2))
NAME = '"Shop"."things"'
WHERE = 'WHERE "k" = ? AND "a" = ? AND "b" = ?'


def v(operator: Operator, value: int | None = None) -> ColumnCondition:
    return ColumnCondition("v", operator, value)


@pytest.mark.parametrize(
    ("mutation", "statement"),
    [
        (
            Put(TABLE, KEY, {"w": None, "v": 3}),
            Statement(f'INSERT INTO {NAME} ("k", "a", "b", "w", "v") VALUES (?, ?, ?, ?, ?)', (1, "x", 2, None, 3)),
        ),
        (
            Put(TABLE, KEY, {"w": None, "v": 3}, IfNotExists()),
            Statement(
                f'INSERT INTO {NAME} ("k", "a", "b", "w", "v") VALUES (?, ?, ?, ?, ?) IF NOT EXISTS',
                (1, "x", 2, UNSET_VALUE, 3),
                True,
            ),
        ),
        (
            Put(TABLE, KEY, {"w": None}, IfExists()),
            Statement(f'UPDATE {NAME} SET "w" = ? {WHERE} IF EXISTS', (None, 1, "x", 2), True),
        ),
        (
            Put(TABLE, KEY, {}, If((v(Operator.GE, 1), v(Operator.NE, 5)))),
            Statement(
                f'UPDATE {NAME} SET "v" = ? {WHERE} IF "v" >= ? AND "v" != ? AND "v" != NULL',
                (UNSET_VALUE, 1, "x", 2, 1, 5),
                True,
            ),
        ),
        (Delete(TABLE, KEY), Statement(f"DELETE FROM {NAME} {WHERE}", (1, "x", 2))),
        (
            Delete(TABLE, KEY, If((v(Operator.IS_NULL), ColumnCondition("w", Operator.EQ, "y")))),
            Statement(f'DELETE FROM {NAME} {WHERE} IF "v" = NULL AND "w" = ?', (1, "x", 2, "y"), True),
        ),
    ],
)
def test_a_mutation_is_one_statement(mutation: Mutation, statement: Statement):
    assert STATEMENTS.write(mutation) == statement
    assert STATEMENTS.write(mutation) == statement


def test_a_scan_asks_for_its_bounds_by_value_and_leaves_conditions_to_the_client():
    selected = f'SELECT "k", "a", "b", "v", "w" FROM {NAME} WHERE "k" = ?'
    scan = Scan(TABLE, (1,), Bound(("x",)), Bound(("y", 3), inclusive=False), limit=5)

    assert STATEMENTS.scan(scan) == Statement(
        f'{selected} AND ("a") >= (?) AND ("a", "b") < (?, ?) LIMIT ?', (1, "x", "y", 3, 5)
    )
    filtered = Scan(TABLE, (1,), where=(v(Operator.EQ, 1),), limit=5, reverse=True)
    assert STATEMENTS.scan(filtered) == Statement(f'{selected} ORDER BY "a" DESC, "b" ASC', (1,))
    assert STATEMENTS.scan(Scan(TABLE, (1,), Bound(()), limit=2**40)) == Statement(selected, (1,))
    assert STATEMENTS.scan(Scan(TABLE, (1,), end=Bound((), inclusive=False))) is None


@pytest.mark.parametrize(
    ("condition", "left"),
    [
        (IfExists(), IfExists()),
        (If(()), IfExists()),
        (If((v(Operator.EQ, None),)), None),
        (If((v(Operator.NE, None), v(Operator.EQ, 1))), None),
        (If((ColumnCondition("b", Operator.EQ, 2),)), IfExists()),
        (If((ColumnCondition("b", Operator.EQ, 3), v(Operator.EQ, 1))), None),
        (If((ColumnCondition("a", Operator.IS_NOT_NULL), v(Operator.EQ, 1))), If((v(Operator.EQ, 1),))),
        (If((ColumnCondition("a", Operator.IS_NULL),)), None),
    ],
)
def test_what_the_server_is_not_asked_is_decided_before(condition: WriteCondition, left: WriteCondition | None):
    found = simplified(Put(TABLE, KEY, {}, condition))

    assert (found and found.condition) == left


def test_only_conditions_that_an_absent_row_would_meet_want_a_pin():
    null, one = v(Operator.IS_NULL), v(Operator.EQ, 1)

    assert wants_pin(Delete(TABLE, KEY, If((null,))))
    assert not wants_pin(Delete(TABLE, KEY, If((null, one))))
    assert not wants_pin(Delete(TABLE, KEY, IfExists()))
    assert not wants_pin(Put(TABLE, KEY, {}))
    assert STATEMENTS.pin({"k": 1, "a": "x", "b": 2, "v": 3, "w": "y"}) == v(Operator.EQ, 3)
    assert STATEMENTS.pin({"k": 1, "a": "x", "b": 2, "v": None, "w": "y"}) == ColumnCondition("w", Operator.EQ, "y")
    assert STATEMENTS.pin({"k": 1, "a": "x", "b": 2, "v": None, "w": None}) is None


def test_a_row_of_keys_alone_cannot_be_put_only_if_it_exists():
    bare = TableSchema("shop", "bare", {"k": T.INT}, ("k",))

    with pytest.raises(InvalidOperationError, match="no columns but its key"):
        TableStatements(bare).write(Put(bare, Key((1,)), {}, IfExists()))


TEMPORAL = TableSchema("shop", "times", {"d": T.DATE, "t": T.TIME, "z": T.TIMESTAMPTZ}, ("d",))


@settings(max_examples=200, deadline=None)
@given(
    st.dates(min_value=datetime.date(1000, 1, 1)),
    st.times(),
    st.datetimes(min_value=datetime.datetime(1000, 1, 1)).map(
        lambda instant: instant.replace(microsecond=instant.microsecond // 1000 * 1000, tzinfo=datetime.UTC)
    ),
)
def test_days_and_times_survive_the_drivers_types(day: datetime.date, time: datetime.time, instant: datetime.datetime):
    statements = TableStatements(TEMPORAL)
    *_, (days, nanoseconds, milliseconds) = statements.write(Put(TEMPORAL, Key((day,)), {"t": time, "z": instant}))[:2]
    # As the driver decodes it: in floating point.
    read = datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=milliseconds / 1000.0)

    row = statements.row((Date(days - 2**31), Time(nanoseconds), read))

    assert row == {"d": day, "t": time.replace(fold=0), "z": instant}


def test_a_keyspaces_replication_holds_names_and_numbers_only():
    replication = {"class": "NetworkTopologyStrategy", "dc1": "3"}

    assert create_keyspace("Shop", replication) == (
        "CREATE KEYSPACE IF NOT EXISTS \"Shop\" WITH replication = {'class': 'NetworkTopologyStrategy', 'dc1': '3'}"
    )
    with pytest.raises(InvalidOperationError):
        create_keyspace("shop", {"class": "NetworkTopologyStrategy", "dc'1": "3"})


@pytest.mark.parametrize(
    ("replication", "live", "shortfall"),
    [
        ({"class": "org.apache.cassandra.locator.SimpleStrategy", "replication_factor": "1"}, {"dc1": 1}, False),
        ({"class": "SimpleStrategy", "replication_factor": "3"}, {"dc1": 2}, False),
        ({"class": "SimpleStrategy", "replication_factor": "3"}, {"dc1": 1}, True),
        ({"class": "SimpleStrategy", "replication_factor": "3"}, {"dc1": 1, "dc2": 1}, False),
        ({"class": "SimpleStrategy", "replication_factor": "3/1"}, {"dc1": 1}, True),
        ({"class": "NetworkTopologyStrategy", "dc1": "3"}, {"dc2": 9}, True),
        ({"class": "NetworkTopologyStrategy", "dc1": "3", "dc2": "3"}, {"dc1": 3}, True),
        ({"class": "NetworkTopologyStrategy", "dc1": "3", "dc2": "3"}, {"dc1": 3, "dc2": 1}, False),
        ({"class": "NetworkTopologyStrategy", "dc1": "0"}, {"dc1": 3}, True),
        ({"class": "org.apache.cassandra.locator.EverywhereStrategy"}, {}, False),
    ],
)
def test_a_quorum_is_more_than_half_of_all_replicas(
    replication: Mapping[str, str], live: Mapping[str, int], shortfall: bool
):
    assert bool(quorum_shortfall(replication, live)) == shortfall


def test_tables_are_read_in_the_order_of_their_keys():
    columns = [
        ("shop", "t", "b", "clustering", 1, "desc", "text"),
        ("shop", "t", "a", "clustering", 0, "asc", "int"),
        ("shop", "t", "z", "partition_key", 0, "none", "date"),
        ("shop", "t", "y", "partition_key", 1, "none", "time"),
        ("shop", "t", "w", "regular", -1, "none", "blob"),
        ("shop", "t", "V", "regular", -1, "none", "timestamp"),
        ("shop", "no key of ours", "a", "partition_key", 0, "none", "int"),
        ("system_auth", "roles", "a", "partition_key", 0, "none", "text"),
    ]
    indexes = read_indexes([("shop", "t", "anything", {"target": '"V"'}), ("shop", "u", "other", None)])

    assert read_tables(columns, indexes) == [
        TableSchema(
            "shop",
            "t",
            {"z": T.DATE, "y": T.TIME, "a": T.INT, "b": T.TEXT, "V": T.TIMESTAMPTZ, "w": T.BLOB},
            ("z", "y"),
            ("a", "b"),
            frozenset({"b"}),
            frozenset({"V"}),
        )
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"contact_points": []},
        {"contact_points": "127.0.0.1"},
        {"replication_factor": 0},
        {"replication_strategy": "Everywhere"},
        {"compaction_strategy": "FAST"},
        {"request_timeout_s": 0.0},
        {"max_in_flight": 0},
        {"metadata_namespace": "a b"},
    ],
    ids=repr,
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, object]):
    with pytest.raises(InvalidOperationError):
        CassandraStorage(**{"contact_points": ["127.0.0.1"], **settings})  # type: ignore[arg-type]
