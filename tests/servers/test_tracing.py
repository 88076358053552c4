"""Spans: none when they are off; begun, continued, left out and delivered as they should be when they are on."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from infra.config import ConfigurationError, TracingSettings, describe_settings, load_settings
from infra.otlp import OtlpTracer, parse_otlp_headers, traces_url
from infra.storage.errors import NoMutationError
from infra.storage.memory import MemoryStorage
from infra.storage.operations import DataType, IfNotExists, Key, Put, TableSchema
from infra.telemetry import configure_logging
from infra.traced_storage import TracedStorage
from infra.tracing import BATCH, HANDLE, NO_SPAN, OFF, PROCESS, SEND, SPANS, STORAGE, open_tracer
from schemas.trace_context import TraceContext

SAMPLED = TraceContext("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "vendor=1")
UNSAMPLED = TraceContext("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00")


class Recording:
    """A tracer whose spans stay here."""

    def __init__(self, ratio: float = 1.0) -> None:
        self._exporter = InMemorySpanExporter()
        settings = TracingSettings(endpoint="http://127.0.0.1:1", sample_ratio=ratio)
        self.tracer = OtlpTracer(settings, service="test", process="test-0", exporter=self._exporter)

    def spans(self) -> dict[str, ReadableSpan]:
        """Every span that has ended, by name. The tracer is closed then."""
        self.tracer.close(10)
        return {span.name: span for span in self._exporter.get_finished_spans()}


# --- Off ---------------------------------------------------------------------------------------------------------


def test_without_an_endpoint_nothing_of_opentelemetry_is_even_imported() -> None:
    program = (
        "import sys, scripts.worker, scripts.actor_process, scripts.cli.client, streams.command_processor\n"
        "from infra.config import TracingSettings\n"
        "from infra.tracing import OFF, open_tracer\n"
        "assert open_tracer(TracingSettings(), service='worker', process='worker-0') is OFF\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])\n"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)

    assert told.stdout.strip() == "[]"


def test_a_tracer_that_is_off_makes_no_span() -> None:
    spans = (OFF.start(SEND, "t", parent=SAMPLED), OFF.under(SAMPLED, HANDLE, "T"), OFF.child(STORAGE, "get"))

    assert all(span is NO_SPAN for span in spans)
    with NO_SPAN as span:
        span.note({"a": 1})
        span.event("e", {})
        span.link(SAMPLED)
        span.fail("reason")
    assert (span.context, span.recording) == (None, False)


# --- On ----------------------------------------------------------------------------------------------------------


def test_a_span_continues_the_trace_that_came_with_the_message_and_hands_its_tracestate_on() -> None:
    recording = Recording()

    with recording.tracer.start(PROCESS, "orders.commands", parent=SAMPLED) as span:
        handed_on = span.context

    assert handed_on is not None
    assert handed_on.trace_id == SAMPLED.trace_id
    assert handed_on.tracestate == "vendor=1"
    ended = recording.spans()["process orders.commands"]
    assert f"{ended.parent.span_id:016x}" == SAMPLED.span_id
    assert ended.parent.is_remote
    assert f"{ended.context.span_id:016x}" == handed_on.span_id
    assert ended.kind.name == "CONSUMER"
    assert ended.resource.attributes["service.name"] == "concord-test"
    assert ended.resource.attributes["service.instance.id"] == "test-0"


def test_a_trace_that_is_not_sampled_is_not_recorded_and_handed_on_as_not_sampled() -> None:
    recording = Recording()

    with recording.tracer.start(PROCESS, "t", parent=UNSAMPLED) as span:
        assert not span.recording
        assert span.context is not None
        assert (span.context.trace_id, span.context.sampled) == (UNSAMPLED.trace_id, False)
        assert recording.tracer.child(STORAGE, "get") is NO_SPAN
    with recording.tracer.under(UNSAMPLED, HANDLE, "T") as span:
        assert (span.recording, span.context) == (False, None)

    assert recording.spans() == {}


@pytest.mark.parametrize(("ratio", "recorded"), [(0.0, False), (1.0, True)])
def test_the_ratio_decides_where_a_trace_begins_and_nowhere_else(ratio: float, recorded: bool) -> None:
    recording = Recording(ratio)

    with recording.tracer.start(SEND, "begun") as begun, recording.tracer.start(SEND, "continued", parent=SAMPLED):
        assert begun.context is not None
        assert begun.context.sampled is recorded

    assert recording.spans().keys() == {"send continued", *(["send begun"] if recorded else [])}


def test_a_batch_is_recorded_exactly_when_a_message_of_it_is() -> None:
    recording = Recording(0.0)

    recording.tracer.start(BATCH, "none", links=[UNSAMPLED, UNSAMPLED]).end()
    recording.tracer.start(BATCH, "one", links=[UNSAMPLED, SAMPLED]).end()

    spans = recording.spans()
    assert spans.keys() == {"batch one"}
    assert len(spans["batch one"].links) == 2
    assert spans["batch one"].context.trace_id != int(SAMPLED.trace_id, 16)


def test_children_are_of_the_current_span_and_there_are_none_without_one() -> None:
    recording = Recording()
    tracer = recording.tracer

    assert tracer.child(STORAGE, "alone") is NO_SPAN
    with tracer.under(SAMPLED, HANDLE, "A") as outer:
        with tracer.under(None, HANDLE, "B"):
            assert tracer.child(STORAGE, "of somebody else") is NO_SPAN
        tracer.child(STORAGE, "get").end()

    spans = recording.spans()
    assert spans.keys() == {"handle A", "get"}
    assert f"{spans['get'].parent.span_id:016x}" == outer.context.span_id  # type: ignore[union-attr]


async def test_what_a_task_does_after_its_parent_has_ended_is_still_of_the_trace() -> None:
    import asyncio

    recording = Recording()
    go = asyncio.Event()

    async def later() -> None:
        await go.wait()
        recording.tracer.child(STORAGE, "later").end()

    with recording.tracer.under(SAMPLED, HANDLE, "A"):
        task = asyncio.ensure_future(later())
    go.set()
    await task

    assert recording.spans().keys() == {"handle A", "later"}


def test_an_exception_is_named_by_its_class_and_its_text_is_told_nobody() -> None:
    recording = Recording()

    def fail() -> None:
        with recording.tracer.under(SAMPLED, HANDLE, "A"):
            raise ValueError("the customer's card is 4711")

    with pytest.raises(ValueError, match="4711"):
        fail()

    span = recording.spans()["handle A"]
    assert span.attributes == {"error.type": "ValueError"}
    assert (span.status.status_code.name, span.status.description, list(span.events)) == ("ERROR", None, [])


def test_the_names_and_attributes_of_spans_are_said_once() -> None:
    names = [(row.name, row.kind) for row in SPANS]

    assert len(names) == len(set(names))
    for row in SPANS:
        assert len(row.attributes) == len(set(row.attributes)), row.name
        assert row.description
        assert row.where


# --- Storage -----------------------------------------------------------------------------------------------------

TABLE = TableSchema("shop", "stock", {"id": DataType.TEXT, "n": DataType.INT}, ("id",))


async def test_requests_of_storage_say_table_and_counts_and_neither_keys_nor_values() -> None:
    recording = Recording()
    storage = TracedStorage(MemoryStorage(), recording.tracer)
    await storage.create_table(TABLE)

    with recording.tracer.under(SAMPLED, HANDLE, "A"):
        insert = Put(TABLE, Key(("secret-key",)), {"n": 4711}, IfNotExists())
        await storage.mutate([insert])
        assert await storage.get(TABLE, Key(("secret-key",))) is not None
        with pytest.raises(NoMutationError):
            await storage.mutate([insert])
    await storage.get(TABLE, Key(("untraced",)))

    recording.tracer.close(10)
    spans = [span for span in recording._exporter.get_finished_spans() if span.name != "handle A"]
    assert [span.name for span in spans] == ["mutate shop.stock", "get shop.stock", "mutate shop.stock"]
    assert dict(spans[0].attributes) == {
        "db.system.name": "memory",
        "db.operation.name": "mutate",
        "db.namespace": "shop",
        "db.collection.name": "shop.stock",
        "db.operation.batch.size": 1,
        "concord.tables": 1,
    }
    assert spans[1].attributes["db.response.returned_rows"] == 1
    assert spans[2].attributes["error.type"] == "no_mutation"
    assert "secret-key" not in str([dict(span.attributes) for span in spans])


# --- Log lines ---------------------------------------------------------------------------------------------------


def test_log_lines_within_a_span_name_it_and_others_do_not(tmp_path: Path) -> None:
    import structlog

    before = structlog.get_config()
    recording = Recording()
    file = tmp_path / "log"
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        root.handlers = []
        configure_logging(process="test-0", file=file)
        with recording.tracer.under(SAMPLED, HANDLE, "A") as span:
            structlog.get_logger("ours").info("inside")
            logging.getLogger("theirs").warning("inside too")
        structlog.get_logger("ours").info("outside")
    finally:
        for handler in root.handlers:
            handler.close()
        root.handlers, root.level = handlers, level
        structlog.configure(**before)

    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert span.context is not None
    expected = {"trace_id": span.context.trace_id, "span_id": span.context.span_id}
    assert [{name: line[name] for name in expected} for line in lines[:2]] == [expected, expected]
    assert lines[2].keys() & expected.keys() == set()


# --- Delivery ----------------------------------------------------------------------------------------------------


class Collector(SpanExporter):
    """A collector that can be away, or keep whoever calls it waiting."""

    def __init__(self) -> None:
        self.away = False
        self.answer = threading.Event()
        self.answer.set()
        self.took = 0
        self.called = threading.Semaphore(0)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.called.release()
        self.answer.wait(30)
        self.took += 0 if self.away else len(spans)
        return SpanExportResult.FAILURE if self.away else SpanExportResult.SUCCESS

    def shutdown(self) -> None: ...


def test_a_collector_that_is_away_is_said_once_and_once_more_when_it_is_back(caplog: pytest.LogCaptureFixture) -> None:
    collector = Collector()
    settings = TracingSettings(endpoint="http://127.0.0.1:1", export_every_ms=10)
    tracer = OtlpTracer(settings, service="test", process="test-0", exporter=collector)
    caplog.set_level(logging.INFO, logger="infra.otlp")

    for away in (True, True, False, False):
        collector.away = away
        tracer.start(SEND, "t").end()
        assert collector.called.acquire(timeout=10)
    tracer.close(10)

    said = [record.levelname for record in caplog.records if record.name == "infra.otlp"]
    assert said == ["WARNING", "INFO"]


def test_a_collector_that_does_not_answer_holds_nobody_up_and_costs_bounded_memory() -> None:
    collector = Collector()
    collector.answer.clear()
    settings = TracingSettings(endpoint="http://127.0.0.1:1", export_every_ms=10, queue_spans=512)
    tracer = OtlpTracer(settings, service="test", process="test-0", exporter=collector)

    for _ in range(5_000):
        tracer.start(SEND, "t").end()
    processor = tracer._provider._active_span_processor._span_processors[0]
    waiting = len(processor._batch_processor._queue)  # type: ignore[attr-defined]
    began_s = time.monotonic()
    tracer.close(0.2)

    assert waiting <= 512
    assert collector.took == 0
    assert time.monotonic() - began_s < 20  # it returned, although the collector still holds the first batch
    collector.answer.set()


def test_spans_are_posted_below_the_endpoint() -> None:
    assert traces_url("http://c:4318") == traces_url("http://c:4318/") == "http://c:4318/v1/traces"
    assert traces_url("https://c/otlp/v1/traces") == "https://c/otlp/v1/traces"
    assert parse_otlp_headers("Authorization=Bearer a=b, x-tenant = 7 ,") == {
        "authorization": "Bearer a=b",
        "x-tenant": "7",
    }


# --- Settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "endpoint",
    [
        "collector:4318",
        "grpc://collector:4317",
        "http://",
        "http://me:hunter2@collector:4318",
        "http://c:99999",
        "http://c/?k=hunter2",
    ],
)
def test_an_endpoint_that_spans_cannot_go_to_is_refused_by_name_and_not_quoted(endpoint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="CONCORD_TRACING__ENDPOINT") as refused:
        load_settings(environment={"CONCORD_TRACING__ENDPOINT": endpoint}, data_dir=tmp_path)

    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("endpoint", ["", "http://collector.example:4318"])
def test_headers_go_to_a_collector_over_tls_or_on_this_machine(endpoint: str, tmp_path: Path) -> None:
    environment = {"CONCORD_TRACING__HEADERS": "authorization=hunter2"}

    with pytest.raises(ConfigurationError, match="CONCORD_TRACING__") as refused:
        load_settings(environment={**environment, "CONCORD_TRACING__ENDPOINT": endpoint}, data_dir=tmp_path)
    assert "hunter2" not in str(refused.value)
    for good in ("https://collector.example", "http://127.0.0.1:4318", "http://[::1]:4318"):
        settings = load_settings(environment={**environment, "CONCORD_TRACING__ENDPOINT": good}, data_dir=tmp_path)
        assert all("hunter2" not in str(line) for line in describe_settings(settings))
        assert "hunter2" not in settings.model_dump_json()
        assert open_tracer(settings.tracing, service="test", process="test-0").on
