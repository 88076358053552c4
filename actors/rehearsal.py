"""Runs handlers without any runtime: what a domain author tests a domain with.

Commands run one at a time against tables in memory, with the semantics that handlers rely on: a refusal undoes
everything in every domain, calls run in other domains' handlers as part of the transaction, events carry the version
of the record they speak of, and the same command id again gets the same answer. Rows are kept as storage would keep
them, so a record that does not survive the way there and back is found here.

It is also stricter than a runtime, and raises AssertionError where a handler

- reads or writes another domain's tables, or rows of another routing key than the command's;
- inserts a row that is there, or updates or deletes one that it has not read;
- emits an event of another domain, or about a record that it has not written;
- swallows the refusal of a call, calls on although it was itself called, or returns what is not JSON.

It knows nothing of conflicts, retries, versions of other writers or time-outs: those are the runtime's.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from actors.domain import Domain, Record, Refused, Table
from infra.storage.operations import Row, Value
from schemas.message import Command, Event, Message

R = TypeVar("R", bound=Record)
M = TypeVar("M", bound=Message)

REHEARSAL_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "urn:concord:rehearsal")

COMMITTED = "committed"
REFUSED = "refused"

START_MS = 1_700_000_000_000


@dataclass(frozen=True)
class EmittedEvent:
    """An event, the record it speaks of (full table name, then key) and that record's version after the commit."""

    event: Event
    about: tuple[Any, ...]
    record_version: int


@dataclass(frozen=True)
class Answer:
    """How a command ended. `details` are a refusal's."""

    status: str
    reason: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    events: tuple[EmittedEvent, ...] = ()

    @property
    def event_names(self) -> list[str]:
        return [emitted.event.type_name() for emitted in self.events]


@dataclass
class _Stored:
    columns: Row
    version: int


Address = tuple[str, tuple[Value, ...]]
"""A row: full table name and key values."""


class Rehearsal:
    """The tables of `domains`, empty, and a clock that stands still until `advance`."""

    def __init__(self, domains: Iterable[Domain], *, now_ms: int = START_MS) -> None:
        self.now_ms = now_ms
        self._domains = {domain.name: domain for domain in domains}
        self._tables = {table.full_name: table for domain in self._domains.values() for table in domain.tables}
        self._rows: dict[Address, _Stored] = {}
        self._answers: dict[tuple[str, str, str], Answer] = {}
        self._commands_run = 0

    def advance(self, ms: int) -> None:
        """Let `ms` pass."""
        self.now_ms += ms

    async def run(self, command: Command, *, command_id: str | None = None) -> Answer:
        """Carry out `command`; every run without `command_id` is a new command.

        Raises AssertionError as listed above, and whatever else a handler raises; nothing of it remains then.
        """
        self._commands_run += 1
        command_id = command_id or f"command-{self._commands_run}"
        address = (command.domain, command.routing_key, command_id)
        if address not in self._answers:
            self._answers[address] = await self._answer(command, command_id)
        return self._answers[address]

    async def run_due(self) -> list[Answer]:
        """Let every domain's timer look once, and carry out what it says is due."""
        due = [
            item
            for domain in self._domains.values()
            if domain.due is not None
            for item in await domain.due(_Reader(self), self.now_ms)
        ]
        return [await self.run(command, command_id=command_id) for command_id, command in due]

    def rows(self, table: Table[R]) -> list[R]:
        """Every committed row of `table`, in key order."""
        addresses = sorted(address for address in self._rows if address[0] == table.full_name)
        return [table.from_row(self._rows[address].columns) for address in addresses]

    def row(self, table: Table[R], *key: Value) -> R | None:
        stored = self._rows.get((table.full_name, key))
        return None if stored is None else table.from_row(stored.columns)

    def put(self, table: Table[R], record: R) -> None:
        """Set a row as if an earlier command had written it: for states that are far to reach."""
        address = (table.full_name, table.key_of(record))
        columns: Row = dict(zip(table.key, address[1], strict=True)) | table.to_columns(record)
        version = self._rows[address].version + 1 if address in self._rows else 1
        self._rows[address] = _Stored(columns, version)

    def tables(self) -> dict[str, list[Row]]:
        """Every row as storage has it, by table."""
        rows: dict[str, list[Row]] = {name: [] for name in self._tables}
        for address in sorted(self._rows):
            rows[address[0]].append(dict(self._rows[address].columns))
        return rows

    async def _answer(self, command: Command, command_id: str) -> Answer:
        transaction = _Transaction(self, command, command_id)
        try:
            result = await transaction.carry_out(command)
        except Refused as refusal:
            return Answer(REFUSED, refusal.reason, _json(refusal.details))
        assert not transaction.refusals, f"the refusal of a call was swallowed: {transaction.refusals}"
        return Answer(COMMITTED, result=result, events=transaction.commit())


