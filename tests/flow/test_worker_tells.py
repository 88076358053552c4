"""What a stream worker tells telemetry of its partitions, and what becomes of it there."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flow_world import raw_command, until, worker_options
from prometheus_client import CollectorRegistry, generate_latest

from infra.config import load_settings
from infra.metrics import make_metrics, parse_metrics
from schemas.envelope import DeadLetterReason
from schemas.outcome import Answer, EmittedEvent
from scripts.measuring import worker_observer
from streams.app import StreamWorker, WorkerObserver
from streams.lag import PartitionState
from streams.partitions import Limits, Partition, Pipelines, Progress, Received

P0, P1 = ("test.commands", 0), ("test.commands", 1)
NOW_S = 1_700_000_000.0


class Told:
    """What was told of each partition, the latest last."""

    def __init__(self) -> None:
        self.lag: list[tuple[Partition, int]] = []
        self.oldest: list[tuple[Partition, int | None]] = []
        self.in_flight: list[tuple[int, int]] = []
        self.observer = WorkerObserver(
            lag=lambda partition, messages: self.lag.append((partition, messages)),
            oldest=lambda partition, oldest_ms: self.oldest.append((partition, oldest_ms)),
            in_flight=lambda messages, size: self.in_flight.append((messages, size)),
        )


def worker(told: Told, directory: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[StreamWorker, dict[Partition, Any]]:
    options = worker_options("127.0.0.1:1", "test", "group", "worker-0", directory, {})
    made = StreamWorker(options, None, observer=told.observer)  # type: ignore[arg-type]
    states: dict[Partition, PartitionState] = {}
    monkeypatch.setattr(made.lag, "states", lambda: dict(states))
    return made, states


async def test_each_partition_is_told_of_and_what_is_in_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    made, states = worker(told, tmp_path, monkeypatch)
    states[P0] = PartitionState(7, Progress(3, 4, 12, 5.0, oldest_ms=1_600_000_000_000))
    states[P1] = PartitionState(None, None)

    assert made._tell(set()) == {P0, P1}

    assert told.lag == [(P0, 7)], "of the other one the broker has not said"
    assert told.oldest == [(P0, 1_600_000_000_000), (P1, None)]
    assert told.in_flight == [(7, 0)]


async def test_a_partition_that_was_taken_away_lags_no_more_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told()
    made, states = worker(told, tmp_path, monkeypatch)
    states[P0] = PartitionState(7, Progress(3, 4, 12, 5.0, oldest_ms=1))
    before = made._tell(set())
    states.clear()

    after = made._tell(before)
    made._tell(after)

    assert told.lag == [(P0, 7), (P0, 0)], "said once: the next worker's word counts from then on"
    assert told.oldest[-1] == (P0, None)
    assert told.in_flight[-1] == (0, 0)


class NoSource:
    def pause(self, partition: Partition) -> None: ...

    def resume(self, partition: Partition) -> None: ...

    def start_of(self, partition: Partition) -> int | None:
        return 0

    async def first_offset(self, partition: Partition, offset: int) -> int | None:
        return offset


async def test_the_oldest_message_is_the_first_that_is_not_finished() -> None:
    go, begun = asyncio.Event(), asyncio.Event()

    async def work(partition: Partition, batch: list[Received], tried: Any) -> None:
        begun.set()
        await go.wait()

    pipelines = Pipelines(
        work=work,
        source=NoSource(),
        finished=lambda partition, offset: None,
        failed=lambda error: None,
        limits=Limits(linger_s=0, batch_messages=1),
    )
    times_ms = [1_600_000_000_000, 1_600_000_005_000]
    for offset, time_ms in enumerate(times_ms):
        raw = replace(raw_command(f"c{offset}", offset=offset), timestamp_ms=time_ms)
        pipelines.offer(P0, 1, Received(raw))

    waiting = pipelines.progress()[P0].oldest_ms
    await begun.wait()
    at_work = pipelines.progress()[P0].oldest_ms
    go.set()
    await until(lambda: pipelines.progress()[P0].next_finished == 2)

    assert (waiting, at_work, pipelines.progress()[P0].oldest_ms) == (times_ms[0], times_ms[0], None)


# As metrics.


def observed(tmp_path: Path) -> tuple[WorkerObserver, Any]:
    registry = CollectorRegistry()
    options = worker_options("127.0.0.1:1", "orders", "group", "worker-0", tmp_path, {})
    observer = worker_observer(
        make_metrics(registry), load_settings(environment={}, data_dir=tmp_path), options, now_s=lambda: NOW_S
    )
    return observer, lambda: parse_metrics(generate_latest(registry))


def answer(**changes: Any) -> Answer:
    fields: Mapping[str, Any] = {
        "id": "i",
        "type": "PlaceOrder",
        "key": "k",
        "status": "committed",
        "digest": "d",
        "received_at_ms": 0,
        **changes,
    }
    return Answer(**fields)


def labelled(**labels: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(labels.items()))


def test_latency_is_from_the_timestamp_of_the_command_to_now(tmp_path: Path) -> None:
    observer, page = observed(tmp_path)
    observer.answered("orders", answer(), int((NOW_S - 0.25) * 1000))
    observer.answered("orders", answer(), int((NOW_S + 60) * 1000))  # a client whose clock is ahead

    values = page()
    placed = {"domain": "orders", "type": "PlaceOrder"}
    assert values["concord_command_latency_seconds_count", labelled(**placed)] == 2
    assert values["concord_command_latency_seconds_sum", labelled(**placed)] == pytest.approx(0.25)
    assert values["concord_command_latency_seconds_bucket", labelled(**placed, le="0.3")] == 2
    assert values["concord_command_latency_seconds_bucket", labelled(**placed, le="0.2")] == 1


def test_dead_letters_begin_at_zero_and_are_counted_by_reason(tmp_path: Path) -> None:
    observer, page = observed(tmp_path)
    before = page()
    observer.answered("orders", answer(status="dead-lettered", reason="not_json", type=""), 0)

    values = page()
    for reason in DeadLetterReason:
        place = labelled(topic="orders.commands.dlq", reason=reason.value)
        assert before["concord_dead_letters_total", place] == 0
        assert values["concord_dead_letters_total", place] == (reason is DeadLetterReason.NOT_JSON)
    assert values["concord_command_latency_seconds_count", labelled(domain="orders", type="unknown")] == 1


def test_events_are_counted_in_the_domain_that_they_are_of(tmp_path: Path) -> None:
    observer, page = observed(tmp_path)
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
    observer.answered("orders", answer(events=(event, event)), 0)

    assert page()["concord_events_published_total", labelled(domain="payment", type="PaymentTaken")] == 2


def test_times_are_published_as_timestamps_so_that_ages_go_on_growing(tmp_path: Path) -> None:
    observer, page = observed(tmp_path)
    place = labelled(topic="orders.commands", partition="3")
    observer.oldest(("orders.commands", 3), int((NOW_S - 40) * 1000))
    observer.last_progress(("orders.commands", 3), 9.0)
    values = page()
    observer.oldest(("orders.commands", 3), None)

    assert values["concord_oldest_unacknowledged_timestamp_seconds", place] == NOW_S - 40
    assert values["concord_last_progress_timestamp_seconds", place] == NOW_S - 9
    assert page()["concord_oldest_unacknowledged_timestamp_seconds", place] == 0


def test_bounds_are_published_beside_what_they_bound(tmp_path: Path) -> None:
    observer, page = observed(tmp_path)
    observer.in_flight(5, 1234)

    values = page()
    assert values["concord_worker_waiting_bytes", labelled(worker="worker-0")] == 1234
    assert values["concord_worker_waiting_bytes_limit", labelled(worker="worker-0")] == Limits().total_bytes
    assert values["concord_worker_in_flight_messages", labelled(worker="worker-0")] == 5
    assert values["concord_topic_retention_seconds", labelled(topic="orders.commands")] == 72 * 3600
    assert ("concord_topic_retention_seconds", labelled(topic="orders.events")) not in values, "kept for ever"
