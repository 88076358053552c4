"""Copies of all files of an SqliteStorage as they were at one instant, while other processes may have them open.

    for each file: a connection, and its data version (a counter that changes when another connection has committed)
    copy every file, by SQLite's backup of a database that is in use
    for each file: the data version again

If none has changed, nothing was written between the first look and the last, so all copies show the same instant. If
one has, there is no such instant, and the caller is told: it is for the caller to keep writers out meanwhile. SQLite's
own backup is whole for one file and says nothing of several.

Source: https://www.sqlite.org/backup.html, https://www.sqlite.org/pragma.html#pragma_data_version
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection
from contextlib import ExitStack, closing
from pathlib import Path

from infra.storage.errors import UnavailableStorageError


def copy_files(directory: Path, target: Path, *, leave_out: Collection[str] = ()) -> bool:
    """Copy the files of every namespace but those of `leave_out` into `target`, a new directory; blocks.

    Whether the copies are of one instant. Raises UnavailableStorageError for a file that cannot be read or written.
    """
    target.mkdir(mode=0o700)
    paths = sorted(path for path in directory.glob("*.db") if path.stem not in leave_out)
    path = directory
    try:
        with ExitStack() as opened:
            sources = []
            for path in paths:
                sources.append(
                    opened.enter_context(closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=10)))
                )
            before = [_data_version(source) for source in sources]
            for path, source in zip(paths, sources, strict=True):
                with closing(sqlite3.connect(target / path.name)) as copy:
                    # Thrown away if anything fails, so nothing of it needs to be safe yet.
                    copy.execute("PRAGMA synchronous = OFF")
                    source.backup(copy)
            return before == [_data_version(source) for source in sources]
    except sqlite3.Error as error:
        raise UnavailableStorageError(
            f"{path} could not be copied to {target}: {error}",
            remedy=f"see that {path} can be read and that {target} has room",
        ) from error


def _data_version(connection: sqlite3.Connection) -> int:
    (version,) = connection.execute("PRAGMA data_version").fetchone()
    return int(version)
