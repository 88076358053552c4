"""Every single fault of one command's life: each storage call, each message, each actor's death.

However a fault strikes, the command is answered in the end, once, and nothing of it stays in doubt.
"""

from __future__ import annotations

import pytest
from harness import COORDINATOR, Fate, System, order, product, side_by_side
from weather import Fault

from infra.storage.memory import MemoryStorage
from infra.storage.operations import Atomicity
from schemas.inventory import RegisterProduct
from schemas.message import Command
from schemas.orders import PlaceOrder

PLACED: PlaceOrder = order("o1")
REFUSED: PlaceOrder = order("o1", lines=(("art", "p0", 1), ("books", "p0", 10**6)))
REGISTERED: RegisterProduct = product("art", "new", 10)

TWO_PHASES = Atomicity.PARTITION
ONE_PHASE = Atomicity.NAMESPACE


async def _answered(system: System, command: Command, status: str) -> None:
    """`command` is answered as it should be, again too, and everything comes to rest."""
    answer = await system.send(command, "x1")
    assert (answer.status, answer.reason != "conflict") == (status, True), answer
    assert await system.send(command, "x1") == answer
    await system.check_at_rest()
    orders = await system.dump("orders.orders")
    assert len(orders) == (command is PLACED), orders


async def _calls_of(command: Command, status: str, atomicity: Atomicity) -> int:
    """How many storage calls it takes when nothing goes wrong."""
    async with System(MemoryStorage(atomicity), sweep_interval_s=60) as system:
        await system.open_shop(products=1, customers=1)
        before = len(system.storage.calls)
        await _answered(system, command, status)
        return len(system.storage.calls) - before


@pytest.mark.parametrize("fault", list(Fault))
@pytest.mark.parametrize(
    ("command", "status", "atomicity"),
    [
        pytest.param(PLACED, "committed", TWO_PHASES, id="an order over four domains"),
        pytest.param(REFUSED, "refused", TWO_PHASES, id="a refused order"),
        pytest.param(REGISTERED, "committed", ONE_PHASE, id="a product, in one phase"),
    ],
)
async def test_a_command_survives_a_fault_of_any_of_its_storage_calls(
    command: Command, status: str, atomicity: Atomicity, fault: Fault
) -> None:
    calls = await _calls_of(command, status, atomicity)
    assert calls > 3

    async def strike(nth: int) -> None:
        async with System(MemoryStorage(atomicity)) as system:
            await system.open_shop(products=1, customers=1)
            system.storage.fail(fault, nth=nth)
            await _answered(system, command, status)
            assert system.storage.struck

    await side_by_side(range(1, calls + 1), strike)


async def _messages_of(command: Command, status: str) -> list[tuple[str, str]]:
    async with System(MemoryStorage()) as system:
        await system.open_shop(products=1, customers=1)
        system.runtime.carried.clear()
        await system.send(command, "x1")
        await system.check_at_rest()
        return sorted(message for message in system.runtime.carried if message[1] != "health")


@pytest.mark.parametrize(
    "fate", [Fate.LOST, Fate.UNANSWERED, Fate.LATE, Fate.TWICE, Fate.KILLS_BEFORE, Fate.KILLS_AFTER]
)
@pytest.mark.parametrize(
    ("command", "status"),
    [pytest.param(PLACED, "committed", id="an order"), pytest.param(REFUSED, "refused", id="a refused order")],
)
async def test_a_command_survives_the_fate_of_any_of_its_messages(command: Command, status: str, fate: Fate) -> None:
    messages = await _messages_of(command, status)
    assert {"execute", "invoke", "commit"} <= {method for _, method in messages}

    async def befall(message: tuple[str, str]) -> None:
        async with System(MemoryStorage()) as system:
            await system.open_shop(products=1, customers=1)
            interception = system.intercept(*message, fate)
            answer = await system.send(command, "x1")
            assert (answer.status, answer.reason != "conflict") == (status, True), answer
            assert interception.reached.is_set()
            interception.let_go()
            if fate is Fate.LATE:
                await interception.arrived.wait()
            await _answered(system, command, status)

    await side_by_side(messages, befall)


@pytest.mark.parametrize("fate", [Fate.LOST, Fate.UNANSWERED, Fate.LATE, Fate.KILLS_BEFORE, Fate.KILLS_AFTER])
@pytest.mark.parametrize(
    "second", [("inventory-0", "rollback"), ("payment-0", "rollback"), ("payment-0", "settle"), ("orders-0", "settle")]
)
async def test_taking_back_survives_a_second_fault(second: tuple[str, str], fate: Fate) -> None:
    async with System(MemoryStorage()) as system:
        await system.open_shop(products=1, customers=1)
        system.intercept("payment-0", "prepare", Fate.UNANSWERED)  # so that it must be rolled back
        interception = system.intercept(*second, fate)
        answer = await system.send(PLACED, "x1")
        assert answer.status == "committed"
        await system.settle()
        assert interception.reached.is_set() or second[1] == "settle"
        interception.let_go()
        await _answered(system, PLACED, "committed")


@pytest.mark.parametrize("victim", ["orders-0", "payment-0", "inventory-1", COORDINATOR])
async def test_a_command_survives_the_death_of_any_actor_at_any_message(victim: str) -> None:
    messages = sum([1 for _ in await _messages_of(PLACED, "committed")])

    async def strike(nth: int) -> None:
        async with System(MemoryStorage()) as system:
            await system.open_shop(products=1, customers=1)

            async def crash() -> None:
                await system.runtime.kill_and_restart(victim)

            interception = system.intercept("", "", Fate.VISITED, nth=nth, visitor=crash)
            answer = await system.send(PLACED, "x1")
            assert answer.status == "committed", answer
            await _answered(system, PLACED, "committed")
            assert interception.reached.is_set()

    await side_by_side(range(1, messages + 1), strike)
