"""Inventory: stock, reservations and their expiry."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from shop import Shop, items, product, reserve

from actors.domain import Refused
from actors.inventory.handlers import ASK_AGAIN_MS, due_reservations
from actors.inventory.tables import EXPIRIES, PRODUCTS, RESERVATIONS, Expiry
from schemas.common import QUANTITY_MAX, STOCK_MAX
from schemas.inventory import (
    EXPIRES_IN_MS_DEFAULT,
    CancelReservation,
    CheckAvailability,
    ConfirmReservation,
    ExpireReservation,
    ReservationStatus,
    RestockProduct,
    StockLow,
    WriteOffStock,
)


def stock(shop: Shop, product_id: str = "mug") -> tuple[int, int]:
    """(quantity, reserved)"""
    row = shop.row(PRODUCTS, "kitchen", product_id)
    assert row is not None
    return row.quantity, row.reserved


def status(shop: Shop, order_id: str = "o1") -> ReservationStatus:
    row = shop.row(RESERVATIONS, "kitchen", order_id)
    assert row is not None
    return row.status


def confirm(order_id: str = "o1", *, for_order: bool = False) -> ConfirmReservation:
    return ConfirmReservation(category="kitchen", order_id=order_id, for_order=for_order)


def cancel(order_id: str = "o1", *, for_order: bool = False) -> CancelReservation:
    return CancelReservation(category="kitchen", order_id=order_id, for_order=for_order)


def write_off(quantity: int) -> WriteOffStock:
    return WriteOffStock(category="kitchen", product_id="mug", quantity=quantity, reason="broken")


async def test_a_registered_product_is_in_stock_and_available(shop: Shop) -> None:
    answer = await shop.committed(product("plate", quantity=7))
    assert answer.event_names == ["ProductRegistered"]
    assert answer.result == {
        "category": "kitchen",
        "product_id": "plate",
        "name": "A plate",
        "quantity": 7,
        "reserved": 0,
        "available": 7,
        "unit_price": 250,
        "currency": "GBP",
        "low_stock_threshold": 10,
        "updated_at_ms": shop.now_ms,
    }


async def test_a_product_registered_again_gets_the_first_answer_whatever_happened_since(shop: Shop) -> None:
    first = await shop.committed(product("plate"))
    await shop.committed(reserve(items=items(plate=3)))
    shop.advance(1)
    assert await shop.unchanged(product("plate")) == first.result


async def test_a_product_registered_with_other_content_is_refused(shop: Shop) -> None:
    details = await shop.refused(product("mug", unit_price=251), "duplicate_product")
    assert details == {"category": "kitchen", "product_id": "mug"}


async def test_the_same_product_id_in_another_category_is_another_product(shop: Shop) -> None:
    await shop.committed(product("mug", category="garden", unit_price=999))
    assert len(shop.rows(PRODUCTS)) == 4


async def test_restocking_adds_to_every_product_named(shop: Shop) -> None:
    answer = await shop.committed(RestockProduct(category="kitchen", items=items(mug=5, bowl=6)))
    assert answer.event_names == ["ProductRestocked", "ProductRestocked"]
    assert (stock(shop, "mug"), stock(shop, "bowl")) == ((105, 0), (106, 0))


async def test_restocking_an_unknown_product_is_refused_with_all_unknown_ones(shop: Shop) -> None:
    details = await shop.refused(RestockProduct(category="kitchen", items=items(x=1, mug=1, y=1)), "unknown_product")
    assert details == {"category": "kitchen", "product_ids": ["x", "y"]}


async def test_stock_is_bounded(shop: Shop) -> None:
    row = shop.row(PRODUCTS, "kitchen", "mug")
    assert row is not None
    full = STOCK_MAX - QUANTITY_MAX
    shop.put(PRODUCTS, row.with_(quantity=full, initial_quantity=full))
    await shop.committed(RestockProduct(category="kitchen", items=items(mug=QUANTITY_MAX)))
    await shop.refused(RestockProduct(category="kitchen", items=items(mug=1)), "stock_too_large")


async def test_a_write_off_takes_from_what_is_available(shop: Shop) -> None:
    answer = await shop.committed(write_off(40))
    assert stock(shop) == (60, 0)
    assert answer.result["available"] == 60
    assert answer.event_names == ["StockWrittenOff"]


async def test_reserved_goods_cannot_be_written_off(shop: Shop) -> None:
    await shop.committed(reserve(items=items(mug=90)))
    assert await shop.refused(write_off(11), "insufficient_stock") == {
        "product_id": "mug",
        "requested": 11,
        "available": 10,
    }
    await shop.committed(write_off(10))
    assert stock(shop) == (90, 90)


async def test_writing_off_an_unknown_product_is_refused(shop: Shop) -> None:
    await shop.refused(WriteOffStock(category="kitchen", product_id="x", quantity=1), "unknown_product")


async def test_availability_is_answered_for_each_product(shop: Shop) -> None:
    await shop.committed(reserve(items=items(mug=99)))
    answer = await shop.unchanged(CheckAvailability(category="kitchen", items=items(mug=2, bowl=2, x=1)))
    assert answer["available"] is False
    assert [(a["product_id"], a["known"], a["available"], a["sufficient"]) for a in answer["products"]] == [
        ("mug", True, 1, False),
        ("bowl", True, 100, True),
        ("x", False, 0, False),
    ]


async def test_all_available_is_said_so(shop: Shop) -> None:
    answer = await shop.unchanged(CheckAvailability(category="kitchen", items=items(mug=100, bowl=100)))
    assert answer["available"] is True


async def test_reserving_sets_goods_aside_until_they_expire(shop: Shop) -> None:
    answer = await shop.committed(reserve(items=items(mug=5, bowl=2)))
    assert answer.event_names == ["StockReserved"]
    assert (stock(shop, "mug"), stock(shop, "bowl")) == ((100, 5), (100, 2))
    assert answer.result["expires_at_ms"] == shop.now_ms + EXPIRES_IN_MS_DEFAULT
    assert [item["product_id"] for item in answer.result["items"]] == ["bowl", "mug"]


async def test_out_of_stock_lists_everything_that_is_missing(shop: Shop) -> None:
    details = await shop.refused(reserve(items=items(mug=101, rag=1, bowl=200)), "unknown_product")
    assert details["product_ids"] == ["rag"]
    details = await shop.refused(reserve(items=items(mug=101, bowl=200)), "out_of_stock")
    assert details == {
        "category": "kitchen",
        "missing": [
            {"product_id": "bowl", "requested": 200, "available": 100},
            {"product_id": "mug", "requested": 101, "available": 100},
        ],
    }


async def test_the_same_reservation_again_gets_the_first_answer_in_any_order_of_items(shop: Shop) -> None:
    first = await shop.committed(reserve(items=items(mug=5, bowl=2)))
    shop.advance(1)
    assert await shop.unchanged(reserve(items=items(bowl=2, mug=5))) == first.result


@pytest.mark.parametrize("changes", [{"items": items(mug=6)}, {"customer_id": "bob"}, {"expires_in_ms": 5}])
async def test_an_order_has_one_reservation_in_a_category(shop: Shop, changes: dict[str, object]) -> None:
    await shop.committed(reserve())
    await shop.refused(reserve(**changes), "duplicate_reservation")


async def test_an_ended_reservation_is_not_made_again(shop: Shop) -> None:
    await shop.committed(reserve())
    await shop.committed(cancel())
    assert (await shop.refused(reserve(), "duplicate_reservation"))["status"] == "cancelled"


async def test_confirming_lets_the_goods_leave(shop: Shop) -> None:
    await shop.committed(reserve())
    answer = await shop.committed(confirm())
    assert answer.event_names == ["ReservationConfirmed"]
    assert stock(shop) == (95, 0)
    assert shop.rows(EXPIRIES) == []


async def test_cancelling_makes_the_goods_available_again(shop: Shop) -> None:
    await shop.committed(reserve())
    answer = await shop.committed(cancel())
    assert answer.event_names == ["ReservationCancelled"]
    assert stock(shop) == (100, 0)
    assert shop.rows(EXPIRIES) == []


@pytest.mark.parametrize("ending", [confirm, cancel])
async def test_ending_a_reservation_twice_gets_the_first_answer(shop: Shop, ending) -> None:
    await shop.committed(reserve())
    first = await shop.committed(ending())
    shop.advance(1)
    assert await shop.unchanged(ending()) == first.result


async def test_what_has_ended_one_way_cannot_end_another(shop: Shop) -> None:
    await shop.committed(reserve("o1"))
    await shop.committed(reserve("o2"))
    await shop.committed(confirm("o1"))
    await shop.committed(cancel("o2"))
    assert await shop.refused(cancel("o1"), "reservation_ended") == {"order_id": "o1", "status": "confirmed"}
    assert await shop.refused(confirm("o2"), "reservation_ended") == {"order_id": "o2", "status": "cancelled"}


@pytest.mark.parametrize("ending", [confirm, cancel])
async def test_a_reservation_nobody_made_cannot_end(shop: Shop, ending) -> None:
    await shop.refused(ending(), "unknown_reservation")


@pytest.mark.parametrize("ending", [confirm, cancel])
async def test_a_reservation_of_an_order_is_ended_by_the_order_alone(shop: Shop, ending) -> None:
    await shop.run(reserve(for_order=True))
    await shop.refused(ending(), "belongs_to_order")
    answer = await shop.run(ending(for_order=True))
    assert answer.status == "committed"


async def test_a_reservation_for_an_order_never_expires(shop: Shop) -> None:
    await shop.run(reserve(for_order=True))
    shop.advance(10 * EXPIRES_IN_MS_DEFAULT)
    assert await shop.run_due() == []
    assert status(shop) is ReservationStatus.RESERVED
    with pytest.raises(ValidationError, match="does not expire"):
        reserve(for_order=True, expires_in_ms=1)


async def test_an_order_takes_over_what_was_reserved_for_it(shop: Shop) -> None:
    first = await shop.run(reserve())
    answer = await shop.run(reserve(for_order=True))
    assert answer.result["reservation_id"] == first.result["reservation_id"]
    assert answer.result["expires_at_ms"] is None
    assert answer.event_names == ["StockReserved"]
    assert stock(shop) == (100, 5)
    assert shop.rows(EXPIRIES) == []


@pytest.mark.parametrize("changes", [{"items": items(mug=6)}, {"customer_id": "bob"}])
async def test_an_order_does_not_take_over_other_goods_or_another_customers(
    shop: Shop, changes: dict[str, object]
) -> None:
    await shop.committed(reserve())
    await shop.refused(reserve(for_order=True, **changes), "duplicate_reservation")


async def test_the_timer_expires_what_is_due_and_nothing_else(shop: Shop) -> None:
    await shop.committed(reserve("o1", expires_in_ms=1000))
    await shop.committed(reserve("o2", expires_in_ms=1001))
    shop.advance(999)
    assert await shop.run_due() == []
    shop.advance(1)
    [answer] = await shop.run_due()
    assert answer.result == {"expired": True}
    assert answer.event_names == ["ReservationExpired"]
    assert (status(shop, "o1"), status(shop, "o2")) == (ReservationStatus.EXPIRED, ReservationStatus.RESERVED)
    assert stock(shop) == (100, 5)
    assert await shop.run_due() == []


async def test_an_expired_reservation_cannot_be_confirmed_or_cancelled(shop: Shop) -> None:
    await shop.committed(reserve())
    shop.advance(EXPIRES_IN_MS_DEFAULT)
    await shop.run_due()
    assert (await shop.refused(confirm(), "reservation_ended"))["status"] == "expired"
    assert (await shop.refused(cancel(), "reservation_ended"))["status"] == "expired"


async def test_a_reservation_that_is_due_cannot_be_confirmed_before_the_timer_comes_round(shop: Shop) -> None:
    await shop.committed(reserve(expires_in_ms=1000))
    shop.advance(1000)
    assert (await shop.refused(confirm(), "reservation_ended"))["status"] == "expired"
    await shop.committed(cancel())


async def test_expiry_checks_time_and_status_again(shop: Shop) -> None:
    await shop.committed(reserve(expires_in_ms=1000))
    due_at_ms = shop.now_ms + 1000
    expire = ExpireReservation(category="kitchen", order_id="o1", expires_at_ms=due_at_ms)
    await shop.refused(expire, "not_due")
    await shop.committed(confirm())
    shop.advance(1000)
    assert await shop.unchanged(expire) == {"expired": False}


async def test_expiry_of_another_time_or_of_nothing_does_nothing(shop: Shop) -> None:
    await shop.committed(reserve(expires_in_ms=1000))
    for order_id in ("o1", "o2"):
        expire = ExpireReservation(category="kitchen", order_id=order_id, expires_at_ms=shop.now_ms)
        assert await shop.unchanged(expire) == {"expired": False}


class Due:
    """A reader with one expiry."""

    def __init__(self, expiry: Expiry) -> None:
        self.expiry = expiry

    async def until(self, table, limit_value, *, limit):
        assert table is EXPIRIES
        return [self.expiry]


async def test_the_timer_says_the_same_command_under_one_id_and_asks_anew_much_later() -> None:
    reader = Due(Expiry(expires_at_ms=1_000, category="kitchen", order_id="o1"))
    [(first, _)] = await due_reservations(reader, 1_000)
    [(soon, _)] = await due_reservations(reader, 1_000 + ASK_AGAIN_MS - 1)
    [(later, command)] = await due_reservations(reader, 1_000 + ASK_AGAIN_MS)
    assert first == soon != later
    assert command == ExpireReservation(category="kitchen", order_id="o1", expires_at_ms=1_000)


async def test_a_cancelled_reservation_frees_what_another_wants(shop: Shop) -> None:
    await shop.committed(reserve("o1", items=items(mug=100)))
    await shop.refused(reserve("o2"), "out_of_stock")
    await shop.committed(cancel("o1"))
    await shop.committed(reserve("o2"))


@pytest.mark.parametrize(
    ("before", "taken", "says_low"), [(100, 89, False), (100, 90, True), (100, 100, True), (10, 1, False)]
)
async def test_low_stock_is_told_when_the_threshold_is_crossed_and_only_then(
    before: int, taken: int, says_low: bool
) -> None:
    shop = Shop()
    await shop.committed(product("mug", quantity=before, low_stock_threshold=10))
    for command in (reserve(items=items(mug=taken)), cancel(), write_off(taken)):
        answer = await shop.committed(command)
        low = [emitted.event for emitted in answer.events if isinstance(emitted.event, StockLow)]
        assert len(low) == (says_low and not isinstance(command, CancelReservation))
        assert all(event.product.available == before - taken for event in low)


async def test_low_stock_is_told_again_after_it_has_recovered(shop: Shop) -> None:
    names = []
    for command in (
        write_off(95),
        write_off(1),
        RestockProduct(category="kitchen", items=items(mug=50)),
        write_off(50),
    ):
        names.append((await shop.committed(command)).event_names)
    assert names == [
        ["StockWrittenOff", "StockLow"],
        ["StockWrittenOff"],
        ["ProductRestocked"],
        ["StockWrittenOff", "StockLow"],
    ]


async def test_events_carry_the_version_of_the_record_they_speak_of(shop: Shop) -> None:
    versions = []
    for command in (write_off(1), write_off(2), reserve(), cancel()):
        versions += [(e.about[0], e.record_version) for e in (await shop.committed(command)).events]
    assert versions == [
        ("inventory.products", 2),
        ("inventory.products", 3),
        ("inventory.reservations", 1),
        ("inventory.reservations", 2),
    ]


def test_a_product_listed_twice_is_not_a_command() -> None:
    with pytest.raises(ValidationError, match="listed twice"):
        reserve(items=(*items(mug=1), *items(mug=2)))


def test_refusals_name_their_reason() -> None:
    refusal = Refused("out_of_stock", product_id="mug")
    assert (refusal.reason, refusal.details) == ("out_of_stock", {"product_id": "mug"})
