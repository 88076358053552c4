"""Do the books of the order domains add up? Pure functions over the rows of a resting system.

What finds an offender has found a transaction that took effect in part, twice, or not in all of its domains. What a
client did on its own (a reservation without an order, a courtesy refund, a shipment of its own) is in order; only a
client that sets `for_order` by itself, which is for the orders domain to set, is reported: something is then held for
an order that does not exist.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from actors.domain import Record, Table
from actors.inventory.tables import EXPIRIES, PRODUCTS, RESERVATIONS, Expiry, Product, Reservation
from actors.orders.tables import (
    ORDERS,
    RETURNS,
    Order,
    Return,
    quantity_by_price,
    quantity_by_product,
    total_of,
)
from actors.payment.tables import PAYMENTS, WALLETS, Payment, Wallet, status_of
from actors.shipping.tables import SHIPMENTS, Shipment
from infra.storage.operations import Row
from schemas.inventory import ReservationStatus
from schemas.orders import OrderStatus
from schemas.payment import PaymentKind, PaymentStatus
from schemas.shipping import ShipmentStatus, shipping_key

R = TypeVar("R", bound=Record)

AUDITED: tuple[Table[Any], ...] = (PRODUCTS, RESERVATIONS, EXPIRIES, WALLETS, PAYMENTS, SHIPMENTS, ORDERS, RETURNS)
"""The tables whose rows `check_books` needs, all of them."""


@dataclass(frozen=True)
class Agreement:
    """What an order's reservations and shipment may be at while the order is at one status."""

    reservations: ReservationStatus
    shipment: frozenset[ShipmentStatus]


ON_ITS_WAY = frozenset(
    {ShipmentStatus.SHIPPED, ShipmentStatus.IN_TRANSIT, ShipmentStatus.DELIVERED, ShipmentStatus.RETURNED}
)

AGREEMENTS: Mapping[OrderStatus, Agreement] = {
    OrderStatus.PLACED: Agreement(ReservationStatus.RESERVED, frozenset({ShipmentStatus.CREATED})),
    OrderStatus.SHIPPED: Agreement(ReservationStatus.CONFIRMED, ON_ITS_WAY),
    OrderStatus.COMPLETED: Agreement(
        ReservationStatus.CONFIRMED, frozenset({ShipmentStatus.DELIVERED, ShipmentStatus.RETURNED})
    ),
    OrderStatus.RETURNED: Agreement(ReservationStatus.CONFIRMED, ON_ITS_WAY),
    OrderStatus.CANCELLED: Agreement(ReservationStatus.CANCELLED, frozenset({ShipmentStatus.CANCELLED})),
}


@dataclass(frozen=True)
class Books:
    """Every row of the audited tables, by key."""

    products: Mapping[tuple[str, str], Product]
    reservations: Mapping[tuple[str, str], Reservation]
    expiries: Sequence[Expiry]
    wallets: Mapping[str, Wallet]
    payments: Mapping[tuple[str, str], Payment]
    shipments: Mapping[tuple[str, str], Shipment]
    orders: Mapping[tuple[str, str], Order]
    returns: Mapping[tuple[str, str], Return]

    @classmethod
    def of(cls, rows: Mapping[str, Iterable[Row]]) -> Books:
        """From rows as storage has them (key columns included, transaction columns ignored), by full table name."""
        return cls(
            products={(row.category, row.product_id): row for row in _records(PRODUCTS, rows)},
            reservations={(row.category, row.order_id): row for row in _records(RESERVATIONS, rows)},
            expiries=_records(EXPIRIES, rows),
            wallets={row.customer_id: row for row in _records(WALLETS, rows)},
            payments={(row.customer_id, row.payment_id): row for row in _records(PAYMENTS, rows)},
            shipments={(row.shipping_key, row.order_id): row for row in _records(SHIPMENTS, rows)},
            orders={(row.customer_id, row.order_id): row for row in _records(ORDERS, rows)},
            returns={(row.customer_id, row.return_id): row for row in _records(RETURNS, rows)},
        )


def check_books(rows: Mapping[str, Iterable[Row]]) -> list[str]:
    """One sentence for each thing that does not add up; none when all does.

    `rows` are the committed rows of every table in `AUDITED` by full table name, as storage has them. A missing table
    counts as empty. Raises pydantic.ValidationError for a row that its table could not have written.
    """
    books = Books.of(rows)
    return [
        *_check_products(books),
        *_check_expiries(books),
        *_check_wallets(books),
        *_check_payments(books),
        *_check_orders(books),
        *_check_returns(books),
        *_check_owners(books),
    ]


