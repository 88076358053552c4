"""The checker is itself checked: a good history passes, and each planted fault is found and named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from infra.messaging.reader import Record
from schemas.envelope import RawMessage, parse_command
from schemas.outcome import Answer, EmittedEvent
from scripts.cli.check import CommandName, Topics, check_outcomes, identity
from scripts.cli.send_command import Outgoing, outgoing, raw

A: CommandName = ("payment", "alice", "a")
B: CommandName = ("payment", "alice", "b")
DEAD: CommandName = ("orders", "bob", "dead")
History = tuple[Topics, dict[CommandName, Answer]]


def event(id: str) -> EmittedEvent:
    return EmittedEvent(
        id=id, type="T", domain="payment", key="alice", body="{}", subject="s", record_version=1, data_schema="x"
    )


def answer(name: CommandName, **given: Any) -> Answer:
    values: dict[str, Any] = {"status": "committed", "digest": f"digest-{name[2]}", "received_at_ms": 1}
    return Answer(**(values | {"id": name[2], "type": "T", "key": name[1]} | given))


def history() -> History:
    """Two commands with events, one of them also sent with another payload, and a dead letter."""
    topics = Topics()
    topics.commands |= {A: ["digest-a", "other"], B: ["digest-b"], DEAD: ["digest-dead"]}
    topics.results = {
        ("payment", "a", "digest-a"),
        ("payment", "a", "other"),
        ("payment", "b", "digest-b"),
        ("orders", "dead", "digest-dead"),
    }
    topics.conflicts = {("payment", "a", "other")}
    topics.events = {"e1": "a", "e2": "a", "e3": "b", "pruned": "long-ago"}
    topics.dead_letters = {("orders", "dead")}
    outcomes = {
        A: answer(A, events=(event("e1"), event("e2"))),
        B: answer(B, events=(event("e3"),)),
        DEAD: answer(DEAD, status="dead-lettered", reason="not_json"),
        ("payment", "alice", "older"): answer(("payment", "alice", "older"), events=(event("old"),)),
    }
    return topics, outcomes


def test_a_good_history_has_no_offenders() -> None:
    assert check_outcomes(*history()) == []


def _lose_outcome(topics: Topics, outcomes: dict[CommandName, Answer]) -> None:
    del outcomes[B]


def _lose_result(topics: Topics, outcomes: dict[CommandName, Answer]) -> None:
    topics.results.discard(("payment", "b", "digest-b"))


def _answer_other_payload(topics: Topics, outcomes: dict[CommandName, Answer]) -> None:
    outcomes[B] = answer(B, digest="never sent", events=(event("e3"),))


def _no_conflict(topics: Topics, outcomes: dict[CommandName, Answer]) -> None:
    topics.conflicts.clear()


def _conflict_for_the_first(topics: Topics, outcomes: dict[CommandName, Answer]) -> None:
    topics.conflicts.add(("payment", "b", "digest-b"))


def _lose_dead_letter(topics: Topics, outcomes: dict[CommandName, Answer]) -> None:
    topics.dead_letters.clear()


def _dead_letter_of_a_committed_one(topics: Topics, outcomes: dict[CommandName, Answer]) -> None:
    topics.dead_letters.add(("payment", "a"))


def _lose_event(topics: Topics, outcomes: dict[CommandName, Answer]) -> None:
    del topics.events["e3"]


def _stray_event(topics: Topics, outcomes: dict[CommandName, Answer]) -> None:
    topics.events["phantom"] = "a"


def _shared_event(topics: Topics, outcomes: dict[CommandName, Answer]) -> None:
    outcomes[B] = answer(B, events=(event("e1"), event("e3")))


@pytest.mark.parametrize(
    ("plant", "found"),
    [
        (_lose_outcome, "payment command b (key alice) has no outcome"),
        (_lose_result, "payment command b (key alice) has no result on payment.results"),
        (_answer_other_payload, "payment command b (key alice): its outcome answers another payload"),
        (_no_conflict, "payment command a (key alice): `id_conflict` was answered to the wrong payload"),
        (_conflict_for_the_first, "payment command b (key alice): `id_conflict` was answered to the wrong payload"),
        (_lose_dead_letter, "orders command dead (key bob) is dead-lettered, but not on orders.commands.dlq"),
        (_dead_letter_of_a_committed_one, "payment command a is on payment.commands.dlq, but its outcome is another"),
        (_lose_event, "event e3 (T) of command b is not on payment.events"),
        (_stray_event, "event phantom was published for command a, whose outcome does not name it"),
        (_shared_event, "event e1 belongs to two commands, a and b"),
    ],
)
def test_a_planted_fault_is_found(plant: Callable[[Topics, dict[CommandName, Answer]], None], found: str) -> None:
    topics, outcomes = history()
    plant(topics, outcomes)

    assert found in check_outcomes(topics, outcomes)


def record(message: Outgoing) -> Record:
    out = message.message
    headers = tuple((name, value or b"") for name, value in out.headers)
    return Record(out.topic, 2, 7, 99, out.key, out.value, headers)


def test_a_command_is_identified_as_its_home_identifies_it() -> None:
    body = b'{"customer_id": "alice", "currency": "GBP"}'
    sent = record(outgoing("OpenWallet", body, key=None, id="a", time_ms=0))
    parsed = parse_command(
        RawMessage(sent.topic, sent.partition, sent.offset, 0, sent.key, sent.headers, sent.value), domain="payment"
    )

    assert identity(sent, "payment", 1000) == ("alice", "a", parsed.digest)


def test_what_cannot_be_read_is_identified_by_its_place() -> None:
    unreadable = record(raw("OpenWallet", b"\x80", key="k", id=None, topic=None, headers=["ce_id="], time_ms=0))

    key, id, _ = identity(unreadable, "payment", 1000)

    assert (key, id) == ("k", "unreadable:payment.commands:2:7")


def test_what_is_too_large_is_identified_by_its_length() -> None:
    def digest(size: int) -> str:
        large = raw("OpenWallet", b"x" * size, key="k", id="a", topic=None, headers=[], time_ms=0)
        return identity(record(large), "payment", 1000)[2]

    assert digest(2000) == digest(2000) != digest(2001)
