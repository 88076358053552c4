"""The supervisor asked for more workers, fewer, or a restart of everything: with stand-ins that start at once."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from infra.config import Settings
from infra.servers import guard
from scripts.control import ControlError, ControlServer, ask_supervisor, socket_path
from scripts.parts import Parts
from scripts.rolling import in_turn
from tests.cli.test_supervisor import HEALTHY, StandInCluster, World, eventually, marked_children, running, until_ready

LEAVES = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(7))
"""


class Cluster(StandInCluster):
    """Notes what it is asked for."""

    async def health(self, timeout_s: float = 5.0) -> dict[str, Any]:
        return {"coordinator-0": object(), "orders-0": object(), "views-0": object()}

    async def drain(self, name: str, *, within_s: float) -> bool:
        self._world.events.append(f"{name} drained")
        return name != "views-0"

    async def restart(self, name: str, *, within_s: float) -> None:
        self._world.events.append(f"{name} restarted")


class RollingWorld(World):
    def _start_cluster(self, settings: Settings) -> StandInCluster:
        super()._start_cluster(settings)
        return Cluster(self)

    def parts(self) -> Parts:
        return super().parts()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.delenv(guard.MARK, raising=False)
    made = RollingWorld(tmp_path / "data")
    made.worker = [sys.executable, "-I", "-S", "-c", LEAVES + HEALTHY]
    return made


async def ask(directory: Path, request: Mapping[str, Any]) -> list[dict[str, Any]]:
    return await asyncio.to_thread(lambda: [dict(step) for step in ask_supervisor(directory, request)])


async def workers_of(world: World) -> dict[str, str]:
    from tests.cli.test_supervisor import is_ready

    return dict((await is_ready(world))[1]["workers"])


async def test_workers_come_and_go_as_they_are_asked_for(world: World) -> None:
    async with running(world):
        more = await ask(world.directory, {"do": "workers", "count": 4})
        assert more[:2] == [{"worker": f"worker-{n}", "step": "joined"} for n in (2, 3)]
        assert more[2] == {"workers": ["worker-0", "worker-1", "worker-2", "worker-3"]}
        assert len(marked_children()) == 6

        fewer = await ask(world.directory, {"do": "workers", "count": 1})
        assert fewer[:3] == [{"worker": f"worker-{n}", "step": "left", "exit_code": 7} for n in (1, 2, 3)]
        assert await workers_of(world) == {"worker-0": "ready"}
        await asyncio.sleep(1)  # longer than the pause before a worker is started again: nothing may happen
        assert len(marked_children()) == 3, "a worker that left was started again"

        assert (await ask(world.directory, {"do": "workers", "count": 2}))[-1] == {"workers": ["worker-0", "worker-1"]}
    assert marked_children() == []


async def test_a_system_may_have_no_workers_of_its_own(world: World) -> None:
    async with running(world):
        steps = await ask(world.directory, {"do": "workers", "count": 0})

        assert steps[-1] == {"workers": []}
        await until_ready(world)
        assert await workers_of(world) == {}


async def test_a_restart_takes_workers_then_actors_one_after_the_other_and_coordinators_last(world: World) -> None:
    async with running(world):
        before = set(marked_children())
        steps = await ask(world.directory, {"do": "restart"})

        told = [(step.get("worker") or step["actor"], step.get("exit_code"), step.get("drained")) for step in steps]
        assert told == [
            ("worker-0", 0, None),
            ("worker-1", 0, None),
            ("orders-0", None, True),
            ("views-0", None, False),
            ("coordinator-0", None, True),
        ]
        names = ("orders-0", "views-0", "coordinator-0")
        done = [event for event in world.events if event.startswith(names)]
        assert done == [f"{name} {what}" for name in names for what in ("drained", "restarted")]
        assert len(before & set(marked_children())) == 2, "Kafka and Ray's core alone go on running"


NONSENSE: list[tuple[Any, str]] = [
    ({"do": "workers", "count": -1}, "0 to 256"),
    ({"do": "workers", "count": "3"}, "0 to 256"),
    ({"do": "restart", "parts": ["kafka"]}, "workers, actors"),
    ({"do": "format"}, "workers or restart"),
    ([], "workers or restart"),
]


async def test_what_makes_no_sense_is_refused_and_changes_nothing(world: World) -> None:
    async with running(world):
        before = set(marked_children())
        for request, reason in NONSENSE:
            with pytest.raises(ControlError, match=reason):
                await ask(world.directory, request)

        assert set(marked_children()) == before


async def test_the_socket_is_its_owners_alone_and_gone_after_the_stop(world: World) -> None:
    async with running(world):
        found = socket_path(world.directory).stat()
        assert stat.S_ISSOCK(found.st_mode)
        assert stat.S_IMODE(found.st_mode) == 0o600
    assert not socket_path(world.directory).exists()
    with pytest.raises(OSError, match="No such file"):
        await ask(world.directory, {"do": "restart"})


# --- the socket alone


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """A directory whose path is longer than the name of a socket may be."""
    directory = tmp_path / ("d" * 120)
    directory.mkdir()
    return directory


async def test_one_request_at_a_time_is_carried_out_and_goes_on_when_whoever_asked_is_gone(deep: Path) -> None:
    enough, ended = asyncio.Event(), asyncio.Event()

    async def to_the_end(request: Mapping[str, Any]) -> Any:
        yield {"step": 1}
        await enough.wait()
        yield {"step": 2}
        ended.set()

    server = ControlServer(deep, {"try": to_the_end})
    await server.start()
    try:
        with socket.socket(socket.AF_UNIX) as impatient:
            impatient.setblocking(False)
            descriptor = os.open(deep / "run", os.O_PATH)
            await asyncio.get_running_loop().sock_connect(impatient, f"/proc/self/fd/{descriptor}/control.sock")
            os.close(descriptor)
            await asyncio.get_running_loop().sock_sendall(impatient, json.dumps({"do": "try"}).encode() + b"\n")
            assert json.loads(await asyncio.get_running_loop().sock_recv(impatient, 100)) == {"step": 1}
            with pytest.raises(ControlError, match="busy: try"):
                await ask(deep, {"do": "try"})
        enough.set()
        await asyncio.wait_for(ended.wait(), 30)
        await eventually(lambda: not server._under_way)
        assert await ask(deep, {"do": "try"}) == [{"step": 1}, {"step": 2}]
    finally:
        await server.stop()


async def test_a_supervisor_that_ends_in_the_middle_is_told_from_one_that_is_done(deep: Path) -> None:
    begun = asyncio.Event()

    async def without_end(request: Mapping[str, Any]) -> Any:
        begun.set()
        yield {"step": 1}
        await asyncio.Event().wait()

    server = ControlServer(deep, {"try": without_end})
    await server.start()
    asking = asyncio.ensure_future(ask(deep, {"do": "try"}))
    await begun.wait()
    await server.stop()

    with pytest.raises(ControlError, match="ended before"):
        await asking


def test_coordinators_are_restarted_last() -> None:
    assert in_turn(["coordinator-1", "orders-1", "coordinator-0", "views-0", "orders-0"]) == [
        "orders-0",
        "orders-1",
        "views-0",
        "coordinator-0",
        "coordinator-1",
    ]
