"""Which messages there are, and how older versions of them still work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import pytest
from message_samples import as_value, body_of, raw_command, sample, with_header, without_header

from schemas.envelope import DeadLetterError, RawMessage, parse_command
from schemas.message import Command, Event
from schemas.registry import (
    DOMAINS,
    Registry,
    UnknownTypeError,
    UnknownVersionError,
    Upcast,
    default_registry,
)


class Greet(Command):
    """Version 1 had `name`; version 2 `names`; version 3 `people`."""

    domain: ClassVar[str] = "greetings"
    version: ClassVar[int] = 3

    place: str
    people: tuple[str, ...]

    @property
    def routing_key(self) -> str:
        return self.place


class Greeted(Event):
    domain: ClassVar[str] = "greetings"


UPCASTS: Mapping[tuple[str, int], Upcast] = {
    ("Greet", 1): lambda body: {"place": body["place"], "names": [body["name"]]},
    ("Greet", 2): lambda body: {"place": body["place"], "people": body["names"]},
}


def registry(upcasts: Mapping[tuple[str, int], Upcast] = UPCASTS) -> Registry:
    return Registry(commands=[Greet], events=[Greeted], upcasts=upcasts)


def test_every_domain_has_commands_and_events_of_its_own() -> None:
    for domain in DOMAINS:
        messages = (*default_registry().commands_of(domain), *default_registry().events_of(domain))
        assert {message.domain for message in messages} == {domain}
        assert default_registry().commands_of(domain)
        assert default_registry().events_of(domain)


def test_the_commands_of_the_contract_are_there() -> None:
    contract = {
        "inventory": "RegisterProduct RestockProduct WriteOffStock ReserveStock ConfirmReservation CancelReservation "
        "CheckAvailability",
        "payment": "OpenWallet TopUpWallet TakePayment RefundPayment",
        "shipping": "ArrangeShipment UpdateShipmentStatus",
        "orders": "PlaceOrder CancelOrder ReturnGoods ShipOrder CompleteOrder",
    }

    for domain, names in contract.items():
        assert {default_registry().command(name).domain for name in names.split()} == {domain}


def test_an_unknown_name_is_neither_command_nor_event() -> None:
    with pytest.raises(UnknownTypeError):
        default_registry().command("OrderPlaced")
    with pytest.raises(UnknownTypeError):
        default_registry().event("PlaceOrder")


def test_an_old_body_goes_through_every_version_between() -> None:
    body = registry().upcast(Greet, 1, {"place": "Kyoto", "name": "Ai"})

    assert body == {"place": "Kyoto", "people": ["Ai"]}


def test_the_current_version_is_left_as_it_is() -> None:
    body = {"place": "Kyoto", "people": ["Ai"]}

    assert registry().upcast(Greet, 3, body) is body


@pytest.mark.parametrize(
    ("upcasts", "version"),
    [(UPCASTS, 4), (UPCASTS, 0), ({("Greet", 1): UPCASTS["Greet", 1]}, 1), ({("Greet", 2): UPCASTS["Greet", 2]}, 1)],
    ids=["newer", "before the first", "gap after it", "none from it"],
)
def test_a_version_without_a_way_to_the_current_one_is_unknown(
    upcasts: Mapping[tuple[str, int], Upcast], version: int
) -> None:
    with pytest.raises(UnknownVersionError, match=f"Greet/{version}"):
        registry(upcasts).upcast(Greet, version, {"place": "Kyoto", "name": "Ai"})


def test_accepted_versions_are_those_with_a_way() -> None:
    assert registry().accepted_versions(Greet) == (1, 2, 3)
    assert registry({("Greet", 2): UPCASTS["Greet", 2]}).accepted_versions(Greet) == (2, 3)
    assert registry({("Greet", 1): UPCASTS["Greet", 1]}).accepted_versions(Greet) == (3,)


@pytest.mark.parametrize("key", [("Greet", 3), ("Greet", 0), ("Nothing", 1)])
def test_an_upcast_that_leads_nowhere_is_found_at_the_start(key: tuple[str, int]) -> None:
    with pytest.raises(AssertionError, match=key[0]):
        registry({key: dict})


def test_two_messages_of_one_name_are_found_at_the_start() -> None:
    with pytest.raises(AssertionError, match="Greet"):
        Registry(commands=[Greet, Greet], events=[], upcasts={})


# --- RegisterProduct, version 1 ----------------------------------------------------------------------------------


def version_1(**changes: Any) -> RawMessage:
    """RegisterProduct as it was: `price`, not `unit_price`."""
    raw = raw_command("RegisterProduct")
    body = body_of(raw)
    body["price"] = body.pop("unit_price")
    headers = with_header(raw.headers, "ce_dataschema", b"concord:/schemas/inventory/RegisterProduct/1")
    return replace(raw, value=as_value(body | changes), headers=headers)


def test_a_command_of_an_older_version_still_works() -> None:
    parsed = parse_command(version_1(), domain="inventory")

    assert parsed.version == 1
    assert parsed.command == sample("RegisterProduct")


def test_a_command_that_names_no_schema_is_of_version_1() -> None:
    old = version_1()

    parsed = parse_command(replace(old, headers=without_header(old.headers, "ce_dataschema")), domain="inventory")

    assert parsed.command == sample("RegisterProduct")


def test_what_version_1_did_not_know_it_ignores() -> None:
    assert parse_command(version_1(unit_price=1), domain="inventory").command == sample("RegisterProduct")


def test_a_price_that_is_missing_in_version_1_is_missed() -> None:
    old = version_1()
    body = body_of(old)
    del body["price"]

    with pytest.raises(DeadLetterError, match="unit_price: Field required"):
        parse_command(replace(old, value=as_value(body)), domain="inventory")


def test_an_upcast_leaves_the_old_body_alone() -> None:
    model = default_registry().command("RegisterProduct")
    body = {"price": 1, "category": "851"}

    assert default_registry().upcast(model, 1, body) == {"unit_price": 1, "category": "851"}
    assert body == {"price": 1, "category": "851"}


def test_the_current_version_does_not_take_the_old_name() -> None:
    raw = raw_command("RegisterProduct")

    with pytest.raises(DeadLetterError, match="unit_price: Field required"):
        parse_command(replace(raw, value=version_1().value), domain="inventory")
