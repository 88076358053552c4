"""What actors take on at most, what they say when that is reached, and how one is emptied before its restart."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from harness import COORDINATOR, Fate, System, in_background, order, scripted, until

from actors.domain import Transaction
from actors.runtime import ActorBusyError
from infra.storage.port import Storage
from schemas.inventory import CheckAvailability, RestockProduct, StockItem
from schemas.outcome import MAX_ANSWER_BYTES
from schemas.payment import TopUpWallet

CHECK = CheckAvailability(category="art", items=(StockItem(product_id="p0", quantity=1),))


async def test_an_answer_that_no_topic_would_take_is_a_refusal_that_says_so_and_has_no_effect(storage: Storage) -> None:
    async def talkative(tx: Transaction, command: Any) -> dict[str, Any]:
        await tx.call(RestockProduct(category="art", items=(StockItem(product_id="p0", quantity=5),)))
        await tx.call(TopUpWallet(customer_id="c0", amount=1, currency="GBP"))
        return {"words": "ä" * (MAX_ANSWER_BYTES // 2)}

    async with System(storage) as system:
        await system.open_shop()
        await system.check_at_rest()
        before = await system.tables()
        placed = order("o1")
        scripted("x1", type(placed), talkative)

        answer = await system.send(placed, "x1")
        again = await system.send(placed, "x1")

        assert (answer.status, answer.reason, answer.result, answer.events) == ("refused", "answer_too_large", None, ())
        assert answer.detail["bytes"] > answer.detail["limit"] == MAX_ANSWER_BYTES
        assert again == answer
        await system.check_at_rest()
        after = await system.tables()
        assert len(after.pop("orders.outcomes")) == len(before.pop("orders.outcomes")) + 1
        assert after == before


async def test_a_home_with_its_hands_full_takes_no_batch_and_says_that_nothing_was_done(memory: Storage) -> None:
    async with System(memory) as system:
        await system.open_shop()
        home = system.home(CHECK)
        system.runtime.actor(home)._as_home._max_open_commands = 2
        system.storage.down = True
        async with in_background(system.deliver(home, system.raw(CHECK, "x1"))) as waiting:
            await until(lambda: system.runtime.actor(home)._as_home.open_commands == 1)
            batch = [system.raw(CHECK, "x2"), system.raw(CHECK, "x3")]
            with pytest.raises(ActorBusyError):
                await system.runtime.ask(home, "execute", batch)
            assert system.runtime.actor(home)._as_home.open_commands == 1

            system.storage.down = False
            assert (await waiting).status == "committed"
        assert not [row for id in ("x2", "x3") for row in await system.outcome("inventory", id)]
        assert [answer.status for answer in await system.runtime.ask(home, "execute", batch)] == ["committed"] * 2


async def test_a_batch_that_is_larger_than_all_that_a_home_may_have_is_taken_when_it_has_nothing(
    memory: Storage,
) -> None:
    async with System(memory) as system:
        await system.open_shop()
        home = system.home(CHECK)
        system.runtime.actor(home)._as_home._max_open_commands = 1

        answers = await system.runtime.ask(home, "execute", [system.raw(CHECK, f"x{n}") for n in range(3)])

        assert [answer.status for answer in answers] == ["committed"] * 3


async def test_a_coordinator_works_at_no_more_transactions_than_it_may(memory: Storage) -> None:
    async with System(memory) as system:
        await system.open_shop()
        await system.check_at_rest()
        system.runtime.actor(COORDINATOR)._room = asyncio.Semaphore(1)
        held = system.intercept("payment-0", "commit", Fate.HELD)  # of records, after the answer
        first = await system.send(order("o1", lines=(("art", "p0", 1),)), "x1")
        await held.reached.wait()
        before = system.runtime.carried[("payment-0", "prepare")]

        async with in_background(system.send(order("o2", lines=(("books", "p1", 1),), customer="c1"), "x2")) as second:
            await until(lambda: len(system.runtime.actor(COORDINATOR)._active) == 2)
            await asyncio.sleep(0.05)
            assert system.runtime.carried[("payment-0", "prepare")] == before
            held.let_go()
            answers = [first, await second]

        assert [answer.status for answer in answers] == ["committed", "committed"]
        await system.check_at_rest()


async def test_an_actor_that_is_emptied_finishes_what_it_is_at_and_takes_nothing_new(storage: Storage) -> None:
    async with System(storage) as system:
        await system.open_shop()
        home = system.home(order("o1"))
        held = system.intercept(COORDINATOR, "commit", Fate.HELD)
        async with in_background(system.send(order("o1"), "x1")) as placing:
            await held.reached.wait()
            async with in_background(system.runtime.ask(home, "drain", [5.0])) as draining:
                await until(lambda: system.runtime.actor(home)._as_home.draining)
                with pytest.raises(ActorBusyError):
                    await system.runtime.ask(home, "execute", [system.raw(order("o2"), "x2")])
                assert not draining.done()
                held.let_go()

                assert (await placing).status == "committed"
                assert await draining == [True]
        await system.check_at_rest()


async def test_actors_restarted_in_turn_under_load_cost_no_command_its_success(storage: Storage) -> None:
    async with System(storage) as system:
        await system.open_shop()
        enough = asyncio.Event()
        answers: list[Any] = []

        async def shop(customer: str) -> None:
            number = 0
            while not enough.is_set():
                number += 1
                placed = order(f"{customer}-{number}", customer=customer, lines=(("art", "p0", 1), ("books", "p1", 1)))
                answers.append(await system.send(placed, f"x-{customer}-{number}"))

        async with in_background(shop("c0")) as first, in_background(shop("c1")) as second:
            for name in sorted(system.runtime.names(), key=lambda name: name.startswith("coordinator")):
                before = len(answers)
                await asyncio.wait_for(system.runtime.ask(name, "drain", [5.0]), 30)
                await system.kill(name)
                await system.restart(name)
                await until(lambda before=before: len(answers) > before + 2)
            enough.set()
            await asyncio.gather(first, second)

        assert {(answer.status, answer.reason) for answer in answers} == {("committed", "")}
        await system.check_at_rest()
