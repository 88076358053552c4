"""A stream worker with remembering actors, as a process of its own that tests may kill. Argument: JSON."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

from flow_world import NullRuntime, RememberingRuntime, until, worker_options

from infra.telemetry import configure_logging
from streams.app import StreamWorker


async def main(arguments: dict) -> None:  # type: ignore[type-arg]
    directory = Path(arguments["directory"])
    settings = arguments["settings"]
    null = settings.pop("null", False)
    options = worker_options(
        arguments["bootstrap_servers"], arguments["domain"], arguments["group"], arguments["name"], directory, settings
    )
    runtime = RememberingRuntime(directory / "journal", directory / "hold", directory / "deaf")
    worker = StreamWorker(options, NullRuntime() if null else runtime)

    async def tell_port() -> None:
        await until(lambda: worker.health.port)
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
