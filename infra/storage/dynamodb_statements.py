"""The requests of one table: what reads and mutations are in DynamoDB's API.

Pure: nothing here makes a request. Names and values enter expressions only through `#` and `:` placeholders.

A condition means what it means to the port, not what DynamoDB makes of absent attributes: a comparison with NULL
never holds, `!=` included. What is known before anything is asked (a condition on the row's own key, a comparison
with NULL) is decided here; a mutation whose condition can never hold has no request.

A clustering range becomes one range of bytes. Where a bound names columns of which some ascend and some descend, the
rows that it means do not lie together: then the range is a wider one. So `is_within` has the last word on every row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from infra.storage.conditions import holds
from infra.storage.dynamodb_encoding import (
    ATTRIBUTE_TYPES,
    CLUSTERING_KEY,
    MAX_CLUSTERING_KEY_BYTES,
    MAX_PARTITION_KEY_BYTES,
    PARTITION_KEY,
    Attribute,
    clustering_key,
    clustering_prefix,
    decoded,
    encoded,
    following,
    partition_key,
    size_of,
)
from infra.storage.errors import InvalidOperationError
from infra.storage.operations import (
    Bound,
    ColumnCondition,
    CrossPartition,
    DataType,
    If,
    IfNotExists,
    IndexScan,
    Key,
    Mutation,
    Operator,
    Put,
    Row,
    Scan,
    TableSchema,
    Value,
)

MAX_ITEM_BYTES = 400 * 1024
MAX_BATCH_BYTES = 4 * 1024 * 1024
_MAX_NAME_LENGTH = 255

Request = dict[str, Any]

_COMPARISONS: Mapping[Operator, str] = {
    Operator.EQ: "=",
    Operator.NE: "<>",
    Operator.LT: "<",
    Operator.LE: "<=",
    Operator.GT: ">",
    Operator.GE: ">=",
}


class Write(NamedTuple):
    """One mutation: `Update` or `Delete`, its request, and how many bytes it writes at least."""

    action: str
    request: Request
    byte_count: int


class _Expression:
    """The placeholders of one request."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        self.values: dict[str, Attribute] = {}
        self._placeholders: dict[str, str] = {}

    def name(self, name: str) -> str:
        placeholder = self._placeholders.get(name)
        if placeholder is None:
            placeholder = self._placeholders[name] = f"#n{len(self.names)}"
            self.names[placeholder] = name
        return placeholder

    def value(self, attribute: Attribute) -> str:
        placeholder = f":v{len(self.values)}"
        self.values[placeholder] = attribute
        return placeholder

    def into(self, request: Request) -> Request:
        if self.names:
            request["ExpressionAttributeNames"] = self.names
        if self.values:
            request["ExpressionAttributeValues"] = self.values
        return request


