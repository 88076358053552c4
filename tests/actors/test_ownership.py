"""Wound-wait as a property: never two owners, everybody is done in the end, and the oldest is never sent back."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.ownership import Owner, Ownership, WoundedError

IMPATIENT_S = 0.001


@dataclass
class Village:
    """Commands that take keys in their own order, hold them for a few turns, and start again if wounded."""

    ownership: Ownership = field(default_factory=lambda: Ownership(patience_s=IMPATIENT_S))
    holders: dict[str, Owner] = field(default_factory=dict)
    wounds: list[int] = field(default_factory=list)
    done: list[int] = field(default_factory=list)

    async def work(self, number: int, keys: list[str], *, side_by_side: bool, turns: random.Random) -> None:
        while True:
            owner = Owner((number, str(number)))
            try:
                if side_by_side:
                    await asyncio.gather(*(self._take(key, owner) for key in keys))
                else:
                    for key in keys:
                        await self._take(key, owner)
                        for _ in range(turns.randrange(3)):
                            await asyncio.sleep(0)
                if owner.wounded:
                    raise WoundedError
                owner.prepared = True
                for _ in range(turns.randrange(5)):
                    await asyncio.sleep(0)
                    assert all(self.holders.get(key) is owner for key in keys), "a prepared owner keeps its keys"
                self._leave(owner)
                self.done.append(number)
                return
            except WoundedError:
                self.wounds.append(number)
                self._leave(owner)
                await asyncio.sleep(0)

    async def _take(self, key: str, owner: Owner) -> None:
        await self.ownership.acquire(key, owner)
        before = self.holders.get(key)
        assert before in (None, owner) or before.wounded, f"{key} has two owners"
        self.holders[key] = owner

    def _leave(self, owner: Owner) -> None:
        for key in [key for key, holder in self.holders.items() if holder is owner]:
            del self.holders[key]
        self.ownership.release(owner)


@given(
    programs=st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=5), min_size=2, max_size=8),
    side_by_side=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_every_set_of_lock_sequences_finishes_with_one_owner_at_a_time(
    programs: list[list[str]], side_by_side: bool, seed: int
) -> None:
    async def run() -> Village:
        village, turns = Village(), random.Random(seed)
        order = list(enumerate(programs))
        turns.shuffle(order)
        async with asyncio.timeout(10):
            await asyncio.gather(
                *(village.work(number, keys, side_by_side=side_by_side, turns=turns) for number, keys in order)
            )
        return village

    village = asyncio.run(run())

    assert sorted(village.done) == list(range(len(programs)))
    assert 0 not in village.wounds, "the oldest was wounded"
    assert village.ownership.owned == 0
    assert village.ownership._queues == {}


async def test_a_deadlock_is_broken_by_wounding_the_younger() -> None:
    ownership = Ownership(patience_s=IMPATIENT_S)
    old, young = Owner((1, "old")), Owner((2, "young"))
    await ownership.acquire("a", old)
    await ownership.acquire("b", young)

    results = await asyncio.gather(ownership.acquire("b", old), ownership.acquire("a", young), return_exceptions=True)

    assert results[0] is None
    assert isinstance(results[1], WoundedError)
    assert (old.wounded, young.wounded, old.keys) == (False, True, {"a", "b"})


async def test_one_that_is_wounded_after_it_was_given_a_key_and_before_it_wakes_is_told_so() -> None:
    ownership = Ownership(patience_s=IMPATIENT_S)
    first, second, third = Owner((1, "first")), Owner((2, "second")), Owner((3, "third"))
    await ownership.acquire("a", first)
    waiting = [asyncio.ensure_future(ownership.acquire("a", owner)) for owner in (second, third)]
    await asyncio.sleep(0)

    ownership.release(first)
    ownership.release(second)
    results = await asyncio.gather(*waiting, return_exceptions=True)

    assert isinstance(results[0], WoundedError)
    assert results[1] is None
    assert (second.keys, third.keys) == (set(), {"a"})


async def test_a_prepared_owner_is_waited_for_however_young_it_is() -> None:
    ownership = Ownership(patience_s=IMPATIENT_S)
    old, young = Owner((1, "old")), Owner((2, "young"), prepared=True)
    await ownership.acquire("a", young)
    waiting = asyncio.ensure_future(ownership.acquire("a", old))
    await asyncio.sleep(20 * IMPATIENT_S)  # far longer than it would give one that is not prepared

    assert not waiting.done()
    assert not young.wounded
    ownership.release(young)
    await waiting
    assert old.keys == {"a"}


async def test_an_older_command_gives_a_younger_owner_a_moment_to_be_done() -> None:
    ownership = Ownership(patience_s=60)
    old, young = Owner((1, "old")), Owner((2, "young"))
    await ownership.acquire("a", young)
    waiting = asyncio.ensure_future(ownership.acquire("a", old))
    for _ in range(10):
        await asyncio.sleep(0)
    ownership.release(young)

    await waiting
    assert old.keys == {"a"}


async def test_a_free_key_goes_to_the_oldest_that_waits() -> None:
    ownership = Ownership(patience_s=60)
    first = Owner((0, "first"))
    await ownership.acquire("a", first)
    order: list[int] = []

    async def take(age: int) -> None:
        owner = Owner((age, str(age)))
        await ownership.acquire("a", owner)
        order.append(age)
        ownership.release(owner)

    tasks = [asyncio.ensure_future(take(age)) for age in (5, 2, 9, 1)]
    await asyncio.sleep(0)
    ownership.release(first)
    await asyncio.gather(*tasks)

    assert order == [1, 2, 5, 9]


async def test_one_that_asks_twice_for_a_key_gets_it_twice() -> None:
    ownership = Ownership(patience_s=60)
    first, second = Owner((1, "first")), Owner((2, "second"))
    await ownership.acquire("a", first)
    waiting = [asyncio.ensure_future(ownership.acquire(key, second)) for key in ("a", "a", "b")]
    await asyncio.sleep(0)
    ownership.release(first)

    async with asyncio.timeout(5):
        await asyncio.gather(*waiting)
    assert second.keys == {"a", "b"}


async def test_one_that_stopped_waiting_is_given_nothing() -> None:
    ownership = Ownership(patience_s=60)
    first, gone, third = Owner((1, "first")), Owner((2, "gone")), Owner((3, "third"))
    await ownership.acquire("a", first)
    cancelled = asyncio.ensure_future(ownership.acquire("a", gone))
    waiting = asyncio.ensure_future(ownership.acquire("a", third))
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.sleep(0)
    ownership.release(first)

    await waiting
    assert (gone.keys, third.keys) == (set(), {"a"})


async def test_whoever_has_let_go_gets_nothing_any_more() -> None:
    ownership = Ownership(patience_s=60)
    first, second = Owner((1, "first")), Owner((2, "second"))
    await ownership.acquire("a", first)
    waiting = asyncio.ensure_future(ownership.acquire("a", second))
    await asyncio.sleep(0)
    ownership.release(second)

    with pytest.raises(WoundedError):
        await waiting
    with pytest.raises(WoundedError):
        await ownership.acquire("b", second)
    ownership.release(first)
    assert ownership.owned == 0
