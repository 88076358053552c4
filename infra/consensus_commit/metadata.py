"""The format of a transactional record: which columns a table gains, and how a stored row divides.

A stored row is an after-image (the user's columns and `tx_*`) beside a before-image (`before_*` of every column that
is not part of the key). The before-image is there only while the record is PREPARED or DELETED. A row whose `tx_id`
is NULL has never met a transaction (an imported table) and is deemed committed.
Source: ScalarDB's `Attribute` and `ConsensusCommitUtils.buildTransactionTableMetadata`; columns and their order as
ScalarDB 3.19 creates them in Cassandra.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import cast

from infra.consensus_commit.errors import IllegalOperationError
from infra.consensus_commit.states import TransactionState
from infra.storage.operations import ColumnCondition, DataType, Key, Row, TableSchema, Value

TX_ID = "tx_id"
TX_STATE = "tx_state"
TX_VERSION = "tx_version"
TX_PREPARED_AT = "tx_prepared_at"
TX_COMMITTED_AT = "tx_committed_at"
BEFORE = "before_"
BEFORE_TX_ID = BEFORE + TX_ID
BEFORE_TX_STATE = BEFORE + TX_STATE
BEFORE_TX_VERSION = BEFORE + TX_VERSION

TRANSACTION_COLUMNS: dict[str, DataType] = {
    TX_ID: DataType.TEXT,
    TX_STATE: DataType.INT,
    TX_VERSION: DataType.INT,
    TX_PREPARED_AT: DataType.BIGINT,
    TX_COMMITTED_AT: DataType.BIGINT,
}

_PYTHON_TYPES: Mapping[DataType, type] = {
    DataType.DATE: datetime.date,
    DataType.TIME: datetime.time,
    DataType.TIMESTAMP: datetime.datetime,
    DataType.TIMESTAMPTZ: datetime.datetime,
    DataType.BOOLEAN: bool,
    DataType.INT: int,
    DataType.BIGINT: int,
    DataType.FLOAT: float,
    DataType.DOUBLE: float,
    DataType.TEXT: str,
    DataType.BLOB: bytes,
}


@dataclass(frozen=True, eq=False, slots=True)
class Layout:
    """A transactional table: the user's view, what is stored, and the lists that divide a row. One for each table."""

    user: TableSchema
    stored: TableSchema
    full_name: str
    user_columns: tuple[str, ...]
    value_columns: frozenset[str]
    """The user's columns that are not part of the key: what a transaction may write."""
    after_columns: tuple[str, ...]
    """Everything but the before-image, key columns included."""
    before_pairs: tuple[tuple[str, str], ...]
    """(`before_x`, `x`) for every column of the before-image."""
    no_before: Mapping[str, Value]
    """Every column of the before-image, as NULL."""

    def key_of(self, row: Mapping[str, Value]) -> Key:
        return Key(
            tuple(row[name] for name in self.stored.partition_key),
            tuple(row[name] for name in self.stored.clustering_key),
        )

    def key_columns(self, key: Key) -> Row:
        """The key as columns. Raises IllegalOperationError where it has too few or too many values."""
        partition_key, clustering_key = self.stored.partition_key, self.stored.clustering_key
        if len(key.partition) != len(partition_key) or len(key.clustering) != len(clustering_key):
            raise IllegalOperationError(f"{key} is not a key of {self.full_name} {self.stored.key_columns}")
        return dict(zip(partition_key + clustering_key, key.partition + key.clustering, strict=True))

    def user_row(self, record: Mapping[str, Value]) -> Row:
        """A record as its user sees it."""
        return {name: record[name] for name in self.user_columns}

    def check_written(self, columns: Mapping[str, Value]) -> None:
        """Raises IllegalOperationError for columns that a transaction may not write."""
        if not columns.keys() <= self.value_columns:
            strangers = sorted(columns.keys() - self.value_columns)
            raise IllegalOperationError(f"{self.full_name} has no writable column {', '.join(strangers)}")

    def check_conditions(self, conditions: Iterable[ColumnCondition]) -> None:
        """Raises IllegalOperationError for conditions on columns that are not the user's, or of another type."""
        for condition in conditions:
            kind = self.user.columns.get(condition.column)
            if kind is None:
                raise IllegalOperationError(f"{self.full_name} has no column {condition.column!r}")
            if condition.value is not None and type(condition.value) is not _PYTHON_TYPES[kind]:
                raise IllegalOperationError(
                    f"{self.full_name}.{condition.column} is {kind}, not {type(condition.value).__name__}"
                )


