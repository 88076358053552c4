"""Bringing records to rest that a transaction left PREPARED or DELETED.

A reader who meets such a record asks the state table, and obeys:

    COMMITTED             the after-image counts; roll the record forward
    ABORTED               the before-image counts; roll it back
    undecided, young      the transaction is under way: UncommittedRecordError
    undecided, expired    put ABORTED if absent, obey the winner

Rolling forward or back happens in the background: the reader has its answer, and whoever else meets the record does
the same conditional write, of which one takes effect. A transaction that is about to write what it read so waits for
it (`wait_for`). With an intent in hand, `settle_partition` does the same for a whole partition.

A record is expired once this machine's clock is past `tx_prepared_at` by the lifetime; or once this process has seen
it undecided for that long, so that a stamp from a clock that runs ahead cannot keep it in doubt. A clock that runs
wrong thus aborts too early at worst: the put-if-absent keeps the outcome right.

Source: ScalarDB's RecoveryHandler and RecoveryExecutor. Here as there, no record is touched without a condition on
its `tx_id` and `tx_state`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, NamedTuple, cast

from infra.clock import Clock
from infra.consensus_commit import compose
from infra.consensus_commit.coordinator import CoordinatorStates, StateRow
from infra.consensus_commit.errors import CrudConflictError, UncommittedRecordError, UnknownTransactionStatusError
from infra.consensus_commit.metadata import (
    TX_ID,
    TX_PREPARED_AT,
    TX_STATE,
    Layout,
    after_image,
    before_image,
    is_committed,
    layout_of,
)
from infra.consensus_commit.snapshot import RecordId
from infra.consensus_commit.states import TransactionState
from infra.failpoints import reach
from infra.storage.errors import NoMutationError, StorageError
from infra.storage.operations import ColumnCondition, Key, Mutation, Operator, Row, Scan, TableSchema, Value
from infra.storage.port import Storage

TRANSACTION_LIFETIME_MS = 15_000
"""ScalarDB's, hard-coded there: after this, whoever meets an undecided record may abort its transaction."""

ROLLED_FORWARD = "rolled_forward"
ROLLED_BACK = "rolled_back"

RECOVERIES_AT_ONCE = 64
"""Background recoveries under way at which reads under READ_COMMITTED start no more. They want their answers, not the
recoveries, and a scan may meet thousands of records in doubt: without a bound each would be a task, and its calls to
storage would stand in the way of everybody else's. Whoever reads next, or the sweeper, takes up the rest."""

_PASSES = 5
_OBSERVED_AT_MOST = 10_000

logger = logging.getLogger(__name__)


class InDoubtRecord(NamedTuple):
    """A record that is PREPARED or DELETED, whatever the state table says of its transaction."""

    key: Key
    tx_id: str
    tx_state: TransactionState
    prepared_at_ms: int


