"""Connections that the asking loop serves: whose loop they belong to, and what becomes of them when it ends."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from infra.storage.cassandra import CassandraStorage
from infra.storage.cassandra_reactor import LoopConnection, LoopTimer
from infra.storage.errors import UnavailableStorageError
from infra.storage.operations import DataType, Key, Put, TableSchema
from scripts.proof.tcp_proxy import TcpProxy

if TYPE_CHECKING:
    from infra.servers.cassandra import LocalCassandra


def in_a_thread(*works: Callable[[], Coroutine[Any, Any, Any]]) -> list[Any]:
    """What the coroutine functions gave, each run in a loop of its own, one after the other, in one other thread."""
    answers: list[Any] = []

    def run() -> None:
        for work in works:
            answers.append(asyncio.run(work()))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    return answers


def test_a_storage_whose_loop_was_closed_connects_again_from_the_next(cassandra: LocalCassandra) -> None:
    storage = CassandraStorage([cassandra.contact_point], cassandra.port)

    async def ask() -> list[str]:
        return await storage.namespaces()

    async def ask_and_close() -> list[str]:
        found = await storage.namespaces()
        await storage.close()
        return found

    first, second = in_a_thread(ask, ask_and_close)
    assert first == second


def test_requests_and_answers_need_no_thread_but_that_of_the_loop(cassandra: LocalCassandra) -> None:
    async def ask() -> set[str]:
        before = set(threading.enumerate())  # Other tests may have let the driver start its own.
        storage = CassandraStorage([cassandra.contact_point], cassandra.port)
        await storage.namespaces()
        started = {thread.name for thread in set(threading.enumerate()) - before}
        await storage.close()
        return started

    (started,) = in_a_thread(ask)
    assert started  # Connecting has threads of its own; there is none that serves the sockets.
    assert not [name for name in started if "event_loop" in name or "libev" in name]


async def test_a_large_request_and_a_large_answer_pass_in_pieces(cassandra_storage: CassandraStorage) -> None:
    table = TableSchema("reactor", "large", {"id": DataType.INT, "value": DataType.TEXT}, ("id",))
    await cassandra_storage.create_table(table)
    values = [chr(ord("a") + number) * 2_000_000 for number in range(6)]
    await asyncio.gather(
        *(cassandra_storage.mutate([Put(table, Key((n,)), {"value": value})]) for n, value in enumerate(values))
    )
    rows = await asyncio.gather(*(cassandra_storage.get(table, Key((n,))) for n in range(6)))
    assert [row["value"] for row in rows if row is not None] == values
    await cassandra_storage.drop_table(table)
    await cassandra_storage.drop_namespace("reactor")


async def test_a_timer_that_was_cancelled_calls_nobody() -> None:
    loop, called = asyncio.get_running_loop(), asyncio.Event()
    cancelled = LoopTimer(loop, 0.0, lambda: called.set())
    cancelled.cancel()
    from_elsewhere = await asyncio.to_thread(lambda: LoopTimer(loop, 0.0, lambda: None))
    from_elsewhere.cancel()
    done = asyncio.Event()
    LoopTimer(loop, 0.001, done.set)
    await done.wait()
    assert not called.is_set()


SILENCE_S = 2.0
"""Longer than a server on a busy machine takes to give a sign of life."""


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that ask for a sign of life often, and are soon given up."""
    monkeypatch.setattr(LoopConnection, "heartbeat_interval_s", 0.1)
    monkeypatch.setattr(LoopConnection, "heartbeat_timeout_s", SILENCE_S)


@pytest.mark.usefixtures("hasty")
def test_a_loop_that_stands_still_or_pauses_loses_no_connection(cassandra: LocalCassandra) -> None:
    storage = CassandraStorage([cassandra.contact_point], cassandra.port)

    async def ask_and_stand_still(awake_s: float) -> list[str]:
        found = await storage.namespaces()
        await asyncio.sleep(awake_s)
        time.sleep(SILENCE_S + 0.3)  # noqa: ASYNC251 - that is the point
        return found

    with asyncio.Runner() as runner:
        first = runner.run(storage.namespaces())
        for awake_s in (0.101, 0.2):  # A heartbeat is under way, or was answered.
            assert runner.run(ask_and_stand_still(awake_s)) == first
        time.sleep(SILENCE_S + 0.3)
        assert runner.run(storage.namespaces()) == first
        runner.run(storage.close())


@pytest.mark.usefixtures("hasty")
async def test_a_server_that_falls_silent_is_noticed_and_reached_again_when_it_is_back(
    cassandra: LocalCassandra,
) -> None:
    async with TcpProxy(cassandra.contact_point, cassandra.port) as proxy:
        storage = CassandraStorage([proxy.host], proxy.port, request_timeout_s=30.0)
        await storage.namespaces()
        proxy.swallow_answers()

        with pytest.raises(UnavailableStorageError):
            async with asyncio.timeout(10):  # sooner than its own time limit
                await storage.namespaces()

        proxy.pass_on()
        async with asyncio.timeout(30):
            while True:
                with suppress(UnavailableStorageError):
                    await storage.namespaces()
                    break
                await asyncio.sleep(0.1)
        await storage.close()


@pytest.mark.usefixtures("hasty")
async def test_heartbeats_take_up_no_room_on_a_connection_that_is_idle(cassandra: LocalCassandra) -> None:
    storage = CassandraStorage([cassandra.contact_point], cassandra.port)
    await storage.namespaces()
    await asyncio.sleep(1.0)  # ten heartbeats

    held = [connection.in_flight for pool in storage_pools(storage) for connection in pool.get_connections()]
    assert held
    assert max(held) <= 1  # one may be under way
    await storage.close()


def storage_pools(storage: CassandraStorage) -> list[Any]:
    session = storage._session._session
    assert session is not None
    return list(session.get_pools())
