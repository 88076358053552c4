"""Finding what is due without reading what is gone: which partitions a look reads, and that it misses nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from actors.due_rows import LATE_AT_MOST, REMEMBERED_EVERY, SOON_MS, TIMERS, WALKED_AT_ONCE, DueRows
from actors.inventory.tables import EXPIRIES, Expiry
from infra.clock import ManualClock
from infra.consensus_commit.coordinator import CoordinatorStates
from infra.consensus_commit.manager import TransactionManager
from infra.consensus_commit.metadata import transactional
from infra.consensus_commit.recovery import RecoveryHandler
from infra.storage.errors import TooMuchToReadError, UnavailableStorageError
from infra.storage.forwarding import ForwardingStorage
from infra.storage.memory import MemoryStorage
from infra.storage.operations import Key, Put, Row, Scan, TableSchema, Value
from schemas.partitioning import slot

BUCKETS = 4
CATEGORY = "art"
BUCKET = slot(CATEGORY, BUCKETS)
MINUTE_MS = EXPIRIES.period_ms
STORED = transactional(EXPIRIES.schema)


class Reads(ForwardingStorage):
    """Counts what is read of the timers."""

    def __init__(self, storage: MemoryStorage) -> None:
        super().__init__(storage)
        self.periods: list[int] = []
        self.listings = 0
        self.refuses_writes = False
        self.unreadable: set[int] = set()

    async def scan(self, scan: Scan) -> list[Row]:
        if scan.table == STORED:
            self.periods.append(int(str(scan.partition[1])))
            if self.periods[-1] in self.unreadable:
                raise TooMuchToReadError("too many deletions")
        return await super().scan(scan)

    async def partitions(self, table: TableSchema) -> list[tuple[Value, ...]]:
        self.listings += 1
        return await super().partitions(table)

    async def mutate(self, mutations) -> None:
        if self.refuses_writes:
            raise UnavailableStorageError("no writes now")
        await super().mutate(mutations)


@dataclass
class Shelf:
    """The timers of one bucket, and whoever looks for those that are due."""

    clock: ManualClock = field(default_factory=lambda: ManualClock(1_600_000_050_000))
    memory: MemoryStorage = field(default_factory=MemoryStorage)

    async def open(self) -> Shelf:
        self.reads = Reads(self.memory)
        self.manager = TransactionManager(self.memory, self.clock)
        await self.manager.create_coordinator_tables()
        await self.manager.create_table(EXPIRIES.schema)
        await self.memory.create_table(TIMERS)
        self.restart()
        return self

    def restart(self) -> None:
        states = CoordinatorStates(self.reads, self.clock)
        recovery = RecoveryHandler(self.reads, states, self.clock, transaction_lifetime_ms=10**9)
        self.rows = DueRows(self.reads, recovery, [BUCKET])
        self.reads.periods.clear()

    def expiry(self, order_id: str, *, in_ms: int) -> Expiry:
        return Expiry(expires_at_ms=self.clock.now_ms() + in_ms, category=CATEGORY, order_id=order_id)

    async def add(self, order_id: str, *, in_ms: int) -> Expiry:
        expiry = self.expiry(order_id, in_ms=in_ms)
        key = EXPIRIES.storage_key(EXPIRIES.key_of(expiry), buckets=BUCKETS)
        await self.manager.run(lambda tx: tx.insert(EXPIRIES.schema, key, EXPIRIES.to_columns(expiry)))
        return expiry

    async def remove(self, expiry: Expiry) -> None:
        key = EXPIRIES.storage_key(EXPIRIES.key_of(expiry), buckets=BUCKETS)

        async def delete(tx) -> None:
            assert await tx.get(EXPIRIES.schema, key) is not None
            await tx.delete(EXPIRIES.schema, key)

        await self.manager.run(delete)

    async def due(self, *, limit: int = 100) -> list[str]:
        self.reads.periods.clear()
        return [expiry.order_id for expiry in await self.rows.until(EXPIRIES, self.clock.now_ms(), limit=limit)]

    async def remembered(self) -> int:
        row = await self.memory.get(TIMERS, Key((EXPIRIES.full_name,), (BUCKET,)))
        assert row is not None
        return int(str(row["pending_from_ms"])) // MINUTE_MS

    @property
    def minute(self) -> int:
        return self.clock.now_ms() // MINUTE_MS


@pytest.fixture
async def shelf() -> Shelf:
    return await Shelf().open()


async def test_a_timer_is_due_at_its_time_and_no_earlier(shelf: Shelf) -> None:
    expiry = await shelf.add("o1", in_ms=90_000)
    shelf.clock.advance(89_999)
    assert await shelf.due() == []
    shelf.clock.advance(1)
    assert await shelf.due() == ["o1"]
    assert await shelf.due() == ["o1"], "until it is gone"
    await shelf.remove(expiry)
    assert await shelf.due() == []


def test_a_bucket_and_the_minute_in_which_a_timer_is_due_make_a_partition() -> None:
    assert STORED.partition_key == ("bucket", "period")
    key = EXPIRIES.storage_key((MINUTE_MS * 7 + 1, CATEGORY, "o1"), buckets=BUCKETS)
    assert key.partition == (BUCKET, 7)


async def test_a_look_reads_this_minute_and_for_a_moment_the_one_before(shelf: Shelf) -> None:
    await shelf.due()
    shelf.clock.advance(MINUTE_MS)
    await shelf.due()
    await shelf.due()
    assert shelf.reads.periods == [shelf.minute]

    shelf.clock.advance(MINUTE_MS - shelf.clock.now_ms() % MINUTE_MS + SOON_MS - 1)
    await shelf.due()
    await shelf.due()
    assert shelf.reads.periods == [shelf.minute - 1, shelf.minute]


async def test_however_long_the_history_a_minute_costs_some_twenty_reads_beside_the_looks_at_it(shelf: Shelf) -> None:
    for _ in range(3):
        shelf.clock.advance(MINUTE_MS)
        await shelf.due()
    assert len(shelf.reads.periods) <= 20
    assert len(set(shelf.reads.periods)) == len(shelf.reads.periods)


async def test_what_is_done_with_is_not_read_again_by_a_process_that_starts_anew(shelf: Shelf) -> None:
    await shelf.due()
    for _ in range(2 * REMEMBERED_EVERY):
        shelf.clock.advance(MINUTE_MS)
        await shelf.due()
    shelf.restart()
    await shelf.due()
    assert shelf.reads.listings == 1, "once, when nothing was remembered yet"
    assert len(shelf.reads.periods) <= REMEMBERED_EVERY + 20


async def test_after_a_long_time_off_everything_is_found_a_part_at_a_time_and_what_is_due_now_at_once(
    shelf: Shelf,
) -> None:
    await shelf.due()
    old = [await shelf.add(f"old-{hours}", in_ms=hours * 60 * MINUTE_MS) for hours in (1, 30, 71)]
    shelf.clock.advance(72 * 60 * MINUTE_MS)
    new = await shelf.add("new", in_ms=1)
    shelf.clock.advance(1)
    shelf.restart()

    found = await shelf.due()
    assert found == ["old-1", "new"]
    assert len(shelf.reads.periods) <= WALKED_AT_ONCE + 20
    looks = 1
    while len(found := await shelf.due()) < 4:
        looks += 1
        assert looks <= 72 * 60 // WALKED_AT_ONCE
    assert found == ["old-1", "old-30", "old-71", "new"]
    for expiry in (*old, new):
        await shelf.remove(expiry)
    for _ in range(2):
        assert await shelf.due() == []
    assert shelf.reads.periods == [shelf.minute]


async def test_where_nothing_is_remembered_the_oldest_timer_that_there_is_tells_where_to_begin(shelf: Shelf) -> None:
    await shelf.add("long ago", in_ms=1)
    shelf.clock.advance(WALKED_AT_ONCE // 2 * MINUTE_MS)
    assert await shelf.due() == ["long ago"]
    assert await shelf.remembered() == shelf.minute - WALKED_AT_ONCE // 2


@pytest.mark.parametrize("late_minutes", [1, 2, 3, 5, 60, 24 * 60])
@pytest.mark.parametrize("restarted", [False, True])
async def test_a_timer_that_lands_late_is_found_before_its_lateness_has_doubled(
    shelf: Shelf, late_minutes: int, restarted: bool
) -> None:
    """Its transaction took so long, or its process was paused."""
    await shelf.due()
    for _ in range(late_minutes // 10 + 2):
        shelf.clock.advance(10 * MINUTE_MS)
        await shelf.due()
    await shelf.add("late", in_ms=-late_minutes * MINUTE_MS)
    if restarted:
        shelf.restart()

    waited = 0
    while await shelf.due() != ["late"]:
        shelf.clock.advance(MINUTE_MS)
        waited += 1
        assert waited <= late_minutes + 1
    assert await shelf.due() == ["late"], "from then on in every look"
    shelf.restart()
    assert await shelf.due() == ["late"], "and by a new process"
    assert late_minutes * 2 < LATE_AT_MOST


async def test_what_stays_due_is_read_in_every_look_and_remembered_as_pending(shelf: Shelf) -> None:
    stuck = await shelf.add("stuck", in_ms=1)
    for _ in range(3 * REMEMBERED_EVERY):
        shelf.clock.advance(MINUTE_MS)
        assert await shelf.due() == ["stuck"]
    assert await shelf.remembered() <= stuck.expires_at_ms // MINUTE_MS
    shelf.restart()
    assert await shelf.due() == ["stuck"]
    await shelf.remove(stuck)
    assert await shelf.due() == []
    assert await shelf.remembered() >= shelf.minute - 1 - REMEMBERED_EVERY


async def test_more_than_a_look_may_bring_comes_by_and_by_and_in_order(shelf: Shelf) -> None:
    await shelf.due()
    expiries = [await shelf.add(f"o{number:02}", in_ms=number * MINUTE_MS // 2) for number in range(40)]
    shelf.clock.advance(60 * MINUTE_MS)
    done = []
    while found := await shelf.due(limit=3):
        assert len(found) <= 3
        done += found
        for expiry in expiries:
            if expiry.order_id in found:
                await shelf.remove(expiry)
    assert done == [expiry.order_id for expiry in expiries]


async def test_a_clock_that_was_wrong_for_a_while_hides_no_timer_for_good(shelf: Shelf) -> None:
    """Far ahead, and back again: what lands and comes due then is behind where the looks had got."""
    await shelf.due()
    shelf.clock.advance(100 * MINUTE_MS)
    await shelf.due()
    shelf.clock.advance(-100 * MINUTE_MS)
    await shelf.add("o1", in_ms=MINUTE_MS)
    shelf.clock.advance(MINUTE_MS)
    assert await shelf.due() == ["o1"]
    shelf.clock.advance(3 * MINUTE_MS)  # nobody looked
    waited = 0
    while await shelf.due() != ["o1"]:
        shelf.clock.advance(MINUTE_MS)
        waited += 1
        assert waited <= 4


async def test_a_timer_is_found_once_in_a_look_though_a_clock_was_set_back(shelf: Shelf) -> None:
    await shelf.add("o1", in_ms=1)
    shelf.clock.advance(2 * MINUTE_MS)
    assert await shelf.due() == ["o1"]
    shelf.clock.advance(1 - 2 * MINUTE_MS)
    assert await shelf.due() == ["o1"]


async def test_a_storage_that_takes_no_writes_keeps_nothing_from_being_found(shelf: Shelf) -> None:
    await shelf.add("o1", in_ms=1)
    shelf.clock.advance(1)
    shelf.reads.refuses_writes = True
    assert await shelf.due() == ["o1"]
    shelf.reads.refuses_writes = False
    assert await shelf.due() == ["o1"]
    assert await shelf.remembered() == shelf.minute


async def test_a_minute_that_cannot_be_read_keeps_no_other_waiting(shelf: Shelf) -> None:
    await shelf.due()
    full = await shelf.add("in too full a minute", in_ms=MINUTE_MS)
    await shelf.add("o2", in_ms=2 * MINUTE_MS)
    shelf.reads.unreadable = {full.expires_at_ms // MINUTE_MS}
    for _ in range(2 * REMEMBERED_EVERY):
        shelf.clock.advance(MINUTE_MS)
        assert await shelf.due() == (["o2"] if shelf.clock.now_ms() > full.expires_at_ms else [])
    shelf.restart()
    assert await shelf.due() == ["o2"]

    shelf.reads.unreadable = set()
    assert await shelf.due() == ["in too full a minute", "o2"]


async def test_a_timer_in_doubt_keeps_its_minute_from_being_done_with(shelf: Shelf) -> None:
    await shelf.due()
    expiry = await shelf.add("o1", in_ms=1)
    key = EXPIRIES.storage_key(EXPIRIES.key_of(expiry), buckets=BUCKETS)
    row = await shelf.memory.get(STORED, key)
    assert row is not None
    doubt = {"tx_state": 1, "tx_id": "undecided", "tx_prepared_at": shelf.clock.now_ms()}
    await shelf.memory.mutate([Put(STORED, key, doubt)])
    for _ in range(5):
        shelf.clock.advance(MINUTE_MS)
        assert await shelf.due() == []
    await shelf.memory.mutate([Put(STORED, key, {name: row[name] for name in doubt})])
    assert await shelf.due() == ["o1"]
