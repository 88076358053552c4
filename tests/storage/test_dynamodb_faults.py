"""What DynamoDB refuses, what it leaves open, and what is sent again.

Lost answers are lost by a proxy before DynamoDB Local; answers that it never gives by itself (another transaction at
work, no capacity left, errors of its own) come from a server that answers as it is told.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from aiobotocore.session import get_session
from aiohttp import web

from infra.storage.dynamodb import DynamoDbStorage
from infra.storage.errors import (
    InvalidOperationError,
    NoMutationError,
    UnavailableStorageError,
    UnknownOutcomeError,
)
from infra.storage.operations import (
    ColumnCondition,
    DataType,
    Delete,
    If,
    IfExists,
    IfNotExists,
    IndexScan,
    Key,
    Operator,
    Put,
    Scan,
    TableSchema,
)
from scripts.proof.tcp_proxy import TcpProxy

if TYPE_CHECKING:
    from infra.servers.dynamodb import LocalDynamoDb

T = DataType
CREDENTIALS = ("local", "local")
PREFIX = "of_fault_tests_"
COUNTERS = TableSchema("shop", "counters", {"id": T.TEXT, "value": T.INT, "note": T.TEXT}, ("id",))
FORWARD = TableSchema("shop", "forward", {"id": T.INT, "n": T.INT, "v": T.BIGINT}, ("id",), ("n",))
BACKWARD = replace(FORWARD, namespace="depot", name="backward", descending=frozenset({"n"}))


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def direct(dynamodb: LocalDynamoDb) -> AsyncIterator[DynamoDbStorage]:
    """The storage without anything in between."""
    storage = DynamoDbStorage(
        region="local", endpoint=dynamodb.endpoint_url, credentials=CREDENTIALS, prefix=PREFIX, timeout_ms=60_000
    )
    for table in (COUNTERS, FORWARD, BACKWARD):
        await storage.create_table(table)
    yield storage
    await asyncio.gather(*(storage.drop_table(table) for table in await storage.tables()))
    await storage.close()


@pytest.fixture
async def proxy(dynamodb: LocalDynamoDb) -> AsyncIterator[TcpProxy]:
    async with TcpProxy("127.0.0.1", dynamodb.port) as proxy:
        yield proxy


@pytest.fixture
async def storage(direct: DynamoDbStorage, proxy: TcpProxy) -> AsyncIterator[DynamoDbStorage]:
    """The storage through the proxy, with patience for what is slow, and two counters at 0."""
    storage = DynamoDbStorage(
        region="local",
        endpoint=f"http://{proxy.host}:{proxy.port}",
        credentials=CREDENTIALS,
        prefix=PREFIX,
        timeout_ms=60_000,
    )
    await direct.truncate_table(COUNTERS)
    await storage.mutate([Put(COUNTERS, Key((name,)), {"value": 0}) for name in "ab"])
    yield storage
    await storage.close()


@pytest.fixture
async def hasty(storage: DynamoDbStorage, proxy: TcpProxy) -> AsyncIterator[DynamoDbStorage]:
    """The same, for answers that never come: they are waited for only shortly."""
    hasty = DynamoDbStorage(
        region="local",
        endpoint=f"http://{proxy.host}:{proxy.port}",
        credentials=CREDENTIALS,
        prefix=PREFIX,
        timeout_ms=1_500,
        tries=3,
    )
    await hasty.get(COUNTERS, Key(("a",)))
    yield hasty
    await hasty.close()


def raised(name: str, value: int = 1) -> Put:
    """From 0 to `value`, which can happen once."""
    return Put(COUNTERS, Key((name,)), {"value": value}, If((ColumnCondition("value", Operator.EQ, 0),)))


async def values(storage: DynamoDbStorage) -> list[object]:
    rows = [await storage.get(COUNTERS, Key((name,))) for name in "ab"]
    return [row and row["value"] for row in rows]


# Lost answers


@pytest.mark.parametrize("mutation", [raised("a"), Delete(COUNTERS, Key(("a",)), IfExists())], ids=["put", "delete"])
async def test_a_write_whose_answer_breaks_off_is_unknown_and_not_sent_again(
    storage: DynamoDbStorage, direct: DynamoDbStorage, proxy: TcpProxy, mutation: Put | Delete
):
    proxy.break_on_answer()

    with pytest.raises(UnknownOutcomeError):
        await storage.mutate([mutation])

    assert proxy.answers_lost == 1
    assert await values(direct) == [None if isinstance(mutation, Delete) else 1, 0]


async def test_a_write_whose_answer_never_comes_is_unknown(
    hasty: DynamoDbStorage, direct: DynamoDbStorage, proxy: TcpProxy
):
    proxy.swallow_answers()

    with pytest.raises(UnknownOutcomeError):
        await hasty.mutate([raised("a")])

    await proxy.lost_an_answer()
    assert proxy.answers_lost == 1
    assert await values(direct) == [1, 0]


async def test_a_write_that_never_arrives_is_unknown_too(
    hasty: DynamoDbStorage, direct: DynamoDbStorage, proxy: TcpProxy
):
    proxy.swallow_requests()

    with pytest.raises(UnknownOutcomeError):
        await hasty.mutate([raised("a")])

    assert await values(direct) == [0, 0]


async def test_a_batch_whose_answer_breaks_off_is_asked_about_under_its_token(
    storage: DynamoDbStorage, direct: DynamoDbStorage, proxy: TcpProxy
):
    """Its conditions no longer hold then, and still it succeeds: DynamoDB knows the token."""
    proxy.break_on_answer()
    writing = asyncio.create_task(storage.mutate([raised("a"), raised("b")]))
    await proxy.lost_an_answer()
    proxy.pass_on()

    await writing

    assert await values(direct) == [1, 1]
    with pytest.raises(NoMutationError):
        await storage.mutate([raised("a"), raised("b")])


async def test_a_batch_without_any_answer_is_unknown(
    storage: DynamoDbStorage, direct: DynamoDbStorage, proxy: TcpProxy
):
    proxy.break_on_answer()

    with pytest.raises(UnknownOutcomeError):
        await storage.mutate([raised("a"), raised("b")])

    assert proxy.answers_lost == 2
    assert await values(direct) == [1, 1]


async def test_a_read_is_repeated_until_it_is_answered(storage: DynamoDbStorage, proxy: TcpProxy):
    proxy.break_on_answer()
    reading = asyncio.create_task(storage.get(COUNTERS, Key(("a",))))
    await proxy.lost_an_answer()
    proxy.pass_on()

    assert await reading == {"id": "a", "value": 0, "note": None}


async def test_a_read_that_is_never_answered_is_unavailable(hasty: DynamoDbStorage, proxy: TcpProxy):
    proxy.break_on_answer()

    for reading in (hasty.get(COUNTERS, Key(("a",))), hasty.scan(Scan(COUNTERS, ("a",))), hasty.tables()):
        with pytest.raises(UnavailableStorageError) as caught:
            await reading
        assert "endpoint" in caught.value.remedy


async def test_a_server_that_is_not_there_is_unavailable_and_nothing_was_written(unused_tcp_port_of: int):
    storage = DynamoDbStorage(
        region="local", endpoint=f"http://127.0.0.1:{unused_tcp_port_of}", credentials=CREDENTIALS, tries=2
    )

    for call in (storage.tables(), storage.get(COUNTERS, Key(("a",))), storage.create_table(COUNTERS)):
        with pytest.raises(UnavailableStorageError, match="reached"):
            await call
    await storage.close()


@pytest.fixture
async def unused_tcp_port_of() -> int:
    """A port that nobody listens on."""
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port: int = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    return port


# Limits


async def test_a_row_that_is_too_large_is_refused(direct: DynamoDbStorage):
    key = Key(("large",))
    with pytest.raises(InvalidOperationError, match="at most 400 KB"):
        await direct.mutate([Put(COUNTERS, key, {"note": "x" * 410_000})])

    wide = replace(COUNTERS, name="wide", columns={**COUNTERS.columns, "more": T.TEXT})
    await direct.create_table(wide)
    await direct.mutate([Put(wide, key, {"note": "x" * 300_000})])
    grown = Put(wide, key, {"more": "x" * 300_000})
    for batch in ([grown], [grown, Put(COUNTERS, key, {"value": 1})]):  # too large only in the database
        with pytest.raises(InvalidOperationError):
            await direct.mutate(batch)

    row = await direct.get(wide, key)
    assert row is not None
    assert row["more"] is None
    assert await direct.get(COUNTERS, key) is None


async def test_a_batch_that_is_too_large_is_refused(direct: DynamoDbStorage):
    batch = [Put(COUNTERS, Key((f"part {n}",)), {"note": "x" * 390_000}) for n in range(11)]

    with pytest.raises(InvalidOperationError, match="at most 4 MB"):
        await direct.mutate(batch)

    assert await direct.get(COUNTERS, Key(("part 0",))) is None


async def test_each_row_of_a_batch_goes_by_the_order_of_its_own_table(direct: DynamoDbStorage):
    tables = (FORWARD, BACKWARD)
    for batch in (tables, tables[::-1]):
        await direct.mutate([Put(table, Key((1,), (n,)), {"v": n}) for n in range(3) for table in batch])

    assert [row["n"] for row in await direct.scan(Scan(FORWARD, (1,)))] == [0, 1, 2]
    assert [row["n"] for row in await direct.scan(Scan(BACKWARD, (1,)))] == [2, 1, 0]
    found = await direct.get(BACKWARD, Key((1,), (2,)))
    assert found == {"id": 1, "n": 2, "v": 2}


# Beside ScalarDB


async def test_a_row_is_stored_as_scalardb_stores_it(direct: DynamoDbStorage, dynamodb: LocalDynamoDb):
    await direct.mutate([Put(BACKWARD, Key((7,), (1,)), {"v": 5}, IfNotExists())])
    async with _raw(dynamodb) as client:
        item = await client.get_item(
            TableName=f"{PREFIX}depot.backward",
            Key={
                "concatenatedPartitionKey": {"B": bytes.fromhex("80000007")},
                "concatenatedClusteringKey": {"B": bytes.fromhex("7ffffffe")},
            },
        )
        described = await client.get_item(
            TableName=f"{PREFIX}scalardb.metadata", Key={"table": {"S": f"{PREFIX}depot.backward"}}
        )
        namespaces = await client.scan(TableName=f"{PREFIX}scalardb.namespaces")

    del item["Item"]["concatenatedPartitionKey"], item["Item"]["concatenatedClusteringKey"]
    assert item["Item"] == {"id": {"N": "7"}, "n": {"N": "1"}, "v": {"N": "5"}}
    assert described["Item"] == {
        "table": {"S": f"{PREFIX}depot.backward"},
        "columns": {"M": {"id": {"S": "int"}, "n": {"S": "int"}, "v": {"S": "bigint"}}},
        "partitionKey": {"L": [{"S": "id"}]},
        "clusteringKey": {"L": [{"S": "n"}]},
        "clusteringOrders": {"M": {"n": {"S": "DESC"}}},
        "columnOrder": {"L": [{"S": "id"}, {"S": "n"}, {"S": "v"}]},
    }
    names = {found["namespace_name"]["S"] for found in namespaces["Items"]}
    assert names >= {f"{PREFIX}{name}" for name in ("scalardb", "shop", "depot")}


async def test_a_table_that_scalardb_made_is_used(direct: DynamoDbStorage, dynamodb: LocalDynamoDb):
    """Provisioned, without the order of columns, a NULL attribute instead of none, an index that is added here."""
    theirs = TableSchema("shop", "theirs", {"id": T.TEXT, "a": T.INT, "z": T.TEXT}, ("id",))
    name = f"{PREFIX}shop.theirs"
    capacity = {"ReadCapacityUnits": 10, "WriteCapacityUnits": 10}
    async with _raw(dynamodb) as client:
        await client.create_table(
            TableName=name,
            KeySchema=[{"AttributeName": "concatenatedPartitionKey", "KeyType": "HASH"}],
            AttributeDefinitions=[{"AttributeName": "concatenatedPartitionKey", "AttributeType": "B"}],
            ProvisionedThroughput=capacity,
        )
        await client.put_item(
            TableName=f"{PREFIX}scalardb.metadata",
            Item={
                "table": {"S": name},
                "columns": {"M": {"z": {"S": "text"}, "a": {"S": "int"}, "id": {"S": "text"}}},
                "partitionKey": {"L": [{"S": "id"}]},
            },
        )
        item = {"concatenatedPartitionKey": {"B": b"k\0"}, "id": {"S": "k"}, "a": {"NULL": True}, "z": {"S": "x"}}
        await client.put_item(TableName=name, Item=item)

    assert theirs in await direct.tables()
    await direct.create_table(theirs)
    assert await direct.get(theirs, Key(("k",))) == {"id": "k", "a": None, "z": "x"}
    null, other = (If((ColumnCondition("a", op, value),)) for op, value in ((Operator.IS_NULL, None), (Operator.NE, 1)))
    with pytest.raises(NoMutationError):
        await direct.mutate([Put(theirs, Key(("k",)), {"a": 2}, other)])
    await direct.mutate([Put(theirs, Key(("k",)), {"a": 2}, null)])
    await direct.create_index(theirs, "z")
    indexed = replace(theirs, indexes=frozenset({"z"}))
    pages = [page async for page in direct.pages(IndexScan(indexed, "z", "x"))]
    assert pages == [[{"id": "k", "a": 2, "z": "x"}]]
    async with _raw(dynamodb) as client:
        [index] = (await client.describe_table(TableName=name))["Table"]["GlobalSecondaryIndexes"]
    assert index["IndexName"] == f"{name}.global_index.z"
    assert index["ProvisionedThroughput"]["WriteCapacityUnits"] == 10


async def test_a_table_whose_creation_was_interrupted_is_completed(direct: DynamoDbStorage, dynamodb: LocalDynamoDb):
    table = replace(COUNTERS, name="interrupted")
    await direct.create_table(table)
    async with _raw(dynamodb) as client:
        await client.delete_table(TableName=f"{PREFIX}shop.interrupted")

    with pytest.raises(InvalidOperationError, match="no table"):
        await direct.get(table, Key(("a",)))
    await direct.create_table(table)

    assert await direct.get(table, Key(("a",))) is None


async def test_of_two_who_create_different_tables_under_one_name_one_is_refused(
    direct: DynamoDbStorage, dynamodb: LocalDynamoDb
):
    other = DynamoDbStorage(
        region="local", endpoint=dynamodb.endpoint_url, credentials=CREDENTIALS, prefix=PREFIX, units=5
    )
    wanted = replace(FORWARD, name="contested"), replace(FORWARD, name="contested", descending=frozenset({"n"}))

    answers = await asyncio.gather(
        *(storage.create_table(table) for storage, table in zip((direct, other), wanted, strict=True)),
        return_exceptions=True,
    )

    assert sorted(type(answer).__name__ for answer in answers) == ["InvalidOperationError", "NoneType"]
    won = wanted[answers.index(None)]
    await other.mutate([Put(won, Key((1,), (n,)), {"v": n}) for n in range(2)])
    assert await direct.scan(Scan(won, (1,))) == await other.scan(Scan(won, (1,)))
    await other.close()


async def test_the_tables_about_tables_are_nobodys_to_change(direct: DynamoDbStorage):
    system = TableSchema("scalardb", "metadata", {"table": T.TEXT}, ("table",))

    for call in (direct.create_table(system), direct.drop_table(system), direct.create_namespace("ScalarDB")):
        with pytest.raises(InvalidOperationError, match="described"):
            await call


def _raw(dynamodb: LocalDynamoDb) -> Any:
    return get_session().create_client(
        "dynamodb",
        region_name="local",
        endpoint_url=dynamodb.endpoint_url,
        aws_access_key_id=CREDENTIALS[0],
        aws_secret_access_key=CREDENTIALS[1],
    )


# Answers as they are told


class ToldServer:
    """Answers requests in turn as told, each `(status, type of the error, more)`; then with nothing but success."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, str, dict[str, Any]]] = []
        self.requests: list[tuple[str, dict[str, Any]]] = []

    async def answer(self, request: web.Request) -> web.Response:
        operation = request.headers["X-Amz-Target"].rpartition(".")[2]
        body = await request.json()
        if body.get("TableName") == "scalardb.metadata":
            columns = {column: {"S": kind.value.lower()} for column, kind in COUNTERS.columns.items()}
            item = {"columns": {"M": columns}, "partitionKey": {"L": [{"S": "id"}]}}
            return web.json_response({"Item": item})
        self.requests.append((operation, body))
        if not self.answers:
            return web.json_response({})
        status, kind, more = self.answers.pop(0)
        text = json.dumps({"__type": f"com.amazonaws.dynamodb.v20120810#{kind}", "message": f"told {kind}", **more})
        return web.Response(text=text, status=status, content_type="application/x-amz-json-1.0")


