"""What nobody should send: each ends as a dead letter or a refusal with a reason, and the next message is served.

One row of BAD_INPUT is one message. Behind each, on the same partition, goes a good command; it must be committed.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from scripts.proof.judge import Seen
from tests.end_to_end.harness import Sent, System, order, product, wallet

pytestmark = pytest.mark.system

CATEGORY = "bad-goods"
CUSTOMER = "bad-customer"
MEBIBYTE = 2**20


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def shop(system: System) -> System:
    await system.committed(product(CATEGORY, "tea", quantity=100_000), wallet(CUSTOMER))
    return system


@dataclass(frozen=True)
class Raw:
    """A message as its sender got it wrong. None leaves a part, or a header, out."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...]


def good_order(order_id: str = "bad-1") -> Sent:
    return order(CUSTOMER, order_id, (CATEGORY, "tea", 1, 250))


def raw(command: Sent, **changed: Any) -> Raw:
    parts = {"topic": command.topic, "key": command.key, "value": command.value, "headers": command.headers}
    parts |= changed
    return Raw(**{**parts, "headers": tuple(parts["headers"].items())})


def valued(value: bytes) -> Raw:
    """A PlaceOrder with these bytes as its body."""
    return raw(good_order(), value=value)


def edited(**fields: Any) -> Raw:
    """A PlaceOrder with other fields in its body."""
    return valued(json.dumps({**good_order().body, **fields}).encode())


def lined(**fields: Any) -> Raw:
    """A PlaceOrder with other fields in its one line."""
    body = good_order().body
    return edited(lines=[{**body["lines"][0], **fields}])


def headed(**changed: bytes | None) -> Raw:
    """A PlaceOrder with other headers (`content__type` for `content-type`)."""
    command = good_order()
    headers = dict(command.headers)
    for name, value in changed.items():
        headers.pop(name.replace("__", "-"))
        if value is not None:
            headers[name.replace("__", "-")] = value
    return raw(command, headers=headers)


def repeated(name: str, value: bytes) -> Raw:
    made = raw(good_order())
    return Raw(made.topic, made.key, made.value, (*made.headers, (name, value)))


def sent(type: str, body: Mapping[str, Any]) -> Raw:
    return raw(Sent(type, body))


PLACED = json.dumps(good_order().body).encode()
NOT_JSON = PLACED[:-1]
LINE = json.dumps(good_order().body["lines"][0])
PAYLOAD_MARKER = "a-pickle-was-executed"


