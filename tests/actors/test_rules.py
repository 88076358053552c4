"""The twelve rules of the architecture, each shown in process. Faults that strike anywhere are in test_faults.py."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from harness import (
    COORDINATOR,
    QUICK,
    Fate,
    Foreigner,
    System,
    in_background,
    order,
    product,
    scripted,
    until,
)
from weather import Fault, PatientEvent, preparing, writes_to

from actors.domain import Refused, Transaction
from actors.inventory.tables import PRODUCTS, RESERVATIONS
from actors.messages import Trouble
from actors.orders.tables import ORDERS
from actors.payment.tables import WALLETS
from actors.runtime import Placement
from infra.config import ConfigurationError, load_settings
from infra.consensus_commit.errors import UncommittedRecordError
from infra.consensus_commit.intents import Intent, IntentLog
from infra.consensus_commit.states import TransactionState
from infra.storage.memory import MemoryStorage
from infra.storage.operations import Atomicity
from infra.storage.port import Storage
from schemas.inventory import CheckAvailability, ReserveStock, RestockProduct, StockItem, WriteOffStock
from schemas.orders import PlaceOrder
from schemas.payment import TakePayment, TopUpWallet

SOLD_OUT: PlaceOrder = order("o1", lines=(("art", "p0", 1), ("books", "p0", 2000)))
"""Refused: a thousand books are there, in the care of inventory-1; the art, the money and the shipment would do."""


def restock(category: str, quantity: int) -> RestockProduct:
    return RestockProduct(category=category, items=(StockItem(product_id="p0", quantity=quantity),))


def more(quantity: int) -> Any:
    return lambda product: product.restock(quantity, at_ms=product.updated_at_ms)


# ---- 1: redelivery always meets its outcome ----------------------------------------------------------------------


async def test_rule_01_a_redelivered_command_gets_the_same_answer_and_the_same_event_ids(storage: Storage) -> None:
    async with System(storage) as system:
        await system.open_shop()
        first = await system.send(order("o1"), "x1")
        await system.check_at_rest()
        tables = await system.tables()

        again = await system.send(order("o1"), "x1")

        assert first.status == "committed"
        assert len(first.events) == 5
        assert again == first
        assert await system.tables() == tables
        await system.check_at_rest()


async def test_rule_01_a_redelivered_refusal_gets_the_same_answer_though_it_could_succeed_now(storage: Storage) -> None:
    async with System(storage) as system:
        await system.open_shop()
        first = await system.send(SOLD_OUT, "x1")
        await system.send(restock("books", 5000), "more")

        assert await system.send(SOLD_OUT, "x1") == first
        assert (first.status, first.reason) == ("refused", "out_of_stock")
        await system.check_at_rest()


async def test_rule_01_a_home_that_restarted_gives_the_same_answer(storage: Storage) -> None:
    async with System(storage) as system:
        await system.open_shop()
        first = await system.send(order("o1"), "x1")
        await system.runtime.kill_and_restart("orders-0")

        assert await system.send(order("o1"), "x1") == first
        await system.check_at_rest()


async def test_rule_01_another_payload_under_a_known_id_is_an_id_conflict_and_changes_nothing(storage: Storage) -> None:
    async with System(storage) as system:
        await system.open_shop()
        first = await system.send(order("o1"), "x1")
        await system.check_at_rest()
        tables = await system.tables()

        other = await system.deliver("orders-0", system.raw(order("o2"), "x1"))

        assert (other.status, other.reason, other.events, other.tx_id) == ("refused", "id_conflict", (), None)
        assert await system.tables() == tables
        assert await system.send(order("o1"), "x1") == first


async def test_rule_01_one_id_with_two_payloads_at_once_has_one_effect(memory: Storage) -> None:
    async with System(memory) as system:
        await system.open_shop()
        raws = [system.raw(order(f"o{number}"), "x1") for number in range(5)]

        answers = await asyncio.gather(*(system.deliver("orders-0", raw) for raw in raws))

        assert sorted(answer.reason for answer in answers) == ["", *["id_conflict"] * 4]
        assert len(await system.dump("orders.orders")) == 1
        system.answers = {key: answer for key, answer in system.answers.items() if answer.status == "committed"}
        await system.check_at_rest()


async def test_rule_01_the_start_is_refused_where_commands_are_kept_longer_than_answers() -> None:
    load_settings(environment={"CONCORD_KAFKA__RETENTION_COMMANDS_HOURS": "71", "CONCORD_OUTCOME__WINDOW_HOURS": "72"})
    with pytest.raises(ConfigurationError, match="might not find its answer"):
        load_settings(
            environment={"CONCORD_KAFKA__RETENTION_COMMANDS_HOURS": "72", "CONCORD_OUTCOME__WINDOW_HOURS": "72"}
        )


async def test_rule_01_pruning_takes_old_outcomes_and_no_younger_ones(storage: Storage) -> None:
    async with System(storage, outcome_window_ms=60_000) as system:
        await system.open_shop(customers=1)
        await system.send(order("old"), "old")
        await system.settle()
        system.advance(50)
        await system.send(order("young"), "young")
        system.advance(20)

        assert await system.runtime.actor("orders-0").prune() == 1

        assert [row["id"] for row in await system.dump("orders.outcomes")] == ["young"]
        # Beyond the window, a retry is a new command, unless a business id knows it.
        again = await system.deliver("orders-0", system.raw(order("old"), "old"))
        assert (again.status, again.events) == ("committed", ())
        assert len(await system.dump("orders.orders")) == 2


async def test_rule_01_pruning_spares_an_outcome_that_grew_young_while_it_looked(memory: Storage) -> None:
    async with System(memory, outcome_window_ms=60_000) as system:
        await system.open_shop(customers=1)
        await system.send(order("o1"), "x1")
        await system.check_at_rest()
        system.advance(100)
        held = system.storage.hold(writes_to("orders.outcomes"))
        async with in_background(system.runtime.actor("orders-0").prune()) as pruning:
            await held.reached.wait()
            (delete,) = held.mutations
            await system.storage.storage.mutate([delete])  # another pruner was quicker,
            again = await system.deliver("orders-0", system.raw(order("o1"), "x1"))  # and the command came again
            held.let_go()

            assert await pruning == 0
        assert len(await system.outcome("orders", "x1")) == 1
        assert again.status == "committed"


# ---- 2: dead letters are answers too -----------------------------------------------------------------------------


async def test_rule_02_a_dead_letter_is_answered_from_its_outcome_and_its_id_cannot_commit(storage: Storage) -> None:
    async with System(storage) as system:
        good = system.raw(product("art", "p0", 10), "x1")
        bad = system.raw(product("art", "p0", 10), "x1", value=b"{")

        first = await system.deliver("inventory-0", bad)
        again = await system.deliver("inventory-0", bad)
        other = await system.deliver("inventory-0", good)

        assert (first.status, first.reason, first.id) == ("dead-lettered", "not_json", "x1")
        assert again == first
        assert (other.status, other.reason) == ("refused", "id_conflict")
        assert await system.dump("inventory.products") == []


async def test_rule_02_a_dead_letter_whose_id_has_committed_is_kept_under_its_place_in_the_log(
    storage: Storage,
) -> None:
    async with System(storage) as system:
        committed = await system.send(product("art", "p0", 10), "x1")
        bad = system.raw(product("art", "p0", 10), "x1", value=b"{")

        first = await system.deliver("inventory-0", bad)
        again = await system.deliver("inventory-0", bad)

        assert (first.status, first.id) == ("dead-lettered", f"unreadable:inventory.commands:0:{bad.offset}")
        assert again == first
        assert await system.send(product("art", "p0", 10), "x1") == committed
        await system.check_at_rest()


async def test_rule_02_a_dead_letter_at_a_place_that_had_another_one_has_an_answer_of_its_own(
    storage: Storage,
) -> None:
    """A topic that was made anew counts from 0 again."""
    async with System(storage) as system:
        before = system.raw(product("art", "p0", 10), "x1", headers=(), value=b"one")
        after = system.raw(product("art", "p0", 10), "x1", headers=(), value=b"other", offset=before.offset)

        first = await system.deliver("inventory-0", before)
        other = await system.deliver("inventory-0", after)

        assert (first.status, other.status) == ("dead-lettered", "dead-lettered")
        assert other.id.startswith(first.id + ":")
        assert await system.deliver("inventory-0", before) == first
        assert await system.deliver("inventory-0", after) == other
        await system.check_at_rest()


async def test_rule_02_what_has_no_readable_id_gets_one_from_topic_partition_and_offset(storage: Storage) -> None:
    async with System(storage) as system:
        raw = system.raw(product("art", "p0", 10), "x1", headers=())

        first = await system.deliver("inventory-0", raw)

        assert (first.status, first.reason) == ("dead-lettered", "bad_headers")
        assert first.id == f"unreadable:inventory.commands:0:{raw.offset}"
        assert await system.deliver("inventory-0", raw) == first
        await system.check_at_rest()


@pytest.mark.parametrize("slower", ["dead letter", "command"])
async def test_rule_02_a_dead_letter_and_a_commit_under_one_id_exclude_each_other(slower: str) -> None:
    """Two homes at once, one of them taken for dead: only the outcome's row stands between them."""
    async with System(MemoryStorage(Atomicity.NAMESPACE)) as system:
        good = system.raw(product("art", "p0", 10), "x1")
        bad = system.raw(product("art", "p0", 10), "x1", value=b"{")
        slow, quick = (bad, good) if slower == "dead letter" else (good, bad)
        old: Any = await system.replace("inventory-0")
        held = system.storage.hold(writes_to("inventory.outcomes"))
        async with in_background(old.execute([slow])) as working:
            await held.reached.wait()
            winner = await system.deliver("inventory-0", quick)
            held.let_go()
            (loser,) = await working

        assert winner.id == "x1"
        if slower == "dead letter":
            assert (winner.status, loser.status) == ("committed", "dead-lettered")
            assert loser.id.startswith("unreadable:")
        else:
            assert (winner.status, loser.reason) == ("dead-lettered", "id_conflict")
        assert len(await system.dump("inventory.products")) == (slower == "dead letter")
        await system.check_at_rest()


