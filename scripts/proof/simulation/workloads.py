"""What clients do, and a record of what they saw.

Every namespace has one table; its partitions hold different things:

    0, 1      accounts: transfers keep the sum, and every commit raises two versions
    10, 11    lists: a transaction appends its token, so that the final list tells the order of all appends
    20, 21    items: inserted, deleted, put blindly, scanned, found by colour

A client's transaction is a `Log`: what it read, what it wrote, and what it was told in the end.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from infra.consensus_commit.participant import ParticipantTransaction, Scanner
from infra.consensus_commit.states import Isolation
from infra.consensus_commit.transaction import Transaction
from infra.consensus_commit.two_phase import TwoPhaseCoordinator, TwoPhaseParticipant
from infra.storage.operations import (
    Bound,
    ColumnCondition,
    DataType,
    IndexScan,
    Key,
    Operator,
    Row,
    Scan,
    ScanAll,
    Selection,
    TableSchema,
    Value,
)

NAMESPACES = ("one", "two", "three")
TABLES: Mapping[str, TableSchema] = {
    namespace: TableSchema(
        namespace,
        "record",
        {
            "part": DataType.INT,
            "id": DataType.INT,
            "value": DataType.BIGINT,
            "note": DataType.TEXT,
            "color": DataType.TEXT,
        },
        partition_key=("part",),
        clustering_key=("id",),
        indexes=frozenset({"color"}),
    )
    for namespace in NAMESPACES
}
COLORS = ("red", "blue")
BALANCE = 100

Place: TypeAlias = tuple[str, int, int]
"""(namespace, partition, id)."""
Values: TypeAlias = tuple[Value, Value, Value]
"""(value, note, color)."""


@dataclass(frozen=True)
class Places:
    """Where accounts, lists and items are; few of each, so that clients meet."""

    namespaces: tuple[str, ...]
    accounts: tuple[Place, ...]
    lists: tuple[Place, ...]
    items: tuple[tuple[str, int], ...]

    def initial(self) -> dict[Place, Values]:
        """What is there before the first transaction: every account, and some items."""
        items = [(namespace, part, number) for namespace, part in self.items for number in (1, 3)]
        return {
            **dict.fromkeys(self.accounts, (BALANCE, "", None)),
            **{place: (0, "", COLORS[place[2] // 2]) for place in items},
        }


def places_in(namespaces: tuple[str, ...]) -> Places:
    first, *_, last = namespaces
    return Places(
        namespaces,
        accounts=((first, 0, 0), (first, 0, 1), (first, 1, 0), *((other, 0, 0) for other in namespaces[1:])),
        lists=((first, 10, 0), (first, 11, 0), *((other, 10, 0) for other in namespaces[1:])),
        items=((first, 20), (last, 20), (last, 21)),
    )


@dataclass(slots=True)
class Log:
    """One transaction as its client knows it. Instants are the witness's; `answer` stays "" if the client dies."""

    tx_id: str
    kind: str
    isolation: Isolation
    began_at: int
    reads: list[tuple[Any, ...]] = field(default_factory=list)
    writes: dict[Place, tuple[str, Mapping[str, Value]]] = field(default_factory=dict)
    committing_at: int = 0
    ended_at: int = 0
    answer: str = ""


def values_of(row: Row | None) -> Values | None:
    return None if row is None else (row["value"], row["note"], row["color"])


def key_of(place: Place) -> Key:
    return Key((place[1],), (place[2],))


class TwoPhaseTransaction:
    """A transaction of a coordinator, with a participant for each namespace, behind the methods of a Transaction."""

    def __init__(
        self, coordinator: TwoPhaseCoordinator, participants: Mapping[str, TwoPhaseParticipant], isolation: Isolation
    ) -> None:
        self._coordinator = coordinator
        self._participants = participants
        self.tx_id = coordinator.begin(isolation)

    async def get(self, table: TableSchema, key: Key) -> Row | None:
        return await self._part(table).get(table, key)

    async def get_many(self, table: TableSchema, keys: Sequence[Key]) -> list[Row | None]:
        return await self._part(table).get_many(table, keys)

    async def scan(self, scan: Selection) -> list[Row]:
        return await self._part(scan.table).scan(scan)

    def scanner(self, scan: Selection) -> Scanner:
        return self._part(scan.table).scanner(scan)

    async def insert(self, table: TableSchema, key: Key, columns: Mapping[str, Value]) -> None:
        await self._part(table).insert(table, key, columns)

    async def upsert(self, table: TableSchema, key: Key, columns: Mapping[str, Value]) -> None:
        await self._part(table).upsert(table, key, columns)

    async def update(self, table: TableSchema, key: Key, columns: Mapping[str, Value]) -> None:
        await self._part(table).update(table, key, columns)

    async def put(self, table: TableSchema, key: Key, columns: Mapping[str, Value]) -> None:
        await self._part(table).put(table, key, columns)

    async def delete(self, table: TableSchema, key: Key) -> None:
        await self._part(table).delete(table, key)

    async def commit(self) -> None:
        await self._coordinator.commit(self.tx_id)

    async def __aenter__(self) -> TwoPhaseTransaction:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._coordinator.rollback(self.tx_id)

    def _part(self, table: TableSchema) -> ParticipantTransaction:
        return self._coordinator.enlist(self.tx_id, self._participants[table.namespace])


