"""What inventory does with its commands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from actors.domain import Reader, Refused, Transaction, canonical_json
from actors.idempotency import content_digest
from actors.inventory.tables import EXPIRIES, PRODUCTS, RESERVATIONS, Expiry, Product, Reservation, inventory
from schemas.common import STOCK_MAX
from schemas.inventory import (
    EXPIRES_IN_MS_DEFAULT,
    CancelReservation,
    CheckAvailability,
    ConfirmReservation,
    ExpireReservation,
    ProductRegistered,
    ProductRestocked,
    ProductSummary,
    RegisterProduct,
    ReservationCancelled,
    ReservationConfirmed,
    ReservationEvent,
    ReservationExpired,
    ReservationStatus,
    ReservationSummary,
    ReserveStock,
    RestockProduct,
    StockItem,
    StockLow,
    StockReserved,
    StockWrittenOff,
    WriteOffStock,
)
from schemas.message import Command

REASONS: Mapping[str, str] = {
    "duplicate_product": "The product is registered already, with other content.",
    "unknown_product": "The category has no such product.",
    "out_of_stock": "Less is available than was asked for; `missing` lists each product concerned.",
    "insufficient_stock": "Less is available than was to be written off: reserved goods cannot be.",
    "stock_too_large": "The stock would pass the largest that is kept.",
    "duplicate_reservation": "The order has a reservation in this category already, with other content or ended.",
    "unknown_reservation": "The order has no reservation in this category.",
    "reservation_ended": "The reservation is confirmed, cancelled or expired already; `status` says which.",
    "belongs_to_order": "The reservation belongs to an order, which alone confirms or cancels it.",
    "not_due": "The reservation's time has not come.",
}

ENDINGS: Mapping[ReservationStatus, type[ReservationEvent]] = {
    ReservationStatus.CONFIRMED: ReservationConfirmed,
    ReservationStatus.CANCELLED: ReservationCancelled,
    ReservationStatus.EXPIRED: ReservationExpired,
}
"""How a reserved reservation may end, and the event that says so. None of them can be undone."""

DUE_LIMIT = 500
"""How many expiries the timer asks for at once."""

ASK_AGAIN_MS = 10 * 60 * 1000
"""A reservation still there so long after its time is asked to expire under a new command id."""


@inventory.handles(RegisterProduct)
async def register_product(tx: Transaction, command: RegisterProduct) -> dict[str, Any]:
    digest = content_digest(command)
    product = await tx.get(PRODUCTS, command.category, command.product_id)
    if product is None:
        product = Product(
            category=command.category,
            product_id=command.product_id,
            name=command.name,
            quantity=command.quantity,
            reserved=0,
            unit_price=command.unit_price,
            currency=command.currency,
            low_stock_threshold=command.low_stock_threshold,
            initial_quantity=command.quantity,
            restocked=0,
            shipped=0,
            written_off=0,
            created_at_ms=tx.now_ms,
            updated_at_ms=tx.now_ms,
            content_digest=digest,
        )
        await tx.insert(PRODUCTS, product)
        tx.emit(ProductRegistered(product=ProductSummary.of(product)), about=_about(product))
    elif product.content_digest != digest:
        raise Refused("duplicate_product", category=command.category, product_id=command.product_id)
    return ProductSummary.of(product.as_registered()).as_json()


@inventory.handles(RestockProduct)
async def restock_product(tx: Transaction, command: RestockProduct) -> dict[str, Any]:
    restocked = []
    for product, quantity in await _products(tx, command.category, command.items):
        if product.quantity + quantity > STOCK_MAX:
            raise Refused("stock_too_large", product_id=product.product_id, quantity=product.quantity)
        after = product.restock(quantity, at_ms=tx.now_ms)
        await tx.update(PRODUCTS, after)
        summary = ProductSummary.of(after)
        tx.emit(ProductRestocked(product=summary, quantity=quantity), about=_about(after))
        restocked.append(summary.as_json())
    return {"products": restocked}


@inventory.handles(WriteOffStock)
async def write_off_stock(tx: Transaction, command: WriteOffStock) -> dict[str, Any]:
    lost = StockItem(product_id=command.product_id, quantity=command.quantity)
    [(product, quantity)] = await _products(tx, command.category, (lost,))
    if product.available < quantity:
        raise Refused(
            "insufficient_stock", product_id=product.product_id, requested=quantity, available=product.available
        )
    after = product.write_off(quantity, at_ms=tx.now_ms)
    summary = ProductSummary.of(after)
    tx.emit(StockWrittenOff(product=summary, quantity=quantity, reason=command.reason), about=_about(after))
    await _update(tx, product, after)
    return summary.as_json()


@inventory.handles(CheckAvailability)
async def check_availability(tx: Transaction, command: CheckAvailability) -> dict[str, Any]:
    answers = []
    for item in command.items:
        product = await tx.get(PRODUCTS, command.category, item.product_id)
        available = product.available if product else 0
        answers.append(
            {
                "product_id": item.product_id,
                "known": product is not None,
                "requested": item.quantity,
                "available": available,
                "sufficient": available >= item.quantity,
            }
        )
    return {"available": all(answer["sufficient"] for answer in answers), "products": answers}


@inventory.handles(ReserveStock)
async def reserve_stock(tx: Transaction, command: ReserveStock) -> dict[str, Any]:
    items = tuple(sorted(command.items, key=lambda item: item.product_id))
    digest = content_digest(command.model_copy(update={"items": items}))
    existing = await tx.get(RESERVATIONS, command.category, command.order_id)
    if existing is not None:
        return await _reserve_again(tx, existing, command, items, digest)

    products = await _products(tx, command.category, items)
    if missing := [
        {"product_id": product.product_id, "requested": quantity, "available": product.available}
        for product, quantity in products
        if product.available < quantity
    ]:
        raise Refused("out_of_stock", category=command.category, missing=missing)
    for product, quantity in products:
        await _update(tx, product, product.reserve(quantity, at_ms=tx.now_ms))

    reservation = Reservation(
        category=command.category,
        order_id=command.order_id,
        reservation_id=tx.new_id("reservation", command.category, command.order_id),
        customer_id=command.customer_id,
        items=items,
        status=ReservationStatus.RESERVED,
        for_order=command.for_order,
        expires_at_ms=None if command.for_order else tx.now_ms + (command.expires_in_ms or EXPIRES_IN_MS_DEFAULT),
        created_at_ms=tx.now_ms,
        updated_at_ms=tx.now_ms,
        content_digest=digest,
    )
    await tx.insert(RESERVATIONS, reservation)
    if reservation.expires_at_ms is not None:
        await tx.insert(EXPIRIES, _expiry(reservation))
    return _reserved(tx, reservation)


@inventory.handles(ConfirmReservation)
async def confirm_reservation(tx: Transaction, command: ConfirmReservation) -> dict[str, Any]:
    return await _end_on_request(tx, command, ReservationStatus.CONFIRMED)


@inventory.handles(CancelReservation)
async def cancel_reservation(tx: Transaction, command: CancelReservation) -> dict[str, Any]:
    return await _end_on_request(tx, command, ReservationStatus.CANCELLED)


@inventory.handles(ExpireReservation)
async def expire_reservation(tx: Transaction, command: ExpireReservation) -> dict[str, Any]:
    """Between the timer's look and now the reservation may have ended; then there is nothing to do."""
    if tx.now_ms < command.expires_at_ms:
        raise Refused("not_due", expires_at_ms=command.expires_at_ms, now_ms=tx.now_ms)
    reservation = await tx.get(RESERVATIONS, command.category, command.order_id)
    if reservation is None or not reservation.expires or reservation.expires_at_ms != command.expires_at_ms:
        return {"expired": False}
    await _end(tx, reservation, ReservationStatus.EXPIRED)
    return {"expired": True}


