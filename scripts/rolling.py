"""Changes to a running system that its load must not notice: more workers or fewer, and everything restarted in turn.

Theory of operation. Every process of the system may be killed at any instant; that costs repetition, and never a
message. So nothing here is needed for correctness. What it adds is that nobody waits for longer than one process takes:

    a worker comes     the group shares the partitions anew when it joins
    a worker goes      it finishes and acknowledges what it is at, then leaves the group, so that the others take its
                       partitions at once, and not when its session ends
    a worker restarts  it finishes and acknowledges what it is at, and keeps its place in the group (static membership):
                       it finds its partitions as it left them, and nobody else is asked for anything
    an actor restarts  it is drained first: it begins nothing new and finishes what it is at, both as a home of commands
                       and as a participant. Workers and homes are told to ask again, and do so; no command is refused.

One at a time, and the next one only when the one before serves again. Coordinators come last: whatever the others were
still at needs them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

from scripts.control import Request, Step
from scripts.parts import Cluster, Worker

DRAIN_WITHIN_S = 15.0
"""How long an actor may take to finish what it is at before it is restarted all the same."""

SERVES_WITHIN_S = 120.0
"""How long a process that was started may take until it serves."""

MAX_WORKERS = 256


class Crew(Protocol):
    """What of the supervisor is needed here."""

    @property
    def workers(self) -> Sequence[Worker]: ...

    @property
    def cluster(self) -> Cluster:
        """Raises NotServingError while Ray is being started anew."""

    @property
    def actors(self) -> Sequence[str]: ...

    def add_worker(self, number: int) -> Worker:
        """Start worker `number`, and keep it."""

    def remove_worker(self, worker: Worker) -> None:
        """Forget a worker, which has ended."""


class NotServingError(Exception):
    """Something did not come (back) into service in time; the text says what."""


def number_of(worker: Worker) -> int:
    return int(worker.name.rpartition("-")[2])


async def scale(crew: Crew, request: Request) -> AsyncIterator[Step]:
    """Have `count` workers. Steps: each worker that has come or gone, then all that there are."""
    count = request.get("count")
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= MAX_WORKERS:
        raise ValueError(f"A system has 0 to {MAX_WORKERS} workers of its own.")
    workers = sorted(crew.workers, key=number_of)
    going, taken = workers[count:], {number_of(worker) for worker in workers[:count]}
    free = (number for number in range(MAX_WORKERS) if number not in taken)
    coming = [crew.add_worker(next(free)) for _ in range(count - len(workers))]
    for worker, code in zip(going, await asyncio.gather(*(worker.leave() for worker in going)), strict=True):
        crew.remove_worker(worker)
        yield {"worker": worker.name, "step": "left", "exit_code": code}
    for worker in coming:
        await _until(lambda worker=worker: worker.ready, f"{worker.name} (see {worker.log_path})")  # type: ignore[misc]
        yield {"worker": worker.name, "step": "joined"}
    yield {"workers": sorted(worker.name for worker in crew.workers)}


async def restart(crew: Crew, request: Request) -> AsyncIterator[Step]:
    """Restart workers and actors, one after the other. `parts` may name one of the two kinds."""
    parts = request.get("parts") or ["workers", "actors"]
    if not isinstance(parts, list) or not set(parts) <= {"workers", "actors"}:
        raise ValueError("What can be restarted is workers, actors or both.")
    if "workers" in parts:
        for worker in sorted(crew.workers, key=number_of):
            yield await _restart_worker(worker)
    if "actors" in parts:
        for name in in_turn(crew.actors):
            yield await _restart_actor(crew, name)


def in_turn(actors: Sequence[str]) -> list[str]:
    """Coordinators last."""
    return sorted(actors, key=lambda name: (name.startswith("coordinator-"), name))


async def _restart_worker(worker: Worker) -> Step:
    started_s, before = time.monotonic(), worker.pid
    worker.renewing = before is not None
    code = await worker.stop()
    await _until(lambda: worker.ready and worker.pid not in (None, before), f"{worker.name} (see {worker.log_path})")
    return {"worker": worker.name, "step": "restarted", "exit_code": code, "seconds": _since(started_s)}


async def _restart_actor(crew: Crew, name: str) -> Step:
    started_s = time.monotonic()
    drained = await crew.cluster.drain(name, within_s=DRAIN_WITHIN_S)
    await crew.cluster.restart(name, within_s=SERVES_WITHIN_S)
    return {"actor": name, "step": "restarted", "drained": drained, "seconds": _since(started_s)}


async def _until(serves: Callable[[], Any], what: str) -> None:
    until_s = time.monotonic() + SERVES_WITHIN_S
    while not serves():
        if time.monotonic() > until_s:
            raise NotServingError(f"{what} does not serve after {SERVES_WITHIN_S:.0f} s. The rest was left as it is.")
        await asyncio.sleep(0.05)


def _since(started_s: float) -> float:
    return round(time.monotonic() - started_s, 1)
