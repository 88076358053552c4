"""A client of the command topics: publishes commands and waits for their answers, through restarts of the system.

Theory of operation. Answers are read from the results topics outside of any consumer group, from the position that
they had before the first command was published, so no answer can be missed. An answer belongs to a command by its id
and the digest of its payload; what has no readable id is answered under the place where the broker stored it.

A command counts as published when the broker has confirmed it. When a delivery fails, everything that is not
confirmed is published again, in the order of submission. That may store a command twice, which is harmless: a command
that was carried out is answered with its first answer. So per key the first occurrences stay in order, and whatever
is killed in between, nothing has to be sent again by hand. After a restart Kafka may have another address: it is
asked for (`find_kafka`) before each new attempt.

Latency is measured from `submit`, when the command is handed over, to its answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError
from pydantic import ValidationError

from infra.messaging.connection import Kafka, KafkaConnection, start
from infra.messaging.errors import BrokerUnavailableError, DeliveryFailedError, MessagingError
from infra.messaging.producer import Delivery, EventProducer
from infra.messaging.reader import end_offsets
from infra.tracing import NO_SPAN, OFF, SEND, Attributes, Span, Tracer
from schemas.envelope import OutgoingMessage, RawMessage, derived_id
from schemas.outcome import Answer
from schemas.topics import results_topic
from schemas.trace_context import TRACEPARENT, TraceContext

CLIENT_ID = "concord-cli"

_POLL_MS = 100
_PAUSE_S = 0.5
_DELIVERY_TIMEOUT_MS = 10_000


@dataclass(eq=False)
class Submitted:
    """One command on its way. `answer` resolves with its answer, or fails with what makes it impossible to send."""

    number: int
    message: OutgoingMessage
    id: str | None
    digest: str | None
    submitted_at_s: float
    answer: asyncio.Future[Answer]
    delivered: asyncio.Future[Delivery]
    answered_at_s: float = 0.0
    sent: bool = field(default=False, repr=False)
    span: Span = NO_SPAN

    @property
    def latency_s(self) -> float:
        """Seconds from submission to the answer; only once there is one."""
        return self.answered_at_s - self.submitted_at_s


class CommandClient:
    """Use as an async context manager. `domains` are those whose answers are waited for; none: nobody waits.

    Entering raises BrokerUnavailableError and UnknownTopicError; afterwards an absent broker is waited for. Each
    command gets a span of `tracer`, which its message names, under `parent`; one that names a span already keeps that.
    """

    def __init__(
        self,
        find_kafka: Callable[[], Kafka],
        domains: Sequence[str],
        *,
        tracer: Tracer = OFF,
        parent: TraceContext | None = None,
    ) -> None:
        self._tracer = tracer
        self._parent = parent
        self._find_kafka = find_kafka
        self._topics = [results_topic(domain) for domain in domains]
        self._kafka = KafkaConnection("")
        self._producer: EventProducer | None = None
        self._consumer: AIOKafkaConsumer | None = None
        self._positions: dict[TopicPartition, int] = {}
        self._waiting: dict[tuple[str, str | None], list[Submitted]] = {}
        self._unconfirmed: dict[int, Submitted] = {}
        self._placeless: set[int] = set()
        """Numbers of the commands without an id whose place is not known yet."""
        self._early: dict[str, Answer] = {}
        """By id, answers that nobody expects, for as long as there are such commands."""
        self._submitted = 0
        self._to_send = asyncio.Event()
        self._failed = False
        self._closing = False
        self._connecting = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> CommandClient:
        try:
            await self._connect(KafkaConnection.of(self._find_kafka()))
        except BaseException:
            await self._disconnect()
            raise
        self._tasks = [asyncio.create_task(self._keep_sending())]
        if self._consumer is not None:
            self._tasks.append(asyncio.create_task(self._keep_reading()))
        for task in self._tasks:
            task.add_done_callback(self._on_end)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing = True  # aiokafka's `stop` may swallow a cancellation
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._disconnect()

    def submit(self, message: OutgoingMessage, *, id: str | None, digest: str | None) -> Submitted:
        """Hand a command over. Commands are published in the order of submission.

        `id` None: it has no readable one. `digest` (see `payload_digest`) None: any answer under the id will do.
        """
        loop = asyncio.get_running_loop()
        self._submitted += 1
        span, message = self._traced(message, id)
        submitted = Submitted(
            self._submitted,
            message,
            id,
            digest,
            time.monotonic(),
            loop.create_future(),
            loop.create_future(),
            span=span,
        )
        if id is None:
            self._placeless.add(submitted.number)
        else:
            self._expect(submitted, id)
        self._unconfirmed[submitted.number] = submitted
        self._to_send.set()
        return submitted

    def _traced(self, message: OutgoingMessage, id: str | None) -> tuple[Span, OutgoingMessage]:
        if not self._tracer.on or any(name == TRACEPARENT for name, _ in message.headers):
            return NO_SPAN, message
        told: Attributes = {
            "messaging.system": "kafka",
            "messaging.operation.name": "send",
            "messaging.operation.type": "send",
            "messaging.destination.name": message.topic,
            "messaging.client.id": CLIENT_ID,
            "messaging.message.body.size": len(message.value or b""),
            **({"messaging.message.id": id} if id is not None else {}),
        }
        span = self._tracer.start(SEND, message.topic, parent=self._parent, attributes=told)
        if span.context is None:
            return span, message
        return span, replace(message, headers=(*message.headers, *span.context.headers()))

    def forget(self, submitted: Submitted) -> None:
        """Nobody waits for this answer any more."""
        submitted.answer.cancel()

    def _on_end(self, task: asyncio.Task[None]) -> None:
        """A task that broke would leave everybody waiting."""
        if not task.cancelled() and (error := task.exception()) is not None:
            waiting = [submitted for group in self._waiting.values() for submitted in group]
            for submitted in (*waiting, *list(self._unconfirmed.values())):
                self._give_up(submitted, error)

    def _expect(self, submitted: Submitted, id: str) -> None:
        self._waiting.setdefault((id, submitted.digest), []).append(submitted)

    # --- publishing -----------------------------------------------------------------------------------------------

    async def _keep_sending(self) -> None:
        while not self._closing:
            await self._to_send.wait()
            self._to_send.clear()
            if self._failed:
                self._failed = False
                await asyncio.sleep(_PAUSE_S)
                for submitted in self._unconfirmed.values():
                    submitted.sent = False
            try:
                async with self._connecting:
                    await self._send_unsent()
            except (BrokerUnavailableError, DeliveryFailedError):
                self._send_again()
                await self._follow_the_broker()

    async def _send_unsent(self) -> None:
        assert self._producer is not None
        for submitted in [each for each in self._unconfirmed.values() if not each.sent]:
            message = submitted.message
            headers = [(name, value or b"") for name, value in message.headers]
            try:
                delivery = await self._producer.send(message.topic, message.key, message.value, headers)
            except (BrokerUnavailableError, DeliveryFailedError):
                raise
            except MessagingError as error:  # of this message alone
                self._give_up(submitted, error)
                continue
            submitted.sent = True
            delivery.add_done_callback(partial(self._on_delivery, submitted))
            if self._failed:
                return

    def _on_delivery(self, submitted: Submitted, done: asyncio.Future[Delivery]) -> None:
        if done.cancelled():
            return
        error = done.exception()
        if error is None:
            self._unconfirmed.pop(submitted.number, None)
            if not submitted.delivered.done():
                place = done.result()
                submitted.span.note(
                    {"messaging.destination.partition.id": str(place.partition), "messaging.kafka.offset": place.offset}
                )
                submitted.span.end()
                submitted.delivered.set_result(place)
            if submitted.id is None:
                self._expect_under_its_place(submitted, done.result())
        elif isinstance(error, BrokerUnavailableError | DeliveryFailedError):
            self._send_again()
        else:
            self._give_up(submitted, error)

    def _expect_under_its_place(self, submitted: Submitted, place: Delivery) -> None:
        id = derived_id(RawMessage(place.topic, place.partition, place.offset, 0, None, (), None))
        self._expect(submitted, id)
        if id in self._early:  # The answer was here before the broker's word that the command is stored.
            self._resolve(self._early[id], time.monotonic())
        self._forget_place_of(submitted)

    def _send_again(self) -> None:
        self._failed = True
        self._to_send.set()

    def _give_up(self, submitted: Submitted, error: BaseException) -> None:
        if self._unconfirmed.pop(submitted.number, None) is not None:
            submitted.span.fail(type(error).__name__)
            submitted.span.end()
            self._forget_place_of(submitted)
        for future in (submitted.answer, submitted.delivered):
            if not future.done():
                future.set_exception(error)
                future.exception()  # looked at or not, it is no news for the log

    # --- answers --------------------------------------------------------------------------------------------------

    async def _keep_reading(self) -> None:
        while not self._closing:
            assert self._consumer is not None
            try:
                fetched = await self._consumer.getmany(timeout_ms=_POLL_MS)
            except KafkaError:
                await asyncio.sleep(_PAUSE_S)
                await self._follow_the_broker()
                continue
            now_s = time.monotonic()
            for partition, records in fetched.items():
                for record in records:
                    self._on_result(record.value, now_s)
                    self._positions[partition] = record.offset + 1
            if not fetched and self._new_address() is not None:
                await self._follow_the_broker()

    def _on_result(self, value: bytes | None, now_s: float) -> None:
        try:
            answer = Answer.from_json(value or b"")
        except ValidationError:
            return  # not one of ours
        if not self._resolve(answer, now_s) and self._placeless:
            self._early[answer.id] = answer

    def _resolve(self, answer: Answer, now_s: float) -> bool:
        """Whether somebody waited for it."""
        waited = [*self._waiting.pop((answer.id, answer.digest), ()), *self._waiting.pop((answer.id, None), ())]
        for submitted in waited:
            submitted.answered_at_s = now_s
            if not submitted.answer.done():
                submitted.answer.set_result(answer)
        return waited != []

    def _forget_place_of(self, submitted: Submitted) -> None:
        self._placeless.discard(submitted.number)
        if not self._placeless:
            self._early.clear()

    # --- connections ----------------------------------------------------------------------------------------------

    def _new_address(self) -> KafkaConnection | None:
        """Kafka's address if it has another one by now. A system that is just being restarted has none."""
        with suppress(Exception):
            found = KafkaConnection.of(self._find_kafka())
            return found if found != self._kafka else None
        return None

    async def _follow_the_broker(self) -> None:
        """Connect anew if Kafka has another address by now."""
        async with self._connecting:
            address = self._new_address()
            if address is None:
                return
            await self._disconnect()
            while not self._closing:
                try:
                    await self._connect(address)
                except (MessagingError, KafkaError):
                    await self._disconnect()
                    await asyncio.sleep(_PAUSE_S)
                    address = self._new_address() or address
                else:
                    self._send_again()
                    return

    async def _connect(self, address: KafkaConnection) -> None:
        self._kafka = address
        self._producer = EventProducer(address, client_id=CLIENT_ID, delivery_timeout_ms=_DELIVERY_TIMEOUT_MS)
        if self._topics:
            await self._connect_consumer()
        await self._producer.start()

    async def _connect_consumer(self) -> None:
        self._consumer = AIOKafkaConsumer(
            **self._kafka.client_options(),
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            max_partition_fetch_bytes=8 * 2**20,
        )
        try:
            await start(self._consumer, self._kafka)
            if not self._positions:
                self._positions = await self._ends()
        except KafkaError as error:
            raise BrokerUnavailableError(self._kafka.bootstrap_servers, str(error)) from error
        self._consumer.assign(list(self._positions))
        for partition, offset in self._positions.items():
            self._consumer.seek(partition, offset)

    async def _ends(self) -> dict[TopicPartition, int]:
        # Not by the consumer: it only knows the partitions of topics that it is assigned.
        ends = await end_offsets(self._kafka, self._topics)
        return {TopicPartition(topic, number): offset for (topic, number), offset in ends.items()}

    async def _disconnect(self) -> None:
        producer, self._producer = self._producer, None
        consumer, self._consumer = self._consumer, None
        parts: list[Any] = [part for part in (producer, consumer) if part is not None]
        for part in parts:
            with suppress(MessagingError, KafkaError):
                await part.stop()
