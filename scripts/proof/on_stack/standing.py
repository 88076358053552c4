"""Servers, the proxies in front of them, and the system behind these, as one thing that can be hurt and looked at.

    concord stack up --foreground ─┬─ Kafka ◄───── proxy ◄──┐
                                   └─ Cassandra ◄─ proxy ◄──┴─ concord up --profile cluster, and a worker apart
                                        ▲
    the client that publishes, the witness and the judge talk to the servers themselves

The worker apart is one whose clock can be set; it has a process of its own and no supervisor, so it is started again
here. The proxies live on the event loop of whoever enters `standing`.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from scripts.proof.disks.clocks import WrongClock
from scripts.proof.running import NotAsAskedError, RunningSystem, clean_environment, concord_program
from scripts.proof.tcp_proxy import KafkaProxy, TcpProxy

SERVERS_READY_WITHIN_S = 180.0
STOPPED_WITHIN_S = 90.0
WORKERS = 2

SETTINGS: Mapping[str, str] = {
    "CONCORD_WORKERS": str(WORKERS),
    "CONCORD_RECOVERY__SWEEP_INTERVAL_MS": "1000",
}
"""What differs from the defaults: two workers, and sweepers that look more often, for the 20 s to be tight."""


class Servers:
    """Kafka and Cassandra of one directory, kept by `concord stack up`. They end with it, and it with `stop`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self.addresses: dict[str, tuple[str, int]] = {}

    @property
    def log_path(self) -> Path:
        return self._directory.with_name(f"{self._directory.name}.log")

    def start(self) -> None:
        """Raises NotAsAskedError with what it said instead of serving."""
        self._directory.mkdir(parents=True)
        told = self._directory.with_name(f"{self._directory.name}.stdout")
        with self.log_path.open("ab") as log, told.open("wb") as stdout:
            self._process = subprocess.Popen(
                [
                    *(concord_program(), "stack", "up", "--foreground"),
                    *("--data", str(self._directory), "--output", "json"),
                ],
                env=clean_environment(),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=log,
                start_new_session=True,
            )
        until_s = time.monotonic() + SERVERS_READY_WITHIN_S
        while not (line := told.read_text()).endswith("\n"):
            if self._process.poll() is not None or time.monotonic() > until_s:
                self.kill()
                said = self.log_path.read_text(errors="replace")[-4000:]
                raise NotAsAskedError(f"the servers did not become ready: {said}")
            time.sleep(0.05)
        ready = json.loads(line)
        for name in ("kafka", "cassandra"):
            host, _, port = str(ready[name]).rpartition(":")
            self.addresses[name] = (host, int(port))

    def state_of(self, name: str) -> tuple[str, int | None]:
        """Its state and its process."""
        found = json.loads((self._directory / "run" / "stack.json").read_text())["servers"][name]
        return str(found["state"]), found["pid"]

    def stop(self) -> None:
        if self._process is None:
            return
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(STOPPED_WITHIN_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise NotAsAskedError("concord stack did not stop") from None

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


class WorkerApart:
    """`concord worker` on a running system, with a clock that can be set. Started again when it has ended."""

    def __init__(self, system: RunningSystem, clock: WrongClock, log: Path) -> None:
        self._system = system
        self._clock = clock
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self.starts = 0

    def keep(self) -> None:
        """Have it run: start it if it does not."""
        if self._process is not None and self._process.poll() is None:
            return
        self.starts += 1
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [concord_program(), "worker", "--name", "worker-apart", "--data", str(self._system.directory)],
                env={**self._system.environment, **self._clock.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def set_clock(self, wrong_by_s: int) -> None:
        self._clock.set(wrong_by_s)

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@dataclass(frozen=True)
class Standing:
    """All of it, while it runs."""

    servers: Servers
    proxies: Mapping[str, TcpProxy]
    system: RunningSystem
    apart: WorkerApart
    failpoints: Path

    @property
    def bootstrap_servers(self) -> str:
        """Kafka itself."""
        host, port = self.servers.addresses["kafka"]
        return f"{host}:{port}"

    @property
    def storage_url(self) -> str:
        """Cassandra itself."""
        host, port = self.servers.addresses["cassandra"]
        return f"cassandra://{host}:{port}/"


@asynccontextmanager
async def standing(work: Path, *, say: Callable[[str], None]) -> AsyncIterator[Standing]:
    """Start all of it; at the end the system stops with Ctrl-C and leaves nothing behind, or is killed by an error.

    Raises ToolMissingError where no clock can be set.
    """
    clock = WrongClock(work / "clock")
    servers = Servers(work / "servers")
    failpoints = work / "failpoints"
    try:
        await asyncio.to_thread(servers.start)
        say(f"servers at {servers.addresses}")
        async with (
            KafkaProxy(*servers.addresses["kafka"]) as kafka,
            TcpProxy(*servers.addresses["cassandra"]) as cassandra,
        ):
            system = RunningSystem(
                work / "system",
                profile="cluster",
                environment={
                    **SETTINGS,
                    "CONCORD_KAFKA__BOOTSTRAP_SERVERS": f"{kafka.host}:{kafka.port}",
                    "CONCORD_STORAGE__URL": f"cassandra://{cassandra.host}:{cassandra.port}/",
                    "CONCORD_FAILPOINTS": str(failpoints),
                },
            )
            await asyncio.to_thread(system.start)
            say(f"ready after {system.ready_after_s:.1f} s")
            apart = WorkerApart(system, clock, work / "apart.log")
            try:
                apart.keep()
                yield Standing(servers, {"kafka": kafka, "cassandra": cassandra}, system, apart, failpoints)
                await asyncio.to_thread(apart.end)
                code = await asyncio.to_thread(system.stop)
                if code:
                    raise NotAsAskedError(f"concord up ended with {code}: {system.last_words()}")
                await asyncio.to_thread(system.wait_until_gone)
            except BaseException:
                apart.end()
                await asyncio.to_thread(system.kill)
                raise
        await asyncio.to_thread(servers.stop)
    except BaseException:
        servers.kill()
        raise


def raylet_of(system: RunningSystem) -> int:
    """The process by which Ray's node lives. Raises NotAsAskedError where there is none."""
    for process in system.processes(named=False):
        if process.role == "ray" and _program(process.pid) == "raylet":
            return process.pid
    raise NotAsAskedError("no process is a raylet")


def _program(pid: int) -> str:
    try:
        return Path(os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0])).name
    except OSError:
        return ""
