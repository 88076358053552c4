"""Traces: the spans of one command from its client to its commit and its events, and nothing at all when they are off.

    send orders.commands                       client
    └─ process orders.commands                 worker         a link to `batch orders.commands`, when it came in one
       ├─ handle PlaceOrder                    home actor
       │  ├─ call inventory                    home actor
       │  │  └─ handle ReserveStock            participant
       │  │     └─ get inventory.products      participant    every read and write of storage
       │  └─ call coordinator                  home actor
       │     └─ commit transaction             coordinator
       │        ├─ prepare ─► prepare records        participants
       │        ├─ validate ─► validate records      participants
       │        ├─ commit state
       │        └─ commit ─► commit records          participants, after the answer is out
       ├─ send inventory.events                worker
       │  └─ process orders.events             whoever reads them
       └─ send orders.results                  worker

SPANS is the whole vocabulary: what each span is called, of which kind it is, and every attribute that it may have.
Names and attributes are OpenTelemetry's semantic conventions for messaging, databases and RPC; what those have no word
for begins with `concord.`. No key, no payload and no text of an error is ever an attribute: errors are named by their
reason or their type.

Between processes a context travels as W3C Trace Context: in the headers of messages on Kafka, and beside each item of
a batch between actors (`schemas.trace_context`), because a batch holds the items of many traces. A trace that is not
sampled is not told to actors at all.

Theory of operation. `Tracer` and `Span`, as they are here, do nothing, and are what a process has unless
`tracing.endpoint` is set: no span is made, no OpenTelemetry imported. `open_tracer` gives the ones that work
(`infra.otlp`). Where a span must be the parent of what comes after it, it is entered (`with`), which makes it the
current span of its task and of the tasks that it starts; `child` makes one only where there is a current one, so that
housekeeping leaves no traces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import TYPE_CHECKING, Any

from schemas.trace_context import TraceContext

if TYPE_CHECKING:
    from infra.config import TracingSettings

# What there is to see.


class SpanKind(Enum):
    INTERNAL = "internal"
    SERVER = "server"
    CLIENT = "client"
    PRODUCER = "producer"
    CONSUMER = "consumer"


@dataclass(frozen=True)
class SpanType:
    """A row of SPANS. `{}` in its name stands for what the span is about: a topic, a message type, a table."""

    name: str
    kind: SpanKind
    where: str
    description: str
    attributes: tuple[str, ...] = ()


_TOPIC = ("messaging.system", "messaging.operation.name", "messaging.operation.type", "messaging.destination.name")
_MESSAGE = ("messaging.message.id", "messaging.message.conversation_id", "concord.message.type")
_PLACE = ("messaging.destination.partition.id", "messaging.kafka.offset")
_ANSWER = ("concord.outcome", "concord.reason", "concord.tx_id")
_FAILED = ("error.type",)
_TRANSACTION = ("concord.tx_id", "concord.participants")
_RPC = ("rpc.system", "rpc.service", "rpc.method")

SEND = SpanType(
    "send {}",
    SpanKind.PRODUCER,
    "client, worker",
    "A message on its way to Kafka, until the broker has confirmed it. The parent of whatever is made of the message.",
    (*_TOPIC, *_MESSAGE, *_PLACE, "messaging.message.body.size", "messaging.client.id", *_FAILED),
)
BATCH = SpanType(
    "batch {}",
    SpanKind.INTERNAL,
    "worker",
    "Several messages of one partition, from taking them to having published what came of them. A trace of its own, "
    "with a link to each message that was sampled; recorded if one was.",
    (*_TOPIC, "messaging.destination.partition.id", "messaging.batch.message_count", "messaging.consumer.group.name"),
)
PROCESS = SpanType(
    "process {}",
    SpanKind.CONSUMER,
    "worker",
    "One message, from taking it to having published what came of it. Links to the batch that it was part of.",
    (
        *_TOPIC,
        *_MESSAGE,
        *_PLACE,
        "messaging.message.body.size",
        "messaging.batch.message_count",
        "messaging.consumer.group.name",
        "messaging.client.id",
        *_ANSWER,
        *_FAILED,
    ),
)
HANDLE = SpanType(
    "handle {}",
    SpanKind.SERVER,
    "domain actor",
    "A command at its home, through all its tries (an event `retry` for each further one) to its answer; or a call "
    "at a participant. `unknown` stands for a type that is not one of ours.",
    ("concord.actor", "concord.message.type", "messaging.message.id", "concord.attempts", *_ANSWER, *_FAILED),
)
CALL = SpanType(
    "call {}",
    SpanKind.CLIENT,
    "home actor",
    "What one command asks of one other actor in one turn: calls to a domain, or the commit at the coordinator.",
    (*_RPC, "concord.calls", *_FAILED),
)
COMMIT = SpanType(
    "commit transaction",
    SpanKind.SERVER,
    "coordinator",
    "Two-phase commit of one transaction, to its decision.",
    (*_TRANSACTION, *_FAILED),
)
PREPARE = SpanType("prepare", SpanKind.CLIENT, "coordinator", "Phase one.", (*_TRANSACTION, *_FAILED))
VALIDATE = SpanType("validate", SpanKind.CLIENT, "coordinator", "Reads are compared.", (*_TRANSACTION, *_FAILED))
COMMIT_STATE = SpanType("commit state", SpanKind.INTERNAL, "coordinator", "The commit point.", ("concord.tx_id",))
COMMIT_RECORDS = SpanType(
    "commit", SpanKind.CLIENT, "coordinator", "Records are brought to rest, after the answer.", _TRANSACTION
)
ABORT = SpanType("abort", SpanKind.CLIENT, "coordinator", "Not committed: records are rolled back.", _TRANSACTION)
PARTICIPATE = SpanType(
    "{} records",
    SpanKind.SERVER,
    "domain actor",
    "A participant's part of a phase: prepare, validate, commit, roll back.",
    ("concord.actor", "concord.tx_id", *_FAILED),
)
ONE_PHASE = SpanType(
    "commit one phase",
    SpanKind.INTERNAL,
    "home actor",
    "Everything lies in one atomic unit of the storage: one write commits it.",
    ("concord.tx_id", *_FAILED),
)
STORAGE = SpanType(
    "{}",
    SpanKind.CLIENT,
    "any actor",
    "One request of the storage, with the time that it queued for its partition.",
    (
        "db.system.name",
        "db.operation.name",
        "db.namespace",
        "db.collection.name",
        "db.operation.batch.size",
        "db.response.returned_rows",
        "concord.tables",
        *_FAILED,
    ),
)
APPLY = SpanType(
    "apply {}",
    SpanKind.SERVER,
    "view actor",
    "A batch of events becomes rows of a view.",
    ("concord.actor", "messaging.batch.message_count", *_FAILED),
)

SPANS: tuple[SpanType, ...] = (
    SEND,
    BATCH,
    PROCESS,
    HANDLE,
    CALL,
    COMMIT,
    PREPARE,
    VALIDATE,
    COMMIT_STATE,
    COMMIT_RECORDS,
    ABORT,
    PARTICIPATE,
    ONE_PHASE,
    STORAGE,
    APPLY,
)

Attributes = Mapping[str, str | int | bool]

UNKNOWN = "unknown"
"""In place of a name that somebody else chose: names of spans must be few."""

# How it is noted.


class Span:
    """A span that is not recorded. `context` is what to hand on; None when there is nothing to say."""

    __slots__ = ("context",)

    recording = False

    def __init__(self, context: TraceContext | None = None) -> None:
        self.context = context

    def rename(self, about: str) -> None:
        """Say what the span is about, once that is known."""

    def note(self, attributes: Attributes) -> None:
        """Add attributes."""

    def event(self, name: str, attributes: Attributes) -> None:
        """Something that happened at this moment."""

    def link(self, context: TraceContext | None) -> None:
        """Point to a span elsewhere."""

    def fail(self, error_type: str) -> None:
        """The span ended in an error of this type: a reason of ours, or the name of an exception's class."""

    def end(self) -> None:
        """Only for a span that was not entered."""

    def __enter__(self) -> Span:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


