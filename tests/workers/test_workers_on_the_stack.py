"""Workers that come, go and die, everything restarted in turn, and a storage that stands still, on real servers.

Method: a steady stream of orders goes on while workers change; afterwards every command has the one answer that it
would have had in peace, and the standing check holds: nothing in doubt, `concord check`, and an independent consumer
that judges repetitions and the order within each key.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from strange_records import publish_with_names

from infra.metrics import parse_metrics
from schemas.partitioning import slot
from scripts.proof.running import concord_program
from tests.end_to_end.harness import Sent, System, eventually, order, product, seeded, wallet

pytestmark = pytest.mark.system

CUSTOMERS = 8
AT_ONCE = 32
"""Commands of the stream that may be without an answer."""

STALLED = 13
STORM = (3, 1, 0)
"""How many workers of its own the system has, one number after the other."""

STALLED_S = 14.0
"""Longer than a storage call may take (10 s), so that deadlines have to show."""

KIBIBYTE = 1024
MEBIBYTE = 1024 * KIBIBYTE


class Shop:
    """A stream of orders that goes on in the background until it is told to end."""

    def __init__(self, system: System, name: str) -> None:
        self._system = system
        self._name = name
        self._rng = seeded(name)
        self.sent: list[Sent] = []

    async def open(self) -> None:
        await self._system.committed(
            *(product(f"{self._name}-goods", f"p{number}", quantity=10**6) for number in range(4)),
            product(f"{self._name}-cups", "cup", quantity=10**6),
            *(wallet(f"{self._name}-{number}", balance=10**9) for number in range(CUSTOMERS)),
        )

    async def _go_on(self, enough: asyncio.Event, pause_s: float) -> None:
        while not enough.is_set():
            if self._unanswered() > AT_ONCE:  # a slow machine gets less to do, not more to wait for
                await asyncio.sleep(pause_s)
                continue
            some = [self._order(len(self.sent) + number) for number in range(4)]
            await self._system.publish_all(*some)
            self.sent += some
            await asyncio.sleep(pause_s)

    def _unanswered(self) -> int:
        return sum(not self._system.witness.answers(command.id) for command in self.sent[-10 * AT_ONCE :])

    def _order(self, number: int) -> Sent:
        lines = [(f"{self._name}-goods", f"p{self._rng.randrange(4)}", 1, 100), (f"{self._name}-cups", "cup", 1, 900)]
        return order(f"{self._name}-{self._rng.randrange(CUSTOMERS)}", f"{self._name}-{number}", *lines)

    @asynccontextmanager
    async def busy(self, *, pause_s: float = 0.25) -> AsyncIterator[None]:
        enough = asyncio.Event()
        going_on = asyncio.ensure_future(self._go_on(enough, pause_s))
        try:
            yield
        finally:
            enough.set()
            await going_on

    async def all_committed(self) -> None:
        answers = await self._system.answers(*(command.id for command in self.sent), within_s=90)
        assert Counter((answer["status"], answer["reason"]) for answer in answers) == {("committed", ""): len(answers)}


async def told(system: System, *arguments: str) -> list[dict[str, Any]]:
    done = await system.concord(*arguments, timeout_s=300)
    assert done.code == 0, done.stderr
    return list(done.lines)


def own_workers(system: System) -> list[tuple[str, int]]:
    return [(one.role, one.pid) for one in system.running.processes(named=False) if one.role.startswith("worker-")]


@asynccontextmanager
async def one_worker_afterwards(system: System) -> AsyncIterator[None]:
    """Whatever comes of the block, the system is then as other tests expect it."""
    try:
        yield
    finally:
        await system.concord("workers", "1")


@asynccontextmanager
async def worker_apart(system: System, log: Path) -> AsyncIterator[Apart]:
    """`concord worker` on the system's directory, a process that the supervisor knows nothing of."""
    apart = Apart(system, log)
    try:
        yield apart
    finally:
        apart.process.kill()
        await asyncio.to_thread(apart.process.wait)


