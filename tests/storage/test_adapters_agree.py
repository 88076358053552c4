"""Memory, SQLite, Cassandra and a dictionary are told the same things and must give the same answers."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from infra.storage.errors import NoMutationError
from infra.storage.gate import PartitionGate
from infra.storage.memory import MemoryStorage
from infra.storage.operations import (
    Atomicity,
    Bound,
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
    TableSchema,
    Value,
)
from infra.storage.port import Storage
from infra.storage.sqlite import SqliteStorage

if TYPE_CHECKING:
    from infra.servers.cassandra import LocalCassandra

TABLE = TableSchema(
    namespace="agreement",  # not a name that others use on a server they share
    name="things",
    columns={
        "flag": DataType.BOOLEAN,
        "day": DataType.INT,
        "name": DataType.TEXT,
        "raw": DataType.BLOB,
        "count": DataType.BIGINT,
        "ratio": DataType.DOUBLE,
        "note": DataType.TEXT,
    },
    partition_key=("flag",),
    clustering_key=("name", "day"),
)

# Few keys, so that operations meet; many values, so that types are tried to their ends.
names = st.sampled_from(["", "a", "a\0", "b", "\uffff", "\U0001f600"])
days = st.sampled_from([-1, 0, 2**31 - 1])
keys = st.builds(lambda flag, name, day: Key((flag,), (name, day)), st.booleans(), names, days)

VALUES: Mapping[str, st.SearchStrategy[Value]] = {
    "raw": st.none() | st.binary(max_size=4),
    "count": st.none() | st.integers(-(2**53), 2**53) | st.integers(0, 2),
    "ratio": st.none() | st.floats(allow_nan=False),
    "note": st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
}

column_conditions = st.sampled_from(sorted(VALUES)).flatmap(
    lambda column: st.builds(ColumnCondition, st.just(column), st.sampled_from(Operator), VALUES[column])
)
wheres = st.lists(column_conditions, max_size=2).map(tuple)
columns_written = st.fixed_dictionaries({}, optional=dict(VALUES))
presence = st.sampled_from([None, IfExists()]) | st.builds(If, wheres)

mutations = st.builds(Put, st.just(TABLE), keys, columns_written, presence | st.just(IfNotExists())) | st.builds(
    Delete, st.just(TABLE), keys, presence
)
batches = st.lists(mutations, min_size=1, max_size=4, unique_by=lambda mutation: mutation.key)

batches_of_one_partition = st.booleans().flatmap(
    lambda flag: st.lists(
        mutations.map(lambda mutation: replace(mutation, key=replace(mutation.key, partition=(flag,)))),
        min_size=1,
        max_size=4,
        unique_by=lambda mutation: mutation.key,
    )
)

bounds = st.none() | st.builds(
    Bound,
    st.just(()) | st.tuples(names) | st.tuples(names, days),
    st.booleans(),
)
scans = st.builds(
    Scan, st.just(TABLE), st.tuples(st.booleans()), bounds, bounds, wheres, st.integers(0, 3), st.booleans()
)


class Model:
    """The port's sentences over one dictionary, as plainly as possible."""

    def __init__(self) -> None:
        self.rows: dict[Key, Row] = {}

    def mutate(self, batch: Sequence[Mutation]) -> bool:
        if not all(self._allows(mutation) for mutation in batch):
            return False
        for mutation in batch:
            if isinstance(mutation, Delete):
                self.rows.pop(mutation.key, None)
            else:
                (flag,), (name, day) = mutation.key.partition, mutation.key.clustering
                empty: Row = {**dict.fromkeys(TABLE.columns), "flag": flag, "name": name, "day": day}
                self.rows[mutation.key] = {**self.rows.get(mutation.key, empty), **mutation.columns}
        return True

    def scan(self, scan: Scan) -> list[Row]:
        inside = [
            key
            for key in self.rows
            if key.partition == scan.partition
            and (scan.start is None or self._side(key, scan.start) > 0)
            and (scan.end is None or self._side(key, scan.end, below=True) < 0)
        ]
        inside.sort(key=lambda key: self._comparable(key.clustering), reverse=scan.reverse)
        found = [self.rows[key] for key in inside if all(self._meets(self.rows[key], c) for c in scan.where)]
        return found[: scan.limit] if scan.limit else found

    def _allows(self, mutation: Mutation) -> bool:
        row = self.rows.get(mutation.key)
        if mutation.condition is None:
            return True
        if isinstance(mutation.condition, IfNotExists):
            return row is None
        conditions = mutation.condition.conditions if isinstance(mutation.condition, If) else ()
        return row is not None and all(self._meets(row, condition) for condition in conditions)

    def _meets(self, row: Row, condition: ColumnCondition) -> bool:
        held, asked = self._comparable((row[condition.column], condition.value))
        if condition.operator in (Operator.IS_NULL, Operator.IS_NOT_NULL):
            return (held is None) == (condition.operator is Operator.IS_NULL)
        if held is None or asked is None:
            return False
        sign = (held > asked) - (held < asked)
        return (
            sign in {"=": (0,), "!=": (-1, 1), "<": (-1,), "<=": (-1, 0), ">": (1,), ">=": (0, 1)}[condition.operator]
        )

    def _side(self, key: Key, bound: Bound, *, below: bool = False) -> int:
        """Where a key lies of a bound; a key on an inclusive bound lies on the side that is asked for."""
        own, other = self._comparable(key.clustering[: len(bound.values)]), self._comparable(bound.values)
        if own == other:
            return (-1 if below else 1) if bound.inclusive else (1 if below else -1)
        return 1 if own > other else -1

    @staticmethod
    def _comparable(values: Sequence[Value]) -> tuple[Any, ...]:
        return tuple(value.encode() if isinstance(value, str) else value for value in values)


