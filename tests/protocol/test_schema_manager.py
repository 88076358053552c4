"""The schema manager: what differs, who mends it, and that nothing is lost on the way."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.clock import ManualClock
from infra.consensus_commit.coordinator import CoordinatorStates
from infra.consensus_commit.errors import IllegalOperationError
from infra.consensus_commit.manager import TransactionManager
from infra.consensus_commit.metadata import TRANSACTION_COLUMNS, is_transactional, transactional
from infra.consensus_commit.schema import (
    MENDS,
    REMEDIES,
    AddColumn,
    Command,
    CreateIndex,
    CreateNamespace,
    CreateTable,
    Difference,
    DifferenceKind,
    DropIndex,
    DropNamespace,
    DropTable,
    Plan,
    SchemaRefusedError,
    Step,
    Stock,
    TableKind,
    as_declared,
    bookkeeping,
    carry_out,
    differences,
    drop_plan,
    import_differences,
    kind_of,
    plan,
    repair_plan,
    take_stock,
)
from infra.storage.memory import MemoryStorage
from infra.storage.operations import Atomicity, DataType, IndexScan, Key, Put, TableSchema
from infra.storage.port import AdministrableStorage
from infra.storage.schema_file import ImportDeclaration, TableDeclaration, parse
from infra.storage.sqlite import SqliteStorage
from tests.storage.schema_strategies import declarations

AUDITOR = parse((Path(__file__).resolve().parents[2] / "schemas" / "auditor.schema.json").read_text())

GOODS = TableSchema(
    "shop",
    "goods",
    {"shelf": DataType.INT, "id": DataType.INT, "name": DataType.TEXT, "price": DataType.INT},
    ("shelf",),
    ("id",),
    frozenset({"id"}),
    frozenset({"name"}),
)
DECLARED = (TableDeclaration(GOODS),)
WIDER = (TableDeclaration(replace(GOODS, columns={**GOODS.columns, "weight": DataType.DOUBLE})),)
K = DifferenceKind


async def done(storage: AdministrableStorage, steps: Iterable[Step]) -> list[str]:
    return [str(step) async for step in carry_out(storage, steps)]


async def planned(storage: AdministrableStorage, command: Command, declared: Iterable[TableDeclaration]) -> Plan:
    return plan(command, differences(declared, await take_stock(storage)))


async def apply(storage: AdministrableStorage, declared: Iterable[TableDeclaration]) -> list[str]:
    found = await planned(storage, Command.APPLY, declared)
    assert found.refused == ()
    return await done(storage, found.steps)


async def kinds(storage: AdministrableStorage, declared: Iterable[TableDeclaration]) -> list[DifferenceKind]:
    return [found.kind for found in differences(declared, await take_stock(storage))]


async def test_apply_creates_what_is_missing_and_a_second_time_nothing(storage: AdministrableStorage) -> None:
    assert await apply(storage, DECLARED) == ["create namespace shop", "create table shop.goods"]

    assert await storage.tables() == [transactional(GOODS)]
    assert await apply(storage, DECLARED) == []
    assert await kinds(storage, DECLARED) == []


async def test_what_apply_creates_is_used_by_transactions(storage: AdministrableStorage) -> None:
    states = CoordinatorStates(storage, ManualClock())
    await apply(storage, (*DECLARED, TableDeclaration(states.table, transaction=False)))

    manager = TransactionManager(storage, ManualClock())
    async with manager.begin() as transaction:
        await transaction.insert(GOODS, Key((1,), (7,)), {"name": "mug", "price": 5})
        await transaction.commit()

    async with manager.begin() as transaction:
        assert await transaction.scan(IndexScan(GOODS, "name", "mug")) == [
            {"shelf": 1, "id": 7, "name": "mug", "price": 5}
        ]
    await manager.close()


async def test_the_namespaces_of_the_auditor_are_applied(storage: AdministrableStorage) -> None:
    await apply(storage, AUDITOR)

    assert await kinds(storage, AUDITOR) == []
    assert {as_declared(stored).table.full_name for stored in await storage.tables()} == {
        declaration.table.full_name for declaration in AUDITOR
    }


@settings(max_examples=40, deadline=None)
@given(declared=declarations())
def test_whatever_is_declared_is_shown_as_it_was_and_differs_in_nothing(
    declared: tuple[TableDeclaration, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    async def check() -> None:
        for storage in (MemoryStorage(), SqliteStorage(tmp_path_factory.mktemp("schema"))):
            await apply(storage, declared)

            shown = {table.full_name: as_declared(table) for table in await storage.tables()}
            assert shown == {item.table.full_name: replace(item, options={}) for item in declared}
            assert await kinds(storage, declared) == []
            await storage.close()

    asyncio.run(check())


def changed(
    columns: dict[str, DataType] | None = None,
    *,
    without: tuple[str, ...] = (),
    partition_key: tuple[str, ...] = GOODS.partition_key,
    clustering_key: tuple[str, ...] = GOODS.clustering_key,
    descending: frozenset[str] = GOODS.descending,
    indexes: frozenset[str] = GOODS.indexes,
) -> TableSchema:
    kept = {name: kind for name, kind in {**GOODS.columns, **(columns or {})}.items() if name not in without}
    return TableSchema("shop", "goods", kept, partition_key, clustering_key, descending, indexes)


PLAIN = TableDeclaration(GOODS, transaction=False)

DIFFERENT: list[tuple[str, TableDeclaration, list[DifferenceKind]]] = [
    ("one column more", TableDeclaration(changed({"weight": DataType.DOUBLE})), [K.MISSING_COLUMN]),
    ("one column less", TableDeclaration(changed(without=("price",))), [K.UNDECLARED_COLUMN]),
    ("another type", TableDeclaration(changed({"price": DataType.BIGINT})), [K.OTHER_TYPE, K.OTHER_TYPE]),
    ("another index", TableDeclaration(changed(indexes=frozenset({"price"}))),
     [K.MISSING_INDEX, K.MISSING_BEFORE_INDEX, K.UNDECLARED_INDEX, K.UNDECLARED_INDEX]),
    ("another order", TableDeclaration(changed(descending=frozenset())), [K.OTHER_CLUSTERING_KEY]),
    ("another clustering key", TableDeclaration(changed(clustering_key=("price",), descending=frozenset())),
     [K.OTHER_CLUSTERING_KEY]),
    ("another partition key", TableDeclaration(changed(partition_key=("price",))),
     [K.OTHER_PARTITION_KEY]),
    ("no transactions", PLAIN, [K.UNDECLARED_TRANSACTION]),
]  # fmt: skip
"""Declarations beside the stored GOODS, and what is found."""


@pytest.mark.parametrize(("name", "declared", "expected"), DIFFERENT, ids=[case[0] for case in DIFFERENT])
async def test_each_difference_is_found(
    storage: AdministrableStorage, name: str, declared: TableDeclaration, expected: list[DifferenceKind]
) -> None:
    await apply(storage, DECLARED)

    assert await kinds(storage, [declared]) == expected


@pytest.mark.parametrize(("name", "declared", "expected"), DIFFERENT, ids=[case[0] for case in DIFFERENT])
@pytest.mark.parametrize("command", [Command.APPLY, Command.ALTER, Command.IMPORT])
async def test_a_command_refuses_what_it_may_not_mend_and_says_what_would(
    command: Command, name: str, declared: TableDeclaration, expected: list[DifferenceKind]
) -> None:
    storage = MemoryStorage()
    await apply(storage, DECLARED)

    found = await planned(storage, command, [declared])

    beyond = [kind for kind in expected if kind not in MENDS[command]]
    if command is Command.APPLY:
        beyond = [kind for kind in beyond if kind is not K.UNDECLARED_INDEX]
    assert [difference.kind for difference in found.refused] == beyond
    if beyond:
        error = SchemaRefusedError(command, found.refused)
        assert all(REMEDIES[kind] in str(error) for kind in beyond)
        assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_every_difference_has_a_remedy() -> None:
    assert set(REMEDIES) == set(DifferenceKind)


async def test_a_column_in_the_clustering_key_runs_as_declared_or_is_another_table() -> None:
    storage = MemoryStorage()
    await apply(storage, DECLARED)

    (found,) = differences([TableDeclaration(changed(descending=frozenset()))], await take_stock(storage))

    assert str(found) == "shop.goods: another clustering key (declared [id], stored [id DESC])"


async def test_apply_creates_an_index_of_both_images_on_a_table_that_is_there(storage: AdministrableStorage) -> None:
    await apply(storage, DECLARED)
    indexed = [TableDeclaration(changed(indexes=frozenset({"name", "price"})))]

    assert await apply(storage, indexed) == [
        "create index on shop.goods.price",
        "create index on shop.goods.before_price",
    ]
    assert await kinds(storage, indexed) == []


async def test_apply_leaves_an_index_that_is_not_declared(storage: AdministrableStorage) -> None:
    await apply(storage, DECLARED)

    found = await planned(storage, Command.APPLY, [TableDeclaration(changed(indexes=frozenset()))])

    assert (found.steps, found.refused) == ((), ())
    assert [difference.kind for difference in found.left] == [K.UNDECLARED_INDEX] * 2


async def test_alter_adds_columns_and_changes_indexes_and_keeps_the_rows(storage: AdministrableStorage) -> None:
    await storage.create_table(CoordinatorStates(storage, ManualClock()).table)
    await apply(storage, DECLARED)
    manager = TransactionManager(storage, ManualClock())
    async with manager.begin() as transaction:
        await transaction.insert(GOODS, Key((1,), (7,)), {"name": "mug", "price": 5})
        await transaction.commit()
    altered = changed({"weight": DataType.DOUBLE}, indexes=frozenset({"price"}))

    found = await planned(storage, Command.ALTER, [TableDeclaration(altered)])
    assert found.refused == ()
    assert await done(storage, found.steps) == [
        "add column shop.goods.weight DOUBLE",
        "add column shop.goods.before_weight DOUBLE",
        "create index on shop.goods.price",
        "create index on shop.goods.before_price",
        "drop index on shop.goods.name",
        "drop index on shop.goods.before_name",
    ]

    assert await kinds(storage, [TableDeclaration(altered)]) == []
    again = TransactionManager(storage, ManualClock())
    async with again.begin() as transaction:
        assert await transaction.get(altered, Key((1,), (7,))) == {
            "shelf": 1,
            "id": 7,
            "name": "mug",
            "price": 5,
            "weight": None,
        }


async def test_apply_does_not_alter() -> None:
    storage = MemoryStorage()
    await apply(storage, DECLARED)

    found = await planned(storage, Command.APPLY, WIDER)

    (refused,) = found.refused
    assert refused.remedy == "alter adds it, NULL in every row"


async def test_alter_does_not_create() -> None:
    found = await planned(MemoryStorage(), Command.ALTER, DECLARED)

    assert [difference.kind for difference in found.refused] == [K.MISSING_NAMESPACE, K.MISSING_TABLE]


# -- import


async def imported(storage: AdministrableStorage, *tables: ImportDeclaration) -> Plan:
    return plan(Command.IMPORT, import_differences(tables, await take_stock(storage)))


async def test_rows_of_an_imported_table_are_committed_and_can_be_changed(storage: AdministrableStorage) -> None:
    await storage.create_table(CoordinatorStates(storage, ManualClock()).table)
    await storage.create_table(GOODS)
    await storage.mutate([Put(GOODS, Key((1,), (7,)), {"name": "mug", "price": 5})])

    found = await imported(storage, ImportDeclaration("shop", "goods"))
    assert found.refused == ()
    await done(storage, found.steps)

    assert await kinds(storage, DECLARED) == []
    manager = TransactionManager(storage, ManualClock())
    async with manager.begin() as transaction:
        assert await transaction.scan(IndexScan(GOODS, "name", "mug")) == [
            {"shelf": 1, "id": 7, "name": "mug", "price": 5}
        ]
        await transaction.update(GOODS, Key((1,), (7,)), {"price": 6})
        await transaction.commit()
    async with manager.begin() as transaction:
        row = await transaction.get(GOODS, Key((1,), (7,)))
        assert row is not None
        assert row["price"] == 6
    await manager.close()


async def test_importing_again_does_nothing(storage: AdministrableStorage) -> None:
    await storage.create_table(GOODS)
    await done(storage, (await imported(storage, ImportDeclaration("shop", "goods"))).steps)

    assert await imported(storage, ImportDeclaration("shop", "goods")) == Plan(Command.IMPORT, ())


async def test_an_import_that_was_interrupted_after_any_step_goes_on() -> None:
    begun = MemoryStorage()
    await begun.create_table(GOODS)
    steps = (await imported(begun, ImportDeclaration("shop", "goods"))).steps
    assert len(steps) == len(transactional(GOODS).columns) - len(GOODS.columns) + 1

    for interruption in range(len(steps)):
        storage = MemoryStorage()
        await storage.create_table(GOODS)
        await done(storage, steps[:interruption])

        rest = await imported(storage, ImportDeclaration("shop", "goods"))

        assert rest.refused == ()
        assert len(rest.steps) == len(steps) - interruption
        await done(storage, rest.steps)
        assert await kinds(storage, DECLARED) == []


async def test_a_table_is_no_transactional_one_before_its_import_has_ended() -> None:
    storage = MemoryStorage()
    await storage.create_table(GOODS)
    steps = (await imported(storage, ImportDeclaration("shop", "goods"))).steps
    columns = [step for step in steps if isinstance(step, AddColumn)]

    assert columns[0].column == "before_tx_id"
    assert columns[-1].column == "tx_id"
    async for step in carry_out(storage, steps):
        (table,) = await storage.tables()
        assert is_transactional(table) == (step in steps[len(columns) - 1 :])


async def test_a_table_with_names_that_belong_to_transactions_is_not_imported() -> None:
    storage = MemoryStorage()
    await storage.create_table(changed({"tx_id": DataType.TEXT}))

    with pytest.raises(IllegalOperationError, match="tx_id belong to transactions"):
        await imported(storage, ImportDeclaration("shop", "goods"))
    with pytest.raises(IllegalOperationError, match="tx_id belong to transactions"):
        await apply(storage, [TableDeclaration(changed({"tx_id": DataType.TEXT}))])


async def test_a_column_of_the_users_is_never_taken_for_a_transactions() -> None:
    storage = MemoryStorage()
    await storage.create_table(changed({"tx_id": DataType.TEXT}))

    assert kind_of((await storage.tables())[0]) is TableKind.PLAIN
    found = await planned(storage, Command.REPAIR, DECLARED)

    assert found.steps == ()
    assert [difference.kind for difference in found.left] == [K.NOT_TRANSACTIONAL]


async def test_only_what_is_there_is_imported_and_by_its_own_types() -> None:
    storage = MemoryStorage()
    await storage.create_table(GOODS)

    absent = await imported(storage, ImportDeclaration("shop", "none"))
    agreeing = await imported(storage, ImportDeclaration("shop", "goods", True, {"price": DataType.INT}))
    other = await imported(storage, ImportDeclaration("shop", "goods", True, {"price": DataType.TIME}))
    plain = await imported(storage, ImportDeclaration("shop", "goods", False))

    assert [difference.kind for difference in absent.refused] == [K.NOT_THERE]
    assert agreeing.refused == ()
    assert [str(found) for found in other.refused] == ["shop.goods.price: another type (declared TIME, stored INT)"]
    assert plain == Plan(Command.IMPORT, ())


# -- repair


@pytest.mark.parametrize("column", [name for name in transactional(GOODS).columns if name not in GOODS.columns])
async def test_a_lost_transaction_column_is_repaired_with_the_file(column: str) -> None:
    storage = MemoryStorage()
    whole = transactional(GOODS)
    columns = {name: kind for name, kind in whole.columns.items() if name != column}
    await storage.create_table(replace(whole, columns=columns, indexes=whole.indexes & columns.keys()))

    await done(storage, repair_plan(DECLARED, await take_stock(storage)).steps)

    assert await kinds(storage, DECLARED) == []


@pytest.mark.parametrize("column", [name for name in transactional(GOODS).columns if name not in GOODS.columns])
async def test_a_lost_transaction_column_is_repaired_without_a_file(column: str) -> None:
    storage = MemoryStorage()
    whole = transactional(GOODS)
    columns = {name: kind for name, kind in whole.columns.items() if name != column}
    await storage.create_table(replace(whole, columns=columns, indexes=whole.indexes & columns.keys()))
    stock = await take_stock(storage)
    assert [kind_of(table) for table in stock.tables.values()] == [TableKind.INCOMPLETE]

    await done(storage, repair_plan([as_declared(table) for table in stock.tables.values()], stock).steps)

    assert await kinds(storage, DECLARED) == []


async def test_repair_creates_the_before_image_indexes_that_older_programs_left_out(
    storage: AdministrableStorage,
) -> None:
    await storage.create_table(replace(transactional(GOODS), indexes=GOODS.indexes))
    stock = await take_stock(storage)

    assert await done(storage, repair_plan([as_declared(table) for table in stock.tables.values()], stock).steps) == [
        "create namespace shop",
        "create index on shop.goods.before_name",
    ]
    assert await storage.tables() == [transactional(GOODS)]


async def test_repair_creates_again_what_has_vanished_and_keeps_out_of_the_rest(storage: AdministrableStorage) -> None:
    states = TableDeclaration(CoordinatorStates(storage, ManualClock()).table, transaction=False)
    await storage.create_table(transactional(GOODS))

    found = repair_plan((*WIDER, states), await take_stock(storage))

    assert await done(storage, found.steps) == [
        "create namespace shop",
        "create namespace coordinator",
        "create table coordinator.state",
    ]
    assert [difference.kind for difference in found.left] == [K.MISSING_COLUMN]


async def test_an_alteration_that_was_interrupted_is_completed_by_alter_or_by_repair_without_a_file() -> None:
    for finish in (Command.ALTER, Command.REPAIR):
        storage = MemoryStorage()
        await apply(storage, DECLARED)
        steps = (await planned(storage, Command.ALTER, WIDER)).steps
        await done(storage, steps[:1])
        stock = await take_stock(storage)
        declared = WIDER if finish is Command.ALTER else [as_declared(table) for table in stock.tables.values()]

        await done(storage, plan(finish, differences(declared, stock)).steps)

        assert await kinds(storage, WIDER) == []


async def test_a_state_table_with_scalardbs_further_columns_is_as_declared(storage: AdministrableStorage) -> None:
    states = CoordinatorStates(storage, ManualClock()).table
    await storage.create_table(replace(states, columns={**states.columns, "tx_child_ids": DataType.TEXT}))
    stock = await take_stock(storage)

    assert differences([bookkeeping(states, stock)], stock) == []
    assert bookkeeping(states, Stock(frozenset(), {}, {})).table == states


# -- what cannot be held, and names


async def test_a_type_that_the_storage_cannot_hold_is_refused_before_anything_is_done() -> None:
    stock = Stock(frozenset(), {}, {"shop": frozenset(DataType) - {DataType.TIMESTAMP}})
    declared = [TableDeclaration(changed({"at": DataType.TIMESTAMP}))]

    for command in (Command.APPLY, Command.ALTER, Command.REPAIR):
        refused = plan(command, differences(declared, stock)).refused
        assert K.UNSUPPORTED_TYPE in [difference.kind for difference in refused]


async def test_names_that_differ_only_by_case_are_refused() -> None:
    storage = MemoryStorage()
    await apply(storage, DECLARED)
    other = [TableDeclaration(replace(GOODS, name="Goods")), TableDeclaration(replace(GOODS, namespace="SHOP"))]

    found = await planned(storage, Command.APPLY, other)

    assert [(difference.kind, difference.stored) for difference in found.refused] == [
        (K.OTHER_SPELLING, "shop.goods"),
        (K.OTHER_SPELLING, "shop"),
        (K.OTHER_SPELLING, "shop.goods"),
    ]


# -- drop


async def test_drop_removes_tables_and_the_namespaces_that_become_empty(storage: AdministrableStorage) -> None:
    kept = TableSchema("shop", "kept", {"id": DataType.INT}, ("id",))
    states = CoordinatorStates(storage, ManualClock()).table
    for table in (states, kept, transactional(GOODS)):
        await storage.create_table(table)
    stock = await take_stock(storage)

    steps = drop_plan(["coordinator.state", "shop.goods", "shop.none"], stock)

    assert await done(storage, steps) == [
        "drop table shop.goods",
        "drop table coordinator.state",
        "drop namespace coordinator",
    ]
    assert await storage.tables() == [kept]
    assert await storage.namespaces() == ["shop"]


# -- any difference at all


@settings(max_examples=60, deadline=None)
@given(before=declarations(), after=declarations(), choice=st.sampled_from(list(Command)))
def test_a_command_reaches_what_was_declared_or_refuses_and_keeps_every_column_and_key(
    before: tuple[TableDeclaration, ...], after: tuple[TableDeclaration, ...], choice: Command
) -> None:
    async def check() -> None:
        storage = MemoryStorage(Atomicity.PARTITION)
        await apply(storage, before)
        stock = await take_stock(storage)
        found = repair_plan(after, stock) if choice is Command.REPAIR else plan(choice, differences(after, stock))
        if found.refused:
            return
        await done(storage, found.steps)

        now = await take_stock(storage)
        for name, table in stock.tables.items():
            assert table.columns.items() <= now.tables[name].columns.items()
            assert (table.partition_key, table.clustering_key) == (
                now.tables[name].partition_key,
                now.tables[name].clustering_key,
            )
        left = [difference.kind for difference in differences(after, now)]
        assert left == [difference.kind for difference in found.left]

    asyncio.run(check())


def test_steps_say_what_they_do() -> None:
    steps: list[Step] = [
        CreateNamespace("shop"),
        CreateTable(GOODS),
        AddColumn(GOODS, "weight", DataType.DOUBLE),
        CreateIndex(GOODS, "price"),
        DropIndex(GOODS, "price"),
        DropTable(GOODS),
        DropNamespace("shop"),
    ]

    assert [str(step) for step in steps] == [
        "create namespace shop",
        "create table shop.goods",
        "add column shop.goods.weight DOUBLE",
        "create index on shop.goods.price",
        "drop index on shop.goods.price",
        "drop table shop.goods",
        "drop namespace shop",
    ]
    assert str(Difference(K.MISSING_TABLE, "shop.goods")) == "shop.goods: missing table"
    assert all(name.startswith("tx_") for name in TRANSACTION_COLUMNS)
