"""Apache Kafka on this machine: one KRaft node, started from its Java archives, its data in one directory.

What the directory holds:

    data/               the log, formatted once; `meta.properties` in it carries the cluster id
    ports.json          the ports of the last run, taken again while they are free
    server.properties   written anew at every start, from the tables below
    log4j2.properties   likewise
    server.log          Kafka's own log (rotated, 3 files of 8 MB); console.log is what the JVM itself says
    .lock               held by the starting process and by Kafka itself, so that it stays held as long as either lives

A single node shows behaviour, not availability: a message is acknowledged when the operating system has it, so it
outlives any killed process but not the power supply.

This module never looks at topics or messages; readiness is asked for with one Metadata request.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import fcntl
import json
import os
import random
import re
import shutil
import socket
import struct
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from infra.servers.artifacts import SERVERS, Progress, class_path
from infra.servers.errors import (
    AlreadyRunningError,
    DirectoryError,
    PortTakenError,
    ServerDiedError,
    ServerError,
)
from infra.servers.java import JavaRuntime, find_java
from infra.servers.processes import ChildProcess, spawn

HOST = "127.0.0.1"
PORT_SETTING = "CONCORD_KAFKA__PORT"
HEAP_SETTING = "CONCORD_KAFKA__HEAP_MB"
DIRECTORY_SETTING = "--data"

MESSAGE_MAX_BYTES = 8 * 1024 * 1024

# Below Linux's range for outgoing connections, so that nothing takes a remembered port by accident, and above the
# range that Ray gives to its workers.
_PORT_RANGE = range(20_000, 32_000)
_PORT_ATTEMPTS = 3

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

_READY_TIMEOUT_S = 90.0
_PROBE_INTERVAL_S = 0.05
_STOP_GRACE_S = 20.0
_FORMAT_TIMEOUT_S = 60.0
_QUOTED_LINES = 6


@dataclass(frozen=True, slots=True)
class _Cause:
    """A line in the log that says why Kafka ended, and what to tell the user."""

    pattern: re.Pattern[str]
    error: type[ServerError]
    message: str
    remedy: str
    setting: str = ""


_CAUSES: Sequence[_Cause] = (
    _Cause(
        re.compile("Address already in use|BindException"),
        PortTakenError,
        "Kafka could not listen on its port: another process took it.",
        f"Set {PORT_SETTING} to a free port, or leave it unset to have one chosen.",
        PORT_SETTING,
    ),
    _Cause(
        re.compile("No space left on device|Disk quota exceeded"),
        DirectoryError,
        "Kafka could not write its data: the disk is full.",
        f"Make room, or choose another directory with {DIRECTORY_SETTING}.",
        DIRECTORY_SETTING,
    ),
    _Cause(
        re.compile("Permission denied|AccessDeniedException|Read-only file system"),
        DirectoryError,
        "Kafka could not write its data: permission denied.",
        f"Make the directory writable, or choose another with {DIRECTORY_SETTING}.",
        DIRECTORY_SETTING,
    ),
    _Cause(
        re.compile("Could not reserve enough space|OutOfMemoryError|insufficient memory"),
        ServerDiedError,
        "Kafka ran out of memory.",
        f"Free memory, or change its heap with {HEAP_SETTING}.",
        HEAP_SETTING,
    ),
)


class LocalKafka:
    """One Kafka node of our own. Start it from the main thread (see `processes`).

    `directory` is Kafka's own folder and is made if absent. Ports that are None are chosen freely and remembered.
    `min_free_mb` is the room that the disk must have at the start; `lock_wait_s` is how long a predecessor whose
    parent was killed gets to die.
    """

    def __init__(
        self,
        directory: Path,
        port: int | None = None,
        controller_port: int | None = None,
        heap_mb: int = 512,
        *,
        message_max_bytes: int = MESSAGE_MAX_BYTES,
        cache_dir: Path | None = None,
        min_free_mb: int = 256,
        lock_wait_s: float = 5.0,
        progress: Progress | None = None,
    ) -> None:
        self._directory = directory.absolute()
        self._wanted = _Ports(port or 0, controller_port or 0)
        self._heap_mb = heap_mb
        self._message_max_bytes = message_max_bytes
        self._cache_dir = cache_dir
        self._min_free_mb = min_free_mb
        self._lock_wait_s = lock_wait_s
        self._progress = progress
        self._ports: _Ports | None = None
        self._process: ChildProcess | None = None
        self._lock_file: int | None = None
        self._cluster_id = ""
        self._log_offset = 0

    @property
    def bootstrap_servers(self) -> str:
        """`host:port` for clients, from `start` on."""
        if self._ports is None:
            raise RuntimeError("Kafka has not been started")
        return f"{HOST}:{self._ports.broker}"

    @property
    def pid(self) -> int | None:
        """The process id of the running JVM, None when it does not run."""
        return self._process.pid if self._process is not None and self._process.exit_code is None else None

    @property
    def cluster_id(self) -> str:
        """The identity of the log in this directory; another id means other data."""
        return self._cluster_id

    @property
    def log_path(self) -> Path:
        return self._directory / "server.log"

    async def start(self) -> str:
        """Start Kafka and wait until it serves; its bootstrap servers (`127.0.0.1:PORT`).

        The first start downloads the Java archives and formats the directory; a later one continues with what is
        there. Raises a ServerError, and then nothing runs and nothing is locked.
        """
        if self.pid is not None:
            return self.bootstrap_servers
        self._release_lock()  # of a node that ended by itself
        await asyncio.to_thread(self._check_directory)
        await self._take_lock()
        try:
            java = await asyncio.to_thread(find_java)
            archives = await asyncio.to_thread(
                class_path, SERVERS["kafka"], cache_dir=self._cache_dir, progress=self._progress
            )
            await self._start_on_free_ports(java, ":".join(map(str, archives)))
        except BaseException:
            await self._kill()
            self._release_lock()
            raise
        return self.bootstrap_servers

    async def wait_ready(self, timeout_s: float = _READY_TIMEOUT_S) -> None:
        """Wait until this node answers for its cluster with a broker; `start` has done so already.

        Useful after a pause of the process. Raises ServerDiedError when it has ended or the time is over.
        """
        assert self._ports is not None
        assert self._process is not None
        ending = asyncio.ensure_future(self._process.wait())
        try:
            async with asyncio.timeout(timeout_s):
                while await _serving_cluster(HOST, self._ports.broker) != self._cluster_id:
                    if ending.done():
                        raise self._died(f"Kafka ended with exit code {ending.result()} while it started.")
                    await asyncio.wait([ending], timeout=_PROBE_INTERVAL_S)
        except TimeoutError:
            raise self._died(f"Kafka did not become ready within {timeout_s:.0f} s.") from None
        finally:
            ending.cancel()

    async def wait(self) -> int:
        """Wait until Kafka ends, by itself or by `stop`; its exit code. For whoever watches over it."""
        assert self._process is not None
        return await self._process.wait()

    async def stop(self, *, grace_s: float = _STOP_GRACE_S) -> None:
        """Stop cleanly (SIGTERM), after `grace_s` seconds by SIGKILL. Stopping twice is harmless."""
        if self._process is not None:
            await self._process.stop(grace_s=grace_s)
        self._release_lock()

    # Steps of the start, in their order.

    def _check_directory(self) -> None:
        if "," in str(self._directory):
            raise DirectoryError(
                f"Kafka cannot keep data in {self._directory}: it takes the comma for the end of the name.",
                remedy=f"Choose another directory with {DIRECTORY_SETTING}.",
                setting=DIRECTORY_SETTING,
            )
        try:
            (self._directory / "data").mkdir(parents=True, exist_ok=True)
            probe = self._directory / ".writable"
            probe.write_bytes(b"x")
            probe.unlink()
            free_mb = shutil.disk_usage(self._directory).free // (1024 * 1024)
        except OSError as error:
            raise self._not_writable(error) from error
        if free_mb < self._min_free_mb:
            raise DirectoryError(
                f"Kafka's directory {self._directory} has {free_mb} MB left and needs {self._min_free_mb} MB.",
                remedy=f"Make room, or choose another directory with {DIRECTORY_SETTING}.",
                setting=DIRECTORY_SETTING,
            )

    async def _take_lock(self) -> None:
        """Hold the directory. A node whose parent was just killed gets a moment to die first."""
        try:
            descriptor = os.open(self._directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise self._not_writable(error) from error
        deadline = asyncio.get_running_loop().time() + self._lock_wait_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if asyncio.get_running_loop().time() < deadline:
                    await asyncio.sleep(_PROBE_INTERVAL_S)
                    continue
                holder = os.read(descriptor, 32).decode("ascii", "replace").strip()
                os.close(descriptor)
                raise AlreadyRunningError(
                    f"Kafka already runs on the data in {self._directory}"
                    + (f" (process {holder})." if holder else " (another process is starting it)."),
                    remedy="Stop that system first"
                    + (f", or end the process with `kill {holder}`" if holder else "")
                    + f"; or choose another directory with {DIRECTORY_SETTING}.",
                    setting=DIRECTORY_SETTING,
                ) from None
            break
        self._lock_file = descriptor

    async def _start_on_free_ports(self, java: JavaRuntime, archives: str) -> None:
        for attempt in range(1, _PORT_ATTEMPTS + 1):
            self._ports = _choose_ports(self._wanted, _read_ports(self._directory / "ports.json"))
            self._write_configuration(self._ports)
            await asyncio.to_thread(self._format_once, java, archives)
            self._spawn(java, archives)
            try:
                await self.wait_ready()
            except PortTakenError:
                # Between the choice of a free port and the bind, somebody else was faster.
                if attempt == _PORT_ATTEMPTS or self._wanted.both_fixed:
                    raise
                await self._kill()
                (self._directory / "ports.json").unlink(missing_ok=True)
                continue
            ports = {"broker": self._ports.broker, "controller": self._ports.controller}
            self._write("ports.json", json.dumps(ports))
            return

    def _write_configuration(self, ports: _Ports) -> None:
        properties = {
            **SERVER_PROPERTIES,
            "controller.quorum.voters": f"1@{HOST}:{ports.controller}",
            "listeners": f"BROKER://{HOST}:{ports.broker},CONTROLLER://{HOST}:{ports.controller}",
            "advertised.listeners": f"BROKER://{HOST}:{ports.broker}",
            "log.dirs": str(self._directory / "data"),
            "message.max.bytes": str(self._message_max_bytes),
            "replica.fetch.max.bytes": str(self._message_max_bytes),
        }
        lines = [f"{name}={_escaped(value)}\n" for name, value in properties.items()]
        self._write("server.properties", "".join(lines))
        self._write("log4j2.properties", _LOG4J2_PROPERTIES.format(log=_escaped(str(self.log_path))))

    def _format_once(self, java: JavaRuntime, archives: str) -> None:
        """Give the data directory its identity. `meta.properties` is written last, so its presence says it is whole.

        Kafka's own tool does it: beside the id it writes the first metadata records, whose content is Kafka's affair.
        """
        meta = self._directory / "data" / "meta.properties"
        if not meta.exists():
            cluster_id = base64.urlsafe_b64encode(os.urandom(16)).rstrip(b"=").decode()
            # A leading dash would be taken for an option.
            cluster_id = cluster_id.replace("-", "A")
            tool = [
                *(str(java.executable), *_FORMATTER_JVM_OPTIONS, self._log4j2_option, "-cp", archives),
                *("kafka.tools.StorageTool", "format", "-t", cluster_id),
                *("-c", str(self._directory / "server.properties")),
            ]
            try:
                done = subprocess.run(
                    tool, capture_output=True, text=True, errors="replace", timeout=_FORMAT_TIMEOUT_S, check=False
                )
            except subprocess.TimeoutExpired:
                raise self._died(f"Formatting Kafka's directory took longer than {_FORMAT_TIMEOUT_S:.0f} s.") from None
            if done.returncode != 0:
                raise _explain("Kafka's directory could not be formatted.", (done.stderr + done.stdout).splitlines())
        self._cluster_id = _read_properties(meta)["cluster.id"]

    def _spawn(self, java: JavaRuntime, archives: str) -> None:
        assert self._lock_file is not None
        self._log_offset = self.log_path.stat().st_size if self.log_path.exists() else 0
        (self._directory / "console.log").unlink(missing_ok=True)
        self._process = spawn(
            [
                *(str(java.executable), f"-Xmx{self._heap_mb}m", *_JVM_OPTIONS, self._log4j2_option),
                f"-XX:ErrorFile={self._directory / 'jvm_crash.log'}",
                *("-cp", archives, "kafka.Kafka", str(self._directory / "server.properties")),
            ],
            env={name: value for name, value in os.environ.items() if name != "CLASSPATH"},
            log_path=self._directory / "console.log",
            pass_fds=[self._lock_file],
        )
        os.ftruncate(self._lock_file, 0)
        os.pwrite(self._lock_file, f"{self._process.pid}\n".encode(), 0)

    @property
    def _log4j2_option(self) -> str:
        return f"-Dlog4j2.configurationFile={self._directory / 'log4j2.properties'}"

    def _write(self, name: str, text: str) -> None:
        try:
            (self._directory / name).write_text(text)
        except OSError as error:
            raise self._not_writable(error) from error

    def _not_writable(self, error: OSError) -> DirectoryError:
        return DirectoryError(
            f"Kafka's directory {self._directory} cannot be written: {error.strerror or error}.",
            remedy=f"Make room or permission there, or choose another with {DIRECTORY_SETTING}.",
            setting=DIRECTORY_SETTING,
        )

    # Ends.

    async def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            await self._process.wait()

    def _release_lock(self) -> None:
        if self._lock_file is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._lock_file, 0)
            os.close(self._lock_file)
            self._lock_file = None

    def _died(self, message: str) -> ServerError:
        """What this run left in its logs, as an error."""
        lines = []
        for path, offset in ((self.log_path, self._log_offset), (self._directory / "console.log", 0)):
            with contextlib.suppress(OSError), path.open("rb") as file:
                if path.stat().st_size >= offset:  # else it was rotated, and all of it is new
                    file.seek(offset)
                lines += file.read().decode("utf-8", "replace").splitlines()
        return _explain(message, lines, log_path=self.log_path)


@dataclass(frozen=True, slots=True)
class _Ports:
    """0 stands for a port to be chosen."""

    broker: int
    controller: int

    @property
    def both_fixed(self) -> bool:
        return bool(self.broker and self.controller)


def _choose_ports(wanted: _Ports, remembered: _Ports) -> _Ports:
    """The wanted ports; where none is wanted, the one of the last run if it is free, else any free one."""
    if wanted.broker and not _is_free(wanted.broker):
        raise PortTakenError(
            f"Kafka cannot listen on port {wanted.broker}: another process does.",
            remedy=f"Stop that process, set {PORT_SETTING} to a free port, or leave it unset to have one chosen.",
            setting=PORT_SETTING,
        )
    if wanted.controller and not _is_free(wanted.controller):
        raise PortTakenError(
            f"Kafka's controller cannot listen on port {wanted.controller}: another process does.",
            remedy="Stop that process, or leave the controller's port unset to have one chosen.",
            setting="controller_port",
        )
    broker = wanted.broker or _free_port(remembered.broker, avoid=wanted.controller)
    controller = wanted.controller or _free_port(remembered.controller, avoid=broker)
    return _Ports(broker, controller)


def _free_port(preferred: int, *, avoid: int) -> int:
    if preferred and preferred != avoid and _is_free(preferred):
        return preferred
    for port in random.sample(_PORT_RANGE, k=200):
        if port != avoid and _is_free(port):
            return port
    raise PortTakenError(
        f"No free port was found between {_PORT_RANGE.start} and {_PORT_RANGE.stop}.",
        remedy=f"Set {PORT_SETTING} to a free port.",
        setting=PORT_SETTING,
    )


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as attempt:
        attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the JVM does: TIME_WAIT is no obstacle
        try:
            attempt.bind((HOST, port))
        except OSError:
            return False
        return True


def _read_ports(path: Path) -> _Ports:
    """The remembered ports; an unreadable file has nothing to say."""
    try:
        ports = json.loads(path.read_text())
        return _Ports(int(ports["broker"]), int(ports["controller"]))
    except (OSError, ValueError, KeyError, TypeError):
        return _Ports(0, 0)


def _read_properties(path: Path) -> dict[str, str]:
    lines = (line.split("=", 1) for line in path.read_text().splitlines() if "=" in line and not line.startswith("#"))
    return {name.strip(): value.strip() for name, value in lines}


def _escaped(value: str) -> str:
    """`value` as a Java properties file wants it: ASCII, the rest as UTF-16 escapes."""
    units = struct.iter_unpack(">H", value.encode("utf-16-be", "surrogatepass"))
    return "".join(chr(unit) if 32 <= unit < 127 and unit != 92 else f"\\u{unit:04x}" for (unit,) in units)


def _explain(message: str, lines: Sequence[str], *, log_path: Path | None = None) -> ServerError:
    """The error for a server that failed with these log lines: a known cause, else the telling lines themselves."""
    text = "\n".join(lines)
    for cause in _CAUSES:
        if cause.pattern.search(text):
            return cause.error(cause.message, remedy=cause.remedy, setting=cause.setting)
    telling = [line for line in lines if re.search("ERROR|FATAL|Exception|Error:", line)] or list(lines)
    quoted = "".join(f"\n    {line[:300]}" for line in telling[-_QUOTED_LINES:])
    remedy = f"\nThe whole log is {log_path}." if log_path is not None else ""
    return ServerDiedError(message + (f" It said last:{quoted}" if quoted else ""), remedy=remedy)


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
