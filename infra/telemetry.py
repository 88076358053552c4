"""Logs as JSON lines.

One JSON object a line, whatever is logged: line breaks, control characters and broken Unicode arrive escaped. Both
structlog and the standard library's loggers come out the same way. Ids of the command at hand are set once with
`bind_ids` and appear in every line that its task logs. Numbers are in `metrics.py`.

Importing this module does not import structlog; the engine uses neither it nor that.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, TextIO

from infra.tracing import add_trace_ids

_LIBRARY_LEVELS: Mapping[str, int] = {
    # Libraries whose "info" is chatter to an operator of this system.
    "aiokafka": logging.WARNING,
    "asyncio": logging.WARNING,
    "faust": logging.WARNING,
    "mode": logging.WARNING,
    "ray": logging.WARNING,
    "aiohttp.access": logging.WARNING,
    "urllib3": logging.WARNING,
    "cassandra": logging.ERROR,  # warns twice a second, with a traceback, while a node is away; its callers are told
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
        add_trace_ids,
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
