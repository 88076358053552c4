"""The digest by which a business id's content is known again."""

from __future__ import annotations

from shop import place, product, reserve, take

from actors.idempotency import content_digest
from schemas.inventory import CancelReservation, ConfirmReservation, RegisterProduct
from schemas.payment import TakePayment


def test_equal_content_has_one_digest_and_other_content_another() -> None:
    assert content_digest(place()) == content_digest(place())
    commands = [place(), place("o2"), place(currency="USD"), take(), product(), reserve(), reserve(for_order=True)]
    assert len({content_digest(command) for command in commands}) == len(commands)


def test_two_commands_that_say_the_same_in_the_same_fields_are_told_apart() -> None:
    confirm = ConfirmReservation(category="kitchen", order_id="o1")
    cancel = CancelReservation(category="kitchen", order_id="o1")
    assert content_digest(confirm) != content_digest(cancel)


def test_a_field_that_a_later_version_adds_with_a_default_changes_no_digest() -> None:
    later = type("TakePayment", (TakePayment,), {"__annotations__": {"memo": str}, "memo": ""})
    same = later(customer_id="ada", payment_id="p1", amount=1_000, currency="GBP")
    assert content_digest(same) == content_digest(take())


def test_a_default_said_out_loud_is_the_same_content() -> None:
    body = product().model_dump(mode="json")
    silent = {name: value for name, value in body.items() if name != "low_stock_threshold"}
    loud = RegisterProduct.consume(body | {"low_stock_threshold": 0})
    assert content_digest(loud) == content_digest(RegisterProduct.consume(silent))
