"""Puts records on a Kafka that no client of aiokafka's would make."""

from __future__ import annotations

from collections.abc import Sequence

from aiokafka import AIOKafkaProducer
from aiokafka.record.default_records import _DefaultRecordBatchBuilderPy


class _Bytes(str):
    """A header's name that is bytes after all."""

    name: bytes

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return self.name


async def publish_with_names(
    bootstrap_servers: str,
    topic: str,
    messages: Sequence[tuple[bytes | None, bytes | None, Sequence[tuple[bytes, bytes]]]],
    *,
    partition: int = 0,
    compressed: bool = False,
) -> int:
    """Store (key, value, headers) in one batch, header names as they are; the offset of the first."""
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap_servers, enable_idempotence=False, acks="all")
    await producer.start()
    try:
        batch = producer.create_batch()
        builder = _DefaultRecordBatchBuilderPy(2, 1 if compressed else 0, False, -1, -1, -1, 1 << 20)
        batch._builder = builder
        for number, (key, value, headers) in enumerate(messages):
            named = []
            for name, data in headers:
                text = _Bytes("?")
                text.name = name
                named.append((text, data))
            assert builder.append(number, None, key, value, named) is not None
            batch._relative_offset += 1
        stored = await (await producer.send_batch(batch, topic, partition=partition))
        return int(stored.offset)
    finally:
        await producer.stop()
