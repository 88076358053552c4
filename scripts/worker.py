"""Entry point of a stream worker process: `python -m scripts.worker --data DIR --name worker-0 --health-port N`.

What it needs to know beyond its arguments lies in `DIR/run/settings.json`, written by whoever runs the system. Start
it with `infra.servers.processes.spawn`, so that it ends with its parent. Exit code 0 after SIGTERM; anything else
means: start it again.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pydantic import BaseModel, ConfigDict, Field

from infra.config import WITH_SECRETS, Settings
from infra.metrics import Metrics, free_name, open_metrics
from infra.telemetry import configure_logging
from infra.tracing import Tracer, open_tracer

if TYPE_CHECKING:
    from streams.app import StreamWorker, WorkerOptions

EXIT_NOT_STARTED = 1

EXIT_MOVED = 75
"""Exit code of a worker whose system has moved to other addresses (EX_TEMPFAIL): started again, it finds them."""

FOLLOW_EVERY_S = 1.0


RAY_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def _of_ray(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: environment[name] for name in RAY_VARIABLES if name in environment}


class WorkerSetup(BaseModel):
    """What a running system tells its workers: the settings, and where its servers turned out to be."""

    model_config = ConfigDict(frozen=True)

    settings: Settings
    bootstrap_servers: str
    ray_address: str
    ray_environment: dict[str, str] = Field(default_factory=lambda: _of_ray(os.environ))
    """By which this process, and a worker that is nobody's child, gets into Ray."""


def setup_path(data_dir: Path) -> Path:
    """Where workers find what they need to know."""
    return data_dir / "run" / "settings.json"


