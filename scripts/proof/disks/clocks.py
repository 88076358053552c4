"""Two processes transfer in one storage, and the clock of one is wrong: ahead, behind, jumping, back and forth.

The engine stamps records with a process's clock, and a record whose transaction is undecided may be aborted once its
stamp is a lifetime old, or once the reader has watched it that long. So a clock that runs ahead makes its process abort
others too early, and one that runs behind is aborted too early by others; no clock decides what commits. Expected are
conflicts, never a wrong outcome.

The wrong clock comes from libfaketime; the monotonic clock stays right, as it does on a machine whose time is set.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.proof.disks.accounts import Bank
from scripts.proof.disks.clients import client
from scripts.proof.disks.injury import ToolMissingError
from scripts.proof.disks.scenes import Storages, bank_options, judged, more_commits, open_on

_TEN_MINUTES_S = 600
_LIBRARIES = (
    "/usr/lib/{machine}-linux-gnu/faketime/libfaketimeMT.so.1",
    "/usr/lib/faketime/libfaketimeMT.so.1",
    "/usr/local/lib/faketime/libfaketimeMT.so.1",
    "/usr/lib64/faketime/libfaketimeMT.so.1",
)

CLOCKS: Mapping[str, Sequence[int]] = {
    "ten minutes ahead": (_TEN_MINUTES_S,),
    "ten minutes behind": (-_TEN_MINUTES_S,),
    "jumps backwards": (0, -60, -_TEN_MINUTES_S),
    "strobes": (30, -30) * 3,
}
"""What the clock is wrong by, in seconds, one after the other."""


def libfaketime() -> Path:
    """The library that gives a process a wrong clock, or ToolMissingError."""
    for place in _LIBRARIES:
        library = Path(place.format(machine=os.uname().machine))
        if library.exists():
            return library
    raise ToolMissingError("libfaketime is not installed; remedy: `apt-get install faketime`")


class WrongClock:
    """A clock that is told by a file what to be wrong by, so that it can jump while a process runs."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._library = libfaketime()
        self.set(0)

    def set(self, wrong_by_s: int) -> None:
        """From now on; processes look at the file whenever they look at the clock."""
        replacement = self._file.with_suffix(".new")
        replacement.write_text(f"{wrong_by_s:+d}\n")
        replacement.replace(self._file)

    @property
    def environment(self) -> Mapping[str, str]:
        """What a process needs in its environment to have this clock."""
        return {
            "LD_PRELOAD": str(self._library),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",  # its name before version 0.9.8
            "NO_FAKE_STAT": "1",
        }


async def wrong_clock(
    storages: Storages,
    url: str,
    work: Path,
    *,
    name: str,
    lifetime_ms: int = 2_000,
    commits: int = 6,
    seed: int = 1,
) -> dict[str, Any]:
    """Two processes, of which one has the clock called `name` in CLOCKS. It is killed once, and its successor goes on.

    The killed one leaves records PREPARED with wrong stamps: the other must neither wait for ever nor guess.
    """
    bank = Bank("".join(letter if letter.isalnum() else "_" for letter in name))
    await open_on(storages, bank)
    clock = WrongClock(work / "clock")
    options = (*bank_options(bank), "--lifetime-ms", str(lifetime_ms))
    offsets = list(CLOCKS[name])
    randomness = random.Random(seed)
    async with client(url, "right", *options, "--lanes", "1") as right:
        said = [right]
        for life in range(2):
            wrong_options = (*options, "--seed", str(randomness.randrange(1_000_000)))
            async with client(url, f"wrong-{life}", *wrong_options, environment=clock.environment) as wrong:
                said.append(wrong)
                for step, offset in enumerate(offsets):
                    clock.set(offset)
                    await wrong.mark(f"{step}: {offset}")
                    await more_commits((right, wrong), max(commits // len(offsets), 2))
                if life == 0:
                    wrong.kill()
                    await wrong.wait()
                    await right.more_commits(commits)
                else:
                    await wrong.end()
        await right.end()
    report = await judged(storages, bank, said)
    report["clock"] = name
    report["clock was wrong by (s)"] = [one.clock_errors_s for one in said[1:]]
    return report
