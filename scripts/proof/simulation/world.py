"""One seed from beginning to end: processes and clients in their weather, then healing, recovery, and the verdict."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from infra.consensus_commit import coordinator, intents, participant, recovery
from infra.consensus_commit.coordinator import CHILD_IDS, OPTIONAL_COLUMNS, CoordinatorStates
from infra.consensus_commit.errors import (
    TransactionConflictError,
    UncommittedRecordError,
    UnknownTransactionStatusError,
    UnsatisfiedConditionError,
    ValidationConflictError,
)
from infra.consensus_commit.group_commit import GroupCommit
from infra.consensus_commit.intents import Intent, IntentLog
from infra.consensus_commit.manager import TransactionManager
from infra.consensus_commit.metadata import is_committed, transactional
from infra.consensus_commit.recovery import RecoveryHandler
from infra.consensus_commit.states import TransactionState
from infra.consensus_commit.transaction import Transaction
from infra.consensus_commit.two_phase import TwoPhaseCoordinator, TwoPhaseParticipant
from infra.storage.errors import StorageError
from infra.storage.memory import MemoryStorage
from infra.storage.multi import MultiStorage
from infra.storage.operations import Atomicity, Put, Row, ScanAll
from scripts.proof.simulation.judge import Evidence, judge
from scripts.proof.simulation.loop import Process, SimulatedClock, SimulatedLoop, StuckError, bury
from scripts.proof.simulation.network import Network, SimulatedStorage, WitnessedGate
from scripts.proof.simulation.probes import Probes
from scripts.proof.simulation.weather import Interface, Topology, Weather, weather_of
from scripts.proof.simulation.witness import CURRENT_TX, Witness, stored_now
from scripts.proof.simulation.workloads import (
    TABLES,
    Jobs,
    Log,
    LoggedTransaction,
    Places,
    TwoPhaseTransaction,
    Work,
    key_of,
    places_in,
)

HEALED_WITHIN_S = 20.0
"""Reliability promise P3: so long after the last fault, no record is in doubt any more."""

Begin = Callable[[], Transaction | TwoPhaseTransaction]

TRIES = 4
CLOCK_JUMP_MS = 600_000

_STORES: dict[Topology, dict[str, tuple[Atomicity, tuple[str, ...]]]] = {
    Topology.ONE_STORE: {"a": (Atomicity.PARTITION, ("one", "two"))},
    Topology.TWO_STORES: {"a": (Atomicity.PARTITION, ("one",)), "b": (Atomicity.PARTITION, ("two",))},
    Topology.THREE_STORES: {
        "a": (Atomicity.PARTITION, ("one",)),
        "b": (Atomicity.PARTITION, ("two",)),
        "c": (Atomicity.NAMESPACE, ("three",)),
    },
}


@dataclass(frozen=True)
class Verdict:
    """What one seed came to. `trace` is a hash of everything that happened, in order."""

    seed: int
    violations: tuple[str, ...]
    trace: str
    transactions: int
    committed: int
    calls: int
    faults: Counter[str] = field(compare=False)
    probes: Counter[str] = field(compare=False)


def run_seed(seed: int, weather: Weather | None = None) -> Verdict:
    """Simulate one seed. Two runs of a seed are the same in every step, whatever the process they run in."""
    return World(seed, weather or weather_of(seed)).run()


class World:
    """Stores, processes and clients of one seed."""

    def __init__(self, seed: int, weather: Weather) -> None:
        self.seed = seed
        self.weather = weather
        self.random = random.Random(f"world {seed}")
        self.loop = SimulatedLoop(self.random, shuffled=weather.shuffled)  # type: ignore[abstract]
        self.probes = Probes()
        self.logs: dict[str, Log] = {}
        self.violations: list[str] = []
        self._processes: list[Process] = []
        self._running: dict[int, Process] = {}
        self._managers: dict[int, TransactionManager] = {}
        self._left = [weather.transactions // weather.processes] * weather.processes
        self._clients = 0
        self._waiting_to_restart = 0
        self.witness = Witness(self.probes, self._owner_of, self._writes_of, weather.lifetime_ms)
        self.network = Network(self.loop, weather, self.random, self.witness, self.crash)
        self._stores: dict[str, MemoryStorage] = {}
        self._namespaces: dict[str, str] = {}
        for alias, (atomicity, namespaces) in _STORES[weather.topology].items():
            self._stores[alias] = MemoryStorage(atomicity, name=alias)
            self._namespaces.update(dict.fromkeys(namespaces, alias))
        self.places: Places = places_in(tuple(self._namespaces))
        self._coordinator_store = self.random.choice(list(self._stores))
        self._jobs = Jobs(self.places, self.random)
        self._pass_crash = weather.pass_crash
        self._pass_delay = weather.pass_delay

    # -- from beginning to end

    def run(self) -> Verdict:
        self._fill()
        with watched_failpoints(self):
            try:
                for slot in range(self.weather.processes):
                    self._start(slot)
                self._schedule_faults()
                self.loop.run_until(lambda: self._clients == 0 and self._waiting_to_restart == 0)
                self._heal()
                self.loop.run_until(lambda: self.network.under_way == 0)
                self._settle()
            except StuckError as error:
                self.violations.append(f"the simulation is stuck: {error}")
        self.violations += self.loop.errors
        self.violations += judge(self.evidence())
        violations = tuple(self.violations)
        bury(self._processes)
        for log in self.logs.values():
            self._probe_answer(log)
        return Verdict(
            self.seed,
            violations,
            self.network.trace,
            len(self.logs),
            sum(log.answer == "committed" for log in self.logs.values()),
            self.network.calls,
            self.network.faults,
            self.probes.hits,
        )

    def _fill(self) -> None:
        manager = self._manager(Process(0, -1, SimulatedClock(self.loop, 0)))
        states = manager.states.table
        if self.weather.group_commit:
            states = replace(states, columns={**states.columns, CHILD_IDS: OPTIONAL_COLUMNS[CHILD_IDS]})
        for table in (states, IntentLog(self._stores[self._coordinator_store]).table):
            stored_now(self._stores[self._coordinator_store].create_table(table))
        for namespace, alias in self._namespaces.items():
            stored_now(self._stores[alias].create_table(transactional(TABLES[namespace])))
        metadata: Row = {"tx_id": "initial", "tx_state": 3, "tx_version": 1, "tx_prepared_at": 1, "tx_committed_at": 1}
        for place, (value, note, color) in self.places.initial().items():
            columns = {"value": value, "note": note, "color": color, **({} if self.weather.imported else metadata)}
            put = Put(transactional(TABLES[place[0]]), key_of(place), columns)
            stored_now(self._stores[self._namespaces[place[0]]].mutate([put]))

    def _heal(self) -> None:
        self.network.heal()
        self._pass_crash = self._pass_delay = 0.0
        for process in self._running.values():
            if process.paused:
                self.loop.resume(process)

    def _settle(self) -> None:
        """Let one more process bring everything to rest: by the intents it finds, or else by looking at all records."""
        process = self._new_process(-1)
        manager = self._manager(process)
        deadline_s = self.loop.now_s + HEALED_WITHIN_S
        work = self._wait_for_rest(deadline_s) if self.weather.intents else self._settle_all(manager, deadline_s)
        if self.weather.intents:
            self.loop.start(process, manager.sweeper.run())
        task = self.loop.start(process, work)
        self.loop.run_until(task.done)
        if task.exception() is not None:
            self.violations.append(f"the last recovery failed: {task.exception()!r}")

    async def _wait_for_rest(self, deadline_s: float) -> None:
        while left := sum(not is_committed(row) for rows in self._rows().values() for row in rows):
            if self.loop.now_s > deadline_s:
                self.violations.append(f"{left} records are in doubt {HEALED_WITHIN_S} s after the last fault")
                return
            await asyncio.sleep(0.5)

    async def _settle_all(self, manager: TransactionManager, deadline_s: float) -> None:
        while True:
            left = 0
            for namespace in self.places.namespaces:
                table = TABLES[namespace]
                for record in await manager.recovery.in_doubt(table):
                    left += not await manager.recovery.recover_record(table, record.key)
            await manager.recovery.drain()
            if not left:
                return
            if self.loop.now_s > deadline_s:
                self.violations.append(f"{left} records are in doubt {HEALED_WITHIN_S} s after the last fault")
                return
            await asyncio.sleep(1.0)

    # -- processes

    def _new_process(self, slot: int) -> Process:
        number = len(self._processes) + 1
        process = Process(number, slot, SimulatedClock(self.loop, number))
        self._processes.append(process)
        return process

    def _storage(self, process: Process) -> MultiStorage:
        ways = {alias: SimulatedStorage(self.network, process, store) for alias, store in self._stores.items()}
        return MultiStorage(ways, self._namespaces, self._coordinator_store)

    def _manager(self, process: Process) -> TransactionManager:
        """The engine as one process has it, under a name that its successors will bear too."""
        manager = TransactionManager(
            WitnessedGate(self._storage(process), self.witness),
            process.clock,
            one_phase_commit=self.weather.one_phase_commit,
            async_commit=self.weather.async_commit,
            group_commit=self.weather.group_commit,
            name=f"process {process.slot}" if self.weather.intents else None,
            cache_records=self.weather.cache_records,
            transaction_lifetime_ms=self.weather.lifetime_ms,
            randomness=self.random,
        )
        if self.weather.group_commit:  # So few clients would seldom meet if several groups prepared at a time.
            manager._groups = GroupCommit(manager.states, process.clock, preparing_at_most=1)
        return manager

    def _interface(self, process: Process, manager: TransactionManager) -> Begin:
        """How the clients of a process begin a transaction."""
        isolation = self.weather.isolation
        if self.weather.interface is Interface.MANAGER:
            return lambda: manager.begin(isolation)
        coordinator = TwoPhaseCoordinator(
            manager.states,
            process.clock,
            journal=manager._journal,
            one_phase_commit=self.weather.one_phase_commit,
        )
        participants = {
            namespace: TwoPhaseParticipant(
                namespace,
                storage := SimulatedStorage(self.network, process, self._stores[alias]),
                RecoveryHandler(
                    storage, manager.states, process.clock, transaction_lifetime_ms=self.weather.lifetime_ms
                ),
                process.clock,
            )
            for namespace, alias in self._namespaces.items()
        }
        return lambda: TwoPhaseTransaction(coordinator, participants, isolation)

    def _start(self, slot: int) -> None:
        process = self._new_process(slot)
        process.clock.wrong_ms = self.random.choice((0, 0, -3_000, 4_000))
        self._running[slot] = process
        manager = self._managers[slot] = self._manager(process)
        begin = self._interface(process, manager)
        for _ in range(self.weather.clients):
            self._clients += 1
            self.loop.start(process, self._client(process, begin))
        if self.weather.intents:
            self.loop.start(process, manager.sweeper.run())
        self.network.note(f"process {process.number} starts in {slot}")

    def crash(self, process: Process) -> None:
        """End a process where it stands. Another takes its place after a while."""
        if process.dead:
            return
        process.dead = True
        self.network.faults["crash"] += 1
        self.network.note(f"process {process.number} dies")
        self.witness.died(process)
        self._clients -= sum(1 for task in process.tasks if task in self._client_tasks(process) and not task.done())
        self._waiting_to_restart += 1
        away_s = self.random.random() * self.random.choice((0.01, 1.0, self.weather.lifetime_ms / 800))
        self.loop.deliver(away_s, None, self._restart, process.slot)

    def _client_tasks(self, process: Process) -> list[asyncio.Task[Any]]:
        return process.tasks[: self.weather.clients]

    def _restart(self, slot: int) -> None:
        self._waiting_to_restart -= 1
        self._start(slot)

    def _owner_of(self, tx_id: str) -> Process:
        return self._processes[int(tx_id[:8], 16) - 1]

    def _writes_of(self, tx_id: str) -> int:
        return len(self.logs[tx_id].writes)

    # -- faults that befall processes and stores

    def _schedule_faults(self) -> None:
        draw, weather = self.random, self.weather
        horizon_s = 150 * weather.latency_s + 8 * weather.think_s
        for _ in range(weather.pauses):
            self.loop.deliver(draw.random() * horizon_s, None, self._pause, draw.randrange(weather.processes))
        for _ in range(weather.clock_jumps):
            jump_ms = draw.choice((-CLOCK_JUMP_MS, CLOCK_JUMP_MS, -weather.lifetime_ms, weather.lifetime_ms))
            slot = draw.randrange(weather.processes)
            self.loop.deliver(draw.random() * horizon_s, None, self._jump, slot, jump_ms)
        for _ in range(weather.prunings):
            at_s = draw.random() * horizon_s + draw.choice((0, weather.lifetime_ms / 1000))
            self.loop.deliver(at_s, None, self._prune, draw.randrange(weather.processes))
        for _ in range(weather.outages):
            self.loop.deliver(draw.random() * horizon_s, None, self._go_down, draw.choice(list(self._stores)))

    def _prune(self, slot: int) -> None:
        process, manager = self._running[slot], self._managers[slot]
        if not process.dead and manager._journal is not None:
            self.loop.start(process, self._prune_states(manager.states, manager._journal.log))

    async def _prune_states(self, states: CoordinatorStates, log: IntentLog) -> None:
        try:
            await states.prune(log, older_than_ms=self.weather.lifetime_ms, writer_is_gone=self._is_gone)
        except StorageError:
            return  # Another time.

    def _is_gone(self, intent: Intent) -> bool:
        """Whether nothing can arrive any more of the process that wrote an intent."""
        writer = self._owner_of(intent.home_incarnation)
        return writer.dead and not self.network.under_way_of[writer.number]

    def _pause(self, slot: int) -> None:
        process = self._running[slot]
        if not process.dead and not process.paused:
            process.paused = process.was_paused = True
            self.network.faults["pause"] += 1
            self.network.note(f"process {process.number} pauses")
            lifetime_s = self.weather.lifetime_ms / 1000
            self.loop.deliver(self.random.random() * 3 * lifetime_s, None, self._resume, process)

    def _resume(self, process: Process) -> None:
        if process.paused:
            self.network.note(f"process {process.number} goes on")
            self.loop.resume(process)

    def _jump(self, slot: int, jump_ms: int) -> None:
        self._running[slot].clock.wrong_ms += jump_ms
        self.network.faults["clock jump"] += 1
        self.network.note(f"clock of {slot} jumps by {jump_ms} ms")

    def _go_down(self, alias: str) -> None:
        if self.network.healed:
            return
        self.network.down.add(alias)
        self.network.faults["outage"] += 1
        self.network.note(f"store {alias} goes down")
        self.loop.deliver(self.random.random() * 100 * self.weather.latency_s, None, self._come_up, alias)

    def _come_up(self, alias: str) -> None:
        self.network.down.discard(alias)
        self.network.note(f"store {alias} comes up")

    async def reach(self, name: str) -> None:
        """What stands in for `failpoints.reach` in the engine: a place to be slow or to die."""
        self.probes.hit(f"reached {name}")
        if self._pass_delay and self.random.random() < self._pass_delay:
            await asyncio.sleep(self.random.random() * 10 * self.weather.latency_s)
        process = self.loop.process
        if self._pass_crash and process is not None and self.random.random() < self._pass_crash:
            self.crash(process)
            await asyncio.Future(loop=self.loop)  # For ever.

    # -- clients

    async def _client(self, process: Process, begin: Begin) -> None:
        while self._left[process.slot] > 0:
            kind, work = self._jobs.draw()
            for _ in range(TRIES):
                self._left[process.slot] -= 1
                conflict = await self._attempt(process, begin, kind, work)
                if conflict is None:
                    break
                await asyncio.sleep(self._patience_s(conflict))
            await asyncio.sleep(self.random.random() * self.weather.think_s)
        self._clients -= 1

    def _patience_s(self, conflict: Exception) -> float:
        if isinstance(conflict, UncommittedRecordError) and self.random.random() < 0.3:
            return self.random.random() * 1.3 * self.weather.lifetime_ms / 1000
        return self.random.random() * 10 * self.weather.latency_s

    async def _attempt(self, process: Process, begin: Begin, kind: str, work: Work) -> TransactionConflictError | None:
        """Try a job once; the conflict that it met."""
        transaction = begin()
        log = Log(transaction.tx_id, kind, self.weather.isolation, self.witness.next_instant())
        self.logs[log.tx_id] = log
        CURRENT_TX.set(log.tx_id)
        met: TransactionConflictError | None = None
        try:
            async with transaction:
                await work(LoggedTransaction(transaction, log))
                log.committing_at = self.witness.next_instant()
                await transaction.commit()
            log.answer = "committed"
        except UnknownTransactionStatusError:
            log.answer = "unknown"
        except TransactionConflictError as conflict:
            log.answer = "aborted"
            met = conflict
            self._probe_conflict(process, conflict)
        except (UnsatisfiedConditionError, StorageError):
            log.answer = "aborted"
        except Exception as error:
            if process.dead:
                raise  # It is being buried.
            log.answer = "unknown"
            self.violations.append(f"{log.tx_id} ({kind}) raised {error!r}")
        log.ended_at = self.witness.next_instant()
        self.network.note(f"{log.tx_id} {kind} {log.answer}")
        return met

    def _probe_conflict(self, process: Process, conflict: TransactionConflictError) -> None:
        if isinstance(conflict, ValidationConflictError):
            self.probes.hit("validation_conflict")
        elif isinstance(conflict, UncommittedRecordError):
            self.probes.hit("uncommitted_record_met")

    def _probe_answer(self, log: Log) -> None:
        committed = self.witness.decided.get(log.tx_id) is TransactionState.COMMITTED
        if log.answer == "unknown":
            committed = committed or log.tx_id in self.witness.at_once
            self.probes.hit("unknown_was_committed" if committed else "unknown_was_aborted")
        elif log.answer == "" and committed:
            self.probes.hit("died_and_was_committed")

    # -- evidence

    def _rows(self) -> dict[str, list[Row]]:
        return {
            namespace: stored_now(_all_rows(self._stores[alias], namespace))
            for namespace, alias in self._namespaces.items()
        }

    def evidence(self) -> Evidence:
        """All that is left, once it has run."""
        return Evidence(
            self.weather.isolation, self.weather.imported, self.places, self.logs, self.witness, self._rows()
        )


async def _all_rows(store: MemoryStorage, namespace: str) -> list[Row]:
    return [row async for page in store.pages(ScanAll(transactional(TABLES[namespace]))) for row in page]


_WATCHED = (coordinator, intents, participant, recovery)


@contextmanager
def watched_failpoints(world: World) -> Iterator[None]:
    """Have the engine's failpoints lead into `world`."""
    before = [(module, module.reach) for module in _WATCHED]
    for module in _WATCHED:
        module.reach = world.reach  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module, reach in before:
            module.reach = reach  # type: ignore[attr-defined]
