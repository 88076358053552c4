"""Servers that end when their disk fails: how they ended, what comes of a start, and whether that is as it must be."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Mapping, Sequence
from typing import Any

from infra.servers.errors import ServerError
from infra.servers.local_node import LocalNode

CRASHED = -signal.SIGABRT
"""What a JVM ends with when it touches a page of a file in memory that a full disk had no room for (SIGBUS)."""

NOT_TRIED = "not tried"

_ENDS_WITHIN_S = 60.0

Told = dict[str, Any]


async def end_of(server: LocalNode) -> int | None:
    """The exit code of a server that ends by itself within a minute; None if it lives on."""
    try:
        return await asyncio.wait_for(server.wait(), _ENDS_WITHIN_S)
    except TimeoutError:
        return None


async def start_of(server: LocalNode) -> str:
    """What comes of a start while there is no room."""
    try:
        await server.start()
    except ServerError as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return "serves"


def after_a_full_disk(report: Told, *, exit_code: int, ended: int | None, at_once: str) -> Told:
    """`report`, how the server ended, and what came of a start on the full disk; what is wrong about these, too."""
    if ended not in (exit_code, CRASHED):
        report["wrong"].append(f"the server ended with {ended}, not with {exit_code} or {CRASHED}")
    if at_once != NOT_TRIED and not at_once.startswith("DirectoryError"):
        report["wrong"].append(f"a start on the full disk: {at_once}")
    return {"server ended with": ended, "a start on the full disk": at_once, **report}


def after_failed_syncs(
    report: Told,
    *,
    exit_code: int,
    ended: int | None,
    used: Mapping[str, int],
    injected: Mapping[str, int],
    struck: Sequence[str],
) -> Told:
    """`report`, how the server ended, which syncs it `used` and which failed; what is wrong about these, too."""
    if ended != exit_code:
        report["wrong"].append(f"the server ended with {ended}, not with {exit_code}")
    if not injected:
        report["wrong"].append("no sync was made to fail")
    return {
        "server ended with": ended,
        "syncs it uses": dict(used),
        "syncs that failed": dict(injected),
        "of": struck,
        **report,
    }
