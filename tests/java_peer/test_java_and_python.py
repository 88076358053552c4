"""A program on ScalarDB 3.19 and this engine on one Cassandra: same tables, same bytes, each settling the other's."""

from __future__ import annotations

import asyncio
import datetime
import itertools
from collections.abc import Mapping
from typing import Any

import pytest

from infra.consensus_commit import write_set
from infra.consensus_commit.coordinator import group_and_child
from infra.consensus_commit.errors import UncommittedRecordError
from infra.consensus_commit.manager import TransactionManager
from infra.consensus_commit.metadata import transactional
from infra.consensus_commit.states import TransactionState
from infra.storage.operations import IndexScan, Key, Row, TableSchema, Value
from scripts.java_peer.processes import PeerError, PeerProcess
from tests.java_peer.conftest import COORDINATORS, JAVA_MADE, PYTHON_MADE, Cql, Peers
from tests.java_peer.mixed_tables import every_type_table
from tests.java_peer.python_peer import start_python
from tests.java_peer.values import columns_to_json, row_from_json

EVERY_TYPE = {side: every_type_table(side, "every_type") for side in (JAVA_MADE, PYTHON_MADE)}
VALUE_COLUMNS = [name for name in EVERY_TYPE[JAVA_MADE].columns if name not in EVERY_TYPE[JAVA_MADE].key_columns]

UTC = datetime.UTC
VALUES: Mapping[str, tuple[Value, ...]] = {
    "plain": (
        *(True, 1, -1, 1.5, 0.1, "日本 🎈", b"bytes"),
        *(datetime.date(2024, 2, 29), datetime.time(12, 34, 56, 789_012)),
        datetime.datetime(2024, 2, 29, 12, 34, 56, 789_000, UTC),
    ),
    "smallest": (
        *(False, -(2**31), -(2**53), -3.4028234663852886e38, -1.7976931348623157e308, "", b""),
        *(datetime.date(1000, 1, 1), datetime.time(0, 0)),
        datetime.datetime(1000, 1, 1, tzinfo=UTC),
    ),
    "largest": (
        *(True, 2**31 - 1, 2**53, 3.4028234663852886e38, 1.7976931348623157e308, "\0\t\n'\"$\\\U0010ffff" * 50),
        *(bytes(range(256)), datetime.date(9999, 12, 31), datetime.time(23, 59, 59, 999_999)),
        datetime.datetime(9999, 12, 31, 23, 59, 59, 999_000, UTC),
    ),
    "least": (
        *(False, 0, 0, 1.401298464324817e-45, 5e-324, " ", b"\0"),
        *(datetime.date(1582, 10, 15), datetime.time(0, 0, 0, 1), datetime.datetime(1970, 1, 1, tzinfo=UTC)),
    ),
    "zero": (
        *(False, 0, 0, 0.0, 0.0, "0", b"0", datetime.date(1970, 1, 1), datetime.time(1)),
        datetime.datetime(1969, 12, 31, 23, 59, 59, 999_000, UTC),
    ),
    "nothing": (None,) * 10,
}
KEYS: Mapping[str, tuple[Value, ...]] = {
    "plain": (datetime.date(2024, 2, 29), 7, datetime.time(12, 34, 56, 789_012)),
    "smallest": (datetime.date(1000, 1, 1), -(2**31), datetime.time(0, 0)),
    "largest": (datetime.date(9999, 12, 31), 2**31 - 1, datetime.time(23, 59, 59, 999_999)),
    "least": (datetime.date(1969, 12, 31), 0, datetime.time(0, 0, 0, 1)),
    "zero": (datetime.date(1970, 1, 1), 0, datetime.time(1)),
    "nothing": (datetime.date(1582, 10, 15), -1, datetime.time(1)),
}

SLOWER_THAN_ITS_GROUP_MS = 2_500
"""ScalarDB moves a transaction out of its group 1.2 s after the others are ready."""

numbers = itertools.count()


def fresh(what: str) -> str:
    """Text for a partition key that no other test has."""
    return f"{what} {next(numbers)} é🎈"


