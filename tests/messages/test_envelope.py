"""Headers: CloudEvents in Kafka's binary mode."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from message_samples import raw_command, with_header, without_header

from schemas.envelope import (
    MAX_HEADER_BYTES,
    MAX_HEADERS,
    MAX_ID_CHARS,
    MAX_TEXT_CHARS,
    Envelope,
    EnvelopeError,
    Header,
    decode_headers,
    encode_headers,
)

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

FULL = Envelope(
    id="c-1",
    type="OrderPlaced",
    source="concord:/domains/orders",
    time_ms=1_291_191_960_123,
    subject="orders.orders/17850/536365",
    correlation_id="root",
    causation_id="cause",
    data_schema="concord:/schemas/orders/OrderPlaced/3",
    record_version=7,
    tx_id="tx",
    traceparent=TRACEPARENT,
    extra=(("ce_expectedversion", b"2"), ("mine", b"\xff\x00")),
)


def test_headers_are_those_of_cloudevents_in_binary_mode() -> None:
    assert dict(encode_headers(FULL)) == {
        "ce_specversion": b"1.0",
        "ce_id": b"c-1",
        "ce_type": b"OrderPlaced",
        "ce_source": b"concord:/domains/orders",
        "ce_subject": b"orders.orders/17850/536365",
        "ce_correlationid": b"root",
        "ce_causationid": b"cause",
        "ce_dataschema": b"concord:/schemas/orders/OrderPlaced/3",
        "ce_txid": b"tx",
        "ce_time": b"2010-12-01T08:26:00.123Z",
        "ce_recordversion": b"7",
        "traceparent": TRACEPARENT.encode(),
        "content-type": b"application/json",
        "ce_expectedversion": b"2",
        "mine": b"\xff\x00",
    }


TEXT = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=30)
NAMES = st.from_regex(r"[A-Za-z][A-Za-z0-9_]{0,20}", fullmatch=True)


@st.composite
def envelopes(draw: st.DrawFn) -> Envelope:
    type_name = draw(NAMES)
    return Envelope(
        id=draw(TEXT),
        type=type_name,
        source=draw(TEXT),
        # The years that RFC 3339 can write.
        time_ms=draw(st.none() | st.integers(-62_135_596_800_000, 253_402_300_799_999)),
        subject=draw(st.none() | TEXT),
        correlation_id=draw(st.none() | TEXT),
        causation_id=draw(st.none() | TEXT),
        data_schema=draw(st.none() | st.builds("{}/{}/{}".format, TEXT, st.just(type_name), st.integers(1, 10**9 - 1))),
        record_version=draw(st.none() | st.integers(0, 10**18 - 1)),
        tx_id=draw(st.none() | TEXT),
        traceparent=draw(st.none() | st.just(TRACEPARENT)),
        extra=tuple(draw(st.lists(st.tuples(st.sampled_from(["a", "b", "tracestate"]), st.binary(max_size=5))))),
    )


@given(envelopes())
@settings(max_examples=200, deadline=None)
def test_an_envelope_comes_back_as_it_was_written(envelope: Envelope) -> None:
    assert decode_headers(encode_headers(envelope)) == envelope


@given(envelopes(), st.data())
@settings(max_examples=100, deadline=None)
def test_the_order_of_headers_does_not_matter(envelope: Envelope, data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(encode_headers(replace(envelope, extra=()))))

    assert decode_headers(shuffled) == replace(envelope, extra=())


GOOD = tuple(encode_headers(replace(FULL, extra=())))

BAD: dict[str, tuple[tuple[Header, ...], str]] = {
    "no headers at all": ((), "missing_header"),
    "no id": (without_header(GOOD, "ce_id"), "missing_header"),
    "no type": (without_header(GOOD, "ce_type"), "missing_header"),
    "no source": (without_header(GOOD, "ce_source"), "missing_header"),
    "no specversion": (without_header(GOOD, "ce_specversion"), "missing_header"),
    "specversion 0.3": (with_header(GOOD, "ce_specversion", b"0.3"), "wrong_specversion"),
    "an empty id": (with_header(GOOD, "ce_id", b""), "empty_header"),
    "an id that is null": (with_header(GOOD, "ce_id", None), "empty_header"),
    "an id of 201 characters": (with_header(GOOD, "ce_id", b"x" * (MAX_ID_CHARS + 1)), "too_long"),
    "a line feed in the id": (with_header(GOOD, "ce_id", b"a\nb"), "control_character"),
    "NUL in the id": (with_header(GOOD, "ce_id", b"a\0"), "control_character"),
    "DEL in the id": (with_header(GOOD, "ce_id", b"a\x7f"), "control_character"),
    "a C1 control in the id": (with_header(GOOD, "ce_id", "a\x85".encode()), "control_character"),
    "a line separator in the id": (with_header(GOOD, "ce_id", "a\u2028".encode()), "control_character"),
    "an id that is not UTF-8": (with_header(GOOD, "ce_id", b"\xff"), "not_utf8"),
    "two ids": ((*GOOD, ("ce_id", b"other")), "repeated_header"),
    "the same id twice": ((*GOOD, ("ce_id", b"c-1")), "repeated_header"),
    "two content types": ((*GOOD, ("content-type", b"application/json")), "repeated_header"),
    "two of an unknown attribute": ((*GOOD, ("ce_x", b"1"), ("ce_x", b"1")), "repeated_header"),
    "an unknown attribute that is not UTF-8": ((*GOOD, ("ce_x", b"\xff")), "not_utf8"),
    "a subject that is not UTF-8": (with_header(GOOD, "ce_subject", b"\xc3"), "not_utf8"),
    "a subject of 1,001 characters": (with_header(GOOD, "ce_subject", b"x" * (MAX_TEXT_CHARS + 1)), "too_long"),
    "an empty correlation id": (with_header(GOOD, "ce_correlationid", b""), "empty_header"),
    "a time without offset": (with_header(GOOD, "ce_time", b"2010-12-01T08:26:00"), "bad_time"),
    "a time that is a number": (with_header(GOOD, "ce_time", b"1291191960123"), "bad_time"),
    "the 30th of February": (with_header(GOOD, "ce_time", b"2010-02-30T00:00:00Z"), "bad_time"),
    "the year 0": (with_header(GOOD, "ce_time", b"0000-01-01T00:00:00Z"), "bad_time"),
    "digits of another script": (with_header(GOOD, "ce_time", "２010-12-01T08:26:00Z".encode()), "bad_time"),
    "a time with something behind it": (with_header(GOOD, "ce_time", b"2010-12-01T08:26:00Z "), "bad_time"),
    "structured mode": (with_header(GOOD, "content-type", b"application/cloudevents+json"), "wrong_content_type"),
    "a pickle's content type": (
        with_header(GOOD, "content-type", b"application/x-python-pickle"),
        "wrong_content_type",
    ),
    "another charset": (with_header(GOOD, "content-type", b"application/json; charset=latin-1"), "wrong_content_type"),
    "a data schema without a version": (with_header(GOOD, "ce_dataschema", b"urn:x/OrderPlaced"), "bad_dataschema"),
    "version 0": (with_header(GOOD, "ce_dataschema", b"urn:x/OrderPlaced/0"), "bad_dataschema"),
    "a negative version": (with_header(GOOD, "ce_dataschema", b"urn:x/OrderPlaced/-1"), "bad_dataschema"),
    "a version of a thousand digits": (
        with_header(GOOD, "ce_dataschema", b"urn:x/OrderPlaced/" + b"9" * 900),
        "bad_dataschema",
    ),
    "the data schema of another type": (with_header(GOOD, "ce_dataschema", b"urn:x/Other/1"), "bad_dataschema"),
    "a record version that is no number": (with_header(GOOD, "ce_recordversion", b"x"), "bad_record_version"),
    "too many headers": ((*GOOD, *((f"h{i}", b"") for i in range(MAX_HEADERS))), "too_many_headers"),
    "too much in the headers": ((*GOOD, ("h", b"x" * MAX_HEADER_BYTES)), "too_many_headers"),
}


@pytest.mark.parametrize("name", BAD)
def test_malformed_headers_are_refused_with_their_reason(name: str) -> None:
    headers, reason = BAD[name]

    with pytest.raises(EnvelopeError) as refused:
        decode_headers(headers)

    assert refused.value.reason == reason


@pytest.mark.parametrize("name", BAD)
def test_the_id_is_told_wherever_the_id_itself_is_good(name: str) -> None:
    headers, _ = BAD[name]
    ids = [value for header, value in headers if header == "ce_id"]
    readable = ids == [b"c-1"]

    with pytest.raises(EnvelopeError) as refused:
        decode_headers(headers)

    assert refused.value.id == ("c-1" if readable else None)


@pytest.mark.parametrize(
    "header",
    ["ce_subject", "ce_time", "ce_correlationid", "ce_causationid", "ce_dataschema", "traceparent", "content-type"],
)
def test_an_optional_header_may_be_missing(header: str) -> None:
    assert decode_headers(without_header(GOOD, header)).id == "c-1"


@pytest.mark.parametrize(
    "content_type", ["application/json", "application/json; charset=utf-8", 'Application/JSON;charset="UTF-8"']
)
def test_json_may_say_that_it_is_utf8(content_type: str) -> None:
    assert decode_headers(with_header(GOOD, "content-type", content_type.encode())).id == "c-1"


@pytest.mark.parametrize(
    ("text", "time_ms"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("1970-01-01t00:00:00z", 0),
        ("2010-12-01T08:26:00.123Z", 1_291_191_960_123),
        ("2010-12-01T08:26:00.1239999Z", 1_291_191_960_123),
        ("2010-12-01T08:26:00.1Z", 1_291_191_960_100),
        ("2010-12-01T17:26:00+09:00", 1_291_191_960_000),
        ("2010-12-01T04:56:00-03:30", 1_291_191_960_000),
        ("0001-01-01T00:00:00+23:59", -62_135_596_800_000 - 86_340_000),
    ],
)
def test_times_are_read_in_every_form_of_rfc_3339(text: str, time_ms: int) -> None:
    assert decode_headers(with_header(GOOD, "ce_time", text.encode())).time_ms == time_ms


@pytest.mark.parametrize(
    "traceparent",
    [
        b"",
        None,
        b"\xff",
        b"garbage",
        b"ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        b"00-00000000000000000000000000000000-00f067aa0ba902b7-01",
        b"00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
        b"00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
        b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
    ],
)
def test_a_malformed_traceparent_is_dropped_and_the_message_goes_on(traceparent: bytes | None) -> None:
    envelope = decode_headers(with_header(GOOD, "traceparent", traceparent))

    assert envelope == replace(FULL, traceparent=None, extra=())


def test_a_traceparent_given_twice_is_dropped() -> None:
    assert decode_headers((*GOOD, ("traceparent", TRACEPARENT.encode()))).traceparent is None


def test_a_traceparent_of_a_later_version_is_kept() -> None:
    later = TRACEPARENT.replace("00-", "01-", 1) + "-more"

    assert decode_headers(with_header(GOOD, "traceparent", later.encode())).traceparent == later


def test_a_message_without_a_data_schema_is_of_version_1() -> None:
    assert decode_headers(without_header(GOOD, "ce_dataschema")).version == 1
    assert decode_headers(GOOD).version == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"id": ""},
        {"id": "a\r\nb"},
        {"id": "x" * 201},
        {"id": "\ud800"},
        {"time_ms": 10**18},
        {"data_schema": "nothing"},
        {"data_schema": "concord:/schemas/orders/Other/1"},
        {"record_version": -1},
    ],
    ids=str,
)
def test_headers_that_nobody_would_take_are_not_written(changes: dict[str, object]) -> None:
    with pytest.raises(EnvelopeError):
        encode_headers(replace(FULL, **changes))  # type: ignore[arg-type]


@given(
    st.lists(
        st.tuples(
            st.sampled_from([name for name, _ in GOOD]) | st.text(max_size=5),
            st.none() | st.binary(max_size=30) | st.sampled_from([value for _, value in GOOD]),
        ),
        max_size=8,
    ),
    st.integers(0, len(GOOD)),
)
@settings(max_examples=400, deadline=None)
def test_any_headers_become_an_envelope_or_the_one_declared_error(noise: list[Header], kept: int) -> None:
    headers = [*GOOD[:kept], *noise]
    try:
        envelope = decode_headers(headers)
    except EnvelopeError as refused:
        assert refused.reason.isidentifier()  # noqa: PT017
    else:
        assert 0 < len(envelope.id) <= MAX_ID_CHARS


def test_a_raw_message_survives_the_way_to_another_process() -> None:
    raw = raw_command(oversize=3)

    assert pickle.loads(pickle.dumps(raw)) == raw
    assert len(pickle.dumps(raw)) < len(raw.value or b"") + sum(len(n) + len(v or b"") for n, v in raw.headers) + 300
