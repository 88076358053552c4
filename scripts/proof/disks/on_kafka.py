"""Numbered messages go to one Kafka while the disk below it fills up, fails to sync, or takes its time.

The topic has `flush.messages=1`: each message is synced before it is acknowledged. Without it, a single node keeps
what it acknowledged in the operating system's memory, where neither a failed sync nor a kill can show anything.

What must hold: every acknowledged number can be read, and first occurrences are in the order of the sender. What was
not acknowledged is sent again until it is, as stream workers do, and may be there twice. Whoever watches over a server
starts it again when it ends (`concord up` does); here that is this file.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.messaging.errors import MessagingError
from infra.messaging.producer import EventProducer
from infra.messaging.reader import read_all
from infra.messaging.topics import TopicSpec, ensure_topics
from infra.servers.kafka import LocalKafka
from scripts.proof.disks.endings import after_a_full_disk, after_failed_syncs, end_of, start_of
from scripts.proof.disks.injury import SYNCS, SmallDisk, traced
from scripts.proof.disks.scenes import together

DELIVERY_TIMEOUT_MS = 3_000
EXIT_CODE = 1
"""What Kafka ends with when its only log directory has failed."""

_PATIENCE_S = 120.0
_LANES = 4
_BODY = b"x" * 2_000


class Sender:
    """Sends the numbers 0, 1, 2, … of each of its lanes, one after the other, each until it is acknowledged."""

    def __init__(self, bootstrap_servers: str, topic: str) -> None:
        self.topic = topic
        self.acknowledged: dict[int, int] = dict.fromkeys(range(_LANES), 0)
        """How many numbers of each lane."""
        self.errors: Counter[str] = Counter()
        self.longest_wait_s = 0.0
        """From a `send` to its answer, good or bad."""
        self._producer = EventProducer(bootstrap_servers, delivery_timeout_ms=DELIVERY_TIMEOUT_MS)
        self._ending = False
        self._changed = asyncio.Event()

    @contextlib.asynccontextmanager
    async def sending(self) -> AsyncIterator[Sender]:
        """Send from all lanes until the end of the block; then what is under way is acknowledged first."""
        with contextlib.suppress(MessagingError):  # The lanes try again, as after every other failure.
            await self._producer.start()
        lanes = [asyncio.create_task(self._send(lane)) for lane in self.acknowledged]
        try:
            yield self
            self._ending = True
            await asyncio.wait_for(together(lanes), _PATIENCE_S)
        finally:
            for task in lanes:
                task.cancel()
            await asyncio.wait(lanes)
            await self._producer.stop()

    async def _send(self, lane: int) -> None:
        while not self._ending:
            number = self.acknowledged[lane]
            started_s = time.monotonic()
            try:
                await self._producer.send_and_wait(self.topic, b"%d" % lane, b"%d %d %s" % (lane, number, _BODY))
            except MessagingError as error:
                self.errors[type(error).__name__] += 1
                await asyncio.sleep(0.1)
            else:
                self.acknowledged[lane] = number + 1
            self.longest_wait_s = max(self.longest_wait_s, time.monotonic() - started_s)
            self._changed.set()

    def total(self) -> int:
        return sum(self.acknowledged.values())

    async def more(self, count: int) -> None:
        """Wait until `count` more messages were acknowledged."""
        await self._until(count, self.total)

    async def more_errors(self, count: int) -> None:
        """Wait until `count` more messages were not."""
        await self._until(count, self.errors.total)

    async def _until(self, count: int, counted: Any) -> None:
        goal = counted() + count
        try:
            async with asyncio.timeout(_PATIENCE_S):
                while counted() < goal:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"{counted()} instead of {goal}: {self.acknowledged}, {dict(self.errors)}") from None


@dataclass(frozen=True, slots=True)
class Below:
    """A running server, and the disk that its data lie on."""

    server: LocalKafka
    disk: SmallDisk


@contextlib.asynccontextmanager
async def running(directory: Path, *, megabytes: int = 64) -> AsyncIterator[Below]:
    """A Kafka whose data lie on a small disk. It is killed in the end."""
    with SmallDisk(directory / "kafka" / "data", megabytes) as disk:
        server = LocalKafka(directory / "kafka", heap_mb=512, min_free_mb=1)
        await server.start()
        try:
            yield Below(server, disk)
        finally:
            await server.stop(grace_s=0)


async def disk_full(below: Below) -> dict[str, Any]:
    """The disk fills up under load; the server ends, room is made, it is started."""
    server = below.server
    topic = await _topic(server, "full")
    async with Sender(server.bootstrap_servers, topic).sending() as sender:
        await sender.more(40)
        below.disk.fill()
        ended = await end_of(server)
        await sender.more_errors(3)
        at_once = await start_of(server)
        below.disk.make_room()
        await server.start()
        await sender.more(40)
    report = await judged(server, sender)
    return after_a_full_disk(report, exit_code=EXIT_CODE, ended=ended, at_once=at_once)


async def sync_error(below: Below, work: Path) -> dict[str, Any]:
    """Syncs fail under load. The server ends by itself, and what it acknowledged is there when it starts again."""
    server = below.server
    topic = await _topic(server, "sync")
    async with Sender(server.bootstrap_servers, topic).sending() as sender:
        await sender.more(40)
        assert server.pid is not None
        async with traced(server.pid, work / "strace.log") as trace:
            await sender.more(40)
            used = trace.count()
        async with traced(server.pid, work / "strace.log", calls=tuple(used) or SYNCS, tamper="error=EIO") as trace:
            # What was synced before strace came may still be acknowledged after it: one message a lane.
            before = sender.total() + _LANES
            ended = await end_of(server)
            injected, struck = trace.injected(), trace.struck()
        false = max(0, sender.total() - before)
        await server.stop(grace_s=0)
        await server.start()
        await sender.more(40)
    report = await judged(server, sender)
    if false:
        report["wrong"].append(f"{false} messages were acknowledged while no sync succeeded")
    return after_failed_syncs(report, exit_code=EXIT_CODE, ended=ended, used=used, injected=injected, struck=struck)


async def slow_disk(below: Below, work: Path, *, delay_ms: int, messages: int = 8) -> dict[str, Any]:
    """Every sync lasts `delay_ms` longer. Where that is longer than the sender's deadline, the deadline holds."""
    server = below.server
    topic = await _topic(server, f"slow{delay_ms}")
    async with Sender(server.bootstrap_servers, topic).sending() as sender:
        await sender.more(40)
        assert server.pid is not None
        async with traced(server.pid, work / "strace.log", tamper=f"delay_enter={delay_ms * 1000}") as trace:
            if delay_ms < DELIVERY_TIMEOUT_MS / 4:
                await sender.more(messages)
            else:
                await sender.more_errors(4)
            await trace.more_injected(0 if trace.injected() else 1)  # it is known of one when it is over
            delayed = trace.injected()
            read_in_s = await _read_in_s(server, topic)
        await sender.more(40)
    return {
        "delay_ms": delay_ms,
        "syncs that lasted": dict(delayed),
        "all was read meanwhile in (s)": read_in_s,
        **await judged(server, sender),
    }


