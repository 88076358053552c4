"""`concord top` and `concord slis`: what a running system's metrics page says, to people and programs.

Both look twice at the page and show the difference, as Prometheus would; `slis` can also ask a Prometheus.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scripts.cli.errors import CommandError
from scripts.cli.exit_codes import ExitCode
from scripts.cli.options import DEFAULT_DIRECTORY, Data, Shape, command
from scripts.cli.output import Output
from scripts.cli.system import System

if TYPE_CHECKING:
    from infra.monitoring.readings import Labels, Page, Readings

ANSWER_WITHIN_S = 10.0

PARTITIONS_SHOWN = 12
"""Of those that lag, on a terminal; JSON has all."""

Url = Annotated[str, typer.Option("--url", metavar="URL", help="A metrics page, instead of that of the system in DIR.")]


def register(app: typer.Typer) -> None:
    @command(app, "top")
    def top(
        every: Annotated[float, typer.Option("--every", min=0.1, help="Seconds between two looks.")] = 2.0,
        times: Annotated[
            int | None,
            typer.Option("--times", min=1, help="How often to show (default: once, on a terminal for ever)."),
        ] = None,
        url: Url = "",
        data: Data = DEFAULT_DIRECTORY,
        output: Shape = None,
    ) -> None:
        """What the system is doing: rates, latency, lag, doubt, storage, processes."""
        shape = Output.of(output)
        if times is None and not shape.human:
            times = 1
        shown = (summary(readings, now_s=time.time()) for readings in looks(_page_url(url, data), every, times))
        if shape.human:
            _show_live(shown)
        else:
            for one in shown:
                shape.json(one)

    @command(app, "slis")
    def slis(
        seconds: Annotated[
            float, typer.Option("--seconds", min=0.0, help="Seconds between the two looks; 0: since the start.")
        ] = 10.0,
        prometheus: Annotated[
            str, typer.Option("--prometheus", metavar="URL", help="Ask this Prometheus, not a metrics page.")
        ] = "",
        window: Annotated[str, typer.Option("--window", help="Over which time Prometheus is asked (5m, 30d).")] = "5m",
        url: Url = "",
        data: Data = DEFAULT_DIRECTORY,
        output: Shape = None,
    ) -> None:
        """The service level indicators: their targets, and what they are."""
        from infra.monitoring.slis import SLIS

        if prometheus:
            values = {sli.name: ask_prometheus(prometheus, sli.query(window)) for sli in SLIS}
        else:
            readings = next(looks(_page_url(url, data), seconds, 1))
            values = {sli.name: sli.reading(readings) for sli in SLIS}
        shape = Output.of(output)
        rows: list[dict[str, Any]] = []
        for sli in SLIS:
            value = values[sli.name]
            met = sli.met(value)
            row = {"name": sli.name, "indicator": sli.title, "source": sli.source, "target": sli.target_shown}
            if shape.human:
                rows.append({**row, "is": sli.shown(value), "met": {True: "yes", False: "NO", None: ""}[met]})
            else:
                rows.append({**row, "value": _number(value), "unit": sli.unit.value, "met": met})
        shape.table(rows, ("indicator", "source", "target", "is", "met"))


# Looking.


def looks(url: str, every_s: float, times: int | None) -> Iterator[Readings]:
    """Two looks at a page `every_s` apart, and on and on; with 0, one look and what it says since the start."""
    from infra.monitoring.readings import Readings

    before: Page = {}
    at_s = 0.0
    if every_s > 0:
        before, at_s = _look(url)
    shown = 0
    while times is None or shown < times:
        time.sleep(every_s)
        after, now_s = _look(url)
        # Since the start: the oldest process of the system says how long that is.
        started_s = min((value for (name, _), value in after.items() if name == _STARTED), default=time.time())
        yield Readings(before, after, now_s - at_s if every_s > 0 else max(0.0, time.time() - started_s))
        before, at_s = after, now_s
        shown += 1


_STARTED = "concord_process_start_time_seconds"


def _look(url: str) -> tuple[Page, float]:
    """A page, and when it was looked at (monotonic clock). Raises CommandError (UNREACHABLE)."""
    from infra.metrics import parse_metrics

    return parse_metrics(_fetch(url)), time.monotonic()


def ask_prometheus(url: str, promql: str) -> float:
    """The value of an expression with one value; NaN where it has none. Raises CommandError."""
    import json
    from urllib.parse import urlencode

    answer = json.loads(_fetch(f"{url.rstrip('/')}/api/v1/query?{urlencode({'query': promql})}"))
    found = answer["data"]["result"]
    return float(found[0]["value"][1]) if found else math.nan


def _fetch(url: str) -> bytes:
    import urllib.request
    from http.client import HTTPException

    if not url.startswith(("http://", "https://")):
        raise CommandError(f"{url!r} is no address of a page: it begins with http:// or https://.", ExitCode.USAGE)
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_WITHIN_S) as answer:
            page: bytes = answer.read()
            return page
    except (OSError, HTTPException) as error:
        raise CommandError(
            f"{url} cannot be read ({error}). Is the system running? `concord doctor` looks.", ExitCode.UNREACHABLE
        ) from error


def _page_url(url: str, directory: Path) -> str:
    if url:
        return url if "/" in url.partition("://")[2] else f"{url}/metrics"
    system = System.find(directory)
    if not system.running or "http" not in system.runtime:
        raise CommandError(
            f"No system is running in {directory}. Start it with `concord up`, name its directory with --data, or a "
            "metrics page with --url.",
            ExitCode.UNREACHABLE,
        )
    return f"{system.runtime['http']}/metrics"


# Summing up.


def summary(readings: Readings, *, now_s: float) -> dict[str, Any]:
    """What there is to see, as JSON. Numbers that nothing was observed for are null. `now_s` is Unix time."""
    return {
        "seconds": round(readings.seconds, 3),
        "ready": _flag(readings.gauge("concord_ready")),
        "not_ready": sorted(labels["part"] for labels, value in readings.gauges("concord_part_ready") if not value),
        "domains": _domains(readings),
        "transactions": _transactions(readings),
        "in_doubt": _in_doubt(readings, now_s),
        "dead_letters": int(sum(value for _, value in readings.gauges("concord_dead_letters_total"))),
        "lag": _lag(readings, now_s),
        "storage": _storage(readings),
        "storage_errors": {
            error: int(count)
            for error, count in sorted(readings.increases("concord_storage_errors_total", "error").items())
            if count
        },
        "processes": _processes(readings, now_s),
    }


def _domains(readings: Readings) -> list[dict[str, Any]]:
    found = []
    for domain, answered in sorted(readings.increases("concord_commands_total", "domain").items()):

        def of(labels: Labels, domain: str = domain) -> bool:
            return labels["domain"] == domain

        outcomes = readings.increases("concord_commands_total", "outcome", of)
        found.append(
            {
                "domain": domain,
                "commands_per_s": _number(answered / readings.seconds),
                "committed": int(outcomes.get("committed", 0)),
                "refused": int(outcomes.get("refused", 0)),
                "dead_lettered": int(outcomes.get("dead-lettered", 0)),
                "latency_p50_s": _number(readings.quantile(0.5, "concord_command_latency_seconds", of)),
                "latency_p99_s": _number(readings.quantile(0.99, "concord_command_latency_seconds", of)),
                "transaction_p99_s": _number(readings.quantile(0.99, "concord_transaction_seconds", of)),
            }
        )
    return found


def _transactions(readings: Readings) -> dict[str, Any]:
    from infra.monitoring.slis import SLIS

    (abort_ratio,) = (sli for sli in SLIS if sli.name == "abort_ratio")
    by_reason = readings.increases("concord_transactions_total", "reason", lambda labels: labels["reason"] != "")
    committed = readings.rate("concord_transactions_total", lambda labels: labels["outcome"] == "committed")
    return {
        "committed_per_s": _number(committed),
        "abort_ratio": _number(abort_ratio.reading(readings)),
        "not_committed": {reason: int(count) for reason, count in sorted(by_reason.items()) if count},
    }


def _in_doubt(readings: Readings, now_s: float) -> dict[str, Any]:
    since = [value for _, value in readings.gauges("concord_oldest_in_doubt_timestamp_seconds") if value]
    pending = readings.gauge("concord_intents_pending")
    return {
        "pending": None if math.isnan(pending) else int(pending),
        "oldest_s": round(max(0.0, now_s - min(since)), 1) if since else None,
    }


def _lag(readings: Readings, now_s: float) -> list[dict[str, Any]]:
    """Every partition, the one that lags most first."""
    ages = {
        name: {(labels["topic"], labels["partition"]): value for labels, value in readings.gauges(series)}
        for name, series in (
            ("oldest", "concord_oldest_unacknowledged_timestamp_seconds"),
            ("tried", "concord_last_progress_timestamp_seconds"),
        )
    }
    found = []
    for labels, messages in readings.gauges("concord_consumer_lag_messages"):
        partition = (labels["topic"], labels["partition"])
        oldest, tried = (ages[name].get(partition, 0.0) for name in ("oldest", "tried"))
        found.append(
            {
                "topic": partition[0],
                "partition": int(partition[1]),
                "messages": int(messages),
                "oldest_s": round(max(0.0, now_s - oldest), 1) if oldest else None,
                "tried_s_ago": round(max(0.0, now_s - tried), 1) if tried else None,
            }
        )
    return sorted(found, key=lambda row: (-row["messages"], row["topic"], row["partition"]))


def _storage(readings: Readings) -> list[dict[str, Any]]:
    calls: dict[tuple[str, str], float] = {}
    for labels, _ in readings.gauges("concord_storage_seconds_count"):
        calls[labels["storage"], labels["operation"]] = 0.0
    found = []
    for storage, operation in sorted(calls):

        def of(labels: Labels, storage: str = storage, operation: str = operation) -> bool:
            return labels["storage"] == storage and labels["operation"] == operation

        found.append(
            {
                "storage": storage,
                "operation": operation,
                "calls_per_s": _number(readings.rate("concord_storage_seconds_count", of)),
                "p50_s": _number(readings.quantile(0.5, "concord_storage_seconds", of)),
                "p99_s": _number(readings.quantile(0.99, "concord_storage_seconds", of)),
            }
        )
    return found


def _processes(readings: Readings, now_s: float) -> list[dict[str, Any]]:
    def by_process(name: str) -> dict[str, float]:
        return {labels["process"]: value for labels, value in readings.gauges(name)}

    descriptors, started, starts = map(
        by_process, ("concord_process_open_fds", _STARTED, "concord_process_starts_total")
    )
    cpu_s = readings.increases("concord_process_cpu_seconds_total", "process")
    return [
        {
            "process": process,
            "memory_bytes": int(memory),
            "open_fds": int(descriptors.get(process, 0)),
            "cpu_cores": _number(cpu_s.get(process, 0.0) / readings.seconds),
            "age_s": max(0, round(now_s - started[process])) if process in started else None,
            "restarts": max(0, int(starts.get(process, 1)) - 1),
        }
        for process, memory in sorted(by_process("concord_process_resident_memory_bytes").items())
    ]


def _number(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None


def _flag(value: float) -> bool | None:
    return None if math.isnan(value) else bool(value)


# Showing, to people.


def _show_live(summaries: Iterator[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console()
    with Live(Text("Looking …"), console=console, auto_refresh=False) as live:
        for one in summaries:
            live.update(drawn(one), refresh=True)


def drawn(one: Mapping[str, Any]) -> Any:
    """A summary as rich draws it."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    def table(title: str, columns: Mapping[str, Callable[[Mapping[str, Any]], str]], rows: Any) -> Table:
        made = Table(
            title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0)
        )
        for index, column in enumerate(columns):
            made.add_column(column, justify="left" if index == 0 else "right")
        for row in rows:
            made.add_row(*(show(row) for show in columns.values()))
        return made

    behind = [row for row in one["lag"] if row["messages"]]
    more = len(behind) - PARTITIONS_SHOWN
    return Group(
        Text(_headline(one), style="" if one["ready"] is not False else "bold red"),
        table(
            "\nCommands",
            {
                "domain": lambda row: row["domain"],
                "per second": lambda row: _plain(row["commands_per_s"]),
                "committed": lambda row: str(row["committed"]),
                "refused": lambda row: str(row["refused"]),
                "dead letters": lambda row: str(row["dead_lettered"]),
                "p50": lambda row: _time(row["latency_p50_s"]),
                "p99": lambda row: _time(row["latency_p99_s"]),
                "transaction p99": lambda row: _time(row["transaction_p99_s"]),
            },
            one["domains"],
        ),
        table(
            f"\nLag{'' if behind else ': none'}{f' (and {more} partitions more)' if more > 0 else ''}",
            {
                "partition": lambda row: f"{row['topic']}[{row['partition']}]",
                "messages": lambda row: str(row["messages"]),
                "oldest": lambda row: _time(row["oldest_s"]),
                "last tried": lambda row: _time(row["tried_s_ago"]),
            }
            if behind
            else {},
            behind[:PARTITIONS_SHOWN],
        ),
        table(
            "\nStorage",
            {
                "operation": lambda row: f"{row['storage']} {row['operation']}",
                "per second": lambda row: _plain(row["calls_per_s"]),
                "p50": lambda row: _time(row["p50_s"]),
                "p99": lambda row: _time(row["p99_s"]),
            },
            one["storage"],
        ),
        table(
            "\nProcesses",
            {
                "process": lambda row: row["process"],
                "memory": lambda row: f"{row['memory_bytes'] / 2**20:.0f} MiB",
                "files": lambda row: str(row["open_fds"]),
                "cores": lambda row: _plain(row["cpu_cores"]),
                "age": lambda row: _time(row["age_s"]),
                "restarts": lambda row: str(row["restarts"] or ""),
            },
            one["processes"],
        ),
    )


def _headline(one: Mapping[str, Any]) -> str:
    state = {True: "ready", False: f"NOT READY: {', '.join(one['not_ready'])}", None: "one part of a system"}[
        one["ready"]
    ]
    doubt = one["in_doubt"]
    aborts = one["transactions"]["abort_ratio"]
    return "   ".join(
        (
            state,
            f"{_plain(one['transactions']['committed_per_s'])} transactions/s",
            f"aborts {'-' if aborts is None else f'{aborts * 100:.2f} %'}",
            f"in doubt {doubt['pending'] or 0}" + (f", for {_time(doubt['oldest_s'])}" if doubt["oldest_s"] else ""),
            f"dead letters {one['dead_letters']}",
            f"storage errors {sum(one['storage_errors'].values())}",
        )
    )


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, _ = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
