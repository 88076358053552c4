"""A record whose header has a name that is not UTF-8: Kafka stores it, and nothing behind it is held up."""

from __future__ import annotations

import pytest
from strange_records import publish_with_names

from infra.messaging.reader import read_all
from infra.servers.kafka import LocalKafka
from schemas.envelope import DeadLetterError, RawMessage, parse_command
from tests.servers.kafka_fixture import fresh_topic

pytestmark = pytest.mark.system


@pytest.mark.parametrize("compressed", [False, True])
async def test_kafka_stores_header_names_that_are_not_utf8_and_they_are_read_with_all_around_them(
    kafka: LocalKafka, compressed: bool
) -> None:
    topic = await fresh_topic(kafka)
    records = [
        (b"k", b"0", [(b"ce_id", b"a")]),
        (b"k", b"1", [(b"na\xff\xfeme", b"\xff"), (b"ce_id", b"b")]),
        (b"k", b"2", [("schön".encode(), b"")]),
    ]

    await publish_with_names(kafka.bootstrap_servers, topic, records, compressed=compressed)
    read = [record async for record in read_all(kafka.bootstrap_servers, [topic])]

    assert [(record.offset, record.value, record.headers) for record in read] == [
        (0, b"0", (("ce_id", b"a"),)),
        (1, b"1", (("na\ufffd\ufffdme", b"\xff"), ("ce_id", b"b"))),
        (2, b"2", (("schön", b""),)),
    ]


def test_a_command_with_such_a_header_is_a_dead_letter_whatever_else_it_says() -> None:
    headers = (("ce_specversion", b"1.0"), ("ce_id", b"c1"), ("ce_type", b"TopUpWallet"), ("ce_source", b"s"))
    raw = RawMessage("payment.commands", 2, 7, 0, b"c", (*headers, ("na\ufffdme", b"")), b"{}")

    with pytest.raises(DeadLetterError) as found:
        parse_command(raw, domain="payment")

    assert (found.value.reason, found.value.command_id) == ("bad_headers", "c1")
    with pytest.raises(DeadLetterError) as found:
        parse_command(RawMessage("payment.commands", 2, 7, 0, b"c", (("\ufffd", b""),), b"{}"), domain="payment")
    assert (found.value.reason, found.value.command_id) == ("bad_headers", "unreadable:payment.commands:2:7")