# ---- 3: a refusal is serializable --------------------------------------------------------------------------------


async def test_rule_03_a_refusal_is_serializable_so_goods_that_arrive_meanwhile_are_sold(storage: Storage) -> None:
    async with System(storage) as system:
        await system.open_shop()
        foreigner = Foreigner(system)
        held = system.intercept("inventory-1", "validate", Fate.HELD)
        async with in_background(system.send(SOLD_OUT, "x1")) as sending:
            await held.reached.wait()
            await foreigner.change(PRODUCTS, "books", "p0", by=more(5000))
            held.let_go()
            answer = await sending

        assert (answer.status, answer.reason) == ("committed", "")
        assert system.troubles[Trouble.CONFLICT] == 1
        assert len(await system.dump("orders.orders")) == 1
        await system.check_at_rest()


async def test_rule_03_a_refusal_rests_on_absences_too(storage: Storage) -> None:
    async with System(storage) as system:
        await system.open_shop()
        foreigner = Foreigner(system)
        shelf = await system.record(PRODUCTS, "books", "p0")
        assert shelf is not None
        unknown = order("o1", lines=(("art", "p0", 1), ("books", "rare", 1)))
        held = system.intercept("inventory-1", "validate", Fate.HELD)
        async with in_background(system.send(unknown, "x1")) as sending:
            await held.reached.wait()
            await foreigner.insert(PRODUCTS, shelf.with_(product_id="rare"))
            held.let_go()
            answer = await sending

        assert (answer.status, answer.reason) == ("committed", "")
        await system.check_at_rest()


