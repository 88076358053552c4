"""Makes a backup of a system, running or at rest.

Theory of operation. A transaction changes records in several tables, so a copy of the tables is good only if every
transaction is in all of it or in none. Consensus Commit makes that easy to say: a transaction is decided by its row in
the state table, and a record that was copied PREPARED can be brought to rest afterwards by that row. So

    a copy of all tables is whole if no transaction was decided while it was made.

(A table copied before a decision would have the record as it was, another one copied after it would have it as it is:
torn, and no recovery could know.) What is needed is a pause, for as long as the copy takes:

    pause every domain actor ─► wait until no intent is open ─► offsets and ends of the topics ─► copy the tables
         └─ no command is under way                                                                    │
                                  messages of the topics, packing ◄─ resume ◄─ was nothing decided? ◄──┘

Nothing is refused meanwhile: commands wait on their topics. How long the pause is depends on the storage. SQLite's
files are copied as files, and packed after the pause. Other storages are read row by row through the storage port,
which takes as long as the tables are large; where that is too long, the operator's own command takes a snapshot in the
pause (`nodetool snapshot` on each node: a moment), and this backup holds all but the rows.

That the pause held is not believed but shown. Every actor says that it was paused all the time. Of SQLite's files none
was written to (`infra.storage.sqlite_snapshot`); of other storages the state table is the same before and after, which
also catches programs that are not ours and commit meanwhile. If not, the backup is thrown away with an error.

Offsets: what consumers had acknowledged during the pause is in the tables. What it had not is read again after a
restore, and whatever of that is in the tables is answered from there (rule 1). So the backup needs no luck with the
moment at which workers acknowledge.

Views are not copied: they are made anew from the tables.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from actors.history_view import ORDER_HISTORY
from actors.runtime import Runtime
from actors.system import COORDINATOR, actor_names
from infra.clock import SystemClock
from infra.config import Settings
from infra.consensus_commit.coordinator import CoordinatorStates
from infra.consensus_commit.intents import Intent, IntentLog
from infra.messaging.reader import cluster_id
from infra.storage.operations import TableSchema
from infra.storage.port import Storage
from infra.storage.sqlite import SqliteStorage
from infra.storage.sqlite_snapshot import copy_files
from scripts.backup import log, tables
from scripts.backup.form import Manifest, StoredPartition, StoredTable, new_directory, write_manifest
from scripts.backup.pausing import PauseFailedError, paused
from scripts.backup.place import AtRest, at_rest
from scripts.cli.system import System
from scripts.connections import open_storage, ray_environment
from scripts.wiring import system_config, topics

DERIVED = frozenset({ORDER_HISTORY.namespace})
"""Namespaces whose tables are made anew from the others."""

SETTLED_WITHIN_S = 10.0
COPIES = 10
COPIED_AGAIN_AFTER_S = 0.2
"""How often SQLite's files are copied before it counts as shown that somebody else writes to them. One write is nobody
else's: coordinators clear up behind transactions that were aborted."""

Progress = Callable[[str], None]


class BackupFailedError(Exception):
    """No backup was made; the text says why. What was begun of it has been removed."""


@dataclass(frozen=True)
class Options:
    """What a backup holds and how it is made. `within_s`: how long commands that have begun may take to end.

    `everything`: all messages of the topics, or those commands alone that nobody has finished. `command`: the
    operator's own snapshot, a line for the shell that is run in the pause instead of reading the rows.
    """

    everything: bool = True
    command: str = ""
    within_s: float = 30.0


@dataclass(frozen=True)
class Copied:
    """What was done in the pause."""

    tables: tuple[StoredTable, ...]
    partitions: list[StoredPartition]
    paused_ms: int


async def create_backup(
    system: System, into: Path, options: Options, progress: Progress = lambda line: None
) -> tuple[Path, Manifest]:
    """A new backup in a directory of its own inside `into`.

    Raises BackupFailedError, PauseFailedError, storage, messaging and server errors, OSError.
    """
    settings = system.settings
    try:
        directory = await asyncio.to_thread(new_directory, into)
    except FileExistsError as error:
        raise BackupFailedError(f"{error.filename} was begun in this very second: make one backup at a time.") from None
    try:
        async with _reach(system, settings, progress) as reached:
            copied = await copy(reached, directory, options, progress)
            progress("Copying the topics" if options.everything else "Copying unfinished commands")
            partitions = [
                await log.copy_out(reached.place.kafka, partition, directory, everything=options.everything)
                for partition in copied.partitions
            ]
            manifest = Manifest(
                name=directory.name,
                made_by=version("concord"),
                profile=settings.profile,
                storage=reached.place.storage.info.name,
                buckets=settings.actors.buckets,
                command_partitions=settings.kafka.command_partitions,
                log_identity=await cluster_id(reached.place.kafka),
                was_running=reached.runtime is not None,
                paused_ms=copied.paused_ms,
                tables_by="command" if options.command else "rows",
                tables=copied.tables,
                partitions=tuple(partitions),
            )
        await asyncio.to_thread(write_manifest, directory, manifest)
    except BaseException:
        await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
        raise
    return directory, manifest


# --- reaching the system ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reached:
    """The system's servers, and of one that runs its domain actors."""

    place: AtRest
    runtime: Runtime | None
    actors: Sequence[str] = ()


@asynccontextmanager
async def _reach(system: System, settings: Settings, progress: Progress) -> AsyncIterator[Reached]:
    """The running system's servers and actors; of one at rest its servers, started for this if they are ours."""
    if not system.running:
        async with at_rest(settings, progress) as place:
            yield Reached(place, None)
        return
    storage = open_storage(settings)
    try:
        yield Reached(
            AtRest(settings, storage, system.kafka),
            _connect(settings),
            [name for name in actor_names(system_config(settings)) if not name.startswith(COORDINATOR)],
        )
    finally:
        await storage.close()


