"""One command's attempts: conflicts, raising handlers, swallowed trouble, and what an attempt must not leave behind."""

from __future__ import annotations

import asyncio
from typing import Any

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
from weather import PatientEvent, writes_to

from actors.domain import Refused, Transaction
from actors.home import BROKEN_TRIES
from actors.inventory.tables import PRODUCTS
from actors.messages import Trouble
from actors.outcomes import outcome_row, outcomes_of
from actors.payment.tables import WALLETS
from infra.consensus_commit.retry import RetryPolicy
from infra.storage.port import Storage
from schemas.inventory import CheckAvailability, ReserveStock, RestockProduct, StockItem
from schemas.orders import PlaceOrder
from schemas.payment import TopUpWallet

# ---- conflicts ---------------------------------------------------------------------------------------------------


def foreign_sales(system: System, *, times: int) -> Any:
    """Let a foreigner change the wallet of c0 just before each of the next `times` prepares of payment."""
    foreigner = Foreigner(system)

    async def change() -> None:
        await foreigner.change(WALLETS, "c0", by=lambda wallet: wallet.with_(updated_at_ms=wallet.updated_at_ms + 1))

    return system.intercept("payment-0", "prepare", Fate.VISITED, times=times, visitor=change)


async def test_a_command_whose_records_changed_before_it_prepared_is_tried_again(storage: Storage) -> None:
    async with System(storage) as system:
        await system.open_shop()
        foreign_sales(system, times=3)

        answer = await system.send(order("o1"), "x1")

        assert answer.status == "committed"
        assert system.troubles == {Trouble.CONFLICT: 3}
        await system.check_at_rest()


async def test_after_the_last_try_a_conflict_is_the_durable_answer_and_nothing_has_happened(storage: Storage) -> None:
    async with System(storage, retry=RetryPolicy(tries=4, first_ms=1, most_ms=4)) as system:
        await system.open_shop()
        foreign_sales(system, times=100)

        answer = await system.send(order("o1"), "x1")

        assert (answer.status, answer.reason, answer.detail) == ("refused", "conflict", {"tries": 4})
        assert system.troubles == {Trouble.CONFLICT: 4}
        assert await system.dump("orders.orders") == []
        assert await system.send(order("o1"), "x1") == answer
        await system.check_at_rest()


async def test_a_command_that_runs_out_of_tries_while_another_takes_its_id_is_an_id_conflict(storage: Storage) -> None:
    async with System(storage, retry=RetryPolicy(tries=2, first_ms=1, most_ms=4)) as system:
        await system.open_shop()
        foreigner = Foreigner(system)
        other = (await system.send(order("other"), "x0")).model_copy(update={"id": "x1", "digest": "another"})
        await system.check_at_rest()

        async def take_the_id() -> None:
            await foreigner.insert(outcomes_of("orders"), outcome_row(other))

        foreign_sales(system, times=1)
        system.intercept("orders-0", "prepare", Fate.VISITED, nth=2, visitor=take_the_id)
        answer = await system.send(order("o1"), "x1")

        assert (answer.reason, answer.id) == ("id_conflict", "x1")
        assert sorted(str(row["id"]) for row in await system.dump("orders.outcomes")) == ["x0", "x1"]
        await system.check_at_rest()


async def test_the_next_command_of_the_key_is_served_after_one_that_was_refused_for_conflicts(storage: Storage) -> None:
    async with System(storage, retry=RetryPolicy(tries=2, first_ms=1, most_ms=4)) as system:
        await system.open_shop()
        foreign_sales(system, times=2)

        first, second = await system.runtime.ask(
            "orders-0", "execute", [system.raw(order("o1"), "x1"), system.raw(order("o2"), "x2")]
        )

        assert (first.reason, second.status) == ("conflict", "committed")
        await system.check_at_rest()


# ---- handlers that raise -----------------------------------------------------------------------------------------


async def broken(tx: Transaction, command: Any) -> None:
    raise ZeroDivisionError("nobody expected this")


async def test_a_handler_that_raises_ends_as_a_dead_letter_and_the_next_command_is_served(storage: Storage) -> None:
    async with System(storage) as system:
        await system.open_shop()
        scripted("x1", PlaceOrder, broken)

        first, second = await system.runtime.ask(
            "orders-0", "execute", [system.raw(order("o1"), "x1"), system.raw(order("o2"), "x2")]
        )

        assert (first.status, first.reason) == ("dead-lettered", "handler_error")
        assert "ZeroDivisionError" in first.detail["detail"]
        assert system.troubles == {Trouble.BROKEN: BROKEN_TRIES}
        assert second.status == "committed"
        assert await system.send(order("o1"), "x1") == first
        await system.check_at_rest()


