"""The failpoint that stops a process stops it at that very point."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from infra.failpoints import arm

ROOT = Path(__file__).resolve().parents[2]
TIMES = 40

GOES_ON = f"""
import asyncio, threading
from infra.failpoints import reach

async def work():
    for number in range({TIMES}):
        await reach("prepare.after_records")
        print(number, flush=True)

# As in an actor: the loop is in a thread of its own, and others have work too.
threading.Thread(target=asyncio.run, args=(work(),)).start()
while threading.active_count() > 1:
    sum(range(1000))
"""


def test_a_process_that_hangs_at_a_failpoint_does_nothing_more_until_it_is_woken(tmp_path: Path) -> None:
    failpoints = tmp_path / "failpoints"
    arm(failpoints, ["prepare.after_records=hang@1"] * TIMES)
    environment = os.environ | {"CONCORD_FAILPOINTS": str(failpoints), "PYTHONPATH": str(ROOT)}

    with (
        (tmp_path / "said").open("w") as said,
        subprocess.Popen([sys.executable, "-c", GOES_ON], env=environment, stdout=said) as process,
    ):
        try:
            for number in range(TIMES):
                _until_stopped(process)
                assert (tmp_path / "said").read_text().splitlines() == [str(n) for n in range(number)]
                process.send_signal(signal.SIGCONT)
            assert process.wait(30) == 0
        finally:
            process.kill()
    assert (tmp_path / "said").read_text().splitlines() == [str(n) for n in range(TIMES)]


def _until_stopped(process: subprocess.Popen[bytes]) -> None:
    """Until every thread of it stands still."""
    deadline_s = time.monotonic() + 30
    while not all(state == "T" for state in _states(process.pid)):
        assert process.poll() is None, "it has ended"
        assert time.monotonic() < deadline_s, "it goes on"
        time.sleep(0.002)


def _states(pid: int) -> list[str]:
    """One letter for each thread, as /proc has it."""
    return [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in Path(f"/proc/{pid}/task").iterdir()]
