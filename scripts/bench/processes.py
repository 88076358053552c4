"""CPU seconds and memory of a running system, process by process. Reads /proc; Linux only."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.servers import guard
from scripts.proof.running import ACTOR_TITLE, VIEWS
from scripts.proof.stored import stored_at

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")

_RAY_PARTS = ("raylet", "gcs_server")


@dataclass(frozen=True)
class Usage:
    cpu_s: float
    resident_mb: float


def usage(runtime: dict[str, Any], actors: Mapping[int, str] | None = None) -> dict[str, Usage]:
    """What each part of the system of a `runtime.json` has used so far; most of Ray's own processes are summed up.

    `actors` are those of `actor_pids`, for whoever looks often; without it the storage is asked each time.
    """
    actors = actor_pids(runtime["storage"]) if actors is None else actors
    found: dict[str, Usage] = {}
    for pid in {*guard.marked(runtime["run"]), runtime["pid"]}:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue
        name = actors.get(pid) or _name(command, is_supervisor=pid == runtime["pid"])
        before = found.get(name, Usage(0, 0))
        cpu_s = (int(fields[11]) + int(fields[12])) / _TICKS
        found[name] = Usage(before.cpu_s + cpu_s, before.resident_mb + int(fields[21]) * _PAGE / 2**20)
    return found


def spent(before: dict[str, Usage], after: dict[str, Usage]) -> dict[str, float]:
    """CPU seconds by part between two looks, the greatest first."""
    by_part = {name: now.cpu_s - before.get(name, Usage(0, 0)).cpu_s for name, now in after.items()}
    return dict(sorted(by_part.items(), key=lambda item: -item[1]))


def _name(command: str, *, is_supervisor: bool) -> str:
    if is_supervisor:
        return "supervisor"
    if "kafka.Kafka" in command:
        return "kafka"
    if "CassandraDaemon" in command:
        return "cassandra"
    if "scripts.worker" in command:
        return command.partition("--name ")[2].split()[0]
    if command.startswith(ACTOR_TITLE):
        return VIEWS
    return next((part for part in _RAY_PARTS if f"/{part} " in command), "ray's others")


def actor_pids(storage_url: str) -> dict[int, str]:
    """The newest incarnation of each actor names its process."""
    with stored_at(storage_url) as storage:
        rows = sorted(storage.rows("coordinator.incarnations"), key=lambda row: int(row["started_at_ms"]))
    return {pid: actor for actor, pid in {row["actor"]: row["pid"] for row in rows}.items()}
