"""CloudEvents 1.0 in Kafka's binary mode: what stands around a message, and how whole messages are read and built.

    Kafka record                      here
    key                               routing key, UTF-8; must equal the one in the command's body
    headers ce_*, content-type, …     Envelope (encode_headers, decode_headers)
    value                             JSON object (schemas.decoding), then the model of (ce_type, version)

`ce_dataschema` is `concord:/schemas/<domain>/<Type>/<version>`. Only the last two parts are read, so any prefix may
stand before them. A message that names no schema is taken as version 1: its producer was written when there was only
that. A malformed `traceparent` is dropped and never refuses a message, because W3C Trace Context (section 4.3) has the
receiver restart the trace.

A command that cannot be taken raises DeadLetterError with one reason of a fixed table; nothing else escapes from
`parse_command`. Sources: CloudEvents 1.0.2, Kafka protocol binding section 3.2; W3C Trace Context.
Never here: I/O, clocks, ids from randomness.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, TypeVar
from urllib.parse import quote

from pydantic import ValidationError

from schemas.decoding import MAX_VALUE_BYTES, DecodingError, DecodingReason, decode_json
from schemas.message import Command, Event, Message
from schemas.outcome import Answer, EmittedEvent, iso_time
from schemas.registry import Registry, UnknownTypeError, UnknownVersionError, default_registry
from schemas.topics import commands_topic, events_topic, results_topic
from schemas.trace_context import TRACESTATE, TraceContext, parse_traceparent, trace_context_of

SPEC_VERSION = "1.0"
CONTENT_TYPE = "application/json"
CLI_SOURCE = "concord-cli"
ANSWER_TYPE = "Answer"
ANSWER_VERSION = 1

Header = tuple[str, bytes | None]
"""Kafka allows a header without a value; none of ours is one."""

MAX_ID_CHARS = 200
MAX_TEXT_CHARS = 1_000
MAX_HEADERS = 100
MAX_HEADER_BYTES = 32_768

NOT_UTF8_IN_NAME = "\ufffd"
"""What clients put in place of bytes of a header's name that are not UTF-8. Kafka itself lets them pass."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_RFC3339 = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})[Tt]([0-9]{2}):([0-9]{2}):([0-9]{2})(?:\.([0-9]{1,12}))?"
    r"(?:[Zz]|([+-])([01][0-9]|2[0-3]):([0-5][0-9]))"
)
_DATA_SCHEMA = re.compile(r"(?:.*/)?([A-Za-z][A-Za-z0-9_]*)/([1-9][0-9]{0,8})", re.DOTALL)
_JSON_CONTENT = re.compile(r'application/json(?:\s*;\s*charset\s*=\s*"?utf-?8"?)?\s*', re.IGNORECASE)
_COUNT = re.compile(r"0|[1-9][0-9]{0,17}")


# --- Headers -----------------------------------------------------------------------------------------------------


class EnvelopeReason(StrEnum):
    """Why headers were not taken."""

    MISSING_HEADER = "missing_header"
    REPEATED_HEADER = "repeated_header"
    NOT_UTF8 = "not_utf8"
    EMPTY_HEADER = "empty_header"
    TOO_LONG = "too_long"
    CONTROL_CHARACTER = "control_character"
    TOO_MANY_HEADERS = "too_many_headers"
    WRONG_SPECVERSION = "wrong_specversion"
    WRONG_CONTENT_TYPE = "wrong_content_type"
    BAD_TIME = "bad_time"
    BAD_DATASCHEMA = "bad_dataschema"
    BAD_RECORD_VERSION = "bad_record_version"


class EnvelopeError(ValueError):
    """The headers are not those of a message. `id` is the message's id where that at least could be read."""

    def __init__(self, reason: EnvelopeReason, detail: str, *, id: str | None = None) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail
        self.id = id

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True, slots=True)
class Envelope:
    """The attributes of one message. Times are ms since the epoch; `extra` are headers that are not ours, in order."""

    id: str
    type: str
    source: str
    time_ms: int | None = None
    subject: str | None = None
    correlation_id: str | None = None
    causation_id: str | None = None
    data_schema: str | None = None
    record_version: int | None = None
    tx_id: str | None = None
    traceparent: str | None = None
    extra: tuple[Header, ...] = ()

    @property
    def version(self) -> int:
        """The version that the data schema names; 1 when there is none."""
        return 1 if self.data_schema is None else _type_and_version(self.data_schema)[1]


