"""A pause of an actor: it begins no command, while whatever has begun goes on to its end.

    asked to pause ─► no further command begins ─► those that have begun end ─► "drained" ─► … ─► resumed, or lapsed

What a backup copies must not contain half of a transaction, and a transaction lies in several tables. With every
domain actor drained no transaction of a command is under way anywhere, whichever stream workers there are and wherever
they run, since each command begins at an actor. Only commands are held up: participants still answer the calls,
prepares and commits of commands that began elsewhere, or two actors would wait for each other; health is answered,
too, so that nobody takes a paused actor for a dead one. Timers are not looked at meanwhile, and the views' actor, whose
transactions are decided in the same state table, applies no events.

A pause is a lease. Whoever asked for it renews it, and if nobody does it lapses, so that a backup that was killed holds
up the system no longer than that. To renew or to end a pause that is over is answered with False: then something may
have happened meanwhile. A restarted actor knows of no pause.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import structlog

log = structlog.get_logger()


@dataclass(frozen=True)
class PauseRequest:
    """Pause for `lease_s` under a name of the asker's. `within_s`: how long what has begun may take to end."""

    name: str
    lease_s: float
    within_s: float


@dataclass(frozen=True)
class PauseRenewal:
    """Keep the pause called `name` for `lease_s` from now."""

    name: str
    lease_s: float


class Pausing:
    """The gate that every command of one actor passes."""

    def __init__(self, actor: str) -> None:
        self._actor = actor
        self._name = ""
        self._open = asyncio.Event()
        self._open.set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._under_way = 0
        self._lapse: asyncio.TimerHandle | None = None

    @property
    def holds(self) -> bool:
        """Whether there is a pause now."""
        return not self._open.is_set()

    @asynccontextmanager
    async def command(self) -> AsyncIterator[None]:
        """Around a command: waits until there is no pause, and holds up the next one."""
        while not self._open.is_set():
            await self._open.wait()
        self._under_way += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()

    async def pause(self, request: PauseRequest) -> bool:
        """Begin a pause; whether it holds and nothing is under way. If not, this actor is not paused by `request`.

        False while a pause of another name holds, and when what has begun takes longer than `within_s`.
        """
        if self._name not in ("", request.name):
            return False
        self._name = request.name
        self._open.clear()
        self._end_in(request.lease_s)
        try:
            async with asyncio.timeout(request.within_s):
                await self._idle.wait()
        except TimeoutError:
            self.resume(request.name)
            return False
        return self._name == request.name

    def renew(self, renewal: PauseRenewal) -> bool:
        """Whether the pause has held all the time; then it goes on."""
        if self._name != renewal.name:
            return False
        self._end_in(renewal.lease_s)
        return True

    def resume(self, name: str) -> bool:
        """End the pause; whether it has held until now."""
        if self._name != name:
            return False
        if self._lapse is not None:
            self._lapse.cancel()
        self._name = ""
        self._open.set()
        return True

    def _end_in(self, lease_s: float) -> None:
        if self._lapse is not None:
            self._lapse.cancel()
        self._lapse = asyncio.get_running_loop().call_later(lease_s, self._lapsed)

    def _lapsed(self) -> None:
        log.warning("the pause has lapsed", actor=self._actor, pause=self._name)
        self.resume(self._name)
