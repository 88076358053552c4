"""Storage in Apache Cassandra: conditional writes by Paxos, one partition at a time.

Theory of operation
    A namespace is a keyspace. A `mutate` is one statement, or one LOGGED batch, within one partition
    (Atomicity.PARTITION). With a condition it is a lightweight transaction: consistency QUORUM for its commit,
    serial consistency SERIAL for its Paxos rounds. Reads of one partition are at SERIAL, so they finish or discard
    what Paxos has in flight and see every write that was answered. LOCAL_SERIAL is never used: programs that share
    these tables (ScalarDB) use SERIAL, and the two do not exclude each other.

    Reads across partitions (`pages`, `partitions`) are at QUORUM, because Cassandra refuses SERIAL there. That is
    enough for validation: a write is answered only after a quorum has it, every quorum meets that one, and an index
    is kept by each replica together with the row. So whatever was answered before the read began is seen. What is
    still unanswered may be seen or not, as any concurrent write. Two reads do not agree on unanswered writes, as
    reads at SERIAL would; the engine re-reads what matters by its key. Pages are read one after the other, so a
    long read is no snapshot.

    A read that a replica gives up, since it passes over too much that was deleted (100,000 of it a request), is made
    again of less: of smaller pages first, and where it is of all partitions, of a smaller part of the ring. What was
    deleted in a row in one partition remains: tables are made so that no partition gathers so much (decision 34).

    Nothing else is retried. A write that failed raises UnknownOutcomeError unless it is certain that nothing was or
    will be written (`cassandra_errors`); the caller reads the row at SERIAL, or writes it again under its condition.

    **Unconditional writes are plain writes at QUORUM, outside Paxos. Rows that are also written conditionally must
    never be written without a condition**: the two are ordered by clocks, not by each other. Transactional records and
    state rows are always written conditionally; intents never. A batch that has one condition goes through Paxos whole.

IS NULL and absent rows
    For the port, `If` holds for present rows only. Cassandra lets `IF c = NULL` hold for an absent row and knows no
    `IF EXISTS AND …`. A mutation whose conditions all are IS NULL is therefore preceded by a read of its row, and
    gets one more condition, which only this row can meet: that a column which is not NULL still has the value that was
    read (a pin). If the row changes in between, it is read again. What remains: a row whose columns outside the key
    are all NULL offers no pin, and if it is deleted between that read and the write, the write makes it anew. ScalarDB
    has this gap for every such condition. Transactional records are never such rows.

What else differs from the port
    An empty text or blob cannot be the whole partition key, and no key value may exceed 64 KiB: refused by the server.
    TIMESTAMP has no type in Cassandra and is refused. `create_table` adds indexes that an otherwise equal table
    lacks, because Cassandra cannot make a table and its indexes at once, and an interrupted creation must be
    repeatable. Columns outside the key are listed by name: Cassandra forgets their order.

Before a table is first used, its keyspace's replication is checked: a quorum of it must be up. Before anything,
`commitlog_sync` of every node of the data centre is: `periodic` would answer writes that a power failure takes back.

ScalarDB 3.19 uses the same tables: types, index names and its keyspace `scalardb` are as it makes them (its
CassandraAdmin). It takes every keyspace that is not Cassandra's own for a namespace and keeps no list of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn

from cassandra import ConsistencyLevel
from cassandra.auth import PlainTextAuthProvider

from infra.storage import cassandra_schema as schema
from infra.storage import cassandra_statements as cql
from infra.storage.cassandra_session import CassandraSession, Page, Rows, SessionSettings
from infra.storage.cassandra_statements import Statement, TableStatements, simplified, wants_pin
from infra.storage.conditions import all_hold
from infra.storage.errors import (
    InvalidOperationError,
    NoMutationError,
    TooMuchToReadError,
    UnavailableStorageError,
)
from infra.storage.operations import (
    Atomicity,
    Bound,
    ColumnCondition,
    CrossPartition,
    DataType,
    If,
    IndexScan,
    Key,
    Mutation,
    Row,
    Scan,
    StorageInfo,
    TableSchema,
    Value,
)
from infra.storage.validation import (
    TableRules,
    check_identifier,
    check_one_unit,
    difference,
    is_same_table,
    needs_creation,
    with_column,
    with_index,
)

DEFAULT_PORT = 9042
SCAN_PAGE_SIZE = 2_000
"""Rows that one request of a scan brings; a scan with a limit and no filter brings no more than its limit."""
CELLS_OF_A_PAGE = 50_000
"""What bounds the rows of a request in wide tables. A NULL that was written counts as a deletion for days, every record
that was ever committed has one for each column of its before-image, and the server refuses to pass 100,000 a request.
"""

SMALLER = 8
"""A read that was too much is made again of so much less: of a smaller page, then of a smaller part of the ring."""
FIRST_TOKEN, LAST_TOKEN = -(2**63), 2**63 - 1
"""Murmur3Partitioner's; the first is nobody's."""

ReplicationStrategy = Literal["SimpleStrategy", "NetworkTopologyStrategy"]

_DATA_TYPES = frozenset(cql.TYPES)
_DEFAULT_REPLICATION_FACTOR = 3  # ScalarDB's
_MAX_PIN_READS = 8
_INDEX_POLL_S = 0.05


@dataclass(frozen=True)
class _Table:
    schema: TableSchema
    rules: TableRules
    statements: TableStatements

    @property
    def page_size(self) -> int:
        """Rows that one request of a scan may bring."""
        return max(1, min(SCAN_PAGE_SIZE, CELLS_OF_A_PAGE // len(self.schema.columns)))

    @property
    def goes_one_way(self) -> bool:
        """Whether a bound by value can say "after this row": not where some columns ascend and some descend."""
        return self.schema.descending in (frozenset(), frozenset(self.schema.clustering_key))


class CassandraStorage:
    """The storage port on a Cassandra cluster (4.0 or newer). Connects at the first call; one event loop at a time.

    `contact_points` are addresses of some of its nodes. `local_dc` names the data centre whose nodes are asked; None:
    that of the first contact point. `username` and `password`, or an `auth_provider` of the driver; `ssl_context` turns
    TLS on. New keyspaces get `replication_factor` copies (None: 1 on a cluster of one node, else 3) by
    `replication_strategy`; NetworkTopologyStrategy puts them into `local_dc`. `replication` names the copies by data
    centre instead. `compaction_strategy` (STCS, LCS, TWCS or UCS) is that of new tables, None leaves it to the server.
    `only_authenticated` refuses nodes that let everybody in, `allow_periodic` takes nodes that keep an acknowledged
    write in memory alone for a while. A request fails after `request_timeout_s` without an answer (connecting has 5
    seconds at least); `max_in_flight` requests are outstanding at most, further ones wait. `max_mutations` 0 takes a
    batch of any size, as far as the server does (Paxos writes it twice; some dozens of rows are best).
    `index_timeout_s`: how long `create_index` waits for the rows that are there.

    Raises UnavailableStorageError with a remedy at the first call if the cluster cannot be reached, if a node says
    `commitlog_sync: periodic`, or if a quorum of a keyspace's replicas is not up.
    """

    def __init__(
        self,
        contact_points: Sequence[str],
        port: int = DEFAULT_PORT,
        *,
        local_dc: str | None = None,
        username: str | None = None,
        password: str | None = None,
        auth_provider: Any = None,
        ssl_context: Any = None,
        replication_factor: int | None = None,
        replication_strategy: ReplicationStrategy = "SimpleStrategy",
        replication: Mapping[str, int] | None = None,
        only_authenticated: bool = False,
        allow_periodic: bool = False,
        compaction_strategy: str | None = None,
        request_timeout_s: float = 10.0,
        max_in_flight: int = 256,
        max_mutations: int = 0,
        metadata_namespace: str = "scalardb",
        index_timeout_s: float = 600.0,
        protocol_version: int = 4,
        name: str = "cassandra",
    ) -> None:
        if isinstance(contact_points, str) or not contact_points:
            raise InvalidOperationError("contact_points must be a list of at least one address")
        if replication_strategy not in ("SimpleStrategy", "NetworkTopologyStrategy"):
            raise InvalidOperationError(f"replication_strategy {replication_strategy!r} is not known")
        if replication_factor is not None and replication_factor < 1:
            raise InvalidOperationError("replication_factor must be at least 1")
        if compaction_strategy is not None and compaction_strategy not in cql.COMPACTION_STRATEGIES:
            raise InvalidOperationError(f"compaction_strategy must be one of {', '.join(cql.COMPACTION_STRATEGIES)}")
        if request_timeout_s <= 0 or max_in_flight < 1:
            raise InvalidOperationError("request_timeout_s and max_in_flight must be positive")
        if username is not None:
            auth_provider = PlainTextAuthProvider(username, password or "")
        self._settings = SessionSettings(
            contact_points=tuple(contact_points),
            port=port,
            local_dc=local_dc,
            auth_provider=auth_provider,
            ssl_context=ssl_context,
            request_timeout_s=request_timeout_s,
            max_in_flight=max_in_flight,
            protocol_version=protocol_version,
            only_authenticated=only_authenticated,
            allow_periodic=allow_periodic,
        )
        self._session = CassandraSession(self._settings)
        self._replication_factor = replication_factor
        self._replication_strategy = replication_strategy
        self._copies = dict(replication or {})
        self._compaction_strategy = compaction_strategy
        self._metadata_namespace = check_identifier(metadata_namespace)
        self._index_timeout_s = index_timeout_s
        self._info = StorageInfo(
            name=name,
            atomicity=Atomicity.PARTITION,
            max_mutations=max_mutations,
            data_types=_DATA_TYPES,
            options={"contact_points": ",".join(contact_points), "port": str(port)},
        )
        self._tables: dict[TableSchema, _Table] = {}

    def __reduce__(self) -> NoReturn:
        raise TypeError("a CassandraStorage holds connections: make one in each process, from the same settings")

    @property
    def info(self) -> StorageInfo:
        return self._info

    def info_of(self, namespace: str) -> StorageInfo:
        return self.info

    @property
    def in_flight(self) -> int:
        """Requests that were sent and not answered yet, of callers that gave up included."""
        return self._session.in_flight

    # -- reads

    async def get(self, table: TableSchema, key: Key) -> Row | None:
        held = self._tables.get(table) or await self._learn(table)
        held.rules.check_key(key)
        return await self._get(held, key)

    async def peek(self, table: TableSchema, key: Key) -> Row | None:
        """At QUORUM: it meets every quorum that has answered a write, and spares the Paxos round of a SERIAL read."""
        held = self._tables.get(table) or await self._learn(table)
        held.rules.check_key(key)
        return await self._get(held, key, consistency=ConsistencyLevel.QUORUM)

    async def scan(self, scan: Scan) -> list[Row]:
        held = self._tables.get(scan.table) or await self._learn(scan.table)
        held.rules.check_scan(scan)
        statement = held.statements.scan(scan)
        if statement is None:
            return []
        found: list[Row] = []
        what = f"a scan of {scan.table.full_name}"
        async for values in self._pages(held, statement, what, ConsistencyLevel.SERIAL, held.page_size):
            rows = map(held.statements.row, values)
            found += [row for row in rows if all_hold(scan.where, row)] if scan.where else rows
            if scan.limit and len(found) >= scan.limit:
                return found[: scan.limit]
        return found

    async def pages(self, selection: CrossPartition, page_size: int = 256) -> AsyncIterator[list[Row]]:
        held = self._tables.get(selection.table) or await self._learn(selection.table)
        held.rules.check_cross_partition(selection)
        left = selection.limit
        what = f"a scan of all of {selection.table.full_name}"
        if isinstance(selection, IndexScan):
            statement = held.statements.by_index(selection.column, selection.value)
            pages = self._pages(held, statement, what, ConsistencyLevel.QUORUM, page_size)
        else:
            pages = self._ring(held, held.statements.ring_rows, what, page_size)
        async for values in pages:
            rows = [row for row in map(held.statements.row, values) if all_hold(selection.where, row)]
            if selection.limit:
                rows = rows[:left]
                left -= len(rows)
            if rows:
                yield rows
            if selection.limit and not left:
                return

    async def partitions(self, table: TableSchema) -> list[tuple[Value, ...]]:
        held = self._tables.get(table) or await self._learn(table)
        found: list[tuple[Value, ...]] = []
        what = f"the partitions of {table.full_name}"
        async for values in self._ring(held, held.statements.ring_partitions, what, SCAN_PAGE_SIZE):
            found += map(held.statements.partition, values)
        return found

    # -- writes

    async def mutate(self, mutations: Sequence[Mutation]) -> None:
        asked: list[Mutation] = []
        hopeless = False
        for mutation in mutations:
            held = self._tables.get(mutation.table) or await self._learn(mutation.table)
            held.rules.check_mutation(mutation)
            answerable = simplified(mutation)
            hopeless = hopeless or answerable is None
            asked.append(answerable or mutation)
        check_one_unit(mutations, self._info)
        if not asked:
            return
        if hopeless:
            raise _unmet(asked)
        to_pin = [mutation for mutation in asked if wants_pin(mutation)]
        pins: dict[Key, ColumnCondition | None] = {}
        for _ in range(_MAX_PIN_READS):
            if to_pin:
                before, pins = pins, await self._pins(held, to_pin)
                if before == pins:  # It was not the rows that changed: some other condition does not hold.
                    break
            found = await self._write(held, asked, pins)
            if found is None:
                return
            if not to_pin:
                raise _unmet(asked, held.statements.unmet(asked, found.columns, found.rows))
        raise _unmet(asked)

    async def _write(
        self, held: _Table, mutations: Sequence[Mutation], pins: Mapping[Key, ColumnCondition | None]
    ) -> Page | None:
        what = f"a write of {len(mutations)} row{'s' * (len(mutations) > 1)} of {held.schema.full_name}"
        statements = [held.statements.write(mutation, pins.get(mutation.key)) for mutation in mutations]
        with self._looking_again(held):
            return await self._session.write(statements, what)

    async def _pins(self, held: _Table, mutations: Sequence[Mutation]) -> dict[Key, ColumnCondition | None]:
        """For each mutation, a condition that only the row as it is now can meet; NoMutationError if it is absent."""
        pins: dict[Key, ColumnCondition | None] = {}
        for mutation in mutations:
            row = await self._get(held, mutation.key)
            if row is None or (isinstance(mutation.condition, If) and not all_hold(mutation.condition.conditions, row)):
                raise _unmet(mutations)
            pins[mutation.key] = held.statements.pin(row)
        return pins

    async def _get(self, held: _Table, key: Key, *, consistency: int = ConsistencyLevel.SERIAL) -> Row | None:
        what = f"a read of {held.schema.full_name}"
        with self._looking_again(held):
            answer = await self._session.read(held.statements.get(key), what, consistency=consistency)
        return held.statements.row(answer.rows[0]) if answer.rows else None

    async def _pages(
        self, held: _Table, statement: Statement, what: str, consistency: int, page_size: int
    ) -> AsyncIterator[Rows]:
        page: bytes | None = None
        size = page_size
        while True:
            try:
                with self._looking_again(held):
                    answer = await self._session.read(
                        statement, what, consistency=consistency, page_size=size, page=page
                    )
            except TooMuchToReadError:
                if size == 1:
                    raise
                size = max(1, size // SMALLER)
                continue
            yield answer.rows
            size = min(page_size, size * 2)
            page = answer.next_page
            if page is None:
                return

    async def _ring(
        self, held: _Table, statement: Callable[[int, int], Statement], what: str, page_size: int
    ) -> AsyncIterator[Rows]:
        """What `statement` selects of all partitions, in the order of their tokens."""
        after, width = FIRST_TOKEN, LAST_TOKEN - FIRST_TOKEN
        while after < LAST_TOKEN:
            upto = min(LAST_TOKEN, after + width)
            last: Sequence[Any] | None = None
            try:
                consistency = ConsistencyLevel.QUORUM
                async for rows in self._pages(held, statement(after, upto), what, consistency, page_size):
                    if rows:
                        last = rows[-1]
                        yield [values[:-1] for values in rows]
            except TooMuchToReadError:
                # Between the last row and the next one more was deleted than a read may pass over.
                if not (held.goes_one_way if last is not None else width > 1):
                    raise
                if last is not None:
                    after = last[-1]
                    async for rows in self._rest_of_partition(held, last[:-1], what, page_size):
                        yield rows
                width = max(1, min(width, LAST_TOKEN - after) // SMALLER)
            else:
                after, width = upto, width * 2

    async def _rest_of_partition(
        self, held: _Table, last: Sequence[Any], what: str, page_size: int
    ) -> AsyncIterator[Rows]:
        """What follows after a row in its partition; nothing after a partition key alone."""
        table = held.schema
        if not table.clustering_key or len(last) < len(table.columns):
            return
        row = held.statements.row(last)
        place = tuple(row[name] for name in table.partition_key)
        after = Bound(tuple(row[name] for name in table.clustering_key), inclusive=False)
        scan = Scan(table, place, end=after) if table.descending else Scan(table, place, start=after)
        statement = held.statements.scan(scan)
        assert statement is not None
        async for rows in self._pages(held, statement, what, ConsistencyLevel.QUORUM, page_size):
            yield rows

    @contextmanager
    def _looking_again(self, held: _Table) -> Iterator[None]:
        """Look a table up again before its next use if the server refused a call: it may have been changed."""
        try:
            yield
        except InvalidOperationError:
            self._tables.pop(held.schema, None)
            raise

    async def close(self) -> None:
        """Wait for what is outstanding and close the connections; nothing can be asked afterwards."""
        await self._session.close()
        self._tables.clear()

    # -- tables

    async def create_table(self, table: TableSchema) -> None:
        TableRules(table)
        for column, data_type in table.columns.items():
            self._check_type(table, column, data_type)
        missing = await self._missing(table)
        if missing is not None and table.short_lived:
            await self._forget_deletions_soon(table)
        if missing is None:
            await self.create_namespace(table.namespace)
            statements = TableStatements(table)
            what = f"creating {table.full_name}"
            await self._session.administer(statements.create_table(self._compaction_strategy), what)
            # Another process may have created it otherwise, meanwhile or on another node.
            missing = await self._missing(table)
        for column in sorted(missing or ()):
            await self.create_index(table, column)

    async def tables(self) -> list[TableSchema]:
        columns, indexes = await asyncio.gather(
            self._session.administer(schema.SELECT_COLUMNS, "reading the schema"),
            self._session.administer(schema.SELECT_INDEXES, "reading the schema"),
        )
        found = schema.read_tables(columns, schema.read_indexes(indexes))
        return [table for table in found if table.namespace != self._metadata_namespace]

    async def namespaces(self) -> list[str]:
        """Keyspaces that are not Cassandra's own, nor ScalarDB's for its metadata."""
        rows = await self._session.administer(schema.SELECT_KEYSPACES, "reading the schema")
        names = (str(name) for name, _replication in rows)
        return sorted(name for name in names if schema.is_user_namespace(name) and name != self._metadata_namespace)

    async def create_namespace(self, namespace: str) -> None:
        name = check_identifier(namespace)
        for other in await self.namespaces():
            if other == name:
                return
            if other.lower() == name.lower():
                raise InvalidOperationError(f"namespaces {name} and {other} differ only by case")
        replication = await self._replication()
        await self._refuse_shortfall(name, replication)
        # ScalarDB makes its metadata's keyspace with the first table. On Cassandra it holds nothing there.
        for keyspace in (self._metadata_namespace, name):
            await self._session.administer(cql.create_keyspace(keyspace, replication), f"creating the keyspace {name}")

    async def drop_namespace(self, namespace: str) -> None:
        name = check_identifier(namespace)
        what = f"dropping the keyspace {name}"
        if await self._session.administer(schema.SELECT_TABLES + schema.OF_KEYSPACE, what, (name,)):
            raise InvalidOperationError(f"namespace {name} still has tables")
        if name not in await self.namespaces():
            return
        await self._session.administer(cql.drop_keyspace(name), what)

    async def drop_table(self, table: TableSchema) -> None:
        if table.namespace in await self.namespaces():
            await self._change(table, TableStatements(table).drop_table())

    async def truncate_table(self, table: TableSchema) -> None:
        """Raises UnavailableStorageError unless all nodes are up: Cassandra truncates on all or not at all."""
        known = await self._known(table)
        await self._session.administer(TableStatements(known).truncate_table(), f"truncating {table.full_name}")

    async def add_column(self, table: TableSchema, column: str, data_type: DataType) -> None:
        known = await self._known(table)
        changed = with_column(known, column, data_type)
        self._check_type(table, column, data_type)
        if changed is not known:
            await self._change(table, TableStatements(known).add_column(column, data_type))

    async def create_index(self, table: TableSchema, column: str) -> None:
        known = await self._known(table)
        changed = with_index(known, column)
        if column not in known.indexes:
            await self._change(table, TableStatements(known).create_index(column))
        for index in await self._indexes(table):
            if index.column == column:
                return await self._await_index(index)
        taken = cql.index_name(changed, column)
        raise InvalidOperationError(f"{table.full_name}.{column}: another table has the index {taken}")

    async def drop_index(self, table: TableSchema, column: str) -> None:
        known = await self._known(table)
        for index in await self._indexes(table):
            if index.column == column:
                await self._change(table, TableStatements(known).drop_index(index.name))

    async def _change(self, table: TableSchema, statement: str) -> None:
        await self._session.administer(statement, f"changing {table.full_name}")
        self._tables = {known: held for known, held in self._tables.items() if known.full_name != table.full_name}
        self._session.forget(f'"{table.namespace}"."{table.name}"')

    async def _missing(self, table: TableSchema) -> frozenset[str] | None:
        """The indexes that `table` lacks, None if it does not exist; InvalidOperationError if it is another table."""
        existing = await self.tables()
        missing: frozenset[str] = frozenset()
        for at, other in enumerate(existing):
            if other.full_name == table.full_name:
                missing = table.indexes - other.indexes
                existing[at] = replace(other, indexes=other.indexes | table.indexes)
        return None if needs_creation(table, existing) else missing

    async def _forget_deletions_soon(self, table: TableSchema) -> None:
        """Give a table the options of short-lived rows, unless somebody has chosen others than the server's."""
        where, key, what = schema.OF_TABLE, (table.namespace, table.name), f"looking up {table.full_name}"
        for (grace_s,) in await self._session.administer(schema.SELECT_GRACE + where, what, key):
            if grace_s == schema.DEFAULT_GRACE_S:
                await self._change(table, TableStatements(table).forget_deletions_soon())

    async def _known(self, table: TableSchema) -> TableSchema:
        """The table as it is in Cassandra; InvalidOperationError if it is not there."""
        check_identifier(table.namespace)
        check_identifier(table.name)
        where, key = schema.OF_TABLE, (table.namespace, table.name)
        what = f"looking up {table.full_name}"
        columns, indexes = await asyncio.gather(
            self._session.administer(schema.SELECT_COLUMNS + where, what, key), self._indexes(table)
        )
        for known in schema.read_tables(columns, indexes):
            return known
        if columns:
            raise InvalidOperationError(f"{table.full_name} has columns or keys of other types than ours")
        raise InvalidOperationError(f"there is no table {table.full_name}")

    async def _indexes(self, table: TableSchema) -> list[schema.Index]:
        what = f"looking up {table.full_name}"
        key = (table.namespace, table.name)
        return schema.read_indexes(await self._session.administer(schema.SELECT_INDEXES + schema.OF_TABLE, what, key))

    async def _learn(self, table: TableSchema) -> _Table:
        """Look a table up in Cassandra. Only found ones are remembered: another process may yet create the others."""
        rules = TableRules(table)
        known = await self._known(table)
        if not is_same_table(table, known):
            raise InvalidOperationError(f"{table.full_name} exists otherwise: {difference(table, known)}")
        await self._check_quorum(table.namespace)
        held = self._tables[table] = _Table(table, rules, TableStatements(table))
        return held

    async def _check_quorum(self, namespace: str) -> None:
        what = f"looking up the keyspace {namespace}"
        statement = schema.SELECT_KEYSPACES + schema.OF_KEYSPACE
        for _name, replication in await self._session.administer(statement, what, (namespace,)):
            await self._refuse_shortfall(namespace, replication or {})

    async def _refuse_shortfall(self, namespace: str, replication: Mapping[str, str]) -> None:
        shortfall = schema.quorum_shortfall(replication, await self._session.live_nodes())
        if shortfall:
            raise UnavailableStorageError(
                f"the keyspace {namespace} cannot be used: {shortfall}",
                remedy=(
                    "bring more nodes up, or lower the keyspace's replication with ALTER KEYSPACE"
                    " (replication_factor is the setting for new ones)"
                ),
            )

    async def _replication(self) -> dict[str, str]:
        """The replication of a new keyspace."""
        if self._copies:
            copies = {name: str(number) for name, number in self._copies.items()}
            return {"class": "NetworkTopologyStrategy", **copies}
        live = await self._session.live_nodes()
        factor = self._replication_factor or (1 if sum(live.values()) == 1 else _DEFAULT_REPLICATION_FACTOR)
        if self._replication_strategy == "SimpleStrategy":
            return {"class": "SimpleStrategy", "replication_factor": str(factor)}
        centre = self._settings.local_dc or next(iter(live), "")
        return {"class": "NetworkTopologyStrategy", centre: str(factor)}

    async def _await_index(self, index: schema.Index) -> None:
        """Return when every node has built `index`; until then it may miss rows or refuse to be read."""
        built = (
            f"SELECT index_name FROM system.\"IndexInfo\" WHERE table_name = '{check_identifier(index.namespace)}'"
            f" AND index_name = '{check_identifier(index.name)}'"
        )
        what = f"waiting for the index {index.name}"
        until = asyncio.get_running_loop().time() + self._index_timeout_s
        while not all(await self._session.on_every_node(built, what)):
            if asyncio.get_running_loop().time() > until:
                raise UnavailableStorageError(
                    f"the index {index.name} is still being built", remedy="wait for it and try again: it goes on"
                )
            await asyncio.sleep(_INDEX_POLL_S)

    def _check_type(self, table: TableSchema, column: str, data_type: DataType) -> None:
        if data_type not in _DATA_TYPES:
            raise InvalidOperationError(
                f"{table.full_name}.{column}: Cassandra has no type for {data_type}; use TIMESTAMPTZ or another storage"
            )


def _unmet(mutations: Sequence[Mutation], unmet: frozenset[Key] = frozenset()) -> NoMutationError:
    return NoMutationError(f"a condition of the batch did not hold in {mutations[0].table.full_name}", unmet=unmet)