@dataclass(frozen=True, slots=True)
class _Text:
    """One attribute that is text."""

    header: str
    attribute: str
    max_chars: int
    required: bool = False


_TEXTS = (
    _Text("ce_id", "id", MAX_ID_CHARS, required=True),
    _Text("ce_type", "type", MAX_ID_CHARS, required=True),
    _Text("ce_source", "source", MAX_TEXT_CHARS, required=True),
    _Text("ce_subject", "subject", MAX_TEXT_CHARS),
    _Text("ce_correlationid", "correlation_id", MAX_ID_CHARS),
    _Text("ce_causationid", "causation_id", MAX_ID_CHARS),
    _Text("ce_dataschema", "data_schema", MAX_TEXT_CHARS),
    _Text("ce_txid", "tx_id", MAX_ID_CHARS),
)
_OTHERS = ("ce_specversion", "ce_time", "ce_recordversion", "content-type", "traceparent")
_OURS = frozenset((*(text.header for text in _TEXTS), *_OTHERS))


def encode_headers(envelope: Envelope) -> list[tuple[str, bytes]]:
    """The Kafka headers of `envelope`. Raises EnvelopeError for what `decode_headers` would not take back."""
    headers = [("ce_specversion", SPEC_VERSION)]
    for text in _TEXTS:
        value = getattr(envelope, text.attribute)
        if value is not None:
            headers.append((text.header, _checked(text, value)))
        elif text.required:
            raise EnvelopeError(EnvelopeReason.MISSING_HEADER, text.header)
    if envelope.data_schema is not None:
        _check_data_schema(envelope.data_schema, envelope.type)
    if envelope.time_ms is not None:
        headers.append(("ce_time", _format_time(envelope.time_ms)))
    if envelope.record_version is not None:
        headers.append(("ce_recordversion", str(_parse_count(str(envelope.record_version)))))
    if envelope.traceparent is not None and parse_traceparent(envelope.traceparent):
        headers.append(("traceparent", envelope.traceparent))
    headers.append(("content-type", CONTENT_TYPE))
    try:
        encoded = [(name, value.encode("utf-8")) for name, value in headers]
    except UnicodeEncodeError:
        raise EnvelopeError(EnvelopeReason.NOT_UTF8, "a header holds half a surrogate pair") from None
    return encoded + [(name, value) for name, value in envelope.extra if value is not None]


def decode_headers(headers: Iterable[Header]) -> Envelope:
    """The envelope in Kafka `headers`. Raises EnvelopeError, which carries the id if that could be read.

    Required are specversion, id, type and source, as in CloudEvents. Attributes this system does not know stay in
    `extra`, as do headers of others.
    """
    ours: dict[str, bytes | None] = {}
    repeated: set[str] = set()
    extra: list[Header] = []
    count = size = 0
    unreadable = 0
    for name, value in headers:
        count += 1
        unreadable += NOT_UTF8_IN_NAME in name
        size += len(name) + len(value or b"")
        if name not in _OURS:
            extra.append((name, value))
        elif name in ours:
            repeated.add(name)
        else:
            ours[name] = value
    id = _read_id(ours, repeated)
    try:
        if unreadable:
            raise EnvelopeError(EnvelopeReason.NOT_UTF8, f"the names of {unreadable} headers")
        if count > MAX_HEADERS or size > MAX_HEADER_BYTES:
            raise EnvelopeError(EnvelopeReason.TOO_MANY_HEADERS, f"{count} headers of {size} characters")
        return _envelope(ours, repeated, tuple(extra))
    except EnvelopeError as error:
        error.id = id
        raise


def _envelope(ours: dict[str, bytes | None], repeated: set[str], extra: tuple[Header, ...]) -> Envelope:
    _check_extensions(extra)
    traceparent = None if "traceparent" in repeated else traceparent_of(ours.items())
    ours.pop("traceparent", None)
    repeated.discard("traceparent")
    if repeated:
        raise EnvelopeError(EnvelopeReason.REPEATED_HEADER, ", ".join(sorted(repeated)))
    texts = {name: _utf8(name, value) for name, value in ours.items()}
    _check_constants(texts)
    attributes: dict[str, str] = {}
    for text in _TEXTS:
        if text.header in texts:
            attributes[text.attribute] = _checked(text, texts[text.header])
        elif text.required:
            raise EnvelopeError(EnvelopeReason.MISSING_HEADER, text.header)
    if "data_schema" in attributes:
        _check_data_schema(attributes["data_schema"], attributes["type"])
    return Envelope(
        **attributes,
        time_ms=_parse_time(texts["ce_time"]) if "ce_time" in texts else None,
        record_version=_parse_count(texts["ce_recordversion"]) if "ce_recordversion" in texts else None,
        traceparent=traceparent,
        extra=extra,
    )


