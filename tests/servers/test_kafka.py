"""A real Kafka, started and stopped as users do and as they should not."""

from __future__ import annotations

import asyncio
import os
import re
import select
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from infra.messaging.producer import EventProducer
from infra.messaging.reader import read_all
from infra.servers import kafka as kafka_module
from infra.servers.errors import (
    AlreadyRunningError,
    DirectoryError,
    PortTakenError,
    ServerDiedError,
    ServerError,
)
from infra.servers.kafka import LocalKafka
from tests.servers.kafka_fixture import fresh_topic


async def publish(kafka: LocalKafka, topic: str, values: list[bytes]) -> None:
    producer = EventProducer(kafka.bootstrap_servers)
    await producer.start()
    try:
        await asyncio.gather(*[await producer.send(topic, b"key", value) for value in values])
    finally:
        await producer.stop()


async def values_of(kafka: LocalKafka, topic: str) -> list[bytes | None]:
    return [record.value async for record in read_all(kafka.bootstrap_servers, [topic])]


@asynccontextmanager
async def stopped_at_the_end(*nodes: LocalKafka) -> AsyncIterator[None]:
    try:
        yield
    finally:
        for node in nodes:
            await node.stop()


@pytest.mark.system
async def test_a_second_start_on_the_same_directory_continues_with_its_messages_and_its_port(tmp_path: Path) -> None:
    directory = tmp_path / "a folder of 日本語"
    first, second = LocalKafka(directory), LocalKafka(directory)
    async with stopped_at_the_end(first, second), AsyncExitStack() as stack:
        bootstrap = await first.start()
        long_lived = EventProducer(bootstrap)
        await long_lived.start()
        stack.push_async_callback(long_lived.stop)
        topic = await fresh_topic(first)
        values = [b"%d" % number for number in range(500)]
        await publish(first, topic, values)
        cluster_id = first.cluster_id
        await first.stop()
        assert first.pid is None

        assert await second.start() == bootstrap
        assert second.cluster_id == cluster_id
        assert await values_of(second, topic) == values

        await long_lived.send_and_wait(topic, b"key", b"after the restart")
        values.append(b"after the restart")

        with pytest.raises(AlreadyRunningError) as caught:
            await LocalKafka(directory, lock_wait_s=0).start()
        assert f"process {second.pid}" in str(caught.value)
        assert f"kill {second.pid}" in str(caught.value)
        assert str(directory) in str(caught.value)

        assert await values_of(second, topic) == values, "the refused start left the running one alone"


