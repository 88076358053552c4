"""Every topic as data: four for each domain, their key, partitions, retention and size.

Deletion is by time alone; none is compacted, since compaction would destroy history. Results live as long as the
commands they answer: beyond that, the outcome rows are asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

MIB = 1 << 20
DAY_MS = 24 * 60 * 60 * 1000
KEEP_FOREVER = -1


class TopicRole(StrEnum):
    """What a domain's topic carries; the value is the last part of its name."""

    COMMANDS = "commands"
    EVENTS = "events"
    RESULTS = "results"
    DEAD_LETTERS = "commands.dlq"


@dataclass(frozen=True)
class RoleOfTopics:
    """What all topics of one role have in common."""

    key: str
    carries: str
    max_message_bytes: int


ROLES: Mapping[TopicRole, RoleOfTopics] = {
    # Above the limit of a command's value (1 MiB), so that a value that is too large is answered, not lost at a client.
    TopicRole.COMMANDS: RoleOfTopics("the command's routing key", "orders to the domain", 4 * MIB),
    TopicRole.EVENTS: RoleOfTopics("the event's routing key", "what happened in the domain", 4 * MIB),
    TopicRole.RESULTS: RoleOfTopics("the key of the command that is answered", "one answer a command", 4 * MIB),
    # The original bytes, and room for the headers that say why.
    TopicRole.DEAD_LETTERS: RoleOfTopics("the key of the original message", "commands nobody could carry out", 5 * MIB),
}


@dataclass(frozen=True)
class Topic:
    """One topic as it should be. `retention_ms` is KEEP_FOREVER for no limit."""

    name: str
    domain: str
    role: TopicRole
    partitions: int
    retention_ms: int
    max_message_bytes: int
    cleanup_policy: str = "delete"

    @property
    def key(self) -> str:
        """What the Kafka key of its messages means."""
        return ROLES[self.role].key

    @property
    def carries(self) -> str:
        """What its messages are."""
        return ROLES[self.role].carries


def topic_name(domain: str, role: TopicRole) -> str:
    """`orders.commands`, `orders.commands.dlq`, …"""
    return f"{domain}.{role}"


def commands_topic(domain: str) -> str:
    return topic_name(domain, TopicRole.COMMANDS)


def events_topic(domain: str) -> str:
    return topic_name(domain, TopicRole.EVENTS)


def results_topic(domain: str) -> str:
    return topic_name(domain, TopicRole.RESULTS)


def dead_letters_topic(domain: str) -> str:
    return topic_name(domain, TopicRole.DEAD_LETTERS)


CONSUMER_GROUP = "concord"
"""The group of workers that take the commands of every domain."""


def consumer_group(domain: str = "") -> str:
    """The group of the workers that take the commands of `domain` alone; without one, of those that take all."""
    return f"{CONSUMER_GROUP}.{domain}" if domain else CONSUMER_GROUP


def topic_specs(
    domains: Iterable[str],
    *,
    command_partitions: int = 4,
    event_partitions: int = 4,
    result_partitions: int = 4,
    dead_letter_partitions: int = 1,
    command_retention_ms: int = 3 * DAY_MS,
    event_retention_ms: int = KEEP_FOREVER,
    dead_letter_retention_ms: int = 30 * DAY_MS,
) -> tuple[Topic, ...]:
    """Every topic of `domains`, with the counts and times of the settings.

    Results keep the retention of commands. That commands outlive no outcome row (rule 1: retention shorter than the
    outcome window) is checked where both settings are read.
    """
    partitions = {
        TopicRole.COMMANDS: command_partitions,
        TopicRole.EVENTS: event_partitions,
        TopicRole.RESULTS: result_partitions,
        TopicRole.DEAD_LETTERS: dead_letter_partitions,
    }
    retention_ms = {
        TopicRole.COMMANDS: command_retention_ms,
        TopicRole.EVENTS: event_retention_ms,
        TopicRole.RESULTS: command_retention_ms,
        TopicRole.DEAD_LETTERS: dead_letter_retention_ms,
    }
    return tuple(
        Topic(
            name=topic_name(domain, role),
            domain=domain,
            role=role,
            partitions=partitions[role],
            retention_ms=retention_ms[role],
            max_message_bytes=ROLES[role].max_message_bytes,
        )
        for domain in domains
        for role in TopicRole
    )
