"""`concord worker`: one stream worker apart from everything else; `concord workers` and `concord restart`: a running
system's own workers and actors, changed while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scripts.cli.errors import CommandError
from scripts.cli.exit_codes import ExitCode
from scripts.cli.options import DEFAULT_DIRECTORY, Data, Shape, command
from scripts.cli.output import Output
from scripts.cli.system import System

if TYPE_CHECKING:
    from infra.config import Settings
    from scripts.worker import WorkerSetup


def register(app: typer.Typer) -> None:
    @command(app, "worker")
    def worker(
        profile: Annotated[
            str | None, typer.Option(help="cluster: join the servers and the Ray that the settings name.")
        ] = None,
        data: Data = DEFAULT_DIRECTORY,
        name: Annotated[
            str,
            typer.Option(help="Unique among the workers; one that comes back under it keeps its partitions meanwhile."),
        ] = "",
        domain: Annotated[
            str, typer.Option(help="Take the commands of this domain alone, in a consumer group named after it.")
        ] = "",
        health_host: Annotated[
            str, typer.Option(help="Address of /healthz, /readyz and /metrics (default: setting http_host).")
        ] = "",
        health_port: Annotated[int, typer.Option(help="Port of the same; 0: any that is free.")] = 0,
        output: Shape = None,
    ) -> None:
        """Run one stream worker, apart from actors and supervisor.

        It joins the system that runs on DIR or, with --profile cluster, the one that the settings name, and takes its
        share of the partitions. Prints one line when its health can be asked. After SIGTERM it finishes and
        acknowledges what it is at and ends with 0; when it ends with anything else, start it again.
        """
        from infra.config import load_settings
        from schemas.registry import DOMAINS
        from scripts.worker import read_setup, run_worker

        if domain and domain not in DOMAINS:
            raise CommandError(f"There is no domain {domain}. There are: {', '.join(DOMAINS)}.", ExitCode.USAGE)
        shape = Output.of(output)
        settings = load_settings(data_dir=data, profile=profile)
        system = System.find(data)
        joins = system.running and profile is None
        called, host = name or unique_name(), health_host or settings.http_host

        def on_listening(port: int) -> None:
            told = {"worker": called, "health": f"http://{host}:{port}"}
            shape.show(told, lambda line: f"{line['worker']} serves {line['health']}/readyz. Ctrl-C stops it.")

        run_worker(
            read_setup(data) if joins else _outside(settings),
            name=called,
            health_host=host,
            health_port=health_port,
            keeps_place=bool(name),
            domain=domain,
            follow=data if joins else None,
            on_listening=on_listening,
        )

    @command(app, "workers")
    def workers(
        count: Annotated[
            int | None, typer.Argument(help="How many there shall be; without it they are listed.")
        ] = None,
        data: Data = DEFAULT_DIRECTORY,
        output: Shape = None,
    ) -> None:
        """How many stream workers a running system has of its own, until it is stopped.

        Those that come share the partitions with the others; those that go finish what they are at first. More
        workers than a command topic has partitions find nothing to do.
        """
        if count is None:
            states = _readiness(System.find(data)).get("workers", {})
            Output.of(output).table(
                [{"worker": name, "state": state} for name, state in sorted(states.items())], ("worker", "state")
            )
            return
        _told(data, {"do": "workers", "count": count}, output)

    @command(app, "restart")
    def restart(
        workers: Annotated[bool, typer.Option("--workers", help="Only the workers.")] = False,
        actors: Annotated[bool, typer.Option("--actors", help="Only the actors.")] = False,
        data: Data = DEFAULT_DIRECTORY,
        output: Shape = None,
    ) -> None:
        """Restart a running system's workers and actors, one after the other, while it works.

        Each finishes what it is at before it ends, and serves again before the next one's turn. No command is refused
        or lost because of it. Kafka, the storage and Ray itself go on running.
        """
        parts = [name for name, chosen in (("workers", workers), ("actors", actors)) if chosen]
        _told(data, {"do": "restart", "parts": parts}, output)


def unique_name() -> str:
    """A name that no other worker has or had."""
    import os
    import socket
    import uuid

    return f"worker-{socket.gethostname()[:40]}-{os.getpid()}-{uuid.uuid4().hex[:6]}"


def _outside(settings: Settings) -> WorkerSetup:
    from infra.config import ConfigurationError
    from scripts.worker import WorkerSetup

    if settings.profile != "cluster":
        raise CommandError(
            f"No system is running in {settings.data_dir}. Start one there with `concord up`, or name the servers in "
            "the settings and use --profile cluster.",
            ExitCode.UNREACHABLE,
        )
    if not settings.ray.address:
        raise ConfigurationError(
            [
                "CONCORD_RAY__ADDRESS: a worker needs the Ray that the actors live on. Name it as host:port, or as "
                "auto on a machine that is one of its nodes."
            ]
        )
    return WorkerSetup(
        settings=settings,
        bootstrap_servers=",".join(settings.kafka.bootstrap_servers),
        ray_address=settings.ray.address,
    )


def _told(directory: Path, request: Mapping[str, Any], output: Any) -> None:
    """Have a running supervisor do something, and show each step of it."""
    from scripts.control import ControlError, ask_supervisor

    shape = Output.of(output)
    try:
        for step in ask_supervisor(directory, request):
            shape.show(step, _for_people)
    except ControlError as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(
            f"No system is running in {directory}. Start it with `concord up`, or name its directory with --data.",
            ExitCode.UNREACHABLE,
        ) from error


def _for_people(step: Mapping[str, Any]) -> str:
    if "workers" in step:
        return f"Workers: {', '.join(step['workers']) or 'none'}."
    told = f"{step.get('worker') or step.get('actor')} {step['step']}"
    if "seconds" in step:
        told += f" in {step['seconds']} s"
    return told + (", with work under way that is done again" if step.get("drained") is False else "")


def _readiness(system: System) -> Mapping[str, Any]:
    import json
    import urllib.error
    import urllib.request

    if not system.running or not system.runtime.get("http"):
        raise CommandError(
            f"No system is running in {system.directory}. Start it with `concord up`, or name its directory with "
            "--data.",
            ExitCode.UNREACHABLE,
        )
    try:
        with urllib.request.urlopen(f"{system.runtime['http']}/readyz", timeout=10) as answer:
            found: dict[str, Any] = json.load(answer)
    except urllib.error.HTTPError as error:  # 503 says what is missing in the same form
        found = json.load(error)
    except OSError as error:
        raise CommandError(
            f"The system in {system.directory} does not answer: {error}.", ExitCode.UNREACHABLE
        ) from error
    return found