class Bomb:
    """Unpickled, it would make a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


DEAD = "dead-lettered"
REFUSED = "refused"

BAD_INPUT: dict[str, tuple[Callable[[], Raw], str, str]] = {
    # --- bytes
    "not JSON": (lambda: valued(NOT_JSON), DEAD, "not_json"),
    "an empty value": (lambda: valued(b""), DEAD, "not_json"),
    "no value": (lambda: raw(good_order(), value=None), DEAD, "not_json"),
    "not UTF-8": (lambda: valued(PLACED.replace(b"bad-1", b"bad-\xff")), DEAD, "not_json"),
    "NaN": (lambda: valued(PLACED.replace(b'"quantity": 1', b'"quantity": NaN')), DEAD, "not_json"),
    "2 to the 63rd": (lambda: lined(quantity=2**63), DEAD, "wrong_shape"),
    "a lone surrogate": (lambda: valued(PLACED.replace(b"bad-1", rb"\ud800")), DEAD, "wrong_shape"),
    "a name twice": (lambda: valued(PLACED[:-1] + b', "currency": "USD"}'), DEAD, "wrong_shape"),
    "10,000 levels": (lambda: valued(b'{"a":' * 10_000 + b"1" + b"}" * 10_000), DEAD, "wrong_shape"),
    "more than 1 MiB": (lambda: edited(note="x" * MEBIBYTE), DEAD, "too_large"),
    # --- shape
    "an array": (lambda: valued(b"[1, 2, 3]"), DEAD, "wrong_shape"),
    "a field that is missing": (lambda: valued(b'{"customer_id": "bad-customer"}'), DEAD, "wrong_shape"),
    "a text for a number": (lambda: lined(quantity="3"), DEAD, "wrong_shape"),
    "a negative quantity": (lambda: lined(quantity=-3), DEAD, "wrong_shape"),
    "a quantity of zero": (lambda: lined(quantity=0), DEAD, "wrong_shape"),
    "a negative price": (lambda: lined(unit_price=-1), DEAD, "wrong_shape"),
    "no lines": (lambda: edited(lines=[]), DEAD, "wrong_shape"),
    # --- headers
    "an unknown type": (lambda: headed(ce_type=b"PlaceBet", ce_dataschema=b"x:/PlaceBet/1"), DEAD, "unknown_type"),
    "a type of another domain": (lambda: raw(wallet(CUSTOMER), topic="orders.commands"), DEAD, "unknown_type"),
    "an unknown version": (
        lambda: headed(ce_dataschema=b"concord:/schemas/orders/PlaceOrder/9"),
        DEAD,
        "unknown_version",
    ),
    "no headers": (lambda: raw(good_order(), headers={}), DEAD, "bad_headers"),
    "no id": (lambda: headed(ce_id=None), DEAD, "bad_headers"),
    "no type": (lambda: headed(ce_type=None), DEAD, "bad_headers"),
    "an id that is not UTF-8": (lambda: headed(ce_id=b"\xff\xfe"), DEAD, "bad_headers"),
    "an id too long": (lambda: headed(ce_id=b"x" * 500), DEAD, "bad_headers"),
    "two ids": (lambda: repeated("ce_id", b"another"), DEAD, "bad_headers"),
    "another specversion": (lambda: headed(ce_specversion=b"0.3"), DEAD, "bad_headers"),
    "another content type": (lambda: headed(content__type=b"application/x-python-pickle"), DEAD, "bad_headers"),
    # --- key
    "no key": (lambda: raw(good_order(), key=None), DEAD, "missing_key"),
    "another key": (lambda: raw(good_order(), key=b"somebody-else"), DEAD, "key_mismatch"),
    # --- what the domains do not know
    "an unknown product": (lambda: lined(product_id="nothing"), REFUSED, "unknown_product"),
    "an unknown wallet": (
        lambda: raw(order("bad-nobody", "bad-2", (CATEGORY, "tea", 1, 250))),
        REFUSED,
        "unknown_wallet",
    ),
    "an unknown order": (
        lambda: sent("ShipOrder", {"customer_id": CUSTOMER, "order_id": "bad-never-placed"}),
        REFUSED,
        "unknown_order",
    ),
    "more than there is": (lambda: lined(quantity=10**9), REFUSED, "out_of_stock"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
async def test_it_is_answered_with_a_reason_and_the_next_message_is_served(shop: System, name: str) -> None:
    make, status, reason = BAD_INPUT[name]
    bad = make()
    next_one = good_order(f"after {name}")

    place = await shop.publish(bad.topic, bad.key, bad.value, bad.headers)
    [served] = await shop.send(next_one)

    answer = await answer_to(shop, bad, place)
    assert (answer["status"], answer["reason"]) == (status, reason), answer
    assert answer["events"] == []
    assert served["status"] == "committed"
    if status == DEAD:
        letter = await dead_letter_of(shop, bad.topic, answer["id"])
        assert (letter.key, letter.value) == (bad.key, bad.value)
        assert letter.headers[: len(bad.headers)] == bad.headers
        assert letter.last_header("dlq-reason") == reason


async def test_a_message_without_a_key_and_one_with_another_do_not_stop_any_partition(shop: System) -> None:
    for number in range(8):
        bad = raw(good_order(f"unkeyed-{number}"), key=None)
        await shop.publish(bad.topic, bad.key, bad.value, bad.headers)

    customers = [f"bad-{letter}" for letter in "abcdefghijklmnopqrst"]  # enough to meet every partition
    await shop.committed(*map(wallet, customers))
    await shop.committed(*(order(who, f"after-{who}", (CATEGORY, "tea", 1, 250)) for who in customers))
    await shop.witness.catch_up()
    asked = shop.witness.history.commands("orders")
    assert {message.partition for message in asked if (message.key or b"").decode() in customers} == {0, 1, 2, 3}


async def test_a_pickle_is_a_dead_letter_and_is_never_executed(shop: System, tmp_path: Path) -> None:
    file = tmp_path / PAYLOAD_MARKER
    bomb = pickle.dumps(Bomb(file))

    for bad in (valued(bomb), raw(good_order(), key=bomb), headed(ce_source=bomb)):
        place = await shop.publish(bad.topic, bad.key, bad.value, bad.headers)
        answer = await answer_to(shop, bad, place)
        assert answer["status"] == DEAD
        letter = await dead_letter_of(shop, bad.topic, answer["id"])
        assert letter.value == bad.value

    assert not file.exists()
    assert pickle.loads(bomb) is None  # the bomb is a real one
    assert file.exists()


async def test_the_same_id_with_another_payload_is_a_conflict_and_changes_nothing(shop: System) -> None:
    first = order(CUSTOMER, "conflict-1", (CATEGORY, "tea", 1, 250))
    other = Sent(first.type, order(CUSTOMER, "conflict-2", (CATEGORY, "tea", 5, 250)).body, id=first.id)

    [answer] = await shop.send(first)
    await shop.publish_all(other, first)
    await shop.committed(good_order("after the conflict"))

    told = shop.witness.answers(first.id)
    assert [each["status"] for each in told] == ["committed", "refused", "committed"]
    assert told[1]["reason"] == "id_conflict"
    assert told[0] == told[2] == answer
    status = await shop.concord("status", first.id, "--key", CUSTOMER)
    assert status.lines[0]["result"] == answer["result"]
    orders = await shop.concord("table", "dump", "orders.orders", "--key", CUSTOMER)
    assert "conflict-1" in orders.stdout
    assert "conflict-2" not in orders.stdout


async def test_a_dead_lettered_command_is_found_by_status(shop: System) -> None:
    bad = valued(NOT_JSON)
    place = await shop.publish(bad.topic, bad.key, bad.value, bad.headers)
    answer = await answer_to(shop, bad, place)

    told = await shop.concord("status", answer["id"])

    assert told.code == 4
    assert (told.lines[0]["status"], told.lines[0]["reason"]) == (DEAD, "not_json")


async def test_many_messages_beyond_the_limit_do_not_fill_the_workers_memory(shop: System) -> None:
    before = memory_by_role(shop)
    big = edited(note="x" * (3 * MEBIBYTE))

    ids = []
    for number in range(24):
        headers = tuple((n, f"big-{number}".encode() if n == "ce_id" else v) for n, v in big.headers)
        await shop.publish(big.topic, big.key, big.value, headers)
        ids.append(f"big-{number}")
    answers = await shop.answers(*ids)

    assert {(answer["status"], answer["reason"]) for answer in answers} == {(DEAD, "too_large")}
    after = memory_by_role(shop)
    # 72 MiB went through. What may be in flight at once is bounded, so the growth is far below what was sent.
    assert after["worker-0"] - before["worker-0"] < 64 * MEBIBYTE
    for actor in ("orders-0", "orders-1"):
        assert after[actor] - before[actor] < 16 * MEBIBYTE


async def test_after_all_of_it_the_system_is_as_it_should_be(shop: System) -> None:
    await shop.check()


def memory_by_role(system: System) -> dict[str, int]:
    return {process.role: process.rss_bytes for process in system.running.processes()}


async def answer_to(system: System, bad: Raw, place: str) -> dict[str, Any]:
    """The answer to a message, under its own id or under its place in the log."""
    own = [value.decode("utf-8", "replace") for name, value in bad.headers if name == "ce_id"]
    wanted = [place, *own]
    await system.witness.until(
        lambda _: any(system.witness.answers(id) for id in wanted), timeout_s=60, what=f"an answer to {wanted}"
    )
    return next(answers[0] for id in wanted if (answers := system.witness.answers(id)))


async def dead_letter_of(system: System, topic: str, id: str) -> Seen:
    def found() -> list[Seen]:
        letters = system.witness.history.messages[f"{topic}.dlq"]
        return [letter for letter in letters if letter.last_header("dlq-command-id") == id]

    await system.witness.until(lambda _: bool(found()), timeout_s=60, what=f"the dead letter {id}")
    return found()[0]
