"""What every adapter refuses, decided in one place so that all adapters refuse the same calls.

`TableRules` is compiled once for each table and then asked for every read and write. Messages name tables,
columns and types, never values: they end up in logs.

Rules that the port leaves open, settled here:

- Names are `[A-Za-z_][A-Za-z0-9_]*`; namespaces and tables have at most 48 characters (Cassandra's limit). Names
  that differ only by case are refused, because SQLite and some file systems cannot tell them apart.
- Key columns are never NULL, FLOAT or DOUBLE. Only clustering columns descend, only columns outside the key are
  indexed, and a table that has more indexes than were declared is still the table that was declared.
- A bool is no int and an int is no float. INT has 32 bits; BIGINT goes from -2^53 to 2^53, as in ScalarDB, so that
  every program that shares a table can hold what it reads. A FLOAT must be exact in 32 bits. NaN is refused: it
  equals nothing, itself included, and SQLite would store NULL.
- DATE is a date and no datetime. TIME and TIMESTAMP have no zone, TIMESTAMPTZ is in UTC. Both timestamps are exact to
  the millisecond; no date lies before the year 1000 (ScalarDB's ranges).
- TEXT must be encodable as UTF-8, so no lone surrogates. NUL is allowed.
- Subclasses of int, str, bytes and float (enumerations) are taken by their plain value.
"""

from __future__ import annotations

import datetime
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from infra.storage.errors import InvalidOperationError
from infra.storage.operations import (
    Bound,
    ColumnCondition,
    CrossPartition,
    DataType,
    Delete,
    If,
    IfExists,
    IfNotExists,
    IndexScan,
    Key,
    Mutation,
    Operator,
    Put,
    Scan,
    StorageInfo,
    TableSchema,
    Value,
    WriteCondition,
)
from infra.storage.port import atomic_unit

MAX_NAME_LENGTH = 48
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


def is_identifier(name: str) -> bool:
    """Whether `name` may stand in a statement or a file name."""
    return isinstance(name, str) and _IDENTIFIER.fullmatch(name) is not None


def check_identifier(name: str) -> str:
    """`name` itself if it is an identifier, else InvalidOperationError."""
    if not is_identifier(name):
        raise InvalidOperationError(f"{name!r} is not a name: letters, digits and _ only, no digit first")
    return name


def check_table(table: TableSchema) -> None:
    """Refuse a table that some adapter could not hold."""
    for name in (table.namespace, table.name):
        check_identifier(name)
        if len(name) > MAX_NAME_LENGTH:
            raise InvalidOperationError(f"{name!r} is longer than {MAX_NAME_LENGTH} characters")
        if name.lower().startswith("sqlite_"):
            raise InvalidOperationError(f"{name!r}: names that begin with sqlite_ are SQLite's own")
    for column, data_type in table.columns.items():
        check_identifier(column)
        if not isinstance(data_type, DataType):
            raise InvalidOperationError(f"{table.full_name}.{column}: {data_type!r} is not a DataType")
    if len({column.lower() for column in table.columns}) != len(table.columns):
        raise InvalidOperationError(f"{table.full_name}: two columns differ only by case")
    if not table.partition_key:
        raise InvalidOperationError(f"{table.full_name}: no partition key")
    if len(set(table.key_columns)) != len(table.key_columns):
        raise InvalidOperationError(f"{table.full_name}: a column stands twice in the primary key")
    for column in table.key_columns:
        if column not in table.columns:
            raise InvalidOperationError(f"{table.full_name}: key column {column!r} is not a column")
        if table.columns[column] in (DataType.FLOAT, DataType.DOUBLE):
            raise InvalidOperationError(f"{table.full_name}.{column}: {table.columns[column]} cannot be a key")
    for column in table.descending:
        if column not in table.clustering_key:
            raise InvalidOperationError(f"{table.full_name}: {column!r} descends, but is no clustering column")
    for column in table.indexes:
        if column not in table.columns or column in table.key_columns:
            raise InvalidOperationError(f"{table.full_name}: {column!r} is indexed, but is no column outside the key")


def is_same_table(declared: TableSchema, existing: TableSchema) -> bool:
    """Whether what exists is what was declared; the order of non-key columns and further indexes do not matter."""
    return (
        declared.full_name == existing.full_name
        and dict(declared.columns) == dict(existing.columns)
        and declared.partition_key == existing.partition_key
        and declared.clustering_key == existing.clustering_key
        and declared.descending == existing.descending
        and declared.indexes <= existing.indexes
    )


def difference(declared: TableSchema, existing: TableSchema) -> str:
    """In words, what keeps `existing` from being `declared`; empty if nothing does."""
    found = []
    for column, data_type in declared.columns.items():
        there = existing.columns.get(column)
        if there is None:
            found.append(f"no column {column}")
        elif there is not data_type:
            found.append(f"column {column} is {there}, not {data_type}")
    found += [f"column {column} was not declared" for column in existing.columns if column not in declared.columns]
    for what in ("partition_key", "clustering_key"):
        if getattr(declared, what) != getattr(existing, what):
            found.append(f"the {what.replace('_', ' ')} is {getattr(existing, what)}, not {getattr(declared, what)}")
    if declared.descending != existing.descending:
        found.append(f"descending are {sorted(existing.descending)}, not {sorted(declared.descending)}")
    found += [f"column {column} is not indexed" for column in sorted(declared.indexes - existing.indexes)]
    return ", ".join(found)


