"""The audit finds each kind of disagreement, and raises no alarm about what is in order."""

from __future__ import annotations

from typing import Any

import pytest
from shop import Shop, arrange, give_back, items, line, place, reserve, take

from actors.audit import AGREEMENTS, check_books
from actors.domain import Record, Table
from actors.inventory.tables import EXPIRIES, PRODUCTS, RESERVATIONS, Expiry
from actors.orders.tables import ORDERS, RETURNS
from actors.payment.tables import PAYMENTS, WALLETS
from actors.shipping.tables import SHIPMENTS
from schemas.inventory import CancelReservation, ReservationStatus, WriteOffStock
from schemas.orders import CancelOrder, OrderStatus, ShipOrder
from schemas.payment import PaymentKind, PaymentStatus, RefundPayment, TopUpWallet
from schemas.shipping import ShipmentStatus, UpdateShipmentStatus


@pytest.fixture
async def busy(shop: Shop) -> Shop:
    """Orders at every status, and what customers did on their own."""
    for command in (
        place("placed", line(quantity=3), line("rake", 1, 10, "garden")),
        place("shipped", line(quantity=2)),
        ShipOrder(customer_id="ada", order_id="shipped"),
        give_back("back", line(quantity=1), order_id="shipped"),
        place("gone", line("bowl")),
        CancelOrder(customer_id="ada", order_id="gone"),
        give_back("free", line("bowl", 4, 5)),
        reserve("alone", items=items(bowl=9)),
        reserve("dropped", items=items(bowl=1)),
        CancelReservation(category="kitchen", order_id="dropped"),
        take("alone", order_id="alone"),
        RefundPayment(customer_id="ada", refund_id="part", payment_id="alone", amount=10),
        TopUpWallet(customer_id="ada", amount=5, currency="GBP"),
        arrange("alone"),
        UpdateShipmentStatus(region="東京都", order_id="alone", status=ShipmentStatus.SHIPPED),
        WriteOffStock(category="kitchen", product_id="mug", quantity=1),
    ):
        await shop.committed(command)
    return shop


def only(shop: Shop, table: Table[Any], **values: Any) -> Any:
    [row] = [row for row in shop.rows(table) if all(getattr(row, name) == value for name, value in values.items())]
    return row


def damaged(shop: Shop, table: Table[Any], changes: dict[str, Any], **where: Any) -> list[str]:
    """What the audit says after one row was changed."""
    row: Record = only(shop, table, **where)
    shop.put(table, row.with_(**changes))
    return check_books(shop.tables())


def lost(shop: Shop, table: Table[Any], **where: Any) -> list[str]:
    """What the audit says after one row went missing."""
    columns = shop.tables()
    key = table.key_of(only(shop, table, **where))
    rows = columns[table.full_name]
    columns[table.full_name] = [row for row in rows if tuple(row[name] for name in table.key) != key]
    assert len(columns[table.full_name]) == len(rows) - 1
    return check_books(columns)


def test_nothing_adds_up_to_nothing() -> None:
    assert check_books({}) == []


def test_the_books_of_a_busy_shop_add_up(busy: Shop) -> None:
    assert check_books(busy.tables()) == []


