"""Topics as declared and as they are: creates what is missing, reports what differs, changes nothing that exists.

A topic that exists is never altered: another partition count would send a key's next command to another partition
than its last, and a shorter retention would drop messages. Drift is shown and people decide.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import MappingProxyType

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaConnectionError, KafkaError, NoError, TopicAlreadyExistsError, for_code

from infra.messaging.connection import Kafka, KafkaConnection, start
from infra.messaging.errors import BrokerUnavailableError, TopicError

_REQUEST_TIMEOUT_MS = 15_000
_VISIBLE_WITHIN_S = 15.0
_VISIBLE_INTERVAL_S = 0.02


@dataclass(frozen=True)
class TopicSpec:
    """A topic as declared. `configs` are Kafka's own names and values, all strings."""

    name: str
    partitions: int
    replication: int = 1
    configs: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "configs", MappingProxyType(dict(self.configs)))


@dataclass(frozen=True)
class TopicDescription:
    """A topic as it is. `configs` holds those that were asked about; an absent topic has no partitions."""

    name: str
    partitions: int
    replication: int
    configs: Mapping[str, str]
    drift: tuple[str, ...] = ()

    @property
    def exists(self) -> bool:
        return self.partitions > 0


async def ensure_topics(kafka: Kafka, specs: Sequence[TopicSpec]) -> list[str]:
    """Create the topics that are missing; the names of those created, in the order of `specs`.

    Returns when every declared topic has a leader for each of its partitions, so that a producer's next message
    finds it. Safe to call from several processes at once. Raises BrokerUnavailableError, or TopicError naming the
    topics that Kafka refused and why.
    """
    async with _admin(kafka) as admin:
        present = set(await admin.list_topics())
        missing = [spec for spec in specs if spec.name not in present]
        created = await _create(admin, missing) if missing else []
        await _wait_for_leaders(admin, specs)
    return created


async def describe_topics(kafka: Kafka, specs: Sequence[TopicSpec]) -> list[TopicDescription]:
    """Each declared topic as it is, with what differs from its declaration in words. Raises BrokerUnavailableError."""
    async with _admin(kafka) as admin:
        present = {topic["topic"]: topic for topic in await admin.describe_topics()}
        existing = [spec for spec in specs if spec.name in present]
        configs = await _configs(admin, existing)
    descriptions = []
    for spec in specs:
        topic = present.get(spec.name)
        if topic is None:
            descriptions.append(TopicDescription(spec.name, 0, 0, {}, ("does not exist",)))
            continue
        partitions = topic["partitions"]
        replication = min((len(partition["replicas"]) for partition in partitions), default=0)
        descriptions.append(describe_drift(spec, len(partitions), replication, configs.get(spec.name, {})))
    return descriptions


def describe_drift(spec: TopicSpec, partitions: int, replication: int, actual: Mapping[str, str]) -> TopicDescription:
    """Compare a declaration with what is there."""
    compared: Iterable[tuple[str, object, object]] = [
        ("partitions", spec.partitions, partitions),
        ("replication", spec.replication, replication),
        *((name, value, actual.get(name, "unset")) for name, value in sorted(spec.configs.items())),
    ]
    drift = tuple(
        f"{name} is {is_now}, declared {declared}" for name, declared, is_now in compared if declared != is_now
    )
    return TopicDescription(spec.name, partitions, replication, dict(actual), drift)


async def _create(admin: AIOKafkaAdminClient, specs: Sequence[TopicSpec]) -> list[str]:
    response = await admin.create_topics(
        [
            NewTopic(
                name=spec.name,
                num_partitions=spec.partitions,
                replication_factor=spec.replication,
                topic_configs=dict(spec.configs),
            )
            for spec in specs
        ],
        timeout_ms=_REQUEST_TIMEOUT_MS,
    )
    created, refused = [], []
    for name, code, *message in response.topic_errors:
        error = for_code(code)
        if error is NoError:
            created.append(name)
        elif error is not TopicAlreadyExistsError:  # another process was faster: as good
            refused.append(f"{name}: {error.__name__} {message[0] if message and message[0] else ''}".strip())
    if refused:
        raise TopicError(f"Kafka refused to create topics. {'; '.join(refused)}")
    return [spec.name for spec in specs if spec.name in created]


async def _wait_for_leaders(admin: AIOKafkaAdminClient, specs: Sequence[TopicSpec]) -> None:
    deadline = time.monotonic() + _VISIBLE_WITHIN_S
    while waiting := [spec.name for spec in specs if spec.name not in await _led_topics(admin)]:
        if time.monotonic() > deadline:
            raise TopicError(f"These topics have partitions without a leader: {', '.join(waiting)}.")
        await asyncio.sleep(_VISIBLE_INTERVAL_S)


async def _led_topics(admin: AIOKafkaAdminClient) -> set[str]:
    return {
        topic["topic"]
        for topic in await admin.describe_topics()
        if topic["partitions"] and all(partition["leader"] >= 0 for partition in topic["partitions"])
    }


async def _configs(admin: AIOKafkaAdminClient, specs: Sequence[TopicSpec]) -> dict[str, dict[str, str]]:
    """The current values of the declared configs. A topic that declares none is not asked: that would mean all."""
    asked = [spec for spec in specs if spec.configs]
    if not asked:
        return {}
    resources = [ConfigResource(ConfigResourceType.TOPIC, spec.name, dict(spec.configs)) for spec in asked]
    found: dict[str, dict[str, str]] = {}
    for response in await admin.describe_configs(resources):
        for code, message, _type, name, entries, *_ in response.resources:
            if for_code(code) is not NoError:
                raise TopicError(f"Kafka did not describe {name}: {message}")
            found[name] = {entry[0]: entry[1] for entry in entries}
    return found


@asynccontextmanager
async def _admin(kafka: Kafka) -> AsyncIterator[AIOKafkaAdminClient]:
    admin = AIOKafkaAdminClient(**KafkaConnection.of(kafka).client_options(), request_timeout_ms=_REQUEST_TIMEOUT_MS)
    try:
        await start(admin, kafka)
        yield admin
    except KafkaConnectionError as error:
        raise BrokerUnavailableError(KafkaConnection.of(kafka).bootstrap_servers, str(error)) from error
    except KafkaError as error:
        raise TopicError(f"Kafka refused the request: {error!r}") from error
    finally:
        await admin.close()
