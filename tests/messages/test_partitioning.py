"""Keys fall where Kafka's own partitioner puts them."""

from __future__ import annotations

import pytest
from aiokafka.partitioner import murmur2 as peer_murmur2
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.partitioning import murmur2, shard_of, slot

# org.apache.kafka.common.utils.UtilsTest.testMurmur2, as signed numbers.
KAFKAS_VECTORS = {
    "21": -973932308,
    "foobar": -790332482,
    "a-little-bit-long-string": -985981536,
    "a-little-bit-longer-string": -1486304829,
    "lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
    "abc": 479470107,
}


@pytest.mark.parametrize("text", KAFKAS_VECTORS)
def test_murmur2_gives_kafkas_own_numbers(text: str) -> None:
    assert murmur2(text.encode()) == KAFKAS_VECTORS[text] & 0xFFFFFFFF


@given(st.binary(max_size=40))
@settings(max_examples=200, deadline=None)
def test_murmur2_agrees_with_the_clients_partitioner(data: bytes) -> None:
    assert murmur2(data) == peer_murmur2(data) & 0xFFFFFFFF


@given(st.text(max_size=20), st.integers(1, 6), st.integers(1, 6))
@settings(max_examples=200, deadline=None)
def test_partition_and_bucket_agree_when_their_counts_divide(key: str, partitions: int, times: int) -> None:
    assert slot(key, partitions * times) % partitions == slot(key, partitions)


def test_text_counts_as_its_utf8_bytes() -> None:
    assert slot("東京都", 1000) == slot("東京都".encode(), 1000)


@given(st.integers(1, 64), st.data())
@settings(max_examples=100, deadline=None)
def test_shards_own_ranges_of_buckets_as_even_as_they_can_be(buckets: int, data: st.DataObject) -> None:
    shards = data.draw(st.integers(1, buckets))

    owners = [shard_of(bucket, buckets=buckets, shards=shards) for bucket in range(buckets)]

    assert owners == sorted(owners)
    sizes = [owners.count(shard) for shard in range(shards)]
    assert max(sizes) - min(sizes) <= 1
