"""What time itself asks for: reservations that expire."""

from __future__ import annotations

from typing import Any

from harness import System, in_background
from weather import writes_to

from actors.pausing import PauseRequest
from infra.storage.port import Storage
from schemas.inventory import CancelReservation, ExpireReservation, ReserveStock, StockItem
from schemas.message import Command


def reserve(order_id: str, *, category: str = "art", expires_in_ms: int = 60_000) -> ReserveStock:
    return ReserveStock(
        category=category,
        order_id=order_id,
        customer_id="c0",
        items=(StockItem(product_id="p0", quantity=2),),
        expires_in_ms=expires_in_ms,
    )


async def due(system: System, actor: str = "inventory-0") -> list[tuple[str, Command]]:
    """(command id, command) of what is due at one actor now, as the stream worker would publish it."""
    (found,) = await system.runtime.ask(actor, "due", [system.clock.now_ms()])
    commands: list[tuple[str, Command]] = []
    for id, type_name, body, routing_key in found:
        assert type_name == "ExpireReservation"
        command = ExpireReservation.model_validate_json(body)
        assert command.routing_key == routing_key
        commands.append((id, command))
    return commands


async def reserved(system: System) -> dict[Any, Any]:
    return {row["category"]: row["reserved"] for row in await system.dump("inventory.products")}


async def test_a_reservation_expires_when_its_time_has_come_and_its_goods_are_free_again(storage: Storage) -> None:
    async with System(storage) as system:
        await system.open_shop(products=1, customers=1)
        await system.send(reserve("o1"), "x1")
        await system.check_at_rest()
        assert await due(system) == []
        assert (await reserved(system))["art"] == 2

        system.advance(61)
        commands = await due(system)
        assert await due(system) == commands  # the same ids, as long as it waits
        answers = await system.send_all(commands + commands)

        assert [answer.result for answer in answers] == [{"expired": True}] * 2
        assert answers[0] == answers[1]
        await system.check_at_rest()
        assert (await reserved(system))["art"] == 0
        assert await due(system) == []


async def test_in_a_pause_nothing_is_due_and_after_it_what_was(storage: Storage) -> None:
    async with System(storage) as system:
        await system.open_shop(products=1, customers=1)
        await system.send_all([("x1", reserve("o1"))])
        system.advance(61)
        assert await system.runtime.ask("inventory-0", "pause", [PauseRequest("backup", 60.0, 10.0)]) == [True]

        assert await due(system) == []

        assert await system.runtime.ask("inventory-0", "resume", ["backup"]) == [True]
        assert len(await due(system)) == 1


async def test_each_actor_asks_for_what_is_due_in_its_own_buckets(storage: Storage) -> None:
    async with System(storage) as system:
        await system.open_shop(products=1, customers=1)
        await system.send_all([("x1", reserve("o1")), ("x2", reserve("o2", category="books"))])
        system.advance(61)

        first, second = await due(system, "inventory-0"), await due(system, "inventory-1")

        assert [command.routing_key for _, command in first] == ["art"]
        assert [command.routing_key for _, command in second] == ["books"]
        assert await system.runtime.ask("orders-0", "due", [0, 1]) == [[], []]


async def test_a_reservation_in_doubt_keeps_no_other_from_expiring(storage: Storage) -> None:
    async with System(storage) as system:
        await system.open_shop(products=1, customers=1)
        await system.send_all([("x1", reserve("o1")), ("x2", reserve("o2", category="coins"))])
        await system.check_at_rest()
        system.advance(61)
        before = await due(system)
        cancel = CancelReservation(category="art", order_id="o1")
        held = system.storage.hold(writes_to("coordinator.state"))
        in_two_phases = system.storage.info.atomicity.name == "PARTITION"
        async with in_background(system.send(cancel, "x3")) as sending:
            if in_two_phases:
                await held.reached.wait()
                assert [command.routing_key for _, command in await due(system)] == ["coins"]
            held.let_go()
            assert (await sending).status == "committed"
        await system.check_at_rest()

        assert sorted(command.routing_key for _, command in before) == ["art", "coins"]
        assert [command.routing_key for _, command in await due(system)] == ["coins"]
        late = await system.send_all(before)
        assert sorted(str(answer.result) for answer in late) == ["{'expired': False}", "{'expired': True}"]
        await system.check_at_rest()


async def test_an_actor_that_restarted_asks_for_the_same_again(storage: Storage) -> None:
    async with System(storage) as system:
        await system.open_shop(products=1, customers=1)
        await system.send(reserve("o1"), "x1")
        system.advance(61)
        before = await due(system)
        await system.runtime.kill_and_restart("inventory-0")

        assert await due(system) == before
        assert len(before) == 1
