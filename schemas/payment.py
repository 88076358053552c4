"""Payment: wallets, and the payments that move their balance. Routing key: the customer."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from schemas.common import AMOUNT_MAX, Amount, Currency, Identifier, Part, Text
from schemas.message import Command, Event

WALLET = "wallet"
"""The one payment method there is: no provider is connected."""


class PaymentKind(StrEnum):
    """Why the balance moved."""

    OPENING = "opening"
    TOP_UP = "top_up"
    PAYMENT = "payment"
    REFUND = "refund"


SIGN: Mapping[PaymentKind, int] = {
    PaymentKind.OPENING: +1,
    PaymentKind.TOP_UP: +1,
    PaymentKind.PAYMENT: -1,
    PaymentKind.REFUND: +1,
}
"""Which way each kind moves the balance: a wallet's balance is the sum of sign times amount over its payments."""


class PaymentStatus(StrEnum):
    """A payment is completed when it is made; refunds against it change that later."""

    COMPLETED = "completed"
    PARTIALLY_REFUNDED = "partially_refunded"
    REFUNDED = "refunded"


class WalletSummary(Part):
    """A wallet as events and results carry it."""

    customer_id: str
    balance: int
    currency: str
    updated_at_ms: int


class PaymentSummary(Part):
    """A payment, refund or top-up as events and results carry it. `refund_of` names the payment a refund is against."""

    payment_id: str
    customer_id: str
    order_id: str | None
    for_order: bool
    kind: PaymentKind
    amount: int
    currency: str
    method: str
    status: PaymentStatus
    transaction_id: str
    processed_at_ms: int
    refunded: int
    refund_of: str | None


class PaymentCommand(Command):
    """A command to one customer's wallet."""

    domain: ClassVar[str] = "payment"

    customer_id: Identifier

    @property
    def routing_key(self) -> str:
        return self.customer_id


class OpenWallet(PaymentCommand):
    """Give a customer a wallet with `initial_balance` in it."""

    currency: Currency
    initial_balance: Amount = 0


class TopUpWallet(PaymentCommand):
    """Put money in. With `top_up_id` it happens once for that id, without once for the command."""

    amount: Annotated[int, Field(ge=1, le=AMOUNT_MAX)]
    currency: Currency
    top_up_id: Identifier | None = None


class TakePayment(PaymentCommand):
    """Pay from the wallet; once for each `payment_id` of the customer.

    With `for_order` it is the payment of that order, placed in the same transaction.
    """

    payment_id: Identifier
    order_id: Identifier | None = None
    amount: Amount
    currency: Currency
    method: Identifier = WALLET
    for_order: bool = False

    @model_validator(mode="after")
    def _of_which_order(self) -> Self:
        if self.for_order and self.order_id is None:
            raise ValueError("a payment for an order needs order_id")
        return self


class RefundPayment(PaymentCommand):
    """Give money back; once for each `refund_id` of the customer.

    With `payment_id` it is a refund against that payment, of at most what is left of it; leaving `amount` out refunds
    all that is left. Without `payment_id` it is a credit, and `amount` and `currency` say how much.
    """

    refund_id: Identifier
    payment_id: Identifier | None = None
    order_id: Identifier | None = None
    amount: Amount | None = None
    currency: Currency | None = None
    reason: Text | None = None

    @model_validator(mode="after")
    def _a_credit_says_how_much(self) -> Self:
        if self.payment_id is None and (self.amount is None or self.currency is None):
            raise ValueError("a refund without payment_id needs amount and currency")
        return self


class WalletEvent(Event):
    """What happened to one wallet, and the payment that did it."""

    domain: ClassVar[str] = "payment"

    wallet: WalletSummary
    payment: PaymentSummary

    @property
    def routing_key(self) -> str:
        return self.wallet.customer_id


class WalletOpened(WalletEvent):
    pass


class WalletToppedUp(WalletEvent):
    pass


class PaymentTaken(WalletEvent):
    pass


class PaymentRefunded(WalletEvent):
    """`payment` is the refund; `refunded_payment` the payment it is against, as it is now, unless it is a credit."""

    refunded_payment: PaymentSummary | None
    reason: str | None


COMMANDS: tuple[type[Command], ...] = (OpenWallet, TopUpWallet, TakePayment, RefundPayment)

EVENTS: tuple[type[Event], ...] = (WalletOpened, WalletToppedUp, PaymentTaken, PaymentRefunded)
