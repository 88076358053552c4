"""Orders: placed, shipped, completed or cancelled as a whole; goods may come back in parts. Routing key: customer."""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

from schemas.common import Address, Amount, Currency, Identifier, Part, Quantity, Several, Text
from schemas.message import Command, Event
from schemas.payment import WALLET


class OrderStatus(StrEnum):
    """`returned` once every one of its goods has come back."""

    PLACED = "placed"
    SHIPPED = "shipped"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    RETURNED = "returned"


class OrderLine(Part):
    """One line of an order or a return. Lines keep their own prices, so one product may have several."""

    category: Identifier
    product_id: Identifier
    name: Text | None = None
    quantity: Quantity
    unit_price: Amount


class OrderSummary(Part):
    """An order as events carry it: all that a list of orders needs."""

    order_id: str
    customer_id: str
    status: OrderStatus
    total: int
    currency: str
    payment_method: str
    region: str
    line_count: int
    item_count: int
    returned_count: int
    returned_total: int
    tracking_number: str
    carrier: str
    estimated_delivery_at_ms: int
    created_at_ms: int
    updated_at_ms: int


class ReturnSummary(Part):
    """Goods that came back."""

    return_id: str
    customer_id: str
    order_id: str | None
    lines: tuple[OrderLine, ...]
    total: int
    currency: str
    created_at_ms: int


class OrdersCommand(Command):
    """A command about one customer's orders."""

    domain: ClassVar[str] = "orders"

    customer_id: Identifier

    @property
    def routing_key(self) -> str:
        return self.customer_id


class PlaceOrder(OrdersCommand):
    """Reserve the goods, pay for them and arrange their shipment: all of it or nothing."""

    order_id: Identifier
    lines: Several[OrderLine]
    currency: Currency
    payment_method: Identifier = WALLET
    shipping_address: Address


class ShipOrder(OrdersCommand):
    """The goods have left the warehouse."""

    order_id: Identifier


class CompleteOrder(OrdersCommand):
    """The goods have arrived."""

    order_id: Identifier


class CancelOrder(OrdersCommand):
    """Take an order back that has not been shipped: goods free, money back."""

    order_id: Identifier
    reason: Text | None = None


class ReturnGoods(OrdersCommand):
    """Goods have come back: restock them and refund their price. Without `order_id` no order has to match."""

    return_id: Identifier
    order_id: Identifier | None = None
    lines: Several[OrderLine]
    currency: Currency


class OrderEvent(Event):
    """What happened to one order, and all that there is to know of it now."""

    domain: ClassVar[str] = "orders"

    order: OrderSummary

    @property
    def routing_key(self) -> str:
        return self.order.customer_id


class OrderPlaced(OrderEvent):
    lines: tuple[OrderLine, ...]


class OrderShipped(OrderEvent):
    pass


class OrderCompleted(OrderEvent):
    pass


class OrderCancelled(OrderEvent):
    reason: str | None


class OrderReturned(OrderEvent):
    """Goods of this order came back; `returned` says which. GoodsReturned tells the same of the return."""

    returned: ReturnSummary


class GoodsReturned(Event):
    """Goods came back, whether of an order or not."""

    domain: ClassVar[str] = "orders"

    returned: ReturnSummary

    @property
    def routing_key(self) -> str:
        return self.returned.customer_id


COMMANDS: tuple[type[Command], ...] = (PlaceOrder, CancelOrder, ReturnGoods, ShipOrder, CompleteOrder)

EVENTS: tuple[type[Event], ...] = (
    OrderPlaced,
    OrderShipped,
    OrderCompleted,
    OrderCancelled,
    OrderReturned,
    GoodsReturned,
)
