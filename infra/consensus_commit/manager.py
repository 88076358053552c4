"""The engine as a library, in one process: begins transactions, gives them their storage, commits them.

In the system of actors, the two sides live apart and the coordinator actor drives them; here they are together.
Transactions of a manager record no intents: after a crash, their records are recovered by whoever reads them.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from infra.clock import Clock, SystemClock
from infra.consensus_commit.commit import BeforeCommitState, commit
from infra.consensus_commit.coordinator import CoordinatorStates
from infra.consensus_commit.errors import TransactionConflictError
from infra.consensus_commit.metadata import transactional
from infra.consensus_commit.participant import ParticipantTransaction
from infra.consensus_commit.recovery import TRANSACTION_LIFETIME_MS, RecoveryHandler
from infra.consensus_commit.states import Isolation
from infra.consensus_commit.transaction import Transaction
from infra.storage.operations import TableSchema
from infra.storage.port import Storage

T = TypeVar("T")
Sleep = Callable[[float], Awaitable[None]]


class TransactionManager:
    """Transactions over one storage.

    `one_phase_commit`: let a transaction that fits one atomic unit commit by one write, without a state row.
    `states` and `recovery` are public for inspection; `close` waits for recoveries under way.
    """

    def __init__(
        self,
        storage: Storage,
        clock: Clock | None = None,
        *,
        one_phase_commit: bool = True,
        coordinator_namespace: str = "coordinator",
        transaction_lifetime_ms: int = TRANSACTION_LIFETIME_MS,
        on_recovered: Callable[[str], None] = lambda kind: None,
        randomness: random.Random | None = None,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self._storage = storage
        self._clock = clock or SystemClock()
        self._one_phase_commit = one_phase_commit
        self._random = randomness or random.Random()
        self._sleep = sleep
        self.states = CoordinatorStates(storage, self._clock, namespace=coordinator_namespace, sleep=sleep)
        self.recovery = RecoveryHandler(
            storage,
            self.states,
            self._clock,
            transaction_lifetime_ms=transaction_lifetime_ms,
            on_recovered=on_recovered,
        )

    async def create_coordinator_tables(self) -> None:
        """Create the state table if it is absent."""
        await self.states.create_tables()

    async def create_table(self, table: TableSchema) -> None:
        """Create `table` with the transaction columns added, if it is absent."""
        await self._storage.create_table(transactional(table))

    def begin(
        self,
        isolation: Isolation = Isolation.SERIALIZABLE,
        *,
        read_only: bool = False,
        before_commit_state: BeforeCommitState | None = None,
    ) -> Transaction:
        """A new transaction; nothing is read or written yet. One that is `read_only` refuses to write.

        `before_commit_state`: see `commit.commit`.
        """
        participant = ParticipantTransaction(
            self._clock.new_id(),
            isolation=isolation,
            storage=self._storage,
            recovery=self.recovery,
            clock=self._clock,
            read_only=read_only,
        )

        async def commit_participant(participant: ParticipantTransaction) -> None:
            await commit(
                participant.tx_id,
                [participant],
                self.states,
                self._clock,
                one_phase_commit=self._one_phase_commit,
                before_commit_state=before_commit_state,
            )

        return Transaction(participant, commit_participant)

    async def run(
        self,
        work: Callable[[Transaction], Awaitable[T]],
        *,
        isolation: Isolation = Isolation.SERIALIZABLE,
        tries: int = 10,
        backoff_ms: int = 10,
    ) -> T:
        """Run `work` in a transaction and commit it; on a conflict again from the start, with a new id.

        Waits `backoff_ms`, doubled each time and jittered, between tries. Raises the last conflict, or at once
        whatever else `work` or the commit raises; an unknown outcome is never tried again.
        """
        for attempt in range(tries):
            try:
                async with self.begin(isolation) as transaction:
                    result = await work(transaction)
                    await transaction.commit()
                    return result
            except TransactionConflictError:
                if attempt == tries - 1:
                    raise
            await self._sleep(backoff_ms * 2**attempt * self._random.uniform(0.5, 1.5) / 1000)
        raise ValueError("tries must be at least 1")

    async def close(self) -> None:
        """Wait for recoveries under way. The storage stays open: it is the caller's."""
        await self.recovery.drain()
