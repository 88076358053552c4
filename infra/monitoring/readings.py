"""What two looks at a metrics page tell: rates, ratios and quantiles, computed as Prometheus computes them.

For people and programs without a Prometheus at hand. The difference of two looks stands for `rate(x[…])`; a counter
that has fallen begins anew, and a first look of nothing means: since the start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

Page = Mapping[tuple[str, tuple[tuple[str, str], ...]], float]
"""`infra.metrics.parse_metrics` of a page: (sample, labels) to value."""

Labels = Mapping[str, str]

Match = Callable[[Labels], bool]


def anything(labels: Labels) -> bool:
    return True


@dataclass(frozen=True)
class Readings:
    """Two looks at a page, `seconds` apart. `before` may be empty."""

    before: Page
    after: Page
    seconds: float

    def increase(self, name: str, match: Match = anything) -> float:
        """How much the counters `name` that match have grown, added up; 0.0 where there are none."""
        return sum(grown for _, grown in self._grown(name, match))

    def rate(self, name: str, match: Match = anything) -> float:
        """The same for each second."""
        return self.increase(name, match) / self.seconds if self.seconds > 0 else 0.0

    def increases(self, name: str, by: str, match: Match = anything) -> dict[str, float]:
        """How much they have grown, by the values of one label."""
        grown: dict[str, float] = {}
        for labels, amount in self._grown(name, match):
            value = labels.get(by, "")
            grown[value] = grown.get(value, 0.0) + amount
        return grown

    def quantile(self, q: float, histogram: str, match: Match = anything) -> float:
        """Prometheus' histogram_quantile(q, sum by (le) (…)); NaN where nothing was observed.

        https://prometheus.io/docs/prometheus/latest/querying/functions/#histogram_quantile
        """
        buckets = self.increases(f"{histogram}_bucket", "le", match)
        return quantile(q, [(float(bound), count) for bound, count in buckets.items()])

    def gauges(self, name: str, match: Match = anything) -> list[tuple[Labels, float]]:
        """The gauges `name` as they are now."""
        return [(labels, value) for labels, value in _samples(self.after, name) if match(labels)]

    def gauge(self, name: str, match: Match = anything) -> float:
        """The sum of the gauges `name`; NaN where there is none."""
        found = [value for _, value in self.gauges(name, match)]
        return sum(found) if found else math.nan

    def _grown(self, name: str, match: Match) -> list[tuple[Labels, float]]:
        found: list[tuple[Labels, float]] = []
        for key, value in self.after.items():
            labels = dict(key[1])
            if key[0] == name and match(labels):
                before = self.before.get(key, 0.0)
                found.append((labels, value - before if value >= before else value))
        return found


def quantile(q: float, buckets: Iterable[tuple[float, float]]) -> float:
    """Of a histogram's buckets (upper bound, cumulative count), interpolated within the bucket as Prometheus does."""
    ordered = sorted(buckets)
    if len(ordered) < 2 or not math.isinf(ordered[-1][0]) or ordered[-1][1] <= 0:
        return math.nan
    rank = q * ordered[-1][1]
    index = next(number for number, (_, count) in enumerate(ordered) if count >= rank)
    if index == len(ordered) - 1:
        return ordered[-2][0]  # beyond the last bound nothing is known
    upper, count = ordered[index]
    lower, below = ordered[index - 1] if index else (0.0, 0.0)
    if upper <= 0:
        return upper
    return lower + (upper - lower) * ((rank - below) / (count - below)) if count > below else upper


def _samples(page: Page, name: str) -> list[tuple[Labels, float]]:
    return [(dict(labels), value) for (sample, labels), value in page.items() if sample == name]
