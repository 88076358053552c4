"""Brings a system back from a backup, into a new directory and empty tables.

    files whole? ─► target empty? ─► tables ─► rows and digests as in the backup?
                                                    │ restore
    in doubt: settled by the state table ◄──────────┘
            │ apply the transaction log, first half: what was decided when the backup was made
            ▼
    Kafka survived: consumers go back to where the backup saw them   ─┐ second half: the commands after that are on
    Kafka is new:   topics are filled from backup and increments     ─┘ their topics, and are done when the system runs
            ▼
    in doubt none? books add up? ─► only now may `concord up` start on the directory

What is the same afterwards and what is not. Everything that the backup saw finished is the same: records, versions,
answers, transaction ids. Commands after the backup, where Kafka survived, are carried out again in the order of each
key, under their own ids; so are their events, whose ids derive from the commands'. Their transaction ids and times are
new, and where commands of different keys compete for the same goods, another one may win: an answer that a client had
seen may then be followed by another one, on the results topic, in `concord status`, and as events; the last one holds.

A restore that failed leaves a mark, with which `concord up` refuses the directory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from actors.audit import AUDITED, check_books
from actors.history_view import ORDER_HISTORY, POSITIONS, PROJECTION, VIEW_BUCKETS, PositionRow
from actors.view_actor import rebuild_order_history
from infra.config import Settings
from infra.consensus_commit.metadata import is_transactional, layout_of
from infra.consensus_commit.transaction import Transaction
from infra.messaging.connection import Kafka
from infra.messaging.reader import Position, cluster_id
from infra.messaging.topic_copy import bounds
from infra.messaging.topics import ensure_topics
from infra.storage.port import Storage
from scripts.backup import log, tables
from scripts.backup.form import Manifest, StoredTable, check_files, increments_of
from scripts.backup.place import AtRest, at_rest
from scripts.preflight import UNFINISHED_RESTORE
from scripts.reading import CommittedReader
from scripts.wiring import create_tables, kafka_topics

MAY_BE_THERE = frozenset({"kafka", "cassandra", "concord.toml", "run"})
"""What the target's directory may hold: servers' data that survived, settings, and the lock."""

Progress = Callable[[str], None]


class RestoreRefusedError(Exception):
    """The restore was not begun, or not ended; the text says why."""


@dataclass(frozen=True)
class Options:
    """`tables_are_there`: the operator's own snapshot has been put back. `accept_gap`: commands that retention has
    taken from the surviving topics since the backup may be missing."""

    tables_are_there: bool = False
    accept_gap: bool = False


@dataclass(frozen=True)
class Restored:
    """What was brought back. `to_apply`: commands on the topics that are carried out when the system starts."""

    tables: int
    rows: int
    settled: int
    kafka_survived: bool
    messages: int
    to_apply: int


async def restore_backup(
    directory: Path, settings: Settings, options: Options, progress: Progress = lambda line: None
) -> Restored:
    """Restore the backup in `directory` into the system that `settings` describe.

    Raises DamagedBackupError, RestoreRefusedError, log.LogGapError, log.ForeignLogError, and what servers, storage and
    Kafka raise.
    """
    progress("Checking the backup's files")
    manifest = await asyncio.to_thread(check_files, directory)
    _check_settings(manifest, settings)
    _check_directory(settings.data_dir)
    if options.tables_are_there != (manifest.tables_by == "command"):
        raise RestoreRefusedError(
            "The backup has no rows: put back the snapshot that its command made, then use --tables-are-there."
            if manifest.tables_by == "command"
            else "The backup has the rows: leave --tables-are-there out, and give it empty tables."
        )
    async with at_rest(settings, progress) as place:
        if not options.tables_are_there:
            await _check_empty(place.storage, manifest)
        survived, offsets = await _plan_log(place.kafka, manifest, options)
        mark = settings.data_dir / UNFINISHED_RESTORE
        mark.write_text(f"The restore of {directory} into this directory was not finished.\n")
        rows = 0 if options.tables_are_there else await _restore_tables(place.storage, manifest, directory, progress)
        await create_tables(place.settings, place.storage)
        progress("Settling what was in doubt")
        settled = await settle(place.storage)
        messages = 0
        if not survived:
            progress("Filling the topics")
            await ensure_topics(place.kafka, kafka_topics(place.settings))
            await _check_topics_empty(place.kafka, manifest)
            messages, offsets = await log.publish_again(
                place.kafka, manifest.partitions, directory, increments_of(directory, manifest)
            )
        progress("Setting the positions of the consumer groups")
        await log.set_positions(place.kafka, offsets)
        progress("Making the views anew")
        await rebuild_order_history(place.storage, buckets=place.settings.actors.buckets)
        await _place_projection(place, offsets)
        progress("Checking what was restored")
        await _check_restored(place.storage)
        ends = await bounds(place.kafka, sorted(log.COMMAND_TOPICS))
        mark.unlink()
    return Restored(
        tables=len(manifest.tables),
        rows=rows,
        settled=settled,
        kafka_survived=survived,
        messages=messages,
        to_apply=sum(end - offsets[position] for position, (_, end) in ends.items() if position in offsets),
    )


# --- before anything is written ------------------------------------------------------------------------------------


def _check_settings(manifest: Manifest, settings: Settings) -> None:
    wanted = {
        "actors.buckets": (manifest.buckets, settings.actors.buckets),
        "kafka.command_partitions": (manifest.command_partitions, settings.kafka.command_partitions),
    }
    wrong = [f"{name} is {now} and was {then}" for name, (then, now) in wanted.items() if then != now]
    if wrong:
        raise RestoreRefusedError(
            f"The settings do not fit the backup: {'; '.join(wrong)}. Keys would be looked for in other places. Set "
            "them as they were."
        )


def _check_directory(directory: Path) -> None:
    there = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    if UNFINISHED_RESTORE in there:
        raise RestoreRefusedError(
            f"{directory} holds a restore that was not finished. Remove what it wrote (the directory's content but a "
            "Kafka that survived, or the tables of your storage), then restore again."
        )
    more = [name for name in there if name not in MAY_BE_THERE]
    if more:
        raise RestoreRefusedError(
            f"{directory} is not empty: it has {', '.join(more)}. Restore into a new directory; move the surviving "
            "kafka/ (and concord.toml) there first, and nothing else."
        )


async def _check_empty(storage: Storage, manifest: Manifest) -> None:
    wanted = {table.full_name for table in manifest.tables}
    full = [
        table.full_name
        for table in await storage.tables()
        if (table.full_name in wanted or table.namespace == ORDER_HISTORY.namespace)
        and not await tables.is_empty(storage, table)
    ]
    if full:
        raise RestoreRefusedError(
            f"These tables have rows already: {', '.join(full)}. Restore into an empty storage: what is there is not "
            "overwritten."
        )


async def _plan_log(kafka: Kafka, manifest: Manifest, options: Options) -> tuple[bool, dict[Position, int]]:
    """Whether this is the Kafka that the backup is of, and then from where each partition is read on."""
    if await cluster_id(kafka) != manifest.log_identity:
        return False, {}
    there = await bounds(kafka, sorted({stored.topic for stored in manifest.partitions}))
    return True, log.resume_on_survivor(manifest.partitions, there, accept_gap=options.accept_gap)


async def _check_topics_empty(kafka: Kafka, manifest: Manifest) -> None:
    there = await bounds(kafka, sorted({stored.topic for stored in manifest.partitions}))
    missing = [f"{p.topic}[{p.partition}]" for p in manifest.partitions if (p.topic, p.partition) not in there]
    full = [f"{topic}[{partition}]" for (topic, partition), (_, end) in there.items() if end]
    if missing or full:
        raise log.ForeignLogError(
            "This is another Kafka than the one of the backup, and its topics cannot be filled: "
            + "; ".join(
                filter(
                    None,
                    (
                        f"these have messages: {', '.join(full)}" if full else "",
                        f"these are missing: {', '.join(missing)}" if missing else "",
                    ),
                )
            )
            + ". Use the Kafka that survived, or one without these topics."
        )


# --- tables ----------------------------------------------------------------------------------------------------------


async def _restore_tables(storage: Storage, manifest: Manifest, directory: Path, progress: Progress) -> int:
    rows = 0
    for stored in manifest.tables:
        progress(f"Restoring {stored.full_name} ({stored.rows} rows)")
        await storage.create_table(stored.schema_of)
        rows += await tables.copy_in(storage, stored, directory)
        await _check_table(storage, stored)
    return rows


async def _check_table(storage: Storage, stored: StoredTable) -> None:
    found = await tables.count_rows(storage, stored.schema_of)
    if (found.rows, found.value) != (stored.rows, stored.digest):
        raise RestoreRefusedError(
            f"{stored.full_name} has {found.rows} rows after the restore and {stored.rows} in the backup, or others: "
            "something else writes to it, or the storage has lost some. Restore again into an empty storage."
        )


async def settle(storage: Storage) -> int:
    """Bring every record in doubt to rest by its transaction's state row; how many there were."""
    settled = 0
    reader = CommittedReader(storage)
    try:
        for table in await storage.tables():
            if not is_transactional(table):
                continue
            for record in await reader.manager.recovery.in_doubt(table):
                row = await storage.get(layout_of(table).stored, record.key)
                if row is not None:
                    await reader.resolve(table, row)
                settled += 1
        await reader.manager.recovery.drain()
    finally:
        await reader.manager.close()
    return settled


