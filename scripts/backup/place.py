"""A system's servers without the system: what a backup of a resting system and a restore work on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from infra.config import Settings
from infra.messaging.connection import Kafka
from infra.storage.port import Storage
from scripts.connections import kafka_connection, open_storage
from scripts.preflight import check_directory, hold
from scripts.servers import Server, all_of, local_cassandra, local_kafka

Progress = Callable[[str], None]


@dataclass(frozen=True)
class AtRest:
    """The settings with the addresses that servers turned out to have, and the connections to them."""

    settings: Settings
    storage: Storage
    kafka: Kafka


@asynccontextmanager
async def at_rest(settings: Settings, progress: Progress) -> AsyncIterator[AtRest]:
    """Hold the directory, so that no `concord up` begins meanwhile, and start the servers that are ours.

    Raises infra.servers.errors, AlreadyRunningError among them.
    """
    check_directory(settings.data_dir)
    with hold(settings.data_dir):
        async with AsyncExitStack() as stack:
            if settings.profile != "cluster":
                settings = await _started(settings, stack, progress)
            storage = open_storage(settings)
            stack.push_async_callback(storage.close)
            yield AtRest(settings, storage, kafka_connection(settings))


async def _started(settings: Settings, stack: AsyncExitStack, progress: Progress) -> Settings:
    progress("Starting Kafka" if settings.profile == "local" else "Starting Kafka and Cassandra")
    kafka = local_kafka(settings, progress)
    cassandra = local_cassandra(settings, progress) if settings.profile == "stack" else None
    servers: list[Server] = [kafka] if cassandra is None else [kafka, cassandra]
    for server in servers:
        server.choose_ports()
        stack.push_async_callback(server.stop)
    await all_of(server.start() for server in servers)
    storage_url = settings.storage_url if cassandra is None else f"cassandra://{cassandra.address}/"
    return settings.located(bootstrap_servers=kafka.address, storage_url=storage_url)
