"""Many commands at once on few records, in fair weather and in foul: every effect once, and the books balance."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest
from harness import COORDINATOR, Fate, Interception, System, in_background, order, until
from weather import Fault, writes_to

from actors.inventory.tables import PRODUCTS
from actors.messages import Trouble
from actors.payment.tables import WALLETS
from actors.system import Actor
from infra.storage.port import Storage
from schemas.inventory import (
    CancelReservation,
    CheckAvailability,
    ReserveStock,
    RestockProduct,
    StockItem,
    WriteOffStock,
)
from schemas.message import Command
from schemas.orders import CancelOrder, CompleteOrder, PlaceOrder, ReturnGoods, ShipOrder
from schemas.payment import TopUpWallet

FAULTS = (Fault.UNAVAILABLE, Fault.LOST, Fault.UNANSWERED)
"""Those that a storage may well have, over and over."""


def orders(count: int, *, seed: int, customers: int = 3, products: int = 2) -> list[tuple[str, Command]]:
    """Orders of one to three products, each from few, by few customers."""
    draw = random.Random(seed)
    shelves = [(category, f"p{number}") for category in ("art", "books", "coins") for number in range(products)]
    return [
        (
            f"x{number}",
            order(
                f"o{number}",
                customer=f"c{draw.randrange(customers)}",
                lines=[(*shelf, draw.randint(1, 3)) for shelf in draw.sample(shelves, draw.randint(1, 3))],
            ),
        )
        for number in range(count)
    ]


async def check_versions(system: System, sent: list[tuple[str, Command]]) -> None:
    """A record's version is one more than the commands that wrote it: none was lost, none happened twice."""
    writers: Counter[str] = Counter()
    for id, command in sent:
        assert isinstance(command, PlaceOrder)
        if system.answers[("orders", command.customer_id, id)].status == "committed":
            writers.update({"/".join((PRODUCTS.full_name, line.category, line.product_id)) for line in command.lines})
            writers["/".join((WALLETS.full_name, command.customer_id))] += 1
    for table in (PRODUCTS, WALLETS):
        for row in await system.dump(table.full_name):
            name = "/".join((table.full_name, *(str(row[column]) for column in table.key)))
            assert row["tx_version"] == 1 + writers[name], name


async def test_many_orders_for_a_few_hot_products_all_commit_and_the_books_balance(storage: Storage) -> None:
    sent = orders(120, seed=1)
    async with System(storage) as system:
        await system.open_shop(quantity=10_000, customers=3)

        answers = await system.send_all(sent)

        assert Counter(answer.status for answer in answers) == {"committed": len(sent)}
        assert system.troubles.keys() <= {Trouble.WOUNDED}
        await system.check_at_rest()
        await check_versions(system, sent)


async def test_when_goods_run_out_exactly_what_is_there_is_sold(storage: Storage) -> None:
    async with System(storage) as system:
        await system.open_shop(products=1, quantity=10, customers=3)
        sent: list[tuple[str, Command]] = [
            (f"x{number}", order(f"o{number}", customer=f"c{number % 3}")) for number in range(40)
        ]

        answers = await system.send_all(sent)

        assert Counter((answer.status, answer.reason) for answer in answers) == {
            ("committed", ""): 10,
            ("refused", "out_of_stock"): 30,
        }
        await system.check_at_rest()
        await check_versions(system, sent)
        assert await system.send_all(sent) == answers


def bad_weather(system: System, draw: random.Random, *, faults: int, zombies: bool = False) -> list[Interception]:
    """Storage that fails now and then, messages that are lost, late or doubled, actors that die: all at once."""
    for _ in range(faults):
        system.storage.fail(draw.choice(FAULTS), nth=draw.randint(1, 2000), times=draw.randint(1, 3))
    names = [actor.name for actor in system.participants()]
    methods = ("invoke", "prepare", "commit", "rollback", "collect", "validate", "settle")
    interceptions = [
        system.intercept(
            draw.choice(names),
            draw.choice(methods),
            draw.choice([Fate.LOST, Fate.UNANSWERED, Fate.LATE, Fate.TWICE]),
            nth=draw.randint(1, 10),
        )
        for _ in range(faults)
    ]
    for actor in (*names, COORDINATOR):
        nth = draw.randint(20, 200)
        taken_for_dead = zombies and draw.random() < 0.3

        async def strike(actor: str = actor, taken_for_dead: bool = taken_for_dead) -> None:
            if taken_for_dead and actor in system.runtime.names():
                await system.replace(actor)
            else:
                await system.runtime.kill_and_restart(actor)

        interceptions.append(system.intercept("", "", Fate.VISITED, nth=nth, visitor=strike))
    return interceptions


@pytest.mark.parametrize("seed", range(4))
async def test_in_any_weather_every_order_has_one_effect(memory: Storage, seed: int) -> None:
    draw = random.Random(seed)
    sent = orders(40, seed=seed)
    async with System(memory) as system:
        await system.open_shop(quantity=10_000, customers=3)
        weather = bad_weather(system, draw, faults=20)

        async with system.passing_time():
            answers = await system.send_all(sent)
        for interception in weather:
            interception.let_go()

        assert Counter(answer.status for answer in answers) == {"committed": len(sent)}
        assert len(system.storage.struck) > 2
        await system.check_at_rest()
        await check_versions(system, sent)
        assert await system.send_all(sent) == answers


