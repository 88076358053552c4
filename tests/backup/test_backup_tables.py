"""Tables in a backup: what comes back is what was there, from every storage into every other, and nothing torn."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from infra.clock import ManualClock
from infra.consensus_commit.coordinator import CoordinatorStates
from infra.consensus_commit.errors import UnknownTransactionStatusError
from infra.consensus_commit.manager import TransactionManager
from infra.consensus_commit.metadata import transactional
from infra.consensus_commit.transaction import Transaction
from infra.storage import sqlite_snapshot
from infra.storage.errors import UnavailableStorageError
from infra.storage.forwarding import ForwardingStorage
from infra.storage.memory import MemoryStorage
from infra.storage.operations import Atomicity, DataType, Key, Mutation, Put, ScanAll, TableSchema
from infra.storage.port import Storage
from infra.storage.sqlite import SqliteStorage
from infra.storage.sqlite_snapshot import copy_files
from scripts.backup.create import copy_by_rows
from scripts.backup.pausing import PauseFailedError
from scripts.backup.restore import settle
from scripts.backup.tables import copy_in, copy_out, count_rows
from tests.storages import opened

EVERYTHING = TableSchema(
    "backup_of_all",
    "types",
    {
        "part": DataType.INT,
        "place": DataType.TEXT,
        "yes": DataType.BOOLEAN,
        "small": DataType.INT,
        "large": DataType.BIGINT,
        "single": DataType.FLOAT,
        "double": DataType.DOUBLE,
        "words": DataType.TEXT,
        "bytes_": DataType.BLOB,
        "day": DataType.DATE,
        "hour": DataType.TIME,
        "instant": DataType.TIMESTAMPTZ,
    },
    ("part",),
    ("place",),
    descending=frozenset({"place"}),
)

FULL = {
    "yes": True,
    "small": -(2**31),
    "large": 2**53,
    "single": 0.5,
    "double": 1e-100,
    "words": 'line\nbreak "quoted" \u2028 ü',
    "bytes_": bytes(range(256)),
    "day": datetime.date(1066, 10, 14),
    "hour": datetime.time(23, 59, 59, 999_999),
    "instant": datetime.datetime(2026, 2, 28, 1, 2, 3, 4000, tzinfo=datetime.UTC),
}
ROWS = [
    *(Put(EVERYTHING, Key((part,), (f"p{place}",)), FULL) for part in range(3) for place in range(70)),
    Put(EVERYTHING, Key((9,), ("null",)), {"words": None}),
    Put(EVERYTHING, Key((9,), ("empty",)), {"words": "", "bytes_": b"", "yes": False, "small": 0}),
]


@pytest.fixture(params=["memory", "sqlite", "cassandra", "dynamodb"])
def opening(request: pytest.FixtureRequest, tmp_path: Path) -> AbstractAsyncContextManager[Storage]:
    return opened(request.param, request, tmp_path / "tables")


@pytest.fixture
async def storage(opening: AbstractAsyncContextManager[Storage]) -> AsyncIterator[Storage]:
    async with opening as made:
        yield made


async def fill(storage: Storage, mutations: Sequence[Mutation]) -> None:
    for mutation in mutations:
        await storage.mutate([mutation])


async def test_rows_of_every_type_come_back_from_a_file_into_this_storage_and_into_another(
    storage: Storage, tmp_path: Path
) -> None:
    await storage.create_table(EVERYTHING)
    other = MemoryStorage(atomicity=Atomicity.PARTITION)
    await other.create_table(EVERYTHING)
    await fill(other, ROWS)
    before = await count_rows(other, EVERYTHING)
    first = await copy_out(other, EVERYTHING, tmp_path / "first")

    assert await copy_in(storage, first, tmp_path / "first") == len(ROWS)
    there = await copy_out(storage, EVERYTHING, tmp_path / "second")
    back = SqliteStorage(tmp_path / "back")
    await back.create_table(EVERYTHING)
    await copy_in(back, there, tmp_path / "second")
    after = await count_rows(back, EVERYTHING)

    assert {(one.rows, one.digest) for one in (first, there)} == {(len(ROWS), before.value)}
    assert (after.rows, after.value) == (len(ROWS), before.value)
    assert await back.get(EVERYTHING, Key((1,), ("p7",))) == {"part": 1, "place": "p7", **FULL}
    await back.close()


async def test_a_digest_tells_of_one_changed_value_a_missing_row_and_a_row_too_many(tmp_path: Path) -> None:
    storage = MemoryStorage(atomicity=Atomicity.PARTITION)
    await storage.create_table(EVERYTHING)
    await fill(storage, ROWS[:5])
    digests = [(await count_rows(storage, EVERYTHING)).value]

    for change in (Put(EVERYTHING, Key((0,), ("p3",)), {"small": 1}), ROWS[5]):
        await storage.mutate([change])
        digests.append((await count_rows(storage, EVERYTHING)).value)

    assert len(set(digests)) == len(digests)


# --- what is decided while it is copied ----------------------------------------------------------------------------

ACCOUNTS = TableSchema("bank", "accounts", {"id": DataType.INT, "balance": DataType.BIGINT}, ("id",))
SAVINGS = TableSchema("savings", "accounts", {"id": DataType.INT, "balance": DataType.BIGINT}, ("id",))


class CutOff(ForwardingStorage):
    """A storage that takes no write any more once one has been made that `last` wants to be the last."""

    def __init__(self, storage: Storage, *, before: str = "", after: str = "") -> None:
        super().__init__(storage)
        self._before = before
        self._after = after
        self.cut = False

    async def mutate(self, mutations: Sequence[Mutation]) -> None:
        names = {mutation.table.full_name for mutation in mutations}
        if self.cut or self._before in names:
            self.cut = True
            raise UnavailableStorageError("cut off", remedy="none")
        await super().mutate(mutations)
        self.cut = self._after in names


async def bank(storage: Storage, clock: ManualClock | None = None) -> TransactionManager:
    manager = TransactionManager(storage, clock or ManualClock())
    await manager.create_coordinator_tables()
    for table in (ACCOUNTS, SAVINGS):
        await manager.create_table(table)
    return manager


async def move(transaction: Transaction, amount: int) -> None:
    await transaction.upsert(ACCOUNTS, Key((1,)), {"balance": 100 - amount})
    await transaction.upsert(SAVINGS, Key((1,)), {"balance": amount})


async def balances(storage: Storage) -> list[int]:
    found = []
    for table in (ACCOUNTS, SAVINGS):
        stored = await storage.get(transactional(table), Key((1,)))
        assert stored is not None
        assert stored["tx_state"] == 3
        found.append(int(str(stored["balance"])))
    return found


async def restored(storage: Storage, directory: Path) -> MemoryStorage:
    """A backup of `storage`, brought into another one and settled."""
    found = await storage.tables()
    copied = await copy_by_rows(storage, found, directory)
    target = MemoryStorage(atomicity=Atomicity.PARTITION)
    for stored in copied:
        await target.create_table(stored.schema_of)
        await copy_in(target, stored, directory)
    await settle(target)
    return target


@pytest.mark.parametrize(
    ("cut", "expected"),
    [({"after": "coordinator.state"}, [30, 70]), ({"before": "coordinator.state"}, [100, 0])],
    ids=["decided", "undecided"],
)
async def test_records_in_doubt_are_settled_after_a_restore_by_the_state_table_of_the_backup(
    cut: dict[str, str], expected: list[int], tmp_path: Path
) -> None:
    storage = MemoryStorage(atomicity=Atomicity.PARTITION)
    clock = ManualClock()
    manager = await bank(storage, clock)
    await manager.run(lambda transaction: move(transaction, 0))
    crashing = CutOff(storage, **cut)
    dying = TransactionManager(crashing, clock)
    transaction = dying.begin()
    await transaction.get(ACCOUNTS, Key((1,)))
    await transaction.get(SAVINGS, Key((1,)))
    await move(transaction, 70)
    try:
        await transaction.commit()
    except (UnknownTransactionStatusError, UnavailableStorageError):
        assert "before" in cut
    await dying.close()
    assert crashing.cut
    doubtful = [
        row async for page in storage.pages(ScanAll(transactional(SAVINGS))) for row in page if row["tx_state"] != 3
    ]
    assert doubtful

    target = await restored(storage, tmp_path / "backup")

    assert await balances(target) == expected


async def test_a_copy_during_which_a_transaction_was_decided_is_refused(tmp_path: Path) -> None:
    storage = MemoryStorage(atomicity=Atomicity.PARTITION)
    manager = await bank(storage)
    await manager.run(lambda transaction: move(transaction, 0))

    class Meddling(ForwardingStorage):
        """Somebody commits after `bank.accounts` was copied and before `savings.accounts` is."""

        def pages(self, selection, page_size=256):  # type: ignore[no-untyped-def]
            if selection.table.full_name != SAVINGS.full_name:
                return super().pages(selection, page_size)

            async def after_a_commit():  # type: ignore[no-untyped-def]
                await manager.run(lambda transaction: move(transaction, 70))
                async for page in self.storage.pages(selection, page_size):
                    yield page

            return after_a_commit()

    with pytest.raises(PauseFailedError, match="decided"):
        await copy_by_rows(Meddling(storage), await storage.tables(), tmp_path)


async def test_files_are_copied_while_they_are_in_use_and_a_write_in_between_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = SqliteStorage(tmp_path / "tables")
    manager = await bank(storage, ManualClock())
    await manager.run(lambda transaction: move(transaction, 10))
    await manager.drain()

    assert await asyncio.to_thread(copy_files, tmp_path / "tables", tmp_path / "copy", leave_out={"savings"})
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == ["bank.db", "coordinator.db"]
    copy = SqliteStorage(tmp_path / "copy")
    assert (await count_rows(copy, transactional(ACCOUNTS))).rows == 1
    await copy.close()

    looks = []
    look = sqlite_snapshot._data_version

    def looking(connection):  # type: ignore[no-untyped-def]
        looks.append(connection)
        if len(looks) == 4:  # three files were looked at and copied, and are looked at again
            asyncio.run_coroutine_threadsafe(manager.run(lambda tx: move(tx, 20)), loop).result(30)
        return look(connection)

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(sqlite_snapshot, "_data_version", looking)

    assert not await asyncio.to_thread(copy_files, tmp_path / "tables", tmp_path / "torn")
    await storage.close()


async def test_the_state_table_is_part_of_every_backup_by_rows(tmp_path: Path) -> None:
    storage = MemoryStorage(atomicity=Atomicity.PARTITION)
    manager = await bank(storage)
    await manager.run(lambda transaction: move(transaction, 0))

    copied = await copy_by_rows(storage, await storage.tables(), tmp_path)

    rows = {table.full_name: table.rows for table in copied}
    assert rows[CoordinatorStates(storage, ManualClock()).table.full_name] == 1
    assert rows == {"bank.accounts": 1, "coordinator.state": 1, "savings.accounts": 1} | {
        name: 0 for name in rows if name == "coordinator.intents"
    }
