"""The runtime port: how to reach an actor by name, whatever it runs on.

`local_runtime.py` keeps actors in this process (tests, simulation), `ray_runtime.py` puts them on Ray.
A batch crosses this boundary, never one item: `Mailroom` gathers what is said to one actor in one turn of the loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from schemas.partitioning import shard_of, slot


class ActorLostError(Exception):
    """The actor died or cannot be reached: what it did with the items is unknown."""


class ActorBusyError(ActorLostError):
    """The actor takes nothing more now, and has done nothing with the items: ask again later.

    It is full, because what it waits for (storage, mostly) holds up what it has; or it is being emptied for a restart.
    """


class ActorSilentError(ActorLostError):
    """The actor gives no sign of life: it is paused, or this process does not reach it."""


class Runtime(Protocol):
    async def ask(self, actor: str, method: str, items: Sequence[Any]) -> list[Any]:
        """One reply for each item, in order. Raises ActorLostError; the items may have been worked on."""


@dataclass(frozen=True)
class Placement:
    """Which actor owns a routing key: `shards` of each domain own ranges of `buckets`."""

    buckets: int
    shards: dict[str, int]
    coordinators: int = 1

    def bucket(self, routing_key: str | bytes) -> int:
        return slot(routing_key, self.buckets)

    def actor_of(self, domain: str, routing_key: str | bytes) -> str:
        shard = shard_of(self.bucket(routing_key), buckets=self.buckets, shards=self.shards[domain])
        return actor_name(domain, shard)

    def buckets_of(self, domain: str, shard: int) -> list[int]:
        shards = self.shards[domain]
        return [b for b in range(self.buckets) if shard_of(b, buckets=self.buckets, shards=shards) == shard]

    def coordinator_of(self, home: str) -> str:
        return actor_name("coordinator", slot(home, self.coordinators))

    def actors(self) -> list[str]:
        """Every actor of the system, coordinators first."""
        names = [actor_name("coordinator", number) for number in range(self.coordinators)]
        return names + [actor_name(domain, shard) for domain, count in self.shards.items() for shard in range(count)]


def actor_name(kind: str, number: int) -> str:
    """The name that operators see in the Ray dashboard: `orders-0`."""
    return f"{kind}-{number}"


class Mailroom:
    """Gathers what is asked of one actor's method in one turn of the loop into one message.

    At most `in_flight` messages to one (actor, method) are under way; what is asked meanwhile waits and travels
    together, so that a slow receiver makes batches larger and not queues longer.
    """

    def __init__(self, runtime: Runtime, *, in_flight: int = 1, max_items: int = 256) -> None:
        self._runtime = runtime
        self._in_flight = in_flight
        self._max_items = max_items
        self._waiting: dict[tuple[str, str], list[tuple[Any, asyncio.Future[Any]]]] = {}
        self._under_way: dict[tuple[str, str], int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def close(self) -> None:
        """Send nothing any more: what a crash does to a process's letters (local runtime only)."""
        self._closed = True
        for address in list(self._waiting):
            self._dispatch(address)

    async def ask(self, actor: str, method: str, item: Any) -> Any:
        """The reply to one item. Raises ActorLostError."""
        return await self.post(actor, method, item)

    async def ask_alone(self, actor: str, method: str, item: Any) -> Any:
        """Like `ask`, in a message of its own: for what may wait long and must not make others wait."""
        if self._closed:
            raise ActorLostError(actor)
        (reply,) = await self._runtime.ask(actor, method, [item])
        return reply

    def post(self, actor: str, method: str, item: Any) -> asyncio.Future[Any]:
        """Like `ask`, without waiting: items posted to one actor's method are sent in the order of posting."""
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[Any] = loop.create_future()
        address = (actor, method)
        if self._closed:
            _fail(reply, ActorLostError(actor))
            return reply
        queue = self._waiting.setdefault(address, [])
        queue.append((item, reply))
        if len(queue) == 1:
            loop.call_soon(self._dispatch, address)
        return reply

    def _dispatch(self, address: tuple[str, str]) -> None:
        queue = self._waiting.get(address)
        if self._closed:
            for _, reply in self._waiting.pop(address, ()):
                _fail(reply, ActorLostError(address[0]))
            return
        while queue and self._under_way.get(address, 0) < self._in_flight:
            batch, rest = queue[: self._max_items], queue[self._max_items :]
            self._waiting[address] = queue = rest
            self._under_way[address] = self._under_way.get(address, 0) + 1
            task = asyncio.ensure_future(self._deliver(address, batch))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _deliver(self, address: tuple[str, str], batch: list[tuple[Any, asyncio.Future[Any]]]) -> None:
        try:
            replies = await self._runtime.ask(*address, [item for item, _ in batch])
            assert len(replies) == len(batch), f"{address} answered {len(replies)} of {len(batch)} items"
            for (_, future), reply in zip(batch, replies, strict=True):
                if not future.done():
                    future.set_result(reply)
        except BaseException as error:
            answer = error if isinstance(error, Exception) else ActorLostError(f"{address[0]}: {error!r}")
            for _, future in batch:
                _fail(future, answer)
            if not isinstance(error, Exception):
                raise
        finally:
            self._under_way[address] -= 1
            self._dispatch(address)


def _fail(reply: asyncio.Future[Any], error: Exception) -> None:
    if not reply.done():
        reply.set_exception(error)
        reply.exception()  # whoever asked may have gone; that is no news for the log
