"""The CQL of one table: statements composed from validated names, values always bound.

Pure: nothing here talks to a server. Names enter the text only through `quoted`, operators only through a table of
literals, and every value through a `?`.

How the port's sentences become CQL's
    put, no condition       INSERT, which also makes a row that has no column (UPDATE would not)
    put IfNotExists         INSERT … IF NOT EXISTS; NULLs are left unset, for the row is new and needs no tombstones
    put If, IfExists        UPDATE … IF …; with nothing to set, one column is set to "unset", which writes nothing
    delete If, IfExists     DELETE … IF …
    !=                      "c" != ? AND "c" != NULL, since for Cassandra NULL differs from every value
    compared with NULL      never holds: `simplified` finds it, and nothing is sent
    a key column            has no conditions in CQL; its value is in the mutation, so `simplified` decides
    IS NULL and no other    holds for an absent row in Cassandra: `wants_pin` finds it, see `CassandraStorage`
    bounds                  relations on tuples, by value also where columns descend; `where` is not sent

DATE is bound as days since 1970 plus 2^31, TIME as nanoseconds of the day, TIMESTAMPTZ as milliseconds since 1970.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias, cast

from cassandra.query import UNSET_VALUE

from infra.storage.conditions import holds
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
    Row,
    Scan,
    TableSchema,
    Value,
)
from infra.storage.statement_text import conjunction, listed, placeholders, quoted, remember

TYPES: Mapping[DataType, str] = {
    DataType.BOOLEAN: "boolean",
    DataType.INT: "int",
    DataType.BIGINT: "bigint",
    DataType.FLOAT: "float",
    DataType.DOUBLE: "double",
    DataType.TEXT: "text",
    DataType.BLOB: "blob",
    DataType.DATE: "date",
    DataType.TIME: "time",
    DataType.TIMESTAMPTZ: "timestamp",
}
"""ScalarDB's choice of CQL types. TIMESTAMP, a time without zone, has none."""

COMPACTION_STRATEGIES: Mapping[str, str] = {
    "STCS": "SizeTieredCompactionStrategy",
    "LCS": "LeveledCompactionStrategy",
    "TWCS": "TimeWindowCompactionStrategy",
    "UCS": "UnifiedCompactionStrategy",
}

SHORT_LIVED: Mapping[str, int] = {"gc_grace_seconds": 60, "memtable_flush_period_in_ms": 20_000}
"""Options of a table whose rows are deleted soon after they were written.

Cassandra keeps every deletion for `gc_grace_seconds` (ten days, if nobody says otherwise), a read passes over all those
of its partition, and fails at 100,000. What the time is for is that a replica which missed a deletion learns of it, so
that the row does not come back; a short-lived row may. Younger deletions still count: with a minute, a partition bears
1,600 a second. They are thrown away when files are merged, hence the flushing, which makes files to merge."""

_SHORT_LIVED = " AND ".join(f"{option} = {value}" for option, value in SHORT_LIVED.items())

_CONDITIONS: Mapping[Operator, str] = {
    Operator.EQ: "{0} = ?",
    Operator.NE: "{0} != ? AND {0} != NULL",
    Operator.LT: "{0} < ?",
    Operator.LE: "{0} <= ?",
    Operator.GT: "{0} > ?",
    Operator.GE: "{0} >= ?",
    Operator.IS_NULL: "{0} = NULL",
    Operator.IS_NOT_NULL: "{0} != NULL",
}

_UNARY = frozenset({Operator.IS_NULL, Operator.IS_NOT_NULL})

# Types whose equality is that of their bytes and which are small, so that a condition on one costs little.
_PIN_TYPES = frozenset(
    {DataType.BOOLEAN, DataType.INT, DataType.BIGINT, DataType.DATE, DataType.TIME, DataType.TIMESTAMPTZ}
)

_MAX_LIMIT = 2**31 - 1  # CQL's LIMIT is an int

_DATE_OFFSET = 2**31
_DAY_ZERO = datetime.date(1970, 1, 1)
_TIME_ZERO = datetime.datetime(1970, 1, 1)
_ORDINAL_ZERO = _DAY_ZERO.toordinal()
_MS = datetime.timedelta(milliseconds=1)

_BOUND_AS_THEY_ARE = frozenset({type(None), bool, int, str, bytes})

Parameters: TypeAlias = tuple[Any, ...]
"""Values as the driver's prepared statements take them."""


class Statement(NamedTuple):
    """A statement and what it is executed with. `conditional`: it has an IF."""

    cql: str
    parameters: Parameters
    conditional: bool = False


class _Cached(NamedTuple):
    cql: str
    conditional: bool


