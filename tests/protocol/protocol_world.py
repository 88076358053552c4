"""What the protocol's scenarios play in: two tables in two namespaces, a clock that is moved, a storage that can fail.

Transactions are driven one step at a time, by hand. `orphan` makes what a crashed process leaves behind: records
prepared by a real participant, and a state row, or none.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from faults import FaultyStorage

from infra.clock import ManualClock
from infra.consensus_commit.coordinator import StateRow
from infra.consensus_commit.manager import TransactionManager
from infra.consensus_commit.metadata import transactional
from infra.consensus_commit.participant import ParticipantTransaction
from infra.consensus_commit.recovery import TRANSACTION_LIFETIME_MS
from infra.consensus_commit.states import Isolation, TransactionState
from infra.consensus_commit.transaction import Transaction
from infra.storage.operations import DataType, Key, Row, Scan, TableSchema
from infra.storage.port import Storage

ACCOUNT = TableSchema(
    "bank",
    "account",
    {"branch": DataType.INT, "id": DataType.INT, "balance": DataType.INT, "note": DataType.TEXT},
    partition_key=("branch",),
    clustering_key=("id",),
)
STOCK = TableSchema(
    "shop",
    "stock",
    {"shelf": DataType.INT, "id": DataType.INT, "balance": DataType.INT, "note": DataType.TEXT},
    partition_key=("shelf",),
    clustering_key=("id",),
)
INDEXED = TableSchema(
    "bank",
    "indexed",
    ACCOUNT.columns,
    partition_key=("branch",),
    clustering_key=("id",),
    indexes=frozenset({"balance"}),
)
TABLES = (ACCOUNT, STOCK)

COMMITTED = TransactionState.COMMITTED
ABORTED = TransactionState.ABORTED

Work = Callable[[Any], Awaitable[object]]


def key(number: int, *, partition: int = 1) -> Key:
    return Key((partition,), (number,))


def whole(table: TableSchema = ACCOUNT, partition: int = 1) -> Scan:
    """A scan of one partition."""
    return Scan(table, (partition,))


def row(number: int, balance: int | None, note: str | None = None, *, partition: int = 1) -> Row:
    """An account as its user sees it."""
    return {"branch": partition, "id": number, "balance": balance, "note": note}


async def at_once(seconds: float) -> None:
    """For waiting between tries: nothing here waits for time to pass."""


class World:
    """One storage, one clock, and as many processes (managers) as a scenario wants."""

    def __init__(self, storage: Storage, *, coordinator_namespace: str = "coordinator") -> None:
        self.coordinator_namespace = coordinator_namespace
        self.plain_storage = storage
        self.storage = FaultyStorage(storage)
        self.clock = ManualClock()
        self.recovered: list[str] = []
        self.manager = self.process(self.storage)
        self.states = self.manager.states

    def process(self, storage: Storage | None = None, *, one_phase_commit: bool = False) -> TransactionManager:
        """Another process on the same storage; the faults of `self.storage` do not strike it."""
        return TransactionManager(
            storage or self.plain_storage,
            self.clock,
            one_phase_commit=one_phase_commit,
            coordinator_namespace=self.coordinator_namespace,
            async_commit=False,  # Scenarios look at the records right after the commit.
            on_recovered=self.recovered.append,
            sleep=at_once,
        )

    async def create(self) -> None:
        await self.manager.create_coordinator_tables()
        for table in (*TABLES, INDEXED):
            await self.manager.create_table(table)

    # -- acting

    def begin(self, isolation: Isolation = Isolation.SERIALIZABLE) -> Transaction:
        return self.manager.begin(isolation)

    def participant(
        self, *, tx_id: str | None = None, isolation: Isolation = Isolation.SERIALIZABLE, storage: Storage | None = None
    ) -> ParticipantTransaction:
        return ParticipantTransaction(
            tx_id or self.clock.new_id(),
            isolation=isolation,
            storage=storage or self.plain_storage,
            recovery=self.process(storage).recovery,
            clock=self.clock,
        )

    async def given(self, balances: dict[int, int], *, table: TableSchema = ACCOUNT, partition: int = 1) -> str:
        """Records of one partition, committed undisturbed and without a state row; their transaction's id."""
        transaction = self.process(one_phase_commit=True).begin()
        for number, balance in balances.items():
            await transaction.insert(table, key(number, partition=partition), {"balance": balance})
        await transaction.commit()
        return transaction.tx_id

    async def commits(self, work: Work, *, isolation: Isolation = Isolation.SERIALIZABLE) -> str:
        """Somebody else's transaction, from beginning to end; its id."""
        transaction = self.process().begin(isolation)
        await work(transaction)
        await transaction.commit()
        return transaction.tx_id

    async def orphan(self, work: Work, decided: TransactionState | None = None, *, tx_id: str | None = None) -> str:
        """What a process leaves that dies after preparing `work`: undecided, or decided and not told; its id."""
        participant = self.participant(tx_id=tx_id, isolation=Isolation.SNAPSHOT)
        await work(participant)
        await participant.prepare_records(self.clock.now_ms())
        states = self.process().states
        if decided is COMMITTED:
            await states.commit_state(participant.tx_id, self.clock.now_ms() + 1)
        elif decided is ABORTED:
            await states.abort_state(participant.tx_id)
        return participant.tx_id

    def expire(self) -> None:
        """Let every prepared record grow older than a transaction may."""
        self.clock.advance(TRANSACTION_LIFETIME_MS + 1)

    # -- looking

    async def stored(self, number: int, *, table: TableSchema = ACCOUNT, partition: int = 1) -> Row | None:
        """The row as it is stored, transaction columns included."""
        return await self.plain_storage.get(transactional(table), key(number, partition=partition))

    async def state(self, tx_id: str) -> StateRow | None:
        return await self.process().states.get_state(tx_id)

    async def state_rows(self) -> dict[str, TransactionState]:
        states = self.process().states
        await states.create_tables()  # It learns which columns the table has.
        ids = [str(partition[0]) for partition in await self.plain_storage.partitions(states.table)]
        return {tx_id: found.state for tx_id in ids if (found := await states.get_state(tx_id)) is not None}

    async def everything(self) -> list[Row]:
        """Every stored row of every table, in a fixed order."""
        rows: list[Row] = []
        for table in (*TABLES, INDEXED):
            stored = transactional(table)
            for partition in sorted(await self.plain_storage.partitions(stored), key=str):
                rows.extend(await self.plain_storage.scan(Scan(stored, partition)))
        return rows

    async def balances(self, tables: Iterable[TableSchema] = TABLES) -> dict[tuple[str, int, int], object]:
        """What a new process reads, after recovering whatever it meets: (table, partition, id) -> balance."""
        process = self.process()
        transaction = process.begin()
        found: dict[tuple[str, int, int], object] = {}
        for table in tables:
            first, second = table.key_columns
            for partition in await self.plain_storage.partitions(transactional(table)):
                for record in await transaction.scan(Scan(table, partition)):
                    found[(table.name, record[first], record[second])] = record["balance"]  # type: ignore[index]
        await transaction.commit()
        await process.recovery.drain()
        return found

    async def in_doubt(self) -> int:
        recovery = self.process().recovery
        return sum([len(await recovery.in_doubt(table)) for table in (*TABLES, INDEXED)])

    async def settled(self) -> None:
        """Wait until the recoveries of the scenario's own process have ended."""
        await self.manager.recovery.drain()
