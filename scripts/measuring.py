"""What is measured: how the parts' own words become metrics (`infra/metrics.py`), and what a scrape looks at.

Actors and workers tell what happens to an `Observer` or a `WorkerObserver`; here each word is given its labels. All
label values are known beforehand: the type of a command that no registry knows is `unknown`, whatever it was.
Counters whose first step matters, because an alert waits for it, begin at 0: Prometheus sees no increase in a series
that begins with 1.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.metrics import Metrics, process_page
from infra.servers import guard

if TYPE_CHECKING:
    from actors.system import Observer
    from infra.config import Settings
    from streams.app import WorkerObserver, WorkerOptions

UNKNOWN_TYPE = "unknown"

COMMITTED, ABORTED, UNKNOWN = "committed", "aborted", "unknown"
"""How a transaction ends. Unknown: its coordinator was lost, and the next attempt will find what became of it."""


def observer(metrics: Metrics) -> Observer:
    """Count what an actor tells."""
    from actors.messages import Trouble
    from actors.system import Observer
    from infra.storage.observed import ERRORS
    from schemas.outcome import Answer
    from schemas.registry import DOMAINS

    type_of = _known_types()
    outcome_of = {trouble: UNKNOWN if trouble is Trouble.LOST else ABORTED for trouble in Trouble}
    storage_calls: dict[tuple[str, str, str], Any] = {}
    for domain in DOMAINS:
        metrics.transactions.labels(domain, COMMITTED, "")
        for trouble, outcome in outcome_of.items():
            metrics.transactions.labels(domain, outcome, trouble.value)

    def on_answer(domain: str, answer: Answer, seconds: float) -> None:
        metrics.commands.labels(domain, type_of(answer.type), answer.status, answer.reason).inc()
        metrics.transaction_seconds.labels(domain, answer.status).observe(seconds)

    def on_sweep(coordinator: str, pending: int, oldest_ms: int | None) -> None:
        metrics.intents_pending.labels(coordinator).set(pending)
        metrics.oldest_in_doubt.labels(coordinator).set((oldest_ms or 0) / 1000)

    def on_in_hand(actor: str, commands: int, limit: int) -> None:
        metrics.commands_in_hand.labels(actor).set(commands)
        metrics.commands_in_hand_limit.labels(actor).set(limit)

    def on_storage_call(storage: str, namespace: str, operation: str, seconds: float, error: str) -> None:
        timed = storage_calls.get((storage, namespace, operation))
        if timed is None:
            timed = metrics.storage_seconds.labels(storage, namespace, operation)
            storage_calls[storage, namespace, operation] = timed
            for kind in ERRORS:
                metrics.storage_errors.labels(storage, namespace, kind)
        timed.observe(seconds)
        if error:
            metrics.storage_errors.labels(storage, namespace, error).inc()

    return Observer(
        on_answer=on_answer,
        on_committed=lambda domain: metrics.transactions.labels(domain, COMMITTED, "").inc(),
        on_trouble=lambda domain, trouble: metrics.transactions.labels(
            domain, outcome_of[trouble], trouble.value
        ).inc(),
        on_recovered=lambda kind: metrics.recovered.labels(kind).inc(),
        on_sweep=on_sweep,
        on_pruned=lambda table, rows: metrics.pruned.labels(table).inc(rows),
        on_in_hand=on_in_hand,
        on_storage_call=on_storage_call,
    )


def worker_observer(
    metrics: Metrics, settings: Settings, options: WorkerOptions, *, now_s: Callable[[], float] = time.time
) -> WorkerObserver:
    """Count what a stream worker tells. `now_s` is Unix time, as the timestamps of messages are."""
    from schemas.envelope import DeadLetterReason
    from schemas.outcome import DEAD_LETTERED, Answer
    from schemas.topics import KEEP_FOREVER, dead_letters_topic
    from scripts.wiring import topics
    from streams.app import WorkerObserver
    from streams.partitions import Partition

    type_of = _known_types()
    name = metrics.process or options.name
    for domain in options.domains:
        for reason in DeadLetterReason:
            metrics.dead_letters.labels(dead_letters_topic(domain), reason.value)
    for topic in topics(settings):
        if topic.retention_ms != KEEP_FOREVER:
            metrics.retention.labels(topic.name).set(topic.retention_ms / 1000)
    metrics.waiting_bytes_limit.labels(name).set(options.limits.total_bytes)

    def answered(domain: str, answer: Answer, sent_at_ms: int) -> None:
        # A client's clock may be ahead of ours; nothing is answered before it was asked.
        seconds = max(0.0, now_s() - sent_at_ms / 1000)
        metrics.command_seconds.labels(domain, type_of(answer.type)).observe(seconds)
        if answer.status == DEAD_LETTERED:
            metrics.dead_letters.labels(dead_letters_topic(domain), answer.reason).inc()
        for event in answer.events:
            metrics.events.labels(event.domain, event.type).inc()

    def lag(partition: Partition, messages: int) -> None:
        metrics.consumer_lag.labels(*_labels(partition)).set(messages)

    def oldest(partition: Partition, oldest_ms: int | None) -> None:
        metrics.oldest_unacknowledged.labels(*_labels(partition)).set((oldest_ms or 0) / 1000)

    def last_progress(partition: Partition, seconds_ago: float) -> None:
        metrics.last_progress.labels(*_labels(partition)).set(now_s() - seconds_ago)

    def in_flight(messages: int, waiting_bytes: int) -> None:
        metrics.in_flight_messages.labels(name).set(messages)
        metrics.waiting_bytes.labels(name).set(waiting_bytes)

    return WorkerObserver(
        answered=answered,
        batch=lambda domain, commands: metrics.batch_size.labels(domain).observe(commands),
        lag=lag,
        oldest=oldest,
        in_flight=in_flight,
        last_progress=last_progress,
        page=lambda: process_page(name),
    )


def _labels(partition: tuple[str, int]) -> tuple[str, str]:
    return partition[0], str(partition[1])


def _known_types() -> Callable[[str], str]:
    """A command's type as a label: what a client made up would make a series for each of its inventions."""
    from schemas.registry import default_registry

    known = frozenset(default_registry().commands)
    return lambda type_name: type_name if type_name in known else UNKNOWN_TYPE


