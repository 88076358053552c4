"""How values become DynamoDB's attributes and keys: ScalarDB's bytes, so that both can share a table.

Pure: nothing here makes a request.

Keys
    A table's partition key columns are concatenated into one binary attribute, and its clustering key columns into
    another whose byte order is the order of the rows. Each column but a last BLOB says itself where it ends:
    BOOLEAN one byte; INT and DATE four, BIGINT, TIME and the timestamps eight, big-endian with the sign bit flipped;
    TEXT its UTF-8 and a zero byte, which is why it may hold no NUL. Every byte of a descending column is inverted,
    its end included.

Attributes
    BOOL, S and B as they are; everything else is N. DATE counts days since 1970, TIME nanoseconds of the day. A
    timestamp is seconds since 1970 followed by three digits of milliseconds, which count backwards before 1970 so
    that the numbers keep the order. NULL is an absent attribute; a NULL attribute is read as the same.

Limits of the database itself, refused with InvalidOperationError before anything is sent: numbers have 38 digits and
lie between 1e-130 and 9.99e125 in size, so some DOUBLE cannot be stored; keys have 2048 and 1024 bytes.

Source: ScalarDB's `storage/dynamo/bytes`, `ValueBinder`, `TimeRelatedColumnEncodingUtils`.
"""

from __future__ import annotations

import datetime
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias

from infra.storage.errors import InvalidOperationError
from infra.storage.operations import DataType, TableSchema, Value

Attribute: TypeAlias = dict[str, Any]
"""A value as DynamoDB's API has it: its type and the value, `{"N": "1"}`."""

PARTITION_KEY = "concatenatedPartitionKey"
CLUSTERING_KEY = "concatenatedClusteringKey"

MAX_PARTITION_KEY_BYTES = 2048  # of an index too
MAX_CLUSTERING_KEY_BYTES = 1024

SMALLEST_NUMBER = 1e-130
LARGEST_NUMBER = 9.99e125

# The type of attribute that holds a column; a NULL is no attribute at all.
ATTRIBUTE_TYPES: Mapping[DataType, str] = {
    DataType.BOOLEAN: "BOOL",
    DataType.INT: "N",
    DataType.BIGINT: "N",
    DataType.FLOAT: "N",
    DataType.DOUBLE: "N",
    DataType.TEXT: "S",
    DataType.BLOB: "B",
    DataType.DATE: "N",
    DataType.TIME: "N",
    DataType.TIMESTAMP: "N",
    DataType.TIMESTAMPTZ: "N",
}

_INVERTED = bytes(0xFF - byte for byte in range(256))
_DAY_ZERO = datetime.date(1970, 1, 1)
_TIME_ZERO = datetime.datetime(1970, 1, 1)
_MS = datetime.timedelta(milliseconds=1)
_US = datetime.timedelta(microseconds=1)


def _days(day: datetime.date) -> int:
    return (day - _DAY_ZERO).days


def _day(days: int) -> datetime.date:
    return _DAY_ZERO + datetime.timedelta(days=days)


def _nanoseconds(time: datetime.time) -> int:
    return (((time.hour * 60 + time.minute) * 60 + time.second) * 1_000_000 + time.microsecond) * 1000


