"""`concord tx`: one transaction by its id."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scripts.cli.exit_codes import ExitCode
from scripts.cli.options import command
from scripts.cli.output import Output, cell
from scripts.cli.schema_command import COORDINATOR, HERE, CoordinatorNamespace, Where
from scripts.cli.system import System

if TYPE_CHECKING:
    from scripts.cli.transactions import Transactions

TxId = Annotated[
    str, typer.Argument(metavar="TX_ID", help="The transaction's id, as logs and records have it, or a group's.")
]
Tables = Annotated[
    list[str] | None,
    typer.Option("--table", metavar="NAMESPACE.TABLE", help="Look for records only here; repeatable (default: all)."),
]


def register(app: typer.Typer) -> None:
    tx = typer.Typer(no_args_is_help=True)
    app.add_typer(tx, name="tx", help="One transaction by its id: its decision and the records that wait for it.")

    @command(tx, "show")
    def show(
        tx_id: TxId,
        tables: Tables = None,
        coordinator_namespace: CoordinatorNamespace = COORDINATOR,
        where: Where = HERE,
    ) -> ExitCode:
        """What was decided, and which records wait for it. Exit code 5 if nothing was. Changes nothing.

        Without an intent that names its partitions, every record of the tables is looked at.
        """
        from scripts.cli.transactions import as_json

        async def work(transactions: Transactions) -> ExitCode:
            found = await transactions.look_up(tx_id, tables or ())
            Output.of(where.output).show(as_json(found), for_people)
            return ExitCode.NO_ANSWER if found.state is None else ExitCode.DONE

        return ExitCode(_run(work, where, coordinator_namespace))

    @command(tx, "recover")
    def recover(
        tx_id: TxId,
        tables: Tables = None,
        abort: Annotated[bool, typer.Option("--abort", help="Abort it first, if nothing is decided.")] = False,
        coordinator_namespace: CoordinatorNamespace = COORDINATOR,
        where: Where = HERE,
    ) -> None:
        """Bring every record that waits for this transaction to rest: forward if it committed, back if it aborted."""

        async def work(transactions: Transactions) -> None:
            state, settled = await transactions.recover(tx_id, tables or (), abort=abort)
            Output.of(where.output).show(
                {"tx_id": tx_id, "state": state.state.name, "settled": settled},
                lambda done: f"{done['state']}; {settled} settled",
            )

        _run(work, where, coordinator_namespace)

    @command(tx, "finish")
    def finish(
        tx_id: TxId,
        writer_is_gone: Annotated[
            bool, typer.Option("--writer-is-gone", help="Its program has ended: also forget that it was aborted.")
        ] = False,
        coordinator_namespace: CoordinatorNamespace = COORDINATOR,
        where: Where = HERE,
    ) -> None:
        """Bring every record of a decided transaction to rest, then forget its decision.

        Finds records in this storage only: where participants keep their own, finish those first.
        """

        async def work(transactions: Transactions) -> None:
            state, settled = await transactions.finish(tx_id, writer_is_gone=writer_is_gone)
            name = None if state is None else state.state.name
            Output.of(where.output).show(
                {"tx_id": tx_id, "state": name, "settled": settled, "finished": True},
                lambda _: (
                    "Finished before, or never begun." if name is None else f"{name}; {settled} settled; forgotten"
                ),
            )

        _run(work, where, coordinator_namespace)


def _run(work: Callable[[Transactions], Awaitable[Any]], where: Where, coordinator: str) -> Any:
    import asyncio

    from scripts.cli.schema import Place, opened
    from scripts.cli.transactions import transactions_of

    async def run() -> Any:
        async with opened(Place.find(where.storage, System.find(where.data))) as place:
            await place.check_begun()
            async with transactions_of(place.storage, coordinator=coordinator) as transactions:
                return await work(transactions)

    return asyncio.run(run())


def for_people(found: Mapping[str, Any]) -> str:
    lines = [f"{found['tx_id']}  {found['state']}"]
    if found["intent"] is not None:
        lines.append(f"  announced by {found['intent']['coordinator']}, {found['intent']['partitions']} partitions")
    if "children" in found:
        lines.append(f"  decided by the row of a group of {len(found['children'])}")
    for record in found["waiting"]:
        whose = "" if record["tx_id"] == found["tx_id"] else f"  {record['tx_id']}"
        lines.append(f"  {record['tx_state']:<8}  {record['table']}  {cell(record['key'])}{whose}")
    if not found["waiting"]:
        lines.append("  no record waits for it")
    return "\n".join(lines)
