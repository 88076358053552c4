"""Answers, and the messages that the system itself sends."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from message_samples import NOW_MS, raw_command, sample

from schemas.envelope import (
    DeadLetterError,
    Envelope,
    EnvelopeError,
    OutgoingMessage,
    RawMessage,
    build_command_message,
    build_dead_letter,
    build_event_message,
    build_result_message,
    data_schema_of,
    decode_headers,
    parse_command,
    parse_event,
)
from schemas.message import Event
from schemas.outcome import ID_CONFLICT, Answer, EmittedEvent, unknown_status
from schemas.registry import Registry
from schemas.trace_context import TraceContext

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


class WalletOpened(Event):
    """Of this test's own, so that the envelope is what is tested."""

    domain: ClassVar[str] = "payment"

    customer_id: str
    balance: int

    @property
    def routing_key(self) -> str:
        return self.customer_id


REGISTRY = Registry(commands=[], events=[WalletOpened], upcasts={})

OPENED = WalletOpened(customer_id="17850", balance=100)

EMITTED = EmittedEvent(
    id="e-1",
    type="WalletOpened",
    domain="payment",
    key="17850",
    body=OPENED.model_dump_json(),
    subject="payment.wallets/17850",
    record_version=1,
    data_schema=data_schema_of(WalletOpened),
)

ANSWER = Answer(
    id="c-1",
    type="OpenWallet",
    key="17850",
    status="committed",
    result={"balance": 100},
    events=(EMITTED,),
    digest="d1",
    tx_id="tx-1",
    correlation_id="root",
    received_at_ms=NOW_MS,
    committed_at_ms=NOW_MS + 7,
)


def delivered(message: OutgoingMessage, **changes: Any) -> RawMessage:
    """`message` as a consumer gets it."""
    raw = RawMessage(message.topic, 0, 0, NOW_MS + 9, message.key, message.headers, message.value)
    return replace(raw, **changes)


# --- Commands ----------------------------------------------------------------------------------------------------


def test_a_command_is_sent_to_its_domains_topic_under_its_routing_key() -> None:
    message = build_command_message(sample("ArrangeShipment"), command_id="c-1", time_ms=NOW_MS)

    assert message.topic == "shipping.commands"
    assert message.key == sample("ArrangeShipment").routing_key.encode()
    assert decode_headers(message.headers) == Envelope(
        id="c-1",
        type="ArrangeShipment",
        source="concord-cli",
        time_ms=NOW_MS,
        subject=sample("ArrangeShipment").routing_key,
        correlation_id="c-1",
        data_schema="concord:/schemas/shipping/ArrangeShipment/1",
    )


def test_a_command_may_be_part_of_something_begun_before() -> None:
    message = build_command_message(
        sample("CancelReservation"),
        command_id="c-2",
        time_ms=NOW_MS,
        correlation_id="root",
        causation_id="c-1",
        source="concord:/domains/inventory",
        trace=TraceContext(TRACEPARENT),
    )

    parsed = parse_command(delivered(message), domain="inventory")
    assert (parsed.correlation_id, parsed.causation_id, parsed.traceparent) == ("root", "c-1", TRACEPARENT)


def test_what_the_sender_did_not_set_is_not_sent() -> None:
    """So that the same command from a newer client, whose model has more optional fields, is the same payload."""
    message = build_command_message(sample("OpenWallet"), command_id="c-1", time_ms=NOW_MS)

    assert message.value == b'{"customer_id":"17850","currency":"GBP","initial_balance":1000000000}'


def test_an_id_that_no_consumer_would_take_is_not_sent() -> None:
    with pytest.raises(EnvelopeError, match="ce_id"):
        build_command_message(sample("OpenWallet"), command_id="a\nb", time_ms=NOW_MS)


# --- Events ------------------------------------------------------------------------------------------------------


def test_an_event_carries_its_record_its_version_and_what_caused_it() -> None:
    message = build_event_message(EMITTED, answer=ANSWER, trace=TraceContext(TRACEPARENT))

    assert (message.topic, message.key, message.value) == ("payment.events", b"17850", EMITTED.body.encode())
    assert decode_headers(message.headers) == Envelope(
        id="e-1",
        type="WalletOpened",
        source="concord:/domains/payment",
        time_ms=NOW_MS + 7,
        subject="payment.wallets/17850",
        correlation_id="root",
        causation_id="c-1",
        data_schema="concord:/schemas/payment/WalletOpened/1",
        record_version=1,
        tx_id="tx-1",
        traceparent=TRACEPARENT,
    )