def _read_id(ours: dict[str, bytes | None], repeated: set[str]) -> str | None:
    """The id alone, so that a message whose other headers are bad still answers to its name."""
    if "ce_id" not in ours or "ce_id" in repeated:
        return None
    try:
        return _checked(_TEXTS[0], _utf8("ce_id", ours["ce_id"]))
    except EnvelopeError:
        return None


def _check_extensions(extra: tuple[Header, ...]) -> None:
    """Extension attributes that we do not know must still be CloudEvents: once each, and text."""
    seen: set[str] = set()
    for name, value in extra:
        if name.startswith("ce_"):
            if name in seen:
                raise EnvelopeError(EnvelopeReason.REPEATED_HEADER, _short(name))
            seen.add(name)
            _utf8(name, value)


def _check_constants(texts: dict[str, str]) -> None:
    if "ce_specversion" not in texts:
        raise EnvelopeError(EnvelopeReason.MISSING_HEADER, "ce_specversion")
    if texts["ce_specversion"] != SPEC_VERSION:
        raise EnvelopeError(EnvelopeReason.WRONG_SPECVERSION, _short(texts["ce_specversion"]))
    if "content-type" in texts and not _JSON_CONTENT.fullmatch(texts["content-type"]):
        raise EnvelopeError(EnvelopeReason.WRONG_CONTENT_TYPE, _short(texts["content-type"]))


def _utf8(name: str, value: bytes | None) -> str:
    if value is None:
        raise EnvelopeError(EnvelopeReason.EMPTY_HEADER, _short(name))
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        raise EnvelopeError(EnvelopeReason.NOT_UTF8, _short(name)) from None


def _checked(text: _Text, value: str) -> str:
    if not value:
        raise EnvelopeError(EnvelopeReason.EMPTY_HEADER, text.header)
    if len(value) > text.max_chars:
        raise EnvelopeError(EnvelopeReason.TOO_LONG, f"{text.header} has {len(value)} of {text.max_chars} characters")
    if _CONTROL.search(value):
        raise EnvelopeError(EnvelopeReason.CONTROL_CHARACTER, text.header)
    return value


def _format_time(time_ms: int) -> str:
    try:
        return iso_time(time_ms)
    except OverflowError:
        raise EnvelopeError(EnvelopeReason.BAD_TIME, f"{time_ms} ms is no date") from None


def _parse_time(text: str) -> int:
    """RFC 3339, any offset, to whole ms since the epoch."""
    match = _RFC3339.fullmatch(text)
    if match is None:
        raise EnvelopeError(EnvelopeReason.BAD_TIME, _short(text))
    *date, fraction, sign, hours, minutes = match.groups()
    try:
        moment = datetime(*map(int, date), tzinfo=UTC)  # type: ignore[arg-type, misc]
    except ValueError:
        raise EnvelopeError(EnvelopeReason.BAD_TIME, _short(text)) from None
    time_ms = (moment - _EPOCH) // timedelta(milliseconds=1) + int((fraction or "0")[:3].ljust(3, "0"))
    offset_ms = (int(hours) * 60 + int(minutes)) * 60_000 if sign else 0
    return time_ms + offset_ms if sign == "-" else time_ms - offset_ms


def _parse_count(text: str) -> int:
    if not _COUNT.fullmatch(text):
        raise EnvelopeError(EnvelopeReason.BAD_RECORD_VERSION, _short(text))
    return int(text)


def traceparent_of(headers: Iterable[Header]) -> str | None:
    """The trace that the message with these headers belongs to; None unless there is exactly one valid traceparent."""
    context = trace_context_of(headers)
    return None if context is None else context.traceparent


def data_schema_of(model: type[Message]) -> str:
    """`concord:/schemas/orders/PlaceOrder/1`: what `ce_dataschema` says of messages of `model` made here."""
    return data_schema(model.domain, model.type_name(), model.version)