NO_SPAN = Span()


class Tracer:
    """A tracer that records nothing."""

    on = False

    @property
    def active(self) -> bool:
        """Whether there is a current span, so that `child` would make one."""
        return False

    def start(
        self,
        span_type: SpanType,
        about: str = "",
        *,
        parent: TraceContext | None = None,
        links: Iterable[TraceContext] = (),
        attributes: Attributes | None = None,
    ) -> Span:
        """A span under `parent`, which came in a message; without one, the first span of a new trace.

        The span may turn out not to be recorded; its context is then to be handed on all the same, so that nobody else
        decides anew.
        """
        return NO_SPAN

    def under(
        self,
        parent: TraceContext | None,
        span_type: SpanType,
        about: str = "",
        attributes: Attributes | None = None,
    ) -> Span:
        """A span to be entered, under `parent`, which came from another actor. Without it: none, and no current one."""
        return NO_SPAN

    def child(self, span_type: SpanType, about: str = "", attributes: Attributes | None = None) -> Span:
        """A span under the current one; none where there is none."""
        return NO_SPAN

    def close(self, within_s: float = 2.0) -> None:
        """Deliver what is outstanding, as far as that is possible in time."""


OFF = Tracer()


def open_tracer(settings: TracingSettings, *, service: str, process: str) -> Tracer:
    """The tracer of this process: OFF without an endpoint.

    `service` is what the process is one of (`worker`, `inventory`), `process` its name (`worker-0`).
    """
    if not settings.endpoint:
        return OFF
    from infra.otlp import OtlpTracer

    return OtlpTracer(settings, service=service, process=process)


# In log lines.

_current_ids: Callable[[], tuple[str, str] | None] | None = None


def name_current_span_by(current_ids: Callable[[], tuple[str, str] | None]) -> None:
    """From now on log lines carry the (trace id, span id) that this tells. Called by whatever records spans here."""
    global _current_ids
    _current_ids = current_ids


def add_trace_ids(_logger: Any, _method: str, event: Any) -> Any:
    """For structlog: a line that is logged within a recorded span carries `trace_id` and `span_id`."""
    if _current_ids is not None and (ids := _current_ids()) is not None:
        event["trace_id"], event["span_id"] = ids
    return event
