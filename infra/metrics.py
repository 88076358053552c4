"""Metrics as a table, counted together by all processes of one machine.

Every metric is a row of METRICS. There are two kinds of rows:

    COUNTED     processes count as things happen. Each keeps its numbers in files of one directory (prometheus_client's
                multiprocess mode), and `metrics_page` adds them up.
    LOOKED_AT   is looked at when the page is asked for: what /proc says of each process, and what is ready.

The files of a process are named after what it is (`orders-0`, `worker-1`), not after its pid, so that a part that was
killed and started again goes on counting where it was: no counter falls back, and the directory does not grow with
restarts. Two living processes must never write one file: each holds a lock (flock, which ends with its holder) on its
name, and who does not get it counts under its pid as well. The lock file says the pid, by which /proc is asked. Files
are allocated before they are mapped: on a full disk the first touch of a sparse page would end the process with SIGBUS.

The directory is chosen when prometheus_client is first imported, so a process needs `metrics_environment` in its
environment when it starts, or must call `open_metrics` before anything imports prometheus_client.

Labels have few values, all of them ours: nothing that a client wrote becomes a label.

Importing this module does not import prometheus_client; the engine uses neither.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Kind(Enum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """A row of the table. `field` is its name in `Metrics`, `name` in Prometheus (counters gain `_total`)."""

    field: str
    kind: Kind
    name: str
    description: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def series(self) -> tuple[str, ...]:
        """The names of its samples, as queries use them."""
        match self.kind:
            case Kind.COUNTER:
                return (f"{self.name}_total",)
            case Kind.GAUGE:
                return (self.name,)
            case Kind.HISTOGRAM:
                return (f"{self.name}_bucket", f"{self.name}_sum", f"{self.name}_count")


# The targets are 0.1 s for a transaction, 0.5 s and 1 s for an answer: each is a bound, and has others around it.
_ANSWER_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_TRANSACTION_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0)
_STORAGE_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

COUNTED: tuple[Metric, ...] = (
    Metric(
        "commands",
        Kind.COUNTER,
        "concord_commands",
        "Commands answered, by outcome; reason is empty for committed ones. A redelivered command counts again.",
        ("domain", "type", "outcome", "reason"),
    ),
    Metric(
        "command_seconds",
        Kind.HISTOGRAM,
        "concord_command_latency_seconds",
        "From a command's timestamp on its topic to the broker's confirmation of its result.",
        ("domain", "type"),
        _ANSWER_SECONDS,
    ),
    Metric(
        "transaction_seconds",
        Kind.HISTOGRAM,
        "concord_transaction_seconds",
        "From the first try of a command's transaction to its end, by how it ended.",
        ("domain", "outcome"),
        _TRANSACTION_SECONDS,
    ),
    Metric(
        "transactions",
        Kind.COUNTER,
        "concord_transactions",
        "Transactions by how they ended: committed, aborted for a reason, or unknown until the state table is asked.",
        ("domain", "outcome", "reason"),
    ),
    Metric(
        "recovered",
        Kind.COUNTER,
        "concord_recovered_records",
        "Records in doubt that were settled: rolled_forward or rolled_back.",
        ("kind",),
    ),
    Metric(
        "intents_pending",
        Kind.GAUGE,
        "concord_intents_pending",
        "Transactions of a coordinator whose records were not all seen settled, at its last sweep.",
        ("coordinator",),
    ),
    Metric(
        "oldest_in_doubt",
        Kind.GAUGE,
        "concord_oldest_in_doubt_timestamp_seconds",
        "When the oldest of these transactions began (Unix time); 0 when there is none.",
        ("coordinator",),
    ),
    Metric(
        "dead_letters",
        Kind.COUNTER,
        "concord_dead_letters",
        "Messages sent to a dead-letter topic, by reason.",
        ("topic", "reason"),
    ),
    Metric(
        "events",
        Kind.COUNTER,
        "concord_events_published",
        "Events that the broker confirmed. Those of a redelivered command count again.",
        ("domain", "type"),
    ),
    Metric(
        "consumer_lag",
        Kind.GAUGE,
        "concord_consumer_lag_messages",
        "Messages of a partition that are not acknowledged yet.",
        ("topic", "partition"),
    ),
    Metric(
        "oldest_unacknowledged",
        Kind.GAUGE,
        "concord_oldest_unacknowledged_timestamp_seconds",
        "Timestamp of the oldest message that a worker has taken and not finished (Unix time); 0 when there is none.",
        ("topic", "partition"),
    ),
    Metric(
        "retention",
        Kind.GAUGE,
        "concord_topic_retention_seconds",
        "How long a topic keeps its messages.",
        ("topic",),
    ),
    Metric(
        "last_progress",
        Kind.GAUGE,
        "concord_last_progress_timestamp_seconds",
        "When something was last tried for a partition (Unix time).",
        ("topic", "partition"),
    ),
    Metric(
        "in_flight_messages",
        Kind.GAUGE,
        "concord_worker_in_flight_messages",
        "Messages that a worker has taken and not finished.",
        ("worker",),
    ),
    Metric(
        "waiting_bytes",
        Kind.GAUGE,
        "concord_worker_waiting_bytes",
        "Size of the messages that wait in a worker for their partition's turn.",
        ("worker",),
    ),
    Metric(
        "waiting_bytes_limit",
        Kind.GAUGE,
        "concord_worker_waiting_bytes_limit",
        "The size from which on a worker fetches no more.",
        ("worker",),
    ),
    Metric(
        "commands_in_hand",
        Kind.GAUGE,
        "concord_actor_commands_in_hand",
        "Commands that an actor has taken and not answered.",
        ("actor",),
    ),
    Metric(
        "commands_in_hand_limit",
        Kind.GAUGE,
        "concord_actor_commands_in_hand_limit",
        "How many it takes at most; others stay in Kafka.",
        ("actor",),
    ),
    Metric("batch_size", Kind.HISTOGRAM, "concord_batch_commands", "Commands in a batch.", ("domain",), _COUNTS),
    Metric(
        "storage_seconds",
        Kind.HISTOGRAM,
        "concord_storage_seconds",
        "Calls of the storage, by operation; the first page of a scan over partitions counts as pages.",
        ("storage", "storage_namespace", "operation"),
        _STORAGE_SECONDS,
    ),
    Metric(
        "storage_errors",
        Kind.COUNTER,
        "concord_storage_errors",
        "Calls that the storage did not serve (unavailable), answered too late to know (unknown), or that broke.",
        ("storage", "storage_namespace", "error"),
    ),
    Metric(
        "pruned",
        Kind.COUNTER,
        "concord_pruned_rows",
        "Rows of tables that grow with history, deleted after their window.",
        ("table",),
    ),
    Metric(
        "process_starts",
        Kind.COUNTER,
        "concord_process_starts",
        "Starts of an actor or a worker; each after the first is a restart.",
        ("process",),
    ),
)

LOOKED_AT: tuple[Metric, ...] = (
    Metric(
        "process_memory",
        Kind.GAUGE,
        "concord_process_resident_memory_bytes",
        "Resident memory; of the parts that consist of several processes, the sum.",
        ("process",),
    ),
    Metric("process_fds", Kind.GAUGE, "concord_process_open_fds", "Open file descriptors, likewise.", ("process",)),
    Metric(
        "process_max_fds",
        Kind.GAUGE,
        "concord_process_max_fds",
        "File descriptors that one process may have open.",
        ("process",),
    ),
    Metric(
        "process_cpu", Kind.COUNTER, "concord_process_cpu_seconds", "User and system CPU time, likewise.", ("process",)
    ),
    Metric(
        "process_started",
        Kind.GAUGE,
        "concord_process_start_time_seconds",
        "When the process started (Unix time); of several, the oldest.",
        ("process",),
    ),
    Metric("ready", Kind.GAUGE, "concord_ready", "1 when every part of the system is ready, else 0."),
    Metric("part_ready", Kind.GAUGE, "concord_part_ready", "1 when this part is ready, else 0.", ("part",)),
)

METRICS: tuple[Metric, ...] = COUNTED + LOOKED_AT

_DIRECTORY_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"

_PREFIXES = ("counter", "histogram", "gauge_mostrecent")
"""How the files of a process begin, as prometheus_client names them."""

_LOCK_TRIES = 10
_LOCK_PAUSE_S = 0.01

_FILE_BYTES = 512 * 1024
"""Allocated for each file: several times what one process's series take, and a disk that is full later does no harm."""


