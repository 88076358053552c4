"""A real Prometheus scrapes a running system: it finds it, its rules are in order, and an alert fires for its cause.

Prometheus is Debian's package; where it is not installed this is a visible skip that says how to get it.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.config import load_settings
from infra.monitoring.slis import SLIS
from scripts.preflight import free_port
from scripts.wiring import system_config
from tests.end_to_end.harness import System, order, product, wallet

MONITORING = Path(__file__).parents[2] / "infra" / "monitoring"
PROGRAM = shutil.which("prometheus")
REMEDY = "prometheus is not here: install Debian's package (apt-get install --no-install-recommends prometheus)"
SEEN_WITHIN_S = 30.0

pytestmark = [pytest.mark.system, pytest.mark.skipif(PROGRAM is None, reason=REMEDY)]


class Prometheus:
    """A Prometheus with our own configuration, but for the address of the system and a shorter interval."""

    def __init__(self, url: str, log_path: Path) -> None:
        self.url = url
        self.log_path = log_path

    def get(self, path: str, **parameters: str) -> Any:
        asked = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(asked, timeout=10) as answer:
            found = json.load(answer)
        assert found["status"] == "success", found
        return found["data"]

    def value(self, promql: str) -> float | None:
        """The one value of an expression; None while it has none."""
        result = self.get("query", query=promql)["result"]
        assert len(result) <= 1, result
        return float(result[0]["value"][1]) if result else None

    def firing(self, name: str, **labels: str) -> dict[str, Any] | None:
        """The alert of that name and those labels, if it fires."""
        for alert in self.get("alerts")["alerts"]:
            if alert["state"] == "firing" and alert["labels"].items() >= {"alertname": name, **labels}.items():
                return dict(alert)
        return None


@pytest.fixture(scope="module")
def prometheus(system: System, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    directory = tmp_path_factory.mktemp("prometheus")
    configuration = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    configuration["global"] = {"scrape_interval": "2s", "scrape_timeout": "2s", "evaluation_interval": "1s"}
    configuration["rule_files"] = [str(MONITORING / file) for file in configuration["rule_files"]]
    [job] = configuration["scrape_configs"]
    job["static_configs"] = [{"targets": [system.running.ready["http"].removeprefix("http://")]}]
    file = directory / "prometheus.yml"
    file.write_text(yaml.safe_dump(configuration))
    port = free_port()
    log_path = directory / "prometheus.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [
                str(PROGRAM),
                f"--config.file={file}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        yield Prometheus(f"http://127.0.0.1:{port}", log_path)
    finally:
        process.terminate()
        process.wait(30)


def shard_of_orders(customer: str) -> int:
    """Which orders actor a customer's commands go to, as the settings have it by default."""
    settings = load_settings(environment={})
    return int(system_config(settings).placement.actor_of("orders", customer).rpartition("-")[2])


async def until(prometheus: Prometheus, holds: Any, what: str) -> Any:
    """What `holds` says, as soon as it says anything; Prometheus looks every two seconds."""
    deadline_s = asyncio.get_running_loop().time() + SEEN_WITHIN_S
    while True:
        try:
            found = await asyncio.to_thread(holds)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            found = None  # it is starting, or slow
        if found:
            return found
        assert asyncio.get_running_loop().time() < deadline_s, f"{what}\n{prometheus.log_path.read_text()[-2000:]}"
        await asyncio.sleep(0.2)


async def test_prometheus_finds_the_system_and_all_its_rules_are_in_order(prometheus: Prometheus) -> None:
    await until(prometheus, lambda: prometheus.value('up{job="concord"}') == 1, "the system to be up")
    await until(prometheus, lambda: prometheus.value("concord_ready") == 1, "the system to be ready")

    def judged() -> list[dict[str, Any]] | None:
        rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
        return rules if all(rule["health"] != "unknown" for rule in rules) else None

    rules = await until(prometheus, judged, "every rule to be evaluated")
    written = yaml.safe_load((MONITORING / "rules" / "concord.yml").read_text())
    assert {rule["name"] for rule in rules} == {
        rule.get("alert") or rule["record"] for group in written["groups"] for rule in group["rules"]
    }
    assert [(rule["name"], rule.get("lastError")) for rule in rules if rule["health"] != "ok"] == []


