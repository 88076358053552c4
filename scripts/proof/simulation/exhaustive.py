"""No chance at all: every single fault of a transaction, and every pair with a crash, one case after another.

    transaction   three records on two stores, and one that it only reads; every storage call that it makes fails in
                  every way, or the process dies before or after it
    then          nothing further; or storage goes on failing; or the process dies at any later call of its own
    recoverer     brings to rest what it finds, by reading the records or by the intents; it runs to its end, or dies
                  before or after any of its calls
    the last      a second recoverer, undisturbed, when everything that was late has arrived

At the end the three records are all new or all old, as the state table and the client's answer say, and at rest.
The calls are numbered as they are made; there is one order of events for each case.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from infra.consensus_commit.errors import TransactionError, UnknownTransactionStatusError
from infra.consensus_commit.intents import IntentLog
from infra.consensus_commit.manager import TransactionManager
from infra.consensus_commit.metadata import is_committed, transactional
from infra.consensus_commit.states import TransactionState
from infra.consensus_commit.transaction import Transaction
from infra.storage.errors import NoMutationError, StorageError, UnavailableStorageError, UnknownOutcomeError
from infra.storage.memory import MemoryStorage
from infra.storage.multi import MultiStorage
from infra.storage.operations import Atomicity, Key, Put, Row
from scripts.proof.simulation.loop import Process, SimulatedClock, SimulatedLoop, bury
from scripts.proof.simulation.network import SimulatedStorage, begun, fail, succeed
from scripts.proof.simulation.weather import CallFault
from scripts.proof.simulation.witness import stored_now
from scripts.proof.simulation.workloads import TABLES, Place, key_of

LIFETIME_MS = 15_000
LATENCY_S = 0.001
LATE_S = {CallFault.SLOW: 1.0, CallFault.LATE: 40.0}
"""When a write arrives that was not answered: while its transaction is still at work, or after the first recoverer."""

WRITE_FAULTS = tuple(CallFault)
READ_FAULTS = (CallFault.UNAVAILABLE, CallFault.CRASH_BEFORE)
LASTING = (CallFault.UNAVAILABLE, CallFault.LOST, CallFault.UNANSWERED, CallFault.LATE)
CRASHES = (CallFault.CRASH_BEFORE, CallFault.CRASH_AFTER)

READ_ONLY: Place = ("two", 1, 0)


@dataclass(frozen=True)
class Shape:
    """What the transaction does to its three records; `there` are those that exist before."""

    writes: Mapping[Place, str]
    there: frozenset[Place]


SHAPES: Mapping[str, Shape] = {
    "three updates, two of one partition": Shape(
        {("one", 0, 0): "update", ("one", 0, 1): "update", ("two", 0, 0): "update"},
        frozenset({("one", 0, 0), ("one", 0, 1), ("two", 0, 0)}),
    ),
    "an update, an insert, a delete": Shape(
        {("one", 0, 0): "update", ("one", 1, 0): "insert", ("two", 0, 0): "delete"},
        frozenset({("one", 0, 0), ("two", 0, 0)}),
    ),
}
RECOVERERS = ("reader", "sweeper")


@dataclass(frozen=True)
class Strike:
    """What befalls a process's call number `call`, counted from 1; `lasting`: and all that follow.

    A lasting fault that only writes know leaves reads UNAVAILABLE.
    """

    call: int
    fault: CallFault
    lasting: bool = False


@dataclass(frozen=True)
class Case:
    """One course of events. `strikes` befall the transaction's process, `recoverer_strike` the first recoverer."""

    shape: str
    recoverer: str
    strikes: tuple[Strike, ...] = ()
    recoverer_strike: Strike | None = None


@dataclass(frozen=True)
class Outcome:
    """What a case came to: the client's answer ("" if it died), the calls of both processes, and what was wrong."""

    answer: str
    calls: tuple[str, ...]
    recoverer_calls: tuple[str, ...]
    violations: tuple[str, ...]


