from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from infra import metrics as module
from infra.metrics import (
    COUNTED,
    LOOKED_AT,
    METRICS,
    Kind,
    Metrics,
    clear_metrics,
    free_name,
    make_metrics,
    metrics_environment,
    metrics_page,
    open_metrics,
    parse_metrics,
    sharing_processes,
    usage,
)

COUNTING = """
import sys
from pathlib import Path
from infra.metrics import open_metrics
directory, name, number = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
metrics = open_metrics(directory, name)
assert open_metrics(directory, name) is metrics, "asked again after a start that failed"
metrics.commands.labels("orders", "PlaceOrder", "committed", "").inc(number)
metrics.batch_size.labels("orders").observe(number)
metrics.consumer_lag.labels("orders.commands", "0").set(number)
metrics.waiting_bytes.labels(name).set(number)
from prometheus_client import Counter
Counter("somebody_elses", "Not ours.").inc()
print("counted", flush=True)
sys.stdin.read()
"""

PLACED = (("domain", "orders"), ("outcome", "committed"), ("reason", ""), ("type", "PlaceOrder"))


@contextmanager
def counting(directory: Path, name: str, number: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has counted `number` and lives on; killed at the end, as a part of a system may be at any time."""
    process = subprocess.Popen(
        [sys.executable, "-c", COUNTING, str(directory), name, str(number)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"counted\n"
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        process.stdin.close()
        process.stdout.close()


def test_processes_that_have_ended_count_together(tmp_path: Path) -> None:
    for name, number in (("worker-0", 3), ("worker-1", 4)):
        with counting(tmp_path, name, number):
            pass

    page = metrics_page(tmp_path)
    values = parse_metrics(page)
    assert values["concord_commands_total", PLACED] == 7
    assert values["concord_batch_commands_sum", (("domain", "orders"),)] == 7
    assert values["concord_batch_commands_count", (("domain", "orders"),)] == 2
    assert values["concord_batch_commands_bucket", (("domain", "orders"), ("le", "4.0"))] == 2
    lag = (("partition", "0"), ("topic", "orders.commands"))
    assert values["concord_consumer_lag_messages", lag] == 4, "the process that spoke last is right"
    assert b"# HELP concord_commands_total Commands answered, by outcome;" in page
    assert b"somebody_elses" not in page


def test_a_part_that_is_killed_and_started_again_goes_on_counting_in_the_same_files(tmp_path: Path) -> None:
    with counting(tmp_path, "orders-0", 3):
        pass
    files = {file.name for file in tmp_path.iterdir()}
    for _ in range(3):
        with counting(tmp_path, "orders-0", 1):
            pass

    values = parse_metrics(metrics_page(tmp_path))
    assert values["concord_commands_total", PLACED] == 6
    assert values["concord_process_starts_total", (("process", "orders-0"),)] == 4
    assert {file.name for file in tmp_path.iterdir()} == files


def test_two_living_processes_of_one_name_never_share_a_file(tmp_path: Path) -> None:
    # An actor that is only paused while Ray starts another one in its place.
    with counting(tmp_path, "orders-0", 3) as first, counting(tmp_path, "orders-0", 4) as second:
        values = parse_metrics(metrics_page(tmp_path))
        living = sharing_processes(tmp_path)

    assert values["concord_commands_total", PLACED] == 7
    assert sorted(living) == [("orders-0", first.pid), (f"orders-0.{second.pid}", second.pid)]
    assert sharing_processes(tmp_path) == [], "both are gone"


def test_what_a_worker_had_in_hand_goes_with_it_and_what_lags_stays(tmp_path: Path) -> None:
    waiting, lag = "concord_worker_waiting_bytes", "concord_consumer_lag_messages"
    with counting(tmp_path, "worker-0", 1), counting(tmp_path, "worker-1", 2):
        living = parse_metrics(metrics_page(tmp_path))
    gone = parse_metrics(metrics_page(tmp_path))

    assert {dict(labels)["worker"] for name, labels in living if name == waiting} == {"worker-0", "worker-1"}
    assert [labels for name, labels in gone if name == waiting] == []
    assert [value for (name, _), value in gone.items() if name == lag] == [2]


def test_who_never_comes_back_under_its_name_takes_one_that_is_free(tmp_path: Path) -> None:
    with counting(tmp_path, free_name(tmp_path, "worker-apart"), 1):
        with counting(tmp_path, free_name(tmp_path, "worker-apart"), 1):
            assert [name for name, _ in sharing_processes(tmp_path)] == ["worker-apart-0", "worker-apart-1"]
        assert free_name(tmp_path, "worker-apart") == "worker-apart-1"
    assert free_name(tmp_path, "worker-apart") == "worker-apart-0"


def test_the_page_shows_memory_and_descriptors_of_the_living(tmp_path: Path) -> None:
    with counting(tmp_path, "gone-0", 1):
        pass
    with counting(tmp_path, "worker-0", 1) as process:
        page = metrics_page(tmp_path, processes=[("supervisor", os.getpid()), ("ray", os.getpid()), ("ray", 1 << 22)])
        descriptors = len(os.listdir(f"/proc/{process.pid}/fd"))
    values = parse_metrics(page)

    assert values["concord_process_open_fds", (("process", "worker-0"),)] == descriptors
    assert values["concord_process_resident_memory_bytes", (("process", "worker-0"),)] > 1 << 20
    names = {dict(labels)["process"] for name, labels in values if name == "concord_process_open_fds"}
    assert names == {"worker-0", "supervisor", "ray"}
    assert usage(1 << 22) is None, "there is no such process"


def test_a_pid_of_another_container_is_not_taken_for_one_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with counting(tmp_path, "orders-0", 1):
        monkeypatch.setattr(module, "_pid_namespace", lambda: "pid:[1]")  # as an exporter beside it would see it

        assert sharing_processes(tmp_path) == []
        assert free_name(tmp_path, "orders") == "orders-1", "but its name is taken"
        assert parse_metrics(metrics_page(tmp_path))["concord_commands_total", PLACED] == 1


def test_readiness_is_on_the_page_where_it_is_known(tmp_path: Path) -> None:
    page = metrics_page(tmp_path, parts={"kafka": True, "orders-0": False})

    values = parse_metrics(page)
    assert values["concord_ready", ()] == 0
    assert values["concord_part_ready", (("part", "kafka"),)] == 1
    assert values["concord_part_ready", (("part", "orders-0"),)] == 0
    assert ("concord_ready", ()) not in parse_metrics(metrics_page(tmp_path))
    assert parse_metrics(metrics_page(tmp_path, parts={}))["concord_ready", ()] == 0, "nothing is ready of nothing"


def test_a_part_that_was_killed_before_it_had_counted_spoils_no_page(tmp_path: Path) -> None:
    (tmp_path / "counter_worker-9.db").touch()
    (tmp_path / "worker-9.lock").touch()

    assert b"concord" not in metrics_page(tmp_path).replace(b"concord_process", b"")


def test_the_files_of_a_process_have_all_their_blocks(tmp_path: Path) -> None:
    """A sparse page that is touched on a full disk ends the process with SIGBUS."""
    with counting(tmp_path, "worker-0", 1):
        sizes = {file.name: (file.stat().st_size, file.stat().st_blocks * 512) for file in tmp_path.glob("*.db")}

    assert set(sizes) == {f"{prefix}_worker-0.db" for prefix in ("counter", "histogram", "gauge_mostrecent")}
    for size, allocated in sizes.values():
        assert allocated >= size == 512 * 1024


def test_a_new_run_forgets_the_counts_of_the_one_before(tmp_path: Path) -> None:
    with counting(tmp_path, "worker-0", 3):
        pass
    clear_metrics(tmp_path)

    assert list(tmp_path.iterdir()) == []


def test_metrics_that_would_stay_in_the_process_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_opened", {})
    with pytest.raises(RuntimeError, match="metrics_environment"):
        open_metrics(tmp_path, "worker-0")  # this test imported prometheus_client long ago

    assert metrics_environment(tmp_path)["PROMETHEUS_MULTIPROC_DIR"] == str(tmp_path)
    assert os.environ.get("PROMETHEUS_MULTIPROC_DIR") != str(tmp_path)


def test_every_row_of_the_table_is_a_metric_that_counts() -> None:
    registry = CollectorRegistry()
    metrics = make_metrics(registry)
    for row in COUNTED:
        metric = getattr(metrics, row.field).labels(*["x"] * len(row.labels))
        match row.kind:
            case Kind.COUNTER:
                metric.inc()
            case Kind.GAUGE:
                metric.set(1)
            case Kind.HISTOGRAM:
                metric.observe(1)

    samples = {name for name, _labels in parse_metrics(generate_latest(registry))}
    for row in COUNTED:
        assert set(row.series) <= samples, row
    assert ["process", *(row.field for row in COUNTED)] == [field.name for field in fields(Metrics)]


def test_names_follow_the_conventions_of_prometheus() -> None:
    assert len({row.name for row in METRICS}) == len(METRICS)
    for row in METRICS:
        assert row.name.startswith("concord_"), row
        assert not row.name.endswith("_total"), "the client appends it"
        assert row.description.endswith("."), row
        assert bool(row.buckets) == (row.kind is Kind.HISTOGRAM), row
        assert list(row.buckets) == sorted(set(row.buckets)), row
        assert not {"ms", "milliseconds", "kb", "mb"} & set(row.name.split("_")), "base units only"
    assert {row.field for row in LOOKED_AT}.isdisjoint(row.field for row in COUNTED)


def test_the_bounds_of_the_targets_are_bounds_of_buckets() -> None:
    by_field = {row.field: row for row in METRICS}

    assert {0.5, 1.0} <= set(by_field["command_seconds"].buckets)
    assert {0.1, 0.5} <= set(by_field["transaction_seconds"].buckets)
