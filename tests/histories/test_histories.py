"""Random transactions on hot records, under faults: what an isolation level forbids is not in their history.

Goal: no run of the real engine on a real storage shows a forbidden anomaly, loses or doubles a transfer, or leaves a
record in doubt; and runs of a broken engine do. Method: `scripts/proof/histories`; every run checks itself for being
vacuous. Longer runs: `python -m scripts.proof histories`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infra.consensus_commit import compose
from infra.consensus_commit import participant as participant_module
from infra.consensus_commit.coordinator import CoordinatorStates, StateRow
from infra.consensus_commit.errors import TransactionConflictError, UnknownTransactionStatusError
from infra.consensus_commit.recovery import RecoveryHandler
from infra.consensus_commit.states import Isolation, TransactionState
from infra.storage.errors import InvalidOperationError
from infra.storage.memory import MemoryStorage
from infra.storage.port import Storage
from scripts.proof.histories.command import plans, prove_histories
from scripts.proof.histories.running import Plan, Report, create_tables, run, vacuous
from scripts.proof.histories.workloads import Workload
from tests.storages import LOCAL, SERVERS

SERIALIZABLE, SNAPSHOT, READ_COMMITTED = Isolation.SERIALIZABLE, Isolation.SNAPSHOT, Isolation.READ_COMMITTED


def assert_good(*reports: Report) -> None:
    for report in reports:
        assert report.wrong == [], report.plan
    assert vacuous(reports) == []


@pytest.mark.parametrize("opening", LOCAL, indirect=True)
@pytest.mark.parametrize("isolation", list(Isolation))
async def test_a_history_shows_nothing_that_its_level_forbids(storage: Storage, isolation: Isolation) -> None:
    reports = [
        await run(storage, Plan(workload, isolation, transactions=450, seed=1, lifetime_ms=12)) for workload in Workload
    ]

    assert_good(*reports)
    if isolation is not READ_COMMITTED:  # which reads around a record in doubt
        assert sum(report.counts["overruled while it was at work"] for report in reports) > 0


@pytest.mark.parametrize("opening", SERVERS, indirect=True)
async def test_a_history_on_a_real_server_is_strictly_serializable(storage: Storage) -> None:
    reports = [await run(storage, Plan(workload, SERIALIZABLE, transactions=120, seed=2)) for workload in Workload]

    assert_good(*reports)


@pytest.mark.parametrize("opening", SERVERS, indirect=True)
@pytest.mark.parametrize("isolation", [SNAPSHOT, READ_COMMITTED])
async def test_a_weaker_history_on_a_real_server_shows_nothing_forbidden(
    storage: Storage, isolation: Isolation
) -> None:
    report = await run(storage, Plan(Workload.LISTS, isolation, transactions=60, seed=3))

    assert report.wrong == []
    assert report.counts["conflict"] > 0


@pytest.mark.parametrize("isolation", [SNAPSHOT, READ_COMMITTED])
async def test_what_a_weaker_level_allows_is_seen_in_its_histories(isolation: Isolation) -> None:
    """So the checker is not blind on the histories of this engine."""
    storage = MemoryStorage()
    await create_tables(storage)

    report = await run(storage, Plan(Workload.LISTS, isolation, transactions=700, seed=4))

    assert report.wrong == []
    assert report.allowed["G2"] > 0


# -- the command


def test_the_command_runs_every_workload_at_every_level(tmp_path: Path) -> None:
    report = prove_histories("memory", tmp_path, transactions=900, seed=3)

    assert report["holds"], report
    assert {(run["workload"], run["isolation"]) for run in report["runs"]} == {
        (workload.value, isolation.value) for workload in Workload for isolation in Isolation
    }


def test_a_long_proof_is_several_runs_with_seeds_of_their_own() -> None:
    chosen = plans(100_000, seed=3, isolations=(SERIALIZABLE,))

    assert sum(plan.transactions for plan in chosen) == pytest.approx(100_000, rel=0.01)
    assert max(plan.transactions for plan in chosen) <= 2_500
    assert len({(plan.workload, plan.seed) for plan in chosen}) == len(chosen)


def test_the_command_refuses_a_storage_that_there_is_not(tmp_path: Path) -> None:
    with pytest.raises(InvalidOperationError, match="there is no storage"):
        prove_histories("punch-cards", tmp_path, transactions=900, seed=1)


def test_a_run_that_could_prove_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="proves nothing"):
        Plan(Workload.LISTS, SERIALIZABLE, transactions=10, seed=1)


def test_runs_without_commits_conflicts_or_faults_prove_nothing() -> None:
    report = Report(Plan(Workload.LISTS, SERIALIZABLE, transactions=100, seed=1), history=[])

    missing = vacuous([report])
    assert any("under a quarter" in line for line in missing)
    assert any("conflicts" in line for line in missing)
    assert any("no call met 'crash late'" in line for line in missing)
    assert any("no record was rolled_forward" in line for line in missing)


# -- a broken engine is found out


Break = Callable[[pytest.MonkeyPatch], None]


def skip_validation(patch: pytest.MonkeyPatch) -> None:
    async def validate(*arguments: Any) -> None:
        return None

    patch.setattr(participant_module, "validate", validate)


def take_an_unanswered_commit_for_an_abort(patch: pytest.MonkeyPatch) -> None:
    commit_state = CoordinatorStates.commit_state

    async def impatient(self: CoordinatorStates, tx_id: str, committed_at_ms: int) -> None:
        try:
            await commit_state(self, tx_id, committed_at_ms)
        except UnknownTransactionStatusError as error:
            raise TransactionConflictError("it was probably aborted") from error

    patch.setattr(CoordinatorStates, "commit_state", impatient)
    patch.setattr(CoordinatorStates.__init__, "__kwdefaults__", {**KEYWORDS, "tries": 1})


def roll_back_without_asking(patch: pytest.MonkeyPatch) -> None:
    async def nobody_knows(self: RecoveryHandler, layout: object, key: object, tx_id: str) -> StateRow:
        return StateRow(tx_id, TransactionState.ABORTED, 0)

    patch.setattr(RecoveryHandler, "_abort", nobody_knows)


def prepare_without_a_condition(patch: pytest.MonkeyPatch) -> None:
    prepare = compose.prepare

    def blind(*arguments: Any, **named: Any) -> Any:
        return replace(prepare(*arguments, **named), condition=None)

    patch.setattr(compose, "prepare", blind)


KEYWORDS = dict(CoordinatorStates.__init__.__kwdefaults__ or {})

BREAKS: dict[str, Break] = {
    "validation is skipped": skip_validation,
    "an unanswered commit is taken for an abort": take_an_unanswered_commit_for_an_abort,
    "records are rolled back without asking": roll_back_without_asking,
    "records are prepared without a condition": prepare_without_a_condition,
}


@pytest.mark.parametrize("sabotage", BREAKS.values(), ids=BREAKS.keys())
async def test_a_broken_engine_is_found_out(sabotage: Break, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = MemoryStorage()
    await create_tables(storage)
    sabotage(monkeypatch)

    for seed, workload in itertools.product(range(6), Workload):
        if (await run(storage, Plan(workload, SERIALIZABLE, transactions=400, seed=seed, lifetime_ms=12))).wrong:
            return
    pytest.fail("nothing was found in eighteen runs")
