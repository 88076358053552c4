"""The anomalies of Hermitage on our data model: prevented where we say so, and reproducible where we do not.

    anomaly                              READ_COMMITTED   SNAPSHOT    SERIALIZABLE
    ─────────────────────────────────────────────────────────────────────────────
    G0        write cycle                prevented        prevented   prevented
    G1a       aborted read               prevented        prevented   prevented
    G1b       intermediate read          prevented        prevented   prevented
    G1c       circular flow              prevented        prevented   prevented
    P4        lost update                prevented        prevented   prevented
    OTV       observed vanishing         allowed          prevented   prevented
              stale read                 allowed          prevented   prevented
    P2        read not to be repeated    allowed          prevented   prevented
    PMP       phantom                    allowed          allowed     prevented
    G-single  read skew                  allowed          allowed     prevented, for read-only transactions too
    G2-item   write skew                 allowed          allowed     prevented
    G2        predicate write skew       allowed          allowed     prevented

Two rows, 1 with 10 and 2 with 20: in one partition, in two, in two namespaces, or in two storages. Each history is
driven one step at a time, by one manager or with a participant for each namespace; a transaction that meets a conflict
is out, and only committed ones may show the anomaly. A history returns whether they do. That the allowed ones can be
seen proves that the histories are able to show them. Beside the classes themselves stand the traps of this protocol:
rows that are absent, rows that were deleted and inserted again, blind writes, records that another has prepared, and
indexes while their column is being changed.

In full on memory and SQLite; on real servers many histories at a time, so that one test holds them all.

After P. Bailis et al., "Highly Available Transactions", and M. Kleppmann's Hermitage.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from faults import Call, FaultyStorage, Matcher, following, writes_to
from protocol_world import ACCOUNT, INDEXED, STOCK, World

from infra.consensus_commit.errors import IllegalOperationError, TransactionConflictError
from infra.consensus_commit.manager import TransactionManager
from infra.consensus_commit.metadata import transactional
from infra.consensus_commit.participant import ParticipantTransaction
from infra.consensus_commit.states import Isolation
from infra.consensus_commit.transaction import Transaction
from infra.consensus_commit.two_phase import TwoPhaseCoordinator, TwoPhaseParticipant
from infra.storage.memory import MemoryStorage
from infra.storage.multi import MultiStorage
from infra.storage.operations import Atomicity, Bound, IndexScan, Key, Row, Scan, Selection, TableSchema
from infra.storage.port import Storage
from tests.storages import LOCAL, SERVERS

READ_COMMITTED, SNAPSHOT, SERIALIZABLE = Isolation.READ_COMMITTED, Isolation.SNAPSHOT, Isolation.SERIALIZABLE

AT_ONCE = 8
"""Histories that play side by side on a server."""


@dataclass(frozen=True)
class Place:
    """Where the two rows lie: the table and partition of each, counted from a stage's first partition."""

    name: str
    first: tuple[TableSchema, int]
    second: tuple[TableSchema, int]
    two_storages: bool = False


ONE_PARTITION = Place("one partition", (ACCOUNT, 0), (ACCOUNT, 0))
TWO_PARTITIONS = Place("two partitions", (ACCOUNT, 0), (ACCOUNT, 1))
TWO_NAMESPACES = Place("two namespaces", (ACCOUNT, 0), (STOCK, 0))
TWO_STORAGES = Place("two storages", (ACCOUNT, 0), (STOCK, 0), two_storages=True)
PLACES = (ONE_PARTITION, TWO_PARTITIONS, TWO_NAMESPACES, TWO_STORAGES)


# -- the two ways to drive a transaction


class Apart:
    """A transaction with a participant for each namespace, driven through the two-phase interface."""

    def __init__(
        self, coordinator: TwoPhaseCoordinator, participants: Mapping[str, TwoPhaseParticipant], isolation: Isolation
    ) -> None:
        self._coordinator = coordinator
        self._participants = participants
        self.tx_id = coordinator.begin(isolation)

    def _part(self, table: TableSchema) -> ParticipantTransaction:
        return self._coordinator.enlist(self.tx_id, self._participants[table.namespace])

    async def get(self, table: TableSchema, key: Key) -> Row | None:
        return await self._part(table).get(table, key)

    async def scan(self, scan: Selection) -> list[Row]:
        return await self._part(scan.table).scan(scan)

    async def upsert(self, table: TableSchema, key: Key, columns: Row) -> None:
        await self._part(table).upsert(table, key, columns)

    async def insert(self, table: TableSchema, key: Key, columns: Row) -> None:
        await self._part(table).insert(table, key, columns)

    async def put(self, table: TableSchema, key: Key, columns: Row) -> None:
        await self._part(table).put(table, key, columns)

    async def delete(self, table: TableSchema, key: Key) -> None:
        await self._part(table).delete(table, key)

    async def commit(self) -> None:
        await self._coordinator.commit(self.tx_id)

    async def rollback(self) -> None:
        await self._coordinator.rollback(self.tx_id)


