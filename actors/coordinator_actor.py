"""The coordinator actor: drives two-phase commit, one conditional insert of a state row decides.

    record the intent ─► prepare records ─► validate records ─► commit state ─► commit records ─► remove the intent
                              └──────────────┴─► abort state, obey the winner ─► roll back records

It never touches a user's record: participants do, each its own. Its memory is worth nothing: what it was doing is in
the intents (rule 7), and a restarted coordinator settles its predecessor's before anything else.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

import structlog

from actors.incarnations import Incarnations
from actors.messages import (
    CommitRecords,
    CommitRequest,
    Decision,
    Health,
    Partition,
    Prepare,
    Rollback,
    Settle,
    Share,
    Trouble,
    Validate,
    Verdict,
)
from actors.pruning import prune_forever
from actors.runtime import Mailroom, Placement, actor_name
from actors.timing import Timing
from actors.work import trouble_of
from infra.clock import Clock
from infra.consensus_commit.coordinator import CoordinatorStates, StateRow
from infra.consensus_commit.errors import UnknownTransactionStatusError
from infra.consensus_commit.intents import Intent, IntentLog
from infra.consensus_commit.states import TransactionState
from infra.consensus_commit.sweeper import Turns
from infra.failpoints import reach
from infra.storage.errors import StorageError, UnavailableStorageError
from infra.tracing import ABORT, COMMIT, COMMIT_RECORDS, COMMIT_STATE, OFF, PREPARE, VALIDATE, Attributes, Tracer
from schemas.partitioning import shard_of

log = structlog.get_logger()

SWEPT_AT_ONCE = 64

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 2.0
"""Between questions to a state table that does not answer."""

MAX_AT_WORK = 1_024
"""How many transactions are prepared, decided or brought to rest at a time; further ones wait for their turn.