class LoggedTransaction:
    """The engine's transaction, with a record of what it answered. A record is not read after it was written."""

    def __init__(self, transaction: Transaction | TwoPhaseTransaction, log: Log) -> None:
        self._transaction = transaction
        self.log = log

    async def get(self, place: Place) -> Values | None:
        values = values_of(await self._transaction.get(TABLES[place[0]], key_of(place)))
        self.log.reads.append(("get", place, values))
        return values

    async def get_many(self, places: list[Place]) -> list[Values | None]:
        by_namespace = {place[0]: [other for other in places if other[0] == place[0]] for place in places}
        found: dict[Place, Values | None] = {}
        for namespace, group in by_namespace.items():
            rows = await self._transaction.get_many(TABLES[namespace], [key_of(place) for place in group])
            for place, row in zip(group, rows, strict=True):
                found[place] = values_of(row)
                self.log.reads.append(("get", place, found[place]))
        return [found[place] for place in places]

    async def scan(
        self,
        namespace: str,
        part: int,
        *,
        first: int | None = None,
        limit: int = 0,
        reverse: bool = False,
        color: str | None = None,
    ) -> list[Row]:
        scan = Scan(
            TABLES[namespace],
            (part,),
            start=None if first is None else Bound((first,)),
            where=() if color is None else (ColumnCondition("color", Operator.EQ, color),),
            limit=limit,
            reverse=reverse,
        )
        rows = await self._transaction.scan(scan)
        self.log.reads.append(("scan", namespace, part, first, limit, reverse, color, _found(rows)))
        return rows

    async def first_of_scanner(self, namespace: str, part: int, count: int) -> None:
        """Read at most `count` rows through a scanner, and no further."""
        rows: list[Row] = []
        async with self._transaction.scanner(Scan(TABLES[namespace], (part,))) as scanner:
            while len(rows) < count and (row := await scanner.one()) is not None:
                rows.append(row)
        self.log.reads.append(("scan", namespace, part, None, count, False, None, _found(rows)))

    async def by_color(self, namespace: str, color: str) -> list[Row]:
        rows = await self._transaction.scan(IndexScan(TABLES[namespace], "color", color))
        self.log.reads.append(("everywhere", namespace, color, frozenset(_found(rows))))
        return rows

    async def everything(self, namespace: str) -> list[Row]:
        rows = await self._transaction.scan(ScanAll(TABLES[namespace]))
        self.log.reads.append(("everywhere", namespace, None, frozenset(_found(rows))))
        return rows

    async def write(self, verb: str, place: Place, **columns: Value) -> None:
        """`verb` is the engine's: insert, upsert, update, put or delete."""
        self.log.writes[place] = (verb, columns)
        if verb == "delete":
            await self._transaction.delete(TABLES[place[0]], key_of(place))
        else:
            await getattr(self._transaction, verb)(TABLES[place[0]], key_of(place), columns)


def _found(rows: list[Row]) -> tuple[tuple[Any, Any, Values | None], ...]:
    return tuple((row["part"], row["id"], values_of(row)) for row in rows)


Work: TypeAlias = Callable[[LoggedTransaction], Awaitable[None]]


