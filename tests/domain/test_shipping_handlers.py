"""Shipping: arranging, tracking numbers and the table of legal transitions."""

from __future__ import annotations

import uuid
from itertools import product as pairs

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shop import Shop, arrange

from actors.shipping.carriers import (
    ALPHABET,
    DAY_MS,
    DEFAULT_SERVICE,
    SERVICES,
    is_tracking_number,
    service_for,
    tracking_number,
)
from actors.shipping.handlers import TRANSITIONS
from actors.shipping.tables import SHIPMENTS, Shipment
from schemas.common import Address
from schemas.shipping import SPREAD, ArrangeShipment, ShipmentItem, ShipmentStatus, UpdateShipmentStatus, shipping_key

WAY_TO: dict[ShipmentStatus, tuple[ShipmentStatus, ...]] = {
    ShipmentStatus.CREATED: (),
    ShipmentStatus.SHIPPED: (ShipmentStatus.SHIPPED,),
    ShipmentStatus.IN_TRANSIT: (ShipmentStatus.SHIPPED, ShipmentStatus.IN_TRANSIT),
    ShipmentStatus.DELIVERED: (ShipmentStatus.SHIPPED, ShipmentStatus.DELIVERED),
    ShipmentStatus.RETURNED: (ShipmentStatus.SHIPPED, ShipmentStatus.RETURNED),
    ShipmentStatus.CANCELLED: (ShipmentStatus.CANCELLED,),
}

LEGAL = {
    ("created", "shipped"),
    ("created", "cancelled"),
    ("shipped", "in_transit"),
    ("shipped", "delivered"),
    ("shipped", "returned"),
    ("in_transit", "delivered"),
    ("in_transit", "returned"),
    ("delivered", "returned"),
}


def update(status: ShipmentStatus, order_id: str = "o1", **changes: object) -> UpdateShipmentStatus:
    return UpdateShipmentStatus(**({"region": "東京都", "order_id": order_id, "status": status} | changes))


def shipment(shop: Shop, order_id: str = "o1") -> Shipment:
    row = shop.row(SHIPMENTS, shipping_key("東京都", order_id), order_id)
    assert row is not None
    return row


async def test_an_arranged_shipment_has_a_carrier_a_date_and_a_tracking_number(shop: Shop) -> None:
    answer = await shop.committed(arrange())
    assert answer.event_names == ["ShipmentArranged"]
    row = shipment(shop)
    assert is_tracking_number(row.tracking_number)
    assert (row.carrier, row.estimated_delivery_at_ms) == ("Kanto Express", shop.now_ms + DAY_MS)
    assert [(change.status, change.at_ms) for change in row.history] == [(ShipmentStatus.CREATED, shop.now_ms)]
    assert (row.shipped_at_ms, row.delivered_at_ms) == (None, None)
    assert answer.result["tracking_number"] == row.tracking_number


async def test_the_same_shipment_again_gets_the_first_answer(shop: Shop) -> None:
    first = await shop.committed(arrange())
    shop.advance(1)
    assert await shop.unchanged(arrange()) == first.result


async def test_an_order_has_one_shipment(shop: Shop) -> None:
    await shop.committed(arrange())
    other = (ShipmentItem(category="kitchen", product_id="mug", quantity=3),)
    await shop.refused(arrange(items=other), "duplicate_shipment")
    await shop.committed(update(ShipmentStatus.SHIPPED))
    assert (await shop.refused(arrange(), "duplicate_shipment"))["status"] == "shipped"


def test_a_product_listed_twice_is_not_a_shipment() -> None:
    item = ShipmentItem(category="kitchen", product_id="mug", quantity=1)
    with pytest.raises(ValueError, match="listed twice"):
        arrange(items=(item, item))
    arrange(items=(item, ShipmentItem(category="garden", product_id="mug", quantity=1)))


async def test_history_keeps_every_status_with_its_time_and_note(shop: Shop) -> None:
    await shop.committed(arrange())
    start = shop.now_ms
    for status in (ShipmentStatus.SHIPPED, ShipmentStatus.IN_TRANSIT, ShipmentStatus.DELIVERED):
        shop.advance(1)
        await shop.committed(update(status, note=f"now {status}"))
    row = shipment(shop)
    assert [(change.status, change.at_ms - start, change.note) for change in row.history] == [
        ("created", 0, None),
        ("shipped", 1, "now shipped"),
        ("in_transit", 2, "now in_transit"),
        ("delivered", 3, "now delivered"),
    ]
    assert (row.shipped_at_ms, row.delivered_at_ms) == (start + 1, start + 3)


