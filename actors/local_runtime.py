"""The runtime that keeps every actor in this process: for tests, simulation, and trying a domain without Ray.

Messages are pickled on their way, as on Ray, so that nothing is shared that could not be shared there. An actor that
is killed here is as dead as a process: neither its letters nor its writes reach anybody any more. One that is
`replaced` lives on unseen, as a paused process does, and may still do what it had begun.
"""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from actors.incarnations import Incarnations
from actors.runtime import ActorLostError, Mailroom
from actors.system import Actor, Observer, SystemConfig, actor_names, build_actor
from infra.clock import Clock, SystemClock
from infra.storage.errors import UnavailableStorageError
from infra.storage.forwarding import ForwardingStorage
from infra.storage.operations import CrossPartition, Key, Mutation, Row, Scan, TableSchema, Value
from infra.storage.port import Storage


class LocalRuntime:
    """Starts every actor of `config`, or those of `names`, over one storage. Implements actors.runtime.Runtime."""

    def __init__(
        self,
        config: SystemConfig,
        storage: Storage,
        *,
        clock: Clock | None = None,
        observer: Observer | None = None,
        on_ask: Callable[[str, str, Sequence[Any]], None] | None = None,
        names: Sequence[str] = (),
    ) -> None:
        self.config = config
        self.storage = storage
        self.clock = clock or SystemClock()
        self._names = names or actor_names(config)
        self._observer = observer or Observer()
        self._on_ask = on_ask
        self._living: dict[str, _Living] = {}
        self._replaced: list[_Living] = []

    async def start(self) -> None:
        for name in self._names:
            await self.restart(name)

    async def stop(self) -> None:
        for living in (*self._living.values(), *self._replaced):
            await living.actor.stop()
            living.end()
        self._living.clear()
        self._replaced.clear()

    async def __aenter__(self) -> LocalRuntime:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.stop()

    async def ask(self, actor: str, method: str, items: Sequence[Any]) -> list[Any]:
        living = self._living.get(actor)
        if living is None:
            raise ActorLostError(actor)
        if self._on_ask is not None:
            self._on_ask(actor, method, items)
        call = asyncio.ensure_future(getattr(living.actor, method)(pickle.loads(pickle.dumps(list(items)))))
        living.calls.add(call)
        call.add_done_callback(living.calls.discard)
        await asyncio.wait((call, living.gone), return_when=asyncio.FIRST_COMPLETED)
        if living.gone.done() or call.cancelled():
            call.add_done_callback(_hear_out)
            raise ActorLostError(actor)
        replies: list[Any] = pickle.loads(pickle.dumps(call.result()))
        return replies

    def names(self) -> list[str]:
        """The actors that can be asked now."""
        return list(self._living)

    def actor(self, name: str) -> Any:
        """The actor itself, for a test that must look inside."""
        return self._living[name].actor

    async def kill(self, name: str) -> None:
        """Stop an actor as a crash would: its memory is gone, its callers learn that it is lost."""
        await self._bury(self._living.pop(name))

    async def replace(self, name: str) -> Actor:
        """Start a second actor of a name, as a supervisor does that takes the first for dead; returns the first.

        Whoever asks for the name finds the second, and whoever waits for the first is told that it is lost. The first
        is not told, and still works on what it has begun.
        """
        first = self._living.pop(name)
        first.gone.set_result(None)
        self._replaced.append(first)
        await self.restart(name)
        return first.actor

    async def bury(self, replaced: Actor) -> None:
        """A replaced actor dies now."""
        living = next(living for living in self._replaced if living.actor is replaced)
        self._replaced.remove(living)
        await self._bury(living)

    async def restart(self, name: str) -> None:
        """Start an actor that is not there."""
        lifeline, mailroom = _Lifeline(self.storage), Mailroom(self)
        actor = build_actor(
            name,
            self.config,
            storage=lifeline,
            mailroom=mailroom,
            clock=self.clock,
            observer=self._observer,
            incarnations=_LocalIncarnations(self, lifeline),
        )
        await actor.start()
        self._living[name] = _Living(actor, lifeline, mailroom)

    def runs(self, incarnation: str) -> bool:
        """Whether an actor of this incarnation lives, known or replaced."""
        living = (*self._living.values(), *self._replaced)
        return any(getattr(one.actor, "incarnation", "") == incarnation for one in living)

    async def _bury(self, living: _Living) -> None:
        living.end()
        await asyncio.wait([asyncio.ensure_future(living.actor.stop())], timeout=1)


class _Living:
    """An actor and all by which it reaches others."""

    def __init__(self, actor: Actor, lifeline: _Lifeline, mailroom: Mailroom) -> None:
        self.actor = actor
        self.lifeline = lifeline
        self.mailroom = mailroom
        self.calls: set[asyncio.Task[Any]] = set()
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def end(self) -> None:
        """Cut it off, and end what it was asked to do."""
        self.lifeline.cut = True
        self.mailroom.close()
        if not self.gone.done():
            self.gone.set_result(None)
        for call in list(self.calls):
            call.cancel()


def _hear_out(call: asyncio.Task[Any]) -> None:
    """Nobody wants the answer of a lost actor, nor its errors in the log."""
    if not call.cancelled():
        call.exception()


class _LocalIncarnations(Incarnations):
    """Here actors die and the process lives on, so that the process says nothing about them."""

    def __init__(self, runtime: LocalRuntime, storage: Storage) -> None:
        super().__init__(storage, runtime.clock)
        self._runtime = runtime

    async def known_gone(self, actor: str, incarnation: str) -> bool:
        return not self._runtime.runs(incarnation)


class _Lifeline(ForwardingStorage):
    """One actor's way to the storage. Once it is cut, what a dead actor's tasks still try has no effect."""

    def __init__(self, storage: Storage) -> None:
        super().__init__(storage)
        self.cut = False

    def _check(self) -> None:
        if self.cut:
            raise UnavailableStorageError("the actor is dead")

    async def create_table(self, table: TableSchema) -> None:
        self._check()
        await super().create_table(table)

    async def tables(self) -> list[TableSchema]:
        self._check()
        return await super().tables()

    async def get(self, table: TableSchema, key: Key) -> Row | None:
        self._check()
        return await super().get(table, key)

    async def scan(self, scan: Scan) -> list[Row]:
        self._check()
        return await super().scan(scan)

    async def partitions(self, table: TableSchema) -> list[tuple[Value, ...]]:
        self._check()
        return await super().partitions(table)

    async def pages(self, selection: CrossPartition, page_size: int = 256) -> AsyncIterator[list[Row]]:
        async for page in super().pages(selection, page_size):
            self._check()
            yield page

    async def mutate(self, mutations: Sequence[Mutation]) -> None:
        self._check()
        await super().mutate(mutations)

    async def close(self) -> None:
        """The storage belongs to whoever made it."""
