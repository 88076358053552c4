"""Options that every command has, and the wrapper that turns expected errors into a sentence and an exit code."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from scripts.cli.errors import expected
from scripts.cli.exit_codes import ExitCode
from scripts.cli.output import Format, note, quiet_stdout

DEFAULT_DIRECTORY = Path(".concord")

Data = Annotated[
    Path,
    typer.Option("--data", metavar="DIR", help="The system's directory.", envvar="CONCORD_DATA_DIR", show_envvar=False),
]
Shape = Annotated[
    Format | None,
    typer.Option("--output", help="For people, or one JSON object a line (default: json unless on a terminal)."),
]

Function = TypeVar("Function", bound=Callable[..., Any])


def command(app: typer.Typer, name: str) -> Callable[[Function], Function]:
    """Register a command. What it returns is its exit code; None is DONE."""

    def register(function: Function) -> Function:
        @functools.wraps(function)
        def run(*arguments: Any, **options: Any) -> None:
            raise typer.Exit(int(_guarded(function, *arguments, **options)))

        app.command(name)(run)
        return function

    return register


def _guarded(function: Callable[..., Any], *arguments: Any, **options: Any) -> ExitCode | int:
    # What the Kafka client logs about an absent broker, the command says itself, once and with the remedy.
    logging.getLogger("aiokafka").addHandler(logging.NullHandler())
    try:
        code = function(*arguments, **options)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        quiet_stdout()
        return 141
    except (Exception, ExceptionGroup) as error:
        found = expected(error)
        if found is None or os.environ.get("CONCORD_TRACEBACK"):
            import traceback

            traceback.print_exc(file=sys.stderr)
            return ExitCode.FAILED if found is None else found[1]
        note(f"concord: {found[0]}")
        return found[1]
    return ExitCode.DONE if code is None else code