async def test_rule_03_a_refusal_rests_on_scans_too(storage: Storage) -> None:
    async def refuse_without_reservations(tx: Transaction, command: CheckAvailability) -> dict[str, Any]:
        found = await tx.scan(RESERVATIONS, command.category)
        if not found:
            raise Refused("no_reservations")
        return {"found": len(found)}

    async with System(storage) as system:
        await system.open_shop()
        scripted("x1", CheckAvailability, refuse_without_reservations)
        check = CheckAvailability(category="art", items=(StockItem(product_id="p0", quantity=1),))
        held = system.intercept("inventory-0", "validate", Fate.HELD)
        async with in_background(system.send(check, "x1")) as sending:
            await held.reached.wait()
            placed = await system.send(order("o1", lines=(("art", "p0", 1),)), "x2")
            held.let_go()
            answer = await sending

        assert placed.status == "committed"
        assert (answer.status, answer.result) == ("committed", {"found": 1})
        await system.check_at_rest()


async def test_rule_03_a_refused_command_leaves_only_its_answer(storage: Storage) -> None:
    async with System(storage) as system:
        await system.open_shop()
        await system.check_at_rest()
        before = await system.tables()

        answer = await system.send(SOLD_OUT, "x1")

        await system.check_at_rest()
        after = await system.tables()
        assert (answer.status, answer.reason, answer.events) == ("refused", "out_of_stock", ())
        assert len(after.pop("orders.outcomes")) == len(before.pop("orders.outcomes")) + 1
        assert after == before


async def test_rule_03_a_read_only_command_is_validated_with_its_answer(storage: Storage) -> None:
    async with System(storage) as system:
        await system.open_shop(quantity=10)
        foreigner = Foreigner(system)
        check = CheckAvailability(category="art", items=(StockItem(product_id="p0", quantity=15),))
        held = system.intercept("inventory-0", "validate", Fate.HELD)
        async with in_background(system.send(check, "x1")) as sending:
            await held.reached.wait()
            await foreigner.change(PRODUCTS, "art", "p0", by=more(10))
            held.let_go()
            answer = await sending

        assert answer.result is not None
        assert answer.result["available"] is True


# ---- 4: a restarted participant has forgotten --------------------------------------------------------------------


async def test_rule_04_a_participant_that_restarted_between_call_and_prepare_makes_the_command_start_again(
    storage: Storage,
) -> None:
    async with System(storage) as system:
        await system.open_shop()
        held = system.intercept("payment-0", "prepare", Fate.HELD)
        async with in_background(system.send(order("o1"), "x1")) as sending:
            await held.reached.wait()
            await system.runtime.kill_and_restart("payment-0")
            held.let_go()
            answer = await sending

        assert answer.status == "committed"
        assert system.troubles[Trouble.FORGOTTEN] == 1
        assert [row["payment_id"] for row in await system.dump("payment.payments")].count("opening") == 2
        assert len(await system.dump("payment.payments")) == 3
        await system.check_at_rest()