# What a scrape looks at.


def parts_ready(readiness: Mapping[str, Any]) -> dict[str, bool]:
    """The supervisor's readiness (`{"kafka": {"kafka": "ready"}, "actors": {…}, …}`) as one flag for each part."""
    return {
        part: state == "ready"
        for group in readiness.values()
        if isinstance(group, Mapping)
        for part, state in group.items()
    }


def processes_of_run() -> list[tuple[str, int]]:
    """(name, pid) of what belongs to this process's run, itself included, and shares no metrics by itself: servers and
    Ray's own processes. The actors and workers say themselves what they are."""
    found = [("supervisor", os.getpid())]
    run = os.environ.get(guard.MARK)
    for pid in guard.marked(run) if run else ():
        name = name_of(_command_line(pid))
        if name is not None:
            found.append((name, pid))
    return found


_SERVERS = {"kafka.Kafka": "kafka", "org.apache.cassandra.service.CassandraDaemon": "cassandra"}
"""The main classes of servers that run on this machine."""


def _command_line(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
    except OSError:  # gone meanwhile
        return [""]


def name_of(words: list[str]) -> str | None:
    """What a process is, by its command line; None for those that say so themselves, and for what is not ours."""
    if words[0].startswith("ray::"):
        return None if words[0].startswith("ray::ConcordActor") else "ray"
    if Path(words[0]).name == "java":
        return next((_SERVERS[word] for word in words if word in _SERVERS), "java")
    return "ray" if any("/ray/" in word for word in words) else None
