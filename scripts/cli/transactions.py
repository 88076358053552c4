"""One transaction by its id: what was decided, which records still wait for it, and bringing them to rest.

Records are found by the transaction's intent, else by the write set that its program logged, else by looking at every
record of every transactional table. Settling is what any reader would do, so it is safe while programs run.

A transaction that commits in a group has the id `group$child`; the id of a group stands for all its members.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

from infra.clock import Clock, SystemClock
from infra.consensus_commit.coordinator import PARENT_ID_LENGTH, StateRow
from infra.consensus_commit.intents import Intent, IntentLog
from infra.consensus_commit.manager import TransactionManager
from infra.consensus_commit.metadata import TX_ID, TX_PREPARED_AT, TX_STATE, is_committed, is_transactional, layout_of
from infra.consensus_commit.states import TransactionState
from infra.storage.operations import ColumnCondition, Key, Operator, Row, Scan, ScanAll, TableSchema, Value
from infra.storage.port import Storage
from scripts.cli.errors import CommandError
from scripts.cli.exit_codes import ExitCode


@dataclass(frozen=True)
class Waiting:
    """A record that is PREPARED or DELETED for the transaction (`tx_id` is its own, not that of its group)."""

    tx_id: str
    table: TableSchema
    key: Key
    tx_state: TransactionState
    prepared_at_ms: int

    @property
    def partition(self) -> tuple[TableSchema, tuple[Value, ...]]:
        return self.table, self.key.partition


@dataclass(frozen=True)
class Transaction:
    """What storage knows of one transaction. `looked_by`: intent, or scan of all records."""

    tx_id: str
    state: StateRow | None
    intent: Intent | None
    waiting: tuple[Waiting, ...]
    looked_by: str


class Transactions:
    """The transactions that one state table decides. `close` must be called; `transactions_of` does."""

    def __init__(self, storage: Storage, manager: TransactionManager, intents: IntentLog | None) -> None:
        self._storage = storage
        self._manager = manager
        self._intents = intents

    async def look_up(self, tx_id: str, tables: Sequence[str] = ()) -> Transaction:
        """What is known of `tx_id`, changing nothing. `tables` restricts where records are looked for.

        Raises CommandError for a table that is not transactional.
        """
        chosen = await self._tables(tables)
        state = await self._manager.states.get_state(tx_id)
        intent = await self._intent(tx_id)
        waiting: list[Waiting] = []
        if intent is not None and not tables:
            for namespace, name, partition in intent.partitions:
                table = chosen.get(f"{namespace}.{name}")
                if table is not None:
                    waiting += _waiting(table, await self._storage.scan(Scan(table, partition, where=_of(tx_id))))
            return Transaction(tx_id, state, intent, tuple(waiting), "intent")
        for table in chosen.values():
            async for page in self._storage.pages(ScanAll(table, _of(tx_id))):
                waiting += _waiting(table, page)
        return Transaction(tx_id, state, intent, tuple(waiting), "scan")

    async def recover(self, tx_id: str, tables: Sequence[str] = (), *, abort: bool) -> tuple[StateRow, int]:
        """Settle the records of `tx_id`; the decision, and how many records were found waiting for it.

        An undecided transaction is left alone (CommandError) unless `abort` is said: then it is aborted, or is found
        to have been decided after all. Storage errors pass through; calling again is harmless.
        """
        if abort:
            await self._tables(tables)  # refuse a wrong name before anything is decided
            await self._manager.states.abort_state(tx_id)
        found = await self.look_up(tx_id, tables)
        members = sorted({record.tx_id for record in found.waiting} - {tx_id})
        if members:  # Each has a decision of its own: its group's row need not list it.
            settled = [(await self.recover(member, tables, abort=abort)) for member in members]
            return found.state or settled[0][0], sum(number for _, number in settled)
        if found.state is None:
            if not found.waiting:
                raise CommandError(
                    f"Nothing is known of transaction {tx_id}: no decision, and no record waits for one.",
                    ExitCode.NO_ANSWER,
                )
            raise CommandError(
                f"Transaction {tx_id} is undecided, and {_records(found.waiting)} wait for it. It may still be under "
                "way. If its program is gone, `--abort` decides it.",
                ExitCode.REFUSED,
            )
        number = 0
        for table, partition in dict.fromkeys(record.partition for record in found.waiting):
            number += await self._manager.recovery.settle_partition(table, partition, tx_id, found.state)
        return found.state, number

    async def finish(self, tx_id: str, *, writer_is_gone: bool) -> tuple[StateRow | None, int]:
        """Settle every record of a decided transaction, then forget its decision; the decision, and how many records.

        Refuses (CommandError) an undecided one, and an aborted one unless `writer_is_gone` is said: without its row
        in the way, a writer that was only paused could still commit. No decision at all, and no records: finished
        before.
        """
        found = await self.look_up(tx_id)
        if found.state is None:
            if found.waiting:
                raise CommandError(
                    f"Transaction {tx_id} is undecided, and {_records(found.waiting)} wait for it. Decide it first: "
                    f"`concord tx recover {tx_id} --abort`.",
                    ExitCode.REFUSED,
                )
            return None, 0
        if found.state.state is TransactionState.ABORTED and not writer_is_gone:
            raise CommandError(
                f"Transaction {tx_id} was aborted. While its program may only be paused, that decision must stay in "
                "its way; once the program has surely ended, say --writer-is-gone.",
                ExitCode.REFUSED,
            )
        stored = list((await self._tables(())).values())
        await self._manager.sweeper.finish(tx_id, stored)
        return found.state, len(found.waiting)

    async def _tables(self, names: Sequence[str]) -> dict[str, TableSchema]:
        """The transactional tables as stored: those of `names`, or all."""
        there = {table.full_name: table for table in await self._storage.tables() if is_transactional(table)}
        absent = [name for name in names if name not in there]
        if absent:
            raise CommandError(
                f"There is no transactional table {', '.join(absent)}. There are: {', '.join(there) or 'none'}.",
                ExitCode.USAGE,
            )
        return {name: there[name] for name in names} if names else there

    async def _intent(self, tx_id: str) -> Intent | None:
        if self._intents is None:
            return None
        return next((intent for intent in await self._intents.all() if intent.tx_id == tx_id), None)


@asynccontextmanager
async def transactions_of(
    storage: Storage, *, coordinator: str = "coordinator", clock: Clock | None = None
) -> AsyncIterator[Transactions]:
    """The transactions of `storage`, which stays open. Raises CommandError where none was ever decided."""
    clock = clock or SystemClock()
    there = {table.full_name for table in await storage.tables()}
    if f"{coordinator}.state" not in there:
        raise CommandError(
            f"There is no table {coordinator}.state, so no transaction was ever decided here. Name the storage with "
            "--storage, or the namespace of its decisions with --coordinator-namespace.",
            ExitCode.UNREACHABLE,
        )
    intents = IntentLog(storage, namespace=coordinator)
    has_intents = intents.table.full_name in there
    # The name is for a journal of intents to be read; nothing is ever written under it.
    name = f"concord-tx-{clock.new_id()}" if has_intents else None
    manager = TransactionManager(storage, clock, name=name, coordinator_namespace=coordinator)
    try:
        yield Transactions(storage, manager, intents if has_intents else None)
    finally:
        await manager.close()


def as_json(found: Transaction) -> dict[str, Any]:
    intent = found.intent
    return {
        "tx_id": found.tx_id,
        "state": "UNDECIDED" if found.state is None else found.state.state.name,
        "decided_at_ms": None if found.state is None else found.state.created_at_ms,
        **({"children": list(found.state.child_ids)} if found.state is not None and found.state.child_ids else {}),
        "intent": None
        if intent is None
        else {
            "coordinator": intent.coordinator,
            "created_at_ms": intent.created_at_ms,
            "aborted": intent.aborted,
            "partitions": len(intent.partitions),
        },
        "looked_by": found.looked_by,
        "waiting": [
            {
                "tx_id": record.tx_id,
                "table": record.table.full_name,
                "key": list(record.key.partition + record.key.clustering),
                "tx_state": record.tx_state.name,
                "prepared_at_ms": record.prepared_at_ms,
            }
            for record in found.waiting
        ],
    }


def _waiting(table: TableSchema, rows: Sequence[Row]) -> list[Waiting]:
    return [
        Waiting(
            cast(str, row[TX_ID]),
            table,
            layout_of(table).key_of(row),
            TransactionState(cast(int, row[TX_STATE])),
            cast(int, row[TX_PREPARED_AT] or 0),
        )
        for row in rows
        if not is_committed(row)
    ]


def _of(tx_id: str) -> tuple[ColumnCondition, ...]:
    """Which records are those of `tx_id`; of a group, those of its members: `tx_id$` and whatever follows."""
    if len(tx_id) != PARENT_ID_LENGTH:
        return (ColumnCondition(TX_ID, Operator.EQ, tx_id),)
    first, behind = f"{tx_id}$", f"{tx_id}{chr(ord('$') + 1)}"
    return (ColumnCondition(TX_ID, Operator.GE, first), ColumnCondition(TX_ID, Operator.LT, behind))


def _records(waiting: Sequence[Waiting]) -> str:
    return f"{len(waiting)} {'record' if len(waiting) == 1 else 'records'}"
