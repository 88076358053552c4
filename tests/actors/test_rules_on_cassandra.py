"""Rules whose proof depends on what the storage can do, with the actors on a real Cassandra.

The tests are those of `test_rules.py`, which say what they show; only their storage is another one. Chosen are those
that need conditional deletes (pruning), reads across partitions (sweeping, refusals that rest on scans), writes that
come late, and intents. `EVERY_STORAGE=1` in the environment plays all that ask for a storage there.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
import test_rules
from test_rules import (
    test_rule_01_a_redelivered_command_gets_the_same_answer_and_the_same_event_ids,
    test_rule_01_pruning_takes_old_outcomes_and_no_younger_ones,
    test_rule_03_a_refusal_rests_on_scans_too,
    test_rule_06_a_coordinator_that_dies_after_its_decision_has_committed,
    test_rule_06_a_participant_of_a_silent_coordinator_aborts_through_the_state_table_alone,
    test_rule_07_a_restarted_coordinator_settles_what_its_predecessor_left_though_nobody_reads_it,
    test_rule_08_a_prepare_that_comes_late_is_undone_though_nobody_reads_and_its_row_waits_for_it,
    test_rule_11_commands_of_one_key_take_effect_in_the_order_of_the_log,
)

from infra.storage.port import Storage
from tests.storages import opened

pytestmark = pytest.mark.system

__all__ = [
    "test_rule_01_a_redelivered_command_gets_the_same_answer_and_the_same_event_ids",
    "test_rule_01_pruning_takes_old_outcomes_and_no_younger_ones",
    "test_rule_03_a_refusal_rests_on_scans_too",
    "test_rule_06_a_coordinator_that_dies_after_its_decision_has_committed",
    "test_rule_06_a_participant_of_a_silent_coordinator_aborts_through_the_state_table_alone",
    "test_rule_07_a_restarted_coordinator_settles_what_its_predecessor_left_though_nobody_reads_it",
    "test_rule_08_a_prepare_that_comes_late_is_undone_though_nobody_reads_and_its_row_waits_for_it",
    "test_rule_11_commands_of_one_key_take_effect_in_the_order_of_the_log",
]

if os.environ.get("EVERY_STORAGE"):
    globals().update(
        (name, test)
        for name, test in vars(test_rules).items()
        if name.startswith("test_rule_") and "storage" in inspect.signature(test).parameters
    )


@pytest.fixture
def opening(request: pytest.FixtureRequest, tmp_path: Path) -> AbstractAsyncContextManager[Storage]:
    return opened("cassandra", request, tmp_path)


@pytest.fixture
async def storage(opening: AbstractAsyncContextManager[Storage]) -> AsyncIterator[Storage]:
    async with opening as storage:
        yield storage
