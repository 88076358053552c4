"""What tests of several folders share: one of each real server, and one real system of each kind, for the session.

Imported inside the fixtures, so that a folder that needs neither does not wait for what they need.

`./scripts/test` runs two processes side by side, since whole systems mostly wait. Each process would start servers
and systems of its own, so that all tests that need the same ones go to the same process: LANES says which.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from tests.last_use import Stop, is_last_to_want_it

TESTS = Path(__file__).parent

# A server of the tests lives for minutes. To compile its code a second time, for speed in the long run, takes a third
# of its processor time and brings nothing.
os.environ.setdefault("JAVA_TOOL_OPTIONS", "-XX:TieredStopAtLevel=1")

LANES = {
    "systems": (
        "chaos",
        "stack",
        "backup/test_rehearsals.py",
        "workers",
        "end_to_end/test_failpoints.py",
        "end_to_end",
        "actors/test_rules_on_cassandra.py",
    ),
    "servers": (
        "java_peer",
        "flow",
        "cluster",
        "servers",
        "messaging",
        "cli",
        "histories",
        "protocol",
        "backup",
        "faults_on_disk",
        "storage",
    ),
}
"""Folders and files of `tests`, in this order, by the process that runs them; any other file goes to whichever process
is free. The first lane that names a path has it."""

if TYPE_CHECKING:
    from infra.servers.cassandra import LocalCassandra
    from infra.servers.dynamodb import LocalDynamoDb
    from infra.servers.kafka import LocalKafka
    from infra.storage.cassandra import CassandraStorage
    from infra.storage.dynamodb import DynamoDbStorage
    from tests.end_to_end.harness import System


def place_of(path: str) -> int:
    """Where a file of `tests` stands in the order of LANES; those of no lane stand last."""
    places = [place for paths in LANES.values() for place in paths]
    named = (n for n, place in enumerate(places) if path == place or path.startswith(f"{place}/"))
    return next(named, len(places))


def lane_of(path: str) -> str:
    """The lane of a file of `tests`, or the file itself: what one process runs as a whole."""
    lanes = [lane for lane, paths in LANES.items() for _ in paths]
    place = place_of(path)
    return lanes[place] if place < len(lanes) else path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long lanes first, so that the files of no lane fill up what is left of the shorter one."""
    items.sort(key=lambda item: place_of(item.path.relative_to(TESTS).as_posix()))  # Stable.


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand out whole lanes. (xdist's own groups, by a mark, do nothing under pytest 9.)"""
    from xdist.scheduler import LoadScopeScheduling

    class Lanes(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return lane_of(Path(nodeid.partition("::")[0]).relative_to("tests").as_posix())

    return Lanes(config, log)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def kafka(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalKafka]:
    """A Kafka without a system; tests make topics of their own on it."""
    from tests.servers.kafka_fixture import running_kafka

    async with running_kafka(tmp_path_factory.mktemp("kafka")) as node:
        yield node


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def cassandra(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCassandra]:
    """A Cassandra without keyspaces; tests make keyspaces or rows of their own on it, and leave it running."""
    from tests.servers.cassandra_fixture import running_cassandra

    async with running_cassandra(tmp_path_factory.mktemp("cassandra")) as node:
        yield node


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def dynamodb() -> AsyncIterator[LocalDynamoDb]:
    """A DynamoDB Local without tables; tests make tables or items of their own on it, and leave it running."""
    from tests.servers.dynamodb_fixture import running_dynamodb

    async with running_dynamodb() as node:
        yield node


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def cassandra_storage(cassandra: LocalCassandra) -> AsyncIterator[CassandraStorage]:
    """The connection to `cassandra` that all tests share; see `tests/storages.py`."""
    from infra.storage.cassandra import CassandraStorage

    storage = CassandraStorage([cassandra.contact_point], cassandra.port)
    yield storage
    await storage.close()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def dynamodb_storage(dynamodb: LocalDynamoDb) -> AsyncIterator[DynamoDbStorage]:
    """The connection to `dynamodb` that all tests share; see `tests/storages.py`."""
    from infra.storage.dynamodb import DynamoDbStorage

    storage = DynamoDbStorage(region="us-west-2", endpoint=dynamodb.endpoint_url, credentials=("test", "test"))
    yield storage
    await storage.close()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def system(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    """A whole system from `concord up`. At the end it is stopped with Ctrl-C, and must leave no process behind."""
    from tests.end_to_end.harness import running_system

    async with running_system(tmp_path_factory.mktemp("system")) as whole:
        yield whole


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def started_stack_system(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[System, Stop]]:
    """The system of `stack_system`, and what stops it."""
    from tests.end_to_end.harness import running_system

    async with AsyncExitStack() as stack:
        whole = running_system(tmp_path_factory.mktemp("stack"), profile="stack")
        yield await stack.enter_async_context(whole), stack.aclose


@pytest_asyncio.fixture(loop_scope="session")
async def stack_system(
    started_stack_system: tuple[System, Stop], request: pytest.FixtureRequest
) -> AsyncIterator[System]:
    """A whole system on Kafka and Cassandra, from `concord up --profile stack`: 30 s and 4 GB.

    It has servers of its own, since the names of its topics and keyspaces are those of every system. A test may kill
    any of its processes, for the supervisor brings them back, and leaves it running and at rest. It ends with the last
    test that wants it, for it takes time from all others.
    """
    system, stop = started_stack_system
    yield system
    if is_last_to_want_it(request, also=is_played_on_the_stack):
        await stop()


def is_played_on_the_stack(item: pytest.Item) -> bool:
    """Of the tests that are played on systems of both kinds: `whole` is to be the stack."""
    callspec = getattr(item, "callspec", None)
    return callspec is not None and callspec.params.get("whole") == "stack"
