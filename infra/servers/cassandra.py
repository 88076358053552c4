"""Apache Cassandra on this machine: one node, started from its Java archives, its data in one directory.

What the directory holds, beside what every node has (`local_node`):

    data/ commitlog/ hints/ saved_caches/ cdc_raw/    Cassandra's own
    cluster_name                                      made once; the data are bound to it
    cassandra.yaml  logback.xml                       written anew at every start, from the tables below
    server.log                                        Cassandra's log (rotated, 3 files of 8 MB)

With `commitlog_sync` batch, the default here, an acknowledged write is on the disk. Cassandra's own default, periodic,
forgets acknowledged writes, and not with the power supply alone: after SIGKILL, too, those since the last mark in the
commit log (0.1 s, longer on a busy machine) are not replayed. A single node shows behaviour, not availability.

This module never looks at keyspaces; readiness is asked for with one query for the cluster's name. It needs no driver.
"""

from __future__ import annotations

import asyncio
import json
import re
import struct
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal
from xml.sax.saxutils import escape

from infra.servers.artifacts import Progress
from infra.servers.errors import DirectoryError, ServerDiedError
from infra.servers.local_node import LOOPBACK, Cause, LocalNode

CommitLogSync = Literal["batch", "group", "periodic"]

LOCAL_DATA_CENTER = "datacenter1"
"""What a SimpleSnitch calls the only data centre; drivers ask for it."""

SETTINGS: Mapping[str, Any] = {
    "num_tokens": 16,
    "partitioner": "org.apache.cassandra.dht.Murmur3Partitioner",
    "endpoint_snitch": "SimpleSnitch",
    "auto_bootstrap": False,  # nobody to stream from
    "hinted_handoff_enabled": False,  # nobody to keep hints for
    "auto_snapshot": False,  # dropping a table deletes it
    "incremental_backups": False,
    "storage_compatibility_mode": "NONE",
    # Two round trips for a conditional statement instead of four. ScalarDB recommends it as well.
    "paxos_variant": "v2",
    # A disk that fails ends the process, and whoever watches over it starts it anew from what can be read. Unset, these
    # are `ignore` and `stop`: a table that cannot be flushed is not mentioned again, and a server that cannot log lives
    # on and answers nobody.
    "disk_failure_policy": "die",
    "commit_failure_policy": "die",
    # One laptop: little memory, few threads.
    "memtable_heap_space": "256MiB",
    "memtable_offheap_space": "128MiB",
    "file_cache_enabled": False,
    "key_cache_size": "16MiB",
    "commitlog_total_space": "512MiB",
    "concurrent_compactors": 1,
    "disk_optimization_strategy": "ssd",
    # A conditional batch of some dozens of records with their before-images; Cassandra's 5 and 50 KiB are too tight.
    "batch_size_warn_threshold": "64KiB",
    "batch_size_fail_threshold": "1MiB",
    # Longer than Cassandra's 2 to 5 s: two cores that also run the clients are late now and then.
    "request_timeout": "10s",
    "read_request_timeout": "10s",
    "range_request_timeout": "20s",
    "write_request_timeout": "10s",
    "cas_contention_timeout": "5s",
}

_SYNC_SETTINGS: Mapping[CommitLogSync, Mapping[str, Any]] = {
    "batch": {},
    "group": {"commitlog_sync_group_window": "5ms"},
    "periodic": {"commitlog_sync_period": "10s"},
}

# Cassandra's own list for Java 17 (conf/jvm17-server.options).
_EXPORTED: Sequence[str] = (
    "java.base/java.lang.ref",
    "java.base/jdk.internal.misc",
    "java.management.rmi/com.sun.jmx.remote.internal.rmi",
    "java.rmi/sun.rmi.registry",
    "java.rmi/sun.rmi.server",
    "java.sql/java.sql",
    "jdk.attach/sun.tools.attach",
    "jdk.compiler/com.sun.tools.javac.file",
    "jdk.unsupported/sun.misc",
)
_OPENED: Sequence[str] = (
    "java.base/java.io",
    "java.base/java.lang",
    "java.base/java.lang.module",
    "java.base/java.lang.reflect",
    "java.base/java.util",
    "java.base/jdk.internal.loader",
    "java.base/jdk.internal.math",
    "java.base/jdk.internal.module",
    "java.base/jdk.internal.ref",
    "java.base/jdk.internal.reflect",
    "java.base/jdk.internal.util.jar",
    "java.base/sun.nio.ch",
    "jdk.compiler/com.sun.tools.javac",
    "jdk.management/com.sun.management.internal",
)

