"""What orders does with its commands: each is one transaction over inventory, payment, shipping and orders.

The calls of one command do not depend on each other, so they are made together and travel in one message for each
actor. That a refused call is not the first to be made does not show: nothing of the command remains.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from actors.domain import Refused, Transaction
from actors.idempotency import content_digest, made_before
from actors.orders.tables import (
    ORDERS,
    RETURNS,
    Order,
    ProductKey,
    Return,
    orders,
    quantity_by_price,
    quantity_by_product,
    total_of,
)
from schemas.common import AMOUNT_MAX, QUANTITY_MAX
from schemas.inventory import CancelReservation, ConfirmReservation, ReserveStock, RestockProduct, StockItem
from schemas.message import Command
from schemas.orders import (
    CancelOrder,
    CompleteOrder,
    GoodsReturned,
    OrderCancelled,
    OrderCompleted,
    OrderLine,
    OrderPlaced,
    OrderReturned,
    OrderShipped,
    OrderStatus,
    OrderSummary,
    PlaceOrder,
    ReturnGoods,
    ReturnSummary,
    ShipOrder,
)
from schemas.payment import RefundPayment, TakePayment
from schemas.shipping import ArrangeShipment, ShipmentItem, ShipmentStatus, UpdateShipmentStatus

REASONS: Mapping[str, str] = {
    "duplicate_order": "The customer has an order of this id already, with other content.",
    "unknown_order": "The customer has no order of this id.",
    "illegal_transition": "The status cannot follow the one there is; `from_status` and `to_status` name them.",
    "amount_too_large": "The total passes the largest amount that one payment can have.",
    "quantity_too_large": "The quantities of one product add up to more than one command can speak of.",
    "duplicate_return": "The customer has a return of this id already, with other content.",
    "order_not_shipped": "Goods that have not been shipped cannot come back: cancel the order instead.",
    "over_return": "More comes back than was sold at that price and has not come back yet; `lines` lists it.",
}

TRANSITIONS: Mapping[OrderStatus, frozenset[OrderStatus]] = {
    OrderStatus.PLACED: frozenset({OrderStatus.SHIPPED, OrderStatus.CANCELLED}),
    OrderStatus.SHIPPED: frozenset({OrderStatus.COMPLETED, OrderStatus.RETURNED}),
    OrderStatus.COMPLETED: frozenset({OrderStatus.RETURNED}),
    OrderStatus.CANCELLED: frozenset(),
    OrderStatus.RETURNED: frozenset(),
}
"""What may follow what. `returned` is not asked for: it comes when the last of the goods is back."""


@orders.handles(PlaceOrder)
async def place_order(tx: Transaction, command: PlaceOrder) -> dict[str, Any]:
    refusal = Refused("duplicate_order", customer_id=command.customer_id, order_id=command.order_id)
    existing = await made_before(tx, ORDERS, command.customer_id, command.order_id, by=command, refusal=refusal)
    if existing is not None:
        return _placed(existing)

    total = _bounded_total(command.lines)
    quantities = _bounded_quantities(command.lines)
    payment_id = tx.new_id("payment")
    *_, shipment = await _call_all(
        tx,
        [
            *(
                ReserveStock(
                    category=category,
                    order_id=command.order_id,
                    customer_id=command.customer_id,
                    items=items,
                    for_order=True,
                )
                for category, items in _items_by_category(quantities).items()
            ),
            TakePayment(
                customer_id=command.customer_id,
                payment_id=payment_id,
                order_id=command.order_id,
                amount=total,
                currency=command.currency,
                method=command.payment_method,
                for_order=True,
            ),
            ArrangeShipment(
                order_id=command.order_id,
                customer_id=command.customer_id,
                address=command.shipping_address,
                items=tuple(
                    ShipmentItem(category=category, product_id=product_id, quantity=quantity)
                    for (category, product_id), quantity in quantities.items()
                ),
                for_order=True,
            ),
        ],
    )
    order = Order(
        customer_id=command.customer_id,
        order_id=command.order_id,
        lines=command.lines,
        total=total,
        currency=command.currency,
        payment_method=command.payment_method,
        shipping_address=command.shipping_address,
        status=OrderStatus.PLACED,
        steps=dict.fromkeys(("reserved", "paid", "shipment_arranged", str(OrderStatus.PLACED)), tx.now_ms),
        payment_id=payment_id,
        shipment_id=shipment["shipment_id"],
        tracking_number=shipment["tracking_number"],
        carrier=shipment["carrier"],
        estimated_delivery_at_ms=shipment["estimated_delivery_at_ms"],
        returned=(),
        created_at_ms=tx.now_ms,
        updated_at_ms=tx.now_ms,
        content_digest=content_digest(command),
    )
    await tx.insert(ORDERS, order)
    tx.emit(OrderPlaced(order=OrderSummary.of(order), lines=order.lines), about=_about(order))
    return _placed(order)


@orders.handles(ShipOrder)
async def ship_order(tx: Transaction, command: ShipOrder) -> dict[str, Any]:
    order = await _order(tx, command.customer_id, command.order_id)
    if _may_move(order, OrderStatus.SHIPPED):
        await _call_all(
            tx,
            [
                *(
                    ConfirmReservation(category=category, order_id=order.order_id, for_order=True)
                    for category in order.categories
                ),
                _shipment_to(order, ShipmentStatus.SHIPPED),
            ],
        )
        order = order.moved_to(OrderStatus.SHIPPED, "reservations_confirmed", at_ms=tx.now_ms)
        await tx.update(ORDERS, order)
        tx.emit(OrderShipped(order=OrderSummary.of(order)), about=_about(order))
    return _moved(order, OrderStatus.SHIPPED)


@orders.handles(CompleteOrder)
async def complete_order(tx: Transaction, command: CompleteOrder) -> dict[str, Any]:
    order = await _order(tx, command.customer_id, command.order_id)
    if _may_move(order, OrderStatus.COMPLETED):
        await tx.call(_shipment_to(order, ShipmentStatus.DELIVERED))
        order = order.moved_to(OrderStatus.COMPLETED, "delivered", at_ms=tx.now_ms)
        await tx.update(ORDERS, order)
        tx.emit(OrderCompleted(order=OrderSummary.of(order)), about=_about(order))
    return _moved(order, OrderStatus.COMPLETED)


@orders.handles(CancelOrder)
async def cancel_order(tx: Transaction, command: CancelOrder) -> dict[str, Any]:
    order = await _order(tx, command.customer_id, command.order_id)
    if _may_move(order, OrderStatus.CANCELLED):
        await _call_all(
            tx,
            [
                *(
                    CancelReservation(category=category, order_id=order.order_id, for_order=True)
                    for category in order.categories
                ),
                # Without an amount: all that is left, should some have been refunded as a courtesy before.
                RefundPayment(
                    customer_id=order.customer_id,
                    refund_id=tx.new_id("refund"),
                    payment_id=order.payment_id,
                    reason=command.reason,
                ),
                _shipment_to(order, ShipmentStatus.CANCELLED),
            ],
        )
        order = order.moved_to(
            OrderStatus.CANCELLED, "reservations_cancelled", "refunded", "shipment_cancelled", at_ms=tx.now_ms
        )
        await tx.update(ORDERS, order)
        tx.emit(OrderCancelled(order=OrderSummary.of(order), reason=command.reason), about=_about(order))
    return _moved(order, OrderStatus.CANCELLED)


@orders.handles(ReturnGoods)
async def return_goods(tx: Transaction, command: ReturnGoods) -> dict[str, Any]:
    refusal = Refused("duplicate_return", customer_id=command.customer_id, return_id=command.return_id)
    existing = await made_before(tx, RETURNS, command.customer_id, command.return_id, by=command, refusal=refusal)
    if existing is not None:
        return _returned(existing)

    total = _bounded_total(command.lines)
    quantities = _bounded_quantities(command.lines)
    order = None
    if command.order_id is not None:
        order = await _order(tx, command.customer_id, command.order_id)
        _check_return(order, command)
    refund_id = tx.new_id("refund")
    await _call_all(
        tx,
        [
            *(
                RestockProduct(category=category, items=items)
                for category, items in _items_by_category(quantities).items()
            ),
            RefundPayment(
                customer_id=command.customer_id,
                refund_id=refund_id,
                payment_id=order.payment_id if order else None,
                order_id=command.order_id,
                amount=total,
                currency=command.currency,
            ),
        ],
    )
    returned = Return(
        customer_id=command.customer_id,
        return_id=command.return_id,
        order_id=command.order_id,
        lines=command.lines,
        total=total,
        currency=command.currency,
        refund_id=refund_id,
        created_at_ms=tx.now_ms,
        content_digest=content_digest(command),
    )
    await tx.insert(RETURNS, returned)
    summary = ReturnSummary.of(returned)
    tx.emit(GoodsReturned(returned=summary), about=(RETURNS, returned.customer_id, returned.return_id))
    if order is not None:
        order = order.with_returned(command.lines, at_ms=tx.now_ms)
        await tx.update(ORDERS, order)
        tx.emit(OrderReturned(order=OrderSummary.of(order), returned=summary), about=_about(order))
    return _returned(returned)


async def _call_all(tx: Transaction, commands: Sequence[Command]) -> list[dict[str, Any]]:
    """Call all of `commands` at once and wait for all; their results in order.

    Which call fails first is chance, which failure is reported is not: that of the earliest command, and a refusal
    only when nothing else went wrong, since it may have come from a state that is about to change.
    """
    answers = await asyncio.gather(*(tx.call(command) for command in commands), return_exceptions=True)
    failures = [answer for answer in answers if isinstance(answer, BaseException)]
    for failure in sorted(failures, key=lambda failure: isinstance(failure, Refused)):
        raise failure
    return [answer for answer in answers if not isinstance(answer, BaseException)]


async def _order(tx: Transaction, customer_id: str, order_id: str) -> Order:
    order = await tx.get(ORDERS, customer_id, order_id)
    if order is None:
        raise Refused("unknown_order", customer_id=customer_id, order_id=order_id)
    return order


def _may_move(order: Order, status: OrderStatus) -> bool:
    """Whether the step to `status` is still to be taken; refused where it never can be."""
    if status in order.steps:
        return False
    if status not in TRANSITIONS[order.status]:
        raise Refused("illegal_transition", from_status=order.status, to_status=status)
    return True


def _check_return(order: Order, command: ReturnGoods) -> None:
    """Refuse what `order` did not sell, or what is back already."""
    if "shipped" not in order.steps:
        raise Refused("order_not_shipped", order_id=order.order_id, status=order.status)
    returnable = quantity_by_price(order.lines) - quantity_by_price(order.returned)
    if too_many := [
        {
            "category": product[0],
            "product_id": product[1],
            "unit_price": product[2],
            "quantity": quantity,
            "returnable": returnable[product],
        }
        for product, quantity in sorted(quantity_by_price(command.lines).items())
        if quantity > returnable[product]
    ]:
        raise Refused("over_return", order_id=order.order_id, lines=too_many)


def _bounded_total(lines: Sequence[OrderLine]) -> int:
    total = total_of(lines)
    if total > AMOUNT_MAX:
        raise Refused("amount_too_large", total=total, maximum=AMOUNT_MAX)
    return total


def _bounded_quantities(lines: Sequence[OrderLine]) -> dict[ProductKey, int]:
    quantities = quantity_by_product(lines)
    for (category, product_id), quantity in quantities.items():
        if quantity > QUANTITY_MAX:
            raise Refused(
                "quantity_too_large",
                category=category,
                product_id=product_id,
                quantity=quantity,
                maximum=QUANTITY_MAX,
            )
    return quantities


def _items_by_category(quantities: Mapping[ProductKey, int]) -> dict[str, tuple[StockItem, ...]]:
    items: dict[str, tuple[StockItem, ...]] = {}
    for (category, product_id), quantity in quantities.items():
        items[category] = (*items.get(category, ()), StockItem(product_id=product_id, quantity=quantity))
    return items


def _shipment_to(order: Order, status: ShipmentStatus) -> UpdateShipmentStatus:
    return UpdateShipmentStatus(region=order.region, order_id=order.order_id, status=status, for_order=True)


def _placed(order: Order) -> dict[str, Any]:
    """The answer to PlaceOrder: of what never changes, so that it can be given again."""
    return {
        "order_id": order.order_id,
        "customer_id": order.customer_id,
        "status": OrderStatus.PLACED.value,
        "total": order.total,
        "currency": order.currency,
        "line_count": order.line_count,
        "item_count": order.item_count,
        "payment_id": order.payment_id,
        "shipment_id": order.shipment_id,
        "tracking_number": order.tracking_number,
        "carrier": order.carrier,
        "estimated_delivery_at_ms": order.estimated_delivery_at_ms,
        "created_at_ms": order.created_at_ms,
    }


def _moved(order: Order, status: OrderStatus) -> dict[str, Any]:
    """The answer to a step: what it led to and when it was first taken."""
    return {"order_id": order.order_id, "status": status.value, f"{status}_at_ms": order.steps[status]}


def _returned(returned: Return) -> dict[str, Any]:
    return {
        "return_id": returned.return_id,
        "order_id": returned.order_id,
        "total": returned.total,
        "currency": returned.currency,
        "refund_id": returned.refund_id,
        "created_at_ms": returned.created_at_ms,
    }


def _about(order: Order) -> tuple[Any, ...]:
    return (ORDERS, order.customer_id, order.order_id)