async def test_a_called_handler_that_raises_ends_as_a_dead_letter_too_and_leaves_nothing(storage: Storage) -> None:
    async with System(storage) as system:
        await system.open_shop()
        scripted("x1", ReserveStock, broken)

        answer = await system.send(order("o1"), "x1")

        assert (answer.status, answer.reason) == ("dead-lettered", "handler_error")
        assert {row["kind"] for row in await system.dump("payment.payments")} == {"opening"}
        await system.check_at_rest()


async def test_a_handler_that_is_called_cannot_call_on(storage: Storage) -> None:
    async def calls_on(tx: Transaction, command: ReserveStock) -> dict[str, Any]:
        return await tx.call(TopUpWallet(customer_id="c0", amount=1, currency="GBP"))

    async with System(storage) as system:
        await system.open_shop()
        scripted("x1", ReserveStock, calls_on)

        answer = await system.send(order("o1"), "x1")

        assert (answer.status, answer.reason) == ("dead-lettered", "handler_error")
        await system.check_at_rest()


async def test_one_broken_item_of_a_batch_harms_no_other(storage: Storage) -> None:
    async with System(storage) as system:
        await system.open_shop(customers=6)
        scripted("x3", ReserveStock, broken)

        answers = await system.send_all((f"x{n}", order(f"o{n}", customer=f"c{n}")) for n in range(6))

        assert [answer.status for answer in answers].count("committed") == 5
        assert system.troubles[Trouble.BROKEN] == BROKEN_TRIES
        await system.check_at_rest()


async def test_a_refusal_that_a_handler_catches_undoes_that_call_alone(storage: Storage) -> None:
    async def second_best(tx: Transaction, command: PlaceOrder) -> dict[str, Any]:
        too_many = ReserveStock(
            category="art",
            order_id=command.order_id,
            customer_id=command.customer_id,
            items=(StockItem(product_id="p0", quantity=2000),),
        )
        try:
            await tx.call(too_many)
        except Refused as refusal:
            reason = refusal.reason
        await tx.call(too_many.model_copy(update={"items": (StockItem(product_id="p1", quantity=1),)}))
        return {"reason": reason}

    async with System(storage) as system:
        await system.open_shop()
        scripted("x1", PlaceOrder, second_best)

        answer = await system.send(order("o1"), "x1")

        assert (answer.status, answer.result) == ("committed", {"reason": "out_of_stock"})
        await system.check_at_rest()
        stock = {
            row["product_id"]: row["reserved"]
            for row in await system.dump(PRODUCTS.full_name)
            if row["category"] == "art"
        }
        assert stock == {"p0": 0, "p1": 1}


async def test_the_first_answer_and_the_stored_one_are_equal_whatever_a_handler_returns(storage: Storage) -> None:
    async def tuples(tx: Transaction, command: CheckAvailability) -> dict[str, Any]:
        return {"pair": (1, 2), "nested": {"set": [("a", None)]}, "text": "ü\u2028"}

    async with System(storage) as system:
        scripted("x1", CheckAvailability, tuples)
        check = CheckAvailability(category="art", items=(StockItem(product_id="p0", quantity=1),))

        first = await system.send(check, "x1")

        assert first.status == "committed"
        assert await system.send(check, "x1") == first


async def test_a_value_that_storage_will_never_take_is_a_dead_letter_and_not_waited_for(storage: Storage) -> None:
    async def too_much(tx: Transaction, command: RestockProduct) -> None:
        shelf = await tx.get(PRODUCTS, command.category, "p0")
        assert shelf is not None
        await tx.update(PRODUCTS, shelf.with_(quantity=2**70))

    async with System(storage) as system:
        await system.open_shop()
        scripted("x1", RestockProduct, too_much)
        restock = RestockProduct(category="art", items=(StockItem(product_id="p0", quantity=1),))

        answer = await system.send(restock, "x1")

        assert (answer.status, answer.reason) == ("dead-lettered", "handler_error")
        assert Trouble.UNAVAILABLE not in system.troubles
        await system.check_at_rest()