class TableRequests:
    """Turns reads and mutations of one table into requests, and items into rows.

    `prefix` stands before every namespace (ScalarDB's `namespace.prefix`).
    """

    def __init__(self, table: TableSchema, prefix: str = "") -> None:
        self.table = table
        self.name = prefix + table.full_name

    def index_name(self, column: str) -> str:
        return f"{self.name}.global_index.{column}"

    def check(self) -> None:
        """InvalidOperationError for a table that DynamoDB cannot hold in ScalarDB's way."""
        table = self.table
        for column in table.columns:
            if column in (PARTITION_KEY, CLUSTERING_KEY):
                raise InvalidOperationError(f"{table.full_name}: {column} is the name of an attribute of DynamoDB's")
        for column in (*table.partition_key[:-1], *table.clustering_key):
            if table.columns[column] is DataType.BLOB:
                raise InvalidOperationError(
                    f"{table.full_name}.{column}: in DynamoDB a BLOB can only be the last column of a partition key"
                )
        for column in table.indexes:
            if table.columns[column] is DataType.BOOLEAN:
                raise InvalidOperationError(f"{table.full_name}.{column}: DynamoDB does not index BOOLEAN")
        for name in (self.name, *map(self.index_name, table.indexes)):
            if len(name) > _MAX_NAME_LENGTH:
                raise InvalidOperationError(f"{name}: a name in DynamoDB has at most {_MAX_NAME_LENGTH} characters")

    def definition(self, units: int | None) -> Request:
        """What CreateTable is told. `units`: provisioned read and write capacity, None for paying by request."""
        has_clustering = bool(self.table.clustering_key)
        attributes = [PARTITION_KEY, *([CLUSTERING_KEY] if has_clustering else [])]
        request: Request = {
            "TableName": self.name,
            "KeySchema": [
                {"AttributeName": name, "KeyType": kind}
                for name, kind in zip(attributes, ("HASH", "RANGE"), strict=False)
            ],
            "AttributeDefinitions": [{"AttributeName": name, "AttributeType": "B"} for name in attributes]
            + [self.index_attribute(column) for column in sorted(self.table.indexes)],
            **capacity(units),
        }
        if self.table.indexes:
            request["GlobalSecondaryIndexes"] = [
                self.index_definition(column, units) for column in sorted(self.table.indexes)
            ]
        return request

    def index_attribute(self, column: str) -> Request:
        return {"AttributeName": column, "AttributeType": ATTRIBUTE_TYPES[self.table.columns[column]]}

    def index_definition(self, column: str, units: int | None) -> Request:
        request: Request = {
            "IndexName": self.index_name(column),
            "KeySchema": [{"AttributeName": column, "KeyType": "HASH"}],
            "Projection": {"ProjectionType": "ALL"},
        }
        if units is not None:
            request["ProvisionedThroughput"] = capacity(units)["ProvisionedThroughput"]
        return request

    # Reading

    def row(self, item: Mapping[str, Attribute]) -> Row:
        return {column: decoded(item.get(column), data_type) for column, data_type in self.table.columns.items()}

    def key(self, key: Key) -> dict[str, Attribute]:
        """The primary key of an item."""
        found: dict[str, Attribute] = {PARTITION_KEY: {"B": partition_key(self.table, key.partition)}}
        if self.table.clustering_key:
            found[CLUSTERING_KEY] = {"B": clustering_key(self.table, key.clustering)}
        return found

    def get(self, key: Key) -> Request:
        return {"TableName": self.name, "Key": self.key(key), "ConsistentRead": True}

    def scan(self, scan: Scan) -> Request | None:
        """The query that finds every row of `scan`, and maybe others beside its bounds; None if there are none."""
        expression = _Expression()
        partition = expression.value({"B": partition_key(self.table, scan.partition)})
        terms = [f"{expression.name(PARTITION_KEY)} = {partition}"]
        if self.table.clustering_key:
            bytes_range = self._byte_range(scan)
            if bytes_range is None:
                return None
            low, high = (edge and expression.value({"B": edge}) for edge in bytes_range)
            if low or high:
                name = expression.name(CLUSTERING_KEY)
                terms.append(
                    f"{name} BETWEEN {low} AND {high}"
                    if low and high
                    else f"{name} {f'>= {low}' if low else f'<= {high}'}"
                )
        elif any(bound is not None and not bound.inclusive for bound in (scan.start, scan.end)):
            return None  # An exclusive bound without values leaves out everything.
        return expression.into(
            {
                "TableName": self.name,
                "KeyConditionExpression": " AND ".join(terms),
                "ScanIndexForward": not scan.reverse,
                "ConsistentRead": True,
            }
        )

    def is_within(self, scan: Scan, row: Row) -> bool:
        """Whether `row` lies between the bounds of `scan`. Bounds compare by value."""
        for bound, sign in ((scan.start, 1), (scan.end, -1)):
            if bound is not None:
                order = self._compared(row, bound) * sign
                if order < 0 or (order == 0 and not bound.inclusive):
                    return False
        return True

    def page(self, selection: CrossPartition) -> tuple[str, Request]:
        """The operation that reads a cross-partition selection, and its request, without its conditions."""
        if not isinstance(selection, IndexScan):
            return "scan", {"TableName": self.name, "ConsistentRead": True}
        expression = _Expression()
        self._check_indexed(selection.column, value := self._encoded(selection.column, selection.value))
        condition = f"{expression.name(selection.column)} = {expression.value(value)}"
        request = {
            "TableName": self.name,
            "IndexName": self.index_name(selection.column),
            "KeyConditionExpression": condition,
        }
        return "query", expression.into(request)

    def partitions(self) -> Request:
        request = {"TableName": self.name, "ConsistentRead": True, "ProjectionExpression": "#n0"}
        return {**request, "ExpressionAttributeNames": {"#n0": PARTITION_KEY}}

    def keys(self) -> Request:
        """The scan that reads the primary keys of all items."""
        names = {"#n0": PARTITION_KEY, **({"#n1": CLUSTERING_KEY} if self.table.clustering_key else {})}
        request = {"TableName": self.name, "ConsistentRead": True, "ProjectionExpression": ", ".join(names)}
        return {**request, "ExpressionAttributeNames": names}

    # Writing

    def write(self, mutation: Mutation) -> Write | None:
        """The request that applies `mutation` if its condition holds; None if it never can."""
        expression = _Expression()
        request: Request = {"TableName": self.name, "Key": self.key(mutation.key)}
        terms = self._terms(mutation, expression)
        if terms is None:
            return None
        if terms:
            request["ConditionExpression"] = " AND ".join(terms)
        byte_count = sum(size_of(*part) for part in request["Key"].items())
        if isinstance(mutation, Put):
            request["UpdateExpression"], written = self._changes(mutation, expression)
            byte_count += written
            if byte_count > MAX_ITEM_BYTES:
                raise InvalidOperationError(
                    f"{self.table.full_name}: a row in DynamoDB has at most {MAX_ITEM_BYTES // 1024} KB"
                )
        return Write("Update" if isinstance(mutation, Put) else "Delete", expression.into(request), byte_count)

    def _changes(self, put: Put, expression: _Expression) -> tuple[str, int]:
        columns = dict(put.columns)
        if put.condition is None or isinstance(put.condition, IfNotExists) or not columns:
            # The key's columns are attributes too. Of a row that exists they are there already, but an update must
            # change something.
            columns.update(zip(self.table.key_columns, put.key.partition + put.key.clustering, strict=True))
        assigned, removed, byte_count = [], [], 0
        for column, value in columns.items():
            if value is None:
                removed.append(expression.name(column))
                continue
            attribute = self._encoded(column, value)
            if column in self.table.indexes:
                self._check_indexed(column, attribute)
            byte_count += size_of(column, attribute)
            assigned.append(f"{expression.name(column)} = {expression.value(attribute)}")
        clauses = [f"SET {', '.join(assigned)}"] if assigned else []
        clauses += [f"REMOVE {', '.join(removed)}"] if removed else []
        return " ".join(clauses), byte_count

    def _terms(self, mutation: Mutation, expression: _Expression) -> list[str] | None:
        condition = mutation.condition
        if condition is None:
            return []
        if isinstance(condition, IfNotExists):
            return [f"attribute_not_exists({expression.name(PARTITION_KEY)})"]
        terms = [f"attribute_exists({expression.name(PARTITION_KEY)})"]
        if isinstance(condition, If):
            values = mutation.key.partition + mutation.key.clustering
            known: Row = dict(zip(self.table.key_columns, values, strict=True))
            for asked in condition.conditions:
                if asked.column in known:
                    if not holds(asked, known):
                        return None
                    continue
                term = self._term(asked, expression)
                if term is None:
                    return None
                terms.append(term)
        return terms

    def _term(self, condition: ColumnCondition, expression: _Expression) -> str | None:
        name = expression.name(condition.column)
        data_type = self.table.columns[condition.column]
        is_held = f"attribute_type({name}, {expression.value({'S': ATTRIBUTE_TYPES[data_type]})})"
        match condition.operator:
            case Operator.IS_NULL:
                return f"NOT {is_held}"
            case Operator.IS_NOT_NULL:
                return is_held
        if condition.value is None:
            return None
        if data_type is DataType.BOOLEAN and condition.operator is not Operator.EQ:
            # DynamoDB has no order of BOOL. There are only two to choose from.
            allowed = [held for held in (False, True) if holds(condition, {condition.column: held})]
            if len(allowed) != 1:
                return is_held if allowed else None
            condition = ColumnCondition(condition.column, Operator.EQ, allowed[0])
        value = expression.value(self._encoded(condition.column, condition.value))
        return f"({is_held} AND {name} {_COMPARISONS[condition.operator]} {value})"

    def _encoded(self, column: str, value: Value) -> Attribute:
        try:
            return encoded(value, self.table.columns[column])
        except InvalidOperationError as error:
            raise InvalidOperationError(f"{self.table.full_name}.{column}: {error}") from None

    def _check_indexed(self, column: str, attribute: Attribute) -> None:
        [held] = attribute.values()
        if not held or size_of("", attribute) > MAX_PARTITION_KEY_BYTES:
            raise InvalidOperationError(
                f"{self.table.full_name}.{column}: what DynamoDB indexes has 1 to {MAX_PARTITION_KEY_BYTES} bytes"
            )

    # Clustering ranges

    def _byte_range(self, scan: Scan) -> tuple[bytes | None, bytes | None] | None:
        """The smallest and the largest clustering key to read, where there is one; None if there is nothing between."""
        descends = self.table.clustering_key[0] in self.table.descending
        first, last = (scan.end, scan.start) if descends else (scan.start, scan.end)
        low = high = None
        if first is not None:
            prefix, inclusive = self._common_prefix(first)
            if not prefix:
                if not inclusive:
                    return None
            elif len(prefix) > MAX_CLUSTERING_KEY_BYTES:
                low = prefix[:MAX_CLUSTERING_KEY_BYTES]
            else:
                low = prefix if inclusive else following(prefix)
                if low is None:
                    return None
        if last is not None:
            prefix, inclusive = self._common_prefix(last)
            if not prefix:
                if not inclusive:
                    return None
            else:
                is_whole = inclusive or len(prefix) > MAX_CLUSTERING_KEY_BYTES
                high = following(prefix[:MAX_CLUSTERING_KEY_BYTES]) if is_whole else prefix
        if low is not None and high is not None and low >= high:
            return None  # `high` itself is already outside.
        return low, high

    def _common_prefix(self, bound: Bound) -> tuple[bytes, bool]:
        """The bytes of a bound as far as its columns run one way, and whether rows beginning with them count."""
        ways = [column in self.table.descending for column in self.table.clustering_key[: len(bound.values)]]
        length = next((place for place, way in enumerate(ways) if way != ways[0]), len(ways))
        prefix = clustering_prefix(self.table, bound.values[:length])
        return prefix, bound.inclusive or length < len(ways)

    def _compared(self, row: Row, bound: Bound) -> int:
        """-1, 0 or 1: the row's clustering key before, within or after the bound's prefix, by value."""
        for column, value in zip(self.table.clustering_key, bound.values, strict=False):
            held: Any = row[column]
            if held != value:
                return -1 if held < value else 1
        return 0


def capacity(units: int | None) -> Request:
    """How a table is paid for: provisioned `units` of reading and of writing a second, or by request."""
    if units is None:
        return {"BillingMode": "PAY_PER_REQUEST"}
    throughput = {"ReadCapacityUnits": units, "WriteCapacityUnits": units}
    return {"BillingMode": "PROVISIONED", "ProvisionedThroughput": throughput}