def data_schema(domain: str, type_name: str, version: int) -> str:
    return f"concord:/schemas/{domain}/{type_name}/{version}"


def _type_and_version(text: str) -> tuple[str, int]:
    match = _DATA_SCHEMA.fullmatch(text)
    if match is None:
        raise EnvelopeError(EnvelopeReason.BAD_DATASCHEMA, f"{_short(text)} does not end in /<Type>/<version>")
    return match[1], int(match[2])


def _check_data_schema(text: str, type_name: str) -> None:
    if _type_and_version(text)[0] != type_name:
        raise EnvelopeError(EnvelopeReason.BAD_DATASCHEMA, f"{_short(text)} is not of ce_type {_short(type_name)}")


def _short(text: str, limit: int = 80) -> str:
    """Somebody else's text, fit for a sentence: escaped, and cut."""
    return ascii(text if len(text) <= limit else text[:limit] + "…")


# --- Messages in -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RawMessage:
    """A Kafka record as it came. `timestamp_ms` is the broker's; `oversize` the length of a value left out for it.

    `trace` is no part of the record: whoever hands a message on names its own span there, and leaves the headers alone.
    """

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    headers: tuple[Header, ...]
    value: bytes | None
    oversize: int = 0
    trace: TraceContext | None = field(default=None, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickled between processes by the thousand: a call with few arguments is the smallest form.
        arguments = (self.topic, self.partition, self.offset, self.timestamp_ms)
        more = (self.key, self.headers, self.value, self.oversize)
        return RawMessage, (*arguments, *more) if self.trace is None else (*arguments, *more, self.trace)


class DeadLetterReason(StrEnum):
    """Every reason why a command ends as a dead letter."""

    BAD_HEADERS = "bad_headers"
    UNKNOWN_TYPE = "unknown_type"
    UNKNOWN_VERSION = "unknown_version"
    TOO_LARGE = "too_large"
    NOT_JSON = "not_json"
    WRONG_SHAPE = "wrong_shape"
    MISSING_KEY = "missing_key"
    KEY_MISMATCH = "key_mismatch"
    HANDLER_ERROR = "handler_error"


_REASON_OF_DECODING = {
    DecodingReason.TOO_LARGE: DeadLetterReason.TOO_LARGE,
    DecodingReason.EMPTY: DeadLetterReason.NOT_JSON,
    DecodingReason.BYTE_ORDER_MARK: DeadLetterReason.NOT_JSON,
    DecodingReason.NOT_UTF8: DeadLetterReason.NOT_JSON,
    DecodingReason.MALFORMED: DeadLetterReason.NOT_JSON,
    DecodingReason.NOT_A_NUMBER: DeadLetterReason.NOT_JSON,
    DecodingReason.NUMBER_OUT_OF_RANGE: DeadLetterReason.WRONG_SHAPE,
    DecodingReason.NUMBER_TOO_LONG: DeadLetterReason.WRONG_SHAPE,
    DecodingReason.NOT_AN_OBJECT: DeadLetterReason.WRONG_SHAPE,
    DecodingReason.REPEATED_NAME: DeadLetterReason.WRONG_SHAPE,
    DecodingReason.LONE_SURROGATE: DeadLetterReason.WRONG_SHAPE,
    DecodingReason.NUL_CHARACTER: DeadLetterReason.WRONG_SHAPE,
    DecodingReason.TOO_DEEP: DeadLetterReason.WRONG_SHAPE,
    DecodingReason.TOO_MANY_ITEMS: DeadLetterReason.WRONG_SHAPE,
}


class DeadLetterError(Exception):
    """A message that nobody can carry out, with what its answer needs.

    `command_id` is the id in the headers or, where that cannot be read (`id_readable` False), one made from topic,
    partition and offset: the same at every redelivery. `type` and `key` are what could be read of them, else empty.
    `detail` never quotes the body.
    """

    def __init__(
        self,
        reason: DeadLetterReason,
        detail: str,
        *,
        command_id: str,
        id_readable: bool,
        type: str = "",
        key: str = "",
        correlation_id: str = "",
        digest: str = "",
    ) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail
        self.command_id = command_id
        self.id_readable = id_readable
        self.type = type
        self.key = key
        self.correlation_id = correlation_id or command_id
        self.digest = digest

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True, slots=True)
class ParsedCommand:
    """A command ready to be carried out. `version` is the one it came in; `command` is of the current one.

    `digest` tells payloads under one id apart. `time_ms` is when its sender made it, or the broker's time.
    """

    id: str
    domain: str
    type: str
    version: int
    key: str
    command: Command
    digest: str
    correlation_id: str
    causation_id: str | None
    traceparent: str | None
    time_ms: int
    topic: str
    partition: int
    offset: int
    timestamp_ms: int


