"""`concord schema`: tables as declared and as they are, and the way from the one to the other."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scripts.cli.errors import CommandError
from scripts.cli.exit_codes import ExitCode
from scripts.cli.options import DEFAULT_DIRECTORY, Data, Shape, command
from scripts.cli.output import Output, note
from scripts.cli.system import System

if TYPE_CHECKING:
    from infra.consensus_commit.schema import Difference, Step
    from infra.storage.operations import TableSchema
    from infra.storage.schema_file import TableDeclaration
    from scripts.cli.schema import Place

OptionalFile = Annotated[
    Path | None,
    typer.Argument(
        metavar="[FILE]", help="A schema file, - for stdin (default: the tables of the system's own domains).",
        show_default=False,
    ),
]  # fmt: skip
CoordinatorNamespace = Annotated[
    str, typer.Option("--coordinator-namespace", metavar="NAME", help="Where transactions are decided.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]
Yes = Annotated[bool, typer.Option("--yes", help="Drop without asking.")]

COORDINATOR = "coordinator"


@dataclass(frozen=True)
class Where:
    """Which storage is meant, and how to answer."""

    storage: Annotated[
        str | None,
        typer.Option("--storage", metavar="URL", help="Which storage (default: that of the system in --data)."),
    ] = None
    data: Data = DEFAULT_DIRECTORY
    output: Shape = None


@dataclass(frozen=True)
class Copies:
    """How new namespaces are replicated."""

    replication_factor: Annotated[
        int | None, typer.Option(min=1, help="Copies of each row in new namespaces (Cassandra).")
    ] = None
    replication_strategy: Annotated[
        str | None, typer.Option(help="SimpleStrategy or NetworkTopologyStrategy, for new namespaces (Cassandra).")
    ] = None

    def as_options(self) -> dict[str, str | None]:
        return {
            "replication-factor": None if self.replication_factor is None else str(self.replication_factor),
            "replication-strategy": self.replication_strategy,
        }


HERE = Where()
NO_COPIES = Copies()


def register(app: typer.Typer) -> None:
    schema = typer.Typer(no_args_is_help=True)
    app.add_typer(schema, name="schema", help="Tables as declared and as they are.")
    coordinator = typer.Typer(no_args_is_help=True)
    schema.add_typer(coordinator, name="coordinator", help="The tables by which transactions are decided.")
    _reading(schema)
    _changing(schema)
    _dropping(schema)
    _of_coordinator(coordinator)


def _reading(schema: typer.Typer) -> None:
    @command(schema, "show")
    def show(
        names: Annotated[
            list[str] | None, typer.Argument(metavar="[NAMESPACE.TABLE]...", help="Only these (default: all but the "
            "coordinator's).", show_default=False),
        ] = None,
        as_file: Annotated[bool, typer.Option("--as-file", help="As a schema file.")] = False,
        metadata: Annotated[bool, typer.Option("--metadata", help="With transaction columns.")] = False,
        coordinator_namespace: CoordinatorNamespace = COORDINATOR,
        where: Where = HERE,
    ) -> None:  # fmt: skip
        """The tables as they are."""
        from infra.consensus_commit.schema import as_declared
        from infra.storage.schema_file import render

        async def work(place: Place) -> None:
            stored = {table.full_name: table for table in await place.storage.tables()}
            absent = [name for name in names or () if name not in stored]
            if absent:
                there = ", ".join(stored) or "none"
                raise CommandError(f"There is no table {', '.join(absent)}. There are: {there}.", ExitCode.USAGE)
            chosen = [
                table
                for name, table in stored.items()
                if (name in names if names else table.namespace != coordinator_namespace)
            ]
            shape = Output.of(where.output)
            if as_file:
                print(render(as_declared(table) for table in chosen), file=shape.stream)
                return
            _show(chosen, shape, metadata=metadata, none="No tables.")

        _run(work, where)

    @command(schema, "diff")
    def diff(
        file: OptionalFile = None,
        coordinator_namespace: CoordinatorNamespace = COORDINATOR,
        where: Where = HERE,
    ) -> ExitCode:
        """How the tables differ from those declared, with the remedy. Exit code 1 if they do, 0 if they do not."""
        from scripts.cli.schema import declared_by, difference_as_json, find_differences

        async def work(place: Place) -> ExitCode:
            declared = declared_by(file, place, System.find(where.data), coordinator_namespace)
            found = await find_differences(place, declared, coordinator_namespace)
            shape = Output.of(where.output)
            for difference in found:
                shape.show(difference_as_json(difference), _said(f"{difference}: {difference.remedy}"))
            if shape.human and not found:
                print("No differences.", file=shape.stream)
            return ExitCode.FAILED if found else ExitCode.DONE

        return ExitCode(_run(work, where, begun=False))


def _changing(schema: typer.Typer) -> None:
    @command(schema, "apply")
    def apply(
        file: OptionalFile = None,
        copies: Copies = NO_COPIES,
        dry_run: DryRun = False,
        coordinator_namespace: CoordinatorNamespace = COORDINATOR,
        where: Where = HERE,
    ) -> None:
        """Create what is missing: namespaces, tables, indexes, and the coordinator's tables.

        Does nothing the second time. Refuses, before it does anything, if a table is there with other columns or keys.
        """
        _change("apply", file, where, copies.as_options(), dry_run, coordinator_namespace)

    @command(schema, "alter")
    def alter(
        file: OptionalFile = None,
        dry_run: DryRun = False,
        coordinator_namespace: CoordinatorNamespace = COORDINATOR,
        where: Where = HERE,
    ) -> None:
        """Add columns, and create and drop indexes, until tables are as declared. Keys, types and values stay."""
        _change("alter", file, where, {}, dry_run, coordinator_namespace)

    @command(schema, "repair")
    def repair(
        file: Annotated[
            Path | None,
            typer.Argument(
                metavar="[FILE]", help="A schema file, - for stdin (default: what is transactional, as it is stored).",
                show_default=False,
            ),
        ] = None,
        copies: Copies = NO_COPIES,
        dry_run: DryRun = False,
        coordinator_namespace: CoordinatorNamespace = COORDINATOR,
        where: Where = HERE,
    ) -> None:  # fmt: skip
        """Make half-made tables whole: transaction columns, before-images and their indexes, coordinator tables.

        Tables of ScalarDB before 3.16.5 lack the indexes of before-images, for one.
        """
        _change("repair", file, where, copies.as_options(), dry_run, coordinator_namespace)

    @command(schema, "import")
    def import_(
        file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that names the tables, - for stdin.")],
        dry_run: DryRun = False,
        where: Where = HERE,
    ) -> None:
        """Make plain tables transactional; the rows that are there count as committed."""
        from scripts.cli.schema import execute, plan_import

        async def work(place: Place) -> None:
            found = await plan_import(place, file)
            if found.steps and not dry_run:
                place.check_at_rest()
            await _do(Output.of(where.output), found.steps, found.left, execute(place, found.steps), dry_run)

        _run(work, where)


def _dropping(schema: typer.Typer) -> None:
    @command(schema, "drop")
    def drop(
        file: Annotated[
            Path | None,
            typer.Argument(metavar="[FILE]", help="A schema file whose tables go, - for stdin.", show_default=False),
        ] = None,
        tables: Annotated[
            list[str] | None, typer.Option("--table", metavar="NAMESPACE.TABLE", help="A table that goes; repeatable.")
        ] = None,
        everything: Annotated[bool, typer.Option("--all", help="Every table and namespace of the storage.")] = False,
        coordinator: Annotated[bool, typer.Option("--coordinator", help="The coordinator's tables, too.")] = False,
        yes: Yes = False,
        dry_run: DryRun = False,
        coordinator_namespace: CoordinatorNamespace = COORDINATOR,
        where: Where = HERE,
    ) -> None:
        """Drop tables with all their rows, and the namespaces that this leaves empty. Asks first."""
        from infra.storage.schema_file import parse
        from scripts.cli.schema import plan_drop, read_file

        if not (file or tables or everything):
            raise CommandError("Say what to drop: a schema file, --table NAMESPACE.TABLE, or --all.", ExitCode.USAGE)
        if str(file) == "-" and not (yes or dry_run):
            raise CommandError("With the file on stdin nobody can be asked; say --yes as well.", ExitCode.USAGE)

        async def work(place: Place) -> None:
            names = [declared.table.full_name for declared in parse(read_file(file))] if file else []
            if tables:
                there = {table.full_name for table in await place.storage.tables()}
                absent = [name for name in tables if name not in there]
                if absent:
                    raise CommandError(
                        f"There is no table {', '.join(absent)}. There are: {', '.join(sorted(there)) or 'none'}.",
                        ExitCode.USAGE,
                    )
            steps = await plan_drop(
                place,
                [*names, *(tables or ())],
                everything=everything,
                with_coordinator=coordinator,
                coordinator=coordinator_namespace,
            )
            await _drop(place, steps, yes=yes, dry_run=dry_run, shape=Output.of(where.output))

        _run(work, where)


def _of_coordinator(coordinator: typer.Typer) -> None:
    @command(coordinator, "create")
    def create(
        copies: Copies = NO_COPIES,
        dry_run: DryRun = False,
        coordinator_namespace: CoordinatorNamespace = COORDINATOR,
        where: Where = HERE,
    ) -> None:
        """Create the coordinator's tables, if they are missing."""
        from infra.consensus_commit.schema import Command
        from infra.storage.schema_file import TableDeclaration
        from scripts.cli.schema import coordinator_tables, execute, plan_for

        async def work(place: Place) -> None:
            declared = [
                TableDeclaration(table, transaction=False)
                for table in coordinator_tables(place.storage, coordinator_namespace)
            ]
            found = await plan_for(Command.APPLY, place, declared, coordinator_namespace)
            await _do(Output.of(where.output), found.steps, found.left, execute(place, found.steps, declared), dry_run)

        _run(work, where, copies.as_options(), begun=False)

    @command(coordinator, "show")
    def show(
        coordinator_namespace: CoordinatorNamespace = COORDINATOR,
        where: Where = HERE,
    ) -> None:
        """The coordinator's tables as they are."""

        async def work(place: Place) -> None:
            shape = Output.of(where.output)
            found = [table for table in await place.storage.tables() if table.namespace == coordinator_namespace]
            none = "No tables. `concord schema coordinator create` makes them."
            _show(found, shape, metadata=True, none=none)

        _run(work, where)

    @command(coordinator, "drop")
    def drop(
        yes: Yes = False,
        dry_run: DryRun = False,
        coordinator_namespace: CoordinatorNamespace = COORDINATOR,
        where: Where = HERE,
    ) -> None:
        """Drop the coordinator's tables. Refused while there are transactional tables, whose records may need them."""
        from scripts.cli.schema import plan_drop

        async def work(place: Place) -> None:
            steps = await plan_drop(
                place, (), everything=False, with_coordinator=True, coordinator=coordinator_namespace
            )
            await _drop(place, steps, yes=yes, dry_run=dry_run, shape=Output.of(where.output))

        _run(work, where)


