"""A real Cassandra that takes names and passwords over TLS alone: who gets in, and what the others are told."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest
from secure_servers import Authority, SecureCassandra

from infra.servers.cassandra import LocalCassandra
from infra.storage.connect import CassandraAccess, StorageAddress, connect
from infra.storage.errors import InvalidOperationError, UnavailableStorageError
from infra.storage.operations import DataType, Key, Put, TableSchema


def fresh_table() -> TableSchema:
    columns = {"id": DataType.TEXT, "value": DataType.BIGINT}
    return TableSchema(f"secure_{uuid.uuid4().hex[:8]}", "counters", columns, ("id",))


async def refusal(url: str, access: CassandraAccess) -> str:
    """What the first call says, with its remedy."""
    storage = connect(StorageAddress(url, access))
    try:
        with pytest.raises(UnavailableStorageError) as caught:
            await storage.tables()
    finally:
        await storage.close()
    return str(caught.value)


async def test_records_cross_with_a_password_a_certificate_and_encryption(secure_cassandra: SecureCassandra) -> None:
    # As production has it: nodes that let everybody in are refused, and copies are said by data centre.
    access = secure_cassandra.access(only_authenticated=True, data_center="datacenter1", replication={"datacenter1": 1})
    storage = connect(StorageAddress(secure_cassandra.url, access))
    table = fresh_table()
    try:
        await storage.create_table(table)
        await storage.mutate([Put(table, Key(("a",)), {"value": 1})])

        assert await storage.get(table, Key(("a",))) == {"id": "a", "value": 1}
    finally:
        await storage.close()


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ({"password": lambda: "planted-wrong"}, "refuses the user name or the password"),
        ({"username": "nobody"}, "refuses the user name or the password"),
        ({"username": ""}, "refuses the user name or the password"),
        ({"data_center": "elsewhere"}, "has no data centre 'elsewhere'"),
    ],
    ids=["password", "name", "no-name", "data-centre"],
)
async def test_a_wrong_name_or_password_is_told_as_such(
    secure_cassandra: SecureCassandra, others: dict[str, Any], said: str
) -> None:
    text = await refusal(secure_cassandra.url, secure_cassandra.access(**others))

    assert said in text
    assert "planted" not in text


async def test_a_certificate_of_somebody_else_is_not_trusted(secure_cassandra: SecureCassandra, tmp_path: Path) -> None:
    stranger = Authority(tmp_path, "stranger").begin()

    assert "cannot be trusted" in await refusal(secure_cassandra.url, secure_cassandra.access(ca_file=stranger.ca_file))


async def test_a_node_is_known_by_its_address_whatever_name_was_called(secure_cassandra: SecureCassandra) -> None:
    # Nodes tell each other's addresses and not names, so that certificates must have those.
    elsewhere = secure_cassandra.url.replace("127.0.0.1", "localhost")
    storage = connect(StorageAddress(elsewhere, secure_cassandra.access()))

    assert isinstance(await storage.tables(), list)
    await storage.close()


async def test_without_a_certificate_of_our_own_or_without_encryption_nobody_gets_in(
    secure_cassandra: SecureCassandra,
) -> None:
    for others in ({"certificate_file": None, "key_file": None}, {"encrypted": False}):
        assert "cannot be" in await refusal(secure_cassandra.url, secure_cassandra.access(**others))


def test_a_key_that_does_not_open_is_named(secure_cassandra: SecureCassandra) -> None:
    access = secure_cassandra.access(key_password=lambda: "planted-wrong")

    with pytest.raises(InvalidOperationError, match=r"client\.key.*cannot be used") as caught:
        connect(StorageAddress(secure_cassandra.url, access))

    assert "planted" not in repr(caught.value)


async def test_production_refuses_a_cassandra_that_lets_everybody_in(cassandra: LocalCassandra) -> None:
    url = f"cassandra://{cassandra.address}/"

    assert "AllowAllAuthenticator" in await refusal(url, CassandraAccess(only_authenticated=True))
    storage = connect(StorageAddress(url))
    assert isinstance(await storage.tables(), list)
    await storage.close()


def test_what_the_url_says_goes_before_what_stands_beside_it() -> None:
    storage = connect(StorageAddress("cassandra://a:9142/?local_dc=one", CassandraAccess(data_center="other")))

    assert storage._settings.local_dc == "one"  # type: ignore[attr-defined]


def test_an_address_shows_no_secret() -> None:
    access = CassandraAccess(username="u", password=lambda: "planted-x", key_password=lambda: "planted-y")

    assert "planted" not in repr(StorageAddress("cassandra://a/?password=planted-z", access))
