"""Bugs planted into the engine, each of which a simulation must find: proof that the judge sees what it should.

A mutation replaces a piece of the real code while it is planted, and is the kind of mistake that an implementer of
this protocol makes. `MUTATIONS` says what each one is; `planted` puts it in and takes it out again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

from infra.consensus_commit import commit, compose, coordinator, participant, recovery, scanning, validation
from infra.consensus_commit.coordinator import CoordinatorStates, StateRow
from infra.consensus_commit.errors import (
    CommitConflictError,
    PreparationConflictError,
    UncommittedRecordError,
    UnknownTransactionStatusError,
    ValidationConflictError,
)
from infra.consensus_commit.metadata import TX_VERSION, after_image, before_image, layout_of
from infra.consensus_commit.participant import ParticipantTransaction
from infra.consensus_commit.recovery import RecoveryHandler
from infra.consensus_commit.snapshot import Snapshot
from infra.consensus_commit.states import TransactionState
from infra.storage.errors import UnknownOutcomeError
from infra.storage.operations import Delete, If, IndexScan, Key, Put

Replacement = tuple[Any, str, Any]
"""What to replace in which module or class."""

ABORTED, COMMITTED = TransactionState.ABORTED, TransactionState.COMMITTED


@dataclass(frozen=True)
class Mutation:
    """One planted bug, in words and in code."""

    mistake: str
    replacements: Callable[[], list[Replacement]]


@contextmanager
def planted(name: str) -> Iterator[None]:
    """The engine with one bug. KeyError if there is no mutation of this name."""
    with ExitStack() as stack:
        for where, attribute, instead in MUTATIONS[name].replacements():
            stack.enter_context(patch.object(where, attribute, instead))
        yield


# -- validation


def _skip_validation() -> list[Replacement]:
    async def validate(*args: Any) -> None:
        return None

    return [(participant, "validate", validate)]


def _forget_absent_reads() -> list[Replacement]:
    whole = Snapshot.gets_to_validate

    def gets_to_validate(self: Snapshot) -> Any:
        return [(record_id, layout) for record_id, layout in whole(self) if self.reads[record_id] is not None]

    return [(Snapshot, "gets_to_validate", gets_to_validate)]


def _ignore_new_rows_of_scans() -> list[Replacement]:
    whole = Snapshot.scans_to_validate

    def scans_to_validate(self: Snapshot) -> Any:
        return (replace(read, complete=False) for read in whole(self))

    return [(Snapshot, "scans_to_validate", scans_to_validate)]


def _validate_no_scans() -> list[Replacement]:
    return [(Snapshot, "scans_to_validate", lambda self: iter(()))]


def _validate_presence_only() -> list[Replacement]:
    async def validate_get(snapshot: Snapshot, storage: Any, record_id: Any, layout: Any, *others: Any) -> None:
        now = await storage.get(layout.stored, record_id[1])
        if (now is None) != (snapshot.reads[record_id] is None):
            raise ValidationConflictError("presence")

    return [(validation, "_validate_get", validate_get)]


def _validate_before_preparing() -> list[Replacement]:
    prepare_records, validate_records = commit._prepare_records, commit._validate_records

    async def both(writers: Any, prepared_at_ms: int) -> None:
        for writer in writers:
            phase, writer._phase = writer._phase, participant._Phase.PREPARING
            await writer.validate_records()
            writer._phase = phase
        await prepare_records(writers, prepared_at_ms)

    async def validate(participants: Any) -> None:
        for each in participants:
            if not each.has_writes:
                await validate_records([each])

    return [(commit, "_prepare_records", both), (commit, "_validate_records", validate)]


def _one_phase_without_asking() -> list[Replacement]:
    return [(Snapshot, "needs_validation", lambda self: not self.writes)]


# -- preparing


def _drop_the_tx_id_condition() -> list[Replacement]:
    return [(compose, "_unchanged", lambda read: If(()))]


def _insert_over_what_is_there() -> list[Replacement]:
    return [(compose, "_ABSENT", None)]


def _lose_the_before_image() -> list[Replacement]:
    whole = compose.prepare

    def prepare(*args: Any, **kwargs: Any) -> Put:
        put = whole(*args, **kwargs)
        kept = {name: value for name, value in put.columns.items() if not name.startswith("before_")}
        return replace(put, columns=kept)

    return [(compose, "prepare", prepare)]


def _forget_to_count_versions() -> list[Replacement]:
    whole = compose.prepare

    def prepare(layout: Any, key: Key, columns: Any, read: Any, **kwargs: Any) -> Put:
        put = whole(layout, key, columns, read, **kwargs)
        version = read[TX_VERSION] if read is not None else 1
        return replace(put, columns={**put.columns, TX_VERSION: version})

    return [(compose, "prepare", prepare)]


def _prepare_deletes_as_puts() -> list[Replacement]:
    return [(compose, "DELETED", compose.PREPARED)]


def _take_an_unanswered_prepare_for_done() -> list[Replacement]:
    whole = ParticipantTransaction._prepare

    async def prepare(self: ParticipantTransaction, batch: Any, prepared_at_ms: int) -> None:
        try:
            await whole(self, batch, prepared_at_ms)
        except UnknownOutcomeError:
            batch.prepared = participant._Prepared.YES

    return [(ParticipantTransaction, "_prepare", prepare)]


def _take_a_refused_prepare_for_a_repetition() -> list[Replacement]:
    whole = ParticipantTransaction._prepare

    async def prepare(self: ParticipantTransaction, batch: Any, prepared_at_ms: int) -> None:
        try:
            await whole(self, batch, prepared_at_ms)
        except UnknownOutcomeError:
            try:
                await whole(self, batch, prepared_at_ms)
            except PreparationConflictError:
                batch.prepared = participant._Prepared.YES

    return [(ParticipantTransaction, "_prepare", prepare)]


# -- deciding


def _take_an_unanswered_commit_for_an_abort() -> list[Replacement]:
    whole = CoordinatorStates.commit_state

    async def commit_state(self: CoordinatorStates, tx_id: str, *args: Any, **kwargs: Any) -> Any:
        self._tries = 1
        try:
            return await whole(self, tx_id, *args, **kwargs)
        except UnknownTransactionStatusError as error:
            raise CommitConflictError("surely it was not committed") from error

    return [(CoordinatorStates, "commit_state", commit_state)]


def _take_an_unanswered_commit_for_done() -> list[Replacement]:
    whole = CoordinatorStates.commit_state

    async def commit_state(self: CoordinatorStates, tx_id: str, *args: Any, **kwargs: Any) -> Any:
        self._tries = 1
        try:
            return await whole(self, tx_id, *args, **kwargs)
        except UnknownTransactionStatusError:
            return None

    return [(CoordinatorStates, "commit_state", commit_state)]


def _commit_over_an_abort() -> list[Replacement]:
    return [(coordinator, "IfNotExists", lambda: None)]


def _commit_though_aborted() -> list[Replacement]:
    whole = CoordinatorStates.commit_state

    async def commit_state(self: CoordinatorStates, tx_id: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return await whole(self, tx_id, *args, **kwargs)
        except CommitConflictError:
            return None

    return [(CoordinatorStates, "commit_state", commit_state)]


def _commit_records_before_the_state() -> list[Replacement]:
    validate_records = commit._validate_records

    async def validate(participants: Any) -> None:
        await validate_records(participants)
        for each in participants:
            if each.has_writes:
                await each.commit_records(each._clock.now_ms())
                each._phase = participant._Phase.PREPARING

    return [(commit, "_validate_records", validate)]


def _obey_ones_own_abort() -> list[Replacement]:
    whole = CoordinatorStates.abort_state

    async def abort_state(self: CoordinatorStates, tx_id: str, *, own: bool = False) -> StateRow:
        return replace(await whole(self, tx_id, own=own), state=ABORTED)

    return [(CoordinatorStates, "abort_state", abort_state)]


def _disobey_the_group() -> list[Replacement]:
    async def abort_state(self: CoordinatorStates, tx_id: str, *, own: bool = False) -> StateRow:
        group = None if own else coordinator.group_and_child(tx_id)
        if group is not None:
            await self._decide_aborted(group[0])
        return self._remember(await self._decide_aborted(tx_id))

    return [(CoordinatorStates, "abort_state", abort_state)]


def _abort_a_member_without_its_group() -> list[Replacement]:
    whole = CoordinatorStates.abort_state

    async def abort_state(self: CoordinatorStates, tx_id: str, *, own: bool = False) -> StateRow:
        return await whole(self, tx_id, own=True)

    return [(CoordinatorStates, "abort_state", abort_state)]


def _prune_while_the_writer_lives() -> list[Replacement]:
    whole = CoordinatorStates.prune

    async def prune(self: CoordinatorStates, intents: Any, **kwargs: Any) -> Any:
        return await whole(self, intents, **{**kwargs, "writer_is_gone": lambda intent: True})

    return [(CoordinatorStates, "prune", prune)]


# -- recovery


def _roll_back_without_asking() -> list[Replacement]:
    async def abort(self: RecoveryHandler, layout: Any, key: Key, tx_id: str) -> StateRow:
        return StateRow(tx_id, ABORTED, self._clock.now_ms())

    return [(RecoveryHandler, "_abort", abort)]


def _roll_back_at_once_whoever_won() -> list[Replacement]:
    async def get_state(self: CoordinatorStates, tx_id: str) -> StateRow | None:
        return None

    return [
        (RecoveryHandler, "_check_expired", lambda *args: None),
        *_obey_ones_own_abort(),
        (CoordinatorStates, "get_state", get_state),
    ]


def _roll_forward_the_undecided() -> list[Replacement]:
    async def abort(self: RecoveryHandler, layout: Any, key: Key, tx_id: str) -> StateRow:
        return StateRow(tx_id, COMMITTED, self._clock.now_ms())

    return [(RecoveryHandler, "_abort", abort)]


def _roll_back_without_an_owner() -> list[Replacement]:
    whole = compose._mine

    def mine(tx_id: str, state: int) -> If:
        return If(whole(tx_id, state).conditions[1:])

    return [(compose, "_mine", mine)]


def _roll_back_the_metadata_only() -> list[Replacement]:
    whole = compose.roll_back

    def roll_back(layout: Any, key: Key, **kwargs: Any) -> Any:
        mutation = whole(layout, key, **kwargs)
        if isinstance(mutation, Delete):
            return mutation
        kept = {name: value for name, value in mutation.columns.items() if name not in layout.value_columns}
        return replace(mutation, columns=kept)

    return [(compose, "roll_back", roll_back)]


def _roll_back_by_deleting() -> list[Replacement]:
    whole = compose.roll_back

    def roll_back(layout: Any, key: Key, *, before: Any, **kwargs: Any) -> Any:
        return whole(layout, key, before=None, **kwargs)

    return [(compose, "roll_back", roll_back)]


def _never_roll_back() -> list[Replacement]:
    async def settle(self: RecoveryHandler, layout: Any, rows: Any, state: StateRow) -> None:
        return None

    return [(RecoveryHandler, "_settle", settle)]


# -- reading


def _read_the_before_image_of_a_committed_record() -> list[Replacement]:
    def stale_image(layout: Any, row: Any, *, committed_at_ms: int) -> Any:
        return before_image(layout, row)

    return [(recovery, "after_image", stale_image)]


def _read_what_is_not_committed() -> list[Replacement]:
    whole = RecoveryHandler.resolve

    async def resolve(self: RecoveryHandler, table: Any, key: Key, row: Any) -> Any:
        try:
            return await whole(self, table, key, row)
        except UncommittedRecordError:
            return after_image(layout_of(table), row, committed_at_ms=0)

    return [(RecoveryHandler, "resolve", resolve)]


def _read_a_snapshot_of_its_own() -> list[Replacement]:
    def last_read(self: Snapshot, layout: Any, key: Key, record: Any, *, latest: bool = False) -> None:
        self.reads[(layout.full_name, key)] = record
        self.gets[(layout.full_name, key)] = layout

    async def prepare(self: ParticipantTransaction) -> None:
        for write in self._snapshot.writes.values():
            if not write.insert:
                await self._read(write.layout, write.key)

    return [(Snapshot, "remember_get", last_read), (ParticipantTransaction, "pre_read", prepare)]


def _look_up_new_index_values_only() -> list[Replacement]:
    async def indexed(storage: Any, layout: Any, selection: IndexScan) -> Any:
        found = {}
        async for page in storage.pages(IndexScan(layout.stored, selection.column, selection.value)):
            for row in page:
                found[layout.key_of(row)] = row
        yield [row for _, row in sorted(found.items(), key=lambda item: item[0].partition + item[0].clustering)]

    return [(scanning, "_indexed", indexed)]


MUTATIONS: dict[str, Mutation] = {
    "skip_validation": Mutation("nothing that was read is read again", _skip_validation),
    "forget_absent_reads": Mutation("only records that were there are validated", _forget_absent_reads),
    "ignore_new_rows": Mutation("rows after the last one of a scan are not looked for", _ignore_new_rows_of_scans),
    "validate_no_scans": Mutation("only gets are validated", _validate_no_scans),
    "validate_presence_only": Mutation("a record that is still there counts as unchanged", _validate_presence_only),
    "validate_before_preparing": Mutation("validation comes first, and nothing is locked", _validate_before_preparing),
    "one_phase_without_asking": Mutation("one phase, though something must be validated", _one_phase_without_asking),
    "drop_the_tx_id_condition": Mutation("a prepare asks only that the record is there", _drop_the_tx_id_condition),
    "insert_over_what_is_there": Mutation("an insert does not ask for absence", _insert_over_what_is_there),
    "lose_the_before_image": Mutation("a prepare keeps nothing of what was there", _lose_the_before_image),
    "forget_to_count_versions": Mutation("tx_version stays as it was", _forget_to_count_versions),
    "prepare_deletes_as_puts": Mutation("a delete prepares PREPARED, not DELETED", _prepare_deletes_as_puts),
    "unanswered_prepare_is_done": Mutation("an unanswered prepare counts", _take_an_unanswered_prepare_for_done),
    "refused_prepare_is_a_repetition": Mutation(
        "a prepare is tried again, and refused because it was already there, as it is thought",
        _take_a_refused_prepare_for_a_repetition,
    ),
    "unanswered_commit_is_an_abort": Mutation(
        "an unanswered commit-state is rolled back", _take_an_unanswered_commit_for_an_abort
    ),
    "unanswered_commit_is_done": Mutation("an unanswered commit-state counts", _take_an_unanswered_commit_for_done),
    "commit_over_an_abort": Mutation("the last to write the state row wins, not the first", _commit_over_an_abort),
    "commit_though_aborted": Mutation("a lost commit-state is not noticed", _commit_though_aborted),
    "commit_records_before_the_state": Mutation(
        "records are committed before it is decided", _commit_records_before_the_state
    ),
    "disobey_the_group": Mutation("a member is aborted though its group has committed it", _disobey_the_group),
    "abort_a_member_without_its_group": Mutation(
        "who aborts a member of a group lets the group decide", _abort_a_member_without_its_group
    ),
    "prune_while_the_writer_lives": Mutation(
        "an ABORTED row goes, though its writer may only be paused", _prune_while_the_writer_lives
    ),
    "obey_ones_own_abort": Mutation("whoever puts ABORTED thinks that it won", _obey_ones_own_abort),
    "roll_back_without_asking": Mutation("what has expired is rolled back unasked", _roll_back_without_asking),
    "roll_back_at_once": Mutation("what is PREPARED is aborted, however young", _roll_back_at_once_whoever_won),
    "roll_forward_the_undecided": Mutation("what has expired is rolled forward", _roll_forward_the_undecided),
    "settle_without_an_owner": Mutation("a record is settled, whoever prepared it", _roll_back_without_an_owner),
    "roll_back_the_metadata_only": Mutation("a roll-back leaves the new values", _roll_back_the_metadata_only),
    "roll_back_by_deleting": Mutation("a roll-back takes every record for new", _roll_back_by_deleting),
    "never_settle": Mutation("recovery decides, and leaves the record as it is", _never_roll_back),
    "stale_read": Mutation("a committed record is read as it was before", _read_the_before_image_of_a_committed_record),
    "dirty_read": Mutation("a record under way is read as if it were committed", _read_what_is_not_committed),
    "unrepeatable_write": Mutation(
        "a write is conditional on a later read than the user's", _read_a_snapshot_of_its_own
    ),
    "index_by_new_value_only": Mutation("the index is not asked for the value before", _look_up_new_index_values_only),
}