# -- what they share


def _run(
    work: Callable[[Place], Awaitable[Any]],
    where: Where,
    options: Mapping[str, str | None] | None = None,
    *,
    begun: bool = True,
) -> Any:
    """Do `work` on the storage that is meant. `begun`: there must have been a system, where one is meant."""
    import asyncio

    from scripts.cli.schema import Place, opened

    async def run() -> Any:
        place = Place.find(where.storage, System.find(where.data), options)
        _warn_of_options(place, place.options)
        async with opened(place):
            if begun:
                await place.check_begun()
            return await work(place)

    return asyncio.run(run())


def _change(
    name: str,
    file: Path | None,
    where: Where,
    options: Mapping[str, str | None],
    dry_run: bool,
    coordinator: str,
) -> None:
    from infra.consensus_commit.schema import Command
    from scripts.cli.schema import declared_by, execute, plan_for, stored_declarations

    chosen = Command(name)

    async def work(place: Place) -> None:
        declared: list[TableDeclaration]
        if file is None and chosen is Command.REPAIR:
            declared = await stored_declarations(place, coordinator)
        else:
            # What alter is not there to create, it does not miss: ScalarDB's own storages have no table of intents.
            needed = chosen is not Command.ALTER
            declared = declared_by(file, place, System.find(where.data), coordinator, with_coordinator=needed)
        _warn_of_options(place, {name for declaration in declared for name in declaration.options})
        found = await plan_for(chosen, place, declared, coordinator)
        if found.steps and not dry_run and chosen is not Command.APPLY:
            place.check_at_rest()
        await _do(Output.of(where.output), found.steps, found.left, execute(place, found.steps, declared), dry_run)

    _run(work, where, options, begun=chosen is not Command.APPLY)


