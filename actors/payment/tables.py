"""What payment keeps: wallets, and every payment that ever moved one."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from actors.domain import Domain, Record, Table
from schemas.payment import SIGN, PaymentKind, PaymentStatus


class Payment(Record):
    """One movement of a wallet's balance. `amount` is never negative: `kind` says which way it goes.

    `refunded` is how much of a payment has been given back; `refund_of` names the payment a refund is against.
    """

    customer_id: str
    payment_id: str
    order_id: str | None
    for_order: bool
    kind: Annotated[PaymentKind, Field(strict=False)]
    amount: int
    currency: str
    method: str
    status: Annotated[PaymentStatus, Field(strict=False)]
    transaction_id: str
    processed_at_ms: int
    provider_response: dict[str, str]
    refunded: int
    refund_of: str | None
    balance_after: int
    content_digest: str

    @property
    def signed_amount(self) -> int:
        return SIGN[self.kind] * self.amount

    @property
    def refundable(self) -> int:
        return self.amount - self.refunded

    def refund(self, amount: int) -> Payment:
        """This payment after `amount` of it was given back."""
        assert amount <= self.refundable
        refunded = self.refunded + amount
        return self.with_(refunded=refunded, status=status_of(amount=self.amount, refunded=refunded))


class Wallet(Record):
    """A customer's money. The balance is the sum of the signed amounts of its payments."""

    customer_id: str
    balance: int
    currency: str
    created_at_ms: int
    updated_at_ms: int
    content_digest: str

    def moved_by(self, payment: Payment) -> Wallet:
        balance = self.balance + payment.signed_amount
        assert balance >= 0
        return self.with_(balance=balance, updated_at_ms=payment.processed_at_ms)


def status_of(*, amount: int, refunded: int) -> PaymentStatus:
    """The status of a payment of `amount` of which `refunded` was given back by a refund."""
    if refunded >= amount:
        return PaymentStatus.REFUNDED
    return PaymentStatus.PARTIALLY_REFUNDED if refunded else PaymentStatus.COMPLETED


WALLETS = Table("payment", "wallets", Wallet, key=("customer_id",), routing="customer_id")

PAYMENTS = Table(
    "payment",
    "payments",
    Payment,
    key=("customer_id", "payment_id"),
    routing="customer_id",
    sliced_by="payment_id",
    slices=4,
)

payment = Domain("payment", (WALLETS, PAYMENTS))
