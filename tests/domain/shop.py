"""A rehearsal of the four order domains, and commands with sensible content to begin with."""

from __future__ import annotations

from typing import Any

from actors.audit import check_books
from actors.order_domains import ORDER_DOMAINS
from actors.rehearsal import COMMITTED, REFUSED, Answer, Rehearsal
from schemas.common import Address
from schemas.inventory import RegisterProduct, ReserveStock, StockItem
from schemas.message import Command
from schemas.orders import OrderLine, PlaceOrder, ReturnGoods
from schemas.payment import OpenWallet, TakePayment
from schemas.shipping import ArrangeShipment, ShipmentItem


class Shop(Rehearsal):
    """After every command the books are checked; after a refusal, that no row has changed either."""

    def __init__(self) -> None:
        super().__init__(ORDER_DOMAINS)

    async def committed(self, command: Command) -> Answer:
        answer = await self.run(command)
        assert (answer.status, answer.reason) == (COMMITTED, ""), answer
        assert check_books(self.tables()) == []
        return answer

    async def refused(self, command: Command, reason: str) -> dict[str, Any]:
        """The details of the refusal."""
        before = self.tables()
        answer = await self.run(command)
        assert (answer.status, answer.reason) == (REFUSED, reason), answer
        assert answer.events == ()
        assert self.tables() == before
        return answer.details

    async def unchanged(self, command: Command) -> dict[str, Any]:
        """The result of a command that is answered and has no effect."""
        before = self.tables()
        answer = await self.committed(command)
        assert answer.events == ()
        assert self.tables() == before
        return answer.result


def product(product_id: str = "mug", **changes: Any) -> RegisterProduct:
    content: dict[str, Any] = {
        "category": "kitchen",
        "product_id": product_id,
        "name": f"A {product_id}",
        "quantity": 100,
        "unit_price": 250,
        "currency": "GBP",
        "low_stock_threshold": 10,
    }
    return RegisterProduct(**(content | changes))


def wallet(customer_id: str = "ada", **changes: Any) -> OpenWallet:
    content: dict[str, Any] = {"customer_id": customer_id, "currency": "GBP", "initial_balance": 10_000}
    return OpenWallet(**(content | changes))


def items(**quantities: int) -> tuple[StockItem, ...]:
    return tuple(StockItem(product_id=name, quantity=quantity) for name, quantity in quantities.items())


def reserve(order_id: str = "o1", **changes: Any) -> ReserveStock:
    content: dict[str, Any] = {
        "category": "kitchen",
        "order_id": order_id,
        "customer_id": "ada",
        "items": items(mug=5),
    }
    return ReserveStock(**(content | changes))


def take(payment_id: str = "p1", **changes: Any) -> TakePayment:
    content: dict[str, Any] = {"customer_id": "ada", "payment_id": payment_id, "amount": 1_000, "currency": "GBP"}
    return TakePayment(**(content | changes))


def arrange(order_id: str = "o1", **changes: Any) -> ArrangeShipment:
    content: dict[str, Any] = {
        "order_id": order_id,
        "customer_id": "ada",
        "address": Address(region="東京都", city="千代田区"),
        "items": (ShipmentItem(category="kitchen", product_id="mug", quantity=2),),
    }
    return ArrangeShipment(**(content | changes))


def line(product_id: str = "mug", quantity: int = 1, unit_price: int = 250, category: str = "kitchen") -> OrderLine:
    return OrderLine(category=category, product_id=product_id, quantity=quantity, unit_price=unit_price)


def place(order_id: str = "o1", *lines: OrderLine, **changes: Any) -> PlaceOrder:
    content: dict[str, Any] = {
        "customer_id": "ada",
        "order_id": order_id,
        "lines": lines or (line(quantity=2), line("bowl", 1, 400), line("rake", 1, 900, "garden")),
        "currency": "GBP",
        "shipping_address": Address(region="United Kingdom", street="1 High Street"),
    }
    return PlaceOrder(**(content | changes))


def give_back(return_id: str = "r1", *lines: OrderLine, **changes: Any) -> ReturnGoods:
    content: dict[str, Any] = {
        "customer_id": "ada",
        "return_id": return_id,
        "lines": lines or (line(),),
        "currency": "GBP",
    }
    return ReturnGoods(**(content | changes))
