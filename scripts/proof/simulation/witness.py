"""Sees every write at the instant at which storage applies it, and so knows what nobody in the system can know.

For the judge: which transaction prepared which record in which order, when the last of a transaction's records was
prepared (from then until it is decided, its writes are locked and its reads have yet to be validated: the instant to
which it may be pinned), who committed in one phase, what was decided. For the probes: which rare paths these are.

It knows the format on disk, and nothing of how the engine comes to write it.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NamedTuple, TypeVar, cast

from infra.consensus_commit.coordinator import PARENT_ID_LENGTH, group_and_child
from infra.consensus_commit.states import TransactionState
from infra.storage.memory import MemoryStorage
from infra.storage.operations import Delete, If, Key, Mutation, Put
from scripts.proof.simulation.loop import Process
from scripts.proof.simulation.probes import Probes
from scripts.proof.simulation.weather import CallFault

RecordId = tuple[str, Key]
"""(namespace, key): every namespace has one table."""

CURRENT_TX: contextvars.ContextVar[str] = contextvars.ContextVar("current_tx", default="")

T = TypeVar("T")


def begun_as(tx_id: str) -> str:
    """The id that a transaction began with: its records carry another one if it committed in a group."""
    group = group_and_child(tx_id)
    return tx_id if group is None else group[1]


PREPARE, SETTLE, AT_ONCE = "prepare", "settle", "at once"
STATE, INTENTS = "state", "intents"
_BOOKS = (STATE, INTENTS)
_NOTHING: frozenset[RecordId] = frozenset()


class Write(NamedTuple):
    """A batch on its way, and the transaction in whose course it was sent."""

    mutations: tuple[Mutation, ...]
    tx_id: str


def kind_of(mutation: Mutation) -> tuple[str, str | None]:
    """What the protocol does by a mutation of a record, and for which transaction (None: it does not say)."""
    condition = mutation.condition
    conditions = condition.conditions if isinstance(condition, If) else ()
    if isinstance(mutation, Put) and mutation.columns.get("tx_state") in (
        TransactionState.PREPARED,
        TransactionState.DELETED,
    ):
        return PREPARE, begun_as(cast(str, mutation.columns["tx_id"]))
    names = {c.column for c in conditions}
    if "tx_state" in names:
        owner = next((c.value for c in conditions if c.column == "tx_id"), None)
        return SETTLE, None if owner is None else begun_as(cast(str, owner))
    if isinstance(mutation, Put):
        return AT_ONCE, cast("str | None", mutation.columns.get("tx_id"))
    return AT_ONCE, None


class Witness:
    """`owner_of` gives the process that a transaction id was made in, `writes_of` how many records it writes."""

    def __init__(
        self,
        probes: Probes,
        owner_of: Callable[[str], Process],
        writes_of: Callable[[str], int],
        lifetime_ms: int,
    ) -> None:
        self.probes = probes
        self.chains: dict[RecordId, list[str]] = {}
        self.prepared: dict[str, set[RecordId]] = {}
        self.at_once: dict[str, set[RecordId]] = {}
        self.pinned_at: dict[str, int] = {}
        self.decided: dict[str, TransactionState] = {}
        self.decided_at: dict[str, int] = {}
        self.violations: list[str] = []
        self.instant = 0
        self._owner_of = owner_of
        self._writes_of = writes_of
        self._lifetime_ms = lifetime_ms
        self._prepared_at_ms: dict[str, int] = {}
        self._settled: dict[str, set[RecordId]] = {}
        self._rolled_back: set[str] = set()
        self._refused_batches: set[str] = set()
        self._aborted_by: dict[str, Process] = {}
        self._forgotten: set[str] = set()
        self._unanswered: set[str] = set()
        self._children: dict[str, tuple[str, ...]] = {}
        self._senders: dict[int, tuple[Delete, str]] = {}

    def next_instant(self) -> int:
        """A number larger than those of all that has happened."""
        self.instant += 1
        return self.instant

    def sent(self, mutations: Sequence[Mutation], tx_id: str) -> None:
        """A transaction hands these to its process's gate, which may let them travel in the batch of another one.

        Only a delete needs it: it leaves no row to carry the id. (What is noted stays alive, so that no `id` is met
        twice in a seed.)
        """
        for mutation in mutations:
            if isinstance(mutation, Delete):
                self._senders[id(mutation)] = (mutation, tx_id)

    # -- what the network tells

    def lost(self, write: Write) -> None:
        """A write that never arrives."""
        if write.mutations[0].table.name not in _BOOKS and kind_of(write.mutations[0])[0] == AT_ONCE:
            self.probes.hit("one_phase_unknown_not_applied")

    def wrote(
        self, process: Process, store: MemoryStorage, write: Write, *, applied: bool, fault: CallFault | None
    ) -> None:
        """A write has arrived; `applied` is whether its conditions held."""
        self.instant += 1
        if applied and process.dead:
            self.probes.hit("request_outlived_its_process")
        table = write.mutations[0].table.name
        if table == STATE:
            self._state_written(process, write.mutations[0], applied, fault)
        elif table != INTENTS:
            for mutation in write.mutations:
                self._record_written(process, store, mutation, write, applied, fault)

    def died(self, process: Process) -> None:
        """A process is gone: how far had its transactions come?"""
        hit = self.probes.hit
        if any(aborter is process and self._is_unsettled(tx_id) for tx_id, aborter in self._aborted_by.items()):
            hit("recoverer_died_between_abort_and_roll_back")
        for tx_id, records in self.prepared.items():
            if self._owner_of(tx_id) is not process or not self._is_unsettled(tx_id):
                continue
            match self.decided.get(tx_id):
                case TransactionState.COMMITTED:
                    hit("died_before_commit_records")
                case None:
                    whole = len(records) == self._writes_of(tx_id)
                    hit("died_before_commit_state" if whole else "died_between_prepares")

    def _is_unsettled(self, tx_id: str) -> bool:
        return bool(self.prepared.get(tx_id, _NOTHING) - self._settled.get(tx_id, _NOTHING))

    # -- the state table

    def _state_written(self, process: Process, mutation: Mutation, applied: bool, fault: CallFault | None) -> None:
        row_id = cast(str, mutation.key.partition[0])
        if isinstance(mutation, Delete):
            if applied:
                for tx_id in self._children.pop(row_id, (begun_as(row_id),)):
                    self._forgotten_now(tx_id)
            return
        state = TransactionState(cast(int, mutation.columns["tx_state"]))
        children = cast("str | None", mutation.columns.get("tx_child_ids"))
        if children is None and len(row_id) == PARENT_ID_LENGTH:
            self.probes.hit("group_kept_from_committing" if applied else "group_outran_its_aborter")
            return  # It decides nobody.
        decided = tuple(children.split(",")) if children else (begun_as(row_id),)
        if applied and children:
            self.probes.hit("group_committed")
            self._children[row_id] = decided
        if not applied and children and row_id not in self._children:
            self.probes.hit("group_met_its_aborter")
            return
        if applied and group_and_child(row_id) and state is TransactionState.COMMITTED:
            self.probes.hit("member_committed_alone")
        for tx_id in decided:
            if applied:
                self._decided_now(process, tx_id, state, fault)
            else:
                self._decided_before(process, tx_id, state, fault)

    def _forgotten_now(self, tx_id: str) -> None:
        self._forgotten.add(tx_id)
        is_commit = self.decided.get(tx_id) is TransactionState.COMMITTED
        self.probes.hit("commit_forgotten" if is_commit else "abort_forgotten")
        if is_commit and self._is_unsettled(tx_id):
            self.violations.append(f"it was forgotten that {tx_id} is committed, and records of it are PREPARED")

    def _decided_now(self, process: Process, tx_id: str, state: TransactionState, fault: CallFault | None) -> None:
        hit = self.probes.hit
        before = self.decided.get(tx_id)
        if tx_id in self._forgotten and state is TransactionState.ABORTED:
            return  # A recoverer's put that was late. All records are settled: there is nobody left whom it could harm.
        if before is not None and before is not state:
            self.violations.append(f"{tx_id} was {before.name} and became {state.name}")
        self.decided[tx_id] = state
        self.decided_at[tx_id] = self.instant
        owner = self._owner_of(tx_id)
        if state is TransactionState.COMMITTED:
            if fault is CallFault.LATE:
                hit("late_commit_state_won")
            if fault is CallFault.UNANSWERED:
                self._unanswered.add(tx_id)
            return
        if fault is CallFault.UNANSWERED:
            hit("abort_unanswered")
        if owner is not process:
            self._aborted_by[tx_id] = process
            if not owner.dead:
                hit("aborted_while_alive")
            prepared_at_ms = self._prepared_at_ms.get(tx_id)
            if prepared_at_ms is not None and process.clock.now_ms() < prepared_at_ms + self._lifetime_ms:
                hit("expired_by_observation")

    def _decided_before(self, process: Process, tx_id: str, state: TransactionState, fault: CallFault | None) -> None:
        hit = self.probes.hit
        match state, self.decided.get(tx_id):
            case TransactionState.COMMITTED, TransactionState.ABORTED:
                hit("commit_lost_to_aborted")
                if fault is CallFault.LATE:
                    hit("late_commit_state_lost")
                if process.was_paused:
                    hit("zombie_commit_refused")
            case TransactionState.COMMITTED, TransactionState.COMMITTED if tx_id in self._unanswered:
                hit("commit_unanswered_then_found")
            case TransactionState.ABORTED, TransactionState.COMMITTED:
                hit("abort_lost_to_committed")
            case TransactionState.ABORTED, TransactionState.ABORTED:
                hit("two_aborts")

    # -- records

    def _record_written(
        self,
        process: Process,
        store: MemoryStorage,
        mutation: Mutation,
        write: Write,
        applied: bool,
        fault: CallFault | None,
    ) -> None:
        kind, tx_id = kind_of(mutation)
        record = (mutation.table.namespace, mutation.key)
        if kind == PREPARE:
            assert tx_id is not None
            assert isinstance(mutation, Put)
            self._prepared_at_ms[tx_id] = cast(int, mutation.columns["tx_prepared_at"])
            self._prepare(process, record, tx_id, applied, fault)
        elif kind == AT_ONCE:
            _, sender = self._senders.get(id(mutation), (mutation, write.tx_id))
            self._commit_at_once(record, tx_id or sender, applied, fault)
        elif tx_id is None:
            self.violations.append(f"a record was settled without a condition on its transaction: {record}")
        elif applied:
            self._settle(process, record, mutation, tx_id, single=len(write.mutations) == 1)
        elif len(write.mutations) > 1:
            self._refused_batches.add(tx_id)
        else:
            self._settle_refused(process, store, mutation, tx_id)

    def _prepare(self, process: Process, record: RecordId, tx_id: str, applied: bool, fault: CallFault | None) -> None:
        hit = self.probes.hit
        if not applied:
            hit("refused_prepare")
            if fault is CallFault.LATE:
                hit("late_prepare_refused")
            if process.was_paused:
                hit("zombie_prepare_refused")
            return
        chain = self.chains.setdefault(record, [])
        before = chain[-1] if chain else ""
        if self.decided.get(before) is TransactionState.COMMITTED and record not in self._settled.get(before, _NOTHING):
            hit("prepared_over_an_unsettled_commit")
        self._write_over(record)
        chain.append(tx_id)
        self.prepared.setdefault(tx_id, set()).add(record)
        self.pinned_at[tx_id] = self.instant
        if self.decided.get(tx_id) is TransactionState.ABORTED:
            hit("late_prepare_after_abort")
            if tx_id in self._rolled_back:
                hit("late_prepare_after_roll_back")

    def _write_over(self, record: RecordId) -> None:
        """Whoever prepared a record last has nothing more to settle there."""
        for tx_id in self.chains.get(record, ())[-1:]:
            self._settled.setdefault(tx_id, set()).add(record)

    def _commit_at_once(self, record: RecordId, tx_id: str, applied: bool, fault: CallFault | None) -> None:
        if not applied:
            self.probes.hit("refused_one_phase")
            return
        if not tx_id:
            self.violations.append(f"a record was written at once by no transaction: {record}")
        self._write_over(record)
        self.chains.setdefault(record, []).append(tx_id)
        self.at_once.setdefault(tx_id, set()).add(record)
        self.pinned_at[tx_id] = self.instant
        if fault is CallFault.UNANSWERED:
            self.probes.hit("one_phase_unknown_applied")
        if fault is CallFault.LATE:
            self.probes.hit("one_phase_late")

    def _settle(self, process: Process, record: RecordId, mutation: Mutation, tx_id: str, *, single: bool) -> None:
        hit = self.probes.hit
        self._settled.setdefault(tx_id, set()).add(record)
        if single and tx_id in self._refused_batches:
            hit("partly_settled_batch")
        decided = self.decided.get(tx_id)
        forward = _is_forward(mutation, decided)
        wanted = TransactionState.COMMITTED if forward else TransactionState.ABORTED
        if decided is not wanted:
            was = "undecided" if decided is None else decided.name
            self.violations.append(f"{record} was settled as if {tx_id} were {wanted.name}; it was {was}")
        if not forward:
            self._rolled_back.add(tx_id)
        if self._owner_of(tx_id) is process:
            return
        if forward:
            hit("roll_forward_of_a_put" if isinstance(mutation, Put) else "roll_forward_of_a_delete")
        elif isinstance(mutation, Delete):
            hit("roll_back_of_an_insert")
        else:
            hit("roll_back_of_a_delete" if _expects_deleted(mutation) else "roll_back_of_an_update")
            if mutation.columns["tx_id"] is None:
                hit("roll_back_of_a_deemed_committed")

    def _settle_refused(self, process: Process, store: MemoryStorage, mutation: Mutation, tx_id: str) -> None:
        hit = self.probes.hit
        row = stored_now(store.get(mutation.table, mutation.key))
        if self._owner_of(tx_id) is process:
            forward = _is_forward(mutation, self.decided.get(tx_id))
            hit("own_commit_came_second" if forward else "own_roll_back_came_second")
        elif row is None or row["tx_state"] in (None, TransactionState.COMMITTED):
            hit("recoverer_came_second")
        elif row["tx_id"] != tx_id:
            hit("prepared_again_while_resolved")


def _expects_deleted(mutation: Mutation) -> bool:
    assert isinstance(mutation.condition, If)
    return any(c.column == "tx_state" and c.value == TransactionState.DELETED for c in mutation.condition.conditions)


def _is_forward(mutation: Mutation, decided: TransactionState | None) -> bool:
    """Whether a settlement commits. Removing a DELETED record does, unless an absent one was to be deleted."""
    if isinstance(mutation, Put):
        return "tx_id" not in mutation.columns
    return _expects_deleted(mutation) and decided is not TransactionState.ABORTED


def stored_now(work: Coroutine[Any, Any, T]) -> T:
    """The result of a call to a MemoryStorage, which never waits."""
    try:
        work.send(None)
    except StopIteration as stop:
        return cast(T, stop.value)
    raise AssertionError("a MemoryStorage waited")
