"""Two processes on one storage, one with a wrong clock; longer: `python -m scripts.proof disks --only clock`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from infra.servers.cassandra import LocalCassandra
from infra.storage.cassandra import CassandraStorage
from infra.storage.sqlite import SqliteStorage
from scripts.proof.disks.clocks import CLOCKS, wrong_clock


@pytest.mark.parametrize("name", CLOCKS)
async def test_a_wrong_clock_makes_conflicts_and_never_a_wrong_outcome(
    tmp_path: Path, wrong_clocks: Path, name: str
) -> None:
    directory = tmp_path / "tables"

    report = await wrong_clock(partial(SqliteStorage, directory), f"sqlite://{directory}", tmp_path, name=name)

    assert report["wrong"] == []
    for seen in report["clock was wrong by (s)"]:
        assert [round(error, -1) for error in seen] == list(CLOCKS[name]), "the clock was not wrong"


@pytest.mark.parametrize("name", ["strobes"])
async def test_a_wrong_clock_makes_no_wrong_outcome_on_cassandra_either(
    tmp_path: Path, wrong_clocks: Path, cassandra: LocalCassandra, name: str
) -> None:
    storages = partial(CassandraStorage, [cassandra.contact_point], cassandra.port)
    url = f"cassandra://{cassandra.contact_point}:{cassandra.port}/"

    report = await wrong_clock(storages, url, tmp_path, name=name)

    assert report["wrong"] == []
    for seen in report["clock was wrong by (s)"]:
        assert [round(error, -1) for error in seen] == list(CLOCKS[name]), "the clock was not wrong"
