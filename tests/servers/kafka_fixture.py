"""A real Kafka for tests, as plain functions; `tests/conftest.py` makes fixtures of them."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from infra.messaging.topics import TopicSpec, ensure_topics
from infra.servers.kafka import LocalKafka


@asynccontextmanager
async def running_kafka(directory: Path) -> AsyncIterator[LocalKafka]:
    """A Kafka in `directory`, stopped at the end. One for all tests of a session is enough: 3 s and 220 MB."""
    kafka = LocalKafka(directory, heap_mb=512)
    await kafka.start()
    try:
        yield kafka
    finally:
        await kafka.stop()


async def fresh_topic(
    kafka: LocalKafka, *, name: str = "test", partitions: int = 1, configs: Mapping[str, str] | None = None
) -> str:
    """Create a topic that no other test has; its name."""
    topic = f"{name}.{uuid.uuid4().hex[:12]}"
    await ensure_topics(kafka.bootstrap_servers, [TopicSpec(topic, partitions, configs=configs or {})])
    return topic
