"""Spans that are recorded, by OpenTelemetry's SDK, and delivered by OTLP over HTTP (protobuf).

Nothing here waits for the collector. Ended spans queue in memory (`tracing.queue_spans`), a thread of the SDK takes
them from there; when the collector is away the oldest are dropped. That is said once in the log, and once when it is
over. What a process that is killed has not delivered yet is lost: spans describe the work and are no part of it.

Sampling is decided where a trace begins and obeyed by everybody else; a batch, which is a trace of its own, is
recorded when one of the messages that it links to is.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Sequence
from contextvars import Token
from types import TracebackType
from typing import Any

from opentelemetry import context as otel_context
from opentelemetry import trace as otel
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import Decision, ParentBased, Sampler, SamplingResult, TraceIdRatioBased
from opentelemetry.trace import Link, NonRecordingSpan, SpanContext, Status, StatusCode, TraceFlags, TraceState

from infra.config import TracingSettings, secret_of
from infra.tracing import NO_SPAN, Attributes, Span, SpanKind, SpanType, Tracer, name_current_span_by
from schemas.trace_context import TraceContext

log = logging.getLogger(__name__)

TRACES_PATH = "/v1/traces"
EXPORT_TIMEOUT_S = 5.0
EXPORT_BATCH = 512

_KINDS = {
    SpanKind.INTERNAL: otel.SpanKind.INTERNAL,
    SpanKind.SERVER: otel.SpanKind.SERVER,
    SpanKind.CLIENT: otel.SpanKind.CLIENT,
    SpanKind.PRODUCER: otel.SpanKind.PRODUCER,
    SpanKind.CONSUMER: otel.SpanKind.CONSUMER,
}


def traces_url(endpoint: str) -> str:
    """Where spans are posted: OTLP's path below `endpoint`, unless that names it already."""
    base = endpoint.rstrip("/")
    return base if base.endswith(TRACES_PATH) else base + TRACES_PATH


def parse_otlp_headers(text: str) -> dict[str, str]:
    """`name=value,name=value`, as OTEL_EXPORTER_OTLP_HEADERS has them."""
    pairs = (part.partition("=") for part in text.split(",") if part.strip())
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


class OtlpTracer(Tracer):
    """Implements `Tracer`. `exporter` is for tests; by default spans go to `settings.endpoint`. Close it at the end."""

    on = True

    def __init__(
        self, settings: TracingSettings, *, service: str, process: str, exporter: SpanExporter | None = None
    ) -> None:
        # The SDK says at every try that it could not deliver; once is enough (see _Delivery).
        logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)
        resource = Resource.create(
            {
                "service.namespace": "concord",
                "service.name": f"concord-{service}",
                "service.instance.id": process,
                "process.pid": os.getpid(),
            }
        )
        sampler = ParentBased(root=_Root(settings.sample_ratio))
        self._provider = TracerProvider(
            sampler=sampler, resource=resource, shutdown_on_exit=False, meter_provider=NoOpMeterProvider()
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(
                _Delivery(exporter or _exporter(settings), settings.endpoint),
                max_queue_size=settings.queue_spans,
                schedule_delay_millis=settings.export_every_ms,
                max_export_batch_size=min(EXPORT_BATCH, settings.queue_spans),
                meter_provider=NoOpMeterProvider(),
            )
        )
        self._tracer = self._provider.get_tracer("concord")
        name_current_span_by(_current_ids)

    def start(
        self,
        span_type: SpanType,
        about: str = "",
        *,
        parent: TraceContext | None = None,
        links: Iterable[TraceContext] = (),
        attributes: Attributes | None = None,
    ) -> Span:
        made = self._tracer.start_span(
            span_type.name.format(about),
            context=_NO_CONTEXT if parent is None else _context_of(parent),
            kind=_KINDS[span_type.kind],
            attributes=attributes,
            links=[Link(_span_context(context)) for context in links],
        )
        return RecordedSpan(made, span_type) if made.is_recording() else Span(_told(made.get_span_context()))

    def under(
        self,
        parent: TraceContext | None,
        span_type: SpanType,
        about: str = "",
        attributes: Attributes | None = None,
    ) -> Span:
        if parent is None or not parent.sampled:
            return _NoCurrentSpan()
        made = self._tracer.start_span(
            span_type.name.format(about),
            context=_context_of(parent),
            kind=_KINDS[span_type.kind],
            attributes=attributes,
        )
        return RecordedSpan(made, span_type) if made.is_recording() else _NoCurrentSpan()

    @property
    def active(self) -> bool:
        # Not "is it recording": what a task does after its parent has ended is still a part of the trace.
        current = otel.get_current_span().get_span_context()
        return current.is_valid and current.trace_flags.sampled

    def child(self, span_type: SpanType, about: str = "", attributes: Attributes | None = None) -> Span:
        if not self.active:
            return NO_SPAN
        made = self._tracer.start_span(span_type.name.format(about), kind=_KINDS[span_type.kind], attributes=attributes)
        return RecordedSpan(made, span_type) if made.is_recording() else NO_SPAN

    def close(self, within_s: float = 2.0) -> None:
        # A collector that takes the connection and does not answer would keep the SDK waiting.
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(within_s)


