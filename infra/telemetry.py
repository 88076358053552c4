"""Logs as JSON lines, metrics as a table.

Logs. One JSON object a line, whatever is logged: line breaks, control characters and broken Unicode arrive escaped.
Both structlog and the standard library's loggers come out the same way. Ids of the command at hand are set once with
`bind_ids` and appear in every line that its task logs.

Metrics. Every metric is a row of METRICS. Several processes of one machine count together: each keeps its numbers in
files of one directory (prometheus_client's multiprocess mode), and `metrics_page` adds them up. That mode is chosen
when prometheus_client is first imported, so a process needs `metrics_environment` in its environment when it starts,
or must call `open_metrics` before anything imports prometheus_client.

Importing this module imports neither structlog nor prometheus_client; the engine uses neither it nor them.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

# Logs.

_LIBRARY_LEVELS: Mapping[str, int] = {
    # Libraries whose "info" is chatter to an operator of this system.
    "aiokafka": logging.WARNING,
    "asyncio": logging.WARNING,
    "faust": logging.WARNING,
    "mode": logging.WARNING,
    "ray": logging.WARNING,
    "aiohttp.access": logging.WARNING,
    "urllib3": logging.WARNING,
}

_ID_NAMES = ("command_id", "tx_id", "correlation_id")


def configure_logging(level: str = "info", *, process: str, file: Path | None = None) -> None:
    """Send every log line of this process, as JSON, to stderr or to `file`.

    `process` names the process in each line (`worker-0`, `orders-1`). Calling again replaces what was there.
    Raises ValueError for an unknown level.
    """
    import structlog

    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"{level!r} is no log level")

    def name_process(_logger: Any, _method: str, event: Any) -> Any:
        event["process"] = process
        return event

    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.stdlib.ExtraAdder(),
        name_process,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.FileHandler(file, encoding="utf-8") if file is not None else _StderrHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(serializer=_to_json_line),
            ],
        )
    )
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(number)
    for name, least in _LIBRARY_LEVELS.items():
        logging.getLogger(name).setLevel(max(least, number))
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught


def get_logger(name: str) -> Any:
    """A structlog logger: `get_logger(__name__).info("prepared", records=3)`."""
    import structlog

    return structlog.stdlib.get_logger(name)


@contextmanager
def bind_ids(
    *, command_id: str | None = None, tx_id: str | None = None, correlation_id: str | None = None
) -> Iterator[None]:
    """Put these ids into every line logged inside, by this task and the tasks that it starts."""
    import structlog

    given = dict(zip(_ID_NAMES, (command_id, tx_id, correlation_id), strict=True))
    with structlog.contextvars.bound_contextvars(**{name: value for name, value in given.items() if value is not None}):
        yield


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to whatever sys.stderr is at the time of the line; a closed stderr must not end a worker."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, _value: TextIO) -> None:
        raise AttributeError("the stream is always sys.stderr")

    def handleError(self, record: logging.LogRecord) -> None:
        """Nowhere is left to say it."""


def _to_json_line(event: Any, **_options: Any) -> str:
    # ASCII only: CR, LF, U+2028 and lone surrogates all become escapes, so a line stays a line for every reader.
    try:
        return json.dumps(event, ensure_ascii=True, default=_readable, allow_nan=False)
    except (ValueError, TypeError, RecursionError):
        return json.dumps({str(name): repr(value) for name, value in event.items()}, ensure_ascii=True)


def _readable(value: object) -> str:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).decode("utf-8", "backslashreplace")
    if isinstance(value, Enum):
        return str(value.value)
    return str(value)


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    logging.getLogger("concord").critical("uncaught exception", exc_info=(kind, error, trace))


# Metrics.


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


_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

METRICS: tuple[Metric, ...] = (
    Metric(
        "commands", Kind.COUNTER, "concord_commands", "Commands answered, by outcome.", ("domain", "type", "outcome")
    ),
    Metric(
        "transaction_seconds",
        Kind.HISTOGRAM,
        "concord_transaction_seconds",
        "From the first try of a transaction to its end, by how it ended.",
        ("domain", "outcome"),
        _SECONDS,
    ),
    Metric("conflicts", Kind.COUNTER, "concord_conflicts", "Transactions aborted by a conflict.", ("domain",)),
    Metric("retries", Kind.COUNTER, "concord_retries", "Commands tried again, by cause.", ("domain", "cause")),
    Metric(
        "recovered",
        Kind.COUNTER,
        "concord_recovered_records",
        "Records in doubt that were settled: rolled_forward or rolled_back.",
        ("kind",),
    ),
    Metric(
        "dead_letters",
        Kind.COUNTER,
        "concord_dead_letters",
        "Messages sent to a dead-letter topic, by reason.",
        ("topic", "reason"),
    ),
    Metric(
        "consumer_lag",
        Kind.GAUGE,
        "concord_consumer_lag_messages",
        "Messages of a partition that are not acknowledged yet.",
        ("topic", "partition"),
    ),
    Metric(
        "last_progress",
        Kind.GAUGE,
        "concord_last_progress_timestamp_seconds",
        "When something was last tried for a partition (Unix time).",
        ("topic", "partition"),
    ),
    Metric("batch_size", Kind.HISTOGRAM, "concord_batch_commands", "Commands in a batch.", ("domain",), _COUNTS),
    Metric("actor_restarts", Kind.COUNTER, "concord_actor_restarts", "Starts of an actor after its first.", ("actor",)),
)

_DIRECTORY_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


class MetricsError(RuntimeError):
    """Metrics cannot be shared between processes as this process was started."""


@dataclass(frozen=True)
class Metrics:
    """The metrics of METRICS, ready to be counted: `metrics.conflicts.labels(domain="orders").inc()`."""

    commands: Counter
    transaction_seconds: Histogram
    conflicts: Counter
    retries: Counter
    recovered: Counter
    dead_letters: Counter
    consumer_lag: Gauge
    last_progress: Gauge
    batch_size: Histogram
    actor_restarts: Counter


def metrics_environment(directory: Path) -> dict[str, str]:
    """What a process that shares its metrics in `directory` must have in its environment when it starts.

    Give it to our own workers and actors, not to a whole Ray cluster: Ray's agents count with prometheus_client too.
    """
    return {_DIRECTORY_VARIABLE: str(directory)}


def clear_metrics(directory: Path) -> None:
    """Forget the counts of earlier runs, whose processes are gone. Call before any process of this run starts."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in directory.glob("*.db"):
        file.unlink(missing_ok=True)