def with_column(table: TableSchema, column: str, data_type: DataType) -> TableSchema:
    """`table` with one column more (itself, if it has it); InvalidOperationError if the column is there otherwise."""
    there = table.columns.get(column)
    if there is data_type:
        return table
    if there is not None:
        raise InvalidOperationError(f"{table.full_name}.{column} is {there}, not {data_type}")
    changed = replace(table, columns={**table.columns, column: data_type})
    check_table(changed)
    return changed


def with_index(table: TableSchema, column: str) -> TableSchema:
    """`table` with `column` indexed; InvalidOperationError if it cannot be."""
    changed = replace(table, indexes=table.indexes | {column})
    check_table(changed)
    return changed


def needs_creation(table: TableSchema, existing: Iterable[TableSchema]) -> bool:
    """Whether `table` is absent from `existing`; InvalidOperationError if something else stands in its place."""
    for other in existing:
        if other.full_name == table.full_name:
            if not is_same_table(table, other):
                raise InvalidOperationError(f"{table.full_name} exists otherwise: {difference(table, other)}")
            return False
        if other.full_name.lower() == table.full_name.lower() or (
            other.namespace != table.namespace and other.namespace.lower() == table.namespace.lower()
        ):
            raise InvalidOperationError(f"{table.full_name} and {other.full_name} differ only by case")
    return True


def _check_boolean(value: Value) -> None:
    if not isinstance(value, bool):
        raise TypeError


def _check_int(value: Value) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError
    if not -(2**31) <= value < 2**31:
        raise ValueError("out of the range of 32 bits")


def _check_bigint(value: Value) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError
    if not -(2**53) <= value <= 2**53:
        raise ValueError("out of the range of BIGINT, which is -2^53 to 2^53")


def _check_float(value: Value) -> None:
    if not isinstance(value, float):
        raise TypeError
    try:
        exact: bool = struct.unpack("f", struct.pack("f", value))[0] == value
    except OverflowError:
        exact = False
    if not exact:
        raise ValueError("not exact in 32 bits (NaN never is)")


def _check_double(value: Value) -> None:
    if not isinstance(value, float):
        raise TypeError
    if value != value:
        raise ValueError("NaN")


def _check_text(value: Value) -> None:
    if not isinstance(value, str):
        raise TypeError
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("not encodable as UTF-8") from None


def _check_blob(value: Value) -> None:
    if not isinstance(value, bytes):
        raise TypeError


def _check_date(value: Value) -> None:
    if not isinstance(value, datetime.date) or isinstance(value, datetime.datetime):
        raise TypeError
    _check_year(value.year)


def _check_time(value: Value) -> None:
    if not isinstance(value, datetime.time):
        raise TypeError
    if value.tzinfo is not None:
        raise ValueError("a time of day has no zone")


def _check_timestamp(value: Value) -> None:
    if not isinstance(value, datetime.datetime):
        raise TypeError
    if value.tzinfo is not None:
        raise ValueError("has a zone; a datetime with zone is a TIMESTAMPTZ")
    _check_year(value.year)
    _check_milliseconds(value)


def _check_timestamptz(value: Value) -> None:
    if not isinstance(value, datetime.datetime):
        raise TypeError
    if value.utcoffset() != datetime.timedelta(0):
        raise ValueError("must be in UTC")
    _check_year(value.year)
    _check_milliseconds(value)


def _check_year(year: int) -> None:
    if year < 1000:
        raise ValueError("before the year 1000")


def _check_milliseconds(value: datetime.datetime) -> None:
    if value.microsecond % 1000:
        raise ValueError("not exact to the millisecond")


_CHECKS: Mapping[DataType, Callable[[Value], None]] = {
    DataType.BOOLEAN: _check_boolean,
    DataType.INT: _check_int,
    DataType.BIGINT: _check_bigint,
    DataType.FLOAT: _check_float,
    DataType.DOUBLE: _check_double,
    DataType.TEXT: _check_text,
    DataType.BLOB: _check_blob,
    DataType.DATE: _check_date,
    DataType.TIME: _check_time,
    DataType.TIMESTAMP: _check_timestamp,
    DataType.TIMESTAMPTZ: _check_timestamptz,
}


