"""When what is old is deleted: every hour, and at most a tenth of the time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from infra.clock import Clock
from infra.storage.errors import StorageError

log = structlog.get_logger()

PRUNE_INTERVAL_S = 3_600.0

RESTS_FOR = 9
"""So many times as long as it took. A pruning reads whole tables, which may take longer than its interval."""


async def prune_forever(
    actor: str,
    prune: Callable[[], Awaitable[object]],
    clock: Clock,
    *,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Prune until cancelled. What fails is logged, and done at the next time."""
    pause_s = PRUNE_INTERVAL_S
    while True:
        await sleep(pause_s)
        began_s = clock.monotonic_s()
        try:
            await prune()
        except StorageError as error:
            log.warning("pruning waits for storage", actor=actor, error=str(error))
        except Exception:
            log.exception("pruning failed", actor=actor)
        pause_s = max(PRUNE_INTERVAL_S, RESTS_FOR * (clock.monotonic_s() - began_s))
