"""An OpenTelemetry collector as far as a test needs one: takes spans by OTLP over HTTP and tells what it got."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as ProtoSpan
from opentelemetry.proto.trace.v1.trace_pb2 import Status

HOST = "127.0.0.1"
QUIET_S = 1.0


@dataclass(frozen=True)
class Event:
    name: str
    attributes: dict[str, Any]


@dataclass(frozen=True)
class SeenSpan:
    """A span as it arrived. `links` are (trace id, span id)."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    kind: str
    failed: bool
    attributes: dict[str, Any]
    resource: dict[str, Any]
    links: tuple[tuple[str, str], ...]
    events: tuple[Event, ...]
    trace_state: str
    status_text: str

    @property
    def process(self) -> str:
        """`worker-0`, `orders-1`, `coordinator-0`, …"""
        return str(self.resource["service.instance.id"])


@dataclass
class Collector:
    """`headers` are those of every request, `bodies` what they held."""

    url: str = ""
    spans: list[SeenSpan] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    refusing: int = 0
    """The status that requests are answered with; 0 to take them."""

    def of(self, trace_id: str) -> list[SeenSpan]:
        return [span for span in self.spans if span.trace_id == trace_id]

    async def until(self, holds: Callable[[], bool], what: str, *, within_s: float = 20.0) -> None:
        """Wait for spans that are on their way: processes send them about once a second."""
        deadline_s = asyncio.get_running_loop().time() + within_s
        while not holds():
            names = sorted({span.name for span in self.spans})
            assert asyncio.get_running_loop().time() < deadline_s, f"waited {within_s:.0f} s for {what}; got {names}"
            await asyncio.sleep(0.05)

    async def take(self, request: web.Request) -> web.Response:
        body = await request.read()
        if self.refusing:
            return web.Response(status=self.refusing)
        if request.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        assert request.content_type == "application/x-protobuf", request.content_type
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        self.bodies.append(body)
        told = ExportTraceServiceRequest.FromString(body)
        for per_process in told.resource_spans:
            resource = {each.key: _value(each.value) for each in per_process.resource.attributes}
            for scope in per_process.scope_spans:
                self.spans += [_seen(span, resource) for span in scope.spans]
        return web.Response(
            body=ExportTraceServiceResponse().SerializeToString(), content_type="application/x-protobuf"
        )


@asynccontextmanager
async def running_collector(port: int = 0) -> AsyncIterator[Collector]:
    """A collector on a free port, or on the one that is named."""
    collector = Collector()
    app = web.Application(client_max_size=64 * 2**20)
    app.router.add_post("/v1/traces", collector.take)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, HOST, port)
    await site.start()
    collector.url = f"http://{HOST}:{runner.addresses[0][1]}"
    try:
        yield collector
    finally:
        await runner.cleanup()


def _seen(span: ProtoSpan, resource: dict[str, Any]) -> SeenSpan:
    return SeenSpan(
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        name=span.name,
        kind=ProtoSpan.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_").lower(),
        failed=span.status.code == Status.STATUS_CODE_ERROR,
        attributes={each.key: _value(each.value) for each in span.attributes},
        resource=resource,
        links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
        events=tuple(
            Event(event.name, {each.key: _value(each.value) for each in event.attributes}) for event in span.events
        ),
        trace_state=span.trace_state,
        status_text=span.status.message,
    )


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    return None if kind is None else getattr(value, kind)