Begin = Callable[[Isolation], "Transaction | Apart"]
Api = Callable[[World, TransactionManager, Storage], Begin]


def by_one_manager(world: World, manager: TransactionManager, storage: Storage) -> Begin:
    return manager.begin


def by_participants(world: World, manager: TransactionManager, storage: Storage) -> Begin:
    coordinator = TwoPhaseCoordinator(manager.states, world.clock, one_phase_commit=False)
    participants = {
        namespace: TwoPhaseParticipant(namespace, storage, manager.recovery, world.clock)
        for namespace in (ACCOUNT.namespace, STOCK.namespace)
    }
    return lambda isolation: Apart(coordinator, participants, isolation)


APIS: tuple[Api, ...] = (by_one_manager, by_participants)


# -- what the histories are made of


class Session:
    """One transaction of a history. After a conflict it is out: further steps do nothing."""

    def __init__(self, transaction: Transaction | Apart, stage: Stage) -> None:
        self._transaction = transaction
        self._stage = stage
        self.committed = False
        self.out = False

    @property
    def tx_id(self) -> str:
        return self._transaction.tx_id

    async def get(self, number: int, *, beside: int | None = None) -> Any:
        """The row's value, None if absent (or if this session is out)."""
        row: Row | None = await self._step(self._transaction.get(*self._stage.row(number, beside)))
        return None if row is None else row["balance"]

    async def put(self, number: int, value: int) -> None:
        await self._step(self._transaction.upsert(*self._stage.row(number), {"balance": value}))

    async def put_blindly(self, number: int, value: int) -> None:
        await self._step(self._transaction.put(*self._stage.row(number), {"balance": value}))

    async def delete(self, number: int) -> None:
        await self._step(self._transaction.delete(*self._stage.row(number)))

    async def insert(self, number: int, value: int, *, beside: int | None = None) -> None:
        """Insert a row into the partition that another lies in."""
        await self._step(self._transaction.insert(*self._stage.row(number, beside), {"balance": value}))

    async def scan(self, number: int, *, up_to: int = 99) -> list[Any]:
        """Values of the rows up to a number in the partition that a row lies in."""
        table, key = self._stage.row(number)
        rows = await self._step(self._transaction.scan(Scan(table, key.partition, end=Bound((up_to,)))))
        return [row["balance"] for row in rows or []]

    async def find(self, value: int, *, limit: int = 0) -> list[Any]:
        """The numbers of the indexed rows that have a value; a `limit` makes it another scan, to be read anew."""
        scan = IndexScan(INDEXED, "balance", self._stage.indexed_value(value), limit=limit)
        return [row["id"] for row in await self._step(self._transaction.scan(scan)) or []]

    async def put_indexed(self, number: int, value: int) -> None:
        columns: Row = {"balance": self._stage.indexed_value(value)}
        await self._step(self._transaction.upsert(INDEXED, self._stage.indexed_key(number), columns))

    async def commit(self) -> None:
        if not self.out:
            await self._step(self._transaction.commit())
            self.committed = not self.out

    async def _step(self, operation: Awaitable[Any]) -> Any:
        if self.out:
            operation.close()  # type: ignore[attr-defined]
            return None
        try:
            return await operation
        except TransactionConflictError:
            self.out = True
            return None


