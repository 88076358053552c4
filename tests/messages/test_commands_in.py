"""From a Kafka record to a command, or to the one reason why not."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from message_samples import BODIES, NOW_MS, as_value, body_of, raw_command, sample, with_header, without_header

from schemas.envelope import DeadLetterError, RawMessage, parse_command, payload_digest
from schemas.registry import default_registry

REGISTRY = default_registry()
MIB = 1 << 20


@pytest.mark.parametrize("type_name", REGISTRY.commands)
def test_every_command_comes_back_as_it_was_sent(type_name: str) -> None:
    command = sample(type_name)

    parsed = parse_command(raw_command(type_name), domain=command.domain)

    assert parsed.command == command
    assert (parsed.id, parsed.type, parsed.key) == ("c-1", type_name, command.routing_key)
    assert (parsed.version, parsed.domain) == (command.version, command.domain)


def test_there_are_samples_of_commands_only() -> None:
    assert BODIES.keys() == REGISTRY.commands.keys()


def test_a_parsed_command_says_where_it_lay_and_when() -> None:
    parsed = parse_command(raw_command(), domain="orders")

    assert (parsed.topic, parsed.partition, parsed.offset) == ("orders.commands", 3, 41)
    assert (parsed.time_ms, parsed.timestamp_ms) == (NOW_MS, NOW_MS + 5)


def test_without_a_time_of_its_own_a_command_has_the_brokers() -> None:
    raw = raw_command()

    parsed = parse_command(raw_command(headers=without_header(raw.headers, "ce_time")), domain="orders")

    assert parsed.time_ms == NOW_MS + 5


def test_without_a_correlation_id_a_command_is_where_things_begin() -> None:
    raw = raw_command()

    parsed = parse_command(raw_command(headers=without_header(raw.headers, "ce_correlationid")), domain="orders")

    assert parsed.correlation_id == "c-1"


def without(body: dict[str, Any], name: str) -> dict[str, Any]:
    return {field: value for field, value in body.items() if field != name}


def order(**changes: Any) -> bytes:
    return as_value(body_of(raw_command()) | changes)


def order_line(**changes: Any) -> bytes:
    line = body_of(raw_command())["lines"][0]
    return order(lines=[line | changes])


def order_with(literal: bytes) -> bytes:
    """The order with this JSON text for the quantity of its line."""
    value = raw_command().value
    assert value is not None
    return value.replace(b'"quantity":6', b'"quantity":' + literal)


HEADERS = raw_command().headers

BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    # name: (fields of the record that differ, reason, what the detail tells)
    "not JSON": ({"value": b"hello"}, "not_json", "malformed"),
    "nothing": ({"value": b""}, "not_json", "empty"),
    "null": ({"value": None}, "not_json", "empty"),
    "not UTF-8": ({"value": b"\xff\xfe\xfd"}, "not_json", "byte_order_mark"),
    "a pickle": ({"value": pickle.dumps({"order_id": "1"})}, "not_json", "not_utf8"),
    "a pickle that would run": (
        {"value": b"cos\nsystem\n(S'touch /tmp/unpickled'\ntR."},
        "not_json",
        "malformed",
    ),
    "NaN": ({"value": order_with(b"NaN")}, "not_json", "NaN"),
    "Infinity": ({"value": order_with(b"-Infinity")}, "not_json", "Infinity"),
    "2**63": ({"value": order_with(b"9223372036854775808")}, "wrong_shape", "number_out_of_range"),
    "1e999": ({"value": order_with(b"1e999")}, "wrong_shape", "number_out_of_range"),
    "a lone surrogate": ({"value": order(order_id="\ud800")}, "wrong_shape", "lone_surrogate"),
    "NUL": ({"value": order(order_id="a\0b")}, "wrong_shape", "nul_character"),
    "a name twice": ({"value": order_with(b'6,"quantity":7')}, "wrong_shape", "repeated_name"),
    "10,000 deep": ({"value": order_with(b"[" * 10_000 + b"]" * 10_000)}, "wrong_shape", "too_deep"),
    "a megabyte of lines": ({"value": order(lines=[{}] * 260_000)}, "wrong_shape", "too_many_items"),
    "an array": ({"value": b"[]"}, "wrong_shape", "not_an_object"),
    "an empty object": ({"value": b"{}"}, "wrong_shape", "order_id: Field required"),
    "a field too few": ({"value": as_value(without(body_of(raw_command()), "lines"))}, "wrong_shape", "lines"),
    "no lines": ({"value": order(lines=[])}, "wrong_shape", "lines"),
    "a negative quantity": ({"value": order_line(quantity=-6)}, "wrong_shape", "lines.0.quantity"),
    "a quantity of nothing": ({"value": order_line(quantity=0)}, "wrong_shape", "lines.0.quantity"),
    "a quantity as text": ({"value": order_line(quantity="6")}, "wrong_shape", "lines.0.quantity"),
    "a quantity as a fraction": ({"value": order_line(quantity=6.0)}, "wrong_shape", "lines.0.quantity"),
    "a quantity that is true": ({"value": order_line(quantity=True)}, "wrong_shape", "lines.0.quantity"),
    "a negative price": ({"value": order_line(unit_price=-1)}, "wrong_shape", "lines.0.unit_price"),
    "a currency in lower case": ({"value": order(currency="gbp")}, "wrong_shape", "currency"),
    "an order id of 201 characters": ({"value": order(order_id="x" * 201)}, "wrong_shape", "order_id"),
    "a line feed in the order id": ({"value": order(order_id="a\nb")}, "wrong_shape", "order_id"),
    "an unknown type": ({"headers": with_header(HEADERS, "ce_type", b"PlaceOrdr")}, "bad_headers", "bad_dataschema"),
    "an unknown type without schema": (
        {"headers": with_header(without_header(HEADERS, "ce_dataschema"), "ce_type", b"PlaceOrdr")},
        "unknown_type",
        "PlaceOrdr",
    ),
    "an event as a command": (
        {"headers": with_header(without_header(HEADERS, "ce_dataschema"), "ce_type", b"OrderPlaced")},
        "unknown_type",
        "OrderPlaced",
    ),
    "a command of another domain": (
        {"headers": with_header(without_header(HEADERS, "ce_dataschema"), "ce_type", b"OpenWallet")},
        "unknown_type",
        "payment.commands",
    ),
    "a version to come": (
        {"headers": with_header(HEADERS, "ce_dataschema", b"concord:/schemas/orders/PlaceOrder/99")},
        "unknown_version",
        "PlaceOrder/99; understood: 1",
    ),
    "no headers": ({"headers": ()}, "bad_headers", "ce_specversion"),
    "no id": ({"headers": without_header(HEADERS, "ce_id")}, "bad_headers", "ce_id"),
    "an id with a line feed": ({"headers": with_header(HEADERS, "ce_id", b"a\nb")}, "bad_headers", "ce_id"),
    "a header that is not UTF-8": ({"headers": with_header(HEADERS, "ce_source", b"\xff")}, "bad_headers", "ce_source"),
    "a bad time": ({"headers": with_header(HEADERS, "ce_time", b"yesterday")}, "bad_headers", "yesterday"),
    "another content type": (
        {"headers": with_header(HEADERS, "content-type", b"application/x-pickle")},
        "bad_headers",
        "x-pickle",
    ),
    "a million headers": ({"headers": HEADERS + (("h", b""),) * 1_000_000}, "bad_headers", "too_many_headers"),
    "over 1 MiB": ({"value": order(note="x" * MIB)}, "too_large", "1048576"),
    "over 1 MiB, left out": ({"value": None, "oversize": 3 * MIB}, "too_large", str(3 * MIB)),
    "no key": ({"key": None}, "missing_key", "no key"),
    "an empty key": ({"key": b""}, "missing_key", "no key"),
    "the key of another customer": ({"key": b"17851"}, "key_mismatch", "17851"),
    "a key that is not UTF-8": ({"key": b"\xff"}, "key_mismatch", "xff"),
    "a key with a space behind it": ({"key": b"17850 "}, "key_mismatch", "17850 "),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_as_a_dead_letter_with_its_reason(name: str) -> None:
    changes, reason, told = BAD[name]

    with pytest.raises(DeadLetterError) as dead:
        parse_command(raw_command(**changes), domain="orders")

    assert dead.value.reason == reason
    assert told in dead.value.detail
    assert len(dead.value.detail) < 2_000
    assert dead.value.detail.isprintable()


@pytest.mark.parametrize("name", BAD)
def test_a_dead_letter_answers_to_its_own_id_where_that_can_be_read(name: str) -> None:
    changes, _, _ = BAD[name]
    unreadable = name in ("no headers", "no id", "an id with a line feed")

    with pytest.raises(DeadLetterError) as dead:
        parse_command(raw_command(**changes), domain="orders")

    assert dead.value.id_readable is not unreadable
    assert dead.value.command_id == ("unreadable:orders.commands:3:41" if unreadable else "c-1")


@pytest.mark.parametrize("name", BAD)
def test_a_dead_letter_is_the_same_at_every_redelivery(name: str) -> None:
    changes, _, _ = BAD[name]
    ends = []
    for _ in range(2):
        with pytest.raises(DeadLetterError) as dead:
            parse_command(raw_command(**changes), domain="orders")
        ends.append((dead.value.command_id, dead.value.digest, dead.value.reason, dead.value.detail))

    assert ends[0] == ends[1]


def test_a_dead_letter_does_not_quote_the_body() -> None:
    with pytest.raises(DeadLetterError) as dead:
        parse_command(raw_command(value=order(currency="4111 1111 1111 1111", order_id=["s3cret"])), domain="orders")

    assert "4111" not in str(dead.value)
    assert "s3cret" not in str(dead.value)


@pytest.mark.parametrize("byte", [b"k", b"\xff", "東".encode()])
def test_a_key_of_megabytes_is_cut_and_still_told_apart(byte: bytes) -> None:
    """Its answer must fit a row and a message."""
    keys = set()
    for length in (1_000_000, 1_000_001):
        with pytest.raises(DeadLetterError) as dead:
            parse_command(raw_command(key=byte * length), domain="orders")
        keys.add(dead.value.key)

    assert len(keys) == 2
    assert all(len(key) < 600 for key in keys)


def test_one_bad_command_does_not_list_a_thousand_complaints() -> None:
    with pytest.raises(DeadLetterError, match=r"; and \d{4} more$") as dead:
        parse_command(raw_command(value=order(lines=[1] * 2_000, currency=1, order_id=1)), domain="orders")

    assert dead.value.detail.count(";") == 5


def test_a_value_of_exactly_the_limit_is_looked_into() -> None:
    value = raw_command().value
    assert value is not None
    padded = value + b" " * (MIB - len(value))

    assert parse_command(raw_command(value=padded), domain="orders", max_bytes=MIB).id == "c-1"
    with pytest.raises(DeadLetterError, match="too_large"):
        parse_command(raw_command(value=padded + b" "), domain="orders", max_bytes=MIB)


def test_nothing_is_unpickled() -> None:
    """A pickle as value, key and header: it ends as bytes."""

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return exec, ("raise SystemExit('unpickled')",)

    bomb = pickle.dumps(Bomb())
    for changes in ({"value": bomb}, {"key": bomb}, {"headers": (*HEADERS, ("ce_bomb", bomb))}):
        with pytest.raises(DeadLetterError):
            parse_command(raw_command(**changes), domain="orders")


# --- Strict on produce, lenient on consume -----------------------------------------------------------------------


def test_unknown_fields_pass_when_consumed() -> None:
    body = body_of(raw_command()) | {"loyalty_points": 5}
    body["lines"][0]["gift_wrap"] = True

    parsed = parse_command(raw_command(value=as_value(body)), domain="orders")

    assert parsed.command == sample("PlaceOrder")


@pytest.mark.parametrize("within", [False, True])
def test_unknown_fields_are_refused_when_produced(within: bool) -> None:
    body = body_of(raw_command())
    (body["lines"][0] if within else body)["quanttiy"] = 5

    with pytest.raises(ValueError, match="quanttiy"):
        REGISTRY.command("PlaceOrder").produce(json.dumps(body))


# --- The payload's digest ----------------------------------------------------------------------------------------


def digest_of(raw: RawMessage) -> str:
    return parse_command(raw, domain="orders").digest


def test_a_redelivery_has_the_same_digest_wherever_it_lies() -> None:
    assert digest_of(raw_command()) == digest_of(raw_command(offset=99, partition=1, timestamp_ms=NOW_MS + 1))


def test_another_payload_has_another_digest() -> None:
    assert digest_of(raw_command()) != digest_of(raw_command(value=order_line(quantity=7)))


def test_another_name_for_the_same_schema_has_the_same_digest() -> None:
    headers = with_header(HEADERS, "ce_dataschema", b"urn:elsewhere/PlaceOrder/1")

    assert digest_of(raw_command(headers=headers)) == digest_of(raw_command())


def test_type_version_and_value_cannot_be_mistaken_for_each_other() -> None:
    digests = {payload_digest("ab", "1", b"c"), payload_digest("a", "b1", b"c"), payload_digest("ab", "", b"1c")}

    assert len(digests) == 3


# --- Whatever comes ----------------------------------------------------------------------------------------------


def parses_or_dies(raw: RawMessage, domain: str) -> None:
    try:
        parsed = parse_command(raw, domain=domain)
    except DeadLetterError as dead:
        assert dead.command_id  # noqa: PT017
        assert dead.detail  # noqa: PT017
    else:
        assert parsed.key.encode() == raw.key


EDITS = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 2), st.binary(min_size=1, max_size=3)), max_size=4)


def edited(data: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """`data` with bytes replaced (from a place, so many, by these)."""
    for place, length, replacement in edits:
        place %= len(data) + 1
        data = data[:place] + replacement + data[place + length :]
    return data


@given(st.sampled_from(sorted(BODIES)), EDITS, EDITS)
@settings(max_examples=500, deadline=None)
def test_mutated_bytes_become_a_command_or_a_dead_letter(
    type_name: str, value_edits: list[tuple[int, int, bytes]], header_edits: list[tuple[int, int, bytes]]
) -> None:
    raw = raw_command(type_name)
    headers = [*raw.headers]
    for place, length, replacement in header_edits:
        name, value = headers[place % len(headers)]
        headers[place % len(headers)] = (name, edited(value or b"", [(place, length, replacement)]))
    mutated = raw_command(type_name, value=edited(raw.value or b"", value_edits), headers=tuple(headers))

    parses_or_dies(mutated, sample(type_name).domain)


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64)
    | st.floats()
    | st.sampled_from(["GBP", "851", "shipped", "", "\0", "\ud800", "'; DROP TABLE orders; --", "\u2019", "x" * 201])
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["category", "product_id", "quantity", "unit_price", "region", "x"]), inner, max_size=5
        )
    ),
    max_leaves=8,
)


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_any_values_in_a_commands_fields_become_a_command_or_a_dead_letter(data: st.DataObject) -> None:
    type_name = data.draw(st.sampled_from(sorted(BODIES)))
    changed = data.draw(st.dictionaries(st.sampled_from(sorted(REGISTRY.commands[type_name].model_fields)), ANYTHING))
    value = as_value(BODIES[type_name] | changed)

    parses_or_dies(raw_command(type_name, value=value), sample(type_name).domain)