Homes wait for a decision, and not for the records to come to rest after it. So without a bound decisions could for ever
outrun a storage that is slow, and what is left to do after them would pile up here.
"""


class CoordinatorActor:
    """One coordinator. `start` must have returned before it is asked anything."""

    def __init__(
        self,
        *,
        name: str,
        placement: Placement,
        states: CoordinatorStates,
        intents: IntentLog,
        incarnations: Incarnations,
        mailroom: Mailroom,
        clock: Clock,
        sweep_interval_s: float = 5.0,
        state_window_ms: int = 7 * 24 * 3_600_000,
        max_at_work: int = MAX_AT_WORK,
        timing: Timing,
        tracer: Tracer = OFF,
        on_sweep: Callable[[str, int, int | None], None] = lambda coordinator, pending, oldest_ms: None,
        on_pruned: Callable[[str, int], None] = lambda table, rows: None,
    ) -> None:
        self.name = name
        self.incarnation = ""
        self._tracer = tracer
        self._placement = placement
        self._states = states
        self._intents = intents
        self._incarnations = incarnations
        self._mailroom = mailroom
        self._clock = clock
        self._sweep_interval_s = sweep_interval_s
        self._state_window_ms = state_window_ms
        self._timing = timing
        self._on_sweep = on_sweep
        self._on_pruned = on_pruned
        self._predecessors: frozenset[str] = frozenset()
        self._active: set[str] = set()
        self._first_seen_s: dict[str, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining = False
        self._room = asyncio.Semaphore(max_at_work)
        self._housekeeping: list[asyncio.Task[None]] = []
        self._turns = Turns()
        self._sweeping = asyncio.Lock()

    async def start(self) -> None:
        """Create the coordinator's tables, register, and begin to settle what predecessors left."""
        await self._states.create_tables()
        await self._intents.create_tables()
        await self._incarnations.create_tables()
        self._predecessors = frozenset(await self._incarnations.of(self.name))
        self.incarnation = await self._incarnations.register(self.name)
        self._housekeeping = [asyncio.ensure_future(self._sweep_forever())]
        if self.name == actor_name("coordinator", 0):  # One is enough: each would read the whole table.
            self._housekeeping.append(asyncio.ensure_future(prune_forever(self.name, self.prune, self._clock)))

    async def stop(self) -> None:
        """Let running commits bring their records to rest, then end."""
        for task in self._housekeeping:
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=5)

    async def drain(self, within_s: list[float]) -> list[bool]:
        """Decide nothing new, and wait so long for what is at work; whether all of it has ended.

        What is asked meanwhile is rolled back and answered FORGOTTEN, so that its home tries again.
        """
        self._draining = True
        until_s = self._clock.monotonic_s() + max(within_s)
        while self._active and self._clock.monotonic_s() < until_s:  # noqa: ASYNC110 - once, before an end
            await asyncio.sleep(self._timing.drain_poll_s)
        return [not self._active for _ in within_s]

    async def health(self, items: list[None]) -> list[Health]:
        return [Health(self.name, self.incarnation, os.getpid(), len(self._active)) for _ in items]

    async def commit(self, requests: list[CommitRequest]) -> list[Decision]:
        """Decide each request: committed at a time, or not and why."""
        return list(await asyncio.gather(*(self._commit(request) for request in requests)))

    async def _commit(self, request: CommitRequest) -> Decision:
        with self._tracer.under(request.trace, COMMIT, attributes=_told(request.tx_id, request.shares)) as span:
            decision = await self._decided(request)
            if decision.trouble is not None:
                span.fail(decision.trouble)
            return decision

    async def _decided(self, request: CommitRequest) -> Decision:
        if self._draining:
            await self._roll_back(request)
            return Decision(trouble=Trouble.FORGOTTEN, detail=f"{self.name} is being restarted")
        self._active.add(request.tx_id)
        keep_active = False
        await self._room.acquire()
        try:
            writers = [s for s in request.shares if s.has_writes and request.drop_writes_except in ("", s.actor)]
            partitions = tuple(partition for share in writers for partition in share.partitions)
            intent = self._intent(request, writers, partitions)
            try:
                if writers:
                    await self._intents.record([intent])
            except Exception as error:
                await self._roll_back(request)
                trouble = trouble_of(error)
                return Decision(trouble=trouble.trouble, detail=trouble.detail)
            try:
                verdict = await self._forward(request, writers)
            except Exception as error:  # what the participants have done is unknown then
                log.exception("preparing failed", tx_id=request.tx_id)
                verdict = Verdict(Trouble.LOST, str(error))
            if verdict.trouble is None:
                winner, verdict = await self._decide(request.tx_id, writers)
                if winner.state is TransactionState.COMMITTED:
                    keep_active = True
                    self._spawn(self._commit_records(request, partitions, winner))
                    return Decision(committed_at_ms=winner.created_at_ms)
            await self._abort(request, intent, told=verdict)
            return Decision(trouble=verdict.trouble, detail=verdict.detail)
        finally:
            if not keep_active:
                self._end(request)

    def _end(self, request: CommitRequest) -> None:
        self._active.discard(request.tx_id)
        self._room.release()

    async def _forward(self, request: CommitRequest, writers: list[Share]) -> Verdict:
        """Prepare, then validate: the first trouble, or none."""
        prepared_at_ms = self._clock.now_ms()
        await reach("coordinator.before_prepare")
        with self._tracer.child(PREPARE, attributes=_told(request.tx_id, writers)) as span:
            trace = span.context
            verdict = _worst(
                await self._ask_all(
                    "prepare",
                    {s.actor: Prepare(request.tx_id, s.incarnation, s.calls, prepared_at_ms, trace) for s in writers},
                )
            )
            if verdict.trouble is not None:
                span.fail(verdict.trouble)
                return verdict
        await reach("coordinator.after_prepare")
        readers = [
            share
            for share in request.shares
            if share.needs_validation or request.drop_writes_except not in ("", share.actor)
        ]
        if not readers:
            return Verdict()
        with self._tracer.child(VALIDATE, attributes=_told(request.tx_id, readers)) as span:
            asked = {
                share.actor: Validate(
                    request.tx_id,
                    share.incarnation,
                    share.calls,
                    drop_writes=request.drop_writes_except not in ("", share.actor),
                    trace=span.context,
                )
                for share in readers
            }
            verdict = _worst(await self._ask_all("validate", asked))
            if verdict.trouble is not None:
                span.fail(verdict.trouble)
            return verdict

    async def _decide(self, tx_id: str, writers: list[Share]) -> tuple[StateRow, Verdict]:
        """Put COMMITTED if absent, and say who won, with the verdict if it was not us. Never guesses.

        Storage that cannot serve is waited for: whoever loses patience first has put ABORTED by then, and wins.
        """
        committed_at_ms = self._clock.now_ms()
        committed = StateRow(tx_id, TransactionState.COMMITTED, committed_at_ms)
        if not writers:
            return committed, Verdict()  # nothing to decide about
        aborted = Verdict(Trouble.CONFLICT, "aborted by recovery")
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                with self._tracer.child(COMMIT_STATE, attributes={"concord.tx_id": tx_id}):
                    await self._states.commit_state(tx_id, committed_at_ms)
                return committed, Verdict()
            except (UnknownTransactionStatusError, UnavailableStorageError) as error:
                log.warning("the state table does not answer", tx_id=tx_id, error=str(error))
                aborted = Verdict(Trouble.UNAVAILABLE, "aborted by recovery while storage could not serve")
                pause_s = await _pause(pause_s)
            except Exception as error:  # of whatever kind: committed or not, only the row knows
                log.warning("committing was refused", tx_id=tx_id, error=str(error))
                return await self._obey(tx_id), aborted

    async def _obey(self, tx_id: str) -> StateRow:
        """Put ABORTED if absent and return whatever the row says (rule 6); waits for storage as long as it takes."""
        return await self._until_known(lambda: self._states.abort_state(tx_id))

    async def _until_known(self, ask: Callable[[], Awaitable[StateRow]]) -> StateRow:
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                return await ask()
            except (UnknownTransactionStatusError, StorageError) as error:
                log.warning("the state table does not answer", error=str(error))
                pause_s = await _pause(pause_s)

    async def _commit_records(
        self, request: CommitRequest, partitions: tuple[Partition, ...], winner: StateRow
    ) -> None:
        """After the answer is out: bring records to rest, then remove the intent; what fails is left to the sweeper."""
        try:
            await reach("coordinator.before_commit_records")
            with self._tracer.child(COMMIT_RECORDS, attributes=_told(request.tx_id, request.shares)) as span:
                message = CommitRecords(request.tx_id, winner.created_at_ms, span.context)
                done = await self._ask_all("commit", {share.actor: message for share in request.shares})
            if partitions and (all(answer is True for answer in done) or await self._settle(winner, partitions)):
                await self._intents.remove(self.name, [request.tx_id])
        except Exception as error:
            log.warning("left to the sweeper", tx_id=request.tx_id, error=str(error))
        finally:
            self._end(request)

    async def _abort(self, request: CommitRequest, intent: Intent, *, told: Verdict) -> None:
        """Put ABORTED, then roll back. The intent goes only when nothing of this transaction can arrive any more."""
        if not intent.partitions:
            await self._roll_back(request)
            return
        winner = await self._obey(request.tx_id)
        assert winner.state is TransactionState.ABORTED, "only this coordinator commits its transactions"
        done = await self._roll_back(request)
        all_answered = told.trouble is not Trouble.LOST and all(answer is True for answer in done)
        try:
            if all_answered:
                # Every participant has answered its prepare and undone it: no write of this transaction is under way,
                # so the row that would refuse it has done its work.
                await self._states.forget(winner)
                await self._intents.remove(self.name, [request.tx_id])
            elif await self._settle(winner, intent.partitions):
                await self._intents.mark_aborted([intent])
        except StorageError as error:
            log.warning("left to the sweeper", tx_id=request.tx_id, error=str(error))

    async def _roll_back(self, request: CommitRequest) -> list[object]:
        with self._tracer.child(ABORT, attributes=_told(request.tx_id, request.shares)) as span:
            message = Rollback(request.tx_id, span.context)
            return await self._ask_all("rollback", {share.actor: message for share in request.shares})

    async def _ask_all(self, method: str, messages: Mapping[str, object]) -> list[object]:
        """One answer for each participant; of one that was lost, or broke, what it did is unknown: LOST."""

        async def ask(actor: str, message: object) -> object:
            try:
                return await self._mailroom.ask(actor, method, message)
            except Exception as error:
                return Verdict(Trouble.LOST, f"{type(error).__name__}: {error}")

        return list(await asyncio.gather(*(ask(actor, message) for actor, message in messages.items())))

    def _intent(self, request: CommitRequest, writers: list[Share], partitions: tuple[Partition, ...]) -> Intent:
        return Intent(
            tx_id=request.tx_id,
            coordinator=self.name,
            coordinator_incarnation=self.incarnation,
            home=request.home,
            home_incarnation=request.home_incarnation,
            partitions=partitions,
            participants=tuple(f"{share.actor}/{share.incarnation}" for share in writers),
            created_at_ms=self._clock.now_ms(),
        )

    # ---- settling what was left ------------------------------------------------------------------------------

    async def _sweep_forever(self) -> None:
        while True:
            try:
                await self.sweep()
            except StorageError as error:
                log.warning("the sweep waits for storage", error=str(error))
            except Exception:
                log.exception("the sweep failed", actor=self.name)
            await asyncio.sleep(self._sweep_interval_s)

    async def prune(self) -> int:
        """Forget state rows older than the window that nobody can need again (rule 8); returns how many."""
        gone = {intent.tx_id for intent in await self._intents.all() if await self._writers_gone(intent)}
        pruned = await self._states.prune(
            self._intents, older_than_ms=self._state_window_ms, writer_is_gone=lambda intent: intent.tx_id in gone
        )
        self._on_pruned(self._states.table.full_name, pruned.committed + pruned.aborted)
        return pruned.committed + pruned.aborted

    async def sweep(self) -> int:
        """Settle every intent that no living transaction of this coordinator holds; returns how many are left.

        One sweep at a time: another would put ABORTED for an intent that the first has just seen the end of, and leave
        a row that no intent leads to.
        """
        async with self._sweeping:
            return await self._sweep()

    async def _sweep(self) -> int:
        living = frozenset(self._active)  # a transaction that ends while we read is settled by itself
        intents = await self._ours()
        in_doubt = [intent.created_at_ms for intent in intents if not intent.aborted]  # those are settled
        self._on_sweep(self.name, len(in_doubt), min(in_doubt, default=None))
        now_s = self._clock.monotonic_s()
        self._first_seen_s = {intent.tx_id: self._first_seen_s.get(intent.tx_id, now_s) for intent in intents}
        due = self._turns.take(
            [
                intent
                for intent in intents
                if intent.tx_id not in living and intent.tx_id not in self._active and self._due(intent)
            ]
        )
        left = 0
        for first in range(0, len(due), SWEPT_AT_ONCE):
            batch = due[first : first + SWEPT_AT_ONCE]
            settled = await asyncio.gather(*map(self._settle_intent, batch), return_exceptions=True)
            for intent, outcome in zip(batch, settled, strict=True):
                left += outcome is not True
                if isinstance(outcome, Exception):  # one that cannot be settled must not keep the others in doubt
                    log.error("settling waits", actor=self.name, tx_id=intent.tx_id, exc_info=outcome)
                elif isinstance(outcome, BaseException):
                    raise outcome
        return left

    async def _ours(self) -> list[Intent]:
        """This coordinator's intents; coordinator-0 also takes those of coordinators that are placed no longer.

        Whoever else records intents (views, programs of others) sees to them itself.
        """
        if self.name != actor_name("coordinator", 0):
            return await self._intents.of(self.name)
        others = {actor_name("coordinator", number) for number in range(1, self._placement.coordinators)}
        of_coordinators = [each for each in await self._intents.all() if _is_coordinator(each.coordinator)]
        return [intent for intent in of_coordinators if intent.coordinator not in others]

    def _due(self, intent: Intent) -> bool:
        """Our own and our predecessors' intents at once; others when they have been seen for a transaction's lifetime.

        Others are coordinators of other names, and a successor of ours, if we were taken for dead.
        """
        return (
            intent.coordinator_incarnation == self.incarnation
            or intent.coordinator_incarnation in self._predecessors
            or self._seen_for_a_lifetime(intent)
        )

    def _seen_for_a_lifetime(self, intent: Intent) -> bool:
        """Age is what this process observed on its own steady clock, never a difference of two machines' clocks."""
        seen_s = self._clock.monotonic_s() - self._first_seen_s[intent.tx_id]
        return seen_s * 1000 > self._timing.transaction_lifetime_ms

    async def _settle_intent(self, intent: Intent) -> bool:
        """Whether nothing of it is in doubt now. An ABORTED row goes only when no write can arrive any more (rule 8):
        its writers have let go of it or are gone, and what they sent has had time to be served or dropped."""
        winner = await self._obey(intent.tx_id)
        if not await self._settle(winner, intent.partitions):
            return False
        if winner.state is TransactionState.COMMITTED:
            await self._intents.remove(intent.coordinator, [intent.tx_id])
        elif self._seen_for_a_lifetime(intent) and await self._writers_gone(intent):
            await self._states.forget(winner)
            await self._intents.remove(intent.coordinator, [intent.tx_id])
        elif not intent.aborted:
            await self._intents.mark_aborted([intent])
        return True

    async def _writers_gone(self, intent: Intent) -> bool:
        """Rule 8: is every process that could still write for this transaction known to be gone, or known better?"""
        writers = [(intent.coordinator, intent.coordinator_incarnation)]
        writers += [(actor, incarnation) for actor, _, incarnation in (p.partition("/") for p in intent.participants)]
        for actor, incarnation in writers:
            if incarnation == self.incarnation:
                continue  # we are not working on it: it is not active
            if not await self._incarnations.known_gone(actor, incarnation) and not await self._has_let_go(
                actor, incarnation, intent.tx_id
            ):
                return False
        return True

    async def _has_let_go(self, actor: str, incarnation: str, tx_id: str) -> bool:
        """Whether a living participant, the same incarnation still, says that nothing of a transaction is under way."""
        try:
            asked = self._mailroom.ask(actor, "health", None)
            health: Health = await asyncio.wait_for(asked, self._timing.health_timeout_s)
        except Exception:
            return False
        return health.incarnation == incarnation

    async def _settle(self, winner: StateRow, partitions: Iterable[Partition]) -> bool:
        """Ask whoever owns each partition now to bring the transaction's records there to rest."""
        by_owner: dict[str, list[Partition]] = {}
        for partition in partitions:
            namespace, _, values = partition
            shard = shard_of(
                int(values[0] or 0), buckets=self._placement.buckets, shards=self._placement.shards[namespace]
            )
            by_owner.setdefault(actor_name(namespace, shard), []).append(partition)
        committed = winner.state is TransactionState.COMMITTED
        messages: dict[str, object] = {
            owner: Settle(winner.tx_id, committed, winner.created_at_ms, tuple(theirs))
            for owner, theirs in by_owner.items()
        }
        return all(answer is True for answer in await self._ask_all("settle", messages))

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _is_coordinator(name: str) -> bool:
    return name.rpartition("-")[0] == "coordinator"


def _told(tx_id: str, shares: Sequence[Share]) -> Attributes:
    """What a span tells of a transaction."""
    return {"concord.tx_id": tx_id, "concord.participants": len(shares)}


async def _pause(pause_s: float) -> float:
    """Sleep a random while around `pause_s`; the next pause."""
    await asyncio.sleep(pause_s * (0.5 + random.random()))
    return min(pause_s * 2, LONGEST_PAUSE_S)


def _worst(verdicts: list[object]) -> Verdict:
    """The verdict that decides: a lost participant weighs most, since its write may still be under way."""
    troubled = [v for v in verdicts if isinstance(v, Verdict) and v.trouble is not None]
    if not troubled:
        return Verdict()
    return next((v for v in troubled if v.trouble is Trouble.LOST), troubled[0])
