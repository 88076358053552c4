"""Options that every command has, and the wrapper that turns expected errors into a sentence and an exit code."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

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
    """Register a command. What it returns is its exit code; None is DONE.

    A parameter that is a dataclass stands for its fields: options that several commands have in common.
    """

    def register(function: Function) -> Function:
        hints = get_type_hints(function, include_extras=True)
        shared = {parameter: hint for parameter, hint in hints.items() if is_dataclass(hint)}

        @functools.wraps(function)
        def run(**options: Any) -> None:
            for parameter, kind in shared.items():
                options[parameter] = kind(**{field.name: options.pop(field.name) for field in fields(kind)})
            raise typer.Exit(int(_guarded(function, **options)))

        if shared:
            signature = inspect.Signature(list(_parameters(function, hints)))
            run.__signature__ = signature  # type: ignore[attr-defined]
            run.__annotations__ = {each.name: each.annotation for each in signature.parameters.values()}
        app.command(name)(run)
        return function

    return register


def _parameters(function: Callable[..., Any], hints: Mapping[str, Any]) -> Iterator[inspect.Parameter]:
    """The parameters of a command, with the fields of a dataclass in its place. Typer asks for them by keyword."""
    for name, parameter in inspect.signature(function).parameters.items():
        hint = hints[name]
        if not is_dataclass(hint):
            yield parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY)
            continue
        types = get_type_hints(hint, include_extras=True)
        for field in fields(hint):
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            yield inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=types[field.name]
            )


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