@pytest.mark.system
async def test_kafka_dies_with_its_killed_parent_and_the_next_start_finds_the_messages(tmp_path: Path) -> None:
    program = f"""
import asyncio
from pathlib import Path
from infra.servers.kafka import LocalKafka
from infra.messaging.producer import EventProducer
from infra.messaging.topics import TopicSpec, ensure_topics

async def main():
    kafka = LocalKafka(Path({str(tmp_path)!r}))
    bootstrap = await kafka.start()
    await ensure_topics(bootstrap, [TopicSpec("survivors", 1)])
    producer = EventProducer(bootstrap)
    await producer.start()
    await asyncio.gather(*[await producer.send("survivors", None, b"%d" % n) for n in range(100)])
    print(kafka.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    java = os.pidfd_open(int(await parent.stdout.readline()))
    try:
        parent.kill()
        await parent.wait()
        assert select.select([java], [], [], 20)[0], "Kafka must not outlive its parent"
    finally:
        os.close(java)

    again = LocalKafka(tmp_path)
    async with stopped_at_the_end(again):
        await again.start()
        assert await values_of(again, "survivors") == [b"%d" % number for number in range(100)]


async def test_a_port_that_is_taken_is_named_with_its_setting(tmp_path: Path) -> None:
    with socket.create_server((kafka_module.HOST, 0)) as other:
        port = other.getsockname()[1]

        with pytest.raises(PortTakenError) as caught:
            await LocalKafka(tmp_path, port=port).start()

    assert str(caught.value).startswith(f"Kafka cannot listen on port {port}")
    assert "CONCORD_KAFKA__PORT" in str(caught.value)
    assert not (tmp_path / "data" / "meta.properties").exists(), "nothing was begun"


def test_a_remembered_port_is_left_when_somebody_else_has_it(tmp_path: Path) -> None:
    node = LocalKafka(tmp_path)
    with socket.create_server((kafka_module.HOST, 0)) as other:
        taken = other.getsockname()[1]

        ports = node._choose_ports({"broker": taken, "controller": 0})

    assert ports["broker"] != taken
    assert ports["controller"] not in (0, ports["broker"])
    assert node._choose_ports(ports) == ports


def test_ports_that_were_chosen_beforehand_are_known_before_the_start(tmp_path: Path) -> None:
    node = LocalKafka(tmp_path)
    with pytest.raises(RuntimeError):
        _ = node.address

    node.choose_ports()

    assert node.address == f"{kafka_module.HOST}:{node.port}"


def test_further_listeners_and_properties_are_laid_over_the_defaults(tmp_path: Path) -> None:
    node = LocalKafka(
        tmp_path,
        extra_listeners={"LOGIN": "SASL_PLAINTEXT"},
        extra_properties={"flush.messages": "1", "log.dirs": "/elsewhere"},
    )
    node.choose_ports()

    node._configure(node._ports or {})

    written = kafka_module._read_properties(tmp_path / "server.properties")
    assert written["listener.security.protocol.map"] == "BROKER:PLAINTEXT,CONTROLLER:PLAINTEXT,LOGIN:SASL_PLAINTEXT"
    assert written["advertised.listeners"] == f"BROKER://{node.address},LOGIN://{node.address_of('LOGIN')}"
    assert written["listeners"].startswith(written["advertised.listeners"] + ",CONTROLLER://")
    assert (written["flush.messages"], written["log.dirs"]) == ("1", "/elsewhere")


async def test_a_directory_that_cannot_be_written_is_named_with_its_option(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(DirectoryError) as caught:
        await LocalKafka(tmp_path / "file" / "kafka").start()

    assert f"{tmp_path}/file/kafka cannot be written" in str(caught.value)
    assert "--data" in str(caught.value)


async def test_a_full_disk_is_noticed_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(DirectoryError, match=r"has \d+ MB left and needs 1000000000000 MB"):
        await LocalKafka(tmp_path, min_free_mb=10**12).start()


async def test_a_failed_start_gives_the_directory_back(tmp_path: Path) -> None:
    """A heap that no JVM accepts: it ends at once, and a second attempt fails for the same reason, not for the lock."""
    for _ in range(2):
        node = LocalKafka(tmp_path, heap_mb=1, lock_wait_s=0)
        with pytest.raises(ServerDiedError, match=r"Kafka ran out of memory\..*CONCORD_KAFKA__HEAP_MB"):
            await node.start()
        assert node.pid is None


@pytest.mark.parametrize(
    ("line", "error", "setting"),
    [
        ("org.apache.kafka.common.KafkaException: Socket server failed to bind to 127.0.0.1:1: Address already in use.",
         PortTakenError, "CONCORD_KAFKA__PORT"),
        ("java.io.IOException: No space left on device", DirectoryError, "--data"),
        ("java.nio.file.AccessDeniedException: /data/meta.properties", DirectoryError, "--data"),
        ("Error: Could not reserve enough space for 67108864KB object heap", ServerDiedError, "CONCORD_KAFKA__HEAP_MB"),
    ],
)  # fmt: skip
def test_known_ends_of_kafka_name_the_setting_and_the_remedy(
    tmp_path: Path, line: str, error: type[ServerError], setting: str
) -> None:
    explained = LocalKafka(tmp_path)._explain("Kafka ended.", ["INFO starting", line, "INFO shut down"])

    assert type(explained) is error
    assert explained.setting == setting
    assert setting in explained.remedy


def test_an_unknown_end_quotes_the_telling_lines_and_names_the_log(tmp_path: Path) -> None:
    lines = [
        "INFO one",
        "ERROR Exiting Kafka due to fatal exception",
        "java.lang.IllegalStateException: odd",
        "INFO two",
    ]

    explained = LocalKafka(tmp_path)._explain("Kafka ended.", lines)

    assert type(explained) is ServerDiedError
    assert "ERROR Exiting Kafka due to fatal exception\n    java.lang.IllegalStateException: odd" in str(explained)
    assert "INFO" not in str(explained)
    assert str(explained).endswith(f"{tmp_path}/server.log.")


def test_values_of_property_files_survive_every_character() -> None:
    escaped = kafka_module._escaped("C:\\é日😀")

    assert escaped == "C:\\u005c\\u00e9\\u65e5\\ud83d\\ude00"
    assert re.fullmatch(r"[ -~]*", escaped)


async def test_a_port_that_speaks_something_else_is_not_taken_for_kafka() -> None:
    async def babble(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"\x00\x00\x00\x05HTTP/")
        writer.close()

    async with await asyncio.start_server(babble, kafka_module.HOST, 0) as server:
        port = server.sockets[0].getsockname()[1]
        assert await kafka_module._serving_cluster(kafka_module.HOST, port) is None
