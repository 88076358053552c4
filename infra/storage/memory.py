"""Storage in this process's memory: for tests, simulation and the in-process runtime.

Deterministic: no thread, no clock, no await between the first check and the last write, so every call is atomic
and the same calls give the same answers. Checks everything that the port says, to be as strict as a database.
"""

from __future__ import annotations

import datetime
from bisect import bisect_left, bisect_right, insort
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from infra.storage.conditions import all_hold
from infra.storage.errors import InvalidOperationError, NoMutationError
from infra.storage.operations import (
    Atomicity,
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
    Row,
    Scan,
    StorageInfo,
    TableSchema,
    Value,
    WriteCondition,
)
from infra.storage.validation import (
    TableRules,
    check_identifier,
    check_one_unit,
    difference,
    is_same_table,
    needs_creation,
    with_column,
    with_index,
)

Clustering = tuple[Value, ...]

_PLAIN_TYPES = frozenset({type(None), bool, int, str, bytes, datetime.date, datetime.time})


@dataclass
class _Partition:
    """Rows by clustering key, and the clustering keys in order."""

    rows: dict[Clustering, Row] = field(default_factory=dict)
    order: list[Clustering] = field(default_factory=list)


@dataclass
class _Table:
    schema: TableSchema
    rules: TableRules
    partitions: dict[tuple[Value, ...], _Partition] = field(default_factory=dict)

    def row(self, key: Key) -> Row | None:
        partition = self.partitions.get(key.partition)
        return partition.rows.get(key.clustering) if partition else None


class MemoryStorage:
    """Dictionaries behind the storage port.

    `atomicity` and `max_mutations` choose which storage this one stands in for: PARTITION for Cassandra, NAMESPACE
    for SQLite, STORAGE and 100 for DynamoDB. Closing it keeps the data: they live as long as the object does.
    """

    def __init__(
        self, atomicity: Atomicity = Atomicity.PARTITION, *, max_mutations: int = 0, name: str = "memory"
    ) -> None:
        self._info = StorageInfo(name=name, atomicity=atomicity, max_mutations=max_mutations, serializes_batches=True)
        self._tables: dict[str, _Table] = {}
        self._namespaces: set[str] = set()

    @property
    def info(self) -> StorageInfo:
        return self._info

    def info_of(self, namespace: str) -> StorageInfo:
        return self.info

    async def create_table(self, table: TableSchema) -> None:
        rules = TableRules(table)
        if needs_creation(table, (other.schema for other in self._tables.values())):
            self._namespaces.add(table.namespace)
            self._tables[table.full_name] = _Table(table, rules)

    async def tables(self) -> list[TableSchema]:
        return [self._tables[name].schema for name in sorted(self._tables)]

    async def get(self, table: TableSchema, key: Key) -> Row | None:
        held = self._table(table)
        held.rules.check_key(key)
        row = held.row(_plain_key(key))
        return None if row is None else dict(row)

    async def scan(self, scan: Scan) -> list[Row]:
        table = self._table(scan.table)
        table.rules.check_scan(scan)
        partition = table.partitions.get(scan.partition)
        if partition is None:
            return []
        keys = _between(partition.order, scan.start, scan.end)
        if table.schema.descending:
            keys = _in_clustering_order(keys, table.schema)
        if scan.reverse:
            keys.reverse()
        found: list[Row] = []
        for key in keys:
            if scan.limit and len(found) == scan.limit:
                break
            row = partition.rows[key]
            if all_hold(scan.where, row):
                found.append(dict(row))
        return found

    async def pages(self, selection: CrossPartition, page_size: int = 256) -> AsyncIterator[list[Row]]:
        table = self._table(selection.table)
        table.rules.check_cross_partition(selection)
        where = selection.where
        if isinstance(selection, IndexScan):
            where = (ColumnCondition(selection.column, Operator.EQ, selection.value), *where)
        found = [
            row for partition in table.partitions.values() for row in partition.rows.values() if all_hold(where, row)
        ]
        wanted = [dict(row) for row in found[: selection.limit or None]]
        for first in range(0, len(wanted), page_size):
            yield wanted[first : first + page_size]

    async def partitions(self, table: TableSchema) -> list[tuple[Value, ...]]:
        return list(self._table(table).partitions)

    async def mutate(self, mutations: Sequence[Mutation]) -> None:
        for mutation in mutations:
            self._table(mutation.table).rules.check_mutation(mutation)
        check_one_unit(mutations, self.info)
        unmet = [
            mutation
            for mutation in mutations
            if not _allows(mutation.condition, self._table(mutation.table).row(mutation.key))
        ]
        if unmet:
            raise NoMutationError(
                f"a condition of the batch did not hold in {unmet[0].table.full_name}",
                # Only within one partition is a key the name of a record; else it says nothing, as others do.
                unmet=frozenset(mutation.key for mutation in unmet)
                if self.info.atomicity is Atomicity.PARTITION
                else frozenset(),
            )
        for mutation in mutations:
            self._apply(mutation)

    async def close(self) -> None:
        """Nothing to release."""

    # -- administration

    async def namespaces(self) -> list[str]:
        return sorted(self._namespaces)

    async def create_namespace(self, namespace: str) -> None:
        self._namespaces.add(check_identifier(namespace))

    async def drop_namespace(self, namespace: str) -> None:
        check_identifier(namespace)
        if any(table.schema.namespace == namespace for table in self._tables.values()):
            raise InvalidOperationError(f"namespace {namespace} still has tables")
        self._namespaces.discard(namespace)

    async def drop_table(self, table: TableSchema) -> None:
        self._tables.pop(table.full_name, None)

    async def truncate_table(self, table: TableSchema) -> None:
        self._named(table).partitions.clear()

    async def add_column(self, table: TableSchema, column: str, data_type: DataType) -> None:
        held = self._named(table)
        changed = with_column(held.schema, column, data_type)
        if changed is not held.schema:
            for partition in held.partitions.values():
                for row in partition.rows.values():
                    row[column] = None
            self._change(changed)

    async def create_index(self, table: TableSchema, column: str) -> None:
        self._change(with_index(self._named(table).schema, column))

    async def drop_index(self, table: TableSchema, column: str) -> None:
        schema = self._named(table).schema
        self._change(replace(schema, indexes=schema.indexes - {column}))

    def _change(self, schema: TableSchema) -> None:
        self._tables[schema.full_name] = _Table(schema, TableRules(schema), self._tables[schema.full_name].partitions)

    def _named(self, table: TableSchema) -> _Table:
        held = self._tables.get(table.full_name)
        if held is None:
            raise InvalidOperationError(f"there is no table {table.full_name}")
        return held

    def _table(self, table: TableSchema) -> _Table:
        held = self._named(table)
        if held.schema is not table and not is_same_table(table, held.schema):
            raise InvalidOperationError(f"{table.full_name} exists otherwise: {difference(table, held.schema)}")
        return held

    def _apply(self, mutation: Mutation) -> None:
        table = self._table(mutation.table)
        match mutation:
            case Put(columns=columns):
                key = _plain_key(mutation.key)
                partition = table.partitions.setdefault(key.partition, _Partition())
                row = partition.rows.get(key.clustering)
                if row is None:
                    row = dict.fromkeys(table.schema.columns)
                    row.update(zip(table.schema.key_columns, key.partition + key.clustering, strict=True))
                    partition.rows[key.clustering] = row
                    insort(partition.order, key.clustering)
                row.update((column, _plain(value)) for column, value in columns.items())
            case Delete(key=key):
                held = table.partitions.get(key.partition)
                if held is not None and held.rows.pop(key.clustering, None) is not None:
                    del held.order[bisect_left(held.order, key.clustering)]
                    if not held.rows:
                        del table.partitions[key.partition]


