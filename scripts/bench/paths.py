"""Where the time of one traced command went: its spans, gathered by OTLP, and the path through them that took longest.

The path is walked backwards from the end: of the spans that a span waited for, the one that ended last decides; the
time before the next such end is the span's own. So the parts of a path add up to the whole, whatever went on side by
side. What begins after the end of its parent (records that come to rest after the answer) is on no path.

    topic     from the client's `submit` until a worker has taken the command: producer, Kafka, fetching
    worker    until its home begins: the batch, Ray, and the turn of its routing key
    handle    the handler at home, keys that it waits for included
    calls     what it asks of other domains: the way there and back, keys, reads
    commit    the way to the coordinator and back, and what that does itself
    intent, prepare, validate, commit state     the steps of the protocol
    publish   events and answer, until the broker has confirmed them

Each is told apart into `storage` (a request, with its waiting for the partition's turn), `between` (a message to
another actor and its answer, less what happened there) and `own`. All clocks are one machine's.
"""

from __future__ import annotations

import gzip
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

STORAGE, BETWEEN, OWN = "storage", "between", "own"

_PHASES: Mapping[str, str] = {
    "prepare": "prepare",
    "validate": "validate",
    "commit state": "commit state",
    "commit transaction": "commit",
    "call coordinator": "commit",
}
_MESSAGES = ("call ", "process ")
_REQUESTS = ("get", "scan", "mutate", "partitions")


@dataclass(frozen=True)
class TimedSpan:
    """A span as far as a path needs it. Times are Unix time."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    start_ns: int
    end_ns: int


def longest_path(spans: Sequence[TimedSpan]) -> dict[str, int]:
    """Nanoseconds by `step part` of one trace, as the module tells; empty if the client's span or the worker's lacks.

    The trace is over when the worker has published the answer.
    """
    children: dict[str, list[TimedSpan]] = defaultdict(list)
    for span in spans:
        children[span.parent_id].append(span)
    root = next((span for span in spans if not span.parent_id), None)
    processed = [s for s in children[root.span_id] if s.name.startswith("process ")] if root is not None else []
    if root is None or not processed:
        return {}
    path: dict[str, int] = defaultdict(int)

    def walk(span: TimedSpan, until_ns: int, phase: str) -> None:
        phase = _phase_of(span.name, phase)
        part = f"{phase} {_part_of(span.name)}"
        for child in sorted(children[span.span_id], key=lambda each: -each.end_ns):
            if child.start_ns >= until_ns or child.end_ns <= span.start_ns:
                continue
            end_ns = min(child.end_ns, until_ns)
            path[part] += until_ns - end_ns
            walk(child, end_ns, phase)
            until_ns = max(child.start_ns, span.start_ns)
        path[part] += max(0, until_ns - span.start_ns)

    walk(root, max(span.end_ns for span in processed), "")
    return dict(path)


def mean_path_ms(spans: Sequence[TimedSpan]) -> tuple[int, dict[str, float]]:
    """How many traces were whole, and the mean of their longest paths in ms, the greatest part first."""
    by_trace: dict[str, list[TimedSpan]] = defaultdict(list)
    for span in spans:
        by_trace[span.trace_id].append(span)
    total: dict[str, int] = defaultdict(int)
    whole = 0
    for trace in by_trace.values():
        path = longest_path(trace)
        whole += bool(path)
        for part, ns in path.items():
            total[part] += ns
    parts = {part: round(ns / whole / 1e6, 2) for part, ns in total.items()}
    return whole, dict(sorted(parts.items(), key=lambda item: -item[1]))


def _phase_of(name: str, phase: str) -> str:
    if name in _PHASES:
        return _PHASES[name]
    if name.startswith("send "):
        return "publish" if phase else "topic"
    if name.startswith("process "):
        return "worker"
    if name.startswith("call "):
        return "calls"
    if name.startswith("handle "):
        return phase if phase == "calls" else "handle"
    return "intent" if name.endswith("coordinator.intents") else phase


def _part_of(name: str) -> str:
    if (name in _PHASES and name not in ("commit transaction", "commit state")) or name.startswith(_MESSAGES):
        return BETWEEN
    return STORAGE if name.partition(" ")[0] in _REQUESTS else OWN


class SpanCollector(ThreadingHTTPServer):
    """Takes spans by OTLP over HTTP (protobuf) on a free port of this machine, and keeps them in `spans`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans: list[TimedSpan] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def of_traces_since(self, since_ns: int) -> list[TimedSpan]:
        """Those of traces that began no earlier (Unix time)."""
        began = {span.trace_id for span in self.spans if not span.parent_id and span.start_ns >= since_ns}
        return [span for span in self.spans if span.trace_id in began]

    def take(self, body: bytes) -> None:
        for of_process in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in of_process.scope_spans:
                self.spans += [
                    TimedSpan(
                        span.trace_id.hex(),
                        span.span_id.hex(),
                        span.parent_span_id.hex(),
                        span.name,
                        span.start_time_unix_nano,
                        span.end_time_unix_nano,
                    )
                    for span in scope.spans
                ]


class _Handler(BaseHTTPRequestHandler):
    server: SpanCollector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.take(gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body)
        taken = ExportTraceServiceResponse().SerializeToString()
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", str(len(taken)))
        self.end_headers()
        self.wfile.write(taken)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nobody wants to read of every delivery."""


@contextmanager
def collecting() -> Iterator[SpanCollector]:
    """A collector in a thread of this process, while the block runs."""
    with SpanCollector() as collector:
        thread = threading.Thread(target=collector.serve_forever, daemon=True)
        thread.start()
        try:
            yield collector
        finally:
            collector.shutdown()
            thread.join()