async def judged(server: LocalKafka, sender: Sender) -> dict[str, Any]:
    """What was sent, in numbers, and what is `wrong`: nothing if all is well."""
    wrong: list[str] = []
    seen: dict[int, list[int]] = {lane: [] for lane in sender.acknowledged}
    twice = 0
    async for record in read_all(server.bootstrap_servers, [sender.topic]):
        assert record.value is not None
        of_lane, numbered, body = record.value.split(b" ", 2)
        numbers = seen[int(of_lane)]
        if body != _BODY:
            wrong.append(f"message {numbered!r} of lane {of_lane!r} came back changed")
        if int(numbered) in numbers:
            twice += 1
        else:
            numbers.append(int(numbered))
    for lane, count in sender.acknowledged.items():
        # One number of a lane is under way at a time, so a correct log is this one and nothing else.
        if seen[lane][:count] != list(range(count)) or len(seen[lane]) > count + 1:
            lost = sorted(set(range(count)) - set(seen[lane]))
            wrong.append(f"lane {lane}: {count} acknowledged, {len(seen[lane])} there, lost {lost[:5]}")
    return {
        "wrong": wrong,
        "acknowledged": sender.total(),
        "errors": dict(sorted(sender.errors.items())),
        "stored twice after an error": twice,
        "longest wait for an answer (s)": round(sender.longest_wait_s, 1),
    }


async def _topic(server: LocalKafka, name: str) -> str:
    await ensure_topics(server.bootstrap_servers, [TopicSpec(name, 2, configs={"flush.messages": "1"})])
    return name


async def _read_in_s(server: LocalKafka, topic: str) -> float | None:
    """How long it takes to read all of `topic`; None if more than a minute."""
    started_s = time.monotonic()
    try:
        async with asyncio.timeout(60):
            async for _ in read_all(server.bootstrap_servers, [topic]):
                pass
    except (TimeoutError, MessagingError):
        return None
    return round(time.monotonic() - started_s, 1)
