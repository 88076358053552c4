"""Commands that were accepted since a backup, added to it: the hourly part of a daily backup.

    2026-11-21T03-00-00Z/log/2026-11-21T04-00-00Z/   from where the backup ended
    2026-11-21T03-00-00Z/log/2026-11-21T05-00-00Z/   from where the one before ended

An increment holds messages of the command topics and nothing else: after a restore they are carried out, and make the
rows, answers and events anew. So it needs no pause and reads no table. It is for the day on which Kafka is lost as
well; one that has survived has these commands itself.
"""

from __future__ import annotations

import asyncio
import shutil
from importlib.metadata import version
from pathlib import Path

from infra.messaging.reader import cluster_id
from infra.messaging.topic_copy import bounds
from scripts.backup import log
from scripts.backup.form import (
    LOG,
    Increment,
    StoredPartition,
    increments_of,
    new_directory,
    read_manifest,
    write_manifest,
)
from scripts.cli.system import System


async def add_increment(system: System, backup: Path) -> tuple[Path, Increment]:
    """Add what the command topics of a running system hold beyond `backup` and its increments.

    Raises DamagedBackupError, log.LogGapError where retention was faster, log.ForeignLogError for another Kafka, and
    messaging errors. Of what was begun nothing stays then.
    """
    manifest = await asyncio.to_thread(read_manifest, backup)
    before = await asyncio.to_thread(increments_of, backup, manifest)
    ends = {
        (stored.topic, stored.partition): stored.end
        for partitions in (manifest.partitions, *(increment.partitions for _, increment in before))
        for stored in partitions
        if stored.topic in log.COMMAND_TOPICS
    }
    kafka = system.kafka
    identity = await cluster_id(kafka)
    if identity != manifest.log_identity:
        raise log.ForeignLogError(f"{backup} is of another Kafka than this system's. Make a new backup.")
    there = await bounds(kafka, sorted(log.COMMAND_TOPICS))
    for (topic, partition), end in ends.items():
        first, now = there.get((topic, partition), (0, 0))
        if now < end:
            raise log.ForeignLogError(f"{topic}[{partition}] ends at {now}, before the backup. Make a new backup.")
        if first > end:
            raise log.LogGapError(
                f"{topic}[{partition}] begins at {first}, after the {end} at which the backup ends. Make a new backup."
            )
    directory = await asyncio.to_thread(new_directory, backup / LOG)
    try:
        increment = Increment(
            name=directory.name,
            of=manifest.name,
            made_by=version("concord"),
            log_identity=identity,
            partitions=tuple(
                [
                    await log.copy_from(
                        kafka,
                        StoredPartition(
                            topic=topic,
                            partition=partition,
                            start=there[topic, partition][0],
                            acknowledged=None,
                            end=there[topic, partition][1],
                            copied_from=end,
                        ),
                        end,
                        directory,
                    )
                    for (topic, partition), end in sorted(ends.items())
                ]
            ),
        )
        await asyncio.to_thread(write_manifest, directory, increment)
    except BaseException:
        await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
        raise
    return directory, increment
