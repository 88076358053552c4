"""A real process, killed at each failpoint of the engine; another finds its files and brings everything to rest.

Each case is also the proof that its failpoint is reached: a run in which it has not fired fails.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest
from crashing_process import AMOUNT, PAIRS
from protocol_world import STOCK, World

from infra.failpoints import FAILPOINTS, arm, fired
from infra.storage.sqlite import SqliteStorage

OF_THE_ENGINE = ("intent", "prepare", "validate", "commit_state", "commit_records", "rollback", "one_phase", "recovery")
POINTS = [name for name in FAILPOINTS if name.partition(".")[0] in OF_THE_ENGINE]
HELD = 100

ROOT = Path(__file__).resolve().parents[2]


async def run_process(directory: Path, failpoints: Path) -> int:
    environment = os.environ | {
        "CONCORD_FAILPOINTS": str(failpoints),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
    }
    script = str(Path(__file__).with_name("crashing_process.py"))
    process = await asyncio.create_subprocess_exec(sys.executable, script, str(directory), env=environment)
    return await asyncio.wait_for(process.wait(), 60)


async def given(directory: Path) -> None:
    storage = SqliteStorage(directory)
    world = World(storage)
    await world.create()
    await world.given(dict.fromkeys(range(1, PAIRS), HELD))
    await world.given(dict.fromkeys(range(1, PAIRS), HELD), table=STOCK)
    await storage.close()


async def found(directory: Path) -> dict[int, int]:
    """How much was moved of each pair, after recovery; what left an account must have reached the stock."""
    storage = SqliteStorage(directory)
    world = World(storage)
    world.clock.advance(3_600_000)
    balances = await world.balances()
    assert await world.in_doubt() == 0
    await storage.close()
    moved = {}
    for number in range(1, PAIRS):
        held, owed = balances[("account", 1, number)], balances[("stock", 1, number)]
        moved[number] = HELD - held  # type: ignore[operator]
        assert owed == HELD + moved[number], f"pair {number} was torn"  # type: ignore[operator]
    return moved


@pytest.mark.parametrize("point", POINTS)
async def test_a_process_killed_at_a_failpoint_leaves_nothing_that_recovery_cannot_settle(
    tmp_path: Path, point: str
) -> None:
    failpoints = tmp_path / "failpoints"
    arm(failpoints, [f"{point}=kill@1"])
    await given(tmp_path / "data")

    code = await run_process(tmp_path / "data", failpoints)

    assert (code, fired(failpoints)) == (-signal.SIGKILL, [point])
    moved = await found(tmp_path / "data")
    assert set(moved.values()) <= {0, AMOUNT}
    assert moved[2] == 0, "its transaction lost a conflict"
    assert (moved[5], moved[6]) == (0, 0), "their transactions were aborted"
    before_the_commit = ("intent.", "prepare.", "validate.", "commit_state.before")
    if point.startswith(before_the_commit):
        assert moved[1] == 0
    else:
        assert moved[1] == AMOUNT, "the first transaction had its COMMITTED row"


async def test_the_process_that_nobody_kills_ends_well(tmp_path: Path) -> None:
    failpoints = tmp_path / "failpoints"
    arm(failpoints, [])
    await given(tmp_path / "data")

    code = await run_process(tmp_path / "data", failpoints)

    assert (code, fired(failpoints)) == (0, [])
    assert await found(tmp_path / "data") == {1: AMOUNT, 2: 0, 3: 0, 4: AMOUNT, 5: 0, 6: 0}