def _show(tables: Sequence[TableSchema], shape: Output, *, metadata: bool, none: str) -> None:
    """The tables, with their transaction columns or without; for people, `none` if there is none."""
    from scripts.cli.schema import table_as_json

    for table in tables:
        shape.show(table_as_json(table, metadata=metadata), table_for_people)
    if shape.human and not tables:
        print(none, file=shape.stream)


def _warn_of_options(place: Place, options: Iterable[str]) -> None:
    unknown = place.unknown(options)
    if unknown:
        note(f"concord: {', '.join(unknown)} mean nothing to {place.scheme}: and are left out")


async def _do(
    shape: Output,
    steps: Sequence[Step],
    left: Iterable[Difference],
    execution: AsyncGenerator[Step, None],
    dry_run: bool,
) -> None:
    """Do the steps, a line for each that is done; with `dry_run` only say them. Then what is left as it is."""
    from scripts.cli.schema import difference_as_json, step_as_json

    if dry_run:
        await execution.aclose()
        for step in steps:
            shape.show({**step_as_json(step), "done": False}, _said(f"would {step}"))
    else:
        async for step in execution:
            shape.show({**step_as_json(step), "done": True}, _said(str(step)))
    for difference in left:
        shape.show(
            {**difference_as_json(difference), "left": True},
            _said(f"left as it is: {difference}: {difference.remedy}"),
        )
    if shape.human and not steps:
        print("Nothing to do.", file=shape.stream)