class Stage:
    """The two rows, two indexed ones, and sessions over them. `number` sets them apart from other stages' rows."""

    def __init__(self, world: World, place: Place, isolation: Isolation, api: Api, number: int) -> None:
        self.world = world
        self.place = place
        self.isolation = isolation
        self.storage = FaultyStorage(world.plain_storage)
        self._number = number
        self._api = api
        self._here = api(world, world.process(self.storage), self.storage)

    def row(self, number: int, beside: int | None = None) -> tuple[TableSchema, Key]:
        table, partition = self.place.first if (beside or number) == 1 else self.place.second
        return table, Key((self._number * 2 + partition,), (number,))

    def indexed_key(self, number: int) -> Key:
        return Key((self._number,), (number,))

    def indexed_value(self, value: int) -> int:
        return self._number * 1000 + value

    def session(self) -> Session:
        return Session(self._here(self.isolation), self)

    def elsewhere(self) -> Session:
        """A session of another process."""
        manager = self.world.process()
        return Session(self._api(self.world, manager, self.world.plain_storage)(self.isolation), self)

    async def set_up(self) -> None:
        setup = self.world.process().begin()
        for number in (1, 2):
            await setup.insert(*self.row(number), {"balance": number * 10})
            await setup.insert(INDEXED, self.indexed_key(number), {"balance": self.indexed_value(number * 10)})
        await setup.commit()

    def interrupt(self, matches: Matcher, visitor: Callable[[], Awaitable[object]]) -> None:
        """Let `visitor` act just before this stage's own process makes a call."""
        self.storage.visit_before(matches, visitor)

    def decides(self) -> Matcher:
        return writes_to(self.world.states.table)

    def settles(self, number: int) -> Matcher:
        """The write that makes a row say that its transaction has committed."""
        table, key = self.row(number)
        name = transactional(table).full_name

        def writes_row(call: Call) -> bool:
            return any(mutation.table.full_name == name and mutation.key == key for mutation in call.mutations)

        return following(self.decides(), writes_row)

    async def values(self) -> list[Any]:
        """The two rows' values, read by a new process when everything is over."""
        reader = self.world.process().begin()
        rows = [await reader.get(*self.row(number)) for number in (1, 2)]
        await reader.commit()
        return [row and row["balance"] for row in rows]


# -- never


async def write_cycle(stage: Stage) -> bool:
    one, two = stage.session(), stage.session()
    await one.put(1, 11)
    await two.put(1, 12)
    await one.put(2, 21)
    await two.put(2, 22)
    await two.commit()
    await one.commit()
    return await stage.values() not in ([11, 21], [12, 22])


async def aborted_read(stage: Stage) -> bool:
    """T2 reads what T1 has prepared; then T1 finds that it cannot commit."""
    one, two = stage.session(), stage.session()
    seen: list[Any] = []

    async def others_interfere() -> None:
        seen.append(await two.get(1))
        await stage.world.process().states.abort_state(one.tx_id)

    await one.put(1, 101)
    await one.put(2, 102)
    stage.interrupt(stage.decides(), others_interfere)
    await one.commit()
    seen.append(await two.get(1))
    await two.commit()
    assert not one.committed
    return two.committed and 101 in seen


async def intermediate_read(stage: Stage) -> bool:
    one, two = stage.session(), stage.session()
    await one.put(1, 101)
    seen = [await two.get(1)]
    await one.put(1, 11)
    await one.commit()
    seen.append(await two.get(1))
    await two.commit()
    return two.committed and 101 in seen


async def circular_flow(stage: Stage) -> bool:
    one, two = stage.session(), stage.session()
    await one.put(1, 11)
    await two.put(2, 22)
    first, second = await one.get(2), await two.get(1)
    await one.commit()
    await two.commit()
    return one.committed and two.committed and first == 22 and second == 11


async def lost_update(stage: Stage) -> bool:
    one, two = stage.session(), stage.session()
    first, second = await one.get(1), await two.get(1)
    await one.put(1, first + 1)
    await two.put(1, second + 1)
    await one.commit()
    await two.commit()
    return one.committed and two.committed


async def lost_update_of_a_row_that_was_made_anew(stage: Stage) -> bool:
    """T1 read it; it was deleted and inserted with the same value and the same version: that is another row."""
    one, two, three = stage.session(), stage.session(), stage.session()
    found = await one.get(1)
    await two.delete(1)
    await two.commit()
    await three.insert(1, 10)
    await three.commit()
    await one.put(1, found + 1)
    await one.commit()
    assert two.committed
    assert three.committed
    return one.committed


async def blind_write_over_a_row_that_was_not_read(stage: Stage) -> bool:
    one = stage.session()
    await one.put_blindly(1, 11)
    await one.commit()
    return one.committed


