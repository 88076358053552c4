"""Two processes on SQLite, one with a wrong clock; longer: `python -m scripts.proof disks --only clock`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

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
        assert seen == pytest.approx(CLOCKS[name], abs=10), "the clock was not wrong"