class TableStatements:
    """Turns reads and mutations of one table into CQL and parameters, and result rows into `Row`s."""

    def __init__(self, table: TableSchema) -> None:
        self.table = table
        self._columns = tuple(table.columns)
        self._others = tuple(column for column in table.columns if column not in table.key_columns)
        self._name = _full_name(table)
        self._key = conjunction(f"{quoted(column)} = ?" for column in table.key_columns)
        self._partition = conjunction(f"{quoted(column)} = ?" for column in table.partition_key)
        self._selected = listed(self._columns)
        self._decoders = tuple((c, _DECODERS[t]) for c, t in table.columns.items() if t in _DECODERS)
        self._writes: dict[object, _Cached] = {}
        self._scans: dict[object, str] = {}
        self._get = f"SELECT {self._selected} FROM {self._name} WHERE {self._key}"
        self._all = f"SELECT {self._selected} FROM {self._name}"
        self._token = f"token({listed(table.partition_key)})"
        self._in_range = f"WHERE {self._token} > ? AND {self._token} <= ?"

    # -- rows

    def row(self, values: Sequence[Any]) -> Row:
        """The columns of `get`, `scan`, `ring_rows` (all but the last) and `by_index` as the port's row."""
        row: Row = dict(zip(self._columns, values, strict=True))
        for column, decoded in self._decoders:
            value = row[column]
            if value is not None:
                row[column] = decoded(value)
        return row

    def partition(self, values: Sequence[Any]) -> tuple[Value, ...]:
        """The columns of `ring_partitions`, all but the last, as a partition key."""
        types = self.table.columns
        return tuple(
            _DECODERS[types[column]](value) if types[column] in _DECODERS else cast(Value, value)
            for column, value in zip(self.table.partition_key, values, strict=True)
        )

    # -- reads

    def get(self, key: Key) -> Statement:
        return Statement(self._get, _encoded_all(key.partition + key.clustering))

    def scan(self, scan: Scan) -> Statement | None:
        """The statement for a partition's rows between two bounds; None if the bounds leave nothing.

        The limit is in it only if there is no `where`, which the caller evaluates.
        """
        if any(bound is not None and not bound.values and not bound.inclusive for bound in (scan.start, scan.end)):
            return None
        limited = 0 < scan.limit <= _MAX_LIMIT and not scan.where
        shape = (_shape(scan.start), _shape(scan.end), limited, scan.reverse)
        cql = self._scans.get(shape)
        if cql is None:
            cql = remember(self._scans, shape, self._compose_scan(scan, limited))
        start = scan.start.values if scan.start else ()
        end = scan.end.values if scan.end else ()
        limit: Parameters = (scan.limit,) if limited else ()
        return Statement(cql, _encoded_all(scan.partition + start + end) + limit)

    def ring_rows(self, after: int, upto: int) -> Statement:
        """All rows whose token is in that range, each with its token as the last column."""
        return Statement(f"SELECT {self._selected}, {self._token} FROM {self._name} {self._in_range}", (after, upto))

    def ring_partitions(self, after: int, upto: int) -> Statement:
        """All partition keys whose token is in that range, each with its token as the last column."""
        distinct = f"DISTINCT {listed(self.table.partition_key)}"
        return Statement(f"SELECT {distinct}, {self._token} FROM {self._name} {self._in_range}", (after, upto))

    def by_index(self, column: str, value: Value) -> Statement:
        return Statement(f"{self._all} WHERE {quoted(column)} = ?", (_encoded(value),))

    # -- writes

    def write(self, mutation: Mutation, pin: ColumnCondition | None = None) -> Statement:
        """The statement that applies `mutation` (as `simplified` left it) if its condition, and `pin`, hold."""
        conditions = _conditions(mutation) + ((pin,) if pin else ())
        columns = tuple(mutation.columns) if isinstance(mutation, Put) else None
        shape = (columns, type(mutation.condition), tuple((c.column, c.operator) for c in conditions))
        cached = self._writes.get(shape)
        if cached is None:
            cached = remember(self._writes, shape, self._compose_write(mutation, conditions))
        key = _encoded_all(mutation.key.partition + mutation.key.clustering)
        compared = _encoded_all(c.value for c in conditions if c.operator not in _UNARY)
        values: Parameters = ()
        if isinstance(mutation, Put):
            values = _encoded_all(mutation.columns.values())
            if isinstance(mutation.condition, IfNotExists):
                values = tuple(UNSET_VALUE if value is None else value for value in values)
            if mutation.condition is None or isinstance(mutation.condition, IfNotExists):
                return Statement(cached.cql, key + values, cached.conditional)
            if not columns:
                values = (UNSET_VALUE,)
        return Statement(cached.cql, values + key + compared, cached.conditional)

    def unmet(
        self, mutations: Sequence[Mutation], columns: Sequence[str], rows: Iterable[Sequence[Any]]
    ) -> frozenset[Key]:
        """The keys whose conditions did not hold, by what Cassandra found when it refused the batch of `mutations`.

        It gives the rows that exist, with their keys and the columns that conditions speak of; those of a statement
        that is no batch come without keys, and tell nothing here.
        """
        if len(mutations) < 2:
            return frozenset()
        found: dict[tuple[Value, ...], Row] = {}
        for values in rows:
            row: Row = dict(zip(columns, values, strict=True))
            for column, decoded in self._decoders:
                if row.get(column) is not None:
                    row[column] = decoded(row[column])
            if all(column in row for column in self.table.key_columns):
                found[tuple(row[column] for column in self.table.key_columns)] = row
        return frozenset(
            mutation.key
            for mutation in mutations
            if _is_refuted(mutation, found.get(mutation.key.partition + mutation.key.clustering))
        )

    def pin(self, row: Row) -> ColumnCondition | None:
        """A condition that `row` meets and an absent row does not; None if the row is nothing but its key."""
        filled = [column for column in self._others if row[column] is not None]
        small = [column for column in filled if self.table.columns[column] in _PIN_TYPES]
        column = next(iter(small or filled), None)
        return None if column is None else ColumnCondition(column, Operator.EQ, row[column])

    # -- tables

    def create_table(self, compaction: str | None) -> str:
        """`compaction` is one of COMPACTION_STRATEGIES, None leaves it to the server."""
        table = self.table
        ordered = table.key_columns + self._others
        columns = ", ".join(f"{quoted(column)} {TYPES[table.columns[column]]}" for column in ordered)
        key = ", ".join([f"({listed(table.partition_key)})", *map(quoted, table.clustering_key)])
        options = []
        if table.clustering_key:
            order = ", ".join(
                f"{quoted(column)} {'DESC' if column in table.descending else 'ASC'}" for column in table.clustering_key
            )
            options.append(f"CLUSTERING ORDER BY ({order})")
        if compaction is not None:
            options.append(f"compaction = {{'class': '{COMPACTION_STRATEGIES[compaction]}'}}")
        if table.short_lived:
            options.append(_SHORT_LIVED)
        with_options = f" WITH {conjunction(options)}" if options else ""
        return f"CREATE TABLE IF NOT EXISTS {self._name} ({columns}, PRIMARY KEY ({key})){with_options}"

    def forget_deletions_soon(self) -> str:
        """For a table that was made without the options SHORT_LIVED."""
        return f"ALTER TABLE {self._name} WITH {_SHORT_LIVED}"

    def create_index(self, column: str) -> str:
        return f"CREATE INDEX IF NOT EXISTS {quoted(index_name(self.table, column))} ON {self._name} ({quoted(column)})"

    def drop_index(self, name: str) -> str:
        return f"DROP INDEX IF EXISTS {quoted(self.table.namespace)}.{quoted(name)}"

    def add_column(self, column: str, data_type: DataType) -> str:
        return f"ALTER TABLE {self._name} ADD {quoted(column)} {TYPES[data_type]}"

    def drop_table(self) -> str:
        return f"DROP TABLE IF EXISTS {self._name}"

    def truncate_table(self) -> str:
        return f"TRUNCATE {self._name}"

    # -- composition

    def _compose_write(self, mutation: Mutation, conditions: tuple[ColumnCondition, ...]) -> _Cached:
        terms = [_CONDITIONS[c.operator].format(quoted(c.column)) for c in conditions]
        conditional = f" IF {conjunction(terms) if terms else 'EXISTS'}" if mutation.condition is not None else ""
        if isinstance(mutation, Delete):
            return _Cached(f"DELETE FROM {self._name} WHERE {self._key}{conditional}", bool(conditional))
        columns = tuple(mutation.columns)
        if mutation.condition is None or isinstance(mutation.condition, IfNotExists):
            inserted = self.table.key_columns + columns
            conditional = " IF NOT EXISTS" if mutation.condition is not None else ""
            marks = placeholders(len(inserted))
            return _Cached(
                f"INSERT INTO {self._name} ({listed(inserted)}) VALUES ({marks}){conditional}", bool(conditional)
            )
        if not self._others:
            raise InvalidOperationError(
                f"{self.table.full_name} has no columns but its key: Cassandra cannot put a row only if it exists"
            )
        changes = ", ".join(f"{quoted(column)} = ?" for column in columns or self._others[:1])
        return _Cached(f"UPDATE {self._name} SET {changes} WHERE {self._key}{conditional}", True)

    def _compose_scan(self, scan: Scan, limited: bool) -> str:
        terms = [self._partition, *self._range(scan.start, ">=", ">"), *self._range(scan.end, "<=", "<")]
        cql = f"{self._all} WHERE {conjunction(terms)}"
        if scan.reverse and self.table.clustering_key:
            cql += " ORDER BY " + ", ".join(
                f"{quoted(column)} {'ASC' if column in self.table.descending else 'DESC'}"
                for column in self.table.clustering_key
            )
        return f"{cql} LIMIT ?" if limited else cql

    def _range(self, bound: Bound | None, inclusive: str, exclusive: str) -> list[str]:
        if bound is None or not bound.values:
            return []
        columns = listed(self.table.clustering_key[: len(bound.values)])
        return [f"({columns}) {inclusive if bound.inclusive else exclusive} ({placeholders(len(bound.values))})"]


