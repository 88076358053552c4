from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.servers.artifacts import SERVERS
from infra.servers.cassandra import SETTINGS
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


def test_every_port_is_open_on_this_machine_alone(services: dict[str, Any]) -> None:
    shared = {name for name, service in services.items() if service.get("network_mode") == "host"}
    ports = [port for name, service in services.items() if name not in shared for port in service["ports"]]

    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert shared == {"prometheus", "grafana"}
    assert "--web.listen-address=127.0.0.1:9090" in services["prometheus"]["command"]
    assert services["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"


def test_monitoring_is_a_profile_that_reads_the_files_of_this_repository(services: dict[str, Any]) -> None:
    optional = {name: service for name, service in services.items() if "profiles" in service}
    mounted = [
        volume.split(":") for service in optional.values() for volume in service["volumes"] if volume.startswith("./")
    ]

    assert {name: service["profiles"] for name, service in optional.items()} == {
        "prometheus": ["monitoring"],
        "grafana": ["monitoring"],
    }
    assert mounted
    assert all((FILE.parent / source).exists() and mode == "ro" for source, _, mode in mounted)


def test_every_volume_is_declared(services: dict[str, Any]) -> None:
    declared = yaml.safe_load(FILE.read_text())["volumes"]
    named = {volume.split(":")[0] for service in services.values() for volume in service["volumes"]}

    assert {name for name in named if not name.startswith("./")} == set(declared)


OF_ONE_MACHINE = {"partitioner", "endpoint_snitch", "num_tokens", "auto_bootstrap"}
"""What the image has the same, or sets by variables of its own."""

SAMPLE = """\
# commitlog_sync: group
commitlog_sync: periodic
commitlog_sync_period: 10000ms
key_cache_size:
read_request_timeout: 5s
memtable:
  configurations:
    skiplist:
      class_name: SkipListMemtable
seed_provider:
  - class_name: org.apache.cassandra.locator.SimpleSeedProvider
"""


def test_the_container_has_the_settings_of_the_cassandra_that_runs_without_containers(services: dict[str, Any]) -> None:
    lines = yaml.safe_load(services["cassandra"]["environment"]["CONCORD_SETTINGS"])

    assert lines == {
        "commitlog_sync": "batch",
        **{name: value for name, value in SETTINGS.items() if name not in OF_ONE_MACHINE},
    }
    assert services["cassandra"]["environment"]["CASSANDRA_NUM_TOKENS"] == str(SETTINGS["num_tokens"])


def test_the_settings_replace_those_of_the_image(services: dict[str, Any], tmp_path: Path) -> None:
    """The script of the service, as compose hands it to bash, on a file like the image's."""
    file = tmp_path / "cassandra.yaml"
    file.write_text(SAMPLE)
    settings = services["cassandra"]["environment"]["CONCORD_SETTINGS"]
    script = services["cassandra"]["command"][-1].replace("$$", "$").replace("/etc/cassandra/cassandra.yaml", str(file))
    assert "exec docker-entrypoint.sh cassandra -f" in script

    subprocess.run(
        ["bash", "-c", script.replace("exec docker-entrypoint.sh", "true")],
        env={"PATH": os.environ["PATH"], "CONCORD_SETTINGS": settings},
        check=True,
    )

    written = yaml.safe_load(file.read_text())
    assert written == yaml.safe_load(settings) | {
        "memtable": {"configurations": {"skiplist": {"class_name": "SkipListMemtable"}}},
        "seed_provider": [{"class_name": "org.apache.cassandra.locator.SimpleSeedProvider"}],
    }
    assert all(file.read_text().count(f"\n{name}:") == 1 for name in yaml.safe_load(settings))