async def test_an_order_is_seen_from_its_publishing_to_its_result(system: System, prometheus: Prometheus) -> None:
    mark = uuid.uuid4().hex[:8]
    category, customer = f"watched-{mark}", f"watcher-{mark}"
    counted = 'concord_command_latency_seconds_count{domain="orders",type="PlaceOrder"}'
    await system.committed(product(category, "tea"), wallet(customer))
    await system.committed(order(customer, f"{customer}-1", (category, "tea", 1, 250)))
    before = await until(prometheus, lambda: prometheus.value(counted), "the first order to be seen")

    await system.committed(order(customer, f"{customer}-2", (category, "tea", 1, 250)))

    await until(prometheus, lambda: (prometheus.value(counted) or 0) > before, "the second order to be seen")
    for name in ("transaction_p95", "order_p95", "commit_ratio", "availability"):
        sli = next(sli for sli in SLIS if sli.name == name)
        await until(prometheus, lambda sli=sli: (prometheus.value(sli.query("1m")) or 0) > 0, sli.title)
    expected = {"supervisor", "kafka", "ray", "worker-0", "coordinator-0", "orders-0", "orders-1", "views-0"}

    def processes() -> set[str]:
        found = prometheus.get("query", query="concord_process_resident_memory_bytes")["result"]
        return {sample["metric"]["process"] for sample in found}

    # What is asked for now has no value while a scrape that came too late is the last one.
    await until(prometheus, lambda: expected <= processes(), "each process")
    for name in (
        "concord_storage_seconds_count",
        "concord_transactions_total",
        "concord_events_published_total",
        "concord_consumer_lag_messages",
        "concord_oldest_in_doubt_timestamp_seconds",
        "concord_topic_retention_seconds",
        "concord_worker_waiting_bytes_limit",
    ):
        await until(prometheus, lambda name=name: prometheus.get("query", query=name)["result"], name)


async def test_a_message_that_cannot_be_read_makes_an_alert_fire(system: System, prometheus: Prometheus) -> None:
    asked = 'concord_dead_letters_total{topic="orders.commands.dlq",reason="not_json"}'
    await until(prometheus, lambda: prometheus.value(asked) is not None, "the counter to be there, at whatever it is")
    cause = {"topic": "orders.commands.dlq", "reason": "not_json"}
    assert prometheus.firing("ConcordDeadLetters", **cause) is None
    good = order(f"poison-{uuid.uuid4().hex[:8]}", "O-1", ("nothing", "tea", 1, 250))

    await system.publish(good.topic, good.key, b"{ this is no JSON", good.headers)
    await system.answers(good.id)

    alert = await until(prometheus, lambda: prometheus.firing("ConcordDeadLetters", **cause), "the alert")
    assert alert["labels"]["severity"] == "warning"
    assert alert["annotations"]["summary"] == "Messages went to orders.commands.dlq"
    assert alert["annotations"]["runbook_url"] == "infra/monitoring/README.md#concorddeadletters"


async def test_an_actor_that_is_killed_goes_on_counting_where_it_was(system: System, prometheus: Prometheus) -> None:
    mark = uuid.uuid4().hex[:8]
    customer = f"counted-{mark}"
    home = f"orders-{shard_of_orders(customer)}"
    starts = f'concord_process_starts_total{{process="{home}"}}'
    await system.committed(product(f"counted-{mark}", "tea"), wallet(customer))
    before = await until(prometheus, lambda: prometheus.value(starts), "the actor to be seen")

    os.kill(await system.pid_of(home), signal.SIGKILL)
    await system.committed(order(customer, f"{customer}-1", (f"counted-{mark}", "tea", 1, 250)))

    await until(prometheus, lambda: (prometheus.value(starts) or 0) > before, "the actor to be seen again")
    placed = 'concord_commands_total{type="PlaceOrder",outcome="committed"}'
    assert prometheus.value(f"max(resets({placed}[5m]))") == 0
    assert prometheus.value(f"max(resets({starts}[5m]))") == 0
    living = f'concord_process_resident_memory_bytes{{process="{home}"}}'
    await until(prometheus, lambda: prometheus.value(living), "the memory of the new process")
    await system.ready()


async def test_people_and_programs_see_the_same_without_a_prometheus(system: System, prometheus: Prometheus) -> None:
    mark = uuid.uuid4().hex[:8]
    category, customer = f"seen-{mark}", f"seer-{mark}"
    await system.committed(product(category, "tea"), wallet(customer))
    await system.committed(order(customer, f"{customer}-1", (category, "tea", 1, 250)))
    await until(prometheus, lambda: prometheus.value("concord_ready") == 1, "the system to be ready")

    seen = (await system.concord("top", "--every", "0.5")).lines
    since_the_start = (await system.concord("slis", "--seconds", "0")).lines
    asked = (await system.concord("slis", "--prometheus", prometheus.url, "--window", "10m")).lines

    assert len(seen) == 1
    assert seen[0]["ready"] is True
    assert {"supervisor", "kafka", "worker-0", "orders-0"} <= {row["process"] for row in seen[0]["processes"]}
    assert {row["topic"] for row in seen[0]["lag"]} >= {"orders.commands", "payment.commands"}
    assert [row["name"] for row in since_the_start] == [row["name"] for row in asked] == [sli.name for sli in SLIS]
    assert [row["name"] for row in since_the_start if row["value"] is None] == []
    assert {row["name"]: row["value"] for row in asked}["availability"] > 0
