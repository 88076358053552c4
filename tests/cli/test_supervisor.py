"""The supervisor with stand-ins for the servers, Ray and workers: real processes that start at once and do nothing.

What is shown is the supervisor's own work: order of start and stop, readiness, restarts, what it tells others.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from infra.config import Settings, load_settings
from infra.servers import guard
from infra.servers.errors import ServerDiedError
from infra.servers.processes import ChildProcess, spawn
from infra.storage.errors import UnavailableStorageError
from scripts import outside, servers, up
from scripts.cli.system import System
from scripts.outside import SilentServerError, wait_until_reachable
from scripts.parts import Parts, first_to_end
from scripts.servers import Pauses
from scripts.up import Addresses, StartFailedError, supervise

SLEEP = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(300)"]

HEALTHY = """
import http.server, sys
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *arguments): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Ready).serve_forever()
"""


@dataclass
class World:
    """What the stand-ins share with the test. `events` is the order in which things happened."""

    directory: Path
    events: list[str] = field(default_factory=list)
    profile: str = "local"
    addresses: dict[str, list[str]] = field(
        default_factory=lambda: {"kafka": ["127.0.0.1:1001"], "cassandra": ["127.0.0.1:3001"]}
    )
    """Of the starts of each server, one after the other; the last stays."""
    worker: list[str] = field(default_factory=lambda: [sys.executable, "-I", "-S", "-c", HEALTHY])
    servers: dict[str, ChildProcess] = field(default_factory=dict)
    core: subprocess.Popen[bytes] | None = None
    broken_starts: int = 0
    ready: list[Addresses] = field(default_factory=list)
    outside: list[StandInOutside] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    """Where the actors of each cluster look for the storage."""

    def parts(self) -> Parts:
        return Parts(
            kafka=lambda settings, progress: None if self.profile == "cluster" else StandInServer(self, "kafka"),
            cassandra=lambda settings, progress: StandInServer(self, "cassandra") if self.profile == "stack" else None,
            outside=lambda settings: self.outside,
            create_tables=self._create_tables,
            declare_topics=self._declare_topics,
            start_cluster=self._start_cluster,
            cluster_core=lambda run: [] if self.core is None else [self.core.pid],
            clear_cluster=lambda run: None if self.core is None else self.core.kill(),
            worker_command=lambda name, directory, port: [*self.worker, str(port)],
        )

    async def _create_tables(self, settings: Settings) -> None:
        self.events.append(f"tables at {settings.storage_url.rpartition('/tables')[1] or settings.storage_url}")

    async def _declare_topics(self, settings: Settings) -> None:
        self.events.append(f"topics at {','.join(settings.kafka.bootstrap_servers)}")

    def _start_cluster(self, settings: Settings) -> StandInCluster:
        self.events.append("ray started")
        self.told.append(settings.storage_url)
        if self.broken_starts:
            self.broken_starts -= 1
            raise RuntimeError("Ray does not start")
        self.core = subprocess.Popen(SLEEP)
        return StandInCluster(self)

    @property
    def runtime(self) -> dict[str, Any]:
        return System.find(self.directory).runtime

    @property
    def worker_setup(self) -> dict[str, Any]:
        setup: dict[str, Any] = json.loads((self.directory / "run" / "settings.json").read_text())
        return setup


class StandInServer:
    def __init__(self, world: World, name: str) -> None:
        self._world = world
        self._name = name
        self.address = ""

    @property
    def pid(self) -> int | None:
        server = self._world.servers.get(self._name)
        return None if server is None or server.exit_code is not None else server.pid

    def choose_ports(self) -> None:
        self.address = self._world.addresses[self._name][0]

    async def start(self) -> str:
        world = self._world
        addresses = world.addresses[self._name]
        self.address = addresses.pop(0) if len(addresses) > 1 else addresses[0]
        world.servers[self._name] = spawn(SLEEP)
        world.events.append(f"{self._name} started")
        return self.address

    async def wait(self) -> int:
        return await self._world.servers[self._name].wait()

    async def stop(self) -> None:
        if self._name in self._world.servers:
            await self._world.servers[self._name].stop(grace_s=5)
        self._world.events.append(f"{self._name} stopped")


@dataclass
class StandInOutside:
    """A server of somebody else's. `error` is what asking it comes to, for the first `times` questions or for ever."""

    kind: str
    name: str
    error: Exception | None = None
    times: int = -1
    address: str = "somewhere"
    closed: bool = False

    async def ask(self) -> None:
        if self.error is not None and self.times:
            self.times -= 1
            raise self.error

    async def close(self) -> None:
        self.closed = True