class MetricsError(RuntimeError):
    """Metrics cannot be shared between processes as this process was started."""


@dataclass(frozen=True)
class Metrics:
    """The metrics of COUNTED, ready to be counted: `metrics.transactions.labels("orders", "committed", "").inc()`.

    `process` is the name under which this process counts.
    """

    process: str
    commands: Counter
    command_seconds: Histogram
    transaction_seconds: Histogram
    transactions: Counter
    recovered: Counter
    intents_pending: Gauge
    oldest_in_doubt: Gauge
    dead_letters: Counter
    events: Counter
    consumer_lag: Gauge
    oldest_unacknowledged: Gauge
    retention: Gauge
    last_progress: Gauge
    in_flight_messages: Gauge
    waiting_bytes: Gauge
    waiting_bytes_limit: Gauge
    commands_in_hand: Gauge
    commands_in_hand_limit: Gauge
    batch_size: Histogram
    storage_seconds: Histogram
    storage_errors: Counter
    pruned: Counter
    process_starts: Counter


@dataclass(frozen=True, slots=True)
class Usage:
    """What /proc says of a process. `start_s` is Unix time."""

    resident_bytes: int
    open_fds: int
    max_fds: float
    cpu_s: float
    start_s: float


def metrics_environment(directory: Path) -> dict[str, str]:
    """What a process that shares its metrics in `directory` must have in its environment when it starts.

    Give it to our own workers and actors, not to a whole Ray cluster: Ray's agents count with prometheus_client too.
    """
    return {_DIRECTORY_VARIABLE: str(directory)}