class _Transaction:
    """What the handlers of one command, and of its calls, do together."""

    def __init__(self, rehearsal: Rehearsal, command: Command, command_id: str) -> None:
        self.rehearsal = rehearsal
        self.command_id = command_id
        self.root = command
        self.tx_id = str(uuid.uuid5(REHEARSAL_NAMESPACE, f"{command.domain}/{command.routing_key}/{command_id}"))
        self.now_ms = rehearsal.now_ms
        self.read: set[Address] = set()
        self.written: dict[Address, Row | None] = {}
        self.refusals: list[Refused] = []
        self.emitted: list[tuple[Event, Address]] = []
        self.one_call_at_a_time = asyncio.Lock()

    async def carry_out(self, command: Command, *, called: bool = False) -> dict[str, Any]:
        assert _travelled(command) == command, f"a command that cannot be read back: {command!r}"
        domain = self.rehearsal._domains[command.domain]
        result = await domain.handlers[type(command)](_View(self, domain, command, called=called), command)
        return _json(result or {})

    def columns(self, address: Address) -> Row | None:
        if address in self.written:
            return self.written[address]
        stored = self.rehearsal._rows.get(address)
        return None if stored is None else stored.columns

    def version_after_commit(self, address: Address) -> int:
        stored = self.rehearsal._rows.get(address)
        return 1 if stored is None else stored.version + 1

    def commit(self) -> tuple[EmittedEvent, ...]:
        for event, address in self.emitted:
            assert self.written.get(address) is not None, f"{type(event).__name__} is about an unwritten {address}"
        events = tuple(
            EmittedEvent(event, (address[0], *address[1]), self.version_after_commit(address))
            for event, address in self.emitted
        )
        for address, columns in self.written.items():
            if columns is None:
                self.rehearsal._rows.pop(address, None)
            else:
                self.rehearsal._rows[address] = _Stored(columns, self.version_after_commit(address))
        return events


