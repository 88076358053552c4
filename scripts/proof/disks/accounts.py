"""The bank that is robbed: accounts, a receipt for every transfer, and what must be true of them in the end.

A transfer takes 1 from an account, gives it to another and inserts a receipt under its own id. So afterwards

    acknowledged ⊆ receipts ⊆ begun, and no receipt of a transfer that failed       nothing lost, nothing invented
    sum of the balances = what there was                                            no half of a transfer
    each balance = opening + what its receipts say                                  nothing doubled
    sum of the versions = accounts + 2 × receipts                                   likewise, by the engine's count
    nothing is PREPARED or DELETED                                                  nothing is left in doubt

Receipts lie in a namespace of their own: on SQLite that is another file, and so each transfer commits in two phases
over three files. A bank in one namespace has them beside the accounts; on SQLite a transfer is then one write.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from infra.consensus_commit.errors import TransactionConflictError
from infra.consensus_commit.manager import TransactionManager
from infra.consensus_commit.metadata import TX_VERSION, is_committed, transactional
from infra.consensus_commit.states import Isolation
from infra.storage.errors import StorageError
from infra.storage.operations import DataType, Key, Row, ScanAll, TableSchema
from infra.storage.port import Storage

OPENING = 1_000
QUIET = -1
"""An account that no transfer touches: whether it can be read says whether the storage can."""


@dataclass(frozen=True, slots=True)
class Bank:
    """The tables of one bank. Several may lie in one storage, each with a `name` of its own."""

    name: str
    one_namespace: bool = False

    @property
    def accounts(self) -> TableSchema:
        return TableSchema("bank", f"accounts_{self.name}", {"id": DataType.INT, "balance": DataType.INT}, ("id",))

    @property
    def receipts(self) -> TableSchema:
        columns = {"id": DataType.TEXT, "giver": DataType.INT, "taker": DataType.INT, "note": DataType.TEXT}
        return TableSchema("bank" if self.one_namespace else "ledger", f"receipts_{self.name}", columns, ("id",))

    @property
    def tables(self) -> tuple[TableSchema, TableSchema]:
        return self.accounts, self.receipts


async def open_bank(storage: Storage, bank: Bank, numbers: range) -> None:
    """Make the tables and the accounts. The coordinator's tables are made, too, with those of intents."""
    manager = TransactionManager(storage, name="opening")
    await manager.create_coordinator_tables()
    for table in bank.tables:
        await manager.create_table(table)
    async with manager.begin() as opening:
        for number in (QUIET, *numbers):
            await opening.insert(bank.accounts, Key((number,)), {"balance": OPENING})
        await opening.commit()
    await manager.close()


@dataclass(slots=True)
class Ledger:
    """What one client said of its transfers, by their ids. Those begun and in no other set ended unsaid."""

    begun: set[str]
    committed: set[str]
    failed: set[str]
    unknown: set[str]


async def judge(storage: Storage, bank: Bank, numbers: range, ledgers: Sequence[Ledger]) -> list[str]:
    """Settle what is left in doubt and compare the bank with what was said of it; what is wrong, if anything.

    Call it when every client has ended, at a time when the storage serves.
    """
    manager = TransactionManager(storage, name="judge", transaction_lifetime_ms=1_000)
    await manager.create_coordinator_tables()
    try:
        async with asyncio.timeout(60):
            while await _settle(manager, storage, bank):  # noqa: ASYNC110 - records expire when they do
                await asyncio.sleep(0.1)
    except TimeoutError:
        return [f"in doubt after a minute: {await _in_doubt(storage, bank)}"]
    finally:
        await manager.close()
    accounts = {
        cast(int, row["id"]): row
        async for page in storage.pages(ScanAll(transactional(bank.accounts)))
        for row in page
        if row["id"] != QUIET
    }
    receipts = {
        cast(str, row["id"]): row async for page in storage.pages(ScanAll(transactional(bank.receipts))) for row in page
    }
    return _compare(numbers, accounts, receipts, ledgers)


def _compare(
    numbers: range,
    accounts: dict[int, Row],
    receipts: dict[str, Row],
    said: Sequence[Ledger],
) -> list[str]:
    wrong = []
    begun: set[str] = set().union(*(ledger.begun for ledger in said))
    committed: set[str] = set().union(*(ledger.committed for ledger in said))
    failed: set[str] = set().union(*(ledger.failed for ledger in said))
    for what, ids in (
        ("acknowledged and lost", committed - receipts.keys()),
        ("failed and done all the same", failed & receipts.keys()),
        ("done and never begun", receipts.keys() - begun),
    ):
        if ids:
            wrong.append(f"{len(ids)} transfers {what}: {sorted(ids)[:3]}")
    moved: Counter[int] = Counter()
    for receipt in receipts.values():
        moved[cast(int, receipt["taker"])] += 1
        moved[cast(int, receipt["giver"])] -= 1
    if accounts.keys() != set(numbers):
        wrong.append(f"accounts are {sorted(accounts)}, not {numbers}")
    for number, row in accounts.items():
        if row["balance"] != OPENING + moved[number]:
            wrong.append(f"account {number} holds {row['balance']!r}, and its receipts say {OPENING + moved[number]}")
    if (total := sum(cast(int, row["balance"]) for row in accounts.values())) != OPENING * len(numbers):
        wrong.append(f"there are {total} in all, not {OPENING * len(numbers)}")
    versions = sum(cast(int, row[TX_VERSION]) for row in accounts.values())
    if versions != len(numbers) + 2 * len(receipts):
        wrong.append(f"versions add up to {versions}, not {len(numbers)} + 2 x {len(receipts)}")
    return wrong


async def _settle(manager: TransactionManager, storage: Storage, bank: Bank) -> int:
    """Have whatever is in doubt recovered if it may be; how many records still were when this was last looked at."""
    for table in bank.tables:
        for record in await manager.recovery.in_doubt(table):
            try:
                await manager.recovery.recover_record(table, record.key)
            except (TransactionConflictError, StorageError):
                continue
    return len(await _in_doubt(storage, bank))


async def _in_doubt(storage: Storage, bank: Bank) -> list[object]:
    return [
        row["id"]
        for table in bank.tables
        async for page in storage.pages(ScanAll(transactional(table)))
        for row in page
        if not is_committed(row)
    ]


async def total_of(manager: TransactionManager, bank: Bank, numbers: range) -> int:
    """The sum of all balances as one serializable transaction sees it."""
    async with manager.begin(Isolation.SERIALIZABLE, read_only=True) as reading:
        rows = await reading.get_many(bank.accounts, [Key((number,)) for number in numbers])
        await reading.commit()
    return sum(cast(int, row["balance"]) for row in rows if row is not None)
