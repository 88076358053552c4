"""Committing one transaction whose participants are all in this process: the protocol, to be read aloud.

    prepare records ──► validate records ──► commit state ──► commit records
          │                    │                  │
          └────────┬───────────┘                  └─ not answered: never guess. Only the state row knows, and whoever
                   ▼                                 meets the records will ask it.
             abort state ──► roll back records

The instant of the COMMITTED row is the commit; what comes after is best effort. Participants write records, the
coordinator writes the state row, and this file writes nothing itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from infra.clock import Clock
from infra.consensus_commit.coordinator import CoordinatorStates
from infra.consensus_commit.errors import CommitConflictError
from infra.consensus_commit.parallel import in_parallel
from infra.consensus_commit.participant import ParticipantTransaction
from infra.consensus_commit.states import TransactionState
from infra.storage.errors import UnavailableStorageError

logger = logging.getLogger(__name__)

BeforeCommitState = Callable[[], Awaitable[None]]


async def commit(
    tx_id: str,
    participants: Sequence[ParticipantTransaction],
    states: CoordinatorStates,
    clock: Clock,
    *,
    one_phase_commit: bool = True,
    before_commit_state: BeforeCommitState | None = None,
) -> None:
    """Commit what `participants` read and wrote as `tx_id`.

    `before_commit_state` is begun with the first prepare and has ended before the state is committed; if it raises,
    the transaction is aborted. Raises a TransactionConflictError or what a participant raised when nothing took
    effect, UnknownTransactionStatusError when nobody can tell.
    """
    await in_parallel([participant.pre_read() for participant in participants])
    writers = [participant for participant in participants if participant.has_writes]

    if not writers:  # Nothing to decide: no state row, but what was read must have been true at one time.
        return await _validate_records(participants)

    if one_phase_commit and before_commit_state is None and _fits_one_phase(participants, writers):
        return await writers[0].commit_one_phase(clock.now_ms())

    side_work = asyncio.ensure_future(before_commit_state()) if before_commit_state else None
    try:
        await _prepare_records(writers, clock.now_ms())
        await _validate_records(participants)
        if side_work is not None:
            await side_work
    except Exception:
        if side_work is not None:
            await asyncio.wait([side_work])
        await _abort(tx_id, writers, states)
        raise
    finally:  # Of use only to a commit that was cancelled; its records are left to recovery.
        if side_work is not None:
            side_work.cancel()

    committed_at_ms = clock.now_ms()
    try:
        await states.commit_state(tx_id, committed_at_ms)
    except CommitConflictError:  # Aborted already, by somebody who met the records.
        await _rollback_records(writers)
        raise
    except UnavailableStorageError:  # Surely not written, so it is still ours to abort.
        await _abort(tx_id, writers, states)
        raise

    await _commit_records(writers, committed_at_ms)


async def _prepare_records(writers: Sequence[ParticipantTransaction], prepared_at_ms: int) -> None:
    await in_parallel([writer.prepare_records(prepared_at_ms) for writer in writers])


async def _validate_records(participants: Sequence[ParticipantTransaction]) -> None:
    await in_parallel([participant.validate_records() for participant in participants])


async def _commit_records(writers: Sequence[ParticipantTransaction], committed_at_ms: int) -> None:
    await in_parallel([writer.commit_records(committed_at_ms) for writer in writers])


async def _rollback_records(writers: Sequence[ParticipantTransaction]) -> None:
    await in_parallel([writer.rollback_records() for writer in writers])


async def _abort(tx_id: str, writers: Sequence[ParticipantTransaction], states: CoordinatorStates) -> None:
    """Put ABORTED, then roll back. If the put is not answered, its error says so and nothing is rolled back."""
    winner = await states.abort_state(tx_id)
    assert winner.state is TransactionState.ABORTED, f"{tx_id} was committed by somebody else, and only we may"
    await _rollback_records(writers)


def _fits_one_phase(participants: Sequence[ParticipantTransaction], writers: Sequence[ParticipantTransaction]) -> bool:
    return (
        len(writers) == 1
        and not any(participant.needs_validation for participant in participants)
        and writers[0].one_phase_unit() is not None
    )
