"""Storage in this process's memory: for tests, simulation and the in-process runtime.

Deterministic: no thread, no clock, no await between the first check and the last write, so every call is atomic
and the same calls give the same answers. Checks everything that the port says, to be as strict as a database.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass, field

from infra.storage.conditions import all_hold
from infra.storage.errors import InvalidOperationError, NoMutationError
from infra.storage.operations import (
    Atomicity,
    Bound,
    Delete,
    If,
    IfExists,
    IfNotExists,
    Key,
    Mutation,
    Put,
    Row,
    Scan,
    StorageInfo,
    TableSchema,
    Value,
    WriteCondition,
)
from infra.storage.validation import TableRules, check_one_unit, is_same_table, needs_creation

Clustering = tuple[Value, ...]

_PLAIN_TYPES = frozenset({type(None), bool, int, str, bytes})


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

    `atomicity` chooses which storage this one stands in for: PARTITION for Cassandra, NAMESPACE for SQLite.
    Closing it keeps the data: they live as long as the object does.
    """

    def __init__(self, atomicity: Atomicity = Atomicity.PARTITION) -> None:
        self._info = StorageInfo(name="memory", atomicity=atomicity, serializes_batches=True)
        self._tables: dict[str, _Table] = {}

    @property
    def info(self) -> StorageInfo:
        return self._info

    async def create_table(self, table: TableSchema) -> None:
        rules = TableRules(table)
        if needs_creation(table, (other.schema for other in self._tables.values())):
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

    async def partitions(self, table: TableSchema) -> list[tuple[Value, ...]]:
        return list(self._table(table).partitions)

    async def mutate(self, mutations: Sequence[Mutation]) -> None:
        for mutation in mutations:
            self._table(mutation.table).rules.check_mutation(mutation)
        check_one_unit(mutations, self._info.atomicity)
        for mutation in mutations:
            row = self._table(mutation.table).row(mutation.key)
            if not _allows(mutation.condition, row):
                raise NoMutationError(f"a condition of the batch did not hold in {mutation.table.full_name}")
        for mutation in mutations:
            self._apply(mutation)

    async def close(self) -> None:
        """Nothing to release."""

    def _table(self, table: TableSchema) -> _Table:
        held = self._tables.get(table.full_name)
        if held is None:
            raise InvalidOperationError(f"there is no table {table.full_name}")
        if held.schema is not table and not is_same_table(held.schema, table):
            raise InvalidOperationError(f"{table.full_name} exists with other columns or keys")
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


def _plain(value: Value) -> Value:
    """The value as a database would give it back: no enumeration, no negative zero."""
    if type(value) in _PLAIN_TYPES:
        return value
    match value:
        case float():
            return float(value) + 0.0
        case int():
            return int(value)
        case str():
            return str.__str__(value)
        case _:
            return bytes(value) if isinstance(value, bytes) else value


def _plain_key(key: Key) -> Key:
    return Key(tuple(map(_plain, key.partition)), tuple(map(_plain, key.clustering)))
