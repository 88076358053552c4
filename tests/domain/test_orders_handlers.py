"""Orders: one transaction over inventory, payment, shipping and orders, and every way it can be refused."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pydantic import ValidationError
from shop import Shop, arrange, give_back, items, line, place, product, reserve, take, wallet

from actors.domain import Refused
from actors.inventory.tables import EXPIRIES, PRODUCTS, RESERVATIONS
from actors.orders.handlers import TRANSITIONS, _call_all
from actors.orders.tables import ORDERS, RETURNS, Order, quantity_by_product, total_of
from actors.payment.tables import PAYMENTS, WALLETS
from actors.shipping.tables import SHIPMENTS
from schemas.common import AMOUNT_MAX, LINES_MAX, QUANTITY_MAX, Address
from schemas.inventory import CancelReservation, ConfirmReservation, ReservationStatus
from schemas.message import Command
from schemas.orders import CancelOrder, CompleteOrder, OrderPlaced, OrderReturned, OrderStatus, ShipOrder
from schemas.payment import RefundPayment
from schemas.shipping import ShipmentStatus, UpdateShipmentStatus

TOTAL = 2 * 250 + 400 + 900
"""Of `place()`."""

LEGAL = {
    ("placed", "shipped"),
    ("placed", "cancelled"),
    ("shipped", "completed"),
    ("shipped", "returned"),
    ("completed", "returned"),
}


def order(shop: Shop, order_id: str = "o1", customer_id: str = "ada") -> Order:
    row = shop.row(ORDERS, customer_id, order_id)
    assert row is not None
    return row


def balance(shop: Shop) -> int:
    row = shop.row(WALLETS, "ada")
    assert row is not None
    return row.balance


def stock(shop: Shop) -> dict[str, tuple[int, int]]:
    return {row.product_id: (row.quantity, row.reserved) for row in shop.rows(PRODUCTS)}


def ship(order_id: str = "o1") -> ShipOrder:
    return ShipOrder(customer_id="ada", order_id=order_id)


def complete(order_id: str = "o1") -> CompleteOrder:
    return CompleteOrder(customer_id="ada", order_id=order_id)


def cancel(order_id: str = "o1") -> CancelOrder:
    return CancelOrder(customer_id="ada", order_id=order_id, reason="changed my mind")


def everything_back(return_id: str = "r1") -> Command:
    return give_back(return_id, *place().lines, order_id="o1")


async def test_a_placed_order_is_reserved_paid_and_on_its_way_to_the_carrier(shop: Shop) -> None:
    answer = await shop.committed(place())
    assert answer.event_names == ["StockReserved", "StockReserved", "PaymentTaken", "ShipmentArranged", "OrderPlaced"]
    assert stock(shop) == {"mug": (100, 2), "bowl": (100, 1), "rake": (100, 1)}
    assert balance(shop) == 10_000 - TOTAL
    row = order(shop)
    assert (row.status, row.total, row.item_count) == (OrderStatus.PLACED, TOTAL, 4)
    assert row.steps == dict.fromkeys(("reserved", "paid", "shipment_arranged", "placed"), shop.now_ms)
    paid = shop.row(PAYMENTS, "ada", row.payment_id)
    assert paid is not None
    assert (paid.amount, paid.order_id) == (TOTAL, "o1")
    [shipment] = shop.rows(SHIPMENTS)
    assert (shipment.tracking_number, shipment.status) == (row.tracking_number, ShipmentStatus.CREATED)
    assert answer.result == {
        "order_id": "o1",
        "customer_id": "ada",
        "status": "placed",
        "total": TOTAL,
        "currency": "GBP",
        "line_count": 3,
        "item_count": 4,
        "payment_id": row.payment_id,
        "shipment_id": row.shipment_id,
        "tracking_number": row.tracking_number,
        "carrier": "Albion Post",
        "estimated_delivery_at_ms": row.estimated_delivery_at_ms,
        "created_at_ms": shop.now_ms,
    }


async def test_the_order_event_tells_all_that_a_list_of_orders_needs(shop: Shop) -> None:
    *_, emitted = (await shop.committed(place())).events
    assert isinstance(emitted.event, OrderPlaced)
    assert emitted.about == ("orders.orders", "ada", "o1")
    assert emitted.record_version == 1
    assert emitted.event.lines == place().lines
    summary = emitted.event.order
    assert (summary.status, summary.total, summary.line_count, summary.item_count) == ("placed", TOTAL, 3, 4)
    assert summary.region == "United Kingdom"


async def test_lines_of_one_product_are_reserved_together_and_keep_their_prices(shop: Shop) -> None:
    await shop.committed(place("o1", line(quantity=3, unit_price=250), line(quantity=2, unit_price=200)))
    assert stock(shop)["mug"] == (100, 5)
    assert order(shop).total == 3 * 250 + 2 * 200
    assert [item.unit_price for item in order(shop).lines] == [250, 200]
    [reservation] = shop.rows(RESERVATIONS)
    assert reservation.items == items(mug=5)


async def test_the_reservation_of_an_order_stays(shop: Shop) -> None:
    await shop.committed(place())
    assert shop.rows(EXPIRIES) == []
    assert all(row.for_order and row.expires_at_ms is None for row in shop.rows(RESERVATIONS))


async def test_an_order_may_cost_nothing(shop: Shop) -> None:
    await shop.committed(place("o1", line(unit_price=0)))
    assert balance(shop) == 10_000


async def test_an_order_has_up_to_two_thousand_lines(shop: Shop) -> None:
    lines = [line(unit_price=number % 3) for number in range(LINES_MAX)]
    shop.put(PRODUCTS, shop.rows(PRODUCTS)[2].with_(quantity=5_000, initial_quantity=5_000))
    await shop.committed(place("o1", *lines))
    assert order(shop).item_count == LINES_MAX
    with pytest.raises(ValidationError):
        place("o2", *lines, line())


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (place("o1", line(), line("x")), "unknown_product"),
        (place("o1", line(), line("bowl", 101)), "out_of_stock"),
        (place("o1", line(quantity=60), line(quantity=60)), "out_of_stock"),
        (place(customer_id="eve"), "unknown_wallet"),
        (place("o1", line(quantity=41)), "insufficient_funds"),
        (place(currency="USD"), "currency_mismatch"),
        (place(payment_method="card"), "unsupported_payment_method"),
        (place("o1", line(unit_price=AMOUNT_MAX), line(unit_price=1)), "amount_too_large"),
        (place("o1", line(quantity=QUANTITY_MAX, unit_price=0), line()), "quantity_too_large"),
    ],
)
async def test_a_refused_order_leaves_no_trace_in_any_domain(shop: Shop, command: Command, reason: str) -> None:
    await shop.refused(command, reason)
    await shop.committed(place())


async def test_of_several_refusals_the_first_in_order_of_category_is_the_answer(shop: Shop) -> None:
    command = place("o1", line(quantity=200), line("rake", 200, category="garden"), customer_id="eve")
    assert (await shop.refused(command, "out_of_stock"))["category"] == "garden"


async def test_the_same_order_again_gets_the_first_answer_whatever_happened_since(shop: Shop) -> None:
    first = await shop.committed(place())
    shop.advance(5)
    assert await shop.unchanged(place()) == first.result
    await shop.committed(ship())
    assert await shop.unchanged(place()) == first.result


@pytest.mark.parametrize(
    "command",
    [
        place("o1", line()),
        place("o1", *place().lines, shipping_address=Address(region="France")),
        place("o1", *place().lines, currency="USD"),
    ],
)
async def test_an_order_id_has_one_content(shop: Shop, command: Command) -> None:
    await shop.committed(place())
    assert await shop.refused(command, "duplicate_order") == {"customer_id": "ada", "order_id": "o1"}


async def test_a_refused_order_id_may_be_used_again(shop: Shop) -> None:
    await shop.refused(place("o1", line(quantity=101)), "out_of_stock")
    await shop.committed(place("o1", line(quantity=1)))


async def test_two_customers_may_use_one_order_id_for_goods_of_other_categories_and_regions(shop: Shop) -> None:
    await shop.committed(wallet("bob"))
    await shop.committed(place("o1", line()))
    france = Address(region="France")
    rake = line("rake", category="garden")
    await shop.refused(place("o1", line(), customer_id="bob", shipping_address=france), "duplicate_reservation")
    await shop.refused(place("o1", rake, customer_id="bob"), "duplicate_shipment")
    await shop.committed(place("o1", rake, customer_id="bob", shipping_address=france))


async def test_an_order_takes_over_what_was_reserved_for_it(shop: Shop) -> None:
    await shop.committed(reserve("o1", items=items(mug=3)))
    await shop.committed(place("o1", line(quantity=3)))
    assert stock(shop)["mug"] == (100, 3)
    shop.advance(10**9)
    assert await shop.run_due() == []


async def test_an_order_does_not_take_over_a_shipment_made_alone(shop: Shop) -> None:
    await shop.committed(arrange("o1", address=Address(region="United Kingdom")))
    await shop.refused(place("o1"), "duplicate_shipment")


async def test_shipping_lets_the_goods_leave(shop: Shop) -> None:
    await shop.committed(place())
    shop.advance(7)
    answer = await shop.committed(ship())
    assert answer.event_names == [
        "ReservationConfirmed",
        "ReservationConfirmed",
        "ShipmentStatusChanged",
        "OrderShipped",
    ]
    assert answer.result == {"order_id": "o1", "status": "shipped", "shipped_at_ms": shop.now_ms}
    assert stock(shop) == {"mug": (98, 0), "bowl": (99, 0), "rake": (99, 0)}
    assert order(shop).steps["shipped"] == shop.now_ms
    [shipment] = shop.rows(SHIPMENTS)
    assert (shipment.status, shipment.shipped_at_ms) == (ShipmentStatus.SHIPPED, shop.now_ms)


@pytest.mark.parametrize("scanned", [(), (ShipmentStatus.IN_TRANSIT,), (ShipmentStatus.DELIVERED,)])
async def test_completing_an_order_means_its_goods_have_arrived(
    shop: Shop, scanned: tuple[ShipmentStatus, ...]
) -> None:
    await shop.committed(place())
    await shop.committed(ship())
    for status in scanned:
        await shop.committed(UpdateShipmentStatus(region="United Kingdom", order_id="o1", status=status))
    await shop.committed(complete())
    assert order(shop).status is OrderStatus.COMPLETED
    assert shop.rows(SHIPMENTS)[0].status is ShipmentStatus.DELIVERED


async def test_what_went_back_to_the_sender_has_not_arrived(shop: Shop) -> None:
    await shop.committed(place())
    await shop.committed(ship())
    back = UpdateShipmentStatus(region="United Kingdom", order_id="o1", status=ShipmentStatus.RETURNED)
    await shop.committed(back)
    details = await shop.refused(complete(), "illegal_transition")
    assert details == {"from_status": "returned", "to_status": "delivered"}


async def test_cancelling_frees_the_goods_and_gives_the_money_back(shop: Shop) -> None:
    await shop.committed(place())
    answer = await shop.committed(cancel())
    assert answer.event_names == [
        "ReservationCancelled",
        "ReservationCancelled",
        "PaymentRefunded",
        "ShipmentStatusChanged",
        "OrderCancelled",
    ]
    assert stock(shop) == {"mug": (100, 0), "bowl": (100, 0), "rake": (100, 0)}
    assert balance(shop) == 10_000
    assert order(shop).status is OrderStatus.CANCELLED
    assert {row.status for row in shop.rows(RESERVATIONS)} == {ReservationStatus.CANCELLED}


async def test_cancelling_refunds_what_a_courtesy_has_left(shop: Shop) -> None:
    await shop.committed(place())
    courtesy = RefundPayment(customer_id="ada", refund_id="sorry", payment_id=order(shop).payment_id, amount=100)
    await shop.committed(courtesy)
    await shop.committed(cancel())
    assert balance(shop) == 10_000


@pytest.mark.parametrize(
    ("steps", "command"),
    [((), ship()), ((), cancel()), ((ship(),), complete()), ((ship(), complete()), ship())],
)
async def test_a_step_taken_twice_gets_the_first_answer(
    shop: Shop, steps: tuple[Command, ...], command: Command
) -> None:
    await shop.committed(place())
    answers: list[dict[str, Any]] = []
    for step in (*steps, command):
        answer = await shop.committed(step)
        if step == command:
            answers.append(answer.result)
        shop.advance(1)
    answers.append(await shop.unchanged(command))
    assert all(answer == answers[0] for answer in answers)


WAY_TO: dict[OrderStatus, tuple[Command, ...]] = {
    OrderStatus.PLACED: (),
    OrderStatus.SHIPPED: (ship(),),
    OrderStatus.COMPLETED: (ship(), complete()),
    OrderStatus.CANCELLED: (cancel(),),
    OrderStatus.RETURNED: (ship(), everything_back("r0")),
}

STEP_TO: dict[OrderStatus, Command] = {
    OrderStatus.SHIPPED: ship(),
    OrderStatus.COMPLETED: complete(),
    OrderStatus.CANCELLED: cancel(),
}


@pytest.mark.parametrize("before", OrderStatus)
@pytest.mark.parametrize("after", STEP_TO)
async def test_every_step_is_legal_refused_or_taken_already(
    shop: Shop, before: OrderStatus, after: OrderStatus
) -> None:
    await shop.committed(place())
    for command in WAY_TO[before]:
        await shop.committed(command)
    assert order(shop).status is before
    if after in order(shop).steps:
        assert (await shop.unchanged(STEP_TO[after]))["status"] == after
    elif (before, after) in LEGAL:
        await shop.committed(STEP_TO[after])
        assert order(shop).status is after
    else:
        details = await shop.refused(STEP_TO[after], "illegal_transition")
        assert details == {"from_status": before, "to_status": after}


def test_the_table_of_transitions_has_a_line_for_each_status() -> None:
    assert {(before.value, after.value) for before, line in TRANSITIONS.items() for after in line} == LEGAL
    assert set(TRANSITIONS) == set(OrderStatus) == set(WAY_TO)


@pytest.mark.parametrize("command", [ship("o9"), complete("o9"), cancel("o9"), give_back(order_id="o9")])
async def test_an_order_nobody_placed_is_unknown(shop: Shop, command: Command) -> None:
    assert await shop.refused(command, "unknown_order") == {"customer_id": "ada", "order_id": "o9"}


@pytest.mark.parametrize(
    "command",
    [
        ConfirmReservation(category="kitchen", order_id="o1"),
        CancelReservation(category="kitchen", order_id="o1"),
        UpdateShipmentStatus(region="United Kingdom", order_id="o1", status=ShipmentStatus.SHIPPED),
        UpdateShipmentStatus(region="United Kingdom", order_id="o1", status=ShipmentStatus.CANCELLED),
    ],
)
async def test_what_belongs_to_an_order_is_not_moved_behind_its_back(shop: Shop, command: Command) -> None:
    await shop.committed(place())
    await shop.refused(command, "belongs_to_order")


async def test_a_return_without_an_order_restocks_and_refunds(shop: Shop) -> None:
    lines = (line(quantity=3), line("bowl", 1, 40), line(quantity=1, unit_price=10), line("rake", 2, 5, "garden"))
    answer = await shop.committed(give_back("r1", *lines))
    assert answer.event_names == [
        "ProductRestocked",
        "ProductRestocked",
        "ProductRestocked",
        "PaymentRefunded",
        "GoodsReturned",
    ]
    assert stock(shop) == {"mug": (104, 0), "bowl": (101, 0), "rake": (102, 0)}
    assert balance(shop) == 10_000 + 750 + 40 + 10 + 10
    [returned] = shop.rows(RETURNS)
    assert (returned.total, returned.order_id, returned.lines) == (810, None, lines)
    assert answer.result["total"] == 810


async def test_a_return_of_an_order_counts_against_what_was_sold(shop: Shop) -> None:
    await shop.committed(place("o1", line(quantity=3), line(quantity=2, unit_price=200)))
    await shop.committed(ship())
    answer = await shop.committed(give_back("r1", line(quantity=2), order_id="o1"))
    *_, emitted = answer.events
    assert isinstance(emitted.event, OrderReturned)
    assert (emitted.event.order.returned_count, emitted.event.order.returned_total) == (2, 500)
    assert (order(shop).status, order(shop).returned_count) == (OrderStatus.SHIPPED, 2)
    assert stock(shop)["mug"] == (97, 0)
    details = await shop.refused(
        give_back("r2", line(quantity=2), line(quantity=3, unit_price=200), order_id="o1"), "over_return"
    )
    assert [(entry["unit_price"], entry["quantity"], entry["returnable"]) for entry in details["lines"]] == [
        (200, 3, 2),
        (250, 2, 1),
    ]
    await shop.committed(give_back("r2", line(quantity=1), line(quantity=2, unit_price=200), order_id="o1"))
    assert order(shop).status is OrderStatus.RETURNED
    assert balance(shop) == 10_000
    await shop.refused(give_back("r3", line(), order_id="o1"), "over_return")


async def test_goods_that_were_not_sold_or_at_another_price_do_not_come_back(shop: Shop) -> None:
    await shop.committed(place())
    await shop.committed(ship())
    await shop.refused(give_back("r1", line("plate"), order_id="o1"), "over_return")
    await shop.refused(give_back("r1", line(unit_price=251), order_id="o1"), "over_return")


async def test_what_has_not_been_shipped_does_not_come_back(shop: Shop) -> None:
    await shop.committed(place())
    await shop.refused(give_back(order_id="o1"), "order_not_shipped")
    await shop.committed(cancel())
    assert (await shop.refused(give_back(order_id="o1"), "order_not_shipped"))["status"] == "cancelled"


async def test_a_return_of_an_order_is_refunded_from_its_payment(shop: Shop) -> None:
    await shop.committed(place())
    await shop.committed(ship())
    payment_id = order(shop).payment_id
    await shop.committed(RefundPayment(customer_id="ada", refund_id="sorry", payment_id=payment_id, amount=TOTAL - 100))
    await shop.refused(give_back(order_id="o1"), "over_refund")


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (give_back("r1", line("x")), "unknown_product"),
        (give_back(customer_id="eve"), "unknown_wallet"),
        (give_back(currency="USD"), "currency_mismatch"),
        (give_back(currency="USD", order_id="o1"), "currency_mismatch"),
        (give_back("r1", line(unit_price=AMOUNT_MAX), line()), "amount_too_large"),
        (give_back("r1", line(quantity=QUANTITY_MAX, unit_price=0), line()), "quantity_too_large"),
    ],
)
async def test_a_refused_return_leaves_no_trace_in_any_domain(shop: Shop, command: Command, reason: str) -> None:
    await shop.committed(place())
    await shop.committed(ship())
    await shop.refused(command, reason)


async def test_the_same_return_again_gets_the_first_answer(shop: Shop) -> None:
    first = await shop.committed(give_back())
    shop.advance(1)
    assert await shop.unchanged(give_back()) == first.result
    await shop.refused(give_back("r1", line(quantity=2)), "duplicate_return")


async def test_ids_of_orders_returns_and_payments_do_not_get_in_each_others_way(shop: Shop) -> None:
    await shop.committed(take("o1"))
    await shop.committed(place("o1"))
    await shop.committed(give_back("o1"))


async def test_reservations_and_payments_made_alone_leave_orders_as_they_are(shop: Shop) -> None:
    await shop.committed(place())
    await shop.committed(reserve("elsewhere"))
    await shop.committed(take("elsewhere", order_id="o1"))
    await shop.committed(ship())


async def test_products_of_one_id_in_two_categories_are_two_products(shop: Shop) -> None:
    await shop.committed(product("mug", category="garden"))
    await shop.committed(place("o1", line(), line(category="garden")))
    assert {(row.category, row.reserved) for row in shop.rows(PRODUCTS) if row.product_id == "mug"} == {
        ("garden", 1),
        ("kitchen", 1),
    }


class Callee:
    """Answers each call after as many turns of the loop as its script says, with a result or an error."""

    def __init__(self, *script: tuple[int, Exception | None]) -> None:
        self.script = list(script)
        self.answered = 0

    async def call(self, command: Command) -> dict[str, Any]:
        turns, error = self.script.pop(0)
        for _ in range(turns):
            await asyncio.sleep(0)
        self.answered += 1
        if error is not None:
            raise error
        return {"answered": self.answered}


async def test_results_of_calls_come_in_the_order_of_the_calls() -> None:
    assert await _call_all(Callee((2, None), (1, None)), [ship(), cancel()]) == [{"answered": 2}, {"answered": 1}]


async def test_a_failed_call_does_not_leave_the_others_behind() -> None:
    callee = Callee((0, Refused("first")), (9, None))
    with pytest.raises(Refused, match="first"):
        await _call_all(callee, [ship(), cancel()])
    assert callee.answered == 2


async def test_the_earliest_call_that_was_refused_is_reported_however_late_it_was() -> None:
    with pytest.raises(Refused, match="first"):
        await _call_all(Callee((9, Refused("first")), (0, Refused("second"))), [ship(), cancel()])


async def test_trouble_is_reported_before_a_refusal() -> None:
    with pytest.raises(RuntimeError, match="trouble"):
        await _call_all(Callee((0, Refused("first")), (0, RuntimeError("trouble"))), [ship(), cancel()])


def test_lines_add_up() -> None:
    lines = [line(quantity=2, unit_price=3), line("a", 1, 5), line(quantity=4, unit_price=1)]
    assert total_of(lines) == 15
    assert list(quantity_by_product(lines).items()) == [(("kitchen", "a"), 1), (("kitchen", "mug"), 6)]
