"""Cassandra on a disk that fails to sync, the fault after which a server could acknowledge what is not there.

Full and slow disks below it, and wrong clocks, take minutes: `python -m scripts.proof disks --only cassandra`.
"""

from __future__ import annotations

from pathlib import Path

from scripts.proof.disks import on_cassandra
from scripts.proof.disks.on_cassandra import EXIT_CODE


async def test_a_sync_that_fails_ends_cassandra_before_it_acknowledges(tools: None, tmp_path: Path) -> None:
    async with on_cassandra.running(tmp_path / "cassandra") as below:
        report = await on_cassandra.sync_error(below, tmp_path)

    assert report["wrong"] == []
    assert report["server ended with"] == EXIT_CODE
    assert sum(report["syncs that failed"].values()) >= 1
