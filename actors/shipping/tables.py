"""What shipping keeps: one shipment an order, with every status it has had."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from actors.domain import Domain, Record, Table
from schemas.common import Address, Part, Text
from schemas.shipping import ShipmentItem, ShipmentStatus


class StatusChange(Part):
    """One entry of a shipment's history."""

    status: ShipmentStatus
    at_ms: int
    note: Text | None = None


class Shipment(Record):
    """Goods on their way to an address. `shipped_at_ms` and `delivered_at_ms` are null until it is."""

    shipping_key: str
    order_id: str
    shipment_id: str
    customer_id: str
    region: str
    address: Address
    items: tuple[ShipmentItem, ...]
    status: Annotated[ShipmentStatus, Field(strict=False)]
    for_order: bool
    tracking_number: str
    carrier: str
    estimated_delivery_at_ms: int
    created_at_ms: int
    shipped_at_ms: int | None
    delivered_at_ms: int | None
    updated_at_ms: int
    history: tuple[StatusChange, ...]
    content_digest: str

    @property
    def item_count(self) -> int:
        return sum(item.quantity for item in self.items)

    def moved_to(self, status: ShipmentStatus, *, at_ms: int, note: str | None) -> Shipment:
        return self.with_(
            status=status,
            shipped_at_ms=at_ms if status is ShipmentStatus.SHIPPED else self.shipped_at_ms,
            delivered_at_ms=at_ms if status is ShipmentStatus.DELIVERED else self.delivered_at_ms,
            updated_at_ms=at_ms,
            history=(*self.history, StatusChange(status=status, at_ms=at_ms, note=note)),
        )


SHIPMENTS = Table(
    "shipping",
    "shipments",
    Shipment,
    key=("shipping_key", "order_id"),
    routing="shipping_key",
    sliced_by="order_id",
    slices=4,
)

shipping = Domain("shipping", (SHIPMENTS,))
