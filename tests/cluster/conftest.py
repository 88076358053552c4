"""One protected server of each kind for the tests of this folder, which is too much to keep for a whole session; and
after each test a look for secrets in what was told."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack

import pytest
import pytest_asyncio
from secure_servers import SecureCassandra, SecureKafka, running_secure_cassandra, running_secure_kafka

from infra.messaging import connection
from infra.telemetry import _LIBRARY_LEVELS
from tests.last_use import Stop, is_last_to_want_it

PLANTED = "planted-"
"""What every secret of these tests begins with."""


@pytest.fixture(autouse=True)
def reasons_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why a broker refuses is asked once more, and is unknown if no answer comes in time: here, in a long time."""
    monkeypatch.setattr(connection, "_PROBE_TIMEOUT_MS", 60_000)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def started_kafka(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[SecureKafka, Stop]]:
    async with AsyncExitStack() as stack:
        directory = tmp_path_factory.mktemp("secure-kafka")
        yield await stack.enter_async_context(running_secure_kafka(directory)), stack.aclose


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def started_cassandra(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[SecureCassandra, Stop]]:
    async with AsyncExitStack() as stack:
        directory = tmp_path_factory.mktemp("secure-cassandra")
        yield await stack.enter_async_context(running_secure_cassandra(directory)), stack.aclose


@pytest_asyncio.fixture(loop_scope="session")
async def secure_kafka(
    started_kafka: tuple[SecureKafka, Stop], request: pytest.FixtureRequest
) -> AsyncIterator[SecureKafka]:
    """A Kafka that asks who one is; tests make topics of their own on it. It ends with the last test that wants it."""
    kafka, stop = started_kafka
    yield kafka
    if is_last_to_want_it(request):
        await stop()


@pytest_asyncio.fixture(loop_scope="session")
async def secure_cassandra(
    started_cassandra: tuple[SecureCassandra, Stop], request: pytest.FixtureRequest
) -> AsyncIterator[SecureCassandra]:
    """A Cassandra that asks who one is; tests make keyspaces of their own on it. It ends as the Kafka does."""
    cassandra, stop = started_cassandra
    yield cassandra
    if is_last_to_want_it(request):
        await stop()


@pytest.fixture(autouse=True)
def no_secret_is_told(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Nothing that is logged at level debug, as `configure_logging` sets it, or written to a stream has a secret."""
    for name, least in _LIBRARY_LEVELS.items():
        caplog.set_level(least, logger=name)
    caplog.set_level(logging.DEBUG)  # last, since each sets the handler's level as well
    yield
    # Each phase of a test has records of its own; here it is the last one's turn.
    logged = [caplog.handler.format(record) for phase in ("setup", "call") for record in caplog.get_records(phase)]
    told = "\n".join((*logged, *capfd.readouterr()))
    assert PLANTED not in told, [line for line in told.splitlines() if PLANTED in line]