def record(case: str, text: str) -> tuple[Key, Row]:
    date, *clustering = KEYS[case]
    return Key((text, date), tuple(clustering)), dict(zip(VALUE_COLUMNS, VALUES[case], strict=True))


def step(do: str, table: TableSchema, key: Key, columns: Mapping[str, Value] | None = None) -> dict[str, Any]:
    keys = dict(zip(table.key_columns, key.partition + key.clustering, strict=True))
    line = {"do": do, "table": table.full_name, "key": columns_to_json(keys)}
    return line if columns is None else {**line, "columns": columns_to_json(columns)}


def exact(row: Row | None) -> dict[str, str] | None:
    """A row so that equal means identical: 1 is not True, and every digit of a float counts."""
    return None if row is None else {name: repr(value) for name, value in row.items()}


def whole(table: TableSchema, key: Key, columns: Mapping[str, Value]) -> dict[str, str] | None:
    keys = dict(zip(table.key_columns, key.partition + key.clustering, strict=True))
    return exact({name: (keys | dict(columns))[name] for name in table.columns})


async def java_reads(java: PeerProcess, manager: str, table: TableSchema, *keys: Key) -> list[dict[str, str] | None]:
    answer = await java.ask("transaction", manager=manager, steps=[step("get", table, key) for key in keys])
    rows = [row_from_json(table, row) for row in answer["results"]]
    return [exact(row and {name: row[name] for name in table.columns}) for row in rows]


async def python_reads(manager: TransactionManager, table: TableSchema, *keys: Key) -> list[dict[str, str] | None]:
    async with manager.begin() as transaction:
        rows = await transaction.get_many(table, keys)
        await transaction.commit()
    return [exact(row) for row in rows]


async def stored(peers: Peers, table: TableSchema, key: Key) -> Row | None:
    return await peers.storage.get(transactional(table), key)


# -- tables


async def test_tables_of_both_sides_look_the_same_to_cassandra(peers: Peers, cql: Cql) -> None:
    pairs = [(JAVA_MADE, PYTHON_MADE), ("java_plain", "python_plain")]
    for what in ("keyspaces", "tables", "columns", "indexes"):
        found: dict[str, list[dict[str, Any]]] = {}
        for row in await cql(f"SELECT * FROM system_schema.{what}"):
            unlike = {name: value for name, value in row.items() if name not in ("keyspace_name", "id")}
            found.setdefault(row["keyspace_name"], []).append(unlike)
        for java, python in pairs:
            ours, theirs = (
                [row for row in found.get(side, []) if row.get("table_name") != "intents"] for side in (python, java)
            )
            assert ours == theirs, f"{what} of {python} are not those of {java}"
            assert theirs or (what, java) == ("indexes", "java_plain")


async def test_indexes_are_named_as_scalardb_names_them(peers: Peers, cql: Cql) -> None:
    for side in EVERY_TYPE:
        rows = await cql(f"SELECT index_name FROM system_schema.indexes WHERE keyspace_name = '{side}'")
        assert {row["index_name"] for row in rows} == {
            "every_type_index_an_int",
            "every_type_index_before_an_int",
        }


async def test_each_side_sees_the_others_tables_and_namespaces(peers: Peers, java: PeerProcess) -> None:
    described = [await java.ask("table", manager="java_plain", table=f"{side}.every_type") for side in EVERY_TYPE]
    namespaces = await java.ask("namespaces", manager="java_plain")
    assert described[0] == described[1]
    assert {*EVERY_TYPE} <= {*namespaces}
    tables = {table.full_name: table for table in await peers.storage.tables()}
    for table in EVERY_TYPE.values():
        assert tables[table.full_name] == transactional(table)
    assert {*EVERY_TYPE, *COORDINATORS} <= {*await peers.storage.namespaces()}


# -- values


