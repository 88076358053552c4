"""A whole system killed twice in the middle of a replay ends in the tables of one that was left in peace.

The same file of invoices is replayed on the shared system, undisturbed, and on one of its own that loses, at moments
decided by a seed, first every process at once, Kafka and the supervisor included, and then its supervisor alone, of
which nothing may survive. Each time `concord up` starts anew on the same directory, and the client that was replaying
goes on by itself.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from scripts.proof.judge import judge
from scripts.proof.replaying import start_replay
from scripts.proof.running import RunningSystem
from scripts.proof.tables import comparable, differences, exact_rows, in_doubt
from scripts.proof.witness import read_history
from tests.end_to_end.conftest import Replayed
from tests.end_to_end.harness import System, eventually, seeded
from tests.end_to_end.shop_files import of_mark

pytestmark = pytest.mark.system

COMMANDS_A_SECOND = 15
ORPHANS_GONE_WITHIN_S = 30.0


@pytest.mark.timeout(420)
async def test_a_system_killed_twice_ends_in_the_same_tables_as_one_left_in_peace(
    system: System, replayed: Replayed, tmp_path: Path
) -> None:
    rng = seeded("survival")
    killed = RunningSystem(
        tmp_path / "data",
        environment={
            "CONCORD_RECOVERY__SWEEP_INTERVAL_MS": "1000",
            "CONCORD_FAILPOINTS": str(tmp_path / "never-armed"),
        },
    )
    await asyncio.to_thread(killed.start)
    client = start_replay(killed, [replayed.file], rate=COMMANDS_A_SECOND, in_flight=16)
    try:
        await orders_in(killed, rng.randrange(8, 20))
        await asyncio.to_thread(killed.kill, rng=rng)
        await asyncio.to_thread(killed.start)

        await orders_in(killed, rng.randrange(35, 50))
        await asyncio.to_thread(killed.kill_supervisor)
        await asyncio.to_thread(killed.wait_until_gone, within_s=ORPHANS_GONE_WITHIN_S)
        await asyncio.to_thread(killed.start)

        summary = await finished(client)
        assert (summary["unanswered"], summary["dead_lettered"]) == (0, 0)
        assert summary["by_type"] == replayed.summary["by_type"]
        await assert_holds(killed)
        await system.check()
        both = [comparable(directory, wanted=of_mark("77")) for directory in (system.directory, killed.directory)]
        counted, offenders = differences(*both)
        assert not offenders
        assert counted["orders.orders"] == replayed.summary["by_type"]["PlaceOrder"]["committed"]

        await assert_drains_on_ctrl_c(
            killed, customer=str(json.loads(exact_rows(killed.directory, "payment.wallets")[0])["customer_id"])
        )
    finally:
        client.kill()
        await asyncio.to_thread(client.wait)
        await asyncio.to_thread(killed.kill)


async def assert_holds(running: RunningSystem) -> None:
    """The standing check of a system that no witness has watched."""
    await eventually(lambda: not in_doubt(running.directory), "no record to be in doubt")
    checked = await asyncio.to_thread(running.concord, "check")
    assert checked.code == 0, checked.stdout
    judgement = judge(await read_history(running.bootstrap_servers))
    assert judgement.holds, judgement.offenders


async def assert_drains_on_ctrl_c(running: RunningSystem, customer: str) -> None:
    """With work under way Ctrl-C ends everything with 0 and leaves nobody; what was answered is found at rest."""
    commands = [
        {
            "type": "TopUpWallet",
            "id": f"survival-{number}",
            "body": {"customer_id": customer, "amount": 1, "currency": "GBP"},
        }
        for number in range(2_000)
    ]
    file = running.directory / "top-ups.ndjson"
    file.write_text("\n".join(map(json.dumps, commands)))
    client = running.start_concord("send", "--ndjson", str(file))
    try:
        assert client.stdout is not None
        answered = [json.loads(await asyncio.to_thread(client.stdout.readline)) for _ in range(50)]
        assert await asyncio.to_thread(running.stop, number=signal.SIGINT) == 0, running.last_words()
        await asyncio.to_thread(running.wait_until_gone, within_s=ORPHANS_GONE_WITHIN_S)
    finally:
        client.kill()
        await asyncio.to_thread(client.wait)
    for answer in (answered[0], answered[-1]):
        told = await asyncio.to_thread(running.concord, "status", answer["id"], "--key", customer)
        assert told.lines == [answer]
        assert (answer["status"], told.code) == ("committed", 0)


async def orders_in(running: RunningSystem, count: int, *, within_s: float = 90) -> None:
    """Until so many orders stand in the tables: a moment of the replay."""
    await eventually(
        lambda: len(exact_rows(running.directory, "orders.orders")) >= count, f"{count} orders", within_s=within_s
    )


async def finished(client: subprocess.Popen[bytes]) -> dict[str, Any]:
    """The summary of a replay that goes on by itself."""
    stdout, stderr = await asyncio.to_thread(client.communicate, timeout=120)
    assert client.returncode == 0, (stdout[-2000:], stderr[-2000:])
    summary: dict[str, Any] = json.loads(stdout)
    return summary
