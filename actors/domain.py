"""What a domain author imports: Domain, Table, Record, Refused, and the Transaction that a handler is given.

A domain is a folder under `actors/`: its tables, and one pure coroutine for each command. No Kafka, no Ray, no SQL.
A handler is deterministic given what it reads; time and ids come from the transaction.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import NoneType, UnionType
from typing import Any, Generic, Protocol, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, TypeAdapter

from infra.consensus_commit.metadata import is_transactional, layout_of
from infra.storage.operations import DataType, Key, Row, TableSchema, Value
from schemas.message import Command, Event
from schemas.partitioning import slot

COLUMN_TYPES: Mapping[type, DataType] = {
    bool: DataType.BOOLEAN,
    int: DataType.BIGINT,
    float: DataType.DOUBLE,
    str: DataType.TEXT,
    bytes: DataType.BLOB,
}
"""How a field of a Record becomes a column; every other type is a TEXT column that holds JSON."""


class Refused(Exception):
    """The command cannot be done, and that is its answer: everything it did is undone in every domain.

    `reason` is a stable snake_case word for programs, `details` what a person wants to know besides.
    """

    def __init__(self, reason: str, **details: Any) -> None:
        super().__init__(reason, details)
        self.reason = reason
        self.details = details


class Record(BaseModel):
    """One row of a table as a frozen value. `row.with_(column=…)` is the same row with other values."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    def with_(self, **changes: Any) -> Any:
        return self.model_copy(update=changes)