async def row_missed_by_an_index_while_its_column_changes(stage: Stage) -> bool:
    """T2 asks for the old and for the new value while T1 is between the two: the row has exactly one of them."""
    one, two = stage.session(), stage.elsewhere()
    found: list[Any] = []

    async def look() -> None:
        found.extend(await two.find(10))
        found.extend(await two.find(50))

    await one.put_indexed(1, 50)
    stage.interrupt(stage.decides(), look)
    await one.commit()
    await two.commit()
    assert one.committed
    return two.committed and found != [1]


# -- under READ_COMMITTED


async def observed_transaction_vanishes(stage: Stage) -> bool:
    """T3 reads when T2 has committed and not all of its records say so: it must see all of T2, and go on seeing it."""
    one, two, three = stage.session(), stage.session(), stage.elsewhere()
    await one.put(1, 11)
    await one.put(2, 19)
    await one.commit()
    await two.put(1, 12)
    await two.put(2, 18)
    seen: list[Any] = []

    async def read_between() -> None:
        seen.append(await three.get(1))
        seen.append(await three.get(2))

    stage.interrupt(stage.settles(2), read_between)
    await two.commit()
    seen.append(await three.get(2))
    seen.append(await three.get(1))
    await three.commit()
    assert two.committed
    assert len(seen) == 4
    return three.committed and seen != [12, 18, 18, 12]


async def stale_read(stage: Stage) -> bool:
    """T1 has committed, and its process died before its records said so. T2 begins afterwards."""
    one = stage.world.participant()
    await one.upsert(*stage.row(1), {"balance": 11})
    await one.prepare_records(stage.world.clock.now_ms())
    await stage.world.process().states.commit_state(one.tx_id, stage.world.clock.now_ms())

    two = stage.session()
    seen = await two.get(1)
    await two.commit()
    return two.committed and seen == 10


async def read_that_cannot_be_repeated(stage: Stage) -> bool:
    one, two = stage.session(), stage.session()
    before = await one.get(1)
    await two.put(1, 11)
    await two.commit()
    after = await one.get(1)
    await one.commit()
    assert two.committed
    return one.committed and (before, after) == (10, 11)


async def scan_that_cannot_be_repeated(stage: Stage) -> bool:
    one, two = stage.session(), stage.session()
    before = await one.scan(1)
    await two.insert(30, 30, beside=1)
    await two.commit()
    after = await one.scan(1)
    await one.commit()
    assert two.committed
    return one.committed and 30 not in before and 30 in after


# -- under SNAPSHOT


async def phantom(stage: Stage) -> bool:
    """T1 looks twice, the second time a bit further, and sees a row that T2 has put among those it had seen."""
    one, two = stage.session(), stage.session()
    before = await one.scan(1, up_to=50)
    await two.insert(30, 30, beside=1)
    await two.commit()
    after = await one.scan(1, up_to=60)
    await one.commit()
    assert two.committed
    return one.committed and 30 not in before and 30 in after


async def phantom_by_index(stage: Stage) -> bool:
    one, two = stage.session(), stage.session()
    before = await one.find(50)
    await two.put_indexed(1, 50)
    await two.commit()
    after = await one.find(50, limit=9)
    await one.commit()
    assert two.committed
    return one.committed and (before, after) == ([], [1])


async def read_skew(stage: Stage) -> bool:
    one, two = stage.session(), stage.session()
    first = await one.get(1)
    await two.put(1, 12)
    await two.put(2, 18)
    await two.commit()
    second = await one.get(2)
    await one.commit()
    assert two.committed
    return one.committed and (first, second) == (10, 18)


async def read_skew_of_a_writer(stage: Stage) -> bool:
    """As read skew, but T1 also writes, elsewhere."""
    one, two = stage.session(), stage.session()
    first = await one.get(1)
    await two.put(1, 12)
    await two.put(2, 18)
    await two.commit()
    second = await one.get(2)
    await one.insert(40, 40, beside=1)
    await one.commit()
    assert two.committed
    return one.committed and (first, second) == (10, 18)


async def read_skew_about_an_absent_row(stage: Stage) -> bool:
    one, two = stage.session(), stage.session()
    first = await one.get(30, beside=1)
    await two.insert(30, 30, beside=1)
    await two.put(2, 18)
    await two.commit()
    second = await one.get(2)
    await one.commit()
    assert two.committed
    return one.committed and (first, second) == (None, 18)


