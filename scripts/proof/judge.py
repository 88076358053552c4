"""Does a history of messages keep the promises? Pure functions over what a consumer saw; standard library only.

Nothing of the system is imported: its formats (headers, answers, digests, dead letters) are read here by their
description, so that an error in the system's own code cannot hide itself.

    each command        at least one answer; every repetition of an answer is the same
    each answer         belongs to a command that is on the topics
    each dead letter    its original bytes, key and headers are on the dead-letter topic, and nothing else is
    each event          belongs to a committed answer, says what the answer says, and every such event is there
    each key            commands are answered in the order in which the log first had them
    each record         no two transactions made the same version of it
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

DOMAINS = ("inventory", "payment", "shipping", "orders")

Headers = tuple[tuple[str, bytes | None], ...]


@dataclass(frozen=True)
class Seen:
    """A message as a consumer saw it."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Headers

    def header(self, name: str) -> str | None:
        """The first header of that name, as text whatever its bytes."""
        return next(
            ((value or b"").decode("utf-8", "backslashreplace") for n, value in self.headers if n == name), None
        )

    def last_header(self, name: str) -> str | None:
        """The last one: a dead letter's own headers stand behind those of the original."""
        return _first(reversed(self.headers), name)

    @property
    def place(self) -> str:
        return f"{self.topic}[{self.partition}]@{self.offset}"

    @cached_property
    def body(self) -> Any:
        """The value as JSON; raises ValueError for what is none."""
        return json.loads(self.value or b"null")


def _first(headers: Iterable[tuple[str, bytes | None]], wanted: str) -> str | None:
    return next(((value or b"").decode("utf-8", "backslashreplace") for name, value in headers if name == wanted), None)


@dataclass
class History:
    """Every message of every topic, by topic, each partition in order."""

    messages: dict[str, list[Seen]] = field(default_factory=lambda: defaultdict(list))

    def add(self, message: Seen) -> None:
        self.messages[message.topic].append(message)

    def commands(self, domain: str) -> list[Seen]:
        return self.messages.get(f"{domain}.commands", [])

    def results(self, domain: str) -> list[Seen]:
        return self.messages.get(f"{domain}.results", [])

    def events(self, domain: str) -> list[Seen]:
        return self.messages.get(f"{domain}.events", [])

    def dead_letters(self, domain: str) -> list[Seen]:
        return self.messages.get(f"{domain}.commands.dlq", [])


@dataclass(frozen=True)
class Judgement:
    """What was counted, and a sentence for each broken promise."""

    counted: Mapping[str, int]
    offenders: Sequence[str]

    @property
    def holds(self) -> bool:
        return not self.offenders


def judge(history: History) -> Judgement:
    """Hold a resting system's history against the promises."""
    counted: Counter[str] = Counter()
    offenders: list[str] = []
    for domain in DOMAINS:
        offenders += _judge_answers(history, domain, counted)
        offenders += _judge_dead_letters(history, domain, counted)
        offenders += _judge_order(history, domain)
    offenders += _judge_events(history, counted)
    offenders += _judge_versions(history)
    return Judgement(dict(counted), offenders)


