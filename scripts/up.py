"""The supervisor behind `concord up`: starts everything in order, keeps it alive, stops it in the opposite order.

Theory of operation. One process owns the system of one directory (an flock says so) and is the parent of everything:

    supervisor ─┬─ Kafka (a JVM)              restarted when it ends; keeps its port and its data
                ├─ Ray, with every actor      Ray restarts actors; when Ray itself dies, all of it is started anew
                ├─ stream workers             restarted when they end, with growing pauses
                ├─ HTTP: health, metrics
                └─ guard                      kills all of the above once this process is gone, however it went

A start first checks whatever can be checked (settings, ports, directory, disk), then makes the tables, and only then
starts Kafka and Ray side by side; the workers need both. A start that fails takes back what it has started. Ready
means: Kafka serves, every actor answers, every worker has its partitions.

A stop (SIGINT, SIGTERM or SIGHUP) lets the workers finish what they are at, since the commands that they leave
unacknowledged would be done again by the next start; then actors, Ray and Kafka. A second signal ends everything at
once, which costs nothing but repetition: every part may be killed at any instant. Children live in sessions of their
own, so that Ctrl-C in a terminal reaches the supervisor alone.

Files in the directory, beside those of Kafka (`kafka/`) and of the tables (`tables/`):

    runtime.json          where the system is, for the other commands
    run/settings.json     what workers need to know: the settings, Kafka's and Ray's addresses
    run/supervisor.lock   held while this process lives; its content is the pid
    logs/                 what the workers write to stderr
    metrics/              the counters of this run's processes

The supervisor carries out no command and reads no message.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import structlog

from infra.config import Settings
from infra.messaging.topics import ensure_topics
from infra.servers import guard
from infra.servers.guard import Guard
from infra.servers.kafka import LocalKafka
from infra.servers.processes import ChildProcess, spawn
from infra.storage.connect import connect
from infra.telemetry import clear_metrics, metrics_environment
from scripts import preflight
from scripts.actor_process import PREPARE, ActorProcess
from scripts.cli.system import runtime_path, write_atomically
from scripts.endpoints import Endpoints
from scripts.wiring import kafka_topics, stored_tables, system_config
from scripts.worker import WorkerSetup, write_setup

if TYPE_CHECKING:
    from actors.ray_runtime import RayCluster

log = structlog.get_logger()

Progress = Callable[[str], None]

WORKER_GRACE_S = 30.0
"""How long a worker may take to finish what it is at."""

READY_WITHIN_S = 120.0
HEALTH_EVERY_S = 1.0
ANSWER_WITHIN_S = 5.0
PAUSES_S = (0.5, 8.0)
"""The first and the longest pause before a part that ended is started again; doubled from one to the other."""

FUTILE_STARTS = 4
"""A worker that ends so often without ever having been ready makes the start of the system fail."""

STEADY_AFTER_S = 10.0
"""A part that lived so long before it ended begins with the first pause again."""

_RAY_CORE = ("gcs_server", "raylet")
"""Ray's own processes without which a cluster is none."""


class StartFailedError(Exception):
    """The system could not be started; everything has been stopped again."""


@dataclass(frozen=True)
class Addresses:
    """Where the parts of a running system are."""

    bootstrap_servers: str
    http: str
    dashboard: str

    def ready_line(self) -> dict[str, Any]:
        return {
            "ready": True,
            "bootstrap_servers": self.bootstrap_servers,
            "http": self.http,
            "dashboard": self.dashboard,
        }


async def supervise(
    settings: Settings, *, on_ready: Callable[[Addresses], None], progress: Progress = lambda line: None
) -> None:
    """Run the system until it is told to stop. Returns after a clean stop.

    Raises what the checks and the servers raise (infra.servers.errors), UnavailableStorageError, StartFailedError.
    """
    settings = settings.model_copy(update={"data_dir": settings.data_dir.absolute()})
    directory = settings.data_dir
    await asyncio.to_thread(preflight.check_directory, directory)
    with preflight.hold(directory):
        preflight.check_ports(settings)
        await _make_tables(settings)
        await asyncio.to_thread(clear_metrics, directory / "metrics")
        run = str(uuid.uuid4())
        os.environ[guard.MARK] = run
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        guardian = Guard(run)
        try:
            await _Supervisor(settings, run, guardian, on_ready, progress).run()
        finally:
            await asyncio.to_thread(guardian.release)


async def _make_tables(settings: Settings) -> None:
    """Create the tables that are missing: what is wrong with the storage shows before anything runs."""
    storage = connect(settings.storage_url)
    try:
        for table in stored_tables(settings, storage):
            await storage.create_table(table)
    finally:
        await storage.close()


