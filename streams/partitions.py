"""One queue and one outstanding batch for each topic partition, in the order of the log.

Theory of operation. The stream offers each message as it arrives; nothing here ever blocks the stream, so a partition
whose commands wait for storage holds up no other. A partition with messages has one task, which takes what is waiting
(a batch), has it worked on, reports the batch as finished and takes the next: rule 11 of the architecture. Reports
are therefore in the order of the log and never pass over a message that is not finished.

    offered ──► waiting (bounded: the partition is paused in Kafka's client) ──► one batch at work ──► finished

A message counts only in the generation (one assignment of partitions to this process) in which it was offered. When
partitions are revoked, what waits is dropped, since whoever owns the partition next reads it again, and a batch at work
that ends too late is not reported.

Nothing is skipped silently: within a generation every offset must follow the one before. Logs do have gaps (deleted
messages, transaction markers), so a gap is looked up in Kafka once; if Kafka has a message there after all, the client
lost it on the way and the process has to begin anew from its committed positions.

It never knows what the work is, and never touches Kafka, Faust or an actor.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from schemas.envelope import RawMessage

Partition = tuple[str, int]
"""Topic and number. Faust's and aiokafka's own pairs are equal to it."""


@dataclass(frozen=True, slots=True)
class Received:
    """A message to be worked on. `original` is its value where `raw` leaves it out for its size."""

    raw: RawMessage
    original: bytes | None = None
    size_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        raw = self.raw
        headers = sum(len(name) + len(value or b"") for name, value in raw.headers)
        values = len(raw.key or b"") + len(raw.value or b"") + len(self.original or b"")
        object.__setattr__(self, "size_bytes", values + headers + _OVERHEAD_BYTES)


_OVERHEAD_BYTES = 512


@dataclass(frozen=True)
class Limits:
    """How much may wait in this process, and how much of it makes a batch.

    A lone message waits `linger_s` for company. What arrives after a partition was paused (it is already in the
    client's own buffers) is still taken, so the limits are soft by about one fetch.
    """

    batch_messages: int = 256
    batch_bytes: int = 4 * 1024 * 1024
    linger_s: float = 0.005
    partition_messages: int = 2_048
    partition_bytes: int = 8 * 1024 * 1024
    total_bytes: int = 64 * 1024 * 1024


class Source(Protocol):
    """What the pipelines ask of the Kafka client. Called from the event loop of the pipelines."""

    def pause(self, partition: Partition) -> None:
        """Fetch no more of this partition for now. Pausing twice is harmless."""

    def resume(self, partition: Partition) -> None: ...

    def start_of(self, partition: Partition) -> int | None:
        """The offset from which this generation reads the partition; None when it is not known."""

    async def first_offset(self, partition: Partition, offset: int) -> int | None:
        """The offset of the first message that Kafka has at or after `offset`; None at the end of the log."""


class LostMessageError(Exception):
    """Kafka has a message that its client never delivered."""


Work = Callable[[Partition, list[Received], Callable[[], None]], Awaitable[None]]
"""Does one batch. The third argument is to be called whenever something was tried: waiting is no stalling (rule 12)."""


@dataclass
class _Pipeline:
    """One partition's state. `next_offered` and `next_finished` are offsets; times are of the monotonic clock.

    `epoch` counts the generations seen here: a batch at work belongs to the epoch in which it was taken. It is not
    Kafka's number, because a member that rejoins may be given the one that it had.
    """

    partition: Partition
    generation: object = None
    epoch: int = 0
    waiting: deque[Received] = field(default_factory=deque)
    waiting_bytes: int = 0
    next_offered: int | None = None
    next_finished: int | None = None
    at_work: int = 0
    at_work_since_ms: int | None = None
    paused: bool = False
    last_attempt_s: float = 0.0
    task: asyncio.Task[None] | None = None


def _oldest_ms(pipeline: _Pipeline) -> int | None:
    if pipeline.at_work:
        return pipeline.at_work_since_ms
    try:
        return pipeline.waiting[0].raw.timestamp_ms
    except IndexError:  # emptied meanwhile, by the loop's own thread
        return None


@dataclass(frozen=True, slots=True)
class Progress:
    """A partition as the watchdog, the metrics and `/healthz` see it.

    `oldest_ms` is the timestamp of the oldest message that was taken and is not finished; None when there is none.
    """

    waiting: int
    at_work: int
    next_finished: int | None
    last_attempt_s: float
    oldest_ms: int | None = None


class Pipelines:
    """The pipelines of all partitions that one kind of work is done for.

    `finished(partition, next_offset)` is told after each batch; `failed(error)` of anything unexpected and must end
    the process, because going on would mean going past an unfinished message.
    """

    def __init__(
        self,
        *,
        work: Work,
        source: Source,
        finished: Callable[[Partition, int], None],
        failed: Callable[[BaseException], None],
        limits: Limits | None = None,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._work = work
        self._source = source
        self._finished = finished
        self._failed = failed
        self._limits = limits or Limits()
        self._monotonic_s = monotonic_s
        self._pipelines: dict[Partition, _Pipeline] = {}
        self._waiting_bytes = 0
        self._closed = False

    def offer(self, partition: Partition, generation: object, received: Received) -> None:
        """Take one message. Those of a partition must be offered in the order of their offsets.

        A message that was offered before in this generation is ignored.
        """
        if self._closed:
            return
        pipeline = self._pipelines.get(partition)
        if pipeline is None:
            pipeline = self._pipelines[partition] = _Pipeline(partition)
        if pipeline.generation != generation or pipeline.next_offered is None:
            self._begin(pipeline, generation)
        offset = received.raw.offset
        if pipeline.next_offered is not None and offset < pipeline.next_offered:
            return
        if pipeline.next_finished is None:
            pipeline.next_finished = offset
        pipeline.next_offered = offset + 1
        pipeline.waiting.append(received)
        pipeline.waiting_bytes += received.size_bytes
        self._waiting_bytes += received.size_bytes
        if self._is_full(pipeline):
            # Said again for each message: a client may have resumed the partition for reasons of its own.
            pipeline.paused = True
            self._source.pause(partition)
        if pipeline.task is None:
            pipeline.last_attempt_s = self._monotonic_s()
            pipeline.task = asyncio.create_task(self._run(pipeline), name=f"{partition[0]}[{partition[1]}]")

    async def revoke(self, *, patience_s: float) -> None:
        """Drop what waits; give batches at work `patience_s` to be finished and reported, then disown them."""
        for pipeline in self._pipelines.values():
            self._drop_waiting(pipeline)
        at_work = [pipeline.task for pipeline in self._pipelines.values() if pipeline.task is not None]
        if at_work:
            await asyncio.wait(at_work, timeout=patience_s)
        for partition, pipeline in list(self._pipelines.items()):
            if pipeline.task is None:
                del self._pipelines[partition]
            else:
                # The next generation's messages queue behind it: one outstanding batch, also across generations.
                self._drop_waiting(pipeline)
                pipeline.epoch += 1
                pipeline.generation = pipeline.next_offered = pipeline.next_finished = None

    async def close(self, *, patience_s: float) -> None:
        """Take nothing more, and do as at a revocation."""
        self._closed = True
        await self.revoke(patience_s=patience_s)

    def progress(self) -> Mapping[Partition, Progress]:
        """Every partition that has had a message in this generation. May be called from any thread."""
        return {
            partition: Progress(len(one.waiting), one.at_work, one.next_finished, one.last_attempt_s, _oldest_ms(one))
            for partition, one in list(self._pipelines.items())
        }

    @property
    def waiting_bytes(self) -> int:
        return self._waiting_bytes

    # --- one partition ------------------------------------------------------------------------------------------

    def _begin(self, pipeline: _Pipeline, generation: object) -> None:
        self._drop_waiting(pipeline)
        pipeline.epoch += 1
        pipeline.generation = generation
        pipeline.paused = False
        pipeline.next_offered = pipeline.next_finished = self._source.start_of(pipeline.partition)

    def _drop_waiting(self, pipeline: _Pipeline) -> None:
        pipeline.waiting.clear()
        self._waiting_bytes -= pipeline.waiting_bytes
        pipeline.waiting_bytes = 0

    async def _run(self, pipeline: _Pipeline) -> None:
        try:
            if self._limits.linger_s and len(pipeline.waiting) < self._limits.batch_messages:
                await asyncio.sleep(self._limits.linger_s)
            while pipeline.waiting:
                await self._one_batch(pipeline)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._failed(error)
            raise
        finally:
            pipeline.task = None
            pipeline.at_work = 0

    async def _one_batch(self, pipeline: _Pipeline) -> None:
        epoch = pipeline.epoch
        if not await self._follows(pipeline):
            return
        batch = self._take(pipeline)
        pipeline.at_work, pipeline.at_work_since_ms = len(batch), batch[0].raw.timestamp_ms

        def tried() -> None:
            pipeline.last_attempt_s = self._monotonic_s()

        tried()
        await self._work(pipeline.partition, batch, tried)
        tried()
        pipeline.at_work = 0
        if pipeline.epoch == epoch:
            pipeline.next_finished = batch[-1].raw.offset + 1
            self._finished(pipeline.partition, pipeline.next_finished)

    async def _follows(self, pipeline: _Pipeline) -> bool:
        """Whether the next message may be worked on; False if it was dropped meanwhile. Raises LostMessageError."""
        offset, expected, epoch = pipeline.waiting[0].raw.offset, pipeline.next_finished, pipeline.epoch
        if expected is None or offset == expected:
            return True
        there = await self._source.first_offset(pipeline.partition, expected)
        if pipeline.epoch != epoch or not pipeline.waiting:
            return False
        if there != offset:
            raise LostMessageError(f"{pipeline.partition}: offset {offset} came, but {there} is next after {expected}")
        pipeline.next_finished = offset
        return True

    def _take(self, pipeline: _Pipeline) -> list[Received]:
        """The longest unbroken run of offsets, up to a batch; at least one message, however large."""
        batch = [pipeline.waiting.popleft()]
        size_bytes = batch[0].size_bytes
        while pipeline.waiting and len(batch) < self._limits.batch_messages:
            following = pipeline.waiting[0]
            size_bytes += following.size_bytes
            if following.raw.offset != batch[-1].raw.offset + 1 or size_bytes > self._limits.batch_bytes:
                break
            batch.append(pipeline.waiting.popleft())
        freed_bytes = sum(received.size_bytes for received in batch)
        pipeline.waiting_bytes -= freed_bytes
        self._waiting_bytes -= freed_bytes
        self._resume_those_with_room()
        return batch

    def _resume_those_with_room(self) -> None:
        if self._waiting_bytes > self._limits.total_bytes // 2:
            return
        for pipeline in self._pipelines.values():
            if pipeline.paused and self._has_room(pipeline):
                pipeline.paused = False
                self._source.resume(pipeline.partition)

    def _is_full(self, pipeline: _Pipeline) -> bool:
        limits = self._limits
        return (
            len(pipeline.waiting) >= limits.partition_messages
            or pipeline.waiting_bytes >= limits.partition_bytes
            or self._waiting_bytes >= limits.total_bytes
        )

    def _has_room(self, pipeline: _Pipeline) -> bool:
        limits = self._limits
        return (
            len(pipeline.waiting) <= limits.partition_messages // 2
            and pipeline.waiting_bytes <= limits.partition_bytes // 2
        )
