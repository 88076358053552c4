"""The intents of one process's transactions, written with as few storage calls as possible.

    begin ──► intent is stored ──► the transaction prepares, is decided ──► settled ──► intent is removed
                                                                      └──► (not seen settled) it stays: the sweeper's

While one write is on its way, further intents wait and then go together: however many transactions begin at once, one
batch in one partition. Removals are not waited for at all; they go along with the next write, or after a moment. An
intent that is removed late costs a look at records that are settled, nothing else.

Never touches user records or state rows.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from infra.clock import Clock
from infra.consensus_commit.intents import Intent, IntentLog, Partition
from infra.storage.errors import StorageError

logger = logging.getLogger(__name__)

REMOVE_AFTER_MS = 100
"""How long removals are collected before they are written."""


class Journal:
    """Intents of the process `name`, whose present life is `incarnation`. For one event loop.

    A name belongs to one process at a time: whoever starts with it takes the former bearer for gone.
    """

    def __init__(
        self,
        log: IntentLog,
        clock: Clock,
        *,
        name: str,
        incarnation: str,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.log = log
        self.name = name
        self.incarnation = incarnation
        self._clock = clock
        self._sleep = sleep
        self._under_way: set[str] = set()
        self._waiting: list[tuple[Intent, asyncio.Future[None]]] = []
        self._settled: list[str] = []
        self._writer: asyncio.Task[None] | None = None
        self._remover: asyncio.Task[None] | None = None

    async def begin(self, tx_id: str, partitions: Sequence[Partition]) -> None:
        """Store the intent of a transaction; once this returns it may prepare. Storage errors pass through."""
        intent = Intent(
            tx_id=tx_id,
            coordinator=self.name,
            coordinator_incarnation=self.incarnation,
            home=self.name,
            home_incarnation=self.incarnation,
            partitions=tuple(dict.fromkeys(partitions)),
            participants=(),
            created_at_ms=self._clock.now_ms(),
        )
        self._under_way.add(tx_id)
        stored: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((intent, stored))
        if self._writer is None:
            self._writer = asyncio.create_task(self._write())
        try:
            await stored
        except BaseException:
            self._under_way.discard(tx_id)
            raise

    def is_under_way(self, tx_id: str) -> bool:
        """Whether a transaction of this process is at work on its records just now."""
        return tx_id in self._under_way

    def settled(self, tx_id: str) -> None:
        """Every record of the transaction was seen settled, and nothing of it can still arrive: forget its intent."""
        self._settled.append(tx_id)
        if self._remover is None:
            self._remover = asyncio.create_task(self._remove())

    def leave(self, tx_id: str) -> None:
        """This process does no more for the transaction. An intent that is still there is the sweeper's."""
        self._under_way.discard(tx_id)

    async def close(self) -> None:
        """Write what is still to be written."""
        for task in (self._writer, self._remover):
            if task is not None:
                await asyncio.wait([task])

    async def _write(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting, []
                try:
                    await self.log.record([intent for intent, _ in batch])
                except Exception as error:
                    for _, stored in batch:
                        if not stored.done():
                            stored.set_exception(error)
                else:
                    for _, stored in batch:
                        if not stored.done():
                            stored.set_result(None)
        finally:
            self._writer = None
            for _, stored in self._waiting:  # Only if this task was cancelled: the loop is going away.
                stored.cancel()

    async def _remove(self) -> None:
        try:
            await self._sleep(REMOVE_AFTER_MS / 1000)
            while self._settled:
                batch, self._settled = self._settled, []
                try:
                    await self.log.remove(self.name, batch)
                except StorageError as error:
                    logger.warning("%d intents stay for the sweeper to remove: %s", len(batch), error)
                    return
        finally:
            self._remover = None
