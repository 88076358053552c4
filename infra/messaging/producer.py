"""An idempotent Kafka producer that fails in one of a few known ways and is usable again afterwards.

Theory of operation. aiokafka's idempotent producer numbers the batches of each partition, and the broker takes only
the next number. A batch that is given up leaves a gap: everything after it on that partition is refused for good. So
one inner producer is one *generation*: when a delivery of it fails, every message of the generation that is still
outstanding fails with it, the inner producer is torn down, and the next `send` begins a new generation. For the
caller that means: after a failure, send again whatever was not confirmed, in order. Some of it may then be stored
twice; consumers drop what they have seen by its id.

An unreachable broker is waited for, `delivery_timeout_ms` at most, since the inner producer by itself waits for ever.

It never looks into keys, values or headers.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.errors import (
    KafkaConnectionError,
    KafkaError,
    KafkaTimeoutError,
    MessageSizeTooLargeError,
    TopicAuthorizationFailedError,
)

from infra.messaging.connection import Kafka, KafkaConnection, start, why_unreachable
from infra.messaging.errors import (
    BrokerUnavailableError,
    DeliveryFailedError,
    MessageTooLargeError,
    MessagingError,
    UnknownTopicError,
)

Headers = Sequence[tuple[str, bytes]]

MAX_REQUEST_BYTES = 8 * 1024 * 1024
_MAX_BATCH_BYTES = 128 * 1024
_TOPIC_VISIBLE_WITHIN_S = 1.0
_METADATA_INTERVAL_S = 0.1
_PATIENCE_S = 0.1


@dataclass(frozen=True, slots=True)
class Delivery:
    """Where the broker stored a message."""

    topic: str
    partition: int
    offset: int


class EventProducer:
    """Publishes with acks=all, in order, without duplicates of its own.

    `delivery_timeout_ms` bounds the time from `send` to confirmation. Use from the event loop that started it.
    """

    def __init__(
        self,
        kafka: Kafka,
        *,
        client_id: str = "concord",
        linger_ms: int = 3,
        delivery_timeout_ms: int = 30_000,
        max_request_bytes: int = MAX_REQUEST_BYTES,
    ) -> None:
        self._kafka = KafkaConnection.of(kafka)
        self._client_id = client_id
        self._linger_ms = linger_ms
        self._delivery_timeout_s = delivery_timeout_ms / 1000
        self._max_request_bytes = max_request_bytes
        self._generation: _Generation | None = None
        self._beginning = asyncio.Lock()
        self._started = False

    async def start(self) -> None:
        """Connect. Raises BrokerUnavailableError."""
        self._started = True
        await self._current()

    async def stop(self) -> None:
        """Deliver what is outstanding, as far as the broker answers, and disconnect."""
        self._started = False
        generation, self._generation = self._generation, None
        if generation is not None:
            if generation.failure is None:
                await generation.flush(self._delivery_timeout_s)
            await generation.close(DeliveryFailedError("The producer was stopped before the message was confirmed."))

    async def send(
        self, topic: str, key: bytes | None, value: bytes | None, headers: Headers = ()
    ) -> asyncio.Future[Delivery]:
        """Hand a message over; the future resolves when the broker has it, or fails with a MessagingError.

        Messages with one key reach their partition in the order of the calls (await each call before the next).
        The call itself raises MessageTooLargeError and UnknownTopicError, which concern this message alone, and
        BrokerUnavailableError. The partition is Kafka's own: murmur2 of the key, random without one.
        """
        generation = await self._current()
        return await generation.send(topic, key, value, headers)

    async def send_and_wait(
        self, topic: str, key: bytes | None, value: bytes | None, headers: Headers = ()
    ) -> Delivery:
        """`send`, then wait for the confirmation. For many messages call `send` for each and gather the futures."""
        return await (await self.send(topic, key, value, headers))

    async def _current(self) -> _Generation:
        if not self._started:
            raise RuntimeError("EventProducer is not started")
        if self._generation is not None and self._generation.failure is None:
            return self._generation
        async with self._beginning:
            if self._generation is not None:
                if self._generation.failure is None:
                    return self._generation  # another task was faster
                # The old connections must be gone before a new number series begins: nothing may arrive late.
                await self._generation.close(self._generation.failure)
            generation = _Generation(
                AIOKafkaProducer(
                    **self._kafka.client_options(),
                    client_id=self._client_id,
                    acks="all",
                    enable_idempotence=True,
                    linger_ms=self._linger_ms,
                    max_batch_size=_MAX_BATCH_BYTES,
                    max_request_size=self._max_request_bytes,
                    request_timeout_ms=int(self._delivery_timeout_s * 1000),
                ),
                self._kafka,
                self._delivery_timeout_s,
                self._max_request_bytes,
            )
            await generation.begin()
            self._generation = generation
            return generation


class _Generation:
    """One inner producer and the messages that it still owes."""

    def __init__(
        self, inner: AIOKafkaProducer, kafka: KafkaConnection, delivery_timeout_s: float, max_request_bytes: int
    ) -> None:
        self.failure: MessagingError | None = None
        self._inner = inner
        self._kafka = kafka
        self._bootstrap_servers = kafka.bootstrap_servers
        self._delivery_timeout_s = delivery_timeout_s
        self._max_request_bytes = max_request_bytes
        self._known_topics: set[str] = set()
        self._outstanding: deque[tuple[float, asyncio.Future[Delivery]]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    async def begin(self) -> None:
        try:
            async with asyncio.timeout(self._delivery_timeout_s):
                await start(self._inner, self._kafka)
        except TimeoutError as error:
            await self._tear_down()
            raise await why_unreachable(self._kafka, error) from error
        except KafkaError as error:
            await self._tear_down()
            raise DeliveryFailedError(f"Kafka refused the producer: {error!r}") from error
        except BaseException:
            await self._tear_down()
            raise

    async def send(
        self, topic: str, key: bytes | None, value: bytes | None, headers: Headers
    ) -> asyncio.Future[Delivery]:
        if topic not in self._known_topics:
            await self._find_topic(topic)
        try:  # bounded by the inner producer's own request timeout; one of ours for each message would double the cost
            if key is None and value is None:
                inner = await self._send_nothing(topic, headers)
            else:
                inner = await self._inner.send(topic, value=value, key=key, headers=list(headers))
        except MessageSizeTooLargeError as error:  # found before sending: the others are not affected
            raise MessageTooLargeError(topic, _size(key, value, headers), self._max_request_bytes) from error
        except KafkaError as error:
            self._fail(self._translate(error, topic, key, value, headers))
            assert self.failure is not None
            raise self.failure from error
        return self._owe(inner, topic, key, value, headers)

    def _owe(
        self, inner: asyncio.Future[Any], topic: str, key: bytes | None, value: bytes | None, headers: Headers
    ) -> asyncio.Future[Delivery]:
        loop = asyncio.get_running_loop()
        outer: asyncio.Future[Delivery] = loop.create_future()

        def settle(done: asyncio.Future[Any]) -> None:
            error = None if done.cancelled() else done.exception()
            if done.cancelled() or error is not None:
                failure = self._translate(error, topic, key, value, headers)
                if not outer.done():
                    outer.set_exception(failure)
                self._fail(failure)
            elif not outer.done():
                stored = done.result()
                outer.set_result(Delivery(stored.topic, stored.partition, stored.offset))

        inner.add_done_callback(settle)
        if self.failure is not None:  # another task's message failed while this one was handed over
            outer.set_exception(_for_the_others(self.failure))
            return outer
        self._forget_settled()  # now rather than by the timer: a minute of kept futures is what the collector walks
        self._outstanding.append((time.monotonic() + self._delivery_timeout_s, outer))
        if self._timer is None:
            self._timer = loop.call_later(self._delivery_timeout_s, self._look_for_overdue)
        return outer

    def _look_for_overdue(self) -> None:
        self._timer = None
        self._forget_settled()
        if not self._outstanding:
            return
        remaining_s = self._outstanding[0][0] - time.monotonic()
        if remaining_s > 0:
            self._timer = asyncio.get_running_loop().call_later(remaining_s, self._look_for_overdue)
        else:
            detail = f"a message was not confirmed within {self._delivery_timeout_s:.0f} s"
            self._fail(BrokerUnavailableError(self._bootstrap_servers, detail))

    def _forget_settled(self) -> None:
        while self._outstanding and self._outstanding[0][1].done():
            self._outstanding.popleft()

    def _fail(self, failure: MessagingError) -> None:
        """End the generation: everything outstanding fails; the first failure is the one that is reported."""
        if self.failure is not None:
            return
        self.failure = failure
        while self._outstanding:
            _, outer = self._outstanding.popleft()
            if not outer.done():
                outer.set_exception(_for_the_others(failure))

    def _translate(
        self, error: BaseException | None, topic: str, key: bytes | None, value: bytes | None, headers: Headers
    ) -> MessagingError:
        match error:
            case MessageSizeTooLargeError():
                return MessageTooLargeError(topic, _size(key, value, headers))
            case KafkaConnectionError() | KafkaTimeoutError():
                return BrokerUnavailableError(self._bootstrap_servers, str(error))
            case TopicAuthorizationFailedError():
                return DeliveryFailedError(f"Kafka does not allow writing to {topic}.")
            case _:
                return DeliveryFailedError(f"Kafka did not take a message for {topic}: {error!r}")

    async def _find_topic(self, topic: str) -> None:
        """Learn the topic's partitions; tells a topic that is absent from a broker that does not answer."""
        client = self._inner.client
        asked_s = time.monotonic()
        client.add_topic(topic)
        while client.cluster.partitions_for_topic(topic) is None:
            answered = await client.force_metadata_update()
            waited_s = time.monotonic() - asked_s
            if client.cluster.partitions_for_topic(topic) is not None:
                break
            # A topic that was created a moment ago may not have reached the broker's view yet.
            if answered and waited_s > _TOPIC_VISIBLE_WITHIN_S:
                raise UnknownTopicError(topic)
            if waited_s > self._delivery_timeout_s:
                raise BrokerUnavailableError(self._bootstrap_servers, "no metadata")
            await asyncio.sleep(_METADATA_INTERVAL_S)
        self._known_topics.add(topic)

    async def _send_nothing(self, topic: str, headers: Headers) -> asyncio.Future[Any]:
        """A message with neither key nor value: legal in Kafka, and dead letters must be able to keep one."""
        batch = self._inner.create_batch()
        batch.append(key=None, value=None, timestamp=None, headers=list(headers))
        partitions = sorted(await self._inner.partitions_for(topic))
        sent: asyncio.Future[Any] = await self._inner.send_batch(batch, topic, partition=random.choice(partitions))
        return sent

    async def flush(self, timeout_s: float) -> None:
        """Wait until the broker has everything, as far as it answers in time."""
        with contextlib.suppress(TimeoutError, KafkaError):
            async with asyncio.timeout(timeout_s):
                await self._inner.flush()
        await asyncio.sleep(0)  # let the confirmations settle

    async def close(self, failure: MessagingError) -> None:
        """Tear the inner producer down; whatever it still owes fails with `failure`."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._forget_settled()
        if self._outstanding:
            self._fail(failure)
        await self._tear_down()

    async def _tear_down(self) -> None:
        """Disconnect without delivering anything more.

        The inner producer's own `stop` would flush, and wait for a silent broker for ever. So its sender is ended
        here: the first cancellation lets it wait for the requests under way, a further one ends those as well
        (they may be waiting for metadata that a closed client will never fetch).
        """
        sender_task = self._inner._sender.sender_task
        if sender_task is not None:
            sender_task.cancel()
        with contextlib.suppress(KafkaError, OSError):
            await self._inner.client.close()
        while sender_task is not None and not sender_task.done():
            await asyncio.wait([sender_task], timeout=_PATIENCE_S)
            sender_task.cancel()
        self._inner._closed = True  # or its destructor complains that nobody called `stop`


def _for_the_others(failure: MessagingError) -> MessagingError:
    """A fresh exception for a message that was given up because of `failure`."""
    if isinstance(failure, BrokerUnavailableError):
        return type(failure)(failure.bootstrap_servers, failure.detail)
    return DeliveryFailedError(f"Given up because an earlier message failed: {failure}")


def _size(key: bytes | None, value: bytes | None, headers: Headers) -> int:
    return len(key or b"") + len(value or b"") + sum(len(name.encode()) + len(data) for name, data in headers)