def test_a_consumer_reads_the_event_that_was_emitted() -> None:
    parsed = parse_event(delivered(build_event_message(EMITTED, answer=ANSWER)), registry=REGISTRY)

    assert parsed.event == OPENED
    assert (parsed.id, parsed.key, parsed.subject, parsed.record_version) == (
        "e-1",
        "17850",
        "payment.wallets/17850",
        1,
    )
    assert (parsed.correlation_id, parsed.causation_id, parsed.tx_id) == ("root", "c-1", "tx-1")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"key": b"17851"}, "key_mismatch"),
        ({"value": b"{}"}, "wrong_shape"),
        ({"value": b"x"}, "not_json"),
        ({"headers": ()}, "bad_headers"),
        ({"headers": raw_command().headers}, "unknown_type"),
    ],
    ids=str,
)
def test_an_event_that_cannot_be_read_is_told_apart(changes: dict[str, Any], reason: str) -> None:
    raw = delivered(build_event_message(EMITTED, answer=ANSWER), **changes)

    with pytest.raises(DeadLetterError) as unreadable:
        parse_event(raw, registry=REGISTRY)

    assert unreadable.value.reason == reason


def test_an_event_published_again_is_the_same_message() -> None:
    stored = Answer.from_json(ANSWER.to_json())

    assert build_event_message(stored.events[0], answer=stored) == build_event_message(EMITTED, answer=ANSWER)


@pytest.mark.parametrize("key", ["a\nb", "a\u2028b", "x" * 5_000, "100%", "東京都"])
def test_a_committed_event_can_be_published_whatever_its_records_key(key: str) -> None:
    event = EMITTED.model_copy(update={"subject": f"payment.wallets/{key}"})

    subject = decode_headers(build_event_message(event, answer=ANSWER).headers).subject

    assert subject is not None
    assert subject.startswith("payment.wallets/")


# --- Answers -----------------------------------------------------------------------------------------------------


JSON_OBJECTS = st.dictionaries(st.text(max_size=5), st.integers(-9, 9) | st.text(max_size=5) | st.none(), max_size=3)
EVENTS = st.builds(EmittedEvent, **dict.fromkeys(("id", "key", "body", "subject"), st.text(max_size=8)))
ANSWERS = st.builds(
    Answer,
    **dict.fromkeys(("id", "type", "key", "digest", "reason", "correlation_id"), st.text(max_size=8)),
    status=st.sampled_from(["committed", "refused", "dead-lettered"]),
    tx_id=st.none() | st.text(max_size=5),
    detail=JSON_OBJECTS,
    result=st.none() | JSON_OBJECTS,
    events=st.lists(EVENTS, max_size=2).map(tuple),
)


@given(ANSWERS)
@settings(max_examples=100, deadline=None)
def test_an_answer_comes_back_as_it_was_stored(answer: Answer) -> None:
    assert Answer.from_json(answer.to_json()) == answer


def test_an_answer_of_a_newer_writer_is_read_without_what_is_unknown() -> None:
    body = json.loads(ANSWER.to_json()) | {"mood": "good"}

    assert Answer.from_json(json.dumps(body)) == ANSWER


def test_a_result_is_published_under_the_commands_key_and_names_the_command() -> None:
    message = build_result_message(ANSWER, domain="payment")
    envelope = decode_headers(message.headers)

    assert (message.topic, message.key) == ("payment.results", b"17850")
    assert Answer.from_json(message.value or b"") == ANSWER
    assert (envelope.type, envelope.causation_id, envelope.correlation_id) == ("Answer", "c-1", "root")
    assert (envelope.time_ms, envelope.tx_id) == (NOW_MS + 7, "tx-1")


def test_a_result_published_again_is_the_same_message() -> None:
    assert build_result_message(ANSWER, domain="payment") == build_result_message(ANSWER, domain="payment")


def test_an_id_conflict_is_another_message_than_the_first_answer() -> None:
    conflict = Answer(
        id="c-1",
        type="OpenWallet",
        key="17850",
        status="refused",
        reason=ID_CONFLICT,
        digest="d2",
        received_at_ms=NOW_MS + 60,
    )
    first = decode_headers(build_result_message(ANSWER, domain="payment").headers)
    second = decode_headers(build_result_message(conflict, domain="payment").headers)

    assert first.id != second.id
    assert first.causation_id == second.causation_id == "c-1"
    assert second.time_ms == NOW_MS + 60


