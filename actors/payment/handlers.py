"""What payment does with its commands. The payments of a customer are the wallet's history."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from actors.domain import Refused, Transaction
from actors.idempotency import content_digest, made_before
from actors.payment.tables import PAYMENTS, WALLETS, Payment, Wallet, payment
from schemas.common import BALANCE_MAX
from schemas.message import Command
from schemas.payment import (
    SIGN,
    WALLET,
    OpenWallet,
    PaymentKind,
    PaymentRefunded,
    PaymentStatus,
    PaymentSummary,
    PaymentTaken,
    RefundPayment,
    TakePayment,
    TopUpWallet,
    WalletOpened,
    WalletSummary,
    WalletToppedUp,
)

REASONS: Mapping[str, str] = {
    "duplicate_wallet": "The customer has a wallet already, opened with other content.",
    "unknown_wallet": "The customer has no wallet.",
    "currency_mismatch": "The wallet or the payment is in another currency.",
    "insufficient_funds": "The balance is less than the amount.",
    "balance_too_large": "The balance would pass the largest that is kept.",
    "unsupported_payment_method": "No provider is connected: `wallet` is the only payment method.",
    "duplicate_top_up": "The customer has a payment of this id already, with other content.",
    "duplicate_payment": "The customer has a payment of this id already, with other content.",
    "duplicate_refund": "The customer has a payment of this id already, with other content.",
    "unknown_payment": "The customer has made no payment of this id.",
    "over_refund": "Less of the payment is left than was to be refunded.",
}

PROVIDERS: Mapping[str, Mapping[str, str]] = {WALLET: {"provider": WALLET, "result": "approved"}}
"""What the provider behind each payment method answers. The wallet approves: the checks were made before."""

OPENING = "opening"
"""The payment id of a wallet's first row. A client that uses it is refused as a duplicate."""


@payment.handles(OpenWallet)
async def open_wallet(tx: Transaction, command: OpenWallet) -> dict[str, Any]:
    digest = content_digest(command)
    wallet = await tx.get(WALLETS, command.customer_id)
    if wallet is None:
        empty = Wallet(
            customer_id=command.customer_id,
            balance=0,
            currency=command.currency,
            created_at_ms=tx.now_ms,
            updated_at_ms=tx.now_ms,
            content_digest=digest,
        )
        opening = _movement(tx, command, empty, OPENING, PaymentKind.OPENING, command.initial_balance)
        wallet = empty.moved_by(opening)
        await tx.insert(WALLETS, wallet)
        await tx.insert(PAYMENTS, opening)
        tx.emit(
            WalletOpened(wallet=WalletSummary.of(wallet), payment=PaymentSummary.of(opening)),
            about=(WALLETS, wallet.customer_id),
        )
    elif wallet.content_digest != digest:
        raise Refused("duplicate_wallet", customer_id=command.customer_id)
    first = wallet.with_(balance=command.initial_balance, updated_at_ms=wallet.created_at_ms)
    return WalletSummary.of(first).as_json()


@payment.handles(TopUpWallet)
async def top_up_wallet(tx: Transaction, command: TopUpWallet) -> dict[str, Any]:
    top_up_id = command.top_up_id or tx.new_id("top-up")
    refusal = Refused("duplicate_top_up", top_up_id=top_up_id)
    existing = await made_before(tx, PAYMENTS, command.customer_id, top_up_id, by=command, refusal=refusal)
    if existing is not None:
        return _answer(existing)

    wallet = await _wallet(tx, command.customer_id, command.currency)
    top_up = _movement(tx, command, wallet, top_up_id, PaymentKind.TOP_UP, command.amount)
    after = await _post(tx, wallet, top_up)
    tx.emit(
        WalletToppedUp(wallet=WalletSummary.of(after), payment=PaymentSummary.of(top_up)),
        about=(WALLETS, after.customer_id),
    )
    return _answer(top_up)


@payment.handles(TakePayment)
async def take_payment(tx: Transaction, command: TakePayment) -> dict[str, Any]:
    refusal = Refused("duplicate_payment", payment_id=command.payment_id)
    existing = await made_before(tx, PAYMENTS, command.customer_id, command.payment_id, by=command, refusal=refusal)
    if existing is not None:
        return _answer(existing)

    if command.method not in PROVIDERS:
        raise Refused("unsupported_payment_method", method=command.method, supported=sorted(PROVIDERS))
    wallet = await _wallet(tx, command.customer_id, command.currency)
    if wallet.balance < command.amount:
        raise Refused("insufficient_funds", amount=command.amount, balance=wallet.balance, currency=wallet.currency)
    taken = _movement(
        tx,
        command,
        wallet,
        command.payment_id,
        PaymentKind.PAYMENT,
        command.amount,
        method=command.method,
        order_id=command.order_id,
        for_order=command.for_order,
    )
    after = await _post(tx, wallet, taken)
    tx.emit(
        PaymentTaken(wallet=WalletSummary.of(after), payment=PaymentSummary.of(taken)),
        about=(WALLETS, after.customer_id),
    )
    return _answer(taken)