@pytest.mark.parametrize("side", [*EVERY_TYPE])
async def test_every_value_written_by_one_is_read_by_the_other(peers: Peers, java: PeerProcess, side: str) -> None:
    table, coordinator = EVERY_TYPE[side], "java_plain" if side == JAVA_MADE else "python_plain"
    ours = {case: record(case, fresh("python wrote")) for case in VALUES}
    theirs = {case: record(case, fresh("java wrote")) for case in VALUES}
    python = peers.python(coordinator)
    async with python.begin() as transaction:
        for key, columns in ours.values():
            await transaction.insert(table, key, columns)
        await transaction.commit()
    await java.ask(
        "transaction",
        manager=coordinator,
        steps=[step("insert", table, key, columns) for key, columns in theirs.values()],
    )
    await python.drain()
    for wrote in (ours, theirs):
        keys = [key for key, _ in wrote.values()]
        expected = [whole(table, key, columns) for key, columns in wrote.values()]
        assert await java_reads(java, coordinator, table, *keys) == expected
        assert await python_reads(python, table, *keys) == expected

    (key, columns), (java_key, _) = ours["largest"], theirs["largest"]
    async with python.begin() as transaction:
        found = await transaction.scan(IndexScan(table, "an_int", columns["an_int"]))
    assert {row["pk_text"] for row in found} >= {key.partition[0], java_key.partition[0]}


async def test_bytes_of_committed_records_are_the_same(peers: Peers, java: PeerProcess, cql: Cql) -> None:
    """An update by each side, on a record that the other had inserted: every column but ids and times is the same."""
    table = EVERY_TYPE[JAVA_MADE]
    python = peers.python("java_plain")
    rows = []
    for first, second in (("python", "java"), ("java", "python")):
        key, columns = record("plain", fresh("written twice"))
        for who, do, case in ((first, "insert", "plain"), (second, "update", "largest")):
            columns = record(case, "")[1]
            if who == "java":
                read = [step("get", table, key)] if do == "update" else []
                await java.ask("transaction", manager="java_plain", steps=[*read, step(do, table, key, columns)])
            else:
                async with python.begin() as transaction:
                    await (transaction.insert if do == "insert" else transaction.update)(table, key, columns)
                    await transaction.commit()
                await python.drain()
        keyspace, text = table.namespace, key.partition[0]
        (row,) = await cql(f"SELECT * FROM {keyspace}.{table.name} WHERE pk_text = '{text}' AND pk_date = '2024-02-29'")
        assert row["tx_version"] == 2
        assert row["tx_committed_at"] >= row["tx_prepared_at"]
        assert all(value is None for name, value in row.items() if name.startswith("before_"))
        rows.append(
            {n: v for n, v in row.items() if n not in ("pk_text", "tx_id", "tx_prepared_at", "tx_committed_at")}
        )
    assert rows[0] == rows[1]


# -- recovery of what a killed program left


class Doomed:
    """Three records of every type: one to be updated, one deleted, one inserted by a transaction that never ends."""

    def __init__(self, table: TableSchema, case: str, new: str) -> None:
        self.table = table
        self.updated, self.old = record(case, fresh("updated"))
        self.deleted, _ = record(case, fresh("deleted"))
        self.inserted, self.new = record(new, fresh("inserted"))
        self.keys = (self.updated, self.deleted, self.inserted)

    async def settle(self, manager: TransactionManager) -> None:
        async with manager.begin() as transaction:
            await transaction.insert(self.table, self.updated, self.old)
            await transaction.insert(self.table, self.deleted, self.old)
            await transaction.commit()
        await manager.drain()

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [
            *(step("get", self.table, key) for key in (self.updated, self.deleted)),
            step("update", self.table, self.updated, self.new),
            step("delete", self.table, self.deleted),
            step("insert", self.table, self.inserted, self.new),
        ]

    def expected(self, *, committed: bool) -> list[dict[str, str] | None]:
        if committed:
            return [
                whole(self.table, self.updated, self.new),
                None,
                whole(self.table, self.inserted, self.new),
            ]
        return [*(whole(self.table, key, self.old) for key in (self.updated, self.deleted)), None]

    async def states(self, peers: Peers) -> list[Value]:
        rows = [await stored(peers, self.table, key) for key in self.keys]
        return [row and row["tx_state"] for row in rows]


IN_DOUBT = [TransactionState.PREPARED, TransactionState.DELETED, TransactionState.PREPARED]
PYTHON_OF_OLD = {"coordinator": "java_plain", "lifetime_ms": 15_000, "clock_behind_ms": 60_000}
CASES = [*itertools.pairwise([*VALUES, "plain"])]


