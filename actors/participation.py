"""An actor's side of transactions: the calls it runs for them, and the fate of its own records.

A transaction has a workspace here from its first call to its decision: the records it read and wrote, the keys it
owns, and how many calls it has made. A workspace lives in memory only. If this actor restarts, prepare names an
incarnation that is gone and is answered FORGOTTEN (rule 4); nothing was written yet, so nothing is lost but time.

Messages may be lost, come late, or come twice. What was ended is remembered for a while, so that a late call does not
open it again; a call that comes twice runs once; and calls that come before their predecessors wait for these only as
long as the workspace lives.

A transaction that is committed lets go of its keys before its records say so. Whoever reads them next is at this actor
and finds the commit known (`RecoveryHandler`), so it need not wait; and so the records may wait for company, which is
one statement for many (`PartitionGate`). Until they are at rest the coordinator keeps the intent.

Never writes a state row, except to put ABORTED for a transaction whose coordinator fell silent (rule 6).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog

from actors.domain import Domain, Refused, Table
from actors.messages import (
    Age,
    Call,
    CallResult,
    CommitRecords,
    Deferred,
    Health,
    Invocation,
    InvocationReply,
    Prepare,
    Rollback,
    Settle,
    Share,
    Ticket,
    Trouble,
    Validate,
    Verdict,
)
from actors.ownership import Owner, Ownership
from actors.runtime import ActorLostError, Mailroom, Placement
from actors.timing import Timing
from actors.work import Calls, Work, trouble_of
from infra.clock import Clock
from infra.consensus_commit.coordinator import CoordinatorStates, StateRow
from infra.consensus_commit.errors import TransactionError
from infra.consensus_commit.participant import ParticipantTransaction
from infra.consensus_commit.recovery import RecoveryHandler
from infra.consensus_commit.states import Isolation, TransactionState
from infra.failpoints import reach
from infra.recent import Recent
from infra.storage.errors import StorageError
from infra.storage.port import Storage
from infra.tracing import HANDLE, OFF, PARTICIPATE, Span, Tracer
from schemas.message import Command

log = structlog.get_logger()

ENDED_REMEMBERED_S = 60.0
ENDED_REMEMBERED = 10_000
"""How long a participant remembers that a transaction has ended, and of how many at most."""


@dataclass(eq=False)
class Workspace:
    """One transaction here. `calls` counts the calls that were begun; those of one message run without a break."""

    tx_id: str
    home: str
    home_incarnation: str
    records: ParticipantTransaction
    owner: Owner
    touched_at_s: float
    calls: int = 0
    calling: bool = False
    running: int = 0
    closed: bool = False
    may_have_written: bool = False
    at_rest: bool = False
    """Whether every record was seen committed."""
    next_turn: list[asyncio.Future[None]] = field(default_factory=list)
    deferred: dict[int, asyncio.Task[InvocationReply]] = field(default_factory=dict)
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """At its home, whether the handler writes or a call of it to the same actor runs."""
    phase: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One phase at a time: a roll-back that overtook its prepare would leave that prepare's records behind."""

    async def take_turn(self, first: int) -> bool:
        """Wait until the calls before number `first` have run; whether that one is next."""
        while not self.closed and (self.calling or self.calls < first):
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.next_turn.append(turn)
            await turn
        self.calling = not self.closed and self.calls == first
        return self.calling

    def end_turn(self) -> None:
        self.calling = False
        self.wake()

    def wake(self) -> None:
        waiting, self.next_turn = self.next_turn, []
        for turn in waiting:
            if not turn.done():
                turn.set_result(None)


