"""The tables of a system as they lie in its storage, read beside the system and without any of its code.

SQLite is read with the standard library, Cassandra with its driver at consistency QUORUM: what was answered is seen,
what is under way may be. Values are told in the same words wherever they come from: a truth is 1 or 0, as in SQLite.
Cassandra's tables are those that were there when it was opened.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, unquote, urlsplit

Row = dict[str, Any]

_ANSWER_WITHIN_S = 30


class Stored(Protocol):
    """A storage while it is open for reading. Tables are named NAMESPACE.TABLE."""

    def tables(self) -> list[str]: ...

    def columns(self, name: str) -> list[str]: ...

    def rows(self, name: str, only: Sequence[str] = ()) -> list[Row]:
        """Every row as it is stored, or `only` some columns of it; none of a table that does not exist (yet)."""

    def count(self, name: str) -> int: ...


@contextmanager
def stored(directory: Path) -> Iterator[Stored]:
    """The storage of the system in `directory`: where its last start says, else its SQLite files."""
    url = _storage_url(directory)
    with stored_at(url) if urlsplit(url).scheme == "cassandra" else _sqlite(directory / "tables") as storage:
        yield storage


def stored_at(url: str) -> AbstractContextManager[Stored]:
    """The storage at an address: `sqlite://FOLDER` or `cassandra://HOST:PORT/`."""
    parts = urlsplit(url)
    return _cassandra(url) if parts.scheme == "cassandra" else _sqlite(Path(unquote(parts.path)))


def _storage_url(directory: Path) -> str:
    try:
        return str(json.loads((directory / "runtime.json").read_text())["storage"])
    except (OSError, ValueError, KeyError):
        return ""


class _SqliteFiles:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, sqlite3.Connection] = {}

    def tables(self) -> list[str]:
        return [
            f"{file.stem}.{name}"
            for file in sorted(self._folder.glob("*.db"))
            for (name,) in self._in(file.stem).execute(
                "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name"
            )
            if "$" not in name
        ]

    def columns(self, name: str) -> list[str]:
        namespace, _, table = name.partition(".")
        return [row[1] for row in self._in(namespace).execute(f'PRAGMA table_info("{table}")')]

    def rows(self, name: str, only: Sequence[str] = ()) -> list[Row]:
        namespace, _, table = name.partition(".")
        if not (self._folder / f"{namespace}.db").exists():
            return []
        if not self.columns(name):
            return []
        columns = only or self.columns(name)
        found = self._in(namespace).execute(f'SELECT {_listed(columns)} FROM "{table}"')
        return [dict(zip(columns, row, strict=True)) for row in found]

    def count(self, name: str) -> int:
        namespace, _, table = name.partition(".")
        if not (self._folder / f"{namespace}.db").exists() or not self.columns(name):
            return 0
        counted: int = self._in(namespace).execute(f'SELECT count(*) FROM "{table}"').fetchone()[0]
        return counted

    def close(self) -> None:
        for connection in self._open.values():
            connection.close()

    def _in(self, namespace: str) -> sqlite3.Connection:
        if namespace not in self._open:
            file = self._folder / f"{namespace}.db"
            self._open[namespace] = sqlite3.connect(f"file:{quote(str(file))}?mode=ro", uri=True, timeout=10)
        return self._open[namespace]


@contextmanager
def _sqlite(folder: Path) -> Iterator[Stored]:
    files = _SqliteFiles(folder)
    try:
        yield files
    finally:
        files.close()


_ROWS_AT_ONCE = 500
"""Cassandra refuses a page that meets 100,000 deletions, and every column that a commit has cleared is one."""


class _CassandraKeyspaces:
    def __init__(self, session: Any) -> None:
        self._session = session
        self._session.default_fetch_size = _ROWS_AT_ONCE
        self._columns: dict[str, list[str]] = {}
        columns = session.execute("SELECT keyspace_name, table_name, column_name FROM system_schema.columns")
        for keyspace, table, column in columns:
            if not keyspace.startswith("system"):
                self._columns.setdefault(f"{keyspace}.{table}", []).append(column)

    def tables(self) -> list[str]:
        return sorted(self._columns)

    def columns(self, name: str) -> list[str]:
        return self._columns[name]

    def rows(self, name: str, only: Sequence[str] = ()) -> list[Row]:
        if name not in self._columns:
            return []
        namespace, _, table = name.partition(".")
        columns = only or self._columns[name]
        found = self._session.execute(f'SELECT {_listed(columns)} FROM "{namespace}"."{table}"')
        return [dict(zip(columns, map(_as_in_sqlite, row), strict=True)) for row in found]

    def count(self, name: str) -> int:
        if name not in self._columns:
            return 0
        namespace, _, table = name.partition(".")
        counted: int = self._session.execute(f'SELECT count(*) FROM "{namespace}"."{table}"').one()[0]
        return counted


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(f'"{column}"' for column in columns)


def _as_in_sqlite(value: Any) -> Any:
    return int(value) if isinstance(value, bool) else value


@contextmanager
def _cassandra(url: str) -> Iterator[Stored]:
    from cassandra import ConsistencyLevel
    from cassandra.cluster import EXEC_PROFILE_DEFAULT, Cluster, ExecutionProfile
    from cassandra.policies import RoundRobinPolicy
    from cassandra.query import tuple_factory

    logging.getLogger("cassandra").setLevel(logging.ERROR)  # what it says of a server that is away, we raise
    hosts, port = _places(url)
    profile = ExecutionProfile(
        RoundRobinPolicy(),
        consistency_level=ConsistencyLevel.QUORUM,
        request_timeout=_ANSWER_WITHIN_S,
        row_factory=tuple_factory,
    )
    cluster = Cluster(
        hosts,
        port=port,
        protocol_version=5,
        execution_profiles={EXEC_PROFILE_DEFAULT: profile},
        connect_timeout=_ANSWER_WITHIN_S,
        control_connection_timeout=_ANSWER_WITHIN_S,
        schema_metadata_enabled=False,
        token_metadata_enabled=False,
    )
    with cluster, cluster.connect() as session:
        yield _CassandraKeyspaces(session)


def _places(url: str) -> tuple[Sequence[str], int]:
    places = [urlsplit(f"//{place}") for place in urlsplit(url).netloc.split(",")]
    return [place.hostname or "" for place in places], next((place.port for place in places if place.port), 9042)
