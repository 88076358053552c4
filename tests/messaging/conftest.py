from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from infra.servers.kafka import LocalKafka
from tests.servers.kafka_fixture import running_kafka


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def kafka(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalKafka]:
    async with running_kafka(tmp_path_factory.mktemp("kafka")) as node:
        yield node
