"""Order events and order records for the tests of the projection."""

from __future__ import annotations

from typing import Any

from schemas.envelope import RawMessage, build_event_message, data_schema_of
from schemas.message import Event
from schemas.orders import GoodsReturned, OrderPlaced, OrderShipped, OrderStatus, OrderSummary, ReturnSummary
from schemas.outcome import Answer, EmittedEvent


def summary(order_id: str = "order-1", customer_id: str = "customer-1", **changes: Any) -> OrderSummary:
    """An order as its events tell it."""
    values: dict[str, Any] = {
        "order_id": order_id,
        "customer_id": customer_id,
        "status": OrderStatus.PLACED,
        "total": 1250,
        "currency": "GBP",
        "payment_method": "wallet",
        "region": "United Kingdom",
        "line_count": 1,
        "item_count": 5,
        "returned_count": 0,
        "returned_total": 0,
        "tracking_number": "T-1",
        "carrier": "post",
        "estimated_delivery_at_ms": 1_600_000_500_000,
        "created_at_ms": 1_600_000_000_000,
        "updated_at_ms": 1_600_000_000_000,
    }
    return OrderSummary(**(values | changes))


def placed(order_id: str = "order-1", customer_id: str = "customer-1", **changes: Any) -> OrderPlaced:
    return OrderPlaced(order=summary(order_id, customer_id, **changes), lines=())


def shipped(order_id: str = "order-1", customer_id: str = "customer-1") -> OrderShipped:
    return OrderShipped(order=summary(order_id, customer_id, status=OrderStatus.SHIPPED))


def goods_returned() -> GoodsReturned:
    return GoodsReturned(
        returned=ReturnSummary(
            return_id="return-1",
            customer_id="customer-1",
            order_id=None,
            lines=(),
            total=100,
            currency="GBP",
            created_at_ms=1_600_000_000_000,
        )
    )


def message(event: Event, *, offset: int, version: int = 1, partition: int = 0) -> RawMessage:
    """The event as it lies on `orders.events`, about a record of that version."""
    emitted = EmittedEvent(
        id=f"event-{partition}-{offset}",
        type=event.type_name(),
        domain="orders",
        key=event.routing_key,
        body=event.model_dump_json(),
        subject="orders.orders",
        record_version=version,
        data_schema=data_schema_of(type(event)),
    )
    answer = Answer(
        id=f"command-{offset}",
        type="PlaceOrder",
        key=event.routing_key,
        status="committed",
        digest="",
        received_at_ms=1_600_000_000_000,
        committed_at_ms=1_600_000_000_100,
    )
    built = build_event_message(emitted, answer=answer)
    return RawMessage(built.topic, partition, offset, 1_600_000_000_200, built.key, built.headers, built.value)
