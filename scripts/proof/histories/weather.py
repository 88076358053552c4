"""Storage as a process meets it in bad weather, and the clock that its calls drive.

Each process has a storage of its own over the shared one. A call may meet one of these, by chance:

    UNAVAILABLE      not applied, and the caller is told so
    LOST             not applied, and the caller is told nothing
    UNANSWERED       applied or rejected, and the caller is told nothing
    SLOW             applied and answered, after a while in which others go on
    LATE             the caller is told nothing, and the write arrives some time later, or too late
    CRASH_BEFORE     the process dies before the call
    CRASH_AFTER      the process dies after the call was applied, before its answer
    CRASH_LATE       the process dies, and its write arrives some time later

Reads have no unknown outcome: what strikes them is UNAVAILABLE or CRASH_BEFORE. A dead process makes no further call,
whatever its `except` clauses try.

Time is counted in storage calls: each advances the clock of all processes by one millisecond. So a transaction's
lifetime is so many calls of everybody, on a slow machine as on a fast one, and no run waits for time to pass.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from infra.consensus_commit.metadata import TX_ID, TX_STATE, TX_VERSION
from infra.consensus_commit.states import TransactionState
from infra.storage.errors import NoMutationError, StorageError, UnavailableStorageError, UnknownOutcomeError
from infra.storage.forwarding import ForwardingStorage
from infra.storage.operations import CrossPartition, Key, Mutation, Put, Row, Scan, TableSchema, Value
from infra.storage.port import Storage, peek


class CrashedError(BaseException):
    """The process is dead. Not an Exception: nothing in the engine may catch it and carry on."""


class Fault(StrEnum):
    UNAVAILABLE = "unavailable"
    LOST = "lost"
    UNANSWERED = "unanswered"
    SLOW = "slow"
    LATE = "late"
    CRASH_BEFORE = "crash before"
    CRASH_AFTER = "crash after"
    CRASH_LATE = "crash late"


@dataclass(frozen=True, slots=True)
class FaultRates:
    """How likely each fault strikes one call, in thousandths. A crash takes all transactions of its process along."""

    unavailable: int = 4
    lost: int = 6
    unanswered: int = 8
    slow: int = 6
    late: int = 6
    crash_before: int = 1
    crash_after: int = 2
    crash_late: int = 2

    def of_write(self) -> dict[Fault, int]:
        return {
            Fault.UNAVAILABLE: self.unavailable,
            Fault.LOST: self.lost,
            Fault.UNANSWERED: self.unanswered,
            Fault.SLOW: self.slow,
            Fault.LATE: self.late,
            Fault.CRASH_BEFORE: self.crash_before,
            Fault.CRASH_AFTER: self.crash_after,
            Fault.CRASH_LATE: self.crash_late,
        }

    def of_read(self) -> dict[Fault, int]:
        return {Fault.UNAVAILABLE: self.unavailable // 2, Fault.CRASH_BEFORE: self.crash_before}


CALM = FaultRates(0, 0, 0, 0, 0, 0, 0, 0)


class CallClock:
    """A clock that storage calls drive. `ids` makes the transaction ids."""

    def __init__(self, started_at_ms: int, ids: random.Random) -> None:
        self._started_at_ms = started_at_ms
        self._now_ms = started_at_ms
        self._ids = ids

    def now_ms(self) -> int:
        return self._now_ms

    def monotonic_s(self) -> float:
        return (self._now_ms - self._started_at_ms) / 1000

    def new_id(self) -> str:
        return str(uuid.UUID(int=self._ids.getrandbits(128), version=4))

    def advance(self, milliseconds: int) -> None:
        self._now_ms += milliseconds


@dataclass(slots=True)
class Weather:
    """What all processes of a run share. `fired` counts the faults that struck; `versions` what was prepared."""

    storage: Storage
    clock: CallClock
    rates: FaultRates
    randomness: random.Random
    late_by_ms: int
    sure: dict[int, Fault] = field(default_factory=dict)
    """Faults that strike in any case: the number of the write (from 1) -> what befalls it."""
    sure_decisions: frozenset[int] = frozenset()
    """Which of the writes that commit a transaction (from 1) are slow, or the last that their process does: in turn."""
    fired: Counter[Fault] = field(default_factory=Counter)
    versions: dict[tuple[str, str, Key], int] = field(default_factory=dict)
    """(transaction, table, key) -> the `tx_version` that its write carried."""
    _late: list[tuple[int, tuple[Mutation, ...]]] = field(default_factory=list)
    _writes: int = 0
    _decisions: int = 0
    _under_way: int = 0
    _nothing_under_way: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._nothing_under_way.set()

    def strike_write(self, mutations: Sequence[Mutation]) -> Fault | None:
        """What befalls a write."""
        if self.rates is CALM:
            return None
        self._writes += 1
        fault = self.sure.get(self._writes)
        if _decides(mutations):
            self._decisions += 1
            if self._decisions in self.sure_decisions:
                fault = Fault.SLOW if self.fired[Fault.SLOW] <= self.fired[Fault.CRASH_AFTER] else Fault.CRASH_AFTER
        if fault is None:
            return self._strike(self.rates.of_write())
        self.fired[fault] += 1
        return fault

    def strike_read(self) -> Fault | None:
        """What befalls a read."""
        return self._strike(self.rates.of_read())

    def _strike(self, rates: dict[Fault, int]) -> Fault | None:
        draw = self.randomness.randrange(1000)
        for fault, rate in rates.items():
            if draw < rate:
                self.fired[fault] += 1
                return fault
            draw -= rate
        return None

    def delay(self, mutations: Sequence[Mutation]) -> None:
        due_ms = self.clock.now_ms() + self.randomness.randint(1, self.late_by_ms)
        self._late.append((due_ms, tuple(mutations)))

    async def deliver(self, *, everything: bool = False) -> None:
        """Let what is due (or everything that is still on its way) arrive, and find its conditions true or not."""
        now_ms = self.clock.now_ms()
        due = [mutations for due_ms, mutations in self._late if everything or due_ms <= now_ms]
        self._late = [entry for entry in self._late if not everything and entry[0] > now_ms]
        for mutations in due:
            with contextlib.suppress(StorageError):  # Refused: it came too late.
                await self.apply(mutations)

    async def apply(self, mutations: Sequence[Mutation]) -> None:
        """Let a write reach the shared storage."""
        self._under_way += 1
        self._nothing_under_way.clear()
        try:
            await self.storage.mutate(mutations)
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._nothing_under_way.set()

    async def clear_up(self) -> None:
        """No faults any more; returns when every write that was sent has arrived."""
        self.rates = CALM
        await self._nothing_under_way.wait()
        await self.deliver(everything=True)

    async def dawdle(self) -> None:
        """Let others go on for longer than a transaction may live."""
        for _ in range(self.late_by_ms):
            self.clock.advance(1)
            await asyncio.sleep(0)
            await self.give_way()

    async def give_way(self) -> None:
        """Let other tasks go first, a random number of times."""
        for _ in range(self.randomness.randrange(3)):
            await asyncio.sleep(0)


def _decides(mutations: Sequence[Mutation]) -> bool:
    """Whether this is the write that commits a transaction."""
    return any(
        isinstance(mutation, Put)
        and mutation.table.partition_key == (TX_ID,)
        and mutation.columns.get(TX_STATE) == TransactionState.COMMITTED
        for mutation in mutations
    )


class ProcessStorage(ForwardingStorage):
    """The storage port as one process has it."""

    def __init__(self, weather: Weather) -> None:
        super().__init__(weather.storage)
        self._weather = weather
        self.dead = False
        self.died: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def get(self, table: TableSchema, key: Key) -> Row | None:
        await self._enter_read()
        row = await super().get(table, key)
        await self._leave()
        return row

    async def peek(self, table: TableSchema, key: Key) -> Row | None:
        await self._enter_read()
        row = await peek(self.storage, table, key)
        await self._leave()
        return row

    async def scan(self, scan: Scan) -> list[Row]:
        await self._enter_read()
        rows = await super().scan(scan)
        await self._leave()
        return rows

    async def pages(self, selection: CrossPartition, page_size: int = 256) -> AsyncIterator[list[Row]]:
        await self._enter_read()
        async for page in super().pages(selection, page_size):
            yield page
            self._check_alive()

    async def partitions(self, table: TableSchema) -> list[tuple[Value, ...]]:
        await self._enter_read()
        return await super().partitions(table)

    async def mutate(self, mutations: Sequence[Mutation]) -> None:
        await self._enter()
        self._note(mutations)
        fault = self._weather.strike_write(mutations)
        if fault in (Fault.LATE, Fault.CRASH_LATE):
            self._weather.delay(mutations)
        match fault:
            case Fault.CRASH_BEFORE | Fault.CRASH_LATE:
                self._crash()
            case Fault.UNAVAILABLE:
                raise UnavailableStorageError("not applied")
            case Fault.LOST | Fault.LATE:
                raise UnknownOutcomeError("not answered")
            case Fault.CRASH_AFTER:
                with contextlib.suppress(StorageError):
                    await self._weather.apply(mutations)
                self._crash()
            case Fault.UNANSWERED:
                with contextlib.suppress(NoMutationError):
                    await self._weather.apply(mutations)
                self._check_alive()
                raise UnknownOutcomeError("answered, but not heard")
            case _:
                if fault is Fault.SLOW:
                    await self._weather.dawdle()
                    self._check_alive()
                try:
                    await self._weather.apply(mutations)
                finally:
                    self._check_alive()
        await self._leave()

    async def close(self) -> None:
        """The shared storage is not this process's to close."""

    def _note(self, mutations: Sequence[Mutation]) -> None:
        for mutation in mutations:
            if isinstance(mutation, Put) and mutation.columns.get(TX_VERSION) is not None:
                tx_id, version = mutation.columns.get(TX_ID), mutation.columns[TX_VERSION]
                if isinstance(tx_id, str) and isinstance(version, int):
                    self._weather.versions[(tx_id, mutation.table.full_name, mutation.key)] = version

    async def _enter_read(self) -> None:
        await self._enter()
        match self._weather.strike_read():
            case Fault.CRASH_BEFORE:
                self._crash()
            case Fault.UNAVAILABLE:
                raise UnavailableStorageError("not read")

    async def _enter(self) -> None:
        self._check_alive()
        self._weather.clock.advance(1)
        await self._weather.give_way()
        await self._weather.deliver()
        self._check_alive()

    async def _leave(self) -> None:
        await self._weather.give_way()
        self._check_alive()

    def _crash(self) -> None:
        self.dead = True
        if not self.died.done():
            self.died.set_result(None)
        raise CrashedError

    def _check_alive(self) -> None:
        if self.dead:
            raise CrashedError
