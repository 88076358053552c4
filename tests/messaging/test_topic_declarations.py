from __future__ import annotations

import asyncio
import uuid

import pytest

from infra.messaging.errors import BrokerUnavailableError, TopicError
from infra.messaging.topics import TopicSpec, describe_drift, describe_topics, ensure_topics
from infra.servers.kafka import LocalKafka

pytestmark = pytest.mark.system


def unique(name: str) -> str:
    return f"{name}.{uuid.uuid4().hex[:12]}"


async def test_missing_topics_are_created_as_declared_and_existing_ones_left_alone(kafka: LocalKafka) -> None:
    commands = TopicSpec(unique("commands"), 4, configs={"retention.ms": "259200000", "max.message.bytes": "4194304"})
    events = TopicSpec(unique("events"), 2, configs={"retention.ms": "-1"})

    assert await ensure_topics(kafka.bootstrap_servers, [commands]) == [commands.name]
    assert await ensure_topics(kafka.bootstrap_servers, [commands, events]) == [events.name]
    assert await ensure_topics(kafka.bootstrap_servers, [commands, events]) == []

    as_they_are = await describe_topics(kafka.bootstrap_servers, [commands, events])
    assert [(topic.partitions, topic.replication, topic.drift) for topic in as_they_are] == [(4, 1, ()), (2, 1, ())]
    assert as_they_are[0].configs == {"retention.ms": "259200000", "max.message.bytes": "4194304"}


async def test_what_differs_from_the_declaration_is_said_in_words_and_not_changed(kafka: LocalKafka) -> None:
    name = unique("drifted")
    await ensure_topics(kafka.bootstrap_servers, [TopicSpec(name, 1, configs={"retention.ms": "1000"})])
    declared = TopicSpec(name, 4, configs={"retention.ms": "2000", "cleanup.policy": "delete"})

    await ensure_topics(kafka.bootstrap_servers, [declared])
    (found,) = await describe_topics(kafka.bootstrap_servers, [declared])

    assert found.drift == ("partitions is 1, declared 4", "retention.ms is 1000, declared 2000")


async def test_a_topic_that_does_not_exist_is_described_as_absent(kafka: LocalKafka) -> None:
    (absent,) = await describe_topics(kafka.bootstrap_servers, [TopicSpec(unique("absent"), 1)])

    assert not absent.exists
    assert absent.drift == ("does not exist",)


async def test_several_processes_may_create_the_same_topics_at_once(kafka: LocalKafka) -> None:
    specs = [TopicSpec(unique("raced"), 1) for _ in range(3)]

    created = await asyncio.gather(*[ensure_topics(kafka.bootstrap_servers, specs) for _ in range(4)])

    assert sorted(name for names in created for name in names) == sorted(spec.name for spec in specs)


async def test_a_declaration_that_kafka_refuses_is_named_with_the_reason(kafka: LocalKafka) -> None:
    name = unique("odd")

    with pytest.raises(TopicError, match=rf"{name}: InvalidConfigurationError.*no.such.setting"):
        await ensure_topics(kafka.bootstrap_servers, [TopicSpec(name, 1, configs={"no.such.setting": "1"})])
    with pytest.raises(TopicError, match="InvalidReplicationFactorError"):
        await ensure_topics(kafka.bootstrap_servers, [TopicSpec(name, 1, replication=3)])


async def test_an_unreachable_broker_is_named_with_the_remedy() -> None:
    with pytest.raises(BrokerUnavailableError, match=r"does not answer at 127\.0\.0\.1:1 .*concord up"):
        await ensure_topics("127.0.0.1:1", [TopicSpec("any", 1)])


def test_a_declaration_is_frozen_all_the_way_down() -> None:
    configs = {"retention.ms": "1"}
    spec = TopicSpec("topic", 1, configs=configs)
    configs["retention.ms"] = "2"

    assert spec.configs == {"retention.ms": "1"}
    with pytest.raises(TypeError):
        spec.configs["retention.ms"] = "3"  # type: ignore[index]


def test_a_config_that_the_broker_does_not_mention_counts_as_drift() -> None:
    description = describe_drift(TopicSpec("topic", 1, configs={"retention.ms": "1"}), 1, 1, {})

    assert description.drift == ("retention.ms is unset, declared 1",)