@pytest.mark.parametrize(
    ("table", "where", "changes", "finding"),
    [
        (PRODUCTS, {"product_id": "mug"}, {"quantity": 1_000}, "its movements add up to"),
        (PRODUCTS, {"product_id": "mug"}, {"reserved": 2}, "its reservations hold 3"),
        (PRODUCTS, {"product_id": "mug"}, {"shipped": 1}, "its confirmed reservations had 2"),
        (PRODUCTS, {"product_id": "mug"}, {"reserved": -1}, "are reserved"),
        (PRODUCTS, {"product_id": "mug"}, {"restocked": 0}, "1 came back that were not restocked"),
        (RESERVATIONS, {"order_id": "alone"}, {"items": items(bowl=8)}, "its reservations hold 8"),
        (RESERVATIONS, {"order_id": "alone"}, {"items": items(x=9)}, "which is not a product"),
        (RESERVATIONS, {"order_id": "alone"}, {"for_order": True}, "belongs to an order that does not have it"),
        (RESERVATIONS, {"order_id": "shipped"}, {"status": ReservationStatus.CANCELLED}, "is shipped, its reservation"),
        (RESERVATIONS, {"order_id": "shipped"}, {"items": items(mug=1)}, "is of other goods"),
        (RESERVATIONS, {"order_id": "shipped"}, {"customer_id": "eve"}, "has no reservation in kitchen"),
        (WALLETS, {}, {"balance": 1}, "its payments add up to"),
        (WALLETS, {}, {"balance": -1}, "balance is -1"),
        (WALLETS, {}, {"currency": "USD"}, "the wallet in USD"),
        (PAYMENTS, {"payment_id": "alone"}, {"amount": 1}, "its payments add up to"),
        (PAYMENTS, {"payment_id": "alone"}, {"refunded": 11}, "its refunds add up to 10"),
        (PAYMENTS, {"payment_id": "alone"}, {"status": PaymentStatus.COMPLETED}, "status is completed"),
        (PAYMENTS, {"payment_id": "alone"}, {"for_order": True}, "belongs to an order that does not have it"),
        (PAYMENTS, {"payment_id": "alone"}, {"amount": 9}, "10 of 9 were refunded"),
        (PAYMENTS, {"payment_id": "part"}, {"refund_of": "x"}, "which is no payment"),
        (PAYMENTS, {"order_id": "placed"}, {"amount": 1}, "its payment over 1 GBP"),
        (PAYMENTS, {"order_id": "placed"}, {"kind": PaymentKind.TOP_UP}, "has no payment"),
        (PAYMENTS, {"order_id": "gone", "refund_of": None}, {"status": PaymentStatus.COMPLETED}, "is cancelled"),
        (PAYMENTS, {"order_id": "shipped", "refund_of": None}, {"refunded": 0}, "goods for 250 came back"),
        (SHIPMENTS, {"order_id": "placed"}, {"status": ShipmentStatus.SHIPPED}, "is placed, its shipment is shipped"),
        (SHIPMENTS, {"order_id": "placed"}, {"tracking_number": "CC0"}, "another tracking number"),
        (SHIPMENTS, {"order_id": "placed"}, {"items": ()}, "its shipment is of other goods"),
        (SHIPMENTS, {"order_id": "placed"}, {"for_order": False}, "has no shipment"),
        (SHIPMENTS, {"order_id": "alone"}, {"for_order": True}, "belongs to an order that does not have it"),
        (ORDERS, {"order_id": "placed"}, {"total": 1}, "its lines add up to 760"),
        (ORDERS, {"order_id": "placed"}, {"status": OrderStatus.SHIPPED}, "is shipped, its reservation"),
        (ORDERS, {"order_id": "shipped"}, {"status": OrderStatus.RETURNED}, "1 of 2 came back"),
        (ORDERS, {"order_id": "shipped"}, {"returned": ()}, "its returns say that other goods came back"),
        (ORDERS, {"order_id": "shipped"}, {"returned": (line(quantity=3),)}, "more came back than was sold"),
        (RETURNS, {"return_id": "free"}, {"total": 1}, "1 were not refunded"),
        (RETURNS, {"return_id": "free"}, {"total": 1}, "its lines add up to 20"),
        (RETURNS, {"return_id": "free"}, {"order_id": "x"}, "came back, which is no order"),
    ],
)
def test_a_damaged_row_is_found(
    busy: Shop, table: Table[Any], where: dict[str, Any], changes: dict[str, Any], finding: str
) -> None:
    assert any(finding in offender for offender in damaged(busy, table, changes, **where))


@pytest.mark.parametrize(
    ("table", "where", "finding"),
    [
        (PRODUCTS, {"product_id": "bowl"}, "which is not a product"),
        (RESERVATIONS, {"order_id": "placed", "category": "garden"}, "has no reservation in garden"),
        (EXPIRIES, {"order_id": "alone"}, "the timer does not know"),
        (WALLETS, {}, "the customer has no wallet"),
        (PAYMENTS, {"order_id": "placed"}, "has no payment"),
        (PAYMENTS, {"refund_of": "alone"}, "its refunds add up to 0"),
        (SHIPMENTS, {"order_id": "placed"}, "has no shipment"),
        (ORDERS, {"order_id": "placed"}, "belongs to an order that does not have it"),
        (RETURNS, {"return_id": "back"}, "its returns say that other goods came back"),
    ],
)
def test_a_lost_row_is_found(busy: Shop, table: Table[Any], where: dict[str, Any], finding: str) -> None:
    assert any(finding in offender for offender in lost(busy, table, **where))


def test_an_expiry_of_nothing_is_found(busy: Shop) -> None:
    busy.put(EXPIRIES, Expiry(expires_at_ms=1, category="kitchen", order_id="alone"))
    assert check_books(busy.tables()) == ["inventory.expiries kitchen/alone: there is nothing to expire then"]


@pytest.mark.parametrize("part", [RESERVATIONS, PAYMENTS, SHIPMENTS, ORDERS], ids=lambda table: table.full_name)
async def test_an_order_that_took_effect_in_three_domains_of_four_is_found(shop: Shop, part: Table[Any]) -> None:
    await shop.committed(place("o1", line()))
    assert lost(shop, part, order_id="o1") != []


def test_every_status_of_an_order_has_its_agreement() -> None:
    assert set(AGREEMENTS) == set(OrderStatus)


def test_offenders_are_named_as_people_look_for_them(shop: Shop) -> None:
    offenders = damaged(shop, WALLETS, {"balance": 9_999})
    assert offenders == ["payment.wallets ada: balance is 9999, its payments add up to 10000"]