def _check_products(books: Books) -> Iterator[str]:
    """Stock adds up by its own counters, and those by the reservations."""
    items: dict[ReservationStatus, Counter[tuple[str, str]]] = defaultdict(Counter)
    for reservation in books.reservations.values():
        for item in reservation.items:
            product_key = (reservation.category, item.product_id)
            items[reservation.status][product_key] += item.quantity
            if product_key not in books.products:
                yield f"{_name(RESERVATIONS, reservation)} has {item.product_id}, which is not a product"
    for key, product in books.products.items():
        name = _name(PRODUCTS, product)
        moved = product.initial_quantity + product.restocked - product.shipped - product.written_off
        reserved, shipped = (items[status][key] for status in (ReservationStatus.RESERVED, ReservationStatus.CONFIRMED))
        if product.quantity != moved:
            yield f"{name}: quantity is {product.quantity}, its movements add up to {moved}"
        if product.reserved != reserved:
            yield f"{name}: reserved is {product.reserved}, its reservations hold {reserved}"
        if product.shipped != shipped:
            yield f"{name}: shipped is {product.shipped}, its confirmed reservations had {shipped}"
        if not 0 <= product.reserved <= product.quantity:
            yield f"{name}: {product.reserved} of {product.quantity} are reserved"


def _check_expiries(books: Books) -> Iterator[str]:
    """The timer's rows and the reservations that expire are the same."""
    expected = {
        (reservation.expires_at_ms, *key) for key, reservation in books.reservations.items() if reservation.expires
    }
    actual = {(expiry.expires_at_ms, expiry.category, expiry.order_id) for expiry in books.expiries}
    for _, category, order_id in sorted(expected - actual):
        yield f"{RESERVATIONS.full_name} {category}/{order_id} expires, but the timer does not know"
    for _, category, order_id in sorted(actual - expected):
        yield f"{EXPIRIES.full_name} {category}/{order_id}: there is nothing to expire then"


def _check_wallets(books: Books) -> Iterator[str]:
    """A balance is the sum of its payments."""
    sums: Counter[str] = Counter()
    for payment in books.payments.values():
        sums[payment.customer_id] += payment.signed_amount
        wallet = books.wallets.get(payment.customer_id)
        if wallet is None:
            yield f"{_name(PAYMENTS, payment)}: the customer has no wallet"
        elif wallet.currency != payment.currency:
            yield f"{_name(PAYMENTS, payment)} is in {payment.currency}, the wallet in {wallet.currency}"
    for wallet in books.wallets.values():
        if wallet.balance != sums[wallet.customer_id]:
            yield (
                f"{_name(WALLETS, wallet)}: balance is {wallet.balance}, "
                f"its payments add up to {sums[wallet.customer_id]}"
            )
        if wallet.balance < 0:
            yield f"{_name(WALLETS, wallet)}: balance is {wallet.balance}"


def _check_payments(books: Books) -> Iterator[str]:
    """What was refunded of a payment is what its refunds add up to, and no more than was paid."""
    refunded: Counter[tuple[str, str]] = Counter()
    has_refund: set[tuple[str, str]] = set()
    for refund in books.payments.values():
        if refund.refund_of is None:
            continue
        key = (refund.customer_id, refund.refund_of)
        refunded[key] += refund.amount
        has_refund.add(key)
        paid = books.payments.get(key)
        if refund.kind is not PaymentKind.REFUND or paid is None or paid.kind is not PaymentKind.PAYMENT:
            yield f"{_name(PAYMENTS, refund)} is against {refund.refund_of}, which is no payment"
    for key, payment in books.payments.items():
        name = _name(PAYMENTS, payment)
        if payment.refunded != refunded[key]:
            yield f"{name}: refunded is {payment.refunded}, its refunds add up to {refunded[key]}"
        if payment.refunded > payment.amount:
            yield f"{name}: {payment.refunded} of {payment.amount} were refunded"
        expected = (
            status_of(amount=payment.amount, refunded=payment.refunded)
            if key in has_refund
            else PaymentStatus.COMPLETED
        )
        if payment.status is not expected:
            yield f"{name}: status is {payment.status}, {payment.refunded} of {payment.amount} were refunded"


def _check_orders(books: Books) -> Iterator[str]:
    """Every order has its reservations, its payment and its shipment, and they say the same as it does."""
    for order in books.orders.values():
        name = _name(ORDERS, order)
        agreement = AGREEMENTS[order.status]
        if order.total != total_of(order.lines):
            yield f"{name}: total is {order.total}, its lines add up to {total_of(order.lines)}"
        if quantity_by_price(order.returned) - quantity_by_price(order.lines):
            yield f"{name}: more came back than was sold"
        if (order.status is OrderStatus.RETURNED) != (order.returned_count == order.item_count):
            yield f"{name}: status is {order.status}, {order.returned_count} of {order.item_count} came back"
        yield from _check_order_reservations(books, order, agreement)
        yield from _check_order_payment(books, order)
        yield from _check_order_shipment(books, order, agreement)


