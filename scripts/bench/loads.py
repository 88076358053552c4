"""How work is offered, and what came of it: a number of clients that each wait for an answer, or arrivals by the clock.

    closed   N at a time: the next is asked when one is answered. It finds what a system can do, and flatters its
             latency: what is slow is asked less
    open     at moments that were drawn before (Poisson arrivals, from a seed), whether or not earlier ones are
             answered. Latency counts from the moment at which the work was due, so that neither a client nor a system
             that falls behind hides it (no coordinated omission)

The first seconds warm up: they are asked and not counted. `Meter` is looked at when counting begins and ends.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from scripts.cli.replay import percentile_ms

Ask = Callable[[], Awaitable[str]]
"""Do one piece of work; how it ended."""

Meter = Callable[[], Awaitable[Mapping[str, float]]]
"""Counters as they stand: CPU seconds, statements. What they have grown by is told for each piece of work."""

PERCENTILES = (50, 95, 99)
PATIENCE_S = 180.0
"""How long the answers of an open load that was too much are waited for."""


@dataclass(frozen=True)
class Window:
    """Asked for `warm_up_s`, then counted for `seconds`."""

    warm_up_s: float
    seconds: float

    @property
    def end_s(self) -> float:
        return self.warm_up_s + self.seconds


@dataclass
class Tally:
    """What one load came to, over all its rounds. Latencies in seconds; `grown` is what the meter saw."""

    seconds: float = 0.0
    answered: int = 0
    latencies_s: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    grown: dict[str, float] = field(default_factory=dict)
    sent_late_s: list[float] = field(default_factory=list)

    @property
    def per_s(self) -> float:
        return round(self.answered / self.seconds, 1) if self.seconds else 0.0

    def latency_ms(self) -> dict[str, float | None]:
        return {f"p{percent}": percentile_ms(self.latencies_s, percent) for percent in PERCENTILES}

    def each(self, kind: str, *, scale: float = 1.0, digits: int = 2) -> dict[str, float]:
        """By how much the counters of a kind (`kind/name`) have grown for each answer, the greatest first."""
        found = {
            name.removeprefix(f"{kind}/"): round(amount * scale / max(self.answered, 1), digits)
            for name, amount in sorted(self.grown.items(), key=lambda item: -item[1])
            if name.startswith(f"{kind}/")
        }
        return {name: amount for name, amount in found.items() if amount}

    def total(self, kind: str) -> float:
        return sum(amount for name, amount in self.grown.items() if name.startswith(f"{kind}/"))


def arrivals(rate_per_s: float, until_s: float, seed: int = 1) -> list[float]:
    """Moments in seconds from the start at which independent clients ask, `rate_per_s` of them on average."""
    chance = random.Random(f"arrivals {seed}")
    moments: list[float] = []
    at_s = chance.expovariate(rate_per_s)
    while at_s < until_s:
        moments.append(at_s)
        at_s += chance.expovariate(rate_per_s)
    return moments


async def closed_loop(ask: Ask, in_flight: int, window: Window, tally: Tally, meter: Meter) -> None:
    """Keep `in_flight` going; add to `tally` what was answered within the window."""
    started_s = time.perf_counter()
    counting = (started_s + window.warm_up_s, started_s + window.end_s)

    async def client() -> None:
        while (asked_s := time.perf_counter()) < counting[1]:
            status = await ask()
            _answered(tally, status, asked_s, counting)

    metering = asyncio.create_task(_metered(meter, window, tally))
    await asyncio.gather(*(client() for _ in range(in_flight)))
    await metering


async def open_loop(ask: Ask, due_s: list[float], window: Window, tally: Tally, meter: Meter) -> None:
    """Ask at each moment of `due_s` (see `arrivals`); latencies are those of what was due within the window.

    Returns when all is answered, or PATIENCE_S after the last was asked; what is then left has the status unanswered.
    """
    started_s = time.perf_counter()
    counting = (started_s + window.warm_up_s, started_s + window.end_s)
    metering = asyncio.create_task(_metered(meter, window, tally))

    async def one(due_s: float) -> None:
        counts = due_s >= counting[0]
        if counts:
            tally.sent_late_s.append(time.perf_counter() - due_s)
        try:
            async with asyncio.timeout(window.end_s + PATIENCE_S):
                status = await ask()
        except TimeoutError:
            status = "unanswered"
        now_s = time.perf_counter()
        if counts:
            tally.latencies_s.append(now_s - due_s)
            tally.statuses[status] += 1
        tally.answered += counting[0] <= now_s < counting[1]

    asked: list[asyncio.Task[None]] = []
    for each_s in due_s:
        moment_s = started_s + each_s
        if (early_s := moment_s - time.perf_counter()) > 0:
            await asyncio.sleep(early_s)
        asked.append(asyncio.create_task(one(moment_s)))
    await asyncio.gather(*asked)
    await metering


def _answered(tally: Tally, status: str, asked_s: float, counting: tuple[float, float]) -> None:
    now_s = time.perf_counter()
    if counting[0] <= now_s < counting[1]:
        tally.answered += 1
        tally.latencies_s.append(now_s - asked_s)
        tally.statuses[status] += 1


async def _metered(meter: Meter, window: Window, tally: Tally) -> None:
    await asyncio.sleep(window.warm_up_s)
    before = await meter()
    began_s = time.perf_counter()
    await asyncio.sleep(window.seconds)
    after = await meter()
    # A look takes a moment, in which work goes on: what has grown is brought to the time that was asked for.
    part = window.seconds / (time.perf_counter() - began_s)
    for name, value in after.items():
        tally.grown[name] = tally.grown.get(name, 0.0) + (value - before.get(name, 0.0)) * part
    tally.seconds += window.seconds


def report(tally: Tally) -> dict[str, Any]:
    """A level, for people and programs."""
    told: dict[str, Any] = {
        "orders_per_s": tally.per_s,
        "latency_ms": tally.latency_ms(),
        "statuses": dict(tally.statuses),
        "cores_busy": round(tally.total("cpu_s") / tally.seconds, 2) if tally.seconds else 0.0,
        "cpu_ms_an_order": tally.each("cpu_s", scale=1000),
        "statements_an_order": tally.each("statements"),
    }
    if tally.sent_late_s:
        told["sent_late_ms"] = {"p99": percentile_ms(tally.sent_late_s, 99)}
    return told