Told = tuple[ToldServer, DynamoDbStorage, list[float]]


@pytest.fixture
async def told(told_server: Told) -> Told:
    server, _, pauses = told_server
    for heard in (server.answers, server.requests, pauses):
        heard.clear()
    return told_server


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def told_server() -> AsyncIterator[Told]:
    """The server, a storage on it of three tries, and the pauses that it made."""
    server = ToldServer()
    application = web.Application()
    application.router.add_post("/", server.answer)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    pauses: list[float] = []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)

    storage = DynamoDbStorage(
        region="local", endpoint=f"http://127.0.0.1:{port}", credentials=CREDENTIALS, tries=3, sleep=pause
    )
    yield server, storage, pauses
    await storage.close()
    await runner.cleanup()


def cancelled(*reasons: str) -> tuple[int, str, dict[str, Any]]:
    return 400, "TransactionCanceledException", {"CancellationReasons": [{"Code": reason} for reason in reasons]}


SINGLE: Sequence[Put] = [raised("a")]
BATCH: Sequence[Put] = [raised("a"), raised("b")]
PASSING = [
    (SINGLE, (400, "TransactionConflictException", {})),
    (SINGLE, (400, "ThrottlingException", {})),
    (SINGLE, (400, "ProvisionedThroughputExceededException", {})),
    (BATCH, cancelled("TransactionConflict", "None")),
    (BATCH, cancelled("None", "ThrottlingError")),
    (BATCH, cancelled("ProvisionedThroughputExceeded", "TransactionConflict")),
    (BATCH, (400, "RequestLimitExceeded", {})),
]


