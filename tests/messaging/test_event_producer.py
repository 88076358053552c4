from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from infra.messaging.errors import (
    BrokerUnavailableError,
    DeliveryFailedError,
    MessageTooLargeError,
    UnknownTopicError,
)
from infra.messaging.producer import EventProducer
from infra.messaging.reader import Record, read_all
from infra.servers.kafka import LocalKafka
from tests.servers.kafka_fixture import fresh_topic

pytestmark = pytest.mark.system

MEBIBYTE = 1024 * 1024


@asynccontextmanager
async def started(kafka: LocalKafka, *, delivery_timeout_ms: int = 30_000) -> AsyncIterator[EventProducer]:
    producer = EventProducer(kafka.bootstrap_servers, delivery_timeout_ms=delivery_timeout_ms)
    await producer.start()
    try:
        yield producer
    finally:
        await producer.stop()


async def records_of(kafka: LocalKafka, topic: str) -> list[Record]:
    return [record async for record in read_all(kafka.bootstrap_servers, [topic])]


async def test_a_delivery_says_where_the_message_is_and_the_message_is_there(kafka: LocalKafka) -> None:
    topic = await fresh_topic(kafka)
    headers = [("ce_id", b"1"), ("ce_id", b"twice"), ("empty", b"")]
    async with started(kafka) as producer:
        delivery = await producer.send_and_wait(topic, b"key", b"value", headers)

    (record,) = await records_of(kafka, topic)
    assert (delivery.topic, delivery.partition, delivery.offset) == (topic, 0, 0)
    assert (record.key, record.value, record.headers) == (b"key", b"value", tuple(headers))
    assert (record.topic, record.partition, record.offset) == (topic, 0, 0)


async def test_messages_with_one_key_keep_their_order(kafka: LocalKafka) -> None:
    topic = await fresh_topic(kafka, partitions=4)
    keys = [b"a", b"b", b"c"]
    async with started(kafka) as producer:
        futures = [await producer.send(topic, keys[n % 3], b"%d" % n) for n in range(3000)]
        deliveries = await asyncio.gather(*futures)

    assert len({(delivery.partition, delivery.offset) for delivery in deliveries}) == 3000
    records = await records_of(kafka, topic)
    for index, key in enumerate(keys):
        assert [record.value for record in records if record.key == key] == [b"%d" % n for n in range(index, 3000, 3)]


@pytest.mark.parametrize(("key", "value"), [(None, None), (b"key", None), (None, b""), (b"", b"value")])
async def test_absent_keys_and_values_arrive_as_they_were(
    kafka: LocalKafka, key: bytes | None, value: bytes | None
) -> None:
    topic = await fresh_topic(kafka)
    async with started(kafka) as producer:
        await producer.send_and_wait(topic, key, value, [("why", b"dead letters keep everything")])

    (record,) = await records_of(kafka, topic)
    assert (record.key, record.value) == (key, value)
    assert record.headers == (("why", b"dead letters keep everything"),)


async def test_a_message_of_almost_eight_mebibytes_passes(kafka: LocalKafka) -> None:
    topic = await fresh_topic(kafka)
    value = os.urandom(8 * MEBIBYTE - 4096)
    async with started(kafka) as producer:
        await producer.send_and_wait(topic, b"key", value)

    (record,) = await records_of(kafka, topic)
    assert record.value == value


async def test_a_message_that_is_too_large_is_refused_and_the_others_are_not_affected(kafka: LocalKafka) -> None:
    topic = await fresh_topic(kafka)
    async with started(kafka) as producer:
        before = await producer.send(topic, b"key", b"before")
        with pytest.raises(MessageTooLargeError, match=rf"A message of 8,388,611 bytes for {topic} exceeds"):
            await producer.send(topic, b"key", bytes(8 * MEBIBYTE))
        after = await producer.send(topic, b"key", b"after")
        await asyncio.gather(before, after)

    assert [record.value for record in await records_of(kafka, topic)] == [b"before", b"after"]