class Jobs:
    """Draws what a client does next. A job is drawn once and may be tried several times."""

    def __init__(self, places: Places, randomness: random.Random) -> None:
        self._places = places
        self._random = randomness

    def draw(self) -> tuple[str, Work]:
        kinds: Mapping[str, tuple[int, Callable[[], Work]]] = {
            "transfer": (6, self._transfer),
            "append": (6, self._append),
            "read": (2, self._read),
            "audit": (1, self._audit),
            "items": (6, self._items),
            "color": (3, self._color),
        }
        kind = self._random.choices(list(kinds), [weight for weight, _ in kinds.values()])[0]
        return kind, kinds[kind][1]()

    def _transfer(self) -> Work:
        source, target = self._random.sample(self._places.accounts, 2)
        if self._random.random() < 0.3:  # Both in one partition: one phase may do.
            source, target = self._random.sample(self._places.accounts[:2], 2)
        amount = self._random.randint(1, 20)
        together = self._random.random() < 0.5

        async def work(transaction: LoggedTransaction) -> None:
            if together:
                held, there = await transaction.get_many([source, target])
            else:
                held, there = await transaction.get(source), await transaction.get(target)
            assert held is not None, "an account is gone"
            assert there is not None, "an account is gone"
            token = transaction.log.tx_id
            await transaction.write("update", source, value=held[0] - amount, note=token)  # type: ignore[operator]
            await transaction.write("update", target, value=there[0] + amount, note=token)  # type: ignore[operator]

        return work

    def _append(self) -> Work:
        chosen = self._random.sample(self._places.lists, self._random.choice((1, 2, 2)))
        seen = self._random.sample(self._places.lists, self._random.choice((0, 0, 1)))

        async def work(transaction: LoggedTransaction) -> None:
            for place in seen:
                if place not in chosen:
                    await transaction.get(place)
            for place in chosen:
                before = await transaction.get(place)
                token = transaction.log.tx_id
                if before is None:
                    await transaction.write("insert", place, note=token)
                else:
                    await transaction.write("update", place, note=f"{before[1]!s} {token}")

        return work

    def _read(self) -> Work:
        places = [*self._places.lists, self._random.choice(self._places.accounts)]
        self._random.shuffle(places)

        async def work(transaction: LoggedTransaction) -> None:
            for place in places[:3]:
                await transaction.get(place)

        return work

    def _audit(self) -> Work:
        async def work(transaction: LoggedTransaction) -> None:
            for namespace, part in dict.fromkeys((place[0], place[1]) for place in self._places.accounts):
                await transaction.scan(namespace, part)

        return work

    def _items(self) -> Work:
        """One look at a partition, then one or two writes, which the look may or may not bear on."""
        draw = self._random
        (namespace, part), (other, other_part) = draw.sample(self._places.items, 2)
        look = draw.choice(("scan", "limit", "reverse", "scanner", "filter", "get", "nothing"))
        first = draw.choice((None, 1))
        limit = draw.randint(1, 2)
        color = draw.choice(COLORS)
        places = [(other, other_part, number) for number in draw.sample(range(4), draw.choice((1, 1, 2)))]
        if draw.random() < 0.5:  # Into what was looked at, where the engine lets us: below the bound of the scan.
            look, first, places = "scan", 1, [(namespace, part, 0)]
        verbs = [draw.choice(("insert", "upsert", "put", "delete", "delete", "update")) for _ in places]
        colors = [draw.choice(COLORS) for _ in places]

        async def work(transaction: LoggedTransaction) -> None:
            match look:
                case "scan":
                    await transaction.scan(namespace, part, first=first)
                case "limit" | "reverse":
                    await transaction.scan(namespace, part, first=first, limit=limit, reverse=look == "reverse")
                case "scanner":
                    await transaction.first_of_scanner(namespace, part, limit)
                case "filter":
                    await transaction.scan(namespace, part, color=color)
                case "get":
                    await transaction.get((namespace, part, limit))
            for place, verb, new_color in zip(places, verbs, colors, strict=True):
                token = transaction.log.tx_id
                if verb == "delete":
                    await transaction.write("delete", place)
                elif verb == "update":
                    if await transaction.get(place) is not None:
                        await transaction.write("update", place, note=token, color=new_color)
                else:
                    await transaction.write(verb, place, value=1, note=token, color=new_color)

        return work

    def _color(self) -> Work:
        """Look everywhere in one namespace; sometimes then write into another."""
        draw = self._random
        namespace = draw.choice(self._places.namespaces)
        color = draw.choice((*COLORS, None))
        writes = draw.random() < 0.5
        place = (*draw.choice(self._places.items), draw.randrange(4))

        async def work(transaction: LoggedTransaction) -> None:
            if color is None:
                await transaction.everything(namespace)
            else:
                await transaction.by_color(namespace, color)
            if writes and place[0] != namespace:
                await transaction.write("upsert", place, value=2, note=transaction.log.tx_id, color=COLORS[0])

        return work