def _time(nanoseconds: int) -> datetime.time:
    return (_TIME_ZERO + nanoseconds // 1000 * _US).time()


def _instant(moment: datetime.datetime) -> int:
    seconds, milliseconds = divmod((moment.replace(tzinfo=None) - _TIME_ZERO) // _MS, 1000)
    return seconds * 1000 + milliseconds if seconds >= 0 else seconds * 1000 - (999 - milliseconds)


def _moment(instant: int) -> datetime.datetime:
    if instant < 0:
        seconds, milliseconds = divmod(-instant, 1000)
        return _TIME_ZERO + (999 - milliseconds - seconds * 1000) * _MS
    return _TIME_ZERO + instant * _MS


def _moment_in_utc(instant: int) -> datetime.datetime:
    return _moment(instant).replace(tzinfo=datetime.UTC)


# Types that are held as whole numbers: to the number, from the number, and the bytes of one in a key.
_WHOLE: Mapping[DataType, tuple[Callable[[Any], int], Callable[[int], Value], int]] = {
    DataType.INT: (int, int, 4),
    DataType.BIGINT: (int, int, 8),
    DataType.DATE: (_days, _day, 4),
    DataType.TIME: (_nanoseconds, _time, 8),
    DataType.TIMESTAMP: (_instant, _moment, 8),
    DataType.TIMESTAMPTZ: (_instant, _moment_in_utc, 8),
}


# Attributes


def encoded(value: Value, data_type: DataType) -> Attribute:
    """A value that is not NULL, as an attribute. InvalidOperationError for a number that DynamoDB cannot hold."""
    match data_type:
        case DataType.BOOLEAN:
            return {"BOOL": bool(value)}
        case DataType.TEXT:
            assert isinstance(value, str)
            return {"S": str.__str__(value)}
        case DataType.BLOB:
            assert isinstance(value, bytes)
            return {"B": bytes(value)}
        case DataType.FLOAT | DataType.DOUBLE:
            assert isinstance(value, float)
            number = float(value)
            if number and not SMALLEST_NUMBER <= abs(number) <= LARGEST_NUMBER:
                raise InvalidOperationError(
                    f"a {data_type} in DynamoDB is 0 or between {SMALLEST_NUMBER} and {LARGEST_NUMBER} in size"
                )
            return {"N": _shortest(number) if data_type is DataType.FLOAT else repr(number + 0.0)}
        case _:
            return {"N": str(_WHOLE[data_type][0](value))}


def decoded(attribute: Attribute | None, data_type: DataType) -> Value:
    """The value of an attribute; None if there is none."""
    if attribute is None or "NULL" in attribute:
        return None
    held = attribute[ATTRIBUTE_TYPES[data_type]]
    match data_type:
        case DataType.BOOLEAN | DataType.TEXT:
            return held  # type: ignore[no-any-return]
        case DataType.BLOB:
            return bytes(held)
        case DataType.FLOAT:
            return float(struct.unpack("f", struct.pack("f", float(held)))[0])
        case DataType.DOUBLE:
            return float(held)
        case _:
            return _WHOLE[data_type][1](int(held))


def _shortest(number: float) -> str:
    """The fewest digits that read as the same 32 bits, as Java writes a float: `=` compares the digits."""
    for digits in range(1, 9):
        text = f"{number:.{digits}g}"
        if struct.pack("f", float(text)) == struct.pack("f", number):
            return repr(float(text) + 0.0)
    return repr(float(f"{number:.9g}"))


def size_of(name: str, attribute: Attribute) -> int:
    """What an attribute counts towards the size of an item, in bytes; of a number, at least."""
    [(kind, held)] = attribute.items()
    match kind:
        case "S":
            return len(name.encode()) + len(held.encode())
        case "B":
            return len(name.encode()) + len(held)
        case _:
            return len(name.encode()) + 1


# Keys


def partition_key(table: TableSchema, values: Sequence[Value]) -> bytes:
    """The binary attribute of a partition key."""
    key = _concatenated(table, table.partition_key, values, ())
    if len(key) > MAX_PARTITION_KEY_BYTES:
        raise _too_long(table, "partition", MAX_PARTITION_KEY_BYTES)
    if not key:
        raise InvalidOperationError(f"{table.full_name}: a partition key of DynamoDB cannot be empty")
    return key


def clustering_key(table: TableSchema, values: Sequence[Value]) -> bytes:
    """The binary attribute of a clustering key."""
    key = clustering_prefix(table, values)
    if len(key) > MAX_CLUSTERING_KEY_BYTES:
        raise _too_long(table, "clustering", MAX_CLUSTERING_KEY_BYTES)
    return key


def clustering_prefix(table: TableSchema, values: Sequence[Value]) -> bytes:
    """The bytes with which every clustering key begins that begins with `values`, and no other."""
    return _concatenated(table, table.clustering_key[: len(values)], values, table.descending)


def partition_values(table: TableSchema, key: bytes) -> tuple[Value, ...]:
    """The values that `partition_key` was made of."""
    return _taken_apart(table, table.partition_key, key, ())


def clustering_values(table: TableSchema, key: bytes) -> tuple[Value, ...]:
    """The values that `clustering_key` was made of."""
    return _taken_apart(table, table.clustering_key, key, table.descending)


def following(prefix: bytes) -> bytes | None:
    """The smallest bytes above everything that begins with `prefix`; None if there are none."""
    rest = prefix.rstrip(b"\xff")
    return rest[:-1] + bytes([rest[-1] + 1]) if rest else None


def _concatenated(
    table: TableSchema, columns: Sequence[str], values: Sequence[Value], descending: Collection[str]
) -> bytes:
    parts = []
    for column, value in zip(columns, values, strict=True):
        part = _key_part(table, column, value)
        parts.append(part.translate(_INVERTED) if column in descending else part)
    return b"".join(parts)


def _key_part(table: TableSchema, column: str, value: Value) -> bytes:
    data_type = table.columns[column]
    match data_type:
        case DataType.BOOLEAN:
            return b"\1" if value else b"\0"
        case DataType.TEXT:
            assert isinstance(value, str)
            if "\0" in value:
                raise InvalidOperationError(f"{table.full_name}.{column}: a TEXT key of DynamoDB cannot hold NUL")
            return value.encode() + b"\0"
        case DataType.BLOB:
            assert isinstance(value, bytes)
            return bytes(value)
        case _:
            to_number, _, width = _WHOLE[data_type]
            return (to_number(value) + (1 << width * 8 - 1)).to_bytes(width, "big")


def _taken_apart(
    table: TableSchema, columns: Sequence[str], key: bytes, descending: Collection[str]
) -> tuple[Value, ...]:
    values: list[Value] = []
    at = 0
    for column in columns:
        data_type = table.columns[column]
        rest = key[at:].translate(_INVERTED) if column in descending else key[at:]
        match data_type:
            case DataType.BOOLEAN:
                values.append(rest[0] == 1)
                at += 1
            case DataType.TEXT:
                end = rest.index(0)
                values.append(rest[:end].decode())
                at += end + 1
            case DataType.BLOB:
                values.append(rest)
                at = len(key)
            case _:
                _, from_number, width = _WHOLE[data_type]
                values.append(from_number(int.from_bytes(rest[:width], "big") - (1 << width * 8 - 1)))
                at += width
    return tuple(values)


def _too_long(table: TableSchema, which: str, limit: int) -> InvalidOperationError:
    return InvalidOperationError(f"{table.full_name}: a {which} key of DynamoDB has at most {limit} bytes")