class RecoveryHandler:
    """Recovers the records of one process's readers. `on_recovered` is told the kind of each record it settled."""

    def __init__(
        self,
        storage: Storage,
        states: CoordinatorStates,
        clock: Clock,
        *,
        transaction_lifetime_ms: int = TRANSACTION_LIFETIME_MS,
        on_recovered: Callable[[str], None] = lambda kind: None,
    ) -> None:
        self._storage = storage
        self._states = states
        self._clock = clock
        self._lifetime_ms = transaction_lifetime_ms
        self._on_recovered = on_recovered
        self._tasks: set[asyncio.Task[None]] = set()
        self._running: dict[RecordId, tuple[str, asyncio.Task[None]]] = {}
        self._first_seen_s: dict[tuple[RecordId, str], float] = {}
        self._being_settled: dict[str, asyncio.Task[None]] = {}

    # -- what a reader asks

    async def resolve(self, table: TableSchema, key: Key, stored_row: Row | None) -> Row | None:
        """The committed record behind a stored row, with its metadata; None if there is none.

        Raises UncommittedRecordError while the row's transaction is under way, CrudConflictError if the row keeps
        changing hands, and storage errors as they come.
        """
        layout = layout_of(table)
        row = stored_row
        for _ in range(_PASSES):
            if row is None or is_committed(row):
                return row
            tx_id = cast(str, row[TX_ID])
            state = await self._states.get_state(tx_id)
            if state is None:
                self._check_expired(layout, key, row)
                # Its transaction may have ended, records and state row, since the row was read.
                again = await self._storage.get(layout.stored, key)
                if not _is_same_attempt(row, again):
                    row = again
                    continue
                state = await self._abort(layout, key, tx_id)
                again = await self._storage.get(layout.stored, key)
                if not _is_same_attempt(row, again):
                    row = again
                    continue
            self._start(layout, key, row, state)
            if state.state is TransactionState.COMMITTED:
                return after_image(layout, row, committed_at_ms=state.created_at_ms)
            return before_image(layout, row)
        raise CrudConflictError(f"{layout.full_name} {key} changed hands {_PASSES} times while it was being read")

    def last_committed(self, table: TableSchema, key: Key, stored_row: Row | None, *, recover: bool) -> Row | None:
        """The record that was last seen committed behind a stored row, without asking what was decided since.

        What READ_COMMITTED wants: a transaction that is under way, or that another process has committed but not
        settled yet, is not seen. `recover` has the record brought to rest in the background, unless there is enough
        to do already (RECOVERIES_AT_ONCE).
        """
        if stored_row is None or is_committed(stored_row):
            return stored_row
        if recover and len(self._tasks) < RECOVERIES_AT_ONCE:
            self.recover_later([(table, key)])
        layout = layout_of(table)
        known = self._states.known(cast(str, stored_row[TX_ID]))
        if known is not None and known.state is TransactionState.COMMITTED:
            return after_image(layout, stored_row, committed_at_ms=known.created_at_ms)
        return before_image(layout, stored_row)

    def settling(self, tx_id: str, task: asyncio.Task[None]) -> None:
        """Say that `task` is bringing a transaction's records to rest, so that readers of them need not do it too."""
        self._being_settled[tx_id] = task
        task.add_done_callback(lambda done: self._being_settled.pop(tx_id, None))

    def recover_later(self, records: Sequence[tuple[TableSchema, Key]]) -> None:
        """Do what `recover_record` does for each of `records`, in the background."""
        if records:
            self._in_background(self._recover_quietly(records))

    async def wait_for(self, records: Iterable[RecordId]) -> None:
        """Wait until the recoveries under way for these records have ended, well or not."""
        tasks = [running[1] for record_id in records if (running := self._running.get(record_id)) is not None]
        if tasks:
            await asyncio.wait(tasks)

    # -- what a sweeper asks

    async def settle_partition(
        self, table: TableSchema, partition: tuple[Value, ...], tx_id: str, state: StateRow
    ) -> int:
        """Roll every record of a decided transaction in one partition forward or back; how many were found.

        When this returns, none is left there. Storage errors pass through; calling again is harmless.
        """
        layout = layout_of(table)
        mine = ColumnCondition(TX_ID, Operator.EQ, tx_id)
        rows = [
            row
            for row in await self._storage.scan(Scan(layout.stored, partition, where=(mine,)))
            if not is_committed(row)
        ]
        size = self._storage.info_of(layout.stored.namespace).max_mutations or len(rows)
        for first in range(0, len(rows), size or 1):
            await self._settle(layout, rows[first : first + size], state)
        return len(rows)

    async def recover_record(self, table: TableSchema, key: Key) -> bool:
        """Bring one record to rest if its transaction is decided or expired; whether it is at rest now."""
        layout = layout_of(table)
        row = await self._storage.get(layout.stored, key)
        try:
            await self.resolve(table, key, row)
        except CrudConflictError:
            return False
        await self.wait_for([(layout.full_name, key)])
        row = await self._storage.get(layout.stored, key)
        return row is None or is_committed(row)

    async def in_doubt(self, table: TableSchema) -> list[InDoubtRecord]:
        """Every PREPARED or DELETED record of a table. Reads the whole table: for inspection, and foreign writers."""
        layout = layout_of(table)
        unsettled = ColumnCondition(TX_STATE, Operator.LT, TransactionState.COMMITTED.value)
        found: list[InDoubtRecord] = []
        for partition in await self._storage.partitions(layout.stored):
            found.extend(
                InDoubtRecord(
                    layout.key_of(row),
                    cast(str, row[TX_ID]),
                    TransactionState(cast(int, row[TX_STATE])),
                    cast(int, row[TX_PREPARED_AT] or 0),
                )
                for row in await self._storage.scan(Scan(layout.stored, partition, where=(unsettled,)))
            )
        return found

    async def drain(self) -> None:
        """Wait until no recovery is under way."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def close(self) -> None:
        """Drop the recoveries under way: whoever reads their records next takes them up."""
        for task in self._tasks:
            task.cancel()
        await self.drain()

    # -- steps

    def _check_expired(self, layout: Layout, key: Key, row: Row) -> None:
        tx_id = cast(str, row[TX_ID])
        expired_at_ms = cast(int, row[TX_PREPARED_AT] or 0) + self._lifetime_ms
        if self._clock.now_ms() > expired_at_ms:
            return
        seen = ((layout.full_name, key), tx_id)
        now_s = self._clock.monotonic_s()
        first_seen_s = self._first_seen_s.get(seen)
        if first_seen_s is None:
            if len(self._first_seen_s) >= _OBSERVED_AT_MOST:
                self._first_seen_s.pop(next(iter(self._first_seen_s)))
            self._first_seen_s[seen] = now_s
        elif (now_s - first_seen_s) * 1000 > self._lifetime_ms:
            return
        raise UncommittedRecordError(f"{layout.full_name} {key} belongs to transaction {tx_id}, still under way", tx_id)

    async def _abort(self, layout: Layout, key: Key, tx_id: str) -> StateRow:
        await reach("recovery.before_abort")
        logger.info("transaction %s of %s has expired: aborting it unless it is decided", tx_id, layout.full_name)
        try:
            return await self._states.abort_state(tx_id)
        except UnknownTransactionStatusError as error:
            raise UncommittedRecordError(
                f"{layout.full_name} {key}: transaction {tx_id} is undecided", tx_id
            ) from error

    def _start(self, layout: Layout, key: Key, row: Row, state: StateRow) -> None:
        """Roll one record forward or back in the background, unless that is under way."""
        record_id = (layout.full_name, key)
        running = self._running.get(record_id)
        if running is not None and running[0] == state.tx_id:
            return
        task = self._being_settled.get(state.tx_id) or self._in_background(self._settle_quietly(layout, row, state))
        self._running[record_id] = (state.tx_id, task)

        def forget(task: asyncio.Task[None]) -> None:
            if self._running.get(record_id) == (state.tx_id, task):
                del self._running[record_id]

        task.add_done_callback(forget)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a recovery in the background failed: %r", error)

    async def _settle_quietly(self, layout: Layout, row: Row, state: StateRow) -> None:
        try:
            await self._settle(layout, [row], state)
        except StorageError as error:
            logger.warning("a record of transaction %s stays in doubt for now: %s", state.tx_id, error)

    async def _recover_quietly(self, records: Sequence[tuple[TableSchema, Key]]) -> None:
        for table, key in records:
            try:
                await self.recover_record(table, key)
            except StorageError as error:
                logger.warning("a record of %s may stay in doubt for now: %s", table.full_name, error)

    async def _settle(self, layout: Layout, rows: Sequence[Row], state: StateRow) -> None:
        """Roll rows of one atomic unit forward or back. Those that somebody else settled meanwhile are left alone."""
        forward = state.state is TransactionState.COMMITTED
        await reach("recovery.before_roll_forward" if forward else "recovery.before_roll_back")
        try:
            await self._storage.mutate([_settlement(layout, row, state) for row in rows])
        except NoMutationError:
            if len(rows) > 1:
                for row in rows:
                    await self._settle(layout, [row], state)
            return
        for _ in rows:
            self._on_recovered(ROLLED_FORWARD if forward else ROLLED_BACK)


def _is_same_attempt(row: Row, again: Row | None) -> bool:
    return again is not None and not is_committed(again) and again[TX_ID] == row[TX_ID]


def _settlement(layout: Layout, row: Row, state: StateRow) -> Mutation:
    key = layout.key_of(row)
    deleted = row[TX_STATE] == TransactionState.DELETED
    if state.state is TransactionState.COMMITTED:
        return compose.commit(layout, key, deleted=deleted, tx_id=state.tx_id, committed_at_ms=state.created_at_ms)
    return compose.roll_back(layout, key, deleted=deleted, tx_id=state.tx_id, before=before_image(layout, row))
