"""What hurts disks and clocks does so: otherwise the tests that rely on it would show nothing."""

from __future__ import annotations

import asyncio
import errno
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from scripts.proof.disks.clocks import WrongClock
from scripts.proof.disks.injury import SmallDisk, SystemCall, ToolMissingError, traced

SYNCING = """
import mmap, os, sys
file = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR)
os.ftruncate(file, 4096)
page = mmap.mmap(file, 4096)
for line in sys.stdin:
    for sync in (lambda: os.fsync(file), lambda: os.fdatasync(file), page.flush):
        try:
            sync()
            print("ok", flush=True)
        except OSError as error:
            print(error.errno, flush=True)
"""

CLOCK = """
import sys, time
for line in sys.stdin:
    print(time.time(), time.monotonic(), flush=True)
"""


@asynccontextmanager
async def running(
    program: str, *arguments: str, environment: dict[str, str] | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program, *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=environment,
    )
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()


async def asked(process: asyncio.subprocess.Process, answers: int) -> list[str]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"\n")
    return [(await process.stdout.readline()).decode().strip() for _ in range(answers)]


async def test_syncs_are_seen_falsified_and_left_alone_again(tmp_path: Path, tools: None) -> None:
    file, log, eio = tmp_path / "file", tmp_path / "log", str(errno.EIO)
    async with running(SYNCING, str(file)) as process:
        assert await asked(process, 3) == ["ok"] * 3
        async with traced(process.pid, log) as trace:
            assert await asked(process, 3) == ["ok"] * 3
        assert [(call.name, call.path, call.injected) for call in trace.calls()] == [
            ("fsync", str(file), False),
            ("fdatasync", str(file), False),
            ("msync", "", False),
        ]

        async with traced(process.pid, log, tamper="error=EIO") as trace:
            assert await asked(process, 3) == [eio] * 3
        assert trace.injected() == {"fsync": 1, "fdatasync": 1, "msync": 1}

        async with traced(process.pid, log, calls=["fdatasync"], tamper="error=EIO:when=2") as trace:
            assert await asked(process, 3) + await asked(process, 3) == ["ok"] * 4 + [eio, "ok"]
        assert trace.calls()[-1] == SystemCall("fdatasync", str(file), True, trace.calls()[-1].result)

        async with traced(process.pid, log, tamper="delay_enter=1000") as trace:
            assert await asked(process, 3) == ["ok"] * 3
        assert trace.injected().total() == 3
        assert await asked(process, 3) == ["ok"] * 3


async def test_a_process_that_is_gone_cannot_be_traced(tmp_path: Path, tools: None) -> None:
    async with running("") as process:
        await process.wait()
        with pytest.raises(ToolMissingError, match="cannot attach"):
            async with traced(process.pid, tmp_path / "log"):
                pytest.fail("there was nothing to trace")


def test_a_small_disk_fills_up_and_has_room_again_and_is_gone(tmp_path: Path, tools: None) -> None:
    with SmallDisk(tmp_path / "small", 2) as disk:
        (disk.directory / "before").write_bytes(b"x" * 1000)
        assert disk.free_bytes > 1_000_000
        disk.fill()
        with pytest.raises(OSError, match="No space left"):
            (disk.directory / "after").write_bytes(b"x")
        disk.make_room()
        (disk.directory / "after").write_bytes(b"x" * 1_000_000)
    assert list((tmp_path / "small").iterdir()) == []


async def test_a_wrong_clock_jumps_while_monotonic_time_goes_on(tmp_path: Path, wrong_clocks: Path) -> None:
    clock = WrongClock(tmp_path / "clock")
    async with running(CLOCK, environment=dict(clock.environment)) as process:
        told = []
        for wrong_by_s in (0, 600, -600, 30):
            clock.set(wrong_by_s)
            [answer] = await asked(process, 1)
            wall_s, monotonic_s = map(float, answer.split())
            assert round(wall_s - time.time(), -1) == wrong_by_s
            told.append(monotonic_s)

    assert told == sorted(told)
    assert told[-1] - told[0] < 60
