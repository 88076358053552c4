"""The spans of one batch in a stream worker: one for each message, one for the batch, one for each message sent.

A message's span continues the trace that its headers name, or begins one. So each of a batch's messages has a trace of
its own through all that is done for it, although it travels with others; the batch is a trace beside them, and links
lead from each to the other. Of a batch of one the message's span says everything.

Messages whose trace is not recorded are told to nobody: what is sent for them carries on the context that they came
with, and the actors hear of none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from infra.tracing import BATCH, NO_SPAN, PROCESS, SEND, Attributes, Span, Tracer
from schemas.envelope import RawMessage
from schemas.outcome import DEAD_LETTERED, Answer
from schemas.trace_context import TraceContext, trace_context_of
from streams.partitions import Partition, Received

MESSAGING = {"messaging.system": "kafka"}

_ID_CHARS = 200


class TracedBatch:
    """Use as a context manager around the work on `batch`; what is still open at its end has failed."""

    def __init__(
        self,
        tracer: Tracer,
        partition: Partition,
        batch: Sequence[Received],
        *,
        consumer_group: str,
        client_id: str = "",
    ) -> None:
        self._tracer = tracer
        self._came = [trace_context_of(received.raw.headers) for received in batch]
        self._spans: list[Span] = []
        self._sending: list[Span] = []
        self._whole: Span = NO_SPAN
        topic, number = partition
        place: dict[str, str | int | bool] = {
            **MESSAGING,
            "messaging.destination.name": topic,
            "messaging.destination.partition.id": str(number),
        }
        place |= {"messaging.consumer.group.name": consumer_group, "messaging.batch.message_count": len(batch)}
        processing = {**place, "messaging.operation.name": "process", "messaging.operation.type": "process"}
        if client_id:
            processing["messaging.client.id"] = client_id
        for received, context in zip(batch, self._came, strict=True):
            span = tracer.start(PROCESS, topic, parent=context)
            if span.recording:
                span.note({**processing, **_described(received.raw)})
            self._spans.append(span)
        recorded = [
            context or span.context for context, span in zip(self._came, self._spans, strict=True) if span.recording
        ]
        links = [context for context in recorded if context is not None]
        if len(batch) > 1 and links:
            told = {**place, "messaging.operation.name": "batch"}
            self._whole = tracer.start(BATCH, topic, links=links, attributes=told)
            for span in self._spans:
                span.link(self._whole.context)
        elif len(batch) == 1 and links:
            self._whole = self._spans[0]

    @property
    def context(self) -> TraceContext | None:
        """What actors are told who get the batch as a whole; None if nothing of it is recorded."""
        return self._whole.context

    def raw(self, index: int, message: RawMessage) -> RawMessage:
        """The message as the actor gets it: with the span that it is worked on for."""
        span = self._spans[index]
        return replace(message, trace=span.context) if span.recording else message

    def sending(self, index: int, topic: str, type_name: str = "", *, message_id: str = "") -> TraceContext | None:
        """A message is about to be sent because of the one at `index`: the context that it is to carry."""
        cause = self._spans[index]
        if not cause.recording:
            return self._came[index] or cause.context
        told = {**send_attributes(topic), "concord.message.type": type_name, "messaging.message.id": message_id}
        attributes = {name: value for name, value in told.items() if value}
        span = self._tracer.start(SEND, topic, parent=cause.context, attributes=attributes)
        self._sending.append(span)
        return span.context

    def sent(self) -> None:
        """The broker has everything that was to be sent."""
        for span in self._sending:
            span.end()
        self._sending = []

    def answered(self, index: int, answer: Answer) -> None:
        span = self._spans[index]
        if span.recording:
            span.note(
                {
                    "concord.outcome": answer.status,
                    "concord.reason": answer.reason,
                    "concord.tx_id": answer.tx_id or "",
                }
            )
            if answer.status == DEAD_LETTERED:
                span.fail(answer.reason)

    def __enter__(self) -> TracedBatch:
        self._whole.__enter__()  # the worker's log lines name the batch, or the message where that is all of it
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._whole.__exit__(kind, error, trace)  # type: ignore[arg-type]
        for span in (*self._sending, *self._spans):
            if span is self._whole:
                continue  # it has just ended
            if kind is not None:
                span.fail(kind.__name__)
            span.end()


class UntracedBatch(TracedBatch):
    """The same where tracing is off: contexts that came are handed on, and that is all."""

    def __init__(self, batch: Sequence[Received]) -> None:
        self._came = [trace_context_of(received.raw.headers) for received in batch]

    @property
    def context(self) -> TraceContext | None:
        return None

    def raw(self, index: int, message: RawMessage) -> RawMessage:
        return message

    def sending(self, index: int, topic: str, type_name: str = "", *, message_id: str = "") -> TraceContext | None:
        return self._came[index]

    def sent(self) -> None:
        pass

    def answered(self, index: int, answer: Answer) -> None:
        pass

    def __enter__(self) -> TracedBatch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        pass


def trace_batch(
    tracer: Tracer, partition: Partition, batch: Sequence[Received], *, consumer_group: str, client_id: str = ""
) -> TracedBatch:
    """What traces `batch`, by whether `tracer` is on."""
    if not tracer.on:
        return UntracedBatch(batch)
    return TracedBatch(tracer, partition, batch, consumer_group=consumer_group, client_id=client_id)


def send_attributes(topic: str) -> Attributes:
    """What every span of a message that is sent to `topic` says."""
    return {
        **MESSAGING,
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.destination.name": topic,
    }


def _described(raw: RawMessage) -> dict[str, str | int | bool]:
    """What the span of a message says of it: where it lies and what it is called, and neither key nor content."""
    told: dict[str, str | int | bool] = {
        "messaging.kafka.offset": raw.offset,
        "messaging.message.body.size": raw.oversize or len(raw.value or b""),
    }
    headers: dict[str, bytes | None] = dict(raw.headers)
    for header, attribute in (
        ("ce_id", "messaging.message.id"),
        ("ce_correlationid", "messaging.message.conversation_id"),
    ):
        text = _text(headers.get(header))
        if text:
            told[attribute] = text
    return told


def _text(value: bytes | None) -> str:
    return (value or b"").decode("utf-8", "replace")[:_ID_CHARS]