def simplified(mutation: Mutation) -> Mutation | None:
    """`mutation` with conditions that a server can be asked; None if its conditions never hold."""
    if not isinstance(mutation.condition, If):
        return mutation
    table = mutation.table
    key: Row = dict(zip(table.key_columns, mutation.key.partition + mutation.key.clustering, strict=True))
    asked = []
    for condition in mutation.condition.conditions:
        if condition.column in key:
            if not holds(condition, key):
                return None
        elif condition.value is None and condition.operator not in _UNARY:
            return None
        else:
            asked.append(condition)
    return replace(mutation, condition=If(tuple(asked)) if asked else IfExists())


def _is_refuted(mutation: Mutation, row: Row | None) -> bool:
    """Whether the condition of `mutation` surely does not hold for `row`, of which some columns may be missing."""
    match mutation.condition:
        case IfNotExists():
            return row is not None
        case IfExists():
            return row is None
        case If(conditions):
            return row is None or any(not holds(each, row) for each in conditions if each.column in row)
    return False


def wants_pin(mutation: Mutation) -> bool:
    """Whether Cassandra would take an absent row for one that meets all of the mutation's conditions."""
    conditions = _conditions(mutation)
    return bool(conditions) and all(condition.operator is Operator.IS_NULL for condition in conditions)