class AdaptersAgree(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="adapters-agree-"))
        self.runner = asyncio.Runner()
        self.model = Model()
        self.adapters: list[Storage] = [MemoryStorage(Atomicity.NAMESPACE), SqliteStorage(self.directory)]
        for storage in self.adapters:
            self.runner.run(storage.create_table(TABLE))

    def teardown(self) -> None:
        for storage in self.adapters:
            self.runner.run(storage.close())
        self.runner.close()
        shutil.rmtree(self.directory)

    @rule(batch=batches)
    def mutate(self, batch: list[Mutation]) -> None:
        applied = self.model.mutate(batch)
        for storage in self.adapters:
            try:
                self.runner.run(storage.mutate(batch))
                assert applied, storage.info.name
            except NoMutationError:
                assert not applied, storage.info.name

    @rule(together=st.lists(batches, min_size=2, max_size=4))
    def mutate_together(self, together: list[list[Mutation]]) -> None:
        """Batches that are sent at once take effect in the order they were sent."""
        applied = [self.model.mutate(batch) for batch in together]

        for storage in self.adapters:

            async def send(storage: Storage = storage) -> list[BaseException | None]:
                return await asyncio.gather(*map(storage.mutate, together), return_exceptions=True)

            answers = self.runner.run(send())
            assert [answer is None for answer in answers] == applied, storage.info.name
            assert {type(answer) for answer in answers} <= {type(None), NoMutationError}

    @rule(key=keys)
    def get(self, key: Key) -> None:
        for storage in self.adapters:
            assert self.runner.run(storage.get(TABLE, key)) == self.model.rows.get(key), storage.info.name

    @rule(scan=scans)
    def scan(self, scan: Scan) -> None:
        for storage in self.adapters:
            assert self.runner.run(storage.scan(scan)) == self.model.scan(scan), storage.info.name

    @invariant()
    def everything_is_the_same(self) -> None:
        partitions = {key.partition for key in self.model.rows}
        for storage in self.adapters:
            assert set(self.runner.run(storage.partitions(TABLE))) == partitions, storage.info.name
            for partition in partitions:
                everything = Scan(TABLE, partition)
                assert self.runner.run(storage.scan(everything)) == self.model.scan(everything), storage.info.name


class CassandraAgrees(AdaptersAgree):
    """The same on a real server. One connection and one table serve all examples; batches keep to one partition."""

    runner: asyncio.Runner
    cassandra: PartitionGate

    def __init__(self) -> None:
        RuleBasedStateMachine.__init__(self)
        self.model = Model()
        self.adapters = [self.cassandra]
        for flag in (False, True):
            rows = self.runner.run(self.cassandra.scan(Scan(TABLE, (flag,))))
            left = [Delete(TABLE, Key((flag,), (row["name"], row["day"])), IfExists()) for row in rows]
            self.runner.run(self.cassandra.mutate(left))

    def teardown(self) -> None:
        """The connection stays open for the next example."""

    @rule(batch=batches_of_one_partition)
    def mutate(self, batch: list[Mutation]) -> None:
        super().mutate(batch)

    @rule(together=st.lists(batches_of_one_partition, min_size=2, max_size=3))
    def mutate_together(self, together: list[list[Mutation]]) -> None:
        super().mutate_together(together)


class TestCassandraAgrees(CassandraAgrees.TestCase):  # type: ignore[name-defined, misc]
    settings = settings(
        max_examples=8, stateful_step_count=10, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )

    @pytest.fixture(autouse=True)
    def _server(self, cassandra: LocalCassandra) -> Iterator[None]:
        from infra.storage.cassandra import CassandraStorage

        storage = CassandraStorage([cassandra.contact_point], cassandra.port)
        with asyncio.Runner() as runner:
            CassandraAgrees.runner, CassandraAgrees.cassandra = runner, PartitionGate(storage)
            runner.run(storage.create_table(TABLE))
            yield
            runner.run(storage.drop_table(TABLE))
            runner.run(storage.drop_namespace(TABLE.namespace))
            runner.run(storage.close())


class TestAdaptersAgree(AdaptersAgree.TestCase):  # type: ignore[name-defined, misc]
    # A busy machine is no finding: nothing here depends on time.
    settings = settings(
        max_examples=40, stateful_step_count=15, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