async def read_skew_behind_a_row_that_was_made_anew(stage: Stage) -> bool:
    """The row that T1 read is there again, in its first version as before: only its transaction's id tells."""
    one, two, three = stage.session(), stage.session(), stage.session()
    first = await one.get(1)
    await two.delete(1)
    await two.put(2, 18)
    await two.commit()
    await three.insert(1, 12)
    await three.commit()
    second = await one.get(2)
    await one.commit()
    assert two.committed
    assert three.committed
    return one.committed and (first, second) == (10, 18)


async def write_skew(stage: Stage) -> bool:
    one, two = stage.session(), stage.session()
    for session in (one, two):
        await session.get(1)
        await session.get(2)
    await one.put(1, 11)
    await two.put(2, 21)
    await one.commit()
    await two.commit()
    return one.committed and two.committed


async def write_skew_on_absent_rows(stage: Stage) -> bool:
    one, two = stage.session(), stage.session()
    await one.get(31, beside=2)
    await two.get(30, beside=1)
    await one.insert(30, 30, beside=1)
    await two.insert(31, 31, beside=2)
    await one.commit()
    await two.commit()
    return one.committed and two.committed


async def write_skew_with_one_that_has_prepared(stage: Stage) -> bool:
    """T2 has prepared and validated when T1 does: T1 must not take what T2 replaces for what it read."""
    one, two = stage.session(), stage.world.participant(isolation=stage.isolation)
    await two.get(*stage.row(2))
    await two.upsert(*stage.row(1), {"balance": 11})
    await one.get(1)
    await one.put(2, 21)
    now_ms = stage.world.clock.now_ms()
    await two.prepare_records(now_ms)
    await two.validate_records()
    await one.commit()
    await stage.world.process().states.commit_state(two.tx_id, now_ms)
    await two.commit_records(now_ms)
    assert await stage.world.state(two.tx_id) is not None
    return one.committed


async def predicate_write_skew(stage: Stage) -> bool:
    one, two = stage.session(), stage.session()
    for session in (one, two):
        await session.scan(1)
        await session.scan(2)
    await one.insert(30, 30, beside=1)
    await two.insert(31, 42, beside=2)
    await one.commit()
    await two.commit()
    return one.committed and two.committed


async def write_skew_by_index(stage: Stage) -> bool:
    """Each gives a row the value that the other has found nowhere."""
    one, two = stage.session(), stage.session()
    nothing = [await one.find(50), await two.find(60)]
    await one.put_indexed(1, 60)
    await two.put_indexed(2, 50)
    await one.commit()
    await two.commit()
    return one.committed and two.committed and nothing == [[], []]


async def read_only_anomaly(stage: Stage) -> bool:
    """Fekete's: T1 and T2 alone are serializable as T1, T2; the reader T3 sees T2's effect without T1's."""
    one, two, three = stage.session(), stage.session(), stage.session()
    await one.get(1)
    await one.get(2)
    await two.get(2)
    await two.put(2, 25)
    await two.commit()
    seen = [await three.get(1), await three.get(2)]
    await three.commit()
    await one.put(1, 0)
    await one.commit()
    return one.committed and two.committed and three.committed and seen == [10, 25]


History = Callable[[Stage], Awaitable[bool]]

ALLOWED: Mapping[Isolation, tuple[History, ...]] = {
    READ_COMMITTED: (
        observed_transaction_vanishes,
        stale_read,
        read_that_cannot_be_repeated,
        scan_that_cannot_be_repeated,
    ),
    SNAPSHOT: (
        phantom,
        phantom_by_index,
        read_skew,
        read_skew_of_a_writer,
        read_skew_about_an_absent_row,
        read_skew_behind_a_row_that_was_made_anew,
        write_skew,
        write_skew_on_absent_rows,
        write_skew_with_one_that_has_prepared,
        predicate_write_skew,
        write_skew_by_index,
        read_only_anomaly,
    ),
    SERIALIZABLE: (),
}
"""What each level allows besides what the next higher one does."""

NEVER: tuple[History, ...] = (
    write_cycle,
    aborted_read,
    intermediate_read,
    circular_flow,
    lost_update,
    lost_update_of_a_row_that_was_made_anew,
    blind_write_over_a_row_that_was_not_read,
    row_missed_by_an_index_while_its_column_changes,
)
HISTORIES = (*NEVER, *ALLOWED[READ_COMMITTED], *ALLOWED[SNAPSHOT])
BY_INDEX = (row_missed_by_an_index_while_its_column_changes, phantom_by_index, write_skew_by_index)


