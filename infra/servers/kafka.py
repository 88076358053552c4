"""Apache Kafka on this machine: one KRaft node, started from its Java archives, its data in one directory.

What the directory holds, beside what every node has (`local_node`):

    data/               the log, formatted once; `meta.properties` in it carries the cluster id
    server.properties   written anew at every start, from the tables below
    log4j2.properties   likewise
    server.log          Kafka's own log (rotated, 3 files of 8 MB)

A single node shows behaviour, not availability: a message is acknowledged when the operating system has it, so it
outlives any killed process but not the power supply. `flush.messages` 1 makes it outlive that too, at a price.

This module never looks at topics or messages; readiness is asked for with one Metadata request.
"""

from __future__ import annotations

import asyncio
import base64
import os
import re
import struct
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from infra.servers.artifacts import Progress
from infra.servers.errors import DirectoryError
from infra.servers.java import JavaRuntime
from infra.servers.local_node import LOOPBACK, Cause, LocalNode

HOST = LOOPBACK
SETTING_NAMES: Mapping[str, str] = {
    "port": "CONCORD_KAFKA__PORT",
    "broker": "CONCORD_KAFKA__PORT",
    "controller": "controller_port",
    "heap_mb": "CONCORD_KAFKA__HEAP_MB",
    "directory": "--data",
}
"""What the user knows the parameters by."""

MESSAGE_MAX_BYTES = 8 * 1024 * 1024

SERVER_PROPERTIES: Mapping[str, str] = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "listener.security.protocol.map": "BROKER:PLAINTEXT,CONTROLLER:PLAINTEXT",
    "inter.broker.listener.name": "BROKER",
    "controller.listener.names": "CONTROLLER",
    # One laptop, some dozens of partitions.
    "num.network.threads": "2",
    "num.io.threads": "4",
    "background.threads": "2",
    "num.recovery.threads.per.data.dir": "2",
    "log.cleaner.threads": "1",
    "log.cleaner.dedupe.buffer.size": str(8 * 1024 * 1024),
    "log.segment.bytes": str(64 * 1024 * 1024),
    "log.index.size.max.bytes": str(256 * 1024),  # set aside for each partition; enough for a segment of this size
    # One node: every internal topic has one replica.
    "offsets.topic.num.partitions": "4",
    "offsets.topic.replication.factor": "1",
    "transaction.state.log.num.partitions": "1",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "share.coordinator.state.topic.num.partitions": "1",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    # Topics are declared; a mistyped one must fail.
    "auto.create.topics.enable": "false",
    "message.max.bytes": str(MESSAGE_MAX_BYTES),  # unless LocalKafka is told otherwise
    "replica.fetch.max.bytes": str(MESSAGE_MAX_BYTES),
    # Faust brings its own assignor over the classic protocol.
    "group.coordinator.rebalance.protocols": "classic,consumer",
    "group.initial.rebalance.delay.ms": "0",
    # Positions must outlive a holiday: a group that lost them would start again from the oldest message.
    "offsets.retention.minutes": str(30 * 24 * 60),
    # After SIGKILL the controller keeps the dead broker's registration for one session (9 s by default) and refuses
    # the new one until then: measured, a restart took 12 s instead of 2.
    "broker.session.timeout.ms": "4000",
    "broker.heartbeat.interval.ms": "500",
}

_JVM_OPTIONS: Sequence[str] = (
    "-XX:+UseSerialGC",  # two cores: no collector threads beside the workers, and the smallest footprint
    "-XX:+ExitOnOutOfMemoryError",
    "-XX:-UsePerfData",
    "-Djava.awt.headless=true",
)
_FORMATTER_JVM_OPTIONS: Sequence[str] = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xmx128m", "-XX:-UsePerfData")

_LOG4J2_PROPERTIES = """\
status = error
appender.file.type = RollingFile
appender.file.name = file
appender.file.fileName = {log}
appender.file.filePattern = {log}.%i
appender.file.layout.type = PatternLayout
appender.file.layout.pattern = %d{{ISO8601}}{{UTC}}Z %-5p %c{{1}}: %m%n
appender.file.policies.type = Policies
appender.file.policies.size.type = SizeBasedTriggeringPolicy
appender.file.policies.size.size = 8MB
appender.file.strategy.type = DefaultRolloverStrategy
appender.file.strategy.max = 2
rootLogger.level = warn
rootLogger.appenderRef.file.ref = file
logger.server.name = kafka.server.KafkaRaftServer
logger.server.level = info
logger.recovery.name = org.apache.kafka.storage.internals.log.LogManager
logger.recovery.level = info
"""

