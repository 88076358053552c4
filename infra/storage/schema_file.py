"""Schema files: tables declared as JSON, in the format of ScalarDB's Schema Loader.

    {"shop.orders": {"transaction": true,                    absent: true
                     "partition-key": ["customer"],
                     "clustering-key": ["placed_at DESC"],    ASC where nothing is said
                     "columns": {"customer": "TEXT", "placed_at": "BIGINT", "total": "INT"},
                     "secondary-index": ["total"],
                     "compaction-strategy": "LCS", "ru": 10}}  options of single storages

A file for imports names tables that are there already, and says of them only what storage cannot say:

    {"shop.orders": {"transaction": true, "override-columns-type": {"placed_at": "BIGINT"}}}

A file is refused as a whole, and by an error of its own for each kind of mistake:

    SchemaFileError
    ├── MalformedJsonError         no JSON
    ├── RepeatedNameError          a table, attribute or column stands twice in its object
    ├── WrongShapeError            JSON, but of another shape than is wanted there
    ├── TableNameError             the name of a table is not namespace.table
    ├── MissingAttributeError      no partition key, or no columns
    ├── UnknownAttributeError      an attribute that nobody knows: a misspelt one would otherwise be lost
    ├── UnknownTypeError           a column's type is none of `DataType`
    ├── UnsupportedFeatureError    ScalarDB has it and this project has not (ENCRYPTED columns, decoupled metadata)
    ├── ClusteringOrderError       a clustering column is not `name`, `name ASC` or `name DESC`
    ├── UnknownColumnError         a key or an index names a column that is not declared
    ├── RepeatedColumnError        a column stands twice in the key, or twice among the indexes
    └── InvalidTableError          what no storage could hold (`validation.check_table`)

Nothing here knows of transactions: `transaction` is a flag that is handed on. Source: ScalarDB 3.19's schema-loader
(TableSchema, ImportTableSchema). Stricter than that where it would silently take less than was written: JSON names
that repeat, unknown attributes, and `ENCRYPTED` are refused. So is an index on a column of the key, which ScalarDB
allows on some databases: the storage port has none.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from infra.storage.errors import InvalidOperationError
from infra.storage.operations import DataType, TableSchema
from infra.storage.validation import check_table, is_identifier

TRANSACTION = "transaction"
PARTITION_KEY = "partition-key"
CLUSTERING_KEY = "clustering-key"
COLUMNS = "columns"
SECONDARY_INDEX = "secondary-index"
OVERRIDE_COLUMNS_TYPE = "override-columns-type"

OPTIONS: Mapping[str, str] = {
    "replication-strategy": "replication-strategy",
    "network-strategy": "replication-strategy",  # the name that older files have
    "replication-factor": "replication-factor",
    "compaction-strategy": "compaction-strategy",
    "ru": "ru",
    "no-scaling": "no-scaling",
    "no-backup": "no-backup",
}
"""Attributes that only some storages mean anything by, and the name that they are handed on by."""

_DECOUPLING = "transaction-metadata-decoupling"
_TABLE_ATTRIBUTES = (TRANSACTION, PARTITION_KEY, CLUSTERING_KEY, COLUMNS, SECONDARY_INDEX, *OPTIONS)
_IMPORT_ATTRIBUTES = (TRANSACTION, OVERRIDE_COLUMNS_TYPE, *OPTIONS)


class SchemaFileError(Exception):
    """A schema file that cannot be used. `table` says where, as far as that is known."""

    def __init__(self, message: str, *, table: str = "") -> None:
        super().__init__(f"{table}: {message}" if table else message)
        self.table = table


class MalformedJsonError(SchemaFileError):
    """The text is not JSON."""


class RepeatedNameError(SchemaFileError):
    """One name stands twice in one JSON object; a reader would have to guess which is meant."""


class WrongShapeError(SchemaFileError):
    """JSON of another shape than is wanted there."""


class TableNameError(SchemaFileError):
    """The name of a table is not `namespace.table`."""


class MissingAttributeError(SchemaFileError):
    """An attribute without which there is no table is absent."""


class UnknownAttributeError(SchemaFileError):
    """An attribute that means nothing."""


class UnknownTypeError(SchemaFileError):
    """A column's type is no data type."""


class UnsupportedFeatureError(SchemaFileError):
    """Something that ScalarDB offers and this project does not."""


class ClusteringOrderError(SchemaFileError):
    """A clustering column is not written as `name`, `name ASC` or `name DESC`."""


class UnknownColumnError(SchemaFileError):
    """A key or an index names a column that is not among the columns."""


class RepeatedColumnError(SchemaFileError):
    """A column stands twice in a key, or twice among the indexes."""


class InvalidTableError(SchemaFileError):
    """A table that no storage could hold."""