@pytest.mark.parametrize(("before", "after"), list(pairs(ShipmentStatus, ShipmentStatus)))
async def test_every_pair_of_statuses_is_legal_or_refused(
    shop: Shop, before: ShipmentStatus, after: ShipmentStatus
) -> None:
    await shop.committed(arrange())
    for status in WAY_TO[before]:
        await shop.committed(update(status))
    if before is after:
        assert (await shop.unchanged(update(after)))["status"] == after
    elif (before, after) in LEGAL:
        answer = await shop.committed(update(after))
        assert answer.event_names == ["ShipmentStatusChanged"]
        assert shipment(shop).status is after
    else:
        details = await shop.refused(update(after), "illegal_transition")
        assert details == {"from_status": before, "to_status": after}


def test_the_table_of_transitions_has_a_line_for_each_status() -> None:
    assert {(before.value, after.value) for before, line in TRANSITIONS.items() for after in line} == LEGAL
    assert set(TRANSITIONS) == set(ShipmentStatus)


async def test_a_shipment_nobody_arranged_has_no_status(shop: Shop) -> None:
    await shop.committed(arrange())
    await shop.refused(update(ShipmentStatus.SHIPPED, region="大阪府"), "unknown_shipment")
    await shop.refused(update(ShipmentStatus.SHIPPED, "o2"), "unknown_shipment")


@pytest.mark.parametrize("status", [ShipmentStatus.SHIPPED, ShipmentStatus.CANCELLED])
async def test_an_orders_shipment_is_shipped_and_cancelled_by_the_order_alone(
    shop: Shop, status: ShipmentStatus
) -> None:
    await shop.run(arrange(for_order=True))
    await shop.refused(update(status), "belongs_to_order")
    assert (await shop.run(update(status, for_order=True))).status == "committed"


async def test_the_carrier_moves_an_orders_shipment_on(shop: Shop) -> None:
    await shop.run(arrange(for_order=True))
    await shop.run(update(ShipmentStatus.SHIPPED, for_order=True))
    for status in (ShipmentStatus.IN_TRANSIT, ShipmentStatus.DELIVERED):
        assert (await shop.run(update(status))).status == "committed"


def test_every_region_has_a_service() -> None:
    assert service_for("United Kingdom") is SERVICES["United Kingdom"]
    assert service_for("Atlantis") is DEFAULT_SERVICE


def test_arranging_and_updating_name_the_same_key() -> None:
    command: ArrangeShipment = arrange("o7")
    assert command.routing_key == update(ShipmentStatus.SHIPPED, "o7").routing_key == shipping_key("東京都", "o7")


def test_one_regions_orders_are_spread_over_all_of_its_keys() -> None:
    keys = {shipping_key("France", str(number)) for number in range(1_000)}
    assert keys == {f"France/{number}" for number in range(SPREAD)}


def test_the_address_names_the_region() -> None:
    assert arrange(address=Address(region="France")).routing_key == shipping_key("France", "o1")


@settings(deadline=None)
@given(st.uuids())
def test_a_tracking_number_is_readable_and_comes_from_the_shipment_alone(shipment_id: uuid.UUID) -> None:
    number = tracking_number(str(shipment_id))
    assert is_tracking_number(number)
    assert len(number) == 15
    assert number == tracking_number(str(shipment_id))


@settings(deadline=None)
@given(st.uuids(), st.integers(2, 14), st.sampled_from(ALPHABET))
def test_one_wrong_character_is_found(shipment_id: uuid.UUID, place: int, char: str) -> None:
    number = tracking_number(str(shipment_id))
    wrong = number[:place] + char + number[place + 1 :]
    assert is_tracking_number(wrong) == (wrong == number)


@pytest.mark.parametrize("text", ["", "CC", "CC0000000000000x", "CC000000000000I", "XX0000000000000", "0000000000000"])
def test_what_is_no_tracking_number_is_known_as_such(text: str) -> None:
    assert not is_tracking_number(text)
