"""What `concord check` verifies, as functions over what was read: topics, outcomes, tables.

    commands on the topics ──each has──► one outcome row ──names──► its events, which are on the event topics
              │                               │
              │                               └─ dead-lettered ──► a message on the dead-letter topic
              └─ same id, other payload ──► an `id_conflict` result; the row keeps the first answer

Messages may be repeated (delivery is at least once), so everything on a topic is compared after dropping repeats: of
commands by id and payload, of results and events by `ce_id`. A command that retention has taken off its topic is not
asked about any more. Stock and money are `actors.audit`'s affair, records in doubt the engine's.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from actors.audit import AUDITED, check_books
from actors.outcomes import outcomes_of
from infra.messaging.reader import Record, known_groups, lag, read_all
from schemas.envelope import (
    DeadLetterError,
    EnvelopeError,
    RawMessage,
    decode_headers,
    key_text,
    parse_command,
    payload_digest,
)
from schemas.outcome import DEAD_LETTERED, ID_CONFLICT, Answer
from schemas.registry import DOMAINS
from schemas.topics import (
    CONSUMER_GROUP,
    commands_topic,
    consumer_group,
    dead_letters_topic,
    events_topic,
    results_topic,
)
from scripts.cli.system import System
from scripts.reading import CommittedReader

_LOOK_EVERY_S = 0.3

CommandName = tuple[str, str, str]
"""(domain, key, id): what a command's outcome row is found by."""


@dataclass
class Topics:
    """What the topics hold, repeats dropped."""

    commands: dict[CommandName, list[str]] = field(default_factory=lambda: defaultdict(list))
    """The payload digests under each name, in the order of the log."""
    command_messages: int = 0
    results: set[tuple[str, str, str]] = field(default_factory=set)
    """(domain, id, payload digest) of each answer."""
    conflicts: set[tuple[str, str, str]] = field(default_factory=set)
    """The same of those answers that are `id_conflict`."""
    events: dict[str, str] = field(default_factory=dict)
    """Event id to the id of the command that caused it."""
    event_messages: int = 0
    dead_letters: set[tuple[str, str]] = field(default_factory=set)
    """(domain, command id)."""


async def check_system(system: System, *, wait_s: float) -> dict[str, Any]:
    """{"ok", "counted": {what: how many}, "offenders": [sentences]}."""
    counted: Counter[str] = Counter()
    offenders: list[str] = []
    async with await system.reader() as reader:
        topics = None
        if system.running:
            offenders += await _wait_for_rest(system, reader, wait_s)
            topics = await read_topics(system)
        in_doubt = await reader.in_doubt()
        offenders += [
            f"{table} {key.partition + key.clustering} is in doubt ({tx_id})" for table, key, tx_id in in_doubt
        ]
        counted["records_in_doubt"] = len(in_doubt)
        outcomes = await read_outcomes(reader)
        counted.update(Counter(f"outcomes_{answer.status.replace('-', '_')}" for answer in outcomes.values()))
        counted["outcomes"] = len(outcomes)
        if topics is None:
            counted["topics_not_verified_because_the_system_rests"] = 1
        else:
            offenders += check_outcomes(topics, outcomes)
            counted["command_messages"] = topics.command_messages
            counted["commands"] = sum(map(len, topics.commands.values()))
            counted["id_conflicts"] = len(topics.conflicts)
            counted["dead_letters"] = len(topics.dead_letters)
            counted["event_messages"] = topics.event_messages
            counted["events"] = len(topics.events)
        rows = {table.full_name: [row async for row in reader.rows(table.schema)] for table in AUDITED}
        counted.update({name: len(found) for name, found in rows.items()})
        offenders += check_books(rows)
    return {"ok": not offenders, "counted": dict(sorted(counted.items())), "offenders": offenders}


async def _wait_for_rest(system: System, reader: CommittedReader, wait_s: float) -> list[str]:
    """Until every message is acknowledged and no record is in doubt, or `wait_s` are over: then what is left."""
    topics = [commands_topic(domain) for domain in DOMAINS] + [events_topic("orders")]
    until_s = time.monotonic() + wait_s
    while True:
        behind = {place: left for place, left in (await _lag(system, topics)).items() if left}
        if not behind and not await reader.in_doubt():
            return []
        if time.monotonic() > until_s:
            return [
                f"{topic}[{partition}]: {left} messages are not acknowledged"
                for (topic, partition), left in behind.items()
            ]
        await asyncio.sleep(_LOOK_EVERY_S)


async def _lag(system: System, topics: list[str]) -> dict[tuple[str, int], int]:
    groups = [CONSUMER_GROUP, *map(consumer_group, DOMAINS)]
    return await lag(system.kafka, await known_groups(system.kafka, groups), topics)


async def read_topics(system: System) -> Topics:
    """Everything that is on the topics now."""
    found = Topics()
    max_bytes = system.settings.kafka.max_command_bytes
    domain_of = {commands_topic(domain): domain for domain in DOMAINS}
    results = {results_topic(domain): domain for domain in DOMAINS}
    dead_letters = {dead_letters_topic(domain): domain for domain in DOMAINS}
    events = [events_topic(domain) for domain in DOMAINS]
    everything = [*domain_of, *results, *dead_letters, *events]
    async with aclosing(read_all(system.kafka, everything)) as records:  # type: ignore[type-var]
        async for record in records:
            if record.topic in domain_of:
                _add_command(found, record, domain_of[record.topic], max_bytes)
            elif record.topic in results:
                _add_result(found, record, results[record.topic])
            elif record.topic in dead_letters:
                found.dead_letters.add((dead_letters[record.topic], _header(record, "dlq-command-id")))
            else:
                found.event_messages += 1
                found.events[_header(record, "ce_id")] = _header(record, "ce_causationid")
    return found


