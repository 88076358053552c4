"""A system as its operator has it: `concord up` in a process of its own, everything else seen and done from outside.

Its processes are found in /proc by the mark that every process of a run carries (CONCORD_RUN), and told apart by
their command lines; which process is which actor, the table of incarnations says. Linux only.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scripts.proof.stored import stored

MARK = "CONCORD_RUN"
KEPT_VARIABLES = ("CONCORD_CACHE_DIR",)
READY_WITHIN_S = 240.0
GONE_WITHIN_S = 30.0

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


ACTOR_TITLE = "ray::ConcordActor"
"""What the process of an actor calls itself, while it works with a method's name behind."""

VIEWS = "views-0"
"""The one actor that takes part in no transaction, and so has no incarnation."""


SERVERS = ("supervisor", "kafka", "cassandra", "ray")
"""Roles that a command line tells, beside those of workers."""


class NotAsAskedError(Exception):
    """The system did not do what it was asked to; the text says what it said last."""


@dataclass(frozen=True)
class Process:
    """One process of a run. `role` is supervisor, kafka, cassandra, ray, or the name of a worker or an actor."""

    pid: int
    role: str
    rss_bytes: int
    cpu_s: float


@dataclass(frozen=True)
class Finished:
    """A command of `concord` that has ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.stdout.splitlines()]


def concord_program() -> str:
    """The installed command line, beside this Python."""
    return str(Path(sys.executable).with_name("concord"))


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without settings of ours, so that nobody's shell decides a proof."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith("CONCORD_") or name in KEPT_VARIABLES
    }
    return {**kept, **(extra or {})}


class RunningSystem:
    """The system of one directory. Free ports everywhere, so that several may run side by side."""

    def __init__(
        self, directory: Path, *, profile: str = "local", environment: Mapping[str, str] | None = None
    ) -> None:
        self.directory = directory
        self.profile = profile
        self.environment = clean_environment(
            {
                "CONCORD_PROFILE": profile,
                "CONCORD_HTTP_PORT": "0",
                "CONCORD_DASHBOARD_PORT": "0",
                **(environment or {}),
            }
        )
        self.ready: dict[str, Any] = {}
        self.ready_after_s = 0.0
        self._process: subprocess.Popen[bytes] | None = None

    # --- life ---------------------------------------------------------------------------------------------------

    def start(self, *, timeout_s: float = READY_WITHIN_S) -> None:
        """`concord up`, until it says that it is ready. Raises NotAsAskedError with what it said instead."""
        self.directory.mkdir(parents=True, exist_ok=True)
        started_s = time.monotonic()
        with self.log_path.open("ab") as log, self.stdout_path.open("wb") as stdout:
            self._process = subprocess.Popen(
                [concord_program(), "up", "--data", str(self.directory), "--output", "json"],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=log,
                start_new_session=True,
            )
        while not (line := self.stdout_path.read_text()).endswith("\n"):
            code = self._process.poll()
            if code is not None or time.monotonic() - started_s > timeout_s:
                self.kill()
                raise NotAsAskedError(f"concord up did not become ready (exit code {code}): {self.last_words()}")
            time.sleep(0.05)
        self.ready = json.loads(line)
        self.ready_after_s = time.monotonic() - started_s

    def stop(self, *, timeout_s: float = 90, number: int = signal.SIGINT) -> int:
        """Ctrl-C; the exit code."""
        assert self._process is not None
        self._process.send_signal(number)
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise NotAsAskedError(f"concord up did not stop within {timeout_s:.0f} s: {self.last_words()}") from None

    def kill(self, *, rng: random.Random | None = None) -> None:
        """SIGKILL every process of the run, Kafka and supervisor included, in an order that `rng` decides."""
        pids = [process.pid for process in self.processes(named=False)]
        (rng or random.Random(0)).shuffle(pids)
        for pid in pids:
            _kill(pid)
        self.reap()
        self.wait_until_gone()

    def kill_supervisor(self) -> None:
        """SIGKILL of `concord up` alone."""
        assert self._process is not None
        _kill(self._process.pid)
        self.reap()

    def reap(self) -> None:
        if self._process is not None:
            self._process.wait(30)

    def wait_until_gone(self, *, within_s: float = GONE_WITHIN_S) -> None:
        """Until no process of the run is left. Raises NotAsAskedError naming those that are."""
        deadline_s = time.monotonic() + within_s
        while left := self.processes(named=False):
            if time.monotonic() > deadline_s:
                raise NotAsAskedError(f"processes were left behind: {left}")
            time.sleep(0.1)

    @property
    def log_path(self) -> Path:
        return self.directory.with_name(f"{self.directory.name}.log")

    @property
    def stdout_path(self) -> Path:
        """What `concord up` printed: its ready line, and nothing else ever."""
        return self.directory.with_name(f"{self.directory.name}.stdout")

    def last_words(self, *, characters: int = 4000) -> str:
        return self.log_path.read_text(errors="replace")[-characters:] if self.log_path.exists() else ""

    # --- what it says --------------------------------------------------------------------------------------------

    @property
    def bootstrap_servers(self) -> str:
        return str(self.runtime["bootstrap_servers"])

    @property
    def runtime(self) -> dict[str, Any]:
        """DIR/runtime.json as it is now: Kafka may have moved to another port."""
        found: dict[str, Any] = json.loads((self.directory / "runtime.json").read_text())
        return found

    def readiness(self) -> dict[str, Any]:
        """What /readyz says."""
        return _get_json(f"{self.ready['http']}/readyz")

    def wait_until_ready(self, *, timeout_s: float = 60) -> None:
        """Until every worker and every actor answers (again). Raises NotAsAskedError with those that do not."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(OSError):
                if self.readiness()["ready"]:
                    return
            if time.monotonic() > deadline_s:
                raise NotAsAskedError(f"not ready within {timeout_s:.0f} s: {self.readiness()}")
            time.sleep(0.1)

    def concord(self, *arguments: str, stdin: bytes = b"", timeout_s: float = 120) -> Finished:
        """Run a command of the command line on this system."""
        done = subprocess.run(
            [concord_program(), *arguments, "--data", str(self.directory), "--output", "json"],
            env=self.environment,
            input=stdin,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )
        return Finished(done.returncode, done.stdout.decode(), done.stderr.decode("utf-8", "replace"))

    def start_concord(self, *arguments: str) -> subprocess.Popen[bytes]:
        """The same, without waiting for its end: stdin, stdout and stderr are pipes."""
        return subprocess.Popen(
            [concord_program(), *arguments, "--data", str(self.directory), "--output", "json"],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    # --- its processes -------------------------------------------------------------------------------------------

    def processes(self, *, named: bool = True) -> list[Process]:
        """Every living process of this run. `named`: actors by their names, for which Ray is asked."""
        assert self._process is not None
        run = f"{MARK}={self._run()}".encode()
        supervisor = self._process.pid if self._process.poll() is None else None
        found = []
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
            role = "supervisor" if pid == supervisor else _role(pid) if run in _environment(pid) else None
            process = None if role is None else _process(pid, role)
            if process is not None:
                found.append(process)
        return self._named(found) if named else found

    def pid_of(self, role: str, *, timeout_s: float = 30) -> int:
        """The process of a role. Raises NotAsAskedError where there is none even after a while."""
        deadline_s = time.monotonic() + timeout_s
        # Which process is which actor, only the storage knows; which one is the storage must be found without it.
        named = role not in SERVERS and not role.startswith("worker-")
        while True:
            for process in self.processes(named=named):
                if process.role == role:
                    return process.pid
            if time.monotonic() > deadline_s:
                raise NotAsAskedError(
                    f"no process is {role}; there are {sorted(p.role for p in self.processes(named=named))}"
                )
            time.sleep(0.1)

    def _run(self) -> str:
        # Before there is a runtime.json of this start, the children of the supervisor say it.
        assert self._process is not None
        for pid in _children(self._process.pid):
            for variable in _environment(pid):
                if variable.startswith(f"{MARK}=".encode()):
                    return variable.partition(b"=")[2].decode()
        with contextlib.suppress(OSError, ValueError, KeyError):
            return str(self.runtime["run"])
        return "\0"

    def _named(self, processes: Sequence[Process]) -> list[Process]:
        names = self._actor_names()
        return [
            replace(process, role=names.get((process.pid, _started(process.pid)), VIEWS))
            if process.role == "actor"
            else process
            for process in processes
        ]

    def _actor_names(self) -> dict[tuple[int, int], str]:
        """Actors by (pid, when it started): a pid alone may be another process by now."""
        with stored(self.directory) as storage:
            rows = storage.rows("coordinator.incarnations")
        return {(row["pid"], row["process_started"]): row["actor"] for row in rows}


@contextmanager
def running(
    directory: Path, *, profile: str = "local", environment: Mapping[str, str] | None = None
) -> Iterator[RunningSystem]:
    """A system that is stopped with Ctrl-C at the end, or killed if an error ends the block."""
    system = RunningSystem(directory, profile=profile, environment=environment)
    system.start()
    try:
        yield system
    except BaseException:
        system.kill()
        raise
    system.stop()
    system.wait_until_gone()


def _get_json(url: str) -> dict[str, Any]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            found: dict[str, Any] = json.load(answer)
    except urllib.error.HTTPError as error:  # 503 says what is missing in the same form
        found = json.load(error)
    return found


def _role(pid: int) -> str:
    """What a process is, from its command line."""
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").rstrip("\0").split("\0")
    except OSError:
        return "gone"
    if "scripts.worker" in arguments:
        return arguments[arguments.index("--name") + 1]
    if arguments[0].startswith(ACTOR_TITLE):
        return "actor"
    if Path(arguments[0]).name == "java":
        return "cassandra" if arguments[-1].endswith("CassandraDaemon") else "kafka"
    return "ray"


def _process(pid: int, role: str) -> Process | None:
    fields = _stat(pid)
    if not fields or fields[0] in "ZX":
        return None
    return Process(pid, role, int(fields[21]) * _PAGE_BYTES, (int(fields[11]) + int(fields[12])) / _TICKS)


def _started(pid: int) -> int:
    """When a process started, in clock ticks since boot."""
    fields = _stat(pid)
    return int(fields[19]) if fields else 0


def _stat(pid: int) -> list[str]:
    """What /proc/PID/stat has from the third field (the state) on; nothing of a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def _children(pid: int) -> list[int]:
    try:
        return [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except OSError:
        return []


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
