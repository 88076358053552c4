"""Disasters, rehearsed on real servers: a backup under load, more orders, everything destroyed, restored, resumed."""

from __future__ import annotations

import asyncio
import gzip
import re
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from actors.inventory.tables import PRODUCTS
from actors.payment.tables import WALLETS
from actors.view_actor import order_history
from infra.config import load_settings
from infra.messaging.producer import EventProducer
from schemas.outcome import Answer
from scripts.backup.form import DamagedBackupError, check_files, increments_of
from scripts.backup.restore import Options, RestoreRefusedError, restore_backup
from scripts.cli.system import System as KnownSystem
from scripts.proof.running import Finished, RunningSystem
from scripts.proof.witness import Witness
from tests.end_to_end.harness import Sent, System, order, product, wallet

pytestmark = pytest.mark.system

PLANTED = "planted-secret"
STOCK, MONEY = 1_000, 1_000_000
CUSTOMERS = ("ann", "bob", "cid")


@asynccontextmanager
async def talking_to(running: RunningSystem) -> AsyncIterator[System]:
    """A system that runs already, with a witness of its own."""
    witness = Witness(running.bootstrap_servers)
    producer = EventProducer(running.bootstrap_servers, client_id="tests")
    await witness.start()
    await producer.start()
    try:
        yield System(running, running.directory, witness, producer)
    finally:
        await producer.stop()
        await witness.stop()


def orders(name: str, count: int, *, goods: str) -> list[Sent]:
    """Orders of one piece each, which are all committed whoever comes first."""
    return [
        order(f"{name}-{CUSTOMERS[number % 3]}", f"{name}-{goods}-{number}", (f"{name}-{goods}", "tea", 1, 100))
        for number in range(count)
    ]


async def open_shop(system: System, name: str, *goods: str) -> list[Sent]:
    opening = [
        *(product(f"{name}-{each}", "tea", quantity=STOCK, price=100) for each in goods),
        *(wallet(f"{name}-{customer}", balance=MONEY) for customer in CUSTOMERS),
    ]
    await system.committed(*opening)
    return opening


async def books(directory: Path, name: str) -> dict[str, Any]:
    """What the shop of that name has on its shelves and in its wallets."""
    found: dict[str, Any] = {}
    async with await KnownSystem.find(directory).reader() as reader:
        for table, owner, column in ((PRODUCTS, "category", "reserved"), (WALLETS, "customer_id", "balance")):
            async for row in reader.rows(table.schema):
                if str(row[owner]).startswith(f"{name}-"):
                    found[str(row[owner])] = row[column]
    return found


async def told(directory: Path, commands: Sequence[Sent]) -> list[Answer]:
    """The durable answer to each."""
    system = KnownSystem.find(directory)
    found = []
    async with await system.reader() as reader:
        for command in commands:
            key = str(command.body.get("customer_id") or command.body["category"])
            found += await reader.answers(command.id, key, buckets=system.settings.actors.buckets)
    assert len(found) == len(commands)
    return found


async def orders_seen(directory: Path, customer: str) -> int:
    """How many orders the history shows."""
    async with await KnownSystem.find(directory).reader() as reader:
        return len(await order_history(reader.storage, customer))


def content(backup: Path) -> bytes:
    """Everything in a backup, unpacked."""
    files = [path for path in backup.rglob("*") if path.is_file()]
    return b"".join(gzip.decompress(p.read_bytes()) if p.suffix == ".gz" else p.read_bytes() for p in files)


