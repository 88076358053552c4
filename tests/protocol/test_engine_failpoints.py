"""A real process, killed at each failpoint of the engine; another finds its leftovers and brings everything to rest.

At each of them on SQLite, at a few on the servers. Each case is also the proof that its failpoint is reached: a run in
which it has not fired fails.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
from crashing_process import AMOUNT, PAIRS
from protocol_world import STOCK, World

from infra.consensus_commit.intents import IntentLog
from infra.failpoints import FAILPOINTS, arm, fired
from infra.storage.operations import Delete, IfExists, Key
from infra.storage.port import Storage
from infra.storage.sqlite import SqliteStorage
from tests.storages import opened

OF_THE_ENGINE = ("intent", "prepare", "validate", "commit_state", "commit_records", "rollback", "one_phase", "recovery")
POINTS = [name for name in FAILPOINTS if name.partition(".")[0] in OF_THE_ENGINE]
HELD = 100

ROOT = Path(__file__).resolve().parents[2]


async def run_process(url: str, failpoints: Path) -> int:
    environment = os.environ | {
        "CONCORD_FAILPOINTS": str(failpoints),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
    }
    script = str(Path(__file__).with_name("crashing_process.py"))
    process = await asyncio.create_subprocess_exec(sys.executable, script, url, env=environment)
    return await asyncio.wait_for(process.wait(), 60)


async def given(storage: Storage) -> None:
    world = World(storage)
    await world.create()
    await world.given(dict.fromkeys(range(1, PAIRS), HELD))
    await world.given(dict.fromkeys(range(1, PAIRS), HELD), table=STOCK)


async def found(storage: Storage) -> dict[int, int]:
    """How much was moved of each pair, after recovery; what left an account must have reached the stock."""
    world = World(storage)
    world.clock.advance(3_600_000)
    balances = await world.balances()
    assert await world.in_doubt() == 0
    moved = {}
    for number in range(1, PAIRS):
        held, owed = balances[("account", 1, number)], balances[("stock", 1, number)]
        moved[number] = HELD - held  # type: ignore[operator]
        assert owed == HELD + moved[number], f"pair {number} was torn"  # type: ignore[operator]
    return moved


async def dies_at(point: str, url: str, storage: Storage, tmp_path: Path) -> None:
    failpoints = tmp_path / "failpoints"
    arm(failpoints, [f"{point}=kill@1"])
    await given(storage)

    code = await run_process(url, failpoints)

    assert (code, fired(failpoints)) == (-signal.SIGKILL, [point])
    moved = await found(storage)
    assert set(moved.values()) <= {0, AMOUNT}
    assert moved[2] == 0, "its transaction lost a conflict"
    assert (moved[5], moved[6]) == (0, 0), "their transactions were aborted"
    before_the_commit = ("intent.", "prepare.", "validate.", "commit_state.before")
    if point.startswith(before_the_commit):
        assert moved[1] == 0
    else:
        assert moved[1] == AMOUNT, "the first transaction had its COMMITTED row"


@pytest.fixture
async def files(tmp_path: Path) -> AsyncIterator[SqliteStorage]:
    storage = SqliteStorage(tmp_path / "data")
    yield storage
    await storage.close()


@pytest.mark.parametrize("point", POINTS)
async def test_a_process_killed_at_a_failpoint_leaves_nothing_that_recovery_cannot_settle(
    files: SqliteStorage, tmp_path: Path, point: str
) -> None:
    await dies_at(point, f"sqlite://{tmp_path}/data", files, tmp_path)


async def test_the_process_that_nobody_kills_ends_well(files: SqliteStorage, tmp_path: Path) -> None:
    failpoints = tmp_path / "failpoints"
    arm(failpoints, [])
    await given(files)

    code = await run_process(f"sqlite://{tmp_path}/data", failpoints)

    assert (code, fired(failpoints)) == (0, [])
    assert await found(files) == {1: AMOUNT, 2: 0, 3: 0, 4: AMOUNT, 5: 0, 6: 0}


async def forget(storage: Storage) -> None:
    """Remove what the process decided and intended: the ids of later tests are the same."""
    states, intents = World(storage).states, IntentLog(storage)
    await states.create_tables()
    for tx_id in await World(storage).state_rows():
        await storage.mutate([Delete(states.table, Key((tx_id,)), IfExists())])
    for intent in await intents.all():
        await intents.remove(intent.coordinator, [intent.tx_id])


# DynamoDB writes both records at once: there is nothing between two units.
ON_SERVERS = {
    "cassandra": ["prepare.between_units", "commit_state.after", "commit_records.between_units"],
    "dynamodb": ["prepare.after_records", "recovery.before_roll_back"],
}


@pytest.fixture
def server(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, AbstractAsyncContextManager[Storage]]:
    """The URL of a server for another process, and its storage for this one."""
    opening = opened(request.param, request, tmp_path)
    node = request.getfixturevalue(request.param)
    if request.param == "cassandra":
        return f"cassandra://{node.contact_point}:{node.port}/", opening
    return f"dynamodb://?region=us-west-2&endpoint={node.endpoint_url}", opening


@pytest.mark.parametrize(
    ("server", "point"), [(name, point) for name, points in ON_SERVERS.items() for point in points], indirect=["server"]
)
async def test_a_process_killed_at_a_failpoint_on_a_server_leaves_nothing_that_recovery_cannot_settle(
    server: tuple[str, AbstractAsyncContextManager[Storage]], tmp_path: Path, point: str
) -> None:
    url, opening = server
    async with opening as storage:
        await IntentLog(storage).create_tables()
        try:
            await dies_at(point, url, storage, tmp_path)
        finally:
            await forget(storage)
