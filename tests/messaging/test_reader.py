from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition

from infra.messaging.errors import BrokerUnavailableError, UnknownTopicError
from infra.messaging.producer import EventProducer
from infra.messaging.reader import Record, cluster_id, committed_offsets, end_offsets, lag, read_all, tail
from infra.servers.kafka import LocalKafka
from tests.servers.kafka_fixture import fresh_topic

pytestmark = pytest.mark.system


async def publish(kafka: LocalKafka, topic: str, count: int, *, first: int = 0) -> None:
    producer = EventProducer(kafka.bootstrap_servers)
    await producer.start()
    numbers = range(first, first + count)
    await asyncio.gather(*[await producer.send(topic, b"%d" % number, b"%d" % number) for number in numbers])
    await producer.stop()


async def test_everything_is_read_once_and_in_order_within_each_partition(kafka: LocalKafka) -> None:
    one, two = await fresh_topic(kafka, partitions=3), await fresh_topic(kafka, partitions=1)
    await publish(kafka, one, 10_000)
    await publish(kafka, two, 10)

    offsets: dict[tuple[str, int], list[int]] = {}
    values = set()
    async for record in read_all(kafka.bootstrap_servers, [one, two]):
        offsets.setdefault((record.topic, record.partition), []).append(record.offset)
        values.add((record.topic, record.value))

    assert all(numbers == list(range(len(numbers))) for numbers in offsets.values())
    assert len(values) == 10_010
    assert {place: len(numbers) for place, numbers in offsets.items()} == await end_offsets(
        kafka.bootstrap_servers, [one, two]
    )


async def test_empty_topics_end_at_once(kafka: LocalKafka) -> None:
    topic = await fresh_topic(kafka, partitions=4)

    assert [record async for record in read_all(kafka.bootstrap_servers, [topic])] == []


async def test_what_arrives_after_the_ends_were_noted_is_not_waited_for(kafka: LocalKafka) -> None:
    topic = await fresh_topic(kafka)
    await publish(kafka, topic, 10)
    values = []

    async for record in read_all(kafka.bootstrap_servers, [topic]):
        if not values:
            await publish(kafka, topic, 10, first=10)
        values.append(record.value)

    assert values == [b"%d" % number for number in range(10)]


async def test_tail_shows_what_comes_and_not_what_was(kafka: LocalKafka) -> None:
    topic = await fresh_topic(kafka)
    await publish(kafka, topic, 5)
    async with aclosing(tail(kafka.bootstrap_servers, [topic])) as records:
        # The first look begins reading; only then may more be published.
        waiting = asyncio.ensure_future(anext(records))
        found: Record | None = None
        number = 5
        while found is None:
            await publish(kafka, topic, 1, first=number)
            number += 1
            done, _ = await asyncio.wait([waiting], timeout=0.5)
            found = waiting.result() if done else None

    assert found.value is not None
    assert int(found.value) >= 5


async def test_tail_from_the_beginning_shows_both(kafka: LocalKafka) -> None:
    topic = await fresh_topic(kafka)
    await publish(kafka, topic, 5)
    async with aclosing(tail(kafka.bootstrap_servers, [topic], from_beginning=True)) as records:
        values = [(await anext(records)).value for _ in range(5)]
        await publish(kafka, topic, 1, first=5)
        values.append((await anext(records)).value)

    assert values == [b"%d" % number for number in range(6)]


async def test_lag_is_what_a_group_has_not_acknowledged(kafka: LocalKafka) -> None:
    topic = await fresh_topic(kafka, partitions=2)
    group = f"group-of-{topic}"
    await publish(kafka, topic, 100)
    ends = await end_offsets(kafka.bootstrap_servers, [topic])

    assert await committed_offsets(kafka.bootstrap_servers, group) == {}
    assert await lag(kafka.bootstrap_servers, group, [topic]) == ends

    consumer = AIOKafkaConsumer(bootstrap_servers=kafka.bootstrap_servers, group_id=group, enable_auto_commit=False)
    await consumer.start()
    consumer.assign([TopicPartition(topic, 0)])
    await consumer.commit({TopicPartition(topic, 0): 7})
    await consumer.stop()

    assert await committed_offsets(kafka.bootstrap_servers, group) == {(topic, 0): 7}
    assert await lag(kafka.bootstrap_servers, group, [topic]) == {
        (topic, 0): ends[topic, 0] - 7,
        (topic, 1): ends[topic, 1],
    }


async def test_the_log_has_an_identity(kafka: LocalKafka) -> None:
    assert await cluster_id(kafka.bootstrap_servers) == kafka.cluster_id


async def test_an_unknown_topic_is_named(kafka: LocalKafka) -> None:
    with pytest.raises(UnknownTopicError, match=r"no\.such\.topic"):
        await end_offsets(kafka.bootstrap_servers, ["no.such.topic"])


async def test_an_unreachable_broker_is_named_with_the_remedy() -> None:
    with pytest.raises(BrokerUnavailableError, match=r"127\.0\.0\.1:1 .*`concord up`"):
        await cluster_id("127.0.0.1:1")