async def test_python_settles_what_a_killed_java_program_left(peers: Peers, java: PeerProcess) -> None:
    """Of each kind of coordinator table, one transaction is killed before its state is written and one after."""
    later, coordinators = java, [name for name in COORDINATORS if name.startswith("java")]
    phases = {f"{name}:{phase}": phase for name in coordinators for phase in ("commit_state", "commit_records")}
    java = await peers.java(*phases)
    began: list[tuple[str, str, Doomed, str]] = []
    cases = itertools.cycle(CASES)
    for manager, phase in phases.items():
        doomed = Doomed(EVERY_TYPE[PYTHON_MADE], *next(cases))
        await doomed.settle(peers.python("python_plain"))
        await java.ask("hold", manager=manager, at=phase)
        number = len(java.events)
        java.begin("transaction", manager=manager, steps=doomed.steps)
        await java.event(lambda line, manager=manager: line["event"] == "held" and line["manager"] == manager)
        tx_id = next(line["tx_id"] for line in java.events[number:] if line["event"] == "began")
        began.append((manager, phase, doomed, tx_id))
    await java.kill()

    for manager, phase, doomed, tx_id in began:
        assert await doomed.states(peers) == IN_DOUBT
        coordinator = manager.partition(":")[0]
        assert (group_and_child(tx_id) is not None) == (coordinator == "java_grouping")
        committed = phase == "commit_records"
        if not committed:
            with pytest.raises(UncommittedRecordError):
                # However long ago that was by now: it is young for whoever lets a transaction live an hour.
                await python_reads(peers.python(coordinator, lifetime_ms=3_600_000), doomed.table, *doomed.keys)
        python = peers.python(coordinator, lifetime_ms=1)
        assert await python_reads(python, doomed.table, *doomed.keys) == doomed.expected(committed=committed)
        await python.drain()
        settled = await doomed.states(peers)
        assert settled == ([3, None, 3] if committed else [3, 3, None])
        state = await python.states.get_state(tx_id)
        assert state is not None
        assert state.state is (TransactionState.COMMITTED if committed else TransactionState.ABORTED)

    # A Java program that met none of it agrees.
    for manager, phase, doomed, tx_id in began:
        coordinator, committed = manager.partition(":")[0], phase == "commit_records"
        assert await later.ask("state", manager=coordinator, tx_id=tx_id) == ("COMMITTED" if committed else "ABORTED")
        assert await java_reads(later, coordinator, doomed.table, *doomed.keys) == doomed.expected(committed=committed)


@pytest.mark.parametrize("phase", ["commit_state", "commit_records"])
async def test_java_settles_what_a_killed_python_program_left(peers: Peers, java: PeerProcess, phase: str) -> None:
    all_doomed = [Doomed(EVERY_TYPE[JAVA_MADE], *case) for case in CASES]
    settling = peers.python("java_plain")
    for doomed in all_doomed:
        await doomed.settle(settling)
    python = await start_python()
    # Its clock is behind, so that its records have expired when a Java program finds them.
    await python.ask("open", port=peers.port, **PYTHON_OF_OLD)
    await python.ask("hold", at=phase)
    holds = 1 if phase == "commit_state" else 3  # each record lies in a partition of its own
    under_way = [python.begin("transaction", steps=doomed.steps) for doomed in all_doomed]
    await python.events_until(
        lambda events: sum(event["event"] == "held" for event in events) >= len(all_doomed) * holds,
        during=under_way if phase == "commit_state" else (),  # after it, a commit has been answered
    )
    await python.kill()
    for doomed in all_doomed:
        assert await doomed.states(peers) == IN_DOUBT

    committed = phase == "commit_records"
    for doomed in all_doomed:
        expected = doomed.expected(committed=committed)
        assert await java_reads(java, "java_plain", doomed.table, *doomed.keys) == expected
    reading = peers.python("java_plain")
    for doomed in all_doomed:
        assert await python_reads(reading, doomed.table, *doomed.keys) == doomed.expected(committed=committed)


