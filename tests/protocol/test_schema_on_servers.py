"""The schema manager on the real servers: what it plans for memory and files holds there as well."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest
from typer.testing import CliRunner

from infra.clock import SystemClock
from infra.consensus_commit.coordinator import CoordinatorStates
from infra.consensus_commit.manager import TransactionManager
from infra.consensus_commit.schema import (
    Command,
    Plan,
    as_declared,
    carry_out,
    differences,
    drop_plan,
    import_differences,
    plan,
    repair_plan,
    take_stock,
)
from infra.consensus_commit.states import Isolation
from infra.consensus_commit.transaction import Transaction
from infra.storage.operations import DataType, IndexScan, Key, Put, Scan, TableSchema
from infra.storage.port import AdministrableStorage, Storage
from infra.storage.schema_file import ImportDeclaration, TableDeclaration, parse, render
from scripts.cli.main import app
from tests.storages import opened

AUDITOR = {
    declaration.table.full_name: declaration
    for declaration in parse((Path(__file__).resolve().parents[2] / "schemas" / "auditor.schema.json").read_text())
}
APPLIED = [AUDITOR[name] for name in ("audit.audit_set", "audit.audit_set_collaborators", "event.events")]
"""Keys of several columns and of either direction, days, times and an index: what differs among the file's tables.

