"""What the system is asked to do: commands to all four domains, some of them about a few keys that everybody wants.

Drawn from a seed, and so chosen that in peace every one of them commits: stock and money never run out, and what is
shipped, completed or cancelled was placed before by the same customer, whose commands keep their order. So a command
that does not commit was refused because of a fault, and whatever is repeated has the id of one that came before.

Messages are made by hand, as a client in any language would make them.
"""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from schemas.shipping import shipping_key

CURRENCY = "GBP"
CUSTOMERS = 40
CATEGORIES = 6
PRODUCTS = 4
REGIONS = ("United Kingdom", "Japan", "France")
PRICE = 250
MUCH = 10**9

REPEATED = 0.08
"""Part of all messages that repeat one before, and part that has its id and other content."""
CHANGED = 0.02

HOT = 0.15
"""Part of the commands that are about the first customer or the first category, whom everybody wants."""

MIX: Mapping[str, int] = {
    "PlaceOrder": 34,
    "ShipOrder": 6,
    "CompleteOrder": 4,
    "CancelOrder": 6,
    "ReturnGoods": 3,
    "TopUpWallet": 16,
    "TakePayment": 5,
    "RefundPayment": 4,
    "RestockProduct": 7,
    "WriteOffStock": 6,
    "CheckAvailability": 4,
    "ReserveStock": 2,
    "ArrangeShipment": 3,
}
"""How often each command is asked for, in proportion."""

DOMAIN_OF: Mapping[str, str] = {
    **dict.fromkeys(("PlaceOrder", "ShipOrder", "CompleteOrder", "CancelOrder", "ReturnGoods"), "orders"),
    **dict.fromkeys(("OpenWallet", "TopUpWallet", "TakePayment", "RefundPayment"), "payment"),
    **dict.fromkeys(
        ("RegisterProduct", "RestockProduct", "WriteOffStock", "CheckAvailability", "ReserveStock"), "inventory"
    ),
    "ArrangeShipment": "shipping",
}
VERSION: Mapping[str, int] = {"RegisterProduct": 2}

Body = Mapping[str, Any]


@dataclass(frozen=True)
class Message:
    """A message for a command topic, readable or not. `id` is what its answer is found by; "" if only its place is."""

    type: str
    domain: str
    id: str
    key: bytes
    value: bytes
    headers: tuple[tuple[str, bytes], ...]

    @property
    def topic(self) -> str:
        return f"{self.domain}.commands"


def message(type: str, key: str, body: Body, id: str) -> Message:
    """A command as a client publishes it."""
    domain = DOMAIN_OF[type]
    headers = {
        "ce_specversion": "1.0",
        "ce_id": id,
        "ce_type": type,
        "ce_source": "proof",
        "ce_dataschema": f"concord:/schemas/{domain}/{type}/{VERSION.get(type, 1)}",
        "content-type": "application/json",
    }
    encoded = tuple((name, value.encode()) for name, value in headers.items())
    return Message(type, domain, id, key.encode(), json.dumps(body).encode(), encoded)


def changed(original: Message) -> Message:
    """The same id with other content."""
    body = json.loads(original.value)
    if "lines" in body:
        body["lines"][0]["quantity"] += 1
    else:
        body["amount"] += 1
    return replace(original, value=json.dumps(body).encode())


def may_change(original: Message) -> bool:
    return original.type in ("PlaceOrder", "TopUpWallet", "TakePayment")