class RecordedSpan(Span):
    __slots__ = ("_failed", "_span", "_token", "_type")

    recording = True

    def __init__(self, span: otel.Span, span_type: SpanType) -> None:
        super().__init__(_told(span.get_span_context()))
        self._span = span
        self._type = span_type
        self._failed = False
        self._token: Token[Any] | None = None

    def rename(self, about: str) -> None:
        self._span.update_name(self._type.name.format(about))

    def note(self, attributes: Attributes) -> None:
        self._span.set_attributes(dict(attributes))

    def event(self, name: str, attributes: Attributes) -> None:
        self._span.add_event(name, dict(attributes))

    def link(self, context: TraceContext | None) -> None:
        if context is not None:
            self._span.add_link(_span_context(context))

    def fail(self, error_type: str) -> None:
        self._failed = True
        self._span.set_attribute("error.type", error_type)
        self._span.set_status(Status(StatusCode.ERROR))

    def end(self) -> None:
        self._span.end()

    def __enter__(self) -> Span:
        self._token = otel_context.attach(otel.set_span_in_context(self._span))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._token is not None:
            otel_context.detach(self._token)
        if kind is not None and not self._failed:
            self.fail(kind.__name__)  # its text might quote what nobody may see here
        self._span.end()


class _NoCurrentSpan(Span):
    """Not recorded, and sees to it that nothing below it is taken for a part of somebody else's trace."""

    __slots__ = ("_token",)

    def __enter__(self) -> Span:
        self._token = otel_context.attach(_NO_CONTEXT)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        otel_context.detach(self._token)


class _Root(Sampler):
    """Where a trace begins: `ratio` of all; of those that only link to others, those that link to a sampled one."""

    def __init__(self, ratio: float) -> None:
        self._by_ratio = TraceIdRatioBased(ratio)

    def should_sample(
        self,
        parent_context: otel_context.Context | None,
        trace_id: int,
        name: str,
        kind: otel.SpanKind | None = None,
        attributes: Any = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        if links:
            sampled = any(link.context.trace_flags.sampled for link in links)
            return SamplingResult(Decision.RECORD_AND_SAMPLE if sampled else Decision.DROP, attributes)
        return self._by_ratio.should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)

    def get_description(self) -> str:
        return f"ByLinks({self._by_ratio.get_description()})"


class _Delivery(SpanExporter):
    """Says in the log when spans cannot be delivered, once, and when they can again. Called by the SDK's thread."""

    def __init__(self, exporter: SpanExporter, endpoint: str) -> None:
        self._exporter = exporter
        self._endpoint = endpoint
        self._away = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        away = result is not SpanExportResult.SUCCESS
        if away and not self._away:
            log.warning("spans cannot be delivered to %s; those that do not fit the queue are dropped", self._endpoint)
        elif self._away and not away:
            log.info("spans are delivered to %s again", self._endpoint)
        self._away = away
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)


def _exporter(settings: TracingSettings) -> SpanExporter:
    return OTLPSpanExporter(
        endpoint=traces_url(settings.endpoint),
        headers=parse_otlp_headers(secret_of(settings, "headers")) or None,
        certificate_file=None if settings.ca_file is None else str(settings.ca_file),
        timeout=EXPORT_TIMEOUT_S,
    )


_NO_CONTEXT = otel_context.Context()


def _context_of(parent: TraceContext) -> otel_context.Context:
    return otel.set_span_in_context(NonRecordingSpan(_span_context(parent)), _NO_CONTEXT)


def _span_context(context: TraceContext) -> SpanContext:
    return SpanContext(
        trace_id=int(context.trace_id, 16),
        span_id=int(context.span_id, 16),
        is_remote=True,
        trace_flags=TraceFlags(context.flags),
        trace_state=TraceState.from_header([context.tracestate]) if context.tracestate else None,
    )


def _told(context: SpanContext) -> TraceContext:
    state = context.trace_state.to_header() if context.trace_state else ""
    return TraceContext(f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags & 0x03:02x}", state)


def _current_ids() -> tuple[str, str] | None:
    context = otel.get_current_span().get_span_context()
    if not (context.is_valid and context.trace_flags.sampled):
        return None
    return f"{context.trace_id:032x}", f"{context.span_id:016x}"
