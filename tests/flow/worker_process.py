"""A stream worker with remembering actors, as a process of its own that tests may kill. Argument: JSON."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

from flow_world import NullRuntime, RememberingRuntime, placement_of

from infra.telemetry import configure_logging
from streams.app import StreamWorker, WorkerOptions
from streams.asking import Patience
from streams.partitions import Limits


async def main(arguments: dict) -> None:  # type: ignore[type-arg]
    directory = Path(arguments["directory"])
    settings = arguments["settings"]
    null = settings.pop("null", False)
    limits = Limits(**settings.pop("limits", {}))
    patience = Patience(**settings.pop("patience", {}))
    options = WorkerOptions(
        bootstrap_servers=arguments["bootstrap_servers"],
        name=arguments["name"],
        domains=(arguments["domain"],),
        placement=placement_of(arguments["domain"]),
        work_dir=directory,
        consumer_group=arguments["group"],
        projected_domain=settings.pop("projected_domain", ""),
        limits=limits,
        patience=patience,
        **settings,
    )
    runtime = RememberingRuntime(directory / "journal", directory / "hold", directory / "deaf")
    worker = StreamWorker(options, NullRuntime() if null else runtime)

    async def tell_port() -> None:
        while not worker.health.port:
            await asyncio.sleep(0.01)
        path = Path(arguments["port_path"])
        path.with_suffix(".new").write_text(str(worker.health.port))
        path.with_suffix(".new").replace(path)

    telling = asyncio.create_task(tell_port())
    await worker.run()
    await telling


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    configure_logging("info", process=given["name"])
    asyncio.run(main(given))
    sys.stderr.flush()
    os._exit(0)
