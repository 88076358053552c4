"""Topics as data."""

from __future__ import annotations

import re

from schemas.registry import DOMAINS
from schemas.topics import (
    DAY_MS,
    KEEP_FOREVER,
    MIB,
    Topic,
    TopicRole,
    commands_topic,
    dead_letters_topic,
    events_topic,
    results_topic,
    topic_specs,
)


def by_name(**settings: int) -> dict[str, Topic]:
    return {topic.name: topic for topic in topic_specs(DOMAINS, **settings)}


def test_each_domain_has_its_four_topics() -> None:
    expected = {f"{domain}.{last}" for domain in DOMAINS for last in ("commands", "events", "results", "commands.dlq")}

    assert by_name().keys() == expected


def test_names_by_role_are_names_of_declared_topics() -> None:
    names = {name(domain) for domain in DOMAINS for name in (commands_topic, events_topic, results_topic)}

    assert names | {dead_letters_topic(domain) for domain in DOMAINS} == by_name().keys()


def test_no_name_mixes_dots_with_underscores() -> None:
    """Kafka's metric names cannot tell the two apart."""
    assert all(re.fullmatch(r"[a-z.]+", name) for name in by_name())


def test_each_role_takes_its_partitions_and_retention_from_the_settings() -> None:
    topics = by_name(
        command_partitions=8,
        event_partitions=6,
        result_partitions=5,
        dead_letter_partitions=2,
        command_retention_ms=DAY_MS,
        event_retention_ms=7 * DAY_MS,
        dead_letter_retention_ms=14 * DAY_MS,
    )

    found = {role: topics[f"orders.{role}"] for role in TopicRole}
    assert {role: (topic.partitions, topic.retention_ms) for role, topic in found.items()} == {
        TopicRole.COMMANDS: (8, DAY_MS),
        TopicRole.EVENTS: (6, 7 * DAY_MS),
        TopicRole.RESULTS: (5, DAY_MS),
        TopicRole.DEAD_LETTERS: (2, 14 * DAY_MS),
    }


def test_results_are_kept_as_long_as_the_commands_they_answer() -> None:
    topics = by_name()

    assert topics["orders.results"].retention_ms == topics["orders.commands"].retention_ms == 3 * DAY_MS


def test_events_are_kept_for_ever_and_nothing_is_compacted() -> None:
    assert by_name()["orders.events"].retention_ms == KEEP_FOREVER
    assert {topic.cleanup_policy for topic in by_name().values()} == {"delete"}


def test_a_dead_letter_has_room_for_the_largest_command_and_for_why() -> None:
    topics = by_name()

    assert topics["orders.commands"].max_message_bytes == 4 * MIB
    assert topics["orders.commands.dlq"].max_message_bytes == 5 * MIB


def test_every_topic_says_what_its_key_means() -> None:
    assert {topic.role: topic.key for topic in by_name().values()} == {
        TopicRole.COMMANDS: "the command's routing key",
        TopicRole.EVENTS: "the event's routing key",
        TopicRole.RESULTS: "the key of the command that is answered",
        TopicRole.DEAD_LETTERS: "the key of the original message",
    }
