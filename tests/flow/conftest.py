from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio
from flow_world import FlowWorld, flow_world

from infra.servers.kafka import LocalKafka


@pytest_asyncio.fixture
async def world(kafka: LocalKafka, tmp_path: Path) -> AsyncIterator[FlowWorld]:
    async with flow_world(kafka.bootstrap_servers, tmp_path) as made:
        yield made
