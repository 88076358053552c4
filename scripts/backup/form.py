"""What a backup looks like on disk, and how one knows that it is whole. Pure but for reading and writing its files.

    2026-11-21T17-05-12Z/
        manifest.json                      what there is: written last, so a directory without it is no backup
        tables/payment.wallets.ndjson.gz   one row a line: the values in the order of the columns' names
        topics/payment.commands-0.ndjson.gz   one message a line
        log/2026-11-21T18-00-00Z/          what was accepted since, if asked for: see `increments.py`

Rows are written as the storage port has them, transaction columns included, and as text that does not depend on the
storage they came from: a backup of one storage can be restored into another. A table's digest is the sum of the SHA-256
of its lines modulo 2**256, which no order of the rows changes; so it can be computed again over what was restored.

Every file is known by its length and its SHA-256, and the manifest by its own: what was damaged is found before
anything is restored, and named. Nothing here is encrypted, and nothing of it is a secret of the system's (no settings,
no addresses); but it is all of the system's data, readable by its owner alone.
"""

from __future__ import annotations

import base64
import datetime
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from infra.storage.operations import DataType, Row, TableSchema, Value

FORMAT = 1
MANIFEST = "manifest.json"
LOG = "log"
NAME = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}-\d{2}-\d{2}Z")
"""How a backup is called: when it was begun, in UTC."""

_MODULUS = 1 << 256
_LEVEL = 1  # of gzip: higher ones cost three times the CPU for a tenth of the size
_CHUNK_BYTES = 1 << 20


class DamagedBackupError(Exception):
    """A file of a backup is missing, cut off or changed; the text names it."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


M = TypeVar("M", bound=BaseModel)


class StoredFile(_Part):
    """A file of the backup, named relative to its directory."""

    name: str
    size_bytes: int
    sha256: str


class StoredTable(_Part):
    """A table: its schema, how many rows, their digest. Without a file where a snapshot of the operator's has them."""

    namespace: str
    name: str
    columns: dict[str, DataType]
    partition_key: tuple[str, ...]
    clustering_key: tuple[str, ...]
    descending: tuple[str, ...]
    indexes: tuple[str, ...]
    rows: int = 0
    digest: str = ""
    file: StoredFile | None = None

    @property
    def full_name(self) -> str:
        return f"{self.namespace}.{self.name}"

    @property
    def schema_of(self) -> TableSchema:
        """The table as storage has it."""
        return TableSchema(
            self.namespace,
            self.name,
            dict(self.columns),
            self.partition_key,
            self.clustering_key,
            frozenset(self.descending),
            frozenset(self.indexes),
        )

    @classmethod
    def of(cls, table: TableSchema, *, rows: int = 0, digest: str = "", file: StoredFile | None = None) -> StoredTable:
        return cls(
            namespace=table.namespace,
            name=table.name,
            columns=dict(table.columns),
            partition_key=table.partition_key,
            clustering_key=table.clustering_key,
            descending=tuple(sorted(table.descending)),
            indexes=tuple(sorted(table.indexes)),
            rows=rows,
            digest=digest,
            file=file,
        )


class StoredPartition(_Part):
    """A partition of a topic during the pause: its first offset, what its consumers had acknowledged, its end.

    `acknowledged` is the offset that is read next; None where nobody had acknowledged anything. `file` holds
    `messages` messages, those from `copied_from` to `end`.
    """

    topic: str
    partition: int
    start: int
    acknowledged: int | None
    end: int
    copied_from: int
    messages: int = 0
    file: StoredFile | None = None

    @property
    def resumes_at(self) -> int:
        """The offset of the first message that is not known to be finished."""
        return self.start if self.acknowledged is None else max(self.start, self.acknowledged)


class Manifest(_Part):
    """What a backup holds, and what a restored system must have in common with the one that it was made of."""

    format: int = FORMAT
    name: str
    made_by: str
    """The program's version."""
    profile: str
    storage: str
    """Its kind: sqlite, cassandra, …"""
    buckets: int
    command_partitions: int
    log_identity: str
    """The id of the Kafka cluster that the offsets are of."""
    was_running: bool
    paused_ms: int
    """How long no command could begin."""
    tables_by: Literal["rows", "command"]
    """Whether the rows are here, or where the operator's own command has put them."""
    tables: tuple[StoredTable, ...]
    partitions: tuple[StoredPartition, ...]

    def files(self) -> Iterator[StoredFile]:
        files = [table.file for table in self.tables] + [partition.file for partition in self.partitions]
        yield from (file for file in files if file is not None)


