"""Where a routing key belongs: Kafka's own partitioner, used for topic partitions, buckets and spreads alike.

`bucket = (murmur2(key) & 0x7fffffff) mod buckets`, so a command topic's partition and a bucket agree when their
counts divide. Source: org.apache.kafka.common.utils.Utils.murmur2.
"""

from __future__ import annotations

from functools import lru_cache

_MASK = 0xFFFFFFFF
_M = 0x5BD1E995


def murmur2(data: bytes) -> int:
    """Kafka's 32-bit murmur2 of `data`, as an unsigned number."""
    length = len(data)
    h = (0x9747B28C ^ length) & _MASK
    whole = length & ~3
    for i in range(0, whole, 4):
        k = int.from_bytes(data[i : i + 4], "little") * _M & _MASK
        k = (k ^ (k >> 24)) * _M & _MASK
        h = (h * _M & _MASK) ^ k
    rest = data[whole:]
    if rest:
        h = (h ^ int.from_bytes(rest, "little")) * _M & _MASK
    h = (h ^ (h >> 13)) * _M & _MASK
    return h ^ (h >> 15)


@lru_cache(maxsize=512)
def slot(key: str | bytes, count: int) -> int:
    """Which of `count` buckets, partitions or slices `key` falls into, from 0. Text counts as its UTF-8 bytes."""
    data = key.encode("utf-8", "surrogatepass") if isinstance(key, str) else key
    return (murmur2(data) & 0x7FFFFFFF) % count


def shard_of(bucket: int, *, buckets: int, shards: int) -> int:
    """The shard that owns `bucket`: shards own ranges of buckets, as even as the counts allow."""
    return bucket * shards // buckets