async def test_rule_04_a_participant_that_restarted_between_two_calls_makes_the_command_start_again(
    storage: Storage,
) -> None:
    pay = TakePayment(customer_id="c0", payment_id="first", amount=100, currency="GBP", method="wallet")
    first_done, go_on = asyncio.Event(), asyncio.Event()

    async def pay_twice(tx: Transaction, command: PlaceOrder) -> None:
        await tx.call(pay)
        first_done.set()
        await go_on.wait()
        await tx.call(pay.model_copy(update={"payment_id": "second"}))

    async with System(storage) as system:
        await system.open_shop()
        scripted("x1", PlaceOrder, pay_twice)
        async with in_background(system.send(order("o1"), "x1")) as sending:
            await first_done.wait()
            await system.runtime.kill_and_restart("payment-0")
            go_on.set()
            answer = await sending

        assert answer.status == "committed"
        assert system.troubles[Trouble.FORGOTTEN] == 1
        paid = [row["payment_id"] for row in await system.dump("payment.payments")]
        assert sorted(paid) == ["first", "opening", "opening", "second"]
        await system.check_at_rest()


async def test_rule_04_a_call_that_came_twice_counts_once(storage: Storage) -> None:
    async with System(storage) as system:
        await system.open_shop()
        doubled = system.intercept("payment-0", "invoke", Fate.TWICE)

        answer = await system.send(order("o1"), "x1")

        assert doubled.reached.is_set()
        assert answer.status == "committed"
        purse = await system.record(WALLETS, "c0")
        assert purse is not None
        assert purse.balance == 10**9 - 200
        await system.check_at_rest()


# ---- 5: nothing arrives late -------------------------------------------------------------------------------------


async def test_rule_05_a_refused_command_waits_for_its_outstanding_calls_and_their_writes_are_gone(
    storage: Storage,
) -> None:
    async with System(storage) as system:
        await system.open_shop()
        before = await system.dump("payment.payments")
        held = system.intercept("payment-0", "invoke", Fate.ANSWER_HELD)
        async with in_background(system.send(SOLD_OUT, "x1")) as sending:
            await held.reached.wait()
            await until(lambda: system.workspaces("payment-0") == 1 and system.workspaces("inventory-1") == 1)
            await asyncio.sleep(0.03)  # time enough to answer, and be wrong
            assert not sending.done()
            assert await system.outcome("orders", "x1") == []
            held.let_go()
            answer = await sending

        assert (answer.status, answer.reason) == ("refused", "out_of_stock")
        await system.check_at_rest()
        assert await system.dump("payment.payments") == before


async def test_rule_05_a_call_that_comes_after_the_end_changes_nothing_and_holds_nothing(storage: Storage) -> None:
    async with System(storage) as system:
        await system.open_shop()
        late = system.intercept("payment-0", "invoke", Fate.LATE)
        answer = await system.send(order("o1"), "x1")
        await system.check_at_rest()
        before = await system.tables()

        late.let_go()
        await late.arrived.wait()

        assert answer.status == "committed"
        assert system.troubles[Trouble.LOST] == 1
        assert system.workspaces("payment-0") == 0
        assert await system.tables() == before


async def test_rule_05_what_a_refused_handler_left_running_writes_nothing_any_more(storage: Storage) -> None:
    """`gather` gives up at the first refusal and lets the others run on: nothing that they do may count."""
    reserve_art = ReserveStock(
        category="art", order_id="o1", customer_id="c0", items=(StockItem(product_id="p0", quantity=1),)
    )
    reserve_books = reserve_art.model_copy(
        update={"category": "books", "items": (StockItem(product_id="p0", quantity=2000),)}
    )
    strays: list[BaseException] = []
    given_up = PatientEvent()

    async def careless(tx: Transaction, command: PlaceOrder) -> None:
        placed = await tx.get(ORDERS, "c1", "of another")
        assert placed is not None

        async def reserve_then_write() -> None:
            try:
                await tx.call(reserve_art)
                await tx.update(ORDERS, placed.with_(total=1))
            except BaseException as error:
                strays.append(error)
                raise

        async def reserve_then_reserve() -> None:
            try:
                await tx.call(reserve_art.model_copy(update={"order_id": "o2"}))
                await tx.call(reserve_art.model_copy(update={"category": "coins"}))
            except BaseException as error:
                strays.append(error)
                raise

        try:
            await asyncio.gather(tx.call(reserve_books), reserve_then_write(), reserve_then_reserve())
        finally:
            given_up.set()

    async with System(storage) as system:
        await system.open_shop()
        await system.send(order("of another", customer="c1"), "x0")
        await system.check_at_rest()
        before = await system.tables()
        scripted("x1", PlaceOrder, careless)
        slow = system.intercept("inventory-0", "invoke", Fate.ANSWER_HELD)
        async with in_background(system.send(order("o1"), "x1")) as sending:
            await slow.reached.wait()
            await given_up.wait()
            await asyncio.sleep(0.03)  # time enough to answer, and be wrong
            assert not sending.done()
            assert await system.outcome("orders", "x1") == []
            slow.let_go()
            answer = await sending
        await until(lambda: len(strays) == 2)
        await system.check_at_rest()

        after = await system.tables()
        assert (answer.status, answer.reason) == ("refused", "out_of_stock")
        assert len(after.pop("orders.outcomes")) == len(before.pop("orders.outcomes")) + 1
        assert after == before


