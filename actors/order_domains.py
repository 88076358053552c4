"""The four domains of order processing."""

from __future__ import annotations

from actors.domain import Domain
from actors.inventory import inventory
from actors.orders import orders
from actors.payment import payment
from actors.shipping import shipping

ORDER_DOMAINS: tuple[Domain, ...] = (inventory, payment, shipping, orders)
