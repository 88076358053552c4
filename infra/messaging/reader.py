"""Reads topics from outside of any consumer group: for the command line, for checks and for tests.

Nothing here moves a position of the system, and nothing is acknowledged.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaConnectionError, KafkaError, NoError, for_code

from infra.messaging.connection import Kafka, KafkaConnection, start
from infra.messaging.errors import BrokerUnavailableError, MessagingError, UnknownTopicError

_REQUEST_TIMEOUT_MS = 15_000
_POLL_MS = 200
_RECORDS_A_POLL = 2_000
_RETRY_INTERVAL_S = 0.1

Position = tuple[str, int]
"""(topic, partition)"""


@dataclass(frozen=True, slots=True)
class Record:
    """A message as Kafka holds it. A header's name may occur twice, so headers stay a sequence."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...]


async def read_all(
    kafka: Kafka, topics: Sequence[str], *, from_beginning: bool = True, until_end: bool = True
) -> AsyncIterator[Record]:
    """The messages of `topics`, in order within each partition.

    `until_end`: the ends are noted once at the beginning, and what arrives later is not waited for. Without
    `from_beginning` reading begins at those ends, which only makes sense without `until_end`.
    Raises BrokerUnavailableError and UnknownTopicError. Close the iterator (`aclosing`) if you leave it early.
    """
    partitions = await _partitions(kafka, topics)
    async with _consumer(kafka) as consumer:
        _know(consumer, partitions)
        ends = await consumer.end_offsets(partitions)
        starts = await consumer.beginning_offsets(partitions) if from_beginning else ends
        remaining = {partition for partition in partitions if starts[partition] < ends[partition]}
        wanted = remaining if until_end else set(partitions)
        for partition in wanted:
            consumer.seek(partition, starts[partition])
        consumer.resume(*wanted)
        while wanted:
            fetched = await consumer.getmany(timeout_ms=_POLL_MS, max_records=_RECORDS_A_POLL)
            for partition, records in fetched.items():
                for record in records:
                    if until_end and record.offset >= ends[partition]:
                        break
                    yield Record(
                        topic=record.topic,
                        partition=record.partition,
                        offset=record.offset,
                        timestamp_ms=record.timestamp,
                        key=record.key,
                        value=record.value,
                        headers=tuple(record.headers),
                    )
            if not until_end:
                continue
            # The position and not the last offset decides: a log may end in something that is no message.
            for partition in list(remaining):
                if await consumer.position(partition) >= ends[partition]:
                    remaining.discard(partition)
                    consumer.pause(partition)


def tail(kafka: Kafka, topics: Sequence[str], *, from_beginning: bool = False) -> AsyncIterator[Record]:
    """The messages of `topics` as they come, for ever."""
    return read_all(kafka, topics, from_beginning=from_beginning, until_end=False)


async def end_offsets(kafka: Kafka, topics: Sequence[str]) -> dict[Position, int]:
    """The offset that each partition's next message will have."""
    partitions = await _partitions(kafka, topics)
    async with _consumer(kafka) as consumer:
        _know(consumer, partitions)
        ends = await consumer.end_offsets(partitions)
    return {(partition.topic, partition.partition): offset for partition, offset in ends.items()}


async def committed_offsets(kafka: Kafka, group: str) -> dict[Position, int]:
    """What a consumer group has acknowledged: the next offset that it will read. Empty for an unknown group."""
    deadline_s = time.monotonic() + _REQUEST_TIMEOUT_MS / 1000
    async with _admin(kafka) as admin:
        while True:
            # Every partition is asked for by name: a coordinator that is still loading answers without any, which
            # aiokafka does not tell from a group that has acknowledged nothing.
            asked = [
                TopicPartition(topic["topic"], partition["partition"])
                for topic in await admin.describe_topics()
                for partition in topic["partitions"]
            ]
            try:
                held = await admin.list_consumer_group_offsets(group, partitions=asked)
            except KafkaError as error:
                if not getattr(error, "retriable", False) or time.monotonic() > deadline_s:
                    raise
            else:
                if len(held) == len(asked):
                    return {(part.topic, part.partition): at.offset for part, at in held.items() if at.offset >= 0}
                if time.monotonic() > deadline_s:
                    raise MessagingError(f"Kafka did not tell what group {group} has acknowledged.")
            await asyncio.sleep(_RETRY_INTERVAL_S)