async def test_rule_05_trouble_that_a_handler_swallows_ends_the_attempt_all_the_same(storage: Storage) -> None:
    async def optimistic(tx: Transaction, command: PlaceOrder) -> dict[str, Any]:
        try:
            await tx.call(TopUpWallet(customer_id="c0", amount=5, currency="GBP", top_up_id="gift"))
        except Exception:
            return {"gift": False}
        return {"gift": True}

    async with System(storage) as system:
        await system.open_shop()
        scripted("x1", PlaceOrder, optimistic)
        system.intercept("payment-0", "invoke", Fate.UNANSWERED)

        answer = await system.send(order("o1"), "x1")

        assert answer.result == {"gift": True}
        assert system.troubles[Trouble.LOST] == 1
        assert system.workspaces("payment-0") == 0 or (await system.settle()) is None
        await system.check_at_rest()


# ---- 6: nobody aborts by looking ---------------------------------------------------------------------------------


async def test_rule_06_whoever_meets_an_undecided_record_does_not_abort_its_transaction(storage: Storage) -> None:
    async with System(storage) as system:
        await system.open_shop()
        foreigner = Foreigner(system)
        held = system.storage.hold(writes_to("coordinator.state"))
        async with in_background(system.send(order("o1"), "x1")) as sending:
            await held.reached.wait()
            (undecided,) = {row["tx_id"] for row in await system.in_doubt()}
            with pytest.raises(UncommittedRecordError):
                await foreigner.read(WALLETS, "c0")
            assert await system.state(str(undecided)) is None
            held.let_go()
            answer = await sending

        assert (answer.status, answer.tx_id) == ("committed", undecided)
        await system.check_at_rest()


async def test_rule_06_a_coordinator_that_dies_before_its_decision_has_aborted_though_its_write_comes_late(
    storage: Storage,
) -> None:
    async with System(storage) as system:
        await system.open_shop()
        held = system.storage.hold(writes_to("coordinator.state"))
        async with in_background(system.send(order("o1"), "x1")) as sending:
            await held.reached.wait()
            (first,) = {str(row["tx_id"]) for row in await system.in_doubt()}
            await system.runtime.kill_and_restart(COORDINATOR)
            answer = await sending
            state = await system.state(first)
            held.let_go()
            await held.applied.wait()

        assert answer.status == "committed"
        assert answer.tx_id != first
        assert state is not None
        assert state.state is TransactionState.ABORTED
        assert await system.state(first) == state
        await system.check_at_rest()


async def test_rule_06_a_coordinator_that_dies_after_its_decision_has_committed(storage: Storage) -> None:
    async with System(storage) as system:
        await system.open_shop()
        held = system.intercept("payment-0", "commit", Fate.VISITED, visitor=asyncio.Event().wait)
        system.intercept(COORDINATOR, "commit", Fate.KILLS_AFTER)
        answer = await system.send(order("o1"), "x1")

        assert held.reached.is_set()
        assert answer.status == "committed"
        state = await system.state(str(answer.tx_id))
        assert state is not None
        assert state.state is TransactionState.COMMITTED
        assert system.troubles == {}
        await system.check_at_rest()


async def test_rule_06_a_participant_of_a_silent_coordinator_finds_the_commit_and_obeys(storage: Storage) -> None:
    async with System(storage, sweep_interval_s=60) as system:
        await system.open_shop()
        held = system.intercept("payment-0", "commit", Fate.HELD)
        answer = await system.send(order("o1"), "x1")
        await held.reached.wait()
        assert len([row for row in await system.in_doubt() if row["tx_id"] == answer.tx_id]) >= 2

        system.advance(QUICK.silent_after_s + 1)
        await until(lambda: system.workspaces("payment-0") == 0)

        payments = [
            row for name, rows in (await system.tables()).items() if name.startswith("payment.") for row in rows
        ]
        assert {row["tx_state"] for row in payments} == {TransactionState.COMMITTED.value}
        purse = await system.record(WALLETS, "c0")
        assert purse is not None
        assert purse.balance == 10**9 - 200
        held.let_go()
        await system.check_at_rest()


async def test_rule_06_a_participant_of_a_silent_coordinator_aborts_through_the_state_table_alone(
    storage: Storage,
) -> None:
    async with System(storage, sweep_interval_s=60) as system:
        await system.open_shop()
        held = system.storage.hold(writes_to("coordinator.state"))
        async with in_background(system.send(order("o1"), "x1")) as sending:
            await held.reached.wait()
            (first,) = {str(row["tx_id"]) for row in await system.in_doubt()}
            system.advance(QUICK.silent_after_s + 1)
            await until(lambda: system.workspaces("payment-0") == 0)
            state = await system.state(first)
            held.let_go()  # the coordinator speaks at last, and finds that it has lost
            answer = await sending

        assert state is not None
        assert state.state is TransactionState.ABORTED
        assert (answer.status, answer.tx_id != first) == ("committed", True)
        await system.check_at_rest()