class _View:
    """Implements actors.domain.Transaction for one handler's run."""

    def __init__(self, transaction: _Transaction, domain: Domain, command: Command, *, called: bool) -> None:
        self._transaction = transaction
        self._domain = domain
        self._command = command
        self._called = called

    @property
    def command_id(self) -> str:
        return self._transaction.command_id

    @property
    def now_ms(self) -> int:
        return self._transaction.now_ms

    @property
    def tx_id(self) -> str:
        return self._transaction.tx_id

    def new_id(self, *parts: str) -> str:
        root = self._transaction.root
        named = json.dumps([root.domain, root.routing_key, self.command_id, *parts])
        return str(uuid.uuid5(REHEARSAL_NAMESPACE, named))

    async def get(self, table: Table[R], *key: Value) -> R | None:
        address = self._address(table, key)
        self._transaction.read.add(address)
        columns = self._transaction.columns(address)
        return None if columns is None else table.from_row(columns)

    async def scan(self, table: Table[R], routing_key: str, *prefix: Value) -> list[R]:
        assert table.key[0] == table.routing, f"{table.full_name} cannot be scanned by its routing key"
        assert routing_key == self._command.routing_key, f"{routing_key!r} is another owner's"
        beginning = (routing_key, *prefix)
        known = {*self._transaction.rehearsal._rows, *self._transaction.written}
        found = []
        for address in sorted(known):
            if address[0] == table.full_name and address[1][: len(beginning)] == beginning:
                self._transaction.read.add(address)
                columns = self._transaction.columns(address)
                if columns is not None:
                    found.append(table.from_row(columns))
        return found

    async def insert(self, table: Table[R], record: R) -> None:
        address = self._address(table, table.key_of(record))
        assert self._transaction.columns(address) is None, f"insert of a row that is there: {address}"
        self._write(table, address, record)

    async def upsert(self, table: Table[R], record: R) -> None:
        self._write(table, self._address(table, table.key_of(record)), record)

    async def update(self, table: Table[R], record: R) -> None:
        address = self._address(table, table.key_of(record))
        assert self._knows(address), f"update of a row that was not read: {address}"
        assert self._transaction.columns(address) is not None, f"update of a row that is not there: {address}"
        self._write(table, address, record)

    async def delete(self, table: Table[Any], *key: Value) -> None:
        address = self._address(table, key)
        assert self._knows(address), f"delete of a row that was not read: {address}"
        self._transaction.written[address] = None

    async def call(self, command: Command) -> dict[str, Any]:
        assert not self._called, f"{type(self._command).__name__} was itself called and cannot call on"
        async with self._transaction.one_call_at_a_time:
            try:
                return await self._transaction.carry_out(command, called=True)
            except Refused as refusal:
                self._transaction.refusals.append(refusal)
                raise

    def emit(self, event: Event, about: tuple[Any, ...]) -> None:
        table, *key = about
        address = self._address(table, tuple(key))
        assert event.domain == self._domain.name, f"{type(event).__name__} belongs to {event.domain}"
        assert event.routing_key == self._command.routing_key, f"{type(event).__name__} has another routing key"
        assert _travelled(event) == event, f"an event that cannot be read back: {event!r}"
        self._transaction.emitted.append((event, address))

    def _address(self, table: Table[Any], key: Sequence[Value]) -> Address:
        assert table in self._domain.tables, f"{table.full_name} is not a table of {self._domain.name}"
        assert len(key) == len(table.key), f"{table.full_name} is keyed by {table.key}, got {tuple(key)!r}"
        owner = key[table.key.index(table.routing)]
        assert owner == self._command.routing_key, f"{owner!r} is not {type(self._command).__name__}'s routing key"
        return table.full_name, tuple(key)

    def _knows(self, address: Address) -> bool:
        return address in self._transaction.read or address in self._transaction.written

    def _write(self, table: Table[R], address: Address, record: R) -> None:
        columns: Row = dict(zip(table.key, address[1], strict=True)) | table.to_columns(record)
        assert table.from_row(columns) == record, f"a row that cannot be read back: {record!r}"
        self._transaction.written[address] = columns


class _Reader:
    """Implements actors.domain.Reader over the committed rows."""

    def __init__(self, rehearsal: Rehearsal) -> None:
        self._rehearsal = rehearsal

    async def until(self, table: Table[R], limit_ms: int, *, limit: int) -> list[R]:
        due = [row for row in self._rehearsal.rows(table) if getattr(row, table.key[0]) <= limit_ms]
        return due[:limit]


def _travelled(message: M) -> M:
    """`message` after a journey as JSON."""
    return type(message).consume(json.loads(message.model_dump_json()))


def _json(value: dict[str, Any]) -> dict[str, Any]:
    """`value` after a journey as JSON. Raises TypeError for what is not."""
    text = json.dumps(value, allow_nan=False)
    travelled: dict[str, Any] = json.loads(text)
    return travelled
