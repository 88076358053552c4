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
import os
import signal
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import aiohttp
import structlog

from infra.config import Settings
from infra.metrics import clear_metrics
from infra.servers import guard
from infra.servers.guard import Guard
from infra.storage.connect import connect
from scripts import preflight
from scripts.cli.system import runtime_path, write_atomically
from scripts.endpoints import Endpoints
from scripts.parts import REAL, Cluster, Parts, Pauses, Progress, Worker, first_to_end
from scripts.wiring import stored_tables
from scripts.worker import WorkerSetup, write_setup

log = structlog.get_logger()

READY_WITHIN_S = 120.0
HEALTH_EVERY_S = 1.0
ANSWER_WITHIN_S = 5.0

FUTILE_STARTS = 4
"""A worker that ends so often without ever having been ready makes the start of the system fail."""

RAY_STARTS = 3
"""How often Ray is started before the start of the system fails."""

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
            await _Supervisor(settings, parts, run, guardian, on_ready, progress).run()
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
        parts: Parts,
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
        self._kafka = parts.kafka(settings, progress)
        self._bootstrap_servers = ""
        self._kafka_serves = False
        # Ray's processes are tied to the thread that starts them, so that thread must live as long as this process.
        self._ray_thread = ThreadPoolExecutor(1, thread_name_prefix="ray")
        self._ray_starting: asyncio.Future[Cluster] | None = None
        self._cluster: Cluster | None = None
        self._actors: dict[str, str] = {}
        self._workers = [
            Worker(f"worker-{number}", self._directory, parts.worker_command) for number in range(settings.workers)
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
        starting = [asyncio.ensure_future(self._start_kafka()), asyncio.ensure_future(self._start_ray_patiently())]
        try:
            # Whichever fails first ends the start; the other is stopped with everything else.
            await asyncio.gather(*starting)
        finally:
            for each in starting:
                each.cancel()
            await asyncio.wait(starting)
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
        await self._parts.declare_topics(self._bootstrap_servers, self._settings)
        self._kafka_serves = True

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
        self._cluster = await loop.run_in_executor(self._ray_thread, self._parts.start_cluster, self._settings)
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
        pauses = Pauses()
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
                self._announce_anew()

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

    async def _keep_worker(self, worker: Worker) -> None:
        pauses = Pauses()
        while True:
            code = await worker.wait()
            if worker.renewing:
                worker.renewing = False
            else:
                log.error("worker_ended", worker=worker.name, exit_code=code)
                await asyncio.sleep(pauses.next())
            worker.start()
            log.warning("worker_restarted", worker=worker.name, pid=worker.pid)

    def _announce_anew(self) -> None:
        """Tell where everything is now, and renew the workers: the old ones would wait for what is gone.

        While Ray is down as well there is nothing to tell yet; it will be when Ray is up again.
        """
        if self._cluster is None:
            return
        self._write_runtime(running=True)
        self._write_worker_settings()
        for worker in self._workers:
            worker.renewing = worker.pid is not None
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
        self._parts.clear_cluster(self._run)

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


def _all_ready(states: dict[str, str]) -> bool:
    return all(state == "ready" for state in states.values())
