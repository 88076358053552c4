"""The simulated event loop: virtual time, processes that die and pause, and no order but the seed's."""

from __future__ import annotations

import asyncio
import random

import pytest

from scripts.proof.simulation.loop import Process, SimulatedClock, SimulatedLoop, StuckError


def make_loop(*, seed: int = 1, shuffled: bool = False) -> SimulatedLoop:
    return SimulatedLoop(random.Random(seed), shuffled=shuffled)


def make_process(loop: SimulatedLoop, number: int = 1) -> Process:
    return Process(number, 0, SimulatedClock(loop, number))


def test_an_hour_passes_at_once() -> None:
    loop = make_loop()
    process = make_process(loop)

    task = loop.start(process, asyncio.sleep(3_600))
    loop.run_until(task.done)

    assert loop.time() == 3_600
    assert process.clock.monotonic_s() == 3_600


def test_a_dead_process_does_nothing_more() -> None:
    loop = make_loop()
    process = make_process(loop)
    done: list[str] = []

    async def work() -> None:
        await asyncio.sleep(1)
        done.append("before")
        await asyncio.sleep(1)
        done.append("after")

    loop.start(process, work())
    loop.deliver(1.5, None, lambda: setattr(process, "dead", True))
    other = loop.start(make_process(loop, 2), asyncio.sleep(5))
    loop.run_until(other.done)

    assert done == ["before"]


def test_a_paused_process_goes_on_with_all_it_has_missed() -> None:
    loop = make_loop()
    process = make_process(loop)
    seen_s: list[float] = []

    async def work(seconds: float) -> None:
        await asyncio.sleep(seconds)
        seen_s.append(loop.time())

    tasks = [loop.start(process, work(seconds)) for seconds in (1.0, 2.0)]
    loop.deliver(0.5, None, lambda: setattr(process, "paused", True))
    loop.deliver(9.0, None, loop.resume, process)
    loop.run_until(lambda: all(task.done() for task in tasks))

    assert seen_s == [9.0, 9.0]


def test_the_seed_decides_the_order() -> None:
    def order(seed: int) -> list[int]:
        loop = make_loop(seed=seed, shuffled=True)
        ran: list[int] = []

        async def work(number: int) -> None:
            ran.append(number)

        tasks = [loop.start(make_process(loop), work(number)) for number in range(6)]
        loop.run_until(lambda: all(task.done() for task in tasks))
        return ran

    assert order(7) == order(7)
    assert len({tuple(order(seed)) for seed in range(20)}) > 10


def test_waiting_for_what_never_comes_is_told() -> None:
    loop = make_loop()
    task = loop.start(make_process(loop), asyncio.sleep(1))

    with pytest.raises(StuckError):
        loop.run_until(lambda: False)

    assert task.done()


def test_a_clock_that_is_set_back_leaves_the_monotonic_one_alone() -> None:
    loop = make_loop()
    clock = SimulatedClock(loop, 1)
    before_ms = clock.now_ms()

    clock.wrong_ms = -600_000

    assert clock.now_ms() == before_ms - 600_000
    assert clock.monotonic_s() == 0
