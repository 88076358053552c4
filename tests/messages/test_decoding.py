"""What strangers may send as JSON, and what they may not."""

from __future__ import annotations

import json
import pickle
import tracemalloc

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from schemas.decoding import INT64_MAX, INT64_MIN, MAX_DEPTH, MAX_ITEMS, MAX_VALUE_BYTES, DecodingError, decode_json

MIB = 1 << 20


def nested(levels: int) -> bytes:
    """An object with arrays in it, `levels` deep in all."""
    return b'{"a":' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}"


REFUSED = {
    "nothing": (b"", "empty"),
    "only spaces": (b"   ", "malformed"),
    "text": (b"hello", "malformed"),
    "half an object": (b'{"a":1', "malformed"),
    "two objects": (b'{"a":1}{"b":2}', "malformed"),
    "a trailing comma": (b'{"a":1,}', "malformed"),
    "single quotes": (b"{'a':1}", "malformed"),
    "a raw line feed in a string": (b'{"a":"\n"}', "malformed"),
    "a raw NUL": (b'{"a":"\x00"}', "malformed"),
    "NUL bytes": (b"\x00\x00\x00\x00", "malformed"),
    "NaN": (b'{"a":NaN}', "not_a_number"),
    "Infinity": (b'{"a":Infinity}', "not_a_number"),
    "minus Infinity": (b'{"a":[-Infinity]}', "not_a_number"),
    "2**63": (b'{"a":9223372036854775808}', "number_out_of_range"),
    "-2**63-1": (b'{"a":-9223372036854775809}', "number_out_of_range"),
    "a million digits": (b'{"a":' + b"9" * 1_000_000 + b"}", "number_out_of_range"),
    "1e999": (b'{"a":1e999}', "number_out_of_range"),
    "-1e999": (b'{"a":-1e999}', "number_out_of_range"),
    "a fraction of a million digits": (b'{"a":0.' + b"1" * 1_000_000 + b"}", "number_too_long"),
    "the same name twice": (b'{"a":1,"a":1}', "repeated_name"),
    "the same name twice, spelled differently": (b'{"a":1,"\\u0061":2}', "repeated_name"),
    "the same name twice, within": (b'{"b":[{"a":1,"a":1}]}', "repeated_name"),
    "a lone high surrogate": (b'{"a":"\\ud800"}', "lone_surrogate"),
    "a lone low surrogate": (b'{"a":["\\udfff"]}', "lone_surrogate"),
    "surrogates in the wrong order": (b'{"a":"\\udc00\\ud800"}', "lone_surrogate"),
    "a lone surrogate in a name": (b'{"\\uD800":1}', "lone_surrogate"),
    "a lone surrogate in a name within": (b'{"b":{"\\uD8aa":{}}}', "lone_surrogate"),
    "a surrogate as bytes": (b'{"a":"\xed\xa0\x80"}', "not_utf8"),
    "an escaped NUL": (b'{"a":"\\u0000"}', "nul_character"),
    "an escaped NUL in a name": (b'{"\\u0000":1}', "nul_character"),
    "an array": (b"[1]", "not_an_object"),
    "a string": (b'"a"', "not_an_object"),
    "a number": (b"1", "not_an_object"),
    "true": (b"true", "not_an_object"),
    "null": (b"null", "not_an_object"),
    "one level too deep": (nested(MAX_DEPTH + 1), "too_deep"),
    "10,000 arrays deep": (nested(10_000), "too_deep"),
    "10,000 objects deep": (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "too_deep"),
    "a megabyte of opening brackets": (b"[" * MIB, "too_deep"),
    "a megabyte of escaped quotes": (b"[" * 65 + b'"' + b'\\"' * (MIB // 2 - 50), "too_deep"),
    "one item too many": (b'{"a":[' + b"1," * MAX_ITEMS + b"1]}", "too_many_items"),
    "not UTF-8": (b'{"a":"\xff"}', "not_utf8"),
    "overlong UTF-8": (b'{"a":"\xc0\x80"}', "not_utf8"),
    "UTF-8 with a byte order mark": (b'\xef\xbb\xbf{"a":1}', "byte_order_mark"),
    "UTF-16": ('{"a":1}'.encode("utf-16"), "byte_order_mark"),
    "UTF-16 without a mark": ('{"a":1}'.encode("utf-16-le"), "malformed"),
    "a pickle": (pickle.dumps({"a": 1}), "not_utf8"),
    "a pickle in ASCII": (pickle.dumps({"a": 1}, protocol=0), "malformed"),
    "a byte more than allowed": (b" " * (MAX_VALUE_BYTES - 1) + b"{}", "too_large"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_taken_is_refused_with_its_reason(name: str) -> None:
    data, reason = REFUSED[name]

    with pytest.raises(DecodingError) as refused:
        decode_json(data)

    assert refused.value.reason == reason


TAKEN = {
    "an empty object": (b"{}", {}),
    "spaces around": (b' \r\n\t{"a" : 1} ', {"a": 1}),
    "the largest integer": (b'{"a":9223372036854775807}', {"a": INT64_MAX}),
    "the smallest integer": (b'{"a":-9223372036854775808}', {"a": INT64_MIN}),
    "a fraction": (b'{"a":1.5e3}', {"a": 1500.0}),
    "next to nothing": (b'{"a":1e-999}', {"a": 0.0}),
    "a surrogate pair": (b'{"a":"\\ud83d\\ude00"}', {"a": "😀"}),
    "what only looks like a surrogate": (b'{"a":"\\\\ud800"}', {"a": "\\ud800"}),
    "what only looks like NUL": (b'{"a":"\\\\u0000"}', {"a": "\\u0000"}),
    "names that differ in case": (b'{"a":1,"A":2}', {"a": 1, "A": 2}),
    "one name in two objects": (b'{"a":{"a":{"a":1}}}', {"a": {"a": {"a": 1}}}),
    "brackets in strings": (b'{"a":"' + b"[{" * 100 + b'"}', {"a": "[{" * 100}),
    "brackets after an escaped quote": (b'{"a":"\\"' + b"[" * 100 + b'\\\\"}', {"a": '"' + "[" * 100 + "\\"}),
    "many brackets side by side": (b'{"a":[' + b"[]," * 99 + b"[]]}", {"a": [[]] * 100}),
    "commas in a string": (b'{"a":"' + b"," * MAX_ITEMS + b'"}', {"a": "," * MAX_ITEMS}),
    "as many items as allowed": (b'{"a":[' + b"1," * (MAX_ITEMS - 1) + b"1]}", {"a": [1] * MAX_ITEMS}),
    "exactly a mebibyte": (b" " * (MAX_VALUE_BYTES - 2) + b"{}", {}),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_sound_is_taken_as_it_is(name: str) -> None:
    data, value = TAKEN[name]

    assert decode_json(data) == value


def test_the_deepest_nesting_allowed_is_taken() -> None:
    value: object = decode_json(nested(MAX_DEPTH))["a"]

    levels = 1
    while isinstance(value, list):
        levels += 1
        value = value[0] if value else None
    assert levels == MAX_DEPTH


def test_the_reason_and_what_it_concerns_are_told_in_one_line() -> None:
    with pytest.raises(DecodingError, match=r"^number_out_of_range: an integer beyond signed 64 bits$"):
        decode_json(b'{"a":9223372036854775808}')


@pytest.mark.parametrize(
    "data",
    [
        b'{"a":[' + b"{}," * 340_000 + b"{}]}",
        b'{"a":' + b"[" * 500_000 + b"]" * 500_000 + b"}",
        b'{"a":' + b"9" * 1_000_000 + b"}",
        b'{"a":"' + b"\\u0041" * 170_000 + b'"}',
    ],
    ids=["many objects", "deep", "digits", "escapes"],
)
def test_a_mebibyte_of_anything_costs_less_than_64_mib(data: bytes) -> None:
    tracemalloc.start()
    try:
        try:
            decode_json(data)
        except DecodingError as refused:
            assert refused.reason  # noqa: PT017 - either end is right; what it costs is asked
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 64 * MIB


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(INT64_MIN, INT64_MAX)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(TEXTS, JSON_VALUES, max_size=6), st.booleans())
@settings(max_examples=200, deadline=None)
def test_every_sound_object_comes_back_as_it_was_written(value: dict[str, object], escaped: bool) -> None:
    assert decode_json(json.dumps(value, ensure_ascii=escaped).encode()) == value


@given(st.binary(max_size=60) | st.text(st.sampled_from('{}[]",:\\u0dD8eE+-.1NaInfty \n'), max_size=40).map(str.encode))
@example(b'{"\\')
@example(b'{"a":-}')
@settings(max_examples=500, deadline=None)
def test_any_bytes_become_a_dict_or_the_one_declared_error(data: bytes) -> None:
    try:
        value = decode_json(data)
    except DecodingError as refused:
        assert refused.reason.isidentifier()  # noqa: PT017
    else:
        assert json.loads(data) == value
