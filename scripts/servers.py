"""The servers that run on this machine for us, and how one is kept alive: for `concord up` and for `concord stack`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Protocol

import structlog

from infra.config import Settings
from infra.servers.cassandra import LocalCassandra
from infra.servers.kafka import LocalKafka

log = structlog.get_logger()

Progress = Callable[[str], None]

PAUSES_S = (0.5, 8.0)
"""The first and the longest pause before a part that ended is started again; doubled from one to the other."""

STEADY_AFTER_S = 10.0
"""A part that lived so long before it ended begins with the first pause again."""

CASSANDRA_SETTING_NAMES = {
    "port": "CONCORD_CASSANDRA__PORT",
    "heap_mb": "CONCORD_CASSANDRA__HEAP_MB",
    "directory": "--data",
}


class Server(Protocol):
    """`infra.servers.local_node.LocalNode`, as far as it is used here."""

    @property
    def address(self) -> str: ...

    @property
    def pid(self) -> int | None: ...

    def choose_ports(self) -> None: ...

    async def start(self) -> str: ...

    async def wait(self) -> int: ...

    async def stop(self) -> None: ...


def local_kafka(settings: Settings, progress: Progress) -> LocalKafka:
    """The Kafka whose data lie in the directory, not started."""
    return LocalKafka(
        settings.data_dir / "kafka",
        port=settings.kafka.port or None,
        heap_mb=settings.kafka.heap_mb,
        progress=progress,
    )


def local_cassandra(settings: Settings, progress: Progress) -> LocalCassandra:
    """The Cassandra whose data lie in the directory, not started."""
    return LocalCassandra(
        settings.data_dir / "cassandra",
        port=settings.cassandra.port or None,
        heap_mb=settings.cassandra.heap_mb,
        progress=progress,
        setting_names=CASSANDRA_SETTING_NAMES,
    )


async def all_of(starts: Iterable[Coroutine[Any, Any, object]]) -> None:
    """Run them side by side. When one fails, or the caller is cancelled, none is left running."""
    starting = [asyncio.ensure_future(start) for start in starts]
    try:
        await asyncio.gather(*starting)
    finally:
        for each in starting:
            each.cancel()
        await asyncio.wait(starting)


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


class KeptServer:
    """A server of ours that is started again whenever it ends, with its port and its data where that can be.

    `on_change` is called when it has ended and when it serves again; `on_move` when it serves at another address than
    before, because another process has taken its port.
    """

    def __init__(
        self,
        name: str,
        server: Server,
        *,
        on_move: Callable[[], None] = lambda: None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.server = server
        self._on_move = on_move
        self._on_change = on_change
        self._state = "down"

    @property
    def address(self) -> str:
        return self.server.address

    @property
    def state(self) -> str:
        """`starting`, `ready` or `down`."""
        return "down" if self._state == "ready" and self.server.pid is None else self._state

    async def start(self) -> None:
        """Start it for the first time. Raises a ServerError."""
        self._state = "starting"
        try:
            await self.server.start()
        except BaseException:
            self._state = "down"
            raise
        self._state = "ready"

    async def keep(self) -> None:
        """Start it again whenever it ends; never returns."""
        pauses = Pauses()
        while True:
            address = self.server.address
            code = await self.server.wait()
            self._state = "down"
            log.error("server_ended", server=self.name, exit_code=code)
            self._on_change()
            while True:
                await asyncio.sleep(pauses.next())
                try:
                    await self.start()
                except Exception as error:
                    log.error("server_does_not_start", server=self.name, error=str(error))
                else:
                    break
            log.warning("server_restarted", server=self.name, address=self.server.address)
            self._on_change()
            if self.server.address != address:
                self._on_move()

    async def stop(self) -> None:
        """Stop it cleanly; nobody may be in `keep` any more."""
        self._state = "down"
        await self.server.stop()


async def until_stopped(work: Coroutine[Any, Any, None], stopping: asyncio.Event) -> None:
    """Do `work` unless a stop is asked for first; raises what it raises."""
    task = asyncio.ensure_future(work)
    stopped = asyncio.ensure_future(stopping.wait())
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
    finally:
        for each in (task, stopped):
            each.cancel()
        await asyncio.wait({task, stopped})
