"""The spans of a stream worker: a trace for each message, links to the batch, and what is sent continues them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from flow_world import RememberingRuntime, placement_of, raw_command
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from actors.history_view import Applied, EventBatch
from infra.config import TracingSettings
from infra.otlp import OtlpTracer
from infra.tracing import OFF, Tracer
from schemas.envelope import RawMessage
from schemas.trace_context import TraceContext, trace_context_of
from streams.command_processor import CommandProcessor
from streams.partitions import Received
from streams.projections import Projection

PARTITION = ("test.commands", 3)


def parent(number: int, *, sampled: bool = True) -> TraceContext:
    return TraceContext(f"00-{number:032x}-{number:016x}-{int(sampled):02x}", f"vendor={number}")


class Spans:
    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        settings = TracingSettings(endpoint="http://127.0.0.1:1")
        self.tracer = OtlpTracer(settings, service="worker", process="worker-0", exporter=self._exporter)

    def named(self, name: str) -> list[ReadableSpan]:
        self.tracer.close(10)
        return [span for span in self._exporter.get_finished_spans() if span.name == name]


class Producer:
    """Confirms at once, and keeps the trace that each message carries."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, TraceContext | None]] = []

    async def send(
        self, topic: str, key: bytes | None, value: bytes | None, headers: Sequence[tuple[str, Any]] = ()
    ) -> asyncio.Future[None]:
        self.sent.append((topic, trace_context_of(headers)))
        confirmed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        confirmed.set_result(None)
        return confirmed

    def traces(self, topic: str) -> list[TraceContext | None]:
        return [trace for sent, trace in self.sent if sent == topic]


class Runtime(RememberingRuntime):
    """Keeps the span that each message was handed on with."""

    def __init__(self) -> None:
        super().__init__()
        self.traces: list[TraceContext | None] = []

    async def ask(self, actor: str, method: str, items: Sequence[Any]) -> list[Any]:
        if method == "execute":
            self.traces += [raw.trace for raw in items]
        return await super().ask(actor, method, items)


def received(*contexts: TraceContext | None, value: bytes = b"{}") -> list[Received]:
    made = []
    for offset, context in enumerate(contexts):
        raw = raw_command(f"c-{offset}", key=b"k", value=value, offset=offset)
        more = () if context is None else context.headers()
        made.append(Received(replace(raw, headers=(*raw.headers, *more))))
    return made


async def work(tracer: Tracer, batch: list[Received]) -> tuple[Runtime, Producer]:
    runtime, producer = Runtime(), Producer()
    processor = CommandProcessor(
        domains=["test"],
        runtime=runtime,
        placement=placement_of("test"),
        producer=producer,
        consumer_group="concord",
        tracer=tracer,
        client_id="worker-0",
    )
    await processor.work(PARTITION, batch, lambda: None)
    return runtime, producer


async def test_off_what_came_is_handed_on_and_actors_hear_of_no_trace() -> None:
    runtime, producer = await work(OFF, received(parent(1), None, parent(3, sampled=False)))

    assert producer.traces("test.events") == [parent(1), None, parent(3, sampled=False)]
    assert producer.traces("test.results") == producer.traces("test.events")
    assert runtime.traces == [None, None, None]


async def test_a_message_is_processed_and_what_comes_of_it_is_sent_in_its_trace() -> None:
    spans = Spans()

    runtime, producer = await work(spans.tracer, received(parent(1)))

    [process] = spans.named("process test.commands")
    assert (process.context.trace_id, process.parent.span_id) == (1, 1)
    assert dict(process.attributes) == {
        "messaging.system": "kafka",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": "test.commands",
        "messaging.destination.partition.id": "3",
        "messaging.kafka.offset": 0,
        "messaging.message.id": "c-0",
        "messaging.message.body.size": 2,
        "messaging.batch.message_count": 1,
        "messaging.consumer.group.name": "concord",
        "messaging.client.id": "worker-0",
        "concord.outcome": "committed",
        "concord.reason": "",
        "concord.tx_id": "",
    }
    process_id = f"{process.context.span_id:016x}"
    assert [trace.span_id for trace in runtime.traces if trace] == [process_id]
    for topic in ("test.events", "test.results"):
        [sent] = spans.named(f"send {topic}")
        [trace] = producer.traces(topic)
        assert f"{sent.parent.span_id:016x}" == process_id
        assert trace is not None
        assert (trace.span_id, trace.tracestate) == (f"{sent.context.span_id:016x}", "vendor=1")
    assert spans.named("batch test.commands") == []


