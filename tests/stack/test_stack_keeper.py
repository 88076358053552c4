"""What keeps the servers of `concord stack`, with stand-ins for them: real processes that do nothing."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from infra.config import load_settings
from infra.servers.errors import AlreadyRunningError, ServerDiedError
from infra.servers.processes import ChildProcess, spawn
from scripts import stack
from scripts.cli.stack_command import _described, _running_line
from scripts.cli.system import holder, stack_lock_path, stack_state_path

SLEEP = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(300)"]


class StandIn:
    """One server. `addresses` are those of its starts, one after the other; the last stays."""

    heap_mb = 7

    def __init__(self, *addresses: str) -> None:
        self.addresses = list(addresses)
        self.address = addresses[0]
        self.process: ChildProcess | None = None
        self.broken = False

    @property
    def pid(self) -> int | None:
        return None if self.process is None or self.process.exit_code is not None else self.process.pid

    def choose_ports(self) -> None:
        self.address = self.addresses[0]

    async def start(self) -> str:
        if self.broken:
            raise ServerDiedError("It ended.", remedy="See its log.")
        self.address = self.addresses.pop(0) if len(self.addresses) > 1 else self.addresses[0]
        self.process = spawn(SLEEP)
        return self.address

    async def wait(self) -> int:
        assert self.process is not None
        return await self.process.wait()

    async def stop(self) -> None:
        if self.process is not None:
            await self.process.stop(grace_s=5)


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> dict[str, StandIn]:
    made = {"kafka": StandIn("127.0.0.1:1001"), "cassandra": StandIn("127.0.0.1:2001", "127.0.0.1:2002")}
    monkeypatch.setattr(stack, "local_kafka", lambda settings, progress: made["kafka"])
    monkeypatch.setattr(stack, "local_cassandra", lambda settings, progress: made["cassandra"])
    return made


@asynccontextmanager
async def running(directory: Path) -> AsyncIterator[dict[str, Any]]:
    """The keeper in this process; what it said when its servers served. Told to stop at the end."""
    said: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
    settings = load_settings(data_dir=directory, environment={})
    task = asyncio.create_task(stack.run(settings, on_ready=lambda line: said.set_result(dict(line)), progress=print))
    await asyncio.wait({task, said}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        await task
    try:
        yield said.result()
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        await task


def state(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(stack_state_path(directory).read_text())["servers"]
    return found


async def eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not holds():  # noqa: ASYNC110 - other processes set no event
            await asyncio.sleep(0.02)


async def test_it_says_where_both_serve_and_leaves_nothing_when_told_to_stop(
    tmp_path: Path, servers: dict[str, StandIn]
) -> None:
    async with running(tmp_path) as said:
        assert (said["ready"], said["kafka"], said["cassandra"]) == (True, "127.0.0.1:1001", "127.0.0.1:2001")
        assert said["environment"] == {
            "CONCORD_PROFILE": "cluster",
            "CONCORD_KAFKA__BOOTSTRAP_SERVERS": "127.0.0.1:1001",
            "CONCORD_STORAGE__URL": "cassandra://127.0.0.1:2001/",
        }
        assert holder(tmp_path, lock=stack_lock_path(tmp_path)) == os.getpid()
        assert _running_line(tmp_path) == said
        described = _described(tmp_path, "cassandra")
        assert (described["state"], described["pid"], described["heap_mb"]) == ("ready", servers["cassandra"].pid, 7)
        pids = [server.pid for server in servers.values()]

    assert None not in pids
    assert [server.pid for server in servers.values()] == [None, None]
    assert holder(tmp_path, lock=stack_lock_path(tmp_path)) is None
    assert _running_line(tmp_path) is None
    assert _described(tmp_path, "kafka")["state"] == "stopped"


async def test_the_environment_that_it_prints_is_one_that_the_settings_accept(
    tmp_path: Path, servers: dict[str, StandIn]
) -> None:
    async with running(tmp_path) as said:
        settings = load_settings(data_dir=tmp_path, environment=said["environment"])

    assert settings.profile == "cluster"
    assert settings.kafka.bootstrap_servers == ("127.0.0.1:1001",)
    assert settings.storage_url == "cassandra://127.0.0.1:2001/"


async def test_a_server_that_dies_is_started_again_and_where_it_is_now_is_told(
    tmp_path: Path, servers: dict[str, StandIn]
) -> None:
    async with running(tmp_path):
        killed = servers["cassandra"].pid
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        await eventually(lambda: state(tmp_path)["cassandra"]["pid"] not in (killed, None))

        assert state(tmp_path)["cassandra"]["state"] == "ready"
        assert state(tmp_path)["cassandra"]["address"] == "127.0.0.1:2002"
        assert state(tmp_path)["kafka"]["pid"] == servers["kafka"].pid
        line = _running_line(tmp_path)
        assert line is not None
        assert line["environment"]["CONCORD_STORAGE__URL"] == "cassandra://127.0.0.1:2002/"


async def test_when_one_does_not_start_the_other_is_taken_back(tmp_path: Path, servers: dict[str, StandIn]) -> None:
    servers["cassandra"].broken = True

    with pytest.raises(ServerDiedError):
        async with running(tmp_path):
            raise AssertionError("became ready")

    assert servers["kafka"].pid is None
    assert holder(tmp_path, lock=stack_lock_path(tmp_path)) is None


async def test_a_second_keeper_of_the_same_directory_is_refused(tmp_path: Path, servers: dict[str, StandIn]) -> None:
    async with running(tmp_path):
        with pytest.raises(AlreadyRunningError, match="The servers of `concord stack` are running"):
            await stack.run(load_settings(data_dir=tmp_path, environment={}), on_ready=print, progress=print)