def answers_by_id(history: History, domain: str) -> dict[str, list[dict[str, Any]]]:
    """The distinct answers of each command id, in the order of their first appearance."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in history.results(domain):
        if all(_words(result.body) != _words(known) for known in found[result.body["id"]]):
            found[result.body["id"]].append(result.body)
    return dict(found)


# --- answers -----------------------------------------------------------------------------------------------------


def _judge_answers(history: History, domain: str, counted: Counter[str]) -> Iterator[str]:
    answers: dict[tuple[str, str], dict[str, Any]] = {}
    for result in history.results(domain):
        counted["results"] += 1
        answer = result.body
        name = (answer["id"], answer["digest"])
        known = answers.setdefault(name, answer)
        if _words(known) != _words(answer):
            yield f"{result.place}: {answer['id']} was answered before with other words"
    counted["answers"] += len(answers)
    for answer in answers.values():
        counted[answer["status"]] += 1
    expected: set[tuple[str, str]] = set()
    for command in history.commands(domain):
        counted["commands"] += 1
        possible = set(_names_of_answer(command))
        expected |= possible
        if not possible & answers.keys():
            yield f"{command.place}: {command.header('ce_id')} has no answer"
    for id, digest in answers.keys() - expected:
        yield f"{domain}.results: {id} ({digest[:12]}) answers no command"


def _names_of_answer(command: Seen) -> Iterator[tuple[str, str]]:
    """(id, digest) of the answers that this message may have: under its own id, or under its place in the log."""
    value = command.value or b""
    type = command.header("ce_type") or ""
    version = (command.header("ce_dataschema") or "/1").rpartition("/")[2]
    ids = [f"unreadable:{command.topic}:{command.partition}:{command.offset}"]
    if (id := command.header("ce_id")) is not None:
        ids.append(id)
    for payload in (value, b"oversize %d" % len(value)):
        for digest in (_digest(type, version, payload), _digest("", "", payload)):
            for id in ids:
                yield id, digest


def _digest(type: str, version: str, payload: bytes) -> str:
    digest = hashlib.sha256()
    for part in (type.encode("utf-8", "surrogatepass"), version.encode("utf-8", "surrogatepass")):
        digest.update(len(part).to_bytes(4, "big") + part)
    digest.update(payload)
    return digest.hexdigest()


def _words(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """What must be the same in every repetition: all of a stored answer; an id_conflict is composed each time."""
    if answer["reason"] == "id_conflict":
        return {name: value for name, value in answer.items() if name != "received_at_ms"}
    return answer


# --- dead letters ------------------------------------------------------------------------------------------------


def _judge_dead_letters(history: History, domain: str, counted: Counter[str]) -> Iterator[str]:
    dead = {result.body["id"] for result in history.results(domain) if result.body["status"] == "dead-lettered"}
    commands = {(seen.topic, seen.partition, seen.offset): seen for seen in history.commands(domain)}
    found: set[str] = set()
    for letter in history.dead_letters(domain):
        counted["dead_letters"] += 1
        id = letter.last_header("dlq-command-id") or ""
        found.add(id)
        if id not in dead:
            yield f"{letter.place}: {id} is no dead letter by its answer"
        place = tuple(letter.last_header(f"dlq-original-{part}") or "" for part in ("topic", "partition", "offset"))
        original = commands.get((place[0], int(place[1]), int(place[2])))
        if original is None:
            yield f"{letter.place}: its original is not at {place}"
        elif (letter.key, letter.value) != (original.key, original.value):
            yield f"{letter.place}: not the bytes of {original.place}"
        elif letter.headers[: len(original.headers)] != original.headers:
            yield f"{letter.place}: not the headers of {original.place}"
        if not letter.last_header("dlq-reason"):
            yield f"{letter.place}: no reason"
    for id in dead - found:
        yield f"{domain}.commands.dlq: {id} is missing"


# --- events ------------------------------------------------------------------------------------------------------


def _judge_events(history: History, counted: Counter[str]) -> Iterator[str]:
    promised: dict[str, tuple[dict[str, Any], str]] = {}
    for domain in DOMAINS:
        for result in history.results(domain):
            answer = result.body
            if answer["events"] and answer["status"] != "committed":
                yield f"{result.place}: {answer['id']} is {answer['status']} and has events"
            for event in answer["events"]:
                known, command_id = promised.setdefault(event["id"], (event, answer["id"]))
                if known != event or command_id != answer["id"]:
                    yield f"{result.place}: event {event['id']} is promised twice, differently"
    published: set[str] = set()
    for domain in DOMAINS:
        for message in history.events(domain):
            counted["events_published"] += 1
            id = message.header("ce_id") or ""
            published.add(id)
            if id not in promised:
                yield f"{message.place}: event {id} belongs to no committed answer"
                continue
            event, command_id = promised[id]
            yield from _judge_event(message, event, command_id, domain)
    counted["events"] += len(published)
    for id in promised.keys() - published:
        yield f"event {id} of {promised[id][1]} is missing"


def _judge_event(message: Seen, event: Mapping[str, Any], command_id: str, domain: str) -> Iterator[str]:
    expected = {
        "ce_specversion": "1.0",
        "ce_type": event["type"],
        "ce_dataschema": event["data_schema"],
        "ce_causationid": command_id,
        "ce_recordversion": str(event["record_version"]),
        "content-type": "application/json",
    }
    for name, value in expected.items():
        if message.header(name) != value:
            yield f"{message.place}: {name} is {message.header(name)!r}, expected {value!r}"
    if event["domain"] != domain:
        yield f"{message.place}: an event of {event['domain']}"
    if message.value != event["body"].encode() or message.key != event["key"].encode():
        yield f"{message.place}: not what the answer to {command_id} says"
    if message.header("ce_time") is None or message.header("ce_source") is None:
        yield f"{message.place}: without time or source"


def _judge_versions(history: History) -> Iterator[str]:
    """A record's version is made once: two transactions that made the same one both took effect on the same state."""
    makers: dict[tuple[str, str], str] = {}
    for domain in DOMAINS:
        for message in history.events(domain):
            made = (message.header("ce_subject") or "", message.header("ce_recordversion") or "")
            maker = message.header("ce_txid") or ""
            if makers.setdefault(made, maker) != maker:
                yield f"{message.place}: version {made[1]} of {made[0]} was made by {makers[made]} and by {maker}"


# --- order -------------------------------------------------------------------------------------------------------


def _judge_order(history: History, domain: str) -> Iterator[str]:
    """Per key, answers first appear in the order in which commands first appear."""
    asked = _first_by_key((seen.key, seen.partition, seen.header("ce_id")) for seen in history.commands(domain))
    answered = _first_by_key((seen.key, seen.partition, seen.body["id"]) for seen in history.results(domain))
    for (key, partition), ids in answered.items():
        commands = asked.get((key, partition), [])
        known, seen = set(commands), set(ids)
        expected = [id for id in commands if id in seen]
        actual = [id for id in ids if id in known]
        if expected != actual:
            first = next(pair for pair in zip(expected, actual, strict=True) if pair[0] != pair[1])
            yield f"{domain}, key {key!r}: {first[1]} was answered before {first[0]}"


def _first_by_key(
    messages: Iterable[tuple[bytes | None, int, str | None]],
) -> dict[tuple[bytes | None, int], list[str]]:
    found: dict[tuple[bytes | None, int], dict[str, None]] = defaultdict(dict)
    for key, partition, id in messages:
        if key and id is not None:
            found[key, partition].setdefault(id)
    return {place: list(ids) for place, ids in found.items()}