@pytest.mark.parametrize(("mutations", "answer"), PASSING)
async def test_a_write_that_surely_wrote_nothing_for_a_cause_that_passes_is_repeated(
    told: Told, mutations: Sequence[Put], answer: tuple[int, str, dict[str, Any]]
):
    server, storage, pauses = told
    server.answers = [answer, answer]

    await storage.mutate(mutations)

    assert len(server.requests) == 3
    assert all(request == server.requests[0] for request in server.requests), "under one token, if it has one"
    first, second = pauses
    assert 0.005 <= first <= 0.015, "never twice the same"
    assert 0.010 <= second <= 0.030, "and longer each time"


@pytest.mark.parametrize(("mutations", "answer"), PASSING)
async def test_a_cause_that_does_not_pass_is_unavailable_with_a_remedy(
    told: Told, mutations: Sequence[Put], answer: tuple[int, str, dict[str, Any]]
):
    server, storage, _ = told
    server.answers = [answer] * 3

    with pytest.raises(UnavailableStorageError) as caught:
        await storage.mutate(mutations)

    assert len(server.requests) == 3
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("mutations", "answer", "error"),
    [
        (SINGLE, (400, "ConditionalCheckFailedException", {}), NoMutationError),
        (BATCH, cancelled("ConditionalCheckFailed", "None"), NoMutationError),
        (BATCH, cancelled("TransactionConflict", "ConditionalCheckFailed"), NoMutationError),
        (BATCH, cancelled("ValidationError", "TransactionConflict"), InvalidOperationError),
        (BATCH, cancelled("SomethingNew"), UnavailableStorageError),
        (SINGLE, (400, "ValidationException", {}), InvalidOperationError),
        (SINGLE, (400, "ItemCollectionSizeLimitExceededException", {}), InvalidOperationError),
        (SINGLE, (400, "ResourceNotFoundException", {}), InvalidOperationError),
        (SINGLE, (400, "AccessDeniedException", {}), UnavailableStorageError),
        (SINGLE, (400, "UnrecognizedClientException", {}), UnavailableStorageError),
        (SINGLE, (500, "InternalServerError", {}), UnknownOutcomeError),
        (SINGLE, (503, "ServiceUnavailable", {}), UnknownOutcomeError),
    ],
    ids=repr,
)
async def test_every_other_answer_to_a_write_is_final(
    told: Told, mutations: Sequence[Put], answer: tuple[int, str, dict[str, Any]], error: type[Exception]
):
    server, storage, _ = told
    server.answers = [answer]

    with pytest.raises(error) as caught:
        await storage.mutate(mutations)

    assert type(caught.value) is error
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "second",
    [
        (500, "InternalServerError", {}),
        (400, "TransactionInProgressException", {}),
        (400, "ThrottlingException", {}),
        cancelled("TransactionConflict"),
        cancelled("ConditionalCheckFailed"),
    ],
    ids=repr,
)
async def test_after_an_unknown_outcome_of_a_batch_no_second_answer_but_success_is_believed(
    told: Told, second: tuple[int, str, dict[str, Any]]
):
    server, storage, _ = told
    server.answers = [(500, "InternalServerError", {}), second]

    with pytest.raises(UnknownOutcomeError):
        await storage.mutate(BATCH)

    tokens = [body["ClientRequestToken"] for _, body in server.requests]
    assert len(tokens) == 2
    assert tokens[0] == tokens[1]