@dataclass(frozen=True)
class TableDeclaration:
    """A table as its user declares it, without transaction columns, and whether it shall have them.

    `options` are those of single storages, as text, by the names that `OPTIONS` maps to.
    """

    table: TableSchema
    transaction: bool = True
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ImportDeclaration:
    """A table that is there and shall be used, `transaction` telling whether by transactions.

    `override_types` names the types of columns that storage would take for others.
    """

    namespace: str
    name: str
    transaction: bool = True
    override_types: Mapping[str, DataType] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def full_name(self) -> str:
        return f"{self.namespace}.{self.name}"


def parse(text: str) -> tuple[TableDeclaration, ...]:
    """The tables that a schema file declares, in its order. Raises SchemaFileError."""
    declared = tuple(_table(name, _object(value, "a table", name)) for name, value in _tables_in(text))
    _check_spellings(declaration.table.full_name for declaration in declared)
    return declared


def parse_imports(text: str) -> tuple[ImportDeclaration, ...]:
    """The tables that an import file names, in its order. Raises SchemaFileError."""
    return tuple(_import(name, _object(value, "a table", name)) for name, value in _tables_in(text))


def render(declarations: Iterable[TableDeclaration]) -> str:
    """The schema file that declares these tables: `parse` gives them back."""
    return json.dumps(
        {declaration.table.full_name: as_attributes(declaration) for declaration in declarations},
        indent=2,
        ensure_ascii=False,
    )


def as_attributes(declaration: TableDeclaration) -> dict[str, Any]:
    """One table as it stands in a schema file, under its name."""
    table = declaration.table
    attributes: dict[str, Any] = {TRANSACTION: declaration.transaction, PARTITION_KEY: list(table.partition_key)}
    if table.clustering_key:
        attributes[CLUSTERING_KEY] = clustering_order(table)
    attributes[COLUMNS] = {column: data_type.value for column, data_type in table.columns.items()}
    if table.indexes:
        attributes[SECONDARY_INDEX] = [column for column in table.columns if column in table.indexes]
    return attributes | dict(declaration.options)


def clustering_order(table: TableSchema) -> list[str]:
    """The clustering key of a table as a schema file has it: `DESC` stands behind the columns that descend."""
    return [f"{column} DESC" if column in table.descending else column for column in table.clustering_key]


# -- JSON


