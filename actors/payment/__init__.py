"""The payment domain: wallets, payments, refunds."""

from actors.payment.handlers import REASONS
from actors.payment.tables import payment

__all__ = ["REASONS", "payment"]