async def backup_under_load(system: System, to: Path, load: Sequence[Sent]) -> tuple[Path, dict[str, Any]]:
    """Make a backup while `load` is being carried out; where it is, and what was said of it."""
    await system.publish_all(*load[: len(load) // 2])
    making = asyncio.ensure_future(system.concord("backup", "create", "--to", str(to)))
    for command in load[len(load) // 2 :]:
        await system.publish_all(command)
        await asyncio.sleep(0.02)
    done: Finished = await making
    assert done.code == 0, done.stderr
    [made] = done.lines
    answers = await system.answers(*(command.id for command in load))
    assert {answer["status"] for answer in answers} == {"committed"}
    return Path(made["backup"]), made


async def restore(backup: Path, running: RunningSystem) -> Finished:
    return await asyncio.to_thread(running.concord, "restore", str(backup), "--yes", timeout_s=600)


@pytest.mark.timeout(900)
async def test_what_was_lost_with_its_tables_comes_back_from_the_backup_and_the_log_that_survived(
    tmp_path: Path,
) -> None:
    secret = {"CONCORD_CASSANDRA__USERNAME": "concord", "CONCORD_CASSANDRA__PASSWORD": PLANTED}
    first = RunningSystem(tmp_path / "first", environment=secret)
    await asyncio.to_thread(first.start)
    try:
        async with talking_to(first) as system:
            await open_shop(system, "loss", "old", "load", "new")
            before = orders("loss", 30, goods="old")
            await system.committed(*before)
            backup, made = await backup_under_load(system, tmp_path / "backups", orders("loss", 120, goods="load"))
            after = orders("loss", 30, goods="new")
            await system.committed(*after)
            expected = await books(system.directory, "loss")
            answered = await told(system.directory, before)
            events_after = [answer.events for answer in await told(system.directory, after)]
    finally:
        await asyncio.to_thread(first.kill)  # everything, by SIGKILL
    assert expected == {
        **{"loss-old": 30, "loss-load": 120, "loss-new": 30},
        **{f"loss-{customer}": MONEY - 60 * 100 for customer in CUSTOMERS},
    }
    assert made["was_running"]
    assert PLANTED.encode() not in content(backup)

    second = RunningSystem(tmp_path / "second")
    second.directory.mkdir()
    damaged = tmp_path / "damaged"
    shutil.copytree(backup, damaged)
    file = next((damaged / "tables").glob("payment.wallets*"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DamagedBackupError, match=re.escape(str(file))):
        await restore_backup(damaged, load_settings(data_dir=second.directory, environment={}), Options())
    assert list(second.directory.iterdir()) == []
    with pytest.raises(RestoreRefusedError, match="not empty"):
        await restore_backup(backup, load_settings(data_dir=first.directory, environment={}), Options())

    shutil.rmtree(first.directory / "tables")
    shutil.move(first.directory / "kafka", second.directory / "kafka")
    done = await restore(backup, second)
    assert done.code == 0, done.stderr
    [said] = done.lines
    assert said["kafka_survived"]
    assert said["rows"] == made["rows"]
    assert said["to_apply"] >= len(after)

    await asyncio.to_thread(second.start)
    try:
        async with talking_to(second) as system:
            checked = await system.concord("check", "--wait", "120")
            assert (checked.code, checked.lines[0]["offenders"]) == (0, [])
            assert await books(system.directory, "loss") == expected
            assert await told(system.directory, before) == answered
            events_again = [answer.events for answer in await told(system.directory, after)]
            assert [[event.id for event in events] for events in events_again] == [
                [event.id for event in events] for events in events_after
            ]
            await system.publish_all(before[0])  # the same id again changes nothing
            await system.committed(order("loss-ann", "loss-last", ("loss-old", "tea", 1, 100)))
            checked = await system.concord("check", "--wait", "120")
            assert (checked.code, checked.lines[0]["offenders"]) == (0, [])
            assert await told(system.directory, before[:1]) == answered[:1]
            assert await orders_seen(system.directory, "loss-ann") == 61
        assert await asyncio.to_thread(second.stop) == 0
    except BaseException:
        await asyncio.to_thread(second.kill)
        raise
    at_rest = await asyncio.to_thread(second.concord, "backup", "create", "--to", str(tmp_path / "backups"))
    assert at_rest.code == 0, at_rest.stderr
    assert (at_rest.lines[0]["was_running"], at_rest.lines[0]["paused_ms"]) == (False, 0)
    check_files(Path(at_rest.lines[0]["backup"]))


@pytest.mark.timeout(900)
async def test_a_stack_is_backed_up_under_load_and_comes_back_on_new_servers_after_the_loss_of_everything(
    stack_system: System, tmp_path: Path
) -> None:
    system = stack_system
    await open_shop(system, "stacked", "old", "load", "later")
    await system.committed(*orders("stacked", 10, goods="old"))
    backup, made = await backup_under_load(system, tmp_path / "backups", orders("stacked", 40, goods="load"))
    await system.check()
    manifest = check_files(backup)
    assert (manifest.storage, manifest.tables_by) == ("cassandra", "rows")
    later = orders("stacked", 12, goods="later")
    await system.committed(*later[:7])
    assert (await system.concord("backup", "increment", str(backup))).lines[0]["messages"] >= 7
    await system.committed(*later[7:])
    assert (await system.concord("backup", "increment", str(backup))).lines[0]["messages"] == 5
    unfinished = sum(
        stored.end - stored.resumes_at for stored in manifest.partitions if stored.topic.endswith(".commands")
    )

    anew = RunningSystem(tmp_path / "anew", profile="stack")
    done = await restore(backup, anew)

    assert done.code == 0, done.stderr
    [said] = done.lines
    assert (said["kafka_survived"], said["rows"]) == (False, made["rows"])
    added = sum(stored.messages for _, made in increments_of(backup, manifest) for stored in made.partitions)
    assert said["messages"] == sum(stored.messages for stored in manifest.partitions) + added
    assert said["to_apply"] == unfinished + added
    assert manifest.paused_ms > 0
