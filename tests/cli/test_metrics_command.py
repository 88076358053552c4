"""`concord top`, `concord slis` and the exporter: what two looks at a metrics page tell."""

from __future__ import annotations

import io
import json
import math
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from rich.console import Console
from typer.testing import CliRunner

from actors.messages import Trouble
from infra.metrics import Metrics, make_metrics, parse_metrics
from infra.monitoring.readings import Readings, quantile
from infra.monitoring.slis import SLIS
from schemas.outcome import Answer, EmittedEvent
from scripts.cli.main import app
from scripts.cli.metrics_command import drawn, summary
from scripts.exporter import Exporter
from scripts.measuring import name_of, observer, parts_ready

NOW_S = 1_000_000.0


class World:
    """What a system counts, and its page."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.metrics: Metrics = make_metrics(self.registry)
        self.observer = observer(self.metrics)

    @property
    def text(self) -> bytes:
        return generate_latest(self.registry)

    @property
    def page(self) -> Any:
        return parse_metrics(self.text)


def answer(status: Any = "committed", reason: str = "", type: str = "PlaceOrder") -> Answer:
    event = EmittedEvent(
        id="e",
        type="PaymentTaken",
        domain="payment",
        key="k",
        body="{}",
        subject="s",
        record_version=1,
        data_schema="d",
    )
    return Answer(
        id="i", type=type, key="k", status=status, digest="d", reason=reason, received_at_ms=0, events=(event,)
    )


def test_the_difference_of_two_looks_is_what_happened_between_them() -> None:
    world = World()
    world.observer.on_answer("orders", answer(), 0.04)
    before = world.page
    for number in range(20):
        world.observer.on_answer("orders", answer(), 0.04)
        world.observer.on_committed("orders")
        world.metrics.command_seconds.labels("orders", "PlaceOrder").observe(0.15 if number else 4.0)
    world.observer.on_answer("orders", answer("refused", "out_of_stock"), 0.01)
    world.observer.on_answer("orders", answer("dead-lettered", "wrong_shape"), 0.01)
    world.observer.on_trouble("orders", Trouble.CONFLICT)
    world.observer.on_trouble("orders", Trouble.WOUNDED)
    world.observer.on_sweep("coordinator-0", 3, int((NOW_S - 7) * 1000))
    world.observer.on_storage_call("sqlite", "orders", "mutate", 0.003, "")
    world.observer.on_storage_call("sqlite", "orders", "mutate", 0.003, "unavailable")
    world.metrics.consumer_lag.labels("orders.commands", "1").set(5)
    world.metrics.consumer_lag.labels("orders.commands", "0").set(0)
    world.metrics.oldest_unacknowledged.labels("orders.commands", "1").set(NOW_S - 3)

    seen = summary(Readings(before, world.page, 2.0), now_s=NOW_S)

    [orders] = [row for row in seen["domains"] if row["domain"] == "orders"]
    assert (orders["commands_per_s"], orders["committed"], orders["refused"], orders["dead_lettered"]) == (11, 20, 1, 1)
    assert 0.1 < orders["latency_p50_s"] <= 0.2
    assert 2.0 < orders["latency_p99_s"] <= 5.0
    assert seen["transactions"]["committed_per_s"] == 10
    assert seen["transactions"]["abort_ratio"] == pytest.approx(1 / 21, abs=1e-6), "one that was wounded is no abort"
    assert seen["transactions"]["not_committed"] == {"conflict": 1, "wounded": 1}
    assert seen["in_doubt"] == {"pending": 3, "oldest_s": 7.0}
    assert [(row["partition"], row["messages"], row["oldest_s"]) for row in seen["lag"]] == [(1, 5, 3.0), (0, 0, None)]
    [mutate] = seen["storage"]
    assert (mutate["calls_per_s"], seen["storage_errors"]) == (1.0, {"unavailable": 1})
    json.dumps(seen, allow_nan=False)


def test_a_summary_of_nothing_is_drawn_as_well() -> None:
    world = World()
    for seen in (summary(Readings({}, {}, 1.0), now_s=NOW_S), summary(Readings({}, world.page, 1.0), now_s=NOW_S)):
        console = Console(file=io.StringIO(), width=120)
        console.print(drawn(seen))
        json.dumps(seen, allow_nan=False)


def test_people_see_what_lags_and_what_is_not_ready() -> None:
    world = World()
    for partition in range(20):
        world.metrics.consumer_lag.labels("orders.commands", str(partition)).set(partition)
    page = {**world.page, ("concord_ready", ()): 0.0, ("concord_part_ready", (("part", "orders-1"),)): 0.0}
    console = Console(file=io.StringIO(), width=120)

    console.print(drawn(summary(Readings({}, page, 1.0), now_s=NOW_S)))

    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "NOT READY: orders-1" in shown
    assert "orders.commands[19]" in shown
    assert "orders.commands[3]" not in shown
    assert "and 7 partitions more" in shown


def test_what_a_client_made_up_becomes_no_label() -> None:
    world = World()
    for number in range(50):
        world.observer.on_answer("orders", answer("dead-lettered", "unknown_type", f"Invented{number}"), 0.1)

    counted = [dict(labels) for (name, labels), _ in world.page.items() if name == "concord_commands_total"]
    assert [labels["type"] for labels in counted] == ["unknown"]


def test_the_first_step_of_a_counter_that_an_alert_waits_for_is_from_zero() -> None:
    page = World().page

    aborts = {dict(labels)["reason"] for (name, labels) in page if name == "concord_transactions_total"}
    assert aborts == {"", *(trouble.value for trouble in Trouble)}
    lost = {dict(labels)["outcome"] for (_, labels) in page if dict(labels).get("reason") == "lost"}
    assert lost == {"unknown"}, "whether it committed, nobody knows yet"


def test_readiness_becomes_a_flag_for_each_part() -> None:
    state = {"ready": False, "kafka": {"kafka": "ready"}, "actors": {"orders-0": "TimeoutError"}, "workers": {}}

    assert parts_ready(state) == {"kafka": True, "orders-0": False}


def test_a_counter_that_began_anew_counts_from_zero() -> None:
    before, after = {("x_total", ()): 100.0}, {("x_total", ()): 3.0}

    assert Readings(before, after, 1.0).increase("x_total") == 3.0


@pytest.mark.parametrize(
    ("q", "buckets", "expected"),
    [
        (0.5, [(1.0, 10.0), (math.inf, 10.0)], 0.5),
        (0.99, [(0.5, 98.0), (1.0, 100.0), (math.inf, 100.0)], 0.75),
        (0.9, [(1.0, 5.0), (math.inf, 10.0)], 1.0),
        (0.5, [(1.0, 0.0), (math.inf, 0.0)], math.nan),
        (0.5, [], math.nan),
        (0.5, [(1.0, 3.0)], math.nan),
    ],
)
def test_quantiles_are_those_of_prometheus(q: float, buckets: list[tuple[float, float]], expected: float) -> None:
    assert quantile(q, buckets) == pytest.approx(expected, nan_ok=True)


@settings(max_examples=200, deadline=None)
@given(st.floats(0.01, 0.99), st.lists(st.floats(0.0, 20.0), min_size=1, max_size=60))
def test_a_quantile_lies_in_the_bucket_of_the_observation_that_it_is(q: float, observed: list[float]) -> None:
    bounds = [0.1, 0.5, 1.0, 5.0, 10.0, math.inf]
    buckets = [(bound, float(sum(value <= bound for value in observed))) for bound in bounds]
    true = sorted(observed)[min(len(observed) - 1, math.ceil(q * len(observed)) - 1)]

    found = quantile(q, buckets)

    upper = next(bound for bound in bounds if true <= bound)
    lower = max((bound for bound in bounds if bound < upper), default=0.0) if upper > 0.1 else 0.0
    assert lower - 1e-9 <= found <= (upper if math.isfinite(upper) else 10.0) + 1e-9


def test_indicators_are_read_from_the_page() -> None:
    world = World()
    for _ in range(999):
        world.observer.on_answer("orders", answer(), 0.04)
        world.observer.on_committed("orders")
        world.metrics.command_seconds.labels("orders", "PlaceOrder").observe(0.15)
        world.metrics.events.labels("payment", "PaymentTaken").inc()
    world.observer.on_answer("payment", answer("dead-lettered", "handler_error"), 3.0)
    world.observer.on_trouble("orders", Trouble.CONFLICT)
    page = {
        **world.page,
        ("concord_ready", ()): 1.0,
        ("concord_part_ready", (("part", "payment-0"),)): 1.0,
        ("concord_part_ready", (("part", "orders-0"),)): 0.0,
    }
    readings = Readings({}, page, 0.5)

    values = {sli.name: sli.reading(readings) for sli in SLIS}

    assert values["transaction_p95"] < 0.1
    assert values["order_p95"] < 0.5
    assert values["transactions_per_second"] == values["payments_per_second"] == 999 / 0.5
    assert values["commit_ratio"] == pytest.approx(0.999)
    assert values["abort_ratio"] == pytest.approx(0.001)
    assert values["error_ratio"] == pytest.approx(0.001)
    assert values["payment_error_ratio"] == 1.0
    assert (values["availability"], values["payment_availability"]) == (1.0, 1.0)
    met = {sli.name: sli.met(values[sli.name]) for sli in SLIS}
    assert met["order_p95"] is True
    assert met["payment_error_ratio"] is False
    assert all(sli.met(sli.reading(Readings({}, {}, 1.0))) in (None, False) for sli in SLIS)


# The commands, on a page that somebody serves.


@contextmanager
def served(pages: list[bytes]) -> Iterator[str]:
    """An address that answers with these pages in turn, then with the last one."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = pages.pop(0) if len(pages) > 1 else pages[0]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def test_top_prints_one_json_object_where_no_person_reads() -> None:
    world = World()
    first = world.text
    world.observer.on_answer("orders", answer(), 0.04)

    with served([first, world.text]) as url:
        ended = CliRunner().invoke(app, ["top", "--url", url, "--every", "0.1"])

    assert ended.exit_code == 0, ended.output
    [line] = ended.stdout.splitlines()
    seen = json.loads(line)
    assert [row["committed"] for row in seen["domains"]] == [1]
    assert seen["ready"] is None, "the page of one part knows nothing of the others"


