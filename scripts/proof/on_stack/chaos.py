"""Chaos on the stack: some minutes of load and faults, and the judgement afterwards.

The load begins in calm; then faults come one after the other with short pauses, first each kind once and then by
weight, until the time is over and each kind has happened. A long run goes on until each failpoint has fired, too, and,
half as much time again at most, until as many commands were published as it owes. The load ends with the last fault.
SETTLED_WITHIN_S later every command must be answered and no record in doubt, and then everything at rest is judged: by
`concord check`, by an independent consumer's view of the topics, by sums, versions and the order in time.

The seed decides what is asked, which faults come in which order, whom they hit and for how long. What the machine
makes of it is its own, so two runs of a seed have the same plan and not the same history.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from infra.messaging.producer import EventProducer
from scripts.proof.judge import History, judge
from scripts.proof.on_stack.client import Client
from scripts.proof.on_stack.faults import FAILPOINTS_ARMED, FAILPOINTS_NOT_MET, FAULTS, Break, points, schedule
from scripts.proof.on_stack.injecting import Done, Injector
from scripts.proof.on_stack.ledger import check_time, check_versions, check_wallets, made
from scripts.proof.on_stack.load import Load, Message, with_repetitions
from scripts.proof.on_stack.standing import Standing, standing
from scripts.proof.stored import stored_at
from scripts.proof.tables import in_doubt_at
from scripts.proof.witness import Witness, read_history, witnessing

COMMANDS_A_MINUTE = 20_000 / 30
FAULTS_A_MINUTE = 120 / 30
RATE_PER_S = 13.0
"""Somewhat more than COMMANDS_A_MINUTE, for the times in which nothing can be published."""

OVERTIME_PART = 1 / 2
"""How much longer a long run may take until it has published what it owes, and each failpoint has fired."""

LONG_FROM_MINUTES = 20.0
"""A shorter run hurries from fault to fault, so that every kind has its turn: it owes neither COMMANDS_A_MINUTE, for
its machine hardly ever runs in peace, nor every failpoint (tests/end_to_end/test_failpoints.py fires each)."""

PAUSE_SHORT_S = (0.5, 3.0)
PAUSE_LONG_S = (2.0, 9.0)
"""From the moment all is whole again to the next fault."""

UNANSWERED_SHORT = 50
UNANSWERED_LONG = 300
"""So many commands may wait for their answers before the client waits, too. What has piled up at the end must be
answered within SETTLED_WITHIN_S: in a short run by a machine that has other tests to do; in a long one it has not."""

PATIENCE_SHORT = 3.0
"""The short form runs beside other tests; how soon everything is whole again is shown by the long one, alone."""

CALM_PART = 1 / 12
"""Of the time, before the first fault: what the same load comes to in peace."""

SETTLED_WITHIN_S = 20.0
OPENED_WITHIN_S = 60.0
COMMITTED_IN_CALM = 0.95
COMMITTED_UNDER_FIRE = 0.60
CHECKED_WITHIN_S = 900.0
_SHOWN = 20

Report = dict[str, Any]


def prove_chaos_on_the_stack(directory: Path, *, minutes: float, seed: int, rate: float = RATE_PER_S) -> Report:
    """All of it; `holds` says whether everything does. Raises ToolMissingError, NotAsAskedError."""
    directory.mkdir(parents=True, exist_ok=True)
    return asyncio.run(_prove(directory, minutes=minutes, seed=seed, rate=rate))


async def _prove(directory: Path, *, minutes: float, seed: int, rate: float) -> Report:
    async with standing(directory, say=_say) as there, witnessing(there.bootstrap_servers) as witness:
        producer = EventProducer(there.bootstrap_servers, client_id="chaos")
        await producer.start()
        try:
            return await _Run(there, witness, producer, minutes=minutes, seed=seed, rate=rate).report()
        finally:
            await producer.stop()


class _Run:
    def __init__(
        self, there: Standing, witness: Witness, producer: EventProducer, *, minutes: float, seed: int, rate: float
    ) -> None:
        self._there = there
        self._witness = witness
        self._minutes = minutes
        self._seed = seed
        self._rate = rate
        self._load = Load(seed)
        self._long = minutes >= LONG_FROM_MINUTES
        messages = with_repetitions(self._load, seed)
        self._client = Client(
            producer, witness, messages, unanswered_at_most=UNANSWERED_LONG if self._long else UNANSWERED_SHORT
        )
        self._injector = Injector(
            there,
            seed=seed,
            load=self._load,
            points=points(seed),
            published=self._client.published,
            publish=self._client.publish,
            patience=1.0 if self._long else PATIENCE_SHORT,
        )
        self._done: list[Done] = []
        self._every_failpoint = set(FAILPOINTS_ARMED) if self._long else set()

    async def report(self) -> Report:
        opening = self._load.opening()
        await self._client.publish(opening)
        await self._witness.answers_to([each.id for each in opening], timeout_s=OPENED_WITHIN_S)
        started_s = time.monotonic()
        enough = asyncio.Event()
        working = asyncio.ensure_future(self._client.keep_on(rate=self._rate, enough=enough))
        try:
            await asyncio.sleep(self._minutes * 60 * CALM_PART)
            calm_until_s = time.monotonic()
            await self._fire(started_s + self._minutes * 60, working)
        finally:
            enough.set()
            await working
        last_s = time.monotonic()
        unsettled = await self._settle(last_s)
        _say(f"{len(self._client.published)} messages, {len(self._done)} faults in {last_s - started_s:.0f} s; judging")
        report: Report = {"profile": "stack", "seed": self._seed, "minutes": self._minutes}
        report |= self._faults()
        report |= self._work(calm_until_s)
        report |= {"seconds_under_load": round(last_s - started_s, 1), "unsettled_after_20_s": unsettled[:_SHOWN]}
        report |= await self._judged()
        report["broken_promises"] += self._shortcomings(report)
        report["holds"] = not report["broken_promises"]
        return report

    # --- under fire -----------------------------------------------------------------------------------------------

    async def _fire(self, until_s: float, working: asyncio.Future[None]) -> None:
        breaking = next(fault for fault in FAULTS if isinstance(fault.how, Break))
        for planned in schedule(self._seed, pause_s=PAUSE_LONG_S if self._long else PAUSE_SHORT_S):
            if self._is_enough(until_s):
                return
            for fault in [planned.fault, *([breaking] if self._missing_failpoints() else [])]:
                await asyncio.sleep(planned.pause_s)
                if working.done():
                    await working  # the client has given up: nothing is left to prove
                done = await self._injector.inject(fault)
                self._done.append(done)
                _say(f"{len(self._done):3} {_in_short(done)}; {len(self._client.unanswered())} unanswered")

    def _is_enough(self, until_s: float) -> bool:
        now_s = time.monotonic()
        if now_s < until_s or self._missing_kinds():  # the schedule comes to each kind in its turn
            return False
        owed = self._long and len(self._client.sent_at_s) < COMMANDS_A_MINUTE * self._minutes
        return not (owed or self._missing_failpoints()) or now_s > until_s + self._minutes * 60 * OVERTIME_PART

    def _missing_kinds(self) -> list[str]:
        return sorted({fault.name for fault in FAULTS} - {done.fault for done in self._done})

    def _missing_failpoints(self) -> list[str]:
        return sorted(self._every_failpoint - {name for done in self._done for name in done.fired})

    async def _settle(self, last_s: float) -> list[str]:
        """What is unanswered or in doubt SETTLED_WITHIN_S after the last fault."""
        while True:
            looked_s = time.monotonic()
            left = [f"{id} is unanswered" for id in sorted(self._client.unanswered())]
            left += await asyncio.to_thread(in_doubt_at, self._there.storage_url)
            if not left or looked_s > last_s + SETTLED_WITHIN_S:
                return left
            await asyncio.sleep(0.2)

    # --- what was -------------------------------------------------------------------------------------------------

    def _faults(self) -> Report:
        took = {name: [d.over_s - d.injected_s for d in self._done if d.fault == name] for name in _names(self._done)}
        fired = Counter(name for done in self._done for name in done.fired)
        return {
            "faults": len(self._done),
            "faults_by_kind": dict(sorted(Counter(done.fault for done in self._done).items())),
            "slowest_whole_again_s": {name: round(max(each), 1) for name, each in sorted(took.items())},
            "failpoints_fired": dict(sorted(fired.items())),
            "failpoints_not_met_here": FAILPOINTS_NOT_MET,
            "worker_apart_starts": self._there.apart.starts,
        }

    def _work(self, calm_until_s: float) -> Report:
        sent = self._client.sent_at_s
        published = self._client.published
        first: dict[str, Message] = {}
        for each in published:
            if each.type != "poison" and each.id:
                first.setdefault(each.id, each)
        calm = [id for id in first if sent[id] < calm_until_s]
        windows = [(done.began_s, done.over_s) for done in self._done]
        fire = [id for id in first if any(began <= sent[id] <= over for began, over in windows)]
        repeated = Counter(each.id for each in published if each.id in first)
        return {
            "messages": len(published),
            "commands": len(first),
            "commands_by_type": dict(sorted(Counter(each.type for each in first.values()).items())),
            "repetitions": sum(repeated.values()) - len(first),
            "repetitions_with_other_content": sum(
                each.id in first and each.value != first[each.id].value for each in published
            ),
            "poison": sum(each.type == "poison" for each in published),
            "answers": self._statuses(first),
            "in_calm": self._statuses(calm),
            "during_faults": self._statuses(fire),
            "committed_in_calm": _part(self._statuses(calm)),
            "committed_during_faults": _part(self._statuses(fire)),
        }

    def _statuses(self, ids: Iterable[str]) -> dict[str, int]:
        counted: Counter[str] = Counter()
        for id in ids:
            answers = self._witness.answers(id)
            counted[f"{answers[0]['status']} {answers[0]['reason']}".strip() if answers else "unanswered"] += 1
        return dict(sorted(counted.items()))

    async def _judged(self) -> Report:
        checked = await asyncio.to_thread(self._there.system.concord, "check", timeout_s=CHECKED_WITHIN_S)
        check: Report = checked.lines[-1] if checked.stdout else {"ok": False, "offenders": [checked.stderr[-2000:]]}
        history = await read_history(self._there.bootstrap_servers)
        judgement = judge(history)
        ledger = await asyncio.to_thread(self._ledger, history)
        offenders = [*check["offenders"][:_SHOWN], *judgement.offenders[:_SHOWN], *ledger[:_SHOWN]]
        offenders += [done.trouble for done in self._done if done.trouble]
        return {
            "check": {name: check[name] for name in ("ok", "counted") if name in check},
            "judged": dict(judgement.counted),
            "broken_promises": offenders,
        }

    def _ledger(self, history: History) -> list[str]:
        with stored_at(self._there.storage_url) as storage:
            wallets = storage.rows("payment.wallets", ("customer_id", "balance", "tx_version"))
            orders = storage.rows("orders.orders", ("customer_id", "order_id", "tx_version"))
        events = made(history)
        times = {"sent_at_s": self._client.sent_at_s, "answered_at_s": self._witness.answered_at_s}
        return [
            *check_wallets(events, wallets),
            *check_versions(events, wallets, orders),
            *check_time(history, events, **times),
        ]

    def _shortcomings(self, report: Report) -> list[str]:
        """What the numbers of the report do not come to."""
        needed = {
            "commands": (report["commands"], COMMANDS_A_MINUTE * self._minutes if self._long else 1),
            "faults": (report["faults"], FAULTS_A_MINUTE * self._minutes),
            "part committed in calm": (report["committed_in_calm"], COMMITTED_IN_CALM),
            "part committed of what was published during faults": (
                report["committed_during_faults"],
                COMMITTED_UNDER_FIRE,
            ),
        }
        found = [f"{name}: {has}, not {least:.2f}" for name, (has, least) in needed.items() if has < least]
        found += [f"no {kind}" for kind in self._missing_kinds()]
        found += [f"failpoint {name} has not fired" for name in self._missing_failpoints()]
        found += [f"not settled after 20 s: {each}" for each in report["unsettled_after_20_s"]]
        return found


def _names(done: Sequence[Done]) -> set[str]:
    return {each.fault for each in done}


def _in_short(done: Done) -> str:
    took = f"injected in {done.injected_s - done.began_s:.1f} s, whole {done.over_s - done.injected_s:.1f} s later"
    return f"{done.fault}: {done.target}; {took}{'; ' if done.trouble else ''}{done.trouble}"


def _part(statuses: dict[str, int]) -> float:
    """The part that is committed; none of nothing."""
    return round(statuses.get("committed", 0) / max(1, sum(statuses.values())), 4)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