_layouts: dict[TableSchema, Layout] = {}


def layout_of(table: TableSchema) -> Layout:
    """The layout of a table, given as its user declares it or as it is stored; the same object for both.

    Raises IllegalOperationError if the user's columns take names that belong to transactions.
    """
    layout = _layouts.get(table)
    if layout is None:
        user = _user_view(table)
        layout = _layouts.get(user) or _build(user)
        _layouts[table] = _layouts[user] = _layouts[layout.stored] = layout
    return layout


def transactional(table: TableSchema) -> TableSchema:
    """`table` with the transaction columns added, as it is created in storage (unchanged if it has them all)."""
    return layout_of(table).stored


def is_transactional(table: TableSchema) -> bool:
    """Whether a stored table has every transaction column (the state table, for one, has not)."""
    return _user_view(table) is not table


def is_committed(row: Mapping[str, Value]) -> bool:
    """Whether a stored row is at rest: committed, or deemed so because no transaction ever wrote it."""
    return row[TX_STATE] == TransactionState.COMMITTED or row[TX_ID] is None


def version_of(record: Mapping[str, Value]) -> int:
    """`tx_version`; 0 for a record that is deemed committed."""
    return cast(int, record[TX_VERSION] or 0)


def after_image(layout: Layout, row: Mapping[str, Value], *, committed_at_ms: int) -> Row | None:
    """The record that a PREPARED or DELETED row becomes when its transaction has committed; None if it is deleted."""
    if row[TX_STATE] == TransactionState.DELETED:
        return None
    record = {name: row[name] for name in layout.after_columns}
    record[TX_STATE] = TransactionState.COMMITTED.value
    record[TX_COMMITTED_AT] = committed_at_ms
    return record


def before_image(layout: Layout, row: Mapping[str, Value]) -> Row | None:
    """The record that was there before a PREPARED or DELETED row; None if there was none.

    A `before_tx_version` of 0 marks one that was deemed committed: all of its metadata is NULL again.
    """
    if row[BEFORE_TX_ID] is None and row[BEFORE_TX_VERSION] is None:
        return None
    state = row[BEFORE_TX_STATE]
    assert state is None or state == TransactionState.COMMITTED, (
        f"a before-image in state {state!r} was never committed"
    )
    record = {name: row[name] for name in layout.stored.key_columns}
    record.update((name, row[before]) for before, name in layout.before_pairs)
    if row[BEFORE_TX_ID] is None:
        record[TX_VERSION] = None
    return record


def _build(user: TableSchema) -> Layout:
    values = {name: kind for name, kind in user.columns.items() if name not in user.key_columns}
    after = values | TRANSACTION_COLUMNS
    before = {BEFORE + name: kind for name, kind in after.items()}
    reserved = sorted(user.columns.keys() & (TRANSACTION_COLUMNS.keys() | before.keys()))
    if reserved:
        raise IllegalOperationError(f"{user.full_name}: the names {', '.join(reserved)} belong to transactions")
    stored = TableSchema(
        user.namespace,
        user.name,
        dict(user.columns) | TRANSACTION_COLUMNS | before,
        user.partition_key,
        user.clustering_key,
        user.descending,
        # While an indexed value is being changed, its row is found by the old value as well.
        user.indexes | {BEFORE + name for name in user.indexes},
    )
    return Layout(
        user=user,
        stored=stored,
        full_name=user.full_name,
        user_columns=tuple(user.columns),
        value_columns=frozenset(values),
        after_columns=(*user.key_columns, *after),
        before_pairs=tuple((BEFORE + name, name) for name in after),
        no_before=dict.fromkeys(before),
    )


def _user_view(table: TableSchema) -> TableSchema:
    """`table` without the transaction columns, or the same object where it does not have them all."""
    names = table.columns.keys()
    keys = table.key_columns
    user = [
        name
        for name in names
        if name not in TRANSACTION_COLUMNS
        and not (name.startswith(BEFORE) and name not in keys and name.removeprefix(BEFORE) in names)
    ]
    full = {*user, *TRANSACTION_COLUMNS, *(BEFORE + n for n in (*user, *TRANSACTION_COLUMNS) if n not in keys)}
    if full != set(names):
        return table
    columns = {name: table.columns[name] for name in user}
    return replace(table, columns=columns, indexes=table.indexes & columns.keys())
