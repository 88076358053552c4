"""SQLite on a disk that fills up, fails to sync and is slow; longer: `python -m scripts.proof disks --only sqlite`."""

from __future__ import annotations

import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from infra.consensus_commit.manager import TransactionManager
from infra.storage.errors import UnavailableStorageError
from infra.storage.operations import Key, Value
from infra.storage.sqlite import SqliteStorage
from scripts.proof.disks import on_sqlite
from scripts.proof.disks.accounts import Bank, Ledger, judge, open_bank
from scripts.proof.disks.clients import client
from scripts.proof.disks.injury import SmallDisk
from scripts.proof.disks.scenes import ACCOUNTS, bank_options, judged, more


@pytest.mark.parametrize("one_file", [False, True], ids=["two files", "one file"])
async def test_a_full_disk_refuses_transfers_leaves_reads_and_is_over_when_there_is_room(
    tmp_path: Path, tools: None, one_file: bool
) -> None:
    report = await on_sqlite.disk_full(tmp_path, one_file=one_file)

    assert report["wrong"] == []
    for said in report["clients"].values():
        assert said["errors"]["UnavailableStorageError"] >= 3
        assert said["unreadable"] == {}
    assert all("free some space" in remedy for remedy in report["remedies"])
    assert report["another process, while the files are open"] == "reads"


@pytest.mark.parametrize("one_file", [False, True], ids=["two files", "one file"])
async def test_a_sync_that_failed_acknowledges_nothing_and_a_killed_process_has_all_it_acknowledged(
    tmp_path: Path, tools: None, one_file: bool
) -> None:
    report = await on_sqlite.sync_error(tmp_path, one_file=one_file)

    assert report["wrong"] == []
    assert report["syncs that failed"]["fdatasync"] >= 8
    assert report["clients"][0]["unknown"] >= 1, "no outcome was ever unknown"


async def test_a_slow_disk_delays_commits_and_no_read(tmp_path: Path, tools: None) -> None:
    report = await on_sqlite.slow_disk(tmp_path)

    assert report["wrong"] == []
    assert report["syncs that lasted"]["fdatasync"] >= 2
    for said in report["clients"].values():
        assert said["unreadable"] == {}
        assert said["unknown"] == 0


async def test_a_limit_on_the_size_of_files_refuses_transfers_as_a_full_disk_does_without_any_right_of_root(
    tmp_path: Path,
) -> None:
    bank, storages = Bank("main"), partial(SqliteStorage, tmp_path)
    storage = storages()
    await open_bank(storage, bank, ACCOUNTS)
    await storage.close()
    async with client(f"sqlite://{tmp_path}", "one", *bank_options(bank), "--note-bytes", "3000") as limited:
        await limited.more_commits(5)
        resource.prlimit(limited.pid, resource.RLIMIT_FSIZE, (_largest(tmp_path) + 64 * 1024, resource.RLIM_INFINITY))
        # A write beyond the limit fails like any other; only a full disk is known to have kept nothing of a commit.
        await more([limited], 3, "transfers given up", lambda one: one.refused + len(one.ledger.unknown))
        await more([limited], 3, "reads", lambda one: one.reads)
        resource.prlimit(limited.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        await limited.more_commits(5)
        await limited.end()

    report = await judged(storages, bank, [limited])
    assert report["wrong"] == []


def _largest(directory: Path) -> int:
    return max(path.stat().st_size for path in directory.iterdir())


def ledger(**sets: set[str]) -> Ledger:
    empty: dict[str, set[str]] = {"begun": set(), "committed": set(), "failed": set(), "unknown": set()}
    return Ledger(**{**empty, **sets})


async def transferred(manager: TransactionManager, bank: Bank, *, received: int = 1) -> str:
    """A transfer that takes 1, gives `received` and leaves a receipt; its id."""
    async with manager.begin() as transaction:
        for number, change in ((0, -1), (1, received)):
            row = await transaction.get(bank.accounts, Key((number,)))
            assert row is not None
            await transaction.update(bank.accounts, Key((number,)), {"balance": row["balance"] + change})  # type: ignore[operator]
        receipt: dict[str, Value] = {"giver": 0, "taker": 1, "note": ""}
        await transaction.insert(bank.receipts, Key((transaction.tx_id,)), receipt)
        await transaction.commit()
    return transaction.tx_id


async def test_the_judge_finds_what_was_lost_invented_halved_or_done_twice(tmp_path: Path) -> None:
    bank, storage = Bank("judged"), SqliteStorage(tmp_path)
    await open_bank(storage, bank, ACCOUNTS)
    manager = TransactionManager(storage)
    done = await transferred(manager, bank)
    honest = ledger(begun={done}, committed={done})

    async def said(*ledgers: Ledger) -> str:
        return " ".join(await judge(storage, bank, ACCOUNTS, ledgers))

    assert await said(honest) == ""
    assert await said(ledger(begun={done})) == ""
    assert "acknowledged and lost" in await said(honest, ledger(begun={"x"}, committed={"x"}))
    assert "failed and done" in await said(ledger(begun={done}, failed={done}))
    assert "never begun" in await said(ledger())

    halved = await transferred(manager, bank, received=0)
    both = ledger(begun={done, halved}, committed={done, halved})
    assert "in all, not" in await said(both)
    await transferred(manager, bank, received=2)  # the sum is right again, and yet
    assert "never begun" in await said(both)

    async with manager.begin() as again:  # a version too many
        await again.update(bank.accounts, Key((5,)), {"balance": 1_000})
        await again.commit()
    assert "versions add up" in await said(both)
    await manager.close()
    await storage.close()


def test_the_proof_says_what_it_cannot_show_where_tools_are_missing(tmp_path: Path) -> None:
    """Without strace in its path, the command names the remedy and does not hold."""
    proof = subprocess.run(
        [sys.executable, "-m", "scripts.proof", "disks", "--only", "sqlite: slow disk, one file"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert proof.returncode == 1, proof.stderr
    assert "apt-get install strace" in proof.stdout


async def test_a_new_process_on_a_full_disk_is_told_to_make_room(tmp_path: Path, tools: None) -> None:
    with SmallDisk(tmp_path / "small", 4) as disk:
        bank, storage = Bank("main"), SqliteStorage(disk.directory)
        await open_bank(storage, bank, ACCOUNTS)
        await storage.close()
        disk.fill()
        late = SqliteStorage(disk.directory)
        with pytest.raises(UnavailableStorageError) as refused:
            await late.tables()
        assert "free space" in refused.value.remedy
        disk.make_room()
        assert await late.tables()
        await late.close()
