"""What is done to a disk: it is made small and full, and its syncs are made to fail or to last.

    SmallDisk   a file system of a few megabytes (tmpfs, so that nothing of the machine's own fills up)
    traced      strace on a running process: which calls it uses to sync, and what it is told when it does

A sync that is made to fail is not carried out: the caller is told EIO in place of the call. What was written stays in
the page cache, though, and outlives the process; that a machine lost power is not shown here.

Both need rights that not every machine gives. Then `ToolMissingError` says what to do about it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SYNCS = ("fsync", "fdatasync", "msync", "sync_file_range", "syncfs", "sync")
"""Every call by which Linux lets a program ask for what it wrote to be on the disk."""

_ATTACH_WITHIN_S = 30.0
_MAY_TRACE = "remedy: run this as root, in a container with `--cap-add SYS_PTRACE`"
_BLOCK = b"\0" * 65_536


class ToolMissingError(Exception):
    """This machine does not let us hurt its disks. The message ends with the remedy."""


class SmallDisk:
    """A file system of `megabytes` at `directory`, from `with` on. Emptied and gone at its end."""

    def __init__(self, directory: Path, megabytes: int) -> None:
        self.directory = directory.absolute()
        self._megabytes = megabytes
        self._filler = self.directory / "filler"

    def __enter__(self) -> SmallDisk:
        if os.geteuid() != 0 or shutil.which("mount") is None:
            raise ToolMissingError("only root may mount a small file system; remedy: run this as root on Linux")
        self.directory.mkdir(parents=True, exist_ok=True)
        options = f"size={self._megabytes}m,mode=0700"
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "concord-small-disk", str(self.directory)],
            capture_output=True,
            text=True,
            check=False,
        )
        if mounted.returncode != 0:
            raise ToolMissingError(
                f"no file system can be mounted here ({mounted.stderr.strip()}); "
                "remedy: run this with CAP_SYS_ADMIN (`docker run --cap-add SYS_ADMIN`)"
            )
        return self

    def __exit__(self, *exception: object) -> None:
        for lazily in ([], ["-l"]):  # somebody who is just dying may still hold a file
            if (
                subprocess.run(["umount", *lazily, str(self.directory)], capture_output=True, check=False).returncode
                == 0
            ):
                return

    def fill(self) -> None:
        """Take every byte that is left. Others may still write where they have room already."""
        with self._filler.open("ab", buffering=0) as file:
            for block in (_BLOCK, _BLOCK[:4096]):
                try:
                    while True:
                        file.write(block)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise

    def make_room(self) -> None:
        """What an operator does: delete something that nobody needs."""
        self._filler.unlink(missing_ok=True)

    @property
    def free_bytes(self) -> int:
        return shutil.disk_usage(self.directory).free


@dataclass(frozen=True, slots=True)
class SystemCall:
    """One call as strace saw it: its name, the file it went to ("" where it has none), and whether it was falsified."""

    name: str
    path: str
    injected: bool
    result: str


_CALL = re.compile(r"^\d+\s+(?:<\.\.\. )?(\w+)(?:\((?:\d+<([^>]*)>)?| resumed)(.*?)= (.*)$")


class Trace:
    """What strace writes down, line by line, while it is attached."""

    def __init__(self, log: Path) -> None:
        self._log = log

    def forget(self) -> None:
        """Begin anew; not while strace writes."""
        self._log.unlink(missing_ok=True)

    def calls(self) -> list[SystemCall]:
        """The calls that have returned so far. One that was interrupted by another thread's line has no path."""
        if not self._log.exists():
            return []
        found = []
        for line in self._log.read_text(errors="replace").splitlines():
            if match := _CALL.match(line):
                name, path, _, result = match.groups()
                found.append(SystemCall(name, path or "", "(INJECTED)" in line or "(DELAYED)" in line, result))
        return found

    def count(self) -> Counter[str]:
        """How often each call was made."""
        return Counter(call.name for call in self.calls())

    def injected(self) -> Counter[str]:
        """How often each call was made to fail or to wait."""
        return Counter(call.name for call in self.calls() if call.injected)

    def struck(self) -> list[str]:
        """The names of the files, with their directories', whose calls were; of the first few."""
        paths = dict.fromkeys("/".join(Path(call.path).parts[-2:]) for call in self.calls() if call.injected)
        return [path for path in paths if path][:3]

    async def more_injected(self, count: int, *, within_s: float = 60.0) -> None:
        """Wait until `count` more calls were made to fail or to wait; AssertionError after `within_s`."""
        goal = self.injected().total() + count
        try:
            async with asyncio.timeout(within_s):
                while self.injected().total() < goal:  # noqa: ASYNC110 - a file tells nobody that it has grown
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"only {self.injected()} calls were tampered with in {within_s:.0f} s") from None


def find_strace() -> str:
    """The path of strace, or ToolMissingError."""
    found = shutil.which("strace")
    if found is None:
        raise ToolMissingError("strace is not installed; remedy: `apt-get install strace`")
    return found


def check_strace() -> None:
    """ToolMissingError unless strace is there and may trace; a process of the same user stands for all."""
    tried = subprocess.run([find_strace(), "-o", os.devnull, "true"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        raise ToolMissingError(f"strace may not trace here ({tried.stderr.strip()}); {_MAY_TRACE}")


@contextlib.asynccontextmanager
async def traced(
    pid: int, log: Path, *, calls: Sequence[str] = SYNCS, tamper: str = "", path: Path | None = None
) -> AsyncIterator[Trace]:
    """Watch the `calls` of a process and its threads until the end of the block, writing to `log`.

    `tamper` is strace's: `error=EIO`, `error=EIO:when=3+4`, `delay_enter=500000` (µs). `path` limits both to the
    calls on that file. A process may end meanwhile. Raises ToolMissingError where strace is absent or not allowed.
    """
    trace = Trace(log)
    trace.forget()
    command = [find_strace(), "-f", "-y", "-o", str(log), "-e", f"trace={','.join(calls)}"]
    if tamper:
        command += ["-e", f"inject={','.join(calls)}:{tamper}"]
    if path is not None:
        command += ["-P", str(path)]
    strace = await asyncio.create_subprocess_exec(
        *command, "-p", str(pid), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert strace.stderr is not None
    reading: asyncio.Task[bytes] | None = None
    try:
        async with asyncio.timeout(_ATTACH_WITHIN_S):
            said = b""
            while b"attached" not in said:
                line = await strace.stderr.readline()
                said += line
                if not line:
                    raise ToolMissingError(
                        f"strace cannot attach ({said.decode(errors='replace').strip()}); {_MAY_TRACE}"
                    )
        reading = asyncio.create_task(strace.stderr.read())
        yield trace
    finally:
        if strace.returncode is None:
            # Detaches; the process goes on. Not `send_signal`, which looks first, and would take the end of a process
            # from the watcher that waits for it.
            with contextlib.suppress(ProcessLookupError):
                os.kill(strace.pid, signal.SIGINT)
        try:
            await asyncio.wait_for(strace.wait(), 30)
        except TimeoutError:
            os.kill(strace.pid, signal.SIGKILL)
            await strace.wait()
        if reading is not None:
            await reading