def test_top_shows_people_as_many_looks_as_they_ask_for() -> None:
    world = World()
    world.metrics.consumer_lag.labels("orders.commands", "0").set(5)

    with served([world.text]) as url:
        ended = CliRunner().invoke(
            app, ["top", "--url", url, "--every", "0.1", "--times", "2", "--output", "human"], terminal_width=120
        )

    assert ended.exit_code == 0, ended.output
    assert "orders.commands[0]" in ended.stdout


def test_slis_prints_each_indicator_with_its_target() -> None:
    world = World()
    first = world.text
    world.observer.on_answer("orders", answer(), 0.04)
    world.observer.on_committed("orders")

    with served([first, world.text]) as url:
        ended = CliRunner().invoke(app, ["slis", "--url", url, "--seconds", "0.1"])

    assert ended.exit_code == 0, ended.output
    rows = {row["name"]: row for row in map(json.loads, ended.stdout.splitlines())}
    assert list(rows) == [sli.name for sli in SLIS]
    assert (rows["commit_ratio"]["value"], rows["commit_ratio"]["met"]) == (1.0, True)
    assert rows["commit_ratio"]["target"] == "> 99.9 %"
    assert (rows["payment_error_ratio"]["value"], rows["payment_error_ratio"]["met"]) == (None, None)