class Apart:
    def __init__(self, system: System, log: Path) -> None:
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [concord_program(), "worker", "--data", str(system.directory)],
                env=system.running.environment,
                stdout=file,
                stderr=file,
            )

    @property
    def assigned(self) -> bool:
        return '"assigned"' in self.log.read_text()

    async def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return await asyncio.to_thread(self.process.wait, 60)


@pytest.mark.timeout(480)
async def test_workers_that_come_go_and_die_every_few_seconds_lose_and_double_nothing(
    stack_system: System, tmp_path: Path
) -> None:
    system, rng = stack_system, seeded("storm")
    shop = Shop(system, "storm")
    await shop.open()

    async with one_worker_afterwards(system), worker_apart(system, tmp_path / "apart.log") as apart, shop.busy():
        await eventually(lambda: apart.assigned, "the worker apart to have partitions", within_s=60)
        for count in STORM:
            changing = asyncio.ensure_future(told(system, "workers", str(count)))
            await asyncio.sleep(rng.uniform(1, 3))
            if there := own_workers(system):
                with suppress(ProcessLookupError):  # It may just have left.
                    os.kill(rng.choice(there)[1], signal.SIGKILL)
            assert len((await changing)[-1]["workers"]) == count
        # Now all of it is the work of the one that runs apart.
        await system.answers(*(command.id for command in shop.sent), within_s=60)
        await told(system, "workers", "1")
        assert await apart.end(signal.SIGTERM) == 0, apart.log.read_text()[-2000:]

    await shop.all_committed()
    await asyncio.to_thread(system.running.wait_until_ready)
    assert [line["worker"] for line in await told(system, "workers")] == ["worker-0"]
    await system.check()


@pytest.mark.timeout(480)
async def test_everything_restarted_in_turn_under_load_costs_no_command_its_success(stack_system: System) -> None:
    system = stack_system
    shop = Shop(system, "rolling")
    await shop.open()
    async with one_worker_afterwards(system):
        await told(system, "workers", "2")
        before = {one.role: one.pid for one in system.running.processes()}
        async with shop.busy():
            steps = await told(system, "restart")
        after = {one.role: one.pid for one in system.running.processes()}
        await shop.all_committed()

    restarted = [step.get("worker") or step["actor"] for step in steps]
    kept = {role for role in before if before[role] == after.get(role)}
    assert set(restarted) == {role for role in before if role[-2:-1] == "-"}
    assert restarted[:2] == ["worker-0", "worker-1"]
    assert restarted[-1] == "coordinator-0"
    assert not kept & set(restarted), "a process is still the one that it was"
    assert {"supervisor", "kafka", "cassandra"} <= kept
    assert [step["step"] for step in steps] == ["restarted"] * len(steps)
    assert {step["exit_code"] for step in steps if "worker" in step} == {0}
    await system.check()


async def metrics(system: System) -> dict[Any, float]:
    url = f"{system.running.runtime['http']}/metrics"
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return dict(parse_metrics(await response.read()))


async def lag_of(system: System, topic: str) -> float:
    return sum(
        value
        for (name, labels), value in (await metrics(system)).items()
        if name == "concord_consumer_lag_messages" and dict(labels)["topic"] == topic
    )


async def until_lag(system: System, topic: str, least: int) -> None:
    """It is measured every two seconds, and on a busy machine less often."""
    async with asyncio.timeout(30):
        while await lag_of(system, topic) < least:  # noqa: ASYNC110 - what is asked sets no event
            await asyncio.sleep(0.5)


async def unserved(system: System) -> float:
    """Storage calls whose deadline passed, or that found nobody to serve them."""
    return sum(value for (name, _), value in (await metrics(system)).items() if name == "concord_storage_errors_total")


