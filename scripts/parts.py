"""The parts that the supervisor holds together, and how each is started: the only place that knows their programs.

`Parts` says what a system is made of. `REAL` is the servers of the profile, Ray and stream workers; tests use stand-ins
that start at once.

Whatever must know where a server is gets the settings as they are when it starts: `Settings.located`, whose addresses
are those that the servers turned out to have.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import aiohttp

from infra.config import Settings
from infra.messaging.topics import ensure_topics
from infra.metrics import metrics_environment
from infra.servers import guard
from infra.servers.processes import ChildProcess, spawn
from scripts import preflight
from scripts.actor_process import PREPARE, ActorProcess
from scripts.connections import kafka_connection, open_storage, ray_environment, storage_address
from scripts.outside import Outside, servers_outside
from scripts.servers import Progress, Server, local_cassandra, local_kafka
from scripts.wiring import create_tables, kafka_topics, system_config

WORKER_GRACE_S = 30.0
"""How long a worker may take to finish what it is at."""

_RAY_CORE = ("gcs_server", "raylet")
"""Ray's own processes without which a cluster is none."""


class Cluster(Protocol):
    """`actors.ray_runtime.RayCluster`, as far as it is used here. `stop` blocks."""

    address: str
    dashboard_url: str

    async def health(self, timeout_s: float = ...) -> dict[str, Any]: ...

    async def drain(self, name: str, *, within_s: float) -> bool: ...

    async def restart(self, name: str, *, within_s: float) -> None: ...

    def stop(self) -> None: ...


@dataclass(frozen=True)
class Parts:
    """How each part is started. `start_cluster` blocks, for a run whose processes carry the guard's mark."""

    kafka: Callable[[Settings, Progress], Server | None]
    """Of the profile; None where the settings name one of somebody else's."""
    cassandra: Callable[[Settings, Progress], Server | None]
    """Of the profile; None where the storage is another one."""
    outside: Callable[[Settings], Sequence[Outside]]
    """The servers of somebody else's that the profile uses."""
    create_tables: Callable[[Settings], Awaitable[object]]
    declare_topics: Callable[[Settings], Awaitable[object]]
    start_cluster: Callable[[Settings], Cluster]
    cluster_core: Callable[[str], list[int]]
    """Of a run: the processes without which its cluster is none."""
    clear_cluster: Callable[[str], None]
    """Kill what a stopped or broken cluster of a run has left behind."""
    worker_command: Callable[[str, Path, int], list[str]]
    """The program of a worker: its name, the directory, its health port."""


def _kafka(settings: Settings, progress: Progress) -> Server | None:
    return None if settings.profile == "cluster" else local_kafka(settings, progress)


def _cassandra(settings: Settings, progress: Progress) -> Server | None:
    return local_cassandra(settings, progress) if settings.profile == "stack" else None


async def _create_tables(settings: Settings) -> None:
    storage = open_storage(settings)
    try:
        await create_tables(settings, storage)
    finally:
        await storage.close()


async def _declare_topics(settings: Settings) -> None:
    await ensure_topics(kafka_connection(settings), kafka_topics(settings))


def _start_ray(settings: Settings) -> Cluster:
    os.environ.update(ray_environment(settings))  # Ray looks once, when it is imported
    from actors.ray_runtime import start_cluster

    # Ray's logger has handlers of its own from its import on: let it speak through ours, and of trouble only.
    logger = logging.getLogger("ray")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.ERROR)
    process = ActorProcess(
        log_level=settings.log_level, metrics_dir=str(settings.data_dir / "metrics"), tracing=settings.tracing
    )
    return start_cluster(
        system_config(settings),
        storage=storage_address(settings),
        address=settings.ray.address,
        include_dashboard=settings.ray.dashboard,
        prepare_process=PREPARE,
        prepare_argument=process.to_argument(),
        dashboard_port=settings.dashboard_port or preflight.free_port(),
    )


