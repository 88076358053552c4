"""Kafka and Cassandra of one directory without a system: what `concord stack up` leaves running in the background.

Theory of operation. One process keeps the two servers (an flock on DIR/run/stack.lock says so) as the supervisor of a
whole system would: each is started again when it ends, with its port and its data, and both end with this process
however it ends. They lie where profile stack has them, in DIR/kafka and DIR/cassandra, so a system that was run there
finds its data here and the other way round; each server's own lock keeps the two from running at once.

    concord stack up ── spawns ──► python -m scripts.stack --data DIR --tell FD     a session of its own
           ▲                            │
           └── one JSON object a line ──┘   {"note": …} while it starts, then {"ready": …} or {"error": …, "code": …}

DIR/run/stack.json has what the servers are at, written at every change; DIR/logs/stack.log what this process says.
SIGTERM and SIGINT stop both cleanly.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from infra.config import Settings, load_settings
from infra.servers import guard
from infra.telemetry import configure_logging
from scripts import preflight
from scripts.cli.errors import expected
from scripts.cli.exit_codes import ExitCode
from scripts.cli.system import stack_lock_path, stack_state_path, write_atomically
from scripts.servers import KeptServer, all_of, local_cassandra, local_kafka, until_stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Tell = Callable[[Mapping[str, Any]], None]


async def run(settings: Settings, *, on_ready: Tell, progress: Callable[[str], None]) -> None:
    """Run the two servers until a signal says to stop. Returns after a clean stop. Raises a ServerError."""
    directory = settings.data_dir
    await asyncio.to_thread(preflight.check_directory, directory)
    with preflight.hold(directory, lock=stack_lock_path(directory), what="The servers of `concord stack` are"):
        await _Stack(settings, on_ready, progress).run()


class _Stack:
    def __init__(self, settings: Settings, on_ready: Tell, progress: Callable[[str], None]) -> None:
        kafka, cassandra = local_kafka(settings, progress), local_cassandra(settings, progress)
        self._heaps_mb = {"kafka": kafka.heap_mb, "cassandra": cassandra.heap_mb}
        self._servers = [
            KeptServer("kafka", kafka, on_change=self._write_state),
            KeptServer("cassandra", cassandra, on_change=self._write_state),
        ]
        self._directory = settings.data_dir
        self._on_ready = on_ready
        self._progress = progress
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._stopping.set)
        try:
            await until_stopped(self._work(), self._stopping)
        finally:
            await asyncio.gather(*(server.stop() for server in self._servers))
            self._write_state()

    async def _work(self) -> None:
        """Start both, say so, and keep them; never returns."""
        for server in self._servers:
            server.server.choose_ports()
        self._progress("Starting Kafka and Cassandra")
        starting = asyncio.ensure_future(all_of(server.start() for server in self._servers))
        self._write_state()
        await starting
        self._write_state()
        self._on_ready(ready_line(self._state()))
        await asyncio.gather(*(server.keep() for server in self._servers))

    def _state(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "servers": {
                server.name: {
                    "state": server.state,
                    "pid": server.server.pid,
                    "address": server.address,
                    "heap_mb": self._heaps_mb[server.name],
                }
                for server in self._servers
            },
        }

    def _write_state(self) -> None:
        write_atomically(stack_state_path(self._directory), self._state())


def ready_line(state: Mapping[str, Any]) -> dict[str, Any]:
    """Where the servers are, and the environment in which `concord up` uses them."""
    addresses = {name: str(server["address"]) for name, server in state["servers"].items()}
    return {
        "ready": True,
        "pid": state["pid"],
        **addresses,
        "environment": {
            "CONCORD_PROFILE": "cluster",
            "CONCORD_KAFKA__BOOTSTRAP_SERVERS": addresses["kafka"],
            "CONCORD_STORAGE__URL": f"cassandra://{addresses['cassandra']}/",
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.stack", description="Keeps Kafka and Cassandra running.")
    parser.add_argument("--data", type=Path, required=True, help="directory of their data")
    parser.add_argument("--tell", type=int, required=True, help="file descriptor to say on how the start goes")
    arguments = parser.parse_args()
    os.environ.pop(guard.MARK, None)  # started from a system, but no part of it
    channel: list[int] = [arguments.tell]

    def tell(line: Mapping[str, Any]) -> None:
        with suppress(OSError, IndexError):  # whoever waited has gone
            os.write(channel[0], json.dumps(line).encode() + b"\n")

    def on_ready(line: Mapping[str, Any]) -> None:
        tell(line)
        os.close(channel.pop())

    try:
        settings = load_settings(data_dir=arguments.data)
        configure_logging(settings.log_level, process="stack")
        asyncio.run(run(settings, on_ready=on_ready, progress=lambda text: tell({"note": text})))
    except (Exception, ExceptionGroup) as error:
        sentence, code = expected(error) or (f"{type(error).__name__}: {error}", ExitCode.FAILED)
        tell({"error": sentence, "code": int(code)})
        import structlog

        structlog.get_logger().exception("stack_ended")
        return int(code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
