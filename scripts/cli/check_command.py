"""`concord check`: does everything hold in a system at rest?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from scripts.cli.exit_codes import ExitCode
from scripts.cli.options import DEFAULT_DIRECTORY, Data, Shape, command
from scripts.cli.output import Output
from scripts.cli.system import System

SHOWN = 50


def register(app: typer.Typer) -> None:
    @command(app, "check")
    def check(
        wait: Annotated[
            float, typer.Option(metavar="SECONDS", min=0, help="How long to wait for the system to come to rest.")
        ] = 30,
        data: Data = DEFAULT_DIRECTORY,
        output: Shape = None,
    ) -> ExitCode:
        """Verify a resting system: outcomes, events, records in doubt, stock and money.

        Exit code 1 with the offenders. Of a system that does not run, only its tables are verified.
        """
        import asyncio

        from scripts.cli.check import check_system

        report = asyncio.run(check_system(System.find(data), wait_s=wait))
        Output.of(output).show(report, for_people)
        return ExitCode.DONE if report["ok"] else ExitCode.FAILED


def for_people(report: Mapping[str, Any]) -> str:
    lines = ["Everything holds." if report["ok"] else "Something does not hold."]
    lines += [f"  {name.replace('_', ' '):<28} {count}" for name, count in report["counted"].items()]
    offenders = report["offenders"]
    lines += [f"  ! {offender}" for offender in offenders[:SHOWN]]
    if len(offenders) > SHOWN:
        lines.append(f"  … and {len(offenders) - SHOWN} more")
    return "\n".join(lines)
