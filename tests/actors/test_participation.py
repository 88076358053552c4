"""A participant by its messages alone: whatever comes late, twice, out of order or from somebody who is mistaken."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
from harness import System, in_background, order, scripted, until, wallet
from weather import Matcher, preparing, writes_to

from actors.domain import Refused
from actors.messages import (
    Call,
    CommitRecords,
    Deferred,
    Invocation,
    InvocationReply,
    Prepare,
    Rollback,
    Settle,
    Share,
    Ticket,
    Trouble,
    Validate,
    Verdict,
)
from infra.consensus_commit.intents import new_intended_id
from infra.storage.operations import Put
from infra.storage.port import Storage
from schemas.message import Command
from schemas.payment import TopUpWallet


@dataclass
class Payment:
    """payment-0, and the test in the part of homes and coordinators."""

    system: System

    async def ask(self, method: str, item: Any) -> Any:
        (reply,) = await self.system.runtime.ask("payment-0", method, [item])
        return reply

    def begin(self, *commands: Command, first: int = 0, age: int = 0, tx_id: str = "") -> Invocation:
        """The calls of a new transaction, or of one that goes on."""
        return Invocation(
            tx_id=tx_id or new_intended_id(self.system.clock),
            home="orders-0",
            home_incarnation=self.system.runtime.actor("orders-0").incarnation,
            age=(age, self.system.clock.new_id()),
            command_id="x1",
            routing_key="c0",
            now_ms=self.system.clock.now_ms(),
            first=first,
            calls=tuple(Call(command.type_name(), command.model_dump_json().encode()) for command in commands),
        )

    async def invoke(self, invocation: Invocation) -> InvocationReply:
        reply = await self.ask("invoke", invocation)
        if isinstance(reply, Deferred):
            reply = await self.ask("collect", Ticket(invocation.tx_id, invocation.first, len(invocation.calls)))
        assert isinstance(reply, InvocationReply)
        return reply

    async def prepare(self, share: Share, tx_id: str) -> Verdict:
        verdict = await self.ask("prepare", Prepare(tx_id, share.incarnation, share.calls, 1))
        assert isinstance(verdict, Verdict)
        return verdict


def top_up(customer: str = "c0", *, id: str = "gift", amount: int = 5) -> TopUpWallet:
    return TopUpWallet(customer_id=customer, amount=amount, currency="GBP", top_up_id=id)


@pytest.fixture
async def payment(storage: Storage) -> AsyncIterator[Payment]:
    async with System(storage, sweep_interval_s=60) as system:
        await system.open_shop()
        yield Payment(system)
        await system.check_at_rest()


@pytest.mark.parametrize(
    "mistake",
    [{"calls": 0}, {"calls": 2}, {"incarnation": "another"}],
    ids=["a call too few", "a call too many", "another incarnation"],
)
async def test_prepare_and_validate_of_what_is_not_remembered_so_are_refused_and_write_nothing(
    payment: Payment, mistake: dict[str, Any]
) -> None:
    invocation = payment.begin(top_up())
    share = (await payment.invoke(invocation)).share
    wrong = replace(share, **mistake)

    assert (share.calls, share.has_writes) == (1, True)
    assert (await payment.prepare(wrong, invocation.tx_id)).trouble is Trouble.FORGOTTEN
    validate = Validate(invocation.tx_id, wrong.incarnation, wrong.calls, drop_writes=False)
    assert (await payment.ask("validate", validate)).trouble is Trouble.FORGOTTEN
    assert await payment.system.in_doubt() == []
    assert await payment.ask("rollback", Rollback(invocation.tx_id)) is True


async def test_prepare_while_a_call_still_runs_is_refused(payment: Payment) -> None:
    go_on = asyncio.Event()

    async def slow(tx: Any, command: Any) -> None:
        await go_on.wait()

    scripted("x1", TopUpWallet, slow)
    invocation = payment.begin(top_up())
    async with in_background(payment.invoke(invocation)) as calling:
        await until(lambda: payment.system.workspaces("payment-0") == 1)
        incarnation = payment.system.runtime.actor("payment-0").incarnation
        verdict = await payment.ask("prepare", Prepare(invocation.tx_id, incarnation, 1, 1))
        go_on.set()
        await calling

    assert verdict.trouble is Trouble.FORGOTTEN
    await payment.ask("rollback", Rollback(invocation.tx_id))


async def test_calls_of_one_transaction_run_in_their_order_however_they_arrive(payment: Payment) -> None:
    ran: list[str] = []

    async def note(tx: Any, command: TopUpWallet) -> None:
        ran.append(str(command.top_up_id))

    scripted("x1", TopUpWallet, note)
    first = payment.begin(top_up(id="0"))
    await payment.invoke(first)
    later = [payment.begin(top_up(id=str(n)), first=n, tx_id=first.tx_id) for n in (3, 1, 2)]

    await asyncio.gather(*map(payment.invoke, later))

    assert ran == ["0", "1", "2", "3"]
    await payment.ask("rollback", Rollback(first.tx_id))


async def test_a_first_call_that_comes_after_its_roll_back_opens_nothing(payment: Payment) -> None:
    invocation = payment.begin(top_up())
    assert await payment.ask("rollback", Rollback(invocation.tx_id)) is False

    reply = await payment.invoke(invocation)

    assert [result.trouble for result in reply.results] == [Trouble.FORGOTTEN]
    assert payment.system.workspaces("payment-0") == 0


async def test_a_later_call_to_a_transaction_that_is_not_known_is_forgotten(payment: Payment) -> None:
    reply = await payment.invoke(payment.begin(top_up(), top_up(id="2"), first=1))

    assert [result.trouble for result in reply.results] == [Trouble.FORGOTTEN] * 2
    assert payment.system.workspaces("payment-0") == 0


@pytest.mark.parametrize("ending", ["rollback", "settle"])
async def test_what_undoes_a_transaction_waits_for_the_prepare_that_is_under_way(payment: Payment, ending: str) -> None:
    invocation = payment.begin(top_up())
    share = (await payment.invoke(invocation)).share
    held = payment.system.storage.hold(preparing("payment.wallets", "payment.payments"))
    undo: Any = Rollback(invocation.tx_id)
    if ending == "settle":
        undo = Settle(invocation.tx_id, committed=False, decided_at_ms=1, partitions=share.partitions)
    async with in_background(payment.prepare(share, invocation.tx_id)) as preparation:
        await held.reached.wait()
        async with in_background(payment.ask(ending, undo)) as undoing:
            for _ in range(20):
                await asyncio.sleep(0)
            assert not undoing.done()
            held.let_go()

            assert (await preparation).trouble is None
            assert await undoing is True
    assert await payment.system.in_doubt() == []


async def test_a_prepare_that_comes_after_the_end_writes_nothing(payment: Payment) -> None:
    invocation = payment.begin(top_up())
    share = (await payment.invoke(invocation)).share
    await payment.ask("rollback", Rollback(invocation.tx_id))

    assert (await payment.prepare(share, invocation.tx_id)).trouble is Trouble.FORGOTTEN
    assert await payment.system.in_doubt() == []


async def test_an_owner_that_was_wounded_learns_it_when_it_prepares(payment: Payment) -> None:
    young = payment.begin(top_up(), age=2)
    share = (await payment.invoke(young)).share
    old = payment.begin(top_up(id="other"), age=1)

    reply = await payment.invoke(old)

    assert reply.results[0].trouble is None
    assert (await payment.prepare(share, young.tx_id)).trouble is Trouble.WOUNDED
    for invocation in (old, young):
        await payment.ask("rollback", Rollback(invocation.tx_id))


async def test_settling_ends_a_transaction_that_still_runs_here(payment: Payment) -> None:
    owner = payment.begin(top_up(), age=1)
    await payment.invoke(owner)
    waiting = payment.begin(top_up(id="other"), age=2)
    async with in_background(payment.invoke(waiting)) as calling:
        await until(lambda: payment.system.workspaces("payment-0") == 2)

        await payment.ask("settle", Settle(waiting.tx_id, committed=False, decided_at_ms=1, partitions=()))

        reply = await calling
    assert reply.results[0].trouble in (Trouble.WOUNDED, Trouble.FORGOTTEN)
    await payment.ask("rollback", Rollback(owner.tx_id))


async def test_what_is_decided_about_a_transaction_that_is_not_known_is_left_to_settling(payment: Payment) -> None:
    unknown = new_intended_id(payment.system.clock)

    assert await payment.ask("commit", CommitRecords(unknown, 1)) is False
    assert await payment.ask("rollback", Rollback(unknown)) is False


async def test_a_table_that_is_gone_cannot_be_settled(payment: Payment) -> None:
    settle = Settle("x", committed=False, decided_at_ms=1, partitions=(("payment", "gone", (1,)),))

    assert await payment.ask("settle", settle) is False


async def test_a_call_of_an_unknown_type_is_broken_and_the_others_of_its_message_are_not(payment: Payment) -> None:
    invocation = payment.begin(top_up())
    strange = replace(invocation, calls=(Call("Nonsense", b"{}"), *invocation.calls))

    reply = await payment.invoke(strange)

    assert [result.trouble for result in reply.results] == [Trouble.BROKEN, None]
    await payment.ask("rollback", Rollback(invocation.tx_id))


async def test_a_refusal_that_no_message_can_carry_harms_no_other_item_of_its_batch(payment: Payment) -> None:
    async def refuse(tx: Any, command: TopUpWallet) -> None:
        if command.top_up_id == "strange":
            raise Refused("no", why={(1, 2): "a key that JSON does not have"})

    scripted("x1", TopUpWallet, refuse)
    batch = [payment.begin(top_up(id="strange")), payment.begin(top_up())]

    replies = await payment.system.runtime.ask("payment-0", "invoke", batch)

    assert [reply.results[0].trouble for reply in replies] == [Trouble.BROKEN, None]
    for invocation in batch:
        await payment.ask("rollback", Rollback(invocation.tx_id))


async def test_the_share_names_what_was_written_and_how_many_calls_there_were(payment: Payment) -> None:
    invocation = payment.begin(top_up(), top_up(id="second"))

    share = (await payment.invoke(invocation)).share

    assert (share.actor, share.calls, share.has_writes) == ("payment-0", 2, True)
    assert {table for _, table, _ in share.partitions} == {"wallets", "payments"}
    await payment.ask("rollback", Rollback(invocation.tx_id))


# ---- keys are free before records are at rest ----------------------------------------------------------------------


def commits_of(table: str) -> Matcher:
    """Mutations that bring records of a table to rest, which do not write what is in them."""
    is_write = writes_to(table)
    return lambda call: (
        is_write(call)
        and all(
            m.columns["tx_state"] == 3 and "tx_version" not in m.columns for m in call.mutations if isinstance(m, Put)
        )
    )


async def test_whoever_comes_next_reads_what_was_committed_though_no_record_says_so_yet(memory: Storage) -> None:
    """Nor is the state table asked: the participant was told."""
    async with System(memory) as system:
        await system.open_shop()
        held = system.storage.hold(commits_of("payment.wallets"))
        assert (await system.send(order("o1"), "x1")).status == "committed"
        await held.reached.wait()
        assert [row["customer_id"] for row in await system.in_doubt() if "balance" in row] == ["c0"]
        assert system.workspaces("payment-0") == 1, "it is not done with it: a restart has to wait"
        calls = len(system.storage.calls)

        answer = await system.send(top_up("c0"), "x2")

        assert answer.status == "committed"
        assert not [c for c in system.storage.calls[calls:] if c.method == "get" and "coordinator.state" in c.tables]
        held.let_go()
        await system.check_at_rest()
        assert system.workspaces("payment-0") == 0


async def test_records_of_several_transactions_in_one_partition_come_to_rest_together(memory: Storage) -> None:
    async with System(memory, serializes_batches=False, sweep_interval_s=60) as system:
        payment = Payment(system)
        placement = system.config.placement
        neighbours = [name for name in map("c{}".format, range(100)) if placement.bucket(name) == 0][:3]
        await system.send_all((f"open-{name}", wallet(name)) for name in neighbours)
        begun = [payment.begin(top_up(name, id=f"gift-{name}")) for name in neighbours]
        for invocation in begun:
            share = (await payment.invoke(invocation)).share
            assert (await payment.prepare(share, invocation.tx_id)).trouble is None
        calls = len(system.storage.calls)

        done = await asyncio.gather(*(payment.ask("commit", CommitRecords(each.tx_id, 5)) for each in begun))

        assert done == [True] * 3
        written = [len(c.mutations) for c in system.storage.calls[calls:] if writes_to("payment.wallets")(c)]
        assert written == [3]
        assert await system.in_doubt() == []