@dataclass(frozen=True, slots=True)
class ParsedEvent:
    """An event as a projection takes it. `record_version` is of the record that `subject` names."""

    id: str
    type: str
    key: str
    event: Event
    subject: str
    record_version: int
    correlation_id: str
    causation_id: str | None
    tx_id: str | None
    time_ms: int
    topic: str
    partition: int
    offset: int


def payload_digest(type_name: str, version: str, value: bytes) -> str:
    """SHA-256 in hex of what a command asks for. Byte for byte: a redelivery is the same bytes."""
    digest = hashlib.sha256()
    for part in (type_name.encode("utf-8"), version.encode("utf-8")):
        digest.update(len(part).to_bytes(4, "big") + part)
    digest.update(value)
    return digest.hexdigest()


def derived_id(raw: RawMessage) -> str:
    """The id of a message that has no readable one: where it lies."""
    return f"unreadable:{raw.topic}:{raw.partition}:{raw.offset}"


def parse_command(
    raw: RawMessage, *, domain: str, max_bytes: int = MAX_VALUE_BYTES, registry: Registry | None = None
) -> ParsedCommand:
    """The command in `raw`, which came on `domain`'s topic. Raises DeadLetterError and nothing else.

    `max_bytes` is the largest value that is looked into; `registry` is for tests, all domains by default.
    """
    registry = registry or default_registry()
    envelope = _open(raw)
    try:
        model = registry.command(envelope.type)
    except UnknownTypeError:
        raise _dead(raw, envelope, DeadLetterReason.UNKNOWN_TYPE, f"no command {_short(envelope.type)}") from None
    if model.domain != domain:
        detail = f"{envelope.type} belongs on {commands_topic(model.domain)}"
        raise _dead(raw, envelope, DeadLetterReason.UNKNOWN_TYPE, detail)
    command = _body(raw, envelope, model, registry, max_bytes)
    key = _key(raw, envelope, command.routing_key)
    return ParsedCommand(
        id=envelope.id,
        domain=domain,
        type=envelope.type,
        version=envelope.version,
        key=key,
        command=command,
        digest=_digest(raw, envelope),
        correlation_id=envelope.correlation_id or envelope.id,
        causation_id=envelope.causation_id,
        traceparent=envelope.traceparent,
        time_ms=raw.timestamp_ms if envelope.time_ms is None else envelope.time_ms,
        topic=raw.topic,
        partition=raw.partition,
        offset=raw.offset,
        timestamp_ms=raw.timestamp_ms,
    )


def parse_event(
    raw: RawMessage, *, max_bytes: int = 4 * MAX_VALUE_BYTES, registry: Registry | None = None
) -> ParsedEvent:
    """The event in `raw`. Raises DeadLetterError for what cannot be read: a projection logs that and goes on."""
    registry = registry or default_registry()
    envelope = _open(raw)
    try:
        model = registry.event(envelope.type)
    except UnknownTypeError:
        raise _dead(raw, envelope, DeadLetterReason.UNKNOWN_TYPE, f"no event {_short(envelope.type)}") from None
    event = _body(raw, envelope, model, registry, max_bytes)
    return ParsedEvent(
        id=envelope.id,
        type=envelope.type,
        key=_key(raw, envelope, event.routing_key),
        event=event,
        subject=envelope.subject or "",
        record_version=envelope.record_version or 0,
        correlation_id=envelope.correlation_id or envelope.id,
        causation_id=envelope.causation_id,
        tx_id=envelope.tx_id,
        time_ms=raw.timestamp_ms if envelope.time_ms is None else envelope.time_ms,
        topic=raw.topic,
        partition=raw.partition,
        offset=raw.offset,
    )


M = TypeVar("M", bound=Message)


