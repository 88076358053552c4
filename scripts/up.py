"""The supervisor behind `concord up`: starts everything in order, keeps it alive, stops it in the opposite order.

Theory of operation. One process owns the system of one directory (an flock says so) and is the parent of everything:

    supervisor ─┬─ Kafka (a JVM)              restarted when it ends; keeps its port and its data
                ├─ Cassandra (a JVM)          likewise; profile stack alone
                ├─ Ray, with every actor      Ray restarts actors; when Ray itself dies, all of it is started anew
                ├─ stream workers             restarted when they end, with growing pauses
                ├─ HTTP: health, metrics
                └─ guard                      kills all of the above once this process is gone, however it went

A start first checks whatever can be checked (settings, ports, directory, disk, servers that others run), then makes the
tables unless the storage is ours to start, and only then starts the servers and Ray side by side; the workers need all
of them. A start that fails takes back what it has started. Ready means: Kafka and the storage serve, every actor
answers, every worker has its partitions.

The actors learn the storage's address when Ray starts, so Cassandra chooses its port before it starts. Should another
process take that port while Cassandra is down, it comes back at another one, and Ray is started anew to learn it.

A stop (SIGINT, SIGTERM or SIGHUP) lets the workers finish what they are at, since the commands that they leave
unacknowledged would be done again by the next start; then actors, Ray and the servers. A second signal ends everything
at once, which costs nothing but repetition: every part may be killed at any instant. Children live in sessions of their
own, so that Ctrl-C in a terminal reaches the supervisor alone.

Files in the directory, beside those of Kafka (`kafka/`), Cassandra (`cassandra/`) and SQLite's tables (`tables/`):

    runtime.json          where the system is, for the other commands
    run/settings.json     what workers need to know: the settings, the servers' and Ray's addresses
    run/supervisor.lock   held while this process lives; its content is the pid
    run/control.sock      where `concord workers` and `concord restart` ask this process for what they are named after
    logs/                 what the workers write to stderr
    metrics/              the counters of this run's processes

The supervisor carries out no command and reads no message.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import aiohttp
import structlog

from infra.config import Settings, without_secrets
from infra.metrics import clear_metrics
from infra.servers import guard
from infra.servers.guard import Guard
from scripts import preflight, rolling
from scripts.cli.system import runtime_path, write_atomically
from scripts.control import ControlServer
from scripts.endpoints import Endpoints
from scripts.outside import Outside, close_all, trouble_of, wait_until_reachable
from scripts.parts import REAL, Cluster, Parts, Worker, first_to_end
from scripts.servers import KeptServer, Pauses, Progress, Server, all_of, until_stopped
from scripts.worker import WorkerSetup, write_setup

log = structlog.get_logger()

READY_WITHIN_S = 120.0
HEALTH_EVERY_S = 1.0
OUTSIDE_EVERY_S = 5.0
ANSWER_WITHIN_S = 5.0

FUTILE_STARTS = 4
"""A worker that ends so often without ever having been ready makes the start of the system fail."""

RAY_DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # What the dashboard lists of past tasks. To Ray each message to an actor is a task, and takes 3 kB of gcs_server as
    # long as it is listed: at its own default, a hundred thousand, it grows by 300 MB.
    "RAY_task_events_max_num_task_in_gcs": "10000",
    "RAY_task_events_max_dropped_task_attempts_tracked_per_job_in_gcs": "10000",
    # Ray's processes have some thirty threads each. In its servers (jemalloc) each thread keeps freed blocks to itself,
    # and half an hour goes by until all have their fill; in actors (glibc) each fragments an arena of its own.
    "MALLOC_CONF": "narenas:1,tcache:false",
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_TRIM_THRESHOLD_": "131072",
}
"""The environment of the Ray that is started here, as far as the user has not set it otherwise."""

RAY_STARTS = 3
"""How often Ray is started before the start of the system fails."""

AWAITED = ("kafka", "storage", "actors", "workers")
"""What readiness is made of."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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
    settings: Settings,
    *,
    on_ready: Callable[[Addresses], None],
    progress: Progress = lambda line: None,
    parts: Parts = REAL,
) -> None:
    """Run the system until it is told to stop. Returns after a clean stop.

    Raises what the checks and the servers raise (infra.servers.errors), what servers of others come to
    (`wait_until_reachable`), UnavailableStorageError, StartFailedError.
    """
    settings = settings.model_copy(update={"data_dir": settings.data_dir.absolute()})
    directory = settings.data_dir
    await asyncio.to_thread(preflight.check_directory, directory)
    with preflight.hold(directory):
        preflight.check_ports(settings)
        outside = parts.outside(settings)
        try:
            await wait_until_reachable(outside, progress)
            await _run(settings, parts, outside, on_ready, progress)
        finally:
            await close_all(outside)


