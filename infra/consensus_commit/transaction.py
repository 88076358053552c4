"""A transaction as its user holds it: read, write, then commit or roll back.

    async with manager.begin() as transaction:
        row = await transaction.get(ACCOUNTS, Key((1,)))
        await transaction.update(ACCOUNTS, Key((1,)), {"balance": row["balance"] - 10})
        await transaction.commit()

Leaving the block without a commit rolls back.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType

from infra.consensus_commit.errors import IllegalOperationError
from infra.consensus_commit.participant import ParticipantTransaction, Scanner
from infra.consensus_commit.snapshot import Savepoint
from infra.consensus_commit.states import Isolation
from infra.storage.operations import ColumnCondition, Key, Row, Selection, TableSchema, Value, WriteCondition


class Transaction:
    """One transaction of a TransactionManager. Operations are those of ParticipantTransaction."""

    def __init__(
        self, participant: ParticipantTransaction, commit: Callable[[ParticipantTransaction], Awaitable[None]]
    ) -> None:
        self._participant = participant
        self._commit = commit
        self._ended = False

    @property
    def tx_id(self) -> str:
        return self._participant.tx_id

    @property
    def isolation(self) -> Isolation:
        return self._participant.isolation

    async def get(self, table: TableSchema, key: Key, conditions: Sequence[ColumnCondition] = ()) -> Row | None:
        return await self._active().get(table, key, conditions)

    async def get_many(self, table: TableSchema, keys: Sequence[Key]) -> list[Row | None]:
        return await self._active().get_many(table, keys)

    async def get_by_index(self, table: TableSchema, column: str, value: Value) -> Row | None:
        return await self._active().get_by_index(table, column, value)

    async def scan(self, scan: Selection) -> list[Row]:
        return await self._active().scan(scan)

    def scanner(self, scan: Selection) -> Scanner:
        return self._active().scanner(scan)

    async def insert(self, table: TableSchema, key: Key, columns: Mapping[str, Value]) -> None:
        await self._active().insert(table, key, columns)

    async def upsert(self, table: TableSchema, key: Key, columns: Mapping[str, Value]) -> None:
        await self._active().upsert(table, key, columns)

    async def update(
        self,
        table: TableSchema,
        key: Key,
        columns: Mapping[str, Value],
        conditions: Sequence[ColumnCondition] | None = None,
    ) -> None:
        await self._active().update(table, key, columns, conditions)

    async def delete(self, table: TableSchema, key: Key, conditions: Sequence[ColumnCondition] | None = None) -> None:
        await self._active().delete(table, key, conditions)

    async def put(
        self, table: TableSchema, key: Key, columns: Mapping[str, Value], condition: WriteCondition | None = None
    ) -> None:
        await self._active().put(table, key, columns, condition)

    def savepoint(self) -> Savepoint:
        return self._active().savepoint()

    def restore(self, savepoint: Savepoint) -> None:
        self._active().restore(savepoint)

    async def commit(self) -> None:
        """Make everything take effect at once. What it raises says whether to run the transaction again."""
        participant = self._active()
        self._ended = True
        await self._commit(participant)

    async def rollback(self) -> None:
        """Forget everything. Nothing was written, so nothing is undone."""
        self._active()
        self._give_up()

    async def __aenter__(self) -> Transaction:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._ended:
            self._give_up()

    def _give_up(self) -> None:
        self._ended = True
        # It may have given up for what it believed: the next one has to look.
        self._participant.note_failed()

    def _active(self) -> ParticipantTransaction:
        if self._ended:
            raise IllegalOperationError(f"transaction {self.tx_id} has ended")
        return self._participant
