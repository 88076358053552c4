"""The domain actor: owns a shard of one domain, as home of its commands and participant of others' transactions.

Every method takes a list and answers with a list, one reply for each item, in order. The actor is a cache and a
serializer; storage is the truth. It may be killed at any instant, and may for a while exist twice.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

import structlog

from actors.domain import Domain, carry_stored_columns
from actors.due_rows import TIMERS, DueRows
from actors.home import Home
from actors.incarnations import Incarnations
from actors.messages import (
    CommitRecords,
    Deferred,
    Health,
    Invocation,
    InvocationReply,
    Prepare,
    Rollback,
    Settle,
    Ticket,
    Trouble,
    Validate,
    Verdict,
)
from actors.outcomes import outcomes_of, prune_outcomes
from actors.participation import Participation
from actors.pausing import PauseRenewal, PauseRequest
from actors.pruning import prune_forever
from actors.runtime import Mailroom, Placement, actor_name
from actors.timing import Timing
from infra.clock import Clock
from infra.consensus_commit.coordinator import CoordinatorStates
from infra.consensus_commit.metadata import transactional
from infra.consensus_commit.recovery import RecoveryHandler
from infra.consensus_commit.retry import RetryPolicy
from infra.storage.errors import StorageError
from infra.storage.port import Storage
from infra.tracing import OFF, Tracer
from schemas.envelope import RawMessage
from schemas.outcome import Answer

log = structlog.get_logger()

T = TypeVar("T")


class DomainActor:
    """One shard of `domain`. `start` must have returned before it is asked anything."""

    def __init__(
        self,
        *,
        domain: Domain,
        shard: int,
        placement: Placement,
        storage: Storage,
        states: CoordinatorStates,
        incarnations: Incarnations,
        mailroom: Mailroom,
        clock: Clock,
        retry: RetryPolicy,
        max_command_bytes: int,
        outcome_window_ms: int,
        timing: Timing,
        on_answer: Callable[[str, Answer, float], None] = lambda domain, answer, seconds: None,
        on_committed: Callable[[str], None] = lambda domain: None,
        on_trouble: Callable[[str, Trouble], None] = lambda domain, trouble: None,
        on_recovered: Callable[[str], None] = lambda kind: None,
        tracer: Tracer = OFF,
        on_pruned: Callable[[str, int], None] = lambda table, rows: None,
        on_in_hand: Callable[[str, int, int], None] = lambda actor, commands, limit: None,
    ) -> None:
        self.name = actor_name(domain.name, shard)
        self.incarnation = ""
        self._domain = domain
        self._buckets = placement.buckets_of(domain.name, shard)
        self._placement = placement
        self._storage = storage
        self._states = states
        self._incarnations = incarnations
        self._mailroom = mailroom
        self._clock = clock
        self._retry = retry
        self._max_command_bytes = max_command_bytes
        self._outcome_window_ms = outcome_window_ms
        self._timing = timing
        self._on_answer = on_answer
        self._on_committed = on_committed
        self._on_pruned = on_pruned
        self._on_in_hand = on_in_hand
        self._on_trouble = on_trouble
        self._tracer = tracer
        self._recovery = RecoveryHandler(
            storage,
            states,
            clock,
            transaction_lifetime_ms=timing.transaction_lifetime_ms,
            on_recovered=on_recovered,
        )
        self._due_rows = DueRows(storage, self._recovery, self._buckets)
        self._tasks: list[asyncio.Task[None]] = []
        self._participation: Participation | None = None
        self._home: Home | None = None

    async def start(self) -> None:
        """Create the domain's tables where they are absent, register this incarnation, begin housekeeping."""
        outcomes = outcomes_of(self._domain.name)
        tables = (*self._domain.tables, outcomes)
        carry_stored_columns(tables, await self._storage.tables())
        for table in tables:
            await self._storage.create_table(transactional(table.schema))
        if self._domain.due is not None:
            await self._storage.create_table(TIMERS)
        await self._incarnations.create_tables()
        self.incarnation = await self._incarnations.register(self.name)
        self._participation = Participation(
            actor=self.name,
            incarnation=self.incarnation,
            domain=self._domain,
            tables=tables,
            placement=self._placement,
            storage=self._storage,
            states=self._states,
            recovery=self._recovery,
            mailroom=self._mailroom,
            clock=self._clock,
            timing=self._timing,
            tracer=self._tracer,
        )
        self._home = Home(
            domain=self._domain,
            participation=self._participation,
            placement=self._placement,
            mailroom=self._mailroom,
            states=self._states,
            clock=self._clock,
            retry=self._retry,
            timing=self._timing,
            max_command_bytes=self._max_command_bytes,
            on_answer=self._on_answer,
            on_committed=self._on_committed,
            on_trouble=self._on_trouble,
            tracer=self._tracer,
        )
        self._tasks = [
            asyncio.ensure_future(self._every(self._timing.tidy_interval_s, self.tidy)),
            asyncio.ensure_future(prune_forever(self.name, self.prune, self._clock)),
        ]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._participation is not None:
            self._participation.close_all()
        await self._recovery.close()

    # ---- as home ---------------------------------------------------------------------------------------------

    async def execute(self, batch: list[RawMessage]) -> list[Answer]:
        return await self._as_home.execute(batch)

    async def due(self, times_ms: list[int]) -> list[list[tuple[str, str, bytes, str]]]:
        """For each time: (command id, type, JSON body, routing key) of what the domain's clock asks for."""
        if self._domain.due is None or self._as_home.pausing.holds:
            return [[] for _ in times_ms]
        found = []
        async with self._as_home.pausing.command():
            for now_ms in times_ms:
                commands = await self._domain.due(self._due_rows, now_ms)
                found.append([(id, c.type_name(), c.model_dump_json().encode(), c.routing_key) for id, c in commands])
        return found

    async def pause(self, requests: list[PauseRequest]) -> list[bool]:
        return [await self._as_home.pausing.pause(request) for request in requests]

    async def renew_pause(self, renewals: list[PauseRenewal]) -> list[bool]:
        return [self._as_home.pausing.renew(renewal) for renewal in renewals]

    async def resume(self, names: list[str]) -> list[bool]:
        return [self._as_home.pausing.resume(name) for name in names]

    # ---- as participant --------------------------------------------------------------------------------------

    async def invoke(self, batch: list[Invocation]) -> list[InvocationReply | Deferred]:
        return await self._as_participant.invoke(batch)

    async def collect(self, batch: list[Ticket]) -> list[InvocationReply]:
        return list(await asyncio.gather(*map(self._as_participant.collect, batch)))

    async def prepare(self, batch: list[Prepare]) -> list[Verdict]:
        return await _each(map(self._as_participant.prepare, batch), Verdict(Trouble.BROKEN, "prepare failed"))

    async def validate(self, batch: list[Validate]) -> list[Verdict]:
        return await _each(map(self._as_participant.validate, batch), Verdict(Trouble.BROKEN, "validate failed"))

    async def commit(self, batch: list[CommitRecords]) -> list[bool]:
        return await _each(map(self._as_participant.commit, batch), False)

    async def rollback(self, batch: list[Rollback]) -> list[bool]:
        return await _each(map(self._as_participant.rollback, batch), False)

    async def settle(self, batch: list[Settle]) -> list[bool]:
        return await _each(map(self._as_participant.settle, batch), False)

    # ---- housekeeping ----------------------------------------------------------------------------------------

    async def drain(self, within_s: list[float]) -> list[bool]:
        """Begin no new work, and wait so long for what is at work; whether all of it has ended.

        From then on commands are answered ActorBusyError, and transactions that are new here are sent back to their
        homes. There is no way back but the restart for which this is done; one at any other moment costs repetition,
        and nothing else.
        """
        self._as_home.draining = self._as_participant.draining = True
        until_s = self._clock.monotonic_s() + max(within_s)
        while not (empty := self._is_empty()) and self._clock.monotonic_s() < until_s:  # noqa: ASYNC110 - once
            await asyncio.sleep(self._timing.drain_poll_s)
        return [empty for _ in within_s]

    def _is_empty(self) -> bool:
        return not self._as_home.open_commands and not self._as_participant.open_workspaces

    async def health(self, batch: list[Any]) -> list[Health]:
        busy = self._as_participant.open_workspaces
        return [Health(self.name, self.incarnation, os.getpid(), busy) for _ in batch]

    async def tidy(self) -> None:
        """Say how much is in hand, and let go of transactions that nobody cares for any more."""
        self._on_in_hand(self.name, *self._as_home.in_hand)
        await self._as_participant.tidy()

    async def prune(self) -> int:
        """Delete this shard's outcomes that are older than the window; returns how many."""
        before_ms = self._clock.now_ms() - self._outcome_window_ms
        table = outcomes_of(self._domain.name)
        pruned = await prune_outcomes(self._storage, table, self._buckets, before_ms=before_ms)
        self._on_pruned(table.full_name, pruned)
        return pruned

    async def _every(self, interval_s: float, job: Callable[[], Any]) -> None:
        while True:
            await asyncio.sleep(interval_s)
            try:
                await job()
            except StorageError as error:
                log.warning("housekeeping waits for storage", actor=self.name, error=str(error))
            except Exception:
                log.exception("housekeeping failed", actor=self.name)

    @property
    def _as_home(self) -> Home:
        assert self._home is not None, "start() comes first"
        return self._home

    @property
    def _as_participant(self) -> Participation:
        assert self._participation is not None, "start() comes first"
        return self._participation


async def _each(work: Iterable[Awaitable[T]], otherwise: T) -> list[T]:
    """One reply for each item; what failed as nothing should is logged and answered `otherwise`, alone."""
    replies: list[T] = []
    for reply in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(reply, Exception):
            log.error("an item of a batch failed", exc_info=reply)
        elif isinstance(reply, BaseException):
            raise reply
        replies.append(otherwise if isinstance(reply, BaseException) else reply)
    return replies
