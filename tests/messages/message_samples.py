"""One good body for each command, and messages made of them. A command without a sample here fails the tests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from schemas.envelope import Header, RawMessage, build_command_message
from schemas.message import Command
from schemas.registry import default_registry

NOW_MS = 1_291_191_960_123

_LINE = {"category": "851", "product_id": "85123A", "name": "WHITE HANGING HEART", "quantity": 6, "unit_price": 255}
_ITEM = {"product_id": "85123A", "quantity": 6}

BODIES: Mapping[str, dict[str, Any]] = {
    "RegisterProduct": {
        "category": "851",
        "product_id": "85123A",
        "name": "WHITE HANGING HEART",
        "quantity": 1_000_000,
        "unit_price": 255,
        "currency": "GBP",
    },
    "RestockProduct": {"category": "851", "items": [_ITEM]},
    "WriteOffStock": {"category": "851", "product_id": "85123A", "quantity": 6, "reason": "broken"},
    "ReserveStock": {"category": "851", "order_id": "536365", "customer_id": "17850", "items": [_ITEM]},
    "ConfirmReservation": {"category": "851", "order_id": "536365"},
    "CancelReservation": {"category": "851", "order_id": "536365"},
    "ExpireReservation": {"category": "851", "order_id": "536365", "expires_at_ms": NOW_MS},
    "CheckAvailability": {"category": "851", "items": [_ITEM]},
    "OpenWallet": {"customer_id": "17850", "currency": "GBP", "initial_balance": 1_000_000_000},
    "TopUpWallet": {"customer_id": "17850", "currency": "GBP", "amount": 500},
    "TakePayment": {"customer_id": "17850", "payment_id": "536365", "currency": "GBP", "amount": 1530},
    "RefundPayment": {"customer_id": "17850", "refund_id": "C536365", "currency": "GBP", "amount": 1530},
    "ArrangeShipment": {
        "order_id": "536365",
        "customer_id": "17850",
        "address": {"region": "United Kingdom"},
        "items": [{"category": "851", **_ITEM}],
    },
    "UpdateShipmentStatus": {"region": "United Kingdom", "order_id": "536365", "status": "shipped"},
    "PlaceOrder": {
        "customer_id": "17850",
        "order_id": "536365",
        "lines": [_LINE],
        "currency": "GBP",
        "shipping_address": {"region": "United Kingdom"},
    },
    "CancelOrder": {"customer_id": "17850", "order_id": "536365"},
    "ReturnGoods": {"customer_id": "17850", "return_id": "C536365", "lines": [_LINE], "currency": "GBP"},
    "ShipOrder": {"customer_id": "17850", "order_id": "536365"},
    "CompleteOrder": {"customer_id": "17850", "order_id": "536365"},
}


def sample(type_name: str) -> Command:
    """The sample command of that name."""
    return default_registry().command(type_name).produce(json.dumps(BODIES[type_name]))


def raw_command(type_name: str = "PlaceOrder", *, command_id: str = "c-1", **changes: Any) -> RawMessage:
    """The sample as it comes from Kafka, with fields of the record replaced by `changes`."""
    message = build_command_message(sample(type_name), command_id=command_id, time_ms=NOW_MS)
    fields: dict[str, Any] = {
        "topic": message.topic,
        "partition": 3,
        "offset": 41,
        "timestamp_ms": NOW_MS + 5,
        "key": message.key,
        "headers": message.headers,
        "value": message.value,
    }
    return RawMessage(**(fields | changes))


def with_header(headers: tuple[Header, ...], name: str, value: bytes | None) -> tuple[Header, ...]:
    """`headers` with this one in place of, or added to, what they have."""
    return (*without_header(headers, name), (name, value))


def without_header(headers: tuple[Header, ...], name: str) -> tuple[Header, ...]:
    return tuple(header for header in headers if header[0] != name)


def body_of(raw: RawMessage) -> dict[str, Any]:
    assert raw.value is not None
    body: dict[str, Any] = json.loads(raw.value)
    return body


def as_value(body: Any) -> bytes:
    return json.dumps(body).encode()