class _Supervisor:
    def __init__(
        self,
        settings: Settings,
        run: str,
        guardian: Guard,
        on_ready: Callable[[Addresses], None],
        progress: Progress,
    ) -> None:
        self._settings = settings
        self._directory = settings.data_dir
        self._run = run
        self._guardian = guardian
        self._on_ready = on_ready
        self._progress = progress
        self._started_at_s = time.monotonic()
        self._kafka = LocalKafka(
            self._directory / "kafka",
            port=settings.kafka.port or None,
            heap_mb=settings.kafka.heap_mb,
            progress=progress,
        )
        self._bootstrap_servers = ""
        self._kafka_serves = False
        # Ray's processes are tied to the thread that starts them, so that thread must live as long as this process.
        self._ray_thread = ThreadPoolExecutor(1, thread_name_prefix="ray")
        self._ray_starting: asyncio.Future[RayCluster] | None = None
        self._cluster: RayCluster | None = None
        self._actors: dict[str, str] = {}
        self._workers = [
            _Worker(f"worker-{number}", self._directory, preflight.free_port()) for number in range(settings.workers)
        ]
        self._endpoints = Endpoints(
            port=settings.http_port,
            readiness=self._readiness,
            metrics_directory=self._directory / "metrics",
            index={"system": "concord", "data": str(self._directory)},
        )
        self._stopping = asyncio.Event()
        self._failure: BaseException | None = None
        self._watchers: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        self._listen_for_signals()
        try:
            await self._until_stopped(self._start())
            if not self._stopping.is_set():
                addresses = self._addresses()
                self._write_runtime(running=True)
                self._on_ready(addresses)
                await self._stopping.wait()
        finally:
            await self._stop()
        if self._failure is not None:
            raise self._failure

    # --- start ----------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        self._progress("Starting Kafka and Ray")
        await self._endpoints.start()
        self._ray_starting = asyncio.ensure_future(self._start_ray())
        kafka = asyncio.ensure_future(self._start_kafka())
        try:
            # Whichever fails first ends the start; the other is stopped with everything else.
            await asyncio.gather(kafka, asyncio.shield(self._ray_starting))
        finally:
            kafka.cancel()
            await asyncio.wait([kafka])
        self._write_worker_settings()
        self._progress("Starting actors and workers")
        self._watch(self._keep_asking_actors())
        for worker in self._workers:
            worker.start()
            self._watch(self._keep_worker(worker))
        self._watch(self._keep_asking_workers())
        self._watch(self._keep_kafka())
        self._watch(self._keep_ray())
        await self._wait_until_ready()

    async def _start_kafka(self) -> None:
        self._bootstrap_servers = await self._kafka.start()
        await ensure_topics(self._bootstrap_servers, kafka_topics(self._settings))
        self._kafka_serves = True

    async def _start_ray(self) -> RayCluster:
        dashboard_port = self._settings.dashboard_port or preflight.free_port()
        process = ActorProcess(log_level=self._settings.log_level, metrics_dir=str(self._directory / "metrics"))

        def start() -> RayCluster:
            from actors.ray_runtime import start_cluster

            _quiet_ray()
            return start_cluster(
                system_config(self._settings),
                storage_url=self._settings.storage_url,
                prepare_process=PREPARE,
                prepare_argument=process.to_argument(),
                dashboard_port=dashboard_port,
            )

        self._cluster = await asyncio.get_running_loop().run_in_executor(self._ray_thread, start)
        # Ray's core installs handlers of its own in C, below Python's; ours go back on top.
        self._listen_for_signals()
        return self._cluster

    async def _wait_until_ready(self) -> None:
        until_s = time.monotonic() + READY_WITHIN_S
        while not self._readiness()["ready"]:
            for worker in self._workers:
                if worker.ended_unready >= FUTILE_STARTS:
                    raise StartFailedError(f"{worker.name} ends whenever it is started. It wrote to {worker.log_path}.")
            if time.monotonic() > until_s:
                state = self._readiness()
                waiting = [name for name in ("kafka", "actors", "workers") if not _all_ready(state[name])]
                raise StartFailedError(
                    f"The system did not become ready within {READY_WITHIN_S:.0f} s: {json.dumps(state)}. "
                    f"Waiting for: {', '.join(waiting)}. See {self._directory / 'logs'} and Ray's own logs."
                )
            await asyncio.sleep(0.05)

    async def _until_stopped(self, work: Coroutine[Any, Any, None]) -> None:
        """Do `work` unless a stop is asked for first."""
        task = asyncio.ensure_future(work)
        stopped = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                await task
        finally:
            for each in (task, stopped):
                each.cancel()
            await asyncio.wait({task, stopped})

    # --- keep alive -----------------------------------------------------------------------------------------------

    async def _keep_kafka(self) -> None:
        pauses = _Pauses()
        while True:
            code = await self._kafka.wait()
            self._kafka_serves = False
            log.error("kafka_ended", exit_code=code)
            while True:
                await asyncio.sleep(pauses.next())
                try:
                    servers = await self._kafka.start()
                except Exception as error:
                    log.error("kafka_does_not_start", error=str(error))
                else:
                    break
            self._kafka_serves = True
            log.warning("kafka_restarted", bootstrap_servers=servers)
            if servers != self._bootstrap_servers:  # its port was taken meanwhile
                self._bootstrap_servers = servers
                self._write_runtime(running=True)
                await self._renew_workers()

    async def _keep_ray(self) -> None:
        """When Ray's own processes end, Ray cannot restart anything any more: begin again with a new cluster."""
        pauses = _Pauses()
        while True:
            await _first_to_end(self._ray_core())
            log.error("ray_ended")
            self._actors = {}
            while True:
                await asyncio.sleep(pauses.next())
                try:
                    await self._stop_ray()
                    self._ray_starting = asyncio.ensure_future(self._start_ray())
                    await asyncio.shield(self._ray_starting)
                except Exception as error:
                    log.error("ray_does_not_start", error=str(error))
                else:
                    break
            log.warning("ray_restarted")
            self._write_runtime(running=True)
            await self._renew_workers()

    async def _keep_worker(self, worker: _Worker) -> None:
        pauses = _Pauses()
        while True:
            code = await worker.wait()
            if worker.renewing:
                worker.renewing = False
            else:
                log.error("worker_ended", worker=worker.name, exit_code=code)
                await asyncio.sleep(pauses.next())
            worker.start()
            log.warning("worker_restarted", worker=worker.name, pid=worker.pid)

    async def _renew_workers(self) -> None:
        """New workers with the addresses as they are now; the old ones would wait for what is gone."""
        self._write_worker_settings()
        for worker in self._workers:
            worker.renewing = True
            worker.kill()

    async def _keep_asking_actors(self) -> None:
        """Ask every actor how it is: what is asked after a restart begins its work."""
        while True:
            cluster = self._cluster
            if cluster is not None:
                health = await cluster.health(timeout_s=ANSWER_WITHIN_S)
                self._actors = {
                    name: type(reply).__name__ if isinstance(reply, BaseException) else ""
                    for name, reply in health.items()
                }
            await asyncio.sleep(HEALTH_EVERY_S if self._actors and not any(self._actors.values()) else 0.2)

    async def _keep_asking_workers(self) -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER_WITHIN_S)) as session:
            while True:
                await asyncio.gather(*(worker.ask(session) for worker in self._workers))
                await asyncio.sleep(HEALTH_EVERY_S if all(worker.ready for worker in self._workers) else 0.1)

    def _watch(self, watcher: Coroutine[Any, Any, None]) -> None:
        """Run a watcher; if one breaks, the system would be unwatched, so it stops with that error."""
        task = asyncio.ensure_future(watcher)
        self._watchers.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                self._failure = self._failure or error
                self._stopping.set()

        task.add_done_callback(ended)

    # --- stop -----------------------------------------------------------------------------------------------------

    def _listen_for_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.remove_signal_handler(number)
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        if not self._stopping.is_set():
            self._progress("Stopping (once more to end everything at once)")
            self._stopping.set()
            return
        self._progress("Ending everything at once")
        self._guardian.release(timeout_s=10)
        with suppress(OSError):
            self._write_runtime(running=False)
        sys.stdout.flush()
        os._exit(130)

    async def _stop(self) -> None:
        self._stopping.set()
        for task in self._watchers:
            task.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        await asyncio.gather(*(worker.stop() for worker in self._workers))
        await self._quietly("ray", self._stop_ray())
        await self._quietly("kafka", self._kafka.stop())
        await self._quietly("http", self._endpoints.stop())
        if runtime_path(self._directory).exists():
            self._write_runtime(running=False)
        self._ray_thread.shutdown()
        self._progress(f"Stopped after {time.monotonic() - self._started_at_s:.0f} s")

    async def _stop_ray(self) -> None:
        """Stop the cluster, also one that is still starting, and what it leaves behind."""
        if self._ray_starting is not None:
            # Nothing can interrupt a start; cancelling the wait for it would leave the cluster without an owner.
            await asyncio.wait([self._ray_starting])
            if self._ray_starting.exception() is not None:
                log.warning("ray_start_failed", error=str(self._ray_starting.exception()))
            self._ray_starting = None
        cluster, self._cluster = self._cluster, None
        if cluster is not None:
            await asyncio.get_running_loop().run_in_executor(self._ray_thread, cluster.stop)
        for pid in guard.marked(self._run):
            if _is_of_ray(pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    async def _quietly(self, part: str, work: Awaitable[None]) -> None:
        try:
            await work
        except Exception as error:
            log.error("stop_failed", part=part, error=repr(error))

    # --- what others see ------------------------------------------------------------------------------------------

    def _readiness(self) -> dict[str, Any]:
        kafka = self._kafka_serves and self._kafka.pid is not None
        actors = {name: trouble or "ready" for name, trouble in self._actors.items()}
        workers = {worker.name: worker.state for worker in self._workers}
        ready = kafka and bool(actors) and _all_ready(actors) and _all_ready(workers)
        return {
            "ready": ready and not self._stopping.is_set(),
            "kafka": {"kafka": "ready" if kafka else "down"},
            "actors": actors,
            "workers": workers,
        }

    def _addresses(self) -> Addresses:
        assert self._cluster is not None
        url = self._cluster.dashboard_url
        dashboard = url if not url or "://" in url else f"http://{url}"
        return Addresses(self._bootstrap_servers, self._endpoints.url, dashboard)

    def _write_runtime(self, *, running: bool) -> None:
        path = runtime_path(self._directory)
        if running:
            described = {
                **self._addresses().ready_line(),
                "running": True,
                "pid": os.getpid(),
                "run": self._run,
                "storage": self._settings.storage_url,
                "settings": json.loads(self._settings.model_dump_json()),
            }
        else:
            described = {**json.loads(path.read_text()), "ready": False, "running": False, "pid": None}
        write_atomically(path, described)

    def _write_worker_settings(self) -> None:
        assert self._cluster is not None
        write_setup(
            WorkerSetup(
                settings=self._settings,
                bootstrap_servers=self._bootstrap_servers,
                ray_address=self._cluster.address,
            )
        )

    def _ray_core(self) -> list[int]:
        return [pid for pid in guard.marked(self._run) if Path(_command_line(pid)[0]).name in _RAY_CORE]


class _Worker:
    """One stream worker: a process, and what its health port says."""

    def __init__(self, name: str, directory: Path, health_port: int) -> None:
        self.name = name
        self.renewing = False
        self.state = "down"
        self.ended_unready = 0
        self.log_path = directory / "logs" / f"{name}.log"
        self._directory = directory
        self._health_port = health_port
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
            [
                *(sys.executable, "-m", "scripts.worker"),
                *("--data", str(self._directory)),
                *("--name", self.name),
                *("--health-port", str(self._health_port)),
            ],
            env={**os.environ, **metrics_environment(self._directory / "metrics")},
            log_path=self.log_path,
        )

    async def wait(self) -> int:
        assert self._process is not None
        code = await self._process.wait()
        self.ended_unready += 0 if self.ready else 1
        self.state = "down"
        return code

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    async def stop(self) -> None:
        if self._process is not None:
            await self._process.stop(grace_s=WORKER_GRACE_S)

    async def ask(self, session: aiohttp.ClientSession) -> None:
        if self.pid is None:
            return
        try:
            async with session.get(f"http://{preflight.HOST}:{self._health_port}/readyz") as response:
                self.state = "ready" if response.status == 200 else "starting"
                self.ended_unready = 0 if self.ready else self.ended_unready
        except (aiohttp.ClientError, TimeoutError, OSError):
            self.state = "silent"


