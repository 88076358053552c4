"""`concord topics`: topics as declared and as they are."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from scripts.cli.options import DEFAULT_DIRECTORY, Data, Shape, command
from scripts.cli.output import Output
from scripts.cli.system import System

COLUMNS = ("topic", "carries", "key", "partitions", "replication", "written", "retention_ms", "drift")


def register(app: typer.Typer) -> None:
    @command(app, "topics")
    def topics(
        create: Annotated[
            bool, typer.Option("--create", help="First create those that are missing; none that exists is changed.")
        ] = False,
        data: Data = DEFAULT_DIRECTORY,
        output: Shape = None,
    ) -> None:
        """Every topic: what it carries, how much was ever written to it, and where it differs from its declaration.

        Partitions, replication, cleanup.policy, retention.ms, min.insync.replicas and max.message.bytes are compared.
        """
        import asyncio

        Output.of(output).table(asyncio.run(_describe(System.find(data), create=create)), COLUMNS)


async def _describe(system: System, *, create: bool) -> list[dict[str, Any]]:
    from collections import Counter

    from infra.messaging.reader import end_offsets
    from infra.messaging.topics import describe_topics, ensure_topics
    from schemas.topics import ROLES
    from scripts.wiring import kafka_topics, topics

    settings = system.settings
    specs = kafka_topics(settings)
    if create:
        await ensure_topics(system.kafka, specs)
    descriptions = await describe_topics(system.kafka, specs)
    existing = [description.name for description in descriptions if description.exists]
    written: Counter[str] = Counter()
    for (name, _), offset in (await end_offsets(system.kafka, existing)).items():
        written[name] += offset
    return [
        {
            "topic": topic.name,
            "carries": ROLES[topic.role].carries,
            "key": topic.key,
            "partitions": description.partitions,
            "replication": description.replication,
            "written": written[topic.name],
            "retention_ms": topic.retention_ms,
            "drift": "; ".join(description.drift) or None,
        }
        for topic, description in zip(topics(settings), descriptions, strict=True)
    ]