class Increment(_Part):
    """Commands that were accepted after a backup, or after the increment before this one."""

    format: int = FORMAT
    name: str
    of: str
    """The name of the backup."""
    made_by: str
    log_identity: str
    partitions: tuple[StoredPartition, ...]

    def files(self) -> Iterator[StoredFile]:
        yield from (partition.file for partition in self.partitions if partition.file is not None)


# --- lines ---------------------------------------------------------------------------------------------------------


def columns_of(table: TableSchema) -> tuple[str, ...]:
    """The columns in the order in which a line has their values."""
    return tuple(sorted(table.columns))


def row_line(columns: Sequence[str], row: Row) -> bytes:
    """A row as one line, without its end."""
    values = [_to_json(row[column]) for column in columns]
    return json.dumps(values, ensure_ascii=True, separators=(",", ":")).encode("ascii")


def row_of(table: TableSchema, columns: Sequence[str], line: bytes) -> Row:
    """The row of a line. Raises ValueError for what is no such line."""
    values = json.loads(line)
    if not isinstance(values, list) or len(values) != len(columns):
        raise ValueError("not as many values as columns")
    return {column: _from_json(table.columns[column], value) for column, value in zip(columns, values, strict=True)}


def _to_json(value: Value) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, datetime.date | datetime.time):  # a datetime is a date
        return value.isoformat()
    return value


def _from_json(data_type: DataType, value: Any) -> Value:
    if value is None:
        return None
    match data_type:
        case DataType.BLOB:
            return base64.b64decode(value, validate=True)
        case DataType.DATE:
            return datetime.date.fromisoformat(value)
        case DataType.TIME:
            return datetime.time.fromisoformat(value)
        case DataType.TIMESTAMP | DataType.TIMESTAMPTZ:
            return datetime.datetime.fromisoformat(value)
        case _:
            plain: Value = value
            return plain


class RowDigest:
    """How many rows, and what they are, whatever their order."""

    def __init__(self) -> None:
        self.rows = 0
        self._sum = 0

    def add(self, lines: Iterable[bytes]) -> None:
        for line in lines:
            self._sum += int.from_bytes(hashlib.sha256(line).digest(), "big")
            self.rows += 1
        self._sum %= _MODULUS

    @property
    def value(self) -> str:
        return f"{self._sum:064x}"


# --- files ---------------------------------------------------------------------------------------------------------


