"""Theory of operation: what every server of ours that runs from Java archives has in common.

A node owns one directory and one JVM. Its directory holds, whatever the server:

    ports.json          the ports of the last run, taken again while they are free
    console.log         what the JVM itself says, of this run
    .lock               held by the starting process and by the JVM, so that it stays held as long as either lives
    jvm_crash.log       where the JVM leaves its last words, if it ever has any

    start:  directory ── lock ── Java and archives ── ports ── configuration ── preparation ── spawn ── ready
    end:    stop (SIGTERM, then SIGKILL) or kill; the JVM also dies with the process that started it (`processes`)

A server adds its configuration, its command line and the question that tells whether it serves. This module knows
nothing of what a server keeps.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import random
import re
import shutil
import signal
import socket
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

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

LOOPBACK = "127.0.0.1"

# Below Linux's range for outgoing connections, so that nothing takes a remembered port by accident, and above the
# range that Ray gives to its workers.
_PORT_RANGE = range(20_000, 32_000)
_PORT_ATTEMPTS = 3

_READY_TIMEOUT_S = 180.0  # a machine with many other things to do takes ten times as long as an idle one
_PROBE_INTERVAL_S = 0.05
_QUOTED_LINES = 6
_SECRET_VARIABLE = re.compile("PASSWORD|SECRET|TOKEN|CREDENTIAL", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Cause:
    """A line in the log that says why a server ended, and what to tell the user. `{0}` is the pattern's first group.

    `setting` is a parameter of the server's; in the texts, `{setting}` is what the user knows it by.
    """

    pattern: re.Pattern[str]
    error: type[ServerError]
    message: str
    remedy: str
    setting: str = ""


_COMMON_CAUSES: Sequence[Cause] = (
    Cause(
        re.compile("Address already in use|BindException"),
        PortTakenError,
        "{server} could not listen on its port: another process took it.",
        "Set {setting} to a free port, or leave it unset to have one chosen.",
        "port",
    ),
    Cause(
        re.compile("No space left on device|Disk quota exceeded|Insufficient disk space"),
        DirectoryError,
        "{server} could not write its data: the disk is full.",
        "Make room, or choose another directory with {setting}.",
        "directory",
    ),
    Cause(
        re.compile("Permission denied|AccessDeniedException|Read-only file system"),
        DirectoryError,
        "{server} could not write its data: permission denied.",
        "Make the directory writable, or choose another with {setting}.",
        "directory",
    ),
    Cause(
        re.compile(
            # Not the option ExitOnOutOfMemoryError, which servers print among others when they start.
            r"Could not reserve enough space|(?<!On)OutOfMemoryError|insufficient memory"
            r"|Too small (?:initial|maximum) heap"
        ),
        ServerDiedError,
        "{server} ran out of memory.",
        "Free memory, or change its heap with {setting}.",
        "heap_mb",
    ),
)


class LocalNode(ABC):
    """One server of our own, in a directory of its own. Start it from the main thread (see `processes`).

    `directory` is made if absent. `ports` are the wanted ones by purpose, that for clients first; those that are 0 are
    chosen freely and remembered. `min_free_mb` is the room that the disk must have at the start; `lock_wait_s` is how
    long a predecessor whose parent was killed gets to die. `setting_names` says what the user knows `directory`,
    `heap_mb` and the ports by, for messages; what is not named there goes by its own name.
    """

    server: ClassVar[str]
    """The name of the server as people know it."""

    archives: ClassVar[str]
    """Its name in `artifacts.SERVERS`."""

    java_versions: ClassVar[tuple[int, int | None]] = (17, None)
    """The oldest and the newest Java that it runs on."""

    causes: ClassVar[Sequence[Cause]] = ()
    """What this server says when it ends for a reason of its own."""

    stop_grace_s: ClassVar[float] = 10.0
    """How long it gets to stop by itself."""

    def __init__(
        self,
        directory: Path,
        ports: Mapping[str, int],
        heap_mb: int,
        *,
        host: str = LOOPBACK,
        cache_dir: Path | None = None,
        min_free_mb: int = 256,
        lock_wait_s: float = 5.0,
        progress: Progress | None = None,
        environment: Mapping[str, str] | None = None,
        setting_names: Mapping[str, str] | None = None,
    ) -> None:
        self._directory = directory.absolute()
        self._wanted_ports = dict(ports)
        self._heap_mb = heap_mb
        self._host = host
        self._cache_dir = cache_dir
        self._min_free_mb = min_free_mb
        self._lock_wait_s = lock_wait_s
        self._progress = progress
        self._environment = environment
        self._setting_names = dict(setting_names or {})
        self._ports: Mapping[str, int] | None = None
        self._process: ChildProcess | None = None
        self._killed = False
        self._lock_file: int | None = None
        self._log_offset = 0

    @property
    def directory(self) -> Path:
        return self._directory

    @property
    def port(self) -> int:
        """The port for clients, from `start` or `choose_ports` on. The first of the ports."""
        if self._ports is None:
            raise RuntimeError(f"{self.server} has not been started")
        return next(iter(self._ports.values()))

    @property
    def address(self) -> str:
        """Where clients find it, from `start` or `choose_ports` on."""
        return f"{self._host}:{self.port}"

    @property
    def heap_mb(self) -> int:
        return self._heap_mb

    @property
    def pid(self) -> int | None:
        """The process id of the running JVM, None when it does not run."""
        if self._process is None or self._killed or self._process.exit_code is not None:
            return None
        return self._process.pid

    @property
    def log_path(self) -> Path:
        """The server's own log; it outlives restarts."""
        return self._directory / "server.log"

    # What a server adds.

    @abstractmethod
    def _configure(self, ports: Mapping[str, int]) -> None:
        """Write the configuration files for these ports (with `_write`)."""

    @abstractmethod
    def _command(self, archives: Sequence[Path], ports: Mapping[str, int]) -> Sequence[str]:
        """What follows `java`: options, class path, main class and its arguments."""

    def _prepare(self, java: JavaRuntime, archives: Sequence[Path]) -> None:  # noqa: B027 - most have nothing to do
        """Whatever must be done before the server can run in this directory; in a thread, and before every start."""

    @abstractmethod
    async def _serves(self) -> bool:
        """Ask the server whether it serves. True only if it is this one that answers; no answer is False."""

    # Starting, watching, ending.

    def choose_ports(self) -> None:
        """Choose the ports that `start` will take if they are still free then, so that others can be told before.

        Raises PortTakenError.
        """
        self._ports = self._choose_ports(_read_ports(self._directory / "ports.json"))

    async def start(self) -> str:
        """Start the server and wait until it serves; its address. Nothing happens when it runs already.

        The first start downloads the Java archives; a later one continues with the data that are there.
        Raises a ServerError, and then nothing runs and nothing is locked.
        """
        if self.pid is not None:
            return self.address
        await self._end()  # what is left of a run that was killed or ended by itself
        await asyncio.to_thread(self._check_directory)
        await self._take_lock()
        try:
            oldest, newest = self.java_versions
            java = await asyncio.to_thread(find_java, minimum=oldest, maximum=newest, environment=self._environment)
            archives = await asyncio.to_thread(
                class_path, SERVERS[self.archives], cache_dir=self._cache_dir, progress=self._progress
            )
            await self._start_on_free_ports(java, archives)
        except BaseException:
            await self._end()
            raise
        return self.address

    async def wait_ready(self, timeout_s: float = _READY_TIMEOUT_S) -> None:
        """Wait until the server answers; `start` has done so already. Useful after `resume`.

        Raises ServerDiedError, or what the log says more precisely, when it has ended or the time is over.
        """
        assert self._process is not None
        ending = asyncio.ensure_future(self._process.wait())
        asking = asyncio.ensure_future(self._serves())
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    await asyncio.wait([ending, asking], return_when=asyncio.FIRST_COMPLETED)
                    if ending.done():
                        raise self._died(f"{self.server} ended with exit code {ending.result()} while it started.")
                    if asking.result():
                        return
                    await asyncio.wait([ending], timeout=_PROBE_INTERVAL_S)
                    asking = asyncio.ensure_future(self._serves())
        except TimeoutError:
            raise self._died(f"{self.server} did not become ready within {timeout_s:.0f} s.") from None
        finally:
            ending.cancel()
            asking.cancel()

    async def wait(self) -> int:
        """Wait until the server ends, by itself or by `stop` or `kill`; its exit code, negative for a signal."""
        assert self._process is not None
        return await self._process.wait()

    async def stop(self, *, grace_s: float | None = None) -> None:
        """Stop cleanly (SIGTERM), after `grace_s` seconds by SIGKILL. Stopping twice is harmless."""
        if self._process is not None:
            self.resume()  # a paused process would not notice the signal
            await self._process.stop(grace_s=self.stop_grace_s if grace_s is None else grace_s)
        self._release_lock()

    def kill(self) -> None:
        """SIGKILL: the server ends at once, with whatever it had not written. `start` begins again on its data."""
        if self._process is not None:
            self._process.kill()
            self._killed = True

    def pause(self) -> None:
        """SIGSTOP: the server keeps its connections and does nothing, until `resume`."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT: go on where `pause` stopped."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    # Steps of the start, in their order.

    def _check_directory(self) -> None:
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            probe = self._directory / ".writable"
            probe.write_bytes(b"x")
            probe.unlink()
            free_mb = shutil.disk_usage(self._directory).free // (1024 * 1024)
        except OSError as error:
            raise self._not_writable(error) from error
        if free_mb < self._min_free_mb:
            raise DirectoryError(
                f"{self.server}'s directory {self._directory} has {free_mb} MB left and needs {self._min_free_mb} MB.",
                remedy=f"Make room, or choose another directory with {self._named('directory')}.",
                setting=self._named("directory"),
            )

    async def _take_lock(self) -> None:
        """Hold the directory. A node whose parent was just killed gets a moment to die first."""
        try:
            descriptor = os.open(self._directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise self._not_writable(error) from error
        deadline = asyncio.get_running_loop().time() + self._lock_wait_s
        try:
            while not _locked(descriptor):
                if asyncio.get_running_loop().time() >= deadline:
                    raise self._already_running(os.read(descriptor, 32).decode("ascii", "replace").strip())
                await asyncio.sleep(_PROBE_INTERVAL_S)
        except BaseException:
            os.close(descriptor)
            raise
        self._lock_file = descriptor

    async def _start_on_free_ports(self, java: JavaRuntime, archives: Sequence[Path]) -> None:
        for attempt in range(1, _PORT_ATTEMPTS + 1):
            self._ports = self._choose_ports(self._ports or _read_ports(self._directory / "ports.json"))
            self._configure(self._ports)
            await asyncio.to_thread(self._prepare, java, archives)
            self._spawn(java, archives, self._ports)
            try:
                await self.wait_ready()
            except PortTakenError:
                # Between the choice of a free port and the bind, somebody else was faster.
                if attempt == _PORT_ATTEMPTS or all(self._wanted_ports.values()):
                    raise
                self.kill()
                await self.wait()
                (self._directory / "ports.json").unlink(missing_ok=True)
                self._ports = None
                continue
            self._write("ports.json", json.dumps(self._ports))
            return

    def _choose_ports(self, remembered: Mapping[str, int]) -> Mapping[str, int]:
        """The wanted ports; where none is wanted, the one of the last run if it is free, else any free one."""
        for purpose, port in self._wanted_ports.items():
            if port and not _is_free(self._host, port):
                name = self._named(purpose)
                raise PortTakenError(
                    f"{self.server} cannot listen on port {port} ({name}): another process does.",
                    remedy=f"Stop that process, set {name} to a free port, or leave it unset to have one chosen.",
                    setting=name,
                )
        chosen = dict(self._wanted_ports)
        for purpose in chosen:
            others = {port for name, port in chosen.items() if name != purpose}
            chosen[purpose] = chosen[purpose] or self._free_port(remembered.get(purpose, 0), avoid=others)
        return chosen

    def _free_port(self, preferred: int, *, avoid: set[int]) -> int:
        for port in (preferred, *random.sample(_PORT_RANGE, k=200)):
            if port and port not in avoid and _is_free(self._host, port):
                return port
        raise PortTakenError(
            f"No free port was found for {self.server} between {_PORT_RANGE.start} and {_PORT_RANGE.stop}.",
            remedy=f"Set {self._named('port')} to a free port.",
            setting=self._named("port"),
        )

    def _spawn(self, java: JavaRuntime, archives: Sequence[Path], ports: Mapping[str, int]) -> None:
        assert self._lock_file is not None
        (self._directory / "console.log").unlink(missing_ok=True)
        self._log_offset = self.log_path.stat().st_size if self.log_path.exists() else 0
        self._killed = False
        self._process = spawn(
            [
                str(java.executable),
                *(f"-Xms{self._heap_mb}m", f"-Xmx{self._heap_mb}m"),  # fixed: what it may take, it has from the start
                f"-XX:ErrorFile={self._directory / 'jvm_crash.log'}",
                *self._command(archives, ports),
            ],
            # Another program's class path would be searched too, and a server has no use for its starter's secrets.
            env={
                name: value
                for name, value in os.environ.items()
                if name != "CLASSPATH" and not _SECRET_VARIABLE.search(name)
            },
            log_path=self._directory / "console.log",
            cwd=self._directory,
            pass_fds=[self._lock_file],
        )
        os.ftruncate(self._lock_file, 0)
        os.pwrite(self._lock_file, f"{self._process.pid}\n".encode(), 0)

    def _write(self, name: str, text: str) -> None:
        try:
            (self._directory / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise self._not_writable(error) from error

    # Ends.

    async def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            await self._process.wait()
        self._release_lock()

    def _release_lock(self) -> None:
        if self._lock_file is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._lock_file, 0)
            os.close(self._lock_file)
            self._lock_file = None

    def _not_writable(self, error: OSError) -> DirectoryError:
        return DirectoryError(
            f"{self.server}'s directory {self._directory} cannot be written: {error.strerror or error}.",
            remedy=f"Make room or permission there, or choose another directory with {self._named('directory')}.",
            setting=self._named("directory"),
        )

    def _already_running(self, holder: str) -> AlreadyRunningError:
        return AlreadyRunningError(
            f"{self.server} already runs on the data in {self._directory}"
            + (f" (process {holder})." if holder else " (another process is starting it)."),
            remedy="Stop it first"
            + (f", or end the process with `kill {holder}`" if holder else "")
            + f"; or choose another directory with {self._named('directory')}.",
            setting=self._named("directory"),
        )

    def _named(self, parameter: str) -> str:
        """What the user knows a parameter by."""
        return self._setting_names.get(parameter, parameter)

    def _died(self, message: str) -> ServerError:
        """What this run left in its logs, as an error."""
        lines = []
        logs = {self.log_path: self._log_offset, self._directory / "console.log": 0}  # they may be the same file
        for path, offset in logs.items():
            with contextlib.suppress(OSError), path.open("rb") as file:
                if path.stat().st_size >= offset:  # else it was rotated, and all of it is new
                    file.seek(offset)
                lines += file.read().decode("utf-8", "replace").splitlines()
        return self._explain(message, lines)

    def _explain(self, message: str, lines: Sequence[str]) -> ServerError:
        """The error for a server that failed with these log lines: a known cause, else the telling lines themselves."""
        text = "\n".join(lines)
        for cause in (*self.causes, *_COMMON_CAUSES):
            if found := cause.pattern.search(text):
                setting = self._named(cause.setting)
                said = cause.message.format(*found.groups(), server=self.server)
                return cause.error(said, remedy=cause.remedy.format(setting=setting), setting=setting)
        telling = [line for line in lines if re.search("ERROR|FATAL|Exception|Error:", line)] or list(lines)
        quoted = "".join(f"\n    {line[:300]}" for line in telling[-_QUOTED_LINES:])
        return ServerDiedError(
            message + (f" It said last:{quoted}" if quoted else ""), remedy=f"\nThe whole log is {self.log_path}."
        )


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as attempt:
        attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the JVM does: TIME_WAIT is no obstacle
        try:
            attempt.bind((host, port))
        except OSError:
            return False
        return True


def _read_ports(path: Path) -> Mapping[str, int]:
    """The remembered ports by purpose; an unreadable file has nothing to say."""
    try:
        return {str(purpose): int(port) for purpose, port in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
