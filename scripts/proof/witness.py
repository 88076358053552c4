"""An independent consumer: sees every message of every topic from the beginning, and acknowledges nothing.

It reads `read_committed`, as a careful consumer outside of the system would, with aiokafka alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiokafka import AIOKafkaConsumer

from scripts.proof.judge import DOMAINS, History, Seen

TOPICS = tuple(f"{domain}.{role}" for domain in DOMAINS for role in ("commands", "events", "results", "commands.dlq"))

_POLL_MS = 50
_FETCH_BYTES = 16 * 2**20


class Witness:
    """Grows `history` for as long as it runs; `until` waits for something to be seen in it."""

    def __init__(self, bootstrap_servers: str) -> None:
        self.history = History()
        self._consumer = AIOKafkaConsumer(
            *TOPICS,
            bootstrap_servers=bootstrap_servers,
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            max_partition_fetch_bytes=_FETCH_BYTES,
            fetch_max_bytes=4 * _FETCH_BYTES,
        )
        self._answers: dict[str, list[dict[str, Any]]] = {}
        self.answered_at_s: dict[str, float] = {}
        """When the first answer to a command id was seen, by the monotonic clock."""
        self._news = asyncio.Condition()
        self._reading: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self._consumer.start()  # of no group: it has every partition at once
        self._reading = asyncio.create_task(self._read())

    async def stop(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        await self._consumer.stop()

    async def until(self, seen: Callable[[History], bool], *, timeout_s: float, what: str = "it") -> None:
        """Return once `seen` holds of the history. Raises TimeoutError naming `what`."""
        try:
            async with asyncio.timeout(timeout_s), self._news:
                while not seen(self.history):
                    self._check_reading()
                    await self._news.wait()
        except TimeoutError:
            raise TimeoutError(f"{what} was not seen within {timeout_s:.0f} s") from None

    async def catch_up(self, *, timeout_s: float = 60) -> None:
        """Read up to where the topics end now."""
        ends = await self._consumer.end_offsets(self._consumer.assignment())
        async with asyncio.timeout(timeout_s):
            for partition, end in ends.items():
                while await self._consumer.position(partition) < end:
                    self._check_reading()
                    await asyncio.sleep(0.02)
            async with self._news:  # what was fetched has been added once the reader is back at its lock
                pass

    def answers(self, id: str) -> list[dict[str, Any]]:
        """Every answer seen under a command id so far, repetitions included, of all domains."""
        return self._answers.get(id, [])

    async def answers_to(self, ids: list[str], *, timeout_s: float) -> dict[str, dict[str, Any]]:
        """The first answer to each of the commands. Raises TimeoutError naming those that have none."""
        try:
            await self.until(lambda _: all(id in self._answers for id in ids), timeout_s=timeout_s)
        except TimeoutError:
            missing = [id for id in ids if id not in self._answers]
            raise TimeoutError(f"no answer within {timeout_s:.0f} s to {missing}") from None
        return {id: self._answers[id][0] for id in ids}

    async def _read(self) -> None:
        while True:
            # Fetching under the lock keeps positions and history in step for `catch_up`.
            async with self._news:
                fetched = await self._consumer.getmany(timeout_ms=_POLL_MS)
                for records in fetched.values():
                    for record in records:
                        self._add(
                            Seen(
                                record.topic,
                                record.partition,
                                record.offset,
                                record.key,
                                record.value,
                                tuple((name, value) for name, value in record.headers),
                            )
                        )
                if fetched:
                    self._news.notify_all()
            await asyncio.sleep(0)

    def _add(self, seen: Seen) -> None:
        self.history.add(seen)
        if seen.topic.endswith(".results"):
            self._answers.setdefault(seen.body["id"], []).append(seen.body)
            self.answered_at_s.setdefault(seen.body["id"], time.monotonic())

    def _check_reading(self) -> None:
        if self._reading is not None and self._reading.done():
            self._reading.result()


@asynccontextmanager
async def witnessing(bootstrap_servers: str) -> AsyncIterator[Witness]:
    witness = Witness(bootstrap_servers)
    await witness.start()
    try:
        yield witness
    finally:
        await witness.stop()


async def read_history(bootstrap_servers: str) -> History:
    """Everything that is on the topics now."""
    async with witnessing(bootstrap_servers) as witness:
        await witness.catch_up()
        return witness.history
