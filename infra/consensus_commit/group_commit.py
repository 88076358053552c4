"""Transactions that prepare and decide together: one state row for many of them (ScalarDB's group commit).

    commit() ─► gather ─► prepare, validate ─► decide ─► each goes on by itself
                  │              │               one row: tx_id = the group's, tx_child_ids = those that are ready
                  │              └─ failed: leaves the group, and is aborted under its own id
                  └─ while the group before prepares; whoever is alone has no group, and a row of its own

A group starts when the one before has begun to decide, so that prepares of one group travel together (`PartitionGate`
makes batches of them) while the row of the other is written. Nobody waits who is alone. The id of a member is
`group$child`, child being the id that the transaction began with; records carry it, and whoever meets one asks for the
group's row first and for the member's own next (`coordinator.py`).

    slow            the group decides without whoever is not ready some time after the first one; the slow one puts a
                    row of its own, under its whole id
    stuck           whatever its members wait for, after a while the next group starts beside it
    interfered      somebody who took a member for dead put ABORTED for the group: each ready member then puts a row of
                    its own, so that only the one that was aborted itself is lost
    not answered    unknown to all; surely not written: every member is aborted under its own id

Unlike ScalarDB's, a group is formed when its members prepare and not when they begin, so that nobody waits for a
transaction that still reads. The rows are the same.

Source: ScalarDB's GroupCommitter and CommitHandlerWithGroupCommit. Never touches user records.
"""

from __future__ import annotations

import asyncio
from collections import deque
from copy import copy

from infra.clock import Clock
from infra.consensus_commit.coordinator import CHILD_IDS, PARENT_ID_LENGTH, CoordinatorStates, id_in_group
from infra.consensus_commit.errors import CommitConflictError, UnknownTransactionStatusError
from infra.storage.errors import InvalidOperationError, StorageError

PREPARING_AT_MOST = 3
"""Groups that prepare at a time: with fewer, transactions wait for each other; with more, groups become small."""

MEMBERS_AT_MOST = 64
"""Members of a group: a state row lists 36 characters for each."""

PATIENCE = 4.0
"""How much longer than its first member a group waits for the others, as a multiple of the time which that one took."""

SHORTEST_PATIENCE_S = 0.005

LONGEST_TURN_S = 0.1
"""How long a group keeps others from starting: one that waits for a slow storage must not hold up the rest."""


class GroupCommit:
    """Forms the groups of one process. `states` has to know `tx_child_ids` (`CoordinatorStates(group_commit=True)`)."""

    def __init__(
        self,
        states: CoordinatorStates,
        clock: Clock,
        *,
        preparing_at_most: int = PREPARING_AT_MOST,
        members_at_most: int = MEMBERS_AT_MOST,
    ) -> None:
        self._states = states
        self._clock = clock
        self._preparing_at_most = preparing_at_most
        self._members_at_most = members_at_most
        self._gathering: deque[_Group] = deque()
        self._preparing = 0
        self._deciding: set[asyncio.Task[None]] = set()

    async def join(self, tx_id: str) -> Member:
        """Become a member of the next group, once it starts. The caller goes on by `Member.tx_id` and owes the group
        one of `commit_state` and `leave`, whatever happens.

        Raises InvalidOperationError if the state table cannot hold groups: nothing was prepared then.
        """
        if not await self._states.learn_of_groups():
            raise InvalidOperationError(
                f"{self._states.table.full_name} has no column {CHILD_IDS}, which group commit needs: let "
                "create_coordinator_tables() add it, or turn group_commit off"
            )
        if not self._gathering or len(self._gathering[-1].members) >= self._members_at_most:
            self._gathering.append(_Group(self, self._states, self._clock))
            # Later in this turn of the loop: whoever asks in the same turn comes along.
            asyncio.get_running_loop().call_soon(self._start)
        group = self._gathering[-1]
        member = Member(group, tx_id)
        group.members.append(member)
        try:
            await group.started.wait()
        except BaseException:
            member.leave()
            raise
        return member

    def _start(self) -> None:
        while self._gathering and self._preparing < self._preparing_at_most:
            group = self._gathering.popleft()
            if group.members:
                self._preparing += 1
                group.start()

    def has_prepared(self) -> None:
        """A group prepares no more: the next may start."""
        self._preparing -= 1
        self._start()

    def keep(self, deciding: asyncio.Task[None]) -> None:
        """Hold on to a decision under way, which must not end with whoever happened to begin it."""
        self._deciding.add(deciding)
        deciding.add_done_callback(self._deciding.discard)

    async def drain(self) -> None:
        """Wait until what is being decided is decided."""
        while self._deciding:
            await asyncio.wait(self._deciding)


