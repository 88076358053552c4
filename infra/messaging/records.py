"""Lets aiokafka read records whose header names are not UTF-8.

Kafka's brokers do not look at header names, so a record may have any bytes there. aiokafka decodes them strictly and
raises, for the record and for everything behind it: a consumer would never get past it, restart after restart. Here
such a name is read with U+FFFD in place of what is no UTF-8, and whoever takes the message decides about it. Keys,
values and header values are bytes, and not touched.

    fetched bytes ──► TolerantRecords (aiokafka's own batches, one after the other) ──► TolerantBatch
                                     aiokafka's own records ◄── until one cannot be read ──┘
                                     from there on: aiokafka's parser in Python, on bytes that decode leniently

Installed for the whole process when this module is imported (`read_any_header_name`), since aiokafka has no setting for
it. Bound to aiokafka 0.14; a test with a record on a real broker says when that has changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, SupportsIndex

from aiokafka.consumer import fetcher
from aiokafka.errors import CorruptRecordException
from aiokafka.record.default_records import _DefaultRecordBatchPy
from aiokafka.record.memory_records import _MemoryRecordsPy


class _LenientBytes(bytearray):
    """Bytes whose slices decode whatever they hold."""

    def __getitem__(self, index: SupportsIndex | slice) -> Any:
        part = super().__getitem__(index)
        return _LenientBytes(part) if isinstance(part, bytearray) else part

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return super().decode(encoding, "replace")


class TolerantBatch:
    """One of aiokafka's record batches; its records are read leniently from the first on that cannot be read."""

    def __init__(self, batch: Any, data: bytes) -> None:
        self._batch = batch
        self._data = data
        self._records: Iterator[Any] | None = None
        self._read = 0
        self._is_lenient = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    def __iter__(self) -> TolerantBatch:
        return self

    def __next__(self) -> Any:
        if self._records is None:
            self._records = iter(self._batch)
        try:
            record = next(self._records)
        except (UnicodeDecodeError, CorruptRecordException):  # the parser in Python calls both corrupt
            if self._is_lenient:
                raise
            self._records = self._leniently()
            record = next(self._records)
        self._read += 1
        return record

    def _leniently(self) -> Iterator[Any]:
        self._is_lenient = True
        batch = _DefaultRecordBatchPy(self._data)
        records: Iterator[Any] = iter(batch)  # now it is decompressed
        batch._buffer = _LenientBytes(batch._buffer)
        for _ in range(self._read):
            next(records)
        return records


class TolerantRecords:
    """What aiokafka's MemoryRecords is to its consumer: the batches of one fetched piece of a partition."""

    def __init__(self, data: bytes) -> None:
        self._records = _MemoryRecordsPy(data)

    def size_in_bytes(self) -> int:
        return int(self._records.size_in_bytes())

    def has_next(self) -> bool:
        return bool(self._records.has_next())

    def next_batch(self) -> Any:
        data = self._records._next_slice
        batch = self._records.next_batch()
        # Before version 2 records had no headers.
        return TolerantBatch(batch, bytes(data)) if data is not None and _magic(data) >= 2 else batch


def _magic(data: Any) -> int:
    return int(data[_MemoryRecordsPy.MAGIC_OFFSET])


def read_any_header_name() -> None:
    """From now on every consumer of this process reads such records. Calling it again changes nothing."""
    fetcher.MemoryRecords = TolerantRecords


read_any_header_name()