async def _drop(place: Place, steps: Sequence[Step], *, yes: bool, dry_run: bool, shape: Output) -> None:
    from infra.consensus_commit.schema import DropTable
    from scripts.cli.schema import execute

    if steps and not dry_run:
        place.check_at_rest()
        if not yes:
            _confirm([step.table.full_name for step in steps if isinstance(step, DropTable)], place)
    await _do(shape, steps, (), execute(place, steps), dry_run)


def _confirm(names: Sequence[str], place: Place) -> None:
    """Raises CommandError unless somebody types what is about to happen."""
    words = f"drop {len(names)} {'table' if len(names) == 1 else 'tables'}"
    note(f"About to drop from {place.scheme}:, with all rows: {', '.join(names) or 'no table'}")
    note(f'Type "{words}" to go on:')
    try:
        typed = input()
    except EOFError:
        raise CommandError(
            "Nothing was dropped: nobody confirmed it. Say --yes where nobody can.", ExitCode.USAGE
        ) from None
    if typed.strip() != words:
        raise CommandError(f'Nothing was dropped: "{words}" was not typed.', ExitCode.REFUSED)


def _said(text: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda _: text


def table_for_people(table: Mapping[str, Any]) -> str:
    """A table as `\\d` would show it."""
    roles = dict.fromkeys(table["partition_key"], "partition key")
    for place in table["clustering_key"]:
        column, _, order = place.partition(" ")
        roles[column] = f"clustering key {order}".rstrip()
    roles |= dict.fromkeys(table["indexes"], "indexed")
    width = max(map(len, table["columns"]))
    lines = [f"{table['table']} ({table['kind']})"]
    lines += [
        f"  {column:<{width}}  {data_type:<11}  {roles.get(column, '')}".rstrip()
        for column, data_type in table["columns"].items()
    ]
    return "\n".join(lines)
