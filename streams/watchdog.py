"""Ends a process whose work stands still, so that whoever started it starts it again.

Theory of operation. A thread of its own looks every second at two signs of life. The loop's beat: a task of the main
loop notes the time every second; a blocked loop does not. And, for every partition that has something to do, the last
time something was tried: a batch taken, a batch finished, a call repeated, a question after an actor's health answered.
Waiting is therefore not standing still (rule 12): while storage is away, the actor that waits for it answers that it
lives, and the lag grows instead.

What there is to do comes from two places: what the pipelines hold, and the lag as the broker itself reports it, since
a client that has stopped fetching knows of no lag. Without an answer from the broker nothing counts as standing still.

A machine that was asleep is no reason: when the thread's own ticks come late, all ages begin anew.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

import structlog

from streams.partitions import Partition

log = structlog.get_logger()

EXIT_FAILED = 70
"""Exit code after an error that nothing was prepared for (EX_SOFTWARE)."""

EXIT_STALLED = 75
"""Exit code of a process that stood still (EX_TEMPFAIL)."""


@dataclass(frozen=True, slots=True)
class Look:
    """One partition at one moment. `last_attempt_s` is of the monotonic clock, 0 when nothing was ever tried."""

    has_work: bool
    last_attempt_s: float


class StallJudge:
    """Says what stands still. Pure: it is told the time and what there is to see."""

    def __init__(self, *, stalled_after_s: float, tick_s: float) -> None:
        self._stalled_after_s = stalled_after_s
        self._late_tick_s = max(5 * tick_s, 5.0)
        self._last_tick_s: float | None = None
        self._not_before_s = 0.0
        self._has_work_since_s: dict[Partition, float] = {}

    def judge(self, now_s: float, *, beat_s: float, partitions: Mapping[Partition, Look]) -> str | None:
        """Why the process must end, or None. Call at every tick."""
        if self._last_tick_s is None or now_s - self._last_tick_s > self._late_tick_s:
            self._not_before_s = now_s
            self._has_work_since_s.clear()
        self._last_tick_s = now_s
        for partition in self._has_work_since_s.keys() - partitions.keys():
            del self._has_work_since_s[partition]
        if now_s - max(beat_s, self._not_before_s) > self._stalled_after_s:
            return "the event loop does not turn"
        for partition, look in partitions.items():
            if not look.has_work:
                self._has_work_since_s.pop(partition, None)
                continue
            since_s = self._has_work_since_s.setdefault(partition, now_s)
            if now_s - max(since_s, look.last_attempt_s) > self._stalled_after_s:
                return f"nothing was tried in {partition[0]}[{partition[1]}]"
        return None


def end_process(code: int) -> NoReturn:
    """Leave at once. No handler runs: those would need the loop that has just been found wanting."""
    os._exit(code)


class Watchdog:
    """The thread. `look` is called from it; so is `membership_error`, which tells of an end that is known already."""

    def __init__(
        self,
        *,
        look: Callable[[], Mapping[Partition, Look]],
        membership_error: Callable[[], BaseException | None] = lambda: None,
        stalled_after_s: float,
        tick_s: float = 1.0,
        end: Callable[[int], None] = end_process,
    ) -> None:
        self._look = look
        self._membership_error = membership_error
        self._stalled_after_s = stalled_after_s
        self._tick_s = tick_s
        self._end = end
        self._beat_s = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        self._beat_s = time.monotonic()
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def beat(self) -> None:
        """The loop turns. To be called from it, several times within the time after which it counts as stalled."""
        self._beat_s = time.monotonic()

    def _run(self) -> None:
        judge = StallJudge(stalled_after_s=self._stalled_after_s, tick_s=self._tick_s)
        while not self._stopped.wait(self._tick_s):
            try:
                lost = self._membership_error()
                reason = (
                    f"Kafka's group has lost this process: {lost!r}"
                    if lost is not None
                    else judge.judge(time.monotonic(), beat_s=self._beat_s, partitions=self._look())
                )
            except Exception:
                log.exception("watchdog_failed")
                self._end(EXIT_FAILED)
                return
            if reason is not None:
                log.error("standing_still", reason=reason, stalled_after_s=self._stalled_after_s)
                self._end(EXIT_STALLED)
                return
