"""One protected server of each kind for each module that wants it, which is too much to keep for a whole session; and
after each test a look for secrets in what was told."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from secure_servers import SecureCassandra, SecureKafka, running_secure_cassandra, running_secure_kafka

from infra.telemetry import _LIBRARY_LEVELS

PLANTED = "planted-"
"""What every secret of these tests begins with."""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def secure_kafka(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SecureKafka]:
    """A Kafka that asks who one is; tests make topics of their own on it."""
    async with running_secure_kafka(tmp_path_factory.mktemp("secure-kafka")) as kafka:
        yield kafka


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def secure_cassandra(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SecureCassandra]:
    """A Cassandra that asks who one is; tests make keyspaces of their own on it."""
    async with running_secure_cassandra(tmp_path_factory.mktemp("secure-cassandra")) as cassandra:
        yield cassandra


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