class StandInCluster:
    address = "127.0.0.1:2001"
    dashboard_url = "127.0.0.1:2002"

    def __init__(self, world: World) -> None:
        self._world = world

    async def health(self, timeout_s: float = 5.0) -> dict[str, Any]:
        return {"orders-0": object()}

    def stop(self) -> None:
        core = self._world.core
        assert core is not None
        core.kill()
        core.wait()
        self._world.events.append("ray stopped")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    for name in (guard.MARK, *up.RAY_DEFAULTS):  # What a supervisor sets for its children goes with the test.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(servers, "PAUSES_S", (0.05, 0.2))
    monkeypatch.setattr(up, "HEALTH_EVERY_S", 0.05)
    return World(tmp_path / "data")


@pytest_asyncio.fixture(autouse=True)
async def signals_as_before() -> AsyncIterator[None]:
    """A supervisor listens to them until its process ends; here that is the one that runs the tests."""
    before = {number: signal.getsignal(number) for number in up.SIGNALS}
    yield
    for number, handler in before.items():
        asyncio.get_running_loop().remove_signal_handler(number)
        signal.signal(number, handler)


def settings_of(world: World) -> Settings:
    outside = (
        {}
        if world.profile != "cluster"
        else {
            "kafka": {"bootstrap_servers": "kafka.example:9092"},
            "storage": {"url": "cassandra://cassandra.example/"},
        }
    )
    return load_settings(
        data_dir=world.directory,
        environment={},
        profile=world.profile,
        http_port=0,
        dashboard_port=0,
        workers=2,
        **outside,
    )


@asynccontextmanager
async def running(world: World) -> AsyncIterator[asyncio.Task[None]]:
    """A supervised system that is ready; told to stop at the end, if it has not been."""
    is_ready = asyncio.Event()

    def on_ready(addresses: Addresses) -> None:
        world.ready.append(addresses)
        is_ready.set()

    task = asyncio.create_task(supervise(settings_of(world), on_ready=on_ready, parts=world.parts()))
    waiting = asyncio.create_task(is_ready.wait())
    try:
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
        yield task
    finally:
        waiting.cancel()
        if not task.done():
            os.kill(os.getpid(), signal.SIGTERM)
            await task


async def eventually(holds: Callable[[], bool], *, within_s: float = 30) -> None:
    async with asyncio.timeout(within_s):
        while not holds():  # noqa: ASYNC110 - other processes set no event
            await asyncio.sleep(0.02)


async def is_ready(world: World) -> tuple[int, dict[str, Any]]:
    async with aiohttp.ClientSession() as session, session.get(f"{world.ready[-1].http}/readyz") as response:
        return response.status, await response.json()


async def until_ready(world: World) -> None:
    async with asyncio.timeout(30):
        while (await is_ready(world))[0] != 200:  # noqa: ASYNC110 - what a prober does
            await asyncio.sleep(0.02)


