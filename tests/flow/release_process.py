"""A stream worker and its actors, of one release of `release_domain`, in a process of its own. Argument: JSON."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import release_domain

from actors.local_runtime import LocalRuntime
from actors.runtime import Placement
from actors.system import SystemConfig
from infra.storage.sqlite import SqliteStorage
from infra.telemetry import configure_logging
from streams.app import StreamWorker, WorkerOptions


async def main(arguments: dict[str, str]) -> None:
    release_domain.install()
    placement = Placement(4, {release_domain.NAME: 1})
    storage = SqliteStorage(Path(arguments["tables"]))
    config = SystemConfig(placement, domains="release_domain:DOMAINS")
    async with LocalRuntime(config, storage, names=placement.actors()) as runtime:
        worker = StreamWorker(
            WorkerOptions(
                kafka=arguments["bootstrap_servers"],
                name=arguments["name"],
                domains=(release_domain.NAME,),
                placement=placement,
                work_dir=Path(arguments["work"]),
                consumer_group=arguments["group"],
                projected_domain="",
                session_timeout_s=6.0,
                heartbeat_s=1.0,
            ),
            runtime,
        )

        async def tell() -> None:
            """The file says which partitions this worker has, for as long as it has them."""
            path = Path(arguments["work"]) / f"{arguments['name']}.assigned"
            while True:
                numbers = sorted(number for _, number in worker.assigned) if worker.ready else None
                path.with_suffix(".new").write_text(json.dumps(numbers))
                path.with_suffix(".new").replace(path)
                await asyncio.sleep(0.05)

        telling = asyncio.create_task(tell())
        await worker.run()
        telling.cancel()
    await storage.close()


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    configure_logging("info", process=given["name"])
    asyncio.run(main(given))
    sys.stderr.flush()
    os._exit(0)
