"""Several storages behind one port keep its contract, and one transaction spans them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from storage_contract import COUNTERS, ELSEWHERE, THINGS, AdministrationContract, StorageContract

from infra.clock import ManualClock
from infra.consensus_commit.errors import TransactionConflictError
from infra.consensus_commit.manager import TransactionManager
from infra.consensus_commit.metadata import transactional
from infra.consensus_commit.recovery import TRANSACTION_LIFETIME_MS
from infra.storage.connect import connect
from infra.storage.errors import InvalidOperationError, UnavailableStorageError
from infra.storage.gate import PartitionGate
from infra.storage.memory import MemoryStorage
from infra.storage.multi import MultiStorage
from infra.storage.operations import Atomicity, DataType, Key, Put, StorageInfo, TableSchema
from infra.storage.port import AdministrableStorage, Storage, atomic_unit
from infra.storage.sqlite import SqliteStorage
from tests.protocol.faults import Crashed, FaultyStorage, Kind

SHOP, DEPOT = COUNTERS.namespace, ELSEWHERE.namespace
PLACES = ("bank", "shop", "depot")
ACCOUNTS = [
    TableSchema(namespace, "account", {"id": DataType.INT, "balance": DataType.INT}, ("id",)) for namespace in PLACES
]


class TestTablesInSqliteAndOneElsewhere(StorageContract):
    @pytest.fixture
    async def storage(self, tmp_path: Path) -> AsyncIterator[Storage]:
        storages = {"files": SqliteStorage(tmp_path / "a"), "heap": MemoryStorage(Atomicity.NAMESPACE)}
        multi = MultiStorage(storages, {SHOP: "files"}, "heap")
        yield multi
        await multi.close()


class TestTablesInMemoryAndOneElsewhere(StorageContract):
    @pytest.fixture
    async def storage(self, tmp_path: Path) -> AsyncIterator[Storage]:
        storages = {"heap": MemoryStorage(), "files": SqliteStorage(tmp_path / "a")}
        multi = MultiStorage(storages, {SHOP: "heap", DEPOT: "files"}, "heap")
        yield multi
        await multi.close()


class TestAdministrationOfOneOfSeveral(AdministrationContract):
    @pytest.fixture
    async def storage(self, tmp_path: Path) -> AsyncIterator[AdministrableStorage]:
        multi = MultiStorage(
            {"files": SqliteStorage(tmp_path / "a"), "heap": MemoryStorage()}, {self.NAMESPACE: "files"}, "heap"
        )
        yield multi
        await multi.close()


@pytest.fixture
async def spread(tmp_path: Path) -> AsyncIterator[MultiStorage]:
    """Accounts in SQLite and in two memories that are atomic otherwise; the coordinator in the default, SQLite."""
    storages = {
        "files": SqliteStorage(tmp_path),
        "rows": MemoryStorage(),
        "heap": MemoryStorage(Atomicity.STORAGE, max_mutations=100),
    }
    multi = MultiStorage(storages, {"shop": "rows", "depot": "heap"}, "files")
    yield multi
    await multi.close()


# What it promises


def test_what_holds_for_all_is_the_weakest_of_each_promise():
    class Lagging(MemoryStorage):
        @property
        def info(self) -> StorageInfo:
            types = frozenset(DataType) - {DataType.TIMESTAMP}
            return replace(super().info, sees_all_indexed=False, serializes_batches=False, data_types=types)

    strong = MemoryStorage(Atomicity.STORAGE, max_mutations=100)
    weak = MemoryStorage(Atomicity.PARTITION, max_mutations=30)
    info = MultiStorage({"a": strong, "b": weak, "c": Lagging()}, {}, "a").info

    assert (info.atomicity, info.max_mutations) == (Atomicity.PARTITION, 30)
    assert info.sees_all_partitions
    assert not info.sees_all_indexed
    assert not info.serializes_batches
    assert info.data_types == frozenset(DataType) - {DataType.TIMESTAMP}


def test_two_storages_are_never_promised_as_one_unit():
    one, two = MemoryStorage(Atomicity.STORAGE), MemoryStorage(Atomicity.STORAGE)

    assert MultiStorage({"a": one}, {}, "a").info.atomicity is Atomicity.STORAGE
    assert MultiStorage({"a": one, "b": two}, {}, "a").info.atomicity is Atomicity.NAMESPACE


def test_units_of_two_storages_of_a_kind_differ_by_alias():
    multi = MultiStorage(
        {"a": MemoryStorage(Atomicity.STORAGE), "b": MemoryStorage(Atomicity.STORAGE)}, {"shop": "a", "yard": "a"}, "b"
    )

    def unit(namespace: str) -> object:
        table = replace(COUNTERS, namespace=namespace)
        return atomic_unit(multi.info_of(namespace), table, Key(("x",)))

    assert unit("shop") == unit("yard")
    assert unit("depot") == unit("cellar")
    assert unit("shop") != unit("depot")
    assert multi.info_of("shop").name == "a"


@pytest.mark.parametrize(
    ("storages", "namespaces", "default", "error"),
    [
        ({}, {}, "a", "no storage 'a'"),
        ({"a": MemoryStorage()}, {}, "b", "no storage 'b'"),
        ({"a": MemoryStorage()}, {"shop": "b"}, "a", "no storage 'b'"),
        ({"a": MemoryStorage()}, {"shop": "a", "Shop": "a"}, "a", "only by case"),
        ({"a": MemoryStorage()}, {"sh op": "a"}, "a", "not a name"),
        ({"a b": MemoryStorage()}, {}, "a b", "not a name"),
    ],
)
def test_a_mapping_that_cannot_be_meant_is_refused(
    storages: dict[str, Storage], namespaces: dict[str, str], default: str, error: str
):
    with pytest.raises(InvalidOperationError, match=error):
        MultiStorage(storages, namespaces, default)


# Routing


async def test_tables_are_created_in_the_storage_of_their_namespace_and_listed_together():
    a, b = MemoryStorage(), MemoryStorage()
    multi = MultiStorage({"a": a, "b": b}, {SHOP: "a"}, "b")
    for table in (THINGS, COUNTERS, ELSEWHERE):
        await multi.create_table(table)
    await multi.create_namespace("cellar")

    assert await a.tables() == [COUNTERS, THINGS]
    assert await b.tables() == [ELSEWHERE]
    assert await multi.tables() == [ELSEWHERE, COUNTERS, THINGS]
    assert await multi.namespaces() == sorted(["cellar", DEPOT, SHOP])


async def test_a_table_left_where_its_namespace_no_longer_lives_is_not_listed():
    a, b = MemoryStorage(), MemoryStorage()
    await b.create_table(COUNTERS)

    multi = MultiStorage({"a": a, "b": b}, {SHOP: "a"}, "b")

    assert await multi.tables() == []
    assert await multi.namespaces() == []
    with pytest.raises(InvalidOperationError, match="no table"):
        await multi.get(COUNTERS, Key(("x",)))


async def test_tables_are_changed_in_the_storage_of_their_namespace():
    a, b = MemoryStorage(), MemoryStorage()
    multi = MultiStorage({"a": a, "b": b}, {SHOP: "a"}, "b")
    await multi.create_table(COUNTERS)
    await multi.mutate([Put(COUNTERS, Key(("x",)), {"value": 1})])

    await multi.add_column(COUNTERS, "note", DataType.TEXT)
    await multi.create_index(COUNTERS, "note")
    [changed] = await a.tables()
    assert (changed.columns["note"], changed.indexes) == (DataType.TEXT, {"note"})
    await multi.drop_index(changed, "note")
    assert not (await a.tables())[0].indexes
    await multi.truncate_table(changed)
    assert await a.partitions((await a.tables())[0]) == []
    await multi.drop_table(changed)
    await multi.drop_namespace(SHOP)

    assert await multi.namespaces() == []
    assert await b.tables() == []


async def test_a_storage_whose_tables_cannot_be_changed_says_so():
    multi = MultiStorage({"a": PartitionGate(MemoryStorage())}, {}, "a")

    with pytest.raises(InvalidOperationError, match="storage a cannot be changed"):
        await multi.drop_table(COUNTERS)


async def test_a_batch_over_two_storages_is_refused_and_nothing_written(spread: MultiStorage):
    for account in ACCOUNTS:
        await spread.create_table(account)
    writes = [Put(account, Key((1,)), {"balance": 1}) for account in ACCOUNTS]

    for batch in ([writes[0], writes[1]], [writes[1], writes[2]], writes):
        with pytest.raises(InvalidOperationError, match="two atomic units: the storages"):
            await spread.mutate(batch)

    assert [await spread.get(account, Key((1,))) for account in ACCOUNTS] == [None, None, None]


async def test_closing_closes_every_storage_once_even_if_one_cannot_close():
    class Counting(MemoryStorage):
        closed = 0

        def __init__(self, error: Exception | None = None) -> None:
            super().__init__()
            self.error = error

        async def close(self) -> None:
            self.closed += 1
            if self.error:
                raise self.error

    broken, shared, last = Counting(UnavailableStorageError("stuck")), Counting(), Counting()
    multi = MultiStorage({"a": broken, "b": shared, "c": shared, "d": last}, {}, "a")

    with pytest.raises(UnavailableStorageError, match="stuck"):
        await multi.close()

    assert [storage.closed for storage in (broken, shared, last)] == [1, 1, 1]


# One transaction over all of them


async def _with_accounts(storage: Storage, clock: ManualClock) -> TransactionManager:
    manager = TransactionManager(storage, clock)
    await manager.create_coordinator_tables()
    for account in ACCOUNTS:
        await manager.create_table(account)
    async with manager.begin() as transaction:
        for account in ACCOUNTS:
            await transaction.insert(account, Key((1,)), {"balance": 100})
        await transaction.commit()
    return manager


async def _move(manager: TransactionManager) -> None:
    """From the first account to the other two, a unit each."""
    async with manager.begin() as transaction:
        for account, change in zip(ACCOUNTS, (-2, 1, 1), strict=True):
            row = await transaction.get(account, Key((1,)))
            assert row is not None
            balance = row["balance"]
            assert isinstance(balance, int)
            await transaction.update(account, Key((1,)), {"balance": balance + change})
        await transaction.commit()


async def _balances(manager: TransactionManager) -> list[object]:
    async with manager.begin(read_only=True) as transaction:
        rows = [await transaction.get(account, Key((1,))) for account in ACCOUNTS]
        await transaction.commit()
    return [row and row["balance"] for row in rows]


async def test_one_transaction_writes_to_all_storages(spread: MultiStorage):
    clock = ManualClock()
    manager = await _with_accounts(spread, clock)

    await _move(manager)

    assert await _balances(manager) == [98, 101, 101]
    assert len(await spread.partitions(manager.states.table)) == 2, "a state row for each: no commit in one phase"
    await manager.close()


async def test_one_transaction_spans_sqlite_memory_cassandra_and_dynamodb(
    tmp_path: Path, cassandra_storage: Storage, dynamodb_storage: Storage
):
    """Every record in a database of its own: balances move through all, or through none where one of them refuses."""
    storages = {
        "files": SqliteStorage(tmp_path),
        "heap": MemoryStorage(),
        "ring": cassandra_storage,
        "cloud": dynamodb_storage,
    }
    multi = MultiStorage(storages, {"multi_ring": "ring", "multi_cloud": "cloud", "multi_heap": "heap"}, "files")
    accounts = [replace(ACCOUNTS[0], namespace=f"multi_{place}") for place in ("files", "heap", "ring", "cloud")]
    manager = TransactionManager(multi)
    await manager.create_coordinator_tables()
    key = Key((1,))
    try:
        for account in accounts:
            await manager.create_table(account)
            await multi.truncate_table(transactional(account))
        async with manager.begin() as transaction:
            for account in accounts:
                await transaction.insert(account, key, {"balance": 100})
            await transaction.commit()

        async with manager.begin() as first, manager.begin() as second:
            for transaction, change in ((first, 1), (second, 10)):
                for account in accounts:
                    row = await transaction.get(account, key)
                    assert row is not None
                    await transaction.update(account, key, {"balance": 100 + change})
            await first.commit()
            with pytest.raises(TransactionConflictError):
                await second.commit()

        async with manager.begin(read_only=True) as transaction:
            rows = [await transaction.get(account, key) for account in accounts]
            await transaction.commit()
        assert [row and row["balance"] for row in rows] == [101] * 4
        await manager.close()
        stored = [await multi.get(transactional(account), key) for account in accounts]
        assert [(row and row["tx_version"], row and row["before_balance"]) for row in stored] == [(2, None)] * 4
        assert len({row and row["tx_id"] for row in stored}) == 1
    finally:
        for account in accounts:
            await multi.drop_table(transactional(account))
            await multi.drop_namespace(account.namespace)
        await storages["files"].close()


@pytest.mark.parametrize("kind", [Kind.CRASH_BEFORE, Kind.CRASH_AFTER])
async def test_a_crash_at_any_call_leaves_all_storages_with_the_transfer_or_none(spread: MultiStorage, kind: Kind):
    clock = ManualClock()
    survivor = await _with_accounts(spread, clock)
    done = 0
    outcomes = set()

    for nth in itertools.count(1):
        dying = FaultyStorage(spread)
        dying.fail(kind, nth=nth)
        doomed = TransactionManager(dying, clock)
        with contextlib.suppress(Crashed):
            await _move(doomed)
        await doomed.drain()  # What it writes behind its answer.
        clock.advance(TRANSACTION_LIFETIME_MS + 1)

        found = await _balances(survivor)
        await survivor.recovery.drain()

        assert found in ([100 - 2 * n, 100 + n, 100 + n] for n in (done, done + 1)), (nth, found)
        outcomes.add(found[1] != 100 + done)
        done += found[1] != 100 + done
        if len(dying.calls) < nth:
            break

    assert nth > 9, "three reads, three prepared records, a decision, three commits: a crash at each of them"
    assert outcomes == {True, False}
    await survivor.close()


# Its URL


def _described(tmp_path: Path, text: str) -> str:
    file = tmp_path / "storages of mine.toml"
    file.write_text(text, encoding="utf-8")
    return file.as_uri().replace("file:", "multi:")


async def test_a_file_names_the_storages_and_who_lives_where(tmp_path: Path):
    url = _described(
        tmp_path,
        f"""
        default = "scratch"
        [storages]
        disk = "sqlite://{tmp_path}/data"
        scratch = "memory:"
        [namespaces]
        {SHOP} = "disk"
        """,
    )
    multi = connect(url)
    await multi.create_table(COUNTERS)
    await multi.create_table(ELSEWHERE)
    await multi.mutate([Put(COUNTERS, Key(("x",)), {"value": 1})])
    await multi.close()

    again = connect(url)

    assert await again.tables() == [COUNTERS]
    assert await again.get(COUNTERS, Key(("x",))) == {"id": "x", "value": 1}
    assert again.info_of(SHOP).atomicity is Atomicity.NAMESPACE
    assert again.info_of("elsewhere").atomicity is Atomicity.PARTITION
    await again.close()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("default = ", "no TOML"),
        ("", "something else"),
        ('default = "a"', "something else"),
        ('default = 1\n[storages]\na = "memory:"', "something else"),
        ('default = "a"\n[storages]\na = 1', "something else"),
        ('default = "a"\n[storages]\na = "memory:"\n[namespace]\nshop = "a"', "something else"),
        ('default = "a"\n[storages]\na = "memory:"\n[namespaces]\nshop = "b"', "no storage 'b'"),
        ('default = "b"\n[storages]\na = "memory:"', "no storage 'b'"),
        ('default = "a"\n[storages]\na = "postgres://x"', "no storage 'postgres:'"),
        ('default = "a"\n[storages]\na = "multi:///x.toml"', "cannot be multi:"),
    ],
)
def test_a_file_that_says_something_else_is_refused_by_its_name(tmp_path: Path, text: str, error: str):
    with pytest.raises(InvalidOperationError, match=error) as caught:
        connect(_described(tmp_path, text))

    assert "storages of mine.toml" in str(caught.value)


@pytest.mark.parametrize(
    "url", ["multi:", "multi:x", "multi:///absent/x.toml", "multi:///a%00b", "multi:///x?y", "multi://h/x"]
)
def test_a_url_that_names_no_file_is_refused_with_the_forms_that_do(url: str):
    with pytest.raises(InvalidOperationError) as caught:
        connect(url)

    assert "memory:" in str(caught.value)
