"""The pure parts of the benchmarks: moments drawn before, latencies from them, and where the time of a trace went."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping

import pytest

from infra.tracing import (
    CALL,
    COMMIT,
    COMMIT_RECORDS,
    COMMIT_STATE,
    HANDLE,
    PARTICIPATE,
    PREPARE,
    PROCESS,
    SEND,
    STORAGE,
    VALIDATE,
)
from scripts.bench.loads import Tally, Window, arrivals, closed_loop, open_loop, report
from scripts.bench.paths import TimedSpan, longest_path, mean_path_ms
from scripts.bench.stack import statements, table


async def no_meter() -> Mapping[str, float]:
    return {}


def test_arrivals_come_at_the_asked_rate_in_order_and_the_same_for_one_seed() -> None:
    moments = arrivals(200, 50, seed=3)

    assert len(moments) == pytest.approx(10_000, rel=0.05)
    assert moments == sorted(moments)
    assert moments[-1] < 50
    assert moments == arrivals(200, 50, seed=3)
    assert moments != arrivals(200, 50, seed=4)
    gaps = sorted(later - earlier for earlier, later in itertools.pairwise(moments))
    assert gaps[len(gaps) * 63 // 100] == pytest.approx(1 / 200, rel=0.1)  # exponential: 63 % are below the mean


async def test_an_open_load_counts_the_time_for_which_work_that_was_due_waited_for_its_turn() -> None:
    """One server, busy for 30 ms with each of ten that are due at once: the last has waited for all of them."""
    server = asyncio.Lock()

    async def work() -> str:
        async with server:
            await asyncio.sleep(0.03)
        return "committed"

    tally = Tally()
    await open_loop(work, [0.0] * 10, Window(0, 0.1), tally, no_meter)

    assert tally.statuses == {"committed": 10}
    assert max(tally.latencies_s) >= 0.29
    assert tally.answered < 10  # within the window


async def test_an_open_load_goes_on_asking_while_nothing_is_answered() -> None:
    asked = 0
    everybody_asked = asyncio.Event()

    async def work() -> str:
        nonlocal asked
        asked += 1
        if asked == 5:
            everybody_asked.set()
        await everybody_asked.wait()
        return "committed"

    tally = Tally()
    await open_loop(work, [0.0, 0.01, 0.02, 0.03, 0.04], Window(0, 0.05), tally, no_meter)

    assert tally.statuses == {"committed": 5}
    assert len(tally.sent_late_s) == 5


async def test_what_is_asked_to_warm_up_is_not_counted() -> None:
    counter = itertools.count()

    async def work() -> str:
        return "early" if next(counter) < 5 else "committed"

    async def meter() -> Mapping[str, float]:
        return {"cpu_s/worker": 1.5, "statements/get": 7}

    tally = Tally()
    await open_loop(work, [0.0] * 5 + [0.2] * 3, Window(0.1, 0.2), tally, meter)

    assert tally.statuses == {"committed": 3}
    assert (len(tally.latencies_s), tally.seconds) == (3, 0.2)
    assert tally.grown == {"cpu_s/worker": 0.0, "statements/get": 0.0}


async def test_a_closed_load_has_so_many_in_flight_and_no_more() -> None:
    in_flight = most = 0

    async def work() -> str:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        await asyncio.sleep(0.002)
        in_flight -= 1
        return "committed"

    tally = Tally()
    await closed_loop(work, 4, Window(0, 0.3), tally, no_meter)

    assert most == 4
    assert tally.answered == len(tally.latencies_s) == tally.statuses["committed"] > 0


def test_a_report_divides_what_the_counters_grew_by_among_the_answers() -> None:
    tally = Tally(seconds=2, answered=4, latencies_s=[0.001, 0.002, 0.003, 0.1])
    tally.statuses["committed"] = 4
    tally.grown = {"cpu_s/kafka": 0.1, "cpu_s/worker": 0.4, "cpu_s/idle": 0.0, "statements/get": 12}

    told = report(tally)

    assert told["orders_per_s"] == 2
    assert told["latency_ms"] == {"p50": 2, "p95": 100, "p99": 100}
    assert list(told["cpu_ms_an_order"].items()) == [("worker", 100), ("kafka", 25)]
    assert told["cores_busy"] == 0.25
    assert told["statements_an_order"] == {"get": 3}
    assert report(Tally())["latency_ms"] == {"p50": None, "p95": None, "p99": None}


def test_statements_are_told_by_namespace_and_operation_whoever_asked_for_them() -> None:
    def count(storage: str, namespace: str) -> tuple[str, tuple[tuple[str, str], ...]]:
        labels = (("operation", "mutate"), ("storage", storage), ("storage_namespace", namespace))
        return "concord_storage_seconds_count", labels

    page = {
        count("here", "orders"): 3.0,
        count("there", "orders"): 4.0,
        count("here", "coordinator"): 5.0,
        ("concord_storage_seconds_sum", (("operation", "mutate"), ("storage_namespace", "orders"))): 9.0,
    }

    assert statements(page) == {"statements/orders mutate": 7.0, "statements/coordinator mutate": 5.0}


def an_order() -> list[TimedSpan]:
    """Milliseconds by hand; every name is one that the tracer gives."""
    numbers = itertools.count()
    spans: list[TimedSpan] = []

    def span(name: str, start_ms: int, end_ms: int, parent: str = "") -> str:
        id = f"s{next(numbers)}"
        spans.append(TimedSpan("t", id, parent, name, start_ms * 1_000_000, end_ms * 1_000_000))
        return id

    sent = span(SEND.name.format("orders.commands"), 0, 4)
    processed = span(PROCESS.name.format("orders.commands"), 10, 100, sent)
    home = span(HANDLE.name.format("PlaceOrder"), 12, 90, processed)
    for domain, type, end_ms in (("inventory", "ReserveStock", 30), ("payment", "TakePayment", 25)):
        called = span(CALL.name.format(domain), 15, end_ms, home)
        handled = span(HANDLE.name.format(type), 17, end_ms - 1, called)
        span(STORAGE.name.format(f"get {domain}.records"), 18, end_ms - 3, handled)
    asked = span(CALL.name.format("coordinator"), 40, 88, home)
    committed = span(COMMIT.name, 42, 86, asked)
    span(STORAGE.name.format("mutate coordinator.intents"), 43, 46, committed)
    prepared = span(PREPARE.name, 46, 60, committed)
    part = span(PARTICIPATE.name.format("prepare"), 47, 59, prepared)
    span(STORAGE.name.format("mutate"), 48, 58, part)
    span(PARTICIPATE.name.format("validate"), 62, 69, span(VALIDATE.name, 60, 70, committed))
    decided = span(COMMIT_STATE.name, 70, 86, committed)
    span(STORAGE.name.format("mutate coordinator.state"), 71, 85, decided)
    span(COMMIT_RECORDS.name, 86, 120, committed)
    span(SEND.name.format("orders.results"), 91, 99, processed)
    return spans


def test_the_longest_path_adds_up_to_the_whole_and_names_each_step() -> None:
    path = {part: ns // 1_000_000 for part, ns in longest_path(an_order()).items()}

    assert path == {
        "topic own": 10,
        "worker between": 2 + 1 + 1,
        "handle own": 3 + 10 + 2,
        "calls between": 2 + 1,
        "calls own": 1 + 2,
        "calls storage": 9,
        "commit between": 4,
        "commit own": 1,
        "intent storage": 3,
        "prepare between": 2,
        "prepare own": 2,
        "prepare storage": 10,
        "validate between": 3,
        "validate own": 7,
        "commit state own": 2,
        "commit state storage": 14,
        "publish own": 8,
    }
    assert sum(path.values()) == 100


def test_a_trace_of_which_the_worker_told_nothing_yet_is_left_out_of_the_mean() -> None:
    whole = an_order()
    torn = [TimedSpan("u", "a", "", "send orders.commands", 0, 5)]

    traces, path_ms = mean_path_ms(whole + torn)

    assert traces == 1
    assert next(iter(path_ms.items())) == ("handle own", 15.0)
    assert mean_path_ms(torn) == (0, {})


def test_the_table_has_a_row_for_each_load_and_says_what_was_left_out() -> None:
    tally = Tally(seconds=1, answered=100, latencies_s=[0.01] * 100)
    tally.grown = {"cpu_s/worker": 0.3, "statements/get": 400}
    lines = [
        {"who": "scalardb", "load": "left out", "why": "no javac"},
        {"who": "concord", "load": "full", "in_flight": 64, **report(tally)},
        {
            "who": "concord",
            "load": "trace",
            "offered_per_s": 50.0,
            "orders_per_s": 50.0,
            "latency_ms": tally.latency_ms(),
        }
        | {"traces": 5, "sum_ms": 9.0, "path_ms": {"topic own": 9.0}},
    ]

    rows = [line.split() for line in table(lines).splitlines()]

    assert rows[1] == ["scalardb", "left", "out"]
    assert rows[2] == ["concord", "full", "64", "100.0", "10", "10", "10", "3.0", "4.0"]
    assert rows[-1] == ["9.00", "topic", "own"]
