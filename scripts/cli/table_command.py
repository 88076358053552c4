"""`concord table`: the rows that are committed."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scripts.cli.errors import CommandError
from scripts.cli.exit_codes import ExitCode
from scripts.cli.options import DEFAULT_DIRECTORY, Data, Shape, command
from scripts.cli.output import Output
from scripts.cli.system import System

if TYPE_CHECKING:
    from actors.domain import Table
    from infra.storage.operations import Row
    from scripts.reading import CommittedReader


def register(app: typer.Typer) -> None:
    table = typer.Typer(no_args_is_help=True)
    app.add_typer(table, name="table", help="Tables and their committed rows.")

    @command(table, "list")
    def list_(data: Data = DEFAULT_DIRECTORY, output: Shape = None) -> None:
        """Every table there is."""
        import asyncio

        rows = asyncio.run(_describe_tables(System.find(data)))
        Output.of(output).table(rows, ("table", "key", "columns", "transactional"))

    @command(table, "dump")
    def dump(
        name: Annotated[str, typer.Argument(metavar="NAMESPACE.TABLE", help="Which table.")],
        key: Annotated[str | None, typer.Option(help="Only rows of this routing key.")] = None,
        metadata: Annotated[bool, typer.Option("--metadata", help="With placement and transaction columns.")] = False,
        data: Data = DEFAULT_DIRECTORY,
        output: Shape = None,
    ) -> None:
        """The committed rows of a table; records in doubt are resolved first."""
        import asyncio

        shape = Output.of(output)

        async def show() -> None:
            system = System.find(data)
            async with await system.reader() as reader:
                rows = dump_rows(system, reader, name, key=key, metadata=metadata)
                if shape.human:
                    found = [row async for row in rows]
                    shape.table(found, tuple(found[0]) if found else (), title=name)
                    return
                async for row in rows:
                    shape.json(row)

        asyncio.run(show())


async def _describe_tables(system: System) -> list[dict[str, Any]]:
    from infra.consensus_commit.metadata import is_transactional, layout_of

    async with await system.reader() as reader:
        stored = await reader.storage.tables()
    return [
        {
            "table": table.full_name,
            "key": list(user.key_columns),
            "columns": list(user.columns),
            "transactional": is_transactional(table),
        }
        for table in stored
        for user in [layout_of(table).user if is_transactional(table) else table]
    ]


async def dump_rows(
    system: System, reader: CommittedReader, name: str, *, key: str | None, metadata: bool
) -> AsyncIterator[dict[str, Any]]:
    """The rows of the table called `name` as JSON values. Raises CommandError for a table that is not there."""
    from infra.consensus_commit.metadata import is_transactional
    from infra.storage.operations import Scan

    stored = {table.full_name: table for table in await reader.storage.tables()}
    if name not in stored:
        raise CommandError(f"There is no table {name}. There are: {', '.join(stored)}.", ExitCode.USAGE)
    schema = stored[name]
    declared = _declared(system).get(name)
    if declared is not None:
        table, buckets = declared
        async for row in reader.committed_rows(table, key, buckets=buckets):
            yield _visible(table, row, metadata=metadata)
    elif key is not None:
        raise CommandError(f"{name} belongs to no domain and has no routing key; leave --key out.", ExitCode.USAGE)
    elif is_transactional(schema):
        async for row in reader.rows(schema):
            yield _as_stored(row)
    else:
        for partition in sorted(await reader.storage.partitions(schema), key=repr):
            for row in await reader.storage.scan(Scan(schema, partition)):
                yield _as_stored(row)


def _declared(system: System) -> dict[str, tuple[Table[Any], int]]:
    """The tables of domains and views by name, with the number of their buckets."""
    from actors.history_view import ORDER_HISTORY, POSITIONS, VIEW_BUCKETS
    from scripts.wiring import domain_tables

    buckets = system.settings.actors.buckets
    found = {table.full_name: (table, buckets) for table in domain_tables(system.settings)}
    return found | {table.full_name: (table, VIEW_BUCKETS) for table in (ORDER_HISTORY, POSITIONS)}


def _visible(table: Table[Any], row: Row, *, metadata: bool) -> dict[str, Any]:
    """The record as its domain has it, and with `metadata` where it lies and its transaction columns."""
    from infra.consensus_commit.metadata import TRANSACTION_COLUMNS

    visible: dict[str, Any] = table.from_row(row).model_dump(mode="json")
    if metadata:
        visible |= {name: row[name] for name in (*table.schema.partition_key, *TRANSACTION_COLUMNS)}
    return visible


def _as_stored(row: Row) -> dict[str, Any]:
    return {
        name: base64.b64encode(value).decode() if isinstance(value, bytes) else value
        for name, value in row.items()
        if not name.startswith("before_")
    }