All of the file is applied to memory and to files; on a server every table costs a second.
"""

GOODS = TableSchema(
    "schema_life",
    "goods",
    {"shelf": DataType.INT, "id": DataType.INT, "name": DataType.TEXT},
    ("shelf",),
    ("id",),
    frozenset({"id"}),
    frozenset({"name"}),
)


@pytest.fixture(params=["cassandra", "dynamodb"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> AbstractAsyncContextManager[Storage]:
    return opened(request.param, request, tmp_path)


@pytest.fixture
async def storage(place: AbstractAsyncContextManager[Storage]) -> AsyncIterator[AdministrableStorage]:
    """A server on which nothing is left of what these tests make."""
    async with place as made:
        server = cast(AdministrableStorage, made)
        yield server
        mine = {GOODS.namespace, *(declaration.table.namespace for declaration in APPLIED)}
        stock = await take_stock(server)
        names = [name for name, table in stock.tables.items() if table.namespace in mine]
        async for _ in carry_out(server, drop_plan(names, stock)):
            continue


async def planned(storage: AdministrableStorage, command: Command, declared: Iterable[TableDeclaration]) -> Plan:
    return plan(command, differences(declared, await take_stock(storage)))


async def carried_out(storage: AdministrableStorage, found: Plan) -> int:
    assert found.refused == ()
    return len([step async for step in carry_out(storage, found.steps)])


async def test_a_table_is_imported_altered_repaired_and_dropped(storage: AdministrableStorage) -> None:
    await CoordinatorStates(storage, SystemClock()).create_tables()
    unindexed = replace(GOODS, indexes=frozenset())
    await storage.create_table(unindexed)
    await storage.mutate([Put(unindexed, Key((1,), (7,)), {"name": "mug"})])

    imports = [ImportDeclaration(GOODS.namespace, "goods")]
    found = plan(Command.IMPORT, import_differences(imports, await take_stock(storage)))
    assert await carried_out(storage, found) == 11
    assert (await planned(storage, Command.IMPORT, [TableDeclaration(unindexed)])).steps == ()

    altered = replace(GOODS, columns={**GOODS.columns, "price": DataType.INT})
    assert await carried_out(storage, await planned(storage, Command.ALTER, [TableDeclaration(altered)])) == 4
    assert differences([TableDeclaration(altered)], await take_stock(storage)) == []

    manager = TransactionManager(storage)
    async with manager.begin() as transaction:
        await transaction.update(altered, Key((1,), (7,)), {"price": 5})
        await transaction.commit()
    async with manager.begin() as transaction:
        assert await transaction.get(altered, Key((1,), (7,))) == {"shelf": 1, "id": 7, "name": "mug", "price": 5}
    await manager.close()
    rows = [row async for page in storage.pages(IndexScan((await stored(storage)), "name", "mug")) for row in page]
    assert [row["price"] for row in rows] == [5]

    await storage.drop_index(await stored(storage), "before_name")
    stock = await take_stock(storage)
    assert await carried_out(storage, repair_plan([as_declared(stock.tables[GOODS.full_name])], stock)) == 2
    assert differences([TableDeclaration(altered)], await take_stock(storage)) == []

    stock = await take_stock(storage)
    async for _ in carry_out(storage, drop_plan([GOODS.full_name], stock)):
        continue
    assert GOODS.namespace not in await storage.namespaces()


async def stored(storage: AdministrableStorage) -> TableSchema:
    return (await take_stock(storage)).tables[GOODS.full_name]


async def test_an_audit_set_and_its_owner_are_created_in_the_auditors_tables(storage: AdministrableStorage) -> None:
    await CoordinatorStates(storage, SystemClock()).create_tables()
    assert await carried_out(storage, await planned(storage, Command.APPLY, APPLIED)) == len(APPLIED) + 2
    assert differences(APPLIED, await take_stock(storage)) == []
    assert (await planned(storage, Command.APPLY, APPLIED)).steps == ()

    sets, collaborators, events = (declaration.table for declaration in APPLIED)
    at = datetime(2026, 1, 2, 3, 4, 5, 678_000, UTC)
    manager = TransactionManager(storage)

    async def create(transaction: Transaction) -> None:
        await transaction.insert(sets, Key(("s1",)), {"name": "2026", "owner_id": "ann", "created_at": at})
        await transaction.insert(collaborators, Key(("s1",), ("ann",)), {"role": "owner", "added_at": at})
        for hour in (1, 2):
            key = Key((at.date(),), (at.replace(hour=hour), "e1"))
            await transaction.insert(events, key, {"event_type": "set_created", "user_id": "ann"})

    await manager.run(create)

    async with manager.begin(Isolation.SNAPSHOT, read_only=True) as transaction:
        created = await transaction.get(sets, Key(("s1",)))
        assert created is not None
        assert (created["owner_id"], created["created_at"], created["deleted"]) == ("ann", at, None)
        assert [row["role"] for row in await transaction.scan(Scan(collaborators, ("s1",)))] == ["owner"]
        latest = await transaction.scan(Scan(events, (at.date(),)))
        assert [row["occurred_at"] for row in latest] == [at.replace(hour=2), at.replace(hour=1)]
    await manager.close()


URLS = {
    "cassandra": lambda node: f"cassandra://{node.contact_point}:{node.port}/",
    "dynamodb": lambda node: f"dynamodb://?region=us-west-2&endpoint={node.endpoint_url}",
}


@pytest.mark.parametrize("name", URLS)
def test_the_command_line_reaches_a_server_by_its_url(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = URLS[name](request.getfixturevalue(name))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    plain = TableDeclaration(
        replace(GOODS, namespace="schema_line", indexes=frozenset()),
        transaction=False,
        options={"compaction-strategy": "LCS", "ru": "5"},
    )
    file = tmp_path / "line.json"
    file.write_text(render([plain]))

    def schema(*arguments: str) -> list[dict[str, Any]]:
        done = CliRunner().invoke(app, ["schema", *arguments, "--storage", url, "--output", "json"])
        assert done.exit_code == 0, done.output
        return [json.loads(line) for line in done.stdout.splitlines()]

    assert [line["step"] for line in schema("apply", str(file), "--replication-factor", "1")] == [
        "create namespace",
        "create table",
    ]
    assert [line["kind"] for line in schema("show", "schema_line.goods")] == ["plain"]
    assert schema("diff", str(file)) == []
    assert [line["step"] for line in schema("drop", str(file), "--yes")] == ["drop table", "drop namespace"]