def create_keyspace(namespace: str, replication: Mapping[str, str]) -> str:
    """`replication` holds the class and its options; names and numbers only."""
    for text in (part for pair in replication.items() for part in pair):
        if "'" in text or "\\" in text:
            raise InvalidOperationError("a replication setting holds names and numbers only")
    options = ", ".join(f"'{name}': '{value}'" for name, value in replication.items())
    return f"CREATE KEYSPACE IF NOT EXISTS {quoted(namespace)} WITH replication = {{{options}}}"


def drop_keyspace(namespace: str) -> str:
    return f"DROP KEYSPACE IF EXISTS {quoted(namespace)}"


def index_name(table: TableSchema, column: str) -> str:
    """ScalarDB's name, in lower case: it leaves the name unquoted, so that Cassandra folds it."""
    return f"{table.name}_index_{column}".lower()


def _conditions(mutation: Mutation) -> tuple[ColumnCondition, ...]:
    return mutation.condition.conditions if isinstance(mutation.condition, If) else ()


def _encoded_all(values: Iterable[Value]) -> Parameters:
    return tuple(map(_encoded, values))


def _encoded(value: Value) -> Any:
    """A value as the driver binds it; no negative zero, so that equal values are equal bytes."""
    if type(value) in _BOUND_AS_THEY_ARE:
        return value
    match value:
        case float():
            return value + 0.0
        case datetime.datetime():
            return (value.replace(tzinfo=None) - _TIME_ZERO) // _MS
        case datetime.date():
            return (value - _DAY_ZERO).days + _DATE_OFFSET
        case datetime.time():
            return (((value.hour * 60 + value.minute) * 60 + value.second) * 1_000_000 + value.microsecond) * 1_000
        case _:
            return value


def _day(value: Any) -> Value:
    return datetime.date.fromordinal(_ORDINAL_ZERO + int(value.days_from_epoch))


def _time(value: Any) -> Value:
    return (_TIME_ZERO + datetime.timedelta(microseconds=int(value.nanosecond_time) // 1_000)).time()


def _instant(value: datetime.datetime) -> Value:
    # The driver computes it in floating point, which is off by some microseconds for distant years.
    return (_TIME_ZERO + round((value - _TIME_ZERO) / _MS) * _MS).replace(tzinfo=datetime.UTC)


_DECODERS: Mapping[DataType, Callable[[Any], Value]] = {
    DataType.DATE: _day,
    DataType.TIME: _time,
    DataType.TIMESTAMPTZ: _instant,
}


def _shape(bound: Bound | None) -> tuple[int, bool] | None:
    return None if bound is None else (len(bound.values), bound.inclusive)


def _full_name(table: TableSchema) -> str:
    return f"{quoted(table.namespace)}.{quoted(table.name)}"
