"""What shipping does with its commands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from actors.domain import Refused, Transaction
from actors.idempotency import content_digest
from actors.shipping.carriers import DAY_MS, service_for, tracking_number
from actors.shipping.tables import SHIPMENTS, Shipment, StatusChange, shipping
from schemas.shipping import (
    ArrangeShipment,
    ShipmentArranged,
    ShipmentStatus,
    ShipmentStatusChanged,
    ShipmentSummary,
    UpdateShipmentStatus,
)

REASONS: Mapping[str, str] = {
    "duplicate_shipment": "The order has a shipment already, with other content or on its way.",
    "unknown_shipment": "The order has no shipment in this region.",
    "illegal_transition": "The status cannot follow the one there is; `from_status` and `to_status` name them.",
    "belongs_to_order": "The shipment belongs to an order, which alone ships or cancels it.",
}

TRANSITIONS: Mapping[ShipmentStatus, frozenset[ShipmentStatus]] = {
    ShipmentStatus.CREATED: frozenset({ShipmentStatus.SHIPPED, ShipmentStatus.CANCELLED}),
    ShipmentStatus.SHIPPED: frozenset({ShipmentStatus.IN_TRANSIT, ShipmentStatus.DELIVERED, ShipmentStatus.RETURNED}),
    ShipmentStatus.IN_TRANSIT: frozenset({ShipmentStatus.DELIVERED, ShipmentStatus.RETURNED}),
    ShipmentStatus.DELIVERED: frozenset({ShipmentStatus.RETURNED}),
    ShipmentStatus.RETURNED: frozenset(),
    ShipmentStatus.CANCELLED: frozenset(),
}
"""What may follow what. Not every carrier scans on the way, so `shipped` may be followed by `delivered`."""

ORDERS_OWN: frozenset[ShipmentStatus] = frozenset({ShipmentStatus.SHIPPED, ShipmentStatus.CANCELLED})
"""Statuses that an order gives its shipment, together with its goods and its money; the rest is the carrier's."""


@shipping.handles(ArrangeShipment)
async def arrange_shipment(tx: Transaction, command: ArrangeShipment) -> dict[str, Any]:
    digest = content_digest(command)
    existing = await tx.get(SHIPMENTS, command.routing_key, command.order_id)
    if existing is not None:
        if existing.content_digest != digest or existing.status is not ShipmentStatus.CREATED:
            raise Refused("duplicate_shipment", order_id=command.order_id, status=existing.status)
        return ShipmentSummary.of(existing).as_json()

    shipment_id = tx.new_id("shipment", command.order_id)
    service = service_for(command.address.region)
    shipment = Shipment(
        shipping_key=command.routing_key,
        order_id=command.order_id,
        shipment_id=shipment_id,
        customer_id=command.customer_id,
        region=command.address.region,
        address=command.address,
        items=command.items,
        status=ShipmentStatus.CREATED,
        for_order=command.for_order,
        tracking_number=tracking_number(shipment_id),
        carrier=service.carrier,
        estimated_delivery_at_ms=tx.now_ms + service.days * DAY_MS,
        created_at_ms=tx.now_ms,
        shipped_at_ms=None,
        delivered_at_ms=None,
        updated_at_ms=tx.now_ms,
        history=(StatusChange(status=ShipmentStatus.CREATED, at_ms=tx.now_ms),),
        content_digest=digest,
    )
    await tx.insert(SHIPMENTS, shipment)
    summary = ShipmentSummary.of(shipment)
    tx.emit(ShipmentArranged(shipment=summary), about=(SHIPMENTS, shipment.shipping_key, shipment.order_id))
    return summary.as_json()


@shipping.handles(UpdateShipmentStatus)
async def update_shipment_status(tx: Transaction, command: UpdateShipmentStatus) -> dict[str, Any]:
    shipment = await tx.get(SHIPMENTS, command.routing_key, command.order_id)
    if shipment is None:
        raise Refused("unknown_shipment", region=command.region, order_id=command.order_id)
    if shipment.status is command.status:
        return ShipmentSummary.of(shipment).as_json()
    if shipment.for_order and command.status in ORDERS_OWN and not command.for_order:
        raise Refused("belongs_to_order", order_id=command.order_id)
    if command.status not in TRANSITIONS[shipment.status]:
        raise Refused("illegal_transition", from_status=shipment.status, to_status=command.status)

    moved = shipment.moved_to(command.status, at_ms=tx.now_ms, note=command.note)
    await tx.update(SHIPMENTS, moved)
    summary = ShipmentSummary.of(moved)
    tx.emit(
        ShipmentStatusChanged(shipment=summary, previous_status=shipment.status, note=command.note),
        about=(SHIPMENTS, moved.shipping_key, moved.order_id),
    )
    return summary.as_json()
