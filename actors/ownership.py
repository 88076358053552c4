"""Who may work on a record right now: wound-wait, so that commands on hot keys queue instead of colliding.

A command owns every key that it reads or writes until its transaction is decided. Each has an age, kept through all
its attempts, and no two are of one age. An older command that meets a younger owner wounds it, after a moment's
patience: the younger starts again and queues behind. A younger one waits for an older owner. Waits that last go from
young to old only, so no cycle lasts; and an owner that is already prepared is waited for, whatever its age, since it
waits for nobody.

Ownership is about speed and fairness. Correctness rests on the conditions of prepare alone: an actor that forgot,
or a second actor for the same keys, loses its condition there.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Hashable
from dataclasses import dataclass, field

from actors.messages import Age


class WoundedError(Exception):
    """An older command took a key: this attempt is over, the next one keeps its age."""


@dataclass(eq=False)
class Owner:
    """One transaction's claim. `prepared` makes it immune; once `wounded` it has lost everything and gets nothing."""

    age: Age
    prepared: bool = False
    wounded: bool = False
    keys: set[Hashable] = field(default_factory=set)
    waiting: set[asyncio.Future[bool]] = field(default_factory=set)


class Ownership:
    """`patience_s` is how long an older command waits for a younger owner before it wounds it. Most owners are about
    to be done, and wounding throws their work away; only a deadlock needs it. The wait bounds how long one lasts."""

    def __init__(self, *, patience_s: float = 0.1) -> None:
        self._patience_s = patience_s
        self._owners: dict[Hashable, Owner] = {}
        self._queues: dict[Hashable, list[tuple[Age, int, Owner, asyncio.Future[bool]]]] = {}
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
        turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._queues.setdefault(key, []), (claimant.age, next(self._order), claimant, turn))
        claimant.waiting.add(turn)
        try:
            if claimant.age < owner.age:
                # Only the owner met on arrival can be younger: a key is handed to the oldest that waits for it.
                await asyncio.wait((turn,), timeout=self._patience_s)
                if not turn.done() and self._owners.get(key) is owner and not owner.prepared:
                    self.release(owner)
            if not await turn or claimant.wounded:  # It may be wounded after it was given the key, before it wakes.
                raise WoundedError
        finally:
            turn.cancel()  # no key for one that was cancelled while it waited
            claimant.waiting.discard(turn)

    def release(self, owner: Owner) -> None:
        """Give up everything that `owner` has or waits for. It gets nothing any more."""
        owner.wounded = True
        for turn in list(owner.waiting):
            if not turn.done():
                turn.set_result(False)
        keys, owner.keys = owner.keys, set()
        for key in keys:
            del self._owners[key]
            self._hand_over(key)

    @property
    def owned(self) -> int:
        return len(self._owners)

    def _own(self, key: Hashable, owner: Owner) -> None:
        self._owners[key] = owner
        owner.keys.add(key)

    def _hand_over(self, key: Hashable) -> None:
        """Give a free key to the oldest that waits for it."""
        queue = self._queues.get(key, [])
        owner: Owner | None = None
        while queue and owner is None:
            _, _, claimant, turn = heapq.heappop(queue)
            if not turn.done() and not claimant.wounded:
                owner = claimant
                self._own(key, claimant)
                turn.set_result(True)
        if owner is not None and len(owner.waiting) > 1:
            for _, _, claimant, turn in queue:  # it may have asked for this key several times, side by side
                if claimant is owner and not turn.done():
                    turn.set_result(True)
        if not queue:
            self._queues.pop(key, None)
