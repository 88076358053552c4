"""The SQL of one table: statements composed from validated names, values always bound.

Pure: nothing here opens a file. Names enter the text only through `quoted`, operators only through a table of
literals, and every value through a `?`. SQLite has no types for days and times: they are integers in the order of
what they stand for (days, and milliseconds, since 1970; microseconds of the day).
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from infra.storage.operations import (
    Bound,
    ColumnCondition,
    CrossPartition,
    DataType,
    Delete,
    If,
    IfNotExists,
    IndexScan,
    Key,
    Mutation,
    Operator,
    Put,
    Row,
    Scan,
    TableSchema,
    Value,
)
from infra.storage.statement_text import conjunction, listed, placeholders, quoted, remember
from infra.storage.validation import check_identifier

# SQLite's column affinities. Only values of the right type reach a statement, so no affinity ever converts one.
_AFFINITIES: Mapping[DataType, str] = {
    DataType.BOOLEAN: "INTEGER",
    DataType.INT: "INTEGER",
    DataType.BIGINT: "INTEGER",
    DataType.FLOAT: "REAL",
    DataType.DOUBLE: "REAL",
    DataType.TEXT: "TEXT",
    DataType.BLOB: "BLOB",
    DataType.DATE: "INTEGER",
    DataType.TIME: "INTEGER",
    DataType.TIMESTAMP: "INTEGER",
    DataType.TIMESTAMPTZ: "INTEGER",
}

_TEMPORAL = frozenset({DataType.DATE, DataType.TIME, DataType.TIMESTAMP, DataType.TIMESTAMPTZ})
_DAY_ZERO = datetime.date(1970, 1, 1)
_TIME_ZERO = datetime.datetime(1970, 1, 1)
_MS = datetime.timedelta(milliseconds=1)
_US = datetime.timedelta(microseconds=1)

_OPERATORS: Mapping[Operator, str] = {
    Operator.EQ: "= ?",
    Operator.NE: "<> ?",
    Operator.LT: "< ?",
    Operator.LE: "<= ?",
    Operator.GT: "> ?",
    Operator.GE: ">= ?",
    Operator.IS_NULL: "IS NULL",
    Operator.IS_NOT_NULL: "IS NOT NULL",
}

_UNARY = frozenset({Operator.IS_NULL, Operator.IS_NOT_NULL})

# Statements differ by the columns and conditions that callers name, so there are a few dozen for a table. A caller
# that composes filters freely must not grow the cache without end.

Parameters = tuple[Value, ...]


class Write(NamedTuple):
    """A statement that writes one row. `conditional`: it must change a row, else its condition did not hold."""

    sql: str
    conditional: bool


Statement = TypeVar("Statement", str, Write)


class TableStatements:
    """Turns reads and mutations of one table into SQL text and parameters, and result rows into `Row`s."""

    def __init__(self, table: TableSchema) -> None:
        self.table = table
        self._columns = tuple(table.columns)
        self._name = quoted(table.name)
        self._key = conjunction(f"{quoted(column)} = ?" for column in table.key_columns)
        self._selected = listed(self._columns)
        self._decoders = tuple((c, _DECODERS[t]) for c, t in table.columns.items() if t in _DECODERS)
        self._has_temporal = not _TEMPORAL.isdisjoint(table.columns.values())
        self._writes: dict[object, Write] = {}
        self._scans: dict[object, str] = {}
        self.get = f"SELECT {self._selected} FROM {self._name} WHERE {self._key}"

    def create_table(self) -> str:
        columns = ", ".join(f"{quoted(c)} {_AFFINITIES[data_type]}" for c, data_type in self.table.columns.items())
        key = ", ".join(f"{quoted(c)}{' DESC' if c in self.table.descending else ''}" for c in self.table.key_columns)
        return f"CREATE TABLE {self._name} ({columns}, PRIMARY KEY ({key})) WITHOUT ROWID"

    def create_index(self, column: str) -> str:
        name = _index_name(self.table, column)
        return f"CREATE INDEX IF NOT EXISTS {name} ON {self._name} ({quoted(column)})"

    def drop_index(self, column: str) -> str:
        return f"DROP INDEX IF EXISTS {_index_name(self.table, column)}"

    def add_column(self, column: str, data_type: DataType) -> str:
        return f"ALTER TABLE {self._name} ADD COLUMN {quoted(column)} {_AFFINITIES[data_type]}"

    def drop_table(self) -> str:
        return f"DROP TABLE IF EXISTS {self._name}"

    def truncate_table(self) -> str:
        return f"DELETE FROM {self._name}"

    def row(self, values: Sequence[Value]) -> Row:
        """The columns of `get` and `scan` as the port's row."""
        row = dict(zip(self._columns, values, strict=True))
        for column, decoded in self._decoders:
            value = row[column]
            if value is not None:
                row[column] = decoded(value)
        return row

    def key(self, key: Key) -> Parameters:
        """The parameters of `get`."""
        return self._bound(key.partition + key.clustering)

    def write(self, mutation: Mutation) -> tuple[Write, Parameters]:
        """The statement that applies `mutation` if its condition holds, with its parameters."""
        condition = mutation.condition
        conditions = condition.conditions if isinstance(condition, If) else ()
        columns = tuple(mutation.columns) if isinstance(mutation, Put) else None
        shape = (columns, type(condition), *((c.column, c.operator) for c in conditions))
        statement = self._writes.get(shape)
        if statement is None:
            statement = remember(self._writes, shape, self._compose_write(mutation))
        key = mutation.key.partition + mutation.key.clustering
        values = tuple(mutation.columns.values()) if isinstance(mutation, Put) else ()
        if isinstance(mutation, Put) and (condition is None or isinstance(condition, IfNotExists)):
            return statement, self._bound(key + values)
        return statement, self._bound(values + key + _compared(conditions))

    def scan(self, scan: Scan) -> tuple[str, Parameters]:
        """The statement that reads what `scan` names, with its parameters."""
        shape = (
            None if scan.start is None else (len(scan.start.values), scan.start.inclusive),
            None if scan.end is None else (len(scan.end.values), scan.end.inclusive),
            tuple((c.column, c.operator) for c in scan.where),
            scan.reverse,
        )
        sql = self._scans.get(shape)
        if sql is None:
            sql = remember(self._scans, shape, self._compose_scan(scan))
        start = scan.start.values if scan.start else ()
        end = scan.end.values if scan.end else ()
        return sql, self._bound((*scan.partition, *start, *end, *_compared(scan.where), scan.limit or -1))

    def page(self, selection: CrossPartition, after: Key | None, page_size: int) -> tuple[str, Parameters]:
        """The statement that reads the rows of `selection` in the order of their keys, from `after` on."""
        key = self.table.key_columns
        terms: list[str] = []
        values: Parameters = ()
        if isinstance(selection, IndexScan):
            terms, values = [f"{quoted(selection.column)} = ?"], (selection.value,)
        if after is not None:
            terms.append(f"({listed(key)}) > ({placeholders(len(key))})")
        terms += map(_comparison, selection.where)
        where = f" WHERE {conjunction(terms)}" if terms else ""
        position = after.partition + after.clustering if after is not None else ()
        parameters = (*values, *position, *_compared(selection.where), page_size)
        sql = f"SELECT {self._selected} FROM {self._name}{where} ORDER BY {listed(key)} LIMIT ?"
        return sql, self._bound(parameters)

    def first_partition(self) -> str:
        """The smallest partition key."""
        columns = listed(self.table.partition_key)
        return f"SELECT {columns} FROM {self._name} ORDER BY {columns} LIMIT 1"

    def next_partition(self) -> str:
        """The smallest partition key above the given one: one seek, however many rows a partition holds."""
        columns = listed(self.table.partition_key)
        marks = placeholders(len(self.table.partition_key))
        return f"SELECT {columns} FROM {self._name} WHERE ({columns}) > ({marks}) ORDER BY {columns} LIMIT 1"

    def partition(self, values: Sequence[Value]) -> tuple[Value, ...]:
        """The columns of `first_partition` and `next_partition` as a partition key."""
        types = self.table.columns
        return tuple(
            _DECODERS[types[column]](value) if types[column] in _DECODERS else value
            for column, value in zip(self.table.partition_key, values, strict=True)
        )

    def _bound(self, values: Parameters) -> Parameters:
        return tuple(map(_encoded, values)) if self._has_temporal else values

    def _compose_write(self, mutation: Mutation) -> Write:
        condition = mutation.condition
        conditions = condition.conditions if isinstance(condition, If) else ()
        where = conjunction([self._key, *map(_comparison, conditions)])
        if isinstance(mutation, Delete):
            return Write(f"DELETE FROM {self._name} WHERE {where}", condition is not None)
        columns = tuple(mutation.columns)
        if condition is not None and not isinstance(condition, IfNotExists):
            # With nothing to set, the statement must still find the row and count it.
            one = quoted(self._columns[0])
            changes = _assignments(columns, "?") or f"{one} = {one}"
            return Write(f"UPDATE {self._name} SET {changes} WHERE {where}", True)
        keys = listed(self.table.key_columns)
        inserted = listed(self.table.key_columns + columns)
        marks = placeholders(len(self.table.key_columns) + len(columns))
        insert = f"INSERT INTO {self._name} ({inserted}) VALUES ({marks}) ON CONFLICT ({keys}) DO"
        if isinstance(condition, IfNotExists):
            return Write(f"{insert} NOTHING", True)
        if not columns:
            return Write(f"{insert} NOTHING", False)
        return Write(f"{insert} UPDATE SET {_assignments(columns, None)}", False)

    def _compose_scan(self, scan: Scan) -> str:
        table = self.table
        terms = [f"{quoted(column)} = ?" for column in table.partition_key]
        terms += self._range(scan.start, ">=", ">")
        terms += self._range(scan.end, "<=", "<")
        terms += map(_comparison, scan.where)
        order = ", ".join(
            f"{quoted(column)} {'DESC' if (column in table.descending) != scan.reverse else 'ASC'}"
            for column in table.key_columns
        )
        return f"SELECT {self._selected} FROM {self._name} WHERE {conjunction(terms)} ORDER BY {order} LIMIT ?"

    def _range(self, bound: Bound | None, inclusive: str, exclusive: str) -> list[str]:
        if bound is None:
            return []
        if not bound.values:
            return [] if bound.inclusive else ["0"]
        columns = listed(self.table.clustering_key[: len(bound.values)])
        return [f"({columns}) {inclusive if bound.inclusive else exclusive} ({placeholders(len(bound.values))})"]


