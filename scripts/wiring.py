"""The composition root: how settings become topics, tables, placement and storage, in one place for every process.

The supervisor, the workers and the command line build what they need here, so that they cannot disagree.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from actors.domain import Domain, Table, carry_stored_columns
from actors.due_rows import TIMERS
from actors.incarnations import INCARNATIONS
from actors.outcomes import outcomes_of
from actors.runtime import Placement
from actors.system import SystemConfig, load_domains
from actors.timing import Timing
from infra.clock import SystemClock
from infra.config import HOUR_MS, Settings
from infra.consensus_commit.coordinator import CoordinatorStates
from infra.consensus_commit.intents import IntentLog
from infra.consensus_commit.metadata import transactional
from infra.consensus_commit.retry import RetryPolicy
from infra.messaging.topics import TopicSpec
from infra.storage.errors import InvalidOperationError
from infra.storage.operations import TableSchema
from infra.storage.port import Storage
from schemas.registry import DOMAINS
from schemas.topics import KEEP_FOREVER, Topic, TopicRole, topic_specs


def topics(settings: Settings) -> tuple[Topic, ...]:
    """Every topic of the system as the settings have it."""
    kafka = settings.kafka
    return topic_specs(
        DOMAINS,
        command_partitions=kafka.command_partitions,
        event_partitions=kafka.command_partitions,
        result_partitions=kafka.command_partitions,
        command_retention_ms=kafka.retention_commands_hours * HOUR_MS,
        event_retention_ms=_retention_ms(kafka.retention_events_hours),
        dead_letter_retention_ms=kafka.retention_dlq_hours * HOUR_MS,
    )


def kafka_topics(settings: Settings) -> list[TopicSpec]:
    """The same in Kafka's own words."""
    limits = {
        TopicRole.COMMANDS: settings.kafka.command_topic_max_bytes,
        TopicRole.DEAD_LETTERS: settings.kafka.broker_max_bytes,
    }
    return [
        TopicSpec(
            topic.name,
            topic.partitions,
            settings.kafka.replication,
            {
                "cleanup.policy": topic.cleanup_policy,
                "retention.ms": str(topic.retention_ms),
                "min.insync.replicas": str(settings.kafka.min_insync_replicas),
                "max.message.bytes": str(limits.get(topic.role, topic.max_message_bytes)),
            },
        )
        for topic in topics(settings)
    ]


def _retention_ms(hours: int) -> int:
    return KEEP_FOREVER if hours < 0 else hours * HOUR_MS


def system_config(settings: Settings) -> SystemConfig:
    """What every actor needs to know."""
    retry = settings.retry
    return SystemConfig(
        placement=Placement(
            buckets=settings.actors.buckets,
            shards={domain: settings.actors.shards_of(domain) for domain in DOMAINS},
            coordinators=settings.actors.coordinators,
        ),
        retry=RetryPolicy(
            tries=retry.tries,
            first_ms=min(retry.initial_ms, retry.max_ms),
            most_ms=retry.max_ms,
            factor=retry.factor,
            jitter=retry.jitter,
        ),
        max_command_bytes=settings.kafka.max_command_bytes,
        outcome_window_ms=settings.outcome.window_hours * HOUR_MS,
        sweep_interval_s=settings.recovery.sweep_interval_ms / 1000,
        timing=Timing(transaction_lifetime_ms=settings.recovery.transaction_lifetime_ms),
    )


def domains(settings: Settings) -> list[Domain]:
    """The domains, in the order of a start."""
    return list(load_domains(system_config(settings)).values())


def domain_tables(settings: Settings) -> list[Table[Any]]:
    """Every transactional table: those of the domains, and the outcomes of each."""
    found: dict[str, Table[Any]] = {}
    for domain in domains(settings):
        for table in (*domain.tables, outcomes_of(domain.name)):
            found[table.full_name] = table
    return list(found.values())


TABLES_AT_ONCE = 4
"""How many tables are created side by side: each is some round trips and, in Cassandra, a change of the schema."""


KEYS_CHANGED: Mapping[str, str] = {
    "inventory.expiries": (
        "An earlier release made it. With that release, let reservations without an order expire or end until"
        " `concord table dump inventory.expiries` shows none, and stop it; then drop the table, and start this one"
    ),
}
"""Of tables whose key was once another one: the remedy."""


async def create_tables(settings: Settings, storage: Storage) -> None:
    """Create the tables that are missing; one with columns of a later release is right too. Raises a StorageError."""
    carry_stored_columns(domain_tables(settings), await storage.tables())
    permits = asyncio.Semaphore(TABLES_AT_ONCE)

    async def create(table: TableSchema) -> None:
        async with permits:
            try:
                await storage.create_table(table)
            except InvalidOperationError as error:
                if table.full_name not in KEYS_CHANGED or "partition key" not in str(error):
                    raise
                raise InvalidOperationError(f"{error}. {KEYS_CHANGED[table.full_name]}") from error

    await asyncio.gather(*map(create, stored_tables(settings, storage)))


def stored_tables(settings: Settings, storage: Storage) -> Sequence[TableSchema]:
    """Every table that the transactions need, as storage has it."""
    states = CoordinatorStates(storage, SystemClock())
    return [
        states.table,
        IntentLog(storage).table,
        INCARNATIONS,
        TIMERS,
        *(transactional(table.schema) for table in domain_tables(settings)),
    ]
