"""How soon a part that was killed serves again: the slowest of several tries of each, against the bound promised.

Each try kills one process with work under way, and asks at once for something new on the very keys of that work. The
time ends when the last of the new commands is seen to be committed. It begins with the kill; of a server, once that
serves again, which the supervisor's probe says: until then nobody can do anything.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from infra.messaging.producer import EventProducer
from scripts.proof.on_stack.client import Client
from scripts.proof.on_stack.load import Load
from scripts.proof.running import NotAsAskedError, RunningSystem
from scripts.proof.witness import Witness, witnessing

Part = Literal["actor", "coordinator", "worker", "cassandra", "kafka"]


@dataclass(frozen=True)
class Promise:
    """`roles` are killed in turn, one a try; `bound_s` holds for the slowest try."""

    roles: tuple[str, ...]
    bound_s: float
    from_up: bool = False


PROMISES: Mapping[Part, Promise] = {
    "actor": Promise(("orders-0", "inventory-0", "payment-0", "shipping-0", "orders-1"), 5),
    "coordinator": Promise(("coordinator-0",), 5),
    "worker": Promise(("worker-0",), 15),
    "cassandra": Promise(("cassandra",), 10, from_up=True),
    "kafka": Promise(("kafka",), 30, from_up=True),
}

IN_PEACE = 3
"""How often the same commands are timed with nothing killed: what a time is to be compared with."""

UNDER_WAY = 8
NEW = 2
"""Orders that compete for the same few keys. With many more it would be their queue that is timed, not the recovery."""

KILLED_AFTER_S = (0.02, 0.4)
CUSTOMERS = 4
CATEGORIES = 2
ANSWERED_WITHIN_S = 120.0
UP_WITHIN_S = 120.0
LOOKED_EVERY_S = 0.05

Report = dict[str, Any]


def prove_recovery_times(directory: Path, *, profile: str, tries: int, seed: int = 1) -> Report:
    """All tries of every part on one system. Raises NotAsAskedError."""
    system = RunningSystem(directory / "system", profile=profile)
    directory.mkdir(parents=True, exist_ok=True)
    system.start()
    try:
        parts = [part for part in PROMISES if part != "cassandra" or profile == "stack"]
        report = asyncio.run(_measure(system, parts, tries=tries, seed=seed))
        system.stop()
        system.wait_until_gone()
    except BaseException:
        system.kill()
        raise
    return {"profile": profile, "seed": seed, "tries": tries, **report}


async def _measure(system: RunningSystem, parts: list[Part], *, tries: int, seed: int) -> Report:
    async with witnessing(system.bootstrap_servers) as witness:
        producer = EventProducer(system.bootstrap_servers, client_id="recovery-times")
        await producer.start()
        try:
            return await _Trial(system, witness, producer, seed).of(parts, tries)
        finally:
            await producer.stop()


class _Trial:
    def __init__(self, system: RunningSystem, witness: Witness, producer: EventProducer, seed: int) -> None:
        self._system = system
        self._witness = witness
        self._load = Load(seed, "recovery", customers=CUSTOMERS, categories=CATEGORIES)
        self._client = Client(producer, witness, iter(()))
        self._rng = random.Random(f"recovery {seed}")
        self._refused: list[str] = []

    async def of(self, parts: list[Part], tries: int) -> Report:
        opening = self._load.opening()
        await self._client.publish(opening)
        await self._all_committed([each.id for each in opening])
        in_peace = [await self._try(None, False) for _ in range(IN_PEACE)]
        report: Report = {"in_peace_s": in_peace, "parts": {}}
        for part in parts:
            promise = PROMISES[part]
            took = []
            for number in range(tries):
                role = promise.roles[number % len(promise.roles)]
                took.append(await self._try(role, promise.from_up))
                print(f"{part} {number + 1}: {role} served after {took[-1]} s", file=sys.stderr, flush=True)
            report["parts"][part] = {
                "bound_s": promise.bound_s,
                "counted_from": "it is up" if promise.from_up else "the kill",
                "slowest_s": max(took),
                "median_s": sorted(took)[len(took) // 2],
                "seconds": took,
                "holds": max(took) <= promise.bound_s,
            }
        report["not_committed"] = self._refused
        report["holds"] = all(part["holds"] for part in report["parts"].values()) and not self._refused
        return report

    async def _try(self, role: str | None, from_up: bool) -> float:
        """Seconds until new commands on the keys of the work under way are committed."""
        pid = 0 if role is None else await asyncio.to_thread(self._system.pid_of, role)
        await self._client.publish(under_way := [self._load.of_type("PlaceOrder") for _ in range(UNDER_WAY)])
        await asyncio.sleep(self._rng.uniform(*KILLED_AFTER_S))
        since_s = time.monotonic()
        if role is not None:
            os.kill(pid, signal.SIGKILL)
        new = [self._load.of_type("PlaceOrder") for _ in range(NEW)]
        publishing = asyncio.ensure_future(self._client.publish(new))
        if role is not None and from_up:
            since_s = await asyncio.to_thread(self._up_again, role, pid)
        await publishing
        await self._all_committed([each.id for each in new])
        took_s = max(self._witness.answered_at_s[each.id] for each in new) - since_s
        await self._all_committed([each.id for each in under_way])
        await asyncio.to_thread(self._system.wait_until_ready, timeout_s=UP_WITHIN_S)
        return round(took_s, 2)

    async def _all_committed(self, ids: list[str]) -> None:
        answers = await self._witness.answers_to(ids, timeout_s=ANSWERED_WITHIN_S)
        self._refused += [
            f"{answer['type']} {id}: {answer['status']} {answer['reason']}"
            for id, answer in answers.items()
            if answer["status"] != "committed"
        ]

    def _up_again(self, server: str, killed: int) -> float:
        """When a server that was killed serves again."""
        kind = "storage" if server == "cassandra" else server
        until_s = time.monotonic() + UP_WITHIN_S
        ended = False
        while time.monotonic() < until_s:
            try:
                state = self._system.readiness()[kind][server]
            except OSError:
                state = ""
            ended = ended or state != "ready" or self._pid_of(server) not in (None, killed)
            if ended and state == "ready":
                return time.monotonic()
            time.sleep(LOOKED_EVERY_S)
        raise NotAsAskedError(f"{server} is not up again after {UP_WITHIN_S:.0f} s")

    def _pid_of(self, server: str) -> int | None:
        try:
            return self._system.pid_of(server, timeout_s=0)
        except NotAsAskedError:
            return None
