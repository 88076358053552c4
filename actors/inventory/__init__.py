"""The inventory domain: products, stock and reservations."""

from actors.inventory.handlers import REASONS
from actors.inventory.tables import inventory

__all__ = ["REASONS", "inventory"]