# ---- 7: recovery knows where to look -----------------------------------------------------------------------------


@pytest.mark.parametrize("decided", [False, True], ids=["undecided", "committed"])
async def test_rule_07_a_restarted_coordinator_settles_what_its_predecessor_left_though_nobody_reads_it(
    storage: Storage, decided: bool
) -> None:
    async with System(storage) as system:
        await system.open_shop()
        # Everybody dies at the decision: only records, an intent and perhaps a state row are left.
        held = system.storage.hold(writes_to("coordinator.state"))
        async with in_background(system.send(order("o1"), "x1")) as sending:
            await held.reached.wait()
            for actor in reversed(system.config.placement.actors()):  # the home before it can ask the state table
                await system.kill(actor)
            if decided:
                held.let_go()
                await held.applied.wait()
            sending.cancel()
        assert len(await system.in_doubt()) > 8
        (intent,) = await system.intents()

        reads = len(system.storage.calls)
        for actor in reversed(system.config.placement.actors()):
            await system.restart(actor)

        async def settled() -> bool:
            return await system.in_doubt() == []

        await until(settled)
        assert not [
            call for call in system.storage.calls[reads:] if call.method == "get" and "orders.orders" in call.tables
        ]
        assert len(await system.dump("orders.orders")) == decided
        if not decided:
            held.let_go()
            await held.applied.wait()
        state = await system.state(intent.tx_id)
        assert state is not None
        assert (state.state is TransactionState.COMMITTED) == decided
        await system.check_at_rest()
        assert (await system.send(order("o1"), "x1")).status == "committed"
        await system.check_at_rest()


async def test_rule_07_what_a_coordinator_left_that_is_placed_no_longer_is_settled_when_it_has_expired(
    memory: Storage,
) -> None:
    two = Placement(buckets=8, shards={"orders": 1, "inventory": 1, "payment": 1, "shipping": 1}, coordinators=2)
    one = Placement(buckets=8, shards=two.shards, coordinators=1)
    home = next(f"orders-{n}" for n in range(1) if two.coordinator_of(f"orders-{n}"))
    second = two.coordinator_of(home)
    async with System(memory, placement=two) as before:
        await before.open_shop()
        held = before.storage.hold(writes_to("coordinator.state"))
        async with in_background(before.send(order("o1"), "x1")):
            await held.reached.wait()
            for actor in two.actors():
                await before.kill(actor)
    async with System(memory, placement=one, clock=before.clock) as after:
        assert second == "coordinator-1"
        coordinator = after.runtime.actor(COORDINATOR)
        await coordinator.sweep()
        assert await after.in_doubt() != []

        after.advance(QUICK.transaction_lifetime_ms / 1000 + 1)
        await coordinator.sweep()

        assert await after.in_doubt() == []
        await after.check_at_rest()


async def test_rule_07_one_intent_that_cannot_be_settled_keeps_no_other_in_doubt(memory: Storage) -> None:
    async with System(memory) as system:
        await system.open_shop()
        intents = IntentLog(system.storage.storage)
        held = system.storage.hold(writes_to("coordinator.state"))
        async with in_background(system.send(order("o1"), "x1")):
            await held.reached.wait()
            (intent,) = await system.intents()
            alien = replace(intent, tx_id="0-alien", partitions=(("gone", "table", (1,)),))
            await intents.record([alien])
            for actor in ("orders-0", COORDINATOR):
                await system.runtime.kill_and_restart(actor)

            async def settled() -> bool:
                return await system.in_doubt() == []

            await until(settled)
        assert [left.tx_id for left in await system.intents() if left.tx_id == "0-alien"] == ["0-alien"]
        await intents.remove(COORDINATOR, ["0-alien"])


async def test_rule_07_whoever_else_records_intents_sees_to_them_itself(memory: Storage) -> None:
    """The views, and programs that share the tables: what they touch belongs to no actor of a domain."""
    async with System(memory) as system:
        await system.open_shop()
        theirs = Intent(
            tx_id="0-theirs",
            coordinator="views-0",
            coordinator_incarnation="one",
            home="views-0",
            home_incarnation="one",
            partitions=(("views", "order_history", (1,)),),
            participants=(),
            created_at_ms=0,
        )
        intents = IntentLog(system.storage.storage)
        await intents.record([theirs])
        for _ in range(3):
            system.advance(QUICK.transaction_lifetime_ms / 1000 + 1)
            assert await system.runtime.actor(COORDINATOR).sweep() == 0
        assert await intents.of("views-0") == [theirs]
        assert await system.state("0-theirs") is None
        await intents.remove("views-0", ["0-theirs"])