async def _run(
    settings: Settings,
    parts: Parts,
    outside: Sequence[Outside],
    on_ready: Callable[[Addresses], None],
    progress: Progress,
) -> None:
    if settings.profile != "stack":  # what is wrong with the storage shows before anything runs
        await parts.create_tables(settings)
    await asyncio.to_thread(clear_metrics, settings.data_dir / "metrics")
    run = str(uuid.uuid4())
    os.environ[guard.MARK] = run
    os.environ.update(RAY_DEFAULTS | os.environ)
    guardian = Guard(run)
    try:
        await _Supervisor(settings, parts, outside, run, guardian, on_ready, progress).run()
    finally:
        await asyncio.to_thread(guardian.release)


class _Supervisor:
    def __init__(
        self,
        settings: Settings,
        parts: Parts,
        outside: Sequence[Outside],
        run: str,
        guardian: Guard,
        on_ready: Callable[[Addresses], None],
        progress: Progress,
    ) -> None:
        self._settings = settings
        self._directory = settings.data_dir
        self._parts = parts
        self._run = run
        self._guardian = guardian
        self._on_ready = on_ready
        self._progress = progress
        self._started_at_s = time.monotonic()
        self._kafka = _kept("kafka", parts.kafka(settings, progress), self._announce_anew)
        self._cassandra = _kept("cassandra", parts.cassandra(settings, progress), self._end_ray)
        self._servers = [server for server in (self._kafka, self._cassandra) if server is not None]
        self._outside = outside
        self._outside_states = dict.fromkeys((server.kind for server in outside), "ready")  # it was waited for them
        # Ray's processes are tied to the thread that starts them, so that thread must live as long as this process.
        self._ray_thread = ThreadPoolExecutor(1, thread_name_prefix="ray")
        self._ray_starting: asyncio.Future[Cluster] | None = None
        self._cluster: Cluster | None = None
        self._actors: dict[str, str] = {}
        self._actors_know = ""
        """Where the actors look for the storage."""
        self._workers = [
            Worker(f"worker-{number}", self._directory, parts.worker_command) for number in range(settings.workers)
        ]
        self._endpoints = Endpoints(
            host=settings.http_host,
            port=settings.http_port,
            readiness=self._readiness,
            metrics_directory=self._directory / "metrics",
            index={"system": "concord", "data": str(self._directory)},
        )
        self._control = ControlServer(
            self._directory,
            {
                "workers": lambda request: rolling.scale(self, request),
                "restart": lambda request: rolling.restart(self, request),
            },
        )
        self._stopping = asyncio.Event()
        self._failure: BaseException | None = None
        self._watchers: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        self._listen_for_signals()
        try:
            await until_stopped(self._start(), self._stopping)
            if not self._stopping.is_set():
                addresses = self._addresses()
                self._write_runtime(running=True)
                await self._control.start()
                self._on_ready(addresses)
                await self._stopping.wait()
        finally:
            await self._stop()
        if self._failure is not None:
            raise self._failure

    # --- start ----------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        names = [*(server.name.capitalize() for server in self._servers), "Ray"]
        self._progress(f"Starting {', '.join(names[:-1])}{' and ' if names[1:] else ''}{names[-1]}")
        await self._endpoints.start()
        for server in self._servers:
            server.server.choose_ports()
        self._locate()
        # Whichever fails first ends the start; the others are stopped with everything else.
        await all_of([self._start_ray_patiently(), self._start_kafka(), self._start_storage()])
        if self._actors_know != self._settings.storage_url:  # another process took Cassandra's port before it did
            await self._stop_ray()
            await self._start_ray_patiently()
        self._write_worker_settings()
        self._progress("Starting actors and workers")
        self._watch(self._keep_asking_actors())
        for worker in self._workers:
            self._keep(worker)
        self._watch(self._keep_asking_workers())
        for server in self._servers:
            self._watch(server.keep())
        if self._outside:
            self._watch(self._keep_asking_outside())
        self._watch(self._keep_ray())
        await self._wait_until_ready()

    async def _start_kafka(self) -> None:
        if self._kafka is not None:
            await self._kafka.start()
            self._locate()
        await self._parts.declare_topics(self._settings)

    async def _start_storage(self) -> None:
        if self._cassandra is not None:
            await self._cassandra.start()
            self._locate()
            await self._parts.create_tables(self._settings)

    def _locate(self) -> None:
        """Know the addresses that our servers have now."""
        kafka, cassandra = self._kafka, self._cassandra
        self._settings = self._settings.located(
            bootstrap_servers=",".join(self._settings.kafka.bootstrap_servers) if kafka is None else kafka.address,
            storage_url=self._settings.storage_url if cassandra is None else f"cassandra://{cassandra.address}/",
        )

    async def _start_ray_patiently(self) -> None:
        """On a busy machine Ray gives its own agents up too early, for which there is no setting: try again."""
        for left in reversed(range(RAY_STARTS)):
            self._ray_starting = asyncio.ensure_future(self._start_ray())
            try:
                await asyncio.shield(self._ray_starting)
            except Exception as error:
                if not left:
                    raise
                log.warning("ray_starts_again", error=str(error))
                await self._stop_ray()
            else:
                return

    async def _start_ray(self) -> Cluster:
        loop = asyncio.get_running_loop()
        settings = self._settings
        self._cluster = await loop.run_in_executor(self._ray_thread, self._parts.start_cluster, settings)
        self._actors_know = settings.storage_url
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
                waiting = [name for name in AWAITED if not _all_ready(state[name])]
                raise StartFailedError(
                    f"The system did not become ready within {READY_WITHIN_S:.0f} s: {json.dumps(state)}. "
                    f"Waiting for: {', '.join(waiting)}. See {self._directory / 'logs'} and Ray's own logs."
                )
            await asyncio.sleep(0.05)

    # --- keep alive -----------------------------------------------------------------------------------------------

    async def _keep_ray(self) -> None:
        """When Ray's own processes end, Ray cannot restart anything any more: begin again with a new cluster."""
        pauses = Pauses()
        while True:
            await first_to_end(self._parts.cluster_core(self._run))
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
            self._announce_anew()

    def _keep(self, worker: Worker) -> None:
        worker.start()
        self._watch(self._keep_worker(worker))

    async def _keep_worker(self, worker: Worker) -> None:
        pauses = Pauses()
        while True:
            code = await worker.wait()
            if worker.leaving:
                return
            if worker.renewing:
                worker.renewing = False
            else:
                log.error("worker_ended", worker=worker.name, exit_code=code)
                await asyncio.sleep(pauses.next())
                if worker.leaving:
                    return
            worker.start()
            log.warning("worker_restarted", worker=worker.name, pid=worker.pid)

    def _announce_anew(self) -> None:
        """Tell where everything is now, and renew the workers: the old ones would wait for what is gone.

        While Ray is down as well there is nothing to tell yet; it will be when Ray is up again.
        """
        self._locate()
        if self._cluster is None:
            return
        self._write_runtime(running=True)
        self._write_worker_settings()
        for worker in self._workers:
            worker.renewing = worker.pid is not None
            worker.kill()

    def _end_ray(self) -> None:
        """The storage has moved, which actors learn at their start alone: `_keep_ray` begins anew."""
        self._locate()
        self._parts.clear_cluster(self._run)

    async def _keep_asking_outside(self) -> None:
        while True:
            await asyncio.sleep(OUTSIDE_EVERY_S)
            troubles = await asyncio.gather(*map(trouble_of, self._outside))
            self._outside_states = {
                server.kind: trouble or "ready" for server, trouble in zip(self._outside, troubles, strict=True)
            }

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

    # --- changed while it runs (rolling.Crew) -----------------------------------------------------------------------

    @property
    def workers(self) -> Sequence[Worker]:
        return self._workers

    @property
    def cluster(self) -> Cluster:
        if self._cluster is None:
            raise rolling.NotServingError("Ray is being started anew, and every actor with it. Ask again when it is.")
        return self._cluster

    @property
    def actors(self) -> Sequence[str]:
        return list(self._actors)

    def add_worker(self, number: int) -> Worker:
        worker = Worker(f"worker-{number}", self._directory, self._parts.worker_command)
        self._workers.append(worker)
        self._keep(worker)
        return worker

    def remove_worker(self, worker: Worker) -> None:
        self._workers.remove(worker)

    # --- stop -----------------------------------------------------------------------------------------------------

    def _listen_for_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
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
        await self._quietly("control", self._control.stop())
        for task in self._watchers:
            task.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        await asyncio.gather(*(worker.stop() for worker in self._workers))
        await self._quietly("ray", self._stop_ray())
        await asyncio.gather(*(self._quietly(server.name, server.stop()) for server in self._servers))
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
        self._parts.clear_cluster(self._run)

    async def _quietly(self, part: str, work: Awaitable[None]) -> None:
        try:
            await work
        except Exception as error:
            log.error("stop_failed", part=part, error=repr(error))

    # --- what others see ------------------------------------------------------------------------------------------

    def _readiness(self) -> dict[str, Any]:
        kafka = self._outside_states.get("kafka", "down") if self._kafka is None else self._kafka.state
        storage = self._outside_states.get("storage", "ready") if self._cassandra is None else self._cassandra.state
        actors = {name: trouble or "ready" for name, trouble in self._actors.items()}
        workers = {worker.name: worker.state for worker in self._workers}
        parts: dict[str, dict[str, str]] = {
            "kafka": {"kafka": kafka},
            "storage": {self._settings.storage_url.partition(":")[0]: storage},
            "actors": actors,
            "workers": workers,
        }
        ready = bool(actors) and all(_all_ready(parts[name]) for name in AWAITED)
        return {"ready": ready and not self._stopping.is_set(), **parts}

    def _addresses(self) -> Addresses:
        assert self._cluster is not None
        url = self._cluster.dashboard_url
        dashboard = url if not url or "://" in url else f"http://{url}"
        return Addresses(",".join(self._settings.kafka.bootstrap_servers), self._endpoints.url, dashboard)

    def _write_runtime(self, *, running: bool) -> None:
        path = runtime_path(self._directory)
        if running:
            described = {
                **self._addresses().ready_line(),
                "running": True,
                "pid": os.getpid(),
                "run": self._run,
                "storage": without_secrets(self._settings.storage_url),
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
                bootstrap_servers=",".join(self._settings.kafka.bootstrap_servers),
                ray_address=self._cluster.address,
            )
        )


def _kept(name: str, server: Server | None, on_move: Callable[[], None]) -> KeptServer | None:
    return None if server is None else KeptServer(name, server, on_move=on_move)


def _all_ready(states: dict[str, str]) -> bool:
    return all(state == "ready" for state in states.values())
