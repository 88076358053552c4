"""The orders domain: orders across inventory, payment and shipping, and returns."""

from actors.orders.handlers import REASONS
from actors.orders.tables import orders

__all__ = ["REASONS", "orders"]
