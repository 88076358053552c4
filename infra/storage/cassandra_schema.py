"""What Cassandra's own schema tables say, as the port's tables. Pure: rows in, values out.

ScalarDB keeps no metadata of its own for Cassandra: a table is what `system_schema` says it is. Tables that the port
has no words for (collections, static columns, counters, floating-point keys) are not ours and are passed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from infra.storage.cassandra_statements import TYPES
from infra.storage.errors import InvalidOperationError
from infra.storage.operations import DataType, TableSchema
from infra.storage.validation import check_table, is_identifier

DEFAULT_GRACE_S = 864_000
"""How long Cassandra keeps deletions in tables for which nobody said otherwise."""

_DATA_TYPES: Mapping[str, DataType] = {cql: data_type for data_type, cql in TYPES.items()}

SELECT_KEYSPACES = "SELECT keyspace_name, replication FROM system_schema.keyspaces"
SELECT_TABLES = "SELECT keyspace_name, table_name FROM system_schema.tables"
SELECT_COLUMNS = (
    "SELECT keyspace_name, table_name, column_name, kind, position, clustering_order, type FROM system_schema.columns"
)
SELECT_INDEXES = "SELECT keyspace_name, table_name, index_name, options FROM system_schema.indexes"
SELECT_GRACE = "SELECT gc_grace_seconds FROM system_schema.tables"
OF_KEYSPACE = " WHERE keyspace_name = ?"
OF_TABLE = f"{OF_KEYSPACE} AND table_name = ?"


class _Column(NamedTuple):
    keyspace: str
    table: str
    name: str
    kind: str
    position: int
    order: str
    cql_type: str


class Index(NamedTuple):
    """A secondary index by its name and the column it is on."""

    namespace: str
    table: str
    name: str
    column: str


def is_user_namespace(keyspace: str) -> bool:
    """Whether a keyspace is neither Cassandra's own nor one that the port could not name."""
    return is_identifier(keyspace) and not keyspace.startswith("system")


def read_indexes(rows: Iterable[Sequence[Any]]) -> list[Index]:
    """The rows of SELECT_INDEXES."""
    return [
        Index(keyspace, table, name, _unquoted((options or {}).get("target", "")))
        for keyspace, table, name, options in rows
    ]


def read_tables(columns: Iterable[Sequence[Any]], indexes: Iterable[Index]) -> list[TableSchema]:
    """The tables that the rows of SELECT_COLUMNS describe, ordered by full name: key columns, then others by name."""
    by_table: dict[tuple[str, str], list[_Column]] = {}
    for values in columns:
        column = _Column(*values)
        if is_user_namespace(column.keyspace):
            by_table.setdefault((column.keyspace, column.table), []).append(column)
    indexed: dict[tuple[str, str], set[str]] = {}
    for index in indexes:
        indexed.setdefault((index.namespace, index.table), set()).add(index.column)
    found = [_table(name, held, indexed.get(name, set())) for name, held in by_table.items()]
    return sorted((table for table in found if table is not None), key=lambda table: table.full_name)


def _table(name: tuple[str, str], columns: Sequence[_Column], indexed: set[str]) -> TableSchema | None:
    if not all(column.cql_type in _DATA_TYPES and column.kind != "static" for column in columns):
        return None
    partition_key = sorted((c for c in columns if c.kind == "partition_key"), key=lambda c: c.position)
    clustering_key = sorted((c for c in columns if c.kind == "clustering"), key=lambda c: c.position)
    others = sorted((c for c in columns if c.kind == "regular"), key=lambda c: c.name)
    table = TableSchema(
        namespace=name[0],
        name=name[1],
        columns={c.name: _DATA_TYPES[c.cql_type] for c in (*partition_key, *clustering_key, *others)},
        partition_key=tuple(c.name for c in partition_key),
        clustering_key=tuple(c.name for c in clustering_key),
        descending=frozenset(c.name for c in clustering_key if c.order.lower() == "desc"),
        indexes=frozenset(indexed) & frozenset(c.name for c in others),
    )
    try:
        check_table(table)
    except InvalidOperationError:
        return None
    return table


def quorum_shortfall(replication: Mapping[str, str], live: Mapping[str, int]) -> str:
    """In words, why a quorum cannot be reached with `live` nodes a data centre; empty if it can.

    A strategy that is not known here is taken for one that can.
    """
    strategy = replication.get("class", "").rpartition(".")[2]
    if strategy == "SimpleStrategy":
        factor = _factor(replication.get("replication_factor", ""))
        reachable = min(factor, sum(live.values()))
    elif strategy == "NetworkTopologyStrategy":
        factors = {name: _factor(value) for name, value in replication.items() if name != "class"}
        factor = sum(factors.values())
        reachable = sum(min(wanted, live.get(name, 0)) for name, wanted in factors.items())
    else:
        return ""
    quorum = factor // 2 + 1
    if reachable >= quorum:
        return ""
    return f"with {factor} replicas a quorum is {quorum}, and {reachable} can be reached"


def _factor(text: str) -> int:
    """A replication factor; of `3/1` (one of three is transient) the three."""
    number = text.partition("/")[0]
    return int(number) if number.isdecimal() else 0


def _unquoted(target: str) -> str:
    if len(target) >= 2 and target[0] == target[-1] == '"':
        return target[1:-1].replace('""', '"')
    return target