async def test_after_the_broker_refused_a_message_the_producer_works_on(kafka: LocalKafka) -> None:
    """The topic's own limit is known to the broker alone. A gap in the sequence numbers must not remain."""
    topic = await fresh_topic(kafka, configs={"max.message.bytes": "10000"})
    async with started(kafka) as producer:
        await producer.send_and_wait(topic, b"key", b"first")
        with pytest.raises(MessageTooLargeError, match="the broker's limit for this topic"):
            await producer.send_and_wait(topic, b"key", bytes(20_000))
        for number in range(3):
            await producer.send_and_wait(topic, b"key", b"%d" % number)

    assert [record.value for record in await records_of(kafka, topic)] == [b"first", b"0", b"1", b"2"]


async def test_messages_behind_a_refused_one_fail_too_and_can_be_sent_again_in_order(kafka: LocalKafka) -> None:
    topic = await fresh_topic(kafka, configs={"max.message.bytes": "10000"})
    async with started(kafka) as producer:
        refused = await producer.send(topic, b"key", os.urandom(150_000))  # fills a batch of its own
        behind = [await producer.send(topic, b"key", b"%d" % number) for number in range(3)]

        with pytest.raises(MessageTooLargeError):
            await refused
        outcomes = await asyncio.gather(*behind, return_exceptions=True)
        assert all(isinstance(outcome, DeliveryFailedError) for outcome in outcomes)

        await asyncio.gather(*[await producer.send(topic, b"key", b"%d" % number) for number in range(3)])

    assert [record.value for record in await records_of(kafka, topic)][-3:] == [b"0", b"1", b"2"]


async def test_an_unknown_topic_is_named_and_concerns_nobody_else(kafka: LocalKafka) -> None:
    topic = await fresh_topic(kafka)
    async with started(kafka) as producer:
        with pytest.raises(UnknownTopicError, match=r"no topic 'no\.such\.topic'"):
            await producer.send("no.such.topic", b"key", b"value")
        await producer.send_and_wait(topic, b"key", b"value")


async def test_a_broker_that_nobody_started_is_named_with_the_remedy() -> None:
    producer = EventProducer("127.0.0.1:1")

    with pytest.raises(BrokerUnavailableError, match=r"does not answer at 127\.0\.0\.1:1 .*`concord up`"):
        await producer.start()
    await producer.stop()


async def test_a_silent_broker_is_reported_in_time_and_the_producer_recovers_with_it(kafka: LocalKafka) -> None:
    topic = await fresh_topic(kafka)
    assert kafka.pid is not None
    # Time enough for a broker that answers, and too little for it to be taken for dead by its own controller.
    async with started(kafka, delivery_timeout_ms=3000) as producer:
        await producer.send_and_wait(topic, b"key", b"before")
        os.kill(kafka.pid, signal.SIGSTOP)
        try:
            futures = [await producer.send(topic, b"key", b"%d" % number) for number in range(3)]
            outcomes = await asyncio.gather(*futures, return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [BrokerUnavailableError] * 3
            assert f"does not answer at {kafka.bootstrap_servers}" in str(outcomes[0])
        finally:
            os.kill(kafka.pid, signal.SIGCONT)
            await kafka.wait_ready()
        await asyncio.gather(*[await producer.send(topic, b"key", b"%d again" % number) for number in range(3)])

    values = [record.value for record in await records_of(kafka, topic)]
    # What was on its way may have been stored, before what was sent again; never in between or after.
    assert values[0] == b"before"
    assert values[-3:] == [b"0 again", b"1 again", b"2 again"]
    assert values[1:-3] in ([], [b"0", b"1", b"2"])


async def test_stop_delivers_what_is_outstanding(kafka: LocalKafka) -> None:
    topic = await fresh_topic(kafka)
    async with started(kafka) as producer:
        futures = [await producer.send(topic, None, b"%d" % number) for number in range(100)]

    assert all(future.done() and future.exception() is None for future in futures)
    assert len(await records_of(kafka, topic)) == 100


async def test_a_producer_that_was_not_started_or_is_stopped_says_so(kafka: LocalKafka) -> None:
    producer = EventProducer(kafka.bootstrap_servers)
    with pytest.raises(RuntimeError, match="not started"):
        await producer.send("any", None, b"value")
    await producer.start()
    await producer.stop()
    await producer.stop()
    with pytest.raises(RuntimeError, match="not started"):
        await producer.send("any", None, b"value")
