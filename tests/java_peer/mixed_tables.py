"""Tables that both programs use, and what they hold at first."""

from __future__ import annotations

from infra.storage.operations import DataType, TableSchema

OPENING_BALANCE = 1000


def account_table(namespace: str) -> TableSchema:
    """Accounts. `token` names the transaction's write that was the last: it is written once only."""
    columns = {"id": DataType.INT, "balance": DataType.BIGINT, "token": DataType.INT}
    return TableSchema(namespace, "account", columns, partition_key=("id",))


def list_table(namespace: str) -> TableSchema:
    """Lists of tokens, with commas between."""
    return TableSchema(namespace, "list", {"id": DataType.INT, "items": DataType.TEXT}, partition_key=("id",))


def every_type_table(namespace: str, name: str) -> TableSchema:
    """Every type that Cassandra holds for ScalarDB, in the key as well as beside it, with an index."""
    columns = {
        "pk_text": DataType.TEXT,
        "pk_date": DataType.DATE,
        "ck_int": DataType.INT,
        "ck_time": DataType.TIME,
        "a_boolean": DataType.BOOLEAN,
        "an_int": DataType.INT,
        "a_bigint": DataType.BIGINT,
        "a_float": DataType.FLOAT,
        "a_double": DataType.DOUBLE,
        "a_text": DataType.TEXT,
        "a_blob": DataType.BLOB,
        "a_date": DataType.DATE,
        "a_time": DataType.TIME,
        "a_timestamptz": DataType.TIMESTAMPTZ,
    }
    return TableSchema(
        namespace,
        name,
        columns,
        partition_key=("pk_text", "pk_date"),
        clustering_key=("ck_int", "ck_time"),
        descending=frozenset({"ck_int"}),
        indexes=frozenset({"an_int"}),
    )