def is_allowed(history: History, isolation: Isolation) -> bool:
    levels = list(ALLOWED)
    return any(history in ALLOWED[level] for level in levels[levels.index(isolation) :])


def histories_for(world: World, isolation: Isolation) -> list[History]:
    """All, but at SERIALIZABLE those that read an index only where the storage's indexes do not lag behind."""
    lags = not world.plain_storage.info_of(INDEXED.namespace).sees_all_indexed
    return [history for history in HISTORIES if not (lags and isolation is SERIALIZABLE and history in BY_INDEX)]


async def shows(stage: Stage, history: History) -> bool:
    await stage.set_up()
    return await history(stage)


def in_place(storage: Storage, place: Place) -> Storage:
    """The storage under test, or that and another where the place wants two."""
    if not place.two_storages:
        return storage
    other = MemoryStorage(atomicity=Atomicity.PARTITION, name="another memory")
    return MultiStorage({"tested": storage, "another": other}, {STOCK.namespace: "another"}, default="tested")


@pytest.mark.parametrize("place", PLACES, ids=[place.name for place in PLACES])
@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("isolation", list(Isolation))
@pytest.mark.parametrize("opening", LOCAL, indirect=True)
async def test_a_level_allows_what_it_says_and_nothing_else(
    storage: Storage, isolation: Isolation, api: Api, place: Place
) -> None:
    world = World(in_place(storage, place))
    await world.create()

    shown = {
        history.__name__: await shows(Stage(world, place, isolation, api, number), history)
        for number, history in enumerate(HISTORIES)
    }

    assert shown == {history.__name__: is_allowed(history, isolation) for history in HISTORIES}
    await world.settled()


EVERYWHERE = tuple((isolation, api, place) for isolation in Isolation for api in APIS for place in PLACES)
ON_SERVERS: Sequence[tuple[Isolation, Api, Place]] = (
    (READ_COMMITTED, by_one_manager, TWO_PARTITIONS),
    (SNAPSHOT, by_participants, TWO_NAMESPACES),
    (SERIALIZABLE, by_one_manager, ONE_PARTITION),
    (SERIALIZABLE, by_one_manager, TWO_PARTITIONS),
    (SERIALIZABLE, by_participants, TWO_STORAGES),
)
"""Where a statement costs milliseconds; `EVERY_STORAGE=1` in the environment plays them all there, too."""


@pytest.mark.parametrize("opening", SERVERS, indirect=True)
async def test_every_level_on_a_server_allows_what_it_says_and_nothing_else(storage: Storage) -> None:
    limit = asyncio.Semaphore(AT_ONCE)
    one_storage, two_storages = World(storage), World(in_place(storage, TWO_STORAGES))
    for _ in range(10_000):
        two_storages.clock.new_id()  # Clocks count ids from 1, and both worlds decide in the same state table.
    for world in (one_storage, two_storages):
        await world.create()
    worlds = {place: two_storages if place.two_storages else one_storage for place in PLACES}

    async def play(number: int, history: History, isolation: Isolation, api: Api, place: Place) -> bool:
        async with limit:
            return await shows(Stage(worlds[place], place, isolation, api, number), history)

    cases = [
        (history, isolation, api, place)
        for isolation, api, place in (EVERYWHERE if os.environ.get("EVERY_STORAGE") else ON_SERVERS)
        for history in histories_for(worlds[place], isolation)
    ]
    shown = await asyncio.gather(*(play(number, *case) for number, case in enumerate(cases)))

    wrong = [
        f"{history.__name__} at {isolation} in {place.name}: {'seen' if seen else 'not seen'}"
        for (history, isolation, _, place), seen in zip(cases, shown, strict=True)
        if seen != is_allowed(history, isolation)
    ]
    assert wrong == []
    for world in (one_storage, two_storages):
        await world.settled()


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("isolation", list(Isolation))
async def test_a_scan_over_what_was_just_written_is_refused_by_either_interface(
    world: World, isolation: Isolation, api: Api
) -> None:
    stage = Stage(world, ONE_PARTITION, isolation, api, 0)
    await stage.set_up()
    session = stage.session()
    await session.put(1, 11)

    with pytest.raises(IllegalOperationError):
        await session.scan(1)
