"""Bringing to rest what nobody reads.

    ours      intents say which partitions a transaction touched    ┐
              before it touched them: settle these and no others    │   abort_state (obey the winner),
    foreign   Java transactions, and those of managers without a    │   then roll forward or back
              name, leave no intents: a slow walk over all records  ┘

Whose intents, and when
    the former life of our own name      at once: whoever starts with a name takes its former bearer for gone
    our own, of a transaction that has   at once: its commit failed or was not answered, nobody else is at work on it
    left the journal
    another name's                       once this process has seen them for a transaction's lifetime. Clocks are not
                                         compared: a stamp may come from a machine whose clock runs ahead.

An intent goes when every record is seen settled and the transaction was committed. That of an aborted one stays,
marked, as long as its writer may only be paused: its prepares may yet arrive, so its partitions are looked at again
until the writer is known to be gone. Nobody may ever know that, and such intents add up, so a round looks at
LOOKED_AT_AGAIN of them at most, those first that have waited longest. With 200 of them, each is looked at within the
twenty seconds in which everything comes to rest; with more, less often.

The walk over foreign records is bounded: `rows_per_s` at most, so that it disturbs nobody. A foreign record in doubt is
settled at the latest one walk (rows / rows_per_s) and two lifetimes after its transaction died.

Source: architecture rules 6 to 8; `finish` is ScalarDB's finishTransaction. Looking aborts nobody: whatever is rolled
back has an ABORTED row.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, replace

from infra.clock import Clock
from infra.consensus_commit.coordinator import CoordinatorStates, StateRow, group_and_child, id_in_group
from infra.consensus_commit.errors import CrudConflictError, TransactionError
from infra.consensus_commit.intents import Intent, Partition
from infra.consensus_commit.journal import Journal
from infra.consensus_commit.metadata import TX_ID, is_committed, is_transactional, layout_of
from infra.consensus_commit.recovery import RecoveryHandler
from infra.consensus_commit.states import TransactionState
from infra.consensus_commit.write_set import WrittenRecord, decode
from infra.storage.errors import StorageError
from infra.storage.operations import ColumnCondition, Key, Operator, ScanAll, TableSchema, Value
from infra.storage.port import Storage

logger = logging.getLogger(__name__)

LOOKED_AT_AGAIN = 20
"""Aborted transactions, seen rolled back before, that one round looks at again: what a round may cost when there is
nothing to do. Each costs a read of its state and of the partitions that it meant to write."""

_PAGE_SIZE = 200


@dataclass(frozen=True, slots=True)
class Swept:
    """What one round did: transactions whose records were all seen settled, records found, and what must wait.

    Waiting are those that are not due, and aborted ones whose turn to be looked at again it was not.
    """

    transactions: int = 0
    records: int = 0
    waiting: int = 0


class Turns:
    """Who is looked at in which round."""

    def __init__(self) -> None:
        self._round = 0
        self._looked_at_in: dict[str, int] = {}  # The last round that looked at an aborted transaction.

    def take(self, due: Sequence[Intent]) -> list[Intent]:
        """Of all that are due, those that were not seen at rest yet, and of the others LOOKED_AT_AGAIN at most."""
        self._round += 1
        aborted = {intent.tx_id: intent for intent in due if intent.aborted}
        last = {tx_id: self._looked_at_in.get(tx_id, 0) for tx_id in aborted}
        again = sorted(aborted, key=last.__getitem__)[:LOOKED_AT_AGAIN]
        self._looked_at_in = last | dict.fromkeys(again, self._round)
        return [*(intent for intent in due if not intent.aborted), *(aborted[tx_id] for tx_id in again)]


class Sweeper:
    """Settles leftovers. With a `journal`, of every coordinator that writes intents; foreign ones in any case.

    `interval_ms`: between two rounds over the intents. `rows_per_s`: the pace of the walk over foreign records, 0
    for none. `is_gone` says of an aborted intent whether its writer can no longer be at work. `only`: settles the
    intents of these coordinators and nothing else, where somebody else sees to the others.
    """

    def __init__(
        self,
        storage: Storage,
        states: CoordinatorStates,
        recovery: RecoveryHandler,
        clock: Clock,
        *,
        journal: Journal | None,
        transaction_lifetime_ms: int,
        interval_ms: int = 2_000,
        rows_per_s: int = 1_000,
        is_gone: Callable[[Intent], bool] = lambda intent: False,
        only: Collection[str] | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._storage = storage
        self._states = states
        self._recovery = recovery
        self._clock = clock
        self._journal = journal
        self._lifetime_s = transaction_lifetime_ms / 1000
        self._interval_s = interval_ms / 1000
        self._rows_per_s = rows_per_s
        self._is_gone = is_gone
        self._only = None if only is None else sorted(only)
        self._sleep = sleep
        self._first_seen_s: dict[str, float] = {}
        self._turns = Turns()
        self._tables: dict[str, TableSchema] = {}

    async def run(self) -> None:
        """Sweep until cancelled. Storage that does not answer is waited for."""
        await asyncio.gather(self._forever(self.sweep, self._interval_s), self._forever(self.walk, self._lifetime_s))

    async def _forever(self, work: Callable[[], Awaitable[object]], pause_s: float) -> None:
        while True:
            try:
                await work()
            except (StorageError, TransactionError) as error:
                logger.warning("sweeping will go on once storage answers: %s", error)
            await self._sleep(pause_s)

    # -- ours

    async def sweep(self) -> Swept:
        """One round over the intents. Storage errors pass through; the next round takes up what is left."""
        if self._journal is None:
            return Swept()
        log = self._journal.log
        intents = await log.all() if self._only is None else [i for name in self._only for i in await log.of(name)]
        known = {intent.tx_id for intent in intents}
        self._first_seen_s = {tx_id: since for tx_id, since in self._first_seen_s.items() if tx_id in known}
        due = self._turns.take([intent for intent in intents if self._is_due(intent)])
        records = sum([await self._settle(intent) for intent in due])
        return Swept(len(due), records, waiting=len(intents) - len(due))

    def _is_due(self, intent: Intent) -> bool:
        assert self._journal is not None
        if intent.coordinator == self._journal.name:
            mine = intent.coordinator_incarnation == self._journal.incarnation
            return not (mine and self._journal.is_under_way(intent.tx_id))
        now_s = self._clock.monotonic_s()
        return now_s - self._first_seen_s.setdefault(intent.tx_id, now_s) > self._lifetime_s

    async def _settle(self, intent: Intent) -> int:
        assert self._journal is not None
        log = self._journal.log
        state = await self._states.abort_state(intent.tx_id)
        found = 0
        for partition in intent.partitions:
            settled = await self._settle_partition(partition, state)
            if settled is None:  # Perhaps of a storage that only others reach: the intent must stay for them.
                logger.warning("transaction %s wrote to %s.%s, which is not here", intent.tx_id, *partition[:2])
                return found
            found += settled
        if state.state is TransactionState.COMMITTED:
            await log.remove(intent.coordinator, [intent.tx_id])
        elif self._is_gone(intent):
            await self._states.forget(state)
            await log.remove(intent.coordinator, [intent.tx_id])
        elif not intent.aborted:
            await log.mark_aborted([intent])
        return found

    async def _settle_partition(self, partition: Partition, state: StateRow) -> int | None:
        """How many records were settled; None if there is no such table here."""
        namespace, name, values = partition
        table = await self._table(f"{namespace}.{name}")
        if table is None:
            return None
        return await self._recovery.settle_partition(table, values, state.tx_id, state)

    # -- foreign

    async def walk(self) -> int:
        """Look at every record of every transactional table once, and bring those at rest that can be; how many.

        A record whose transaction is undecided and not expired is left for the next walk.
        """
        if not self._rows_per_s or self._only is not None:
            return 0
        settled = 0
        for table in await self._storage.tables():
            if not is_transactional(table):
                continue
            layout = layout_of(table)
            async for page in self._storage.pages(ScanAll(layout.stored), _PAGE_SIZE):
                for row in page:
                    if not is_committed(row):
                        settled += await self._recovery.recover_record(layout.stored, layout.key_of(row))
                await self._sleep(len(page) / self._rows_per_s)
        return settled

    # -- by id

    async def finish(self, tx_id: str, tables: Collection[TableSchema] = ()) -> bool:
        """Settle every record of a decided transaction, then forget its state row; whether nothing of it is left.

        True also where there is no state row: it was finished, or never began. The records are found by the intent,
        by the write set that a Java program logged, or by scanning `tables`; False, and nothing is touched, if there
        is none of these. Tables that are not there were dropped. Only for transactions whose writer is no longer at
        work (rule 8). By the id of a group, all that its row commits are finished; by that of a member, its group's
        row stays. Storage errors pass through.
        """
        state = await self._states.get_state(tx_id)
        if state is None:
            return True
        mine = _of_each(state)
        intents = await self._intents({each.tx_id for each in mine})
        if len(intents) < len(mine) and state.write_set is None and not tables:
            return False
        for each in mine:
            intent = intents.get(each.tx_id)
            if intent is not None:
                for partition in intent.partitions:
                    await self._settle_partition(partition, each)
            elif state.write_set is None:
                for table in tables:
                    await self._settle_in(table, each)
        if state.write_set is not None:
            await self._settle_written(state, decode(state.write_set))
        await self._states.forget(state)
        if self._journal is not None:
            for intent in intents.values():
                await self._journal.log.remove(intent.coordinator, [intent.tx_id])
        return True

    async def recover(self, tx_id: str, tables: Collection[TableSchema], *, abort: bool = False) -> int:
        """Settle every record of one transaction in `tables`; how many were found.

        An undecided one is left alone (CrudConflictError) unless `abort` is asked for: then it is aborted, or found
        to have been decided after all.
        """
        state = await self._states.abort_state(tx_id) if abort else await self._states.get_state(tx_id)
        if state is None:
            raise CrudConflictError(f"transaction {tx_id} is undecided")
        return sum([await self._settle_in(table, each) for each in _of_each(state) for table in tables])

    async def _settle_in(self, table: TableSchema, state: StateRow) -> int:
        layout = layout_of(table)
        mine = ColumnCondition(TX_ID, Operator.EQ, state.tx_id)
        partitions: dict[Key, None] = {}
        async for page in self._storage.pages(ScanAll(layout.stored, (mine,))):
            for row in page:
                if not is_committed(row):
                    partitions[Key(layout.key_of(row).partition)] = None
        return sum(
            [
                await self._recovery.settle_partition(layout.stored, key.partition, state.tx_id, state)
                for key in partitions
            ]
        )

    async def _settle_written(self, state: StateRow, records: Sequence[WrittenRecord]) -> None:
        """Settle what a write set names: a transaction's records, or by a group's id those of all its children."""
        partitions: dict[tuple[str, tuple[Value, ...], str], TableSchema] = {}
        for record in records:
            owner = _owner(state, record)
            table = await self._table(f"{record.namespace}.{record.table}")
            if table is None or (group_and_child(state.tx_id) is not None and owner != state.tx_id):
                continue  # Dropped since; or another child's of the same group, which is finished by its own id.
            values = tuple(record.partition_key[column] for column in table.partition_key)
            partitions[(table.full_name, values, owner)] = table
        for (_, values, owner), table in partitions.items():
            await self._recovery.settle_partition(table, values, owner, replace(state, tx_id=owner))

    async def _intents(self, tx_ids: Collection[str]) -> dict[str, Intent]:
        if self._journal is None:
            return {}
        return {intent.tx_id: intent for intent in await self._journal.log.all() if intent.tx_id in tx_ids}

    async def _table(self, full_name: str) -> TableSchema | None:
        """The stored table of that name, looked up again where it is not known."""
        if full_name not in self._tables:
            self._tables = {table.full_name: table for table in await self._storage.tables()}
        return self._tables.get(full_name)


def _of_each(state: StateRow) -> list[StateRow]:
    """What `state` says of each transaction that it decides: of one, or of all that a group's row commits."""
    if group_and_child(state.tx_id) is not None or not state.child_ids:
        return [state]
    return [replace(state, tx_id=id_in_group(state.tx_id, child_id)) for child_id in state.child_ids]


def _owner(state: StateRow, record: WrittenRecord) -> str:
    """The id under which a record was written, full where it was written in a group."""
    if record.child_id is None:
        return state.tx_id
    group = group_and_child(state.tx_id)
    return f"{group[0] if group else state.tx_id}${record.child_id}"
