"""Every single fault of a transaction over three records and two stores, and every pair with a crash."""

from __future__ import annotations

from collections import Counter

import pytest

from scripts.proof.simulation.exhaustive import RECOVERERS, SHAPES, cases
from scripts.proof.simulation.mutations import planted
from scripts.proof.simulation.running import quiet

CASES_AT_LEAST = 500
"""Of each shape and recoverer: fewer would mean that calls were no longer met by faults."""


@pytest.mark.parametrize("recoverer", RECOVERERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_all_or_nothing_after_every_fault_and_every_pair(shape: str, recoverer: str) -> None:
    answers: Counter[str] = Counter()
    with quiet():
        for case, outcome in cases(shape, recoverer):
            assert outcome.violations == (), case
            answers[outcome.answer] += 1

    print(f"{shape}, {recoverer}: {sum(answers.values())} cases, {dict(answers)}")
    assert sum(answers.values()) >= CASES_AT_LEAST
    assert set(answers) == {"", "committed", "aborted", "unknown"}


@pytest.mark.parametrize(
    "mutation",
    ["unanswered_commit_is_an_abort", "roll_back_by_deleting", "obey_ones_own_abort", "never_settle"],
)
def test_a_planted_bug_is_found_without_chance(mutation: str) -> None:
    with planted(mutation), quiet():
        assert any(
            outcome.violations for shape in SHAPES for recoverer in RECOVERERS for _, outcome in cases(shape, recoverer)
        )
