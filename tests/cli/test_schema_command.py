"""`concord schema`: from a schema file to tables and back, and what it refuses to do."""

from __future__ import annotations

import asyncio
import fcntl
import json
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from typer.testing import CliRunner

from infra.consensus_commit.metadata import transactional
from infra.storage.errors import InvalidOperationError
from infra.storage.operations import DataType, Key, Put, TableSchema
from infra.storage.schema_file import parse
from infra.storage.sqlite import SqliteStorage
from scripts.cli.exit_codes import ExitCode
from scripts.cli.main import app
from scripts.cli.schema import URL_OPTIONS, Place
from scripts.cli.system import lock_path

AUDITOR = Path(__file__).resolve().parents[2] / "schemas" / "auditor.schema.json"
T = TypeVar("T")

GOODS = {
    "transaction": True,
    "partition-key": ["shelf"],
    "clustering-key": ["id DESC"],
    "columns": {"shelf": "INT", "id": "INT", "name": "TEXT", "price": "INT"},
    "secondary-index": ["name"],
}


class Shop:
    """A SQLite storage in a directory of its own, and `concord schema` upon it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.url = f"sqlite://{directory / 'tables'}"

    def file(self, **tables: dict[str, Any]) -> str:
        path = self.directory / "schema.json"
        path.write_text(json.dumps({f"shop.{name}": attributes for name, attributes in tables.items()}))
        return str(path)

    def schema(self, *arguments: str, input: str | None = None, human: bool = False) -> tuple[int, list[Any], str]:
        """(exit code, the lines of stdout, stderr)."""
        shape = "human" if human else "json"
        done = CliRunner().invoke(app, ["schema", *arguments, "--storage", self.url, "--output", shape], input=input)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        lines = done.stdout.splitlines()
        return done.exit_code, lines if human else [json.loads(line) for line in lines], done.stderr

    def steps(self, *arguments: str) -> list[str]:
        code, lines, err = self.schema(*arguments)
        assert code == ExitCode.DONE, err
        return [line["step"] for line in lines]

    def storage(self, work: Callable[[SqliteStorage], Coroutine[Any, Any, T]]) -> T:
        async def run() -> T:
            storage = SqliteStorage(self.directory / "tables")
            try:
                return await work(storage)
            finally:
                await storage.close()

        return asyncio.run(run())

    def tables(self) -> list[TableSchema]:
        return self.storage(lambda storage: storage.tables())


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def test_a_file_is_applied_shown_compared_and_dropped(shop: Shop) -> None:
    file = shop.file(goods=GOODS)

    assert shop.steps("apply", file) == [
        "create namespace",
        "create table",
        "create namespace",
        "create table",
        "create table",
    ]
    assert {table.full_name for table in shop.tables()} == {"shop.goods", "coordinator.state", "coordinator.intents"}
    assert shop.schema("diff", file) == (ExitCode.DONE, [], "")
    assert shop.schema("show") == (
        ExitCode.DONE,
        [
            {
                "table": "shop.goods",
                "kind": "transactional",
                "partition_key": ["shelf"],
                "clustering_key": ["id DESC"],
                "columns": {"shelf": "INT", "id": "INT", "name": "TEXT", "price": "INT"},
                "indexes": ["name"],
            }
        ],
        "",
    )
    assert shop.steps("apply", file) == []
    assert shop.steps("drop", file, "--coordinator", "--yes") == ["drop table"] * 3 + ["drop namespace"] * 2
    assert shop.tables() == []


def test_the_tables_are_shown_as_the_file_that_made_them(shop: Shop) -> None:
    shop.steps("apply", str(AUDITOR))

    _, lines, _ = shop.schema("show", "--as-file", human=True)

    assert {item.table.full_name: item for item in parse("\n".join(lines))} == {
        item.table.full_name: item for item in parse(AUDITOR.read_text())
    }


def test_people_see_a_table_as_a_database_shows_it(shop: Shop) -> None:
    shop.steps("apply", shop.file(goods=GOODS))

    assert shop.schema("show", human=True)[1] == [
        "shop.goods (transactional)",
        "  shelf  INT          partition key",
        "  id     INT          clustering key DESC",
        "  name   TEXT         indexed",
        "  price  INT",
    ]
    assert shop.schema("show", "shop.goods", "--metadata", human=True)[1][5:7] == [
        "  tx_id                   TEXT",
        "  tx_state                INT",
    ]
    code, _, err = shop.schema("show", "shop.bads")
    assert code == ExitCode.USAGE
    assert "shop.goods" in err


def test_what_differs_is_listed_with_its_remedy_and_exit_code_1(shop: Shop) -> None:
    shop.steps("apply", shop.file(goods=GOODS))
    wider = shop.file(goods={**GOODS, "columns": {**GOODS["columns"], "weight": "DOUBLE"}})

    code, lines, _ = shop.schema("diff", wider)

    assert code == ExitCode.FAILED
    assert lines == [
        {
            "difference": "missing column",
            "subject": "shop.goods.weight",
            "declared": "DOUBLE",
            "stored": None,
            "remedy": "alter adds it, NULL in every row",
        }
    ]


def test_apply_refuses_what_alter_then_does(shop: Shop) -> None:
    shop.steps("apply", shop.file(goods=GOODS))
    wider = shop.file(
        goods={**GOODS, "columns": {**GOODS["columns"], "weight": "DOUBLE"}, "secondary-index": ["weight"]}
    )

    code, lines, err = shop.schema("apply", wider)
    assert (code, lines) == (ExitCode.REFUSED, [])
    assert "apply did nothing" in err
    assert "alter adds it" in err

    assert shop.steps("alter", wider, "--dry-run") == shop.steps("alter", wider)
    assert shop.schema("diff", wider)[0] == ExitCode.DONE


def test_a_table_is_altered_where_another_program_made_the_coordinators(shop: Shop) -> None:
    shop.steps("apply", shop.file(goods=GOODS))
    (intents,) = [table for table in shop.tables() if table.name == "intents"]
    shop.storage(lambda storage: storage.drop_table(intents))

    wider = shop.file(goods={**GOODS, "columns": {**GOODS["columns"], "weight": "DOUBLE"}})

    assert shop.steps("alter", wider) == ["add column", "add column"]


def test_alter_refuses_what_would_lose_values(shop: Shop) -> None:
    shop.steps("apply", shop.file(goods=GOODS))
    less = {name: kind for name, kind in GOODS["columns"].items() if name != "price"}

    code, lines, err = shop.schema("alter", shop.file(goods={**GOODS, "columns": {**less, "name": "BLOB"}}))

    assert (code, lines) == (ExitCode.REFUSED, [])
    assert "shop.goods.price: undeclared column" in err
    assert "another type (declared BLOB, stored TEXT)" in err


def test_a_plain_table_is_imported_with_its_rows(shop: Shop) -> None:
    plain = TableSchema("shop", "goods", {"id": DataType.INT, "price": DataType.INT}, ("id",))

    async def fill(storage: SqliteStorage) -> None:
        await storage.create_table(plain)
        await storage.mutate([Put(plain, Key((1,)), {"price": 5})])

    shop.storage(fill)
    file = shop.file(goods={"transaction": True})

    assert set(shop.steps("import", file)) == {"add column"}

    assert shop.tables() == [transactional(plain)]
    assert shop.steps("import", file) == []
    row = shop.storage(lambda storage: storage.get(transactional(plain), Key((1,))))
    assert row is not None
    assert (row["price"], row["tx_id"], row["tx_state"]) == (5, None, None)


def test_repair_without_a_file_completes_what_is_half_made(shop: Shop) -> None:
    whole = transactional(next(iter(parse(json.dumps({"shop.goods": GOODS})))).table)
    shop.storage(lambda storage: storage.create_table(replace(whole, indexes=frozenset({"name"}))))
    assert [line["kind"] for line in shop.schema("show")[1]] == ["incomplete"]

    assert shop.steps("repair") == [
        "create namespace",
        "create namespace",
        "create index",
        "create table",
        "create table",
    ]
    assert [line["kind"] for line in shop.schema("show")[1]] == ["transactional"]


def test_repair_says_what_it_leaves(shop: Shop) -> None:
    shop.steps("apply", shop.file(goods=GOODS))
    wider = shop.file(goods={**GOODS, "columns": {**GOODS["columns"], "weight": "DOUBLE"}})

    code, lines, _ = shop.schema("repair", wider)

    assert code == ExitCode.DONE
    assert [line["subject"] for line in lines if line.get("left")] == ["shop.goods.weight"]


def test_dropping_asks_for_the_words_and_takes_no_others(shop: Shop) -> None:
    shop.steps("apply", shop.file(goods=GOODS))
    ask = ("drop", "--table", "shop.goods")

    assert shop.schema(*ask, input="yes\n")[:2] == (ExitCode.REFUSED, [])
    assert shop.schema(*ask, input="")[:2] == (ExitCode.USAGE, [])
    assert len(shop.tables()) == 3

    code, lines, err = shop.schema(*ask, input="drop 1 table\n")
    assert code == ExitCode.DONE
    assert "shop.goods" in err
    assert [line["step"] for line in lines] == ["drop table", "drop namespace"]
    assert shop.schema("drop", str(shop.directory / "schema.json"), "--yes")[:2] == (ExitCode.DONE, [])


def test_drop_wants_to_know_what_and_names_what_is_not_there(shop: Shop) -> None:
    shop.steps("apply", shop.file(goods=GOODS))

    code, _, err = shop.schema("drop", "--yes")
    assert code == ExitCode.USAGE
    assert "--all" in err
    code, _, err = shop.schema("drop", "--table", "shop.bads", "--yes")
    assert code == ExitCode.USAGE
    assert "shop.goods" in err
    assert shop.schema("drop", "-", input="{}")[0] == ExitCode.USAGE


def test_drop_all_leaves_nothing(shop: Shop) -> None:
    shop.steps("apply", shop.file(goods=GOODS))
    shop.storage(lambda storage: storage.create_namespace("empty"))

    shop.steps("drop", "--all", "--yes")

    assert shop.tables() == []
    assert shop.storage(lambda storage: storage.namespaces()) == []


def test_the_coordinators_tables_are_created_shown_and_dropped_apart(shop: Shop) -> None:
    assert shop.steps("coordinator", "create") == ["create namespace", "create table", "create table"]
    assert shop.steps("coordinator", "create") == []
    assert [line["table"] for line in shop.schema("coordinator", "show")[1]] == [
        "coordinator.intents",
        "coordinator.state",
    ]
    assert shop.schema("show")[1] == []
    assert shop.steps("coordinator", "drop", "--yes") == ["drop table", "drop table", "drop namespace"]


def test_decisions_are_not_dropped_before_the_records_that_await_them(shop: Shop) -> None:
    shop.steps("apply", shop.file(goods=GOODS))

    for arguments in (("coordinator", "drop"), ("drop", "--table", "coordinator.state")):
        code, lines, err = shop.schema(*arguments, "--yes")

        assert (code, lines) == (ExitCode.REFUSED, [])
        assert "shop.goods" in err
    assert len(shop.tables()) == 3


def test_another_namespace_may_hold_the_decisions(shop: Shop) -> None:
    file = shop.file(goods=GOODS)

    shop.steps("apply", file, "--coordinator-namespace", "decisions")

    assert {table.namespace for table in shop.tables()} == {"shop", "decisions"}
    assert shop.schema("diff", file, "--coordinator-namespace", "decisions")[0] == ExitCode.DONE
    assert shop.schema("diff", file)[0] == ExitCode.FAILED


def test_a_file_that_cannot_be_used_is_refused_with_the_reason(shop: Shop) -> None:
    for content, says in (("{", "line 1"), ('{"shop.t": {}}', "partition-key is missing")):
        path = shop.directory / "wrong.json"
        path.write_text(content)

        code, _, err = shop.schema("apply", str(path))

        assert code == ExitCode.USAGE
        assert says in err
    code, _, err = shop.schema("apply", str(shop.directory / "none.json"))
    assert code == ExitCode.USAGE
    assert "none.json" in err
    assert shop.tables() == []


def test_names_that_belong_to_transactions_are_refused(shop: Shop) -> None:
    columns = {**GOODS["columns"], "tx_id": "TEXT"}

    code, _, err = shop.schema("apply", shop.file(goods={**GOODS, "columns": columns}))

    assert code == ExitCode.USAGE
    assert "tx_id belong to transactions" in err


def test_a_file_may_come_on_stdin(shop: Shop) -> None:
    code, lines, _ = shop.schema("apply", "-", input=json.dumps({"shop.t": {**GOODS, "transaction": False}}))

    assert code == ExitCode.DONE
    assert [line["step"] for line in lines] == ["create namespace", "create table"]


def test_options_that_mean_nothing_to_the_storage_are_named(shop: Shop) -> None:
    _, _, err = shop.schema("apply", shop.file(goods={**GOODS, "ru": 10, "compaction-strategy": "LCS"}))

    assert "compaction-strategy, ru mean nothing to sqlite:" in err


@pytest.mark.parametrize(
    ("url", "reached"),
    [
        (
            "cassandra://a:9042,b/?local_dc=x&replication_factor=2",
            "cassandra://a:9042,b/?local_dc=x&replication_factor=2&compaction_strategy=LCS",
        ),
        ("cassandra://a", "cassandra://a?replication_factor=3&compaction_strategy=LCS"),
        ("dynamodb://?region=r", "dynamodb:?region=r&units=10"),
        ("sqlite:///tmp/x", "sqlite:///tmp/x"),
    ],
)
def test_options_reach_a_storage_in_its_url_and_what_the_url_says_itself_counts(
    monkeypatch: pytest.MonkeyPatch, url: str, reached: str
) -> None:
    urls: list[str] = []
    monkeypatch.setattr("scripts.cli.schema.connect", lambda place: urls.append(place.url))

    Place(url, {"replication-factor": "3"}).storage_with({"compaction-strategy": "LCS", "ru": "10"})

    assert urls == [reached]


SENSIBLE = {
    "replication-factor": "1",
    "replication-strategy": "SimpleStrategy",
    "compaction-strategy": "LCS",
    "ru": "10",
}


@pytest.mark.parametrize("url", ["cassandra://a:9042/", "dynamodb://?region=r"])
def test_every_option_has_the_name_that_its_storage_takes(url: str) -> None:
    place = Place(url)

    place.storage_with({name: SENSIBLE[name] for name in URL_OPTIONS[place.scheme]})

    with pytest.raises(InvalidOperationError):
        Place(url).storage_with(dict.fromkeys(URL_OPTIONS[place.scheme], "nonsense"))


def test_without_a_file_the_systems_own_tables_are_declared(tmp_path: Path) -> None:
    def run(*arguments: str) -> tuple[int, list[Any]]:
        done = CliRunner().invoke(app, ["schema", *arguments, "--data", str(tmp_path), "--output", "json"])
        return done.exit_code, [json.loads(line) for line in done.stdout.splitlines()]

    code, lines = run("diff")
    assert code == ExitCode.FAILED
    assert {line["difference"] for line in lines} == {"missing namespace", "missing table"}
    assert "orders.orders" in {line["subject"] for line in lines}
    assert run("apply")[0] == ExitCode.DONE
    assert run("diff") == (ExitCode.DONE, [])
    done = CliRunner().invoke(app, ["table", "list", "--data", str(tmp_path), "--output", "json"])
    listed = {row["table"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert listed["orders.orders"]["transactional"]
    assert not listed["coordinator.state"]["transactional"]


def test_tables_of_a_running_system_are_not_changed(tmp_path: Path) -> None:
    data = ("--data", str(tmp_path))
    assert CliRunner().invoke(app, ["schema", "apply", *data]).exit_code == ExitCode.DONE
    lock_path(tmp_path).parent.mkdir()
    with lock_path(tmp_path).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        done = CliRunner().invoke(app, ["schema", "drop", "--all", "--yes", *data])

        assert done.exit_code == ExitCode.REFUSED
        assert "Stop it first" in done.stderr
    assert CliRunner().invoke(app, ["schema", "diff", *data]).exit_code == ExitCode.DONE
