"""Keeps every domain actor of a running system paused while something is copied (see actors.pausing).

    pause all ─► each says that nothing is under way ─► …copying, the lease renewed… ─► resume all ─► did it hold?

The pause is good only if every actor says at the end that it has held all the time: one that was restarted meanwhile,
or whose lease has lapsed, knows of no pause. What was copied is then thrown away.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import structlog

from actors.pausing import PauseRenewal, PauseRequest
from actors.runtime import ActorLostError, Runtime

log = structlog.get_logger()

LEASE_S = 20.0
RENEW_EVERY_S = 5.0
ANSWER_WITHIN_S = 10.0


class PauseFailedError(Exception):
    """The system could not be paused, or did not stay so; the text says which actors."""


@asynccontextmanager
async def paused(
    runtime: Runtime, actors: Sequence[str], *, within_s: float, lease_s: float = LEASE_S
) -> AsyncIterator[None]:
    """No command is under way during the block, and none begins. Raises PauseFailedError, at its end at the latest.

    `within_s`: how long commands that have begun may take to end.
    """
    name = str(uuid.uuid4())
    renewing: asyncio.Task[None] | None = None
    try:
        request = PauseRequest(name, lease_s + within_s, within_s)
        refused = await _ask_all(runtime, actors, "pause", request, within_s + ANSWER_WITHIN_S)
        if refused:
            raise PauseFailedError(
                f"Not every actor came to rest within {within_s:g} s: {_named(refused)}. Nothing was copied. "
                "See what they wait for (`concord doctor`, /readyz), or give them longer with --within."
            )
        renewing = asyncio.ensure_future(_renew(runtime, actors, PauseRenewal(name, lease_s), RENEW_EVERY_S))
        yield
    except BaseException:
        await _end(renewing)
        # A lease ends by itself where nobody can be told.
        await asyncio.shield(_ask_all(runtime, actors, "resume", name, ANSWER_WITHIN_S))
        raise
    await _end(renewing)
    lapsed = await _ask_all(runtime, actors, "resume", name, ANSWER_WITHIN_S)
    if lapsed:
        raise PauseFailedError(
            f"The pause did not hold at {_named(lapsed)}, so what was copied may be torn and is thrown away. "
            "Make the backup again when these actors are steady."
        )


async def _renew(runtime: Runtime, actors: Sequence[str], renewal: PauseRenewal, every_s: float) -> None:
    while True:
        await asyncio.sleep(every_s)
        refused = await _ask_all(runtime, actors, "renew_pause", renewal, every_s)
        if refused:
            log.warning("the pause is not renewed", actors=refused)


async def _end(task: asyncio.Task[None] | None) -> None:
    if task is not None:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _ask_all(runtime: Runtime, actors: Sequence[str], method: str, item: Any, within_s: float) -> dict[str, str]:
    """What is wrong with each actor that did not answer True."""

    async def ask(actor: str) -> str:
        try:
            async with asyncio.timeout(within_s):
                (answer,) = await runtime.ask(actor, method, [item])
        except (ActorLostError, TimeoutError) as error:
            return type(error).__name__
        return "" if answer is True else "no"

    answers = await asyncio.gather(*map(ask, actors))
    return {actor: answer for actor, answer in zip(actors, answers, strict=True) if answer}


def _named(refused: dict[str, str]) -> str:
    return ", ".join(f"{actor} ({why})" if why != "no" else actor for actor, why in sorted(refused.items()))
