"""How each fault of the table is done to a running system, and how one knows that everything is whole again.

One fault at a time: it is begun, it ends, and then every server, worker and actor must answer again. What a fault
leaves behind (records in doubt, commands to be done again, partitions to be shared out) may well last into the next.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from infra.failpoints import arm, fired
from scripts.proof.on_stack.faults import (
    FAILPOINTS_ARMED,
    Break,
    Fault,
    JumpClock,
    Kill,
    KillAll,
    Mislead,
    Pause,
    Poison,
    Repeat,
    Role,
    Storm,
)
from scripts.proof.on_stack.load import Load, Message, changed, may_change
from scripts.proof.on_stack.standing import Standing, raylet_of
from scripts.proof.running import NotAsAskedError

DOMAINS = ("orders-", "inventory-", "payment-", "shipping-")
LOOKED_EVERY_S = 0.25
FIRES_WITHIN_S = 25.0
STIMULATED_EVERY_S = 1.0
DELAYED_BY_S = (0.05, 0.3)

POISON = "poison"
STIMULI: dict[str, str] = {"dead_letter": POISON, "one_phase": POISON, "home": "TopUpWallet"}
"""What reaches a failpoint with this in its name, if the load happens not to; orders for all others. On Cassandra what
one write commits is what has an outcome and nothing else, as dead letters have."""

Publish = Callable[[Sequence[Message]], Awaitable[None]]
Whole = Callable[[], bool]


@dataclass
class Done:
    """A fault that was. Times are of the monotonic clock; `over_s` is when everything was whole again."""

    fault: str
    target: str
    began_s: float
    injected_s: float = 0.0
    over_s: float = 0.0
    trouble: str = ""
    fired: list[str] = field(default_factory=list)


class Injector:
    """Injects into one standing system. `published` is what the client has published so far, `publish` how more is.

    `patience` is how many times a fault's bound everything may take to be whole again.
    """

    def __init__(
        self,
        standing: Standing,
        *,
        seed: int,
        load: Load,
        points: Iterator[str],
        published: Sequence[Message],
        publish: Publish,
        patience: float = 1.0,
    ) -> None:
        self._standing = standing
        self._system = standing.system
        self._rng = random.Random(f"injections {seed}")
        self._load = load
        self._points = points
        self._published = published
        self._publish = publish
        self._patience = patience

    async def inject(self, fault: Fault) -> Done:
        """Do it, and wait until all is whole. What does not become whole within its bound is a trouble of `Done`."""
        done = Done(fault.name, "", time.monotonic())
        try:
            changed_since = await self._do(fault.how, done)
        finally:
            self._undo()
        done.injected_s = time.monotonic()
        bound_s, left = fault.bound_s * self._patience, ""
        while time.monotonic() - done.injected_s < bound_s:
            left = await asyncio.to_thread(self._not_whole, changed_since)
            if not left:
                break
            await asyncio.sleep(LOOKED_EVERY_S)
        done.over_s = time.monotonic()
        if left:
            done.trouble = f"{fault.name} ({done.target}): not whole within {bound_s:.0f} s: {left}"
        return done

    # --- what is done ---------------------------------------------------------------------------------------------

    async def _do(self, how: object, done: Done) -> Whole:
        if isinstance(how, Kill):
            return await self._kill(how.role, done)
        if isinstance(how, KillAll):
            return await asyncio.to_thread(self._kill_all, done)
        if isinstance(how, Pause):
            return await self._pause(how, done)
        if isinstance(how, Mislead):
            return await self._mislead(how, done)
        if isinstance(how, Storm):
            return await self._storm(how, done)
        if isinstance(how, Repeat):
            return await self._repeat(how, done)
        if isinstance(how, Poison):
            await self._publish(poison := self._load.poison())
            done.target = f"{len(poison)} messages"
            return _at_once
        if isinstance(how, JumpClock):
            return await self._jump(how, done)
        assert isinstance(how, Break)
        return await self._break(next(self._points), done)

    async def _kill(self, role: Role, done: Done) -> Whole:
        done.target, pid, again = await asyncio.to_thread(self._choose, role)
        done.began_s = time.monotonic()
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return lambda: again() not in (pid, None)

    def _kill_all(self, done: Done) -> Whole:
        victims = [each for each in self._system.processes() if each.role.startswith((*DOMAINS, "worker-", "coord"))]
        self._rng.shuffle(victims)
        done.target = f"{len(victims)} processes"
        done.began_s = time.monotonic()
        for victim in victims:
            with suppress(ProcessLookupError):
                os.kill(victim.pid, signal.SIGKILL)
        dead, roles = {victim.pid for victim in victims}, {victim.role for victim in victims}

        def replaced() -> bool:
            there = {each.role for each in self._system.processes() if each.pid not in dead}
            return roles <= there

        return replaced

    async def _pause(self, how: Pause, done: Done) -> Whole:
        done.target, pid, _ = await asyncio.to_thread(self._choose, how.role)
        for_s = self._rng.uniform(*how.for_s)
        done.target += f" for {for_s:.1f} s"
        done.began_s = time.monotonic()
        try:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(for_s)
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        return _at_once

    async def _mislead(self, how: Mislead, done: Done) -> Whole:
        proxy = self._standing.proxies[how.server]
        for_s = self._rng.uniform(*how.for_s)
        done.target = f"{how.server} for {for_s:.1f} s"
        before = proxy.answers_lost
        if how.how == "swallow answers":
            proxy.swallow_answers()
        elif how.how == "delay answers":
            proxy.delay(self._rng.uniform(*DELAYED_BY_S))
        else:
            proxy.break_on_answer()
        await asyncio.sleep(for_s)
        proxy.pass_on()
        if how.how != "delay answers":
            lost = proxy.answers_lost - before
            done.target += f", {lost} answers lost"
            if not lost:
                done.trouble = f"{done.fault}: no answer was lost"
        return _at_once

    async def _storm(self, how: Storm, done: Done) -> Whole:
        for count in how.counts:
            told = await asyncio.to_thread(self._system.concord, "workers", str(count))
            if told.code:
                raise NotAsAskedError(f"concord workers {count} ended with {told.code}: {told.stderr[-1000:]}")
        done.target = f"workers {how.counts}"
        return _at_once

    async def _repeat(self, how: Repeat, done: Done) -> Whole:
        found = [each for each in self._published[-3_000:] if each.id and (may_change(each) or not how.changed)]
        chosen = self._rng.sample(found, min(how.commands, len(found)))
        await self._publish([changed(each) if how.changed else each for each in chosen])
        done.target = f"{len(chosen)} messages"
        return _at_once

    async def _jump(self, how: JumpClock, done: Done) -> Whole:
        done.target = f"worker-apart by {how.by_s} s"
        for wrong_by_s in how.by_s:
            self._standing.apart.set_clock(wrong_by_s)
            await asyncio.sleep(how.each_s)
        return _at_once

    async def _break(self, point: str, done: Done) -> Whole:
        done.target = point
        before = len(fired(self._standing.failpoints))
        arm(self._standing.failpoints, list(FAILPOINTS_ARMED[point]))
        stimulus = next((type for part, type in STIMULI.items() if part in point), "PlaceOrder")
        until_s, asked_s = time.monotonic() + FIRES_WITHIN_S, 0.0
        while point not in done.fired and time.monotonic() < until_s:
            if time.monotonic() - asked_s > STIMULATED_EVERY_S:
                await self._publish(self._load.poison() if stimulus == POISON else [self._load.of_type(stimulus)])
                asked_s = time.monotonic()
            await asyncio.sleep(0.1)
            done.fired = fired(self._standing.failpoints)[before:]
        return _at_once

    def _undo(self) -> None:
        """Whatever was set for the time of a fault alone."""
        for proxy in self._standing.proxies.values():
            proxy.pass_on()
        self._standing.apart.set_clock(0)
        if self._standing.failpoints.exists():
            arm(self._standing.failpoints, [])

    # --- whom it hits, and whether it is over -----------------------------------------------------------------------

    def _choose(self, role: Role) -> tuple[str, int, Callable[[], int | None]]:
        """A name of the role, its process, and how to ask for that again."""
        if role in ("kafka", "cassandra"):
            _, pid = self._standing.servers.state_of(role)
            if pid is None:
                raise NotAsAskedError(f"there is no {role} to hurt")
            return role, pid, lambda: self._standing.servers.state_of(role)[1]
        if role == "raylet":
            return role, raylet_of(self._system), partial(self._process_of, role)
        prefixes = {"worker": ("worker-",), "domain actor": DOMAINS, "coordinator": ("coordinator-",)}[role]
        until_s = time.monotonic() + 30
        while True:
            there = sorted(
                (each.role, each.pid)
                for each in self._system.processes(named=role != "worker")
                if each.role.startswith(prefixes)
            )
            if there:
                name, pid = self._rng.choice(there)
                return name, pid, partial(self._process_of, name)
            if time.monotonic() > until_s:
                raise NotAsAskedError(f"there is no {role} to hurt")
            time.sleep(0.2)

    def _process_of(self, name: str) -> int | None:
        """Of a worker, an actor or the raylet; None where there is none just now."""
        try:
            return raylet_of(self._system) if name == "raylet" else self._system.pid_of(name, timeout_s=0)
        except NotAsAskedError:
            return None

    def _not_whole(self, changed_since: Whole) -> str:
        """What is missing; "" if everything serves."""
        self._standing.apart.keep()
        for server in ("kafka", "cassandra"):
            state, pid = self._standing.servers.state_of(server)
            if state != "ready" or pid is None:
                return f"{server} is {state}"
        if not changed_since():
            return "what was killed has no successor"
        try:
            readiness = self._system.readiness()
        except OSError as error:
            return f"no readiness: {error}"
        return "" if readiness["ready"] else str({name: readiness[name] for name in ("actors", "workers")})


def _at_once() -> bool:
    return True