# ---- 8: aborted rows outlive their writer ------------------------------------------------------------------------


async def test_rule_08_a_prepare_that_comes_late_is_undone_though_nobody_reads_and_its_row_waits_for_it(
    storage: Storage,
) -> None:
    async with System(storage) as system:
        await system.open_shop()
        held = system.storage.hold(preparing("payment.wallets", "payment.payments"))
        async with in_background(system.send(order("o1"), "x1")) as sending:
            await held.reached.wait()
            (intent,) = await system.intents()
            zombie = await system.replace("payment-0")  # taken for dead in the middle of its write
            answer = await sending

        assert answer.status == "committed"
        assert answer.tx_id != intent.tx_id
        coordinator = system.runtime.actor(COORDINATOR)

        async def only_this_is_left() -> bool:
            return [left.tx_id for left in await system.intents()] == [intent.tx_id]

        await until(only_this_is_left)
        for _ in range(3):
            system.advance(QUICK.transaction_lifetime_ms / 1000 + 1)
            await coordinator.sweep()
        state = await system.state(intent.tx_id)
        assert state is not None, "the writer lives: its row must stay in its way"
        assert state.state is TransactionState.ABORTED
        assert [left.tx_id for left in await system.intents()] == [intent.tx_id]

        held.let_go()
        await held.applied.wait()
        await coordinator.sweep()
        assert await system.in_doubt() == []
        assert [left.tx_id for left in await system.intents()] == [intent.tx_id]

        await system.runtime.bury(zombie)

        async def the_row_is_gone() -> bool:
            await coordinator.sweep()  # Asks the other participants too, and waits for a later turn if one is slow.
            return await system.state(intent.tx_id) is None

        await until(the_row_is_gone)
        await system.check_at_rest()


async def test_rule_08_sweeps_at_the_same_time_leave_no_row_without_its_intent(memory: Storage) -> None:
    async with System(memory, sweep_interval_s=3600) as system:
        coordinator = system.runtime.actor(COORDINATOR)
        intents = IntentLog(system.storage.storage)
        ours = Intent(
            tx_id="0-ours",
            coordinator=COORDINATOR,
            coordinator_incarnation=coordinator.incarnation,
            home="orders-0",
            home_incarnation="",
            partitions=(),
            participants=(),
            created_at_ms=0,
        )
        await intents.record([ours])
        await coordinator.sweep()  # It is seen for the first time, and marked: its row may still be needed.
        assert await intents.of(COORDINATOR) == [replace(ours, aborted=True)]
        system.advance(QUICK.transaction_lifetime_ms / 1000 + 1)

        held = system.storage.hold(writes_to("coordinator.state"))
        async with in_background(coordinator.sweep()) as first:
            await held.reached.wait()  # It has read the intent, and is about to put ABORTED.
            others = asyncio.ensure_future(_one_after_another(coordinator.sweep, coordinator.sweep))
            await asyncio.wait([others], timeout=0.1)
            held.let_go()
            await first
            await others
        assert await system.intents() == []
        assert await system.state(ours.tx_id) is None


async def _one_after_another(*steps: Callable[[], Awaitable[object]]) -> None:
    for step in steps:
        await step()


# ---- 9: one conditional batch in flight --------------------------------------------------------------------------


async def test_rule_09_one_conditional_batch_is_in_flight_in_each_partition_commits_included(memory: Storage) -> None:
    async with System(memory, serializes_batches=False) as system:
        await system.open_shop(products=8, customers=8)
        system.storage.pause = lambda: asyncio.sleep(0.001)

        answers = await system.send_all(
            (f"x{n}", order(f"o{n}", customer=f"c{n}", lines=(("art", f"p{n}", 1), ("coins", f"p{n}", 1))))
            for n in range(8)
        )

        assert {answer.status for answer in answers} == {"committed"}

        async def at_rest() -> bool:
            return not await system.unrest()

        await until(at_rest)  # by itself: were time to pass, participants would put ABORTED, each by its own gate
        await system.check_at_rest()
        assert max(system.storage.most_in_flight.values()) == 1


async def test_rule_09_a_rejected_batch_of_commits_is_settled_row_by_row(memory: Storage) -> None:
    async with System(memory) as system:
        await system.open_shop()
        both = order("o1", lines=(("art", "p0", 1), ("art", "p1", 1)))

        def commits(call: Any) -> bool:
            return writes_to("inventory.products")(call) and all(m.columns.get("tx_state") == 3 for m in call.mutations)

        held = system.storage.hold(commits)
        answer = await system.send(both, "x1")
        await held.reached.wait()
        assert len(held.mutations) == 2
        await Foreigner(system).change(PRODUCTS, "art", "p0", by=more(1))  # rolls the record forward, and writes it
        held.let_go()
        await held.applied.wait()

        assert answer.status == "committed"

        async def settled() -> bool:
            return await system.in_doubt() == [] and await system.intents() == []

        await until(settled)
        await system.check_at_rest()


