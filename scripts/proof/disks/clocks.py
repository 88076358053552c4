"""Two processes transfer in one storage, and the clock of one is wrong: ahead, behind, jumping, back and forth.

The engine stamps records with a process's clock, and a record whose transaction is undecided may be aborted once its
stamp is a lifetime old, or once the reader has watched it that long. So a clock that runs ahead makes its process abort
others too early, and one that runs behind is aborted too early by others; no clock decides what commits. Expected are
conflicts, never a wrong outcome.

The wrong clock comes from libfaketime; the monotonic clock stays right, as it does on a machine whose time is set.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC
from pathlib import Path
from typing import Any

from cassandra.cluster import Cluster

from infra.servers.cassandra import LocalCassandra
from scripts.proof.disks.accounts import Bank
from scripts.proof.disks.clients import client
from scripts.proof.disks.injury import ToolMissingError
from scripts.proof.disks.on_cassandra import cassandra_at, url_of
from scripts.proof.disks.scenes import Storages, bank_options, judged, more_commits, open_on, two_clients

_TEN_MINUTES_S = 600
_NEAR_S = 10
"""An answer on a busy machine takes its time, by which a clock then seems wrong as well."""
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

    def __init__(self, file: Path, *, of_jvm: bool = False) -> None:
        """`of_jvm`: a process of many threads that look at the clock all the time; it sees a jump a second late.

        With libfaketime's lock around each look, and with its repair of waits on the monotonic clock, Cassandra did not
        start in three minutes. So it gets the library without the lock, and no repair. Measured with 8 threads that ask
        for the time: 0.4 s without libfaketime, 21 s with both, 0.6 to 0.8 s like this.
        """
        self._file = file
        self._library = libfaketime()
        self._looks = {"FAKETIME_NO_CACHE": "1"}
        if of_jvm:
            self._library = self._library.with_name("libfaketime.so.1")
            self._looks = {"FAKETIME_CACHE_DURATION": "1", "FAKETIME_FORCE_MONOTONIC_FIX": "0"}
        self.set(0)

    def set(self, wrong_by_s: int) -> None:
        """From now on, or from when processes see it."""
        replacement = self._file.with_suffix(".new")
        replacement.write_text(f"{wrong_by_s:+d}\n")
        replacement.replace(self._file)

    @property
    def environment(self) -> Mapping[str, str]:
        """What a process needs in its environment to have this clock."""
        return {
            "LD_PRELOAD": str(self._library),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            **self._looks,
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",  # its name before version 0.9.8
            "NO_FAKE_STAT": "1",
        }


@contextlib.contextmanager
def inherited(environment: Mapping[str, str]) -> Iterator[None]:
    """Give `environment` to whatever is started in this block: servers take theirs from this process."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


async def wrong_clock_of_cassandra(work: Path, *, name: str, commits: int = 20) -> dict[str, Any]:
    """Two processes with right clocks; the server's own is the one called `name` in CLOCKS. It is killed once, too."""
    bank = Bank("server")
    clock = WrongClock(work / "clock", of_jvm=True)
    server = LocalCassandra(work / "cassandra", heap_mb=768)
    offsets = list(CLOCKS[name])
    with inherited(clock.environment):
        await server.start()
    try:
        storages, url = cassandra_at(server), url_of(server)
        async with two_clients(storages, url, bank) as clients:
            seen = []
            for life in range(2):
                for offset in offsets:
                    clock.set(offset)
                    seen.append(await _clock_error_s(server, offset))
                    await more_commits(clients, max(commits // len(offsets), 3))
                if life == 0:
                    server.kill()
                    await server.wait()
                    with inherited(clock.environment):
                        await server.start()
            for one in clients:
                await one.end()
        report = await judged(storages, bank, clients)
    finally:
        server.kill()
        await server.stop()
    return _told(report, name, [seen[: len(offsets)], seen[len(offsets) :]])


async def _clock_error_s(server: LocalCassandra, expected: int) -> int:
    """By how much the server's clock differs from ours, as soon as it is what is expected; else after half a minute."""
    return await asyncio.to_thread(_asked_for_the_time, server.contact_point, server.port, expected)


def _asked_for_the_time(host: str, port: int, expected: int) -> int:
    deadline_s = time.monotonic() + 30
    with Cluster([host], port) as cluster, cluster.connect() as session:
        while True:
            [(told,)] = session.execute("SELECT current_timestamp() FROM system.local")
            wrong_by_s = round(float(told.replace(tzinfo=UTC).timestamp()) - time.time())
            if abs(wrong_by_s - expected) <= _NEAR_S or time.monotonic() > deadline_s:
                return wrong_by_s
            time.sleep(0.2)


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
    return _told(report, name, [one.clock_errors_s for one in said[1:]])


def _told(report: dict[str, Any], name: str, seen: Sequence[Sequence[int]]) -> dict[str, Any]:
    """`report` with what the clock was wrong by in each life, which is wrong itself if it is not what CLOCKS says."""
    for life in seen:
        if len(life) != len(CLOCKS[name]) or any(
            abs(a - b) > _NEAR_S for a, b in zip(life, CLOCKS[name], strict=False)
        ):
            report["wrong"].append(f"the clock was wrong by {list(life)} s instead of {list(CLOCKS[name])} s")
    return {**report, "clock": name, "clock was wrong by (s)": [list(life) for life in seen]}
