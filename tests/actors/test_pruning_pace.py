"""How often is pruned: every hour, more rarely where it takes long, and again after whatever failed."""

from __future__ import annotations

import asyncio

import pytest

from actors.pruning import PRUNE_INTERVAL_S, RESTS_FOR, prune_forever
from infra.clock import ManualClock
from infra.storage.errors import UnavailableStorageError


async def test_pruning_waits_an_hour_or_nine_times_as_long_as_it_took_and_goes_on_after_errors() -> None:
    clock = ManualClock()
    pauses: list[float] = []
    takes_s = iter([1.0, 1_000.0, 2.0])
    fails = iter([None, UnavailableStorageError("away"), RuntimeError("broken")])

    async def sleep(pause_s: float) -> None:
        pauses.append(pause_s)
        if len(pauses) == 4:
            raise asyncio.CancelledError

    async def prune() -> None:
        clock.advance(int(next(takes_s) * 1000))
        error = next(fails)
        if error is not None:
            raise error

    with pytest.raises(asyncio.CancelledError):
        await prune_forever("orders-0", prune, clock, sleep=sleep)
    assert pauses == [PRUNE_INTERVAL_S, PRUNE_INTERVAL_S, RESTS_FOR * 1_000.0, PRUNE_INTERVAL_S]
