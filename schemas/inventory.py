"""Inventory: products with their stock, and reservations. Routing key: the category."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, ClassVar, Self

from pydantic import AfterValidator, Field, model_validator

from schemas.common import (
    Amount,
    Count,
    Currency,
    Identifier,
    Milliseconds,
    Part,
    Quantity,
    Several,
    Text,
    named_once,
)
from schemas.message import Command, Event

EXPIRES_IN_MS_DEFAULT = 15 * 60 * 1000
"""How long a reservation lasts when ReserveStock does not say."""

EXPIRES_IN_MS_MAX = 30 * 24 * 60 * 60 * 1000


class ReservationStatus(StrEnum):
    """`reserved` until one of the others ends it."""

    RESERVED = "reserved"
    CONFIRMED = "confirmed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class StockItem(Part):
    """So many of one product of the command's category."""

    product_id: Identifier
    quantity: Quantity


def _each_product_once(items: tuple[StockItem, ...]) -> tuple[StockItem, ...]:
    if not named_once(item.product_id for item in items):
        raise ValueError("a product is listed twice")
    return items


StockItems = Annotated[Several[StockItem], AfterValidator(_each_product_once)]


class ProductSummary(Part):
    """A product as events and results carry it. available = quantity - reserved."""

    category: str
    product_id: str
    name: str
    quantity: int
    reserved: int
    available: int
    unit_price: int
    currency: str
    low_stock_threshold: int
    updated_at_ms: int


class ReservationSummary(Part):
    """A reservation as events and results carry it. `expires_at_ms` is null while it is held for an order."""

    reservation_id: str
    category: str
    order_id: str
    customer_id: str
    items: tuple[StockItem, ...]
    status: ReservationStatus
    for_order: bool
    expires_at_ms: int | None
    created_at_ms: int
    updated_at_ms: int


class InventoryCommand(Command):
    """A command to one category."""

    domain: ClassVar[str] = "inventory"

    category: Identifier

    @property
    def routing_key(self) -> str:
        return self.category


class RegisterProduct(InventoryCommand):
    """Bring a product into being with `quantity` in stock.

    Version 1 called `unit_price` `price`.
    """

    version: ClassVar[int] = 2

    product_id: Identifier
    name: Text
    quantity: Count
    unit_price: Amount
    currency: Currency
    low_stock_threshold: Count = 0


class RestockProduct(InventoryCommand):
    """Goods have come in, new or returned."""

    items: StockItems


class WriteOffStock(InventoryCommand):
    """Goods are gone without a sale: broken, lost, counted wrong."""

    product_id: Identifier
    quantity: Quantity
    reason: Text | None = None


class ReserveStock(InventoryCommand):
    """Set goods aside for an order: all of `items` or none.

    Alone, the reservation expires after `expires_in_ms`. With `for_order` it belongs to an order, which alone ends
    it, and it never expires.
    """

    order_id: Identifier
    customer_id: Identifier
    items: StockItems
    expires_in_ms: Annotated[int, Field(ge=1, le=EXPIRES_IN_MS_MAX)] | None = None
    for_order: bool = False

    @model_validator(mode="after")
    def _held_or_expiring(self) -> Self:
        if self.for_order and self.expires_in_ms is not None:
            raise ValueError("a reservation for an order does not expire: expires_in_ms must be left out")
        return self


class ConfirmReservation(InventoryCommand):
    """The reserved goods have left. `for_order` must be set to act on a reservation that belongs to an order."""

    order_id: Identifier
    for_order: bool = False


class CancelReservation(InventoryCommand):
    """The reserved goods are free again. `for_order` as in ConfirmReservation."""

    order_id: Identifier
    for_order: bool = False


class ExpireReservation(InventoryCommand):
    """A reservation's time has come. Sent by the inventory's timer; time and status are checked again."""

    order_id: Identifier
    expires_at_ms: Milliseconds


class CheckAvailability(InventoryCommand):
    """Whether `items` could be reserved now. Changes nothing."""

    items: StockItems


class ProductEvent(Event):
    """What happened to one product."""

    domain: ClassVar[str] = "inventory"

    product: ProductSummary

    @property
    def routing_key(self) -> str:
        return self.product.category


class ProductRegistered(ProductEvent):
    pass


class ProductRestocked(ProductEvent):
    quantity: int


class StockWrittenOff(ProductEvent):
    quantity: int
    reason: str | None


class StockLow(ProductEvent):
    """What is available has just fallen to the product's threshold or below it."""


class ReservationEvent(Event):
    """What happened to one reservation."""

    domain: ClassVar[str] = "inventory"

    reservation: ReservationSummary

    @property
    def routing_key(self) -> str:
        return self.reservation.category


class StockReserved(ReservationEvent):
    pass


class ReservationConfirmed(ReservationEvent):
    pass


class ReservationCancelled(ReservationEvent):
    pass


class ReservationExpired(ReservationEvent):
    pass


COMMANDS: tuple[type[Command], ...] = (
    RegisterProduct,
    RestockProduct,
    WriteOffStock,
    ReserveStock,
    ConfirmReservation,
    CancelReservation,
    ExpireReservation,
    CheckAvailability,
)

EVENTS: tuple[type[Event], ...] = (
    ProductRegistered,
    ProductRestocked,
    StockWrittenOff,
    StockLow,
    StockReserved,
    ReservationConfirmed,
    ReservationCancelled,
    ReservationExpired,
)