async def test_a_refused_call_to_the_homes_own_actor_takes_back_what_it_wrote_and_no_more(storage: Storage) -> None:
    """The handler writes while the call runs: both work on one transaction's records."""
    called, written = PatientEvent(), PatientEvent()

    async def write_then_refuse(tx: Transaction, command: RestockProduct) -> None:
        shelf = await tx.get(PRODUCTS, command.category, "p1")
        assert shelf is not None
        await tx.update(PRODUCTS, shelf.with_(name="overwritten"))
        called.set()
        for _ in range(20):
            await asyncio.sleep(0)  # time for the handler to write, if it may
        raise Refused("no")

    async def write_beside(tx: Transaction, command: CheckAvailability) -> dict[str, Any]:
        shelf = await tx.get(PRODUCTS, command.category, "p0")
        assert shelf is not None

        async def write() -> None:
            await called.wait()
            await tx.update(PRODUCTS, shelf.with_(name="renamed"))
            written.set()

        writing = asyncio.ensure_future(write())
        try:
            await tx.call(RestockProduct(category="art", items=(StockItem(product_id="p1", quantity=1),)))
        except Refused as refusal:
            await writing
            return {"reason": refusal.reason}
        return {}

    async with System(storage) as system:
        await system.open_shop()
        scripted("x1", CheckAvailability, write_beside)
        scripted("x1", RestockProduct, write_then_refuse)
        check = CheckAvailability(category="art", items=(StockItem(product_id="p0", quantity=1),))

        answer = await system.send(check, "x1")

        assert (answer.status, answer.result) == ("committed", {"reason": "no"})
        await system.check_at_rest()
        names = {
            row["product_id"]: row["name"] for row in await system.dump(PRODUCTS.full_name) if row["category"] == "art"
        }
        assert names == {"p0": "renamed", "p1": "p1"}


# ---- what an attempt must not leave behind -----------------------------------------------------------------------


async def test_a_home_that_died_lets_go_of_other_actors_keys_before_they_are_abandoned(storage: Storage) -> None:
    """The next command for such a key is younger, and would wait."""
    async with System(storage, sweep_interval_s=60) as system:
        await system.open_shop()
        held = system.intercept("inventory-1", "invoke", Fate.HELD)
        async with in_background(system.runtime.ask("orders-0", "execute", [system.raw(order("o1"), "x1")])):
            await held.reached.wait()
            await until(lambda: system.workspaces("payment-0") == 1)
            await system.runtime.kill_and_restart("orders-0")
        system.advance(QUICK.homes_asked_after_s + 1)  # and not `abandoned_after_s`

        top_up = await system.send(TopUpWallet(customer_id="c0", amount=1, currency="GBP"), "x2")

        assert top_up.status == "committed"
        held.let_go()
        await system.check_at_rest()


async def test_what_a_home_left_that_never_came_back_is_dropped_in_the_end(storage: Storage) -> None:
    async with System(storage) as system:
        await system.open_shop()
        held = system.intercept("inventory-1", "invoke", Fate.HELD)
        async with in_background(system.runtime.ask("orders-0", "execute", [system.raw(order("o1"), "x1")])):
            await held.reached.wait()
            await until(lambda: system.workspaces("payment-0") == 1)
            await system.kill("orders-0")
        system.advance(QUICK.abandoned_after_s + 1)
        top_up = await system.send(TopUpWallet(customer_id="c0", amount=1, currency="GBP"), "x2")

        assert top_up.status == "committed"
        await system.restart("orders-0")
        held.let_go()
        await system.check_at_rest()


async def test_a_new_incarnation_of_a_home_frees_its_predecessors_keys_by_its_first_call(storage: Storage) -> None:
    async with System(storage) as system:
        await system.open_shop()
        held = system.intercept("inventory-1", "invoke", Fate.HELD)
        async with in_background(system.runtime.ask("orders-0", "execute", [system.raw(order("o1"), "x1")])):
            await held.reached.wait()
            await until(lambda: system.workspaces("payment-0") == 1)
            await system.runtime.kill_and_restart("orders-0")

        # The clock stands still: nothing is idle, abandoned or expired.
        assert (await system.send(order("o1"), "x1")).status == "committed"
        held.let_go()
        await system.check_at_rest()


async def test_an_attempt_that_is_cancelled_while_its_coordinator_decides_takes_nothing_back(storage: Storage) -> None:
    """Whoever cancels (a worker that leaves, say) must not undo what is being committed."""
    async with System(storage) as system:
        await system.open_shop()
        held = system.intercept("payment-0", "commit", Fate.HELD)
        answered = system.intercept(COORDINATOR, "commit", Fate.ANSWER_HELD)
        home = system.runtime.actor("orders-0")
        working = asyncio.ensure_future(home.execute([system.raw(order("o1"), "x1")]))
        await held.reached.wait()
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        rollbacks = system.runtime.carried[("payment-0", "rollback")]
        held.let_go()
        answered.let_go()
        await system.settle()

        assert rollbacks == 0
        again = await system.send(order("o1"), "x1")
        assert again.status == "committed"
        assert len(again.events) == 5
        await system.check_at_rest()


