"""What `concord schema` does with storage: which one is meant, what is declared, and the steps in between.

Options of single storages (replication, compaction, capacity) are the adapter's settings, not the port's: they are
handed on in the storage's URL, so tables with different options are created through different connections.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from infra.clock import SystemClock
from infra.consensus_commit.coordinator import CoordinatorStates
from infra.consensus_commit.intents import IntentLog
from infra.consensus_commit.metadata import is_transactional
from infra.consensus_commit.schema import (
    AddColumn,
    Command,
    CreateIndex,
    CreateNamespace,
    CreateTable,
    Difference,
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
from infra.storage.connect import CassandraAccess, StorageAddress, connect
from infra.storage.operations import TableSchema
from infra.storage.port import AdministrableStorage
from infra.storage.schema_file import TableDeclaration, clustering_order, parse, parse_imports
from scripts.cli.errors import CommandError
from scripts.cli.exit_codes import ExitCode
from scripts.cli.system import System
from scripts.connections import storage_address

URL_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "cassandra": {
        "replication-factor": "replication_factor",
        "replication-strategy": "replication_strategy",
        "compaction-strategy": "compaction_strategy",
    },
    "dynamodb": {"ru": "units"},
}
"""By the URL's scheme: an option of a schema file, and what it is called in the URL's query."""


@dataclass
class Place:
    """One storage by its URL, and connections to it with one or another set of options.

    `guarded_by`: the system whose storage this is, if it was found through its directory.
    """

    url: str
    options: Mapping[str, str] = field(default_factory=dict)
    guarded_by: System | None = None
    cassandra: CassandraAccess = field(default_factory=CassandraAccess)
    _open: dict[str, AdministrableStorage] = field(default_factory=dict)

    @classmethod
    def find(cls, url: str | None, system: System, options: Mapping[str, str | None] | None = None) -> Place:
        """The storage at `url`, else that of `system`."""
        given = {name: value for name, value in (options or {}).items() if value is not None}
        if url is not None:
            return cls(url, given)
        address = storage_address(system.settings)
        return cls(address.url, given, system, address.cassandra)

    @property
    def scheme(self) -> str:
        return urlsplit(self.url).scheme

    @property
    def storage(self) -> AdministrableStorage:
        return self.storage_with({})

    def storage_with(self, options: Mapping[str, str]) -> AdministrableStorage:
        """A connection whose new tables and namespaces get `options`, as far as this storage knows them."""
        names = URL_OPTIONS.get(self.scheme, {})
        chosen = {**self.options, **options}
        wanted = {names[name]: value for name, value in chosen.items() if name in names}
        # What stands in the URL itself was written for this storage alone, and the file for any.
        parts = urlsplit(self.url)
        there = {name for name, _ in parse_qsl(parts.query, keep_blank_values=True)}
        more = urlencode({name: value for name, value in wanted.items() if name not in there})
        url = urlunsplit(parts._replace(query="&".join(filter(None, (parts.query, more))))) if more else self.url
        if url not in self._open:
            self._open[url] = cast(AdministrableStorage, connect(StorageAddress(url, self.cassandra)))
        return self._open[url]

    def unknown(self, options: Iterable[str]) -> list[str]:
        """Those of `options` that mean nothing to this storage."""
        known = URL_OPTIONS.get(self.scheme, {})
        return sorted({name for name in options if name not in known})

    def check_at_rest(self) -> None:
        """Raises CommandError while a system runs on these tables: its processes keep the columns that they know."""
        if self.guarded_by is not None and self.guarded_by.running:
            raise CommandError(
                f"A system is running in {self.guarded_by.directory}, and its processes would not learn of the change. "
                "Stop it first (Ctrl-C where `concord up` runs).",
                ExitCode.REFUSED,
            )

    async def check_begun(self) -> None:
        """Raises CommandError (UNREACHABLE) if this is a system's storage and none was ever started on it."""
        if self.guarded_by is not None and not await self.storage.tables():
            raise CommandError(
                f"No system has been started in {self.guarded_by.directory}. Make its tables with "
                "`concord schema apply` or `concord up`, or name the storage with --storage.",
                ExitCode.UNREACHABLE,
            )

    async def close(self) -> None:
        for storage in self._open.values():
            await storage.close()


@asynccontextmanager
async def opened(place: Place) -> AsyncIterator[Place]:
    try:
        yield place
    finally:
        await place.close()


# -- what is declared


def read_file(path: Path) -> str:
    """The text of a schema file, `-` for stdin. Raises CommandError."""
    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CommandError(f"The schema file {path} cannot be read: {reason}.", ExitCode.USAGE) from error


def declared_by(
    file: Path | None, place: Place, system: System, coordinator: str, *, with_coordinator: bool = True
) -> list[TableDeclaration]:
    """The tables of `file`, else those of the system's own domains; with the coordinator's where they are needed."""
    if file is None:
        from scripts.wiring import stored_tables

        return [as_declared(table) for table in stored_tables(system.settings, place.storage)]
    found = list(parse(read_file(file)))
    named = {declaration.table.full_name for declaration in found}
    if with_coordinator and any(declaration.transaction for declaration in found):
        found += [
            TableDeclaration(table, transaction=False)
            for table in coordinator_tables(place.storage, coordinator)
            if table.full_name not in named
        ]
    return found


def coordinator_tables(storage: AdministrableStorage, namespace: str) -> list[TableSchema]:
    """The tables that transactions need besides the users': decisions, and what is under way."""
    return [
        CoordinatorStates(storage, SystemClock(), namespace=namespace).table,
        IntentLog(storage, namespace=namespace).table,
    ]