_JVM_OPTIONS: Sequence[str] = (
    "-XX:+UseSerialGC",  # two cores: no collector threads beside the clients, and the smallest footprint
    "-XX:+ExitOnOutOfMemoryError",
    "-XX:-UsePerfData",
    "-Xss512k",
    "-Djava.awt.headless=true",
    "-Djdk.attach.allowAttachSelf=true",
    "-Dio.netty.tryReflectionSetAccessible=true",
    *(f"--add-exports={package}=ALL-UNNAMED" for package in _EXPORTED),
    *(f"--add-opens={package}=ALL-UNNAMED" for package in _OPENED),
    "-Dcassandra-foreground=yes",
    # No other node will ever be heard of: do not wait for one, neither at the start nor at the end.
    "-Dcassandra.skip_wait_for_gossip_to_settle=0",
    "-Dcassandra.ring_delay_ms=100",
    "-Dcassandra.shutdown_announce_in_ms=0",
    "-Dcassandra.superuser_setup_delay_ms=0",
)

_LOGBACK = """\
<configuration>
  <appender name="file" class="ch.qos.logback.core.rolling.RollingFileAppender">
    <file>{log}</file>
    <rollingPolicy class="ch.qos.logback.core.rolling.FixedWindowRollingPolicy">
      <fileNamePattern>{log}.%i</fileNamePattern>
      <minIndex>1</minIndex>
      <maxIndex>2</maxIndex>
    </rollingPolicy>
    <triggeringPolicy class="ch.qos.logback.core.rolling.SizeBasedTriggeringPolicy">
      <maxFileSize>8MB</maxFileSize>
    </triggeringPolicy>
    <encoder><pattern>%date{{ISO8601, UTC}}Z %-5level %logger{{0}}: %msg%n</pattern></encoder>
  </appender>
  <logger name="org.apache.cassandra.db" level="WARN"/>
  <root level="INFO"><appender-ref ref="file"/></root>
</configuration>
"""


