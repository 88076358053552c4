"""Rules, alerts and the dashboard speak of metrics that exist, and promtool says that they do what they should."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.messages import Trouble
from infra.metrics import METRICS, Kind, Metric
from infra.monitoring import dashboard
from infra.monitoring.slis import SLIS
from infra.storage.observed import ERRORS, OPERATIONS
from schemas.envelope import DeadLetterReason
from schemas.registry import DOMAINS, default_registry
from scripts.measuring import ABORTED, COMMITTED, UNKNOWN

MONITORING = Path(__file__).parents[2] / "infra" / "monitoring"
RULES = MONITORING / "rules" / "concord.yml"
TESTS = sorted((MONITORING / "rules" / "tests").glob("*.yml"))

REMEDY = (
    "promtool is not here: install Debian's package prometheus (apt-get install --no-install-recommends prometheus)"
)
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason=REMEDY)

NOT_OURS = {"up", "ALERTS"}
LABELS_OF_PROMETHEUS = {"job", "instance", "le"}

VALUES: dict[str, set[str]] = {
    "domain": set(DOMAINS),
    "outcome": {"committed", "refused", "dead-lettered", COMMITTED, ABORTED, UNKNOWN},
    "reason": {"", "conflict", *(trouble.value for trouble in Trouble), *(reason.value for reason in DeadLetterReason)},
    "error": set(ERRORS),
    "operation": set(OPERATIONS),
    "type": {*default_registry().commands, *default_registry().events},
    "job": {"concord"},
    "part": {"kafka", "payment-0"},
}
"""What a selector may ask for: a value that nothing ever has would keep an alert silent for ever."""


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def alerts() -> list[dict[str, Any]]:
    return [rule for rule in rules() if "alert" in rule]


def expressions() -> Iterator[tuple[str, str]]:
    """(where, PromQL) of everything that is asked."""
    for rule in rules():
        yield rule.get("alert") or rule["record"], rule["expr"]
    for section in dashboard.SECTIONS:
        for panel in section.panels:
            for expression, _legend in panel.queries:
                yield f"panel {section.title}/{panel.title}", expression
    for sli in SLIS:
        yield f"indicator {sli.name}", sli.query("5m")


SERIES: dict[str, Metric] = {name: row for row in METRICS for name in row.series}
RECORDED = {rule["record"] for rule in rules() if "record" in rule}


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_every_series_that_is_asked_for_exists(where: str, expression: str) -> None:
    without_strings = re.sub(r'"[^"]*"', '""', expression)
    named = set(re.findall(r"\bconcord[_:][a-zA-Z0-9_:]+", without_strings))

    assert named or "up{" in expression
    assert named <= SERIES.keys() | RECORDED


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_every_selector_can_match_something(where: str, expression: str) -> None:
    for name, selector in re.findall(r"\b([a-z_]+)\{([^}]*)\}", expression):
        for label, operator, wanted in re.findall(r'(\w+)(=~|!~|!=|=)"([^"]*)"', selector):
            assert name in NOT_OURS or label in {*SERIES[name].labels, *LABELS_OF_PROMETHEUS}, (name, label)
            values = VALUES[label]
            possible = [v for v in values if re.fullmatch(wanted, v)] if "~" in operator else [wanted]
            assert set(possible) & values, (label, wanted)


def test_every_metric_is_watched_or_drawn() -> None:
    asked = " ".join(expression for _where, expression in expressions())
    undrawn = [row.name for row in METRICS if not any(re.search(rf"\b{name}\b", asked) for name in row.series)]

    assert undrawn == []


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: str(alert["alert"]))
def test_an_alert_says_how_bad_what_and_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["for"]
    assert alert["labels"]["severity"] in {"warning", "critical"}
    assert alert["annotations"]["summary"]
    assert alert["annotations"]["description"].rstrip().endswith(".")
    file, _, anchor = alert["annotations"]["runbook_url"].partition("#")
    text = (MONITORING.parents[1] / file).read_text()
    assert anchor == alert["alert"].lower()
    assert f"### {alert['alert']}\n" in text


def test_the_runbook_has_no_section_of_an_alert_that_is_gone() -> None:
    sections = set(re.findall(r"^### (Concord\w+)$", (MONITORING / "README.md").read_text(), re.MULTILINE))

    assert sections == {alert["alert"] for alert in alerts()}


def test_the_alerts_of_the_design_documents_are_there() -> None:
    """S0: p99 above 0.5 s is a warning, aborts above 1 % critical. S3: errors above 10 % critical, p90 above 1 s a
    warning. Each holds for five minutes."""
    found = {alert["alert"]: (alert["labels"]["severity"], alert["for"], alert["expr"]) for alert in alerts()}

    assert found["ConcordTransactionLatencyHigh"] == ("warning", "5m", "concord:transaction_seconds:p99_5m > 0.5")
    assert found["ConcordAbortRateHigh"] == ("critical", "5m", "concord:transactions:abort_ratio5m > 0.01")
    assert found["ConcordErrorRateHigh"] == ("critical", "5m", "concord:commands:error_ratio5m > 0.1")
    assert found["ConcordCommandLatencyHigh"] == ("warning", "5m", "concord:command_latency_seconds:p90_5m > 1")


def test_every_alert_has_a_test_in_which_it_fires_and_others_in_which_it_is_silent() -> None:
    fires: dict[str, set[str]] = {alert["alert"]: set() for alert in alerts()}
    silent = 0
    for file in TESTS:
        for test in yaml.safe_load(file.read_text())["tests"]:
            for asked in test["promql_expr_test"]:
                if "ALERTS{" not in asked["expr"]:
                    continue
                silent += not asked["exp_samples"]
                for sample in asked["exp_samples"]:
                    fires[re.findall(r'alertname="(\w+)"', sample["labels"])[0]].add(test["name"])

    assert [name for name, tests in fires.items() if not tests] == []
    assert silent >= len(fires)


def test_the_series_of_the_rules_tests_are_those_of_the_system() -> None:
    """A test that feeds a series which no process ever writes would prove nothing."""
    for file in TESTS:
        for test in yaml.safe_load(file.read_text())["tests"]:
            for fed in test["input_series"]:
                name, _, selector = fed["series"].partition("{")
                if name in NOT_OURS:
                    continue
                row = SERIES[name]
                labels = set(re.findall(r'(\w+)="', selector)) - {"instance"}
                assert labels == {*row.labels, *({"le"} if name.endswith("_bucket") else set())}, fed
                for label, value in re.findall(r'(\w+)="([^"]*)"', selector):
                    if label == "le":
                        assert value == "+Inf" or float(value) in row.buckets, fed


@needs_promtool
def test_promtool_finds_the_configuration_right() -> None:
    checked = subprocess.run(
        ["promtool", "check", "config", MONITORING / "prometheus.yml"], capture_output=True, text=True, timeout=60
    )

    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(rules())} rules found" in checked.stdout


@needs_promtool
@pytest.mark.parametrize("file", TESTS, ids=lambda file: file.stem)
def test_alerts_fire_for_their_causes_and_stay_silent_otherwise(file: Path) -> None:
    tested = subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True, timeout=120)

    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert "SUCCESS" in tested.stdout


def test_the_dashboard_and_the_table_of_indicators_are_as_they_are_made() -> None:
    checked = subprocess.run(
        [sys.executable, "-m", "infra.monitoring", "--check"], capture_output=True, text=True, timeout=60
    )

    assert checked.returncode == 0, checked.stderr


def test_panels_stand_beside_each_other_and_never_on_each_other() -> None:
    drawn = json.loads((MONITORING / "grafana" / "dashboards" / "concord.json").read_text())
    taken: set[tuple[int, int]] = set()
    for panel in drawn["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in drawn["panels"]}) == len(drawn["panels"])
    counters = {name for row in METRICS if row.kind is Kind.COUNTER for name in row.series}
    for panel in drawn["panels"]:
        for target in panel.get("targets", []):
            for counter in counters & set(re.findall(r"\bconcord_\w+", target["expr"])):
                assert re.search(rf"(rate|increase)\({counter}", target["expr"]), "a counter alone says nothing"


def test_what_grafana_is_given_names_the_files_that_are_there() -> None:
    provisioning = MONITORING / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "concord.yml").read_text())["providers"]

    assert source["type"] == "prometheus"
    assert provider["options"]["path"] == "/etc/grafana/dashboards"