async def test_two_batches_have_two_tokens(told: Told):
    server, storage, _ = told
    for _ in range(2):
        await storage.mutate(BATCH)

    assert len({body["ClientRequestToken"] for _, body in server.requests}) == 2


@pytest.mark.parametrize("kind", ["InternalServerError", "ServiceUnavailable", "ThrottlingException"])
async def test_a_read_is_repeated_after_errors_of_the_servers_own(told: Told, kind: str):
    server, storage, _ = told
    answer: tuple[int, str, dict[str, Any]] = (400 if kind == "ThrottlingException" else 500, kind, {})
    server.answers = [answer, answer]
    assert await storage.get(COUNTERS, Key(("a",))) is None

    server.answers = [answer] * 3
    with pytest.raises(UnavailableStorageError):
        await storage.get(COUNTERS, Key(("a",)))


async def test_reads_are_strongly_consistent_and_writes_name_nothing_in_their_text(told: Told):
    server, storage, _ = told
    await storage.get(COUNTERS, Key(("a",)))
    await storage.scan(Scan(COUNTERS, ("a",)))
    await storage.partitions(COUNTERS)
    await storage.mutate([Put(COUNTERS, Key(("a",)), {"note": "; DROP"}, raised("a").condition)])

    *reads, (_, write) = server.requests
    assert [(operation, body["ConsistentRead"]) for operation, body in reads] == [
        ("GetItem", True),
        ("Query", True),
        ("Scan", True),
    ]
    for expression in (write["UpdateExpression"], write["ConditionExpression"]):
        assert not {"note", "value", "DROP", "concatenatedPartitionKey"} & set(
            expression.replace("(", " ").replace(")", " ").replace(",", " ").split()
        )


