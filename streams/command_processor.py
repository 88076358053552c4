"""Commands from Kafka to their actors, answers from the actors to Kafka, and only then the acknowledgement.

Theory of operation. One batch of one topic partition at a time (`partitions.py`):

    batch ─► execute, at the home actor of each command's key ─► answers, in the order of the log
                    │ the actor is lost: the same batch again, for as long as this process lives
                    ▼
          events, dead letter, result of each command, in the order of the log ─► all confirmed ─► finished

Repeating is always safe: an actor answers a command that it has carried out before with the same answer and the same
event ids, and consumers drop what they have seen. So every doubt ends in doing it again, and the offset that is not
yet acknowledged is the outbox.

What a command means is the actor's affair. This module looks at the key's bytes, to find the actor, and at the length
of the value: a value that is too long stays here, the actor is told its length and answers with a dead letter.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

import structlog

from actors.runtime import Placement, Runtime
from infra.failpoints import reach
from infra.messaging.errors import BrokerUnavailableError, DeliveryFailedError
from infra.tracing import OFF, Tracer
from schemas.envelope import (
    ANSWER_TYPE,
    OutgoingMessage,
    build_dead_letter,
    build_event_message,
    build_result_message,
)
from schemas.outcome import DEAD_LETTERED, Answer
from schemas.topics import commands_topic, events_topic, results_topic
from streams.asking import Patience, ask_until_answered
from streams.partitions import Partition, Received
from streams.traced_batch import TracedBatch, trace_batch

log = structlog.get_logger()


class Producer(Protocol):
    """`infra.messaging.producer.EventProducer`, as far as it is used here."""

    async def send(
        self, topic: str, key: bytes | None, value: bytes | None, headers: Sequence[tuple[str, Any]] = ()
    ) -> Awaitable[Any]: ...


class CommandProcessor:
    """The work of the command topics. `answered(domain, answer, sent_at_ms)` is told of each answer once it is
    published, with the timestamp of its command."""

    def __init__(
        self,
        *,
        domains: Sequence[str],
        runtime: Runtime,
        placement: Placement,
        producer: Producer,
        consumer_group: str,
        patience: Patience | None = None,
        publish_pause_s: float = 0.5,
        tracer: Tracer = OFF,
        client_id: str = "",
        answered: Callable[[str, Answer, int], None] = lambda domain, answer, sent_at_ms: None,
    ) -> None:
        self._domain_of: Mapping[str, str] = {commands_topic(domain): domain for domain in domains}
        self._runtime = runtime
        self._placement = placement
        self._producer = producer
        self._consumer_group = consumer_group
        self._patience = patience or Patience()
        self._publish_pause_s = publish_pause_s
        self._tracer = tracer
        self._client_id = client_id
        self._answered = answered

    async def work(self, partition: Partition, batch: list[Received], tried: Callable[[], None]) -> None:
        """Carry out a batch and publish what came of it. Returns when the broker has all of it."""
        domain = self._domain_of[partition[0]]
        with trace_batch(
            self._tracer, partition, batch, consumer_group=self._consumer_group, client_id=self._client_id
        ) as traced:
            await reach("worker.before_execute")
            answers = await self._execute(domain, batch, traced, tried)
            await reach("worker.after_execute")
            await self._publish(domain, batch, answers, traced, tried)
        for received, answer in zip(batch, answers, strict=True):
            self._answered(domain, answer, received.raw.timestamp_ms)

    # --- execute ------------------------------------------------------------------------------------------------

    async def _execute(
        self, domain: str, batch: list[Received], traced: TracedBatch, tried: Callable[[], None]
    ) -> list[Answer]:
        """The answers in the order of the batch. Commands of one key go to one actor, in their order."""
        by_actor: dict[str, list[int]] = {}
        for index, received in enumerate(batch):
            actor = self._placement.actor_of(domain, received.raw.key or b"")
            by_actor.setdefault(actor, []).append(index)
        answers: list[Answer | None] = [None] * len(batch)

        async def ask(actor: str, indexes: list[int]) -> None:
            messages = [traced.raw(index, batch[index].raw) for index in indexes]
            replies = await ask_until_answered(self._runtime, actor, "execute", messages, self._patience, tried)
            for index, reply in zip(indexes, replies, strict=True):
                answers[index] = reply

        async with asyncio.TaskGroup() as group:
            for actor, indexes in by_actor.items():
                group.create_task(ask(actor, indexes))
        return [answer for answer in answers if answer is not None]

    # --- publish ------------------------------------------------------------------------------------------------

    async def _publish(
        self,
        domain: str,
        batch: list[Received],
        answers: list[Answer],
        traced: TracedBatch,
        tried: Callable[[], None],
    ) -> None:
        outgoing: list[OutgoingMessage] = []
        dead = False
        for index, (received, answer) in enumerate(zip(batch, answers, strict=True)):
            traced.answered(index, answer)
            for event in answer.events:
                trace = traced.sending(index, events_topic(event.domain), event.type, message_id=event.id)
                outgoing.append(build_event_message(event, answer=answer, trace=trace))
            if answer.status == DEAD_LETTERED:
                dead = True
                dead_letter = self._dead_letter(received, answer)
                traced.sending(index, dead_letter.topic)  # its headers stay as they came
                outgoing.append(dead_letter)
            trace = traced.sending(index, results_topic(domain), ANSWER_TYPE)
            outgoing.append(build_result_message(answer, domain=domain, trace=trace))
        await reach("worker.before_publish")
        if dead:
            await reach("worker.before_dead_letter")
        await self._deliver(outgoing, tried)
        traced.sent()
        if dead:
            await reach("worker.after_dead_letter")
        await reach("worker.after_publish")

    def _dead_letter(self, received: Received, answer: Answer) -> OutgoingMessage:
        detail = answer.detail.get("detail")
        return build_dead_letter(
            received.raw,
            reason=answer.reason,
            detail=detail if isinstance(detail, str) else json.dumps(answer.detail, ensure_ascii=False),
            command_id=answer.id,
            consumer_group=self._consumer_group,
            value=received.original,
        )

    async def _deliver(self, outgoing: list[OutgoingMessage], tried: Callable[[], None]) -> None:
        """Send in order until each is confirmed. After a failure everything from the first unconfirmed goes again.

        Errors that concern one message alone (too large, no such topic) are raised: no repetition would help.
        """
        while outgoing:
            confirmed, failure = await self._send(outgoing)
            outgoing = outgoing[confirmed:]
            if failure is not None:
                log.warning("publishing_again", messages=len(outgoing), error=str(failure))
                await asyncio.sleep(self._publish_pause_s)
                tried()

    async def _send(self, outgoing: list[OutgoingMessage]) -> tuple[int, Exception | None]:
        """How many from the first on are confirmed, and what went wrong after them."""
        deliveries: list[Awaitable[Any]] = []
        failure: Exception | None = None
        for message in outgoing:
            try:
                deliveries.append(await self._producer.send(message.topic, message.key, message.value, message.headers))
            except (BrokerUnavailableError, DeliveryFailedError) as error:
                failure = error
                break
        results = await asyncio.gather(*deliveries, return_exceptions=True)
        for confirmed, result in enumerate(results):
            if isinstance(result, BrokerUnavailableError | DeliveryFailedError):
                return confirmed, result
            if isinstance(result, BaseException):
                raise result
        return len(results), failure