class _Hashing(io.RawIOBase):
    """A file that knows the SHA-256 and the length of what was written to it."""

    def __init__(self, path: Path) -> None:
        self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
        self._hash = hashlib.sha256()
        self.size_bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._hash.update(data)
        self.size_bytes += len(data)
        return self._file.write(data)

    def finish(self) -> str:
        """Onto the disk; the SHA-256."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._hash.hexdigest()

    def close(self) -> None:
        self._file.close()
        super().close()


class LineFile:
    """Writes lines into a compressed file of the backup in `directory`. Blocking: for a thread where there are many."""

    def __init__(self, directory: Path, name: str) -> None:
        self.name = name
        (directory / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._raw = _Hashing(directory / name)
        self._packed = gzip.GzipFile(filename="", mode="wb", fileobj=self._raw, compresslevel=_LEVEL, mtime=0)

    def write(self, lines: Iterable[bytes]) -> None:
        self._packed.write(b"".join(line + b"\n" for line in lines))

    def finish(self) -> StoredFile:
        """Make it durable; what is to be written down about it."""
        self._packed.close()
        sha256 = self._raw.finish()
        return StoredFile(name=self.name, size_bytes=self._raw.size_bytes, sha256=sha256)

    def abandon(self) -> None:
        self._packed.close()
        self._raw.close()


def check_file(directory: Path, file: StoredFile) -> None:
    """Raises DamagedBackupError unless the file is there as it was written."""
    path = directory / file.name
    found = hashlib.sha256()
    size_bytes = 0
    try:
        with path.open("rb") as opened:
            while chunk := opened.read(_CHUNK_BYTES):
                found.update(chunk)
                size_bytes += len(chunk)
    except OSError as error:
        raise DamagedBackupError(f"{path} cannot be read: {error.strerror or error}. {_REMEDY}") from error
    if size_bytes != file.size_bytes:
        raise DamagedBackupError(f"{path} has {size_bytes} bytes and was written with {file.size_bytes}. {_REMEDY}")
    if found.hexdigest() != file.sha256:
        raise DamagedBackupError(f"{path} is not as it was written: its SHA-256 is another. {_REMEDY}")


_REMEDY = "Restore another backup, or get this one from where it was copied to."


def read_lines(directory: Path, file: StoredFile, *, batch: int = 1_000) -> Iterator[list[bytes]]:
    """The lines of a file, some at a time. Raises DamagedBackupError for what cannot be unpacked."""
    path = directory / file.name
    try:
        with gzip.open(path, "rb") as opened:
            lines: list[bytes] = []
            for line in opened:
                lines.append(line.rstrip(b"\n"))
                if len(lines) >= batch:
                    yield lines
                    lines = []
            if lines:
                yield lines
    except (OSError, EOFError, zlib.error) as error:
        raise DamagedBackupError(f"{path} cannot be unpacked: {error}. {_REMEDY}") from error


def write_manifest(directory: Path, manifest: Manifest | Increment) -> None:
    """Make the directory a backup: whole or not at all, and durable when this returns."""
    content = manifest.model_dump(mode="json")
    text = json.dumps({**content, "sha256": _digest(content)}, indent=1, ensure_ascii=True) + "\n"
    temporary = directory / f".{MANIFEST}.{os.getpid()}"
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())
    temporary.replace(directory / MANIFEST)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(directory: Path) -> Manifest:
    """What a backup says of itself. Raises DamagedBackupError, also for a directory that is none."""
    return _read(directory, Manifest)


def _read(directory: Path, kind: type[M]) -> M:
    path = directory / MANIFEST
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DamagedBackupError(
            f"{directory} is no backup, or one that was not finished: it has no {MANIFEST}. Name another directory."
        ) from None
    except (OSError, ValueError) as error:
        raise DamagedBackupError(f"{path} cannot be read: {error}. {_REMEDY}") from error
    if not isinstance(content, dict) or _digest({k: v for k, v in content.items() if k != "sha256"}) != content.get(
        "sha256"
    ):
        raise DamagedBackupError(f"{path} is not as it was written. {_REMEDY}")
    if content.get("format") != FORMAT:
        raise DamagedBackupError(
            f"{path} has format {content.get('format')}, this program reads {FORMAT}. "
            f"Use the version that made it ({content.get('made_by')})."
        )
    content.pop("sha256")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise DamagedBackupError(f"{path} does not say what this program expects: {error}. {_REMEDY}") from error


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def increments_of(directory: Path, manifest: Manifest) -> list[tuple[Path, Increment]]:
    """The increments of a backup with their directories, oldest first.

    Raises DamagedBackupError for one that is of another backup or does not begin where the one before it ended.
    """
    ends = {(stored.topic, stored.partition): stored.end for stored in manifest.partitions}
    found = []
    for path in backups_in(directory / LOG):
        increment = _read(path, Increment)
        begins = {(stored.topic, stored.partition): stored.copied_from for stored in increment.partitions}
        if increment.of != manifest.name or any(ends.get(position) != start for position, start in begins.items()):
            raise DamagedBackupError(f"{path} does not follow what is there before it: an increment is missing.")
        ends |= {(stored.topic, stored.partition): stored.end for stored in increment.partitions}
        found.append((path, increment))
    return found


def check_files(directory: Path) -> Manifest:
    """Read a backup through, increments included; its manifest.

    Raises DamagedBackupError naming the first file that is not as it was written.
    """
    manifest = read_manifest(directory)
    for file in manifest.files():
        check_file(directory, file)
    for path, increment in increments_of(directory, manifest):
        for file in increment.files():
            check_file(path, file)
    return manifest


def new_directory(into: Path) -> Path:
    """A new directory inside `into`, called by the time. Raises FileExistsError for the second within a second."""
    into.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory = into.absolute() / datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H-%M-%SZ")
    directory.mkdir(mode=0o700)
    return directory


def backups_in(directory: Path) -> list[Path]:
    """The finished backups in a directory, oldest first."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if NAME.fullmatch(path.name) and (path / MANIFEST).is_file())