def as_stored(declared: Iterable[TableDeclaration], stock: Stock, coordinator: str) -> list[TableDeclaration]:
    """`declared`, the coordinator's tables with those of ScalarDB's further columns that they have."""
    return [
        bookkeeping(declaration.table, stock) if declaration.table.namespace == coordinator else declaration
        for declaration in declared
    ]


async def stock_for(place: Place, declared: Sequence[TableDeclaration] = ()) -> Stock:
    return await take_stock(place.storage, {declaration.table.namespace for declaration in declared})


# -- commands


async def find_differences(place: Place, declared: Sequence[TableDeclaration], coordinator: str) -> list[Difference]:
    stock = await stock_for(place, declared)
    return differences(as_stored(declared, stock, coordinator), stock)


async def plan_for(command: Command, place: Place, declared: Sequence[TableDeclaration], coordinator: str) -> Plan:
    """The plan of apply, alter or repair. Raises SchemaRefusedError."""
    stock = await stock_for(place, declared)
    wanted = as_stored(declared, stock, coordinator)
    if command is Command.REPAIR:
        return _not_refused(repair_plan(wanted, stock))
    return _not_refused(plan(command, differences(wanted, stock)))


async def plan_import(place: Place, file: Path) -> Plan:
    """The plan of an import. Raises SchemaRefusedError and SchemaFileError."""
    imports = parse_imports(read_file(file))
    return _not_refused(plan(Command.IMPORT, import_differences(imports, await stock_for(place))))


async def stored_declarations(place: Place, coordinator: str) -> list[TableDeclaration]:
    """What a repair without a file is about: tables that are transactional or meant to be, and the coordinator's."""
    stock = await stock_for(place)
    found = [as_declared(table) for table in stock.tables.values() if kind_of(table) is not TableKind.PLAIN]
    return [
        *found,
        *(
            TableDeclaration(table, transaction=False)
            for table in coordinator_tables(place.storage, coordinator)
            if found or table.full_name in stock.tables
        ),
    ]


async def plan_drop(
    place: Place, names: Iterable[str], *, everything: bool, with_coordinator: bool, coordinator: str
) -> tuple[Step, ...]:
    """What would be dropped. Raises CommandError if decisions would go before the records that await them."""
    stock = await stock_for(place)
    chosen = list(stock.tables if everything else names)
    if with_coordinator:
        chosen += [name for name, table in stock.tables.items() if table.namespace == coordinator]
    awaiting = [
        table.full_name for table in stock.tables.values() if is_transactional(table) and table.full_name not in chosen
    ]
    if awaiting and any(name.startswith(f"{coordinator}.") for name in chosen):
        raise CommandError(
            f"The coordinator's tables hold decisions that records of {', '.join(sorted(awaiting))} may await. "
            "Drop these tables first, or everything with --all.",
            ExitCode.REFUSED,
        )
    steps = drop_plan(chosen, stock, coordinator=coordinator)
    if everything:
        gone = {step.namespace for step in steps if isinstance(step, DropNamespace)}
        steps += tuple(DropNamespace(name) for name in sorted(stock.namespaces - gone))
    return steps


async def execute(
    place: Place, steps: Iterable[Step], declared: Sequence[TableDeclaration] = ()
) -> AsyncGenerator[Step, None]:
    """Do the steps, each through a connection with its table's options."""
    of_table = {declaration.table.full_name: declaration.options for declaration in declared}
    of_namespace: dict[str, Mapping[str, str]] = {}
    for declaration in declared:
        of_namespace.setdefault(declaration.table.namespace, declaration.options)
    for step in steps:
        match step:
            case CreateTable(table):
                options = of_table.get(table.full_name, {})
            case CreateNamespace(namespace):
                options = of_namespace.get(namespace, {})
            case _:
                options = {}
        async for done in carry_out(place.storage_with(options), [step]):
            yield done


def _not_refused(found: Plan) -> Plan:
    if found.refused:
        raise SchemaRefusedError(found.command, found.refused)
    return found


# -- as JSON


def step_as_json(step: Step) -> dict[str, Any]:
    match step:
        case CreateNamespace(namespace):
            return {"step": "create namespace", "namespace": namespace}
        case CreateTable(table):
            return {"step": "create table", "table": table.full_name}
        case AddColumn(table, column, data_type):
            return {"step": "add column", "table": table.full_name, "column": column, "type": data_type.value}
        case CreateIndex(table, column):
            return {"step": "create index", "table": table.full_name, "column": column}
        case DropIndex(table, column):
            return {"step": "drop index", "table": table.full_name, "column": column}
        case DropTable(table):
            return {"step": "drop table", "table": table.full_name}
        case DropNamespace(namespace):
            return {"step": "drop namespace", "namespace": namespace}


def difference_as_json(difference: Difference) -> dict[str, Any]:
    return {
        "difference": difference.kind.value,
        "subject": difference.subject,
        "declared": difference.declared,
        "stored": difference.stored,
        "remedy": difference.remedy,
    }


def table_as_json(stored: TableSchema, *, metadata: bool) -> dict[str, Any]:
    """A table as it is; `metadata`: with its transaction columns."""
    kind = kind_of(stored)
    table = stored if metadata else as_declared(stored).table
    return {
        "table": stored.full_name,
        "kind": kind.value,
        "partition_key": list(table.partition_key),
        "clustering_key": clustering_order(table),
        "columns": {column: data_type.value for column, data_type in table.columns.items()},
        "indexes": [column for column in table.columns if column in table.indexes],
    }
