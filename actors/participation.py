"""An actor's side of transactions: the calls it runs for them, and the fate of its own records.

A transaction has a workspace here from its first call to its decision: the records it read and wrote, the keys it
owns, and how many calls it has made. A workspace lives in memory only. If this actor restarts, prepare names an
incarnation that is gone and is answered FORGOTTEN (rule 4); nothing was written yet, so nothing is lost but time.

Never writes a state row, except to put ABORTED for a transaction whose coordinator fell silent (rule 6).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
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
from actors.runtime import Placement
from actors.work import Calls, Work, trouble_of
from infra.clock import Clock
from infra.consensus_commit.coordinator import CoordinatorStates, StateRow
from infra.consensus_commit.errors import TransactionError
from infra.consensus_commit.participant import ParticipantTransaction
from infra.consensus_commit.recovery import RecoveryHandler
from infra.consensus_commit.states import Isolation, TransactionState
from infra.failpoints import reach
from infra.storage.errors import StorageError
from infra.storage.port import Storage
from schemas.message import Command

log = structlog.get_logger()

ABANDONED_AFTER_S = 30.0
"""A workspace that nobody touched for so long, and that has not prepared, is dropped: its home is gone."""

DEFERRED_AFTER_S = 0.01
"""How long the reply to a batch of calls waits for its slowest item."""

SILENT_AFTER_S = 10.0
"""A prepared workspace whose coordinator said nothing for so long is decided through the state table."""


@dataclass(eq=False)
class Workspace:
    """One transaction here. `calls` counts the calls that were run; `turn` keeps them one after another."""

    tx_id: str
    home: str
    home_incarnation: str
    records: ParticipantTransaction
    owner: Owner
    touched_at_s: float
    calls: int = 0
    running: int = 0
    may_have_written: bool = False
    turn: asyncio.Condition = field(default_factory=asyncio.Condition)
    phase: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One phase at a time: a roll-back that overtook its prepare would leave that prepare's records behind."""


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
        clock: Clock,
    ) -> None:
        self.actor = actor
        self.incarnation = incarnation
        self.domain = domain
        self.placement = placement
        self.ownership = Ownership()
        self._commands: dict[str, type[Command]] = {model.type_name(): model for model in domain.handlers}
        self._storage = storage
        self._states = states
        self._recovery = recovery
        self._clock = clock
        self._workspaces: dict[str, Workspace] = {}
        self._deferred: dict[tuple[str, int], asyncio.Task[InvocationReply]] = {}
        self._home_incarnations: dict[str, str] = {}
        self._schemas = {table.full_name: table.schema for table in tables}

    @property
    def open_workspaces(self) -> int:
        return len(self._workspaces)

    def open(self, tx_id: str, *, home: str, home_incarnation: str, age: Age) -> Workspace:
        """A workspace for a transaction that is new here."""
        records = ParticipantTransaction(
            tx_id,
            isolation=Isolation.SERIALIZABLE,
            storage=self._storage,
            recovery=self._recovery,
            clock=self._clock,
        )
        owner = Owner(age, wound=lambda: None)
        workspace = Workspace(tx_id, home, home_incarnation, records, owner, self._clock.monotonic_s())
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
        """Forget a transaction and let others have its keys."""
        self.ownership.release(workspace.owner)
        workspace.owner.wounded = True  # whatever still runs for it must not take keys again
        if self._workspaces.get(workspace.tx_id) is workspace:
            del self._workspaces[workspace.tx_id]

    # ---- what homes and coordinators ask ---------------------------------------------------------------------

    async def invoke(self, batch: list[Invocation]) -> list[InvocationReply | Deferred]:
        """Run the calls of each item; what waits for another transaction's keys is answered Deferred."""
        tasks = [asyncio.ensure_future(self._invoke(invocation)) for invocation in batch]
        await asyncio.wait(tasks, timeout=DEFERRED_AFTER_S)
        replies: list[InvocationReply | Deferred] = []
        for invocation, task in zip(batch, tasks, strict=True):
            if task.done():
                replies.append(task.result())
            else:
                self._deferred[(invocation.tx_id, invocation.first)] = task
                replies.append(Deferred())
        return replies

    async def collect(self, ticket: Ticket) -> InvocationReply:
        """The reply to calls that were deferred, when they are done."""
        task = self._deferred.get((ticket.tx_id, ticket.first))
        if task is None:
            return self._forgotten(ticket.calls)
        try:
            return await task
        finally:
            self._deferred.pop((ticket.tx_id, ticket.first), None)

    def _forgotten(self, calls: int) -> InvocationReply:
        forgotten = CallResult(trouble=Trouble.FORGOTTEN, trouble_detail=self.actor)
        return InvocationReply(Share(self.actor, self.incarnation, 0, False, False, ()), (forgotten,) * calls)

    async def _invoke(self, invocation: Invocation) -> InvocationReply:
        """Run the calls of one turn, in order, after those of earlier turns."""
        self._notice_home(invocation.home, invocation.home_incarnation)
        workspace = self._workspaces.get(invocation.tx_id)
        if workspace is None:
            if invocation.first > 0:  # we restarted, or gave the transaction up, between two of its turns
                return self._forgotten(len(invocation.calls))
            workspace = self.open(
                invocation.tx_id,
                home=invocation.home,
                home_incarnation=invocation.home_incarnation,
                age=invocation.age,
            )
        workspace.running += 1
        try:
            async with workspace.turn:
                await workspace.turn.wait_for(lambda: workspace.calls >= invocation.first)
                results = [await self._run(workspace, invocation, call) for call in invocation.calls]
                workspace.turn.notify_all()
        finally:
            workspace.running -= 1
            workspace.touched_at_s = self._clock.monotonic_s()
        return InvocationReply(self.share(workspace), tuple(results))

    async def _run(self, workspace: Workspace, invocation: Invocation, call: Call) -> CallResult:
        await reach("participant.before_call")
        workspace.calls += 1
        savepoint = workspace.records.savepoint()
        work = self.work(
            workspace,
            command_id=invocation.command_id,
            routing_key=invocation.routing_key,
            now_ms=invocation.now_ms,
        )
        try:
            model = self._commands[call.type]
            command = model.model_validate_json(call.body)
            result = await self.domain.handlers[model](work, command)
            events = await work.events()
        except Refused as refusal:
            workspace.records.restore(savepoint)
            return CallResult(refused=refusal.reason, details=json_safe(refusal.details))
        except Exception as error:
            workspace.records.restore(savepoint)
            trouble = trouble_of(error)
            if trouble.trouble is Trouble.BROKEN:
                log.exception("handler failed", type=call.type, command_id=invocation.command_id)
            return CallResult(trouble=trouble.trouble, trouble_detail=trouble.detail)
        await reach("participant.after_call")
        return CallResult(result=result, events=events)

    async def prepare(self, request: Prepare) -> Verdict:
        """Write the records of exactly the calls that the coordinator names."""
        workspace, verdict = self._look_up(request.tx_id, request.incarnation, request.calls)
        if workspace is None:
            return verdict
        workspace.owner.prepared = True
        workspace.may_have_written = True
        try:
            async with workspace.phase:
                await workspace.records.prepare_records(request.prepared_at_ms)
        except (StorageError, TransactionError) as error:
            return _verdict(error)
        finally:
            workspace.touched_at_s = self._clock.monotonic_s()
        return Verdict()

    async def validate(self, request: Validate) -> Verdict:
        """Is everything that was read still so? Of a refused command the writes are dropped first (rule 3)."""
        workspace, verdict = self._look_up(request.tx_id, request.incarnation, request.calls)
        if workspace is None:
            return verdict
        workspace.owner.prepared = True
        if request.drop_writes:
            workspace.records.drop_writes()
        try:
            await workspace.records.validate_records()
        except (StorageError, TransactionError) as error:
            return _verdict(error)
        finally:
            workspace.touched_at_s = self._clock.monotonic_s()
        return Verdict()

    async def commit(self, request: CommitRecords) -> bool:
        """The transaction is committed: bring its records to rest. False if that must be tried again by `settle`."""
        workspace = self._workspaces.get(request.tx_id)
        if workspace is None:
            return False
        async with workspace.phase:
            try:
                return not workspace.may_have_written or await workspace.records.commit_records(request.committed_at_ms)
            finally:
                self.close(workspace)

    async def rollback(self, request: Rollback) -> bool:
        """The transaction is not committed: undo its records. False if that must be tried again by `settle`."""
        workspace = self._workspaces.get(request.tx_id)
        if workspace is None:
            return False
        async with workspace.phase:
            try:
                return not workspace.may_have_written or await workspace.records.rollback_records()
            finally:
                self.close(workspace)

    async def settle(self, request: Settle) -> bool:
        """Bring what an earlier incarnation left of a decided transaction to rest."""
        await reach("settle.before")
        state = TransactionState.COMMITTED if request.committed else TransactionState.ABORTED
        row = StateRow(request.tx_id, state, request.decided_at_ms)
        workspace = self._workspaces.get(request.tx_id)
        if workspace is not None:
            async with workspace.phase:  # after a prepare that is under way; later ones find no workspace
                self.close(workspace)
        try:
            for namespace, name, partition in request.partitions:
                schema = self._schemas.get(f"{namespace}.{name}")
                if schema is not None:
                    await self._recovery.settle_partition(schema, partition, request.tx_id, row)
        except (StorageError, TransactionError) as error:
            log.warning("settling waits", tx_id=request.tx_id, error=str(error))
            return False
        return True

    # ---- housekeeping ----------------------------------------------------------------------------------------

    async def tidy(self) -> None:
        """Drop workspaces whose home is gone, decide prepared ones whose coordinator fell silent."""
        now = self._clock.monotonic_s()
        for workspace in list(self._workspaces.values()):
            idle = now - workspace.touched_at_s
            if workspace.running or self._workspaces.get(workspace.tx_id) is not workspace:
                continue
            if not workspace.owner.prepared:
                if idle > ABANDONED_AFTER_S and workspace.home != self.actor:
                    self.close(workspace)
            elif idle > SILENT_AFTER_S:
                workspace.touched_at_s = now
                await self._decide(workspace)

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
        if workspace is None or incarnation != self.incarnation or calls != workspace.calls:
            return None, Verdict(Trouble.FORGOTTEN, self.actor)
        if workspace.owner.wounded:
            return None, Verdict(Trouble.WOUNDED, self.actor)
        return workspace, Verdict()


def json_safe(details: dict[str, Any]) -> dict[str, Any]:
    """Details of a refusal as plain JSON values, so that first and later answers are equal."""
    safe: dict[str, Any] = json.loads(json.dumps(details, default=str))
    return safe


def _verdict(error: Exception) -> Verdict:
    trouble = trouble_of(error)
    return Verdict(trouble.trouble, trouble.detail)
