"""Faust's Kafka consumer with what it gets wrong about offsets taken out of its hands.

Faust 0.15.3 reads, heartbeats and rebalances here; it commits nothing. Its own bookkeeping would lose messages:

- It acknowledges what it skips at a rebalance, and commits over a single missing offset (issue 606). So the topics
  are declared with `acks=False`, for which Faust records nothing, and `acknowledge` commits exactly what is finished.
- After a rebalance it goes back to the committed offsets, but leaves partitions without one (or with offset 0) where
  they are, behind messages that it has just thrown away. `seek_to_committed` seeks every partition.
- aiokafka reports a membership that is lost for good to whoever polls, and Faust polls past it: `membership_error`.
- When the group rebalances while it stops, as it does when two workers leave at once, it closes the connection: what
  was finished could not be acknowledged then, nor could the group be left. `App` does as at any other rebalance.

The consumer lives in a thread with a loop of its own. Every public coroutine here may be awaited in the main loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterable, Mapping
from typing import Any, TypeVar

import faust
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import CommitFailedError
from aiokafka.structs import OffsetAndMetadata
from faust.auth import OAuthCredentials, SASLCredentials, SSLCredentials
from faust.transport.drivers import aiokafka as driver
from faust.types import TP
from faust.types.auth import CredentialsT

from infra.messaging.connection import Kafka, KafkaConnection, TokenProvider
from streams.partitions import Partition

T = TypeVar("T")

# Faust's services log their starting and stopping under the name of their class's module, which is this one.
logging.getLogger(__name__).setLevel(logging.WARNING)

FETCH_MAX_WAIT_MS = 250
"""How long the broker may keep a fetch without data. A partition that is drained meanwhile waits for its end."""

ISOLATION_LEVEL = "read_committed"
"""A command sent in a Kafka transaction that was aborted has never been sent."""

LOOK_TIMEOUT_MS = 5_000


class NotAcknowledgedError(Exception):
    """The group has rebalanced: what was to be acknowledged belongs to somebody else now, or is read again."""


class ConsumerThread(driver.AIOKafkaConsumerThread):
    """The thread in which aiokafka's consumer lives."""

    start_offsets: Mapping[Partition, int] = {}

    def _create_worker_consumer(self, transport: Any) -> AIOKafkaConsumer:
        consumer = super()._create_worker_consumer(transport)
        # Neither is a setting of Faust's: it waits 1500 ms, and reads messages whose sender took them back.
        consumer._fetch_max_wait_ms = FETCH_MAX_WAIT_MS
        consumer._isolation_level = ISOLATION_LEVEL
        return consumer

    async def seek_to_committed(self) -> Mapping[TP, int]:
        """Go to where the group stands in every assigned partition; to the oldest message where it stands nowhere."""
        return await self.in_thread(self._seek_to_committed())

    async def _seek_to_committed(self) -> Mapping[TP, int]:
        consumer = self._ensure_consumer()
        partitions = sorted(consumer.assignment())
        committed = dict(zip(partitions, await asyncio.gather(*map(consumer.committed, partitions)), strict=True))
        fresh = [partition for partition in partitions if committed[partition] is None]
        starts = {**committed, **(await consumer.beginning_offsets(fresh) if fresh else {})}
        for partition, offset in starts.items():
            consumer.seek(partition, offset)
        offsets = {TP(partition.topic, partition.partition): offset for partition, offset in starts.items()}
        self.start_offsets = offsets
        return offsets

    async def acknowledge(self, offsets: Mapping[Partition, int]) -> None:
        consumer = self._ensure_consumer()
        held = consumer.assignment()
        wanted = {TopicPartition(*partition): OffsetAndMetadata(offset, "") for partition, offset in offsets.items()}
        if not wanted.keys() <= held:
            raise NotAcknowledgedError(f"no longer assigned: {sorted(wanted.keys() - held)}")
        try:
            await consumer.commit(wanted)
        except CommitFailedError as error:
            raise NotAcknowledgedError(str(error)) from error

    async def end_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        ends = await self._ensure_consumer().end_offsets([TopicPartition(*partition) for partition in partitions])
        return {(partition.topic, partition.partition): offset for partition, offset in ends.items()}

    def give_up_place(self) -> None:
        """Leave the group when this consumer stops. A static member would keep its place until its session ends."""
        self._ensure_consumer()._coordinator._group_instance_id = None

    def membership_error(self) -> BaseException | None:
        coordinator = self._ensure_consumer()._coordinator
        if coordinator._coordination_task.done():
            return RuntimeError("the group coordination has ended")
        error: BaseException | None = coordinator._pending_exception
        return error

    async def in_thread(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` in the consumer's loop. Not through Faust's own queue, whose two workers may both be waiting."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self.thread_loop))


class Consumer(driver.Consumer):
    """What the rest of `streams` asks of Kafka's client."""

    _thread: ConsumerThread

    def _new_consumer_thread(self) -> ConsumerThread:
        return ConsumerThread(self, loop=self.loop, beacon=self.beacon)

    async def acknowledge(self, offsets: Mapping[Partition, int]) -> None:
        """Commit, for the group, that everything before these offsets is finished.

        Waits for a broker that does not answer. Raises NotAcknowledgedError and aiokafka's errors.
        """
        await self._thread.in_thread(self._thread.acknowledge(offsets))

    async def end_offsets(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """The offset that each partition's next message will have, as the broker says now."""
        return await self._thread.in_thread(self._thread.end_offsets(list(partitions)))

    def give_up_place(self) -> None:
        """Leave the group when this consumer stops, so that others get its partitions at once."""
        self._thread.give_up_place()

    def membership_error(self) -> BaseException | None:
        """Why this process will get no messages any more; None while it is a member of the group or becomes one."""
        return self._thread.membership_error()

    def start_of(self, partition: Partition) -> int | None:
        """Where reading began after the last rebalance."""
        return self._thread.start_offsets.get(partition)

    def pause(self, partition: Partition) -> None:
        self.on_buffer_full(TP(*partition))

    def resume(self, partition: Partition) -> None:
        self.on_buffer_drop(TP(*partition))


class Transport(driver.Transport):
    """Faust's Kafka transport with the consumer above."""

    Consumer = Consumer


def credentials(kafka: KafkaConnection) -> CredentialsT | None:
    """The same connection in Faust's words; None for a Kafka without protection."""
    sasl, context = kafka.authentication, kafka.ssl_context
    if sasl is None:
        return None if context is None else SSLCredentials(context)
    if sasl.mechanism == "OAUTHBEARER":
        return OAuthCredentials(oauth_cb=TokenProvider(sasl), ssl_context=context)
    return SASLCredentials(
        username=sasl.username, password=sasl.password(), ssl_context=context, mechanism=sasl.mechanism
    )


class App(faust.App):
    """Faust's application, which goes on being a member of its group until it has stopped."""

    async def _on_partitions_revoked(self, revoked: set[TP]) -> None:
        if self.should_stop:
            await self.on_partitions_revoked.send(revoked)
        else:
            await super()._on_partitions_revoked(revoked)

    async def _on_partitions_assigned(self, assigned: set[TP], generation_id: int = 0) -> None:
        if not self.should_stop:  # else these are given up in a moment
            await super()._on_partitions_assigned(assigned, generation_id)


async def first_offset(kafka: Kafka, partition: Partition, offset: int) -> int | None:
    """The offset of the first message at or after `offset`, as a consumer of its own finds it; None at the end."""
    wanted = TopicPartition(*partition)
    consumer = AIOKafkaConsumer(
        **KafkaConnection.of(kafka).client_options(),
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level=ISOLATION_LEVEL,
    )
    await consumer.start()
    try:
        consumer.assign([wanted])
        start = (await consumer.beginning_offsets([wanted]))[wanted]
        end = (await consumer.end_offsets([wanted]))[wanted]
        consumer.seek(wanted, max(offset, start))
        while await consumer.position(wanted) < end:
            fetched = await consumer.getmany(timeout_ms=LOOK_TIMEOUT_MS, max_records=1)
            for records in fetched.values():
                return records[0].offset if records[0].offset < end else None
        return None
    finally:
        await consumer.stop()
