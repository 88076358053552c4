"""Grafana's dashboard, from a table of panels: `python -m infra.monitoring` writes it.

Every expression uses a metric of `infra/metrics.py` or a series that `rules/concord.yml` records; a test says so.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

_COLUMNS = 24
_HEIGHT = 8
_STAT_HEIGHT = 4


@dataclass(frozen=True)
class Panel:
    """One graph. `queries` are (expression, legend); `unit` is one of Grafana's."""

    title: str
    description: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    stat: bool = False
    thresholds: tuple[tuple[float, str], ...] = ()
    width: int = 8


@dataclass(frozen=True)
class Section:
    title: str
    panels: tuple[Panel, ...]


SECTIONS: tuple[Section, ...] = (
    Section(
        "At a glance",
        (
            Panel(
                "Ready",
                "1 when every part is ready.",
                (("min(concord_ready)", ""),),
                stat=True,
                thresholds=((0, "red"), (1, "green")),
                width=4,
            ),
            Panel("Commands", "Answered each second.", (("sum(concord:commands:rate5m)", ""),), "cps", True, (), 4),
            Panel(
                "Publish to result, p99",
                "The slowest domain. Target: below 1 s.",
                (("max(concord:command_latency_seconds:p99_5m)", ""),),
                "s",
                True,
                ((0, "green"), (1, "red")),
                4,
            ),
            Panel(
                "Aborts",
                "Share of the transactions that abort. Target: below 0.1 %, alarm at 1 %.",
                (("concord:transactions:abort_ratio5m", ""),),
                "percentunit",
                True,
                ((0, "green"), (0.001, "orange"), (0.01, "red")),
                4,
            ),
            Panel(
                "Lag",
                "Messages that wait in all topics.",
                (("sum(concord:consumer_lag:messages)", ""),),
                "short",
                True,
                ((0, "green"), (1000, "orange")),
                4,
            ),
            Panel(
                "Dead letters",
                "In the last hour.",
                (("sum(increase(concord_dead_letters_total[1h]))", ""),),
                "short",
                True,
                ((0, "green"), (1, "red")),
                4,
            ),
        ),
    ),
    Section(
        "Commands",
        (
            Panel(
                "Commands by outcome",
                "Answered each second.",
                (("sum by (outcome, reason) (rate(concord_commands_total[5m]))", "{{outcome}} {{reason}}"),),
                "cps",
            ),
            Panel(
                "Commands by type",
                "Answered each second.",
                (("sum by (domain, type) (rate(concord_commands_total[5m]))", "{{domain}} {{type}}"),),
                "cps",
            ),
            Panel(
                "Errors",
                "Dead letters and commands given up after conflicts, as a share.",
                (("concord:commands:error_ratio5m", "{{domain}}"),),
                "percentunit",
            ),
            Panel(
                "Publish to result",
                "From the timestamp of a command to the broker's confirmation of its result.",
                (
                    ("concord:command_latency_seconds:p50_5m", "{{domain}} p50"),
                    ("concord:command_latency_seconds:p90_5m", "{{domain}} p90"),
                    ("concord:command_latency_seconds:p95_5m", "{{domain}} p95"),
                    ("concord:command_latency_seconds:p99_5m", "{{domain}} p99"),
                ),
                "s",
            ),
            Panel(
                "Batches",
                "Mean number of commands in a batch.",
                (
                    (
                        "sum by (domain) (rate(concord_batch_commands_sum[5m])) "
                        "/ sum by (domain) (rate(concord_batch_commands_count[5m]))",
                        "{{domain}}",
                    ),
                ),
            ),
            Panel(
                "Events and dead letters",
                "Published each second.",
                (
                    ("sum by (domain) (rate(concord_events_published_total[5m]))", "events of {{domain}}"),
                    ("sum by (topic, reason) (rate(concord_dead_letters_total[5m])) > 0", "{{topic}} {{reason}}"),
                ),
                "cps",
            ),
        ),
    ),
    Section(
        "Transactions",
        (
            Panel(
                "Transactions by outcome",
                "Each second. A wounded one made room for an older one before it had written anything.",
                (("sum by (outcome, reason) (rate(concord_transactions_total[5m])) > 0", "{{outcome}} {{reason}}"),),
                "cps",
            ),
            Panel(
                "Duration",
                "From the first try of a command's transaction to its end.",
                (
                    ("concord:transaction_seconds:p50_5m", "{{domain}} p50"),
                    ("concord:transaction_seconds:p99_5m", "{{domain}} p99"),
                ),
                "s",
            ),
            Panel(
                "In doubt",
                "Age of the oldest transaction that is not settled.",
                (("concord:in_doubt:age_seconds", "{{coordinator}}"),),
                "s",
            ),
            Panel(
                "Intents and recovery",
                "Transactions not seen settled at the last sweep; records in doubt that were settled each second.",
                (
                    ("sum by (coordinator) (concord_intents_pending)", "{{coordinator}} pending"),
                    ("sum by (kind) (rate(concord_recovered_records_total[5m]))", "{{kind}} /s"),
                ),
            ),
            Panel(
                "Pruned rows",
                "Rows of tables that grow with history, deleted in each hour.",
                (("sum by (table) (increase(concord_pruned_rows_total[1h]))", "{{table}}"),),
            ),
        ),
    ),
    Section(
        "Kafka",
        (
            Panel(
                "Lag",
                "Messages not acknowledged, by topic.",
                (("concord:consumer_lag:messages", "{{topic}}"),),
            ),
            Panel(
                "Age of the oldest message not done",
                "As a share of the time that its topic keeps it. Alarm at one half.",
                (("concord:consumer_lag:retention_ratio", "{{topic}}"),),
                "percentunit",
            ),
            Panel(
                "In flight",
                "What workers and actors hold, and how near that is to the bound at which they take no more.",
                (
                    ("concord_worker_in_flight_messages", "{{worker}} messages"),
                    ("concord_worker_waiting_bytes / concord_worker_waiting_bytes_limit", "{{worker}} full"),
                    ("concord_actor_commands_in_hand", "{{actor}} commands"),
                    ("concord_actor_commands_in_hand / concord_actor_commands_in_hand_limit", "{{actor}} full"),
                ),
            ),
            Panel(
                "Time since something was tried",
                "Of partitions in which something waits.",
                (
                    (
                        "(time() - max by (topic, partition) (concord_last_progress_timestamp_seconds)) "
                        "and (max by (topic, partition) (concord_consumer_lag_messages) > 0)",
                        "{{topic}}[{{partition}}]",
                    ),
                ),
                "s",
            ),
        ),
    ),
    Section(
        "Storage",
        (
            Panel(
                "Calls",
                "Each second, by operation.",
                (
                    (
                        "sum by (storage, operation) (rate(concord_storage_seconds_count[5m]))",
                        "{{storage}} {{operation}}",
                    ),
                ),
                "ops",
            ),
            Panel(
                "Duration, p99",
                "By operation.",
                (("concord:storage_seconds:p99_5m", "{{storage}} {{operation}}"),),
                "s",
            ),
            Panel(
                "Time spent, by namespace",
                "Seconds of calls in each second.",
                (
                    (
                        "sum by (storage_namespace) (rate(concord_storage_seconds_sum[5m]))",
                        "{{storage_namespace}}",
                    ),
                ),
            ),
            Panel(
                "Errors",
                "Calls each second that were not served, or not in time.",
                (("sum by (storage, error) (rate(concord_storage_errors_total[5m]))", "{{storage}} {{error}}"),),
                "ops",
            ),
        ),
    ),
    Section(
        "Processes",
        (
            Panel(
                "Memory",
                "Resident, by part.",
                (("sum by (process) (concord_process_resident_memory_bytes)", "{{process}}"),),
                "bytes",
            ),
            Panel(
                "CPU",
                "Cores in use, by part.",
                (("sum by (process) (rate(concord_process_cpu_seconds_total[5m]))", "{{process}}"),),
            ),
            Panel(
                "Open file descriptors",
                "As a share of the limit.",
                (("max by (process) (concord_process_open_fds / concord_process_max_fds)", "{{process}}"),),
                "percentunit",
            ),
            Panel(
                "Restarts",
                "Starts of actors and workers in a quarter of an hour.",
                (("sum by (process) (increase(concord_process_starts_total[15m])) > 0", "{{process}}"),),
            ),
            Panel(
                "Age",
                "Time since the start of each part.",
                (("time() - min by (process) (concord_process_start_time_seconds)", "{{process}}"),),
                "s",
            ),
            Panel("Parts that are not ready", "By name.", (("concord_part_ready == 0", "{{part}}"),)),
        ),
    ),
)


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    top = 0
    for section in SECTIONS:
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": section.title,
                "collapsed": False,
                "gridPos": {"h": 1, "w": _COLUMNS, "x": 0, "y": top},
                "panels": [],
            }
        )
        top += 1
        left = height = 0
        for panel in section.panels:
            if left + panel.width > _COLUMNS:
                left, top = 0, top + height
            height = _STAT_HEIGHT if panel.stat else _HEIGHT
            panels.append(_panel(panel, len(panels) + 1, {"h": height, "w": panel.width, "x": left, "y": top}))
            left += panel.width
        top += height
    return {
        "uid": "concord",
        "title": "Concord",
        "tags": ["concord"],
        "timezone": "browser",
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "schemaVersion": 39,
        "version": 1,
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {
                    "name": "datasource",
                    "label": "Prometheus",
                    "type": "datasource",
                    "query": "prometheus",
                    "current": {},
                    "hide": 0,
                }
            ]
        },
        "annotations": {
            "list": [
                {
                    "name": "Alerts",
                    "datasource": _SOURCE,
                    "enable": True,
                    "expr": 'ALERTS{alertname=~"Concord.*",alertstate="firing"}',
                    "titleFormat": "{{alertname}}",
                    "iconColor": "red",
                }
            ]
        },
        "panels": panels,
    }


_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    steps = [
        {"color": color, "value": None if index == 0 else value}
        for index, (value, color) in enumerate(panel.thresholds or ((0, "green"),))
    ]
    defaults: dict[str, Any] = {
        "unit": panel.unit,
        "thresholds": {"mode": "absolute", "steps": steps},
        "color": {"mode": "thresholds" if panel.stat else "palette-classic"},
    }
    if panel.stat:
        options: dict[str, Any] = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value"}
    else:
        defaults |= {"min": 0, "custom": {"lineWidth": 1, "fillOpacity": 8, "showPoints": "never"}}
        options = {
            "legend": {"displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    return {
        "id": number,
        "type": "stat" if panel.stat else "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": _SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": _SOURCE,
                "expr": expression,
                "legendFormat": legend or "__auto",
                "range": not panel.stat,
                "instant": panel.stat,
            }
            for index, (expression, legend) in enumerate(panel.queries)
        ],
    }


def to_json() -> str:
    """The file's content."""
    return json.dumps(dashboard(), indent=2) + "\n"
