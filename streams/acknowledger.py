"""Acknowledges what is finished, a few times a second and for all partitions together.

Finishing a batch only notes an offset here; losing the note costs a redelivery and nothing else. So an offset that
Kafka does not take (the group rebalances, the broker is away) is kept and offered again, or forgotten when the
partitions are revoked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

import structlog

from infra.failpoints import reach
from streams.partitions import Partition

log = structlog.get_logger()


class Acknowledger:
    """`commit` tells Kafka, and raises for whatever it did not take."""

    def __init__(self, commit: Callable[[Mapping[Partition, int]], Awaitable[None]], *, interval_s: float) -> None:
        self._commit = commit
        self._interval_s = interval_s
        self._finished: dict[Partition, int] = {}
        self._lock = asyncio.Lock()
        self.acknowledged: dict[Partition, int] = {}
        """What Kafka has confirmed in this assignment."""

    def finished(self, partition: Partition, next_offset: int) -> None:
        """Everything before `next_offset` is done."""
        self._finished[partition] = next_offset

    async def run(self) -> None:
        """Acknowledge at every interval, until cancelled."""
        while True:
            await asyncio.sleep(self._interval_s)
            await self.flush()

    async def flush(self) -> None:
        """Acknowledge what is finished now; what Kafka does not take stays for the next time."""
        async with self._lock:
            offsets = dict(self._finished)
            if not offsets:
                return
            try:
                await self._commit(offsets)
            except Exception as error:
                log.warning("not_acknowledged", partitions=len(offsets), error=repr(error))
                return
            self.acknowledged.update(offsets)
            for partition, offset in offsets.items():
                if self._finished.get(partition) == offset:
                    del self._finished[partition]
        await reach("worker.after_acknowledge")

    async def end_assignment(self, *, patience_s: float) -> None:
        """Acknowledge what is finished, if that takes no longer than `patience_s`; then forget all offsets."""
        try:
            async with asyncio.timeout(patience_s):
                await self.flush()
        except TimeoutError:
            log.warning("not_acknowledged", partitions=len(self._finished), error="the assignment ended first")
        self._finished.clear()
        self.acknowledged.clear()
