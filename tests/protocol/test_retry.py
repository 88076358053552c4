"""Retry settings: how long is waited between the tries of a transaction."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.consensus_commit.retry import RetryPolicy


def test_the_default_waits_double_from_100_ms_to_10_s_over_ten_tries() -> None:
    policy = RetryPolicy(jitter=0)

    waits = [policy.wait_ms(attempt, Random(1)) for attempt in range(1, policy.tries)]

    assert waits == [100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]


@settings(max_examples=100, deadline=None)
@given(attempt=st.integers(1, 10_000), jitter=st.floats(0, 1), seed=st.integers(0, 1000))
def test_a_wait_lies_between_its_unjittered_part_and_the_longest(attempt: int, jitter: float, seed: int) -> None:
    exact = RetryPolicy(jitter=0).wait_ms(attempt, Random(seed))

    wait = RetryPolicy(jitter=jitter).wait_ms(attempt, Random(seed))

    assert exact * (1 - jitter) <= wait <= exact <= 10_000


def test_the_same_randomness_gives_the_same_wait() -> None:
    assert RetryPolicy().wait_ms(3, Random(7)) == RetryPolicy().wait_ms(3, Random(7))
    assert RetryPolicy().wait_ms(3, Random(7)) != RetryPolicy().wait_ms(3, Random(8))


@pytest.mark.parametrize(
    "wrong",
    [{"tries": 0}, {"first_ms": -1}, {"first_ms": 20_000}, {"factor": 0.5}, {"jitter": 1.1}, {"jitter": -0.1}],
    ids=str,
)
def test_numbers_that_are_no_policy_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        RetryPolicy(**wrong)  # type: ignore[arg-type]
