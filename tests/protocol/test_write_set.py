"""Write sets that a Java program logged are read, and what is none is refused."""

from __future__ import annotations

import contextlib
import datetime
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from protocol_world import ABORTED, ACCOUNT, COMMITTED, STOCK, World, key
from test_sweeper import GROUP, balances, given_money, java_states, move_money

from infra.consensus_commit.write_set import WrittenRecord, decode
from infra.storage.errors import InvalidOperationError
from infra.storage.operations import Key, Put
from infra.storage.port import Storage

UTC = datetime.UTC


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while True:
        out.append((value & 0x7F) | (0x80 if value > 0x7F else 0))
        value >>= 7
        if not value:
            return bytes(out)


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def length(field: int, content: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(content)) + content


def zigzag(value: int) -> int:
    return value * 2 if value >= 0 else -value * 2 - 1


def stamp(value: datetime.datetime) -> int:
    """As ScalarDB packs one: seconds, then the milliseconds, or before 1970 what they lack to 999."""
    whole = value.replace(tzinfo=None) - datetime.datetime(1970, 1, 1)
    seconds = whole // datetime.timedelta(seconds=1)
    milliseconds = value.microsecond // 1000
    return seconds * 1000 + (milliseconds if seconds >= 0 else milliseconds - 999)


def column(name: str, value: object) -> bytes:
    match value:
        case bool():
            content = length(2, number(1, value))
        case int():
            content = length(4 if abs(value) >= 2**31 else 3, number(1, value))
        case float():
            content = length(6, varint(1 << 3 | 1) + struct.pack("<d", value))
        case str():
            content = length(7, length(1, value.encode()))
        case bytes():
            content = length(8, length(1, value))
        case datetime.datetime():
            content = length(12 if value.tzinfo else 11, number(1, zigzag(stamp(value))))
        case datetime.date():
            content = length(9, number(1, zigzag((value - datetime.date(1970, 1, 1)).days)))
        case datetime.time():
            seconds = (value.hour * 60 + value.minute) * 60 + value.second
            content = length(10, number(1, (seconds * 1_000_000 + value.microsecond) * 1000))
        case _:
            raise AssertionError(value)
    return length(1, length(1, name.encode()) + content)


def entry(record: WrittenRecord) -> bytes:
    def packed(columns: object) -> bytes:
        return b"".join(column(name, value) for name, value in columns.items())  # type: ignore[attr-defined]

    clustering = length(5, packed(record.clustering_key)) if record.clustering_key else b""
    participant = length(1, b"some participant")
    return (
        participant
        + length(2, record.namespace.encode())
        + length(3, record.table.encode())
        + length(4, packed(record.partition_key))
        + clustering
    )


def encode(*records: WrittenRecord, version: int = 1) -> bytes:
    groups = b"".join(
        length(1, (length(1, record.child_id.encode()) if record.child_id else b"") + length(2, entry(record)))
        for record in records
    )
    return number(1, version) + length(2, groups)


key_values = (
    st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
    | st.binary(max_size=5)
    | st.dates(datetime.date(1000, 1, 1))
    | st.times()
    | st.datetimes(datetime.datetime(1000, 1, 1)).map(lambda at: at.replace(microsecond=at.microsecond // 1000 * 1000))
    | st.datetimes(datetime.datetime(1000, 1, 1)).map(
        lambda at: at.replace(microsecond=at.microsecond // 1000 * 1000, tzinfo=UTC)
    )
)
keys = st.dictionaries(st.sampled_from(["a", "b", "c"]), key_values, min_size=1)
records = st.builds(
    WrittenRecord, st.just("bank"), st.just("account"), keys, st.just({}) | keys, st.none() | st.sampled_from("xy")
)


@settings(deadline=None, max_examples=200)
@given(st.lists(records, max_size=4))
def test_every_record_that_was_logged_is_read_back(logged: list[WrittenRecord]) -> None:
    assert decode(encode(*logged)) == logged


@settings(deadline=None, max_examples=500)
@given(
    st.binary(max_size=40)
    | st.just(encode(WrittenRecord("n", "t", {"a": 1}, {}))).flatmap(
        lambda whole: st.integers(0, len(whole)).map(lambda cut: whole[:cut])
    )
)
def test_anything_else_is_refused_or_read_but_never_breaks_the_reader(found: bytes) -> None:
    with contextlib.suppress(InvalidOperationError):
        assert isinstance(decode(found), list)


def test_a_write_set_of_another_version_is_refused() -> None:
    with pytest.raises(InvalidOperationError, match="version 2"):
        decode(encode(version=2))


@pytest.mark.parametrize("decided", [COMMITTED, ABORTED])
async def test_a_transaction_with_a_write_set_is_finished_without_saying_where_it_wrote(
    storage: Storage, decided
) -> None:
    table = await java_states(storage)
    world = World(storage)
    await world.create()
    await given_money(world)
    tx_id = await world.orphan(move_money)
    logged = encode(
        WrittenRecord("bank", "account", {"branch": 1}, {"id": 1}),
        WrittenRecord("shop", "stock", {"shelf": 1}, {"id": 1}),
        WrittenRecord("shop", "dropped", {"shelf": 1}, {}),
    )
    await storage.mutate(
        [Put(table, Key((tx_id,)), {"tx_write_set": logged, "tx_state": decided.value, "tx_created_at": 7})]
    )

    assert await world.manager.sweeper.finish(tx_id)

    assert await world.in_doubt() == 0
    assert await balances(world) == ([5, 15] if decided is COMMITTED else [10, 10])
    assert await storage.get(table, Key((tx_id,))) is None


async def test_a_child_is_finished_without_its_siblings_and_a_group_with_all_of_them(storage: Storage) -> None:
    table = await java_states(storage)
    world = World(storage)
    await world.create()
    await given_money(world)
    await world.orphan(lambda dead: dead.update(ACCOUNT, key(1), {"balance": 1}), tx_id=f"{GROUP}$one")
    await world.orphan(lambda dead: dead.update(STOCK, key(1), {"balance": 2}), tx_id=f"{GROUP}$two")
    logged = encode(
        WrittenRecord("bank", "account", {"branch": 1}, {"id": 1}, "one"),
        WrittenRecord("shop", "stock", {"shelf": 1}, {"id": 1}, "two"),
    )
    await storage.mutate(
        [
            Put(
                table,
                Key((GROUP,)),
                {"tx_child_ids": "one,two", "tx_write_set": logged, "tx_state": 3, "tx_created_at": 7},
            )
        ]
    )

    assert await world.manager.sweeper.finish(f"{GROUP}$one")
    assert await world.in_doubt() == 1
    assert await storage.get(table, Key((GROUP,))) is not None, "its sibling still needs the row"

    assert await world.manager.sweeper.finish(GROUP)
    assert await world.in_doubt() == 0
    assert await balances(world) == [1, 2]
    assert await storage.get(table, Key((GROUP,))) is None
