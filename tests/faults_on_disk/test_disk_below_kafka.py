"""Kafka on a disk that fills up, fails to sync and is slow, with a topic that syncs every message.

Longer: `python -m scripts.proof disks --only kafka`. One server plays all scenes; its data lie on a small disk.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from scripts.proof.disks import on_kafka
from scripts.proof.disks.endings import CRASHED
from scripts.proof.disks.on_kafka import DELIVERY_TIMEOUT_MS, EXIT_CODE, Below


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def below(tools: None, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Below]:
    async with on_kafka.running(tmp_path_factory.mktemp("kafka")) as running:
        yield running


async def test_a_full_disk_ends_the_broker_and_loses_nothing_acknowledged(below: Below) -> None:
    report = await on_kafka.disk_full(below)

    assert report["wrong"] == []
    assert report["server ended with"] in (EXIT_CODE, CRASHED)
    assert report["a start on the full disk"].startswith("DirectoryError")
    assert report["errors"], "nobody noticed"


async def test_a_sync_that_fails_ends_the_broker_before_it_acknowledges(below: Below, tmp_path: Path) -> None:
    report = await on_kafka.sync_error(below, tmp_path)

    assert report["wrong"] == []
    assert report["server ended with"] == EXIT_CODE
    assert sum(report["syncs that failed"].values()) >= 1


async def test_a_slow_disk_is_an_outage_to_senders_with_deadlines_and_passes(below: Below, tmp_path: Path) -> None:
    report = await on_kafka.slow_disk(below, tmp_path, delay_ms=2 * DELIVERY_TIMEOUT_MS)

    assert report["wrong"] == []
    assert sum(report["syncs that lasted"].values()) >= 1
    assert report["errors"], "no deadline was ever reached"
