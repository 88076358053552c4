"""JSON from strangers: bytes become a dict or one declared error, in bounded time and memory.

The grammar is I-JSON (RFC 7493) made stricter: UTF-8 without a byte order mark, an object at the top, no repeated
names, no lone surrogates or NUL in any string, integers within signed 64 bits, finite numbers, at most 64 levels, at
most 5,000 items in one array. Each of these is refused here because somewhere behind it would mean something else: a
repeated name is read differently by different parsers, a lone surrogate cannot be written back, NUL ends the text in
some stores; and a model complains of every item of an array, so a megabyte of `{},` would become gigabytes of errors.

Depth is measured on the bytes, before anything recursive sees them, so nesting can exhaust no stack.
Never here: pickle or any other format that can name code.
"""

from __future__ import annotations

import json
import math
import re
from enum import StrEnum
from typing import Any, NoReturn

MAX_VALUE_BYTES = 1 << 20
"""The default limit of a command's value: 1 MiB."""

MAX_DEPTH = 64
"""How many objects and arrays may lie within each other."""

MAX_ITEMS = 5_000
"""How many items one array may have."""

MAX_NUMBER_CHARS = 400
"""Longest spelling of a number: any double can be written exactly enough in far fewer."""

INT64_MIN = -(1 << 63)
INT64_MAX = (1 << 63) - 1


class DecodingReason(StrEnum):
    """Why bytes were not taken. The words are stable: programs and dead letters carry them."""

    EMPTY = "empty"
    TOO_LARGE = "too_large"
    BYTE_ORDER_MARK = "byte_order_mark"
    NOT_UTF8 = "not_utf8"
    MALFORMED = "malformed"
    NOT_A_NUMBER = "not_a_number"
    NUMBER_OUT_OF_RANGE = "number_out_of_range"
    NUMBER_TOO_LONG = "number_too_long"
    NOT_AN_OBJECT = "not_an_object"
    REPEATED_NAME = "repeated_name"
    LONE_SURROGATE = "lone_surrogate"
    NUL_CHARACTER = "nul_character"
    TOO_DEEP = "too_deep"
    TOO_MANY_ITEMS = "too_many_items"


class DecodingError(ValueError):
    """The bytes are not a JSON object as this module takes it. `reason` is for programs, `detail` for a person."""

    def __init__(self, reason: DecodingReason, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else str(self.reason)


# A string runs to its closing quote, or to the end of the text when there is none: the optional quote and the
# possessive repeats keep the search linear whatever the bytes are.
_STRING_OR_BRACKET = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)
_OPENING = (0x5B, 0x7B)
_QUOTE = 0x22
_SUSPICIOUS_ESCAPE = re.compile(rb"\\u(?:[dD][89a-fA-F]|0000)")
_BYTE_ORDER_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")


def decode_json(data: bytes, *, max_bytes: int = MAX_VALUE_BYTES) -> dict[str, Any]:
    """The JSON object in `data`. Raises DecodingError and nothing else.

    Takes time linear in the length of `data`, and memory of at most some thirty times its length.
    """
    if len(data) > max_bytes:
        raise DecodingError(DecodingReason.TOO_LARGE, f"{len(data)} bytes, at most {max_bytes} are taken")
    if not data:
        raise DecodingError(DecodingReason.EMPTY)
    if data.startswith(_BYTE_ORDER_MARKS):
        raise DecodingError(DecodingReason.BYTE_ORDER_MARK)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DecodingError(DecodingReason.NOT_UTF8, f"at byte {error.start}") from None
    _check_depth(data)
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise DecodingError(DecodingReason.MALFORMED, f"{error.msg} at character {error.pos}") from None
    if not isinstance(value, dict):
        raise DecodingError(DecodingReason.NOT_AN_OBJECT, f"the top level is {_KINDS[type(value)]}")
    if data.count(b",") >= MAX_ITEMS:
        _check_lengths(value)
    if _SUSPICIOUS_ESCAPE.search(data):
        _check_strings(value)
    return value


def _check_depth(data: bytes) -> None:
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(data):
        first = data[match.start()]
        if first in _OPENING:
            depth += 1
            if depth > MAX_DEPTH:
                raise DecodingError(DecodingReason.TOO_DEEP, f"more than {MAX_DEPTH} levels")
        elif first != _QUOTE:
            depth -= 1


def _check_lengths(value: Any) -> None:
    """Refuse long arrays. Only called when there are commas enough for one."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting.extend(item.values())
        elif isinstance(item, list):
            if len(item) > MAX_ITEMS:
                raise DecodingError(DecodingReason.TOO_MANY_ITEMS, f"an array of {len(item)}, at most {MAX_ITEMS}")
            waiting.extend(item)


def _check_strings(value: Any) -> None:
    """Refuse lone surrogates and NUL. Only called when an escape in the bytes can have made one."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            if "\0" in item:
                raise DecodingError(DecodingReason.NUL_CHARACTER)
            try:
                item.encode("utf-8")
            except UnicodeEncodeError:
                raise DecodingError(DecodingReason.LONE_SURROGATE) from None
        elif isinstance(item, dict):
            waiting.extend(item)
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)


def _integer(text: str) -> int:
    # The length comes first: converting a long run of digits is quadratic. 64 bits need 19 digits and a sign.
    if len(text) > 20 or not INT64_MIN <= (value := int(text)) <= INT64_MAX:
        raise DecodingError(DecodingReason.NUMBER_OUT_OF_RANGE, "an integer beyond signed 64 bits")
    return value


def _float(text: str) -> float:
    if len(text) > MAX_NUMBER_CHARS:
        raise DecodingError(DecodingReason.NUMBER_TOO_LONG, f"a number of {len(text)} characters")
    value = float(text)
    if not math.isfinite(value):
        raise DecodingError(DecodingReason.NUMBER_OUT_OF_RANGE, "a number beyond the range of a double")
    return value


def _constant(name: str) -> NoReturn:
    raise DecodingError(DecodingReason.NOT_A_NUMBER, f"{name} is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise DecodingError(DecodingReason.REPEATED_NAME, "a name occurs twice in one object")
    return value


_DECODER = json.JSONDecoder(
    parse_int=_integer, parse_float=_float, parse_constant=_constant, object_pairs_hook=_object, strict=True
)

_KINDS = {list: "an array", str: "a string", int: "a number", float: "a number", bool: "a boolean", type(None): "null"}
