"""A soak: steady work for an hour, and whether any process or table grows that should not.

Every SAMPLED_EVERY_S the memory and the descriptors of each process of the system are read from /proc. What each has
in the last minutes is compared with what it had in the minutes after the WARM_UP: medians, so that no single moment
(a compaction, a collection of garbage about to happen) decides. A process that was replaced meanwhile has not been
soaked, and fails the run.

    pss           what is judged: memory of the process's own, and its share of what it shares with others. Pages of
                  files are left out: they are the kernel's cache (Cassandra maps its tables), which it takes back
    rss           told beside it: everything, those pages included
    heaps         the servers' heaps are fixed, and touched when they start, so that growth is not a heap in its first
                  use; one that leaks ends its server (-XX:+ExitOnOutOfMemoryError)
    descriptors   open files and sockets, but for the files below
    files         told beside them: files of the system's own directory. A server opens more as its data grows, and
                  Cassandra fewer as it compacts. One counts once, and only as long as it is in its place: what is
                  opened again and again, or held though it is deleted, is a descriptor

Tables grow with the work. Each that does must be in PRUNED_BY, which says what takes its rows away, or why they stay.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaConsumer

from infra.messaging.producer import EventProducer
from scripts.proof.judge import DOMAINS
from scripts.proof.on_stack.client import Client
from scripts.proof.on_stack.load import Load, with_repetitions
from scripts.proof.running import RunningSystem
from scripts.proof.stored import stored

SAMPLED_EVERY_S = 10.0
COUNTED_EVERY_S = 300.0
WARM_UP_MINUTES = 10.0
"""Or a sixth of a shorter run."""

COMPARED_PART = 1 / 12
"""So much of the run is compared with so much of it: its end with what follows the warm-up."""

GROWTH_AT_MOST = 0.05
COUNTS = ("descriptors", "files")
JUDGED = ("pss", "descriptors")
DRAINED_WITHIN_S = 120.0
COMMITTED_AT_LEAST = 0.95
KIBIBYTE = 1024
_HEAPS_TOUCHED = {"JAVA_TOOL_OPTIONS": "-XX:+AlwaysPreTouch"}

PRUNED_BY: Mapping[str, str] = {
    **{
        f"{domain}.outcomes": "every hour, of those older than CONCORD_OUTCOME__WINDOW_HOURS (168)"
        for domain in DOMAINS
    },
    "coordinator.state": "every hour, of those older than the outcomes' window that nobody can need again",
    "coordinator.intents": "deleted as their transactions end; of aborted ones, once their writer is known to be gone",
    "coordinator.incarnations": "one row a start of an actor; not pruned",
    "coordinator.timers": "one row a bucket, overwritten; does not grow after the first look",
    "payment.payments": "the business's own record of every movement; kept",
    "orders.orders": "the business's own record of every order; kept",
    "orders.returns": "the business's own record of every return; kept",
    "inventory.reservations": "the business's own record of every reservation; kept",
    "inventory.expiries": "deleted as their reservations expire (15 minutes) or end",
    "shipping.shipments": "the business's own record of every shipment; kept",
    "payment.wallets": "one row a customer; kept",
    "inventory.products": "one row a product; kept",
    "views.positions": "one row a partition, overwritten; does not grow after the first events",
    "views.order_history": "one row an order, made anew from the events; kept as long as the orders",
}
"""What takes rows away from a table that grows."""

Report = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """What one process had at one moment."""

    pid: int
    pss_bytes: int
    rss_bytes: int
    descriptors: int
    files: int = 0


def prove_soak(directory: Path, *, profile: str, minutes: float, rate: float, seed: int = 1) -> Report:
    """Run, sample and compare. Raises NotAsAskedError."""
    directory.mkdir(parents=True, exist_ok=True)
    system = RunningSystem(directory / "system", profile=profile, environment=_HEAPS_TOUCHED)
    system.start()
    try:
        report = asyncio.run(_soak(system, minutes=minutes, rate=rate, seed=seed))
        system.stop()
        system.wait_until_gone()
    except BaseException:
        system.kill()
        raise
    return {"profile": profile, "minutes": minutes, "rate_per_s": rate, "seed": seed, **report}


class _Answers:
    """Sees results, and keeps of each the moment alone: a witness that remembers all would outgrow the system."""

    def __init__(self, bootstrap_servers: str) -> None:
        self.answered_at_s: dict[str, float] = {}
        self.statuses: Counter[str] = Counter()
        self._consumer = AIOKafkaConsumer(
            *(f"{domain}.results" for domain in DOMAINS),
            bootstrap_servers=bootstrap_servers,
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
        )

    async def read(self) -> None:
        """For ever."""
        await self._consumer.start()
        try:
            async for record in self._consumer:
                answer = json.loads(record.value)
                if answer["id"] not in self.answered_at_s:
                    self.answered_at_s[answer["id"]] = time.monotonic()
                    self.statuses[f"{answer['status']} {answer['reason']}".strip()] += 1
        finally:
            await self._consumer.stop()


async def _soak(system: RunningSystem, *, minutes: float, rate: float, seed: int) -> Report:
    load = Load(seed, "soak")
    answers = _Answers(system.bootstrap_servers)
    producer = EventProducer(system.bootstrap_servers, client_id="soak")
    await producer.start()
    client = Client(producer, answers, with_repetitions(load, seed), remember=False)
    enough = asyncio.Event()
    reading = asyncio.ensure_future(answers.read())
    try:
        await client.publish(load.opening())
        working = asyncio.ensure_future(client.keep_on(rate=rate, enough=enough))
        try:
            samples, rows = await _watch(system, minutes * 60, (reading, working))
        finally:
            enough.set()
            await working
        await client.drain(within_s=DRAINED_WITHIN_S)
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await producer.stop()
    rows.append(await asyncio.to_thread(_count_rows, system))
    check = (await asyncio.to_thread(system.concord, "check", timeout_s=1800)).lines[-1]
    return {
        **_judged(samples, rows, minutes),
        "commands": len(client.sent_at_s),
        "unanswered": len(client.unanswered()),
        "answers": dict(sorted(answers.statuses.items())),
        "check": check["ok"],
        **_holds(samples, rows, minutes, client=client, answers=answers, check=check),
    }


def _holds(
    samples: Sequence[Mapping[str, Sample]],
    rows: Sequence[Mapping[str, int]],
    minutes: float,
    *,
    client: Client,
    answers: _Answers,
    check: Mapping[str, Any],
) -> Report:
    broken = [
        f"{name} grew: {what} by {grown:.1%}"
        for name, process in grown_processes(samples, minutes).items()
        for what, grown in process["growth"].items()
        if what in JUDGED and grown > GROWTH_AT_MOST
    ]
    broken += [f"{name} was replaced during the run" for name in _replaced(samples, minutes)]
    broken += [f"{name} grows, and nothing says what prunes it" for name in grown_tables(rows) if name not in PRUNED_BY]
    committed = answers.statuses["committed"] / max(1, sum(answers.statuses.values()))
    if client.unanswered() or committed < COMMITTED_AT_LEAST:
        broken.append(f"{len(client.unanswered())} commands unanswered, {committed:.1%} committed")
    broken += [str(each) for each in check["offenders"][:20]]
    return {"broken_promises": broken, "holds": not broken}


async def _watch(
    system: RunningSystem, seconds: float, working: Sequence[asyncio.Future[None]]
) -> tuple[list[dict[str, Sample]], list[dict[str, int]]]:
    started_s = time.monotonic()
    names: dict[int, str] = {}
    samples: list[dict[str, Sample]] = []
    rows = [await asyncio.to_thread(_count_rows, system)]
    counted_s = time.monotonic()
    while (now_s := time.monotonic()) < started_s + seconds:
        for each in working:
            if each.done():
                await each  # what drives the soak has ended before its time
        samples.append(await asyncio.to_thread(_sample, system, names))
        if now_s - counted_s > COUNTED_EVERY_S:
            rows.append(await asyncio.to_thread(_count_rows, system))
            counted_s = now_s
            pss_mb = sum(each.pss_bytes for each in samples[-1].values()) // 2**20
            print(f"{(now_s - started_s) / 60:.0f} min: {pss_mb} MB in all", file=sys.stderr, flush=True)
        await asyncio.sleep(max(0.0, now_s + SAMPLED_EVERY_S - time.monotonic()))
    return samples, rows


def _sample(system: RunningSystem, names: dict[int, str]) -> dict[str, Sample]:
    """By name; `names` remembers which process is which, since asking is dear."""
    processes = system.processes(named=False)
    if any(each.pid not in names for each in processes):
        names.clear()
        names.update({each.pid: each.role for each in system.processes()})
    found: dict[str, Sample] = {}
    for each in processes:
        role = names.get(each.pid, each.role)
        name = f"ray {_program(each.pid)}" if role == "ray" else role
        memory = _memory(each.pid)
        if memory is None:
            continue
        name = name if name not in found else f"{name} {each.pid}"
        descriptors, files = _descriptors(each.pid, system.directory)
        found[name] = Sample(each.pid, memory["Pss"] - memory["Pss_File"], memory["Rss"], descriptors, files)
    return found


def _memory(pid: int) -> dict[str, int] | None:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return None
    found = {line.partition(":")[0]: int(line.split()[1]) * KIBIBYTE for line in lines}
    return found if {"Pss", "Pss_File", "Rss"} <= found.keys() else None


def _descriptors(pid: int, directory: Path) -> tuple[int, int]:
    """How many there are without the files of `directory`, and how many these are."""
    targets = []
    try:
        with os.scandir(f"/proc/{pid}/fd") as entries:
            for entry in entries:
                with suppress(OSError):  # it was closed meanwhile
                    targets.append(os.readlink(entry.path))
    except OSError:
        return 0, 0
    return without_files_of(directory.resolve(), targets)


def without_files_of(directory: Path, targets: Sequence[str]) -> tuple[int, int]:
    """Of what descriptors lead to, as /proc tells it: those but the files of `directory`, and these files."""
    files = {target for target in targets if target.startswith(f"{directory}/") and not target.endswith(" (deleted)")}
    return len(targets) - len(files), len(files)


def _program(pid: int) -> str:
    """What a process of Ray is, by its command line."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
    except OSError:
        return "gone"
    scripts = [word for word in words[:4] if word.endswith(".py")]
    return Path((scripts or words)[0]).name