@inventory.on_time
async def due_reservations(reader: Reader, now_ms: int) -> list[tuple[str, Command]]:
    """ExpireReservation for every reservation whose time has come, under an id that names reservation and time."""
    return [
        (
            _expire_id(expiry, round=(now_ms - expiry.expires_at_ms) // ASK_AGAIN_MS),
            ExpireReservation(category=expiry.category, order_id=expiry.order_id, expires_at_ms=expiry.expires_at_ms),
        )
        for expiry in await reader.until(EXPIRIES, now_ms, limit=DUE_LIMIT)
    ]


def _expire_id(expiry: Expiry, *, round: int) -> str:
    """The same for as long as the command may well be on its way.

    Only a clock that was set back can make an expiry end as not due; the next round then asks anew.
    """
    named = canonical_json([expiry.category, expiry.order_id, expiry.expires_at_ms, round])
    return str(uuid5(NAMESPACE_URL, f"concord:expire:{named}"))


async def _products(tx: Transaction, category: str, items: tuple[StockItem, ...]) -> list[tuple[Product, int]]:
    """The product and quantity of each item. Refuses unknown products."""
    found = [(await tx.get(PRODUCTS, category, item.product_id), item) for item in items]
    if unknown := [item.product_id for product, item in found if product is None]:
        raise Refused("unknown_product", category=category, product_ids=unknown)
    return [(product, item.quantity) for product, item in found if product is not None]


async def _update(tx: Transaction, before: Product, after: Product) -> None:
    """Write `after`, and say so when it has just become low."""
    await tx.update(PRODUCTS, after)
    if after.is_low and not before.is_low:
        tx.emit(StockLow(product=ProductSummary.of(after)), about=_about(after))


async def _reserve_again(
    tx: Transaction, existing: Reservation, command: ReserveStock, items: tuple[StockItem, ...], digest: str
) -> dict[str, Any]:
    """An order's second ReserveStock: the first answer if it says the same; an order takes over what was reserved
    for it beforehand. Neither when the reservation has ended: nothing is set aside then."""
    if existing.status is ReservationStatus.RESERVED:
        if existing.content_digest == digest:
            return ReservationSummary.of(existing).as_json()
        takes_over = command.for_order and not existing.for_order
        if takes_over and (existing.customer_id, existing.items) == (command.customer_id, items):
            await _forget_expiry(tx, existing)
            held = existing.with_(for_order=True, expires_at_ms=None, updated_at_ms=tx.now_ms, content_digest=digest)
            await tx.update(RESERVATIONS, held)
            return _reserved(tx, held)
    raise Refused(
        "duplicate_reservation", category=existing.category, order_id=existing.order_id, status=existing.status
    )


def _reserved(tx: Transaction, reservation: Reservation) -> dict[str, Any]:
    summary = ReservationSummary.of(reservation)
    tx.emit(StockReserved(reservation=summary), about=(RESERVATIONS, reservation.category, reservation.order_id))
    return summary.as_json()


async def _end_on_request(
    tx: Transaction, command: ConfirmReservation | CancelReservation, status: ReservationStatus
) -> dict[str, Any]:
    reservation = await tx.get(RESERVATIONS, command.category, command.order_id)
    if reservation is None:
        raise Refused("unknown_reservation", category=command.category, order_id=command.order_id)
    if reservation.for_order and not command.for_order:
        raise Refused("belongs_to_order", category=command.category, order_id=command.order_id)
    if reservation.status is status:
        return ReservationSummary.of(reservation).as_json()
    if reservation.status is not ReservationStatus.RESERVED:
        raise Refused("reservation_ended", order_id=command.order_id, status=reservation.status)
    if status is ReservationStatus.CONFIRMED and _is_over(reservation, tx.now_ms):
        # The timer has not come round yet, but the goods are promised to nobody any more.
        raise Refused("reservation_ended", order_id=command.order_id, status=ReservationStatus.EXPIRED)
    return await _end(tx, reservation, status)


def _is_over(reservation: Reservation, now_ms: int) -> bool:
    return reservation.expires_at_ms is not None and reservation.expires_at_ms <= now_ms


async def _end(tx: Transaction, reservation: Reservation, status: ReservationStatus) -> dict[str, Any]:
    """The goods leave the stock (confirmed) or are free again, and the reservation is over."""
    for product, quantity in await _products(tx, reservation.category, reservation.items):
        move = product.ship if status is ReservationStatus.CONFIRMED else product.release
        await tx.update(PRODUCTS, move(quantity, at_ms=tx.now_ms))
    await _forget_expiry(tx, reservation)
    ended = reservation.with_(status=status, updated_at_ms=tx.now_ms)
    await tx.update(RESERVATIONS, ended)
    summary = ReservationSummary.of(ended)
    tx.emit(ENDINGS[status](reservation=summary), about=(RESERVATIONS, ended.category, ended.order_id))
    return summary.as_json()


def _expiry(reservation: Reservation) -> Expiry:
    assert reservation.expires_at_ms is not None
    return Expiry(expires_at_ms=reservation.expires_at_ms, category=reservation.category, order_id=reservation.order_id)


async def _forget_expiry(tx: Transaction, reservation: Reservation) -> None:
    """Delete the timer's row of a reservation that had one."""
    if reservation.expires_at_ms is None:
        return
    key = EXPIRIES.key_of(_expiry(reservation))
    if await tx.get(EXPIRIES, *key) is not None:
        await tx.delete(EXPIRIES, *key)


def _about(product: Product) -> tuple[Any, ...]:
    return (PRODUCTS, product.category, product.product_id)
