"""A storage that fails, waits and is watched where it is told to be: what the actors' tests put under a system.

Wraps any storage and counts every get, scan and mutate. A write that is held is applied when it is let go, even if
whoever sent it has died meanwhile: that is what a late write is.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Literal

from infra.storage.errors import UnavailableStorageError, UnknownOutcomeError
from infra.storage.forwarding import ForwardingStorage
from infra.storage.operations import CrossPartition, Key, Mutation, Row, Scan, StorageInfo, TableSchema, Value
from infra.storage.port import Storage, atomic_unit

PATIENT_S = 60.0
"""How long a test waits for what must happen before it says that it did not."""


class PatientEvent(asyncio.Event):
    """An event whose waiting ends in TimeoutError when patience does."""

    async def wait(self) -> Literal[True]:
        async with asyncio.timeout(PATIENT_S):
            return await super().wait()


class Fault(StrEnum):
    """What becomes of one call. Reads have no unknown outcomes: for them the first three are UNAVAILABLE."""

    UNAVAILABLE = "unavailable"  # not applied, and the caller is told so
    LOST = "lost"  # not applied, and the caller is told nothing
    UNANSWERED = "unanswered"  # applied, and the caller is told nothing
    UNDECLARED = "undeclared"  # applied, and then the adapter breaks its contract and raises what it must not


@dataclass(frozen=True)
class StorageCall:
    """`number` counts from 1; `tables` are full names."""

    number: int
    method: str
    tables: frozenset[str]
    mutations: tuple[Mutation, ...] = ()


Matcher = Callable[[StorageCall], bool]


def writes_to(*tables: str) -> Matcher:
    """Mutations of one of these tables (full names)."""
    return lambda call: call.method == "mutate" and not call.tables.isdisjoint(tables)


def preparing(*tables: str) -> Matcher:
    """Mutations that prepare records of one of these tables."""
    is_write = writes_to(*tables)
    return lambda call: (
        is_write(call) and any(getattr(m, "columns", {}).get("tx_state") in (1, 2) for m in call.mutations)
    )


@dataclass(eq=False)
class Held:
    """A call that waits: `reached` once it is there, `let_go` to have it done. `applied` when it has been."""

    matches: Matcher
    mutations: Sequence[Mutation] = ()
    reached: asyncio.Event = field(default_factory=PatientEvent)
    released: asyncio.Event = field(default_factory=asyncio.Event)
    applied: asyncio.Event = field(default_factory=PatientEvent)

    def let_go(self) -> None:
        self.released.set()


@dataclass(eq=False)
class _Armed:
    fault: Fault
    matches: Matcher
    nth: int
    times: int
    seen: int = 0

    def strikes(self, call: StorageCall) -> bool:
        if not self.matches(call):
            return False
        self.seen += 1
        return self.nth <= self.seen < self.nth + self.times


class Weather(ForwardingStorage):
    """The storage port over `storage`. While `down`, nothing is served."""

    def __init__(self, storage: Storage, *, serializes_batches: bool | None = None) -> None:
        super().__init__(storage)
        self.down = False
        self.calls: list[StorageCall] = []
        self.struck: list[StorageCall] = []
        self.in_flight: Counter[Hashable] = Counter()
        self.most_in_flight: Counter[Hashable] = Counter()
        self.pause: Callable[[], Awaitable[None]] | None = None
        self._serializes = serializes_batches
        self._armed: list[_Armed] = []
        self._held: list[Held] = []
        self._late: set[asyncio.Task[None]] = set()

    def fail(self, fault: Fault, matches: Matcher = lambda call: True, *, nth: int = 1, times: int = 1) -> None:
        """Strike the `nth` matching call from now on, and the `times` - 1 that follow it."""
        self._armed.append(_Armed(fault, matches, nth, times))

    def hold(self, matches: Matcher) -> Held:
        """Keep the next matching mutate back until it is let go."""
        held = Held(matches)
        self._held.append(held)
        return held

    @property
    def info(self) -> StorageInfo:
        info = super().info
        return info if self._serializes is None else replace(info, serializes_batches=self._serializes)

    def info_of(self, namespace: str) -> StorageInfo:
        return self.info

    async def partitions(self, table: TableSchema) -> list[tuple[Value, ...]]:
        self._enter("partitions", frozenset([table.full_name]))
        return await super().partitions(table)

    async def get(self, table: TableSchema, key: Key) -> Row | None:
        self._enter("get", frozenset([table.full_name]))
        return await super().get(table, key)

    async def scan(self, scan: Scan) -> list[Row]:
        self._enter("scan", frozenset([scan.table.full_name]))
        return await super().scan(scan)

    async def pages(self, selection: CrossPartition, page_size: int = 256) -> AsyncIterator[list[Row]]:
        self._enter("pages", frozenset([selection.table.full_name]))
        async for page in super().pages(selection, page_size):
            yield page

    async def mutate(self, mutations: Sequence[Mutation]) -> None:
        tables = frozenset(mutation.table.full_name for mutation in mutations)
        fault, call = self._enter("mutate", tables, tuple(mutations))
        if fault is Fault.LOST:
            raise UnknownOutcomeError("not applied, and not answered")
        units = {atomic_unit(self.info, m.table, m.key) for m in mutations if m.condition is not None}
        for unit in units:
            self.in_flight[unit] += 1
            self.most_in_flight[unit] = max(self.most_in_flight[unit], self.in_flight[unit])
        try:
            held = next((held for held in self._held if held.matches(call)), None)
            if held is not None:
                self._held.remove(held)
                late = asyncio.ensure_future(self._apply_late(held, mutations))
                self._late.add(late)
                late.add_done_callback(self._late.discard)
                await asyncio.shield(late)
            else:
                if self.pause is not None:
                    await self.pause()
                await super().mutate(mutations)
        finally:
            self.in_flight.subtract(units)
        if fault is Fault.UNANSWERED:
            raise UnknownOutcomeError("applied, but not answered")
        if fault is Fault.UNDECLARED:
            raise ZeroDivisionError("applied, and broken")

    async def _apply_late(self, held: Held, mutations: Sequence[Mutation]) -> None:
        held.mutations = mutations
        held.reached.set()
        await held.released.wait()
        try:
            await super().mutate(mutations)
        finally:
            held.applied.set()

    def _enter(
        self, method: str, tables: frozenset[str], mutations: tuple[Mutation, ...] = ()
    ) -> tuple[Fault | None, StorageCall]:
        call = StorageCall(len(self.calls) + 1, method, tables, mutations)
        self.calls.append(call)
        if self.down:
            raise UnavailableStorageError("down")
        fault = next((armed.fault for armed in self._armed if armed.strikes(call)), None)
        if fault is not None:
            self.struck.append(call)
        if fault is Fault.UNDECLARED and method != "mutate":
            raise ZeroDivisionError("broken")
        if fault is Fault.UNAVAILABLE or (fault is not None and method != "mutate"):
            raise UnavailableStorageError("not applied")
        return fault, call
