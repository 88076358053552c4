"""The pause around a copy: all actors or none, and nothing is kept of a copy whose pause did not hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from actors.pausing import PauseRequest, Pausing
from actors.runtime import ActorLostError
from scripts.backup.pausing import PauseFailedError, paused

ACTORS = ("orders-0", "payment-0")


class Actors:
    """Only the gates of actors. Those in `lost` do not answer."""

    def __init__(self) -> None:
        self.gates = {name: Pausing(name) for name in ACTORS}
        self.lost: set[str] = set()

    async def ask(self, actor: str, method: str, items: Sequence[Any]) -> list[Any]:
        if actor in self.lost:
            raise ActorLostError(actor)
        gate = self.gates[actor]
        if method == "pause":
            return [await gate.pause(item) for item in items]
        return [{"renew_pause": gate.renew, "resume": gate.resume}[method](item) for item in items]

    async def all_open(self) -> bool:
        """Whether every actor could be paused by another name now, which it cannot while a pause holds."""
        return all([await gate.pause(PauseRequest("another", 60, 1)) for gate in self.gates.values()])


async def test_every_actor_is_paused_during_the_copy_and_open_afterwards() -> None:
    actors = Actors()

    async with paused(actors, ACTORS, within_s=1):
        assert not await actors.all_open()

    assert await actors.all_open()


async def test_when_one_actor_does_not_pause_the_others_are_let_go_and_nothing_is_copied() -> None:
    actors = Actors()
    actors.lost = {"payment-0"}
    copied = False

    with pytest.raises(PauseFailedError, match="payment-0"):
        async with paused(actors, ACTORS, within_s=1):
            copied = True

    assert not copied
    assert await actors.all_open()


async def test_a_copy_that_fails_lets_the_actors_go() -> None:
    actors = Actors()

    with pytest.raises(ZeroDivisionError):
        async with paused(actors, ACTORS, within_s=1):
            raise ZeroDivisionError

    assert await actors.all_open()


async def test_an_actor_that_was_restarted_during_the_copy_makes_it_worthless() -> None:
    actors = Actors()

    with pytest.raises(PauseFailedError, match="did not hold at orders-0"):
        async with paused(actors, ACTORS, within_s=1):
            actors.gates["orders-0"] = Pausing("orders-0")

    assert await actors.all_open()