class Participation:
    """`commands` maps the type names of this domain's commands to their models."""

    def __init__(
        self,
        *,
        actor: str,
        incarnation: str,
        domain: Domain,
        tables: Sequence[Table[Any]],
        placement: Placement,
        storage: Storage,
        states: CoordinatorStates,
        recovery: RecoveryHandler,
        mailroom: Mailroom,
        clock: Clock,
        timing: Timing,
        tracer: Tracer = OFF,
    ) -> None:
        self._tracer = tracer
        self.actor = actor
        self.incarnation = incarnation
        self.domain = domain
        self.placement = placement
        self.ownership = Ownership(patience_s=timing.patience_s)
        self._commands: dict[str, type[Command]] = {model.type_name(): model for model in domain.handlers}
        self._storage = storage
        self._states = states
        self._recovery = recovery
        self._mailroom = mailroom
        self._clock = clock
        self._timing = timing
        self._workspaces: dict[str, Workspace] = {}
        self._coming_to_rest: set[asyncio.Task[None]] = set()
        """Transactions that are committed and closed here, and whose records do not all say so yet."""
        self._ended: Recent[str, None] = Recent(clock, for_s=ENDED_REMEMBERED_S, most=ENDED_REMEMBERED)
        self._home_incarnations: dict[str, str] = {}
        self.draining = False
        """Whether transactions that are new here are sent back to their homes, which try again."""
        self._schemas = {table.full_name: table.schema for table in tables}

    @property
    def open_workspaces(self) -> int:
        """Transactions that this actor has in hand, those included whose records are just coming to rest."""
        return len(self._workspaces) + len(self._coming_to_rest)

    def open(self, tx_id: str, *, home: str, home_incarnation: str, age: Age) -> Workspace:
        """A workspace for a transaction that is new here."""
        records = ParticipantTransaction(
            tx_id,
            isolation=Isolation.SERIALIZABLE,
            storage=self._storage,
            recovery=self._recovery,
            clock=self._clock,
        )
        workspace = Workspace(tx_id, home, home_incarnation, records, Owner(age), self._clock.monotonic_s())
        self._workspaces[tx_id] = workspace
        return workspace

    def work(
        self, workspace: Workspace, *, command_id: str, routing_key: str, now_ms: int, calls: Calls | None = None
    ) -> Work:
        return Work(
            records=workspace.records,
            ownership=self.ownership,
            owner=workspace.owner,
            placement=self.placement,
            command_id=command_id,
            routing_key=routing_key,
            now_ms=now_ms,
            calls=calls,
            writing=workspace.writing if calls is not None else None,
        )

    def share(self, workspace: Workspace) -> Share:
        return Share(
            actor=self.actor,
            incarnation=self.incarnation,
            calls=workspace.calls,
            has_writes=workspace.records.has_writes,
            needs_validation=workspace.records.needs_validation,
            partitions=tuple(workspace.records.written_partitions()),
        )

    def close(self, workspace: Workspace) -> None:
        """Forget a transaction and let others have its keys. What still runs for it changes nothing any more."""
        workspace.closed = True
        self.ownership.release(workspace.owner)
        workspace.wake()
        if self._workspaces.get(workspace.tx_id) is workspace:
            del self._workspaces[workspace.tx_id]
        self._ended.put(workspace.tx_id, None)

    def close_all(self) -> None:
        """Let go of everything: this actor stops."""
        for workspace in list(self._workspaces.values()):
            self.close(workspace)

    # ---- what homes and coordinators ask ---------------------------------------------------------------------

    async def invoke(self, batch: list[Invocation]) -> list[InvocationReply | Deferred]:
        """Run the calls of each item; what waits for another transaction's keys is answered Deferred."""
        tasks = [asyncio.ensure_future(self._answered(invocation)) for invocation in batch]
        await asyncio.wait(tasks, timeout=self._timing.deferred_after_s)
        replies: list[InvocationReply | Deferred] = []
        for invocation, task in zip(batch, tasks, strict=True):
            workspace = self._workspaces.get(invocation.tx_id)
            if task.done():
                replies.append(task.result())
            elif workspace is None:
                replies.append(self._forgotten(len(invocation.calls)))
            else:
                workspace.deferred[invocation.first] = task
                replies.append(Deferred())
        return replies

    async def collect(self, ticket: Ticket) -> InvocationReply:
        """The reply to calls that were deferred, when they are done."""
        workspace = self._workspaces.get(ticket.tx_id)
        task = workspace.deferred.pop(ticket.first, None) if workspace is not None else None
        return self._forgotten(ticket.calls) if task is None else await asyncio.shield(task)

    def _forgotten(self, calls: int) -> InvocationReply:
        return self._in_trouble(calls, Trouble.FORGOTTEN, self.actor)

    def _in_trouble(self, calls: int, trouble: Trouble, detail: str) -> InvocationReply:
        share = Share(self.actor, self.incarnation, 0, False, False, ())
        return InvocationReply(share, (CallResult(trouble=trouble, trouble_detail=detail),) * calls)

    async def _answered(self, invocation: Invocation) -> InvocationReply:
        """The reply to one item: whatever goes wrong with it is no business of the other items of its batch."""
        try:
            return await self._invoke(invocation)
        except Exception as error:
            log.exception("calls failed", tx_id=invocation.tx_id, command_id=invocation.command_id)
            return self._in_trouble(len(invocation.calls), Trouble.BROKEN, f"{type(error).__name__}: {error}")

    async def _invoke(self, invocation: Invocation) -> InvocationReply:
        """Run the calls of one turn, in order, after those of earlier turns."""
        self._notice_home(invocation.home, invocation.home_incarnation)
        workspace = self._workspaces.get(invocation.tx_id)
        if workspace is None:
            # Later turns: we restarted, or gave the transaction up. A first one: it was on its way for too long, or
            # we are about to be restarted. The home's own transactions are opened by the home, which takes none then.
            if invocation.first > 0 or invocation.tx_id in self._ended or self.draining:
                return self._forgotten(len(invocation.calls))
            workspace = self.open(
                invocation.tx_id,
                home=invocation.home,
                home_incarnation=invocation.home_incarnation,
                age=invocation.age,
            )
        workspace.running += 1
        try:
            if not await workspace.take_turn(invocation.first):
                return self._forgotten(len(invocation.calls))
            try:
                results = []
                for call in invocation.calls:
                    async with workspace.writing:
                        results.append(await self._run(workspace, invocation, call))
            finally:
                workspace.end_turn()
        finally:
            workspace.running -= 1
            workspace.touched_at_s = self._clock.monotonic_s()
        return InvocationReply(self.share(workspace), tuple(results))

    async def _run(self, workspace: Workspace, invocation: Invocation, call: Call) -> CallResult:
        with self._tracer.under(invocation.trace, HANDLE, call.type) as span:
            result = await self._handle(workspace, invocation, call)
            if span.recording:
                reason = result.refused or (result.trouble.value if result.trouble is not None else "")
                outcome = "refused" if result.refused else "done" if result.trouble is None else "trouble"
                span.note(
                    {
                        "concord.actor": self.actor,
                        "concord.message.type": call.type,
                        "messaging.message.id": invocation.command_id,
                        "concord.tx_id": invocation.tx_id,
                        "concord.outcome": outcome,
                        "concord.reason": reason,
                    }
                )
                if result.trouble is not None:
                    span.fail(result.trouble)
            return result

    async def _handle(self, workspace: Workspace, invocation: Invocation, call: Call) -> CallResult:
        workspace.calls += 1
        savepoint = workspace.records.savepoint()
        work = self.work(
            workspace,
            command_id=invocation.command_id,
            routing_key=invocation.routing_key,
            now_ms=invocation.now_ms,
        )
        try:
            await reach("participant.before_call")
            model = self._commands[call.type]
            command = model.model_validate_json(call.body)
            try:
                result = await self.domain.handlers[model](work, command)
            finally:
                await work.end()
            events = await work.events()
            await reach("participant.after_call")
        except Refused as refusal:
            workspace.records.restore(savepoint)
            return CallResult(refused=refusal.reason, details=json_safe(refusal.details))
        except Exception as error:
            workspace.records.restore(savepoint)
            trouble = trouble_of(error)
            if trouble.trouble is Trouble.BROKEN:
                log.exception("handler failed", type=call.type, command_id=invocation.command_id)
            return CallResult(trouble=trouble.trouble, trouble_detail=trouble.detail)
        return CallResult(result=result, events=events)

    async def prepare(self, request: Prepare) -> Verdict:
        """Write the records of exactly the calls that the coordinator names."""

        async def write(workspace: Workspace) -> None:
            workspace.may_have_written = True
            await workspace.records.prepare_records(request.prepared_at_ms)

        return await self._take_part("prepare", request, write)

    async def validate(self, request: Validate) -> Verdict:
        """Is everything that was read still so? Of a refused command the writes are dropped first (rule 3)."""

        async def read_again(workspace: Workspace) -> None:
            if request.drop_writes:
                workspace.records.drop_writes()
            await workspace.records.validate_records()

        return await self._take_part("validate", request, read_again)

    async def _take_part(
        self, phase: str, request: Prepare | Validate, step: Callable[[Workspace], Awaitable[None]]
    ) -> Verdict:
        with self._phase(phase, request) as span:
            workspace, verdict = self._look_up(request.tx_id, request.incarnation, request.calls)
            if workspace is not None:
                workspace.owner.prepared = True
                async with workspace.phase:
                    verdict = await self._verdict_of(workspace, step)
            if verdict.trouble is not None:
                span.fail(verdict.trouble)
            return verdict

    async def _verdict_of(self, workspace: Workspace, step: Callable[[Workspace], Awaitable[None]]) -> Verdict:
        if workspace.closed:
            return Verdict(Trouble.FORGOTTEN, self.actor)
        try:
            await step(workspace)
        except Exception as error:
            return _verdict(error)
        finally:
            workspace.touched_at_s = self._clock.monotonic_s()
        return Verdict()

    async def commit(self, request: CommitRecords) -> bool:
        """The transaction is committed: bring its records to rest. False if that must be tried again by `settle`."""
        with self._phase("commit", request):
            return await self._commit(request)

    async def _commit(self, request: CommitRecords) -> bool:
        workspace = self._workspaces.get(request.tx_id)
        if workspace is None:
            self._ended.put(request.tx_id, None)
            return False
        async with workspace.phase:
            if workspace.closed:
                return False
            if not workspace.may_have_written:
                self.close(workspace)
                return True
            self._states.note_committed(request.tx_id, request.committed_at_ms)
            bringing_to_rest = asyncio.ensure_future(self._bring_to_rest(workspace, request.committed_at_ms))
            self._recovery.settling(request.tx_id, bringing_to_rest)
            self._coming_to_rest.add(bringing_to_rest)
            bringing_to_rest.add_done_callback(self._coming_to_rest.discard)
            self.close(workspace)
        await bringing_to_rest
        return workspace.at_rest

    async def _bring_to_rest(self, workspace: Workspace, committed_at_ms: int) -> None:
        workspace.at_rest = await workspace.records.commit_records(committed_at_ms, at_leisure=True)

    async def rollback(self, request: Rollback) -> bool:
        """The transaction is not committed: undo its records. False if that must be tried again by `settle`."""
        with self._phase("roll back", request):
            return await self._rollback(request)

    async def _rollback(self, request: Rollback) -> bool:
        workspace = self._workspaces.get(request.tx_id)
        if workspace is None:
            self._ended.put(request.tx_id, None)
            return False
        async with workspace.phase:
            if workspace.closed:
                return False
            try:
                return not workspace.may_have_written or await workspace.records.rollback_records()
            finally:
                self.close(workspace)

    def _phase(self, name: str, request: Prepare | Validate | CommitRecords | Rollback) -> Span:
        """The span of this actor's part of a phase."""
        told = {"concord.actor": self.actor, "concord.tx_id": request.tx_id}
        return self._tracer.under(request.trace, PARTICIPATE, name, told)

    async def settle(self, request: Settle) -> bool:
        """Bring what an earlier incarnation left of a decided transaction to rest."""
        await reach("settle.before")
        state = TransactionState.COMMITTED if request.committed else TransactionState.ABORTED
        row = StateRow(request.tx_id, state, request.decided_at_ms)
        workspace = self._workspaces.get(request.tx_id)
        if workspace is not None:
            async with workspace.phase:  # after a prepare that is under way; later ones find no workspace
                self.close(workspace)
        self._ended.put(request.tx_id, None)
        try:
            for namespace, name, partition in request.partitions:
                schema = self._schemas.get(f"{namespace}.{name}")
                if schema is None:
                    log.error("a table is gone that a transaction wrote", tx_id=request.tx_id, table=name)
                    return False
                await self._recovery.settle_partition(schema, partition, request.tx_id, row)
        except (StorageError, TransactionError) as error:
            log.warning("settling waits", tx_id=request.tx_id, error=str(error))
            return False
        return True

    # ---- housekeeping ----------------------------------------------------------------------------------------

    async def tidy(self) -> None:
        """Drop workspaces whose home is gone, decide prepared ones whose coordinator fell silent."""
        now = self._clock.monotonic_s()
        doubtful: set[str] = set()
        for workspace in list(self._workspaces.values()):
            idle = now - workspace.touched_at_s
            if workspace.running or workspace.closed:
                continue
            if workspace.owner.prepared:
                if idle > self._timing.silent_after_s:
                    workspace.touched_at_s = now
                    await self._decide(workspace)
            elif idle > self._timing.abandoned_after_s:
                self.close(workspace)
            elif idle > self._timing.homes_asked_after_s:
                doubtful.add(workspace.home)
        await self._ask_homes(doubtful)

    async def _ask_homes(self, homes: Iterable[str]) -> None:
        """A home that restarted, and has said nothing since, still holds keys here."""
        for home in homes:
            try:
                health: Health = await asyncio.wait_for(
                    self._mailroom.ask_alone(home, "health", None), self._timing.health_timeout_s
                )
            except (ActorLostError, TimeoutError):
                continue  # it may only be slow; what is abandoned for long is dropped anyway
            self._notice_home(home, health.incarnation)

    async def _decide(self, workspace: Workspace) -> None:
        try:
            winner = await self._states.abort_state(workspace.tx_id)
            if winner.state is TransactionState.COMMITTED:
                await self.commit(CommitRecords(workspace.tx_id, winner.created_at_ms))
            else:
                await self.rollback(Rollback(workspace.tx_id))
        except (StorageError, TransactionError) as error:
            log.warning("a silent coordinator's transaction stays undecided", tx_id=workspace.tx_id, error=str(error))

    def _notice_home(self, home: str, incarnation: str) -> None:
        """A home that restarted has forgotten its transactions: let go of those that have not prepared."""
        if self._home_incarnations.get(home) == incarnation:
            return
        self._home_incarnations[home] = incarnation
        for workspace in list(self._workspaces.values()):
            if workspace.home == home and workspace.home_incarnation != incarnation and not workspace.owner.prepared:
                self.close(workspace)

    def _look_up(self, tx_id: str, incarnation: str, calls: int) -> tuple[Workspace | None, Verdict]:
        workspace = self._workspaces.get(tx_id)
        if workspace is None or incarnation != self.incarnation or calls != workspace.calls or workspace.calling:
            return None, Verdict(Trouble.FORGOTTEN, self.actor)
        if workspace.owner.wounded:
            return None, Verdict(Trouble.WOUNDED, self.actor)
        return workspace, Verdict()


def json_safe(value: Any) -> Any:
    """A result, or the details of a refusal, as plain JSON values, so that first and later answers are equal."""
    return None if value is None else json.loads(json.dumps(value, default=str))


def _verdict(error: Exception) -> Verdict:
    trouble = trouble_of(error)
    if trouble.trouble is Trouble.BROKEN:
        log.error("a phase failed", exc_info=error)
    return Verdict(trouble.trouble, trouble.detail)
