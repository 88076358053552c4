"""The client of the chaos: publishes in order at a steady rate, remembers what and when, and waits when few answer."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

from infra.messaging.errors import MessagingError
from infra.messaging.producer import EventProducer
from scripts.proof.on_stack.load import Message

UNANSWERED_AT_MOST = 150
"""What can be answered within a part of the time in which everything must be settled."""

AT_ONCE_AT_MOST = 20
LOOKED_EVERY_S = 0.05
GIVEN_UP_AFTER_S = 180.0


class Answered(Protocol):
    """Whoever sees answers: when the first one to each id was seen, by the monotonic clock."""

    answered_at_s: dict[str, float]


class Client:
    """Publishes to Kafka itself, in one order: what was not confirmed is published again, with what followed it.

    `remember`: keep every message in `published`. `unanswered_at_most`: then it waits.
    """

    def __init__(
        self,
        producer: EventProducer,
        witness: Answered,
        messages: Iterator[Message],
        *,
        remember: bool = True,
        unanswered_at_most: int = UNANSWERED_AT_MOST,
    ) -> None:
        logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # it says ten times a second that a broker is away
        self._producer = producer
        self._witness = witness
        self._messages = messages
        self._one_at_a_time = asyncio.Lock()
        self._open: set[str] = set()
        self._remember = remember
        self._unanswered_at_most = unanswered_at_most
        self.published: list[Message] = []
        self.sent_at_s: dict[str, float] = {}
        """When each id was about to be published for the first time, by the monotonic clock."""

    async def publish(self, messages: Sequence[Message]) -> None:
        """All of them, in order, and confirmed when this returns. Raises MessagingError only after minutes."""
        async with self._one_at_a_time:
            for each in messages:
                if each.id and each.id not in self.sent_at_s:
                    self.sent_at_s[each.id] = time.monotonic()
                    self._open.add(each.id)
            self.published += messages if self._remember else ()
            until_s = time.monotonic() + GIVEN_UP_AFTER_S
            while True:
                try:
                    handed = [
                        await self._producer.send(each.topic, each.key, each.value, list(each.headers))
                        for each in messages
                    ]
                    await asyncio.gather(*handed)
                except MessagingError:
                    if time.monotonic() > until_s:
                        raise
                    await asyncio.sleep(0.2)
                else:
                    return

    async def keep_on(self, *, rate: float, enough: asyncio.Event) -> None:
        """`rate` messages a second in the mean, but never many without an answer, until there is enough."""
        started_s, count = time.monotonic(), 0
        while not enough.is_set():
            due = int((time.monotonic() - started_s) * rate) - count
            few = min(due, AT_ONCE_AT_MOST, self._unanswered_at_most - len(self.unanswered()))
            if few > 0:
                await self.publish([next(self._messages) for _ in range(few)])
                count += few
            await asyncio.sleep(LOOKED_EVERY_S)

    def unanswered(self) -> set[str]:
        """The ids without any answer so far."""
        self._open -= {id for id in self._open if id in self._witness.answered_at_s}
        return self._open

    async def drain(self, *, within_s: float) -> None:
        """Until everything is answered, or so long."""
        until_s = time.monotonic() + within_s
        while True:
            if not self.unanswered() or time.monotonic() > until_s:
                return
            await asyncio.sleep(LOOKED_EVERY_S)
