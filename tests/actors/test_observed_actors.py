"""What actors tell telemetry: each transaction once by how it ended, what is in doubt, what was pruned."""

from __future__ import annotations

from collections import Counter
from typing import Any

from harness import Fate, System, in_background, order, until

from actors.home import MAX_OPEN_COMMANDS
from actors.messages import Trouble
from actors.system import Observer
from infra.storage.port import Storage


class Notes:
    """Everything that was told."""

    def __init__(self) -> None:
        self.committed: Counter[str] = Counter()
        self.answered: list[tuple[str, str]] = []
        self.sweeps: list[tuple[str, int, int | None]] = []
        self.pruned: Counter[str] = Counter()
        self.in_hand: set[tuple[str, int, int]] = set()
        self.calls: Counter[tuple[str, str, str]] = Counter()
        self.observer = Observer(
            on_answer=lambda domain, answer, seconds: self.answered.append((answer.id, answer.status)),
            on_committed=lambda domain: self.committed.update([domain]),
            on_sweep=lambda *sweep: self.sweeps.append(sweep),
            on_pruned=lambda table, rows: self.pruned.update({table: rows}),
            on_in_hand=lambda *hand: self.in_hand.add(hand),
            on_storage_call=self._called,
        )

    def _called(self, storage: str, namespace: str, operation: str, seconds: float, error: str) -> None:
        assert seconds >= 0
        self.calls[namespace, operation, error] += 1


async def opened(notes: Notes, storage: Storage) -> System:
    return System(storage, observer=notes.observer, outcome_window_ms=60_000)


async def test_a_transaction_is_told_once_also_when_it_refuses_and_a_redelivery_is_none(memory: Storage) -> None:
    notes = Notes()
    async with await opened(notes, memory) as system:
        await system.open_shop(products=1, customers=1)
        before = notes.committed["orders"]

        placed = system.raw(order("o-1"), "order-1")
        answer = await system.deliver(system.home(order("o-1")), placed)
        again = await system.deliver(system.home(order("o-1")), placed)
        refused = await system.send(order("o-2", customer="nobody"), "order-2")

    assert (answer.status, again, refused.status) == ("committed", answer, "refused")
    assert notes.committed["orders"] - before == 2
    assert [told for told in notes.answered if told[0] == "order-1"] == [("order-1", "committed")] * 2
    assert notes.calls["orders", "mutate", ""]
    assert notes.calls["coordinator", "mutate", ""]


async def test_what_is_not_settled_is_told_with_the_time_at_which_it_began(memory: Storage) -> None:
    notes = Notes()
    async with await opened(notes, memory) as system:
        await system.open_shop(products=1, customers=1)
        began_ms = system.clock.now_ms()
        system.intercept("payment-0", "commit", Fate.LOST, times=10**6)
        system.intercept("payment-0", "settle", Fate.LOST, times=3)

        await system.send(order("o-1"), "order-1")
        coordinator = system.runtime.actor("coordinator-0")
        await coordinator.sweep()
        pending = [sweep for sweep in notes.sweeps if sweep[1]]
        await system.settle()
        await coordinator.sweep()

    assert pending
    assert pending[-1][0] == "coordinator-0"
    assert pending[-1][2] is not None
    assert pending[-1][2] >= began_ms
    assert notes.sweeps[-1] == ("coordinator-0", 0, None)


async def test_pruned_rows_are_told_by_table(memory: Storage) -> None:
    notes = Notes()
    async with await opened(notes, memory) as system:
        await system.open_shop(products=1, customers=1)
        await system.send(order("o-1"), "order-1")
        await system.settle()
        system.advance(120)

        actors: list[Any] = [system.runtime.actor(name) for name in system.runtime.names()]
        pruned = {actor.name: await actor.prune() for actor in actors}

    assert notes.pruned["orders.outcomes"] == pruned["orders-0"] + pruned.get("orders-1", 0) > 0
    assert notes.pruned["coordinator.state"] == pruned["coordinator-0"] > 0


async def test_what_an_actor_has_in_hand_is_told_with_its_bound_while_storage_is_away(memory: Storage) -> None:
    notes = Notes()
    async with await opened(notes, memory) as system:
        await system.open_shop(products=1, customers=1)
        home = system.home(order("o-1"))
        await until(lambda: (home, 0, MAX_OPEN_COMMANDS) in notes.in_hand)

        system.storage.down = True
        async with in_background(system.send(order("o-1"), "order-1")):
            await until(lambda: (home, 1, MAX_OPEN_COMMANDS) in notes.in_hand)
            system.storage.down = False


async def test_trouble_is_told_as_it_was(memory: Storage) -> None:
    async with System(memory) as system:
        await system.open_shop(products=1, customers=1)
        system.intercept("inventory-0", "prepare", Fate.UNANSWERED)
        await system.send(order("o-1"), "order-1")

    assert system.troubles[Trouble.LOST] == 1
