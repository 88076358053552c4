from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from infra.telemetry import bind_ids, configure_logging, get_logger

HOSTILE = [
    "two\nlines",
    "carriage\r\nreturn",
    '"}\n{"event": "forged", "level": "critical"}',
    "separator \u2028 and \u2029 and \x85 and \x0b\x0c",
    "lone surrogate \ud800",
    "nul \x00 and escape \x1b[31m",
    "日本語 😀",
]


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    root, hook = logging.getLogger(), sys.excepthook
    handlers, level = list(root.handlers), root.level
    for handler in handlers:
        root.removeHandler(handler)  # pytest's own, given back below
    yield tmp_path / "log.jsonl"
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level)
    sys.excepthook = hook
    logging.captureWarnings(False)


def lines(log: Path) -> list[dict[str, Any]]:
    """Every line as an object; splitlines knows more line ends than '\\n', so nothing hides."""
    return [json.loads(line) for line in log.read_bytes().decode("ascii").splitlines()]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_line_is_one_json_object_whatever_is_logged(log: Path, text: str) -> None:
    configure_logging("info", process="test", file=log)

    get_logger("ours").info(text, field=text)
    logging.getLogger("theirs").warning("%s", text, extra={"field": text})

    assert [(line["event"], line["field"]) for line in lines(log)] == [(text, text), (text, text)]


def test_a_line_says_when_where_how_bad_and_by_whom(log: Path) -> None:
    configure_logging("info", process="worker-0", file=log)

    get_logger("streams.app").warning("lagging", partition=3)

    (line,) = lines(log)
    assert (line["process"], line["logger"], line["level"]) == ("worker-0", "streams.app", "warning")
    assert (line["event"], line["partition"]) == ("lagging", 3)
    assert line["timestamp"].endswith("Z")
    logged_at = datetime.fromisoformat(line["timestamp"])
    assert abs((datetime.now(UTC) - logged_at).total_seconds()) < 3600


async def test_ids_belong_to_the_task_that_bound_them(log: Path) -> None:
    configure_logging("info", process="test", file=log)
    logger = get_logger("ours")

    async def handle(command_id: str) -> None:
        with bind_ids(command_id=command_id, correlation_id="c"):
            await asyncio.sleep(0)
            logger.info("handled")
            with bind_ids(tx_id=f"tx-{command_id}"):
                logging.getLogger("theirs").info("committed")

    await asyncio.gather(handle("1"), handle("2"))
    logger.info("idle")

    found = {
        (line["event"], line.get("command_id"), line.get("tx_id"), line.get("correlation_id")) for line in lines(log)
    }
    assert found == {
        *[("handled", number, None, "c") for number in ("1", "2")],
        *[("committed", number, f"tx-{number}", "c") for number in ("1", "2")],
        ("idle", None, None, None),
    }


def test_values_that_json_does_not_know_do_not_stop_the_line(log: Path) -> None:
    configure_logging("info", process="test", file=log)
    circle: list[object] = []
    circle.append(circle)

    get_logger("ours").info("odd", path=Path("/x"), data=b"\xff\n", number=float("nan"), circle=circle)

    (line,) = lines(log)
    assert "/x" in line["path"]
    assert "xff" in line["data"]


def test_an_exception_is_one_field(log: Path) -> None:
    configure_logging("info", process="test", file=log)
    try:
        raise ValueError("broken\nin two")
    except ValueError:
        get_logger("ours").exception("failed")

    (line,) = lines(log)
    assert "ValueError: broken\nin two" in line["exception"]


def test_what_is_below_the_level_is_not_logged(log: Path) -> None:
    configure_logging("warning", process="test", file=log)

    get_logger("ours").info("quiet")
    logging.getLogger("theirs").info("quiet")
    logging.getLogger("aiokafka").warning("loud")

    assert [line["event"] for line in lines(log)] == ["loud"]


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="'loud' is no log level"):
        configure_logging("loud", process="test")


def test_an_uncaught_exception_is_a_json_line_on_stderr() -> None:
    program = (
        "from infra.telemetry import configure_logging\nconfigure_logging(process='w')\nraise SystemError('a\\nb')"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)

    (line,) = [json.loads(line) for line in ended.stderr.splitlines()]
    assert (line["level"], line["process"]) == ("critical", "w")
    assert "SystemError: a\nb" in line["exception"]
    assert ended.returncode == 1


def test_importing_telemetry_and_metrics_imports_neither_structlog_nor_prometheus() -> None:
    modules = "infra.telemetry, infra.metrics"
    program = f"import sys, {modules}; print({{'structlog', 'prometheus_client'}} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)

    assert ended.stdout.strip() == "set()"
