"""Shipping: one shipment an order. Routing key: the region, spread by order, since one region can hold nearly all."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, ClassVar

from pydantic import AfterValidator

from schemas.common import Address, Identifier, Part, Quantity, Region, Several, Text, named_once
from schemas.message import Command, Event
from schemas.partitioning import slot

SPREAD = 16
"""Into how many routing keys one region's orders are spread."""


def shipping_key(region: str, order_id: str) -> str:
    """The routing key of an order's shipment."""
    return f"{region}/{slot(order_id, SPREAD)}"


class ShipmentStatus(StrEnum):
    CREATED = "created"
    SHIPPED = "shipped"
    IN_TRANSIT = "in_transit"
    DELIVERED = "delivered"
    RETURNED = "returned"
    CANCELLED = "cancelled"


class ShipmentItem(Part):
    """So many of one product."""

    category: Identifier
    product_id: Identifier
    quantity: Quantity


def _each_product_once(items: tuple[ShipmentItem, ...]) -> tuple[ShipmentItem, ...]:
    if not named_once((item.category, item.product_id) for item in items):
        raise ValueError("a product is listed twice")
    return items


class ShipmentSummary(Part):
    """A shipment as events and results carry it: all but the address and the goods."""

    shipment_id: str
    order_id: str
    customer_id: str
    region: str
    status: ShipmentStatus
    for_order: bool
    item_count: int
    tracking_number: str
    carrier: str
    estimated_delivery_at_ms: int
    created_at_ms: int
    shipped_at_ms: int | None
    delivered_at_ms: int | None
    updated_at_ms: int


class ArrangeShipment(Command):
    """Have an order's goods sent to `address`. With `for_order` only the order ships or cancels it."""

    domain: ClassVar[str] = "shipping"

    order_id: Identifier
    customer_id: Identifier
    address: Address
    items: Annotated[Several[ShipmentItem], AfterValidator(_each_product_once)]
    for_order: bool = False

    @property
    def routing_key(self) -> str:
        return shipping_key(self.address.region, self.order_id)


class UpdateShipmentStatus(Command):
    """Where the shipment is now. `for_order` must be set to ship or cancel one that belongs to an order."""

    domain: ClassVar[str] = "shipping"

    region: Region
    order_id: Identifier
    status: ShipmentStatus
    note: Text | None = None
    for_order: bool = False

    @property
    def routing_key(self) -> str:
        return shipping_key(self.region, self.order_id)


class ShipmentEvent(Event):
    """What happened to one shipment."""

    domain: ClassVar[str] = "shipping"

    shipment: ShipmentSummary

    @property
    def routing_key(self) -> str:
        return shipping_key(self.shipment.region, self.shipment.order_id)


class ShipmentArranged(ShipmentEvent):
    pass


class ShipmentStatusChanged(ShipmentEvent):
    previous_status: ShipmentStatus
    note: str | None


COMMANDS: tuple[type[Command], ...] = (ArrangeShipment, UpdateShipmentStatus)

EVENTS: tuple[type[Event], ...] = (ShipmentArranged, ShipmentStatusChanged)
