"""Health of one stream worker over HTTP, for whoever supervises it and for people.

    /healthz   200 while the loop turns (it answers), with what the worker is doing
    /readyz    200 when the group has assigned partitions and every actor answers; else 503 and what is missing
    /metrics   this process's numbers, for Prometheus

Bound to 127.0.0.1 unless told otherwise: nothing here is authenticated. It only tells, and changes nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aiohttp import web

from actors.runtime import Runtime
from streams.lag import PartitionState
from streams.partitions import Partition

HOST = "127.0.0.1"


class HealthServer:
    """Serves until `stop`. `assignment_known` says whether this process is a member of the group with a share."""

    def __init__(
        self,
        *,
        name: str,
        runtime: Runtime,
        actors: Sequence[str],
        assignment_known: Callable[[], bool],
        states: Callable[[], Mapping[Partition, PartitionState]],
        metrics_page: Callable[[], bytes],
        actor_within_s: float = 2.0,
    ) -> None:
        self._name = name
        self._runtime = runtime
        self._actors = actors
        self._assignment_known = assignment_known
        self._states = states
        self._metrics_page = metrics_page
        self._actor_within_s = actor_within_s
        self._runner: web.AppRunner | None = None
        self.port = 0

    async def start(self, port: int, *, host: str = HOST) -> None:
        """Listen on `port` of the address `host`; 0 chooses a free port, which `port` then tells. Raises OSError."""
        app = web.Application()
        app.add_routes(
            [
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._metrics),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _healthz(self, _request: web.Request) -> web.Response:
        return web.json_response({"status": "ok", **self._details()})

    async def _readyz(self, _request: web.Request) -> web.Response:
        missing = [] if self._assignment_known() else ["partitions: the group has not assigned any yet"]
        missing += [
            f"{actor}: {problem}"
            for actor, problem in zip(self._actors, await self._actor_problems(), strict=True)
            if problem is not None
        ]
        body = {"status": "waiting" if missing else "ready", "missing": missing, **self._details()}
        return web.json_response(body, status=503 if missing else 200)

    async def _metrics(self, _request: web.Request) -> web.Response:
        return web.Response(body=self._metrics_page(), headers={"Content-Type": "text/plain; version=0.0.4"})

    async def _actor_problems(self) -> list[str | None]:
        """For each actor why it does not answer, or None."""

        async def ask(actor: str) -> str | None:
            try:
                async with asyncio.timeout(self._actor_within_s):
                    await self._runtime.ask(actor, "health", [None])
            except TimeoutError:
                return f"no answer within {self._actor_within_s:g} s"
            except Exception as error:
                return repr(error)
            return None

        return await asyncio.gather(*map(ask, self._actors))

    def _details(self) -> dict[str, Any]:
        now_s = time.monotonic()
        partitions = [
            {
                "topic": partition[0],
                "partition": partition[1],
                "lag": state.lag,
                "waiting": state.progress.waiting if state.progress else 0,
                "at_work": state.progress.at_work if state.progress else 0,
                "next_offset": state.progress.next_finished if state.progress else None,
                "last_progress_s_ago": round(now_s - state.progress.last_attempt_s, 3) if state.progress else None,
            }
            for partition, state in sorted(self._states().items())
        ]
        return {"worker": self._name, "partitions": partitions}
