from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.servers.artifacts import SERVERS
from infra.servers.kafka import SERVER_PROPERTIES

FILE = Path(__file__).parents[2] / "docker-compose.kafka.yml"


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return dict(yaml.safe_load(FILE.read_text())["services"])


def test_the_container_is_the_kafka_that_runs_without_containers(services: dict[str, Any]) -> None:
    assert services["kafka"]["image"] == f"apache/kafka:{SERVERS['kafka'].version}"


@pytest.mark.parametrize("name", SERVER_PROPERTIES)
def test_the_container_has_the_same_setting(services: dict[str, Any], name: str) -> None:
    variable = "KAFKA_" + name.replace(".", "_").upper()

    assert services["kafka"]["environment"][variable] == SERVER_PROPERTIES[name]


def test_every_port_is_published_on_this_machine_alone(services: dict[str, Any]) -> None:
    ports = [port for service in services.values() for port in service["ports"]]

    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_cassandra_answers_a_write_only_when_it_is_on_disk(services: dict[str, Any]) -> None:
    script = services["cassandra"]["command"][-1]

    assert "commitlog_sync: batch" in script
    assert "paxos_variant: v2" in script
