"""An event loop in virtual time, on which several simulated processes live.

Time stands still while anything is ready to run and then jumps to the next timer. Which of several ready callbacks
runs first is drawn from the seed. Every callback belongs to the process in which it was scheduled: those of a dead
process never run, those of a paused one wait until it goes on. What belongs to none is the network.

It is single-threaded, has no selector, and knows only what asyncio's tasks, futures, timeouts and locks ask of a loop.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import random
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from typing import Any


class StuckError(Exception):
    """Nothing is left to run, or too much was run, and the simulation has not ended."""


class SimulatedClock:
    """A process's clocks: both follow virtual time, and the wall clock may be set wrong. Its ids name the process."""

    def __init__(self, loop: SimulatedLoop, number: int) -> None:
        self.wrong_ms = 0
        self._loop = loop
        self._number = number
        self._ids = 0

    def now_ms(self) -> int:
        return 1_700_000_000_000 + int(self._loop.now_s * 1000) + self.wrong_ms

    def monotonic_s(self) -> float:
        return self._loop.now_s

    def new_id(self) -> str:
        self._ids += 1
        return f"{self._number:08x}-0000-4000-8000-{self._ids:012x}"


class Process:
    """What lives and dies together, with a clock of its own. `number` counts incarnations over the simulation."""

    def __init__(self, number: int, slot: int, clock: SimulatedClock) -> None:
        self.number = number
        self.slot = slot
        self.clock = clock
        self.dead = False
        self.paused = False
        self.was_paused = False
        self.backlog: list[Handle] = []
        self.tasks: list[asyncio.Task[Any]] = []


def bury(processes: Iterable[Process]) -> None:
    """End what is still suspended in these processes, quietly, so that nothing of it runs when memory is reclaimed."""
    for process in processes:
        process.dead = True
        for task in process.tasks:
            if not task.done():
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                try:
                    task.get_coro().close()
                except RuntimeError:
                    continue  # It awaits while it is being closed: as dead as it will be.


class Handle:
    """A callback that waits for its turn (asyncio.Handle and TimerHandle)."""

    __slots__ = ("_cancelled", "_when", "args", "callback", "context", "process")

    def __init__(
        self,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        context: contextvars.Context | None,
        process: Process | None,
        when: float = 0.0,
    ) -> None:
        self.callback = callback
        self.args = args
        self.context = context
        self.process = process
        self._when = when
        self._cancelled = False

    def cancel(self) -> None:
        self._cancelled = True

    def cancelled(self) -> bool:
        return self._cancelled

    def when(self) -> float:
        return self._when


class SimulatedLoop(asyncio.AbstractEventLoop):
    """`shuffled`: ready callbacks run in any order; otherwise in the order in which they became ready."""

    def __init__(self, randomness: random.Random, *, shuffled: bool, steps_max: int = 500_000) -> None:
        self.now_s = 0.0
        self.process: Process | None = None
        self.errors: list[str] = []
        self._draw = randomness.random
        self._shuffled = shuffled
        self._ready: deque[Handle] = deque()
        self._timers: list[tuple[float, int, Handle]] = []
        self._scheduled = 0
        self._steps_left = steps_max

    # -- what asyncio asks

    def time(self) -> float:
        return self.now_s

    def call_soon(  # type: ignore[override]
        self, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> Handle:
        handle = Handle(callback, args, context, self.process)
        self._ready.append(handle)
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> Handle:
        return self.call_at(self.now_s + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> Handle:
        return self._at(when, Handle(callback, args, context, self.process, when))

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: str | None = None, context: Any = None) -> Any:
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self, name=name or "task", context=context)
        if self.process is not None:
            self.process.tasks.append(task)
        return task

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.errors.append(f"{context.get('message')}: {context.get('exception')!r}")

    # -- what the simulation asks

    def deliver(self, delay_s: float, process: Process | None, callback: Callable[..., object], *args: Any) -> None:
        """Run `callback` after `delay_s`, as part of `process` or (None) of the network."""
        self._at(self.now_s + delay_s, Handle(callback, args, None, process))

    def start(self, process: Process | None, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Begin a task as part of `process`."""
        before, self.process = self.process, process
        try:
            task: asyncio.Task[Any] = self.create_task(work)
            return task
        finally:
            self.process = before

    def resume(self, process: Process) -> None:
        """Let a paused process go on, with all that it has missed."""
        process.paused = False
        self._ready.extend(process.backlog)
        process.backlog.clear()

    def run_until(self, done: Callable[[], bool]) -> None:
        """Run until `done()`; StuckError if it cannot be reached."""
        outer = asyncio._get_running_loop()
        asyncio._set_running_loop(None)
        asyncio._set_running_loop(self)
        try:
            self._run(done)
        finally:
            asyncio._set_running_loop(outer)

    def _run(self, done: Callable[[], bool]) -> None:
        ready, timers, draw = self._ready, self._timers, self._draw
        while not done():
            if not ready:
                if not timers:
                    raise StuckError("nothing is left to run")
                self.now_s, _, handle = heapq.heappop(timers)
            elif self._shuffled and (size := len(ready)) > 1:
                position = int(draw() * size)
                handle = ready[position]
                ready[position] = ready[-1]
                ready.pop()
            else:
                handle = ready.popleft()
            process = handle.process
            if process is not None:
                if process.dead:
                    continue
                if process.paused:
                    process.backlog.append(handle)
                    continue
            if handle._cancelled:
                continue
            self._steps_left -= 1
            if self._steps_left < 0:
                raise StuckError("it goes on and on")
            self.process = process
            if handle.context is None:
                handle.callback(*handle.args)
            else:
                handle.context.run(handle.callback, *handle.args)
            self.process = None

    def _at(self, when: float, handle: Handle) -> Handle:
        self._scheduled += 1
        heapq.heappush(self._timers, (when, self._scheduled, handle))
        return handle