# ---- 10: events carry the version of their record ----------------------------------------------------------------


async def test_rule_10_events_carry_the_version_of_the_record_they_speak_of(storage: Storage) -> None:
    async with System(storage) as system:
        await system.open_shop(products=1, customers=1)
        for number in range(3):
            answer = await system.send(order(f"o{number}"), f"x{number}")
            await system.check_at_rest()

            for event in answer.events:
                (row,) = await system.records_about(event.subject)
                assert event.record_version == row["tx_version"], event
            assert await system.send(order(f"o{number}"), f"x{number}") == answer
        versions = {event.subject: event.record_version for event in answer.events}
        assert versions["payment.wallets/c0"] == 4
        assert len({event.id for answer in system.answers.values() for event in answer.events}) == sum(
            len(answer.events) for answer in system.answers.values()
        )


# ---- 11: a key with an undecided command waits -------------------------------------------------------------------


@pytest.mark.parametrize("together", [True, False], ids=["in one batch", "in batches of two workers"])
async def test_rule_11_a_routing_key_with_an_undecided_command_waits(storage: Storage, together: bool) -> None:
    async with System(storage) as system:
        await system.open_shop()
        held = system.storage.hold(writes_to("inventory.products"))
        first = system.raw(restock("art", 1), "x1")
        second = system.raw(WriteOffStock(category="art", product_id="p0", quantity=1001), "x2")
        other = system.raw(restock("coins", 1), "x3")
        batches = [[first, second, other]] if together else [[first], [second, other]]
        async with in_background(
            asyncio.gather(*(system.runtime.ask("inventory-0", "execute", batch) for batch in batches))
        ) as working:
            await held.reached.wait()

            async def other_is_done() -> bool:
                return len(await system.outcome("inventory", "x3")) == 1 and not await system.outcome("inventory", "x2")

            await until(other_is_done)
            assert not working.done()
            held.let_go()
            answers = {answer.id: answer for batch in await working for answer in batch}

        assert {answer.status for answer in answers.values()} == {
            "committed"
        }  # the second needs what the first brought
        await system.check_at_rest()


async def test_rule_11_commands_of_one_key_take_effect_in_the_order_of_the_log(storage: Storage) -> None:
    async with System(storage) as system:
        await system.open_shop()
        raws = [system.raw(TopUpWallet(customer_id="c0", amount=n + 1, currency="GBP"), f"x{n}") for n in range(20)]

        answers = await system.runtime.ask("payment-0", "execute", raws)

        balances = [answer.events[0].record_version for answer in answers]
        assert balances == list(range(2, 22))
        assert [answer.id for answer in answers] == [f"x{n}" for n in range(20)]
        await system.check_at_rest()


# ---- 12: waiting is not stalling ---------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["before it begins", "while it prepares", "while it decides", "while it commits"])
async def test_rule_12_a_command_waits_for_storage_and_is_never_answered_conflict(
    storage: Storage, moment: str
) -> None:
    async with System(storage) as system:
        await system.open_shop()
        tries = system.config.retry.tries

        async def fall() -> None:
            system.storage.down = True

        places = {
            "before it begins": ("orders-0", "execute"),
            "while it prepares": ("payment-0", "prepare"),
            "while it commits": ("payment-0", "commit"),
        }
        if moment == "while it decides":
            held = system.storage.hold(writes_to("coordinator.state"))
            system.storage.fail(Fault.UNAVAILABLE, writes_to("coordinator.state"), times=tries + 2)
        else:
            place = system.intercept(*places[moment], Fate.VISITED, visitor=fall)
        async with in_background(system.send(order("o1"), "x1")) as sending:
            if moment != "while it decides":
                await place.reached.wait()
                refused = len(system.storage.calls)
                await until(lambda: len(system.storage.calls) > refused + 3 * tries)
                if moment == "before it begins":
                    await until(lambda: system.troubles[Trouble.UNAVAILABLE] > tries)
                assert sending.done() == (moment == "while it commits")
                system.storage.down = False
            else:
                await until(lambda: len(system.storage.struck) == tries + 2)
                held.let_go()
            answer = await sending

        assert (answer.status, answer.reason) == ("committed", "")
        assert system.troubles[Trouble.CONFLICT] == 0
        await system.check_at_rest()


async def test_rule_12_many_commands_wait_side_by_side_and_all_commit(memory: Storage) -> None:
    async with System(memory) as system:
        await system.open_shop(customers=8)
        system.storage.down = True
        async with in_background(
            system.send_all((f"x{n}", order(f"o{n}", customer=f"c{n}")) for n in range(8))
        ) as sending:
            await until(lambda: system.troubles[Trouble.UNAVAILABLE] > 8 * system.config.retry.tries)
            system.storage.down = False
            answers = await sending

        assert {answer.status for answer in answers} == {"committed"}
        assert system.troubles[Trouble.CONFLICT] == 0
        await system.check_at_rest()
