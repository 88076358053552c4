"""The indicators of the design documents, each with its target, in two forms that mean the same.

    promql      asks a Prometheus, over any window
    reading     asks two looks at a metrics page, for which no Prometheus is needed

README.md in this directory shows the table (`python -m infra.monitoring` writes it there).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from infra.monitoring.readings import Labels, Match, Readings

WINDOW = "$window"
"""Stands in `promql` where the window is named (`5m`)."""


class Bound(Enum):
    """On which side of its target an indicator should be."""

    BELOW = "<"
    ABOVE = ">"


class Unit(Enum):
    SECONDS = "s"
    RATIO = "%"
    PER_SECOND = "/s"


@dataclass(frozen=True)
class Sli:
    """One indicator. `source` is the design document that sets the target. An indicator of throughput is a target for a
    load that asks for it: an idle system misses it, and is none the worse."""

    name: str
    title: str
    source: str
    unit: Unit
    bound: Bound
    target: float
    promql: str
    reading: Callable[[Readings], float]

    def met(self, value: float) -> bool | None:
        """Whether the target is met; None where there is nothing to judge."""
        if math.isnan(value):
            return None
        return value < self.target if self.bound is Bound.BELOW else value > self.target

    def shown(self, value: float) -> str:
        """A value as people read it."""
        if math.isnan(value):
            return "nothing yet"
        match self.unit:
            case Unit.SECONDS:
                return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"
            case Unit.RATIO:
                return f"{value * 100:.4g} %"
            case Unit.PER_SECOND:
                return f"{value:.4g} /s"

    @property
    def target_shown(self) -> str:
        return f"{self.bound.value} {self.shown(self.target)}"

    def query(self, window: str) -> str:
        """`promql` over a window such as `5m`."""
        return self.promql.replace(WINDOW, window)


def _match(**wanted: str) -> Match:
    return lambda labels: all(labels.get(name) == value for name, value in wanted.items())


def _quantile(q: float, histogram: str, **wanted: str) -> tuple[str, Callable[[Readings], float]]:
    matchers = ",".join(f'{name}="{value}"' for name, value in wanted.items())
    selector = f"{histogram}_bucket{{{matchers}}}" if matchers else f"{histogram}_bucket"
    promql = f"histogram_quantile({q:g}, sum by (le) (rate({selector}[{WINDOW}])))"
    return promql, lambda readings: readings.quantile(q, histogram, _match(**wanted))


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


def _counted(labels: Labels) -> bool:
    return labels["reason"] != "wounded"


def _with_outcome(outcome: str) -> Match:
    return lambda labels: _counted(labels) and labels["outcome"] == outcome


def _is_error(labels: Labels) -> bool:
    return labels["outcome"] == "dead-lettered" or labels["reason"] == "conflict"


_TRANSACTIONS = "concord_transactions_total"
_COMMANDS = "concord_commands_total"
_EVENTS = "concord_events_published_total"


def _transaction_ratio(outcome: str) -> tuple[str, Callable[[Readings], float]]:
    promql = (
        f'sum(rate({_TRANSACTIONS}{{outcome="{outcome}",reason!="wounded"}}[{WINDOW}])) '
        f'/ sum(rate({_TRANSACTIONS}{{reason!="wounded"}}[{WINDOW}]))'
    )
    return promql, lambda readings: _ratio(
        readings.increase(_TRANSACTIONS, _with_outcome(outcome)), readings.increase(_TRANSACTIONS, _counted)
    )


def _error_ratio(domain: str = "") -> tuple[str, Callable[[Readings], float]]:
    only = f',domain="{domain}"' if domain else ""
    every = f'{{domain="{domain}"}}' if domain else ""
    errors = " + ".join(
        f"(sum(rate({_COMMANDS}{{{which}{only}}}[{WINDOW}])) or vector(0))"
        for which in ('outcome="dead-lettered"', 'outcome="refused",reason="conflict"')
    )
    promql = f"({errors}) / sum(rate({_COMMANDS}{every}[{WINDOW}]))"

    def reading(readings: Readings) -> float:
        errors = readings.increase(_COMMANDS, lambda labels: _is_error(labels) and domain in ("", labels["domain"]))
        return _ratio(errors, readings.increase(_COMMANDS, lambda labels: domain in ("", labels["domain"])))

    return promql, reading


def _ready_share() -> tuple[str, Callable[[Readings], float]]:
    return f"avg(avg_over_time(concord_ready[{WINDOW}]))", lambda readings: readings.gauge("concord_ready")


def _payment_ready_share() -> tuple[str, Callable[[Readings], float]]:
    def reading(readings: Readings) -> float:
        found = [value for _, value in readings.gauges("concord_part_ready", _is_payment_part)]
        return min(found, default=math.nan)

    return f'min(avg_over_time(concord_part_ready{{part=~"payment-.*"}}[{WINDOW}]))', reading


def _is_payment_part(labels: Labels) -> bool:
    return labels["part"].startswith("payment-")


SLIS: tuple[Sli, ...] = (
    Sli(
        "transaction_p95",
        "Transaction, 95th percentile",
        "S0",
        Unit.SECONDS,
        Bound.BELOW,
        0.1,
        *_quantile(0.95, "concord_transaction_seconds", outcome="committed"),
    ),
    Sli(
        "transaction_p99",
        "Transaction, 99th percentile (alert)",
        "S0",
        Unit.SECONDS,
        Bound.BELOW,
        0.5,
        *_quantile(0.99, "concord_transaction_seconds"),
    ),
    Sli(
        "transactions_per_second",
        "Transactions committed",
        "S0",
        Unit.PER_SECOND,
        Bound.ABOVE,
        1000.0,
        f'sum(rate({_TRANSACTIONS}{{outcome="committed"}}[{WINDOW}]))',
        lambda readings: readings.rate(_TRANSACTIONS, _with_outcome("committed")),
    ),
    Sli(
        "commit_ratio",
        "Transactions that commit",
        "S0",
        Unit.RATIO,
        Bound.ABOVE,
        0.999,
        *_transaction_ratio("committed"),
    ),
    Sli("abort_ratio", "Transactions that abort", "S0", Unit.RATIO, Bound.BELOW, 0.001, *_transaction_ratio("aborted")),
    Sli(
        "order_p95",
        "Order from publish to result, 95th percentile",
        "S1",
        Unit.SECONDS,
        Bound.BELOW,
        0.5,
        *_quantile(0.95, "concord_command_latency_seconds", domain="orders"),
    ),
    Sli(
        "command_p95",
        "Command from publish to result, 95th percentile",
        "S1",
        Unit.SECONDS,
        Bound.BELOW,
        0.5,
        *_quantile(0.95, "concord_command_latency_seconds"),
    ),
    Sli(
        "command_p99",
        "Command from publish to result, 99th percentile",
        "S1",
        Unit.SECONDS,
        Bound.BELOW,
        1.0,
        *_quantile(0.99, "concord_command_latency_seconds"),
    ),
    Sli(
        "commands_per_second",
        "Commands answered",
        "S1",
        Unit.PER_SECOND,
        Bound.ABOVE,
        1000.0,
        f"sum(rate({_COMMANDS}[{WINDOW}]))",
        lambda readings: readings.rate(_COMMANDS),
    ),
    Sli(
        "payments_per_second",
        "Payments processed",
        "S1",
        Unit.PER_SECOND,
        Bound.ABOVE,
        100.0,
        f'sum(rate({_EVENTS}{{type="PaymentTaken"}}[{WINDOW}]))',
        lambda readings: readings.rate(_EVENTS, _match(type="PaymentTaken")),
    ),
    Sli("error_ratio", "Commands that fail", "S1", Unit.RATIO, Bound.BELOW, 0.01, *_error_ratio()),
    Sli(
        "payment_error_ratio",
        "Payment commands that fail",
        "S1",
        Unit.RATIO,
        Bound.BELOW,
        0.001,
        *_error_ratio("payment"),
    ),
    Sli("availability", "Time in which every part is ready", "S1", Unit.RATIO, Bound.ABOVE, 0.999, *_ready_share()),
    Sli(
        "payment_availability",
        "Time in which payment's actors are ready",
        "S1",
        Unit.RATIO,
        Bound.ABOVE,
        0.9999,
        *_payment_ready_share(),
    ),
    Sli(
        "command_p90",
        "Command from publish to result, 90th percentile (alert)",
        "S3",
        Unit.SECONDS,
        Bound.BELOW,
        1.0,
        *_quantile(0.9, "concord_command_latency_seconds"),
    ),
    Sli("error_ratio_alert", "Commands that fail (alert)", "S3", Unit.RATIO, Bound.BELOW, 0.1, *_error_ratio()),
)


def markdown() -> str:
    """The table for README.md."""
    lines = ["| indicator | seed | target | measured by (over a window: `[5m]`, `[30d]`) |", "|---|---|---|---|"]
    lines += [
        f"| {sli.title} (`{sli.name}`) | {sli.source} | {sli.target_shown} | `{_in_table(sli.query('5m'))}` |"
        for sli in SLIS
    ]
    return "\n".join(lines) + "\n"


def _in_table(promql: str) -> str:
    return promql.replace("|", "\\|")
