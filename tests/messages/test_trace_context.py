"""W3C Trace Context in Kafka's headers."""

from __future__ import annotations

import pickle

import pytest
from message_samples import NOW_MS, raw_command, sample

from schemas.envelope import build_command_message, decode_headers, parse_command
from schemas.trace_context import TraceContext, parse_tracestate, trace_context_of

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def test_a_context_tells_its_parts() -> None:
    context = TraceContext(PARENT)

    assert (context.trace_id, context.span_id) == ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7")
    assert context.sampled
    assert not TraceContext(PARENT[:-1] + "0").sampled
    assert TraceContext(PARENT[:-2] + "03").sampled


def test_traceparent_and_tracestate_go_out_and_come_in_again() -> None:
    context = TraceContext(PARENT, "vendor=a:1,other@system=b")
    message = build_command_message(sample("OpenWallet"), command_id="c-1", time_ms=NOW_MS, trace=context)

    assert trace_context_of(message.headers) == context
    assert decode_headers(message.headers).traceparent == PARENT


def test_several_tracestate_headers_are_one_list() -> None:
    headers = [("traceparent", PARENT.encode()), ("tracestate", b"a=1"), ("x", None), ("tracestate", b"b=2, c=3")]

    assert trace_context_of(headers) == TraceContext(PARENT, "a=1,b=2,c=3")


@pytest.mark.parametrize(
    "text",
    [
        "",
        ",",
        "novalue",
        "a=",
        "A=1",
        "a=1,a=2",
        "a=b=c",
        "a=\x00",
        "a=1\n",
        "é=1",
        ",".join(f"k{n}=1" for n in range(33)),
        "a=" + "x" * 600,
    ],
)
def test_a_malformed_tracestate_is_dropped_and_the_traceparent_stays(text: str) -> None:
    assert parse_tracestate(text) == ""
    headers = [("traceparent", PARENT.encode()), ("tracestate", text.encode())]
    assert trace_context_of(headers) == TraceContext(PARENT)


@pytest.mark.parametrize("values", [[], [None], [b"garbage"], [PARENT.encode(), PARENT.encode()], [b"\xff"]])
def test_without_exactly_one_valid_traceparent_there_is_no_context(values: list[bytes | None]) -> None:
    assert trace_context_of([*(("traceparent", value) for value in values), ("tracestate", b"a=1")]) is None


def test_whoever_hands_a_message_on_names_its_span_beside_the_headers_and_not_in_them() -> None:
    from dataclasses import replace

    raw = raw_command("OpenWallet")
    traced = replace(raw, trace=TraceContext(PARENT))

    assert traced == raw
    assert traced.headers == raw.headers
    assert pickle.loads(pickle.dumps(traced)).trace == TraceContext(PARENT)
    assert pickle.loads(pickle.dumps(raw)).trace is None
    assert parse_command(traced, domain="payment").digest == parse_command(raw, domain="payment").digest
