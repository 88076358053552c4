"""Two processes transfer in one Cassandra while the disk below it fills up, fails to sync, or takes its time.

Whoever watches over a server starts it again when it ends (`concord up` does); here that is this file.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.servers.cassandra import LocalCassandra
from infra.storage.cassandra import CassandraStorage
from scripts.proof.disks.accounts import Bank
from scripts.proof.disks.clients import Client
from scripts.proof.disks.endings import NOT_TRIED, after_a_full_disk, after_failed_syncs, end_of, start_of
from scripts.proof.disks.injury import SYNCS, SmallDisk, traced
from scripts.proof.disks.scenes import Storages, judged, more, more_commits, together, two_clients

REQUEST_TIMEOUT_S = 2.0
_SMALL = {
    # A server that is at home on a small disk: it flushes after kilobytes, and its log is of small files.
    "commitlog_segment_size": "2MiB",
    "commitlog_total_space": "8MiB",
    "memtable_heap_space": "8MiB",
    "memtable_offheap_space": "8MiB",
    "memtable_cleanup_threshold": 0.2,
}
_NOTE = ("--note-bytes", "3000")


EXIT_CODE = 100
"""What Cassandra ends with when a disk fails and its policies say `die`."""


@dataclass(frozen=True, slots=True)
class Below:
    """A running server, and the disks below it by what lies on them."""

    server: LocalCassandra
    disks: Mapping[str, SmallDisk]


@contextlib.asynccontextmanager
async def running(directory: Path, *, megabytes: int = 64, **settings: Any) -> AsyncIterator[Below]:
    """A Cassandra of small means, its data on one small disk and its commit log on another; killed in the end.

    `settings` are laid over its own.
    """
    with SmallDisk(directory / "data", megabytes) as data, SmallDisk(directory / "log", megabytes) as log:
        places = {
            "data_file_directories": [str(data.directory / "data")],
            "commitlog_directory": str(log.directory / "commitlog"),
        }
        server = LocalCassandra(
            directory / "own", heap_mb=768, min_free_mb=1, settings={**_SMALL, **places, **settings}
        )
        await server.start()
        try:
            yield Below(server, {"data": data, "commitlog": log})
        finally:
            server.kill()
            await server.stop()


async def disk_full(below: Below, *, what: str, start_while_full: bool = True) -> dict[str, Any]:
    """The disk of `what` fills up under load; the server ends, room is made, the server is started.

    `start_while_full`: start it once before there is room, as whoever watches over it does; the server refuses.
    """
    server, disk, bank = below.server, below.disks[what], Bank(f"full_{what}")
    async with two_clients(cassandra_at(server), url_of(server), bank, *_NOTE) as clients:
        await more_commits(clients, 10)
        disk.fill()
        ended = await end_of(server)
        await more(clients, 3, "transfers given up", _given_up)
        at_once = await start_of(server) if start_while_full else NOT_TRIED
        disk.make_room()
        await server.start()
        await more_commits(clients, 10)
        for one in clients:
            await one.end()
    report = await judged(cassandra_at(server), bank, clients)
    told = after_a_full_disk(report, exit_code=EXIT_CODE, ended=ended, at_once=at_once)
    return {"full": what, **told}


async def sync_error(below: Below, work: Path, *, tamper: str = "error=EIO") -> dict[str, Any]:
    """Syncs fail under load. The server ends by itself, and what it acknowledged is there when it starts again."""
    server, bank = below.server, Bank("sync")
    async with two_clients(cassandra_at(server), url_of(server), bank) as clients:
        await more_commits(clients, 10)
        assert server.pid is not None
        async with traced(server.pid, work / "strace.log") as trace:
            await more_commits(clients, 10)
            used = trace.count()
        async with traced(server.pid, work / "strace.log", calls=tuple(used) or SYNCS, tamper=tamper) as trace:
            await together(one.mark("fails") for one in clients)
            begun = [set(one.ledger.begun) for one in clients]
            ended = await end_of(server)
            injected, struck = trace.injected(), trace.struck()
        await together(one.mark("ended") for one in clients)
        false = [id for one, before in zip(clients, begun, strict=True) for id in one.ledger.committed - before]
        server.kill()
        await server.wait()
        await server.start()
        await more_commits(clients, 10)
        for one in clients:
            await one.end()
    report = await judged(cassandra_at(server), bank, clients)
    if false and tamper == "error=EIO":
        report["wrong"].append(f"{len(false)} transfers were acknowledged while no sync succeeded")
    return after_failed_syncs(report, exit_code=EXIT_CODE, ended=ended, used=used, injected=injected, struck=struck)


async def slow_disk(below: Below, work: Path, *, delay_ms: int, commits: int = 3) -> dict[str, Any]:
    """Every sync lasts `delay_ms` longer. Where that is longer than clients wait, it is an outage to them."""
    server, bank = below.server, Bank(f"slow_{delay_ms}")
    async with two_clients(cassandra_at(server), url_of(server), bank) as clients:
        await more_commits(clients, 10)
        assert server.pid is not None
        reads = [one.reads for one in clients]
        async with traced(server.pid, work / "strace.log", tamper=f"delay_enter={delay_ms * 1000}") as trace:
            if delay_ms < 1000 * REQUEST_TIMEOUT_S / 4:
                await more_commits(clients, commits)
            else:
                await more(clients, 3, "transfers given up", _given_up)
            await trace.more_injected(0 if trace.injected() else 1)  # it is known of one when it is over
            delayed = trace.injected()
            reads = [one.reads - before for one, before in zip(clients, reads, strict=True)]
        await more_commits(clients, 10)
        for one in clients:
            await one.end()
    return {
        "delay_ms": delay_ms,
        "syncs that lasted": dict(delayed),
        "reads meanwhile": reads,
        **await judged(cassandra_at(server), bank, clients),
    }


def _given_up(one: Client) -> int:
    return one.refused + len(one.ledger.unknown)


def cassandra_at(server: LocalCassandra) -> Storages:
    """Opens storages at `server`."""
    return lambda: CassandraStorage([server.contact_point], server.port)


def url_of(server: LocalCassandra) -> str:
    """How clients reach `server`, with the deadline that they have."""
    return f"cassandra://{server.contact_point}:{server.port}/?request_timeout_s={REQUEST_TIMEOUT_S}"