def _open(raw: RawMessage) -> Envelope:
    try:
        return decode_headers(raw.headers)
    except EnvelopeError as error:
        raise DeadLetterError(
            DeadLetterReason.BAD_HEADERS,
            str(error),
            command_id=error.id or derived_id(raw),
            id_readable=error.id is not None,
            key=key_text(raw),
            digest=payload_digest("", "", _payload(raw)),
        ) from None


def _body(raw: RawMessage, envelope: Envelope, model: type[M], registry: Registry, max_bytes: int) -> M:
    version = envelope.version
    try:
        registry.check_version(model, version)
    except UnknownVersionError as error:
        raise _dead(raw, envelope, DeadLetterReason.UNKNOWN_VERSION, str(error)) from None
    size = raw.oversize or len(raw.value or b"")
    if size > max_bytes or raw.oversize:
        raise _dead(raw, envelope, DeadLetterReason.TOO_LARGE, f"{size} bytes, at most {max_bytes} are taken")
    try:
        body = decode_json(raw.value or b"", max_bytes=max_bytes)
        # The bytes have just been found good, so the model may read them itself unless they are of an older version.
        if version == model.version and raw.value is not None:
            return model.model_validate_json(raw.value)
        return model.consume(registry.upcast(model, version, body))
    except DecodingError as error:
        raise _dead(raw, envelope, _REASON_OF_DECODING[error.reason], str(error)) from None
    except ValidationError as error:
        raise _dead(raw, envelope, DeadLetterReason.WRONG_SHAPE, _describe(error)) from None


def _key(raw: RawMessage, envelope: Envelope, routing_key: str) -> str:
    if not raw.key:
        raise _dead(raw, envelope, DeadLetterReason.MISSING_KEY, "the message has no key")
    if raw.key != routing_key.encode("utf-8", "surrogatepass"):
        detail = f"the message's key {_short(key_text(raw))} is not the routing key {_short(routing_key)} of its body"
        raise _dead(raw, envelope, DeadLetterReason.KEY_MISMATCH, detail)
    return routing_key


def _dead(raw: RawMessage, envelope: Envelope, reason: DeadLetterReason, detail: str) -> DeadLetterError:
    return DeadLetterError(
        reason,
        detail,
        command_id=envelope.id,
        id_readable=True,
        type=envelope.type,
        key=key_text(raw),
        correlation_id=envelope.correlation_id or envelope.id,
        digest=_digest(raw, envelope),
    )


def key_text(raw: RawMessage) -> str:
    """The key as text, whatever its bytes; empty when there is none.

    A key longer than any of ours is cut and told apart by its digest: an answer must fit a row and a message.
    """
    key = raw.key or b""
    if len(key) > MAX_TEXT_CHARS:
        return f"{key[:100].decode('utf-8', 'backslashreplace')}… sha256:{hashlib.sha256(key).hexdigest()}"
    return key.decode("utf-8", "backslashreplace")


def _payload(raw: RawMessage) -> bytes:
    return b"oversize %d" % raw.oversize if raw.oversize else raw.value or b""


def _digest(raw: RawMessage, envelope: Envelope) -> str:
    # The version, not the text that names it: another prefix makes no other payload.
    return payload_digest(envelope.type, str(envelope.version), _payload(raw))


def _describe(error: ValidationError, limit: int = 5) -> str:
    """Where the body is wrong and how, without quoting it."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    told = [
        f"{'.'.join(map(str, problem['loc']))[:100] or 'body'}: {problem['msg'][:200]}" for problem in problems[:limit]
    ]
    if len(problems) > limit:
        told.append(f"and {len(problems) - limit} more")
    return "; ".join(told)


# --- Messages out ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OutgoingMessage:
    """A Kafka record to be sent."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: tuple[Header, ...]


def build_command_message(
    command: Command,
    *,
    command_id: str,
    time_ms: int,
    correlation_id: str | None = None,
    causation_id: str | None = None,
    source: str = CLI_SOURCE,
    trace: TraceContext | None = None,
) -> OutgoingMessage:
    """`command` for its domain's topic. Fields left at their defaults are not written.

    So a command sent again by a newer client, whose model has more optional fields, is still the same payload.
    Raises EnvelopeError, for instance for an id that no consumer would take.
    """
    key = command.routing_key
    envelope = Envelope(
        id=command_id,
        type=command.type_name(),
        source=source,
        time_ms=time_ms,
        subject=_subject(key) or None,
        correlation_id=correlation_id or command_id,
        causation_id=causation_id,
        data_schema=data_schema_of(type(command)),
        **_traced(trace),
    )
    return OutgoingMessage(
        topic=commands_topic(command.domain),
        key=key.encode("utf-8"),
        value=command.model_dump_json(exclude_unset=True).encode(),
        headers=tuple(encode_headers(envelope)),
    )


