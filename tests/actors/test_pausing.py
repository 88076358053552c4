"""A pause for a backup: no command begins, what has begun ends, and nobody is held up for longer than was agreed."""

from __future__ import annotations

import asyncio

from harness import System, order, scripted
from weather import PatientEvent

from actors.domain import Transaction
from actors.orders.handlers import place_order
from actors.pausing import PauseRenewal, PauseRequest, Pausing
from infra.storage.port import Storage
from schemas.orders import PlaceOrder

LONG_S = 60.0


async def paused(system: System, name: str = "p1", *, lease_s: float = LONG_S, within_s: float = 10.0) -> list[bool]:
    """Ask every domain actor to pause; what each said."""
    request = PauseRequest(name, lease_s, within_s)
    return await on_every_actor(system, "pause", request)


async def on_every_actor(system: System, method: str, item: object) -> list[bool]:
    actors = [name for name in system.runtime.names() if not name.startswith(("coordinator", "views"))]
    replies = await asyncio.gather(*(system.runtime.ask(actor, method, [item]) for actor in actors))
    return [reply for (reply,) in replies]


async def test_a_command_that_has_begun_ends_before_the_pause_and_one_that_has_not_waits_for_its_end(
    storage: Storage,
) -> None:
    async with System(storage) as system:
        await system.open_shop()
        begun, go_on = PatientEvent(), PatientEvent()

        async def slowly(tx: Transaction, command: PlaceOrder) -> dict[str, object] | None:
            begun.set()
            await go_on.wait()
            return await place_order(tx, command)

        scripted("x1", PlaceOrder, slowly)
        first = asyncio.ensure_future(system.send(order("o1"), "x1"))
        await begun.wait()
        pausing = asyncio.ensure_future(paused(system))
        await asyncio.sleep(0.05)
        second = asyncio.ensure_future(system.send(order("o2"), "x2"))
        await asyncio.sleep(0.05)

        assert not pausing.done()
        go_on.set()
        assert all(await pausing)
        assert (await first).status == "committed"
        assert await system.outcome("orders", "x1")
        assert not await system.outcome("orders", "x2")
        assert not second.done()

        assert all(await on_every_actor(system, "resume", "p1"))
        assert (await second).status == "committed"
        await system.check_at_rest()


async def test_a_pause_that_nobody_renews_lapses_and_says_so() -> None:
    pausing = Pausing("orders-0")

    assert await pausing.pause(PauseRequest("p1", 0.02, 1.0))
    async with asyncio.timeout(5), pausing.command():
        pass

    assert not pausing.renew(PauseRenewal("p1", LONG_S))
    assert not pausing.resume("p1")


async def test_a_pause_that_is_renewed_holds_and_only_its_own_name_ends_it() -> None:
    pausing = Pausing("orders-0")

    assert await pausing.pause(PauseRequest("p1", LONG_S, 1.0))
    assert pausing.renew(PauseRenewal("p1", LONG_S))
    assert not await pausing.pause(PauseRequest("p2", LONG_S, 1.0))
    assert not pausing.resume("p2")
    waiting = asyncio.ensure_future(_pass(pausing))
    await asyncio.sleep(0)
    assert not waiting.done()

    assert pausing.resume("p1")
    await waiting


async def test_what_does_not_end_in_time_is_not_held_up_and_the_pause_is_refused() -> None:
    pausing = Pausing("orders-0")
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        async with pausing.command():
            begun.set()
            await go_on.wait()

    working = asyncio.ensure_future(work())
    await begun.wait()

    assert not await pausing.pause(PauseRequest("p1", LONG_S, 0.01))
    async with asyncio.timeout(5), pausing.command():
        pass
    go_on.set()
    await working


async def _pass(pausing: Pausing) -> None:
    async with pausing.command():
        pass
