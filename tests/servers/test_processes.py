from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from infra.servers.processes import ChildProcess, spawn

TIMEOUT_S = 20.0


def has_ended(pid_descriptor: int) -> bool:
    """Whether the process behind a pidfd ends within the timeout; unlike a pid it cannot be reused."""
    readable, _, _ = select.select([pid_descriptor], [], [], TIMEOUT_S)
    return bool(readable)


async def says(child: ChildProcess, log: Path, text: str) -> None:
    """Wait until the child's log holds `text`."""
    async with asyncio.timeout(TIMEOUT_S):
        while text not in (said := await asyncio.to_thread(log.read_text)):
            assert child.exit_code is None, said
            await asyncio.sleep(0.01)


def test_a_child_dies_when_its_parent_is_killed() -> None:
    program = "import time; from infra.servers.processes import spawn; print(spawn(['sleep', '600']).pid, flush=True)"
    parent = subprocess.Popen([sys.executable, "-c", f"{program}; time.sleep(600)"], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = os.pidfd_open(int(parent.stdout.readline()))
    try:
        assert not select.select([child], [], [], 0)[0], "the child runs while its parent does"

        parent.kill()
        parent.wait()

        assert has_ended(child)
    finally:
        os.close(child)


def test_a_parent_that_ends_in_order_takes_a_forgotten_child_with_it() -> None:
    program = "from infra.servers.processes import spawn; print(spawn(['sleep', '600']).pid, flush=True); input()"
    parent = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = os.pidfd_open(int(parent.stdout.readline()))
    try:
        parent.communicate("\n", timeout=TIMEOUT_S)

        assert has_ended(child)
    finally:
        os.close(child)


async def test_spawning_from_another_thread_is_refused() -> None:
    with pytest.raises(RuntimeError, match="main thread"):
        await asyncio.to_thread(spawn, ["true"])


async def test_a_child_leads_its_own_session_so_that_ctrl_c_does_not_reach_it() -> None:
    child = spawn(["sleep", "600"])
    try:
        assert os.getsid(child.pid) == child.pid
        assert os.getsid(child.pid) != os.getsid(0)
    finally:
        child.kill()
        await child.wait()


async def test_stop_asks_with_sigterm_first(tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = (
        "import signal, sys; signal.signal(15, lambda *_: sys.exit(7)); print('ready', flush=True); signal.pause()"
    )
    child = spawn([sys.executable, "-c", program], log_path=log)
    await says(child, log, "ready")

    assert await child.stop(grace_s=TIMEOUT_S) == 7


async def test_stop_kills_a_child_that_does_not_listen(tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = "import signal; signal.signal(15, signal.SIG_IGN); print('ready', flush=True)\nwhile True: signal.pause()"
    child = spawn([sys.executable, "-c", program], log_path=log)
    await says(child, log, "ready")

    assert await child.stop(grace_s=0.1) == -signal.SIGKILL
    assert await child.stop(grace_s=0.1) == -signal.SIGKILL, "stopping twice is harmless"


async def test_several_tasks_may_wait_for_one_child() -> None:
    child = spawn([sys.executable, "-S", "-c", "raise SystemExit(3)"])

    assert await asyncio.gather(child.wait(), child.wait(), child.wait()) == [3, 3, 3]
    assert child.exit_code == 3


async def test_a_program_that_does_not_exist_ends_with_127_and_says_so(tmp_path: Path) -> None:
    child = spawn(["/nonexistent/program"], log_path=tmp_path / "log")

    assert await child.wait() == 127
    assert "/nonexistent/program cannot be executed: No such file" in (tmp_path / "log").read_text()


async def test_a_child_gets_the_environment_and_folder_that_it_was_given(tmp_path: Path) -> None:
    program = "import os; print(os.getcwd(), os.environ['GREETING'], 'HOME' in os.environ)"
    child = spawn(
        [sys.executable, "-S", "-c", program], env={"GREETING": "hello"}, cwd=tmp_path, log_path=tmp_path / "log"
    )

    assert await child.wait() == 0
    assert (tmp_path / "log").read_text() == f"{tmp_path} hello False\n"


async def test_a_log_grows_over_starts_and_is_set_aside_when_it_is_large(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "log"
    for word in ("one", "two", "three"):
        await spawn(["echo", word], log_path=log, log_max_bytes=7).wait()

    assert log.with_name("log.1").read_text() == "one\ntwo\n"
    assert log.read_text() == "three\n"
