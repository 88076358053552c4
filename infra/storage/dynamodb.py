"""Storage in DynamoDB, as ScalarDB 3.19 stores: programs on either can share the tables.

Theory of operation
    A table is a DynamoDB table `namespace.table`, whose item keys are the concatenated key columns (see
    `dynamodb_encoding`), with a global secondary index for each indexed column. What a table's columns are is written
    in `scalardb.metadata`, which namespaces there are in `scalardb.namespaces`.

    Reads are strongly consistent, scans of a whole table included: they see every write that was answered before they
    began. Index reads are not, because a global index lags behind (`info.sees_all_indexed`).

    One mutation is an UpdateItem or DeleteItem with its condition; several are one TransactWriteItems, of up to 100
    items of any tables: the atomic unit is the whole storage. Writes that meet another transaction are refused by
    DynamoDB rather than queued; they are repeated a few times (see `dynamodb_client`).

    Tables come into being by their metadata: whoever writes it first decides what the table is, and everybody makes
    of it the table that it describes. So creating one at the same time, or again after a crash, is harmless. A table
    is removed the other way round.

Beside ScalarDB's attributes, the metadata of a table has `columnOrder`, because a map does not keep the order of its
columns. ScalarDB neither reads it nor keeps it; without it, columns outside the key are ordered by name. Tables made
here are paid for by request unless units are given; nothing here turns on autoscaling or backups.

Never here: credentials in a URL, and the repetition of a write whose outcome is unknown.

Source: ScalarDB's `storage/dynamo`. It encodes every item of a batch by the metadata of the first one's table
(BatchHandler); here each goes by its own.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from infra.storage.conditions import all_hold
from infra.storage.dynamodb_client import (
    DynamoDbClient,
    Meaning,
    RequestFailedError,
    Response,
    Sleep,
)
from infra.storage.dynamodb_encoding import CLUSTERING_KEY, PARTITION_KEY, Attribute, partition_values
from infra.storage.dynamodb_statements import MAX_BATCH_BYTES, Request, TableRequests, Write, capacity
from infra.storage.errors import InvalidOperationError, NoMutationError, UnavailableStorageError
from infra.storage.operations import (
    Atomicity,
    CrossPartition,
    DataType,
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

MAX_MUTATIONS = 100
SYSTEM_NAMESPACE = "scalardb"
_SYSTEM_UNITS = 1

_DELETES_AT_ONCE = 25
_CHANGE_TRIES = 10
_FIRST_POLL_S = 0.02
_LONGEST_POLL_S = 2.0


@dataclass(frozen=True, slots=True)
class _Table:
    """A table that is known to exist."""

    rules: TableRules
    requests: TableRequests


class DynamoDbStorage:
    """The storage port on DynamoDB.

    `region`, `endpoint` and `credentials` (access key, secret): None takes what AWS tools would take. `prefix` stands
    before every namespace, so that several systems can share an account. `units`: provisioned read and write capacity
    of the tables made here, None to pay by request. `timeout_ms`: how long one answer may take; `ready_timeout_ms`:
    how long a table or an index may take to become ready or to go. `tries`: how often a request is made at most.
    """

    def __init__(
        self,
        *,
        region: str | None = None,
        endpoint: str | None = None,
        credentials: tuple[str, str] | None = None,
        prefix: str = "",
        units: int | None = None,
        timeout_ms: int = 10_000,
        ready_timeout_ms: int = 600_000,
        tries: int = 8,
        randomness: random.Random | None = None,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self._client = DynamoDbClient(
            region=region,
            endpoint=endpoint,
            credentials=credentials,
            timeout_ms=timeout_ms,
            tries=tries,
            randomness=randomness or random.Random(),
            sleep=sleep,
        )
        self._prefix = check_identifier(prefix) if prefix else ""
        self._units = units
        self._ready_timeout_s = ready_timeout_ms / 1000
        self._sleep = sleep
        self._system = prefix + SYSTEM_NAMESPACE
        self._tables: dict[TableSchema, _Table] = {}
        self._info = StorageInfo(
            name="dynamodb",
            atomicity=Atomicity.STORAGE,
            max_mutations=MAX_MUTATIONS,
            # DynamoDB refuses rather than queues what meets, but a gate before the unit would be one before all
            # of the storage.
            serializes_batches=True,
            sees_all_indexed=False,
            options={"region": region or "", "endpoint": endpoint or "", "prefix": prefix},
        )

    @property
    def info(self) -> StorageInfo:
        return self._info

    def info_of(self, namespace: str) -> StorageInfo:
        return self.info

    # -- reading

    async def get(self, table: TableSchema, key: Key) -> Row | None:
        held = self._tables.get(table) or await self._learn(table)
        held.rules.check_key(key)
        response = await self._read(held, "get_item", held.requests.get(key))
        return held.requests.row(response["Item"]) if "Item" in response else None

    async def scan(self, scan: Scan) -> list[Row]:
        held = self._tables.get(scan.table) or await self._learn(scan.table)
        held.rules.check_scan(scan)
        request = held.requests.scan(scan)
        if request is None:
            return []
        if scan.limit and not scan.where:
            request["Limit"] = scan.limit
        found: list[Row] = []
        async for items in self._pages(held, "query", request):
            for item in items:
                row = held.requests.row(item)
                if held.requests.is_within(scan, row) and all_hold(scan.where, row):
                    found.append(row)
                    if len(found) == scan.limit:
                        return found
        return found

    async def pages(self, selection: CrossPartition, page_size: int = 256) -> AsyncIterator[list[Row]]:
        """Each page is one request: rows written meanwhile in parts already read are not returned."""
        held = self._tables.get(selection.table) or await self._learn(selection.table)
        held.rules.check_cross_partition(selection)
        operation, request = held.requests.page(selection)
        left = selection.limit
        async for items in self._pages(held, operation, {**request, "Limit": page_size}):
            rows = [row for row in map(held.requests.row, items) if all_hold(selection.where, row)]
            if selection.limit:
                rows = rows[:left]
                left -= len(rows)
            if rows:
                yield rows
            if selection.limit and not left:
                return

    async def partitions(self, table: TableSchema) -> list[tuple[Value, ...]]:
        held = self._tables.get(table) or await self._learn(table)
        keys: dict[bytes, None] = {}
        async for items in self._pages(held, "scan", held.requests.partitions()):
            keys.update((bytes(item[PARTITION_KEY]["B"]), None) for item in items)
        return [partition_values(table, key) for key in keys]

    # -- writing

    async def mutate(self, mutations: Sequence[Mutation]) -> None:
        writes: list[Write | None] = []
        for mutation in mutations:
            held = self._tables.get(mutation.table) or await self._learn(mutation.table)
            held.rules.check_mutation(mutation)
            writes.append(held.requests.write(mutation))
        check_one_unit(mutations, self.info)
        if sum(write.byte_count for write in writes if write is not None) > MAX_BATCH_BYTES:
            raise InvalidOperationError(f"one batch in DynamoDB has at most {MAX_BATCH_BYTES >> 20} MB")
        sent = [write for write in writes if write is not None]
        if len(sent) < len(writes):
            raise NoMutationError("a condition of the batch compares with NULL, or with another key than the row's")
        try:
            if len(sent) == 1:
                await self._client.write(f"{sent[0].action.lower()}_item", sent[0].request)
            elif sent:
                await self._client.transact([{write.action: write.request} for write in sent])
        except RequestFailedError as error:
            if error.failure.meaning is Meaning.ABSENT:
                self._tables.clear()
                raise InvalidOperationError(
                    f"there is no table {mutations[0].table.full_name}, or of its batch"
                ) from error
            raise error.failure.as_error() from error

    async def close(self) -> None:
        await self._client.close()
        self._tables.clear()

    # -- administration

    async def create_table(self, table: TableSchema) -> None:
        TableRules(table)
        TableRequests(table, self._prefix).check()
        self._check_not_system(table.namespace)
        for _ in range(_CHANGE_TRIES):
            existing = await self.tables()
            if not needs_creation(table, existing):
                [known] = [other for other in existing if other.full_name == table.full_name]
                await self._add_namespace(table.namespace)
                await self._make(known)
                return
            await self._make_system_tables()
            await self._put_metadata(table, None)
        raise self._too_many_changes(table)

    async def tables(self) -> list[TableSchema]:
        items = await self._system_items("metadata")
        start = len(self._prefix)
        named = [(item["table"]["S"][start:], item) for item in items if item["table"]["S"].startswith(self._prefix)]
        split = [(*name.split(".", 1), item) for name, item in sorted(named, key=lambda pair: pair[0])]
        return [_schema(namespace, name, item) for namespace, name, item in split]

    async def namespaces(self) -> list[str]:
        items = await self._system_items("namespaces")
        start = len(self._prefix)
        names = {item["namespace_name"]["S"] for item in items} - {self._system}
        found = {name[start:] for name in names if name.startswith(self._prefix)}
        return sorted(found | {table.namespace for table in await self.tables()})

    async def create_namespace(self, namespace: str) -> None:
        self._check_not_system(check_identifier(namespace))
        await self._make_system_tables()
        await self._add_namespace(namespace)

    async def drop_namespace(self, namespace: str) -> None:
        if any(table.namespace == namespace for table in await self.tables()):
            raise InvalidOperationError(f"namespace {namespace} still has tables")
        key = {"namespace_name": {"S": self._prefix + check_identifier(namespace)}}
        await self._administer("delete_item", {"TableName": f"{self._system}.namespaces", "Key": key}, Meaning.ABSENT)

    async def drop_table(self, table: TableSchema) -> None:
        requests = TableRequests(table, self._prefix)

        async def is_gone(description: Mapping[str, Any] | None) -> bool:
            if description is not None and description["TableStatus"] == "ACTIVE":
                await self._administer("delete_table", {"TableName": requests.name}, Meaning.ABSENT, Meaning.BUSY)
            return description is None

        self._check_not_system(table.namespace)
        await self._until(requests.name, is_gone)
        key = {"table": {"S": requests.name}}
        await self._administer("delete_item", {"TableName": f"{self._system}.metadata", "Key": key}, Meaning.ABSENT)
        self._forget(table)

    async def truncate_table(self, table: TableSchema) -> None:
        """Rows are removed one page after another: those written meanwhile may stay."""
        held = await self._learn(await self._known(table))
        async for items in self._pages(held, "scan", held.requests.keys()):
            keys = [{name: item[name] for name in (PARTITION_KEY, CLUSTERING_KEY) if name in item} for item in items]
            for first in range(0, len(keys), _DELETES_AT_ONCE):
                await self._delete(held.requests.name, keys[first : first + _DELETES_AT_ONCE])

    async def add_column(self, table: TableSchema, column: str, data_type: DataType) -> None:
        def changed(known: TableSchema) -> TableSchema:
            changed = with_column(known, column, data_type)
            TableRequests(changed, self._prefix).check()
            return changed

        await self._change(table, changed)

    async def create_index(self, table: TableSchema, column: str) -> None:
        indexed = with_index(await self._known(table), column)
        requests = TableRequests(indexed, self._prefix)
        requests.check()

        async def is_there(description: Mapping[str, Any] | None) -> bool:
            if description is None:
                raise InvalidOperationError(f"there is no table {table.full_name}")
            index = _index(description, requests.index_name(column))
            if index is None and description["TableStatus"] == "ACTIVE":
                units = description.get("ProvisionedThroughput", {}).get("WriteCapacityUnits") or None
                await self._administer(
                    "update_table",
                    {
                        "TableName": requests.name,
                        "AttributeDefinitions": [requests.index_attribute(column)],
                        "GlobalSecondaryIndexUpdates": [{"Create": requests.index_definition(column, units)}],
                    },
                    Meaning.BUSY,
                )
            return index is not None and index["IndexStatus"] == "ACTIVE"

        await self._until(requests.name, is_there)
        await self._change(table, lambda known: with_index(known, column))

    async def drop_index(self, table: TableSchema, column: str) -> None:
        await self._change(table, lambda known: replace(known, indexes=known.indexes - {column}))
        requests = TableRequests(table, self._prefix)

        async def is_gone(description: Mapping[str, Any] | None) -> bool:
            if description is None:
                raise InvalidOperationError(f"there is no table {table.full_name}")
            index = _index(description, requests.index_name(column))
            if index is not None and description["TableStatus"] == "ACTIVE" and index["IndexStatus"] == "ACTIVE":
                delete = {"Delete": {"IndexName": requests.index_name(column)}}
                request = {"TableName": requests.name, "GlobalSecondaryIndexUpdates": [delete]}
                await self._administer("update_table", request, Meaning.BUSY)
            return index is None

        await self._until(requests.name, is_gone)

    # -- tables and their metadata

    async def _learn(self, table: TableSchema) -> _Table:
        """Look a table up. Only found ones are remembered: another process may yet create the others."""
        rules = TableRules(table)
        known = await self._known(table)
        if not is_same_table(table, known):
            raise InvalidOperationError(f"{table.full_name} exists otherwise: {difference(table, known)}")
        held = self._tables[table] = _Table(rules, TableRequests(table, self._prefix))
        return held

    async def _known(self, table: TableSchema) -> TableSchema:
        key = {"table": {"S": self._prefix + table.full_name}}
        request = {"TableName": f"{self._system}.metadata", "Key": key, "ConsistentRead": True}
        response = await self._administer("get_item", request, Meaning.ABSENT) or {}
        if "Item" not in response:
            raise InvalidOperationError(f"there is no table {table.full_name}")
        return _schema(table.namespace, table.name, response["Item"])

    def _forget(self, table: TableSchema) -> None:
        self._tables = {known: held for known, held in self._tables.items() if known.full_name != table.full_name}

    async def _change(self, table: TableSchema, change: Callable[[TableSchema], TableSchema]) -> None:
        """Write down what `change` makes of a table, whatever others write at the same time."""
        for _ in range(_CHANGE_TRIES):
            known = await self._known(table)
            changed = change(known)
            if changed == known or await self._put_metadata(changed, known):
                self._forget(table)
                return
        raise self._too_many_changes(table)

    async def _put_metadata(self, table: TableSchema, replaced: TableSchema | None) -> bool:
        """Write what a table is, if it is what it was when it was read; whether that was so."""
        item = _metadata(self._prefix, table)
        request: Request = {"TableName": f"{self._system}.metadata", "Item": item}
        if replaced is None:
            request["ConditionExpression"] = "attribute_not_exists(#table)"
            request["ExpressionAttributeNames"] = {"#table": "table"}
        else:
            before = _metadata(self._prefix, replaced)
            names = {"#columns": "columns", "#indexes": "secondaryIndex"}
            values = {":columns": before["columns"]}
            indexed = "attribute_not_exists(#indexes)"
            if "secondaryIndex" in before:
                indexed, values[":indexes"] = "#indexes = :indexes", before["secondaryIndex"]
            request["ConditionExpression"] = f"#columns = :columns AND {indexed}"
            request["ExpressionAttributeNames"], request["ExpressionAttributeValues"] = names, values
        return await self._administer("put_item", request, Meaning.CONDITION) is not None

    async def _add_namespace(self, namespace: str) -> None:
        item = {"namespace_name": {"S": self._prefix + namespace}}
        request = {"TableName": f"{self._system}.namespaces", "Item": item}
        if await self._administer("put_item", request, Meaning.ABSENT) is None:
            await self._make_system_tables()
            await self._administer("put_item", request)

    async def _system_items(self, name: str) -> list[Mapping[str, Attribute]]:
        request: Request = {"TableName": f"{self._system}.{name}", "ConsistentRead": True}
        items: list[Mapping[str, Attribute]] = []
        while True:
            response = await self._administer("scan", request, Meaning.ABSENT) or {}
            items += response.get("Items", ())
            if "LastEvaluatedKey" not in response:
                return items
            request["ExclusiveStartKey"] = response["LastEvaluatedKey"]

    async def _make_system_tables(self) -> None:
        for name, key in (("namespaces", "namespace_name"), ("metadata", "table")):
            await self._create(
                {
                    "TableName": f"{self._system}.{name}",
                    "KeySchema": [{"AttributeName": key, "KeyType": "HASH"}],
                    "AttributeDefinitions": [{"AttributeName": key, "AttributeType": "S"}],
                    **capacity(self._units and _SYSTEM_UNITS),
                }
            )
        item = {"namespace_name": {"S": self._system}}
        await self._administer("put_item", {"TableName": f"{self._system}.namespaces", "Item": item})

    async def _make(self, table: TableSchema) -> None:
        await self._create(TableRequests(table, self._prefix).definition(self._units))

    async def _create(self, definition: Request) -> None:
        async def is_ready(description: Mapping[str, Any] | None) -> bool:
            if description is None:
                await self._administer("create_table", definition, Meaning.BUSY)
                return False
            indexes = description.get("GlobalSecondaryIndexes", ())
            return description["TableStatus"] == "ACTIVE" and all(i["IndexStatus"] == "ACTIVE" for i in indexes)

        await self._until(definition["TableName"], is_ready)

    async def _until(self, name: str, is_done: Callable[[Mapping[str, Any] | None], Awaitable[bool]]) -> None:
        """Look at a table (None: there is none) until `is_done`, which may ask for what is missing."""
        waited_s, pause_s = 0.0, _FIRST_POLL_S
        while True:
            response = await self._administer("describe_table", {"TableName": name}, Meaning.ABSENT)
            if await is_done(response and response["Table"]):
                return
            if waited_s >= self._ready_timeout_s:
                raise UnavailableStorageError(
                    f"{name} was not ready after {waited_s:.0f} s", remedy="look at the table's state in DynamoDB"
                )
            await self._sleep(pause_s)
            waited_s += pause_s
            pause_s = min(pause_s * 1.5, _LONGEST_POLL_S)

    async def _delete(self, name: str, keys: Sequence[Mapping[str, Attribute]]) -> None:
        left: Any = {name: [{"DeleteRequest": {"Key": key}} for key in keys]}
        while left:
            response = await self._administer("batch_write_item", {"RequestItems": left}) or {}
            left = response.get("UnprocessedItems")
            if left:
                await self._sleep(_FIRST_POLL_S)

    async def _administer(self, operation: str, request: Mapping[str, Any], *expected: Meaning) -> Response | None:
        """An answer, or None where the request failed as `expected`. Such requests may be made twice."""
        try:
            return await self._client.read(operation, request)
        except RequestFailedError as error:
            if error.failure.meaning in expected:
                return None
            raise error.failure.as_error() from error

    # -- requests

    async def _read(self, held: _Table, operation: str, request: Mapping[str, Any]) -> Response:
        try:
            return await self._client.read(operation, request)
        except RequestFailedError as error:
            if error.failure.meaning is Meaning.ABSENT:
                self._forget(held.requests.table)
                raise InvalidOperationError(f"there is no table {held.requests.table.full_name}") from error
            raise error.failure.as_error() from error

    async def _pages(
        self, held: _Table, operation: str, request: Mapping[str, Any]
    ) -> AsyncIterator[Sequence[Mapping[str, Attribute]]]:
        following: Request = dict(request)
        while True:
            response = await self._read(held, operation, following)
            yield response.get("Items", ())
            if "LastEvaluatedKey" not in response:
                return
            following["ExclusiveStartKey"] = response["LastEvaluatedKey"]

    def _check_not_system(self, namespace: str) -> None:
        if namespace.lower() == SYSTEM_NAMESPACE:
            raise InvalidOperationError(f"namespace {namespace} is where DynamoDB's tables are described")

    def _too_many_changes(self, table: TableSchema) -> UnavailableStorageError:
        return UnavailableStorageError(
            f"{table.full_name} is being changed again and again", remedy="change a table from one place at a time"
        )


def _index(description: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """An index in a description of its table."""
    indexes: Sequence[Mapping[str, Any]] = description.get("GlobalSecondaryIndexes", ())
    return next((index for index in indexes if index["IndexName"] == name), None)


def _metadata(prefix: str, table: TableSchema) -> dict[str, Attribute]:
    """A table as an item of ScalarDB's metadata, and the order of its columns."""

    def names(columns: Sequence[str]) -> Attribute:
        return {"L": [{"S": column} for column in columns]}

    item: dict[str, Attribute] = {
        "table": {"S": prefix + table.full_name},
        "columns": {"M": {column: {"S": data_type.value.lower()} for column, data_type in table.columns.items()}},
        "partitionKey": names(table.partition_key),
        "columnOrder": names(tuple(table.columns)),
    }
    if table.clustering_key:
        item["clusteringKey"] = names(table.clustering_key)
        item["clusteringOrders"] = {
            "M": {c: {"S": "DESC" if c in table.descending else "ASC"} for c in table.clustering_key}
        }
    if table.indexes:
        item["secondaryIndex"] = {"SS": sorted(table.indexes)}
    return item


def _schema(namespace: str, name: str, item: Mapping[str, Attribute]) -> TableSchema:
    """A table from its metadata, whoever wrote it."""

    def names(attribute: str) -> tuple[str, ...]:
        return tuple(entry["S"] for entry in item.get(attribute, {"L": ()})["L"])

    types = {column: DataType(held["S"].upper()) for column, held in item["columns"]["M"].items()}
    partition_key, clustering_key = names("partitionKey"), names("clusteringKey")
    order = [column for column in names("columnOrder") or (*partition_key, *clustering_key) if column in types]
    order += sorted(types.keys() - set(order))
    orders = item.get("clusteringOrders", {"M": {}})["M"]
    return TableSchema(
        namespace=namespace,
        name=name,
        columns={column: types[column] for column in order},
        partition_key=partition_key,
        clustering_key=clustering_key,
        descending=frozenset(column for column, held in orders.items() if held["S"] == "DESC"),
        indexes=frozenset(item.get("secondaryIndex", {"SS": ()})["SS"]),
    )