def clear_metrics(directory: Path) -> None:
    """Forget the counts of earlier runs, whose processes are gone. Call before any process of this run starts."""
    directory.mkdir(parents=True, exist_ok=True)
    for pattern in ("*.db", "*.lock"):
        for file in directory.glob(pattern):
            file.unlink(missing_ok=True)


_opened: dict[str, Metrics] = {}
"""This process's metrics, once `open_metrics` was called: a registry takes each name once."""

_held: list[int] = []
"""The descriptors of locks, which are held until the process ends."""


def open_metrics(directory: Path, process: str) -> Metrics:
    """The metrics of this process, which is `process` to operators, shared in `directory`. The same ones ever after.

    Raises MetricsError when prometheus_client was imported before without knowing the directory, or when this process
    already shares its metrics elsewhere; OSError when the directory cannot be written.
    """
    if _opened:
        if str(directory) not in _opened:
            raise MetricsError(f"this process already shares its metrics in {next(iter(_opened))}")
        return _opened[str(directory)]
    directory.mkdir(parents=True, exist_ok=True)
    if os.environ.get(_DIRECTORY_VARIABLE) != str(directory):
        if "prometheus_client" in sys.modules:
            raise MetricsError(
                f"prometheus_client was imported before {_DIRECTORY_VARIABLE} was set to {directory}: its numbers "
                "would stay in this process. Start the process with metrics_environment(directory)."
            )
        os.environ[_DIRECTORY_VARIABLE] = str(directory)
    from prometheus_client import REGISTRY, values

    name = _hold_name(directory, process)
    for prefix in _PREFIXES:
        _allocate(directory / f"{prefix}_{name}.db")
    pid = os.getpid()

    def identify() -> str:
        return name if os.getpid() == pid else f"{name}.{os.getpid()}"  # a fork is another process

    values.ValueClass = values.MultiProcessValue(identify)  # type: ignore[no-untyped-call]
    metrics = _opened[str(directory)] = make_metrics(REGISTRY, process)
    metrics.process_starts.labels(process).inc()
    return metrics


def free_name(directory: Path, kind: str) -> str:
    """The first of `kind-0`, `kind-1` … under which no living process counts: for a process whose own name is never
    used again, so that neither the directory nor the labels grow with the number of its starts."""
    directory.mkdir(parents=True, exist_ok=True)
    taken = {name for name, _ in _living(directory)}
    return next(name for number in itertools.count() if (name := f"{kind}-{number}") not in taken)


