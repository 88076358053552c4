"""Topics from and to a copy: what a backup keeps of them, and how a restored system's Kafka comes by it.

Reading is at `read_committed`, as the stream workers read: a message whose transaction was taken back was never sent,
and must not come to life as a message without a transaction. So offsets have gaps, and messages that are published anew
have other offsets than they had; their order within a partition, keys, headers and timestamps stay. What a transaction
holds back that is still open comes after the end of what is committed, whenever it was sent.

A group's position can be set only while the group has no members. One that was killed is a member until its session
has ended, so that is waited for.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import CommitFailedError, KafkaError
from aiokafka.structs import OffsetAndMetadata

from infra.messaging.connection import Kafka, KafkaConnection, start
from infra.messaging.errors import DeliveryFailedError, MessagingError
from infra.messaging.producer import MAX_REQUEST_BYTES
from infra.messaging.reader import Position, Record, committed_offsets, end_offsets

GROUP_EMPTY_WITHIN_S = 60.0
"""How long the members of a group may take to be gone; longer than any session of ours."""

_POLL_MS = 200
_RECORDS_A_POLL = 1_000
_IN_FLIGHT = 500
_RETRY_INTERVAL_S = 0.5
_REQUEST_TIMEOUT_MS = 30_000


class GroupBusyError(MessagingError):
    """The consumer group has members: somebody is still reading."""

    def __init__(self, group: str, detail: str) -> None:
        super().__init__(
            f"The positions of group {group} cannot be set while it has members ({detail}). Stop every stream worker "
            "of this system, wherever it runs, and try again."
        )


async def bounds(kafka: Kafka, topics: Sequence[str]) -> dict[Position, tuple[int, int]]:
    """Of every partition of `topics`: the offset of its first message, and the end of what is committed.

    Raises BrokerUnavailableError, UnknownTopicError and MessagingError.
    """
    wanted = [TopicPartition(*position) for position in await end_offsets(kafka, topics)]
    async with _consumer(kafka) as consumer:
        consumer.assign(wanted)
        consumer.pause(*wanted)
        starts = await consumer.beginning_offsets(wanted)
        ends = await consumer.end_offsets(wanted)
    return {(part.topic, part.partition): (starts[part], ends[part]) for part in wanted}


async def read_partition(kafka: Kafka, position: Position, start_at: int, end: int) -> AsyncIterator[list[Record]]:
    """The messages of one partition from offset `start_at` up to `end`, some at a time; what is committed alone.

    Close the iterator (`aclosing`) if you leave it early. Raises BrokerUnavailableError and MessagingError.
    """
    partition = TopicPartition(*position)
    async with _consumer(kafka) as consumer:
        consumer.assign([partition])
        consumer.seek(partition, start_at)
        while await consumer.position(partition) < end:
            fetched = await consumer.getmany(partition, timeout_ms=_POLL_MS, max_records=_RECORDS_A_POLL)
            records = [
                Record(
                    topic=record.topic,
                    partition=record.partition,
                    offset=record.offset,
                    timestamp_ms=record.timestamp,
                    key=record.key,
                    value=record.value,
                    headers=tuple(record.headers),
                )
                for batch in fetched.values()
                for record in batch
                if record.offset < end
            ]
            if records:
                yield records


class Republisher:
    """Publishes messages into the partitions that they are from, in their order. Use as a context manager.

    Each partition must be given its messages in the order of the log.
    """

    def __init__(self, kafka: Kafka) -> None:
        self._kafka = kafka
        self._producer = AIOKafkaProducer(
            **KafkaConnection.of(kafka).client_options(),
            acks="all",
            enable_idempotence=True,
            linger_ms=5,
            max_request_size=MAX_REQUEST_BYTES,
            request_timeout_ms=_REQUEST_TIMEOUT_MS,
        )
        self._outstanding: deque[asyncio.Future[object]] = deque()

    async def __aenter__(self) -> Republisher:
        try:
            await start(self._producer, self._kafka)
        except BaseException:
            await self._producer.stop()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._producer.stop()

    async def publish(self, records: Sequence[Record], *, timestamp_ms: int | None = None) -> None:
        """Send; not all is confirmed when this returns. `timestamp_ms` is for messages that must not count as old."""
        try:
            for record in records:
                while len(self._outstanding) >= _IN_FLIGHT:
                    await self._outstanding.popleft()
                self._outstanding.append(
                    await self._producer.send(
                        record.topic,
                        value=record.value,
                        key=record.key,
                        partition=record.partition,
                        timestamp_ms=record.timestamp_ms if timestamp_ms is None else timestamp_ms,
                        headers=list(record.headers),
                    )
                )
        except KafkaError as error:
            raise DeliveryFailedError(f"Kafka did not take the messages of a backup: {error!r}") from error

    async def confirmed(self) -> None:
        """Until the broker has everything. Raises DeliveryFailedError."""
        try:
            while self._outstanding:
                await self._outstanding.popleft()
        except KafkaError as error:
            raise DeliveryFailedError(f"Kafka did not take the messages of a backup: {error!r}") from error


async def set_group_offsets(
    kafka: Kafka, group: str, offsets: Mapping[Position, int], *, within_s: float = GROUP_EMPTY_WITHIN_S
) -> None:
    """Have the group read on from `offsets`, whatever it had acknowledged, and see that it took.

    Raises GroupBusyError while the group has members, BrokerUnavailableError and MessagingError.
    """
    wanted = {TopicPartition(*position): OffsetAndMetadata(offset, "") for position, offset in offsets.items()}
    until_s = time.monotonic() + within_s
    while True:
        try:
            async with _consumer(kafka, group=group) as consumer:
                consumer.assign(list(wanted))
                consumer.pause(*wanted)
                await consumer.commit(wanted)
            break
        except (CommitFailedError, KafkaError) as error:
            if time.monotonic() > until_s:
                raise GroupBusyError(group, repr(error)) from error
        await asyncio.sleep(_RETRY_INTERVAL_S)
    held = await committed_offsets(kafka, group)
    wrong = {position: held.get(position) for position, offset in offsets.items() if held.get(position) != offset}
    if wrong:
        raise GroupBusyError(group, f"it holds {wrong} after they were set")


@asynccontextmanager
async def _consumer(kafka: Kafka, *, group: str | None = None) -> AsyncIterator[AIOKafkaConsumer]:
    consumer = AIOKafkaConsumer(
        **KafkaConnection.of(kafka).client_options(),
        group_id=group,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
        request_timeout_ms=_REQUEST_TIMEOUT_MS,
        max_partition_fetch_bytes=4 * 1024 * 1024,
    )
    try:
        await start(consumer, kafka)
        yield consumer
    finally:
        await consumer.stop()
