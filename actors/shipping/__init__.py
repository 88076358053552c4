"""The shipping domain: shipments and their way to the customer."""

from actors.shipping.handlers import REASONS
from actors.shipping.tables import shipping

__all__ = ["REASONS", "shipping"]
