"""The checker finds every planted anomaly, and finds nothing where nothing is.

Three kinds of proof: one history by hand for each class; valid executions of random transactions, interleaved at
random, in which it must find nothing; and small executions without any isolation, where all orders are tried and the
checker must agree with the answer.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.consensus_commit.states import Isolation
from scripts.proof.histories.checker import FORBIDDEN, find_anomalies, lost_appends, violations
from scripts.proof.histories.dependencies import Class, took_effect
from scripts.proof.histories.history import Append, Operation, Outcome, Read, Transaction, Write

COMMITTED, ABORTED, UNKNOWN = Outcome.COMMITTED, Outcome.ABORTED, Outcome.UNKNOWN


def tx(
    number: int,
    *operations: Operation,
    outcome: Outcome = COMMITTED,
    at: tuple[int, int | None] = (0, 1000),
) -> Transaction:
    """A transaction; unless told otherwise, all of a history run at the same time."""
    return Transaction(f"T{number}", f"p{number}", operations, outcome, *at)


def kinds(history: Sequence[Transaction]) -> set[Class]:
    return {anomaly.kind for anomaly in find_anomalies(history)}


PLANTED: dict[str, tuple[list[Transaction], Class]] = {
    "list: aborted read": (
        [tx(1, Append("x", 1), outcome=ABORTED), tx(2, Read("x", (1,)))],
        Class.ABORTED_READ,
    ),
    "register: aborted read": (
        [tx(1, Write("x", 1), outcome=ABORTED), tx(2, Read("x", 1))],
        Class.ABORTED_READ,
    ),
    "list: aborted read that only a longer list shows": (
        [tx(1, Append("x", 1), outcome=ABORTED), tx(2, Append("x", 2)), tx(3, Read("x", (1, 2)))],
        Class.ABORTED_READ,
    ),
    "list: intermediate read": (
        [tx(1, Append("x", 1), Append("x", 2)), tx(2, Read("x", (1,)))],
        Class.INTERMEDIATE_READ,
    ),
    "list: intermediate read behind an append of one's own": (
        [tx(1, Append("x", 1), Append("x", 2)), tx(2, Read("x", (1,)), Append("x", 3)), tx(3, Read("x", (1, 3)))],
        Class.INTERMEDIATE_READ,
    ),
    "register: intermediate read": (
        [tx(1, Write("x", 1), Write("x", 2)), tx(2, Read("x", 1))],
        Class.INTERMEDIATE_READ,
    ),
    "list: write cycle": (
        [
            tx(1, Append("x", 1), Append("y", 1)),
            tx(2, Append("x", 2), Append("y", 2)),
            tx(3, Read("x", (1, 2)), Read("y", (2, 1))),
        ],
        Class.WRITE_CYCLE,
    ),
    "register: write cycle": (
        [tx(1, Write("x", 1, 1), Write("y", 1, 2)), tx(2, Write("x", 2, 2), Write("y", 2, 1))],
        Class.WRITE_CYCLE,
    ),
    "list: circular flow": (
        [tx(1, Append("x", 1), Read("y", (2,))), tx(2, Append("y", 2), Read("x", (1,)))],
        Class.CIRCULAR_FLOW,
    ),
    "register: circular flow": (
        [tx(1, Write("x", 1), Read("y", 2)), tx(2, Write("y", 2), Read("x", 1))],
        Class.CIRCULAR_FLOW,
    ),
    "list: read skew": (
        [tx(1, Append("x", 1), Append("y", 1)), tx(2, Read("x", ()), Read("y", (1,))), tx(3, Read("x", (1,)))],
        Class.READ_SKEW,
    ),
    "register: read skew": (
        [tx(1, Write("x", 1, 1), Write("y", 1, 1)), tx(2, Read("x", None), Read("y", 1))],
        Class.READ_SKEW,
    ),
    "register: read skew without versions": (
        [
            tx(1, Write("x", 1), Write("y", 1)),
            tx(2, Read("x", 1), Write("x", 2), Read("y", 1), Write("y", 2)),
            tx(3, Read("x", 1), Read("y", 2)),
        ],
        Class.READ_SKEW,
    ),
    "list: a read that cannot be repeated": (
        [tx(1, Append("x", 1)), tx(2, Read("x", ()), Read("x", (1,)))],
        Class.READ_SKEW,
    ),
    "list: lost update": (
        [
            tx(1, Read("x", ()), Append("x", 1)),
            tx(2, Read("x", ()), Append("x", 2)),
            tx(3, Read("x", (1, 2))),
        ],
        Class.LOST_UPDATE,
    ),
    "list: lost update, and one of the two is gone": (
        [tx(1, Read("x", ()), Append("x", 1)), tx(2, Read("x", ()), Append("x", 2)), tx(3, Read("x", (2,)))],
        Class.LOST_UPDATE,
    ),
    "list: lost update that nobody has looked at": (
        [tx(1, Read("x", ()), Append("x", 1)), tx(2, Read("x", ()), Append("x", 2))],
        Class.LOST_UPDATE,
    ),
    "register: lost update": (
        [tx(1, Read("x", None), Write("x", 1, 1)), tx(2, Read("x", None), Write("x", 2, 2))],
        Class.LOST_UPDATE,
    ),
    "register: lost update without versions": (
        [tx(1, Read("x", None), Write("x", 1)), tx(2, Read("x", None), Write("x", 2))],
        Class.LOST_UPDATE,
    ),
    "register: one version, two writers": (
        [tx(1, Write("x", 1, 1)), tx(2, Write("x", 2, 1))],
        Class.LOST_UPDATE,
    ),
    "list: write skew": (
        [
            tx(1, Read("x", ()), Append("y", 1)),
            tx(2, Read("y", ()), Append("x", 2)),
            tx(3, Read("x", (2,)), Read("y", (1,))),
        ],
        Class.ANTI_DEPENDENCY_CYCLE,
    ),
    "register: write skew": (
        [tx(1, Read("x", None), Write("y", 1, 1)), tx(2, Read("y", None), Write("x", 2, 1))],
        Class.ANTI_DEPENDENCY_CYCLE,
    ),
    "list: the read-only anomaly of three": (
        [
            tx(1, Read("x", ()), Read("y", ()), Append("x", 1)),
            tx(2, Read("y", ()), Append("y", 2)),
            tx(3, Read("x", ()), Read("y", (2,))),
            tx(4, Read("x", (1,)), Read("y", (2,))),
        ],
        Class.ANTI_DEPENDENCY_CYCLE,
    ),
    "list: two long forks": (
        [
            tx(1, Append("x", 1)),
            tx(2, Append("y", 2)),
            tx(3, Read("x", (1,)), Read("y", ())),
            tx(4, Read("x", ()), Read("y", (2,))),
        ],
        Class.ANTI_DEPENDENCY_CYCLE,
    ),
    "list: writes against time": (
        [tx(1, Append("x", 1), at=(0, 1)), tx(2, Append("x", 2), at=(2, 3)), tx(3, Read("x", (2, 1)), at=(4, 5))],
        Class.WRITE_CYCLE_IN_TIME,
    ),
    "list: a read of what came later": (
        [tx(1, Read("x", (2,)), at=(0, 1)), tx(2, Append("x", 2), at=(2, 3))],
        Class.CIRCULAR_FLOW_IN_TIME,
    ),
    "list: a stale read": (
        [tx(1, Append("x", 1), at=(0, 1)), tx(2, Read("x", ()), at=(2, 3)), tx(3, Read("x", (1,)), at=(4, 5))],
        Class.READ_SKEW_IN_TIME,
    ),
    "list: a stale read, and nobody reads better": (
        [tx(1, Append("x", 1), at=(0, 1)), tx(2, Read("x", ()), at=(2, 3))],
        Class.READ_SKEW_IN_TIME,
    ),
    "register: a stale read": (
        [tx(1, Write("x", 1, 1), at=(0, 1)), tx(2, Read("x", None), at=(2, 3))],
        Class.READ_SKEW_IN_TIME,
    ),
    "list: two anti-dependencies that only time closes": (
        [
            tx(1, Append("x", 1), at=(0, 9)),
            tx(2, Append("y", 2), at=(0, 9)),
            tx(3, Read("x", (1,)), at=(0, 1)),
            tx(4, Read("y", ()), at=(2, 3)),
            tx(5, Read("x", ()), Read("y", (2,)), at=(0, 9)),
        ],
        Class.ANTI_DEPENDENCY_CYCLE_IN_TIME,
    ),
    "list: a value from nowhere": ([tx(1, Read("x", (7,)))], Class.GARBAGE_READ),
    "register: a value from nowhere": ([tx(1, Read("x", 7))], Class.GARBAGE_READ),
    "list: an element twice": ([tx(1, Append("x", 1)), tx(2, Read("x", (1, 1)))], Class.DUPLICATE),
    "list: no prefix of the other": (
        [tx(1, Append("x", 1)), tx(2, Append("x", 2)), tx(3, Read("x", (1,))), tx(4, Read("x", (2, 1)))],
        Class.INCOMPATIBLE_ORDER,
    ),
    "list: one's own appends are turned round": (
        [tx(1, Append("x", 1), Append("x", 2)), tx(2, Read("x", (2, 1)))],
        Class.INCOMPATIBLE_ORDER,
    ),
    "list: one's own append is not seen": ([tx(1, Append("x", 1), Read("x", ()))], Class.INTERNAL),
    "register: one's own write is not seen": ([tx(1, Write("x", 1), Read("x", None))], Class.INTERNAL),
}


@pytest.mark.parametrize(("history", "kind"), PLANTED.values(), ids=PLANTED.keys())
def test_a_planted_anomaly_is_found(history: list[Transaction], kind: Class) -> None:
    found = find_anomalies(history)

    assert kind in {anomaly.kind for anomaly in found}
    assert violations(history, Isolation.SERIALIZABLE)
    for anomaly in found:
        assert set(anomaly.transactions) <= {transaction.id for transaction in history}
        assert anomaly.transactions[0] in anomaly.explanation


def test_every_class_is_planted() -> None:
    assert {kind for _, kind in PLANTED.values()} == set(Class) - {Class.LOST_WRITE}


@pytest.mark.parametrize(("history", "kind"), PLANTED.values(), ids=PLANTED.keys())
def test_a_planted_anomaly_hides_in_no_crowd(history: list[Transaction], kind: Class) -> None:
    """Among a thousand innocent transactions on other records, before, during and after."""
    crowd = valid_history(random.Random(1), transactions=1000, keys=8, prefix="crowd")

    assert kind in kinds([*crowd[:500], *history, *crowd[500:]])
    assert not kinds(crowd)


@pytest.mark.parametrize("isolation", [Isolation.SNAPSHOT, Isolation.READ_COMMITTED])
def test_weaker_levels_forbid_all_but_skews(isolation: Isolation) -> None:
    allowed = {
        Class.READ_SKEW,
        Class.ANTI_DEPENDENCY_CYCLE,
        Class.READ_SKEW_IN_TIME,
        Class.ANTI_DEPENDENCY_CYCLE_IN_TIME,
    }

    assert set(Class) - FORBIDDEN[isolation] == allowed
    for history, kind in PLANTED.values():
        assert (kind in {found.kind for found in violations(history, isolation)}) == (kind not in allowed)


def test_a_cycle_is_explained_step_by_step() -> None:
    history, _ = PLANTED["list: read skew"]

    (anomaly,) = (found for found in find_anomalies(history) if found.kind is Class.READ_SKEW)

    assert str(anomaly).splitlines() == [
        "G-single: T2 → T1 → T2",
        "    rw  T2 read x without any value, and T1 wrote 1 after that",
        "    wr  T1 wrote 1 to y, and T2 read it",
    ]


def test_real_time_is_named_in_the_explanation() -> None:
    history, _ = PLANTED["list: a stale read"]

    (anomaly,) = find_anomalies(history)

    assert "rt  T1 had ended before T2 began" in anomaly.explanation


def test_a_value_written_twice_cannot_be_judged() -> None:
    with pytest.raises(ValueError, match="must be unique"):
        find_anomalies([tx(1, Append("x", 1)), tx(2, Append("x", 1))])


def test_a_record_of_two_kinds_cannot_be_judged() -> None:
    with pytest.raises(ValueError, match="as a list and as a register"):
        find_anomalies([tx(1, Append("x", 1), Write("x", 2))])


# -- outcomes that nobody told


def test_an_unknown_transaction_whose_write_was_seen_has_committed() -> None:
    history = [tx(1, Append("x", 1), Append("y", 1), outcome=UNKNOWN), tx(2, Read("x", (1,)), Read("y", ()))]

    assert took_effect(history) == [0, 1]
    assert kinds(history) == {Class.READ_SKEW}


def test_an_unknown_transaction_that_only_an_unknown_one_saw_is_left_out() -> None:
    history = [tx(1, Append("x", 1), outcome=UNKNOWN), tx(2, Read("x", (1,)), Append("y", 2), outcome=UNKNOWN)]

    assert took_effect(history) == []
    assert took_effect([*history, tx(3, Read("y", (2,)))]) == [0, 1, 2]


def test_an_unknown_transaction_that_nobody_saw_proves_nothing() -> None:
    history = [
        tx(1, Append("x", 1), outcome=UNKNOWN, at=(0, None)),
        tx(2, Read("x", ()), at=(5, 6)),
        tx(3, Append("x", 3), at=(7, 8)),
        tx(4, Read("x", (3,)), at=(9, 10)),
    ]

    assert not kinds(history)


def test_an_unknown_transaction_may_take_effect_late() -> None:
    history = [
        tx(1, Append("x", 1), outcome=UNKNOWN, at=(0, None)),
        tx(2, Read("x", ()), at=(5, 6)),
        tx(3, Read("x", (1,)), at=(7, 8)),
    ]

    assert not kinds(history)


def test_what_an_aborted_transaction_read_does_not_matter() -> None:
    history = [
        tx(1, Append("x", 1), Append("y", 1)),
        tx(2, Read("x", ()), Read("y", (1,)), Append("z", 1), outcome=ABORTED),
    ]

    assert not kinds(history)


def test_a_committed_append_that_is_gone_in_the_end_is_found() -> None:
    history = [tx(1, Append("x", 1)), tx(2, Append("x", 2)), tx(3, Append("x", 3), outcome=ABORTED)]

    assert not lost_appends(history, {"x": (2, 1)})
    (lost,) = lost_appends(history, {"x": (2,)})
    assert lost.kind is Class.LOST_WRITE
    assert lost.transactions == ("T1",)


# -- no false alarm


def valid_history(
    draw: random.Random, *, transactions: int, keys: int, prefix: str = "", width: int = 12
) -> list[Transaction]:
    """Transactions of which each takes effect in one instant between its beginning and its end, or not at all."""
    lists: dict[str, list[int]] = {f"{prefix}l{number}": [] for number in range(keys)}
    registers: dict[str, tuple[int | None, int]] = {f"{prefix}r{number}": (None, 0) for number in range(keys)}
    versioned = draw.random() < 0.5
    history: list[Transaction] = []
    for number in range(transactions):
        instant = number * 10
        applied = draw.random() < 0.8
        told = draw.random() < 0.8
        outcome = (COMMITTED if applied else ABORTED) if told else UNKNOWN
        operations: list[Operation] = []
        shown_lists: dict[str, list[int]] = {}
        shown_registers: dict[str, tuple[int | None, int]] = {}
        for step in range(draw.randint(1, 4)):
            value = number * 10 + step
            if draw.random() < 0.6:
                name = draw.choice(list(lists))
                elements = shown_lists.setdefault(name, list(lists[name]))
                if draw.random() < 0.5:
                    operations.append(Read(name, tuple(elements)))
                else:
                    operations.append(Append(name, value))
                    elements.append(value)
            else:
                name = draw.choice(list(registers))
                current, _ = shown_registers.get(name, registers[name])
                if draw.random() < 0.5:
                    operations.append(Read(name, current))
                else:
                    next_version = registers[name][1] + 1
                    operations.append(Write(name, value, next_version if versioned else None))
                    shown_registers[name] = (value, next_version)
        if applied:
            lists.update(shown_lists)
            registers.update(shown_registers)
        began = instant - draw.randrange(10 * width)
        ended = None if outcome is UNKNOWN else instant + draw.randrange(10 * width)
        history.append(Transaction(f"{prefix}{number}", "p", tuple(operations), outcome, began, ended))
    draw.shuffle(history)
    return history


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), keys=st.integers(1, 4), width=st.integers(1, 12))
def test_a_valid_history_of_whatever_overlaps_raises_no_alarm(seed: int, keys: int, width: int) -> None:
    history = valid_history(random.Random(seed), transactions=40, keys=keys, width=width)

    assert find_anomalies(history) == []


def test_five_thousand_transactions_on_hot_keys_raise_no_alarm() -> None:
    history: list[Transaction] = []
    for part in range(100):  # Lists are retired as the workloads do it, or each would hold thousands of elements.
        history += [
            Transaction(
                told.id, told.process, told.operations, told.outcome, told.began_at + part * 10_000,
                None if told.ended_at is None else told.ended_at + part * 10_000,
            )
            for told in valid_history(random.Random(part), transactions=50, keys=3, prefix=f"{part}-")
        ]  # fmt: skip

    assert len(history) == 5000
    assert find_anomalies(history) == []


def test_five_thousand_transactions_without_isolation_are_seen_through() -> None:
    history = unisolated_history(random.Random(5), transactions=5000, keys=100, width=40, slips=0.0)

    assert kinds(history) >= {Class.READ_SKEW, Class.ANTI_DEPENDENCY_CYCLE, Class.LOST_UPDATE}


# -- agreement with brute force


def unisolated_history(
    draw: random.Random, *, transactions: int, keys: int, width: int = 4, slips: float = 0.2
) -> list[Transaction]:
    """Transactions whose operations interleave as they come; that share of the appends slips in before others."""
    steps: list[tuple[int, int, int, Any]] = []
    spans: dict[int, tuple[int, int]] = {}
    for number in range(transactions):
        began = number * 10 + draw.randrange(10)
        times = sorted(began + 1 + draw.randrange(10 * width) for _ in range(draw.randint(1, 3)))
        spans[number] = (began, times[-1] + 1 + draw.randrange(10))
        steps += [(time, number, step, None) for step, time in enumerate(times)]
    lists: dict[str, list[int]] = {f"k{number}": [] for number in range(keys)}
    operations: dict[int, list[Operation]] = {number: [] for number in range(transactions)}
    for _, number, step, _ in sorted(steps):
        name = draw.choice(list(lists))
        if draw.random() < 0.5:
            operations[number].append(Read(name, tuple(lists[name])))
        else:
            element = number * 10 + step
            operations[number].append(Append(name, element))
            position = len(lists[name]) if draw.random() >= slips else draw.randint(0, len(lists[name]))
            lists[name].insert(position, element)
    history = [Transaction(f"T{n}", "p", tuple(operations[n]), COMMITTED, *spans[n]) for n in range(transactions)]
    end = max(ended for _, ended in spans.values()) + 1
    whole = tuple(Read(name, tuple(elements)) for name, elements in lists.items())
    return [*history, Transaction("final", "p", whole, COMMITTED, end, end + 1)]


def is_strictly_serializable(history: Sequence[Transaction]) -> bool:
    """By trying every order that keeps real time."""
    return any(_replays(order) for order in itertools.permutations(history) if _keeps_time(order))


def _keeps_time(order: Sequence[Transaction]) -> bool:
    latest_beginning = -1
    for transaction in order:
        if transaction.ended_at is not None and transaction.ended_at < latest_beginning:
            return False
        latest_beginning = max(latest_beginning, transaction.began_at)
    return True


def _replays(order: Sequence[Transaction]) -> bool:
    lists: dict[object, list[int]] = {}
    for transaction in order:
        for operation in transaction.operations:
            elements = lists.setdefault(operation.key, [])
            match operation:
                case Append(element=element):
                    elements.append(element)
                case Read(value=value):
                    if value != tuple(elements):
                        return False
    return True


def test_the_checker_agrees_with_trying_every_order() -> None:
    """Small histories without isolation: about half are serializable all the same."""
    answers: dict[bool, int] = {True: 0, False: 0}
    for seed in range(600):
        draw = random.Random(seed)
        history = unisolated_history(draw, transactions=draw.randint(2, 4), keys=2, width=draw.randint(1, 4))
        expected = is_strictly_serializable(history)
        answers[expected] += 1

        found = violations(history, Isolation.SERIALIZABLE)
        assert (not found) == expected, (seed, history, [str(anomaly) for anomaly in found])

    assert min(answers.values()) > 100, answers
