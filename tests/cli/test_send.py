"""What `concord send` takes, and how it puts what it is given into messages."""

from __future__ import annotations

import asyncio
import io
import json
from types import SimpleNamespace
from typing import Any

import pytest

from infra.messaging.errors import MessageTooLargeError
from schemas.envelope import RawMessage, parse_command
from scripts.cli.send_command import InvalidCommandError, Outgoing, _for_people, _outcome, outgoing, raw, read_lines

WALLET = b'{"customer_id": "alice", "currency": "GBP", "initial_balance": 5}'


def sent(body: bytes = WALLET, type: str = "OpenWallet", **given: Any) -> Outgoing:
    return outgoing(type, body, **({"key": None, "id": None, "time_ms": 1_600_000_000_000} | given))


def as_read(message: Outgoing) -> RawMessage:
    """The message as its home reads it from the topic."""
    out = message.message
    return RawMessage(out.topic, 0, 0, 0, out.key, out.headers, out.value)


def test_a_command_carries_the_routing_key_of_its_body_and_a_new_id() -> None:
    one, other = sent(), sent()

    assert (one.key, one.message.key, one.message.topic) == ("alice", b"alice", "payment.commands")
    assert one.id != other.id
    assert parse_command(as_read(one), domain="payment").id == one.id


def test_a_given_id_is_used_and_a_given_key_is_used_right_or_wrong() -> None:
    message = sent(key="bob", id="mine")

    assert (message.id, message.message.key) == ("mine", b"bob")


def test_the_digest_is_the_one_that_the_answer_will_carry() -> None:
    message = sent()

    assert message.digest == parse_command(as_read(message), domain="payment").digest


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"nonsense", "malformed"),
        (b"[]", "not_an_object"),
        (b'{"customer_id": "a", "customer_id": "b", "currency": "GBP"}', "repeated_name"),
        (b'{"customer_id": "a", "currency": "GBP", "initial_balance": NaN}', "not_a_number"),
        (b'{"customer_id": "a", "currency": "GBP", "initial_balance": 9223372036854775808}', "number_out_of_range"),
        (b'{"customer_id": "a", "currency": "GBP", "initial_balance": -1}', "initial_balance: "),
        (b'{"customer_id": "a", "currency": "GBP", "balance": 1}', "balance: Extra inputs are not permitted"),
        (b'{"customer_id": "\\ud800", "currency": "GBP"}', "lone_surrogate"),
        (b'{"currency": "GBP"}', "customer_id: Field required"),
    ],
)
def test_a_body_that_its_model_would_not_take_is_refused_before_anything_is_sent(body: bytes, why: str) -> None:
    with pytest.raises(InvalidCommandError, match="OpenWallet") as refused:
        sent(body)

    assert why in str(refused.value)


def test_an_unknown_type_is_refused_with_those_there_are() -> None:
    with pytest.raises(InvalidCommandError, match=r"'Opensesame' is no command. There are: .*OpenWallet"):
        sent(type="Opensesame")


def test_an_id_that_no_consumer_would_take_is_refused() -> None:
    with pytest.raises(InvalidCommandError, match="cannot be sent"):
        sent(id="x" * 300)


def test_raw_sends_bytes_unlooked_at_with_the_headers_asked_for() -> None:
    message = raw(
        "OpenWallet",
        b"\x80garbage",
        key="k",
        id="mine",
        topic=None,
        headers=["ce_source=", "ce_dataschema=concord:/schemas/payment/OpenWallet/99", "extra=1"],
        time_ms=0,
    )
    headers = dict(message.message.headers)

    assert (message.message.topic, message.message.value, message.message.key) == (
        "payment.commands",
        b"\x80garbage",
        b"k",
    )
    assert headers["ce_dataschema"].endswith(b"/99")
    assert headers["extra"] == b"1"
    assert "ce_source" not in headers
    assert message.id == "mine"


def test_raw_without_an_id_has_none_to_wait_for() -> None:
    message = raw("OpenWallet", b"{}", key=None, id=None, topic=None, headers=["ce_id="], time_ms=0)

    assert message.id is None
    assert message.message.key is None


def test_raw_of_an_unknown_type_must_be_told_its_topic() -> None:
    with pytest.raises(InvalidCommandError, match="--topic"):
        raw("Nonsense", b"{}", key=None, id=None, topic=None, headers=[], time_ms=0)

    named = raw("Nonsense", b"{}", key=None, id=None, topic="orders.commands", headers=[], time_ms=0)
    assert named.message.topic == "orders.commands"


def test_lines_are_commands_in_order_and_a_bad_line_spoils_no_other() -> None:
    good = {"type": "OpenWallet", "id": "1", "body": json.loads(WALLET)}
    lines = [
        json.dumps(good),
        "",
        "not json",
        json.dumps({**good, "id": 5}),
        json.dumps({**good, "colour": "red"}),
        json.dumps({"type": "OpenWallet"}),
        json.dumps({**good, "id": "2", "key": "bob"}),
    ]

    found = list(read_lines(io.BytesIO("\n".join(lines).encode()), time_ms=0))

    assert [each.id if isinstance(each, Outgoing) else (each["line"], each["status"]) for each in found] == [
        "1",
        (3, "invalid"),
        (4, "invalid"),
        (5, "invalid"),
        (6, "invalid"),
        "2",
    ]
    assert isinstance(found[-1], Outgoing)
    assert found[-1].message.key == b"bob"


class SmallClient:
    """A client to whose broker every message is too large."""

    def submit(self, message: Any, **named: Any) -> Any:
        refused = asyncio.get_running_loop().create_future()
        refused.set_exception(MessageTooLargeError(message.topic, 9, 8))
        return SimpleNamespace(answer=refused, delivered=refused)


@pytest.mark.parametrize("wait_s", [0.0, 5.0])
async def test_of_many_commands_one_that_is_too_large_holds_up_no_other(wait_s: float) -> None:
    client: Any = SmallClient()

    outcome = await _outcome(client, sent(id="c-1"), wait_s, many=True)

    said = "A message of 9 bytes for payment.commands exceeds the limit of 8 bytes."
    assert (outcome["id"], outcome["status"], outcome["reason"]) == ("c-1", "invalid", said)
    assert _for_people(outcome) == f"invalid  c-1: {said}"
    with pytest.raises(MessageTooLargeError):
        await _outcome(client, sent(), wait_s, many=False)
