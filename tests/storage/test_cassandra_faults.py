"""Cassandra when things go wrong: lost answers, broken connections, paused and badly configured servers.

What is asserted is the contract of outcomes: a write that may have been applied is unknown, and reading tells; a write
that was surely not sent is unavailable; a read may always be asked again.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from cassandra.cluster import EXEC_PROFILE_DEFAULT

from infra.storage.cassandra import CassandraStorage, _Table
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
    Key,
    Mutation,
    Operator,
    Put,
    Row,
    Scan,
    ScanAll,
    TableSchema,
    Value,
)
from scripts.proof.tcp_proxy import TcpProxy

if TYPE_CHECKING:
    from infra.servers.cassandra import LocalCassandra

T = DataType
NAMESPACE = "faults"
TABLE = TableSchema(NAMESPACE, "Things", {"id": T.TEXT, "n": T.INT, "v": T.INT, "w": T.TEXT}, ("id",), ("n",))
PLAIN = TableSchema(NAMESPACE, "plain", {"id": T.TEXT, "v": T.INT}, ("id",))
TIMEOUT_S = 2.0


def at(name: str, n: int = 0) -> Key:
    return Key((name,), (n,))


def v_is(value: Value) -> If:
    return If((ColumnCondition("v", Operator.EQ, value),))


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def direct(cassandra: LocalCassandra) -> AsyncIterator[CassandraStorage]:
    """A storage that reaches the server without a proxy; it has TABLE and PLAIN."""
    storage = CassandraStorage([cassandra.contact_point], cassandra.port)
    await storage.create_table(TABLE)
    await storage.create_table(PLAIN)
    yield storage
    what = "dropping all tables, foreign ones included"
    names = "SELECT table_name FROM system_schema.tables WHERE keyspace_name = ?"
    for (name,) in await storage._session.administer(names, what, (NAMESPACE,)):
        await storage._session.administer(f'DROP TABLE "{NAMESPACE}"."{name}"', what)
    await storage.drop_namespace(NAMESPACE)
    await storage.close()


@pytest.fixture(autouse=True)
async def _empty(direct: CassandraStorage) -> AsyncIterator[None]:
    yield
    for table in (TABLE, PLAIN):
        delete = f'DELETE FROM "{NAMESPACE}"."{table.name}" WHERE "id" = ?'  # Truncation takes ten times as long.
        for partition in await direct.partitions(table):
            await direct._session.administer(delete, "emptying a table", partition)


@pytest.fixture
async def proxy(cassandra: LocalCassandra) -> AsyncIterator[TcpProxy]:
    async with TcpProxy(cassandra.contact_point, cassandra.port) as proxy:
        yield proxy


@pytest.fixture
async def proxied(direct: CassandraStorage, proxy: TcpProxy) -> AsyncIterator[CassandraStorage]:
    storage = CassandraStorage([proxy.host], proxy.port, request_timeout_s=60.0, max_in_flight=8)
    await storage.get(TABLE, at("warm"))
    yield storage
    proxy.pass_on()
    await storage.close()


def in_a_hurry(storage: CassandraStorage) -> None:
    """From now on `storage` waits for no answer that will never come. Before, it has all the time that it wants."""
    session = storage._session._session
    assert session is not None
    session.get_execution_profile(EXEC_PROFILE_DEFAULT).request_timeout = TIMEOUT_S


WRITES: dict[str, list[Mutation]] = {
    "insert": [Put(TABLE, at("insert"), {"v": 1}, IfNotExists())],
    "update": [Put(TABLE, at("update"), {"v": 1}, v_is(0))],
    "delete": [Delete(TABLE, at("delete"), v_is(0))],
    "batch": [Put(TABLE, at("batch", 1), {"v": 1}, IfNotExists()), Delete(TABLE, at("batch"), IfExists())],
    "upsert": [Put(PLAIN, Key(("upsert",)), {"v": 1})],
    "removal": [Delete(PLAIN, Key(("removal",)))],
}
BEFORE: list[Mutation] = [
    *(Put(TABLE, at(name), {"v": 0}, IfNotExists()) for name in ("update", "delete", "batch")),
    Put(PLAIN, Key(("removal",)), {"v": 0}),
]
AFTER = {
    "insert": [{"id": "insert", "n": 0, "v": 1, "w": None}],
    "update": [{"id": "update", "n": 0, "v": 1, "w": None}],
    "delete": [],
    "batch": [{"id": "batch", "n": 1, "v": 1, "w": None}],
    "upsert": [{"id": "upsert", "v": 1}],
    "removal": [],
}


async def outcomes(storage: CassandraStorage, writes: Sequence[Sequence[Mutation]]) -> list[BaseException | None]:
    return await asyncio.gather(*map(storage.mutate, writes), return_exceptions=True)


async def prepared_and_undone(proxied: CassandraStorage, direct: CassandraStorage) -> None:
    """Every statement was sent once, so that it is prepared; the rows are as BEFORE says."""
    for mutation in BEFORE:
        await direct.mutate([mutation])
    assert await outcomes(proxied, list(WRITES.values())) == [None] * len(WRITES)
    for mutations in WRITES.values():
        for mutation in mutations:
            condition = IfExists() if mutation.table is TABLE else None
            try:
                await direct.mutate([Delete(mutation.table, mutation.key, condition)])
            except NoMutationError:
                continue
    for mutation in BEFORE:
        await direct.mutate([mutation])


async def rows(storage: CassandraStorage, name: str) -> list[Row]:
    table = WRITES[name][0].table
    return await storage.scan(Scan(table, (name,)))


@pytest.mark.parametrize("how", ["swallowed", "broken"])
async def test_a_write_whose_answer_is_lost_is_unknown_and_a_read_tells_that_it_was_applied(
    proxied: CassandraStorage, direct: CassandraStorage, proxy: TcpProxy, how: str
):
    await prepared_and_undone(proxied, direct)
    if how == "swallowed":
        proxy.swallow_answers()
        in_a_hurry(proxied)
        answers = await outcomes(proxied, list(WRITES.values()))
        assert [type(answer) for answer in answers] == [UnknownOutcomeError] * len(WRITES)
    else:
        for write in WRITES.values():
            proxy.break_on_answer()
            [answer] = await outcomes(proxied, [write])
            assert type(answer) is UnknownOutcomeError
            proxy.pass_on()
            await until_it_answers(proxied)

    for name in WRITES:
        assert await rows(direct, name) == AFTER[name]


async def test_a_write_whose_request_is_lost_is_as_unknown_and_a_competing_write_decides(
    proxied: CassandraStorage, direct: CassandraStorage, proxy: TcpProxy
):
    await prepared_and_undone(proxied, direct)
    proxy.swallow_requests()
    in_a_hurry(proxied)

    [answer] = await outcomes(proxied, [WRITES["insert"]])

    assert type(answer) is UnknownOutcomeError
    await direct.mutate([Put(TABLE, at("insert"), {"v": 2}, IfNotExists())])
    assert await rows(direct, "insert") == [{"id": "insert", "n": 0, "v": 2, "w": None}]


async def test_a_condition_that_did_not_hold_is_as_unknown_when_nobody_says_so(
    proxied: CassandraStorage, direct: CassandraStorage, proxy: TcpProxy
):
    await prepared_and_undone(proxied, direct)
    await direct.mutate([Put(TABLE, at("insert"), {"v": 7}, IfNotExists())])
    proxy.swallow_answers()
    in_a_hurry(proxied)

    [answer] = await outcomes(proxied, [WRITES["insert"]])

    assert type(answer) is UnknownOutcomeError
    assert await rows(direct, "insert") == [{"id": "insert", "n": 0, "v": 7, "w": None}]


async def test_a_read_whose_answer_is_lost_is_unavailable_with_a_remedy(proxied: CassandraStorage, proxy: TcpProxy):
    async def pages() -> list[list[Row]]:
        return [page async for page in proxied.pages(ScanAll(TABLE))]

    reads = [lambda: proxied.get(TABLE, at("warm")), lambda: proxied.scan(Scan(TABLE, ("warm",))), pages]
    for read in (*reads, lambda: proxied.partitions(TABLE)):
        await read()
    proxy.swallow_answers()
    in_a_hurry(proxied)

    answers = await asyncio.gather(*(read() for read in reads), proxied.partitions(TABLE), return_exceptions=True)

    for answer in answers:
        assert isinstance(answer, UnavailableStorageError)
        assert answer.remedy


async def until_it_answers(storage: CassandraStorage) -> None:
    """The driver reconnects by itself, every half second; until it has, everything is unavailable."""
    async with asyncio.timeout(30):
        while True:
            try:
                await storage.get(TABLE, at("warm"))
                return
            except UnavailableStorageError:
                await asyncio.sleep(0.05)


async def test_what_cannot_be_sent_is_unavailable_and_served_again_when_the_server_is_back(
    proxied: CassandraStorage, direct: CassandraStorage, proxy: TcpProxy
):
    await prepared_and_undone(proxied, direct)
    proxy.refuse()
    answers: list[BaseException | None] = []
    async with asyncio.timeout(30):
        while not answers or isinstance(answers[-1], UnknownOutcomeError):
            answers += await outcomes(proxied, [WRITES["insert"]])

    assert isinstance(answers[-1], UnavailableStorageError)
    assert answers[-1].remedy
    assert await rows(direct, "insert") == []

    proxy.pass_on()
    await until_it_answers(proxied)
    await proxied.mutate(WRITES["insert"])
    assert await rows(direct, "insert") == AFTER["insert"]


async def test_late_answers_are_answers(proxied: CassandraStorage, proxy: TcpProxy):
    await proxied.mutate([Put(TABLE, at("late"), {"v": 1}, IfNotExists())])
    proxy.delay(TIMEOUT_S / 10)

    with pytest.raises(NoMutationError):
        await proxied.mutate([Put(TABLE, at("late"), {"v": 1}, IfNotExists())])
    assert await proxied.get(TABLE, at("late")) == {"id": "late", "n": 0, "v": 1, "w": None}


async def test_no_more_requests_are_outstanding_than_was_allowed(
    proxied: CassandraStorage, proxy: TcpProxy, caplog: pytest.LogCaptureFixture
):
    proxy.hold_answers()
    reads = [asyncio.ensure_future(proxied.get(TABLE, at(f"k{n}"))) for n in range(50)]
    most = 0
    for _ in range(20):
        await asyncio.sleep(0)
        most = max(most, proxied.in_flight)
    assert most == proxied.in_flight == 8

    for read in reads[:20]:
        read.cancel()
    await asyncio.sleep(0)
    assert proxied.in_flight == 8, "what was sent is outstanding, though its caller gave up"
    proxy.pass_on()

    assert await asyncio.gather(*reads[20:]) == [None] * 30
    assert proxied.in_flight == 0
    assert all(read.cancelled() for read in reads[:20])
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_closing_waits_for_what_is_outstanding_and_refuses_what_comes_after(
    proxied: CassandraStorage, direct: CassandraStorage, proxy: TcpProxy
):
    await proxied.mutate([Put(TABLE, at("close", 9), {"v": 9}, IfNotExists())])
    proxy.hold_answers()
    writing = [
        asyncio.ensure_future(proxied.mutate([Put(TABLE, at("close", n), {"v": n}, IfNotExists())])) for n in range(4)
    ]
    await asyncio.wait(writing, timeout=0.01)
    assert proxied.in_flight == 4

    closing = asyncio.ensure_future(proxied.close())
    await asyncio.wait([closing], timeout=0.01)
    assert not closing.done()
    proxy.pass_on()
    await closing

    assert await asyncio.gather(*writing) == [None] * 4
    assert len(await direct.scan(Scan(TABLE, ("close",)))) == 5
    with pytest.raises(InvalidOperationError, match="closed"):
        await proxied.get(TABLE, at("warm"))
    await proxied.close()


async def test_a_storage_serves_one_event_loop_after_another(cassandra: LocalCassandra, direct: CassandraStorage):
    storage = CassandraStorage([cassandra.contact_point], cassandra.port)

    def in_a_loop_of_its_own() -> Row | None:
        async def write_and_read() -> Row | None:
            await storage.mutate([Put(TABLE, at("loops"), {"v": 1}, IfNotExists())])
            return await storage.get(TABLE, at("loops"))

        return asyncio.run(write_and_read())

    assert await asyncio.to_thread(in_a_loop_of_its_own) == {"id": "loops", "n": 0, "v": 1, "w": None}
    assert await storage.get(TABLE, at("loops")) == {"id": "loops", "n": 0, "v": 1, "w": None}
    await storage.close()


async def test_a_storage_is_not_pickled(direct: CassandraStorage):
    with pytest.raises(TypeError, match="in each process"):
        pickle.dumps(direct)


async def test_many_who_come_first_share_one_connection_and_one_preparation(
    cassandra: LocalCassandra, direct: CassandraStorage
):
    storage = CassandraStorage([cassandra.contact_point], cassandra.port)

    answers = await asyncio.gather(*(storage.get(TABLE, at(f"k{n}")) for n in range(40)))

    assert answers == [None] * 40
    assert len([cql for cql in storage._session._prepared if cql.startswith('SELECT "id"')]) == 1
    await storage.close()


async def test_callers_who_give_up_while_it_connects_leave_a_storage_that_works(
    cassandra: LocalCassandra, direct: CassandraStorage
):
    storage = CassandraStorage([cassandra.contact_point], cassandra.port)
    given_up = [asyncio.ensure_future(storage.get(TABLE, at("warm"))) for _ in range(3)]
    await asyncio.sleep(0)
    for read in given_up:
        read.cancel()

    assert await storage.get(TABLE, at("warm")) is None
    assert all(read.cancelled() for read in given_up)
    await storage.close()

    unfinished = CassandraStorage([cassandra.contact_point], cassandra.port)
    reading = asyncio.ensure_future(unfinished.get(TABLE, at("warm")))
    await asyncio.sleep(0)
    await unfinished.close()
    with pytest.raises(InvalidOperationError, match="closed"):
        await reading


async def test_a_table_that_another_client_replaced_is_looked_up_again(
    cassandra: LocalCassandra, direct: CassandraStorage
):
    other = CassandraStorage([cassandra.contact_point], cassandra.port)
    table = TableSchema(NAMESPACE, "replaced", {"id": T.TEXT, "v": T.INT}, ("id",))
    wider = TableSchema(NAMESPACE, "replaced", {"id": T.TEXT, "v": T.TEXT, "w": T.INT}, ("id",))
    await direct.create_table(table)
    await direct.mutate([Put(table, Key(("a",)), {"v": 1}, IfNotExists())])

    await other.drop_table(table)
    with pytest.raises(InvalidOperationError):
        await direct.get(table, Key(("a",)))
    with pytest.raises(InvalidOperationError, match="no table"):
        await direct.get(table, Key(("a",)))
    await other.create_table(wider)
    with pytest.raises(InvalidOperationError, match="exists otherwise"):
        await direct.get(table, Key(("a",)))
    await direct.mutate([Put(wider, Key(("a",)), {"v": "x", "w": 1}, IfNotExists())])

    assert await direct.get(wider, Key(("a",))) == {"id": "a", "v": "x", "w": 1}
    await other.close()


# Rows that are absent or change while IS NULL is asked


class Meddling(CassandraStorage):
    """Lets somebody else write between the read and the write of a condition on NULLs."""

    meddling: Sequence[Sequence[Mutation]] = ()

    async def _get(self, held: _Table, key: Key) -> Row | None:
        row = await super()._get(held, key)
        if self.meddling:
            now, *self.meddling = self.meddling
            await super().mutate(now)
        return row


@pytest.fixture
async def meddled(cassandra: LocalCassandra, direct: CassandraStorage) -> AsyncIterator[Meddling]:
    storage = Meddling([cassandra.contact_point], cassandra.port)
    yield storage
    await storage.close()


IF_NULL = If((ColumnCondition("w", Operator.IS_NULL),))


async def test_is_null_makes_no_row_that_was_deleted_after_it_was_read(meddled: Meddling):
    await meddled.mutate([Put(TABLE, at("gone"), {"v": 1}, IfNotExists())])
    meddled.meddling = [[Delete(TABLE, at("gone"), IfExists())]]

    with pytest.raises(NoMutationError):
        await meddled.mutate([Put(TABLE, at("gone"), {"v": 2}, IF_NULL)])

    assert not meddled.meddling
    assert await meddled.get(TABLE, at("gone")) is None


async def test_is_null_holds_for_a_row_that_changed_otherwise_after_it_was_read(meddled: Meddling):
    await meddled.mutate([Put(TABLE, at("moved"), {"v": 1}, IfNotExists())])
    meddled.meddling = [[Put(TABLE, at("moved"), {"v": n}, v_is(n - 1))] for n in (2, 3)]

    await meddled.mutate([Put(TABLE, at("moved"), {"w": "x"}, IF_NULL)])

    assert not meddled.meddling
    assert await meddled.get(TABLE, at("moved")) == {"id": "moved", "n": 0, "v": 3, "w": "x"}


async def test_is_null_does_not_hold_for_a_column_that_was_filled_after_it_was_read(meddled: Meddling):
    await meddled.mutate([Put(TABLE, at("filled"), {"v": 1}, IfNotExists())])
    meddled.meddling = [[Put(TABLE, at("filled"), {"w": "theirs"}, IfExists())]]

    with pytest.raises(NoMutationError):
        await meddled.mutate([Put(TABLE, at("filled"), {"w": "ours"}, IF_NULL)])

    assert await meddled.get(TABLE, at("filled")) == {"id": "filled", "n": 0, "v": 1, "w": "theirs"}


async def test_is_null_holds_for_a_row_that_is_nothing_but_its_key(direct: CassandraStorage):
    await direct.mutate([Put(TABLE, at("bare"), {}, IfNotExists())])

    await direct.mutate([Put(TABLE, at("bare"), {"w": "x"}, IF_NULL)])

    assert await direct.get(TABLE, at("bare")) == {"id": "bare", "n": 0, "v": None, "w": "x"}


# Servers and settings


async def test_tables_are_as_scalardb_makes_them(direct: CassandraStorage):
    types = {data_type.lower(): data_type for data_type in direct.info.data_types}
    table = TableSchema(NAMESPACE, "Types", {"Id": T.INT, **types}, ("Id",), indexes=frozenset({"text"}))
    storage = CassandraStorage(
        direct._settings.contact_points, direct._settings.port, compaction_strategy="LCS", replication_factor=1
    )

    await storage.create_table(table)

    ask = storage._session.administer
    columns = await ask(
        "SELECT column_name, type FROM system_schema.columns WHERE keyspace_name = ? AND table_name = ?",
        "",
        (NAMESPACE, "Types"),
    )
    assert dict(columns) == {
        "Id": "int",
        "boolean": "boolean",
        "int": "int",
        "bigint": "bigint",
        "float": "float",
        "double": "double",
        "text": "text",
        "blob": "blob",
        "date": "date",
        "time": "time",
        "timestamptz": "timestamp",
    }
    indexes = await ask("SELECT index_name FROM system_schema.indexes WHERE keyspace_name = ?", "", (NAMESPACE,))
    assert indexes == [("types_index_text",)]
    [(compaction,)] = await ask(
        "SELECT compaction FROM system_schema.tables WHERE keyspace_name = ? AND table_name = ?",
        "",
        (NAMESPACE, "Types"),
    )
    assert compaction["class"].endswith("LeveledCompactionStrategy")
    keyspaces = dict(await ask("SELECT keyspace_name, replication FROM system_schema.keyspaces", ""))
    for keyspace in (NAMESPACE, "scalardb"):
        assert keyspaces[keyspace]["replication_factor"] == "1", "the default on a single node"
        assert keyspaces[keyspace]["class"].endswith("SimpleStrategy")
    assert "scalardb" not in await storage.namespaces()
    await storage.close()


async def test_a_foreign_table_is_used_if_the_port_has_words_for_it_and_passed_over_if_not(direct: CassandraStorage):
    for name, columns in {
        "foreign": "(a int, b text, c timestamp, PRIMARY KEY ((a), b)) WITH CLUSTERING ORDER BY (b DESC)",
        "with_list": "(a int PRIMARY KEY, b list<int>)",
        "with_counter": "(a int PRIMARY KEY, b counter)",
        "with_static": "(a int, b int, c int static, PRIMARY KEY (a, b))",
        "with_double_key": "(a double PRIMARY KEY)",
    }.items():
        await direct._session.administer(f'CREATE TABLE "{NAMESPACE}"."{name}" {columns}', "a foreign table")
    foreign = TableSchema(
        NAMESPACE, "foreign", {"a": T.INT, "b": T.TEXT, "c": T.TIMESTAMPTZ}, ("a",), ("b",), frozenset({"b"})
    )
    unworded = TableSchema(NAMESPACE, "with_list", {"a": T.INT, "b": T.TEXT}, ("a",))

    ours = [table for table in await direct.tables() if table.namespace == NAMESPACE]
    assert foreign in ours
    assert not [table.name for table in ours if table.name.startswith("with_")]
    with pytest.raises(InvalidOperationError, match="other types"):
        await direct.get(unworded, Key((1,)))
    await direct.mutate([Put(foreign, Key((1,), ("x",)), {}, IfNotExists())])
    assert await direct.get(foreign, Key((1,), ("x",))) == {"a": 1, "b": "x", "c": None}


async def test_a_keyspace_whose_quorum_cannot_be_reached_is_refused_with_its_setting(
    cassandra: LocalCassandra, direct: CassandraStorage
):
    wide = CassandraStorage([cassandra.contact_point], cassandra.port, replication_factor=3)
    table = TableSchema("starved", "things", {"id": T.INT}, ("id",))

    with pytest.raises(UnavailableStorageError, match="3 replicas a quorum is 2, and 1") as refused:
        await wide.create_table(table)
    assert "replication_factor" in refused.value.remedy
    assert "starved" not in await wide.namespaces()

    ask = direct._session.administer
    await ask("CREATE KEYSPACE starved WITH replication = {'class': 'SimpleStrategy', 'replication_factor': 3}", "")
    await ask("CREATE TABLE starved.things (id int PRIMARY KEY)", "")
    for call in (wide.get(table, Key((1,))), wide.mutate([Put(table, Key((1,)), {})])):
        with pytest.raises(UnavailableStorageError, match="starved cannot be used"):
            await call
    await wide.drop_table(table)
    await wide.drop_namespace("starved")
    await wide.close()


async def test_what_does_not_answer_is_unavailable_with_a_remedy(cassandra: LocalCassandra, unused_tcp_port: int):
    for storage, said in (
        (CassandraStorage(["127.0.0.1"], unused_tcp_port), "address"),
        (CassandraStorage(["no.such.host.invalid"]), "address"),
        (CassandraStorage([cassandra.contact_point], cassandra.port, local_dc="mars"), "local_dc"),
    ):
        for _ in range(2):
            with pytest.raises(UnavailableStorageError) as unreachable:
                await storage.tables()
            assert said in unreachable.value.remedy
        await storage.close()


# By what the patient client was told, who may have written the row.
WINNERS: dict[type, set[str]] = {
    type(None): {"patient"},
    NoMutationError: {"hasty"},
    UnknownOutcomeError: {"patient", "hasty"},
}


async def test_a_paused_server_leaves_outcomes_unknown_and_its_late_writes_meet_their_competitors(tmp_path: Path):
    """The process is stopped longer than clients wait, then goes on. Then it starts anew, and may lose writes."""
    from infra.servers.cassandra import LocalCassandra

    server = LocalCassandra(tmp_path / "own", heap_mb=512)
    await server.start()
    hasty = CassandraStorage([server.contact_point], server.port, request_timeout_s=TIMEOUT_S)
    patient = CassandraStorage([server.contact_point], server.port, request_timeout_s=60.0)
    try:
        await patient.create_table(TABLE)
        for storage in (patient, hasty):  # The first statements of a server take their time.
            await storage.mutate([Put(TABLE, at(str(id(storage))), {"v": 0, "w": ""}, IfNotExists())])
            await storage.get(TABLE, at("warm"))
        keys = [at(f"late{n}") for n in range(20)]

        server.pause()
        # Both clients' writes wait in the server's sockets; one client gives up, and its writes are late.
        competing = [
            asyncio.ensure_future(patient.mutate([Put(TABLE, key, {"v": 2, "w": "patient"}, IfNotExists())]))
            for key in keys
        ]
        given_up = await asyncio.gather(
            *(hasty.mutate([Put(TABLE, key, {"v": 1, "w": "hasty"}, IfNotExists())]) for key in keys),
            return_exceptions=True,
        )
        assert {type(answer) for answer in given_up} == {UnknownOutcomeError}
        server.resume()

        answers = await asyncio.gather(*competing, return_exceptions=True)
        rows = await asyncio.gather(*(patient.get(TABLE, key) for key in keys))
        for answer, row in zip(answers, rows, strict=True):
            assert row is not None
            # A slow machine may lose the patient client's connection, too; then either may have won.
            assert row["w"] in WINNERS[type(answer)]
        assert await asyncio.gather(*(patient.get(TABLE, key) for key in keys)) == rows
    finally:
        server.resume()
        await hasty.close()
        await patient.close()
        await server.stop()

    lossy = LocalCassandra(tmp_path / "own", heap_mb=512, commitlog_sync="periodic")
    await lossy.start()
    storage = CassandraStorage([lossy.contact_point], lossy.port)
    try:
        for _ in range(2):
            with pytest.raises(UnavailableStorageError, match="commitlog_sync: periodic") as refused:
                await storage.get(TABLE, at("late0"))
            assert "cassandra.yaml" in refused.value.remedy
    finally:
        await storage.close()
        await lossy.stop()
