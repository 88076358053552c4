"""Values as the programs' lines carry them: numbers and booleans of whole numbers as they are, the rest as text."""

from __future__ import annotations

import base64
import datetime
from collections.abc import Mapping
from typing import Any, cast

from infra.storage.operations import DataType, Key, Row, TableSchema, Value


def to_json(value: Value) -> Any:
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return repr(value)
        case bytes():
            return base64.b64encode(value).decode()
        case datetime.datetime():
            return value.isoformat().replace("+00:00", "Z")
        case datetime.date() | datetime.time():
            return value.isoformat()


def from_json(kind: DataType, value: Any) -> Value:
    if value is None:
        return None
    match kind:
        case DataType.FLOAT | DataType.DOUBLE:
            return float(value)
        case DataType.BLOB:
            return base64.b64decode(value)
        case DataType.DATE:
            return datetime.date.fromisoformat(value)
        case DataType.TIME:
            return datetime.time.fromisoformat(value)
        case DataType.TIMESTAMPTZ:
            return datetime.datetime.fromisoformat(value)
        case _:
            return cast(Value, value)


def columns_to_json(columns: Mapping[str, Value]) -> dict[str, Any]:
    return {name: to_json(value) for name, value in columns.items()}


def row_from_json(table: TableSchema, row: Mapping[str, Any] | None) -> Row | None:
    return None if row is None else {name: from_json(table.columns[name], value) for name, value in row.items()}


def key_of(table: TableSchema, values: Mapping[str, Any]) -> Key:
    """The key of a step, from JSON."""
    row = row_from_json(table, values)
    assert row is not None
    return Key(tuple(row[name] for name in table.partition_key), tuple(row[name] for name in table.clustering_key))