def test_slis_asks_a_prometheus_the_same() -> None:
    body = {"status": "success", "data": {"resultType": "vector", "result": [{"metric": {}, "value": [1, "0.25"]}]}}

    with served([json.dumps(body).encode()]) as url:
        ended = CliRunner().invoke(app, ["slis", "--prometheus", url, "--window", "30d"])

    rows = {row["name"]: row for row in map(json.loads, ended.stdout.splitlines())}
    assert (rows["order_p95"]["value"], rows["order_p95"]["met"]) == (0.25, True)
    assert (rows["transaction_p95"]["value"], rows["transaction_p95"]["met"]) == (0.25, False)


@pytest.mark.parametrize("name", ["top", "slis"])
def test_a_page_that_is_not_there_is_said_in_a_sentence(name: str, tmp_path: Path) -> None:
    nobody = CliRunner().invoke(app, [name, "--data", str(tmp_path)])
    wrong = CliRunner().invoke(app, [name, "--url", "http://127.0.0.1:9/metrics"])
    malformed = CliRunner().invoke(app, [name, "--url", "127.0.0.1:9"])

    assert (nobody.exit_code, wrong.exit_code, malformed.exit_code) == (6, 6, 2)
    assert "No system is running" in nobody.output
    assert "cannot be read" in wrong.output
    assert "begins with http://" in malformed.output


def test_the_exporter_serves_the_page_of_a_directory_and_nothing_else(tmp_path: Path) -> None:
    exporter = Exporter(tmp_path, ("127.0.0.1", 0))
    threading.Thread(target=exporter.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    url = f"http://127.0.0.1:{exporter.server_address[1]}"
    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as found:
            assert found.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            parse_metrics(found.read())
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{url}/../{os.sep}etc/passwd", timeout=10)
    finally:
        exporter.shutdown()
        exporter.server_close()


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (
            ["/opt/java/bin/java", "-Xmx512m", "-Dlog=/data/cassandra", "kafka.Kafka", "/data/server.properties"],
            "kafka",
        ),
        (["java", "-Dx=/srv/kafka.Kafka/", "org.apache.cassandra.service.CassandraDaemon"], "cassandra"),
        (["java", "-jar", "else.jar"], "java"),
        (["ray::IDLE"], "ray"),
        (["/venv/lib/python3.11/site-packages/ray/core/src/ray/raylet/raylet", "--x"], "ray"),
        (["ray::ConcordActor.execute"], None),
        (["python", "-m", "scripts.worker"], None),
    ],
)
def test_processes_that_count_nothing_themselves_are_known_by_their_programs(
    words: list[str], name: str | None
) -> None:
    assert name_of(words) == name