def business(draw: random.Random, *, customers: int, each: int) -> list[list[tuple[str, Command]]]:
    """What each customer asks for, one after another: orders and their steps, legal or not; money; reservations."""
    days: list[list[tuple[str, Command]]] = []
    for number in range(customers):
        customer, day = f"c{number}", []
        for _ in range(each):
            order_id = f"{customer}-o{draw.randrange(4)}"
            shelf = (draw.choice(["art", "books", "coins"]), f"p{draw.randrange(2)}")
            placed = order(order_id, customer=customer, lines=[(*shelf, draw.randint(1, 30))])
            item = StockItem(product_id=shelf[1], quantity=draw.randint(1, 20))
            command: Command = draw.choice(
                [
                    placed,
                    placed,
                    ShipOrder(customer_id=customer, order_id=order_id),
                    CompleteOrder(customer_id=customer, order_id=order_id),
                    CancelOrder(customer_id=customer, order_id=order_id),
                    ReturnGoods(
                        customer_id=customer,
                        return_id=f"r{draw.randrange(5)}",
                        order_id=order_id,
                        lines=placed.lines,
                        currency="GBP",
                    ),
                    TopUpWallet(customer_id=customer, amount=draw.randint(1, 1000), currency="GBP"),
                    RestockProduct(category=shelf[0], items=(item,)),
                    WriteOffStock(category=shelf[0], product_id=shelf[1], quantity=item.quantity),
                    ReserveStock(
                        category=shelf[0], order_id=order_id, customer_id=customer, items=(item,), expires_in_ms=10**6
                    ),
                    CancelReservation(category=shelf[0], order_id=order_id),
                    CheckAvailability(category=shelf[0], items=(item,)),
                ]
            )
            day.append((f"{customer}-x{len(day)}", command))
        days.append(day)
    return days


@pytest.mark.parametrize("seed", range(3))
async def test_in_any_weather_a_day_of_all_kinds_of_business_ends_with_balanced_books(
    memory: Storage, seed: int
) -> None:
    """Half of it is refused. Some actors are taken for dead and live on beside their successors."""
    draw = random.Random(seed)
    days = business(draw, customers=5, each=10)
    async with System(memory) as system:
        await system.open_shop(quantity=60, customers=5)
        weather = bad_weather(system, draw, faults=15, zombies=True)

        async def live(day: list[tuple[str, Command]]) -> None:
            for id, command in day:
                await system.send(command, id)

        async with system.passing_time():
            await asyncio.gather(*map(live, days))
        for interception in weather:
            interception.let_go()
        await system.runtime.bury_replaced()

        statuses = Counter(answer.status for answer in system.answers.values())
        assert statuses.keys() == {"committed", "refused"}
        assert statuses["refused"] > 3
        assert "conflict" not in {answer.reason for answer in system.answers.values()}
        await system.check_at_rest()


# ---- two of a name -----------------------------------------------------------------------------------------------


async def test_a_coordinator_taken_for_dead_leaves_its_successors_transactions_alone(memory: Storage) -> None:
    async with System(memory) as system:
        await system.open_shop(quantity=10_000, customers=3)
        await system.replace(COORDINATOR)  # the first lives on, and sweeps
        held = system.storage.hold(writes_to("coordinator.state"))
        async with in_background(system.send(order("o1"), "x1")) as sending:
            await held.reached.wait()
            swept = len(system.storage.calls)
            await until(lambda: sum("coordinator.intents" in call.tables for call in system.storage.calls[swept:]) > 20)
            held.let_go()
            answer = await sending

        assert answer.status == "committed"
        assert system.troubles == {}
        await system.check_at_rest()


async def test_what_a_coordinator_taken_for_dead_was_committing_is_decided_once(storage: Storage) -> None:
    sent = orders(30, seed=3)
    async with System(storage) as system:
        await system.open_shop(quantity=10_000, customers=3)

        async def succeed() -> None:
            await system.replace(COORDINATOR)

        system.intercept("payment-0", "commit", Fate.VISITED, nth=2, visitor=succeed)
        answers = await system.send_all(sent)

        assert {answer.status for answer in answers} == {"committed"}
        await system.check_at_rest()
        await check_versions(system, sent)


@pytest.mark.parametrize("actor", ["orders-0", "inventory-0", "payment-0"])
async def test_an_actor_taken_for_dead_in_the_middle_of_its_work_does_no_harm(storage: Storage, actor: str) -> None:
    """It still works on what it has begun; the conditions of its writes are all that stands between."""
    sent = orders(30, seed=4)
    async with System(storage) as system:
        await system.open_shop(quantity=10_000, customers=3)

        replaced: list[Actor] = []

        async def succeed() -> None:
            replaced.append(await system.replace(actor))

        system.intercept("payment-0", "prepare", Fate.VISITED, nth=2, visitor=succeed)
        answers = await system.send_all(sent)
        for first in replaced:
            await system.runtime.bury(first)

        assert len(replaced) == 1
        assert {answer.status for answer in answers} == {"committed"}
        await system.check_at_rest()
        await check_versions(system, sent)


async def test_everything_dies_at_once_and_every_order_has_one_effect(storage: Storage) -> None:
    sent = orders(30, seed=5)
    async with System(storage) as system:
        await system.open_shop(quantity=10_000, customers=3)

        async with in_background(system.send_all(sent)) as sending:
            for messages in (20, 60):
                await until(lambda enough=messages: system.runtime.carried.total() > enough)
                for actor in system.config.placement.actors():
                    await system.kill(actor)
                for actor in system.config.placement.actors():
                    await system.restart(actor)
            answers = await sending

        assert {answer.status for answer in answers} == {"committed"}
        await system.check_at_rest()
        await check_versions(system, sent)
