"""What is remembered for a while does not grow with the time that a process lives."""

from __future__ import annotations

from infra.clock import ManualClock
from infra.recent import Recent


def test_what_was_put_a_while_ago_goes_when_something_else_is_put() -> None:
    clock = ManualClock()
    recent: Recent[str, int] = Recent(clock, for_s=60, most=10)
    recent.put("old", 1)
    clock.advance(30_000)
    recent.put("young", 2)
    clock.advance(30_000)
    assert (recent.get("old"), "old" in recent) == (1, True)

    recent.put("new", 3)

    assert (recent.get("old"), "old" in recent) == (None, False)
    assert (recent.get("young"), recent.get("new"), len(recent)) == (2, 3, 2)


def test_what_is_put_again_lives_from_then_on() -> None:
    clock = ManualClock()
    recent: Recent[str, int] = Recent(clock, for_s=60, most=10)
    recent.put("a", 1)
    clock.advance(59_000)
    recent.put("a", 2)
    clock.advance(59_000)
    recent.put("b", 3)
    assert (recent.get("a"), recent.get("b")) == (2, 3)


def test_beyond_the_most_the_oldest_goes_before_its_time() -> None:
    recent: Recent[int, None] = Recent(ManualClock(), for_s=60, most=3)
    for number in range(5):
        recent.put(number, None)
    assert [number in recent for number in range(5)] == [False, False, True, True, True]


def test_what_is_dropped_is_forgotten_at_once() -> None:
    recent: Recent[str, int] = Recent(ManualClock(), for_s=60, most=3)
    recent.put("a", 1)
    recent.drop("a")
    recent.drop("never there")
    assert (len(recent), recent.get("a")) == (0, None)
