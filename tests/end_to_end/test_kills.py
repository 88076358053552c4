"""Processes killed at random moments under load: each command one answer, per-key order, service soon again.

Method: a seeded stream of orders, cancellations and write-offs is published while the process dies; moments come from
the seed and from what has been answered so far, so that every kill falls into work under way.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter

import pytest

from scripts.proof.tables import aborted, in_doubt, intents
from tests.end_to_end.harness import Sent, System, eventually, order, product, seeded, wallet

pytestmark = pytest.mark.system

ORDERS = 60
CUSTOMERS = 5


def work(name: str) -> list[Sent]:
    """A seeded mix; the orders of one customer are in a known order."""
    rng = seeded(name)
    commands: list[Sent] = []
    placed: list[tuple[str, str]] = []
    for number in range(ORDERS):
        who, order_id = f"{name}-{rng.randrange(CUSTOMERS)}", f"{name}-{number}"
        lines = [(f"{name}-goods", f"p{rng.randrange(4)}", rng.randint(1, 5), 100) for _ in range(rng.randint(1, 3))]
        lines.append((f"{name}-cups", "cup", 1, 900))
        commands.append(order(who, order_id, *lines))
        placed.append((who, order_id))
        if rng.random() < 0.2:
            customer, earlier = rng.choice(placed)
            commands.append(Sent("CancelOrder", {"customer_id": customer, "order_id": earlier}))
        if rng.random() < 0.2:
            body = {"category": f"{name}-goods", "product_id": "p0", "quantity": 1}
            commands.append(Sent("WriteOffStock", body))
    return commands


async def open_shop(system: System, name: str) -> None:
    await system.committed(
        *(product(f"{name}-goods", f"p{number}", quantity=100_000) for number in range(4)),
        product(f"{name}-cups", "cup", quantity=100_000),
        *(wallet(f"{name}-{number}", balance=10**8) for number in range(CUSTOMERS)),
    )


@pytest.mark.parametrize("role", ["worker-0", "coordinator-0", "orders-0", "inventory-0", "payment-0", "shipping-0"])
async def test_a_process_that_is_killed_under_load_takes_nothing_with_it(system: System, role: str) -> None:
    name = f"kill-{role}"
    await open_shop(system, name)
    commands = work(name)
    moment = seeded(f"{name} moment").randrange(5, 25)

    await system.publish_all(*commands)
    await system.witness.until(
        lambda _: sum(bool(system.witness.answers(command.id)) for command in commands) >= moment, timeout_s=60
    )
    os.kill(await system.pid_of(role), signal.SIGKILL)
    answers = await system.answers(*(command.id for command in commands))

    # Everything asked for can be done: without faults all would be committed, and with one all are as well.
    assert Counter((answer["status"], answer["reason"]) for answer in answers) == {("committed", ""): len(commands)}
    await system.ready()
    await system.check()


async def test_a_worker_and_every_actor_killed_at_once_take_nothing_with_them(system: System) -> None:
    name = "kill-all-actors"
    await open_shop(system, name)
    commands = work(name)

    await system.publish_all(*commands[:30])
    await asyncio.to_thread(kill_all_but, system, {"supervisor", "kafka", "ray"})
    await system.publish_all(*commands[30:])
    answers = await system.answers(*(command.id for command in commands))

    assert Counter((answer["status"], answer["reason"]) for answer in answers) == {("committed", ""): len(commands)}
    await system.ready()
    await system.check()


def kill_all_but(system: System, spared: set[str]) -> None:
    for process in system.running.processes():
        if process.role not in spared:
            os.kill(process.pid, signal.SIGKILL)


async def test_a_tenth_of_the_commands_delivered_twice_and_some_ids_with_another_payload_have_one_effect_each(
    system: System,
) -> None:
    name = "twice"
    await open_shop(system, name)
    rng = seeded(name)
    commands = work(name)
    repeated = rng.sample(commands, len(commands) // 10)
    orders = [command for command in commands if command.type == "PlaceOrder"]
    # Under an id that is taken, another order of the same customer.
    thieves = [
        Sent(other.type, other.body, id=command.id)
        for command in rng.sample(orders, 5)
        for other in [next(each for each in orders if each.key == command.key and each != command)]
    ]
    stream = [*commands]
    for late in (*repeated, *thieves):
        first = next(index for index, command in enumerate(stream) if command.id == late.id)
        stream.insert(rng.randint(first + 1, len(stream)), late)

    await system.publish_all(*stream)
    wanted = Counter(command.id for command in stream)
    await system.witness.until(
        lambda _: all(len(system.witness.answers(id)) >= count for id, count in wanted.items()),
        timeout_s=60,
        what="an answer to each delivery",
    )

    for command in commands:
        first, *others = system.witness.answers(command.id)
        assert first["status"] == "committed", first
        conflicts = [answer for answer in others if answer["reason"] == "id_conflict"]
        assert len(conflicts) == sum(thief.id == command.id for thief in thieves)
        assert all(answer == first for answer in others if answer not in conflicts)
    placed = {command.body["order_id"] for command in orders}
    await system.witness.catch_up()
    events = [
        message.body["order"]["order_id"]
        for message in {m.header("ce_id"): m for m in system.witness.history.events("orders")}.values()
        if message.header("ce_type") == "OrderPlaced" and message.body["order"]["order_id"].startswith(f"{name}-")
    ]
    assert Counter(events) == Counter(placed)
    await system.check()


async def test_a_coordinator_that_slept_through_its_transaction_is_overruled_and_obeys(system: System) -> None:
    """A process that is stopped, not dead: nobody takes its place, and it wakes up in the middle of its work.

    The participants that have prepared put ABORTED if absent, and roll back. The sleeper's COMMITTED then comes too
    late, and its command is tried again. (The command's home waits for the sleeper; what it prepared waits with it.)
    """
    name = "sleeper"
    await open_shop(system, name)
    commands = work(name)[:10]
    # One alone, with nothing of earlier ones left: a process that is stopped within a SQLite transaction keeps that
    # file from everybody.
    first, *others = commands
    await eventually(lambda: not intents(system.directory), "the coordinator to have nothing left to do", within_s=60)
    before, decided = system.arm("coordinator.after_prepare=hang@1"), aborted(system.directory)

    await system.publish_all(first)
    await eventually(lambda: system.fired_since(before) != [], "the coordinator to fall asleep")
    asleep = await system.pid_of("coordinator-0")
    try:
        assert of_others(in_doubt(system.directory))
        await eventually(lambda: not of_others(in_doubt(system.directory)), "the participants to decide", within_s=40)
        assert aborted(system.directory) - decided
        await system.publish_all(*others)
    finally:
        os.kill(asleep, signal.SIGCONT)
    answers = await system.answers(*(command.id for command in commands))

    assert Counter((answer["status"], answer["reason"]) for answer in answers) == {("committed", ""): len(commands)}
    assert await system.pid_of("coordinator-0") == asleep
    await system.check()


def of_others(records: list[str]) -> list[str]:
    """Records of participants that are not at home with orders."""
    return [record for record in records if not record.startswith("orders.")]
