"""What the tests of both programs share: the compiled Java program, a storage, raw CQL, keyspaces of their own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from infra.consensus_commit.manager import TransactionManager
from infra.servers.cassandra import LocalCassandra
from infra.storage.cassandra import CassandraStorage
from scripts.java_peer.processes import (
    NO_COMPILER,
    PeerProcess,
    compile_java,
    java_compiler,
    scalardb_settings,
    start_java,
)
from tests.java_peer.mixed_tables import account_table, every_type_table, list_table

MIXED = "mixed"
MIXED_IN_GROUPS = "mixed_in_groups"
MIXED_IN_GROUPS_OF_BOTH = "mixed_in_groups_of_both"
ALL_MIXED = (MIXED, MIXED_IN_GROUPS, MIXED_IN_GROUPS_OF_BOTH)
"""Keyspaces with the accounts and lists of one history each."""

JAVA_MADE = "java_made"
PYTHON_MADE = "python_made"
COORDINATORS = {
    "java_plain": {},
    "java_grouping": {"coordinator__group_commit__enabled": "true"},
    "java_logging": {"coordinator__write_set_logging__enabled": "true"},
    "python_plain": {},
    "python_grouping": {},
}
"""Coordinator namespaces by who made them and how, with the settings of a Java program that uses them."""

Cql = Callable[[str], Awaitable[list[dict[str, Any]]]]


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled Java program; a visible skip where nobody can compile it."""
    if java_compiler() is None:
        pytest.skip(NO_COMPILER)
    folder: Path = tmp_path_factory.mktemp("classes")
    await compile_java(folder)
    return folder


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def cql(cassandra: LocalCassandra) -> AsyncIterator[Cql]:
    """Statements past every adapter: what really is in Cassandra."""
    from cassandra.cluster import EXEC_PROFILE_DEFAULT, Cluster, ExecutionProfile
    from cassandra.query import dict_factory

    profile = ExecutionProfile(row_factory=dict_factory, request_timeout=30)
    cluster = Cluster(["127.0.0.1"], cassandra.port, execution_profiles={EXEC_PROFILE_DEFAULT: profile})
    session = await asyncio.to_thread(cluster.connect)

    async def run(statement: str) -> list[dict[str, Any]]:
        return list(await asyncio.to_thread(session.execute, statement))

    yield run
    await asyncio.to_thread(cluster.shutdown)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def storage(cassandra: LocalCassandra) -> AsyncIterator[CassandraStorage]:
    storage = CassandraStorage(["127.0.0.1"], cassandra.port)
    yield storage
    await storage.close()


@dataclass(frozen=True)
class Peers:
    """How to begin: tables and coordinator tables are there, made by both sides."""

    port: int
    classes: Path
    storage: CassandraStorage

    async def java(self, *managers: str) -> PeerProcess:
        """A new Java program with managers named `COORDINATOR` or `COORDINATOR:ANYTHING`, all watched."""
        java = await start_java(self.classes)
        for name in managers:
            await java.ask("open", manager=name, properties=self.settings(name))
        return java

    def settings(self, name: str) -> dict[str, str]:
        coordinator = name.partition(":")[0]
        consensus = {"coordinator__namespace": coordinator, **COORDINATORS[coordinator]}
        return scalardb_settings(
            self.port,
            scalar__db__storage="watched-cassandra",
            peer__watch=name,
            **{f"scalar__db__consensus_commit__{key}": value for key, value in consensus.items()},
        )

    def python(self, coordinator: str, *, lifetime_ms: int = 15_000, group_commit: bool = False) -> TransactionManager:
        """A manager in this process."""
        return TransactionManager(
            self.storage,
            coordinator_namespace=coordinator,
            transaction_lifetime_ms=lifetime_ms,
            group_commit=group_commit,
        )


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def peers(classes: Path, cassandra: LocalCassandra, storage: CassandraStorage, cql: Cql) -> AsyncIterator[Peers]:
    """Both sides' tables. A Java program reads the schema when it connects, so they come first."""
    peers = Peers(cassandra.port, classes, storage)
    java = await start_java(classes)
    for coordinator in COORDINATORS:
        if coordinator.startswith("java"):
            await java.ask("open", manager=coordinator, properties=peers.settings(coordinator))
            await java.ask("create_coordinator_tables", manager=coordinator)
    table = every_type_table(JAVA_MADE, "every_type")
    await java.ask("create_namespace", manager="java_plain", namespace=JAVA_MADE)
    await java.ask(
        "create_table",
        manager="java_plain",
        namespace=table.namespace,
        name=table.name,
        columns=dict(table.columns),
        partition_key=table.partition_key,
        clustering_key=table.clustering_key,
        descending=sorted(table.descending),
        indexes=sorted(table.indexes),
    )
    await java.stop()
    python = peers.python("python_plain")
    await python.create_coordinator_tables()
    await python.create_table(every_type_table(PYTHON_MADE, "every_type"))
    await peers.python("python_grouping", group_commit=True).create_coordinator_tables()
    for namespace in ALL_MIXED:
        for table in (account_table(namespace), list_table(namespace)):
            await python.create_table(table)
    yield peers
    for keyspace in (*ALL_MIXED, JAVA_MADE, PYTHON_MADE, *COORDINATORS):
        await cql(f"DROP KEYSPACE IF EXISTS {keyspace}")


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def java(peers: Peers) -> AsyncIterator[PeerProcess]:
    """A Java program with a manager for each coordinator namespace, for tests that do not kill it."""
    java = await peers.java(*COORDINATORS)
    yield java
    await java.stop()