def _check_order_reservations(books: Books, order: Order, agreement: Agreement) -> Iterator[str]:
    name = _name(ORDERS, order)
    ordered: dict[str, dict[str, int]] = defaultdict(dict)
    for (category, product_id), quantity in quantity_by_product(order.lines).items():
        ordered[category][product_id] = quantity
    for category, quantities in ordered.items():
        reservation = books.reservations.get((category, order.order_id))
        if reservation is None or not reservation.for_order or reservation.customer_id != order.customer_id:
            yield f"{name} has no reservation in {category}"
            continue
        if reservation.status is not agreement.reservations:
            yield f"{name} is {order.status}, its reservation in {category} is {reservation.status}"
        if quantities != {item.product_id: item.quantity for item in reservation.items}:
            yield f"{name}: its reservation in {category} is of other goods"


def _check_order_payment(books: Books, order: Order) -> Iterator[str]:
    name = _name(ORDERS, order)
    paid = books.payments.get((order.customer_id, order.payment_id))
    if paid is None or paid.kind is not PaymentKind.PAYMENT or paid.order_id != order.order_id:
        yield f"{name} has no payment"
        return
    if (paid.amount, paid.currency) != (order.total, order.currency):
        yield f"{name} is over {order.total} {order.currency}, its payment over {paid.amount} {paid.currency}"
    if order.status is OrderStatus.CANCELLED and paid.status is not PaymentStatus.REFUNDED:
        yield f"{name} is cancelled, its payment is {paid.status}"
    if paid.refunded < order.returned_total:
        yield f"{name}: goods for {order.returned_total} came back, {paid.refunded} were refunded"


def _check_order_shipment(books: Books, order: Order, agreement: Agreement) -> Iterator[str]:
    name = _name(ORDERS, order)
    shipment = books.shipments.get((shipping_key(order.region, order.order_id), order.order_id))
    if shipment is None or not shipment.for_order or shipment.customer_id != order.customer_id:
        yield f"{name} has no shipment"
        return
    if shipment.status not in agreement.shipment:
        yield f"{name} is {order.status}, its shipment is {shipment.status}"
    if shipment.tracking_number != order.tracking_number:
        yield f"{name}: its shipment has another tracking number"
    shipped = {(item.category, item.product_id): item.quantity for item in shipment.items}
    if shipped != quantity_by_product(order.lines):
        yield f"{name}: its shipment is of other goods"


def _check_returns(books: Books) -> Iterator[str]:
    """Every return was refunded, counted by its order, and its goods are back in the stock."""
    back: Counter[tuple[str, str]] = Counter()
    of_order: dict[tuple[str, str], Counter[tuple[str, str, int]]] = defaultdict(Counter)
    for returned in books.returns.values():
        name = _name(RETURNS, returned)
        back.update(quantity_by_product(returned.lines))
        refund = books.payments.get((returned.customer_id, returned.refund_id))
        if refund is None or refund.kind is not PaymentKind.REFUND or refund.amount != returned.total:
            yield f"{name}: {returned.total} were not refunded"
        if returned.total != total_of(returned.lines):
            yield f"{name}: total is {returned.total}, its lines add up to {total_of(returned.lines)}"
        if returned.order_id is not None:
            of_order[returned.customer_id, returned.order_id].update(quantity_by_price(returned.lines))
    for key in of_order.keys() | books.orders.keys():
        order = books.orders.get(key)
        if order is None:
            yield f"{RETURNS.full_name}: goods of {'/'.join(key)} came back, which is no order"
        elif quantity_by_price(order.returned) != of_order[key]:
            yield f"{_name(ORDERS, order)}: its returns say that other goods came back"
    for product_key, quantity in back.items():
        product = books.products.get(product_key)
        if product is None or product.restocked < quantity:
            yield f"{PRODUCTS.full_name} {'/'.join(product_key)}: {quantity} came back that were not restocked"


def _check_owners(books: Books) -> Iterator[str]:
    """What belongs to an order has one."""
    for reservation in books.reservations.values():
        order = books.orders.get((reservation.customer_id, reservation.order_id))
        if reservation.for_order and (order is None or reservation.category not in order.categories):
            yield f"{_name(RESERVATIONS, reservation)} belongs to an order that does not have it"
    for payment in books.payments.values():
        order = books.orders.get((payment.customer_id, payment.order_id or ""))
        if payment.for_order and (order is None or order.payment_id != payment.payment_id):
            yield f"{_name(PAYMENTS, payment)} belongs to an order that does not have it"
    for shipment in books.shipments.values():
        order = books.orders.get((shipment.customer_id, shipment.order_id))
        if shipment.for_order and (order is None or order.shipment_id != shipment.shipment_id):
            yield f"{_name(SHIPMENTS, shipment)} belongs to an order that does not have it"


def _records(table: Table[R], rows: Mapping[str, Iterable[Row]]) -> list[R]:
    return [table.from_row(row) for row in rows.get(table.full_name, ())]


def _name(table: Table[R], record: R) -> str:
    return f"{table.full_name} {'/'.join(map(str, table.key_of(record)))}"
