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
from dataclasses import dataclass, replace
from typing import Any, Protocol

import structlog

from actors.runtime import Placement, Runtime
from infra.failpoints import reach
from infra.messaging.errors import BrokerUnavailableError, DeliveryFailedError, MessageTooLargeError
from infra.tracing import OFF, Tracer
from schemas.envelope import (
    ANSWER_TYPE,
    OutgoingMessage,
    RawMessage,
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


KNOWN = (BrokerUnavailableError, DeliveryFailedError, MessageTooLargeError)
"""What publishing may come to and is gone on after."""

UNPUBLISHABLE = "unpublishable"
"""Reason of the dead letter in place of a message that its topic does not take: its limit was lowered, or the answer is
older than the limit that actors keep to (`schemas.outcome.MAX_ANSWER_BYTES`)."""


@dataclass(frozen=True, slots=True)
class _Outgoing:
    """A message to be published, and the command that it is about."""

    message: OutgoingMessage
    command: RawMessage
    answer: Answer


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
        owners: list[int] = []
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
            owners += [index] * (len(outgoing) - len(owners))
        await reach("worker.before_publish")
        if dead:
            await reach("worker.before_dead_letter")
        about = [
            _Outgoing(message, batch[owner].raw, answers[owner])
            for message, owner in zip(outgoing, owners, strict=True)
        ]
        await self._deliver(about, tried)
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

    async def _deliver(self, outgoing: list[_Outgoing], tried: Callable[[], None]) -> None:
        """Send in order until each is confirmed. After a failure everything from the first unconfirmed goes again.

        A message that the broker will never take for its size is replaced by a word about it, since neither a
        repetition nor a restart would help. A topic that is missing is raised.
        """
        while outgoing:
            confirmed, failure, too_large = await self._send(outgoing)
            if too_large is not None:
                # It fails those before it as well, time and again: these go first, without it.
                await self._deliver(outgoing[confirmed:too_large], tried)
                outgoing = [await self._one_of_its_batch(outgoing[too_large]), *outgoing[too_large + 1 :]]
                continue
            outgoing = outgoing[confirmed:]
            if failure is not None:
                log.warning("publishing_again", messages=len(outgoing), error=str(failure))
                await asyncio.sleep(self._publish_pause_s)
                tried()

    async def _one_of_its_batch(self, outgoing: _Outgoing) -> _Outgoing:
        """What to send in place of a message that was refused for its size, perhaps for that of those it went with."""
        _, alone, _ = await self._send([outgoing])
        if not isinstance(alone, MessageTooLargeError):
            return outgoing  # repeated, with what follows it; consumers drop what they have seen
        log.error("unpublishable", command_id=outgoing.answer.id, topic=outgoing.message.topic, error=str(alone))
        return replace(outgoing, message=self._unpublishable(outgoing, alone))

    def _unpublishable(self, outgoing: _Outgoing, failure: MessageTooLargeError) -> OutgoingMessage:
        """A dead letter that names the command by its place and holds nothing of what is too large.

        The answer itself is kept as a row, with its events: `concord status` shows it.
        """
        return build_dead_letter(
            replace(outgoing.command, key=None, headers=(), value=None),
            reason=UNPUBLISHABLE,
            detail=f"{failure} The answer is kept: concord status {outgoing.answer.id}",
            command_id=outgoing.answer.id,
            consumer_group=self._consumer_group,
        )

    async def _send(self, outgoing: list[_Outgoing]) -> tuple[int, Exception | None, int | None]:
        """How many from the first on are confirmed, what went wrong with the next, and which is too large if any is."""
        deliveries: list[Awaitable[Any]] = []
        failure: Exception | None = None
        for message in (each.message for each in outgoing):
            try:
                deliveries.append(await self._producer.send(message.topic, message.key, message.value, message.headers))
            except KNOWN as error:
                failure = error
                break
        results: list[Any] = await asyncio.gather(*deliveries, return_exceptions=True)
        if failure is not None:
            results.append(failure)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, KNOWN):
                raise result
        confirmed = next((i for i, result in enumerate(results) if isinstance(result, KNOWN)), len(results))
        too_large = next((i for i, result in enumerate(results) if isinstance(result, MessageTooLargeError)), None)
        return confirmed, results[confirmed] if confirmed < len(results) else None, too_large