async def group_members(kafka: Kafka, groups: Sequence[str]) -> dict[str, int]:
    """How many consumers each group has now; 0 for one that there is not."""
    deadline_s = time.monotonic() + _REQUEST_TIMEOUT_MS / 1000
    async with _admin(kafka) as admin:
        while True:
            try:
                # One by one: aiokafka 0.14 reads answers of version 3 by the schema of version 2, which lacks the end
                # of each group, so that the second group of an answer cannot be read.
                answers = [await admin.describe_consumer_groups([group]) for group in groups]
                described = [one for (answer,) in answers for one in answer.groups]
                for code, *_ in described:  # of a coordinator that is still loading, for one
                    if for_code(code) is not NoError:
                        raise for_code(code)()
                return {name: len(members) for _code, name, _state, _type, _protocol, members, *_ in described}
            except KafkaError as error:
                if not getattr(error, "retriable", False) or time.monotonic() > deadline_s:
                    raise
            await asyncio.sleep(_RETRY_INTERVAL_S)


async def known_groups(kafka: Kafka, groups: Sequence[str]) -> list[str]:
    """Those of `groups` that have acknowledged something, or have consumers."""
    async with _admin(kafka) as admin:
        known = {group for group, _protocol in await admin.list_consumer_groups()}
    return [group for group in groups if group in known]


async def lag(kafka: Kafka, groups: str | Sequence[str], topics: Sequence[str]) -> dict[Position, int]:
    """How many offsets each partition has beyond what has been acknowledged: of several groups, by the foremost.

    A partition without an acknowledged offset, or with one that retention has passed, counts from its beginning.
    """
    committed: dict[Position, int] = {}
    for group in [groups] if isinstance(groups, str) else groups:
        for position, offset in (await committed_offsets(kafka, group)).items():
            committed[position] = max(offset, committed.get(position, 0))
    partitions = await _partitions(kafka, topics)
    async with _consumer(kafka) as consumer:
        _know(consumer, partitions)
        ends = await consumer.end_offsets(partitions)
        starts = await consumer.beginning_offsets(partitions)
    lags = {}
    for partition in partitions:
        position = (partition.topic, partition.partition)
        lags[position] = max(0, ends[partition] - max(committed.get(position, 0), starts[partition]))
    return lags


async def cluster_id(kafka: Kafka) -> str:
    """The identity of the log behind `kafka`: positions of one log mean nothing in another."""
    async with _admin(kafka) as admin:
        cluster = await admin.describe_cluster()
    return str(cluster["cluster_id"])


async def _partitions(kafka: Kafka, topics: Iterable[str]) -> list[TopicPartition]:
    async with _admin(kafka) as admin:
        # All topics, not these: asking for one by name would create it where the broker is so configured.
        known = {topic["topic"]: topic["partitions"] for topic in await admin.describe_topics()}
    partitions = []
    for topic in topics:
        if topic not in known:
            raise UnknownTopicError(topic)
        partitions += [TopicPartition(topic, number) for number in sorted(part["partition"] for part in known[topic])]
    return partitions


def _know(consumer: AIOKafkaConsumer, partitions: Sequence[TopicPartition]) -> None:
    """Have the client learn all topics in one request: offsets of unknown ones cost it 100 ms a topic."""
    consumer.assign(partitions)
    consumer.pause(*partitions)


@contextmanager
def _translated(kafka: Kafka) -> Iterator[None]:
    try:
        yield
    except KafkaConnectionError as error:
        raise BrokerUnavailableError(KafkaConnection.of(kafka).bootstrap_servers, str(error)) from error
    except KafkaError as error:
        raise MessagingError(f"Kafka refused the request: {error!r}") from error


@asynccontextmanager
async def _consumer(kafka: Kafka) -> AsyncIterator[AIOKafkaConsumer]:
    consumer = AIOKafkaConsumer(
        **KafkaConnection.of(kafka).client_options(),
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        request_timeout_ms=_REQUEST_TIMEOUT_MS,
        max_partition_fetch_bytes=4 * 1024 * 1024,
    )
    try:
        with _translated(kafka):
            await start(consumer, kafka)
            yield consumer
    finally:
        await consumer.stop()


@asynccontextmanager
async def _admin(kafka: Kafka) -> AsyncIterator[AIOKafkaAdminClient]:
    admin = AIOKafkaAdminClient(**KafkaConnection.of(kafka).client_options(), request_timeout_ms=_REQUEST_TIMEOUT_MS)
    try:
        with _translated(kafka):
            await start(admin, kafka)
            yield admin
    finally:
        await admin.close()