class Load:
    """Commands without end for `next`, after those of `opening` have committed. Names begin with `name`."""

    def __init__(
        self, seed: int, name: str = "chaos", *, customers: int = CUSTOMERS, categories: int = CATEGORIES
    ) -> None:
        self._rng = random.Random(f"load {seed}")
        self._name = name
        self._customers = customers
        self._categories = categories
        self._count = 0
        self._placed: list[tuple[str, str]] = []
        self._shipped: list[tuple[str, str]] = []

    # --- what is there at first -----------------------------------------------------------------------------------

    def opening(self) -> list[Message]:
        """Products and wallets."""
        return [
            *(self._product(category, number) for category in range(self._categories) for number in range(PRODUCTS)),
            *(self._wallet(self._customer(number)) for number in range(self._customers)),
        ]

    def _product(self, category: int, number: int) -> Message:
        body = {
            "category": self._category(category),
            "product_id": f"p{number}",
            "name": f"product {number}",
            "quantity": MUCH,
            "unit_price": PRICE,
            "currency": CURRENCY,
            "low_stock_threshold": 0,
        }
        return self._message("RegisterProduct", self._category(category), body)

    def _wallet(self, customer: str) -> Message:
        body = {"customer_id": customer, "currency": CURRENCY, "initial_balance": MUCH}
        return self._message("OpenWallet", customer, body)

    # --- what is asked for ----------------------------------------------------------------------------------------

    def next(self) -> Message:
        """A command that commits in peace."""
        (type,) = self._rng.choices(list(MIX), list(MIX.values()))
        return self.of_type(type)

    def of_type(self, type: str) -> Message:
        """A command of this type, or PlaceOrder where there is no order for it."""
        domain = DOMAIN_OF[type]
        if domain == "orders":
            return self._about_orders(type)
        if domain == "payment":
            return self._about_money(type)
        if domain == "inventory":
            return self._about_stock(type)
        return self._shipment()

    def _about_orders(self, type: str) -> Message:
        if type == "ReturnGoods":
            who = self._someone()
            body = {"customer_id": who, "return_id": self._new("r"), "lines": self._lines(), "currency": CURRENCY}
            return self._message(type, who, body)
        source = self._shipped if type == "CompleteOrder" else self._placed
        if type == "PlaceOrder" or not source:
            return self._order()
        who, order_id = source.pop(self._rng.randrange(len(source)))
        if type == "ShipOrder":
            self._shipped.append((who, order_id))
        return self._message(type, who, {"customer_id": who, "order_id": order_id})

    def _order(self) -> Message:
        who, order_id = self._someone(), self._new("o")
        self._placed.append((who, order_id))
        body = {
            "customer_id": who,
            "order_id": order_id,
            "lines": self._lines(),
            "currency": CURRENCY,
            "shipping_address": {"region": self._rng.choice(REGIONS)},
        }
        return self._message("PlaceOrder", who, body)

    def _about_money(self, type: str) -> Message:
        who = self._someone()
        body: dict[str, Any] = {"customer_id": who, "amount": self._rng.randint(1, 999), "currency": CURRENCY}
        if type == "TakePayment":
            body["payment_id"] = self._new("pay")
        if type == "RefundPayment":
            body["refund_id"] = self._new("ref")
        return self._message(type, who, body)

    def _about_stock(self, type: str) -> Message:
        category = self._some_category()
        items = [{"product_id": f"p{number}", "quantity": 1} for number in sorted(self._rng.sample(range(PRODUCTS), 2))]
        body: dict[str, Any] = {"category": category, "items": items}
        if type == "WriteOffStock":
            body = {"category": category, **items[0]}
        if type == "ReserveStock":
            body |= {"order_id": self._new("res"), "customer_id": self._someone()}
        return self._message(type, category, body)

    def _shipment(self) -> Message:
        region, order_id = self._rng.choice(REGIONS), self._new("s")
        body = {
            "order_id": order_id,
            "customer_id": self._someone(),
            "address": {"region": region},
            "items": [{"category": self._some_category(), "product_id": "p0", "quantity": 1}],
        }
        return self._message("ArrangeShipment", shipping_key(region, order_id), body)

    def _lines(self) -> list[dict[str, Any]]:
        chosen = {(self._some_category(), self._rng.randrange(PRODUCTS)) for _ in range(self._rng.randint(1, 3))}
        return [
            {
                "category": category,
                "product_id": f"p{product}",
                "quantity": self._rng.randint(1, 3),
                "unit_price": PRICE,
            }
            for category, product in sorted(chosen)
        ]

    # --- what nobody can carry out --------------------------------------------------------------------------------

    def poison(self) -> list[Message]:
        """One message of every kind that becomes a dead letter, in the way of everybody's favourite keys."""
        who = self._customer(0)
        good = self._message("TopUpWallet", who, {"customer_id": who, "amount": 1, "currency": CURRENCY})

        def bad(value: bytes | None = None, **headers: str | None) -> Message:
            id = self._new("bad")
            kept = {**dict(good.headers), "ce_id": id.encode()}
            for name, header in headers.items():
                kept.pop(name, None)
                if header is not None:
                    kept[name] = header.encode()
            return replace(
                good,
                type="poison",
                id=kept.get("ce_id", b"").decode(),
                value=good.value if value is None else value,
                headers=tuple(kept.items()),
            )

        return [
            bad(b"\xff\xfe not json"),
            bad(b'{"customer_id": 7}'),
            bad(b'{"customer_id": "' + who.encode() + b'", "amount": -1, "currency": "GBP"}'),
            bad(b"[" * 5_000),
            bad(good.value + b" " * (1_200 * 1024)),
            bad(ce_type="NoSuchCommand"),
            bad(ce_dataschema="concord:/schemas/payment/TopUpWallet/99"),
            bad(ce_id=None),
        ]

    # --- names ----------------------------------------------------------------------------------------------------

    def _message(self, type: str, key: str, body: Body) -> Message:
        return message(type, key, body, str(uuid.UUID(int=self._rng.getrandbits(128), version=4)))

    def _new(self, kind: str) -> str:
        self._count += 1
        return f"{self._name}-{kind}{self._count}"

    def _customer(self, number: int) -> str:
        return f"{self._name}-{number}"

    def _category(self, number: int) -> str:
        return f"{self._name}-goods{number}"

    def _someone(self) -> str:
        return self._customer(0 if self._rng.random() < HOT else self._rng.randrange(self._customers))

    def _some_category(self) -> str:
        return self._category(0 if self._rng.random() < HOT else self._rng.randrange(self._categories))


def with_repetitions(load: Load, seed: int) -> Iterator[Message]:
    """The load, of which a part comes again, soon or late, and some ids with other content."""
    rng = random.Random(f"repetitions {seed}")
    before: list[Message] = []
    while True:
        chance = rng.random()
        if chance < CHANGED and (changeable := [each for each in before if may_change(each)]):
            yield changed(rng.choice(changeable))
            continue
        if before and chance < CHANGED + REPEATED:
            yield rng.choice(before)
            continue
        before = [*before[-200:], load.next()]
        yield before[-1]