class Member:
    """One transaction in a group. `tx_id` is what its records carry."""

    def __init__(self, group: _Group, tx_id: str) -> None:
        self._group = group
        self.child_id = tx_id
        self.tx_id = tx_id

    async def commit_state(self) -> int:
        """Everything is prepared and valid: commit. Returns when it was committed (ms since the epoch).

        Raises what `CoordinatorStates.commit_state` raises.
        """
        return await self._group.commit_state(self)

    def leave(self) -> None:
        """It will not commit. Harmless when it has."""
        self._group.leave(self)


class _Group:
    def __init__(self, owner: GroupCommit, states: CoordinatorStates, clock: Clock) -> None:
        self._owner = owner
        self._states = states
        self._clock = clock
        self.members: list[Member] = []
        self.started = asyncio.Event()
        self._id = ""
        self._started_at_s = 0.0
        self._pending: set[Member] = set()
        self._ready: dict[Member, asyncio.Future[int]] = {}
        self._patience: asyncio.TimerHandle | None = None
        self._turn: asyncio.TimerHandle | None = None
        self._is_decided = False

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._started_at_s = loop.time()
        self._turn = loop.call_later(LONGEST_TURN_S, self._end_turn)
        self._pending = set(self.members)
        if len(self.members) > 1:
            self._id = new_group_id(self._clock)
            for member in self.members:
                member.tx_id = id_in_group(self._id, member.child_id)
        self.started.set()

    async def commit_state(self, member: Member) -> int:
        if self._is_decided or len(self.members) == 1:
            self._end_turn()
            try:
                return await self._alone(member)
            finally:
                self.leave(member)
        loop = asyncio.get_running_loop()
        self._pending.discard(member)
        decision: asyncio.Future[int] = loop.create_future()
        self._ready[member] = decision
        if not self._pending:
            self._decide()
        elif self._patience is None:
            patience_s = max(PATIENCE * (loop.time() - self._started_at_s), SHORTEST_PATIENCE_S)
            self._patience = loop.call_later(patience_s, self._decide)
        return await decision

    def leave(self, member: Member) -> None:
        if not self.started.is_set():
            if member in self.members:
                self.members.remove(member)
            return
        self._pending.discard(member)
        if not self._pending:
            self._decide()

    def _decide(self) -> None:
        if self._is_decided:
            return
        self._is_decided = True
        if self._patience is not None:
            self._patience.cancel()
        if self._ready:
            self._owner.keep(asyncio.ensure_future(self._commit_ready()))
        self._end_turn()

    def _end_turn(self) -> None:
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
            self._owner.has_prepared()

    async def _commit_ready(self) -> None:
        """One row for all who are ready. What comes of it is everybody's answer."""
        if len(self._ready) == 1:
            return await self._each_alone()
        committed_at_ms = self._clock.now_ms()
        try:
            await self._states.commit_group(self._id, [member.child_id for member in self._ready], committed_at_ms)
        except CommitConflictError:
            await self._each_alone()
        except UnknownTransactionStatusError as error:
            for member in self._ready:
                unknown = UnknownTransactionStatusError(f"the group of {member.tx_id}: {error}", member.tx_id)
                self._answer(member, unknown)
        except StorageError as error:
            for member in self._ready:
                self._answer(member, _alike(error))
        except BaseException:
            for member in self._ready:
                gone = UnknownTransactionStatusError(f"the group of {member.tx_id} was not waited for", member.tx_id)
                self._answer(member, gone)
            raise
        else:
            for member in self._ready:
                self._answer(member, committed_at_ms)

    async def _each_alone(self) -> None:
        async def alone(member: Member) -> None:
            try:
                self._answer(member, await self._alone(member))
            except Exception as error:
                self._answer(member, error)

        await asyncio.gather(*(alone(member) for member in self._ready))

    async def _alone(self, member: Member) -> int:
        committed_at_ms = self._clock.now_ms()
        await self._states.commit_state(member.tx_id, committed_at_ms)
        return committed_at_ms

    def _answer(self, member: Member, answer: int | Exception) -> None:
        decision = self._ready[member]
        if decision.done():
            return  # Cancelled: whoever meets its records asks the state table.
        if isinstance(answer, Exception):
            decision.set_exception(answer)
        else:
            decision.set_result(answer)


def new_group_id(clock: Clock) -> str:
    """24 characters (ScalarDB's are alphanumeric, at random): the beginning and the end of a new id."""
    digits = clock.new_id().replace("-", "")
    return digits[:8] + digits[8 - PARENT_ID_LENGTH :]


def _alike(error: StorageError) -> StorageError:
    """The same error once more: one exception object must not be raised in several tasks."""
    alike = copy(error)
    alike.__cause__ = error
    return alike
