"""W3C Trace Context: where in which trace something happens, as it stands in the headers of a message.

    traceparent   00-<trace id, 32 hex>-<span id, 16 hex>-<flags, 2 hex>     which span caused this
    tracestate    vendor=value,vendor=value                                  what tracing systems add; passed on unread

What is malformed is dropped and never refuses a message: the receiver restarts the trace (W3C Trace Context, section
4.3). Source: https://www.w3.org/TR/trace-context/ (level 1, sections 3.2 and 3.3).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

TRACEPARENT = "traceparent"
TRACESTATE = "tracestate"

MAX_TRACESTATE_CHARS = 512
MAX_TRACESTATE_MEMBERS = 32

_SAMPLED = 0x01
_TRACEPARENT = re.compile(
    r"(?!ff)([0-9a-f]{2})-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-[\x20-\x7e]{0,200})?"
)
_MEMBER = re.compile(
    r"(?:[a-z][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13})"
    r"=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
)


class TraceContext(NamedTuple):
    """A span as others name it. `traceparent` is valid, `tracestate` valid or empty."""

    traceparent: str
    tracestate: str = ""

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits."""
        return self.traceparent[3:35]

    @property
    def span_id(self) -> str:
        """16 hexadecimal digits."""
        return self.traceparent[36:52]

    @property
    def flags(self) -> int:
        return int(self.traceparent[53:55], 16)

    @property
    def sampled(self) -> bool:
        """Whether whoever began the trace wants it recorded."""
        return bool(self.flags & _SAMPLED)

    def headers(self) -> tuple[tuple[str, bytes], ...]:
        """The Kafka headers that hand this on."""
        parent = (TRACEPARENT, self.traceparent.encode())
        return (parent, (TRACESTATE, self.tracestate.encode())) if self.tracestate else (parent,)


def parse_traceparent(text: str) -> str | None:
    """`text` if it is a valid traceparent, else None."""
    match = _TRACEPARENT.fullmatch(text)
    # Version 00 ends after the flags; later versions may say more.
    return None if match is None or (match[1] == "00" and match[2] is not None) else text


def parse_tracestate(text: str) -> str:
    """`text` if it is a valid tracestate of at most 512 characters, else the empty text."""
    if not text or len(text) > MAX_TRACESTATE_CHARS:
        return ""
    members = [member for member in (part.strip(" \t") for part in text.split(",")) if member]
    names = {member.partition("=")[0] for member in members}
    if not members or len(members) > MAX_TRACESTATE_MEMBERS or len(names) != len(members):
        return ""
    return ",".join(members) if all(map(_MEMBER.fullmatch, members)) else ""


def trace_context_of(headers: Iterable[tuple[str, bytes | None]]) -> TraceContext | None:
    """The trace that a message with these headers belongs to; None unless there is exactly one valid traceparent.

    Several tracestate headers are one list (section 3.3.1).
    """
    parents: list[bytes | None] = []
    states: list[bytes] = []
    for name, value in headers:
        if name == TRACEPARENT:
            parents.append(value)
        elif name == TRACESTATE:
            states.append(value or b"")
    if len(parents) != 1 or parents[0] is None:
        return None
    traceparent = parse_traceparent(parents[0].decode("utf-8", "replace"))
    if traceparent is None:
        return None
    return TraceContext(traceparent, parse_tracestate(b",".join(states).decode("utf-8", "replace")) if states else "")
