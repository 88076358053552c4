"""One run: several processes with several clients each, in bad weather; then calm, and everything is accounted for.

    opening ──► attempts, faults, crashes, restarts ──► calm ──► late writes arrive ──► leftovers expire
            ──► every record is read once more ──► what was unknown is looked up ──► judgement

A process is a TransactionManager with a storage of its own. When it dies, its clients go on with its successor; what
it had begun stays as it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from infra.clock import SystemClock
from infra.consensus_commit.errors import (
    CommitConflictError,
    TransactionConflictError,
    TransactionError,
    UnknownTransactionStatusError,
)
from infra.consensus_commit.manager import TransactionManager
from infra.consensus_commit.metadata import TX_VERSION, is_committed, transactional
from infra.consensus_commit.recovery import ROLLED_BACK, ROLLED_FORWARD
from infra.consensus_commit.retry import RetryPolicy
from infra.consensus_commit.states import Isolation, TransactionState
from infra.storage.errors import StorageError, UnavailableStorageError, UnknownOutcomeError
from infra.storage.operations import Scan
from infra.storage.port import Storage
from scripts.proof.histories.checker import FORBIDDEN, find_anomalies, lost_appends
from scripts.proof.histories.dependencies import Anomaly
from scripts.proof.histories.history import Outcome, Read, RecordKey, Transaction, Write
from scripts.proof.histories.weather import (
    CALM,
    CallClock,
    CrashedError,
    Fault,
    FaultRates,
    ProcessStorage,
    Weather,
)
from scripts.proof.histories.workloads import (
    ACCOUNTS,
    OPENING_BALANCE,
    TABLES,
    Attempt,
    Script,
    Work,
    Workload,
)

logger = logging.getLogger(__name__)

COORDINATOR_NAMESPACE = "history_coordinator"

_AT_ONCE = 16
_AT_LEAST = 50
_READ_BACK = 8
_SWEEP_EVERY = 60
_BACKOFF = 40
_SURE_DECISIONS = 4
_CACHED = 30


@dataclass(frozen=True, slots=True)
class Plan:
    """What is tried. `lifetime_ms` is counted in storage calls of all processes (`weather.CallClock`).

    The seed chooses the transactions and what befalls their calls; how a server interleaves them is its own. Every
    fault strikes at least once, some processes die just after a commit, and others are slow to commit. A run has at
    least 50 transactions.
    """

    workload: Workload
    isolation: Isolation
    transactions: int
    seed: int
    processes: int = 3
    clients: int = 3
    lifetime_ms: int = 20
    rates: FaultRates = FaultRates()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        if self.transactions < _AT_LEAST:
            raise ValueError(f"a run of {self.transactions} transactions proves nothing: at least {_AT_LEAST}")


@dataclass(slots=True)
class Report:
    """What a run showed. It holds if nothing is wrong; whether it proves anything is for `counts` and `fired` to say.

    `counts`: attempts by outcome, and what the clients met. `allowed`: anomalies that the isolation level permits.
    """

    plan: Plan
    history: list[Transaction]
    wrong: list[str] = field(default_factory=list)
    allowed: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    fired: Counter[Fault] = field(default_factory=Counter)
    recovered: Counter[str] = field(default_factory=Counter)

    @property
    def holds(self) -> bool:
        return not self.wrong

    def as_json(self) -> dict[str, Any]:
        return {
            "workload": self.plan.workload.value,
            "isolation": self.plan.isolation.value,
            "seed": self.plan.seed,
            "holds": self.holds,
            "wrong": self.wrong,
            "anomalies allowed and seen": dict(sorted(self.allowed.items())),
            "transactions": dict(sorted(self.counts.items())),
            "faults": {fault.value: count for fault, count in sorted(self.fired.items())},
            "records recovered": dict(sorted(self.recovered.items())),
        }


def vacuous(reports: Sequence[Report]) -> list[str]:
    """What keeps these runs from proving anything: too few commits or conflicts, a fault that never struck."""
    missing: list[str] = []
    for report in reports:
        tried, committed = report.plan.transactions, report.counts[Outcome.COMMITTED]
        if committed * 4 < tried:
            missing.append(f"{report.plan.workload}: {committed} of {tried} transactions committed, under a quarter")
        if report.counts["conflict"] * 100 < tried:
            missing.append(f"{report.plan.workload}: {report.counts['conflict']} conflicts among {tried} transactions")
    fired = sum((report.fired for report in reports), Counter[Fault]())
    expected = {fault for report in reports for fault, rate in report.plan.rates.of_write().items() if rate}
    missing += [f"no call met {fault.value!r}" for fault in sorted(expected - fired.keys())]
    recovered = sum((report.recovered for report in reports), Counter[str]())
    if expected:
        missing += [f"no record was {kind}" for kind in (ROLLED_FORWARD, ROLLED_BACK) if not recovered[kind]]
        if not any(report.counts["in doubt, committed"] for report in reports):
            missing.append("nothing that was in doubt turned out to have committed")
    return missing


@dataclass(slots=True)
class _Attempted:
    """An attempt as it ended, and whether its decision is in the state table if there was one."""

    transaction: Transaction
    attempt: Attempt
    decided_by_state: bool

    @property
    def writes(self) -> bool:
        return any(not isinstance(operation, Read) for operation in self.transaction.operations)


class _Process:
    """One life of one process."""

    def __init__(self, run: Run, slot: int) -> None:
        plan = run.plan
        self.storage = ProcessStorage(run.weather)
        # No two processes are alike; a transfer's decision has to be looked up, so none commits in one phase.
        self.one_phase_commit = slot % 2 == 1 and plan.workload is not Workload.TRANSFERS
        self.manager = TransactionManager(
            self.storage,
            run.weather.clock,
            one_phase_commit=self.one_phase_commit,
            async_commit=slot % 3 != 2,
            name=f"{run.name}-{slot}" if slot % 3 != 1 else None,
            cache_records=_CACHED if slot % 3 != 1 else 0,
            coordinator_namespace=COORDINATOR_NAMESPACE,
            transaction_lifetime_ms=plan.lifetime_ms,
            on_recovered=run.note_recovered,
            randomness=random.Random(plan.seed),
            sleep=_give_way,
        )


class Run:
    """Runs one plan on one storage, whose tables `create_tables` makes."""

    def __init__(self, storage: Storage, plan: Plan) -> None:
        self.plan = plan
        self.storage = storage
        self.name = uuid.uuid4().hex[:12]
        randomness = random.Random(plan.seed)
        # Ids from the system: a server keeps the state rows of earlier runs, and the same seed would meet them.
        clock = CallClock(SystemClock().now_ms(), random.SystemRandom())
        self.weather = Weather(
            storage,
            clock,
            plan.rates,
            random.Random(randomness.random()),
            late_by_ms=plan.lifetime_ms * 2,
            sure=dict(zip(randomness.sample(range(1, plan.transactions), len(Fault)), Fault, strict=True)),
            sure_decisions=frozenset(randomness.sample(range(1, plan.transactions // 8), _SURE_DECISIONS)),
        )
        self.script = Script(plan.workload, self.name, random.Random(randomness.random()))
        self._instants = itertools.count()
        self._attempts: list[_Attempted] = []
        self._begun = 0
        self._counts: Counter[str] = Counter()
        self._recovered: Counter[str] = Counter()
        self._processes: list[_Process] = []
        self._lives = 0
        self._chores: set[asyncio.Future[Any]] = set()
        self._abandoned: list[asyncio.Task[Any]] = []

    def note_recovered(self, kind: str) -> None:
        self._recovered[kind] += 1

    async def report(self) -> Report:
        """Run, and judge."""
        await self._opened()
        self._processes = [_Process(self, slot) for slot in range(self.plan.processes)]
        clients = [slot for slot in range(self.plan.processes) for _ in range(self.plan.clients)]
        async with asyncio.TaskGroup() as group:
            for slot in clients:
                group.create_task(self._client(slot))
        await self._calm()
        closing = _Process(self, 0)
        finals = await self._read_back(closing)
        history = await self._settled_history(closing)
        report = Report(self.plan, history, fired=self.weather.fired, recovered=self._recovered, counts=self._counts)
        report.counts["crashes"] = self._lives
        report.counts.update(transaction.outcome for transaction in history)
        self._judge(report, finals)
        await self._judge_records(report)
        if self.plan.workload is Workload.TRANSFERS:
            await self._judge_transfers(report, closing)
        await closing.manager.close()
        return report

    # -- the run

    async def _opened(self) -> None:
        rates, self.weather.rates = self.weather.rates, CALM
        opening = _Process(self, 0)
        await self._try(opening, self.script.opening())
        await opening.manager.close()  # READ_COMMITTED would not see records that are not settled.
        self.weather.rates = rates

    async def _client(self, slot: int) -> None:
        while self._begun < self.plan.transactions:
            self._begun += 1
            process = self._processes[slot]
            if process.storage.dead:
                self._lives += 1
                process = self._processes[slot] = _Process(self, slot)
                self._sweep(process)
            elif self._begun % _SWEEP_EVERY == 0:
                self._sweep(process)
            if not await self._try(process, self.script.next()):
                await _give_way(self.weather.randomness.randrange(_BACKOFF))

    async def _try(self, process: _Process, work: Work, *, isolation: Isolation | None = None) -> bool:
        """One attempt, until it ends or its process does; whether it committed."""
        began_at = next(self._instants)
        transaction = process.manager.begin(isolation or self.plan.isolation)
        attempt = Attempt()

        async def attempted() -> Outcome:
            try:
                await work(transaction, attempt)
                await transaction.commit()
                return Outcome.COMMITTED
            except TransactionConflictError as error:
                self._counts["conflict"] += 1
                if isinstance(error, CommitConflictError) and not process.one_phase_commit:
                    self._counts["overruled while it was at work"] += 1
                return Outcome.ABORTED
            except (UnavailableStorageError, UnknownOutcomeError):
                self._counts["failed"] += 1
                return Outcome.ABORTED
            except UnknownTransactionStatusError:
                self._counts["not answered"] += 1
                return Outcome.UNKNOWN
            except CrashedError:
                return Outcome.UNKNOWN

        task = asyncio.create_task(attempted())
        either: set[asyncio.Future[Any]] = {task, process.storage.died}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if process.storage.dead:  # Whatever it would still say, nobody hears it.
            self._abandoned.append(task)
            outcome = Outcome.UNKNOWN
        else:
            outcome = task.result()
        ended_at = None if outcome is Outcome.UNKNOWN else next(self._instants)
        operations = tuple(self._versioned(transaction.tx_id, attempt))
        told = Transaction(transaction.tx_id, self.name, operations, outcome, began_at, ended_at)
        self._attempts.append(_Attempted(told, attempt, not process.one_phase_commit))
        return outcome is Outcome.COMMITTED

    def _versioned(self, tx_id: str, attempt: Attempt) -> Iterator[Any]:
        """The operations, each write with the version that its record was given."""
        records = {record.name: record for record in self.script.records}
        for operation in attempt.operations:
            if isinstance(operation, Write):
                record = records[cast(str, operation.key)]
                version = self.weather.versions.get((tx_id, record.table.full_name, record.key))
                yield replace(operation, version=version)
            else:
                yield operation

    def _sweep(self, process: _Process) -> None:
        async def sweep() -> None:
            with contextlib.suppress(StorageError, TransactionError, CrashedError):
                swept = await process.manager.sweeper.sweep()
                self._counts["transactions swept"] += swept.transactions

        chore = asyncio.ensure_future(sweep())
        self._chores.add(chore)
        chore.add_done_callback(self._chores.discard)

    async def _calm(self) -> None:
        """The weather clears up, what was sent arrives, what was left expires."""
        self.weather.rates = CALM
        while self._chores:
            await asyncio.wait(set(self._chores))
        for process in self._processes:
            if not process.storage.dead:
                await process.manager.close()
        await self.weather.clear_up()
        for task in self._abandoned:
            task.cancel()
        self.weather.clock.advance(self.plan.lifetime_ms + 1)

    async def _read_back(self, process: _Process) -> dict[RecordKey, tuple[int, ...]]:
        """Every record as it is when all is over, read by a new process that recovers what it meets."""
        finals: dict[RecordKey, tuple[int, ...]] = {}
        records = list(self.script.records)
        for first in range(0, len(records), _READ_BACK):
            work = self.script.read_back(records[first : first + _READ_BACK])
            for _ in range(RetryPolicy().tries):
                if await self._try(process, work, isolation=Isolation.SERIALIZABLE):
                    break
            for operation in self._attempts[-1].transaction.operations:
                if isinstance(operation, Read) and isinstance(operation.value, tuple):
                    finals[operation.key] = operation.value
        await process.manager.drain()
        return finals

    async def _settled_history(self, process: _Process) -> list[Transaction]:
        """The history, with what the state table says of those that nobody was told about."""
        limit = asyncio.Semaphore(_AT_ONCE)

        async def settled(attempted: _Attempted) -> Transaction:
            told = attempted.transaction
            if not attempted.writes:
                return replace(told, outcome=Outcome.ABORTED) if told.outcome is Outcome.UNKNOWN else told
            if not attempted.decided_by_state:
                return told
            async with limit:
                state = await process.manager.states.get_state(told.id)
            committed = state is not None and state.state is TransactionState.COMMITTED
            if told.outcome is Outcome.UNKNOWN:
                self._counts["in doubt, committed" if committed else "in doubt, aborted"] += 1
                return replace(told, outcome=Outcome.COMMITTED if committed else Outcome.ABORTED)
            if committed != (told.outcome is Outcome.COMMITTED):
                self._counts["answers that the state table contradicts"] += 1
            return told

        return await asyncio.gather(*(settled(attempted) for attempted in self._attempts))

    # -- the judgement

    def _judge(self, report: Report, finals: dict[RecordKey, tuple[int, ...]]) -> None:
        forbidden = FORBIDDEN[self.plan.isolation]
        found: list[Anomaly] = find_anomalies(report.history)
        if self.plan.workload is Workload.LISTS:
            found += lost_appends(report.history, finals)
        for anomaly in found:
            if anomaly.kind in forbidden:
                report.wrong.append(str(anomaly))
            else:
                report.allowed[anomaly.kind] += 1
        if contradicted := report.counts["answers that the state table contradicts"]:
            report.wrong.append(f"{contradicted} answers are not what the state table says")

    async def _judge_records(self, report: Report) -> None:
        """No record of the run may be left in doubt."""
        for row in await self._stored_rows():
            if not is_committed(row):
                report.wrong.append(f"a record is still in doubt: {row}")

    async def _stored_rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for table, place in dict.fromkeys((record.table, record.place) for record in self.script.records):
            rows += await self.storage.scan(Scan(transactional(table), (place,)))
        return rows

    async def _judge_transfers(self, report: Report, process: _Process) -> None:
        """The total is exact, and every version has its transfer: lost and doubled ones show alike."""
        expected_total = ACCOUNTS * OPENING_BALANCE
        if self.plan.isolation is Isolation.SERIALIZABLE:
            for attempted in self._attempts:
                committed = attempted.transaction.outcome is Outcome.COMMITTED
                if committed and attempted.attempt.total not in (None, expected_total):
                    report.wrong.append(f"{attempted.transaction.id} read a total of {attempted.attempt.total}")
        transfers = [
            transaction
            for transaction in report.history[1:]
            if transaction.outcome is Outcome.COMMITTED
            and sum(isinstance(operation, Write) for operation in transaction.operations) == 2
        ]
        rows = await self._stored_rows()
        total, versions = sum(row["number"] for row in rows), sum(row[TX_VERSION] for row in rows)
        if total != expected_total:
            report.wrong.append(f"the accounts hold {total}, not {expected_total}")
        if versions != ACCOUNTS + 2 * len(transfers):
            report.wrong.append(f"{len(transfers)} transfers have made {versions - ACCOUNTS} versions, not two each")
        report.counts["transfers"] = len(transfers)
        if not await self._try(process, self.script.rewrite_accounts(), isolation=Isolation.SERIALIZABLE):
            report.wrong.append("the last transaction, alone, could not rewrite every account")
        await process.manager.drain()
        rows = await self._stored_rows()
        if sum(row[TX_VERSION] for row in rows) != versions + ACCOUNTS or sum(row["number"] for row in rows) != total:
            report.wrong.append("rewriting every account changed the total, or not every version by one")


async def create_tables(storage: Storage) -> None:
    """The tables that every run uses: records of different runs lie in different partitions."""
    manager = TransactionManager(storage, name="history", coordinator_namespace=COORDINATOR_NAMESPACE)
    await manager.create_coordinator_tables()
    for table in TABLES:
        await manager.create_table(table)


async def run(storage: Storage, plan: Plan) -> Report:
    """Run one plan on a storage whose tables exist."""
    return await Run(storage, plan).report()


async def run_all(storage: Storage, plans: Sequence[Plan]) -> dict[str, Any]:
    """Run several plans, one after the other; the report of all, as JSON would have it."""
    await create_tables(storage)
    reports: list[Report] = []
    shown: list[dict[str, Any]] = []
    for plan in plans:
        started_s = time.monotonic()
        report = await run(storage, plan)
        reports.append(report)
        shown.append({**report.as_json(), "seconds": round(time.monotonic() - started_s, 1)})
    missing = vacuous(reports)
    holds = not missing and all(report.holds for report in reports)
    return {"holds": holds, "missing": missing, "runs": shown}


async def _give_way(times: float) -> None:
    """For waiting between tries: time passes by the calls of others."""
    for _ in range(max(1, int(times))):
        await asyncio.sleep(0)