@pytest.mark.parametrize("coordinator", ["java_plain", "java_grouping"])
async def test_a_java_program_that_was_overruled_while_it_slept_hears_that_it_conflicted(
    peers: Peers, java: PeerProcess, coordinator: str
) -> None:
    doomed = Doomed(EVERY_TYPE[JAVA_MADE], "plain", "largest")
    python, sleeper = peers.python(coordinator, lifetime_ms=1), f"{coordinator}:sleeper"
    await doomed.settle(python)
    await java.ask("open", manager=sleeper, properties=peers.settings(sleeper))
    await java.ask("hold", manager=sleeper, at="commit_state")
    sleeping = java.begin("transaction", manager=sleeper, steps=doomed.steps)
    await java.event(lambda line: line["event"] == "held" and line["manager"] == sleeper)
    assert await python_reads(python, doomed.table, *doomed.keys) == doomed.expected(committed=False)
    await java.ask("release", manager=sleeper)
    with pytest.raises(PeerError, match="CommitConflictException"):
        await sleeping
    await java.ask("close", manager=sleeper)
    assert await java_reads(java, coordinator, doomed.table, *doomed.keys) == doomed.expected(committed=False)


# -- ScalarDB's group commit, and its log of what was written


async def test_transactions_that_a_java_program_committed_in_groups_are_seen_committed(
    peers: Peers, java: PeerProcess
) -> None:
    """Some share a row under their group's id; a slow one has left its group and has a row of its own."""
    table = EVERY_TYPE[JAVA_MADE]
    keys = [record("plain", fresh("in a group"))[0] for _ in range(8)]
    manager, group_commit = "java_grouping:together", "scalar.db.consensus_commit.coordinator.group_commit"
    # Closed when it is full, and not 40 ms after its first member, when the slow one may not have come yet.
    full = {f"{group_commit}.slot_capacity": str(len(keys)), f"{group_commit}.group_size_fix_timeout_millis": "30000"}
    await java.ask("open", manager=manager, properties={**peers.settings(manager), **full})
    slow = {"do": "wait", "milliseconds": SLOWER_THAN_ITS_GROUP_MS}
    answers = await asyncio.gather(
        *(
            java.ask(
                "transaction",
                manager=manager,
                steps=[step("insert", table, key, {"an_int": number}), *([slow] if number == 7 else [])],
            )
            for number, key in enumerate(keys)
        )
    )
    python = peers.python("java_grouping")
    children = 0
    for number, (key, answer) in enumerate(zip(keys, answers, strict=True)):
        state = await python.states.get_state(answer["tx_id"])
        assert state is not None
        assert (state.tx_id, state.state) == (answer["tx_id"], TransactionState.COMMITTED)
        group = group_and_child(answer["tx_id"])
        assert group is not None
        if state.child_ids:
            assert group[1] in state.child_ids
            children += 1
        row = await stored(peers, table, key)
        assert row is not None
        assert (row["tx_id"], row["tx_state"], row["an_int"]) == (answer["tx_id"], 3, number)
        assert row["tx_committed_at"] == state.created_at_ms
    slowest = await python.states.get_state(answers[7]["tx_id"])
    assert slowest is not None
    assert slowest.child_ids == ()
    assert children >= 2
    await java.ask("close", manager=manager)


async def test_the_write_set_that_a_java_program_logged_names_what_it_wrote(peers: Peers, java: PeerProcess) -> None:
    doomed = Doomed(EVERY_TYPE[PYTHON_MADE], "smallest", "largest")
    python = peers.python("java_logging")
    await doomed.settle(python)
    answer = await java.ask("transaction", manager="java_logging", steps=doomed.steps)
    state = await python.states.get_state(answer["tx_id"])
    assert state is not None
    assert state.write_set is not None
    written = write_set.decode(state.write_set)
    table = doomed.table
    assert {(one.namespace, one.table) for one in written} == {(table.namespace, table.name)}
    keys = {
        Key(
            tuple(one.partition_key[name] for name in table.partition_key),
            tuple(one.clustering_key[name] for name in table.clustering_key),
        )
        for one in written
    }
    assert keys == {*doomed.keys}
