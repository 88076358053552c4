"""`concord history` and `concord rebuild`: the read view of a customer's orders."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from scripts.cli.options import DEFAULT_DIRECTORY, Data, Shape, command
from scripts.cli.output import Output
from scripts.cli.system import System

COLUMNS = ("order_id", "status", "total", "currency", "item_count", "returned_total")


def register(app: typer.Typer) -> None:
    @command(app, "history")
    def history(
        customer: Annotated[str, typer.Argument(metavar="CUSTOMER", help="The customer's id.")],
        data: Data = DEFAULT_DIRECTORY,
        output: Shape = None,
    ) -> None:
        """A customer's orders, from the read view that follows the order events."""
        import asyncio

        async def read() -> list[dict[str, Any]]:
            from actors.view_actor import order_history

            async with await System.find(data).reader() as reader:
                rows = await order_history(reader.storage, customer)
            return [row.model_dump(mode="json") for row in rows]

        Output.of(output).table(asyncio.run(read()), COLUMNS, title=f"Orders of {customer}")

    rebuild = typer.Typer(no_args_is_help=True)
    app.add_typer(rebuild, name="rebuild", help="Make read views anew from the tables.")

    @command(rebuild, "order-history")
    def order_history_(data: Data = DEFAULT_DIRECTORY, output: Shape = None) -> None:
        """Make the order history what the orders table says, while the system runs or rests."""
        import asyncio
        from dataclasses import asdict

        async def run() -> dict[str, Any]:
            from actors.view_actor import rebuild_order_history

            system = System.find(data)
            async with await system.reader() as reader:
                rebuilt = await rebuild_order_history(reader.storage, buckets=system.settings.actors.buckets)
            return asdict(rebuilt)

        Output.of(output).show(
            asyncio.run(run()), lambda done: ", ".join(f"{count} {what}" for what, count in done.items())
        )
