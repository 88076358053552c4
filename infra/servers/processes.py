"""Child processes that end with their parent, also when the parent is killed with SIGKILL.

Each child leads a session of its own, so Ctrl-C in the terminal reaches the parent alone, which then stops its
children in the right order. Should the parent die without stopping them, the kernel ends them (`launch.py`).

The kernel ties that promise to the parent's *thread*: a child is killed when the thread that spawned it ends, even
if the process lives on. `spawn` therefore refuses every thread but the main one. And it covers the child alone, not
the child's own children: whoever spawns further uses `spawn` too. Outside Linux there is no such promise: after
SIGKILL of the parent, children must be stopped by hand (the lock of their data directory names them).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

_LAUNCHER = str(Path(__file__).with_name("launch.py"))
_POLL_INTERVAL_S = 0.05


class ChildProcess:
    """A running child. Made by `spawn`; `wait` and `stop` may be called by several tasks at once."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """The exit code, negative for a signal's number; None while the process runs."""
        return self._process.poll()

    async def wait(self) -> int:
        """Wait for the end of the process; its exit code."""
        while self._process.poll() is None:
            try:
                descriptor = os.pidfd_open(self.pid)
            except (AttributeError, OSError):  # not Linux, or a kernel before 5.3
                await asyncio.sleep(_POLL_INTERVAL_S)
                continue
            try:
                await _readable(descriptor)
            finally:
                os.close(descriptor)
        code = self._process.poll()
        assert code is not None
        return code

    def send_signal(self, number: signal.Signals) -> None:
        """Signal the child alone; nothing happens when it has ended."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL to the child and everything in its process group."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    async def stop(self, *, grace_s: float) -> int:
        """SIGTERM, then after `grace_s` seconds SIGKILL; the exit code."""
        self.send_signal(signal.SIGTERM)
        try:
            return await asyncio.wait_for(self.wait(), grace_s)
        except TimeoutError:
            self.kill()
            return await self.wait()


def spawn(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    log_path: Path | None = None,
    log_max_bytes: int = 4 * 1024 * 1024,
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
    death_signal: signal.Signals = signal.SIGKILL,
) -> ChildProcess:
    """Start `argv` in a session of its own; it gets `death_signal` when this process ends without stopping it.

    `env` replaces the environment (None inherits it). Standard output and error are appended to `log_path`, which
    is set aside as `….1` first when it has grown beyond `log_max_bytes`; without a log path both are inherited.
    A program that cannot be executed ends with 127 and says so in the log. Call from the main thread (see above):
    RuntimeError elsewhere.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("spawn() must be called from the main thread: its children end with the calling thread")
    launcher = [sys.executable, "-I", "-S", _LAUNCHER, str(os.getpid()), str(int(death_signal))]
    with contextlib.ExitStack() as stack:
        output = None
        if log_path is not None:
            log_path.parent.mkdir(parents=True, exist_ok=True)
            if log_path.exists() and log_path.stat().st_size > log_max_bytes:
                log_path.replace(log_path.with_name(log_path.name + ".1"))
            output = stack.enter_context(log_path.open("ab"))
        process = subprocess.Popen(
            [*launcher, *argv],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output is not None else None,
            env=dict(env) if env is not None else None,
            cwd=cwd,
            pass_fds=pass_fds,
            start_new_session=True,
        )
    return ChildProcess(process)


async def _readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(descriptor, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(descriptor)
