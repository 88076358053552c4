"""The vocabulary of storage: tables, keys, reads and conditional writes.

The data model is Cassandra's, as ScalarDB uses it: a table has a partition key, a clustering key that orders
the rows of a partition, and typed columns. Everything here is a frozen value without behaviour of its own.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import TypeAlias

Value: TypeAlias = bool | int | float | str | bytes | datetime.date | datetime.time | datetime.datetime | None
"""One column's value. NULL is None."""

Row: TypeAlias = dict[str, Value]
"""All columns of one row, key columns included; columns that were never written are present as None."""


class DataType(StrEnum):
    """Column types, by ScalarDB's names and with its ranges (`validation` checks them).

    INT is 32 bit, signed; BIGINT goes from -2^53 to 2^53. DATE is a `date`, TIME a `time` without zone, to the
    microsecond; TIMESTAMP a `datetime` without zone and TIMESTAMPTZ one in UTC, both to the millisecond, from the
    year 1000 on.
    """

    BOOLEAN = "BOOLEAN"
    INT = "INT"
    BIGINT = "BIGINT"
    FLOAT = "FLOAT"
    DOUBLE = "DOUBLE"
    TEXT = "TEXT"
    BLOB = "BLOB"
    DATE = "DATE"
    TIME = "TIME"
    TIMESTAMP = "TIMESTAMP"
    TIMESTAMPTZ = "TIMESTAMPTZ"


@dataclass(frozen=True)
class TableSchema:
    """A table: `columns` names every column with its type, in order, key columns included.

    `descending` names the clustering columns that run from the largest value to the smallest. `indexes` names the
    columns outside the key by which rows can be found (secondary indexes, each of one column). `short_lived`: rows are
    written once and soon deleted, many a second, and one that came back would do no harm; a storage may use that, and
    it is no part of what the table is.
    """

    namespace: str
    name: str
    columns: Mapping[str, DataType]
    partition_key: tuple[str, ...]
    clustering_key: tuple[str, ...] = ()
    descending: frozenset[str] = frozenset()
    indexes: frozenset[str] = frozenset()
    short_lived: bool = field(default=False, compare=False)

    @property
    def full_name(self) -> str:
        return f"{self.namespace}.{self.name}"

    @property
    def key_columns(self) -> tuple[str, ...]:
        return self.partition_key + self.clustering_key

    def __hash__(self) -> int:
        return hash((self.namespace, self.name))


@dataclass(frozen=True, slots=True)
class Key:
    """A primary key: values of the partition key columns, then of the clustering key columns."""

    partition: tuple[Value, ...]
    clustering: tuple[Value, ...] = ()


class Operator(StrEnum):
    EQ = "="
    NE = "!="
    LT = "<"
    LE = "<="
    GT = ">"
    GE = ">="
    IS_NULL = "IS NULL"
    IS_NOT_NULL = "IS NOT NULL"


@dataclass(frozen=True, slots=True)
class ColumnCondition:
    """`column operator value`. As in SQL, every comparison with NULL is false; IS_NULL and IS_NOT_NULL test it."""

    column: str
    operator: Operator
    value: Value = None


@dataclass(frozen=True, slots=True)
class IfNotExists:
    """The row must be absent (put only)."""


@dataclass(frozen=True, slots=True)
class IfExists:
    """The row must be present."""


@dataclass(frozen=True, slots=True)
class If:
    """The row must be present and every condition must hold."""

    conditions: tuple[ColumnCondition, ...]


WriteCondition: TypeAlias = IfNotExists | IfExists | If


@dataclass(frozen=True, slots=True)
class Put:
    """Write `columns` (no key columns) of one row; columns not named keep their values. None condition: upsert."""

    table: TableSchema
    key: Key
    columns: Mapping[str, Value]
    condition: WriteCondition | None = None


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove one row. Without a condition, removing an absent row does nothing."""

    table: TableSchema
    key: Key
    condition: IfExists | If | None = None


Mutation: TypeAlias = Put | Delete


@dataclass(frozen=True, slots=True)
class Bound:
    """One end of a clustering range: a prefix of the clustering key's values, itself inside the range or not.

    Bounds compare by value, whichever way the columns run.

    A prefix shorter than the clustering key stands for all rows that begin with it: as an inclusive bound it
    takes them all in, as an exclusive one it leaves them all out.
    """

    values: tuple[Value, ...]
    inclusive: bool = True


@dataclass(frozen=True, slots=True)
class Scan:
    """Rows of one partition in clustering order (`reverse`: the other way), between two bounds.

    `start` is the bound with the smaller values, also where columns descend. `where` filters in the storage, before
    `limit` counts. `limit` 0 means no limit.
    """

    table: TableSchema
    partition: tuple[Value, ...]
    start: Bound | None = None
    end: Bound | None = None
    where: tuple[ColumnCondition, ...] = ()
    limit: int = 0
    reverse: bool = False


@dataclass(frozen=True, slots=True)
class ScanAll:
    """Rows of every partition, in no particular order. `where` filters, before `limit` counts (0: no limit)."""

    table: TableSchema
    where: tuple[ColumnCondition, ...] = ()
    limit: int = 0


@dataclass(frozen=True, slots=True)
class IndexScan:
    """Rows of any partition whose indexed `column` equals `value` (not NULL), in no particular order."""

    table: TableSchema
    column: str
    value: Value
    where: tuple[ColumnCondition, ...] = ()
    limit: int = 0


CrossPartition: TypeAlias = ScanAll | IndexScan
Selection: TypeAlias = Scan | ScanAll | IndexScan


class Atomicity(Enum):
    """How far one `mutate` reaches atomically, smallest first (ScalarDB's StorageInfo)."""

    PARTITION = 1
    NAMESPACE = 2
    STORAGE = 3


@dataclass(frozen=True, slots=True)
class StorageInfo:
    """What an adapter promises. `name` tells storages apart; `max_mutations` 0 means unlimited.

    `sees_all_partitions`, `sees_all_indexed`: a ScanAll, or an IndexScan, sees every write that was answered before
    it began, as reads of one partition always do. Where it may lag behind, SERIALIZABLE has to refuse it.

    `serializes_batches`: the storage itself lets one conditional batch at a time into a unit, so that callers
    need no gate before it (SQLite's single writer); Cassandra's Paxos rounds contend and need one.
    """

    name: str
    atomicity: Atomicity
    max_mutations: int = 0
    serializes_batches: bool = False
    sees_all_partitions: bool = True
    sees_all_indexed: bool = True
    data_types: frozenset[DataType] = frozenset(DataType)
    options: Mapping[str, str] = field(default_factory=dict)
