"""Theory of operation: nothing of a run may outlive it, however it ended.

A supervisor that is killed with SIGKILL cannot stop what it started. The kernel does it for direct children that
asked for it (`PR_SET_PDEATHSIG`), but not for grandchildren and not for those that detach: a Ray cluster leaves
agents behind. So every process of a run carries a mark in its environment, and a guard, a process of its own, holds
the read end of a pipe whose write end only the supervisor has. The kernel closes that end when the supervisor is
gone, in whatever way; the guard then kills every process that carries the mark until none is left, and ends.

    supervisor ──pipe (never written to)──► guard          end of file = the supervisor is gone

The guard is stdlib only and starts in milliseconds, before anything that it guards. It is deaf to the terminal's
signals (a session of its own) and to SIGTERM, which a supervisor's supervisor may send to all of its group. It
never kills itself, a process of another user, or one without the mark: pids are not remembered but looked up anew
each time, together with their environment, so a reused pid is never hit. Linux only (`/proc`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

MARK = "CONCORD_RUN"
"""The environment variable whose value marks the processes of one run."""

_PAUSE_S = 0.1
_LOOKS = 2
"""How often in a row none must be found: one that has just been started shows no environment for a moment."""
_PATIENCE_S = 30.0
"""How long the guard tries before it leaves what SIGKILL does not end (a process in an uninterruptible wait)."""


class Guard:
    """A running guard. The process that made it must keep it: the guard acts when this process ends."""

    def __init__(self, run: str, environment: Mapping[str, str] | None = None) -> None:
        """Start a guard for the processes whose environment has CONCORD_RUN=`run`."""
        read_end, write_end = os.pipe()  # neither is inherited by later children (PEP 446)
        try:
            os.set_inheritable(read_end, True)
            # The guard's environment lacks the mark, so that guards of one run never hunt each other.
            clean = {k: v for k, v in (os.environ if environment is None else environment).items() if k != MARK}
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(Path(__file__).resolve()), run, str(read_end)],
                env=clean,
                pass_fds=(read_end,),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        except BaseException:
            os.close(write_end)
            raise
        finally:
            os.close(read_end)
        self._write_end = write_end

    def release(self, *, timeout_s: float = _PATIENCE_S) -> None:
        """Let the guard do its work now (after a clean stop it finds nothing) and wait until it has ended."""
        os.close(self._write_end)
        try:
            self.process.wait(timeout_s + 5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def marked(run: str) -> list[int]:
    """The pids of this user's processes whose environment, as it was when they started, has the mark of `run`."""
    wanted = f"{MARK}={run}".encode()
    return [pid for pid in _pids() if wanted in _environment(pid)]


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # gone meanwhile, or somebody else's
        return []


def kill_all(run: str, *, patience_s: float = _PATIENCE_S) -> bool:
    """SIGKILL the processes of `run` until none is left; False if some were still there after `patience_s`."""
    until = time.monotonic() + patience_s
    looks = 0
    while True:
        pids = marked(run)  # an ended process that nobody has waited for has no environment any more
        looks = 0 if pids else looks + 1
        if looks == _LOOKS:
            return True
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if pids and time.monotonic() > until:
            return False
        time.sleep(_PAUSE_S)


def main(run: str, read_end: int) -> int:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(read_end, 1):
        pass
    return 0 if kill_all(run) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
