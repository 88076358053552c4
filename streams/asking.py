"""Asking an actor until it answers: how the stream side waits without giving up and without standing still."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from actors.runtime import ActorLostError, ActorSilentError, Runtime
from infra.consensus_commit.errors import TransactionError
from infra.storage.errors import StorageError

log = structlog.get_logger()

PASSING = (ActorLostError, StorageError, TransactionError)
"""What may pass: the actor is being restarted, or its storage is away. Doing it again is harmless."""


@dataclass(frozen=True)
class Patience:
    """How long to wait between two tries, and how often a silent actor is asked whether it lives."""

    pause_s: float = 0.1
    longest_pause_s: float = 2.0
    health_every_s: float = 3.0
    health_within_s: float = 10.0


async def ask_until_answered(
    runtime: Runtime,
    actor: str,
    method: str,
    items: Sequence[Any],
    patience: Patience,
    tried: Callable[[], None],
) -> list[Any]:
    """The actor's replies to `items`, in order. What may pass is waited for, for as long as this process lives.

    `tried` is called for every new try, and while the actor is silent for every sign of life (rule 12): a command
    may wait in it for storage as long as that takes. Raises what the actor raises beyond what may pass.
    """
    pause_s = patience.pause_s
    while True:
        silent = False
        asking = asyncio.ensure_future(runtime.ask(actor, method, items))
        try:
            await _wait_while_it_lives(runtime, actor, asking, patience, tried)
            return await asking
        except PASSING as error:
            silent = isinstance(error, ActorSilentError)
            log.warning("asking_again", actor=actor, method=method, items=len(items), error=repr(error))
        finally:
            asking.cancel()
        await asyncio.sleep(pause_s)
        if not silent:  # else this process may be what is cut off, and a restart of it the cure: the watchdog's to say
            tried()
        pause_s = min(pause_s * 2, patience.longest_pause_s)


async def _wait_while_it_lives(
    runtime: Runtime, actor: str, asking: asyncio.Future[list[Any]], patience: Patience, tried: Callable[[], None]
) -> None:
    while not (await asyncio.wait({asking}, timeout=patience.health_every_s))[0]:
        try:
            async with asyncio.timeout(patience.health_within_s):
                await runtime.ask(actor, "health", [None])
        except (*PASSING, TimeoutError):
            continue
        tried()