def private_bytes(pid: int) -> int:
    """Memory of a process that it shares with nobody: Ray's processes map the same store of objects."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * KIBIBYTE for line in lines if line.startswith("RssAnon:"))


def large_top_ups(count: int, *, kibibytes: int = 256) -> list[Sent]:
    """Small commands with long values: JSON may have any amount of space around it. Spread over all partitions."""

    class Padded(Sent):
        @property
        def value(self) -> bytes:
            return super().value + b" " * (kibibytes * KIBIBYTE)

    return [
        Padded("TopUpWallet", {"customer_id": f"stall-{number % STALLED}", "amount": 1, "currency": "GBP"})
        for number in range(count)
    ]


@pytest.mark.timeout(480)
async def test_while_cassandra_stands_still_the_lag_grows_and_no_process_does(stack_system: System) -> None:
    system = stack_system
    await system.committed(*(wallet(f"stall-{number}") for number in range(STALLED)))
    assert {slot(f"stall-{number}", 4) for number in range(STALLED)} == {0, 1, 2, 3}
    await system.committed(*large_top_ups(48))
    processes = {one.role: one.pid for one in system.running.processes() if one.role[-2:-1] == "-"}
    cassandra, refused_before = await system.pid_of("cassandra"), await unserved(system)
    many = large_top_ups(260)
    filling, more = many[:200], many[200:]  # 51 MB fill every buffer on the way; 15 MB more must stay in Kafka

    os.kill(cassandra, signal.SIGSTOP)
    try:
        await system.publish_all(*filling)
        await asyncio.sleep(STALLED_S)
        assert await lag_of(system, "payment.commands") >= len(filling)
        full = {role: private_bytes(pid) for role, pid in processes.items()}
        await system.publish_all(*more)
        await asyncio.sleep(5)  # time for all of it to come in, which must not happen
        later = {role: private_bytes(pid) for role, pid in processes.items()}
        await until_lag(system, "payment.commands", len(many))
        assert await unserved(system) > refused_before, "no call of the storage met its deadline"
        assert not [command for command in many if system.witness.answers(command.id)]
    finally:
        os.kill(cassandra, signal.SIGCONT)

    grown = {role: (later[role] - full[role]) / MEBIBYTE for role in processes}
    assert max(grown.values()) < 8, grown
    answers = await system.answers(*(command.id for command in many), within_s=90)
    assert Counter((answer["status"], answer["reason"]) for answer in answers) == {("committed", ""): len(many)}
    now = {one.role: one.pid for one in system.running.processes() if one.role in processes}
    assert now == processes, "waiting counted as standing still"
    await system.check()


@pytest.mark.timeout(120)
async def test_a_record_with_an_unreadable_header_name_is_a_dead_letter_and_its_partition_moves_on(
    stack_system: System,
) -> None:
    system = stack_system
    before = wallet("strange-0")
    await system.committed(before)
    good = [Sent("TopUpWallet", {"customer_id": "strange-0", "amount": n, "currency": "GBP"}) for n in (1, 2)]
    named = [
        (one.key, one.value, [(name.encode(), value) for name, value in one.headers.items()])
        for one in (good[0], Sent("TopUpWallet", good[0].body), good[1])
    ]
    named[1][2].insert(0, (b"na\xff\xfeme", b"value"))
    partition = slot("strange-0", 4)

    offset = await publish_with_names(system.running.bootstrap_servers, "payment.commands", named, partition=partition)
    bad = dict(named[1][2])[b"ce_id"].decode()
    answers = await system.answers(good[0].id, bad, good[1].id)

    assert [(answer["status"], answer["reason"]) for answer in answers] == [
        ("committed", ""),
        ("dead-lettered", "bad_headers"),
        ("committed", ""),
    ]
    await system.witness.catch_up()
    [letter] = [seen for seen in system.witness.history.dead_letters("payment") if seen.header("dlq-command-id") == bad]
    place = tuple(letter.header(f"dlq-original-{part}") for part in ("topic", "partition", "offset"))
    assert place == ("payment.commands", str(partition), str(offset + 1))
    assert letter.value == good[0].value
    await system.check()
