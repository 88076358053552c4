"""A call to an actor may take any time; an actor without a sign of life counts as lost."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import ray

from actors.ray_runtime import RayRuntime
from actors.runtime import ActorBusyError, ActorLostError, ActorSilentError
from streams.asking import Patience, ask_until_answered


class Scripted(RayRuntime):
    """A runtime whose one actor lives as long as `lives` is set and is done when `done` is."""

    def __init__(self) -> None:
        super().__init__(silent_after_s=0.1, asked_every_s=0.02)
        self.lives = asyncio.Event()
        self.done = asyncio.Event()
        self.called: Counter[str] = Counter()

    async def _call(self, actor: str, method: str, items: Sequence[Any]) -> list[Any]:
        self.called[method] += 1
        if method == "lost":
            await asyncio.sleep(0.03)
            raise ActorLostError(actor)
        await (self.lives if method == "health" else self.done).wait()
        return list(items)


async def test_a_call_is_waited_for_as_long_as_its_actor_gives_signs_of_life() -> None:
    runtime = Scripted()
    runtime.lives.set()
    asking = asyncio.ensure_future(runtime.ask("orders-0", "execute", [1]))

    while runtime.called["health"] < 3:  # noqa: ASYNC110 - the runtime itself counts
        await asyncio.sleep(0.01)
    assert not asking.done()
    runtime.done.set()

    assert await asking == [1]


async def test_a_silent_actor_is_lost_to_all_that_wait_for_it_and_is_asked_once_for_all_of_them() -> None:
    runtime = Scripted()

    answers = await asyncio.wait_for(
        asyncio.gather(*(runtime.ask("orders-0", "execute", [n]) for n in range(20)), return_exceptions=True), 5
    )

    assert {type(answer) for answer in answers} == {ActorSilentError}
    assert runtime.called["health"] == 1


async def test_an_actor_that_wakes_is_asked_anew() -> None:
    runtime = Scripted()
    with pytest.raises(ActorSilentError):
        await runtime.ask("orders-0", "execute", [1])
    runtime.lives.set()
    asking = asyncio.ensure_future(runtime.ask("orders-0", "execute", [1]))
    await asyncio.sleep(0.3)  # several times as long as one may be silent: nothing may happen

    assert not asking.done()
    runtime.done.set()
    assert await asking == [1]


async def test_everything_else_goes_on_while_ray_is_asked_for_an_actor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its control service, Ray takes a minute to say that it does not know."""
    asked, says_so, said_so = threading.Event(), threading.Event(), list[bool]()

    def get_actor(name: str, namespace: str) -> None:
        asked.set()
        said_so.append(says_so.wait(10))
        raise ValueError(name)

    monkeypatch.setattr(ray, "get_actor", get_actor)
    asking = asyncio.ensure_future(RayRuntime().ask("orders-0", "execute", [1]))

    await asyncio.to_thread(asked.wait)
    says_so.set()
    with pytest.raises(ActorLostError):
        await asking

    assert said_so == [True], "it was told only when it had stopped asking"


async def test_what_a_call_comes_to_is_told_though_its_actor_was_being_asked_how_it_is() -> None:
    runtime = Scripted()

    with pytest.raises(ActorLostError) as found:
        await runtime.ask("orders-0", "lost", [1])

    assert not isinstance(found.value, ActorSilentError)


@pytest.mark.parametrize(
    ("error", "counts"), [(ActorSilentError, False), (ActorBusyError, True), (ActorLostError, True)]
)
async def test_silence_is_no_progress_for_the_watchdog_and_everything_else_is(
    error: type[ActorLostError], counts: bool
) -> None:
    class Runtime:
        asked = 0

        async def ask(self, actor: str, method: str, items: Sequence[Any]) -> list[Any]:
            self.asked += 1
            if self.asked < 4:
                raise error(actor)
            return list(items)

    tried: list[int] = []
    patience = Patience(pause_s=0.001, longest_pause_s=0.001)

    assert await ask_until_answered(Runtime(), "orders-0", "execute", [1], patience, lambda: tried.append(1)) == [1]
    assert len(tried) == (3 if counts else 0)
