"""`concord send` begins a trace for each command, or continues the one it was called in."""

from __future__ import annotations

from dataclasses import replace

from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from infra.config import TracingSettings
from infra.otlp import OtlpTracer
from infra.tracing import NO_SPAN, OFF
from schemas.envelope import OutgoingMessage, build_command_message
from schemas.payment import OpenWallet
from schemas.trace_context import TraceContext, trace_context_of
from scripts.cli.client import CommandClient

PARENT = TraceContext("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
COMMAND = OpenWallet(customer_id="secret-customer", currency="GBP", initial_balance=4711)


def message() -> OutgoingMessage:
    return build_command_message(COMMAND, command_id="c-1", time_ms=1)


def recording() -> tuple[OtlpTracer, InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    settings = TracingSettings(endpoint="http://127.0.0.1:1")
    return OtlpTracer(settings, service="cli", process="cli-1", exporter=exporter), exporter


def client(tracer: OtlpTracer | None = None, parent: TraceContext | None = None) -> CommandClient:
    return CommandClient(lambda: "127.0.0.1:1", [], tracer=tracer or OFF, parent=parent)


async def test_without_a_tracer_a_message_goes_out_as_it_is() -> None:
    assert client()._traced(message(), "c-1") == (NO_SPAN, message())


async def test_a_message_names_the_span_that_sent_it() -> None:
    tracer, exporter = recording()

    span, out = client(tracer)._traced(message(), "c-1")
    span.end()
    tracer.close(10)

    [ended] = exporter.get_finished_spans()
    assert out == replace(message(), headers=out.headers)
    assert trace_context_of(out.headers) == span.context
    assert (ended.name, ended.parent, ended.kind.name) == ("send payment.commands", None, "PRODUCER")
    assert ended.attributes is not None
    assert ended.attributes["messaging.message.id"] == "c-1"
    assert "secret" not in str(dict(ended.attributes))
    assert "4711" not in str(dict(ended.attributes))


async def test_the_trace_that_the_command_line_was_called_in_goes_on() -> None:
    tracer, _ = recording()

    span, out = client(tracer, PARENT)._traced(message(), "c-1")

    sent = trace_context_of(out.headers)
    assert sent is not None
    assert sent.trace_id == PARENT.trace_id
    assert sent == span.context != PARENT


async def test_a_message_that_names_a_span_already_keeps_it_right_or_wrong() -> None:
    tracer, _ = recording()
    traced = build_command_message(COMMAND, command_id="c-1", time_ms=1, trace=PARENT)
    wrong = replace(message(), headers=(*message().headers, ("traceparent", b"\xff")))

    assert client(tracer)._traced(traced, "c-1") == (NO_SPAN, traced)
    assert client(tracer)._traced(wrong, "c-1") == (NO_SPAN, wrong)