def _tables_in(text: str) -> list[tuple[str, Any]]:
    try:
        content = json.loads(text, object_pairs_hook=_distinct)
    except json.JSONDecodeError as error:
        raise MalformedJsonError(f"no JSON at line {error.lineno}, column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise MalformedJsonError("no JSON that anybody wrote: it is nested too deeply") from error
    return list(_object(content, "a schema file").items())


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise RepeatedNameError(f"{name!r} stands twice in one object")
        found[name] = value
    return found


def _object(value: Any, what: str, table: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        raise WrongShapeError(f"{what} is a JSON object, not {_kind(value)}", table=table)
    return cast("dict[str, Any]", value)


def _names(value: Any, attribute: str, table: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise WrongShapeError(f'{attribute} is a list of names, as in ["a", "b"]', table=table)
    return cast("list[str]", value)


def _kind(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a text"
        case list():
            return "a list"
        case _:
            return "an object"


# -- tables


def _split(name: str) -> tuple[str, str]:
    namespace, _, table = name.partition(".")
    if not is_identifier(namespace) or not is_identifier(table):
        raise TableNameError(f"{name!r} is not NAMESPACE.TABLE, each of letters, digits and _, no digit first")
    return namespace, table


def _table(name: str, attributes: dict[str, Any]) -> TableDeclaration:
    namespace, table_name = _split(name)
    if OVERRIDE_COLUMNS_TYPE in attributes and COLUMNS not in attributes:
        raise MissingAttributeError(
            f"{COLUMNS} and {PARTITION_KEY} are missing; with {OVERRIDE_COLUMNS_TYPE}, this is a file for imports",
            table=name,
        )
    _check_attributes(name, attributes, _TABLE_ATTRIBUTES)
    for attribute in (PARTITION_KEY, COLUMNS):
        if attribute not in attributes:
            raise MissingAttributeError(f"{attribute} is missing", table=name)
    partition_key = _names(attributes[PARTITION_KEY], PARTITION_KEY, name)
    if not partition_key:
        raise MissingAttributeError(f"{PARTITION_KEY} names no column", table=name)
    clustering = [_clustering(text, name) for text in _names(attributes.get(CLUSTERING_KEY, []), CLUSTERING_KEY, name)]
    columns = _types(attributes[COLUMNS], COLUMNS, name)
    indexes = _names(attributes.get(SECONDARY_INDEX, []), SECONDARY_INDEX, name)
    key = [*partition_key, *(column for column, _ in clustering)]
    _check_columns(key, "the primary key", columns, name)
    _check_columns(indexes, SECONDARY_INDEX, columns, name)
    table = TableSchema(
        namespace,
        table_name,
        columns,
        tuple(partition_key),
        tuple(column for column, _ in clustering),
        frozenset(column for column, descends in clustering if descends),
        frozenset(indexes),
    )
    try:
        check_table(table)
    except InvalidOperationError as error:
        raise InvalidTableError(str(error)) from error
    return TableDeclaration(table, _flag(attributes, name), _options(attributes, name))


def _import(name: str, attributes: dict[str, Any]) -> ImportDeclaration:
    namespace, table_name = _split(name)
    _check_attributes(name, attributes, _IMPORT_ATTRIBUTES)
    return ImportDeclaration(
        namespace,
        table_name,
        _flag(attributes, name),
        _types(attributes.get(OVERRIDE_COLUMNS_TYPE, {}), OVERRIDE_COLUMNS_TYPE, name),
        _options(attributes, name),
    )


def _check_attributes(table: str, attributes: Iterable[str], known: Sequence[str]) -> None:
    for attribute in attributes:
        if attribute == _DECOUPLING:
            raise UnsupportedFeatureError(f"{attribute}: transaction columns stand in the table itself", table=table)
        if attribute in known:
            continue
        if known is _IMPORT_ATTRIBUTES and attribute in _TABLE_ATTRIBUTES:
            raise UnknownAttributeError(
                f"{attribute} is what the table has, and no matter of an import; leave it out", table=table
            )
        similar = difflib.get_close_matches(attribute, known, n=1)
        remedy = f"did you mean {similar[0]}?" if similar else f"there are {', '.join(known)}"
        raise UnknownAttributeError(f"{attribute!r} is no attribute of a table; {remedy}", table=table)


def _flag(attributes: Mapping[str, Any], table: str) -> bool:
    value = attributes.get(TRANSACTION, True)
    if not isinstance(value, bool):
        raise WrongShapeError(f"{TRANSACTION} is true or false, not {_kind(value)}", table=table)
    return value


def _clustering(text: str, table: str) -> tuple[str, bool]:
    """The column and whether it descends."""
    match text.split():
        case [column]:
            return column, False
        case [column, order] if order.upper() in ("ASC", "DESC"):
            return column, order.upper() == "DESC"
        case _:
            raise ClusteringOrderError(
                f"clustering column {text!r} is not `name`, `name ASC` or `name DESC`", table=table
            )


def _types(value: Any, attribute: str, table: str) -> dict[str, DataType]:
    found = {}
    for column, text in _object(value, attribute, table).items():
        words = text.split() if isinstance(text, str) else []
        if not words or words[0].upper() not in DataType.__members__:
            raise UnknownTypeError(
                f"{column} is {text if isinstance(text, str) else _kind(text)!r}, which is no type; "
                f"there are {', '.join(DataType)}",
                table=table,
            )
        if [word.upper() for word in words[1:]] == ["ENCRYPTED"]:
            raise UnsupportedFeatureError(f"{column} is ENCRYPTED, which no storage here offers", table=table)
        if words[1:]:
            raise UnknownTypeError(f"{column} is {text!r}, which is more than a type", table=table)
        found[column] = DataType[words[0].upper()]
    return found


def _check_columns(names: Sequence[str], where: str, columns: Mapping[str, DataType], table: str) -> None:
    for position, column in enumerate(names):
        if column not in columns:
            similar = difflib.get_close_matches(column, columns, n=1)
            hint = f"; did you mean {similar[0]}?" if similar else ""
            raise UnknownColumnError(f"{where} names {column!r}, which is not among the columns{hint}", table=table)
        if column in names[:position]:
            raise RepeatedColumnError(f"{where} names {column!r} twice", table=table)


def _options(attributes: Mapping[str, Any], table: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for attribute, option in OPTIONS.items():
        if attribute not in attributes:
            continue
        value = attributes[attribute]
        if not isinstance(value, (str, int)):
            raise WrongShapeError(f"{attribute} is a text, a number or a boolean, not {_kind(value)}", table=table)
        if option in found:
            raise RepeatedNameError(f"{attribute} and {option} are the same option", table=table)
        found[option] = str(value).lower() if isinstance(value, bool) else str(value)
    return found


def _check_spellings(names: Iterable[str]) -> None:
    spelt: dict[str, str] = {}
    namespaces: dict[str, str] = {}
    for name in names:
        if spelt.setdefault(name.lower(), name) != name:
            raise InvalidTableError(f"{spelt[name.lower()]} and {name} differ only by case")
        namespace = name.partition(".")[0]
        if namespaces.setdefault(namespace.lower(), namespace) != namespace:
            raise InvalidTableError(f"namespaces {namespaces[namespace.lower()]} and {namespace} differ only by case")