def _hold_name(directory: Path, process: str) -> str:
    """The name under which this process counts: its own, or with its pid while another process of that name lives."""
    name = re.sub(r"[^A-Za-z0-9.-]", "-", process)  # prometheus_client takes file names apart at underscores
    for wanted in (name, f"{name}.{os.getpid()}"):
        descriptor = os.open(directory / f"{wanted}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        for _ in range(_LOCK_TRIES):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(_LOCK_PAUSE_S)  # a scrape may be looking whether anybody holds it
                continue
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()} {_pid_namespace()}\n".encode(), 0)
            _held.append(descriptor)
            return wanted
        os.close(descriptor)
    raise MetricsError(f"{directory / name}.lock and one of our own cannot be locked")


def _allocate(file: Path) -> None:
    """A file of zeros whose every block is there, unless it is there already."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if os.fstat(descriptor).st_size < _FILE_BYTES:
            os.posix_fallocate(descriptor, 0, _FILE_BYTES)
    finally:
        os.close(descriptor)


def make_metrics(registry: CollectorRegistry, process: str = "") -> Metrics:
    """The metrics of COUNTED in a registry of the caller's; kept in this process unless it was started for sharing."""
    from prometheus_client import Counter, Gauge, Histogram

    made: dict[str, Any] = {}
    for row in COUNTED:
        match row.kind:
            case Kind.COUNTER:
                made[row.field] = Counter(row.name, row.description, row.labels, registry=registry)
            case Kind.HISTOGRAM:
                made[row.field] = Histogram(
                    row.name, row.description, row.labels, registry=registry, buckets=row.buckets
                )
            case Kind.GAUGE:
                # A partition moves between workers: the one that spoke last is right.
                made[row.field] = Gauge(
                    row.name, row.description, row.labels, registry=registry, multiprocess_mode="mostrecent"
                )
    return Metrics(process, **made)


def metrics_page(
    directory: Path,
    *,
    processes: Iterable[tuple[str, int]] = (),
    parts: Mapping[str, bool] | None = None,
) -> bytes:
    """The metrics of every process that shares `directory`, added up, in Prometheus' text format.

    `processes` are (name, pid) of others that belong to the system; `parts` says what is ready, if the caller knows.
    Only rows of METRICS: a library in one of the processes may count its own things there.
    """
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    registry.register(_Page(directory, [*sharing_processes(directory), *processes], parts))
    return generate_latest(registry)


def process_page(process: str) -> bytes:
    """The metrics of this process alone, which is `process` to operators: for a part that is scraped by itself."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    registry.register(_OwnPage(process))
    return generate_latest(registry)


def sharing_processes(directory: Path) -> list[tuple[str, int]]:
    """(name, pid) of the living processes that share their metrics in `directory`, as far as /proc here shows them."""
    return [(name, pid) for name, pid in _living(directory) if pid]


def _living(directory: Path) -> list[tuple[str, int]]:
    """The names whose locks are held, each with its pid; 0 where that is one of another container's."""
    found = []
    for file in sorted(directory.glob("*.lock")):
        try:
            with file.open("rb") as opened:
                try:
                    fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    pid, _, namespace = opened.read().decode().strip().partition(" ")
                    found.append((file.stem, int(pid) if namespace == _pid_namespace() else 0))
        except (OSError, ValueError):  # gone meanwhile, or not yet written
            continue
    return found


def _pid_namespace() -> str:
    """Pids mean something only within one (namespaces(7)): containers that share a directory may have two."""
    return os.readlink("/proc/self/ns/pid")


