"""Storage as a process sees it over a network that delays, loses and swallows.

A call travels (latency), is applied to a MemoryStorage in one instant (the `witness` sees it), and its answer travels
back. Each leg belongs to somebody: what is on its way to storage arrives even if its sender has died; an answer to a
dead process is dropped and one to a paused process waits.

Every process has a SimulatedStorage for each store, and the engine's own MultiStorage above them.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, Protocol, cast

from infra.storage.errors import NoMutationError, StorageError, UnavailableStorageError, UnknownOutcomeError
from infra.storage.gate import PartitionGate
from infra.storage.memory import MemoryStorage
from infra.storage.operations import (
    Atomicity,
    ColumnCondition,
    CrossPartition,
    IndexScan,
    Key,
    Mutation,
    Operator,
    Put,
    Row,
    Scan,
    StorageInfo,
    TableSchema,
    Value,
)
from infra.storage.port import Storage
from scripts.proof.simulation.loop import Process, SimulatedLoop
from scripts.proof.simulation.weather import READ_FAULTS, CallFault, Weather
from scripts.proof.simulation.witness import CURRENT_TX, Witness, Write

_WHILE_DOWN = (CallFault.UNAVAILABLE, CallFault.LOST, CallFault.LATE)


class Network:
    """The way to all stores, and what goes wrong on it. `crash` ends a process."""

    def __init__(
        self,
        loop: SimulatedLoop,
        weather: Weather,
        randomness: random.Random,
        witness: Witness,
        crash: Callable[[Process], None],
    ) -> None:
        self.loop = loop
        self.witness = witness
        self.faults: Counter[str] = Counter()
        self.calls = 0
        self.under_way = 0
        self.under_way_of: Counter[int] = Counter()
        self.healed = False
        self.down: set[str] = set()
        self._trace = hashlib.blake2b(digest_size=16)
        self._latency_s = weather.latency_s
        self._weather = weather
        self._draw = randomness.random
        self._randomness = randomness
        self._crash = crash
        self._fault = weather.call_fault
        writes = {kind: weight for kind, weight in weather.call_faults.items() if weight}
        reads = {kind: weight for kind, weight in writes.items() if kind in READ_FAULTS}
        self._writes = (list(writes), list(writes.values()))
        self._reads = (list(reads), list(reads.values()))

    def heal(self) -> None:
        """No new faults. What is late is still to come."""
        self._fault = 0.0
        self.healed = True
        self.down.clear()

    def note(self, text: str) -> None:
        """Add a line to the trace, by which two runs of a seed are compared."""
        self._trace.update(f"{self.loop.now_s:.9f} {text}\n".encode())

    @property
    def trace(self) -> str:
        return self._trace.hexdigest()

    def send(
        self, process: Process, store: MemoryStorage, method: str, argument: Any, answer: asyncio.Future[Any]
    ) -> None:
        """Start a call on its way; `answer` is what its sender waits for."""
        self.calls += 1
        latency_s = self._latency_s
        there_s, back_s = self._draw() * latency_s, self._draw() * latency_s
        is_write = method == "mutate"
        fault: CallFault | None = None
        if store.info.name in self.down:
            # What a store that is down was sent it may have kept for later.
            fault = self._randomness.choice(_WHILE_DOWN) if is_write else CallFault.UNAVAILABLE
            self._strike("down", process)
        elif self.down:
            self.witness.probes.hit("one_store_down")
        if fault is None and self._fault and self._draw() < self._fault:
            kinds, weights = self._writes if is_write else self._reads
            if kinds:
                fault = self._randomness.choices(kinds, weights)[0]
                self._strike(fault, process)
        match fault:
            case CallFault.UNAVAILABLE | CallFault.LOST:
                if fault is CallFault.LOST:
                    self.witness.lost(argument)
                return self._refuse(there_s + back_s, process, answer, fault)
            case CallFault.CRASH_BEFORE:
                return self._crash(process)
            case CallFault.SLOW:
                there_s += self._draw() * self._weather.slow_s
            case CallFault.LATE:
                self._refuse(there_s + back_s, process, answer, fault)
                there_s += self._draw() * self._weather.late_s
        self.under_way += 1
        self.under_way_of[process.number] += 1
        self.loop.deliver(there_s, None, self._apply, process, store, method, argument, answer, back_s, fault)
        if fault is CallFault.CRASH_SENT:
            self._crash(process)

    def _strike(self, kind: str, process: Process) -> None:
        self.faults[kind] += 1
        self.note(f"fault {kind} {process.number}")

    def _refuse(self, delay_s: float, process: Process, answer: asyncio.Future[Any], fault: CallFault) -> None:
        error: StorageError = UnknownOutcomeError("it was not answered")
        if fault is CallFault.UNAVAILABLE:
            error = UnavailableStorageError("it cannot be reached")
        self.loop.deliver(delay_s, process, fail, answer, error)

    def _apply(
        self,
        process: Process,
        store: MemoryStorage,
        method: str,
        argument: Any,
        answer: asyncio.Future[Any],
        back_s: float,
        fault: CallFault | None,
    ) -> None:
        self.under_way -= 1
        self.under_way_of[process.number] -= 1
        call = begun(store, method, argument)
        error: StorageError | None = None
        result = None
        try:
            call.send(None)
        except StopIteration as stop:
            result = stop.value
        except NoMutationError as refusal:
            error = refusal
        if method == "mutate":
            self.note(f"{process.number} {_described(argument.mutations)} {'refused' if error else 'applied'}")
            self.witness.wrote(process, store, argument, applied=error is None, fault=fault)
        else:
            self.note(f"{process.number} {method} {_seen(result)}")
        match fault:
            case CallFault.CRASH_AFTER:
                self._crash(process)
            case CallFault.UNANSWERED:
                self._refuse(back_s, process, answer, fault)
            case CallFault.LATE:
                pass  # It has been told.
            case _ if error is not None:
                self.loop.deliver(back_s, process, fail, answer, error)
            case _:
                self.loop.deliver(back_s, process, succeed, answer, result)


def begun(store: MemoryStorage, method: str, argument: Any) -> Coroutine[Any, Any, Any]:
    """The call of a MemoryStorage that a process made."""
    match method:
        case "get":
            return store.get(*argument)
        case "scan":
            return store.scan(argument)
        case "mutate":
            return store.mutate(argument.mutations)
        case _:
            return store.partitions(argument)


def succeed(answer: asyncio.Future[Any], result: Any) -> None:
    if not answer.done():
        answer.set_result(result)


def fail(answer: asyncio.Future[Any], error: StorageError) -> None:
    if not answer.done():
        answer.set_exception(error)


def _described(mutations: Sequence[Mutation]) -> str:
    """A batch in words that are the same in every run."""
    return " ".join(
        f"{type(m).__name__} {m.table.full_name} {m.key.partition}{m.key.clustering}"
        f" {sorted(m.columns.items()) if isinstance(m, Put) else ''}"
        for m in mutations
    )


def _seen(result: Any) -> str:
    rows = [result] if isinstance(result, dict) else result or []
    return " ".join(str(row.get("tx_id")) if isinstance(row, dict) else str(row) for row in rows)


class Wire(Protocol):
    """What a SimulatedStorage sends its calls by."""

    loop: SimulatedLoop

    def send(
        self, process: Process, store: MemoryStorage, method: str, argument: Any, answer: asyncio.Future[Any]
    ) -> None:
        """Start a call on its way."""


class SimulatedStorage:
    """One process's way to one store: the storage port."""

    def __init__(self, network: Wire, process: Process, store: MemoryStorage) -> None:
        self._network = network
        self._process = process
        self._store = store
        # As in Cassandra, conditional batches contend, and the engine puts its gate before them.
        contends = store.info.atomicity is Atomicity.PARTITION
        self._info = replace(store.info, serializes_batches=not contends)

    @property
    def info(self) -> StorageInfo:
        return self._info

    def info_of(self, namespace: str) -> StorageInfo:
        return self._info

    async def create_table(self, table: TableSchema) -> None:
        await self._store.create_table(table)

    async def tables(self) -> list[TableSchema]:
        return await self._store.tables()

    async def get(self, table: TableSchema, key: Key) -> Row | None:
        return cast("Row | None", await self._call("get", (table, key)))

    async def scan(self, scan: Scan) -> list[Row]:
        return cast("list[Row]", await self._call("scan", scan))

    async def pages(self, selection: CrossPartition, page_size: int = 256) -> AsyncIterator[list[Row]]:
        """One partition after another, each at its own time: a page never shows two partitions as of one instant."""
        where = selection.where
        if isinstance(selection, IndexScan):
            where = (ColumnCondition(selection.column, Operator.EQ, selection.value), *where)
        for partition in await self.partitions(selection.table):
            rows = await self.scan(Scan(selection.table, partition, where=where))
            if rows:
                yield rows

    async def partitions(self, table: TableSchema) -> list[tuple[Value, ...]]:
        return cast("list[tuple[Value, ...]]", await self._call("partitions", table))

    async def mutate(self, mutations: Sequence[Mutation]) -> None:
        await self._call("mutate", Write(tuple(mutations), CURRENT_TX.get()))

    async def close(self) -> None:
        """Nothing to release."""

    def _call(self, method: str, argument: Any) -> asyncio.Future[Any]:
        answer: asyncio.Future[Any] = asyncio.Future(loop=self._network.loop)
        self._network.send(self._process, self._store, method, argument, answer)
        return answer


class WitnessedGate(PartitionGate):
    """The engine's gate, whose witness learns whose mutations those are that it joins to one batch."""

    def __init__(self, storage: Storage, witness: Witness) -> None:
        super().__init__(storage)
        self._witness = witness

    async def mutate(self, mutations: Sequence[Mutation]) -> None:
        self._witness.sent(mutations, CURRENT_TX.get())
        await super().mutate(mutations)