def write_setup(setup: WorkerSetup) -> None:
    """Write it there, whole or not at all, readable by nobody else."""
    path = setup_path(setup.settings.data_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(setup.model_dump_json(context=WITH_SECRETS))
    temporary.replace(path)


def read_setup(data_dir: Path) -> WorkerSetup:
    """What the running system told its workers. Raises OSError, or ValueError if it is no such thing.

    The system may be of an earlier release than this process: settings that are gone since then are passed over.
    """
    return WorkerSetup.model_validate_json(setup_path(data_dir).read_bytes(), extra="ignore")


def worker_options(setup: WorkerSetup, *, name: str, health_port: int, domain: str = "") -> WorkerOptions:
    """The settings in the words of the stream side, for a worker of every domain or of one."""
    from schemas.registry import DOMAINS
    from schemas.topics import consumer_group
    from scripts.connections import kafka_connection
    from scripts.wiring import system_config
    from streams.app import WorkerOptions
    from streams.partitions import Limits

    settings = setup.settings
    return WorkerOptions(
        kafka=kafka_connection(settings, setup.bootstrap_servers),
        name=name,
        domains=(domain,) if domain else DOMAINS,
        consumer_group=consumer_group(domain),
        projected_domain=WorkerOptions.projected_domain if domain in ("", WorkerOptions.projected_domain) else "",
        placement=system_config(settings).placement,
        work_dir=settings.data_dir / "run" / "faust",
        health_port=health_port,
        max_command_bytes=settings.kafka.max_command_bytes,
        limits=Limits(batch_messages=settings.batch.max_commands, linger_s=settings.batch.max_wait_ms / 1000),
        delivery_timeout_ms=settings.kafka.delivery_timeout_ms,
        stalled_after_s=float(settings.watchdog_seconds),
    )


async def _run(
    setup: WorkerSetup,
    connect: Callable[[str], object],
    metrics: Metrics,
    tracer: Tracer,
    options: WorkerOptions,
    follow: Path | None,
    on_listening: Callable[[int], None],
) -> None:
    from scripts.measuring import worker_observer
    from streams.app import StreamWorker

    await refuse_double_work(options)
    runtime = connect(setup.ray_address)  # blocks for a second or two: nothing else runs yet
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Ray has put its own in place; Faust puts the right one later
    observer = replace(worker_observer(metrics, setup.settings, options), tracer=tracer)
    worker = StreamWorker(options, runtime, observer=observer)  # type: ignore[arg-type]
    beside = [asyncio.ensure_future(_tell_port(worker, on_listening))]
    if follow is not None:
        beside.append(asyncio.ensure_future(_follow(follow, setup)))
    await worker.run()
    for task in beside:
        task.cancel()


class DoubleWorkError(Exception):
    """Workers of every domain and workers of one do not know of each other: both would carry out each command."""


async def refuse_double_work(options: WorkerOptions) -> None:
    """Raises DoubleWorkError where workers of the other kind are at work on the same commands.

    It would be harmless (the second finds the first one's answer), and twice the work.
    """
    from infra.messaging.reader import group_members
    from schemas.registry import DOMAINS
    from schemas.topics import CONSUMER_GROUP, consumer_group

    of_all = options.consumer_group == CONSUMER_GROUP
    others = [consumer_group(domain) for domain in DOMAINS] if of_all else [CONSUMER_GROUP]
    busy = [group for group, members in (await group_members(options.kafka, others)).items() if members]
    if busy:
        raise DoubleWorkError(
            f"Workers of the consumer group {', '.join(busy)} take the commands that this worker, of the group "
            f"{options.consumer_group}, would take as well. Stop them first, or start workers of their kind "
            "(`concord worker --domain`)."
        )


async def _tell_port(worker: StreamWorker, on_listening: Callable[[int], None]) -> None:
    while not worker.health.port:  # noqa: ASYNC110 - once, at the start
        await asyncio.sleep(0.05)
    on_listening(worker.health.port)


async def _follow(data_dir: Path, setup: WorkerSetup) -> None:
    """End this process when the system that it belongs to has moved: what it is connected to is gone."""
    import structlog

    while True:
        await asyncio.sleep(FOLLOW_EVERY_S)
        with suppress(OSError, ValueError):
            now = await asyncio.to_thread(read_setup, data_dir)
            if (now.bootstrap_servers, now.ray_address) != (setup.bootstrap_servers, setup.ray_address):
                structlog.get_logger().warning("system_moved", remedy="start this worker again")
                sys.stderr.flush()
                os._exit(EXIT_MOVED)


def run_worker(
    setup: WorkerSetup,
    *,
    name: str,
    health_host: str = "127.0.0.1",
    health_port: int = 0,
    keeps_place: bool = True,
    domain: str = "",
    follow: Path | None = None,
    on_listening: Callable[[int], None] = lambda port: None,
) -> NoReturn:
    """Be a stream worker until SIGTERM or SIGUSR1; ends the process.

    With 0 after a signal, once everything at work is finished and acknowledged; with anything else it is to be started
    again. Must be called before prometheus_client, Ray or Faust are imported. `follow` is the data directory of
    the system that it belongs to: when that has other servers, the process ends with EXIT_MOVED. `on_listening` is told
    the port of the health pages once they are served.
    """
    configure_logging(setup.settings.log_level, process=name)
    faulthandler.enable()
    from scripts.connections import ray_environment

    os.environ.update({**setup.ray_environment, **ray_environment(setup.settings)})
    # Before Ray or Faust are imported: prometheus_client learns only at its first import what is shared.
    shared = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    directory = Path(shared) if shared else setup.settings.data_dir / "metrics"
    metrics = open_metrics(directory, name if keeps_place else free_name(directory, "worker-apart"))
    from actors.ray_runtime import connect

    tracer = open_tracer(setup.settings.tracing, service="worker", process=name)
    code = 0
    try:
        options = replace(
            worker_options(setup, name=name, health_port=health_port, domain=domain),
            health_host=health_host,
            keeps_place=keeps_place,
        )
        asyncio.run(_run(setup, connect, metrics, tracer, options, follow, on_listening))
    except Exception:
        import structlog

        structlog.get_logger().exception("worker_ended")
        code = EXIT_NOT_STARTED
    tracer.close()
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of Ray and Faust have nothing left to do that anybody waits for.
    os._exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.worker", description="One stream worker of a system.")
    parser.add_argument("--data", type=Path, required=True, help="data directory of the running system")
    parser.add_argument("--name", required=True, help="unique among the workers, and the same after a restart")
    parser.add_argument("--health-port", type=int, default=0, help="port of /healthz, /readyz and /metrics; 0: any")
    arguments = parser.parse_args()
    setup = read_setup(arguments.data)
    run_worker(setup, name=arguments.name, health_port=arguments.health_port)


if __name__ == "__main__":
    main()