def test_the_same_command_id_under_another_key_has_another_result_id() -> None:
    other = ANSWER.model_copy(update={"key": "17851"})

    ids = {decode_headers(build_result_message(answer, domain="payment").headers).id for answer in (ANSWER, other)}

    assert len(ids) == 2


def test_an_answer_to_a_command_without_key_can_be_published() -> None:
    answer = ANSWER.model_copy(update={"key": "", "status": "dead-lettered", "reason": "missing_key"})

    assert build_result_message(answer, domain="payment").key is None


def test_status_shows_what_the_contract_names() -> None:
    status = ANSWER.to_status()

    assert (
        status
        | {
            "id": "c-1",
            "type": "OpenWallet",
            "key": "17850",
            "status": "committed",
            "reason": None,
            "result": {"balance": 100},
            "tx_id": "tx-1",
            "committed_at": "2010-12-01T08:26:00.130Z",
            "events": ["e-1"],
        }
        == status
    )
    assert json.loads(json.dumps(status)) == status


def test_a_refusal_shows_its_reason() -> None:
    refused = Answer(
        id="c-1",
        type="PlaceOrder",
        key="17850",
        status="refused",
        reason="out_of_stock",
        detail={"product_id": "85123A"},
        digest="d",
        received_at_ms=NOW_MS,
        committed_at_ms=NOW_MS,
    )

    status = refused.to_status()

    assert (status["status"], status["reason"], status["detail"]) == (
        "refused",
        "out_of_stock",
        {"product_id": "85123A"},
    )


def test_the_status_of_an_unknown_command_has_the_same_fields() -> None:
    assert unknown_status("c-9")["status"] == "unknown"
    assert unknown_status("c-9").keys() <= ANSWER.to_status().keys()


# --- Dead letters ------------------------------------------------------------------------------------------------


def test_a_dead_letter_keeps_key_value_and_headers_byte_for_byte() -> None:
    headers = (("ce_id", b"\xff"), ("ce_id", b"again"), ("empty", None), ("mine", b"\x00"))
    raw = raw_command(key=b"\xfe\x00", value=b"\x80\x04not json", headers=headers)

    message = build_dead_letter(raw, reason="bad_headers", detail="not_utf8: ce_id", command_id="c-1")

    assert (message.topic, message.key, message.value) == ("orders.commands.dlq", b"\xfe\x00", b"\x80\x04not json")
    assert message.headers[: len(headers)] == headers


def test_a_dead_letter_says_why_and_where_it_came_from() -> None:
    raw = raw_command()

    message = build_dead_letter(
        raw, reason="handler_error", detail="boom", command_id="c-1", attempts=10, consumer_group="concord-orders"
    )

    assert dict(message.headers[len(raw.headers) :]) == {
        "dlq-reason": b"handler_error",
        "dlq-detail": b"boom",
        "dlq-command-id": b"c-1",
        "dlq-original-topic": b"orders.commands",
        "dlq-original-partition": b"3",
        "dlq-original-offset": b"41",
        "dlq-original-timestamp": str(NOW_MS + 5).encode(),
        "dlq-consumer-group": b"concord-orders",
        "dlq-attempts": b"10",
    }


def test_a_dead_letter_can_be_sent_again_as_the_command_it_was() -> None:
    raw = raw_command()
    message = build_dead_letter(raw, reason="handler_error", detail="a bug, since mended", command_id="c-1")

    again = delivered(message, topic=raw.topic)

    assert parse_command(again, domain="orders").command == sample("PlaceOrder")


def test_the_bytes_of_a_value_that_was_left_out_are_put_back() -> None:
    raw = raw_command(value=None, oversize=2_000_000)

    message = build_dead_letter(raw, reason="too_large", detail="", command_id="c-1", value=b"x" * 2_000_000)

    assert message.value == b"x" * 2_000_000


def test_a_missing_key_and_a_missing_value_stay_missing() -> None:
    message = build_dead_letter(raw_command(key=None, value=None), reason="not_json", detail="", command_id="c-1")

    assert message.key is None
    assert message.value is None


def test_a_detail_of_any_length_and_kind_fits_a_header() -> None:
    message = build_dead_letter(raw_command(), reason="handler_error", detail="\ud800" * 99_999, command_id="c-1")

    assert len(dict(message.headers)["dlq-detail"] or b"") < 8_000
