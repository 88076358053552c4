"""The engine as a library, in one process: begins transactions, gives them their storage, commits them.

In the system of actors, the two sides live apart and the coordinator actor drives them; here they are together.

What a crash leaves behind is brought to rest by whoever reads it. A manager with a `name` also writes intents down
before it prepares, so that a sweeper (`sweeper.py`) finds and settles its leftovers even if nobody ever reads them.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Collection, Coroutine
from typing import Any, TypeVar

from infra.clock import Clock, SystemClock
from infra.consensus_commit.commit import BeforeCommitState, commit
from infra.consensus_commit.coordinator import CoordinatorStates
from infra.consensus_commit.errors import TransactionConflictError
from infra.consensus_commit.group_commit import GroupCommit
from infra.consensus_commit.hot_records import HotRecords
from infra.consensus_commit.intents import IntentLog, new_intended_id
from infra.consensus_commit.journal import Journal
from infra.consensus_commit.metadata import transactional
from infra.consensus_commit.participant import ParticipantTransaction
from infra.consensus_commit.record_cache import RecordCache
from infra.consensus_commit.recovery import TRANSACTION_LIFETIME_MS, RecoveryHandler
from infra.consensus_commit.retry import RetryPolicy
from infra.consensus_commit.states import Isolation
from infra.consensus_commit.sweeper import Sweeper
from infra.consensus_commit.transaction import Transaction
from infra.storage.gate import PartitionGate
from infra.storage.operations import TableSchema
from infra.storage.port import Storage

T = TypeVar("T")
Sleep = Callable[[float], Awaitable[None]]

_SETTLING_AT_MOST = 1_000


class TransactionManager:
    """Transactions over one storage.

    `one_phase_commit`: let a transaction that fits one atomic unit commit by one write, without a state row.
    `async_commit`: answer a commit once it is decided, and make its records say so afterwards; whoever reads one in
    between sees the commit all the same. At most `_SETTLING_AT_MOST` transactions are settled so at a time.
    `name`: who this is to whoever cleans up after it, from one start to the next; two managers that run at once must
    have two names. None: no intents. `incarnation`: what this start is called, for whoever wants to know of an intent
    whether its writer is gone. `sweeps_only`: whose intents the sweeper settles (by name); None: everybody's, and
    foreign records, too.
    `cache_records`: how many committed records to keep, so that SERIALIZABLE transactions need not read them first;
    see `record_cache.py` for when that pays.
    `queue_at_hot_records`: let transactions that want a record which was in somebody's way lately wait for each other
    instead of colliding; see `hot_records.py`.
    `group_commit`: let transactions that commit at the same time share a state row; see `group_commit.py`. The state
    table then has a column more, and the id of a transaction changes with its commit.
    `states`, `recovery` and `sweeper` are public for inspection; run `sweeper.run()` as a task of its own.
    """

    def __init__(
        self,
        storage: Storage,
        clock: Clock | None = None,
        *,
        one_phase_commit: bool = True,
        async_commit: bool = True,
        name: str | None = None,
        incarnation: str | None = None,
        sweeps_only: Collection[str] | None = None,
        cache_records: int = 0,
        queue_at_hot_records: bool = True,
        group_commit: bool = False,
        coordinator_namespace: str = "coordinator",
        transaction_lifetime_ms: int = TRANSACTION_LIFETIME_MS,
        on_recovered: Callable[[str], None] = lambda kind: None,
        randomness: random.Random | None = None,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        # One conditional batch at a time into a unit, where the storage does not see to it itself (rule 9).
        storage = storage if isinstance(storage, PartitionGate) else PartitionGate(storage)
        self._storage = storage
        self._clock = clock or SystemClock()
        self._one_phase_commit = one_phase_commit
        self._async_commit = async_commit
        self._cache = RecordCache(cache_records) if cache_records else None
        self._hot_records = HotRecords(self._clock) if queue_at_hot_records else None
        self._settling: set[asyncio.Task[None]] = set()
        self._random = randomness or random.Random()
        self._sleep = sleep
        self.states = CoordinatorStates(
            storage, self._clock, namespace=coordinator_namespace, group_commit=group_commit, sleep=sleep
        )
        self._groups = GroupCommit(self.states, self._clock) if group_commit else None
        self.recovery = RecoveryHandler(
            storage,
            self.states,
            self._clock,
            transaction_lifetime_ms=transaction_lifetime_ms,
            on_recovered=on_recovered,
        )
        self._journal: Journal | None = None
        if name is not None:
            log = IntentLog(storage, namespace=coordinator_namespace)
            incarnation = incarnation or self._clock.new_id()
            self._journal = Journal(log, self._clock, name=name, incarnation=incarnation, sleep=sleep)
        self.sweeper = Sweeper(
            storage,
            self.states,
            self.recovery,
            self._clock,
            journal=self._journal,
            transaction_lifetime_ms=transaction_lifetime_ms,
            only=sweeps_only,
            sleep=sleep,
        )

    async def create_coordinator_tables(self) -> None:
        """Create the state table, and that of intents where they are written, if they are absent."""
        await self.states.create_tables()
        if self._journal is not None:
            await self._journal.log.create_tables()

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
            self._clock.new_id() if self._journal is None else new_intended_id(self._clock),
            isolation=isolation,
            storage=self._storage,
            recovery=self.recovery,
            clock=self._clock,
            read_only=read_only,
            cache=self._cache,
            hot_records=self._hot_records,
        )

        async def commit_participant(participant: ParticipantTransaction) -> None:
            await commit(
                participant.tx_id,
                [participant],
                self.states,
                self._clock,
                one_phase_commit=self._one_phase_commit,
                before_commit_state=before_commit_state,
                journal=self._journal,
                settle=self._settle,
                groups=self._groups,
                at_leisure=self._async_commit,
            )

        return Transaction(participant, commit_participant)

    async def run(
        self,
        work: Callable[[Transaction], Awaitable[T]],
        *,
        isolation: Isolation = Isolation.SERIALIZABLE,
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008 - frozen
    ) -> T:
        """Run `work` in a transaction and commit it; on a conflict again from the start, with a new id.

        `retry` says how often and how long to wait in between. Raises the last conflict, or at once whatever else
        `work` or the commit raises; an unknown outcome is never tried again.
        """
        attempt = 0
        while True:
            attempt += 1
            try:
                async with self.begin(isolation) as transaction:
                    result = await work(transaction)
                    await transaction.commit()
                    return result
            except TransactionConflictError:
                if attempt == retry.tries:
                    raise
            await self._sleep(retry.wait_ms(attempt, self._random) / 1000)

    async def _settle(self, tx_id: str, work: Coroutine[Any, Any, None]) -> None:
        if not self._async_commit:
            return await work
        task = asyncio.create_task(work)
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)
        self.recovery.settling(tx_id, task)
        if len(self._settling) > _SETTLING_AT_MOST:
            await task

    async def drain(self) -> None:
        """Wait until the records of every transaction committed so far are settled, and recoveries have ended."""
        if self._groups is not None:
            await self._groups.drain()
        while self._settling:
            await asyncio.wait(self._settling)
        await self.recovery.drain()

    async def close(self) -> None:
        """Finish what is under way. The storage stays open: it is the caller's."""
        await self.drain()
        if self._journal is not None:
            await self._journal.close()