def _allows(condition: WriteCondition | None, row: Row | None) -> bool:
    match condition:
        case None:
            return True
        case IfNotExists():
            return row is None
        case IfExists():
            return row is not None
        case If(conditions=conditions):
            return row is not None and all_hold(conditions, row)


def _between(order: list[Clustering], start: Bound | None, end: Bound | None) -> list[Clustering]:
    """The keys from `start` to `end`. A bound compares with as many leading values of a key as it has itself."""
    first, last = 0, len(order)
    if start is not None:
        bisect = bisect_left if start.inclusive else bisect_right
        first = bisect(order, start.values, key=lambda key: key[: len(start.values)])
    if end is not None:
        bisect = bisect_right if end.inclusive else bisect_left
        last = bisect(order, end.values, key=lambda key: key[: len(end.values)])
    return order[first:last]


def _in_clustering_order(keys: list[Clustering], table: TableSchema) -> list[Clustering]:
    """Keys that are ordered by value, in the order of a table some of whose columns descend."""
    for position in reversed(range(len(table.clustering_key))):  # Sorting is stable: the first column goes last.
        keys = sorted(
            keys,
            key=lambda key: cast("Any", key[position]),
            reverse=table.clustering_key[position] in table.descending,
        )
    return keys


def _plain(value: Value) -> Value:
    """The value as a database would give it back: no enumeration, no negative zero."""
    if type(value) in _PLAIN_TYPES:
        return value
    match value:
        case float():
            return float(value) + 0.0
        case datetime.datetime(tzinfo=datetime.tzinfo()):
            return value.astimezone(datetime.UTC)
        case int():
            return int(value)
        case str():
            return str.__str__(value)
        case _:
            return bytes(value) if isinstance(value, bytes) else value


def _plain_key(key: Key) -> Key:
    return Key(tuple(map(_plain, key.partition)), tuple(map(_plain, key.clustering)))
