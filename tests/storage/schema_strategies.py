"""Tables as a schema file can declare them, for property tests."""

from __future__ import annotations

from hypothesis import strategies as st

from infra.storage.operations import DataType, TableSchema
from infra.storage.schema_file import TableDeclaration

NAMES = ("a", "b", "c", "d_1", "E", "user", "order", "select", "before", "tx", "state", "_x")
KEY_TYPES = sorted(set(DataType) - {DataType.FLOAT, DataType.DOUBLE})
OPTIONS = st.fixed_dictionaries({}, optional={"compaction-strategy": st.just("LCS"), "ru": st.just("10")})


@st.composite
def tables(draw: st.DrawFn, namespace: str = "ns", name: str = "t") -> TableSchema:
    """A table with names that are words of SQL and CQL, keys of either direction, and indexes."""
    names = draw(st.permutations(NAMES))[: draw(st.integers(1, 8))]
    key_length = draw(st.integers(1, min(4, len(names))))
    partition_length = draw(st.integers(1, key_length))
    clustering = tuple(names[partition_length:key_length])
    columns = {
        column: draw(st.sampled_from(KEY_TYPES if position < key_length else list(DataType)))
        for position, column in enumerate(names)
    }
    return TableSchema(
        namespace,
        name,
        {column: columns[column] for column in draw(st.permutations(names))},
        tuple(names[:partition_length]),
        clustering,
        frozenset(draw(st.sets(st.sampled_from(clustering)))) if clustering else frozenset(),
        frozenset(draw(st.sets(st.sampled_from(names[key_length:]), max_size=2)))
        if names[key_length:]
        else frozenset(),
    )


@st.composite
def declarations(draw: st.DrawFn) -> tuple[TableDeclaration, ...]:
    """The tables of a file: up to three, in two namespaces."""
    places = draw(
        st.lists(
            st.tuples(st.sampled_from(["ns", "other"]), st.sampled_from(["t", "u", "table"])),
            min_size=1,
            max_size=3,
            unique=True,
        )
    )
    return tuple(
        TableDeclaration(draw(tables(namespace, name)), draw(st.booleans()), draw(OPTIONS))
        for namespace, name in places
    )
