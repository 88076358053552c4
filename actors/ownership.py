"""Who may work on a record right now: wound-wait, so that commands on hot keys queue instead of colliding.

A command owns every key that it reads or writes until its transaction is decided. Each has an age, kept through all
its attempts. An older command that meets a younger owner wounds it, after a moment's patience: the younger starts
again and queues behind. A younger one waits for an older owner. Waits that last go from young to old only, so no cycle
lasts; and an owner that is already prepared is waited for, whatever its age, since it waits for nobody.

Ownership is about speed and fairness. Correctness rests on the conditions of prepare alone: an actor that forgot,
or a second actor for the same keys, loses its condition there.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from actors.messages import Age


class WoundedError(Exception):
    """An older command took a key: this attempt is over, the next one keeps its age."""


@dataclass(eq=False)
class Owner:
    """One transaction's claim. `prepared` makes it immune; `wound` is called when it loses everything."""

    age: Age
    wound: Callable[[], None]
    prepared: bool = False
    wounded: bool = False
    keys: set[Hashable] = field(default_factory=set)
    waiting: set[asyncio.Future[None]] = field(default_factory=set)


class Ownership:
    """`patience_s` is how long an older command waits for a younger owner before it wounds it. Most owners are about
    to be done, and wounding throws their work away; only a deadlock needs it. The wait bounds how long one lasts."""

    def __init__(self, *, patience_s: float = 0.1) -> None:
        self._patience_s = patience_s
        self._owners: dict[Hashable, Owner] = {}
        self._queues: dict[Hashable, list[tuple[Age, int, Owner, asyncio.Future[None]]]] = {}
        self._order = itertools.count()

    async def acquire(self, key: Hashable, claimant: Owner) -> None:
        """Own `key` when this returns. Raises WoundedError if the claimant was wounded, before or while waiting."""
        if claimant.wounded:
            raise WoundedError
        owner = self._owners.get(key)
        if owner is claimant:
            return
        if owner is None:
            self._own(key, claimant)
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._queues.setdefault(key, []), (claimant.age, next(self._order), claimant, turn))
        claimant.waiting.add(turn)
        try:
            while not turn.done():
                await asyncio.wait((turn,), timeout=self._patience_s)
                owner = self._owners.get(key)
                if not turn.done() and owner is not None and claimant.age < owner.age and not owner.prepared:
                    self._wound(owner)  # the key goes to the oldest that waits, which may be another than this one
            turn.result()
        finally:
            claimant.waiting.discard(turn)

    def release(self, owner: Owner) -> None:
        """Give up everything that `owner` has or waits for."""
        for turn in list(owner.waiting):
            if not turn.done():
                turn.set_exception(WoundedError())
        keys, owner.keys = owner.keys, set()
        for key in keys:
            del self._owners[key]
            self._hand_over(key)

    @property
    def owned(self) -> int:
        return len(self._owners)

    def _wound(self, owner: Owner) -> None:
        owner.wounded = True
        owner.wound()
        self.release(owner)

    def _own(self, key: Hashable, owner: Owner) -> None:
        self._owners[key] = owner
        owner.keys.add(key)

    def _hand_over(self, key: Hashable) -> None:
        queue = self._queues.get(key)
        while queue:
            _, _, claimant, turn = heapq.heappop(queue)
            if not turn.done() and not claimant.wounded:
                self._own(key, claimant)
                turn.set_result(None)
                break
        if not queue:
            self._queues.pop(key, None)
