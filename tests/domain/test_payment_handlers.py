"""Payment: wallets, payments, refunds."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from shop import Shop, take, wallet

from actors.payment.tables import PAYMENTS, WALLETS, status_of
from schemas.common import AMOUNT_MAX, BALANCE_MAX
from schemas.payment import SIGN, PaymentKind, PaymentStatus, RefundPayment, TopUpWallet


def balance(shop: Shop, customer_id: str = "ada") -> int:
    row = shop.row(WALLETS, customer_id)
    assert row is not None
    return row.balance


def top_up(amount: int = 500, **changes: object) -> TopUpWallet:
    return TopUpWallet(**({"customer_id": "ada", "amount": amount, "currency": "GBP"} | changes))


def refund(refund_id: str = "f1", **changes: object) -> RefundPayment:
    return RefundPayment(**({"customer_id": "ada", "refund_id": refund_id, "payment_id": "p1"} | changes))


def credit(refund_id: str = "f1", **changes: object) -> RefundPayment:
    return refund(refund_id, **({"payment_id": None, "amount": 300, "currency": "GBP"} | changes))


async def test_a_wallet_opens_with_its_initial_balance_as_the_first_payment() -> None:
    shop = Shop()
    answer = await shop.committed(wallet("bob", initial_balance=700))
    assert answer.event_names == ["WalletOpened"]
    assert answer.result["balance"] == 700
    [opening] = shop.rows(PAYMENTS)
    assert (opening.kind, opening.amount, opening.balance_after) == (PaymentKind.OPENING, 700, 700)


async def test_a_wallet_may_open_empty() -> None:
    shop = Shop()
    await shop.committed(wallet("bob", initial_balance=0))
    assert balance(shop, "bob") == 0


async def test_a_wallet_opened_again_gets_the_first_answer_whatever_happened_since(shop: Shop) -> None:
    first = await shop.committed(wallet("bob"))
    await shop.committed(top_up(customer_id="bob"))
    shop.advance(1)
    assert await shop.unchanged(wallet("bob")) == first.result


@pytest.mark.parametrize("changes", [{"currency": "JPY"}, {"initial_balance": 1}])
async def test_a_customer_has_one_wallet(shop: Shop, changes: dict[str, object]) -> None:
    await shop.refused(wallet("ada", **changes), "duplicate_wallet")


async def test_a_top_up_adds_to_the_balance(shop: Shop) -> None:
    answer = await shop.committed(top_up(500))
    assert answer.event_names == ["WalletToppedUp"]
    assert answer.result["balance"] == balance(shop) == 10_500


async def test_a_top_up_happens_once_for_its_id(shop: Shop) -> None:
    first = await shop.committed(top_up(500, top_up_id="t1"))
    await shop.committed(top_up(500, top_up_id="t2"))
    assert await shop.unchanged(top_up(500, top_up_id="t1")) == first.result
    await shop.refused(top_up(501, top_up_id="t1"), "duplicate_top_up")


async def test_top_ups_without_an_id_are_told_apart_by_their_commands(shop: Shop) -> None:
    await shop.committed(top_up(500))
    await shop.committed(top_up(500))
    assert balance(shop) == 11_000


async def test_a_payment_takes_from_the_balance_and_keeps_everything_about_it(shop: Shop) -> None:
    answer = await shop.committed(take(amount=1_000, order_id="o1"))
    assert answer.event_names == ["PaymentTaken"]
    assert balance(shop) == 9_000
    row = shop.row(PAYMENTS, "ada", "p1")
    assert row is not None
    assert row.provider_response == {"provider": "wallet", "result": "approved"}
    assert answer.result == {
        "payment_id": "p1",
        "customer_id": "ada",
        "order_id": "o1",
        "for_order": False,
        "kind": "payment",
        "amount": 1_000,
        "currency": "GBP",
        "method": "wallet",
        "status": "completed",
        "transaction_id": row.transaction_id,
        "processed_at_ms": shop.now_ms,
        "refunded": 0,
        "refund_of": None,
        "balance": 9_000,
    }


async def test_the_whole_balance_may_be_paid_and_no_more(shop: Shop) -> None:
    details = await shop.refused(take(amount=10_001), "insufficient_funds")
    assert details == {"amount": 10_001, "balance": 10_000, "currency": "GBP"}
    await shop.committed(take(amount=10_000))
    assert balance(shop) == 0


async def test_nothing_may_be_paid_too(shop: Shop) -> None:
    await shop.committed(take(amount=0))
    assert balance(shop) == 10_000


async def test_a_payment_happens_once_for_its_id(shop: Shop) -> None:
    first = await shop.committed(take())
    await shop.committed(take("p2"))
    assert await shop.unchanged(take()) == first.result
    await shop.refused(take(amount=1_001), "duplicate_payment")
    await shop.refused(top_up(top_up_id="p1"), "duplicate_top_up")
    await shop.refused(credit("p1"), "duplicate_refund")


async def test_the_opening_row_is_nobody_elses(shop: Shop) -> None:
    await shop.refused(take("opening"), "duplicate_payment")


@pytest.mark.parametrize("command", [take(customer_id="eve"), top_up(customer_id="eve"), credit(customer_id="eve")])
async def test_without_a_wallet_no_money_moves(shop: Shop, command) -> None:
    assert await shop.refused(command, "unknown_wallet") == {"customer_id": "eve"}


@pytest.mark.parametrize("command", [take(currency="USD"), top_up(currency="USD"), credit(currency="USD")])
async def test_money_of_another_currency_is_refused(shop: Shop, command) -> None:
    assert await shop.refused(command, "currency_mismatch") == {"currency": "USD", "expected": "GBP"}


async def test_only_the_wallet_is_a_method(shop: Shop) -> None:
    details = await shop.refused(take(method="card"), "unsupported_payment_method")
    assert details == {"method": "card", "supported": ["wallet"]}


async def test_a_payment_is_refunded_in_parts_up_to_all_of_it(shop: Shop) -> None:
    await shop.committed(take(amount=1_000, order_id="o1"))
    answer = await shop.committed(refund("f1", amount=400, currency="GBP"))
    assert answer.event_names == ["PaymentRefunded"]
    assert (answer.result["order_id"], answer.result["refund_of"]) == ("o1", "p1")
    row = shop.row(PAYMENTS, "ada", "p1")
    assert row is not None
    assert (row.status, row.refunded) == (PaymentStatus.PARTIALLY_REFUNDED, 400)
    assert await shop.refused(refund("f2", amount=601), "over_refund") == {
        "payment_id": "p1",
        "amount": 601,
        "refundable": 600,
    }
    await shop.committed(refund("f2"))
    row = shop.row(PAYMENTS, "ada", "p1")
    assert row is not None
    assert (row.status, row.refunded) == (PaymentStatus.REFUNDED, 1_000)
    assert balance(shop) == 10_000


async def test_a_refund_happens_once_for_its_id(shop: Shop) -> None:
    await shop.committed(take())
    first = await shop.committed(refund())
    assert await shop.unchanged(refund()) == first.result
    await shop.refused(refund(amount=1), "duplicate_refund")


async def test_a_payment_of_nothing_can_be_refunded(shop: Shop) -> None:
    await shop.committed(take(amount=0))
    await shop.committed(refund())
    row = shop.row(PAYMENTS, "ada", "p1")
    assert row is not None
    assert row.status is PaymentStatus.REFUNDED


async def test_only_payments_can_be_refunded(shop: Shop) -> None:
    await shop.committed(top_up(top_up_id="t1"))
    await shop.refused(refund(payment_id="t1"), "unknown_payment")
    await shop.refused(refund(payment_id="p9"), "unknown_payment")


async def test_a_refund_is_in_the_currency_of_its_payment(shop: Shop) -> None:
    await shop.committed(take())
    await shop.refused(refund(currency="USD"), "currency_mismatch")


async def test_a_credit_needs_no_payment(shop: Shop) -> None:
    await shop.committed(credit(amount=300))
    assert balance(shop) == 10_300


@pytest.mark.parametrize("left_out", [{"amount": None}, {"currency": None}])
def test_a_credit_says_how_much(left_out: dict[str, None]) -> None:
    with pytest.raises(ValidationError, match="needs amount and currency"):
        credit(**left_out)


def test_a_payment_for_an_order_says_which() -> None:
    with pytest.raises(ValidationError, match="needs order_id"):
        take(for_order=True)


async def test_balances_are_bounded(shop: Shop) -> None:
    row = shop.row(WALLETS, "ada")
    assert row is not None
    shop.put(WALLETS, row.with_(balance=BALANCE_MAX - AMOUNT_MAX))
    assert (await shop.run(top_up(AMOUNT_MAX))).status == "committed"
    await shop.refused(top_up(1), "balance_too_large")
    await shop.refused(credit(amount=1), "balance_too_large")


async def test_the_payments_of_a_wallet_are_its_history(shop: Shop) -> None:
    for command in (top_up(500), take(amount=1_200), refund(amount=200), credit("f2", amount=100)):
        shop.advance(1)
        await shop.committed(command)
    history = sorted(shop.rows(PAYMENTS), key=lambda row: row.processed_at_ms)
    assert [(row.kind.value, row.signed_amount, row.balance_after) for row in history] == [
        ("opening", 10_000, 10_000),
        ("top_up", 500, 10_500),
        ("payment", -1_200, 9_300),
        ("refund", 200, 9_500),
        ("refund", 100, 9_600),
    ]
    assert sum(row.signed_amount for row in history) == balance(shop)


def test_every_kind_of_payment_has_a_direction() -> None:
    assert set(SIGN) == set(PaymentKind)


@pytest.mark.parametrize(
    ("amount", "refunded", "status"),
    [
        (10, 0, PaymentStatus.COMPLETED),
        (10, 9, PaymentStatus.PARTIALLY_REFUNDED),
        (10, 10, PaymentStatus.REFUNDED),
        (0, 0, PaymentStatus.REFUNDED),
    ],
)
def test_refunds_decide_the_status(amount: int, refunded: int, status: PaymentStatus) -> None:
    assert status_of(amount=amount, refunded=refunded) is status
