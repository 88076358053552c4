"""DynamoDB Local on this machine: Amazon's single-process stand-in, started from its Java archives.

What the directory holds, beside what every node has (`local_node`):

    data/               one SQLite file with all tables, shared by all access keys and regions

Without a directory the tables are kept in memory and end with the process. DynamoDB Local reads and writes through
SQLite in either case, whose native library is one of the archives: it exists for the systems in `_NATIVE_LIBRARIES`.

It keeps no log of its own; what it says is in console.log. Any access key is good, but a request needs one. Amazon
gives it no way to listen on one address only: it listens on all of them, so it is for tests, never for data.

This module never looks at tables, except for one request for their names, which tells readiness. It needs no SDK.
"""

from __future__ import annotations

import asyncio
import json
import platform
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from infra.servers.artifacts import Progress
from infra.servers.errors import PortTakenError, ServerError
from infra.servers.local_node import LOOPBACK, Cause, LocalNode

_NATIVE_LIBRARIES: Mapping[tuple[str, str], str] = {
    ("Linux", "x86_64"): "libsqlite4java-linux-amd64",
    ("Darwin", "x86_64"): "libsqlite4java-osx",
}
"""The artifact with the native SQLite library, by `platform.system()` and `platform.machine()`."""

_MAIN_CLASS = "com.amazonaws.services.dynamodbv2.local.main.ServerRunner"

_JVM_OPTIONS: Sequence[str] = (
    "-XX:+UseSerialGC",  # two cores: no collector threads beside the clients, and the smallest footprint
    "-XX:+ExitOnOutOfMemoryError",
    "-XX:-UsePerfData",
    "-Djava.awt.headless=true",
)


class LocalDynamoDb(LocalNode):
    """One DynamoDB Local of our own. Start it from the main thread (see `processes`).

    `directory` is its own folder and is made if absent; None keeps the tables in memory. A port that is None is chosen
    freely and remembered.
    """

    server: ClassVar[str] = "DynamoDB Local"
    archives: ClassVar[str] = "dynamodb"
    causes: ClassVar[Sequence[Cause]] = (
        Cause(
            re.compile(r"Could not start server on port (\d+)"),
            PortTakenError,
            "{server} could not listen on port {0}: another process took it.",
            "Set {setting} to a free port, or leave it unset to have one chosen.",
            "port",
        ),
    )

    stop_grace_s: ClassVar[float] = 5.0

    def __init__(
        self,
        directory: Path | None,
        port: int | None = None,
        heap_mb: int = 256,
        *,
        cache_dir: Path | None = None,
        min_free_mb: int = 64,
        lock_wait_s: float = 5.0,
        progress: Progress | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._in_memory = directory is None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        if directory is None:  # the console's output and the lock need a place all the same
            self._temporary = tempfile.TemporaryDirectory(prefix="concord-dynamodb-", ignore_cleanup_errors=True)
            directory = Path(self._temporary.name)
        super().__init__(
            directory,
            {"port": port or 0},
            heap_mb,
            cache_dir=cache_dir,
            min_free_mb=min_free_mb,
            lock_wait_s=lock_wait_s,
            progress=progress,
            environment=environment,
        )

    @property
    def address(self) -> str:
        return self.endpoint_url

    @property
    def endpoint_url(self) -> str:
        """`http://127.0.0.1:PORT` for clients, from `start` on."""
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def log_path(self) -> Path:
        return self._directory / "console.log"

    async def stop(self, *, grace_s: float | None = None) -> None:
        """Stop cleanly (SIGTERM), after `grace_s` seconds by SIGKILL. Tables in memory are gone then."""
        await super().stop(grace_s=grace_s)
        if self._temporary is not None:
            self._temporary.cleanup()

    def _configure(self, ports: Mapping[str, int]) -> None:
        try:
            (self._directory / "data").mkdir(exist_ok=True)
        except OSError as error:
            raise self._not_writable(error) from error

    def _command(self, archives: Sequence[Path], ports: Mapping[str, int]) -> Sequence[str]:
        library = _native_library(archives, platform.system(), platform.machine())
        where = ["-inMemory"] if self._in_memory else ["-dbPath", str(self._directory / "data")]
        return [
            *_JVM_OPTIONS,
            f"-Dsqlite4java.library.path={library.parent}",
            *("-cp", ":".join(str(path) for path in archives if path.suffix == ".jar"), _MAIN_CLASS),
            *(*where, "-sharedDb", "-port", str(ports["port"]), "-disableTelemetry"),
        ]

    async def _serves(self) -> bool:
        return await _answers(LOOPBACK, self.port)


def _native_library(archives: Sequence[Path], system: str, machine: str) -> Path:
    """The archive that is the native SQLite library of this machine; ServerError where there is none."""
    artifact = _NATIVE_LIBRARIES.get((system, machine))
    for path in archives:
        if artifact is not None and path.name.startswith(f"{artifact}-"):
            return path
    systems = ", ".join(" ".join(known) for known in _NATIVE_LIBRARIES)
    raise ServerError(
        f"DynamoDB Local does not run on {system} {machine}: its SQLite library does not exist there.",
        remedy=f"Run it on one of: {systems}.",
    )


async def _answers(host: str, port: int, *, timeout_s: float = 5.0) -> bool:
    """Whether a DynamoDB at host:port answers a request for the names of its tables in time."""
    body = json.dumps({"Limit": 1})
    request = (
        f"POST / HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n"
        "Content-Type: application/x-amz-json-1.0\r\nX-Amz-Target: DynamoDB_20120810.ListTables\r\n"
        "Authorization: AWS4-HMAC-SHA256 Credential=local/20260101/local/dynamodb/aws4_request,"
        " SignedHeaders=host, Signature=0\r\n"  # DynamoDB Local looks at the form only
        f"Content-Length: {len(body)}\r\n\r\n{body}"
    )
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(request.encode())
                answer = await reader.read()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
    return answer.startswith(b"HTTP/1.1 200") and b'"TableNames"' in answer
