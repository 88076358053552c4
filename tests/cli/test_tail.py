"""How a message is shown, whatever is in it, and which are shown."""

from __future__ import annotations

import json

import pytest

from infra.messaging.reader import Record
from scripts.cli.output import to_json
from scripts.cli.tail_command import Wanted, as_json, for_people


def record(value: bytes | None = b'{"a": 1}', *headers: tuple[str, bytes], key: bytes | None = b"k") -> Record:
    return Record("orders.events", 1, 2, 3, key, value, headers or (("ce_id", b"i"), ("ce_type", b"T")))


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (b'{"a": 1}', {"value": {"a": 1}}),
        (b"not json", {"value_text": "not json"}),
        (b"\x80\x04pickle", {"value_base64": "gARwaWNrbGU="}),
        (None, {"value": None}),
        (b"[" * 100_000, {"value_text": "[" * 100_000}),
    ],
)
def test_any_value_is_shown_as_what_it_is(value: bytes | None, shown: dict[str, object]) -> None:
    message = as_json(record(value), with_value=True)

    assert {name: found for name, found in message.items() if name.startswith("value")} == shown
    assert json.loads(to_json(message))["offset"] == 2


def test_headers_only_leaves_the_value_out() -> None:
    message = as_json(record(), with_value=False)

    assert not [name for name in message if name.startswith("value")]


def test_a_header_that_occurs_twice_is_shown_twice_and_bad_bytes_escaped() -> None:
    message = as_json(record(None, ("h", b"1"), ("h", b"\xff"), ("h", b"3"), key=None), with_value=True)

    assert message["headers"] == {"h": ["1", "\\xff", "3"]}
    assert message["key"] is None
    assert for_people(message).startswith("orders.events[1]@2")


@pytest.mark.parametrize(
    ("wanted", "admitted"),
    [
        (Wanted(), True),
        (Wanted(key="k"), True),
        (Wanted(key="other"), False),
        (Wanted(type="T"), True),
        (Wanted(type="U"), False),
        (Wanted(id="i"), True),
        (Wanted(id="cause"), True),
        (Wanted(id="other"), False),
        (Wanted(key="k", type="U"), False),
    ],
)
def test_only_what_is_wanted_is_shown(wanted: Wanted, admitted: bool) -> None:
    message = as_json(record(None, ("ce_id", b"i"), ("ce_type", b"T"), ("ce_causationid", b"cause")), with_value=True)

    assert wanted.admits(message) is admitted


def test_text_that_is_no_unicode_still_makes_a_line() -> None:
    assert json.loads(to_json({"key": "\ud800"})) == {"key": "\ud800"}
