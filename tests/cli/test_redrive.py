"""Dead letters that go out again: the same command under a new id, whoever asks how often."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from typer.testing import CliRunner

from infra.config import Settings
from infra.messaging.reader import Record
from schemas.envelope import RawMessage, build_command_message, build_dead_letter, decode_headers, parse_command
from schemas.message import Command
from schemas.orders import CancelOrder
from schemas.payment import TopUpWallet
from schemas.trace_context import TraceContext, trace_context_of
from scripts.cli.main import app
from scripts.cli.redrive_command import Choice, DeadLetter, known_for_hours

TRACE = TraceContext("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
COMMAND = TopUpWallet(customer_id="c", payment_id="p", amount=5, currency="GBP")


def dead(
    id: str, *, offset: int = 7, reason: str = "unknown_version", command: Command = COMMAND, died_ms: int = 1
) -> Record:
    """The command `id`, which lay at `offset`, as its dead-letter topic holds it."""
    message = build_command_message(command, command_id=id, time_ms=1, correlation_id="root", trace=TRACE)
    raw = RawMessage(message.topic, 2, offset, 1, message.key, message.headers, message.value)
    letter = build_dead_letter(raw, reason=reason, detail="", command_id=id)
    headers = tuple((name, value or b"") for name, value in letter.headers)
    return Record(letter.topic, 0, offset, died_ms, letter.key, letter.value, headers)


def choice_of(records: Sequence[Record], **wanted: Any) -> Choice:
    choice = Choice(**wanted)
    for record in records:
        choice.take(record)
    return choice


def ids(records: Sequence[Record], **wanted: Any) -> list[str]:
    return [letter.id for letter in choice_of(records, **wanted).letters()]


def test_a_dead_letter_goes_out_as_the_same_command_under_a_new_id_with_the_old_one_as_its_cause() -> None:
    record = dead("c-1")

    out = DeadLetter.of(record).again()

    headers = decode_headers(out.message.headers)
    assert out.message.topic == "payment.commands"
    assert (out.message.key, out.message.value) == (record.key, record.value)
    assert headers.id == out.id != "c-1"
    assert (headers.causation_id, headers.correlation_id) == ("c-1", "root")
    assert trace_context_of(out.message.headers) == TRACE
    assert not [name for name, _ in out.message.headers if name.startswith("dlq-")]
    raw = RawMessage(out.message.topic, 0, 0, 1, out.message.key, out.message.headers, out.message.value)
    assert parse_command(raw, domain="payment").command == COMMAND


def test_whoever_redrives_a_dead_letter_again_sends_the_same_command() -> None:
    assert DeadLetter.of(dead("c-1")).new_id == DeadLetter.of(dead("c-1")).new_id
    assert DeadLetter.of(dead("c-1")).new_id != DeadLetter.of(dead("c-2")).new_id


def test_a_command_that_its_sender_repeated_is_redriven_as_one() -> None:
    once, repeated = dead("c-1", offset=7), dead("c-1", offset=8)

    assert DeadLetter.of(once).new_id == DeadLetter.of(repeated).new_id
    assert ids([once, repeated]) == ["c-1"]


def test_commands_of_one_id_with_other_keys_or_in_other_domains_are_others() -> None:
    letters = [
        dead("c-1"),
        dead("c-1", command=COMMAND.model_copy(update={"customer_id": "another"})),
        dead("c-1", command=CancelOrder(customer_id="c", order_id="o")),
    ]

    assert ids(letters) == ["c-1"] * 3
    assert len({DeadLetter.of(letter).new_id for letter in letters}) == 3


def test_dead_letters_are_chosen_by_reason_and_by_id_each_once() -> None:
    records = [dead("c-1"), dead("c-2", reason="not_json"), dead("c-1", offset=8), dead("c-3")]

    assert ids(records) == ["c-1", "c-2", "c-3"]
    assert ids(records, reason="unknown_version") == ["c-1", "c-3"]
    assert ids(records, id="c-3") == ["c-3"]
    assert ids(records, reason="not_json", id="c-3") == []


def test_one_that_died_again_goes_out_in_place_of_the_one_that_it_came_from() -> None:
    first = dead("c-1")
    again = DeadLetter.of(first).new_id
    records = [first, dead(again, offset=20, reason="handler_error")]

    assert ids(records) == ids(records, id="c-1") == ids(records, id=again) == [again]
    assert ids(records, reason="unknown_version") == []
    third = DeadLetter.of(records[1]).new_id
    assert ids([*records, dead(third, offset=30)], id="c-1") == [third]


def test_one_so_old_that_its_successor_may_be_forgotten_stays_where_it_is() -> None:
    hour_ms = 3_600_000
    # c-1 was sent again lately. Had it been redriven after its first death, nobody would know any more.
    records = [dead("c-1", died_ms=0), dead("c-2", died_ms=5 * hour_ms), dead("c-1", offset=9, died_ms=9 * hour_ms)]

    choice = choice_of(records, not_before_ms=2 * hour_ms)

    assert [letter.id for letter in choice.letters()] == ["c-2"]
    assert choice.too_old == 1
    assert ids(records) == ["c-1", "c-2"]
    # The answer is kept for a week, and the command may have waited for three days to be carried out.
    assert known_for_hours(Settings()) == 96


def test_a_dead_letter_without_a_readable_id_gets_one() -> None:
    raw = RawMessage("payment.commands", 1, 3, 1, b"k", (("content-type", b"\xff"),), b"\x80")
    letter = build_dead_letter(raw, reason="bad_headers", detail="", command_id="unreadable:payment.commands:1:3")
    record = Record(letter.topic, 0, 0, 1, letter.key, letter.value, tuple((n, v or b"") for n, v in letter.headers))

    out = DeadLetter.of(record).again()

    headers = dict(out.message.headers)
    assert (headers["ce_id"], headers["content-type"]) == ((out.id or "").encode(), b"\xff")
    assert headers["ce_causationid"] == b"unreadable:payment.commands:1:3"


@pytest.mark.parametrize("arguments", [[], ["payment.commands.dlq"], ["--dry-run"]])
def test_nothing_is_redriven_by_accident(arguments: list[str]) -> None:
    told = CliRunner().invoke(app, ["redrive", *arguments])

    assert told.exit_code == 2
    assert "--all" in told.output


def test_the_headers_that_a_command_died_of_are_not_in_the_one_that_goes_out() -> None:
    unreadable = "unreadable:payment.commands:1:3"
    message = build_command_message(COMMAND, command_id="c-1", time_ms=1)
    headers = (*((name, value) for name, value in message.headers if name != "ce_id"), ("ce_id", b"\xff"))
    raw = RawMessage(message.topic, 1, 3, 1, message.key, headers, message.value)
    letter = build_dead_letter(raw, reason="bad_headers", detail="", command_id=unreadable)
    record = Record(letter.topic, 0, 0, 1, letter.key, letter.value, tuple((n, v or b"") for n, v in letter.headers))

    out = DeadLetter.of(record).again()

    again = RawMessage(out.message.topic, 0, 0, 1, out.message.key, out.message.headers, out.message.value)
    parsed = parse_command(again, domain="payment")
    assert (parsed.id, parsed.causation_id, parsed.correlation_id) == (out.id, unreadable, "c-1")