def open_metrics(directory: Path) -> Metrics:
    """This process's metrics, shared in `directory`. Once a process.

    Raises MetricsError when prometheus_client was imported before without knowing the directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if os.environ.get(_DIRECTORY_VARIABLE) != str(directory):
        if "prometheus_client" in sys.modules:
            raise MetricsError(
                f"prometheus_client was imported before {_DIRECTORY_VARIABLE} was set to {directory}: its numbers "
                "would stay in this process. Start the process with metrics_environment(directory)."
            )
        os.environ[_DIRECTORY_VARIABLE] = str(directory)
    from prometheus_client import REGISTRY

    return make_metrics(REGISTRY)


def make_metrics(registry: CollectorRegistry) -> Metrics:
    """The table's metrics in a registry of the caller's; kept in this process unless it was started for sharing."""
    from prometheus_client import Counter, Gauge, Histogram

    made: dict[str, Any] = {}
    for row in METRICS:
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
    return Metrics(**made)


def metrics_page(directory: Path) -> bytes:
    """The metrics of every process that shares `directory`, added up, in Prometheus' text format.

    Only rows of METRICS: a library in one of the processes may count its own things there.
    """
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.multiprocess import MultiProcessCollector

    registry = CollectorRegistry()
    registry.register(_Ours(MultiProcessCollector(None, path=str(directory))))  # type: ignore[no-untyped-call]
    return generate_latest(registry)


def parse_metrics(page: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """A metrics page as numbers: (sample name, its labels sorted) to value. For the command line and for tests."""
    from prometheus_client.parser import text_string_to_metric_families

    families = text_string_to_metric_families(page.decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


class _Ours:
    """Lets only the families of METRICS through, each with its own description."""

    def __init__(self, collector: Any) -> None:
        self._collector = collector

    def collect(self) -> Iterable[Any]:
        descriptions = {row.name: row.description for row in METRICS}
        families: Sequence[Any] = list(self._collector.collect())
        for family in families:
            if family.name in descriptions:
                family.documentation = descriptions[family.name]  # it does not travel through the files
                yield family
