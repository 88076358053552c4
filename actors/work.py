"""The Transaction that handlers are given: this actor's records, and calls to other domains when at home.

One `Work` is one handler's run. At the home it makes calls, counts their answers and gathers their events; at a
participant it only reads and writes. It never decides anything: it has no commit.

A handler may leave tasks behind (`gather` does when one of its calls is refused). Nothing that they do afterwards may
count: `end` waits for what is under way and refuses the rest, before anybody looks at what the handler has done.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Coroutine
from typing import Any, TypeVar

from actors.domain import Record, Refused, Table
from actors.messages import (
    Age,
    Call,
    CallResult,
    Deferred,
    Emitted,
    Invocation,
    InvocationReply,
    Rollback,
    Share,
    Ticket,
    Trouble,
)
from actors.ownership import Owner, Ownership, WoundedError
from actors.runtime import ActorLostError, Mailroom, Placement
from infra.consensus_commit.errors import TransactionConflictError, UnknownTransactionStatusError
from infra.consensus_commit.participant import ParticipantTransaction
from infra.storage.errors import UnavailableStorageError, UnknownOutcomeError
from infra.storage.operations import Bound, Key, Row, Scan, Value
from infra.tracing import CALL, OFF, Span, Tracer
from schemas.message import Command, Event

R = TypeVar("R", bound=Record)
T = TypeVar("T")

CONCORD_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "urn:concord")
"""Names every id that is derived from a command rather than drawn."""


class TroubleError(Exception):
    """This attempt of the command is over; `trouble` says what to do next."""

    def __init__(self, trouble: Trouble, detail: str = "") -> None:
        super().__init__(trouble, detail)
        self.trouble = trouble
        self.detail = detail


def trouble_of(error: Exception) -> TroubleError:
    """What an error raised by records, ownership or the runtime means for the attempt it ended."""
    match error:
        case TroubleError():
            return error
        case WoundedError():
            return TroubleError(Trouble.WOUNDED)
        case TransactionConflictError():
            return TroubleError(Trouble.CONFLICT, str(error))
        case UnavailableStorageError() | UnknownOutcomeError() | UnknownTransactionStatusError():
            return TroubleError(Trouble.UNAVAILABLE, str(error))
        case ActorLostError():
            return TroubleError(Trouble.LOST, str(error))
        case _:
            return TroubleError(Trouble.BROKEN, f"{type(error).__name__}: {error}")


class Calls:
    """The calls of one command to other actors: those made in one turn of the loop travel together.

    Calls to one actor run in the order they were made; a failed call does not stop the others, and `end` waits for
    all of them, so that nothing of this attempt arrives after its end (rule 5). `trouble` is the first that any call
    met: what the handler made of it does not count, since it may not know what the call has done.
    """

    def __init__(
        self,
        *,
        placement: Placement,
        mailroom: Mailroom,
        tx_id: str,
        home: str,
        home_incarnation: str,
        age: Age,
        command_id: str,
        routing_key: str,
        now_ms: int,
        tracer: Tracer = OFF,
    ) -> None:
        self._placement = placement
        self._mailroom = mailroom
        self._tracer = tracer
        self._tasks: set[asyncio.Task[None]] = set()
        self._header = (tx_id, home, home_incarnation, age, command_id, routing_key, now_ms)
        self._unsent: dict[str, list[tuple[Call, asyncio.Future[CallResult]]]] = {}
        self._made: dict[str, int] = {}
        self._outstanding: set[asyncio.Future[Any]] = set()
        self._ended = False
        self.shares: dict[str, Share] = {}
        self.touched: set[str] = set()
        self.trouble: TroubleError | None = None

    async def make(self, command: Command) -> CallResult:
        """Run `command` where it belongs and return what came of it; raises TroubleError."""
        if self._ended:
            raise _over()
        actor = self._placement.actor_of(command.domain, command.routing_key)
        loop = asyncio.get_running_loop()
        result: asyncio.Future[CallResult] = loop.create_future()
        self._outstanding.add(result)
        result.add_done_callback(self._outstanding.discard)
        self.touched.add(actor)
        unsent = self._unsent.setdefault(actor, [])
        unsent.append((Call(command.type_name(), command.model_dump_json().encode()), result))
        if len(unsent) == 1:
            loop.call_soon(self._send, actor)
        return await asyncio.shield(result)

    async def end(self) -> None:
        """Make no further call, and wait until every one that was made has been answered, whatever the answers are."""
        self._ended = True
        while self._outstanding:
            await asyncio.wait(list(self._outstanding))

    def _send(self, actor: str) -> None:
        batch = self._unsent.pop(actor)
        first = self._made.get(actor, 0)
        self._made[actor] = first + len(batch)
        span = self._tracer.child(CALL, actor.rpartition("-")[0])
        invocation = Invocation(*self._header, first, tuple(call for call, _ in batch), span.context)
        if span.recording:
            told = {"rpc.system": "concord", "rpc.service": actor, "rpc.method": "invoke"}
            span.note({**told, "concord.calls": len(batch)})
        reply = self._mailroom.post(actor, "invoke", invocation)
        waiting = [future for _, future in batch]
        task = asyncio.ensure_future(self._receive(actor, invocation, waiting, reply, span))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _receive(
        self,
        actor: str,
        invocation: Invocation,
        waiting: list[asyncio.Future[CallResult]],
        reply: asyncio.Future[InvocationReply | Deferred],
        span: Span,
    ) -> None:
        try:
            answered = await reply
            if isinstance(answered, Deferred):
                ticket = Ticket(invocation.tx_id, invocation.first, len(invocation.calls))
                answered = await self._mailroom.ask_alone(actor, "collect", ticket)
            known = self.shares.get(actor)
            if known is None or answered.share.calls >= known.calls:
                self.shares[actor] = answered.share
            for future, result in zip(waiting, answered.results, strict=True):
                if result.trouble is None:
                    future.set_result(result)
                else:
                    span.fail(result.trouble)
                    self._fail([future], TroubleError(result.trouble, result.trouble_detail))
        except Exception as error:
            span.fail(trouble_of(error).trouble)
            # The actor may live, and hold later calls of ours back until these have come.
            self._mailroom.post(actor, "rollback", Rollback(invocation.tx_id))
            self._fail(waiting, trouble_of(error))
        finally:
            span.end()

    def _fail(self, waiting: list[asyncio.Future[CallResult]], trouble: TroubleError) -> None:
        self.trouble = self.trouble or trouble
        for future in waiting:
            if not future.done():
                future.set_exception(trouble)
                future.exception()  # the handler may have left already; `end` only waits


def _over() -> TroubleError:
    return TroubleError(Trouble.WOUNDED, "the handler has ended")


class Work:
    """Implements actors.domain.Transaction for one handler's run over one actor's records.

    `writing` is held over each write: a call that the home makes to itself holds it from end to end, because a refused
    call takes back everything that was written since it began.
    """

    def __init__(
        self,
        *,
        records: ParticipantTransaction,
        ownership: Ownership,
        owner: Owner,
        placement: Placement,
        command_id: str,
        routing_key: str,
        now_ms: int,
        calls: Calls | None = None,
        writing: asyncio.Lock | None = None,
    ) -> None:
        self._records = records
        self._ownership = ownership
        self._owner = owner
        self._placement = placement
        self._calls = calls
        self._writing = writing or asyncio.Lock()
        self._routing_key = routing_key
        self.command_id = command_id
        self.now_ms = now_ms
        self._read: dict[tuple[str, tuple[Value, ...]], tuple[Any, Row]] = {}
        self._emitted: list[list[Emitted] | tuple[Event, Table[Any], tuple[Value, ...]]] = []
        self._ended = False
        self._running = 0
        self._idle: asyncio.Future[None] | None = None

    @property
    def tx_id(self) -> str:
        return self._records.tx_id

    def new_id(self, *parts: str) -> str:
        # Command ids are unique within their routing key only, so the key is part of the name.
        return str(uuid.uuid5(CONCORD_NAMESPACE, "\x1f".join((self._routing_key, self.command_id, *parts))))

    async def get(self, table: Table[R], *key: Value) -> R | None:
        return await self._do(self._get(table, key))

    async def scan(self, table: Table[R], routing_key: str, *prefix: Value) -> list[R]:
        return await self._do(self._scan(table, (routing_key, *prefix)))

    async def insert(self, table: Table[R], record: R) -> None:
        await self._write(self._insert(table, record))

    async def upsert(self, table: Table[R], record: R) -> None:
        await self._write(self._upsert(table, record))

    async def update(self, table: Table[R], record: R) -> None:
        await self._write(self._update(table, record))

    async def delete(self, table: Table[Any], *key: Value) -> None:
        await self._write(self._delete(table, key))

    async def call(self, command: Command) -> dict[str, Any]:
        if self._calls is None:
            raise TypeError(f"a handler that is itself called cannot call {command.type_name()}")
        events: list[Emitted] = []
        self._emitted.append(events)  # events keep the order of the calls, not that of the answers
        result = await self._calls.make(command)
        events.extend(result.events)
        if result.refused:
            raise Refused(result.refused, **result.details)
        return result.result or {}

    def emit(self, event: Event, about: tuple[Any, ...]) -> None:
        if self._ended:
            raise _over()
        table, *key = about
        self._emitted.append((event, table, tuple(key)))

    async def end(self) -> None:
        """Refuse everything from now on, and wait until what is under way has ended."""
        self._ended = True
        if self._calls is not None:
            await self._calls.end()
        while self._running:
            self._idle = asyncio.get_running_loop().create_future()
            await self._idle

    async def events(self) -> tuple[Emitted, ...]:
        """Everything emitted, in order, each with the version that its record has after the commit (rule 10)."""
        events: list[Emitted] = []
        for item in self._emitted:
            if isinstance(item, list):
                events.extend(item)
                continue
            event, table, key = item
            where = table.storage_key(key, buckets=self._placement.buckets)
            events.append(
                Emitted(
                    type=event.type_name(),
                    domain=event.domain,
                    version=event.version,
                    key=event.routing_key,
                    subject="/".join((table.full_name, *map(str, key))),
                    record_version=await self._records.version_after_commit(table.schema, where),
                    body=event.model_dump_json(),
                )
            )
        return tuple(events)

    async def _do(self, operation: Coroutine[Any, Any, T]) -> T:
        if self._ended:
            operation.close()
            raise _over()
        self._running += 1
        try:
            return await operation
        finally:
            self._running -= 1
            if self._idle is not None and not self._idle.done():
                self._idle.set_result(None)

    async def _write(self, operation: Coroutine[Any, Any, None]) -> None:
        try:
            await self._do(self._alone(operation))
        finally:
            operation.close()

    async def _alone(self, operation: Coroutine[Any, Any, None]) -> None:
        async with self._writing:
            await operation

    async def _get(self, table: Table[R], key: tuple[Value, ...]) -> R | None:
        row = await self._records.get(table.schema, await self._own(table, key))
        return None if row is None else self._known(table, row)

    async def _scan(self, table: Table[R], prefix: tuple[Value, ...]) -> list[R]:
        assert table.key[0] == table.routing, f"{table.full_name} cannot be scanned by its routing key"
        bound = Bound(prefix)
        records: list[R] = []
        for partition in table.partitions_of(str(prefix[0]), buckets=self._placement.buckets):
            rows = await self._records.scan(Scan(table.schema, partition, start=bound, end=bound))
            records.extend(self._known(table, row) for row in rows)
        return sorted(records, key=table.key_of)

    async def _insert(self, table: Table[R], record: R) -> None:
        where = await self._own(table, table.key_of(record))
        await self._records.insert(table.schema, where, table.to_columns(record))

    async def _upsert(self, table: Table[R], record: R) -> None:
        where = await self._own(table, table.key_of(record))
        await self._records.upsert(table.schema, where, table.to_columns(record))

    async def _update(self, table: Table[R], record: R) -> None:
        key = table.key_of(record)
        where = await self._own(table, key)
        was = self._read.get((table.full_name, key))
        await self._records.update(table.schema, where, table.to_columns(record, was=was))

    def _known(self, table: Table[R], row: Row) -> R:
        """The record of a row that was read, remembered for its update."""
        record = table.from_row(row)
        self._read[table.full_name, table.key_of(record)] = (record, row)
        return record

    async def _delete(self, table: Table[Any], key: tuple[Value, ...]) -> None:
        await self._records.delete(table.schema, await self._own(table, key))

    async def _own(self, table: Table[Any], key: tuple[Value, ...]) -> Key:
        where = table.storage_key(key, buckets=self._placement.buckets)
        await self._ownership.acquire((table.full_name, where), self._owner)
        return where
