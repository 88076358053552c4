"""What every scene has: two processes of one bank, and a judgement in the end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Any

from infra.storage.port import Storage
from scripts.proof.disks.accounts import OPENING, Bank, judge, open_bank
from scripts.proof.disks.clients import Client, client

ACCOUNTS = range(8)

Storages = Callable[[], Storage]
"""Opens the storage that the clients use, for opening the bank and for judging it."""


@contextlib.asynccontextmanager
async def two_clients(
    storages: Storages, url: str, bank: Bank, *options: str, opening: bool = True
) -> AsyncIterator[tuple[Client, Client]]:
    """Two processes that transfer in `bank`, which is made first unless it is there already."""
    if opening:
        await open_on(storages, bank)
    named = bank_options(bank)
    async with client(url, "one", *named, *options) as one, client(url, "two", *named, *options) as two:
        yield one, two


async def open_on(storages: Storages, bank: Bank) -> None:
    """Make `bank` on the storage that `storages` opens."""
    storage = storages()
    await open_bank(storage, bank, ACCOUNTS)
    await storage.close()


def bank_options(bank: Bank) -> tuple[str, ...]:
    """How a client is told which bank it serves."""
    return ("--bank", bank.name, *(("--one-namespace",) if bank.one_namespace else ()))


async def more_commits(clients: Iterable[Client], count: int) -> None:
    """Wait until each of the clients was acknowledged `count` more transfers."""
    await together(one.more_commits(count) for one in clients)


async def more(clients: Iterable[Client], count: int, what: str, counted: Callable[[Client], int]) -> None:
    """Wait until `counted` has grown by `count` for each of the clients."""

    async def of(one: Client) -> None:
        goal = counted(one) + count
        await one.until(lambda: counted(one) >= goal, f"{count} more {what}")

    await together(of(one) for one in clients)


async def together(waits: Iterable[Awaitable[object]]) -> None:
    """Wait for all of them; the first error of one is raised."""
    await asyncio.gather(*waits)


async def judged(storages: Storages, bank: Bank, clients: Sequence[Client]) -> dict[str, Any]:
    """What the clients said, in numbers, and what is `wrong`, if anything. The sums that readers saw count, too."""
    storage = storages()
    try:
        wrong = await judge(storage, bank, ACCOUNTS, [one.ledger for one in clients])
    finally:
        await storage.close()
    exact = OPENING * len(ACCOUNTS)
    for one in clients:
        if odd := {total: count for total, count in one.sums.items() if total != exact}:
            wrong.append(f"{one.name} saw sums other than {exact}: {odd}")
    return {"wrong": wrong, "clients": {one.name: one.summary() for one in clients}}
