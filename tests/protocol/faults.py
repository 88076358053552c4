"""A storage that fails where it is told to, and lets others in between two calls: the weather of the protocol tests.

Wraps any storage. Counts every get, scan and mutate; a Fault names the call it strikes and what becomes of it:

    UNAVAILABLE         not applied, and the caller is told so
    LOST                not applied, and the caller is told nothing (UnknownOutcomeError)
    UNANSWERED          applied, and the caller is told nothing
    CRASH_BEFORE        the process dies before the call
    CRASH_AFTER         the process dies after the call was applied, before its answer

Reads cannot have unknown outcomes: for them LOST and UNANSWERED are UNAVAILABLE. After a crash every further call
dies too, so that whatever the engine does in its `except` clauses has no effect, as in a process that was killed.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from infra.storage.errors import UnavailableStorageError, UnknownOutcomeError
from infra.storage.forwarding import ForwardingStorage
from infra.storage.operations import CrossPartition, Key, Mutation, Row, Scan, TableSchema
from infra.storage.port import Storage


class Crashed(BaseException):
    """The process is dead. Not an Exception: nothing in the engine may catch it and carry on."""


class Kind(StrEnum):
    UNAVAILABLE = "unavailable"
    LOST = "lost"
    UNANSWERED = "unanswered"
    CRASH_BEFORE = "crash_before"
    CRASH_AFTER = "crash_after"


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the storage port: `number` counts from 1."""

    number: int
    method: str
    tables: frozenset[str]
    mutations: tuple[Mutation, ...] = ()


Matcher = Callable[[Call], bool]


def anything(call: Call) -> bool:
    return True


def writes_to(table: TableSchema) -> Matcher:
    """Mutations of a table."""
    return lambda call: call.method == "mutate" and table.full_name in call.tables


def gets_of(table: TableSchema) -> Matcher:
    """Gets of a table."""
    return lambda call: call.method == "get" and table.full_name in call.tables


def reads_of(table: TableSchema) -> Matcher:
    """Gets and scans of a table, of whichever kind."""
    return lambda call: call.method in ("get", "scan", "pages") and table.full_name in call.tables


def following(first: Matcher, then: Matcher) -> Matcher:
    """Calls that match `then`, from the first call on that matches `first`."""
    begun = False

    def matches(call: Call) -> bool:
        nonlocal begun
        if begun:
            return then(call)
        begun = first(call)
        return False

    return matches


@dataclass(slots=True)
class Fault:
    """Strikes the `nth` call (from 1) that matches, and the `times` - 1 that follow it; None: all that follow."""

    kind: Kind
    matches: Matcher = anything
    nth: int = 1
    times: int | None = 1
    seen: int = 0

    def strikes(self, call: Call) -> bool:
        if not self.matches(call):
            return False
        self.seen += 1
        return self.seen >= self.nth and (self.times is None or self.seen < self.nth + self.times)


@dataclass(slots=True)
class _Visit:
    matches: Matcher
    visitor: Callable[[], Awaitable[object]]
    times: int | None


class FaultyStorage(ForwardingStorage):
    """The storage port over `storage`, with faults and visitors.

    `randomness` makes every call give way to other tasks, a random number of times before and after it is applied.
    """

    def __init__(self, storage: Storage, *, randomness: random.Random | None = None) -> None:
        super().__init__(storage)
        self.calls: list[Call] = []
        self.faults: list[Fault] = []
        self.dead = False
        self._before: list[_Visit] = []
        self._randomness = randomness

    def fail(self, kind: Kind, matches: Matcher = anything, *, nth: int = 1, times: int | None = 1) -> Fault:
        """Arm one fault."""
        fault = Fault(kind, matches, nth, times)
        self.faults.append(fault)
        return fault

    def visit_before(
        self, matches: Matcher, visitor: Callable[[], Awaitable[object]], *, times: int | None = 1
    ) -> None:
        """Let `visitor` act just before each of the next `times` matching calls (not those it makes itself)."""
        self._before.append(_Visit(matches, visitor, times))

    def heal(self) -> None:
        """No faults and no visitors any more; the dead stay dead."""
        self.faults.clear()
        self._before.clear()

    async def get(self, table: TableSchema, key: Key) -> Row | None:
        kind = await self._enter("get", frozenset([table.full_name]))
        row = await super().get(table, key)
        await self._leave(kind)
        return row

    async def scan(self, scan: Scan) -> list[Row]:
        kind = await self._enter("scan", frozenset([scan.table.full_name]))
        rows = await super().scan(scan)
        await self._leave(kind)
        return rows

    async def pages(self, selection: CrossPartition, page_size: int = 256) -> AsyncIterator[list[Row]]:
        kind = await self._enter("pages", frozenset([selection.table.full_name]))
        async for page in super().pages(selection, page_size):
            yield page
        await self._leave(kind)

    async def mutate(self, mutations: Sequence[Mutation]) -> None:
        tables = frozenset(mutation.table.full_name for mutation in mutations)
        kind = await self._enter("mutate", tables, tuple(mutations))
        await super().mutate(mutations)
        await self._leave(kind)
        if kind is Kind.UNANSWERED:
            raise UnknownOutcomeError("applied, but not answered")

    async def _enter(self, method: str, tables: frozenset[str], mutations: tuple[Mutation, ...] = ()) -> Kind | None:
        await self._give_way()
        self._check_alive()
        call = Call(len(self.calls) + 1, method, tables, mutations)
        self.calls.append(call)
        for visit in self._before:
            if visit.times != 0 and visit.matches(call):
                remaining, visit.times = visit.times, 0
                await visit.visitor()
                visit.times = None if remaining is None else remaining - 1
        kind = next((fault.kind for fault in self.faults if fault.strikes(call)), None)
        if kind is Kind.CRASH_BEFORE:
            self.dead = True
            raise Crashed
        if kind is Kind.UNAVAILABLE or (method != "mutate" and kind in (Kind.LOST, Kind.UNANSWERED)):
            raise UnavailableStorageError("not applied")
        if kind is Kind.LOST:
            raise UnknownOutcomeError("not applied, and not answered")
        return kind

    async def _leave(self, kind: Kind | None) -> None:
        if kind is Kind.CRASH_AFTER:
            self.dead = True
        self._check_alive()
        await self._give_way()

    def _check_alive(self) -> None:
        if self.dead:
            raise Crashed

    async def _give_way(self) -> None:
        if self._randomness is not None:
            for _ in range(self._randomness.randrange(3)):
                await asyncio.sleep(0)