def _encoded(value: Value) -> Value:
    """A value as SQLite holds it."""
    match value:
        case datetime.datetime():
            return (value.replace(tzinfo=None) - _TIME_ZERO) // _MS
        case datetime.date():
            return (value - _DAY_ZERO).days
        case datetime.time():
            return ((value.hour * 60 + value.minute) * 60 + value.second) * 1_000_000 + value.microsecond
        case _:
            return value


_DECODERS: Mapping[DataType, Callable[[Any], Value]] = {
    DataType.BOOLEAN: bool,
    DataType.DATE: lambda days: _DAY_ZERO + datetime.timedelta(days=days),
    DataType.TIME: lambda microseconds: (_TIME_ZERO + microseconds * _US).time(),
    DataType.TIMESTAMP: lambda milliseconds: _TIME_ZERO + milliseconds * _MS,
    DataType.TIMESTAMPTZ: lambda milliseconds: (_TIME_ZERO + milliseconds * _MS).replace(tzinfo=datetime.UTC),
}


def _index_name(table: TableSchema, column: str) -> str:
    """A name that no table and no other index can have: names hold no `$`."""
    return f'"{check_identifier(table.name)}$index${check_identifier(column)}"'


def _comparison(condition: ColumnCondition) -> str:
    return f"{quoted(condition.column)} {_OPERATORS[condition.operator]}"


def _compared(conditions: Iterable[ColumnCondition]) -> Parameters:
    return tuple(c.value for c in conditions if c.operator not in _UNARY)


def _assignments(columns: Iterable[str], source: str | None) -> str:
    """`"a" = ?` for each column, or `"a" = excluded."a"` without a source."""
    return ", ".join(f"{quoted(c)} = {source or f'excluded.{quoted(c)}'}" for c in columns)
