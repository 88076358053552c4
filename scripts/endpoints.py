"""The supervisor's HTTP endpoints: health for probes, metrics for Prometheus. Read-only, on this machine only unless
told otherwise: nothing here is authenticated.

/          what there is
/healthz   200 while the supervisor's loop turns
/readyz    200 when Kafka and storage serve, every actor answers and every worker has its partitions; 503 and why not
/metrics   the metrics of all processes, added up
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from aiohttp import web

from infra.metrics import metrics_page
from infra.servers.errors import PortTakenError
from scripts.measuring import parts_ready, processes_of_run
from scripts.preflight import HOST

EVERY_ADDRESS = ("0.0.0.0", "::")

Readiness = Callable[[], Mapping[str, Any]]
"""What is ready and what is not: {"ready": bool, …}."""


class Endpoints:
    """Serves until `stop`. `port` 0 chooses a free one; `url`, for this machine, is known once started."""

    def __init__(
        self,
        *,
        port: int,
        readiness: Readiness,
        metrics_directory: Path,
        index: Mapping[str, Any],
        host: str = HOST,
    ) -> None:
        self._host = host
        self._port = port
        self._readiness = readiness
        self._metrics_directory = metrics_directory
        self._index = index
        self._runner: web.AppRunner | None = None
        self.url = ""

    async def start(self) -> str:
        """The address. Raises PortTakenError."""
        application = web.Application()
        application.add_routes(
            [
                web.get("/", self._root),
                web.get("/healthz", self._health),
                web.get("/readyz", self._ready),
                web.get("/metrics", self._metrics),
            ]
        )
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self._port)
        try:
            await site.start()
        except OSError as error:
            await self._runner.cleanup()
            raise PortTakenError(
                f"Port {self._port}, which metrics and health should have, is taken by another process.",
                remedy="Stop that process, or set CONCORD_HTTP_PORT to another port (0: any that is free).",
                setting="CONCORD_HTTP_PORT",
            ) from error
        here = HOST if self._host in EVERY_ADDRESS else self._host
        self.url = f"http://{here}:{self._runner.addresses[0][1]}"
        return self.url

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _root(self, request: web.Request) -> web.Response:
        return web.json_response({**self._index, "endpoints": ["/healthz", "/readyz", "/metrics"]})

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"healthy": True})

    async def _ready(self, request: web.Request) -> web.Response:
        state = self._readiness()
        return web.json_response(state, status=200 if state["ready"] else 503)

    async def _metrics(self, request: web.Request) -> web.Response:
        parts = parts_ready(self._readiness())
        page = await asyncio.to_thread(
            lambda: metrics_page(self._metrics_directory, processes=processes_of_run(), parts=parts)
        )
        return web.Response(body=page, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})