@pytest.mark.parametrize(("region", "credentials"), [("local", None), (None, CREDENTIALS)])
async def test_what_is_missing_to_ask_is_said_with_where_it_goes(
    monkeypatch: pytest.MonkeyPatch, region: str | None, credentials: tuple[str, str] | None
):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    storage = DynamoDbStorage(region=region, endpoint="http://127.0.0.1:9", credentials=credentials)

    with pytest.raises(UnavailableStorageError) as caught:
        await storage.tables()

    assert "AWS_DEFAULT_REGION" in caught.value.remedy
    assert "AWS_ACCESS_KEY_ID" in caught.value.remedy
    await storage.close()


async def test_a_closed_storage_says_so(storage: DynamoDbStorage):
    await storage.mutate([raised("b")])
    await storage.close()
    await storage.close()

    for call in (storage.mutate([raised("a")]), storage.get(COUNTERS, Key(("a",)))):
        with pytest.raises(InvalidOperationError, match="closed"):
            await call


async def test_closing_waits_for_writes_under_way(storage: DynamoDbStorage, direct: DynamoDbStorage, proxy: TcpProxy):
    proxy.hold_answers()
    writing = asyncio.create_task(storage.mutate([raised("a")]))
    while await values(direct) == [0, 0]:
        pass  # it is under way
    closing = asyncio.create_task(storage.close())
    await asyncio.sleep(0)
    assert not closing.done()

    proxy.pass_on()
    await closing

    assert writing.done()
    await writing
