"""What the clients of a run do: random transactions on few, hot records in two namespaces and several partitions.

    LISTS        read lists, append to them, scan partitions         judged by the elements' order
    REGISTERS    read, write blindly, read and write                 judged by the records' versions
    TRANSFERS    move money between ten accounts, add it all up      judged by the total, the versions, and as registers

Hot records are given up after a while and new ones taken, or lists would grow without end.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeAlias, cast

from infra.consensus_commit.transaction import Transaction
from infra.storage.operations import DataType, Key, Row, Scan, TableSchema
from scripts.proof.histories.history import Append, Operation, Read, Write

FIRST = TableSchema(
    "bank",
    "history_entry",
    {"place": DataType.TEXT, "id": DataType.INT, "elements": DataType.TEXT, "number": DataType.BIGINT},
    partition_key=("place",),
    clustering_key=("id",),
)
SECOND = TableSchema("shop", "history_entry", FIRST.columns, partition_key=("place",), clustering_key=("id",))
TABLES = (FIRST, SECOND)

ACCOUNTS = 10
OPENING_BALANCE = 10_000

_HOT = 8
"""Records that are hot at a time: two in each of two partitions of two tables."""

_GIVEN_UP_AFTER = 100
"""Transactions begun on one set of hot records."""


class Workload(StrEnum):
    LISTS = "lists"
    REGISTERS = "registers"
    TRANSFERS = "transfers"


@dataclass(frozen=True, slots=True)
class Record:
    """A record of a run: where it is, and what the history calls it."""

    table: TableSchema
    place: str
    number: int

    @property
    def key(self) -> Key:
        return Key((self.place,), (self.number,))

    @property
    def name(self) -> str:
        return f"{self.table.namespace}/{self.place.partition('.')[2]}/{self.number}"


@dataclass(slots=True)
class Attempt:
    """What one transaction has done so far. `total` is what it added up, of all accounts."""

    operations: list[Operation] = field(default_factory=list)
    total: int | None = None


Work: TypeAlias = Callable[[Transaction, Attempt], Coroutine[Any, Any, None]]


def elements_of(row: Row | None) -> tuple[int, ...]:
    text = None if row is None else cast("str | None", row["elements"])
    return tuple(int(element) for element in text.split(",")) if text else ()


def number_of(row: Row | None) -> int | None:
    return None if row is None else cast("int | None", row["number"])


class Script:
    """Decides what the next transaction does. `name` sets the records of a run apart from those of others."""

    def __init__(self, workload: Workload, name: str, randomness: random.Random) -> None:
        self._workload = workload
        self._name = name
        self._random = randomness
        self._begun = 0
        self._values = 0
        self.records: dict[Record, None] = {}

    def next(self) -> Work:
        self._begun += 1
        match self._workload:
            case Workload.LISTS:
                return self._lists()
            case Workload.REGISTERS:
                return self._registers()
            case Workload.TRANSFERS:
                return self._transfer() if self._random.random() < 0.85 else self._add_up()

    def opening(self) -> Work:
        """What comes before everything else, undisturbed: money for the accounts; nothing for the others."""

        async def open_accounts(tx: Transaction, attempt: Attempt) -> None:
            for account in self._accounts():
                attempt.operations.append(Write(account.name, 0))
                await tx.insert(account.table, account.key, {"number": OPENING_BALANCE, "elements": "0"})

        async def nothing(tx: Transaction, attempt: Attempt) -> None:
            return None

        return open_accounts if self._workload is Workload.TRANSFERS else nothing

    # -- the records

    def _hot(self) -> list[Record]:
        group = self._begun // _GIVEN_UP_AFTER
        hot = [Record(TABLES[number % 2], f"{self._name}.{group}-{number // 2 % 2}", number) for number in range(_HOT)]
        self.records.update(dict.fromkeys(hot))
        return hot

    def _accounts(self) -> list[Record]:
        accounts = [
            Record(TABLES[number % 2], f"{self._name}.accounts-{number // 2 % 2}", number) for number in range(ACCOUNTS)
        ]
        self.records.update(dict.fromkeys(accounts))
        return accounts

    def _new_value(self) -> int:
        self._values += 1
        return self._values

    # -- lists

    def _lists(self) -> Work:
        hot = self._hot()
        chosen = [self._random.choice(hot) for _ in range(self._random.randint(1, 4))]
        scanned = self._random.choice(hot) if self._random.random() < 0.2 else None
        reading = self._random.random() < 0.2
        steps = [(record, None if reading or self._random.random() < 0.4 else self._new_value()) for record in chosen]
        at_the_end = self._random.random() < 0.3
        blind_insert = self._random.random() < 0.5

        async def work(tx: Transaction, attempt: Attempt) -> None:
            if scanned is not None:  # Before any write: a scan may not cover one.
                await _read_partition(tx, attempt, scanned, hot)
            for record, element in steps:
                if element is None:
                    await _read_list(tx, attempt, record)
                else:
                    await _append(tx, attempt, record, element, insert=blind_insert)
            if at_the_end:
                await _read_list(tx, attempt, steps[0][0])

        return work

    # -- registers

    def _registers(self) -> Work:
        hot = self._hot()
        reading = self._random.random() < 0.2
        steps: list[tuple[Record, bool, int | None]] = []
        for _ in range(self._random.randint(1, 4)):
            writes = not reading and self._random.random() < 0.6
            reads = not writes or self._random.random() < 0.6
            steps.append((self._random.choice(hot), reads, self._new_value() if writes else None))

        async def work(tx: Transaction, attempt: Attempt) -> None:
            for record, reads, value in steps:
                if reads:
                    found = await tx.get(record.table, record.key)
                    attempt.operations.append(Read(record.name, number_of(found)))
                if value is not None:
                    attempt.operations.append(Write(record.name, value))
                    await tx.upsert(record.table, record.key, {"number": value})

        return work

    # -- transfers

    def _transfer(self) -> Work:
        payer, payee = self._random.sample(self._accounts(), 2)
        amount = self._random.randint(1, 100)
        tag = self._new_value()

        async def work(tx: Transaction, attempt: Attempt) -> None:
            for account, change in ((payer, -amount), (payee, amount)):
                row = await _read_account(tx, attempt, account)
                attempt.operations.append(Write(account.name, tag))
                changed: Row = {"number": cast(int, row["number"]) + change, "elements": str(tag)}
                await tx.upsert(account.table, account.key, changed)

        return work

    def _add_up(self) -> Work:
        accounts = self._accounts()
        scanning = self._random.random() < 0.5

        async def work(tx: Transaction, attempt: Attempt) -> None:
            total = 0
            if scanning:
                for table, place in dict.fromkeys((account.table, account.place) for account in accounts):
                    for row in await tx.scan(Scan(table, (place,))):
                        record = Record(table, place, cast(int, row["id"]))
                        attempt.operations.append(Read(record.name, elements_of(row)[0]))
                        total += cast(int, row["number"])
            else:
                for account in accounts:
                    total += cast(int, (await _read_account(tx, attempt, account))["number"])
            attempt.total = total

        return work

    def rewrite_accounts(self) -> Work:
        """Read and write every account, as the last transaction of all."""
        accounts, tag = self._accounts(), self._new_value()

        async def work(tx: Transaction, attempt: Attempt) -> None:
            attempt.operations.clear()
            total = 0
            for account in accounts:
                row = await _read_account(tx, attempt, account)
                total += cast(int, row["number"])
                attempt.operations.append(Write(account.name, tag))
                await tx.update(account.table, account.key, {"number": row["number"], "elements": str(tag)})
            attempt.total = total

        return work

    def read_back(self, records: list[Record]) -> Work:
        """Read records at the end, as what they were used for."""

        async def work(tx: Transaction, attempt: Attempt) -> None:
            attempt.operations.clear()
            rows = [(record, await tx.get(record.table, record.key)) for record in records]
            for record, row in rows:
                match self._workload:
                    case Workload.LISTS:
                        attempt.operations.append(Read(record.name, elements_of(row)))
                    case Workload.REGISTERS:
                        attempt.operations.append(Read(record.name, number_of(row)))
                    case Workload.TRANSFERS:
                        attempt.operations.append(Read(record.name, elements_of(row)[0]))

        return work


async def _read_list(tx: Transaction, attempt: Attempt, record: Record) -> tuple[int, ...]:
    found = elements_of(await tx.get(record.table, record.key))
    attempt.operations.append(Read(record.name, found))
    return found


async def _read_partition(tx: Transaction, attempt: Attempt, beside: Record, hot: list[Record]) -> None:
    rows = {cast(int, row["id"]): row for row in await tx.scan(Scan(beside.table, (beside.place,)))}
    for record in hot:
        if (record.table, record.place) == (beside.table, beside.place):
            attempt.operations.append(Read(record.name, elements_of(rows.get(record.number))))


async def _append(tx: Transaction, attempt: Attempt, record: Record, element: int, *, insert: bool) -> None:
    found = await _read_list(tx, attempt, record)
    attempt.operations.append(Append(record.name, element))
    columns = {"elements": ",".join(map(str, (*found, element)))}
    if insert and not found:
        await tx.insert(record.table, record.key, columns)
    else:
        await tx.upsert(record.table, record.key, columns)


async def _read_account(tx: Transaction, attempt: Attempt, account: Record) -> Row:
    row = await tx.get(account.table, account.key)
    assert row is not None, f"account {account.name} is gone"
    attempt.operations.append(Read(account.name, elements_of(row)[0]))
    return row