def _add_command(found: Topics, record: Record, domain: str, max_bytes: int) -> None:
    found.command_messages += 1
    key, id, digest = identity(record, domain, max_bytes)
    digests = found.commands[domain, key, id]
    if digest not in digests:
        digests.append(digest)


def identity(record: Record, domain: str, max_bytes: int) -> tuple[str, str, str]:
    """(key, id, payload digest) of a command as its home knows it, readable or not."""
    size = len(record.value or b"")
    raw = RawMessage(
        record.topic,
        record.partition,
        record.offset,
        record.timestamp_ms,
        record.key,
        record.headers,
        None if size > max_bytes else record.value,
        size if size > max_bytes else 0,
    )
    if not raw.oversize:
        try:
            envelope = decode_headers(raw.headers)
        except EnvelopeError:
            pass
        else:
            # What parse_command would say, without validating the body: there may be very many.
            return key_text(raw), envelope.id, payload_digest(envelope.type, str(envelope.version), raw.value or b"")
    try:
        parsed = parse_command(raw, domain=domain, max_bytes=max_bytes)
    except DeadLetterError as error:
        return error.key, error.command_id, error.digest
    return parsed.key, parsed.id, parsed.digest


def _add_result(found: Topics, record: Record, domain: str) -> None:
    answer = Answer.from_json(record.value or b"")
    found.results.add((domain, answer.id, answer.digest))
    if answer.reason == ID_CONFLICT:
        found.conflicts.add((domain, answer.id, answer.digest))


def _header(record: Record, name: str) -> str:
    """The last header of a name: a dead letter that was one before has some of them twice."""
    for header, value in reversed(record.headers):
        if header == name:
            return value.decode("utf-8", "replace")
    return ""


async def read_outcomes(reader: CommittedReader) -> dict[CommandName, Answer]:
    """Every durable answer."""
    found = {}
    for domain in DOMAINS:
        async for row in reader.rows(outcomes_of(domain).schema):
            answer = Answer.from_json(str(row["answer"]))
            found[domain, str(row["key"]), str(row["id"])] = answer
    return found


def check_outcomes(topics: Topics, outcomes: Mapping[CommandName, Answer]) -> list[str]:
    """One sentence for each command, outcome or event that does not fit."""
    asked = {name: answer for name, answer in outcomes.items() if name in topics.commands}
    return [
        *_check_commands(topics, outcomes),
        *_check_dead_letters(topics, asked),
        *_check_events(topics, asked, outcomes.values()),
    ]


def _check_commands(topics: Topics, outcomes: Mapping[CommandName, Answer]) -> Iterator[str]:
    for (domain, key, id), digests in topics.commands.items():
        name = f"{domain} command {id} (key {key})"
        outcome = outcomes.get((domain, key, id))
        if outcome is None:
            yield f"{name} has no outcome"
            continue
        if outcome.digest not in digests:
            yield f"{name}: its outcome answers another payload"
        for digest in digests:
            answer = (domain, id, digest)
            if answer not in topics.results:
                yield f"{name} has no result on {results_topic(domain)}"
            elif (answer in topics.conflicts) != (digest != outcome.digest):
                yield f"{name}: `{ID_CONFLICT}` was answered to the wrong payload"


def _check_dead_letters(topics: Topics, asked: Mapping[CommandName, Answer]) -> Iterator[str]:
    for (domain, key, id), answer in asked.items():
        is_dead = answer.status == DEAD_LETTERED
        if is_dead and (domain, id) not in topics.dead_letters:
            yield f"{domain} command {id} (key {key}) is dead-lettered, but not on {dead_letters_topic(domain)}"
    dead = {(domain, id) for (domain, _, id), answer in asked.items() if answer.status == DEAD_LETTERED}
    known = {(domain, id) for domain, _, id in asked}
    for domain, id in sorted(topics.dead_letters & known - dead):
        yield f"{domain} command {id} is on {dead_letters_topic(domain)}, but its outcome is another"


def _check_events(topics: Topics, asked: Mapping[CommandName, Answer], all_outcomes: Iterable[Answer]) -> Iterator[str]:
    owner: dict[str, str] = {}
    for answer in all_outcomes:
        for event in answer.events:
            if event.id in owner:
                yield f"event {event.id} belongs to two commands, {owner[event.id]} and {answer.id}"
            owner[event.id] = answer.id
    for answer in asked.values():
        for event in answer.events:
            if event.id not in topics.events:
                yield f"event {event.id} ({event.type}) of command {answer.id} is not on {events_topic(event.domain)}"
    known = {id for _, _, id in asked}
    for event_id, command_id in topics.events.items():
        if event_id not in owner and command_id in known:
            yield f"event {event_id} was published for command {command_id}, whose outcome does not name it"
