"""Committing one transaction whose participants are all in this process: the protocol, to be read aloud.

    prepare records ──► validate records ──► commit state ──► commit records
          │                    │                  │
          └────────┬───────────┘                  └─ not answered: never guess. Only the state row knows, and whoever
                   ▼                                 meets the records will ask it.
             abort state ──► roll back records

The instant of the COMMITTED row is the commit; what comes after is best effort, and need not be waited for: whoever
reads a record that is still PREPARED asks the state table and sees the commit. Participants write records, the
coordinator writes the state row, a journal (if there is one) the intent, and this file writes nothing itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from infra.clock import Clock
from infra.consensus_commit.coordinator import CoordinatorStates
from infra.consensus_commit.errors import CommitConflictError
from infra.consensus_commit.group_commit import GroupCommit, Member
from infra.consensus_commit.journal import Journal
from infra.consensus_commit.parallel import in_parallel
from infra.consensus_commit.participant import ParticipantTransaction
from infra.consensus_commit.states import TransactionState
from infra.storage.errors import StorageError, UnavailableStorageError

logger = logging.getLogger(__name__)

BeforeCommitState = Callable[[], Awaitable[None]]
"""Work of the caller's own that runs beside preparing and must have succeeded before the commit."""

Settle = Callable[[str, Coroutine[Any, Any, None]], Awaitable[None]]
"""How the last step of a transaction (its id is given) is run: awaited at once, or set going."""


async def settle_now(tx_id: str, work: Coroutine[Any, Any, None]) -> None:
    await work


async def commit(
    tx_id: str,
    participants: Sequence[ParticipantTransaction],
    states: CoordinatorStates,
    clock: Clock,
    *,
    one_phase_commit: bool = True,
    before_commit_state: BeforeCommitState | None = None,
    journal: Journal | None = None,
    settle: Settle = settle_now,
    groups: GroupCommit | None = None,
    at_leisure: bool = False,
) -> None:
    """Commit what `participants` read and wrote as `tx_id`.

    `before_commit_state` is begun with the first prepare and has ended before the state is committed; if it raises,
    the transaction is aborted. `journal` writes down what is about to be touched, for whoever has to clean up after
    this process; `settle` runs what comes after the commit; `groups` lets it share its state row with others, under
    the id that its participants then have; `at_leisure` says that nobody waits for what `settle` runs.

    Raises a TransactionConflictError or what a participant raised when nothing took effect,
    UnknownTransactionStatusError when nobody can tell.
    """
    member: Member | None = None
    try:
        writers = await _writers(participants)
        if not writers:  # Nothing to decide: no state row, but what was read must have been true at one time.
            await _validate_records(participants)
            committed_at_ms = clock.now_ms()
        elif one_phase_commit and before_commit_state is None and _fits_one_phase(participants, writers):
            committed_at_ms = clock.now_ms()
            await writers[0].commit_one_phase(committed_at_ms)
            writers = []
        else:
            if groups is not None:
                member = await groups.join(tx_id)
                tx_id = member.tx_id
                for participant in participants:
                    participant.take_id(tx_id)
            if journal is not None:
                partitions = [partition for writer in writers for partition in writer.written_partitions()]
                await journal.begin(tx_id, partitions)
            committed_at_ms = await _decide(
                tx_id, participants, writers, states, clock, before_commit_state, journal, member
            )
    except BaseException:
        for participant in participants:
            participant.note_failed()
        if journal is not None:
            journal.leave(tx_id)  # What is left of it, if anything, is the sweeper's.
        raise
    finally:
        if member is not None:
            member.leave()
    for participant in participants:
        participant.note_committed(committed_at_ms)
    if writers:
        await settle(tx_id, _finish(tx_id, writers, committed_at_ms, journal, at_leisure))


