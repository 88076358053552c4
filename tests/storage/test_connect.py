"""A URL names the storage; adapters are loaded only when named."""

# ruff: noqa: ASYNC240 - nothing else runs on the loop while a test looks at its files

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from infra.storage.connect import connect
from infra.storage.errors import InvalidOperationError
from infra.storage.operations import Atomicity, DataType, Key, Put, TableSchema

COUNTERS = TableSchema("shop", "counters", {"id": DataType.TEXT, "value": DataType.BIGINT}, ("id",))


@pytest.mark.parametrize("name", ["data", "with space", "100%", "don\u2019t", "a#b?c=d;e&f"])
async def test_a_sqlite_url_names_a_directory(tmp_path: Path, name: str):
    url = (tmp_path / name).as_uri().replace("file:", "sqlite:")
    storage = connect(url)
    assert not list(tmp_path.iterdir())

    await storage.create_table(COUNTERS)
    await storage.mutate([Put(COUNTERS, Key(("a",)), {"value": 1})])
    await storage.close()

    again = connect(url)
    assert await again.get(COUNTERS, Key(("a",))) == {"id": "a", "value": 1}
    await again.close()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert again.info.atomicity is Atomicity.NAMESPACE


async def test_a_memory_url_names_a_storage_of_its_own():
    one, other = connect("memory:"), connect("memory:")
    await one.create_table(COUNTERS)

    assert one.info.name == "memory"
    assert await other.tables() == []


@pytest.mark.parametrize(
    "url",
    [
        "",
        "/var/data",
        "data",
        "postgres://host/db",
        "sqlite:",
        "sqlite:data",
        "sqlite://data",
        "sqlite://host/data",
        "sqlite:///data?mode=ro",
        "sqlite:///data#x",
        "sqlite:///a%00b",
        "memory:x",
        "memory://host",
        "http://[",
        "cassandra:",
        "cassandra://",
        "cassandra:///path",
        "cassandra://host/keyspace",
        "cassandra://host#x",
        "cassandra://host:port",
        "cassandra://host:99999",
        "cassandra://one,,two",
        "cassandra://user:password@host",
    ],
)
def test_a_url_that_names_no_storage_is_refused_with_the_forms_that_do(url: str):
    with pytest.raises(InvalidOperationError) as caught:
        connect(url)

    assert "memory:" in str(caught.value) or "NUL" in str(caught.value)


async def test_a_dynamodb_url_names_a_region_and_what_differs():
    plain = connect("dynamodb://?region=ap-northeast-1")
    other = connect("dynamodb://?region=local&endpoint=http%3A%2F%2F127.0.0.1%3A8000&prefix=try_&units=10")
    literal = connect("dynamodb:?endpoint=http://127.0.0.1:8000")

    assert plain.info.options == {"region": "ap-northeast-1", "endpoint": "", "prefix": ""}
    assert other.info.options == {"region": "local", "endpoint": "http://127.0.0.1:8000", "prefix": "try_"}
    assert literal.info.options["endpoint"] == "http://127.0.0.1:8000"
    assert (plain.info.atomicity, plain.info.max_mutations) == (Atomicity.STORAGE, 100)
    for storage in (plain, other, literal):
        await storage.close()


@pytest.mark.parametrize(
    "url",
    [
        "dynamodb://key:secret@?region=local",
        "dynamodb://ap-northeast-1",
        "dynamodb:///table?region=local",
        "dynamodb://?region=local#x",
        "dynamodb://?region=local&secret=x",
        "dynamodb://?region=local&units=0",
        "dynamodb://?region=local&units=ten",
        "dynamodb://?region=local&endpoint=127.0.0.1:8000",
        "dynamodb://?region=local&endpoint=http://key:secret@host",
        "dynamodb://?region=local&prefix=a.b",
    ],
)
def test_a_dynamodb_url_of_another_form_is_refused_and_no_credential_repeated(url: str):
    with pytest.raises(InvalidOperationError) as caught:
        connect(url)

    assert "secret@" not in str(caught.value)
    assert "key:" not in str(caught.value)


def test_a_cassandra_url_names_a_cluster():
    storage = connect("cassandra://10.0.0.1:9142,[::1],node.example/?local_dc=dc1&replication_factor=3&max_in_flight=8")

    assert storage.info.atomicity is Atomicity.PARTITION
    assert storage.info.options == {"contact_points": "10.0.0.1,::1,node.example", "port": "9142"}
    assert DataType.TIMESTAMP not in storage.info.data_types
    assert connect("cassandra://one/?username=u&password=p%2Fw").info.options["port"] == "9042"


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("dc=1", "local_dc, "),
        ("local_dc=a&local_dc=b", "twice"),
        ("replication_factor=many", "replication_factor"),
        ("replication_factor=0", "replication_factor"),
        ("replication_strategy=Everywhere", "replication_strategy"),
        ("request_timeout_s=-1", "request_timeout_s"),
        ("ssl_ca=/no/such/file", "ssl_ca"),
    ],
)
def test_a_cassandra_url_with_a_wrong_parameter_is_refused_and_keeps_its_password(query: str, said: str):
    with pytest.raises(InvalidOperationError, match=said) as caught:
        connect(f"cassandra://host/?username=u&password=hidden&{query}")

    assert "hidden" not in str(caught.value)


def test_the_nodes_of_a_cassandra_cluster_listen_on_one_port():
    with pytest.raises(InvalidOperationError, match="one port"):
        connect("cassandra://one:9042,two:9043/")


def test_no_adapter_is_loaded_before_it_is_named():
    program = (
        "import sys, infra.storage.connect\n"
        "adapters = ('sqlite', 'memory', 'multi', 'cassandra', 'dynamodb')\n"
        "drivers = ('sqlite3', 'cassandra', 'botocore', 'aiobotocore')\n"
        "named = [*drivers, *(f'infra.storage.{name}' for name in adapters)]\n"
        "print([name for name in named if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    output = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
    ).stdout

    assert output.strip() == "[]"
