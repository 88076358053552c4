"""The judge sees each broken promise: a good history passes, and every planted bad one is found.

Goal: no vacuous pass. Method: one good history, made by hand from the formats' description; each case changes one
thing in it that the promises forbid.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from scripts.proof.judge import History, Judgement, Seen, judge


def headers(**named: str) -> tuple[tuple[str, bytes], ...]:
    return tuple((name.replace("__", "-"), value.encode()) for name, value in named.items())


def digest_of(type: str, value: bytes, version: str = "1") -> str:
    digest = hashlib.sha256()
    for part in (type.encode(), version.encode()):
        digest.update(len(part).to_bytes(4, "big") + part)
    digest.update(value)
    return digest.hexdigest()


def command(offset: int, id: str, value: bytes = b'{"n":1}', key: bytes = b"k") -> Seen:
    named = headers(ce_id=id, ce_type="OpenWallet", ce_dataschema="concord:/schemas/payment/OpenWallet/1")
    return Seen("payment.commands", 0, offset, key, value, named)


def event_of(id: str) -> dict[str, Any]:
    return {
        "id": f"event-{id}",
        "type": "WalletOpened",
        "domain": "payment",
        "key": "k",
        "body": json.dumps({"of": id}),
        "subject": f"payment.wallets/{id}",
        "record_version": 1,
        "data_schema": "concord:/schemas/payment/WalletOpened/1",
    }


def answer_of(id: str, *, status: str = "committed", value: bytes = b'{"n":1}', **changed: Any) -> dict[str, Any]:
    made = {
        "id": id,
        "type": "OpenWallet",
        "key": "k",
        "status": status,
        "digest": digest_of("OpenWallet", value),
        "tx_id": f"tx-{id}",
        "reason": "" if status == "committed" else "because",
        "result": None,
        "events": [event_of(id)] if status == "committed" else [],
        "received_at_ms": 1,
    }
    return {**made, **changed}


def result(offset: int, answer: dict[str, Any]) -> Seen:
    return Seen("payment.results", 0, offset, b"k", json.dumps(answer).encode(), ())


def event(offset: int, id: str, **changed: Any) -> Seen:
    told = event_of(id)
    named = headers(
        ce_specversion="1.0",
        ce_id=told["id"],
        ce_type=told["type"],
        ce_source="concord:/domains/payment",
        ce_subject=told["subject"],
        ce_time="2010-12-01T08:26:00.000Z",
        ce_dataschema=told["data_schema"],
        ce_causationid=id,
        ce_recordversion="1",
        ce_txid=f"tx-{id}",
        content__type="application/json",
    )
    return replace(Seen("payment.events", 0, offset, b"k", told["body"].encode(), named), **changed)


def dead_letter(offset: int, original: Seen, id: str, **changed: Any) -> Seen:
    told = headers(
        dlq__reason="not_json",
        dlq__command__id=id,
        dlq__original__topic=original.topic,
        dlq__original__partition=str(original.partition),
        dlq__original__offset=str(original.offset),
    )
    made = Seen(f"{original.topic}.dlq", 0, offset, original.key, original.value, (*original.headers, *told))
    return replace(made, **changed)


POISON = command(2, "poison", b"not json")


def good() -> list[Seen]:
    return [
        command(0, "a"),
        command(1, "b"),
        POISON,
        command(3, "a"),  # redelivered
        result(0, answer_of("a")),
        result(1, answer_of("b")),
        result(2, answer_of("poison", status="dead-lettered", value=b"not json")),
        result(3, answer_of("a")),
        event(0, "a"),
        event(1, "b"),
        event(2, "a"),  # published again
        dead_letter(0, POISON, "poison"),
    ]


def judged(messages: list[Seen]) -> Judgement:
    history = History()
    for message in messages:
        history.add(message)
    return judge(history)


def test_a_history_with_repetitions_that_are_the_same_holds() -> None:
    judgement = judged(good())

    assert judgement.holds, judgement.offenders
    assert judgement.counted["commands"] == 4
    assert judgement.counted["answers"] == 3
    assert judgement.counted["events"] == 2
    assert (judgement.counted["committed"], judgement.counted["dead-lettered"]) == (2, 1)


Change = Callable[[list[Seen]], list[Seen]]


def without(topic: str, offset: int) -> Change:
    return lambda messages: [m for m in messages if (m.topic, m.offset) != (topic, offset)]


def instead(topic: str, offset: int, message: Seen) -> Change:
    return lambda messages: [message if (m.topic, m.offset) == (topic, offset) else m for m in messages]


def added(*more: Seen) -> Change:
    return lambda messages: [*messages, *more]


def swapped_results(messages: list[Seen]) -> list[Seen]:
    a, b = result(0, answer_of("b")), result(1, answer_of("a"))
    return instead("payment.results", 0, a)(instead("payment.results", 1, b)(messages))


TOLD_OTHERWISE = result(3, answer_of("a", result={"balance": 7}))
OTHER_MAKER = event(9, "a", headers=tuple((n, b"tx-z" if n == "ce_txid" else v) for n, v in event(9, "a").headers))
WRONG_TYPE = event(0, "a", headers=tuple((n, b"Other" if n == "ce_type" else v) for n, v in event(0, "a").headers))
REFUSED_WITH_EVENTS = result(1, answer_of("b", status="refused", events=[event_of("b")]))

BAD: dict[str, tuple[Change, str]] = {
    "a command without an answer": (without("payment.results", 1), "has no answer"),
    "a command answered for another payload only": (
        instead("payment.results", 1, result(1, answer_of("b", value=b'{"n":2}'))),
        "has no answer",
    ),
    "an answer given again in other words": (instead("payment.results", 3, TOLD_OTHERWISE), "with other words"),
    "an answer to nobody": (added(result(9, answer_of("ghost"))), "answers no command"),
    "an event that is missing": (without("payment.events", 1), "is missing"),
    "an event of nobody": (added(event(9, "ghost")), "belongs to no committed answer"),
    "an event of a refused command": (instead("payment.results", 1, REFUSED_WITH_EVENTS), "is refused and has events"),
    "an event that says something else": (
        instead("payment.events", 0, event(0, "a", value=b"{}")),
        "not what the answer",
    ),
    "an event repeated with another key": (
        instead("payment.events", 2, event(2, "a", key=b"x")),
        "not what the answer",
    ),
    "an event under another type": (instead("payment.events", 0, WRONG_TYPE), "ce_type is"),
    "a dead letter that is missing": (without("payment.commands.dlq", 0), "poison is missing"),
    "a dead letter with other bytes": (
        instead("payment.commands.dlq", 0, dead_letter(0, POISON, "poison", value=b"not  json")),
        "not the bytes",
    ),
    "a dead letter without its original's headers": (
        instead("payment.commands.dlq", 0, dead_letter(0, replace(POISON, headers=()), "poison")),
        "not the headers",
    ),
    "a dead letter of a committed command": (
        added(dead_letter(9, command(0, "a"), "a")),
        "is no dead letter by its answer",
    ),
    "answers out of order": (swapped_results, "was answered before"),
    "a version made twice": (added(OTHER_MAKER), "was made by"),
}


@pytest.mark.parametrize("name", BAD)
def test_the_judge_finds(name: str) -> None:
    change, words = BAD[name]

    judgement = judged(change(good()))

    assert any(words in offender for offender in judgement.offenders), judgement.offenders


def test_an_id_conflict_is_an_answer_of_its_own_and_may_be_composed_anew() -> None:
    other = b'{"n":2}'
    conflict = answer_of("a", status="refused", value=other, reason="id_conflict", tx_id=None)

    judgement = judged(
        [
            *good(),
            command(4, "a", other),
            result(4, conflict),
            result(5, {**conflict, "received_at_ms": 99}),
        ]
    )

    assert judgement.holds, judgement.offenders
