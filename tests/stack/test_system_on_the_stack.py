"""The whole system on Kafka and Cassandra, as `concord up --profile stack` runs it: orders, kills, starts anew."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from typing import Any

import pytest

from tests.end_to_end.harness import Sent, System, eventually, order, product, seeded, wallet

pytestmark = pytest.mark.system


async def shop(system: System, name: str, *, customers: int = 1) -> None:
    await system.committed(
        product(f"{name}-goods", "tea", quantity=100_000),
        product(f"{name}-goods", "cup", quantity=20),
        *(wallet(f"{name}-{number}", balance=10**8) for number in range(customers)),
    )


async def dumped(system: System, table: str, key: str) -> list[dict[str, Any]]:
    done = await system.concord("table", "dump", table, "--key", key)
    assert done.code == 0, done.stderr
    return list(done.lines)


async def test_an_order_commits_in_four_domains_and_is_found_again_by_the_command_line(stack_system: System) -> None:
    system = stack_system
    await shop(system, "stack")
    lines = (("stack-goods", "tea", 3, 250), ("stack-goods", "cup", 1, 900))

    [answer] = await system.send(placed := order("stack-0", "S-1", *lines))

    assert (answer["status"], answer["result"]["total"]) == ("committed", 3 * 250 + 900)
    assert {event["domain"] for event in answer["events"]} == {"orders", "payment", "shipping", "inventory"}
    stock = {row["product_id"]: row for row in await dumped(system, "inventory.products", "stack-goods")}
    assert (stock["tea"]["reserved"], stock["cup"]["reserved"]) == (3, 1)
    [purse] = await dumped(system, "payment.wallets", "stack-0")
    assert purse["balance"] == 10**8 - answer["result"]["total"]
    told = await system.concord("status", placed.id, "--key", "stack-0")
    assert (told.code, told.lines[0]["tx_id"]) == (0, answer["tx_id"])
    await system.check()


async def test_a_refused_order_leaves_nothing_in_any_keyspace(stack_system: System) -> None:
    system = stack_system
    await shop(system, "refused")

    too_much = order("refused-0", "R-1", ("refused-goods", "tea", 1, 250), ("refused-goods", "cup", 21, 900))
    [answer] = await system.send(too_much)

    assert (answer["status"], answer["reason"]) == ("refused", "out_of_stock")
    assert [row["reserved"] for row in await dumped(system, "inventory.products", "refused-goods")] == [0, 0]
    assert [row["balance"] for row in await dumped(system, "payment.wallets", "refused-0")] == [10**8]
    assert await dumped(system, "orders.orders", "refused-0") == []


async def test_the_doctor_finds_the_servers_of_the_stack(stack_system: System) -> None:
    done = await stack_system.concord("doctor")

    findings = {finding["check"]: finding for finding in done.lines}
    assert done.code == 0, findings
    assert findings["storage"]["found"].startswith(stack_system.running.runtime["storage"])
    assert stack_system.running.readiness()["storage"] == {"cassandra": "ready"}


@pytest.mark.parametrize("server", ["cassandra", "kafka"])
async def test_a_server_that_is_killed_under_load_comes_back_where_it_was_and_nothing_is_lost(
    stack_system: System, server: str
) -> None:
    system, name = stack_system, f"kill-{server}"
    rng = seeded(name)
    await shop(system, name, customers=5)
    commands: list[Sent] = [
        order(f"{name}-{rng.randrange(5)}", f"{name}-{number}", (f"{name}-goods", "tea", 1, 100))
        for number in range(60)
    ]
    addresses = system.running.runtime["bootstrap_servers"], system.running.runtime["storage"]

    await system.publish_all(*commands[:40])
    await system.witness.until(
        lambda _: sum(bool(system.witness.answers(command.id)) for command in commands[:40]) >= 10, timeout_s=60
    )
    killed = await system.pid_of(server)
    os.kill(killed, signal.SIGKILL)
    await eventually(lambda: system.running.readiness()[STATE_OF[server]][server] != "ready", "the death to be noticed")
    await eventually(
        lambda: system.running.readiness()[STATE_OF[server]][server] == "ready", f"{server} to be up", within_s=90
    )
    # How soon it serves again is for `scripts.proof recovery-times`, on a machine that does nothing else.
    [again] = await system.send(commands[40])
    assert again["status"] == "committed"

    await system.publish_all(*commands[41:])
    answers = await system.answers(*(command.id for command in commands))
    assert Counter((answer["status"], answer["reason"]) for answer in answers) == {("committed", ""): len(commands)}
    assert await system.pid_of(server) != killed
    assert (system.running.runtime["bootstrap_servers"], system.running.runtime["storage"]) == addresses
    await system.ready()
    await system.check()


STATE_OF = {"cassandra": "storage", "kafka": "kafka"}


@pytest.mark.timeout(600)
async def test_the_same_directory_goes_on_first_with_its_servers_alone_and_then_as_a_stack_again(
    stack_system: System,
) -> None:
    """Stopped, its servers run by `concord stack`, a system of profile cluster on them, and the stack as before."""
    system, running = stack_system, stack_system.running
    await shop(system, "anew")
    [first] = await system.send(order("anew-0", "A-1", ("anew-goods", "tea", 1, 250)))
    addresses = running.runtime["bootstrap_servers"], running.runtime["storage"]
    environment = running.environment
    assert await asyncio.to_thread(running.stop) == 0
    rests = await system.concord("table", "dump", "orders.orders")
    assert (rests.code, rests.stdout) == (6, "")
    assert "rests with its system" in rests.stderr

    done = await system.concord("stack", "up")
    assert done.code == 0, done.stderr
    try:
        [said] = done.lines
        assert (said["kafka"], said["environment"]["CONCORD_STORAGE__URL"]) == addresses
        running.environment = environment | said["environment"]
        await asyncio.to_thread(running.start)
        assert (running.runtime["bootstrap_servers"], running.runtime["storage"]) == addresses
        assert not {"kafka", "cassandra"} & {process.role for process in await asyncio.to_thread(running.processes)}
        [second] = await system.send(order("anew-0", "A-2", ("anew-goods", "tea", 1, 250)))
        assert await asyncio.to_thread(running.stop) == 0
    finally:
        running.environment = environment
        stopped = await system.concord("stack", "down")
    assert (stopped.code, stopped.lines[0]["stopped"]) == (0, True)

    await asyncio.to_thread(running.start)
    assert (running.runtime["bootstrap_servers"], running.runtime["storage"]) == addresses
    [third] = await system.send(order("anew-0", "A-3", ("anew-goods", "tea", 1, 250)))
    assert [answer["status"] for answer in (first, second, third)] == ["committed"] * 3
    placed = await dumped(system, "orders.orders", "anew-0")
    assert sorted(row["order_id"] for row in placed) == ["A-1", "A-2", "A-3"]
    await system.check()