async def test_messages_of_a_batch_keep_their_traces_and_are_linked_with_it() -> None:
    spans = Spans()
    contexts = [parent(1), parent(2), parent(3, sampled=False), None]

    runtime, producer = await work(spans.tracer, received(*contexts))

    processed = spans.named("process test.commands")
    [batch] = spans.named("batch test.commands")
    assert {span.context.trace_id for span in processed} >= {1, 2}
    assert len(processed) == 3  # the fourth begins a trace of its own
    assert len({span.context.trace_id for span in (*processed, batch)}) == 4
    assert all([link.context.span_id for link in span.links] == [batch.context.span_id] for span in processed)
    assert {link.context.trace_id for link in batch.links} == {span.context.trace_id for span in processed}
    assert batch.attributes["messaging.batch.message_count"] == 4
    assert [trace is not None for trace in runtime.traces] == [True, True, False, True]
    assert producer.traces("test.results")[2] == contexts[2]


async def test_the_headers_that_an_actor_sees_are_those_that_came() -> None:
    seen: list[RawMessage] = []

    class Looking(Runtime):
        async def ask(self, actor: str, method: str, items: Sequence[Any]) -> list[Any]:
            seen.extend(items)
            return await super().ask(actor, method, items)

    batch = received(parent(1))
    spans = Spans()
    processor = CommandProcessor(
        domains=["test"], runtime=Looking(), placement=placement_of("test"), producer=Producer(),
        consumer_group="concord", tracer=spans.tracer,
    )  # fmt: skip
    await processor.work(PARTITION, batch, lambda: None)

    assert [raw.headers for raw in seen] == [batch[0].raw.headers]


async def test_a_dead_letter_keeps_its_headers_and_fails_its_span() -> None:
    spans = Spans()

    _, producer = await work(spans.tracer, received(parent(1), value=b"poison"))

    [process] = spans.named("process test.commands")
    assert process.status.status_code.name == "ERROR"
    assert process.attributes["error.type"] == process.attributes["concord.reason"] == "not_json"
    assert producer.traces("test.commands.dlq") == [parent(1)]
    assert len(spans.named("send test.commands.dlq")) == 1


async def test_work_that_ends_in_an_error_ends_its_spans() -> None:
    class Broken(Runtime):
        async def ask(self, actor: str, method: str, items: Sequence[Any]) -> list[Any]:
            raise ZeroDivisionError("secret-4711")

    spans = Spans()
    processor = CommandProcessor(
        domains=["test"], runtime=Broken(), placement=placement_of("test"), producer=Producer(),
        consumer_group="concord", tracer=spans.tracer,
    )  # fmt: skip
    with pytest.raises(ExceptionGroup):
        await processor.work(PARTITION, received(parent(1), parent(2)), lambda: None)

    ended = [*spans.named("process test.commands"), *spans.named("batch test.commands")]
    assert len(ended) == 3
    assert all(span.status.status_code.name == "ERROR" for span in ended)
    assert "4711" not in str([span.to_json() for span in ended])


async def test_a_projection_continues_the_traces_of_its_events() -> None:
    spans = Spans()
    batches: list[EventBatch] = []

    class Views(RememberingRuntime):
        async def ask(self, actor: str, method: str, items: Sequence[Any]) -> list[Any]:
            batches.extend(items)
            return [Applied(1, 0, 0, 1) for _ in items]

    projection = Projection(runtime=Views(), log_identity="log", tracer=spans.tracer, consumer_group="concord")
    await projection.work(("orders.events", 0), received(parent(1), parent(2)), lambda: None)
    await projection.work(("orders.events", 0), received(parent(3, sampled=False)), lambda: None)

    assert {span.context.trace_id for span in spans.named("process orders.events")} == {1, 2}
    [whole] = spans.named("batch orders.events")
    assert [batch.trace and batch.trace.span_id for batch in batches] == [f"{whole.context.span_id:016x}", None]
