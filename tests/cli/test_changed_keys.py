"""A table whose key was another one in an earlier release ends the start, with the remedy."""

from __future__ import annotations

from dataclasses import replace

import pytest

from actors.inventory.tables import EXPIRIES, PRODUCTS
from infra.config import load_settings
from infra.consensus_commit.metadata import transactional
from infra.storage.errors import InvalidOperationError
from infra.storage.memory import MemoryStorage
from infra.storage.operations import DataType, TableSchema
from scripts.wiring import create_tables


def by_bucket_alone(schema: TableSchema) -> TableSchema:
    columns = {name: data_type for name, data_type in schema.columns.items() if name != "period"}
    return transactional(replace(schema, columns=columns, partition_key=("bucket",)))


async def test_timers_of_an_earlier_release_are_refused_with_what_to_do() -> None:
    storage = MemoryStorage()
    await storage.create_table(by_bucket_alone(EXPIRIES.declared))
    with pytest.raises(InvalidOperationError, match=r"partition key is .*bucket.* let reservations .* drop the table"):
        await create_tables(load_settings(environment={}), storage)


async def test_a_table_that_is_merely_another_one_is_refused_as_ever() -> None:
    storage = MemoryStorage()
    other = replace(PRODUCTS.declared, columns={**PRODUCTS.declared.columns, "name": DataType.INT})
    await storage.create_table(transactional(other))
    with pytest.raises(InvalidOperationError, match=r"before_name is INT, not TEXT$"):
        await create_tables(load_settings(environment={}), storage)


async def test_what_was_created_is_created_again() -> None:
    storage = MemoryStorage()
    for _ in range(2):
        await create_tables(load_settings(environment={}), storage)
    [expiries] = [table for table in await storage.tables() if table.full_name == EXPIRIES.full_name]
    assert expiries.partition_key == ("bucket", "period")
