"""How often the state table is looked for, whose columns a Java program may have chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest

from infra.clock import ManualClock
from infra.consensus_commit.coordinator import CoordinatorStates
from infra.storage.errors import InvalidOperationError
from infra.storage.forwarding import ForwardingStorage
from infra.storage.memory import MemoryStorage
from infra.storage.operations import DataType, TableSchema

BARE = CoordinatorStates(MemoryStorage(), ManualClock()).table
OF_A_GROUPING_PROGRAM = replace(BARE, columns={**BARE.columns, "tx_child_ids": DataType.TEXT})
OF_SOMEBODY_ELSE = replace(BARE, columns={**BARE.columns, "mood": DataType.TEXT})


class CountingStorage(ForwardingStorage):
    """Counts how often all tables are asked for."""

    def __init__(self) -> None:
        super().__init__(MemoryStorage())
        self.asked = 0

    async def tables(self) -> list[TableSchema]:
        self.asked += 1
        return await super().tables()


@pytest.mark.parametrize("made", [BARE, OF_A_GROUPING_PROGRAM], ids=["bare", "grouping"])
async def test_a_state_table_that_was_found_is_not_looked_for_again(made: TableSchema) -> None:
    storage = CountingStorage()
    await storage.create_table(made)
    states = CoordinatorStates(storage, ManualClock())

    for tx_id in ("a", "b", "c"):
        await states.get_state(tx_id)

    assert storage.asked == 1
    assert states.table == made


async def test_a_state_table_with_unknown_columns_is_refused_and_not_looked_for_again() -> None:
    storage = CountingStorage()
    await storage.create_table(OF_SOMEBODY_ELSE)
    states = CoordinatorStates(storage, ManualClock())

    for _ in range(3):
        with pytest.raises(InvalidOperationError, match="mood"):
            await states.get_state("a")

    assert storage.asked == 1


async def test_a_state_table_that_was_created_is_not_looked_for_again() -> None:
    storage = CountingStorage()
    states = CoordinatorStates(storage, ManualClock())

    await states.create_tables()
    await states.commit_state("a", 1)
    await states.get_state("b")

    assert storage.asked == 1


async def test_a_state_table_that_another_program_made_meanwhile_is_found() -> None:
    storage = CountingStorage()
    states = CoordinatorStates(storage, ManualClock())
    with pytest.raises(InvalidOperationError):
        await states.get_state("a")

    await storage.create_table(OF_A_GROUPING_PROGRAM)

    assert await states.get_state("a") is None
    assert states.table == OF_A_GROUPING_PROGRAM


async def test_creating_the_state_table_refuses_one_with_unknown_columns_each_time() -> None:
    storage = CountingStorage()
    await storage.create_table(OF_SOMEBODY_ELSE)
    states = CoordinatorStates(storage, ManualClock())

    for _ in range(2):
        with pytest.raises(InvalidOperationError, match="mood"):
            await states.create_tables()