def _connect(settings: Settings) -> Runtime:
    """Join the system's Ray; blocks for a second or two, in which nothing else runs yet."""
    # Ray looks once, when it is imported. Without a token of the settings it has made one in its usual place.
    generated = {"RAY_AUTH_MODE": "token"} if (Path.home() / ".ray" / "auth_token").exists() else {}
    for variable, value in (ray_environment(settings) or generated).items():
        os.environ.setdefault(variable, value)
    from actors.ray_runtime import connect
    from scripts.worker import read_setup

    return connect(read_setup(settings.data_dir).ray_address)


# --- what is done in the pause ---------------------------------------------------------------------------------------


async def copy(reached: Reached, directory: Path, options: Options, progress: Progress) -> Copied:
    storage, kafka = reached.place.storage, reached.place.kafka
    found = [table for table in await storage.tables() if table.namespace not in DERIVED]
    if not found:
        raise BackupFailedError("There are no tables to back up: no system was ever started on this storage.")
    names = [topic.name for topic in topics(reached.place.settings)]
    snapshot = directory / ".snapshot"
    async with AsyncExitStack() as stack:
        began_s = time.monotonic()
        if reached.runtime is not None:
            progress("Waiting for commands that have begun")
            await stack.enter_async_context(paused(reached.runtime, reached.actors, within_s=options.within_s))
            await _until_settled(storage, found)
        partitions = await log.positions(kafka, names)
        progress("Copying the tables")
        if options.command:
            copied = await _by_command(storage, found, options.command, directory.name)
        elif isinstance(storage, SqliteStorage):
            await _by_files(Path(storage.info.options["directory"]), snapshot)
            copied = ()
        else:
            copied = await copy_by_rows(storage, found, directory)
    paused_ms = round((time.monotonic() - began_s) * 1000) if reached.runtime is not None else 0
    if not copied:
        progress("Packing the tables")
        snapshot_storage = SqliteStorage(snapshot)
        try:
            copied = tuple([await tables.copy_out(snapshot_storage, table, directory) for table in found])
        finally:
            await snapshot_storage.close()
            await asyncio.to_thread(shutil.rmtree, snapshot)
    return Copied(copied, partitions, paused_ms)


async def _until_settled(storage: Storage, found: Sequence[TableSchema]) -> None:
    """Until every transaction's records were seen at rest. What takes longer is brought to rest after a restore."""
    intents = IntentLog(storage)
    if intents.table.full_name not in {table.full_name for table in found}:
        return
    until_s = time.monotonic() + SETTLED_WITHIN_S
    while time.monotonic() < until_s:
        if all(intent.aborted or _is_derived(intent) for intent in await intents.all()):
            return
        await asyncio.sleep(0.05)


def _is_derived(intent: Intent) -> bool:
    """Whether it is about tables that are made anew after a restore."""
    return all(namespace in DERIVED for namespace, _, _ in intent.partitions)


async def _by_files(source: Path, snapshot: Path) -> None:
    for _ in range(COPIES):
        if await asyncio.to_thread(copy_files, source, snapshot, leave_out=DERIVED):
            return
        await asyncio.to_thread(shutil.rmtree, snapshot)
        await asyncio.sleep(COPIED_AGAIN_AFTER_S)
    raise PauseFailedError(
        f"Something else writes to the files in {source} while they are copied. End the programs that use them beside "
        "this system, and make the backup again."
    )


async def copy_by_rows(storage: Storage, found: Sequence[TableSchema], directory: Path) -> tuple[StoredTable, ...]:
    """The state table first, and its digest again at the end: the same means that nothing was decided meanwhile."""
    states = CoordinatorStates(storage, SystemClock()).table.full_name
    ordered = sorted(found, key=lambda table: table.full_name != states)
    copied = [await tables.copy_out(storage, table, directory) for table in ordered]
    if ordered[0].full_name == states:
        again = await tables.count_rows(storage, ordered[0])
        _check_undecided(copied[0].rows, copied[0].digest, again.rows, again.value)
    return tuple(sorted(copied, key=lambda table: table.full_name))


async def _by_command(
    storage: Storage, found: Sequence[TableSchema], command: str, name: str
) -> tuple[StoredTable, ...]:
    states = CoordinatorStates(storage, SystemClock()).table.full_name
    fence = [table for table in found if table.full_name == states]
    before = [await tables.count_rows(storage, table) for table in fence]
    process = await asyncio.create_subprocess_shell(
        command,
        env={**os.environ, "CONCORD_BACKUP_NAME": name},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        _, complaint = await process.communicate()
    except BaseException:
        process.kill()
        raise
    if process.returncode:
        said = complaint.decode("utf-8", "replace").strip()[-500:]
        raise BackupFailedError(f"The snapshot command ended with {process.returncode}: {said}")
    for table, first in zip(fence, before, strict=True):
        again = await tables.count_rows(storage, table)
        _check_undecided(first.rows, first.value, again.rows, again.value)
    return tuple(StoredTable.of(table) for table in found)


def _check_undecided(rows: int, digest: str, rows_again: int, digest_again: str) -> None:
    if (rows, digest) != (rows_again, digest_again):
        raise PauseFailedError(
            f"Transactions were decided, or old ones pruned, while the tables were copied ({rows} state rows, then "
            f"{rows_again}). Pause the other programs that write to these tables, and make the backup again."
        )