async def _writers(participants: Sequence[ParticipantTransaction]) -> Sequence[ParticipantTransaction]:
    """Those that have something to write, once they have read what they write without having read it."""
    await in_parallel([participant.pre_read() for participant in participants])
    return [participant for participant in participants if participant.has_writes]


async def _decide(
    tx_id: str,
    participants: Sequence[ParticipantTransaction],
    writers: Sequence[ParticipantTransaction],
    states: CoordinatorStates,
    clock: Clock,
    before_commit_state: BeforeCommitState | None,
    journal: Journal | None,
    member: Member | None,
) -> int:
    """Prepare, validate and commit the state; when it was committed (ms), or what kept it from being."""
    side_work = asyncio.ensure_future(before_commit_state()) if before_commit_state else None
    try:
        await _prepare_records(writers, clock.now_ms())
        await _validate_records(participants)
        if side_work is not None:
            await side_work
    except Exception:
        if side_work is not None:
            await asyncio.wait([side_work])
        if member is not None:
            member.leave()
        await _abort(tx_id, writers, states, journal)
        raise
    finally:  # Of use only to a commit that was cancelled; its records are left to recovery.
        if side_work is not None:
            side_work.cancel()

    try:
        if member is not None:
            return await member.commit_state()
        committed_at_ms = clock.now_ms()
        await states.commit_state(tx_id, committed_at_ms)
    except CommitConflictError:  # Aborted already, by somebody who met the records.
        await _rollback_records(writers)
        raise
    except UnavailableStorageError:  # Surely not written, so it is still ours to abort.
        await _abort(tx_id, writers, states, journal)
        raise
    return committed_at_ms


async def _finish(
    tx_id: str,
    writers: Sequence[ParticipantTransaction],
    committed_at_ms: int,
    journal: Journal | None,
    at_leisure: bool,
) -> None:
    """Make the records of a committed transaction say so. What cannot be settled now is left to whoever meets it."""
    try:
        if await _commit_records(writers, committed_at_ms, at_leisure) and journal is not None:
            journal.settled(tx_id)
    finally:
        if journal is not None:
            journal.leave(tx_id)


async def _prepare_records(writers: Sequence[ParticipantTransaction], prepared_at_ms: int) -> None:
    await in_parallel([writer.prepare_records(prepared_at_ms) for writer in writers])


async def _validate_records(participants: Sequence[ParticipantTransaction]) -> None:
    await in_parallel([participant.validate_records() for participant in participants])


async def _commit_records(writers: Sequence[ParticipantTransaction], committed_at_ms: int, at_leisure: bool) -> bool:
    return all(await in_parallel([writer.commit_records(committed_at_ms, at_leisure=at_leisure) for writer in writers]))


async def _rollback_records(writers: Sequence[ParticipantTransaction]) -> bool:
    return all(await in_parallel([writer.rollback_records() for writer in writers]))


async def _abort(
    tx_id: str, writers: Sequence[ParticipantTransaction], states: CoordinatorStates, journal: Journal | None
) -> None:
    """Put ABORTED, then roll back. If the put is not answered, its error says so and nothing is rolled back.

    Once every record was seen rolled back, no write of this transaction can be under way any more: with a journal,
    which says that nobody else writes under its id, the ABORTED row is then forgotten (rule 8).
    """
    winner = await states.abort_state(tx_id, own=True)
    assert winner.state is TransactionState.ABORTED, f"{tx_id} was committed by somebody else, and only we may"
    if await _rollback_records(writers) and journal is not None:
        try:
            await states.forget(winner)
        except StorageError as error:
            logger.warning("the ABORTED row of %s stays for the sweeper: %s", tx_id, error)
        else:
            journal.settled(tx_id)


def _fits_one_phase(participants: Sequence[ParticipantTransaction], writers: Sequence[ParticipantTransaction]) -> bool:
    return (
        len(writers) == 1
        and not any(participant.needs_validation for participant in participants)
        and writers[0].one_phase_unit() is not None
    )
