"""Topics as they are declared, their drift, and that whatever publishes does it safely."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.config import load_settings
from infra.messaging.topics import TopicSpec, describe_drift, describe_topics, ensure_topics
from infra.servers.kafka import LocalKafka
from scripts.wiring import kafka_topics

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = {
    "CONCORD_PROFILE": "cluster",
    "CONCORD_KAFKA__BOOTSTRAP_SERVERS": "k1:9092",
    "CONCORD_STORAGE__URL": "memory:",
    "CONCORD_KAFKA__REPLICATION": "3",
    "CONCORD_KAFKA__MIN_INSYNC_REPLICAS": "2",
    "CONCORD_KAFKA__COMMAND_PARTITIONS": "8",
    "CONCORD_KAFKA__RETENTION_COMMANDS_HOURS": "24",
}


def test_topics_are_declared_as_the_settings_say() -> None:
    specs = {spec.name: spec for spec in kafka_topics(load_settings(environment=CLUSTER))}
    commands = specs["orders.commands"]

    assert (commands.partitions, commands.replication) == (8, 3)
    assert commands.configs["retention.ms"] == str(24 * 3_600_000)
    assert specs["orders.results"].configs["retention.ms"] == commands.configs["retention.ms"]
    assert {spec.configs["min.insync.replicas"] for spec in specs.values()} == {"2"}
    assert {spec.configs["cleanup.policy"] for spec in specs.values()} == {"delete"}


@pytest.mark.parametrize(
    ("partitions", "replication", "changed", "drift"),
    [
        (8, 3, {}, None),
        (4, 3, {}, "partitions is 4, declared 8"),
        (8, 2, {}, "replication is 2, declared 3"),
        (8, 3, {"min.insync.replicas": "1"}, "min.insync.replicas is 1, declared 2"),
        (8, 3, {"retention.ms": "1"}, "retention.ms is 1, declared 86400000"),
        (8, 3, {"cleanup.policy": "compact"}, "cleanup.policy is compact, declared delete"),
    ],
)
def test_each_difference_from_the_declaration_is_named(
    partitions: int, replication: int, changed: dict[str, str], drift: str | None
) -> None:
    spec = next(spec for spec in kafka_topics(load_settings(environment=CLUSTER)) if spec.name == "orders.commands")

    found = describe_drift(spec, partitions, replication, {**spec.configs, **changed})

    assert found.drift == (() if drift is None else (drift,))


def test_kafka_keeps_the_declaration_and_drift_shows(kafka: LocalKafka) -> None:
    import asyncio
    import uuid

    declared = TopicSpec(
        f"declared.{uuid.uuid4().hex[:8]}", 2, 1, {"min.insync.replicas": "1", "retention.ms": "60000"}
    )
    wanted = TopicSpec(declared.name, 3, 1, {"min.insync.replicas": "2", "retention.ms": "60000"})

    async def look() -> list[tuple[str, ...]]:
        await ensure_topics(kafka.bootstrap_servers, [declared])
        return [(await describe_topics(kafka.bootstrap_servers, [spec]))[0].drift for spec in (declared, wanted)]

    assert asyncio.run(look()) == [(), ("partitions is 2, declared 3", "min.insync.replicas is 1, declared 2")]


def producers() -> Iterator[tuple[str, ast.Call]]:
    """Every place in our programs that makes a producer of aiokafka's."""
    for package in ("schemas", "infra", "actors", "streams", "scripts"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "AIOKafkaProducer":
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def test_every_producer_waits_for_all_replicas_and_is_idempotent() -> None:
    found = list(producers())
    careless = [
        place
        for place, call in found
        if not {("acks", "'all'"), ("enable_idempotence", "True")}
        <= {(keyword.arg, ast.unparse(keyword.value)) for keyword in call.keywords}
    ]

    assert any(place.startswith("infra/messaging/producer.py") for place, _ in found)
    assert careless == []