class TableRules:
    """What reads and writes of one table must look like. Every `check_…` raises InvalidOperationError."""

    def __init__(self, table: TableSchema) -> None:
        check_table(table)
        self._table = table
        self._checks = {column: _CHECKS[data_type] for column, data_type in table.columns.items()}
        self._value_checks = {c: check for c, check in self._checks.items() if c not in table.key_columns}

    def check_key(self, key: Key) -> None:
        if not isinstance(key, Key):
            raise InvalidOperationError(f"{self._table.full_name}: {type(key).__name__} is not a Key")
        self.check_partition(key.partition)
        self._check_key_values(self._table.clustering_key, key.clustering)

    def check_partition(self, partition: tuple[Value, ...]) -> None:
        self._check_key_values(self._table.partition_key, partition)

    def check_scan(self, scan: Scan) -> None:
        self.check_partition(scan.partition)
        for bound in (scan.start, scan.end):
            if bound is not None:
                self._check_bound(bound)
        for condition in scan.where:
            self._check_condition(condition)
        self._check_limit(scan.limit)

    def check_cross_partition(self, selection: CrossPartition) -> None:
        if isinstance(selection, IndexScan):
            if selection.column not in self._table.indexes:
                raise InvalidOperationError(f"{self._table.full_name}: {selection.column!r} is not indexed")
            if selection.value is None:
                raise InvalidOperationError(f"{self._table.full_name}.{selection.column}: an index does not hold NULL")
            self._check_condition(ColumnCondition(selection.column, Operator.EQ, selection.value))
        for condition in selection.where:
            self._check_condition(condition)
        self._check_limit(selection.limit)

    def check_mutation(self, mutation: Mutation) -> None:
        self.check_key(mutation.key)
        if isinstance(mutation, Put):
            self._check_columns(mutation.columns)
        condition: WriteCondition | None = mutation.condition
        if isinstance(condition, If):
            for column_condition in condition.conditions:
                self._check_condition(column_condition)
        elif isinstance(condition, IfNotExists):
            if isinstance(mutation, Delete):
                raise InvalidOperationError(f"{self._table.full_name}: a delete cannot ask for an absent row")
        elif condition is not None and not isinstance(condition, IfExists):
            raise InvalidOperationError(f"{type(condition).__name__} is not a condition of a write")

    def _check_limit(self, limit: int) -> None:
        if not isinstance(limit, int) or isinstance(limit, bool) or not 0 <= limit < 2**63:
            raise InvalidOperationError(f"{self._table.full_name}: a limit is 0 (none) or a positive number")

    def _check_key_values(self, columns: tuple[str, ...], values: tuple[Value, ...]) -> None:
        if not isinstance(values, tuple) or len(values) != len(columns):
            raise InvalidOperationError(f"{self._table.full_name}: a key needs values for {columns}")
        for column, value in zip(columns, values, strict=True):
            if value is None:
                raise InvalidOperationError(f"{self._table.full_name}.{column}: NULL in a key")
            try:
                self._checks[column](value)
            except (TypeError, ValueError) as error:
                raise self._mismatch(column, value, error) from None

    def _check_columns(self, columns: Mapping[str, Value]) -> None:
        checks = self._value_checks
        for column, value in columns.items():
            try:
                check = checks[column]
                if value is not None:
                    check(value)
            except KeyError:
                what = "a key column, which a put names in its key" if column in self._checks else "no column"
                raise InvalidOperationError(f"{self._table.full_name}: {column!r} is {what}") from None
            except (TypeError, ValueError) as error:
                raise self._mismatch(column, value, error) from None

    def _check_condition(self, condition: ColumnCondition) -> None:
        if not isinstance(condition, ColumnCondition) or not isinstance(condition.operator, Operator):
            raise InvalidOperationError(f"{self._table.full_name}: not a condition on a column")
        check = self._checks.get(condition.column)
        if check is None:
            raise InvalidOperationError(f"{self._table.full_name}: {condition.column!r} is no column")
        if condition.value is not None:
            try:
                check(condition.value)
            except (TypeError, ValueError) as error:
                raise self._mismatch(condition.column, condition.value, error) from None

    def _check_bound(self, bound: Bound) -> None:
        if not isinstance(bound.values, tuple):
            raise InvalidOperationError(f"{self._table.full_name}: a bound holds a tuple of values")
        columns = self._table.clustering_key[: len(bound.values)]
        self._check_key_values(columns, bound.values)

    def _mismatch(self, column: str, value: Value, error: TypeError | ValueError) -> InvalidOperationError:
        data_type = self._table.columns[column]
        what = str(error) if isinstance(error, ValueError) else f"not {type(value).__name__}"
        return InvalidOperationError(f"{self._table.full_name}.{column} is {data_type}: {what}")


def check_one_unit(mutations: Sequence[Mutation], info: StorageInfo) -> None:
    """Refuse a batch that spans two atomic units, names a key twice or is larger than the storage takes.

    The mutations were checked one by one.
    """
    if len(mutations) < 2:
        return
    if 0 < info.max_mutations < len(mutations):
        raise InvalidOperationError(f"one batch, {len(mutations)} mutations: {info.name} takes {info.max_mutations}")
    first = atomic_unit(info, mutations[0].table, mutations[0].key)
    seen = set()
    for mutation in mutations:
        table, key = mutation.table, mutation.key
        if atomic_unit(info, table, key) != first:
            raise InvalidOperationError(f"one batch, two atomic units ({info.atomicity.name}): {table.full_name}")
        seen.add((table.namespace, table.name, key.partition, key.clustering))
    if len(seen) != len(mutations):
        raise InvalidOperationError(f"one batch names a key twice: {mutations[0].table.full_name}")
