"""The long proofs: whole files, whole systems, and a report that says what was seen.

    replay        the file, its formulas, the standing check, and the file again, which must change nothing
    small-stock   the same with little stock and little money: refused orders leave nothing but their answers
    chaos         the file on one system left in peace, and on one of which processes are killed at random moments,
                  and twice everything; both must end in the same tables

Each on profile local or stack; on the stack "everything" is Cassandra, too. Rows are taken along before a system ends,
since the tables of a stack end with it. (Chaos for some minutes without a file is scripts/proof/on_stack/chaos.py.)

Moments are decided by a seed and measured in commands answered so far, so that kills fall into work under way however
fast the machine is. The client that replays goes on by itself through all of it; if it should end, it is started
again with the same file, to see what else can be seen, and the report says so and does not hold.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.proof.judge import DOMAINS, History, judge
from scripts.proof.replaying import check_formulas, replay, start_replay
from scripts.proof.running import NotAsAskedError, RunningSystem, running
from scripts.proof.stored import stored
from scripts.proof.tables import COMMITTED, COMPARED, Tables, comparable, differences, exact, in_doubt, texts, traces
from scripts.proof.witness import read_history

SETTLED_WITHIN_S = 20.0
CHECKED_WITHIN_S = 900.0
PROGRESS_EVERY_S = 0.1
LOOKING_PART = 0.2
"""How much of the time may go into looking how far the system is: it needs the machine itself."""

MOST_CLIENT_STARTS = 5
NO_PROGRESS_FOR_S = 120.0
CLIENT_PATIENCE_S = 1800
"""Without any answer: twice everything may be killed before one comes, and a busy machine starts slowly."""


EVERYTHING = "everything"

KILLED = ("worker", "domain actor", "coordinator")
"""What chaos kills one of at a time."""

Report = dict[str, Any]


def prove_replay(
    files: Sequence[Path], directory: Path, *, profile: str = "local", limit: int = 0, **stocks: int
) -> Report:
    """The file, everything that must hold afterwards, and the file again."""
    options = {"limit": limit, **stocks}
    with running(directory / "system", profile=profile) as system:
        _say(f"ready after {system.ready_after_s:.1f} s")
        summary = replay(system, files, **options)
        _say(f"replayed: {_in_short(summary)}")
        report: Report = {"profile": profile, "ready_after_s": round(system.ready_after_s, 1), "summary": summary}
        report |= _what_holds(system, files, **options)
        before = exact(system.directory)
        again = replay(system, files, **options)
        _say(f"again: {_in_short(again)}")
        checked = _check(system)
        after = exact(system.directory)
        report["again"] = again
        report["rows_compared"] = {name: len(rows) for name, rows in before.items()}
        report["changed_by_replaying_again"] = [name for name in COMPARED if before[name] != after[name]]
        report["check_again"] = checked
    report["holds"] = (
        _all_hold(report)
        and not report["changed_by_replaying_again"]
        and report["check_again"]["ok"]
        and again["by_type"] == summary["by_type"]
    )
    return report


def prove_small_stock(
    files: Sequence[Path],
    directory: Path,
    *,
    profile: str = "local",
    limit: int = 0,
    initial_stock: int,
    initial_balance: int,
) -> Report:
    """The same with so little of everything that many orders are refused."""
    options = {"limit": limit, "initial_stock": initial_stock, "initial_balance": initial_balance}
    with running(directory / "system", profile=profile) as system:
        summary = replay(system, files, **options)
        _say(f"replayed: {_in_short(summary)}")
        history = asyncio.run(read_history(system.bootstrap_servers))
        refused = refused_orders(history)
        report = {
            "profile": profile,
            "summary": summary,
            "refused_orders": len(refused),
            "traces_of_refused_orders": traces(system.directory, refused)[:20],
            "events_of_refused_orders": _events_that_mention(history, refused)[:20],
        }
        report |= _what_holds(system, files, **options)
    report["holds"] = (
        _all_hold(report)
        and bool(refused)
        and not report["traces_of_refused_orders"]
        and not report["events_of_refused_orders"]
    )
    return report


def prove_chaos(
    files: Sequence[Path], directory: Path, *, profile: str = "local", limit: int = 0, seed: int, times: int = 3
) -> Report:
    """One system in peace, one under fire, the same tables."""
    with running(directory / "peace", profile=profile) as peace:
        summary = replay(peace, files, limit=limit)
        _say(f"in peace: {_in_short(summary)}")
        checked = _check(peace)
        in_peace = comparable(peace.directory)
    fired_on = RunningSystem(directory / "fire", profile=profile)
    fired_on.start()
    try:
        report: Report = {"profile": profile, "seed": seed, "in_peace": summary, "in_peace_check": checked}
        report |= _under_fire(fired_on, files, limit=limit, seed=seed, times=times, total=_commands(summary))
        report |= _what_holds(fired_on, files, limit=limit)
        under_fire: Tables = comparable(fired_on.directory)
    finally:
        fired_on.kill()
    counted, found = differences(in_peace, under_fire)
    report["rows_compared"] = counted
    report["differences"] = found
    report["holds"] = (
        checked["ok"]
        and _all_hold(report)
        and not found
        and report["summary"]["by_type"] == summary["by_type"]
        and report["client_starts"] == 1  # nothing had to be sent again by hand
        and len(report["kills"]) == times * len(KILLED) + 2
    )
    return report


# --- under fire --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kill:
    """What is killed once so many commands have been answered."""

    what: str
    at_commands: int


def plan(rng: random.Random, *, total: int, times: int) -> list[Kill]:
    """`times` of each kind, and twice everything, at random moments of a replay of `total` commands."""
    kinds = [*KILLED * times, EVERYTHING, EVERYTHING]
    rng.shuffle(kinds)
    moments = sorted(rng.randrange(total // 50, total * 19 // 20) for _ in kinds)
    return [Kill(what, at) for what, at in zip(kinds, moments, strict=True)]


def _under_fire(
    system: RunningSystem, files: Sequence[Path], *, limit: int, seed: int, times: int, total: int
) -> Report:
    rng = random.Random(seed)
    kills: list[Report] = []
    client = _Client(system, files, limit)
    try:
        for kill in plan(rng, total=total, times=times):
            client.wait_until(kill.at_commands)
            kills.append(_strike(system, kill, rng))
            _say(f"killed: {kills[-1]}")
        summary = client.finish()
    finally:
        client.end()
    _say(f"under fire: {_in_short(summary)}")
    return {"kills": kills, "client_starts": client.starts, "summary": summary}


def _strike(system: RunningSystem, kill: Kill, rng: random.Random) -> Report:
    """SIGKILL, and how long it took until the next command was answered."""
    with _counting(system) as answered:
        told: Report = {"what": kill.what, "planned_at": kill.at_commands, "at": answered()}
    started_s = time.monotonic()
    if kill.what == EVERYTHING:
        system.kill(rng=rng)
        started_s = time.monotonic()
        system.start()
        told["up_after_s"] = round(system.ready_after_s, 1)
    else:
        role = _choose(system, kill.what, rng)
        os.kill(system.pid_of(role), signal.SIGKILL)
        told["role"] = role
    with _counting(system) as answered:
        before = answered()
        while (now := answered()) == before and time.monotonic() - started_s < NO_PROGRESS_FOR_S:
            time.sleep(0.02)
    told["next_answer_after_s"] = round(time.monotonic() - started_s, 2)
    told["answered_by_then"] = now - before
    return told


def _choose(system: RunningSystem, what: str, rng: random.Random) -> str:
    domains = ("orders-", "inventory-", "payment-", "shipping-")
    prefixes = {"worker": ("worker-",), "domain actor": domains, "coordinator": ("coordinator-",)}[what]
    deadline_s = time.monotonic() + 60
    while True:
        roles = sorted({p.role for p in system.processes() if p.role.startswith(prefixes)})
        if roles:
            return rng.choice(roles)
        if time.monotonic() > deadline_s:
            raise NotAsAskedError(f"there is no {what} to kill")
        time.sleep(0.1)


class _Client:
    """The replaying client beside the system; started again, with the same file, should it end early."""

    def __init__(self, system: RunningSystem, files: Sequence[Path], limit: int) -> None:
        self._system = system
        self._files = files
        self._limit = limit
        self.starts = 0
        self._process = self._start()

    def wait_until(self, commands: int) -> None:
        """Until so many commands have been answered."""
        last, since_s = 0, time.monotonic()
        with _counting(self._system) as orders_answered, _counting(self._system, DOMAINS) as answered:
            while orders_answered() < commands:
                if self._process.poll() not in (None, 0):
                    self._process = self._start()
                if time.monotonic() - since_s > NO_PROGRESS_FOR_S:
                    if (now := answered()) == last:  # before the first order come products and wallets
                        raise NotAsAskedError(f"no command was answered for {NO_PROGRESS_FOR_S:.0f} s: {last} so far")
                    last, since_s = now, time.monotonic()
                time.sleep(PROGRESS_EVERY_S)

    def finish(self) -> Report:
        """The summary of the client that came to its end."""
        while True:
            stdout, stderr = self._process.communicate()
            if self._process.returncode == 0:
                summary: Report = json.loads(stdout)
                return summary
            _say(f"the client ended with {self._process.returncode}: {stderr[-500:].decode('utf-8', 'replace')}")
            self._process = self._start()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        self.starts += 1
        if self.starts > MOST_CLIENT_STARTS:
            raise NotAsAskedError(f"the client ended early {MOST_CLIENT_STARTS} times")
        return start_replay(self._system, self._files, limit=self._limit, patience=CLIENT_PATIENCE_S)


@contextmanager
def _counting(system: RunningSystem, domains: Sequence[str] = ("orders",)) -> Iterator[Callable[[], int]]:
    """Asks how many commands of these domains have a durable answer; pauses first when it has been asking too much.

    An answer in doubt is none: when its transaction is aborted, the row goes.
    """
    with stored(system.directory) as storage:
        looked_s, count = 0.0, 0

        def answered() -> int:
            nonlocal looked_s, count
            time.sleep(looked_s * (1 / LOOKING_PART - 1))
            started_s = time.monotonic()
            with suppress(sqlite3.OperationalError):  # the file is being opened for the first time after a kill
                rows = [row for domain in domains for row in storage.rows(f"{domain}.outcomes", ("tx_state",))]
                count = sum(row["tx_state"] in (None, COMMITTED) for row in rows)
            looked_s = time.monotonic() - started_s
            return count

        yield answered


def _commands(summary: Report) -> int:
    return int(summary["orders"]) + int(summary["returns"])


# --- what must hold ----------------------------------------------------------------------------------------------


def _what_holds(system: RunningSystem, files: Sequence[Path], **options: Any) -> Report:
    """The standing check, the judge and the formulas, of a system whose commands are all answered."""
    unsettled = _wait_for_rest(system)
    checked = _check(system)
    judgement = judge(asyncio.run(read_history(system.bootstrap_servers)))
    return {
        "in_doubt_after_20_s": unsettled,
        "check": checked,
        "judged": dict(judgement.counted),
        "broken_promises": list(judgement.offenders[:20]),
        "formulas": check_formulas(system, files, **options),
    }


def _check(system: RunningSystem) -> Report:
    """What `concord check` says of the system once it is at rest. Raises NotAsAskedError where it says nothing."""
    told = system.concord("check", timeout_s=CHECKED_WITHIN_S)
    if not told.lines:
        raise NotAsAskedError(f"concord check ended with {told.code}: {told.stderr[-2000:]}")
    checked: Report = told.lines[-1]
    return checked


def _wait_for_rest(system: RunningSystem) -> list[str]:
    deadline_s = time.monotonic() + SETTLED_WITHIN_S
    while (left := in_doubt(system.directory)) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    return left


def _all_hold(report: Report) -> bool:
    summary = report["summary"]
    return bool(
        not report["in_doubt_after_20_s"]
        and report["check"]["ok"]
        and not report["broken_promises"]
        and report["formulas"]["agrees"]
        and summary["unanswered"] == summary["dead_lettered"] == 0
    )


def refused_orders(history: History) -> set[str]:
    """Order ids of refused PlaceOrders, from the topics."""
    refused = {result.body["id"] for result in history.results("orders") if result.body["status"] == "refused"}
    return {
        command.body["order_id"]
        for command in history.commands("orders")
        if command.header("ce_type") == "PlaceOrder" and command.header("ce_id") in refused
    }


def _events_that_mention(history: History, ids: set[str]) -> list[str]:
    return [
        f"{message.place} mentions {sorted(found)}"
        for topic, messages in history.messages.items()
        if topic.endswith(".events")
        for message in messages
        if (found := ids & set(texts(message.body)))
    ]


def _in_short(summary: Report) -> str:
    chosen = ("invoices", "orders", "returns", "write_offs", "committed", "refused", "seconds", "orders_per_s")
    return ", ".join(f"{name} {summary[name]}" for name in chosen)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
