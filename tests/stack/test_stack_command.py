"""`concord stack`: the two servers alone, started, watched, killed and stopped as their user does it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.cli import stack_command
from scripts.proof.running import clean_environment, concord_program


def concord(directory: Path, *arguments: str, human: bool = False) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [concord_program(), "stack", *arguments, "--data", str(directory), *(["--output", "human"] if human else [])],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def status(directory: Path) -> dict[str, dict[str, Any]]:
    return {row["server"]: row for row in map(json.loads, concord(directory, "status").stdout.splitlines())}


def until(holds: Callable[[], bool], what: str, *, within_s: float = 90.0) -> None:
    deadline_s = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline_s, f"waited {within_s:.0f} s for {what}"
        time.sleep(0.2)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "data"
    yield directory
    concord(directory, "down")


@pytest.mark.system
@pytest.mark.timeout(300)
def test_both_servers_run_in_the_background_until_they_are_stopped(directory: Path) -> None:
    first = concord(directory, "up")
    assert first.returncode == 0, first.stderr
    [said] = map(json.loads, first.stdout.splitlines())
    assert said["ready"] is True
    assert said["environment"] == {
        "CONCORD_PROFILE": "cluster",
        "CONCORD_KAFKA__BOOTSTRAP_SERVERS": said["kafka"],
        "CONCORD_STORAGE__URL": f"cassandra://{said['cassandra']}/",
    }

    # Once more does nothing but tell the same, to people as lines for their shell.
    again = concord(directory, "up", human=True)
    assert again.returncode == 0
    assert f"export CONCORD_KAFKA__BOOTSTRAP_SERVERS={said['kafka']}" in again.stdout.splitlines()

    found = status(directory)
    assert {name: row["state"] for name, row in found.items()} == {"kafka": "ready", "cassandra": "ready"}
    assert {name: row["address"] for name, row in found.items()} == {name: said[name] for name in found}
    assert (found["kafka"]["heap_mb"], found["cassandra"]["heap_mb"]) == (512, 1024)
    assert all(row["data_mb"] > 0 for row in found.values())

    lines = [json.loads(line) for line in concord(directory, "logs", "cassandra", "-n", "3").stdout.splitlines()]
    assert [line["server"] for line in lines] == ["cassandra"] * 3

    # One that is killed is started again, at the same address.
    killed = found["cassandra"]["pid"]
    os.kill(killed, signal.SIGKILL)
    until(lambda: status(directory)["cassandra"]["pid"] not in (killed, None), "another Cassandra")
    until(lambda: status(directory)["cassandra"]["state"] == "ready", "Cassandra to serve")
    found = status(directory)
    assert found["cassandra"]["address"] == said["cassandra"]

    stopped = concord(directory, "down")
    assert (stopped.returncode, json.loads(stopped.stdout)["stopped"]) == (0, True)
    assert not any(alive(row["pid"]) for row in found.values())
    done = concord(directory, "status")
    assert done.returncode == 6
    assert {row["state"] for row in map(json.loads, done.stdout.splitlines())} == {"stopped"}


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_without_servers_nothing_is_stopped_and_there_are_no_logs(directory: Path) -> None:
    stopped = concord(directory, "down")
    assert (stopped.returncode, json.loads(stopped.stdout)) == (0, {"stopped": False, "pid": None, "seconds": 0.0})

    logs = concord(directory, "logs")
    assert logs.returncode == 6
    assert "concord stack up" in logs.stderr
    assert not directory.exists()


def test_what_keeps_the_servers_from_starting_is_said_with_its_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    done = concord(tmp_path / "file", "up")

    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr


def test_a_setting_that_does_not_hold_is_named(directory: Path) -> None:
    directory.mkdir()
    (directory / "concord.toml").write_text("[cassandra]\nheap_mb = 1\n")

    done = concord(directory, "up")

    assert done.returncode == 2
    assert f"cassandra.heap_mb in {directory / 'concord.toml'} must be at least 512." in done.stderr


def test_followed_logs_go_on_with_what_is_added_and_with_the_next_file_after_a_rotation(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text("one\ntwo\nthr")
    lines = stack_command._lines({"kafka": log}, last=1, follow=True)

    assert next(lines) == ("kafka", "two")
    with log.open("a") as file:
        file.write("ee\n")
    assert next(lines) == ("kafka", "three")
    log.rename(tmp_path / "server.log.1")
    log.write_text("four\n")
    assert next(lines) == ("kafka", "four")
