"""What is said to one actor's method travels together, in order, and everybody who asked is answered."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.runtime import ActorLostError, Mailroom


class Receiver:
    """A runtime that remembers each message, answers every item with itself, and fails on demand."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, str, list[Any]]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.under_way = 0
        self.most_under_way = 0
        self.failures: list[BaseException] = []

    async def ask(self, actor: str, method: str, items: Sequence[Any]) -> list[Any]:
        self.messages.append((actor, method, list(items)))
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await self.gate.wait()
            if self.failures:
                raise self.failures.pop(0)
            return [(actor, method, item) for item in items]
        finally:
            self.under_way -= 1


async def test_what_is_asked_in_one_turn_travels_in_one_message() -> None:
    receiver = Receiver()
    mailroom = Mailroom(receiver)

    replies = await asyncio.gather(*(mailroom.ask("orders-0", "prepare", n) for n in range(10)))

    assert receiver.messages == [("orders-0", "prepare", list(range(10)))]
    assert replies == [("orders-0", "prepare", n) for n in range(10)]


async def test_methods_and_actors_have_messages_of_their_own() -> None:
    receiver = Receiver()
    mailroom = Mailroom(receiver)

    await asyncio.gather(
        mailroom.ask("orders-0", "prepare", 1),
        mailroom.ask("orders-1", "prepare", 2),
        mailroom.ask("orders-0", "commit", 3),
    )

    assert sorted(receiver.messages) == [
        ("orders-0", "commit", [3]),
        ("orders-0", "prepare", [1]),
        ("orders-1", "prepare", [2]),
    ]


async def test_a_slow_receiver_makes_batches_larger_and_not_queues_longer() -> None:
    receiver = Receiver()
    mailroom = Mailroom(receiver, in_flight=2, max_items=50)
    receiver.gate.clear()
    asked = []
    for n in range(120):
        asked.append(mailroom.post("orders-0", "invoke", n))
        await asyncio.sleep(0)
    assert [len(items) for _, _, items in receiver.messages] == [1, 1]
    receiver.gate.set()

    assert [reply[2] for reply in await asyncio.gather(*asked)] == list(range(120))
    assert receiver.most_under_way == 2
    assert max(len(items) for _, _, items in receiver.messages) == 50
    assert [item for _, _, items in receiver.messages for item in items] == list(range(120))


async def test_one_that_asks_alone_neither_waits_for_others_nor_makes_them_wait() -> None:
    receiver = Receiver()
    mailroom = Mailroom(receiver, in_flight=1)
    receiver.gate.clear()
    waiting = [mailroom.post("orders-0", "collect", n) for n in range(3)]
    alone = asyncio.ensure_future(mailroom.ask_alone("orders-0", "collect", "alone"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)

    assert ("orders-0", "collect", ["alone"]) in receiver.messages
    receiver.gate.set()
    assert (await alone)[2] == "alone"
    await asyncio.gather(*waiting)


async def test_an_exception_reaches_everybody_who_asked_in_that_message_and_nobody_else() -> None:
    receiver = Receiver()
    mailroom = Mailroom(receiver)
    receiver.failures.append(ActorLostError("orders-0"))

    lost = await asyncio.gather(*(mailroom.ask("orders-0", "invoke", n) for n in range(5)), return_exceptions=True)
    assert all(isinstance(reply, ActorLostError) for reply in lost)
    assert await mailroom.ask("orders-0", "invoke", 6) == ("orders-0", "invoke", 6)


async def test_a_receiver_that_was_cancelled_is_a_lost_actor() -> None:
    receiver = Receiver()
    mailroom = Mailroom(receiver)
    receiver.failures.append(asyncio.CancelledError())

    with pytest.raises(ActorLostError):
        await mailroom.ask("orders-0", "invoke", 1)


async def test_a_reply_too_few_is_an_error_for_all_of_that_message() -> None:
    class Forgetful(Receiver):
        async def ask(self, actor: str, method: str, items: Sequence[Any]) -> list[Any]:
            return (await super().ask(actor, method, items))[:-1]

    mailroom = Mailroom(Forgetful())

    replies = await asyncio.gather(*(mailroom.ask("a", "m", n) for n in range(3)), return_exceptions=True)
    assert [type(reply) for reply in replies] == [AssertionError] * 3


async def test_one_that_stopped_waiting_takes_nothing_from_the_others() -> None:
    receiver = Receiver()
    mailroom = Mailroom(receiver)
    receiver.gate.clear()
    impatient = asyncio.ensure_future(mailroom.ask("a", "m", 1))
    patient = asyncio.ensure_future(mailroom.ask("a", "m", 2))
    await asyncio.sleep(0)
    impatient.cancel()
    receiver.gate.set()

    assert await patient == ("a", "m", 2)


async def test_a_closed_mailroom_sends_nothing_and_tells_whoever_waits() -> None:
    receiver = Receiver()
    mailroom = Mailroom(receiver, in_flight=1)
    receiver.gate.clear()
    sent = mailroom.post("a", "m", 1)
    await asyncio.sleep(0)
    queued = mailroom.post("a", "m", 2)
    mailroom.close()
    late = mailroom.post("a", "m", 3)

    for reply in (queued, late):
        with pytest.raises(ActorLostError):
            await reply
    with pytest.raises(ActorLostError):
        await mailroom.ask_alone("a", "m", 4)
    receiver.gate.set()
    await sent
    assert [items for _, _, items in receiver.messages] == [[1]]


@given(
    plan=st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("mn"), st.booleans()), max_size=60),
    in_flight=st.integers(1, 3),
    max_items=st.integers(1, 5),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=80, deadline=None)
def test_no_reply_is_lost_and_the_order_of_each_address_is_kept(
    plan: list[tuple[str, str, bool]], in_flight: int, max_items: int, seed: int
) -> None:
    """Whatever is asked when, and however slowly messages are answered or fail."""
    turns = random.Random(seed)

    class Moody(Receiver):
        async def ask(self, actor: str, method: str, items: Sequence[Any]) -> list[Any]:
            self.messages.append((actor, method, list(items)))
            for _ in range(turns.randrange(6)):
                await asyncio.sleep(0)
            if turns.random() < 0.2:
                raise ActorLostError(actor)
            return [(actor, method, item) for item in items]

    async def run() -> None:
        receiver = Moody()
        mailroom = Mailroom(receiver, in_flight=in_flight, max_items=max_items)
        asked = []
        for number, (actor, method, pause) in enumerate(plan):
            asked.append((actor, method, number, mailroom.post(actor, method, number)))
            if pause:
                await asyncio.sleep(0)
        async with asyncio.timeout(10):
            replies = await asyncio.gather(*(reply for *_, reply in asked), return_exceptions=True)
        for (actor, method, number, _), reply in zip(asked, replies, strict=True):
            assert isinstance(reply, ActorLostError) or reply == (actor, method, number)
        for address in {(actor, method) for actor, method, _ in plan}:
            sent = [n for actor, method, items in receiver.messages if (actor, method) == address for n in items]
            assert sent == [n for n, (actor, method, _) in enumerate(plan) if (actor, method) == address]

    asyncio.run(run())