class LocalCassandra(LocalNode):
    """One Cassandra node of our own. Start it from the main thread (see `processes`).

    `directory` is Cassandra's own folder and is made if absent. Ports that are None are chosen freely and remembered;
    `storage_port` is the one for other nodes, of which there are none. It listens on `host`, a loopback address,
    without authentication and without JMX. `commitlog_sync` is Cassandra's setting of this name; `settings` is laid
    over `SETTINGS` and holds any others of cassandra.yaml. Its memory is about `heap_mb` and half a gigabyte more.
    """

    server: ClassVar[str] = "Cassandra"
    archives: ClassVar[str] = "cassandra"
    java_versions: ClassVar[tuple[int, int | None]] = (17, 17)
    causes: ClassVar[Sequence[Cause]] = (
        Cause(
            re.compile(r"Please remove properties (\[.*?\]) from your cassandra\.yaml"),
            ServerDiedError,
            "Cassandra has no settings named {0}.",
            "Remove them from `{setting}`, or correct their names: those of Cassandra 5.0's cassandra.yaml.",
            "settings",
        ),
        Cause(
            re.compile(r"Cannot create property=(\w+).*(?:IllegalArgument|YAML)Exception: ([^\n]+)", re.DOTALL),
            ServerDiedError,
            "Cassandra refuses its setting {0}: {1}.",
            "Correct it in `{setting}`; values are those of Cassandra 5.0's cassandra.yaml.",
            "settings",
        ),
        Cause(
            re.compile(r"ConfigurationException: ([^\n]+)"),
            ServerDiedError,
            "Cassandra refuses its settings: {0}.",
            "Correct `{setting}`; values are those of Cassandra 5.0's cassandra.yaml.",
            "settings",
        ),
        Cause(
            # The commit log is a sparse file in memory: there is no page for what is written to it on a full disk.
            re.compile("a fault occurred in an? (?:recent )?unsafe memory access operation|SIGBUS"),
            DirectoryError,
            "Cassandra could not write its commit log: the disk is full.",
            "Make room, or choose another directory with {setting}.",
            "directory",
        ),
    )

    def __init__(
        self,
        directory: Path,
        port: int | None = None,
        storage_port: int | None = None,
        heap_mb: int = 1024,
        *,
        host: str = LOOPBACK,
        commitlog_sync: CommitLogSync = "batch",
        settings: Mapping[str, Any] | None = None,
        cache_dir: Path | None = None,
        min_free_mb: int = 1024,
        lock_wait_s: float = 5.0,
        progress: Progress | None = None,
        environment: Mapping[str, str] | None = None,
        setting_names: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(
            directory,
            {"port": port or 0, "storage_port": storage_port or 0},
            heap_mb,
            host=host,
            cache_dir=cache_dir,
            min_free_mb=min_free_mb,
            lock_wait_s=lock_wait_s,
            progress=progress,
            environment=environment,
            setting_names=setting_names,
        )
        self._commitlog_sync: CommitLogSync = commitlog_sync
        self._settings = dict(settings or {})
        self._cluster_name = ""

    @property
    def contact_point(self) -> str:
        """The address for drivers; the port is `port`."""
        return self._host

    @property
    def cluster_name(self) -> str:
        """The identity of the data in this directory, known from the first start on; another name means other data."""
        return self._cluster_name

    def _configure(self, ports: Mapping[str, int]) -> None:
        named = self._directory / "cluster_name"
        if not named.exists():
            self._write(named.name, f"concord-{uuid.uuid4().hex}")
        self._cluster_name = named.read_text().strip()
        settings = {
            **SETTINGS,
            **_SYNC_SETTINGS[self._commitlog_sync],
            "commitlog_sync": self._commitlog_sync,
            "cluster_name": self._cluster_name,
            "listen_address": self._host,
            "rpc_address": self._host,
            "native_transport_port": ports["port"],
            "storage_port": ports["storage_port"],
            "seed_provider": [
                {
                    "class_name": "org.apache.cassandra.locator.SimpleSeedProvider",
                    "parameters": [{"seeds": f"{self._host}:{ports['storage_port']}"}],
                }
            ],
            "data_file_directories": [str(self._directory / "data")],
            "commitlog_directory": str(self._directory / "commitlog"),
            "hints_directory": str(self._directory / "hints"),
            "saved_caches_directory": str(self._directory / "saved_caches"),
            "cdc_raw_directory": str(self._directory / "cdc_raw"),
            **self._settings,
        }
        # JSON is YAML too, and quotes everything that needs it.
        self._write("cassandra.yaml", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        self._write("logback.xml", _LOGBACK.format(log=escape(str(self.log_path))))

    def _command(self, archives: Sequence[Path], ports: Mapping[str, int]) -> Sequence[str]:
        return [
            *_JVM_OPTIONS,
            f"-Dcassandra.config={(self._directory / 'cassandra.yaml').as_uri()}",
            f"-Dcassandra.storagedir={self._directory}",
            f"-Dcassandra.logdir={self._directory}",
            f"-Dlogback.configurationFile={(self._directory / 'logback.xml').as_uri()}",
            *("-cp", ":".join(map(str, archives)), "org.apache.cassandra.service.CassandraDaemon"),
        ]

    async def _serves(self) -> bool:
        return await _cluster_name_at(self._host, self.port) == self._cluster_name


# CQL's native protocol, version 4: a frame is version, flags, stream, opcode, length, body.
_VERSION, _STARTUP, _READY, _QUERY, _RESULT = 4, 0x01, 0x02, 0x07, 0x08
_CONSISTENCY_ONE, _ROWS = 1, 2


async def _cluster_name_at(host: str, port: int, *, timeout_s: float = 2.0) -> str | None:
    """The name of the Cassandra cluster that answers at host:port; None without an answer in time.

    An open port alone does not mean that Cassandra answers, nor that it is the one that was started.
    """
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                options = struct.pack(">H", 1) + _string("CQL_VERSION") + _string("3.0.0")
                if (await _ask(reader, writer, _STARTUP, options))[0] != _READY:
                    return None
                query = b"SELECT cluster_name FROM system.local"
                parameters = struct.pack(">HB", _CONSISTENCY_ONE, 0)
                opcode, body = await _ask(reader, writer, _QUERY, struct.pack(">i", len(query)) + query + parameters)
                return _only_text(body) if opcode == _RESULT else None
            finally:
                writer.close()
    except (OSError, TimeoutError, asyncio.IncompleteReadError, struct.error, UnicodeDecodeError):
        return None


async def _ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, opcode: int, body: bytes
) -> tuple[int, bytes]:
    """Send one request; opcode and body of its answer."""
    writer.write(struct.pack(">BBhBi", _VERSION, 0, 0, opcode, len(body)) + body)
    _version, _flags, _stream, answer, length = struct.unpack(">BBhBi", await reader.readexactly(9))
    return answer, await reader.readexactly(length)


def _string(text: str) -> bytes:
    return struct.pack(">H", len(text)) + text.encode()


def _only_text(body: bytes) -> str | None:
    """The value of a RESULT of one row with one text column; None if it is anything else."""
    kind, flags = struct.unpack_from(">ii", body)
    if kind != _ROWS or flags != 1:  # 1: keyspace and table are named once, before the columns
        return None
    at = 12
    for _ in range(3):  # keyspace, table, column
        (length,) = struct.unpack_from(">H", body, at)
        at += 2 + length
    rows, length = struct.unpack_from(">ii", body, at + 2)  # behind the column's type
    return body[at + 10 : at + 10 + length].decode() if rows == 1 and length >= 0 else None
