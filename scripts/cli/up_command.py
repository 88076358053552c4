"""`concord up`: the system in the foreground."""

from __future__ import annotations

from typing import Annotated

import typer

from scripts.cli.options import DEFAULT_DIRECTORY, Data, Shape, command
from scripts.cli.output import Output, note


def register(app: typer.Typer) -> None:
    @command(app, "up")
    def up(
        profile: Annotated[
            str | None,
            typer.Option(
                help="Which servers it runs on: local (Kafka and SQLite), stack (Kafka and Cassandra, started here), "
                "or cluster (your own, by their settings)."
            ),
        ] = None,
        workers: Annotated[
            int | None,
            typer.Option(
                help="How many stream workers it begins with; 0 where all of them run apart (concord worker)."
            ),
        ] = None,
        data: Data = DEFAULT_DIRECTORY,
        output: Shape = None,
    ) -> None:
        """Run the system until Ctrl-C.

        Starts the profile's servers, Ray with the domains' actors, and the stream workers; data lives in DIR. A
        second start on the same directory continues from its state. Prints one line when ready.
        """
        import asyncio
        import sys
        from collections.abc import Mapping
        from contextlib import redirect_stdout
        from typing import Any

        from infra.config import load_settings
        from infra.telemetry import configure_logging

        shape = Output.of(output)
        settings = load_settings(data_dir=data, profile=profile, workers=workers)
        configure_logging(settings.log_level, process="supervisor")
        from scripts.up import Addresses, supervise

        def for_people(line: Mapping[str, Any]) -> str:
            return (
                f"Ready. Kafka {line['bootstrap_servers']}, health and metrics {line['http']}, "
                f"Ray dashboard {line['dashboard']}. Ctrl-C stops it."
            )

        def on_ready(addresses: Addresses) -> None:
            shape.show(addresses.ready_line(), for_people)

        # stdout has that line alone: what libraries print (Ray does, of every process that died) belongs with the logs.
        with redirect_stdout(sys.stderr):
            asyncio.run(supervise(settings, on_ready=on_ready, progress=note))