async def test_an_attempt_that_is_cancelled_in_its_handler_takes_everything_back(storage: Storage) -> None:
    reached, never = PatientEvent(), asyncio.Event()

    async def endless(tx: Transaction, command: PlaceOrder) -> None:
        await tx.call(TopUpWallet(customer_id="c0", amount=1, currency="GBP"))
        reached.set()
        await never.wait()

    async with System(storage) as system:
        await system.open_shop()
        scripted("x1", PlaceOrder, endless)
        working = asyncio.ensure_future(system.runtime.actor("orders-0").execute([system.raw(order("o1"), "x1")]))
        await reached.wait()
        assert system.workspaces("payment-0") == 1
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)

        assert (system.workspaces("orders-0"), system.workspaces("payment-0")) == (0, 0)
        await system.check_at_rest()


async def test_a_participant_that_could_not_be_told_to_let_go_is_told_again(storage: Storage) -> None:
    async with System(storage) as system:
        await system.open_shop()
        scripted("x1", ReserveStock, broken)
        lost = system.intercept("payment-0", "rollback", Fate.LOST, times=3)

        answer = await system.send(order("o1"), "x1")

        # The clock stands still: nobody is idle, and nothing abandoned.
        assert answer.reason == "handler_error"
        await until(lambda: system.workspaces("payment-0") == 0)
        assert lost.reached.is_set()
        await system.check_at_rest()


async def test_a_deferred_reply_that_nobody_collects_is_forgotten_with_its_transaction(storage: Storage) -> None:
    async with System(storage) as system:
        await system.open_shop()
        first = system.storage.hold(writes_to("payment.wallets"))
        async with in_background(system.send(TopUpWallet(customer_id="c0", amount=1, currency="GBP"), "x1")) as working:
            await first.reached.wait()
            lost = system.intercept("payment-0", "collect", Fate.LOST)
            async with in_background(system.send(order("o1"), "x2")) as waiting:
                await lost.reached.wait()
                first.let_go()
                assert (await working).status == "committed"
                assert (await waiting).status == "committed"
        payment = system.runtime.actor("payment-0")._as_participant
        assert all(not workspace.deferred for workspace in payment._workspaces.values())
        await system.check_at_rest()


async def test_calls_whose_predecessors_were_lost_do_not_wait_for_ever(storage: Storage) -> None:
    gift = TopUpWallet(customer_id="c0", amount=1, currency="GBP", top_up_id="first")

    async def three_turns(tx: Transaction, command: PlaceOrder) -> None:
        calls = []
        for number in range(3):
            calls.append(asyncio.ensure_future(tx.call(gift.model_copy(update={"top_up_id": f"gift-{number}"}))))
            for _ in range(5):
                await asyncio.sleep(0)  # each call travels in a message of its own
        await asyncio.gather(*calls)

    async with System(storage) as system:
        await system.open_shop()
        scripted("x1", PlaceOrder, three_turns)
        lost = system.intercept("payment-0", "invoke", Fate.LOST, nth=2)
        rollback = system.intercept("payment-0", "rollback", Fate.HELD)
        payment = system.runtime.actor("payment-0")._as_participant
        async with in_background(system.send(order("o1"), "x1")) as sending:
            await rollback.reached.wait()
            await until(lambda: any(workspace.next_turn for workspace in payment._workspaces.values()))
            rollback.let_go()
            answer = await sending

        assert lost.reached.is_set()
        assert answer.status == "committed"
        assert system.troubles == {Trouble.LOST: 1}
        assert len(await system.dump("payment.payments")) == 2 + 3
        await system.check_at_rest()


async def test_the_turns_of_keys_are_forgotten_when_nobody_waits(storage: Storage) -> None:
    async with System(storage) as system:
        restock = RestockProduct(category="art", items=(StockItem(product_id="p0", quantity=1),))
        await system.send(product("art", "p0", 1), "x0")

        answers = await asyncio.gather(*(system.send(restock, f"x{n}") for n in range(1, 20)))

        assert {answer.status for answer in answers} == {"committed"}
        await system.check_at_rest()  # which looks for turns
