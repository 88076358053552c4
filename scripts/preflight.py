"""What must hold before anything is started, so that nothing is ever half-started.

Each check raises one of infra.servers.errors, whose sentence names the setting and the remedy.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from infra.config import Settings
from infra.servers.errors import AlreadyRunningError, DirectoryError, PortTakenError
from scripts.cli.system import lock_path

MIN_FREE_MB = 512
HOST = "127.0.0.1"

UNFINISHED_RESTORE = "restore.unfinished"
"""A file of this name says that a directory is not whole yet: `concord restore` removes it at its end."""

PORTS: tuple[tuple[str, str, Callable[[Settings], int]], ...] = (
    ("CONCORD_HTTP_PORT", "metrics and health", lambda settings: settings.http_port),
    ("CONCORD_DASHBOARD_PORT", "the Ray dashboard", lambda settings: settings.dashboard_port),
    ("CONCORD_KAFKA__PORT", "Kafka", lambda settings: settings.kafka.port if settings.profile != "cluster" else 0),
    (
        "CONCORD_CASSANDRA__PORT",
        "Cassandra",
        lambda settings: settings.cassandra.port if settings.profile == "stack" else 0,
    ),
)
"""Ports that are taken for ourselves: the setting, what listens there, its value (0: a free one is chosen)."""


def check_directory(directory: Path) -> None:
    """It exists or can be made, can be written, has room, and no restore was left unfinished in it."""
    if (directory / UNFINISHED_RESTORE).exists():
        raise DirectoryError(
            f"A restore into {directory} was not finished: what is there is not a whole system.",
            remedy="Restore the backup again, into a new directory.",
            setting="--data",
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".writable.{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
        free_mb = shutil.disk_usage(directory).free // 2**20
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise DirectoryError(
            f"The directory {directory} cannot be written: {error.strerror or error}.",
            remedy=("Make room there" if full else "Make it writable") + ", or choose another directory with --data.",
            setting="--data",
        ) from error
    if free_mb < MIN_FREE_MB:
        raise DirectoryError(
            f"The directory {directory} has {free_mb} MB left; a start needs {MIN_FREE_MB} MB.",
            remedy="Make room there, or choose another directory with --data.",
            setting="--data",
        )


def check_ports(settings: Settings) -> None:
    """Every port that is wanted is free."""
    for setting, purpose, value in PORTS:
        port = value(settings)
        if port and not is_free(port):
            raise PortTakenError(
                f"Port {port}, which {purpose} should have, is taken by another process.",
                remedy=f"Stop that process, or set {setting} to another port (0: any that is free).",
                setting=setting,
            )


def is_free(port: int) -> bool:
    """Whether a server of ours could listen on `port` now."""
    with socket.socket() as attempt:
        attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            attempt.bind((HOST, port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """A port on which nobody listens now."""
    with socket.socket() as chosen:
        chosen.bind((HOST, 0))
        port: int = chosen.getsockname()[1]
        return port


@contextmanager
def hold(directory: Path, *, lock: Path | None = None, what: str = "A system is") -> Iterator[None]:
    """Be the only one of its kind in `directory`: its supervisor, unless `lock` and `what` say what else.

    The kernel gives the lock back when this process ends, however it ends. Raises AlreadyRunningError, DirectoryError.
    """
    path = lock or lock_path(directory)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise DirectoryError(
            f"{path} cannot be opened: {error.strerror or error}.",
            remedy="Make the directory writable, or choose another with --data.",
            setting="--data",
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(descriptor, 32).decode("ascii", "replace").strip() or "unknown"
            raise AlreadyRunningError(
                f"{what} running in {directory} already (process {pid}).",
                remedy=f"Stop it with `kill {pid}`, or choose another directory with --data.",
                setting="--data",
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