_FORMAT_TIMEOUT_S = 120.0


class LocalKafka(LocalNode):
    """One Kafka node of our own. Start it from the main thread (see `processes`).

    `directory` is Kafka's own folder and is made if absent. Ports that are None are chosen freely and remembered.

    `extra_properties` is laid over server.properties and holds any of Kafka's settings (`log.dirs` moves the data).
    `extra_listeners` are further ones for clients, by name with their security protocol (`{"LOGIN": "SASL_SSL"}`); each
    gets a port of its own, at `address_of`; what they need beyond it goes into `extra_properties`. `format_arguments`
    are given to Kafka's own tool when it formats the directory (`--add-scram …`).
    """

    server: ClassVar[str] = "Kafka"
    archives: ClassVar[str] = "kafka"
    stop_grace_s: ClassVar[float] = 20.0
    causes: ClassVar[Sequence[Cause]] = (
        Cause(
            # Indexes are sparse files in memory: there is no page for what is written to them on a full disk.
            re.compile("a fault occurred in an? (?:recent )?unsafe memory access operation|SIGBUS"),
            DirectoryError,
            "Kafka could not write the index of a log: the disk is full.",
            "Make room, or choose another directory with {setting}.",
            "directory",
        ),
    )

    def __init__(
        self,
        directory: Path,
        port: int | None = None,
        controller_port: int | None = None,
        heap_mb: int = 512,
        *,
        message_max_bytes: int = MESSAGE_MAX_BYTES,
        extra_properties: Mapping[str, str] | None = None,
        extra_listeners: Mapping[str, str] | None = None,
        format_arguments: Sequence[str] = (),
        cache_dir: Path | None = None,
        min_free_mb: int = 256,
        lock_wait_s: float = 5.0,
        progress: Progress | None = None,
        environment: Mapping[str, str] | None = None,
        setting_names: Mapping[str, str] = SETTING_NAMES,
    ) -> None:
        self._extra_listeners = dict(extra_listeners or {})
        super().__init__(
            directory,
            {"broker": port or 0, "controller": controller_port or 0, **dict.fromkeys(self._extra_listeners, 0)},
            heap_mb,
            cache_dir=cache_dir,
            min_free_mb=min_free_mb,
            lock_wait_s=lock_wait_s,
            progress=progress,
            environment=environment,
            setting_names=setting_names,
        )
        self._message_max_bytes = message_max_bytes
        self._extra_properties = dict(extra_properties or {})
        self._format_arguments = tuple(format_arguments)
        self._cluster_id = ""

    @property
    def bootstrap_servers(self) -> str:
        """`host:port` for clients, from `start` or `choose_ports` on."""
        return self.address

    def address_of(self, listener: str) -> str:
        """`host:port` of one of `extra_listeners`, from `start` or `choose_ports` on."""
        if self._ports is None:
            raise RuntimeError("Kafka has not been started")
        return f"{self._host}:{self._ports[listener]}"

    @property
    def cluster_id(self) -> str:
        """The identity of the log in this directory, known from the first start on; another id means other data."""
        return self._cluster_id

    # Steps of the start, in their order.

    def _check_directory(self) -> None:
        if "," in str(self._directory):
            name = self._named("directory")
            raise DirectoryError(
                f"Kafka cannot keep data in {self._directory}: it takes the comma for the end of the name.",
                remedy=f"Choose another directory with {name}.",
                setting=name,
            )
        super()._check_directory()

    def _properties(self, ports: Mapping[str, int]) -> Mapping[str, str]:
        listeners = {name: f"{name}://{self._host}:{ports[name]}" for name in self._extra_listeners}
        for_clients = ",".join((f"BROKER://{self._host}:{ports['broker']}", *listeners.values()))
        protocols = [f"{name}:{protocol}" for name, protocol in self._extra_listeners.items()]
        return {
            **SERVER_PROPERTIES,
            "listener.security.protocol.map": ",".join(
                (SERVER_PROPERTIES["listener.security.protocol.map"], *protocols)
            ),
            "controller.quorum.voters": f"1@{self._host}:{ports['controller']}",
            "listeners": f"{for_clients},CONTROLLER://{self._host}:{ports['controller']}",
            "advertised.listeners": for_clients,
            "log.dirs": str(self._directory / "data"),
            "message.max.bytes": str(self._message_max_bytes),
            "replica.fetch.max.bytes": str(self._message_max_bytes),
            **self._extra_properties,
        }

    def _configure(self, ports: Mapping[str, int]) -> None:
        lines = [f"{name}={_escaped(value)}\n" for name, value in self._properties(ports).items()]
        self._write("server.properties", "".join(lines))
        self._write("log4j2.properties", _LOG4J2_PROPERTIES.format(log=_escaped(str(self.log_path))))

    def _prepare(self, java: JavaRuntime, archives: Sequence[Path]) -> None:
        """Give the data directory its identity. `meta.properties` is written last, so its presence says it is whole.

        Kafka's own tool does it: beside the id it writes the first metadata records, whose content is Kafka's affair.
        """
        data = Path(self._extra_properties.get("log.dirs", self._directory / "data"))
        meta = data / "meta.properties"
        if not meta.exists():
            try:
                data.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise self._not_writable(error) from error
            self._format(java, archives)
        self._cluster_id = _read_properties(meta)["cluster.id"]

    def _format(self, java: JavaRuntime, archives: Sequence[Path]) -> None:
        cluster_id = base64.urlsafe_b64encode(os.urandom(16)).rstrip(b"=").decode()
        # A leading dash would be taken for an option.
        cluster_id = cluster_id.replace("-", "A")
        tool = [
            *(str(java.executable), *_FORMATTER_JVM_OPTIONS, self._log4j2_option, *_class_path(archives)),
            *("kafka.tools.StorageTool", "format", "-t", cluster_id),
            *("-c", str(self._directory / "server.properties"), *self._format_arguments),
        ]
        try:
            done = subprocess.run(
                tool, capture_output=True, text=True, errors="replace", timeout=_FORMAT_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise self._died(f"Formatting Kafka's directory took longer than {_FORMAT_TIMEOUT_S:.0f} s.") from None
        if done.returncode != 0:
            raise self._explain("Kafka's directory could not be formatted.", (done.stderr + done.stdout).splitlines())

    def _command(self, archives: Sequence[Path], ports: Mapping[str, int]) -> Sequence[str]:
        return [
            *(*_JVM_OPTIONS, self._log4j2_option, *_class_path(archives)),
            *("kafka.Kafka", str(self._directory / "server.properties")),
        ]

    @property
    def _log4j2_option(self) -> str:
        return f"-Dlog4j2.configurationFile={self._directory / 'log4j2.properties'}"

    async def _serves(self) -> bool:
        return await _serving_cluster(self._host, self.port) == self._cluster_id


def _class_path(archives: Sequence[Path]) -> tuple[str, str]:
    return "-cp", ":".join(map(str, archives))


def _read_properties(path: Path) -> dict[str, str]:
    lines = (line.split("=", 1) for line in path.read_text().splitlines() if "=" in line and not line.startswith("#"))
    return {name.strip(): value.strip() for name, value in lines}


def _escaped(value: str) -> str:
    """`value` as a Java properties file wants it: ASCII, the rest as UTF-16 escapes."""
    units = struct.iter_unpack(">H", value.encode("utf-16-be", "surrogatepass"))
    return "".join(chr(unit) if 32 <= unit < 127 and unit != 92 else f"\\u{unit:04x}" for (unit,) in units)


async def _serving_cluster(host: str, port: int) -> str | None:
    """The id of the cluster that answers at host:port with at least one broker in service; None without an answer.

    One Metadata request of version 2 for no topics (Kafka protocol, API key 3). An open port alone does not mean
    readiness: until the controller has admitted the broker, topics cannot be created.
    """
    request = struct.pack(">hhih", 3, 2, 1, 7) + b"concord" + struct.pack(">i", 0)
    try:
        async with asyncio.timeout(2):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(struct.pack(">i", len(request)) + request)
                (size,) = struct.unpack(">i", await reader.readexactly(4))
                answer = await reader.readexactly(size)
            finally:
                writer.close()
        return _cluster_id_with_brokers(answer)
    except (OSError, TimeoutError, asyncio.IncompleteReadError, struct.error, UnicodeDecodeError):
        return None


def _cluster_id_with_brokers(answer: bytes) -> str | None:
    """Reads a Metadata response, version 2: correlation id, brokers (id, host, port, rack), cluster id."""

    def string(at: int) -> tuple[str, int]:
        (length,) = struct.unpack_from(">h", answer, at)
        end = at + 2 + max(length, 0)
        return answer[at + 2 : end].decode(), end

    (brokers,) = struct.unpack_from(">i", answer, 4)
    at = 8
    for _ in range(brokers):
        _host, at = string(at + 4)
        _rack, at = string(at + 4)
    cluster_id, _ = string(at)
    return cluster_id if brokers > 0 else None