def parse_metrics(page: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """A metrics page as numbers: (sample name, its labels sorted) to value. For the command line and for tests."""
    from prometheus_client.parser import text_string_to_metric_families

    families = text_string_to_metric_families(page.decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


class _Page:
    """The families of METRICS, as they are now, of all processes together."""

    def __init__(self, directory: Path, processes: Sequence[tuple[str, int]], parts: Mapping[str, bool] | None) -> None:
        self._directory = directory
        self._processes = processes
        self._parts = parts

    def collect(self) -> Iterator[Any]:
        from prometheus_client.multiprocess import MultiProcessCollector

        # A file that is still empty belongs to a process that was killed before it had written anything.
        files = [str(file) for file in self._directory.glob("*.db") if file.stat().st_size >= 8]
        living = {name for name, _ in _living(self._directory)}
        for family in _ours(MultiProcessCollector.merge(files)):  # type: ignore[no-untyped-call]
            # What a worker has in hand it has no more once it is gone; its partitions' lag is the next one's to say.
            family.samples = [sample for sample in family.samples if sample.labels.get("worker", "") in {"", *living}]
            yield family
        yield from _looked_at(self._processes, self._parts)


class _OwnPage:
    """The same of this process alone."""

    def __init__(self, process: str) -> None:
        self._process = process

    def collect(self) -> Iterator[Any]:
        from prometheus_client import REGISTRY

        yield from _ours(REGISTRY.collect())
        yield from _looked_at([(self._process, os.getpid())], None)


def _ours(families: Iterable[Any]) -> Iterator[Any]:
    """Those of METRICS; a description does not travel through the files."""
    descriptions = {row.name: row.description for row in COUNTED}
    for family in families:
        if family.name in descriptions:
            family.documentation = descriptions[family.name]
            yield family


def _looked_at(processes: Iterable[tuple[str, int]], parts: Mapping[str, bool] | None) -> Iterator[Any]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    rows = {row.field: row for row in LOOKED_AT}
    used = _used_by(processes)
    values: dict[str, dict[tuple[str, ...], float]] = {
        "process_memory": {(name,): usage.resident_bytes for name, usage in used.items()},
        "process_fds": {(name,): usage.open_fds for name, usage in used.items()},
        "process_max_fds": {(name,): usage.max_fds for name, usage in used.items()},
        "process_cpu": {(name,): usage.cpu_s for name, usage in used.items()},
        "process_started": {(name,): usage.start_s for name, usage in used.items()},
    }
    if parts is not None:
        values["ready"] = {(): float(bool(parts) and all(parts.values()))}
        values["part_ready"] = {(part,): float(ready) for part, ready in parts.items()}
    for field, samples in values.items():
        row = rows[field]
        make = CounterMetricFamily if row.kind is Kind.COUNTER else GaugeMetricFamily
        family = make(row.name, row.description, labels=row.labels)
        for labels, value in samples.items():
            family.add_metric(labels, value)
        yield family


# What /proc says (proc(5)). Linux only, as the whole system is.

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def usage(pid: int) -> Usage | None:
    """What a process uses; None when it is gone, or another user's."""
    try:
        # After the command's name, which may hold anything: fields from the third on.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if fields[0] in "ZX":
            return None
        return Usage(
            resident_bytes=int(fields[21]) * _PAGE_BYTES,
            open_fds=len(os.listdir(f"/proc/{pid}/fd")),
            max_fds=_max_fds(pid),
            cpu_s=(int(fields[11]) + int(fields[12])) / _TICKS,
            start_s=_boot_s() + int(fields[19]) / _TICKS,
        )
    except (OSError, IndexError):
        return None


def _used_by(processes: Iterable[tuple[str, int]]) -> dict[str, Usage]:
    used: dict[str, Usage] = {}
    for name, pid in processes:
        one = usage(pid)
        if one is None:
            continue
        before = used.get(name)
        if before is not None:
            one = Usage(
                resident_bytes=before.resident_bytes + one.resident_bytes,
                open_fds=before.open_fds + one.open_fds,
                max_fds=min(before.max_fds, one.max_fds),
                cpu_s=before.cpu_s + one.cpu_s,
                start_s=min(before.start_s, one.start_s),
            )
        used[name] = one
    return used


def _max_fds(pid: int) -> float:
    for line in Path(f"/proc/{pid}/limits").read_text().splitlines():
        if line.startswith("Max open files"):
            soft = line.split()[3]
            return float("inf") if soft == "unlimited" else float(soft)
    return float("inf")


def _boot_s() -> float:
    for line in Path("/proc/stat").read_text().splitlines():
        if line.startswith("btime "):
            return float(line.split()[1])
    return 0.0