def _count_rows(system: RunningSystem) -> dict[str, int]:
    with stored(system.directory) as storage:
        return {name: storage.count(name) for name in storage.tables()}


# --- comparing ---------------------------------------------------------------------------------------------------


def _judged(samples: Sequence[Mapping[str, Sample]], rows: Sequence[Mapping[str, int]], minutes: float) -> Report:
    return {
        "samples": len(samples),
        "processes": grown_processes(samples, minutes),
        "rows_every_5_minutes": {name: [each.get(name, 0) for each in rows] for name in sorted(rows[-1])},
        "growing_tables": {name: PRUNED_BY.get(name, "") for name in grown_tables(rows)},
    }


def grown_processes(samples: Sequence[Mapping[str, Sample]], minutes: float) -> dict[str, Report]:
    """Of each process that was there all the time after the warm-up: what it had then, at the end, and the growth."""
    early, late = _windows(samples, minutes)
    found: dict[str, Report] = {}
    for name in sorted({name for each in early for name in each} & {name for each in late for name in each}):
        figures = {
            what: (_median(early, name, what), _median(late, name, what))
            for what in ("pss_bytes", "rss_bytes", *COUNTS)
        }
        found[name] = {
            "pss_mb": [round(value / 2**20, 1) for value in figures["pss_bytes"]],
            "rss_mb": [round(value / 2**20, 1) for value in figures["rss_bytes"]],
            **{what: list(figures[what]) for what in COUNTS},
            "growth": {
                what.removesuffix("_bytes"): round(max(1.0, late_value) / max(1.0, early_value) - 1, 4)
                for what, (early_value, late_value) in figures.items()
            },
        }
    return found


