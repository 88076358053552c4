"""Every step of a command's life, broken: the list of failpoints, each fired on a live system.

Goal: wherever a process dies or a step fails, every command ends in exactly one answer, and the standing check passes.
Method: each case arms its failpoints, publishes the same mixed batch (orders over four domains, commands of one
domain, a read, refusals, poison), waits for all answers, proves by the log of firings that the points were reached,
and ends in the standing check. Points of the recoverer need something to recover, so they are armed with the fault
that leaves it behind: failpoint × failpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import pytest
import pytest_asyncio

from infra.failpoints import FAILPOINTS
from tests.end_to_end.harness import Sent, System, eventually, order, product, wallet

pytestmark = pytest.mark.system

NEVER_HERE = {
    # Only where one participant's records lie in several atomic units, which a SQLite file of a namespace has not.
    "prepare.between_units",
    "commit_records.between_units",
    # Only where a transaction's coordinator, home and participants have all been gone for its whole lifetime.
    "recovery.before_abort",
}
"""Fired by the tests of the protocol, not on this system."""


@dataclass(frozen=True)
class Case:
    """What is armed; every name in it must fire."""

    lines: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        return [line.partition("=")[0] for line in self.lines]

    def __str__(self) -> str:
        return " ".join(self.lines)


# Deaths of the worker alternate with those of actors: a process that dies again and again is restarted ever more
# slowly, which is right, and would make this list slow.
CASES = tuple(
    Case(lines)
    for lines in (
        # the stream worker: from the topic and back to it
        ("worker.before_execute=kill@1",),
        # the coordinator: intent, prepare, validate, state, records
        ("intent.before=kill@1",),
        ("intent.after=kill@1",),
        ("worker.after_execute=kill@1",),
        ("coordinator.before_prepare=kill@2",),
        ("coordinator.after_prepare=kill@1",),
        ("worker.before_publish=kill@2",),
        ("commit_state.before=kill@1",),
        ("commit_state.after=kill@1",),
        ("worker.after_publish=kill@1",),
        ("coordinator.before_commit_records=kill@1",),
        # participants: their calls, their records
        ("participant.before_call=kill@2",),
        ("participant.after_call=kill@3",),
        ("worker.before_dead_letter=kill@1",),
        ("prepare.before_records=kill@2",),
        ("prepare.after_records=kill@3",),
        ("worker.after_dead_letter=kill@1",),
        ("validate.after_records=kill@1",),
        ("commit_records.before=kill@2",),
        ("worker.after_acknowledge=kill@1",),
        ("commit_records.after=kill@3",),
        # the home: from the handler to the answer, alone and with others
        ("home.before_handler=kill@2",),
        ("projection.before_apply=kill@1",),
        ("home.after_handler=kill@2",),
        ("home.before_commit_request=kill@1",),
        ("projection.after_apply=kill@1",),
        ("home.after_decision=kill@2",),
        ("one_phase.before=kill@1",),
        ("one_phase.after=kill@2",),
        # whoever cleans up dies as well
        ("coordinator.after_prepare=raise@1", "rollback.before_records=kill@1"),
        ("coordinator.after_prepare=raise@1", "rollback.after_records=kill@1"),
        ("commit_state.after=kill@1", "settle.before=kill@1"),
        ("commit_state.after=kill@1", "commit_records.before=kill@1", "recovery.before_roll_forward=kill@1"),
        # The coordinator lives and rolls back itself: after its death a successor may settle before anybody rolls back.
        ("coordinator.after_prepare=raise@1", "rollback.before_records=kill@1", "recovery.before_roll_back=kill@1"),
        # errors that nobody expects, and slowness
        ("home.after_handler=raise@1", "participant.after_call=raise@2"),
        ("prepare.after_records=raise@1", "commit_state.after=raise@2"),
        ("commit_records.before=raise@1", "settle.before=raise@1"),
        ("one_phase.after=raise@1", "worker.before_publish=raise@1"),
        ("coordinator.after_prepare=sleep@1", "worker.after_execute=sleep@1"),
    )
)

_numbers = count(1)

SHOPPERS = ("fp-ann", "fp-bob", "fp-cid")
GOODS, CUPS, RARE = "fp-goods", "fp-cups", "fp-rare"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def shop(system: System) -> System:
    await system.committed(
        product(GOODS, "tea", quantity=1_000_000),
        product(CUPS, "cup", quantity=1_000_000),
        product(RARE, "vase", quantity=1),
        *map(wallet, SHOPPERS),
    )
    return system


def batch(name: str) -> tuple[list[Sent], dict[str, tuple[str, str]]]:
    """Commands whose answers do not depend on each other, and (status, reason) of each by its id."""
    ann, bob, cid = SHOPPERS
    committed = [
        wallet(f"{name}-wallet"),
        order(ann, f"{name}-1", (GOODS, "tea", 2, 250), (CUPS, "cup", 1, 900)),
        order(bob, f"{name}-2", (GOODS, "tea", 1, 250), region="Japan"),
        Sent("WriteOffStock", {"category": GOODS, "product_id": "tea", "quantity": 1}),
        Sent("CheckAvailability", {"category": CUPS, "items": [{"product_id": "cup", "quantity": 1}]}),
        Sent("TopUpWallet", {"customer_id": cid, "amount": 7, "currency": "GBP"}),
        order(ann, f"{name}-3", (CUPS, "cup", 3, 900)),
        Sent("CancelOrder", {"customer_id": ann, "order_id": f"{name}-1"}),
    ]
    refused = {
        "out_of_stock": order(cid, f"{name}-4", (GOODS, "tea", 1, 250), (RARE, "vase", 2, 1)),
        "insufficient_funds": order(bob, f"{name}-5", (GOODS, "tea", 1, 10**9)),
    }
    expected = {command.id: ("committed", "") for command in committed}
    expected |= {command.id: ("refused", reason) for reason, command in refused.items()}
    return [*committed[:3], *refused.values(), *committed[3:]], expected


@pytest.mark.parametrize("case", CASES, ids=str)
async def test_every_command_ends_in_one_answer_when_this_breaks(shop: System, case: Case) -> None:
    name = f"fp{next(_numbers)}"
    commands, expected = batch(name)
    poison = Sent("PlaceOrder", order(SHOPPERS[0], f"{name}-poison", (GOODS, "tea", -1, 250)).body)
    after_it = order(SHOPPERS[0], f"{name}-6", (GOODS, "tea", 1, 250))
    expected |= {poison.id: ("dead-lettered", "wrong_shape"), after_it.id: ("committed", "")}

    before = shop.arm(*case.lines)
    answers = await shop.send(*commands, poison, after_it)

    assert {a["id"]: (a["status"], a["reason"]) for a in answers} == expected
    await fired_all(shop, before, case.names)
    await shop.check()


async def fired_all(shop: System, before: int, names: Sequence[str]) -> None:
    """No vacuous pass: what is armed has fired, or does so within what settling may take."""
    await eventually(lambda: sorted(shop.fired_since(before)) == sorted(names), f"{names} to fire")


def test_every_failpoint_that_can_be_reached_here_is_in_the_list() -> None:
    listed = {name for case in CASES for name in case.names}

    assert len(listed) >= 20
    assert listed == set(FAILPOINTS) - NEVER_HERE
