"""`concord redrive` on a running system: dead letters go out again once their cause is mended, and take effect once."""

from __future__ import annotations

import json
from typing import Any

import pytest

from actors.home import BROKEN_TRIES
from tests.end_to_end.harness import Sent, System, eventually, wallet

pytestmark = pytest.mark.system

CUSTOMER = "redriven"
DEAD_LETTERS = "payment.commands.dlq"


def top_up(payment: str, amount: int) -> Sent:
    body = {"customer_id": CUSTOMER, "payment_id": payment, "amount": amount, "currency": "GBP"}
    return Sent("TopUpWallet", body)


async def redriven(system: System, id: str) -> tuple[int, list[dict[str, Any]]]:
    """`concord redrive --id`: the exit code and the outcomes."""
    told = await system.concord("redrive", DEAD_LETTERS, "--id", id)
    assert told.stderr == ""
    return told.code, told.lines


async def test_a_command_whose_handler_failed_is_carried_out_once_however_often_it_is_sent_and_redriven(
    system: System,
) -> None:
    poison = top_up("redriven-poison", 5)
    await system.committed(wallet(CUSTOMER, balance=100))
    system.arm(*["home.before_handler=raise@1"] * BROKEN_TRIES)
    [died] = await system.send(poison)
    assert (died["status"], died["reason"]) == ("dead-lettered", "handler_error")

    code, [first] = await redriven(system, poison.id)
    assert (code, first["status"], first["redriven"]) == (0, "committed", poison.id)
    await system.publish_all(poison)  # its sender knows nothing of that; an answer is for ever
    await eventually(lambda: len(system.witness.answers(poison.id)) == 2, "the same answer again")
    code, [second] = await redriven(system, poison.id)

    assert (code, second) == (0, first)
    assert system.witness.answers(poison.id)[1] == died
    told = await system.concord("table", "dump", "payment.wallets", "--key", CUSTOMER)
    assert [row["balance"] for row in told.lines] == [105]
    await system.check()


async def test_a_command_without_an_id_gets_one_and_one_that_dies_again_is_found_by_its_first_id(
    system: System,
) -> None:
    nameless, broken = top_up("redriven-nameless", 1), top_up("redriven-broken", 1)
    headers = {name: value for name, value in nameless.headers.items() if name != "ce_id"}
    unreadable = await system.publish(nameless.topic, nameless.key, nameless.value, headers)
    await system.publish(broken.topic, broken.key, json.dumps(broken.body).encode()[:-1], broken.headers)
    died = await system.answers(unreadable, broken.id)
    assert [answer["reason"] for answer in died] == ["bad_headers", "not_json"]

    code, [named] = await redriven(system, unreadable)
    assert (code, named["status"], named["redriven"]) == (0, "committed", unreadable)

    code, [again] = await redriven(system, broken.id)
    assert (code, again["status"], again["redriven"]) == (4, "dead-lettered", broken.id)
    code, [once_more] = await redriven(system, broken.id)
    assert (code, once_more["status"], once_more["redriven"]) == (4, "dead-lettered", again["id"])
    await system.check()