@payment.handles(RefundPayment)
async def refund_payment(tx: Transaction, command: RefundPayment) -> dict[str, Any]:
    refusal = Refused("duplicate_refund", refund_id=command.refund_id)
    existing = await made_before(tx, PAYMENTS, command.customer_id, command.refund_id, by=command, refusal=refusal)
    if existing is not None:
        return _answer(existing)

    paid, amount = await _refundable(tx, command)
    wallet = await _wallet(tx, command.customer_id, paid.currency if paid else command.currency)
    refund = _movement(
        tx,
        command,
        wallet,
        command.refund_id,
        PaymentKind.REFUND,
        amount,
        method=paid.method if paid else WALLET,
        order_id=command.order_id or (paid.order_id if paid else None),
        refund_of=command.payment_id,
    )
    after = await _post(tx, wallet, refund)
    refunded = None
    if paid is not None:
        refunded = paid.refund(amount)
        await tx.update(PAYMENTS, refunded)
    tx.emit(
        PaymentRefunded(
            wallet=WalletSummary.of(after),
            payment=PaymentSummary.of(refund),
            refunded_payment=PaymentSummary.of(refunded) if refunded else None,
            reason=command.reason,
        ),
        about=(WALLETS, after.customer_id),
    )
    return _answer(refund)


async def _refundable(tx: Transaction, command: RefundPayment) -> tuple[Payment | None, int]:
    """The payment to refund, if the command names one, and how much of it."""
    if command.payment_id is None:
        assert command.amount is not None  # the schema sees to it
        return None, command.amount
    paid = await tx.get(PAYMENTS, command.customer_id, command.payment_id)
    if paid is None or paid.kind is not PaymentKind.PAYMENT:
        raise Refused("unknown_payment", payment_id=command.payment_id)
    if command.currency not in (None, paid.currency):
        raise Refused("currency_mismatch", currency=command.currency, expected=paid.currency)
    amount = paid.refundable if command.amount is None else command.amount
    if amount > paid.refundable:
        raise Refused("over_refund", payment_id=paid.payment_id, amount=amount, refundable=paid.refundable)
    return paid, amount


async def _wallet(tx: Transaction, customer_id: str, currency: str | None) -> Wallet:
    wallet = await tx.get(WALLETS, customer_id)
    if wallet is None:
        raise Refused("unknown_wallet", customer_id=customer_id)
    if wallet.currency != currency:
        raise Refused("currency_mismatch", currency=currency, expected=wallet.currency)
    return wallet


def _movement(
    tx: Transaction,
    command: Command,
    wallet: Wallet,
    payment_id: str,
    kind: PaymentKind,
    amount: int,
    *,
    method: str = WALLET,
    order_id: str | None = None,
    for_order: bool = False,
    refund_of: str | None = None,
) -> Payment:
    """The row that says how `command` moves `wallet`."""
    return Payment(
        customer_id=wallet.customer_id,
        payment_id=payment_id,
        order_id=order_id,
        for_order=for_order,
        kind=kind,
        amount=amount,
        currency=wallet.currency,
        method=method,
        status=PaymentStatus.COMPLETED,
        transaction_id=tx.tx_id,
        processed_at_ms=tx.now_ms,
        provider_response=dict(PROVIDERS[method]),
        refunded=0,
        refund_of=refund_of,
        balance_after=wallet.balance + SIGN[kind] * amount,
        content_digest=content_digest(command),
    )


async def _post(tx: Transaction, wallet: Wallet, movement: Payment) -> Wallet:
    """Write the movement and the wallet it leads to."""
    if movement.balance_after > BALANCE_MAX:
        raise Refused("balance_too_large", balance=wallet.balance, amount=movement.amount)
    after = wallet.moved_by(movement)
    await tx.insert(PAYMENTS, movement)
    await tx.update(WALLETS, after)
    return after


def _answer(movement: Payment) -> dict[str, Any]:
    return PaymentSummary.of(movement).as_json() | {"balance": movement.balance_after}