def build_event_message(event: EmittedEvent, *, answer: Answer, trace: TraceContext | None = None) -> OutgoingMessage:
    """`event`, which the command of `answer` emitted, for the topic of the event's own domain.

    The same answer gives the same message, time included, however often it is published; only the trace may differ.
    """
    envelope = Envelope(
        id=event.id,
        type=event.type,
        source=f"concord:/domains/{event.domain}",
        time_ms=_time_of(answer),
        subject=_subject(event.subject) or None,
        correlation_id=answer.correlation_id or answer.id,
        causation_id=answer.id,
        data_schema=event.data_schema,
        record_version=event.record_version,
        tx_id=answer.tx_id,
        **_traced(trace),
    )
    return OutgoingMessage(
        topic=events_topic(event.domain),
        key=event.key.encode("utf-8"),
        value=event.body.encode("utf-8"),
        headers=tuple(encode_headers(envelope)),
    )


def build_result_message(answer: Answer, *, domain: str, trace: TraceContext | None = None) -> OutgoingMessage:
    """`answer` for the results topic of the domain that the command was sent to.

    Its own id is made from the command's id and key and the payload, so an answer published twice is dropped by who
    has seen it, and an `id_conflict` is another message than the first answer.
    """
    name = "\0".join(("concord:result", domain, answer.key, answer.id, answer.digest))
    envelope = Envelope(
        id=str(uuid.uuid5(uuid.NAMESPACE_URL, name)),
        type=ANSWER_TYPE,
        source=f"concord:/domains/{domain}",
        time_ms=_time_of(answer),
        subject=_subject(answer.key) or None,
        correlation_id=answer.correlation_id or answer.id,
        causation_id=answer.id,
        data_schema=data_schema(domain, ANSWER_TYPE, ANSWER_VERSION),
        tx_id=answer.tx_id,
        **_traced(trace),
    )
    return OutgoingMessage(
        topic=results_topic(domain),
        key=answer.key.encode("utf-8") or None,
        value=answer.to_json(),
        headers=tuple(encode_headers(envelope)),
    )


def build_dead_letter(
    raw: RawMessage,
    *,
    reason: str,
    detail: str,
    command_id: str,
    attempts: int = 1,
    consumer_group: str = "",
    value: bytes | None = None,
) -> OutgoingMessage:
    """`raw` for the dead-letter topic: key, value and headers byte for byte, then headers that say why.

    `value` is the original value where `raw` left it out for its size. A message that has been a dead letter before
    keeps those headers too: the last of a name is the latest. The same arguments give the same message.
    """
    told = {
        "dlq-reason": reason,
        "dlq-detail": detail[:MAX_TEXT_CHARS],
        "dlq-command-id": command_id,
        "dlq-original-topic": raw.topic,
        "dlq-original-partition": str(raw.partition),
        "dlq-original-offset": str(raw.offset),
        "dlq-original-timestamp": str(raw.timestamp_ms),
        "dlq-consumer-group": consumer_group,
        "dlq-attempts": str(attempts),
    }
    added = tuple((name, text.encode("utf-8", "backslashreplace")) for name, text in told.items())
    return OutgoingMessage(
        topic=f"{raw.topic}.dlq",
        key=raw.key,
        value=raw.value if value is None else value,
        headers=(*raw.headers, *added),
    )


def _traced(trace: TraceContext | None) -> dict[str, Any]:
    """The attributes of an envelope that hand a trace on."""
    if trace is None:
        return {}
    state = ((TRACESTATE, trace.tracestate.encode()),) if trace.tracestate else ()
    return {"traceparent": trace.traceparent, "extra": state}


def _time_of(answer: Answer) -> int:
    return answer.received_at_ms if answer.committed_at_ms is None else answer.committed_at_ms


def _subject(text: str) -> str:
    """`text` as an attribute may hold it: a key may contain anything, and a committed event must be publishable."""
    safe = _CONTROL.sub(lambda match: quote(match[0]), text.encode("utf-8", "replace").decode("utf-8"))
    return safe[:MAX_TEXT_CHARS]