async def killed_and_back(world: World, kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill a server, look at the system while it is down, and wait until it is whole. `kind` is where that is told."""
    start, may_start = StandInServer.start, asyncio.Event()

    async def start_later(server: StandInServer) -> str:
        await may_start.wait()
        return await start(server)

    monkeypatch.setattr(StandInServer, "start", start_later)
    world.servers[name].kill()
    await world.servers[name].wait()
    status, state = await is_ready(world)
    assert (status, state[kind][name] in ("down", "starting")) == (503, True)

    may_start.set()
    await until_ready(world)
    assert world.events.count(f"{name} started") == 2


def marked_children() -> list[int]:
    return guard.marked(os.environ[guard.MARK])


async def test_it_is_ready_only_when_everything_is_and_tells_where(world: World) -> None:
    async with running(world):
        [addresses] = world.ready
        assert addresses.ready_line() == {
            "ready": True,
            "bootstrap_servers": "127.0.0.1:1001",
            "http": addresses.http,
            "dashboard": "http://127.0.0.1:2002",
        }
        assert world.runtime.items() >= addresses.ready_line().items()
        assert (world.runtime["running"], world.runtime["pid"]) == (True, os.getpid())
        assert System.find(world.directory).running
        assert world.worker_setup["bootstrap_servers"] == "127.0.0.1:1001"
        assert world.worker_setup["ray_address"] == "127.0.0.1:2001"
        assert await is_ready(world) == (
            200,
            {
                "ready": True,
                "kafka": {"kafka": "ready"},
                "storage": {"sqlite": "ready"},
                "actors": {"orders-0": "ready"},
                "workers": {"worker-0": "ready", "worker-1": "ready"},
            },
        )


async def test_a_clean_stop_ends_workers_then_ray_then_kafka_and_leaves_nothing(world: World) -> None:
    async with running(world):
        assert len(marked_children()) == 4  # Kafka, Ray's core, two workers

    assert world.events[-2:] == ["ray stopped", "kafka stopped"]
    assert marked_children() == []
    assert (world.runtime["ready"], world.runtime["running"], world.runtime["pid"]) == (False, False, None)
    assert not System.find(world.directory).running


async def test_a_worker_that_dies_is_started_again(world: World) -> None:
    async with running(world):
        before = set(marked_children())
        workers = before - {world.servers["kafka"].pid, world.core.pid}  # type: ignore[union-attr]
        victim = min(workers)
        os.kill(victim, signal.SIGKILL)
        await eventually(lambda: len(set(marked_children()) - before) == 1)
        await until_ready(world)

        assert victim not in marked_children()


async def test_kafka_that_dies_is_started_again_and_the_system_is_not_ready_meanwhile(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(world):
        await killed_and_back(world, "kafka", "kafka", monkeypatch)

        assert len(world.ready) == 1
        assert world.runtime["bootstrap_servers"] == "127.0.0.1:1001"


async def test_kafka_on_another_port_is_told_to_everybody(world: World) -> None:
    world.addresses["kafka"] = ["127.0.0.1:1001", "127.0.0.1:1002"]
    async with running(world):
        before = set(marked_children())
        world.servers["kafka"].kill()
        await eventually(lambda: world.runtime["bootstrap_servers"] == "127.0.0.1:1002")
        assert world.worker_setup["bootstrap_servers"] == "127.0.0.1:1002"
        # Kafka and both workers are other processes; Ray is the same.
        await eventually(lambda: len(set(marked_children()) - before) == 3)
        await until_ready(world)


async def test_when_ray_itself_dies_it_is_started_anew_with_new_workers(world: World) -> None:
    async with running(world):
        before = set(marked_children())
        first = world.core
        assert first is not None
        first.kill()
        first.wait()
        await eventually(lambda: world.core is not first and len(set(marked_children()) - before) == 3)
        await until_ready(world)

        assert world.servers["kafka"].pid in before
        assert world.events.count("kafka started") == 1


async def test_ray_that_does_not_start_the_first_time_is_tried_again(world: World) -> None:
    world.broken_starts = up.RAY_STARTS - 1

    async with running(world):
        assert world.events.count("ray started") == up.RAY_STARTS


async def test_what_keeps_rays_processes_small_is_set_unless_the_user_has_set_it_otherwise(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, *others = up.RAY_DEFAULTS
    for name in up.RAY_DEFAULTS:
        monkeypatch.setenv(name, "7")
    for name in others:
        monkeypatch.delenv(name)

    async with running(world):
        assert {name: os.environ[name] for name in up.RAY_DEFAULTS} == {**up.RAY_DEFAULTS, chosen: "7"}


async def test_a_start_without_ray_fails_and_takes_kafka_back(world: World) -> None:
    world.broken_starts = up.RAY_STARTS

    with pytest.raises(RuntimeError, match="Ray does not start"):
        async with running(world):
            raise AssertionError("became ready")

    assert world.events[-1] == "kafka stopped"
    assert marked_children() == []
    assert world.runtime == {}


async def test_a_start_without_kafka_fails_and_takes_ray_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(server: StandInServer) -> str:
        raise ServerDiedError("Kafka ended.", remedy="See its log.")

    monkeypatch.setattr(StandInServer, "start", refuse)

    with pytest.raises(ServerDiedError):
        async with running(world):
            raise AssertionError("became ready")

    assert "ray stopped" in world.events
    assert marked_children() == []


async def test_workers_that_cannot_live_make_the_start_fail_with_the_place_of_their_log(world: World) -> None:
    world.worker = [sys.executable, "-I", "-S", "-c", "raise SystemExit('no luck')"]

    with pytest.raises(StartFailedError) as caught:
        async with running(world):
            raise AssertionError("became ready")

    [log] = re.findall(r"logs/worker-\d\.log", str(caught.value))
    assert "no luck" in (world.directory / log).read_text()
    assert marked_children() == []


async def test_a_stop_during_the_start_takes_back_what_has_started(world: World) -> None:
    world.worker = SLEEP  # never answers, so the system never becomes ready
    task = asyncio.create_task(
        supervise(settings_of(world), on_ready=lambda addresses: world.ready.append(addresses), parts=world.parts())
    )
    await eventually(lambda: guard.MARK in os.environ and len(marked_children()) == 4)

    os.kill(os.getpid(), signal.SIGTERM)
    await task

    assert world.ready == []
    assert marked_children() == []


async def test_a_second_start_goes_on_in_the_same_directory(world: World) -> None:
    async with running(world):
        pass
    async with running(world):
        assert System.find(world.directory).running

    assert len(world.ready) == 2


async def test_tables_of_sqlite_are_there_before_anything_is_started(world: World) -> None:
    async with running(world):
        assert world.events[0] == "tables at /tables"


async def test_the_stack_is_kafka_cassandra_and_ray_and_its_tables_are_made_when_cassandra_serves(world: World) -> None:
    world.profile = "stack"
    async with running(world):
        assert len(marked_children()) == 5  # two servers, Ray's core, two workers
        assert world.events.index("cassandra started") < world.events.index("tables at cassandra://127.0.0.1:3001/")
        assert (await is_ready(world))[1]["storage"] == {"cassandra": "ready"}
        assert world.told == ["cassandra://127.0.0.1:3001/"]
        assert world.runtime["storage"] == "cassandra://127.0.0.1:3001/"
        assert world.worker_setup["settings"]["storage"]["url"] == "cassandra://127.0.0.1:3001/"
        assert System.find(world.directory).settings.storage_url == "cassandra://127.0.0.1:3001/"

    assert world.events[-3] == "ray stopped"
    assert set(world.events[-2:]) == {"kafka stopped", "cassandra stopped"}
    assert marked_children() == []


async def test_cassandra_that_dies_is_started_again_and_the_system_is_not_ready_meanwhile(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.profile = "stack"
    async with running(world):
        await killed_and_back(world, "storage", "cassandra", monkeypatch)

        assert world.events.count("ray started") == 1


async def test_cassandra_at_another_port_means_another_ray_whose_actors_know_it(world: World) -> None:
    world.profile = "stack"
    world.addresses["cassandra"] = ["127.0.0.1:3001", "127.0.0.1:3002"]
    async with running(world):
        world.servers["cassandra"].kill()
        await eventually(lambda: world.told[-1] == "cassandra://127.0.0.1:3002/")
        await eventually(lambda: world.runtime["storage"] == "cassandra://127.0.0.1:3002/")
        await until_ready(world)


async def test_a_port_that_cassandra_did_not_get_is_told_to_actors_before_the_system_is_ready(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.profile = "stack"
    world.addresses["cassandra"] = ["127.0.0.1:3002"]
    start = StandInServer.start

    async def start_late(server: StandInServer) -> str:
        while not world.told:  # noqa: ASYNC110 - Ray is told in another thread
            await asyncio.sleep(0.01)
        return await start(server)

    monkeypatch.setattr(StandInServer, "choose_ports", lambda server: setattr(server, "address", "127.0.0.1:3001"))
    monkeypatch.setattr(StandInServer, "start", start_late)

    async with running(world):
        assert world.told == ["cassandra://127.0.0.1:3001/", "cassandra://127.0.0.1:3002/"]


async def test_servers_of_others_are_used_where_they_are_and_left_alone(world: World) -> None:
    world.profile = "cluster"
    world.outside = [StandInOutside("kafka", "kafka"), StandInOutside("storage", "cassandra")]
    async with running(world):
        assert len(marked_children()) == 3  # Ray's core, two workers
        assert world.runtime["bootstrap_servers"] == "kafka.example:9092"
        assert world.told == ["cassandra://cassandra.example/"]
        assert "topics at kafka.example:9092" in world.events

    assert not any(event.startswith(("kafka", "cassandra")) for event in world.events)
    assert all(server.closed for server in world.outside)


async def test_a_server_of_others_that_stops_answering_makes_the_system_unready_until_it_answers(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(up, "OUTSIDE_EVERY_S", 0.02)
    world.profile = "cluster"
    storage = StandInOutside("storage", "cassandra")
    world.outside = [StandInOutside("kafka", "kafka"), storage]
    async with running(world):
        storage.error = UnavailableStorageError("it is down", remedy="start it")
        async with asyncio.timeout(30):
            while (state := await is_ready(world))[0] == 200:  # noqa: ASYNC110 - what a prober does
                await asyncio.sleep(0.02)
        assert state[1]["storage"] == {"cassandra": "UnavailableStorageError"}
        assert state[1]["kafka"] == {"kafka": "ready"}

        storage.error = None
        await until_ready(world)


async def test_a_server_of_others_is_waited_for_and_people_are_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside, "ASK_AGAIN_S", 0.0)
    late = StandInOutside("kafka", "kafka", UnavailableStorageError("nobody is there", remedy="start it"), times=3)
    said: list[str] = []

    await wait_until_reachable([late], said.append)

    assert said == ["Waiting for kafka at somewhere, at most 60 s: nobody is there"]


@pytest.mark.parametrize(
    ("error", "raised"),
    [(UnavailableStorageError("nobody is there", remedy="start it"), UnavailableStorageError),
     (TimeoutError(), SilentServerError)],
)  # fmt: skip
async def test_a_start_without_a_server_of_others_fails_with_the_reason_and_starts_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch, error: Exception, raised: type[Exception]
) -> None:
    monkeypatch.setattr(outside, "ASK_AGAIN_S", 0.0)
    monkeypatch.setattr(outside, "REACHED_WITHIN_S", 0.0)
    world.profile = "cluster"
    world.outside = [StandInOutside("storage", "cassandra", error)]

    with pytest.raises(ExceptionGroup) as caught:
        async with running(world):
            raise AssertionError("became ready")

    assert [type(each) for each in caught.value.exceptions] == [raised]
    assert world.events == []
    assert [server.closed for server in world.outside] == [True]


def test_pauses_grow_and_begin_again_after_a_steady_time() -> None:
    now_s = [0.0]
    pauses = Pauses(lambda: now_s[0])
    found = []
    for _ in range(6):
        found.append(pauses.next())
        now_s[0] += found[-1]

    assert found == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0]
    now_s[0] += 11
    assert pauses.next() == 0.5


async def test_the_first_process_to_end_is_noticed_whoever_is_its_parent() -> None:
    processes = [subprocess.Popen(SLEEP) for _ in range(2)]  # noqa: ASYNC220
    try:
        waiting = asyncio.create_task(first_to_end([process.pid for process in processes]))
        await asyncio.sleep(0)
        assert not waiting.done()
        processes[1].kill()
        async with asyncio.timeout(10):
            await waiting
        processes[1].wait()
        async with asyncio.timeout(10):
            await first_to_end([processes[1].pid])  # one that is gone already
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                process.kill()
            process.wait()
