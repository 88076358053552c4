"""The coordinator side: the state table, whose rows decide transactions.

A transaction is committed at the instant its COMMITTED row comes to be, and aborted at the instant its ABORTED row
does. Each is a put-if-absent, so the first writer wins and nobody changes a row afterwards. Whoever wants to abort a
transaction puts ABORTED and obeys the winner; looking alone aborts nobody.

A put whose outcome is unknown is tried again: the row is the same whoever wrote it, so that a second put either
decides or meets the decision. What is never done is to guess.

Transactions may commit in groups (`group_commit.py`, and Java programs): one row under a parent id lists the children
that it commits, and a slow child has a row of its own under its full id, `parent$child`. Who wants to abort another's
puts an ABORTED parent row without children first, which keeps a late group from committing, then one under the full
id. Who aborts its own has left its group, and puts the latter alone.

The table is created with exactly ScalarDB's columns without write-set logging, and without group commit unless that is
asked for. One that has those columns (`tx_child_ids`, `tx_write_set`), because a Java program made it, is used as it
is.

Source: ScalarDB's CoordinatorStateAccessor and CommitHandler. Never touches user records.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from infra.clock import Clock
from infra.consensus_commit.errors import CommitConflictError, UnknownTransactionStatusError
from infra.consensus_commit.intents import Intent, IntentLog, records_intent
from infra.consensus_commit.parallel import in_parallel
from infra.consensus_commit.states import TransactionState
from infra.failpoints import reach
from infra.recent import Recent
from infra.storage.errors import (
    NoMutationError,
    UnavailableStorageError,
    UnknownOutcomeError,
)
from infra.storage.operations import (
    ColumnCondition,
    DataType,
    Delete,
    If,
    IfNotExists,
    Key,
    Operator,
    Put,
    Row,
    ScanAll,
    TableSchema,
    Value,
)
from infra.storage.port import Storage, add_column

Sleep = Callable[[float], Awaitable[None]]

CHILD_IDS = "tx_child_ids"
OPTIONAL_COLUMNS: Mapping[str, DataType] = {CHILD_IDS: DataType.TEXT, "tx_write_set": DataType.BLOB}
"""What the state table has besides where a Java program made it, with group commit or write-set logging on."""
_KNOWN_FOR_S = 60.0
_KNOWN_AT_MOST = 2_000
"""Decisions remembered without asking: those whose records may not say so yet, many times over. At most 600 kB."""

PRUNED_AT_ONCE = 1_000
"""Old rows that a pruning holds in memory, and for which it reads the intents once."""

FORGOTTEN_SIDE_BY_SIDE = 32


@dataclass(frozen=True, slots=True)
class StateRow:
    """What was decided about a transaction (COMMITTED or ABORTED), and when (ms since the epoch)."""

    tx_id: str
    state: TransactionState
    created_at_ms: int
    child_ids: tuple[str, ...] = ()
    """The children of a group that this row commits, where `tx_id` is that of a group (ScalarDB's group commit)."""
    write_set: bytes | None = None
    """What the transaction wrote, if a Java program logged it: see `write_set`."""


PARENT_ID_LENGTH = 24
"""Characters of a group's id, before `$` and the child's (ScalarDB's DefaultGroupCommitKeyManipulator)."""


def group_and_child(tx_id: str) -> tuple[str, str] | None:
    """The group's and the child's part of the id of a transaction that was begun in a group; None for any other."""
    if len(tx_id) <= PARENT_ID_LENGTH or tx_id[PARENT_ID_LENGTH] != "$":
        return None
    return tx_id[:PARENT_ID_LENGTH], tx_id[PARENT_ID_LENGTH + 1 :]


def id_in_group(group_id: str, child_id: str) -> str:
    """The id of a transaction in a group: what `group_and_child` takes apart."""
    return f"{group_id}${child_id}"


@dataclass(frozen=True, slots=True)
class Pruned:
    """How many state rows a pruning forgot."""

    committed: int
    aborted: int


class CoordinatorStates:
    """The state table. `tries` and `backoff_ms` (doubled each time) are for puts that storage did not serve.

    `group_commit`: see to it that the table can hold groups.
    """

    def __init__(
        self,
        storage: Storage,
        clock: Clock,
        *,
        namespace: str = "coordinator",
        group_commit: bool = False,
        tries: int = 5,
        backoff_ms: int = 50,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self._storage = storage
        self._clock = clock
        self._group_commit = group_commit
        self._tries = tries
        self._backoff_ms = backoff_ms
        self._sleep = sleep
        self.table = TableSchema(
            namespace,
            "state",
            {"tx_id": DataType.TEXT, "tx_state": DataType.INT, "tx_created_at": DataType.BIGINT},
            partition_key=("tx_id",),
        )
        self._is_adopted = False
        self._known: Recent[str, StateRow] = Recent(clock, for_s=_KNOWN_FOR_S, most=_KNOWN_AT_MOST)

    async def create_tables(self) -> None:
        """Create the state table if it is absent. One that ScalarDB made, with more columns, is left as it is.

        Raises InvalidOperationError if a table of that name has other columns than ScalarDB would give it.
        """
        await self._adopt()
        if self._group_commit and CHILD_IDS not in self.table.columns:
            if self._is_adopted:
                await add_column(self._storage, self.table, CHILD_IDS, OPTIONAL_COLUMNS[CHILD_IDS])
            self.table = replace(self.table, columns={**self.table.columns, CHILD_IDS: OPTIONAL_COLUMNS[CHILD_IDS]})
        await self._storage.create_table(self.table)
        self._is_adopted = True

    def known(self, tx_id: str) -> StateRow | None:
        """What this process saw decided about `tx_id` lately, without asking. A decision never changes."""
        return self._known.get(tx_id)

    def note_committed(self, tx_id: str, committed_at_ms: int) -> None:
        """Whoever committed `tx_id` has said so: its row need not be read."""
        self._remember(StateRow(tx_id, TransactionState.COMMITTED, committed_at_ms))

    async def get_state(self, tx_id: str) -> StateRow | None:
        """What was decided about `tx_id`; None while undecided (or once pruned).

        For a transaction of a group (`parent$child`): the group's row if that commits the child, else its own.
        """
        known = self._known.get(tx_id)
        if known is not None:
            return known
        group = group_and_child(tx_id)
        if group is not None:
            parent, child = group
            await self.learn_of_groups()
            decided = await self._get(parent)
            if decided is not None and child in decided.child_ids:
                return replace(decided, tx_id=tx_id)
        return await self._get(tx_id)

    async def _get(self, tx_id: str) -> StateRow | None:
        await self._adopt()
        row = await self._storage.get(self.table, Key((tx_id,)))
        return None if row is None else _state(row)

    async def _adopt(self) -> None:
        """Take the state table for what it is. Asked until there is one, and then never again.

        One with columns that are not known is left for storage to refuse, at every use.
        """
        if self._is_adopted:
            return
        for table in await self._storage.tables():
            if table.full_name == self.table.full_name:
                more = {name: kind for name, kind in table.columns.items() if name not in self.table.columns}
                if more.items() <= OPTIONAL_COLUMNS.items():
                    self.table = replace(self.table, columns={**self.table.columns, **more})
                self._is_adopted = True

    async def learn_of_groups(self) -> bool:
        """Whether the state table can hold groups, looking at it again if that is not known.

        Somebody may have added the column since: whoever then read a group's row without it would take its members
        for undecided, and abort what is committed.
        """
        if CHILD_IDS not in self.table.columns:
            self._is_adopted = False
            await self._adopt()
        return CHILD_IDS in self.table.columns

    def _remember(self, decided: StateRow) -> StateRow:
        self._known.put(decided.tx_id, decided)
        return decided

    async def commit_state(self, tx_id: str, committed_at_ms: int) -> None:
        """Commit `tx_id`, as of `committed_at_ms` (the stamp that its records will carry).

        Raises CommitConflictError if it has been aborted, UnknownTransactionStatusError if storage did not say, and
        UnavailableStorageError if surely nothing was written: then nothing is decided.
        """
        await reach("commit_state.before")
        try:
            await self._put(tx_id, TransactionState.COMMITTED, committed_at_ms)
        except NoMutationError:
            try:
                winner = await self.get_state(tx_id)
            except UnavailableStorageError as error:
                raise UnknownTransactionStatusError(f"the state of {tx_id} cannot be read", tx_id) from error
            if winner is None:
                # It was there, and was forgotten before we could look: perhaps our own, of a put that was not answered.
                raise UnknownTransactionStatusError(f"the state of {tx_id} was decided and pruned", tx_id) from None
            if winner.state is not TransactionState.COMMITTED:
                raise CommitConflictError(f"transaction {tx_id} was aborted by another") from None
        self._remember(StateRow(tx_id, TransactionState.COMMITTED, committed_at_ms))
        await reach("commit_state.after")

    async def commit_group(self, group_id: str, child_ids: Sequence[str], committed_at_ms: int) -> None:
        """Commit the transactions `group_id$child` of all `child_ids`, as of `committed_at_ms`, by one row.

        Raises CommitConflictError if the group has been decided otherwise: then none of them is decided, and each may
        still be committed by itself. Else like `commit_state`.
        """
        await reach("commit_state.before")
        try:
            await self._put(group_id, TransactionState.COMMITTED, committed_at_ms, child_ids)
        except NoMutationError:
            try:
                winner = await self._get(group_id)
            except UnavailableStorageError as error:
                raise UnknownTransactionStatusError(f"the state of {group_id} cannot be read", group_id) from error
            if winner is None:
                raise UnknownTransactionStatusError(
                    f"the state of {group_id} was decided and pruned", group_id
                ) from None
            if not {*child_ids} <= {*winner.child_ids}:
                raise CommitConflictError(f"the group {group_id} was decided without {child_ids}") from None
        for child_id in child_ids:
            tx_id = id_in_group(group_id, child_id)
            self._remember(StateRow(tx_id, TransactionState.COMMITTED, committed_at_ms))
        await reach("commit_state.after")

    async def abort_state(self, tx_id: str, *, own: bool = False) -> StateRow:
        """Abort `tx_id` unless it is decided; the decision that stands, to be obeyed.

        `own`: it is the caller's, and its group (if any) decides without it. Raises UnknownTransactionStatusError if
        storage did not say, UnavailableStorageError if surely nothing was written.
        """
        group = None if own else group_and_child(tx_id)
        if group is not None:
            parent, child = group
            await self.learn_of_groups()
            in_group = await self._decide_aborted(parent)
            if child in in_group.child_ids:
                return replace(in_group, tx_id=tx_id)
            # The group may no longer commit this child, or never did: what remains is that it commits by itself.
        return self._remember(await self._decide_aborted(tx_id))

    async def _decide_aborted(self, tx_id: str) -> StateRow:
        created_at_ms = self._clock.now_ms()
        for _ in range(self._tries):
            try:
                await self._put(tx_id, TransactionState.ABORTED, created_at_ms)
                return StateRow(tx_id, TransactionState.ABORTED, created_at_ms)
            except NoMutationError:
                try:
                    winner = await self._get(tx_id)
                except UnavailableStorageError as error:
                    raise UnknownTransactionStatusError(f"the state of {tx_id} cannot be read", tx_id) from error
                if winner is not None:
                    return winner
                # Pruned between the put and the read: decide again.
        raise UnknownTransactionStatusError(f"the state of {tx_id} appears and disappears", tx_id)

    async def _put(
        self, tx_id: str, state: TransactionState, created_at_ms: int, child_ids: Sequence[str] = ()
    ) -> None:
        await self._adopt()
        columns: dict[str, Value] = {"tx_state": state.value, "tx_created_at": created_at_ms}
        if child_ids:
            columns[CHILD_IDS] = ",".join(child_ids)
        put = Put(self.table, Key((tx_id,)), columns, IfNotExists())
        unknown: UnknownOutcomeError | None = None
        unavailable: UnavailableStorageError | None = None
        for attempt in range(self._tries):
            if attempt:
                await self._sleep(self._backoff_ms * 2 ** (attempt - 1) / 1000)
            try:
                return await self._storage.mutate([put])
            except UnknownOutcomeError as error:
                unknown = error
            except UnavailableStorageError as error:
                unavailable = error
        if unknown is not None:
            raise UnknownTransactionStatusError(
                f"putting {state.name} for {tx_id} was not answered", tx_id
            ) from unknown
        assert unavailable is not None
        raise unavailable

    async def prune(
        self, intents: IntentLog, *, older_than_ms: int, writer_is_gone: Callable[[Intent], bool]
    ) -> Pruned:
        """Forget decisions made more than `older_than_ms` ago that nobody can need again.

        - COMMITTED goes if its transaction records intents and has none left: then every record was seen settled.
          A transaction of another kind (a Java program's, say) may still have prepared records, and they would be
          rolled back without this row: it is kept.
        - ABORTED goes if its intent says that every record was rolled back, and `writer_is_gone(intent)`: a writer
          that was only paused would otherwise find no row in its way and commit. Without an intent it is kept.

        Reads the state table a page at a time, and after each PRUNED_AT_ONCE old rows the intents: a transaction
        records its intent before its first record and removes it last, so that one without intent at that point has
        been settled. Storage errors pass through; pruning again is harmless.
        """
        await self._adopt()
        cutoff_ms = self._clock.now_ms() - older_than_ms
        committed = aborted = 0
        old: list[StateRow] = []
        async for page in self._storage.pages(ScanAll(self.table)):
            old += [state for state in map(_state, page) if state.created_at_ms < cutoff_ms]
            if len(old) >= PRUNED_AT_ONCE:
                pruned = await self._prune(old, intents, writer_is_gone)
                committed, aborted, old = committed + pruned.committed, aborted + pruned.aborted, []
            await asyncio.sleep(0)  # A storage in this process may answer without ever giving way.
        pruned = await self._prune(old, intents, writer_is_gone)
        # What was pruned halfway: its row is gone, its intent is still there.
        for intent in await intents.all():
            old_enough = intent.aborted and intent.created_at_ms < cutoff_ms
            if old_enough and writer_is_gone(intent) and await self._get(intent.tx_id) is None:
                await intents.remove(intent.coordinator, [intent.tx_id])
        return Pruned(committed + pruned.committed, aborted + pruned.aborted)

    async def _prune(
        self, old: Sequence[StateRow], intents: IntentLog, writer_is_gone: Callable[[Intent], bool]
    ) -> Pruned:
        """Forget those of `old` that nobody can need; they were read before the intents are."""
        if not old:
            return Pruned(0, 0)
        intent_of = {intent.tx_id: intent for intent in await intents.all()}
        settled: list[StateRow] = []
        abandoned: list[tuple[StateRow, Intent]] = []
        for state in old:
            intent = intent_of.get(state.tx_id)
            if state.state is TransactionState.COMMITTED:
                if _is_settled(state, intent_of):
                    settled.append(state)
            elif intent is not None and intent.aborted and writer_is_gone(intent):
                abandoned.append((state, intent))
        committed = 0
        for first in range(0, len(settled), FORGOTTEN_SIDE_BY_SIDE):
            some = settled[first : first + FORGOTTEN_SIDE_BY_SIDE]
            committed += sum(await in_parallel([self.forget(state) for state in some]))
        aborted = 0
        for state, intent in abandoned:
            # The row first, then the intent: the other way round, a crash in between would keep the row for ever.
            aborted += await self.forget(state)
            await intents.remove(intent.coordinator, [intent.tx_id])
        return Pruned(committed, aborted)

    async def forget(self, state: StateRow) -> int:
        """Remove a decision that nobody can need again; the number of rows removed (0 if it was not there).

        For an ABORTED one that is so when no write of its transaction can be under way any more (rule 8): the caller
        has every participant's word, or knows their processes gone. Storage errors pass through.
        """
        await self._adopt()
        self._known.drop(state.tx_id)
        still = If((ColumnCondition("tx_state", Operator.EQ, state.state.value),))
        try:
            await self._storage.mutate([Delete(self.table, Key((state.tx_id,)), still)])
        except NoMutationError:
            return 0
        return 1


def _state(row: Row) -> StateRow:
    children = cast("str | None", row.get(CHILD_IDS))
    return StateRow(
        cast(str, row["tx_id"]),
        TransactionState(cast(int, row["tx_state"])),
        cast(int, row["tx_created_at"]),
        tuple(children.split(",")) if children else (),
        cast("bytes | None", row.get("tx_write_set")),
    )


def _is_settled(state: StateRow, intent_of: Mapping[str, Intent]) -> bool:
    """Whether every transaction that a COMMITTED row commits records intents, and has none left."""
    decided = [id_in_group(state.tx_id, child_id) for child_id in state.child_ids] or [state.tx_id]
    return all(tx_id not in intent_of and _records_intent(tx_id) for tx_id in decided)


def _records_intent(tx_id: str) -> bool:
    group = group_and_child(tx_id)
    return records_intent(tx_id if group is None else group[1])
