"""Topics from and to files, and where a restored system begins to read them.

The command topics are the transaction log of the system: a command that was accepted after the backup is on its topic,
its effects are not in the backup's tables, and the group's position in the backup is before it. So a restored system
whose Kafka has survived reads it again and carries it out again. Where Kafka was lost as well, the topics are made anew
from the backup, and what was accepted after it is lost.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from infra.messaging.connection import Kafka
from infra.messaging.reader import Position, Record, committed_offsets, known_groups
from infra.messaging.topic_copy import Republisher, bounds, read_partition, set_group_offsets
from schemas.registry import DOMAINS
from schemas.topics import CONSUMER_GROUP, commands_topic, consumer_group, events_topic
from scripts.backup.form import DamagedBackupError, Increment, LineFile, StoredPartition, read_lines

COMMAND_TOPICS = frozenset(map(commands_topic, DOMAINS))
PROJECTED = events_topic("orders")

GROUPS = {
    CONSUMER_GROUP: COMMAND_TOPICS | {PROJECTED},
    **{
        consumer_group(domain): frozenset({commands_topic(domain)} | ({PROJECTED} & {events_topic(domain)}))
        for domain in DOMAINS
    },
}
"""Every consumer group that workers may be in, and the topics that it reads."""


class LogGapError(Exception):
    """Commands that the backup does not have are not on the surviving topic any more; the text says how many."""


class ForeignLogError(Exception):
    """Kafka is neither the one that the backup is of nor an empty one."""


async def positions(kafka: Kafka, topics: Sequence[str]) -> list[StoredPartition]:
    """Every partition as it is now.

    What has been acknowledged is read first: whatever it names was published, events included, before the ends are
    read. So everything behind those ends belongs to commands that are carried out again. Of several groups (workers of
    every domain, and workers of one, at different times) the foremost counts: what any has acknowledged is finished.
    """
    acknowledged: dict[Position, int] = {}
    for group in await known_groups(kafka, list(GROUPS)):
        for position, offset in (await committed_offsets(kafka, group)).items():
            acknowledged[position] = max(offset, acknowledged.get(position, 0))
    return [
        StoredPartition(
            topic=topic,
            partition=partition,
            start=start,
            acknowledged=acknowledged.get((topic, partition)),
            end=end,
            copied_from=end,
        )
        for (topic, partition), (start, end) in sorted((await bounds(kafka, topics)).items())
    ]


async def copy_out(kafka: Kafka, stored: StoredPartition, directory: Path, *, everything: bool) -> StoredPartition:
    """Write the messages of a partition into a file of the backup.

    All of them, or without `everything` those commands that were not finished.
    """
    first = stored.start
    if not everything:
        first = stored.resumes_at if stored.topic in COMMAND_TOPICS else stored.end
    return await copy_from(kafka, stored, first, directory)


async def copy_from(kafka: Kafka, stored: StoredPartition, first: int, directory: Path) -> StoredPartition:
    """Write the messages of a partition from offset `first` up to its end into a file in `directory`."""
    stored = stored.model_copy(update={"copied_from": min(first, stored.end)})
    if first >= stored.end:
        return stored
    file = LineFile(directory, f"topics/{stored.topic}-{stored.partition}.ndjson.gz")
    messages = 0
    try:
        async with aclosing(read_partition(kafka, (stored.topic, stored.partition), first, stored.end)) as batches:  # type: ignore[type-var]
            async for records in batches:
                await asyncio.to_thread(file.write, [_line(record) for record in records])
                messages += len(records)
        done = await asyncio.to_thread(file.finish)
    except BaseException:
        file.abandon()
        raise
    return stored.model_copy(update={"messages": messages, "file": done})


def resume_on_survivor(
    partitions: Sequence[StoredPartition], there: dict[Position, tuple[int, int]], *, accept_gap: bool
) -> dict[Position, int]:
    """From which offset each partition of a Kafka that survived is read on.

    Commands from where the backup's group stood. Events from their end: those behind the backup's end belong to
    commands that are carried out again and publish them again, and those before it are in the tables.
    Raises ForeignLogError, and LogGapError unless `accept_gap`.
    """
    offsets = {}
    for stored in partitions:
        position = (stored.topic, stored.partition)
        if position not in there:
            raise ForeignLogError(f"Kafka has no partition {stored.partition} of {stored.topic}, which the backup has.")
        start, end = there[position]
        if end < stored.end:
            raise ForeignLogError(
                f"{stored.topic}[{stored.partition}] ends at {end}, but the backup saw it at {stored.end}: this Kafka "
                "has lost messages. Restore it from the backup as well, into a new one."
            )
        if stored.topic not in COMMAND_TOPICS:
            offsets[position] = end
            continue
        if start > stored.resumes_at and not accept_gap:
            raise LogGapError(
                f"{stored.topic}[{stored.partition}] begins at {start}, but the backup ends before {stored.resumes_at}:"
                f" {start - stored.resumes_at} commands are on neither. Restore a newer backup, or accept their loss "
                "with --accept-gap."
            )
        offsets[position] = max(start, stored.resumes_at)
    return offsets


async def publish_again(
    kafka: Kafka,
    partitions: Sequence[StoredPartition],
    directory: Path,
    increments: Sequence[tuple[Path, Increment]] = (),
) -> tuple[int, dict[Position, int]]:
    """Fill empty topics with the messages of a backup and its increments.

    How many there were, and from which offset each partition is read on.

    Unfinished commands count as sent now: their topic's retention must not take what nobody has carried out.
    """
    published = 0
    offsets: dict[Position, int] = {}
    now_ms = int(time.time() * 1000)
    async with Republisher(kafka) as producer:
        for stored in partitions:
            position = (stored.topic, stored.partition)
            before = total = 0
            batches = _stored_records(position, [(directory, partitions), *((p, i.partitions) for p, i in increments)])
            while (records := await asyncio.to_thread(next, batches, None)) is not None:
                finished = [record for record in records if record.offset < stored.resumes_at]
                waiting = records[len(finished) :]
                await producer.publish(finished)
                await producer.publish(waiting, timestamp_ms=now_ms if stored.topic in COMMAND_TOPICS else None)
                before += len(finished)
                total += len(records)
            published += total
            offsets[position] = before if stored.topic in COMMAND_TOPICS else total
        await producer.confirmed()
    return published, offsets


def _stored_records(
    position: Position, places: Sequence[tuple[Path, Sequence[StoredPartition]]]
) -> Iterator[list[Record]]:
    """The messages of one partition from a backup and its increments, in the order of the log."""
    for directory, partitions in places:
        for stored in partitions:
            if (stored.topic, stored.partition) == position and stored.file is not None:
                for lines in read_lines(directory, stored.file):
                    yield [_record(stored, line, directory) for line in lines]


async def set_positions(kafka: Kafka, offsets: Mapping[Position, int]) -> None:
    """Have every group that workers may be in read on from `offsets`. Raises GroupBusyError while one has members."""
    for group, topics in GROUPS.items():
        theirs = {position: offset for position, offset in offsets.items() if position[0] in topics}
        await set_group_offsets(kafka, group, theirs)


def _line(record: Record) -> bytes:
    return json.dumps(
        {
            "offset": record.offset,
            "timestamp_ms": record.timestamp_ms,
            "key": _text(record.key),
            "value": _text(record.value),
            "headers": [[name, _text(value)] for name, value in record.headers],
        },
        ensure_ascii=True,
        separators=(",", ":"),
    ).encode("ascii")


def _record(stored: StoredPartition, line: bytes, directory: Path) -> Record:
    try:
        read: dict[str, Any] = json.loads(line)
        return Record(
            topic=stored.topic,
            partition=stored.partition,
            offset=read["offset"],
            timestamp_ms=read["timestamp_ms"],
            key=_bytes(read["key"]),
            value=_bytes(read["value"]),
            headers=tuple((name, _bytes(value)) for name, value in read["headers"]),  # type: ignore[misc]
        )
    except (ValueError, KeyError, TypeError, binascii.Error) as error:
        assert stored.file is not None
        raise DamagedBackupError(f"{directory / stored.file.name} has a line that is no message: {error}.") from error


def _text(value: bytes | None) -> str | None:
    return None if value is None else base64.b64encode(value).decode("ascii")


def _bytes(value: str | None) -> bytes | None:
    return None if value is None else base64.b64decode(value, validate=True)