async def _place_projection(place: AtRest, offsets: Mapping[Position, int]) -> None:
    """The views are as the tables are: their projection goes on from the events that are published from now on."""
    identity = await cluster_id(place.kafka)
    reader = CommittedReader(place.storage)

    async def write(transaction: Transaction) -> None:
        for (topic, partition), offset in offsets.items():
            if topic != log.PROJECTED:
                continue
            position = PositionRow(
                projection=PROJECTION, topic=topic, partition=partition, log_identity=identity, next_offset=offset
            )
            key = POSITIONS.storage_key((PROJECTION, topic, partition), buckets=VIEW_BUCKETS)
            await transaction.upsert(POSITIONS.schema, key, POSITIONS.to_columns(position))

    try:
        await reader.manager.run(write)
    finally:
        await reader.manager.close()


async def _check_restored(storage: Storage) -> None:
    """Nothing in doubt, and stock and money add up: what `concord check` verifies of a resting system."""
    reader = CommittedReader(storage)
    try:
        offenders = [f"{table} {key} is in doubt ({tx_id})" for table, key, tx_id in await reader.in_doubt()]
        rows = {table.full_name: [row async for row in reader.rows(table.schema)] for table in AUDITED}
        offenders += check_books(rows)
    finally:
        await reader.manager.close()
    if offenders:
        more = f" … and {len(offenders) - 5} more" if len(offenders) > 5 else ""
        raise RestoreRefusedError(f"What was restored does not hold: {'; '.join(offenders[:5])}{more}.")