class _Wire:
    """The way to storage, on which exactly the given calls fail."""

    def __init__(self, loop: SimulatedLoop, strikes: Mapping[int, Sequence[Strike]]) -> None:
        self.loop = loop
        self.calls: dict[int, list[str]] = {}
        self.under_way = 0
        self._strikes = strikes

    def send(
        self, process: Process, store: MemoryStorage, method: str, argument: Any, answer: asyncio.Future[Any]
    ) -> None:
        calls = self.calls.setdefault(process.number, [])
        calls.append(method)
        fault = self._fault(process, method, len(calls))
        delay_s = LATENCY_S
        match fault:
            case CallFault.CRASH_BEFORE:
                process.dead = True
                return
            case CallFault.UNAVAILABLE:
                self.loop.deliver(delay_s, process, fail, answer, UnavailableStorageError("it cannot be reached"))
                return
            case CallFault.LOST:
                self.loop.deliver(delay_s, process, fail, answer, UnknownOutcomeError("it was not answered"))
                return
            case CallFault.LATE | CallFault.SLOW:
                self.loop.deliver(delay_s, process, fail, answer, UnknownOutcomeError("it was not answered"))
                delay_s = LATE_S[fault]
        self.under_way += 1
        self.loop.deliver(delay_s, None, self._apply, process, store, method, argument, answer, fault)
        if fault is CallFault.CRASH_SENT:
            process.dead = True

    def _fault(self, process: Process, method: str, call: int) -> CallFault | None:
        for strike in self._strikes.get(process.number, ()):
            if call == strike.call or (strike.lasting and call > strike.call):
                knows = method == "mutate" or strike.fault in READ_FAULTS
                return strike.fault if knows else CallFault.UNAVAILABLE
        return None

    def _apply(
        self,
        process: Process,
        store: MemoryStorage,
        method: str,
        argument: Any,
        answer: asyncio.Future[Any],
        fault: CallFault | None,
    ) -> None:
        self.under_way -= 1
        error: StorageError | None = None
        result = None
        try:
            result = stored_now(begun(store, method, argument))
        except NoMutationError as refusal:
            error = refusal
        match fault:
            case CallFault.CRASH_AFTER:
                process.dead = True
            case CallFault.LATE | CallFault.SLOW:
                pass
            case CallFault.UNANSWERED:
                self.loop.deliver(LATENCY_S, process, fail, answer, UnknownOutcomeError("it was not answered"))
            case _ if error is not None:
                self.loop.deliver(LATENCY_S, process, fail, answer, error)
            case _:
                self.loop.deliver(LATENCY_S, process, succeed, answer, result)


@dataclass
class _Stage:
    """The stores and processes of one case."""

    case: Case
    loop: SimulatedLoop
    wire: _Wire
    stores: dict[str, MemoryStorage]
    answer: str = ""
    tx_id: str = ""
    processes: list[Process] = field(default_factory=list)

    def process(self) -> tuple[Process, TransactionManager]:
        number = len(self.processes) + 1
        process = Process(number, 0, SimulatedClock(self.loop, number))
        self.processes.append(process)
        storage = MultiStorage(
            {alias: SimulatedStorage(self.wire, process, store) for alias, store in self.stores.items()},
            {"one": "a", "two": "b"},
            "a",
        )
        by_intents = self.case.recoverer == "sweeper"
        manager = TransactionManager(
            storage,
            process.clock,
            async_commit=by_intents,
            name="home" if by_intents else None,
            transaction_lifetime_ms=LIFETIME_MS,
        )
        return process, manager

    def run(self, process: Process, work: Any) -> None:
        """Run `work`, and all that it leaves running, to the end or to the process's death."""
        self.loop.start(process, work)
        self.loop.run_until(lambda: process.dead or all(task.done() for task in process.tasks))

    def wait(self, seconds: float) -> None:
        until_s = self.loop.now_s + seconds
        self.loop.deliver(seconds, None, lambda: None)
        self.loop.run_until(lambda: self.loop.now_s >= until_s)


def play(case: Case) -> Outcome:
    """Play one case from beginning to end."""
    strikes = {1: case.strikes, 2: (case.recoverer_strike,) if case.recoverer_strike else ()}
    loop = SimulatedLoop(_NoRandomness(), shuffled=False)  # type: ignore[arg-type, abstract]
    stage = _Stage(
        case,
        loop,
        _Wire(loop, strikes),
        {alias: MemoryStorage(Atomicity.PARTITION, name=alias) for alias in ("a", "b")},
    )
    shape = SHAPES[case.shape]
    client, manager = stage.process()
    _fill(stage, shape, manager)
    stage.run(client, _transaction(stage, shape, manager.begin()))
    stage.wait(LIFETIME_MS / 1000 + 1)
    first, manager = stage.process()
    stage.run(first, _recover(stage, shape, manager))
    loop.run_until(lambda: stage.wire.under_way == 0)
    stage.wait(1)
    last, manager = stage.process()
    stage.run(last, _recover(stage, shape, manager))
    violations = [f"the last recoverer failed: {error!r}" for error in _errors(last)] + _judged(stage, shape)
    bury(stage.processes)
    calls = stage.wire.calls
    return Outcome(stage.answer, tuple(calls.get(1, ())), tuple(calls.get(2, ())), tuple(violations + loop.errors))


class _NoRandomness:
    """Nothing is drawn in a case."""

    def random(self) -> float:
        raise AssertionError("something was left to chance")


def _errors(process: Process) -> list[BaseException]:
    return [error for task in process.tasks if task.done() and (error := task.exception()) is not None]


