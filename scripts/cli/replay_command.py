"""`concord replay`: Online Retail CSV files as commands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scripts.cli.errors import CommandError
from scripts.cli.exit_codes import ExitCode
from scripts.cli.options import DEFAULT_DIRECTORY, Data, Shape, command
from scripts.cli.output import Output
from scripts.cli.system import System

if TYPE_CHECKING:
    from scripts.cli.replay import Existing

SHOWN_SKIPPED = 20


def register(app: typer.Typer) -> None:
    @command(app, "replay")
    def replay(
        files: Annotated[list[Path], typer.Argument(metavar="FILE…", help="Online Retail, .csv or .csv.gz.")],
        limit: Annotated[int, typer.Option(min=0, help="Only so many invoices; 0: all.")] = 0,
        rate: Annotated[float, typer.Option(min=0, help="Commands a second at most; 0: no limit.")] = 0,
        in_flight: Annotated[int, typer.Option("--in-flight", min=1, help="Commands without an answer at most.")] = 64,
        initial_stock: Annotated[
            int, typer.Option("--initial-stock", min=0, help="Stock of a product that is not there yet.")
        ] = 1_000_000,
        initial_balance: Annotated[
            int, typer.Option("--initial-balance", min=0, help="Pence in a wallet that is not there yet.")
        ] = 1_000_000_000,
        patience: Annotated[
            float, typer.Option(metavar="SECONDS", min=1, help="Give up when no answer comes for so long.")
        ] = 300,
        data: Data = DEFAULT_DIRECTORY,
        output: Shape = None,
    ) -> ExitCode:
        """Replay invoices: orders, returns and write-offs, in file order.

        First the products and customers that are not in the tables yet are registered. The same file again changes
        nothing. Exit code 5 if a command stayed without an answer.
        """
        import asyncio

        from scripts.cli.client import CommandClient
        from scripts.cli.replay import Options, Replay
        from scripts.cli.retail import UnreadableFileError

        system = System.find(data)
        system.bootstrap_servers  # noqa: B018 - says so if there is no system
        for file in files:
            if not file.is_file():
                raise CommandError(f"There is no file {file}.", ExitCode.USAGE)
        options = Options(limit, rate, in_flight, initial_stock, initial_balance, patience)

        async def run() -> dict[str, Any]:
            client = CommandClient(lambda: System.find(data).kafka, ("inventory", "payment", "orders"))
            with _progress() as on_progress:
                async with client:
                    replay = Replay(client, lambda: _existing(system), options, on_progress)
                    await replay.run(files)
            return replay.summary()

        try:
            summary = asyncio.run(run())
        except UnreadableFileError as error:
            raise CommandError(f"{error}.", ExitCode.USAGE) from None
        Output.of(output).show(summary, for_people)
        return ExitCode.NO_ANSWER if summary["unanswered"] else ExitCode.DONE


async def _existing(system: System) -> Existing:
    from actors.inventory.tables import PRODUCTS
    from actors.payment.tables import WALLETS
    from scripts.cli.replay import Existing

    async with await system.reader() as reader:
        return Existing(
            products={(str(row["category"]), str(row["product_id"])) async for row in reader.rows(PRODUCTS.schema)},
            customers={str(row["customer_id"]) async for row in reader.rows(WALLETS.schema)},
        )


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr if that is a terminal."""
    import sys

    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("replay"), BarColumn(), MofNCompleteColumn(), TextColumn("commands"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("replay", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def for_people(summary: Mapping[str, Any]) -> str:
    latency = summary["latency_ms"]
    lines = [
        f"{summary['invoices']} invoices: {summary['orders']} orders, {summary['returns']} returns, "
        f"{summary['write_offs']} write-offs; {summary['lines']} lines",
        f"  committed {summary['committed']}, refused {summary['refused']}, dead-lettered {summary['dead_lettered']}, "
        f"unanswered {summary['unanswered']}, skipped {summary['skipped']} invoices",
        f"  registered before: {summary['products_registered']} products, {summary['wallets_opened']} wallets",
        f"  {summary['seconds']} s: {summary['orders_per_s']} orders/s, {summary['lines_per_s']} lines/s",
        f"  from publish to result: p50 {latency['p50']} ms, p95 {latency['p95']} ms, p99 {latency['p99']} ms",
    ]
    lines += [f"  not registered: {each}" for each in summary["not_prepared"]]
    lines += [f"  refused {count} times: {reason}" for reason, count in summary["reasons"].items()]
    skipped = summary["skipped_invoices"]
    lines += [f"  skipped {each['invoice'] or '(no number)'}: {each['reason']}" for each in skipped[:SHOWN_SKIPPED]]
    if len(skipped) > SHOWN_SKIPPED:
        lines.append(f"  … and {len(skipped) - SHOWN_SKIPPED} more")
    return "\n".join(lines)
