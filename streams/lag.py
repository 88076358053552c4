"""How far each assigned partition is behind, as the broker says: for the watchdog, the metrics and `/healthz`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field

import structlog

from streams.partitions import Partition, Progress
from streams.watchdog import Look

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class PartitionState:
    """A partition as it is shown. `lag` is None while the broker does not say."""

    lag: int | None
    progress: Progress | None


@dataclass
class LagMonitor:
    """Asks the broker for the ends of the assigned partitions every `interval_s`.

    `finished` is the offset before which everything is done. A log may end in something that is no message (markers
    of a producer's transaction); so a lag that nothing is done about is looked into once with `first_offset`.
    """

    assigned: Callable[[], set[Partition]]
    finished: Callable[[Partition], int | None]
    progress: Callable[[], Mapping[Partition, Progress]]
    end_offsets: Callable[[Iterable[Partition]], Awaitable[Mapping[Partition, int]]]
    first_offset: Callable[[Partition, int], Awaitable[int | None]]
    interval_s: float = 2.0
    within_s: float = 20.0
    suspicious_after: int = 5
    _lag: dict[Partition, int] = field(default_factory=dict)
    _idle_looks: dict[Partition, int] = field(default_factory=dict)
    _empty_until: dict[Partition, int] = field(default_factory=dict)
    measured_at_s: float | None = None

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self.measure()
            await asyncio.sleep(self.interval_s)

    async def measure(self) -> None:
        """Look once. A broker that does not answer leaves no lag known."""
        partitions = self.assigned()
        try:
            async with asyncio.timeout(self.within_s):
                ends = await self.end_offsets(partitions) if partitions else {}
                lag = {}
                for partition, end in ends.items():
                    lag[partition] = await self._lag_of(partition, end)
        except Exception as error:
            log.warning("lag_unknown", error=repr(error))
            self._lag = {}
            self.measured_at_s = None
            return
        self._lag = lag
        self.measured_at_s = time.monotonic()

    async def _lag_of(self, partition: Partition, end: int) -> int:
        finished = self.finished(partition)
        if finished is None:
            return 0
        finished = max(finished, self._empty_until.get(partition, 0))
        progress = self.progress().get(partition)
        idle = progress is None or not (progress.waiting or progress.at_work)
        if finished >= end or not idle:
            self._idle_looks.pop(partition, None)
            return max(0, end - finished)
        self._idle_looks[partition] = self._idle_looks.get(partition, 0) + 1
        if self._idle_looks[partition] < self.suspicious_after:
            return end - finished
        if await self.first_offset(partition, finished) is None:
            self._empty_until[partition] = end
            return 0
        return end - finished

    def states(self) -> dict[Partition, PartitionState]:
        """Every assigned partition."""
        progress = self.progress()
        return {
            partition: PartitionState(self._lag.get(partition), progress.get(partition))
            for partition in self.assigned() | progress.keys()
        }

    def look(self) -> dict[Partition, Look]:
        """What the watchdog needs; may be called from its thread. Without an answer from the broker: nothing."""
        if self.measured_at_s is None:
            return {}
        looks = {}
        for partition, state in self.states().items():
            held = state.progress is not None and bool(state.progress.waiting or state.progress.at_work)
            last_attempt_s = state.progress.last_attempt_s if state.progress is not None else 0.0
            looks[partition] = Look(has_work=held or bool(state.lag), last_attempt_s=last_attempt_s)
        return looks
