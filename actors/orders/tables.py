"""What orders keeps: orders with the state of each step, and returns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Annotated, TypeAlias

from pydantic import Field

from actors.domain import Domain, Record, Table
from schemas.common import Address
from schemas.orders import OrderLine, OrderStatus

ProductKey: TypeAlias = tuple[str, str]
"""Category and product id."""

PricedProduct: TypeAlias = tuple[str, str, int]
"""Category, product id and unit price: what a return is held against, since lines keep their own prices."""


def total_of(lines: Iterable[OrderLine]) -> int:
    return sum(line.quantity * line.unit_price for line in lines)


def count_of(lines: Iterable[OrderLine]) -> int:
    return sum(line.quantity for line in lines)


def quantity_by_product(lines: Iterable[OrderLine]) -> dict[ProductKey, int]:
    """Quantities summed by product, in order of category and product."""
    quantities: Counter[ProductKey] = Counter()
    for line in lines:
        quantities[line.category, line.product_id] += line.quantity
    return dict(sorted(quantities.items()))


def quantity_by_price(lines: Iterable[OrderLine]) -> Counter[PricedProduct]:
    """Quantities summed by product and price."""
    quantities: Counter[PricedProduct] = Counter()
    for line in lines:
        quantities[line.category, line.product_id, line.unit_price] += line.quantity
    return quantities


class Order(Record):
    """An order. `steps` says when each step was taken; `returned` are the lines that came back."""

    customer_id: str
    order_id: str
    lines: tuple[OrderLine, ...]
    total: int
    currency: str
    payment_method: str
    shipping_address: Address
    status: Annotated[OrderStatus, Field(strict=False)]
    steps: dict[str, int]
    payment_id: str
    shipment_id: str
    tracking_number: str
    carrier: str
    estimated_delivery_at_ms: int
    returned: tuple[OrderLine, ...]
    created_at_ms: int
    updated_at_ms: int
    content_digest: str

    @property
    def region(self) -> str:
        return self.shipping_address.region

    @property
    def categories(self) -> list[str]:
        return sorted({line.category for line in self.lines})

    @property
    def line_count(self) -> int:
        return len(self.lines)

    @property
    def item_count(self) -> int:
        return count_of(self.lines)

    @property
    def returned_count(self) -> int:
        return count_of(self.returned)

    @property
    def returned_total(self) -> int:
        return total_of(self.returned)

    def moved_to(self, status: OrderStatus, *steps: str, at_ms: int) -> Order:
        """In `status` now, which is a step of its own, after `steps`."""
        taken = dict.fromkeys((*steps, str(status)), at_ms)
        return self.with_(status=status, steps=self.steps | taken, updated_at_ms=at_ms)

    def with_returned(self, lines: tuple[OrderLine, ...], *, at_ms: int) -> Order:
        """With `lines` back; in status `returned` when that is all of it."""
        after = self.with_(returned=(*self.returned, *lines), updated_at_ms=at_ms)
        whole = after.returned_count == after.item_count
        return after.moved_to(OrderStatus.RETURNED, at_ms=at_ms) if whole else after


class Return(Record):
    """Goods that came back, and the refund for them."""

    customer_id: str
    return_id: str
    order_id: str | None
    lines: tuple[OrderLine, ...]
    total: int
    currency: str
    refund_id: str
    created_at_ms: int
    content_digest: str


ORDERS = Table(
    "orders",
    "orders",
    Order,
    key=("customer_id", "order_id"),
    routing="customer_id",
    sliced_by="order_id",
    slices=4,
)

RETURNS = Table(
    "orders",
    "returns",
    Return,
    key=("customer_id", "return_id"),
    routing="customer_id",
    sliced_by="return_id",
    slices=4,
)

orders = Domain("orders", (ORDERS, RETURNS))
