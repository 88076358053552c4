"""The runtime that keeps every actor in this process: for tests, simulation, and trying a domain without Ray.

Messages are pickled on their way, as on Ray, so that nothing is shared that could not be shared there.
"""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable, Sequence
from typing import Any

from actors.runtime import ActorLostError, Mailroom
from actors.system import Actor, Observer, SystemConfig, actor_names, build_actor
from infra.clock import Clock, SystemClock
from infra.storage.port import Storage


class LocalRuntime:
    """Starts every actor of `config` over one storage. Implements actors.runtime.Runtime."""

    def __init__(
        self,
        config: SystemConfig,
        storage: Storage,
        *,
        clock: Clock | None = None,
        observer: Observer | None = None,
        on_ask: Callable[[str, str, Sequence[Any]], None] | None = None,
    ) -> None:
        self.config = config
        self.storage = storage
        self.clock = clock or SystemClock()
        self._observer = observer or Observer()
        self._on_ask = on_ask
        self._actors: dict[str, Actor] = {}
        self._calls: dict[str, set[asyncio.Task[Any]]] = {}

    async def start(self) -> None:
        for name in actor_names(self.config):
            await self.restart(name)

    async def stop(self) -> None:
        for name in list(self._actors):
            await self._actors.pop(name).stop()

    async def __aenter__(self) -> LocalRuntime:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.stop()

    async def ask(self, actor: str, method: str, items: Sequence[Any]) -> list[Any]:
        target = self._actors.get(actor)
        if target is None:
            raise ActorLostError(actor)
        if self._on_ask is not None:
            self._on_ask(actor, method, items)
        call = asyncio.ensure_future(getattr(target, method)(pickle.loads(pickle.dumps(list(items)))))
        self._calls[actor].add(call)
        try:
            replies: list[Any] = pickle.loads(pickle.dumps(await asyncio.shield(call)))
            return replies
        except asyncio.CancelledError:
            if call.cancelled():
                raise ActorLostError(actor) from None
            raise
        finally:
            if call.done():
                self._calls.get(actor, set()).discard(call)

    def actor(self, name: str) -> Any:
        """The actor itself, for a test that must look inside."""
        return self._actors[name]

    async def kill(self, name: str) -> None:
        """Stop an actor as a crash would: its memory is gone, its callers learn that it is lost."""
        actor = self._actors.pop(name)
        mailroom: Mailroom = actor._mailroom  # type: ignore[attr-defined]
        mailroom.close()
        for call in self._calls.pop(name):
            call.cancel()
        stopped = asyncio.ensure_future(actor.stop())
        await asyncio.wait([stopped], timeout=1)

    async def restart(self, name: str) -> None:
        """Start an actor that is not there."""
        actor = build_actor(
            name,
            self.config,
            storage=self.storage,
            mailroom=Mailroom(self),
            clock=self.clock,
            observer=self._observer,
        )
        await actor.start()
        self._calls[name] = set()
        self._actors[name] = actor
