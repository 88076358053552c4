"""One batch in flight for each atomic unit, and what waits meanwhile goes together.

A storage whose conditional batches contend (Cassandra's Paxos rounds) answers two batches on one partition more slowly
than one after the other, and may refuse both; but fifty rows in one batch cost little more than one. So batches queue
for their unit in the order they came, and when it is free the first one leads: it takes along those behind it that
touch other records, as one batch. One that is in no hurry (`mutate_when_convenient`) lingers for a moment until another
takes it along; it goes before whatever touches its records.

    applied         all of them are
    refused         those that the storage names as to blame are refused, and the others go together again; where it
                    names none, each is tried by itself, in order
    unknown         unknown to all, unavailable likewise
    leader killed   unknown to those it had taken along; the next in the queue leads

The gate guards this process only; batches of others are what conditions are for. It has no tasks of its own, only
timers: whoever leads does the work.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Hashable, Sequence
from copy import copy
from dataclasses import dataclass, replace

from infra.storage.errors import (
    InvalidOperationError,
    NoMutationError,
    StorageError,
    UnavailableStorageError,
    UnknownOutcomeError,
)
from infra.storage.forwarding import ForwardingStorage
from infra.storage.operations import DataType, Key, Mutation, Row, StorageInfo, TableSchema
from infra.storage.port import Storage, add_column, atomic_unit, peek

MAX_ROWS_TOGETHER = 50
"""Rows that go together at most: larger conditional batches cost Cassandra more than they save."""

LINGER_S = 0.01
"""How long a batch that is in no hurry waits for company."""


@dataclass(slots=True, eq=False)
class _Waiting:
    """One `mutate` in a queue. Its turn: True to lead, False when another has taken it along; errors are raised."""

    mutations: Sequence[Mutation]
    turn: asyncio.Future[bool]


@dataclass(slots=True, eq=False)
class _Lingering:
    """Batches of one unit that wait for company, and the timer that ends their waiting."""

    batches: deque[_Waiting]
    timer: asyncio.TimerHandle


class PartitionGate(ForwardingStorage):
    """Storage that passes everything on to `storage`, but one batch at a time into an atomic unit.

    In front of a storage that serializes batches by itself it stands open. `rows_together` bounds what goes into one
    batch; 1 lets every `mutate` go alone.
    """

    def __init__(self, storage: Storage, *, rows_together: int = MAX_ROWS_TOGETHER) -> None:
        super().__init__(storage)
        self._rows_together = rows_together
        self._queues: dict[Hashable, deque[_Waiting]] = {}  # of the units that a batch is in flight for
        self._lingering: dict[Hashable, _Lingering] = {}
        self._infos: dict[str, tuple[StorageInfo, StorageInfo]] = {}

    @property
    def info(self) -> StorageInfo:
        return replace(self.storage.info, serializes_batches=True)

    def info_of(self, namespace: str) -> StorageInfo:
        behind = self.storage.info_of(namespace)
        known = self._infos.get(namespace)
        if known is None or known[0] is not behind:  # Asked for every write: not to be made anew each time.
            known = self._infos[namespace] = (behind, replace(behind, serializes_batches=True))
        return known[1]

    async def add_column(self, table: TableSchema, column: str, data_type: DataType) -> None:
        await add_column(self.storage, table, column, data_type)

    async def peek(self, table: TableSchema, key: Key) -> Row | None:
        return await peek(self.storage, table, key)

    async def mutate(self, mutations: Sequence[Mutation]) -> None:
        info = self._guarded(mutations)
        if info is None:
            await self.storage.mutate(mutations)
            return
        unit = _unit_of(mutations, info)
        lingering = self._lingering.get(unit)
        if lingering is not None and any(_share_records(mutations, other.mutations) for other in lingering.batches):
            self._end_lingering(unit)
        queue = self._queues.get(unit)
        if queue is None:
            self._queues[unit] = deque()
        else:
            waiting = _Waiting(mutations, asyncio.get_running_loop().create_future())
            queue.append(waiting)
            if not await self._turn_of(waiting, unit):
                return
        await self._lead_in(unit, mutations, info)

    async def mutate_when_convenient(self, mutations: Sequence[Mutation]) -> None:
        """Like `mutate`, for a batch whose caller does not mind to wait for a moment: another may take it along."""
        info = self._guarded(mutations)
        if info is None or self._rows_together == 1:
            await self.mutate(mutations)
            return
        unit = _unit_of(mutations, info)
        loop = asyncio.get_running_loop()
        waiting = _Waiting(mutations, loop.create_future())
        lingering = self._lingering.get(unit)
        if lingering is None:
            timer = loop.call_later(LINGER_S, self._end_lingering, unit)
            self._lingering[unit] = _Lingering(deque([waiting]), timer)
        else:
            lingering.batches.append(waiting)
        if await self._turn_of(waiting, unit):
            await self._lead_in(unit, mutations, info)

    def _guarded(self, mutations: Sequence[Mutation]) -> StorageInfo | None:
        """What holds where these go, if they have to come one at a time."""
        info = self.storage.info_of(mutations[0].table.namespace) if mutations else None
        return None if info is None or info.serializes_batches else info

    async def _lead_in(self, unit: Hashable, mutations: Sequence[Mutation], info: StorageInfo) -> None:
        try:
            await self._lead(mutations, self._take_along(unit, mutations, info))
        finally:
            self._pass_on(unit)

    async def _turn_of(self, waiting: _Waiting, unit: Hashable) -> bool:
        """Wait; whether it is this batch's turn to lead (else it was applied with another's)."""
        try:
            return await waiting.turn
        except asyncio.CancelledError:
            if _is_told_to_lead(waiting.turn):
                self._pass_on(unit)
            elif waiting in self._queues.get(unit, ()):
                self._queues[unit].remove(waiting)
            elif unit in self._lingering:
                self._leave_lingering(unit, [waiting])
            raise

    def _end_lingering(self, unit: Hashable) -> None:
        """Let those that linger queue like all others."""
        lingering = self._lingering.pop(unit)
        lingering.timer.cancel()
        if unit in self._queues:
            self._queues[unit].extend(lingering.batches)
        else:
            self._queues[unit] = lingering.batches
            self._pass_on(unit)

    def _leave_lingering(self, unit: Hashable, leaving: Sequence[_Waiting]) -> None:
        lingering = self._lingering[unit]
        lingering.batches = deque(each for each in lingering.batches if each not in leaving)
        if not lingering.batches:
            lingering.timer.cancel()
            del self._lingering[unit]

    def _take_along(self, unit: Hashable, mutations: Sequence[Mutation], info: StorageInfo) -> list[_Waiting]:
        """Those next in the queue that may share a batch with `mutations`: of its kind, and on other records."""
        queue = self._queues[unit]
        most = min(self._rows_together, info.max_mutations or self._rows_together)
        conditional = _is_conditional(mutations)
        taken: list[_Waiting] = []
        if conditional is None:
            return taken
        records = _records(mutations)

        def takes(other: _Waiting) -> bool:
            following = _records(other.mutations)
            if (
                len(records) + len(other.mutations) > most
                or _is_conditional(other.mutations) is not conditional
                or records & following
            ):
                return False
            records.update(following)
            taken.append(other)
            return True

        while queue and takes(queue[0]):
            queue.popleft()
        if unit in self._lingering:
            self._leave_lingering(unit, [other for other in self._lingering[unit].batches if takes(other)])
        return taken

    async def _lead(self, mutations: Sequence[Mutation], others: Sequence[_Waiting]) -> None:
        if not others:
            return await self.storage.mutate(mutations)
        try:
            await self.storage.mutate([*mutations, *(each for other in others for each in other.mutations)])
        except NoMutationError as error:
            await self._without_the_blamed(mutations, others, error)
        except InvalidOperationError:
            await self._each_alone(mutations, others)
        except StorageError as error:
            for other in others:
                _answer(other, copy(error))
            raise
        except BaseException:
            for other in others:
                _answer(other, UnknownOutcomeError("the batch that this one had joined was not waited for"))
            raise
        else:
            for other in others:
                _answer(other, None)

    async def _without_the_blamed(
        self, mutations: Sequence[Mutation], others: Sequence[_Waiting], error: NoMutationError
    ) -> None:
        blameless = []
        for other in others:
            if _has_unmet(other.mutations, error):
                _answer(other, copy(error))
            else:
                blameless.append(other)
        if _has_unmet(mutations, error):
            # Its own refusal waits for the others, whose unit stays taken meanwhile.
            if blameless:
                await self._lead_for(blameless)
            raise error
        if len(blameless) == len(others):
            return await self._each_alone(mutations, others)
        await self._lead(mutations, blameless)

    async def _lead_for(self, others: Sequence[_Waiting]) -> None:
        """Lead in the place of one of `others`, whose errors are its own."""
        first, *rest = others
        try:
            await self._lead(first.mutations, rest)
        except StorageError as error:
            _answer(first, error)
        except BaseException:
            _answer(first, UnknownOutcomeError("the batch was not waited for"))
            raise
        else:
            _answer(first, None)

    async def _each_alone(self, mutations: Sequence[Mutation], others: Sequence[_Waiting]) -> None:
        refusal: StorageError | None = None
        left = list(others)
        try:
            try:
                await self.storage.mutate(mutations)
            except StorageError as error:
                refusal = error
            while left:
                outcome: StorageError | None = None
                try:
                    await self.storage.mutate(left[0].mutations)
                except StorageError as error:
                    outcome = error
                _answer(left.pop(0), outcome)
        except BaseException:
            if left:  # The first was under way.
                _answer(left.pop(0), UnknownOutcomeError("the batch was not waited for"))
            for other in left:
                _answer(other, UnavailableStorageError("the batch was given up before it was its turn"))
            raise
        if refusal is not None:
            raise refusal

    def _pass_on(self, unit: Hashable) -> None:
        """Let the next one lead, or leave the unit free."""
        queue = self._queues[unit]
        while queue:
            following = queue.popleft()
            if not following.turn.done():
                following.turn.set_result(True)
                return
        del self._queues[unit]


def _unit_of(mutations: Sequence[Mutation], info: StorageInfo) -> Hashable:
    # A batch of two units is the storage's to refuse; until then it queues for the first.
    unit = atomic_unit(info, mutations[0].table, mutations[0].key)
    try:
        hash(unit)
    except TypeError as error:
        raise InvalidOperationError(f"{mutations[0].table.full_name}: a key holds plain values ({error})") from error
    return unit


def _records(mutations: Sequence[Mutation]) -> set[tuple[str, Key]]:
    return {(mutation.table.full_name, mutation.key) for mutation in mutations}


def _share_records(some: Sequence[Mutation], others: Sequence[Mutation]) -> bool:
    return not _records(some).isdisjoint(_records(others))


def _is_conditional(mutations: Sequence[Mutation]) -> bool | None:
    """Whether every mutation has a condition (True) or none has (False); None for a mixture."""
    kinds = {mutation.condition is not None for mutation in mutations}
    return kinds.pop() if len(kinds) == 1 else None


def _has_unmet(mutations: Sequence[Mutation], error: NoMutationError) -> bool:
    return any(mutation.key in error.unmet for mutation in mutations)


def _answer(waiting: _Waiting, error: StorageError | None) -> None:
    if waiting.turn.done():
        return  # Cancelled: it knows no more than after an unknown outcome.
    if error is None:
        waiting.turn.set_result(False)
    else:
        waiting.turn.set_exception(error)


def _is_told_to_lead(turn: asyncio.Future[bool]) -> bool:
    return turn.done() and not turn.cancelled() and turn.exception() is None and turn.result()
