"""One transaction over several participants, each with a storage of its own, driven by one coordinator.

    coordinator.begin() ─► tx_id
    coordinator.enlist(tx_id, participant) ─► the participant's part: read and write there      (any number of them)
    coordinator.commit(tx_id)
        pre-read ─► those that neither wrote nor need validation leave
        prepare in parallel ─► validate in parallel ─► commit state ─► commit records in parallel

A participant holds its parts by transaction id, so that a caller who has only the id can go on (`resume`). What it
knows lives in this process: after a restart the id is unknown, and whatever was prepared is recovered like any other
record in doubt.

Source: ScalarDB's TwoPhaseCommitCoordinator and TwoPhaseCommitParticipant (the interface that replaces the deprecated
TwoPhaseCommitTransactionManager). Unlike there, participants are driven in parallel. The protocol is `commit.py`.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from infra.clock import Clock
from infra.consensus_commit.commit import Settle, commit, settle_now
from infra.consensus_commit.coordinator import CoordinatorStates
from infra.consensus_commit.errors import IllegalOperationError, TransactionNotFoundError
from infra.consensus_commit.intents import new_intended_id
from infra.consensus_commit.journal import Journal
from infra.consensus_commit.parallel import in_parallel
from infra.consensus_commit.participant import ParticipantTransaction
from infra.consensus_commit.recovery import RecoveryHandler
from infra.consensus_commit.states import Isolation
from infra.storage.port import Storage

ACTIVE_AT_MOST = 10_000
"""Transactions that a participant holds; beyond it the oldest is given up (ScalarDB's max_active_transactions)."""


class TwoPhaseParticipant:
    """One place that takes part in transactions: a storage, and the parts of transactions that are active here."""

    def __init__(
        self,
        participant_id: str,
        storage: Storage,
        recovery: RecoveryHandler,
        clock: Clock,
        *,
        active_at_most: int = ACTIVE_AT_MOST,
    ) -> None:
        self.participant_id = participant_id
        self._storage = storage
        self._recovery = recovery
        self._clock = clock
        self._active: OrderedDict[str, ParticipantTransaction] = OrderedDict()
        self._active_at_most = active_at_most

    def join(self, tx_id: str, isolation: Isolation = Isolation.SERIALIZABLE) -> ParticipantTransaction:
        """This participant's part of a transaction; the same one however often it is joined.

        Raises IllegalOperationError if it was joined at another isolation.
        """
        part = self._active.get(tx_id)
        if part is None:
            part = ParticipantTransaction(
                tx_id, isolation=isolation, storage=self._storage, recovery=self._recovery, clock=self._clock
            )
            self._active[tx_id] = part
            if len(self._active) > self._active_at_most:
                self._active.popitem(last=False)
        elif part.isolation is not isolation:
            raise IllegalOperationError(f"transaction {tx_id} was joined at {part.isolation}, not {isolation}")
        return part

    def resume(self, tx_id: str) -> ParticipantTransaction:
        """The part of a transaction that was joined before; TransactionNotFoundError if it is not active here."""
        part = self._active.get(tx_id)
        if part is None:
            raise TransactionNotFoundError(f"transaction {tx_id} is not active at {self.participant_id}")
        return part

    def release(self, tx_id: str) -> None:
        """Forget a transaction; nothing happens if it is not active here."""
        self._active.pop(tx_id, None)


@dataclass(slots=True)
class _Global:
    isolation: Isolation
    participants: dict[str, TwoPhaseParticipant] = field(default_factory=dict)


class TwoPhaseCoordinator:
    """Begins transactions, knows who takes part, and commits or rolls them back.

    With a `journal`, intents are written before anything is prepared; see `journal.py`. Whoever sweeps them must reach
    the storages of all participants (`MultiStorage`).
    """

    def __init__(
        self,
        states: CoordinatorStates,
        clock: Clock,
        *,
        journal: Journal | None = None,
        one_phase_commit: bool = True,
        settle: Settle = settle_now,
    ) -> None:
        self._states = states
        self._clock = clock
        self._journal = journal
        self._one_phase_commit = one_phase_commit
        self._settle = settle
        self._active: dict[str, _Global] = {}

    def begin(self, isolation: Isolation = Isolation.SERIALIZABLE) -> str:
        """A new transaction; its id."""
        tx_id = self._clock.new_id() if self._journal is None else new_intended_id(self._clock)
        self._active[tx_id] = _Global(isolation)
        return tx_id

    def enlist(self, tx_id: str, participant: TwoPhaseParticipant) -> ParticipantTransaction:
        """Have `participant` take part; its part of the transaction. Enlisting it again changes nothing.

        Raises TransactionNotFoundError if the transaction is not active, IllegalOperationError if another participant
        took part under the same id.
        """
        active = self._found(tx_id)
        known = active.participants.setdefault(participant.participant_id, participant)
        if known is not participant:
            raise IllegalOperationError(f"two participants are called {participant.participant_id}")
        return participant.join(tx_id, active.isolation)

    async def commit(self, tx_id: str) -> None:
        """Commit what all participants read and wrote. Whatever comes of it, the transaction is active no longer.

        Raises TransactionNotFoundError (also if a participant has lost its part: nothing was prepared then), a
        TransactionConflictError when nothing took effect, UnknownTransactionStatusError when nobody can tell, and
        storage errors as they come.
        """
        active = self._found(tx_id)
        try:
            parts = {
                participant.participant_id: participant.resume(tx_id) for participant in active.participants.values()
            }
            await in_parallel([part.pre_read() for part in parts.values()])
            for name, part in list(parts.items()):
                if not part.has_writes and not part.needs_validation:
                    await part.validate_records()  # Reads nothing, but refuses what was not ended: open scanners.
                    active.participants[name].release(tx_id)
                    del parts[name]
            await commit(
                tx_id,
                list(parts.values()),
                self._states,
                self._clock,
                one_phase_commit=self._one_phase_commit,
                journal=self._journal,
                settle=self._settle,
            )
        finally:
            self._release(tx_id)

    async def rollback(self, tx_id: str) -> None:
        """Give a transaction up. Nothing was written yet, so nothing is undone; an unknown id is none's."""
        self._release(tx_id)

    def _found(self, tx_id: str) -> _Global:
        active = self._active.get(tx_id)
        if active is None:
            raise TransactionNotFoundError(f"transaction {tx_id} is not active")
        return active

    def _release(self, tx_id: str) -> None:
        active = self._active.pop(tx_id, None)
        if active is not None:
            for participant in active.participants.values():
                participant.release(tx_id)
