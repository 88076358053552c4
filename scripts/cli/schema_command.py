"""`concord schema apply|show|diff`: announced by the contract, built with the storages that need it."""

from __future__ import annotations

import typer

from scripts.cli.errors import CommandError
from scripts.cli.exit_codes import ExitCode
from scripts.cli.options import DEFAULT_DIRECTORY, Data, Shape, command


def register(app: typer.Typer) -> None:
    schema = typer.Typer(no_args_is_help=True)
    app.add_typer(schema, name="schema", help="Tables as declared and as they are (comes with a later version).")

    def announce(name: str, help: str) -> None:
        def later(data: Data = DEFAULT_DIRECTORY, output: Shape = None) -> None:
            raise CommandError(
                f"`concord schema {name}` comes with a later version. Until then `concord up` creates missing tables.",
                ExitCode.USAGE,
            )

        later.__doc__ = f"{help} Comes with a later version."
        command(schema, name)(later)

    announce("apply", "Create what is missing.")
    announce("show", "The tables as declared.")
    announce("diff", "What differs between the declared tables and those that are there.")
