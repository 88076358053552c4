"""What inventory keeps: products with their stock, reservations, and when those that expire do."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from actors.domain import Domain, Record, Table
from schemas.inventory import ReservationStatus, StockItem


class Product(Record):
    """One product's stock. quantity = initial_quantity + restocked - shipped - written_off; reserved is part of it."""

    category: str
    product_id: str
    name: str
    quantity: int
    reserved: int
    unit_price: int
    currency: str
    low_stock_threshold: int
    initial_quantity: int
    restocked: int
    shipped: int
    written_off: int
    created_at_ms: int
    updated_at_ms: int
    content_digest: str

    @property
    def available(self) -> int:
        return self.quantity - self.reserved

    @property
    def is_low(self) -> bool:
        return self.available <= self.low_stock_threshold

    def as_registered(self) -> Product:
        """As it was on its first day."""
        return self.with_(quantity=self.initial_quantity, reserved=0, updated_at_ms=self.created_at_ms)

    def reserve(self, quantity: int, *, at_ms: int) -> Product:
        assert quantity <= self.available
        return self.with_(reserved=self.reserved + quantity, updated_at_ms=at_ms)

    def release(self, quantity: int, *, at_ms: int) -> Product:
        assert quantity <= self.reserved
        return self.with_(reserved=self.reserved - quantity, updated_at_ms=at_ms)

    def ship(self, quantity: int, *, at_ms: int) -> Product:
        """What was reserved leaves; what is available stays as it is."""
        released = self.release(quantity, at_ms=at_ms)
        return released.with_(quantity=self.quantity - quantity, shipped=self.shipped + quantity)

    def restock(self, quantity: int, *, at_ms: int) -> Product:
        return self.with_(quantity=self.quantity + quantity, restocked=self.restocked + quantity, updated_at_ms=at_ms)

    def write_off(self, quantity: int, *, at_ms: int) -> Product:
        assert quantity <= self.available
        return self.with_(
            quantity=self.quantity - quantity, written_off=self.written_off + quantity, updated_at_ms=at_ms
        )


class Reservation(Record):
    """Goods of one category set aside for one order. `items` are sorted by product."""

    category: str
    order_id: str
    reservation_id: str
    customer_id: str
    items: tuple[StockItem, ...]
    status: Annotated[ReservationStatus, Field(strict=False)]
    for_order: bool
    expires_at_ms: int | None
    created_at_ms: int
    updated_at_ms: int
    content_digest: str

    @property
    def expires(self) -> bool:
        return self.status is ReservationStatus.RESERVED and self.expires_at_ms is not None


class Expiry(Record):
    """That a reservation expires: here in the order of time, for the timer. Gone once the reservation has ended."""

    expires_at_ms: int
    category: str
    order_id: str


PRODUCTS = Table("inventory", "products", Product, key=("category", "product_id"), routing="category")

RESERVATIONS = Table("inventory", "reservations", Reservation, key=("category", "order_id"), routing="category")

EXPIRIES = Table(
    "inventory",
    "expiries",
    Expiry,
    key=("expires_at_ms", "category", "order_id"),
    routing="category",
    period_ms=60_000,  # 60,000 timers, if a bucket has 1,000 new ones a second.
)

inventory = Domain("inventory", (PRODUCTS, RESERVATIONS, EXPIRIES))
