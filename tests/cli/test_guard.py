"""The guard kills what carries its run's mark once whoever holds it is gone, and nothing else."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator

import pytest

from infra.servers import guard

SLEEPER = [sys.executable, "-I", "-S", "-c", "import time; print('up', flush=True); time.sleep(300)"]

HOLDER = """
import os, subprocess, sys
from infra.servers.guard import Guard
guard = Guard(sys.argv[1])
os.environ["CONCORD_RUN"] = sys.argv[1]
# A grandchild that detached: a session of its own, its parent gone.
code = "import subprocess, sys; print(subprocess.Popen(sys.argv[1:], start_new_session=True).pid, flush=True)"
subprocess.run([sys.executable, "-c", code, sys.executable, "-c", "import time; time.sleep(300)"], check=True)
print("guard", guard.process.pid, flush=True)
sys.stdin.read()
"""

Spawn = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    started: list[subprocess.Popen[str]] = []

    def start(argv: list[str], **environment: str) -> subprocess.Popen[str]:
        clean = {name: value for name, value in os.environ.items() if name != guard.MARK}
        process = subprocess.Popen(
            argv, env=clean | environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_for_end(pid: int, *, seconds: float = 20) -> bool:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], seconds)[0])
    finally:
        os.close(descriptor)


def test_after_sigkill_of_the_holder_marked_processes_end_and_others_live(spawn: Spawn) -> None:
    run = str(uuid.uuid4())
    other = spawn(SLEEPER, CONCORD_RUN=str(uuid.uuid4()))
    unmarked = spawn(SLEEPER)
    assert other.stdout is not None
    assert unmarked.stdout is not None
    assert other.stdout.readline() == unmarked.stdout.readline() == "up\n"
    holder = spawn([sys.executable, "-c", HOLDER, run])
    assert holder.stdout is not None
    orphan = int(holder.stdout.readline())
    guard_pid = int(holder.stdout.readline().split()[1])
    # A process that is just beginning has no environment yet.
    wait_until(lambda: orphan in guard.marked(run), "its environment has no mark")
    assert guard_pid not in guard.marked(run)

    holder.kill()

    assert wait_for_end(orphan)
    assert wait_for_end(guard_pid)
    assert guard.marked(run) == []
    assert other.poll() is None
    assert unmarked.poll() is None


def test_a_guard_is_deaf_to_the_signals_of_a_terminal_and_of_a_process_group(spawn: Spawn) -> None:
    run = str(uuid.uuid4())
    held = guard.Guard(run)
    sleeper = spawn(SLEEPER, CONCORD_RUN=run)
    assert sleeper.stdout is not None
    assert sleeper.stdout.readline() == "up\n"
    assert held.process.stdout is None
    wait_until(lambda: is_deaf(held.process.pid), "the guard does not ignore all of them")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        held.process.send_signal(number)
    assert held.process.poll() is None

    held.release()

    assert held.process.returncode == 0
    assert sleeper.wait(20) == -signal.SIGKILL


def wait_until(holds: Callable[[], bool], otherwise: str) -> None:
    until = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < until, otherwise
        time.sleep(0.01)


def is_deaf(pid: int) -> bool:
    """Whether the guard has said so to the kernel: SigIgn of its status has these three."""
    deaf_to = sum(1 << (number - 1) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    with open(f"/proc/{pid}/status") as status:
        ignored = next(line for line in status if line.startswith("SigIgn:"))
    return int(ignored.split()[1], 16) & deaf_to == deaf_to


def test_releasing_a_guard_with_nothing_left_to_kill_ends_it() -> None:
    held = guard.Guard(str(uuid.uuid4()))

    held.release()

    assert held.process.returncode == 0
