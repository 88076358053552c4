"""Schema files: ScalarDB's format becomes tables, and every mistake has a name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.storage import schema_file
from infra.storage.operations import DataType, TableSchema
from infra.storage.schema_file import (
    ClusteringOrderError,
    ImportDeclaration,
    InvalidTableError,
    MalformedJsonError,
    MissingAttributeError,
    RepeatedColumnError,
    RepeatedNameError,
    SchemaFileError,
    TableDeclaration,
    TableNameError,
    UnknownAttributeError,
    UnknownColumnError,
    UnknownTypeError,
    UnsupportedFeatureError,
    WrongShapeError,
    parse,
    parse_imports,
    render,
)
from tests.storage.schema_strategies import declarations

AUDITOR = Path(__file__).resolve().parents[2] / "schemas" / "auditor.schema.json"


def one(**attributes: Any) -> str:
    """A file with one sound table, `attributes` replaced (underscores for hyphens)."""
    sound = {"partition-key": ["a"], "clustering-key": ["b"], "columns": {"a": "INT", "b": "TEXT", "c": "BLOB"}}
    changed = sound | {name.replace("_", "-"): value for name, value in attributes.items()}
    return json.dumps({"ns.t": {name: value for name, value in changed.items() if value is not ...}})


def test_a_file_with_everything_becomes_a_table() -> None:
    (declared,) = parse(
        """{"shop.order_line": {
            "transaction": false,
            "partition-key": ["order_id", "part"],
            "clustering-key": ["placed DESC", "line ASC", "extra"],
            "columns": {"order_id": "TEXT", "part": "bigint", "placed": "Timestamptz", "line": "INT",
                        "extra": "BOOLEAN", "price": "DOUBLE", "note": "TEXT"},
            "secondary-index": ["note", "price"],
            "compaction-strategy": "LCS",
            "network-strategy": "SimpleStrategy",
            "ru": 10,
            "no-scaling": true}}"""
    )

    assert declared == TableDeclaration(
        TableSchema(
            "shop",
            "order_line",
            {
                "order_id": DataType.TEXT,
                "part": DataType.BIGINT,
                "placed": DataType.TIMESTAMPTZ,
                "line": DataType.INT,
                "extra": DataType.BOOLEAN,
                "price": DataType.DOUBLE,
                "note": DataType.TEXT,
            },
            ("order_id", "part"),
            ("placed", "line", "extra"),
            frozenset({"placed"}),
            frozenset({"note", "price"}),
        ),
        transaction=False,
        options={
            "compaction-strategy": "LCS",
            "replication-strategy": "SimpleStrategy",
            "ru": "10",
            "no-scaling": "true",
        },
    )


def test_a_table_is_transactional_unless_it_says_otherwise() -> None:
    (declared,) = parse(one())

    assert declared.transaction


def test_an_import_names_a_table_and_what_storage_cannot_say() -> None:
    declared = parse_imports(
        '{"ns.t": {"transaction": true, "override-columns-type": {"c3": "TIME", "c5": "timestamp"}}, "ns.u": {}}'
    )

    assert declared == (
        ImportDeclaration("ns", "t", True, {"c3": DataType.TIME, "c5": DataType.TIMESTAMP}),
        ImportDeclaration("ns", "u"),
    )


MISTAKES: list[tuple[str, str, type[SchemaFileError], str]] = [
    ("no JSON", "{", MalformedJsonError, "line 1, column 2"),
    ("nothing at all", "", MalformedJsonError, "line 1"),
    ("nested without end", "[" * 100_000, MalformedJsonError, "nested"),
    ("not an object", "[]", WrongShapeError, "a schema file is a JSON object, not a list"),
    ("a table that is no object", '{"ns.t": 1}', WrongShapeError, "ns.t: a table is a JSON object, not a number"),
    ("a table twice", '{"ns.t": {}, "ns.t": {}}', RepeatedNameError, "'ns.t' stands twice"),
    (
        "a column twice",
        '{"ns.t": {"partition-key": ["a"], "columns": {"a": "INT", "a": "TEXT"}}}',
        RepeatedNameError,
        "'a' stands twice",
    ),
    ("a table without namespace", '{"t": {}}', TableNameError, "'t' is not NAMESPACE.TABLE"),
    ("a table with two dots", '{"a.b.c": {}}', TableNameError, "'a.b.c'"),
    ("a namespace that is no name", '{"1.t": {}}', TableNameError, "'1.t'"),
    ("no partition key", one(partition_key=...), MissingAttributeError, "ns.t: partition-key is missing"),
    ("an empty partition key", one(partition_key=[]), MissingAttributeError, "names no column"),
    ("no columns", one(columns=...), MissingAttributeError, "ns.t: columns is missing"),
    ("an import", '{"ns.t": {"override-columns-type": {"a": "INT"}}}', MissingAttributeError, "a file for imports"),
    ("a misspelt attribute", one(secondary_indexes=["c"]), UnknownAttributeError, "did you mean secondary-index?"),
    ("a strange attribute", one(zzz=1), UnknownAttributeError, "there are transaction, partition-key"),
    ("a key that is a text", one(partition_key="a"), WrongShapeError, "partition-key is a list of names"),
    ("a key of numbers", one(clustering_key=[1]), WrongShapeError, "clustering-key is a list of names"),
    ("a flag that is a text", one(transaction="true"), WrongShapeError, "true or false, not a text"),
    ("columns as a list", one(columns=["a"]), WrongShapeError, "columns is a JSON object, not a list"),
    ("an option that is an object", one(ru={}), WrongShapeError, "not an object"),
    (
        "an option by both its names",
        one(network_strategy="a", replication_strategy="b"),
        RepeatedNameError,
        "the same option",
    ),
    ("an unknown type", one(columns={"a": "INT", "b": "VARCHAR"}), UnknownTypeError, "b is 'VARCHAR'"),
    ("a type that is a number", one(columns={"a": 1, "b": "INT"}), UnknownTypeError, "a is 'a number'"),
    ("a type and more", one(columns={"a": "INT NULL", "b": "INT"}), UnknownTypeError, "more than a type"),
    ("an encrypted column", one(columns={"a": "INT", "b": "TEXT ENCRYPTED"}), UnsupportedFeatureError, "ENCRYPTED"),
    ("decoupled metadata", one(transaction_metadata_decoupling=True), UnsupportedFeatureError, "decoupling"),
    ("a strange order", one(clustering_key=["b DOWN"]), ClusteringOrderError, "'b DOWN'"),
    ("an order too many", one(clustering_key=["b ASC DESC"]), ClusteringOrderError, "'b ASC DESC'"),
    ("an empty clustering column", one(clustering_key=[""]), ClusteringOrderError, "''"),
    ("a key column that is none", one(partition_key=["z"]), UnknownColumnError, "the primary key names 'z'"),
    ("a misspelt index", one(columns={"a": "INT", "b": "INT", "cost": "INT"}, secondary_index=["cots"]),
     UnknownColumnError, "did you mean cost?"),
    ("a column in both keys", one(clustering_key=["a"]), RepeatedColumnError, "names 'a' twice"),
    ("an index twice", one(secondary_index=["c", "c"]), RepeatedColumnError, "secondary-index names 'c' twice"),
    ("a key that is a fraction", one(columns={"a": "FLOAT", "b": "INT"}), InvalidTableError, "FLOAT cannot be a key"),
    ("an index on the key", one(secondary_index=["a"]), InvalidTableError, "no column outside the key"),
    ("a column that is no name", one(columns={"a": "INT", "b": "INT", "c-d": "INT"}), InvalidTableError, "'c-d'"),
    (
        "tables that differ by case",
        json.dumps({name: {"partition-key": ["a"], "columns": {"a": "INT"}} for name in ("ns.t", "ns.T")}),
        InvalidTableError,
        "ns.t and ns.T differ only by case",
    ),
    (
        "namespaces that differ by case",
        json.dumps({name: {"partition-key": ["a"], "columns": {"a": "INT"}} for name in ("ns.t", "NS.u")}),
        InvalidTableError,
        "namespaces ns and NS differ only by case",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("text", "error", "says"), [case[1:] for case in MISTAKES], ids=[case[0] for case in MISTAKES])
def test_each_mistake_has_a_name_and_says_where(text: str, error: type[SchemaFileError], says: str) -> None:
    with pytest.raises(SchemaFileError) as raised:
        parse(text)

    assert type(raised.value) is error
    assert says in str(raised.value)


def test_every_kind_of_mistake_is_among_those_that_are_tried() -> None:
    kinds = {
        kind
        for kind in vars(schema_file).values()
        if isinstance(kind, type) and issubclass(kind, SchemaFileError) and kind is not SchemaFileError
    }

    assert kinds == {case[2] for case in MISTAKES}


@pytest.mark.parametrize(
    ("attributes", "error", "says"),
    [
        ({"columns": {"a": "INT"}}, UnknownAttributeError, "no matter of an import"),
        ({"override-column-types": {}}, UnknownAttributeError, "did you mean override-columns-type?"),
        ({"override-columns-type": {"a": "NUMBER"}}, UnknownTypeError, "a is 'NUMBER'"),
        ({"override-columns-type": []}, WrongShapeError, "not a list"),
    ],
    ids=str,
)
def test_an_import_is_checked_as_closely(attributes: dict[str, Any], error: type[SchemaFileError], says: str) -> None:
    with pytest.raises(error, match=r"ns\.t: ") as raised:
        parse_imports(json.dumps({"ns.t": attributes}))

    assert says in str(raised.value)


@settings(max_examples=100, deadline=None)
@given(declared=declarations())
def test_what_is_rendered_is_parsed_as_it_was(declared: tuple[TableDeclaration, ...]) -> None:
    assert parse(render(declared)) == declared


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["ns.t", "partition-key", "clustering-key", "columns", "transaction", "ru", "a"]),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    ).map(lambda value: {"ns.t": value})
)
def test_whatever_json_is_given_it_is_a_table_or_a_named_mistake(content: Any) -> None:
    for read in (parse, parse_imports):
        try:
            assert len(read(json.dumps(content))) == 1
        except SchemaFileError:
            continue


def test_the_auditor_has_the_namespaces_and_tables_of_its_design() -> None:
    declared = parse(AUDITOR.read_text())

    tables: dict[str, set[str]] = {}
    for declaration in declared:
        tables.setdefault(declaration.table.namespace, set()).add(declaration.table.name)
    assert tables == {
        "audit": {"audit_set", "audit_group", "audit_set_collaborators", "audit_set_item"},
        "verification": {"item_status", "items_by_sha1"},
        "event": {"events", "item_events", "auditor_logs", "position_tracker"},
        "item": {"item"},
        "identity": {"user", "role_user", "user_token", "user_otp", "user_audit_group", "organization"},
    }
    assert all(declaration.transaction for declaration in declared)
