"""Which process an actor is, and which earlier processes of its name are known to be gone (rules 4, 7 and 8).

Every start of an actor is an incarnation with a row of its own. "Known to be gone" is a claim about a process, not
about silence: a paused or partitioned actor is not gone, and what it began may still arrive.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

from infra.clock import Clock
from infra.storage.operations import DataType, Key, Put, Scan, TableSchema, Value
from infra.storage.port import Storage

INCARNATIONS = TableSchema(
    "coordinator",
    "incarnations",
    {
        "actor": DataType.TEXT,
        "incarnation": DataType.TEXT,
        "boot_id": DataType.TEXT,
        "pid": DataType.BIGINT,
        "process_started": DataType.BIGINT,
        "started_at_ms": DataType.BIGINT,
    },
    ("actor",),
    ("incarnation",),
)


class Incarnations:
    """Registers this process and judges others. Of a process on another machine nothing is known: it may live."""

    def __init__(self, storage: Storage, clock: Clock) -> None:
        self._storage = storage
        self._clock = clock

    async def create_tables(self) -> None:
        await self._storage.create_table(INCARNATIONS)

    async def register(self, actor: str) -> str:
        """A new incarnation of `actor`, run by this process."""
        incarnation = self._clock.new_id()
        columns: dict[str, Value] = {
            "boot_id": boot_id(),
            "pid": os.getpid(),
            "process_started": process_started(os.getpid()) or 0,
            "started_at_ms": self._clock.now_ms(),
        }
        await self._storage.mutate([Put(INCARNATIONS, Key((actor,), (incarnation,)), columns)])
        return incarnation

    async def known_gone(self, actor: str, incarnation: str) -> bool:
        """True if the process behind an incarnation has certainly ended; False when in doubt."""
        row = await self._storage.get(INCARNATIONS, Key((actor,), (incarnation,)))
        if row is None:
            return False
        if row["boot_id"] != boot_id():
            # A process of an earlier boot of this machine is gone; one of another machine may live.
            return str(row["boot_id"]).partition("/")[0] == boot_id().partition("/")[0]
        return process_started(int(row["pid"] or 0)) != row["process_started"]

    async def of(self, actor: str) -> list[str]:
        """Every incarnation that `actor` ever had."""
        return [str(row["incarnation"]) for row in await self._storage.scan(Scan(INCARNATIONS, (actor,)))]


def boot_id() -> str:
    """This machine and its current boot: `<node name>/<boot id>`."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return f"{platform.node()}/{path.read_text().strip() if path.exists() else 'unknown'}"


def process_started(pid: int) -> int | None:
    """The start time of a living process in clock ticks since boot (zombies count as ended), or None."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else int(fields[19])