class _Pauses:
    """Growing pauses between restarts, from the first again after a steady time."""

    def __init__(self) -> None:
        self._next_s = PAUSES_S[0]
        self._last_s = time.monotonic()

    def next(self) -> float:
        now_s = time.monotonic()
        if now_s - self._last_s > STEADY_AFTER_S:
            self._next_s = PAUSES_S[0]
        pause_s = self._next_s
        self._next_s = min(pause_s * 2, PAUSES_S[1])
        self._last_s = now_s + pause_s
        return pause_s


def _all_ready(states: dict[str, str]) -> bool:
    return all(state == "ready" for state in states.values())


def _command_line(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
    except OSError:  # gone meanwhile
        return [""]


def _is_of_ray(pid: int) -> bool:
    """Ray's processes run its files, or have a title that begins with its name."""
    line = _command_line(pid)
    return line[0].startswith("ray::") or any("/ray/" in word for word in line)


def _quiet_ray() -> None:
    """Let Ray's logger, which has handlers of its own from its import on, speak through ours, and of trouble only."""
    logger = logging.getLogger("ray")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.ERROR)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _first_to_end(pids: list[int]) -> None:
    """Until one of these processes, which are not our children to wait for, has ended. Of none: for ever."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    descriptors = []
    try:
        for pid in pids:
            try:
                descriptors.append(os.pidfd_open(pid))
            except ProcessLookupError:
                return
            loop.add_reader(descriptors[-1], _resolve, ended)
        await ended
    finally:
        for descriptor in descriptors:
            loop.remove_reader(descriptor)
            os.close(descriptor)
