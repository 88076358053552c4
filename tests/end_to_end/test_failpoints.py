"""Every step of a command's life, broken: the list of failpoints, each fired on a live system.

Goal: wherever a process dies or a step fails, every command ends in exactly one answer, and the standing check passes.
Method: each case arms its failpoints, publishes the same mixed batch (orders over four domains, commands of one
domain, a read, refusals, poison), waits for all answers, proves by the log of firings that the points were reached,
and ends in the standing check. Points of the recoverer need something to recover, so they are armed with the fault
that leaves it behind: failpoint × failpoint.

Played on the local profile; with `EVERY_STORAGE=1` in the environment on Kafka and Cassandra as well (`-k stack`: there
alone).
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import pytest
import pytest_asyncio

from actors.payment.tables import WALLETS, Wallet
from infra.clock import SystemClock
from infra.consensus_commit.participant import ParticipantTransaction
from infra.consensus_commit.states import Isolation
from infra.failpoints import FAILPOINTS
from tests.end_to_end.harness import Sent, System, eventually, order, product, wallet

pytestmark = pytest.mark.system

SYSTEMS = {"local": "system", "stack": "stack_system"}
"""By its profile, the fixture of a whole system."""

PLAYED_ON = tuple(SYSTEMS) if os.environ.get("EVERY_STORAGE") else ("local",)

NEVER_ON = {
    # Only where one participant's records lie in several atomic units, which a SQLite file of a namespace has not.
    "local": {"prepare.between_units", "commit_records.between_units"},
    "stack": set[str](),
}
"""What cannot be reached by profile; the tests of the protocol fire it."""

LONG_AGO_MS = 600_000
"""Longer than any transaction may be under way."""


@dataclass(frozen=True)
class Case:
    """What is armed; every name in it must fire."""

    lines: tuple[str, ...]

    def plays_on(self, profile: str) -> bool:
        return not NEVER_ON[profile].intersection(self.names)

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
        ("prepare.between_units=kill@2",),
        ("commit_records.before=kill@2",),
        ("worker.after_acknowledge=kill@1",),
        ("commit_records.between_units=kill@2",),
        ("commit_records.after=kill@3",),
        # the home: from the handler to the answer, alone and with others
        ("home.before_handler=kill@2",),
        ("projection.before_apply=kill@1",),
        ("home.after_handler=kill@2",),
        ("home.before_commit_request=kill@1",),
        ("projection.after_apply=kill@1",),
        ("home.after_decision=kill@2",),
        ("one_phase.before=kill@1",),
        ("one_phase.after=kill@1",),
        # whoever cleans up dies as well
        ("coordinator.after_prepare=raise@1", "rollback.before_records=kill@1"),
        ("coordinator.after_prepare=raise@1", "rollback.after_records=kill@1"),
        ("commit_state.after=kill@1", "settle.before=kill@1"),
        ("commit_state.after=kill@1", "commit_records.before=kill@1", "recovery.before_roll_forward=kill@1"),
        # The coordinator lives and rolls back itself: after its death a successor may settle before anybody rolls back.
        ("coordinator.after_prepare=raise@1", "rollback.before_records=kill@1", "recovery.before_roll_back=kill@1"),
        ("recovery.before_abort=kill@1",),
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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "whole" in metafunc.fixturenames:
        played = [(profile, case) for profile in PLAYED_ON for case in CASES if case.plays_on(profile)]
        metafunc.parametrize(("whole", "case"), played, indirect=["whole"], ids=str)


@pytest.fixture
def whole(request: pytest.FixtureRequest) -> System:
    """The running system of one profile."""
    system: System = request.getfixturevalue(SYSTEMS[request.param])
    return system


@pytest.fixture(scope="module")
def opened() -> list[System]:
    """The systems that have goods and shoppers by now."""
    return []


@pytest_asyncio.fixture(loop_scope="session")
async def shop(whole: System, opened: list[System]) -> System:
    if whole not in opened:
        await whole.committed(
            product(GOODS, "tea", quantity=1_000_000),
            product(CUPS, "cup", quantity=1_000_000),
            product(RARE, "vase", quantity=1),
            *map(wallet, SHOPPERS),
        )
        opened.append(whole)
    return whole


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


async def leave_behind(system: System, opening: Sent) -> None:
    """What a program of somebody else's leaves that shares the tables and died long ago: the wallet, prepared.

    Nobody of this system knows of its transaction, so the first who reads the record must decide it.
    """
    customer = str(opening.body["customer_id"])
    at_ms = SystemClock().now_ms() - LONG_AGO_MS
    theirs = Wallet(
        customer_id=customer,
        balance=1,
        currency="GBP",
        created_at_ms=at_ms,
        updated_at_ms=at_ms,
        content_digest="theirs",
    )
    key = WALLETS.storage_key((customer,), buckets=system.known.settings.actors.buckets)
    async with await system.known.reader() as reader:
        dead = ParticipantTransaction(
            str(uuid.uuid4()),
            isolation=Isolation.SERIALIZABLE,
            storage=reader.storage,
            recovery=reader.manager.recovery,
            clock=SystemClock(),
        )
        await dead.insert(WALLETS.schema, key, WALLETS.to_columns(theirs))
        await dead.prepare_records(at_ms)


async def test_every_command_ends_in_one_answer_when_this_breaks(shop: System, case: Case) -> None:
    name = f"fp{next(_numbers)}"
    commands, expected = batch(name)
    poison = Sent("PlaceOrder", order(SHOPPERS[0], f"{name}-poison", (GOODS, "tea", -1, 250)).body)
    after_it = order(SHOPPERS[0], f"{name}-6", (GOODS, "tea", 1, 250))
    expected |= {poison.id: ("dead-lettered", "wrong_shape"), after_it.id: ("committed", "")}

    before = shop.arm(*case.lines)
    if "recovery.before_abort" in case.names:
        await leave_behind(shop, commands[0])
    answers = await shop.send(*commands, poison, after_it)

    assert {a["id"]: (a["status"], a["reason"]) for a in answers} == expected
    await fired_all(shop, before, case.names)
    await shop.check()


async def fired_all(shop: System, before: int, names: Sequence[str]) -> None:
    """No vacuous pass: what is armed has fired, or does so within what settling may take."""
    await eventually(lambda: sorted(shop.fired_since(before)) == sorted(names), f"{names} to fire")


@pytest.mark.parametrize("profile", SYSTEMS)
def test_every_failpoint_that_can_be_reached_is_in_the_list(profile: str) -> None:
    listed = {name for case in CASES if case.plays_on(profile) for name in case.names}

    assert len(listed) >= 20
    assert listed == set(FAILPOINTS) - NEVER_ON[profile]