def _ray_core(run: str) -> list[int]:
    return [pid for pid in guard.marked(run) if Path(_command_line(pid)[0]).name in _RAY_CORE]


def _clear_ray(run: str) -> None:
    for pid in guard.marked(run):
        if _is_of_ray(_command_line(pid)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _is_of_ray(command_line: list[str]) -> bool:
    """Ray's processes run its files, or have a title that begins with its name."""
    return command_line[0].startswith("ray::") or any("/ray/" in word for word in command_line)


def _command_line(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
    except OSError:  # gone meanwhile
        return [""]


def _stream_worker(name: str, directory: Path, health_port: int) -> list[str]:
    return [
        *(sys.executable, "-m", "scripts.worker"),
        *("--data", str(directory)),
        *("--name", name),
        *("--health-port", str(health_port)),
    ]


REAL = Parts(
    kafka=_kafka,
    cassandra=_cassandra,
    outside=servers_outside,
    create_tables=_create_tables,
    declare_topics=_declare_topics,
    start_cluster=_start_ray,
    cluster_core=_ray_core,
    clear_cluster=_clear_ray,
    worker_command=_stream_worker,
)


class Worker:
    """One stream worker: a process, and what its health port says."""

    def __init__(self, name: str, directory: Path, command: Callable[[str, Path, int], list[str]]) -> None:
        self.name = name
        self.state = "down"
        self.renewing = False
        """It was ended to be started anew at once, which is no failure."""
        self.leaving = False
        """It was told to leave, and is not started again."""
        self.ended_unready = 0
        """How often in a row it ended without having been ready."""
        self.log_path = directory / "logs" / f"{name}.log"
        self._directory = directory
        self._health_port = preflight.free_port()
        self._command = command(name, directory, self._health_port)
        self._process: ChildProcess | None = None

    @property
    def pid(self) -> int | None:
        return None if self._process is None or self._process.exit_code is not None else self._process.pid

    @property
    def ready(self) -> bool:
        return self.state == "ready"

    def start(self) -> None:
        self.state = "starting"
        self._process = spawn(
            self._command,
            env={**os.environ, **metrics_environment(self._directory / "metrics")},
            log_path=self.log_path,
        )

    async def wait(self) -> int:
        """Until it ends; the exit code."""
        assert self._process is not None
        code = await self._process.wait()
        self.ended_unready += 0 if self.ready else 1
        self.state = "down"
        return code

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    async def stop(self) -> int:
        """SIGTERM, and SIGKILL when it takes too long to finish what it is at; the exit code."""
        return 0 if self._process is None else await self._process.stop(grace_s=WORKER_GRACE_S)

    async def leave(self) -> int:
        """The same for good: the others of its group get its partitions at once. The exit code."""
        self.leaving = True
        if self.pid is None or self._process is None:
            return 0
        self._process.send_signal(signal.SIGUSR1)
        with suppress(TimeoutError):
            return await asyncio.wait_for(self._process.wait(), WORKER_GRACE_S)
        return await self.stop()

    async def ask(self, session: aiohttp.ClientSession) -> None:
        """Learn from its health port how it is."""
        if self.pid is None:
            return
        try:
            async with session.get(f"http://{preflight.HOST}:{self._health_port}/readyz") as response:
                self.state = "ready" if response.status == 200 else "starting"
                self.ended_unready = 0 if self.ready else self.ended_unready
        except (aiohttp.ClientError, TimeoutError, OSError):
            self.state = "silent"


async def first_to_end(pids: list[int]) -> None:
    """Until one of these processes, which are not our children to wait for, has ended. Of none: for ever."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def on_end() -> None:
        if not ended.done():
            ended.set_result(None)

    descriptors = []
    try:
        for pid in pids:
            try:
                descriptors.append(os.pidfd_open(pid))
            except ProcessLookupError:
                return
            loop.add_reader(descriptors[-1], on_end)
        await ended
    finally:
        for descriptor in descriptors:
            loop.remove_reader(descriptor)
            os.close(descriptor)
