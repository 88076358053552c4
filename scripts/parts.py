"""The parts that the supervisor holds together, and how each is started: the only place that knows their programs.

`Parts` says what a system is made of. `REAL` is Kafka, Ray and stream workers; tests use stand-ins that start at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import aiohttp

from infra.config import Settings
from infra.messaging.topics import ensure_topics
from infra.metrics import metrics_environment
from infra.servers import guard
from infra.servers.kafka import LocalKafka
from infra.servers.processes import ChildProcess, spawn
from scripts import preflight
from scripts.actor_process import PREPARE, ActorProcess
from scripts.wiring import kafka_topics, system_config

Progress = Callable[[str], None]

WORKER_GRACE_S = 30.0
"""How long a worker may take to finish what it is at."""

PAUSES_S = (0.5, 8.0)
"""The first and the longest pause before a part that ended is started again; doubled from one to the other."""

STEADY_AFTER_S = 10.0
"""A part that lived so long before it ended begins with the first pause again."""

_RAY_CORE = ("gcs_server", "raylet")
"""Ray's own processes without which a cluster is none."""


class Kafka(Protocol):
    """`infra.servers.kafka.LocalKafka`, as far as it is used here."""

    @property
    def pid(self) -> int | None: ...

    async def start(self) -> str: ...

    async def wait(self) -> int: ...

    async def stop(self) -> None: ...


class Cluster(Protocol):
    """`actors.ray_runtime.RayCluster`, as far as it is used here. `stop` blocks."""

    address: str
    dashboard_url: str

    async def health(self, timeout_s: float = ...) -> dict[str, Any]: ...

    def stop(self) -> None: ...


@dataclass(frozen=True)
class Parts:
    """How each part is started. `start_cluster` blocks, for a run whose processes carry the guard's mark."""

    kafka: Callable[[Settings, Progress], Kafka]
    declare_topics: Callable[[str, Settings], Awaitable[object]]
    start_cluster: Callable[[Settings], Cluster]
    cluster_core: Callable[[str], list[int]]
    """Of a run: the processes without which its cluster is none."""
    clear_cluster: Callable[[str], None]
    """Kill what a stopped or broken cluster of a run has left behind."""
    worker_command: Callable[[str, Path, int], list[str]]
    """The program of a worker: its name, the directory, its health port."""


def _local_kafka(settings: Settings, progress: Progress) -> Kafka:
    return LocalKafka(
        settings.data_dir / "kafka",
        port=settings.kafka.port or None,
        heap_mb=settings.kafka.heap_mb,
        progress=progress,
    )


async def _declare_topics(bootstrap_servers: str, settings: Settings) -> None:
    await ensure_topics(bootstrap_servers, kafka_topics(settings))


def _start_ray(settings: Settings) -> Cluster:
    from actors.ray_runtime import start_cluster

    # Ray's logger has handlers of its own from its import on: let it speak through ours, and of trouble only.
    logger = logging.getLogger("ray")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.ERROR)
    process = ActorProcess(log_level=settings.log_level, metrics_dir=str(settings.data_dir / "metrics"))
    return start_cluster(
        system_config(settings),
        storage_url=settings.storage_url,
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
    kafka=_local_kafka,
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
        """It was killed to be started anew at once, which is no failure."""
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

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL when it takes too long to finish what it is at."""
        if self._process is not None:
            await self._process.stop(grace_s=WORKER_GRACE_S)

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


class Pauses:
    """Growing pauses between restarts, from the first again after a steady time. `now_s` is a monotonic clock."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._next_s = PAUSES_S[0]
        self._started_s = now_s()

    def next(self) -> float:
        """How long to wait before the next start."""
        now_s = self._now_s()
        if now_s - self._started_s > STEADY_AFTER_S:
            self._next_s = PAUSES_S[0]
        pause_s = self._next_s
        self._next_s = min(pause_s * 2, PAUSES_S[1])
        self._started_s = now_s + pause_s
        return pause_s


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
