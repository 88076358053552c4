"""Orders from Kafka to Kafka: every step answered, told in events, found again by the command line."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.end_to_end.harness import Sent, System, order, product, wallet

pytestmark = pytest.mark.system

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


async def prepared(system: System, name: str) -> tuple[str, str]:
    """A category with two products and a customer with money, of this test alone."""
    category, customer = f"{name}-goods", f"{name}-customer"
    await system.committed(product(category, "tea"), product(category, "cup", quantity=20), wallet(customer))
    return category, customer


def event_types(answer: dict[str, Any]) -> list[str]:
    return sorted(event["type"] for event in answer["events"])


async def test_an_order_is_placed_in_four_domains_and_answered_on_the_results_topic(system: System) -> None:
    category, customer = await prepared(system, "placed")
    command = order(customer, "P-1", (category, "tea", 3, 250), (category, "cup", 1, 900), (category, "tea", 1, 200))

    [answer] = await system.send(command)

    assert answer["status"] == "committed"
    assert answer["result"]["total"] == 3 * 250 + 900 + 200
    assert event_types(answer) == ["OrderPlaced", "PaymentTaken", "ShipmentArranged", "StockReserved"]
    assert {event["domain"] for event in answer["events"]} == {"orders", "payment", "shipping", "inventory"}
    stock = {row["product_id"]: row for row in (await dumped(system, "inventory.products", category))}
    assert (stock["tea"]["reserved"], stock["cup"]["reserved"]) == (4, 1)
    [purse] = await dumped(system, "payment.wallets", customer)
    assert purse["balance"] == 1_000_000 - answer["result"]["total"]
    [placed] = await dumped(system, "orders.orders", customer)
    assert (placed["order_id"], placed["status"]) == ("P-1", "placed")
    shipments = await dumped(system, "shipping.shipments")
    assert [row["order_id"] for row in shipments if row["customer_id"] == customer] == ["P-1"]


async def test_events_and_answers_carry_the_headers_of_cloud_events_and_the_command_as_their_cause(
    system: System,
) -> None:
    category, customer = await prepared(system, "headers")
    command = Sent(**{**vars(order(customer, "H-1", (category, "tea", 1, 250))), "traceparent": TRACE})

    [answer] = await system.send(command)

    await system.witness.catch_up()
    published = [
        message
        for domain in ("orders", "payment", "shipping", "inventory")
        for message in (*system.witness.history.events(domain), *system.witness.history.results(domain))
        if message.header("ce_causationid") == command.id
    ]
    assert len(published) == 5
    for message in published:
        names = [name for name, _ in message.headers]
        assert len(names) == len(set(names))
        assert message.header("ce_specversion") == "1.0"
        assert message.header("ce_correlationid") == command.id
        assert message.header("ce_txid") == answer["tx_id"]
        assert message.header("content-type") == "application/json"
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", message.header("ce_time") or "")
        assert (message.header("ce_dataschema") or "").startswith("concord:/schemas/")
        assert (message.header("ce_source") or "").startswith("concord:/domains/")
        assert re.fullmatch(r"00-4bf92f3577b34da6a3ce929d0e0e4736-[0-9a-f]{16}-01", message.header("traceparent") or "")


async def test_an_order_is_shipped_completed_and_partly_returned(system: System) -> None:
    category, customer = await prepared(system, "whole-life")
    whole = {"customer_id": customer, "order_id": "W-1"}
    line = {"category": category, "product_id": "tea", "quantity": 2, "unit_price": 250}
    returned = {"customer_id": customer, "return_id": "R-1", "order_id": "W-1", "lines": [line], "currency": "GBP"}

    answers = await system.send(
        order(customer, "W-1", (category, "tea", 5, 250)),
        Sent("ShipOrder", whole),
        Sent("CompleteOrder", whole),
        Sent("ReturnGoods", returned),
    )

    assert [answer["status"] for answer in answers] == ["committed"] * 4
    assert [event_types(answer) for answer in answers[1:]] == [
        ["OrderShipped", "ReservationConfirmed", "ShipmentStatusChanged"],
        ["OrderCompleted", "ShipmentStatusChanged"],
        ["GoodsReturned", "OrderReturned", "PaymentRefunded", "ProductRestocked"],
    ]
    stock = {row["product_id"]: row for row in (await dumped(system, "inventory.products", category))}
    assert (stock["tea"]["quantity"], stock["tea"]["reserved"]) == (1_000 - 5 + 2, 0)
    [purse] = await dumped(system, "payment.wallets", customer)
    assert purse["balance"] == 1_000_000 - 5 * 250 + 2 * 250


async def test_a_cancelled_order_leaves_stock_and_wallet_as_they_were(system: System) -> None:
    category, customer = await prepared(system, "cancelled")

    placed, cancelled, again = await system.send(
        order(customer, "C-1", (category, "tea", 5, 250), (category, "cup", 2, 900)),
        Sent("CancelOrder", {"customer_id": customer, "order_id": "C-1", "reason": "changed my mind"}),
        Sent("ShipOrder", {"customer_id": customer, "order_id": "C-1"}),
    )

    assert (placed["status"], cancelled["status"]) == ("committed", "committed")
    assert (again["status"], again["reason"]) == ("refused", "illegal_transition")
    for row in await dumped(system, "inventory.products", category):
        assert row["reserved"] == 0
    [purse] = await dumped(system, "payment.wallets", customer)
    assert purse["balance"] == 1_000_000


async def test_a_refused_order_leaves_no_trace_but_its_answer(system: System) -> None:
    category, customer = await prepared(system, "refused")
    too_much = order(customer, "NOT-TO-BE-SEEN-1", (category, "tea", 1, 250), (category, "cup", 21, 900))
    too_dear = order(customer, "NOT-TO-BE-SEEN-2", (category, "tea", 1, 10**7))

    answers = await system.send(too_much, too_dear)

    assert [(answer["status"], answer["reason"]) for answer in answers] == [
        ("refused", "out_of_stock"),
        ("refused", "insufficient_funds"),
    ]
    assert answers[0]["events"] == answers[1]["events"] == []
    await system.witness.catch_up()
    for topic, messages in system.witness.history.messages.items():
        if topic.endswith(".events"):
            assert not any(b"NOT-TO-BE-SEEN" in (message.value or b"") for message in messages), topic
    for table in ("inventory.reservations", "payment.payments", "shipping.shipments", "orders.orders"):
        assert not any("NOT-TO-BE-SEEN" in str(row) for row in await dumped(system, table)), table
    for row in await dumped(system, "inventory.products", category):
        assert row["reserved"] == 0


async def test_status_finds_an_answer_with_and_without_its_key_within_the_tables_alone(system: System) -> None:
    category, customer = await prepared(system, "status")
    good = order(customer, "S-1", (category, "tea", 1, 250))
    bad = order(customer, "S-2", (category, "cup", 1_000, 250))
    [committed, refused] = await system.send(good, bad)

    with_key = await system.concord("status", good.id, "--key", customer)
    without_key = await system.concord("status", good.id)
    of_refused = await system.concord("status", bad.id)
    of_nobody = await system.concord("status", "nobody-sent-this")

    assert (with_key.code, without_key.code, of_refused.code, of_nobody.code) == (0, 0, 3, 5)
    assert with_key.lines == without_key.lines
    [told] = with_key.lines
    assert (told["status"], told["type"], told["key"]) == ("committed", "PlaceOrder", customer)
    assert told["result"] == committed["result"]
    assert told["tx_id"] == committed["tx_id"]
    assert told["events"] == [event["id"] for event in committed["events"]]
    [told] = of_refused.lines
    assert (told["status"], told["reason"], told["events"]) == ("refused", refused["reason"], [])
    assert of_nobody.lines[0]["status"] == "unknown"


async def test_send_publishes_many_commands_and_its_exit_code_is_the_worst_of_their_outcomes(system: System) -> None:
    category, customer = await prepared(system, "many")
    commands = [
        order(customer, "M-1", (category, "tea", 1, 250)),
        order(customer, "M-2", (category, "cup", 99, 250)),
    ]
    lines = [{"type": each.type, "key": each.key.decode(), "id": each.id, "body": each.body} for each in commands]
    told = await system.concord("send", "--ndjson", "-", stdin="\n".join(map(json_line, lines)).encode())

    assert [line["status"] for line in told.lines] == ["committed", "refused"]
    assert [line["id"] for line in told.lines] == [command.id for command in commands]
    assert told.code == 3


async def test_history_shows_a_customers_orders_as_their_events_told_them(system: System) -> None:
    category, customer = await prepared(system, "history")
    await system.committed(
        order(customer, "Y-1", (category, "tea", 1, 250)),
        order(customer, "Y-2", (category, "cup", 2, 900)),
        Sent("CancelOrder", {"customer_id": customer, "order_id": "Y-1"}),
    )
    await system.check()

    told = await system.concord("history", customer)

    assert told.code == 0
    assert [
        (row["order_id"], row["status"], row["total"]) for row in sorted(told.lines, key=lambda r: r["order_id"])
    ] == [
        ("Y-1", "cancelled", 250),
        ("Y-2", "placed", 1_800),
    ]


async def test_tail_shows_exactly_the_messages_that_were_asked_for(system: System) -> None:
    category, customer = await prepared(system, "tail")
    command = order(customer, "T-1", (category, "tea", 1, 250))
    await system.committed(command)

    by_id = await system.concord("tail", "orders.results", "orders.events", "--until-end", "--id", command.id)
    by_type = await system.concord("tail", "orders.events", "--until-end", "--type", "OrderPlaced", "--key", customer)
    headers = await system.concord("tail", "orders.commands", "--until-end", "--key", customer, "--headers-only")

    assert sorted(message["topic"] for message in by_id.lines) == ["orders.events", "orders.results"]
    [placed] = by_type.lines
    assert (placed["key"], placed["value"]["order"]["order_id"]) == (customer, "T-1")
    [published] = headers.lines
    assert "value" not in published
    assert published["headers"]["ce_id"] == command.id


async def test_the_system_says_what_it_is_made_of(system: System) -> None:
    topics = await system.concord("topics")
    tables = await system.concord("table", "list")
    doctor = await system.concord("doctor")
    checked = await system.concord("check")

    assert {line["topic"] for line in topics.lines} >= {"orders.commands", "orders.commands.dlq", "shipping.events"}
    assert not [line["topic"] for line in topics.lines if line["drift"]]
    assert {line["table"] for line in tables.lines} >= {"inventory.products", "payment.wallets", "orders.outcomes"}
    assert (topics.code, tables.code, doctor.code, checked.code) == (0, 0, 0, 0), (doctor, checked)
    ready = system.running.readiness()
    assert ready["ready"]
    assert {"orders-0", "inventory-0", "payment-0", "shipping-0", "coordinator-0"} <= ready["actors"].keys()


async def dumped(system: System, table: str, key: str | None = None) -> list[dict[str, Any]]:
    """What `concord table dump` prints."""
    told = await system.concord("table", "dump", table, *(("--key", key) if key else ()))
    assert told.code == 0, told.stderr
    return list(told.lines)


def json_line(value: Any) -> str:
    import json

    return json.dumps(value)
