"""Reading what a Java program logged in `tx_write_set`: the keys of the records that a transaction wrote.

A protocol buffer of ScalarDB 3.19 (`consensus_commit.proto`): WriteSet {schema_version = 1, entry_groups = 2}, groups
of entries (child_id = 1, entries = 2), entries with namespace = 2, table = 3, partition key = 4, clustering key = 5.
Only reading is needed, and a dependency on a code generator for six messages is not: the wire format is read here.
Pure; unknown fields are passed over, as protocol buffers want it.
"""

from __future__ import annotations

import datetime
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from infra.storage.errors import InvalidOperationError
from infra.storage.operations import Value

SCHEMA_VERSION = 1

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True, slots=True)
class WrittenRecord:
    """One record that a transaction wrote. `child_id`: whose it is, where the row decides for a group."""

    namespace: str
    table: str
    partition_key: Mapping[str, Value]
    clustering_key: Mapping[str, Value]
    child_id: str | None = None


def decode(write_set: bytes) -> list[WrittenRecord]:
    """The records that `tx_write_set` names. Raises InvalidOperationError for what is none, or of another version."""
    try:
        fields = _first_values(write_set)
        version = fields.get(1, 0)
        if version != SCHEMA_VERSION:
            raise InvalidOperationError(f"a write set of version {version}; this program reads {SCHEMA_VERSION}")
        return [record for group in _all(fields.get(2, b""), 1) for record in _group(group)]
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, struct.error, OverflowError) as error:
        raise InvalidOperationError(f"not a write set: {error}") from error


def _group(message: bytes) -> Iterator[WrittenRecord]:
    child = _first_values(message).get(1)
    for entry in _all(message, 2):
        fields = _first_values(entry)
        yield WrittenRecord(
            namespace=fields[2].decode(),
            table=fields[3].decode(),
            partition_key=_key(fields[4]),
            clustering_key=_key(fields.get(5, b"")),
            child_id=None if child is None else child.decode(),
        )


def _key(message: bytes) -> dict[str, Value]:
    return dict(_column(column) for column in _all(message, 1))


def _column(message: bytes) -> tuple[str, Value]:
    name = ""
    value: Value = None
    for number, content in _fields(message):
        if number == 1:
            name = content.decode()
        elif number in _DECODERS:
            inner = _first_values(content)
            value = _DECODERS[number](inner[1])
    return name, value


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _zigzag(value: int) -> int:
    return (value >> 1) ^ -(value & 1)


def _timestamp(encoded: int) -> datetime.datetime:
    """Seconds and milliseconds side by side in decimal; before 1970 the milliseconds are their complement to 999."""
    encoded = _zigzag(encoded)
    seconds, milliseconds = divmod(abs(encoded), 1000)
    if encoded < 0:
        seconds, milliseconds = -seconds, 999 - milliseconds
    return datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=seconds, milliseconds=milliseconds)


def _time(nanoseconds: int) -> datetime.time:
    return (datetime.datetime(1970, 1, 1) + datetime.timedelta(microseconds=nanoseconds // 1000)).time()


_DECODERS: Mapping[int, Callable[[Any], Value]] = {
    2: bool,
    3: _signed,
    4: _signed,
    5: lambda content: float(struct.unpack("<f", content)[0]),
    6: lambda content: float(struct.unpack("<d", content)[0]),
    7: lambda content: str(content.decode()),
    8: bytes,
    9: lambda days: datetime.date(1970, 1, 1) + datetime.timedelta(days=_zigzag(days)),
    10: _time,
    11: _timestamp,
    12: lambda encoded: _timestamp(encoded).replace(tzinfo=datetime.UTC),
}


def _all(message: bytes, wanted: int) -> list[bytes]:
    return [content for number, content in _fields(message) if number == wanted]


def _first_values(message: bytes) -> dict[int, Any]:
    return dict(_fields(message))


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, int for a varint, bytes for everything else), in order."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, position = _varint(message, position)
            yield number, value
            continue
        if kind == _BYTES:
            length, position = _varint(message, position)
        elif kind in (_FIXED32, _FIXED64):
            length = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind}")
        content = message[position : position + length]
        if len(content) != length:
            raise ValueError("cut short")
        position += length
        yield number, content


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