def _fill(stage: _Stage, shape: Shape, manager: TransactionManager) -> None:
    for table in (manager.states.table, IntentLog(stage.stores["a"]).table, transactional(TABLES["one"])):
        stored_now(stage.stores["a"].create_table(table))
    stored_now(stage.stores["b"].create_table(transactional(TABLES["two"])))
    metadata: Row = {"tx_id": "initial", "tx_state": 3, "tx_version": 1, "tx_prepared_at": 1, "tx_committed_at": 1}
    for place in (*sorted(shape.there), READ_ONLY):
        put = Put(transactional(TABLES[place[0]]), key_of(place), {"value": 1, "note": "old", **metadata})
        stored_now(stage.stores["a" if place[0] == "one" else "b"].mutate([put]))


async def _transaction(stage: _Stage, shape: Shape, transaction: Transaction) -> None:
    stage.tx_id = transaction.tx_id
    try:
        await transaction.get(TABLES[READ_ONLY[0]], key_of(READ_ONLY))
        for place, verb in shape.writes.items():
            table, key = TABLES[place[0]], key_of(place)
            if verb == "delete":
                await transaction.delete(table, key)
            elif verb == "insert":
                await transaction.insert(table, key, {"value": 2, "note": "new"})
            else:
                await transaction.get(table, key)
                await transaction.update(table, key, {"value": 2, "note": "new"})
        await transaction.commit()
    except UnknownTransactionStatusError:
        stage.answer = "unknown"
    except (TransactionError, StorageError):
        stage.answer = "aborted"
    else:
        stage.answer = "committed"


async def _recover(stage: _Stage, shape: Shape, manager: TransactionManager) -> None:
    if stage.case.recoverer == "sweeper":
        await manager.sweeper.sweep()
    else:
        for place in shape.writes:
            await manager.recovery.recover_record(TABLES[place[0]], key_of(place))


def _judged(stage: _Stage, shape: Shape) -> list[str]:
    rows: dict[Place, Row | None] = {
        place: stored_now(
            stage.stores["a" if place[0] == "one" else "b"].get(transactional(TABLES[place[0]]), key_of(place))
        )
        for place in shape.writes
    }
    found = [
        f"{place} is left in state {row['tx_state']!s}"
        for place, row in rows.items()
        if row is not None and (not is_committed(row) or row["before_tx_id"] is not None)
    ]
    new = {place: None if verb == "delete" else (2, "new", stage.tx_id) for place, verb in shape.writes.items()}
    old = {place: (1, "old", "initial") if place in shape.there else None for place in shape.writes}
    now = {place: row and (row["value"], row["note"], row["tx_id"]) for place, row in rows.items()}
    state_row = stored_now(
        stage.stores["a"].get(TransactionManager(stage.stores["a"]).states.table, Key((stage.tx_id,)))
    )
    committed = state_row is not None and state_row["tx_state"] == TransactionState.COMMITTED
    if now != (new if committed else old):
        found.append(f"the transaction is {'' if committed else 'not '}committed, and its records are {now}")
    if (stage.answer == "committed" and not committed) or (stage.answer == "aborted" and committed):
        found.append(f"the client was told {stage.answer}")
    return found


def cases(shape: str, recoverer: str) -> Iterator[tuple[Case, Outcome]]:
    """Every case of one shape and one way to recover, played."""
    undisturbed = Case(shape, recoverer)
    outcome = play(undisturbed)
    yield undisturbed, outcome
    yield from _with_recoverer_crashes(undisturbed, outcome)
    for number, method in enumerate(outcome.calls, 1):
        for fault in WRITE_FAULTS if method == "mutate" else READ_FAULTS:
            yield from _with_pairs(Case(shape, recoverer, (Strike(number, fault),)))
            if fault in LASTING:
                lasting = Case(shape, recoverer, (Strike(number, fault, lasting=True),))
                disturbed = play(lasting)
                yield lasting, disturbed
                yield from _with_recoverer_crashes(lasting, disturbed)


def _with_pairs(single: Case) -> Iterator[tuple[Case, Outcome]]:
    """One fault alone, with every later crash of its own process, and with every crash of the recoverer."""
    disturbed = play(single)
    yield single, disturbed
    yield from _with_recoverer_crashes(single, disturbed)
    for later in range(single.strikes[0].call + 1, len(disturbed.calls) + 1):
        for crash in _crashes(disturbed.calls[later - 1]):
            double = replace(single, strikes=(*single.strikes, Strike(later, crash)))
            yield double, play(double)


def _with_recoverer_crashes(case: Case, outcome: Outcome) -> Iterator[tuple[Case, Outcome]]:
    for number, method in enumerate(outcome.recoverer_calls, 1):
        for crash in _crashes(method):
            pair = replace(case, recoverer_strike=Strike(number, crash))
            yield pair, play(pair)


def _crashes(method: str) -> tuple[CallFault, ...]:
    """A process that dies after a read leaves what it leaves when it dies before its next call."""
    return CRASHES if method == "mutate" else (CallFault.CRASH_BEFORE,)