def grown_tables(rows: Sequence[Mapping[str, int]]) -> list[str]:
    """The tables that have more rows at the end than at the beginning."""
    return sorted(name for name, count in rows[-1].items() if count > rows[0].get(name, 0))


def _replaced(samples: Sequence[Mapping[str, Sample]], minutes: float) -> list[str]:
    pids: dict[str, set[int]] = defaultdict(set)
    for each in samples[_warm(samples, minutes) :]:
        for name, sample in each.items():
            pids[name].add(sample.pid)
    return sorted(name for name, found in pids.items() if len(found) > 1)


def _windows(
    samples: Sequence[Mapping[str, Sample]], minutes: float
) -> tuple[Sequence[Mapping[str, Sample]], Sequence[Mapping[str, Sample]]]:
    first, width = _warm(samples, minutes), max(1, round(len(samples) * COMPARED_PART))
    return samples[first : first + width], samples[-width:]


def _warm(samples: Sequence[object], minutes: float) -> int:
    """The first sample after the warm-up."""
    return int(len(samples) * min(WARM_UP_MINUTES / minutes, 1 / 6))


def _median(samples: Sequence[Mapping[str, Sample]], name: str, what: str) -> float:
    return float(statistics.median(getattr(each[name], what) for each in samples if name in each))
