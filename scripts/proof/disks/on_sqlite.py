"""Two processes transfer in the same SQLite files while the disk below fills up, fails to sync, or takes its time."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from infra.consensus_commit.metadata import transactional
from infra.storage.errors import UnavailableStorageError
from infra.storage.operations import Key
from infra.storage.sqlite import SqliteStorage
from scripts.proof.disks.accounts import QUIET, Bank
from scripts.proof.disks.clients import Client, client
from scripts.proof.disks.injury import SmallDisk, traced
from scripts.proof.disks.scenes import bank_options, judged, more, more_commits, two_clients

_SYNCS_OF_SQLITE = ("fdatasync", "fsync")
_NOTE = ("--note-bytes", "3000")  # a receipt a page: the files grow, as those of a shop do

FAILING = ("error=EIO:when=2+3", "error=EIO")
"""Now and then, so that syncs after a failed one succeed; then always."""


async def disk_full(work: Path, *, one_file: bool = False, rounds: int = 1, megabytes: int = 32) -> dict[str, Any]:
    """The disk fills up under load, `rounds` times; room is made, and nothing is restarted."""
    bank = Bank("main", one_file)
    with SmallDisk(work / "small", megabytes) as disk:
        storages = partial(SqliteStorage, disk.directory)
        async with two_clients(storages, _url(disk.directory), bank, *_NOTE) as clients:
            for _ in range(rounds):
                await more_commits(clients, 10)
                disk.fill()
                await more(clients, 3, "refusals", lambda one: one.refused)
                await more(clients, 3, "reads", lambda one: one.reads)
                newcomer = await _newcomer(disk.directory, bank)
                disk.make_room()
                await more_commits(clients, 10)
            for one in clients:
                await one.end()
            disk.fill()
            latecomer = await _newcomer(disk.directory, bank)
            disk.make_room()
        return {
            **await judged(storages, bank, clients),
            "remedies": sorted(set().union(*(one.remedies for one in clients))),
            "another process, while the files are open": newcomer,
            "another process, after all have closed them": latecomer,
        }


async def sync_error(work: Path, *, one_file: bool = False, rounds: int = 1) -> dict[str, Any]:
    """Every third sync of one process fails, then every one; the process is killed in the middle, and starts again."""
    bank, storages, url = Bank("main", one_file), partial(SqliteStorage, work), _url(work)
    said: list[Client] = []
    injected: Counter[str] = Counter()
    false: set[str] = set()
    for round in range(rounds):
        async with two_clients(storages, url, bank, "--seed", str(round), opening=not round) as (hurt, sound):
            said += [hurt, sound]
            await more_commits((hurt, sound), 5)
            for tamper in FAILING:
                async with traced(hurt.pid, work / "strace.log", calls=_SYNCS_OF_SQLITE, tamper=tamper) as trace:
                    await hurt.mark(f"{tamper} begins")
                    before = set(hurt.ledger.begun)
                    await hurt.until(lambda: len(hurt.ledger.begun - before) >= 6, "six more attempts")  # noqa: B023
                    await trace.more_injected(4)
                    await hurt.mark(f"{tamper} ends")
                    if tamper == "error=EIO":
                        false |= (hurt.ledger.begun - before) & hurt.ledger.committed
                        hurt.kill()
                        await hurt.wait()
                    injected += trace.injected()
            await sound.more_commits(5)  # a dead process holds nobody up
            async with client(url, "one", *bank_options(bank)) as successor:
                said.append(successor)
                await successor.more_commits(5)
                await successor.end()
            await sound.end()
    report = await judged(storages, bank, said)
    if false:
        report["wrong"].append(f"{len(false)} transfers were acknowledged while no sync succeeded")
    report["clients"] = [one.summary() for one in said]
    return {**report, "syncs that failed": dict(injected)}


async def slow_disk(work: Path, *, one_file: bool = True, delay_ms: int = 200, commits: int = 3) -> dict[str, Any]:
    """Every sync of one process lasts `delay_ms` longer. Commits wait for it, reads do not."""
    bank, storages = Bank("main", one_file), partial(SqliteStorage, work)
    async with two_clients(storages, _url(work), bank) as clients:
        await more_commits(clients, 5)
        tamper = f"delay_enter={delay_ms * 1000}"
        async with traced(clients[0].pid, work / "strace.log", calls=_SYNCS_OF_SQLITE, tamper=tamper) as trace:
            await more(clients, 3, "reads", lambda one: one.reads)
            await more_commits(clients, commits)
            delayed = trace.injected()
        await more_commits(clients, 10)
        for one in clients:
            await one.end()
    report = await judged(storages, bank, clients)
    if not delayed:
        report["wrong"].append("no sync was made to last")
    return {**report, "syncs that lasted": dict(delayed)}


async def _newcomer(directory: Path, bank: Bank) -> str:
    """Whether a process that opens the files only now can read: it needs room for the index of the log (32 KiB)."""
    storage = SqliteStorage(directory)
    try:
        await storage.get(transactional(bank.accounts), Key((QUIET,)))
        return "reads"
    except UnavailableStorageError as error:
        return f"is refused: {error.remedy}"
    finally:
        await storage.close()


def _url(directory: Path) -> str:
    return f"sqlite://{directory.absolute()}"