R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Table(Generic[R]):
    """One table of a domain. `key` are the clustering columns in order; `routing` the one that names the owner.

    In storage its partition key is `bucket` (from the routing column), and for a table that grows with history also
    `slice`: a hash of the column `sliced_by` modulo `slices`, so that no partition grows without bound while a look-up
    by key stays one read. A table of timers has `period` instead: its first key column, a time in ms since the epoch,
    in units of `period_ms`; `Reader.until` says why.
    """

    namespace: str
    name: str
    record: type[R]
    key: tuple[str, ...]
    routing: str
    sliced_by: str = ""
    slices: int = 1
    period_ms: int = 0

    def __hash__(self) -> int:
        return hash((self.namespace, self.name))

    @property
    def full_name(self) -> str:
        return f"{self.namespace}.{self.name}"

    @cached_property
    def schema(self) -> TableSchema:
        """The table as storage has it, without the transaction's own columns: as declared, and what is carried."""
        return self.declared

    def carry(self, stored: TableSchema | None) -> None:
        """From now on also handle the columns that `stored`, the user's view of the table in storage, has besides.

        They are those of a later release, which runs beside this one or is about to. No record shows them and no
        handler writes them; but they are read, and a before-image holds them, so that they survive whatever this
        process does to the row. A `stored` that is not this table with more columns is left to the storage to refuse.
        """
        declared = self.declared
        self.__dict__["schema"] = stored if stored is not None and _is_wider(stored, declared) else declared

    @cached_property
    def declared(self) -> TableSchema:
        """The table as this release declares it."""
        columns = dict.fromkeys(self._partition_key, DataType.INT)
        for name, info in self.record.model_fields.items():
            columns[name] = COLUMN_TYPES.get(_plain(info.annotation), DataType.TEXT)
        ordered = {name: columns[name] for name in (*self._partition_key, *self.key)} | columns
        return TableSchema(self.namespace, self.name, ordered, self._partition_key, self.key)

    @property
    def _partition_key(self) -> tuple[str, ...]:
        """The bucket first: by it a partition's owner is found."""
        if self.period_ms:
            return ("bucket", "period")
        return ("bucket", "slice") if self.sliced_by else ("bucket",)

    def storage_key(self, key: Sequence[Value], *, buckets: int) -> Key:
        """Where the row with these key values (in the order of `key`) lies."""
        assert len(key) == len(self.key), f"{self.full_name} is keyed by {self.key}, got {tuple(key)!r}"
        partition: tuple[Value, ...] = (slot(str(key[self.key.index(self.routing)]), buckets),)
        if self.sliced_by:
            partition += (slot(str(key[self.key.index(self.sliced_by)]), self.slices),)
        elif self.period_ms:
            due_at_ms = key[0]
            assert isinstance(due_at_ms, int), f"{self.full_name} is keyed by a time in ms, got {due_at_ms!r}"
            partition += (due_at_ms // self.period_ms,)
        return Key(partition, tuple(key))

    def partitions_of(self, routing_key: str, *, buckets: int) -> list[tuple[Value, ...]]:
        """Every partition that rows of `routing_key` may lie in. A table of timers has no such list."""
        assert not self.period_ms, f"{self.full_name} has partitions without end"
        bucket = slot(routing_key, buckets)
        return [(bucket, number) for number in range(self.slices)] if self.sliced_by else [(bucket,)]

    def key_of(self, record: R) -> tuple[Value, ...]:
        return tuple(getattr(record, name) for name in self.key)

    def to_columns(self, record: R, *, was: tuple[R, Row] | None = None) -> dict[str, Value]:
        """The columns that are not part of the primary key, as storage takes them.

        `was` is the record as it was read, with its row: a column of JSON whose value is the same keeps its text, and
        with it what a later release has put there and this one does not know.
        """
        columns: dict[str, Value] = {}
        for name, adapter in self._codecs.items():
            value = getattr(record, name)
            if adapter is not None and value is not None:
                if was is not None and getattr(was[0], name) == value:
                    value = was[1].get(name)
                else:
                    value = adapter.dump_json(value).decode()
            columns[name] = value
        return columns

    def from_row(self, row: Row) -> R:
        """The record that a stored row holds. Raises pydantic.ValidationError where another writer broke it."""
        values: dict[str, Any] = {name: row.get(name) for name in self.record.model_fields}
        for name, adapter in self._codecs.items():
            if adapter is not None and values[name] is not None:
                values[name] = adapter.validate_json(values[name])
        return self.record.model_validate(values)

    @cached_property
    def _codecs(self) -> dict[str, TypeAdapter[Any] | None]:
        return {
            name: None if _plain(info.annotation) in COLUMN_TYPES else TypeAdapter(info.annotation)
            for name, info in self.record.model_fields.items()
            if name not in self.key
        }


class Transaction(Protocol):
    """What a handler may do. All of it takes effect together, with what the other domains did, or not at all."""

    @property
    def command_id(self) -> str: ...

    @property
    def now_ms(self) -> int:
        """When this attempt of the command began, in ms since the epoch: the same in every domain it calls."""

    @property
    def tx_id(self) -> str: ...

    def new_id(self, *parts: str) -> str:
        """A UUIDv5 of the command and `parts`: the same in every attempt and every redelivery."""

    async def get(self, table: Table[R], *key: Value) -> R | None: ...

    async def scan(self, table: Table[R], routing_key: str, *prefix: Value) -> list[R]:
        """The rows of one routing key whose further key columns begin with `prefix`, in key order."""

    async def insert(self, table: Table[R], record: R) -> None:
        """Write a row that must be absent; if another transaction has just inserted it, this attempt is repeated."""

    async def upsert(self, table: Table[R], record: R) -> None: ...

    async def update(self, table: Table[R], record: R) -> None:
        """Write a row that this transaction has read."""

    async def delete(self, table: Table[R], *key: Value) -> None: ...

    async def call(self, command: Command) -> dict[str, Any]:
        """Run `command` in its own domain as part of this transaction; its handler's result. May raise Refused.

        Calls to one domain run in the order they were made, also under `gather`. A handler that is itself called
        cannot call on.
        """

    def emit(self, event: Event, about: tuple[Any, ...]) -> None:
        """Publish `event` if this commits. `about` is (table, *key): the event carries that record's new version."""


Handler = Callable[[Transaction, Any], Awaitable[dict[str, Any] | None]]


class Reader(Protocol):
    """Committed rows of one actor's buckets, for what a domain does on a timer."""

    async def until(self, table: Table[R], limit_ms: int, *, limit: int) -> list[R]:
        """Rows of every bucket of this actor whose first key column is at most `limit_ms`, at most `limit`.

        `table` has a `period_ms`: so long that looking is cheap, so short that one bucket's timers of one period,
        which are deleted by and by, are never too many for a read. Cassandra refuses it at 100,000.
        """


Due = Callable[[Reader, int], Awaitable[list[tuple[str, Command]]]]


@dataclass
class Domain:
    """A name, its tables and its handlers. `due` names what time itself asks for: commands to publish now."""

    name: str
    tables: tuple[Table[Any], ...]
    handlers: dict[type[Command], Handler] = field(default_factory=dict)
    due: Due | None = None

    def handles(self, command: type[Command]) -> Callable[[Handler], Handler]:
        """Register the handler of one command of this domain."""
        assert command.domain == self.name, f"{command.__name__} belongs to {command.domain}"

        def register(handler: Handler) -> Handler:
            assert command not in self.handlers, f"{command.__name__} has a handler already"
            self.handlers[command] = handler
            return handler

        return register

    def on_time(self, due: Due) -> Due:
        """Register the coroutine that, given committed rows and the time in ms, says which commands are due.

        It returns (command id, command). It may say the same command twice (after a restart, or while the first
        waits): the id must then be the same, which is why timers derive ids from what they act on.
        """
        assert self.due is None
        self.due = due
        return due


def carry_stored_columns(tables: Iterable[Table[Any]], stored: Iterable[TableSchema]) -> None:
    """Let each of `tables` carry what `stored`, the tables of a storage, has besides (see `Table.carry`)."""
    views = {table.full_name: layout_of(table).user for table in stored if is_transactional(table)}
    for table in tables:
        table.carry(views.get(table.full_name))


def _is_wider(stored: TableSchema, declared: TableSchema) -> bool:
    return (
        stored.partition_key == declared.partition_key
        and stored.clustering_key == declared.clustering_key
        and stored.descending == declared.descending
        and declared.columns.items() < stored.columns.items()
    )


def _plain(annotation: Any) -> type:
    """The type behind `X | None`, or the annotation itself."""
    if get_origin(annotation) in (Union, UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
        annotation = kinds[0] if len(kinds) == 1 else object
    if isinstance(annotation, type) and issubclass(annotation, str):
        return str
    return annotation if isinstance(annotation, type) else object


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values have equal texts."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
