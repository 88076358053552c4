"""How commands find a system: the secrets of one that runs here, and a cluster that has no directory here at all."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from infra.config import WITH_SECRETS, load_settings, secret_of
from scripts.cli.errors import CommandError
from scripts.cli.system import System, runtime_path, write_atomically
from scripts.connections import kafka_connection, ray_environment, storage_address
from scripts.outside import OutsideRay, RayRefusesError, RayUnavailableError, servers_outside
from scripts.worker import WorkerSetup, read_setup, setup_path, write_setup

CLUSTER = {
    "CONCORD_PROFILE": "cluster",
    "CONCORD_KAFKA__BOOTSTRAP_SERVERS": "k1:9092,k2:9092",
    "CONCORD_KAFKA__SECURITY_PROTOCOL": "SASL_SSL",
    "CONCORD_KAFKA__SASL__USERNAME": "concord",
    "CONCORD_KAFKA__SASL__PASSWORD": "planted-kafka",
    "CONCORD_CASSANDRA__CONTACT_POINTS": "c1",
    "CONCORD_CASSANDRA__USERNAME": "concord",
    "CONCORD_CASSANDRA__PASSWORD": "planted-cassandra",
    "CONCORD_CASSANDRA__DATA_CENTER": "dc1",
    "CONCORD_RAY__TOKEN": "planted-ray",
}


def started(directory: Path) -> WorkerSetup:
    """What a start leaves in `directory`."""
    settings = load_settings(environment=CLUSTER, data_dir=directory)
    setup = WorkerSetup(settings=settings, bootstrap_servers="k1:9092,k2:9092", ray_address="r:1")
    write_setup(setup)
    public = {"bootstrap_servers": "k1:9092,k2:9092", "settings": json.loads(settings.model_dump_json())}
    write_atomically(runtime_path(directory), public)
    return setup


def test_commands_of_the_systems_own_user_have_its_secrets(tmp_path: Path) -> None:
    setup = started(tmp_path)
    found = System.find(tmp_path).settings

    assert found == setup.settings
    assert secret_of(found.kafka.sasl, "password") == "planted-kafka"
    assert "planted" not in runtime_path(tmp_path).read_text()


def test_the_file_of_the_secrets_is_nobody_elses_from_its_first_byte_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []
    real_open = os.open

    def watched(path: str, flags: int, mode: int = 0o777) -> int:
        descriptor = real_open(path, flags, mode)
        if "settings.json" in str(path):
            opened.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        return descriptor

    monkeypatch.setattr(os, "open", watched)
    before = os.umask(0)
    try:
        started(tmp_path)
    finally:
        os.umask(before)

    assert opened == [0o600]
    assert stat.S_IMODE(setup_path(tmp_path).stat().st_mode) == 0o600


def test_commands_of_another_user_have_everything_but_the_secrets(tmp_path: Path) -> None:
    started(tmp_path)
    setup_path(tmp_path).unlink()  # what cannot be read is as if it were not there
    found = System.find(tmp_path).settings

    assert found.kafka.bootstrap_servers == ("k1:9092", "k2:9092")
    assert secret_of(found.kafka.sasl, "password") == ""


def test_without_a_directory_the_system_of_profile_cluster_is_where_the_settings_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in CLUSTER.items():
        monkeypatch.setenv(name, value)
    system = System.find(tmp_path / "none")

    assert system.kafka.bootstrap_servers == "k1:9092,k2:9092"
    assert system.kafka.client_options()["sasl_plain_password"] == "planted-kafka"
    assert not (tmp_path / "none").exists()


def test_without_a_directory_any_other_system_is_none(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="No system is running"):
        System.find(tmp_path / "none").kafka  # noqa: B018


def test_connections_are_made_of_the_settings_and_show_no_secret(tmp_path: Path) -> None:
    settings = load_settings(environment=CLUSTER, data_dir=tmp_path)
    kafka, address = kafka_connection(settings), storage_address(settings)

    assert address.url == "cassandra://c1/"
    assert address.cassandra.options()["local_dc"] == "dc1"
    assert address.cassandra.options()["password"] == "planted-cassandra"
    assert ray_environment(settings) == {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "planted-ray"}
    assert "planted" not in repr((kafka, address))
    assert json.loads(settings.model_dump_json(context=WITH_SECRETS))["ray"]["token"] == "planted-ray"


def test_a_token_in_a_file_is_left_there(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("planted-ray")
    environment = {name: value for name, value in CLUSTER.items() if name != "CONCORD_RAY__TOKEN"}
    settings = load_settings(environment={**environment, "CONCORD_RAY__TOKEN_FILE": str(file)}, data_dir=tmp_path)

    assert ray_environment(settings) == {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)}


def test_production_asks_for_nodes_that_let_nobody_in_unasked(tmp_path: Path) -> None:
    def access(**more: str) -> tuple[bool, bool]:
        mode = {"CONCORD_MODE": "production", "CONCORD_PROFILE": "cluster", "CONCORD_ALLOW_INSECURE": insecure}
        settings = load_settings(environment={**CLUSTER, **mode, **more}, data_dir=tmp_path)
        cassandra = storage_address(settings).cassandra
        return cassandra.only_authenticated, cassandra.allow_periodic

    everything = "kafka_replication,kafka_min_insync,storage_replication,cassandra_plaintext"
    insecure = everything
    assert access() == (True, False)
    assert access(CONCORD_ALLOW_INSECURE=f"{everything},cassandra_anonymous") == (False, False)
    assert access(CONCORD_ALLOW_INSECURE=f"{everything},periodic_commitlog") == (True, True)
    assert access(CONCORD_MODE="development") == (False, False)


@asynccontextmanager
async def ray_that_says(code: grpc.StatusCode | None) -> AsyncIterator[tuple[str, list[dict[str, Any]]]]:
    """Its address, and what it was told by those who asked it."""
    told: list[dict[str, Any]] = []

    async def answer(request: bytes, context: Any) -> bytes:
        told.append(dict(context.invocation_metadata()))
        if code is not None:
            await context.abort(code, "InvalidAuthToken")
        return b""

    methods = {"GetClusterId": grpc.unary_unary_rpc_method_handler(answer)}
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("ray.rpc.NodeInfoGcsService", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}", told
    finally:
        await server.stop(None)


def outside_ray(address: str, tmp_path: Path) -> OutsideRay:
    settings = load_settings(environment={**CLUSTER, "CONCORD_RAY__ADDRESS": address}, data_dir=tmp_path)
    (ray,) = (server for server in servers_outside(settings) if isinstance(server, OutsideRay))
    return ray


@pytest.mark.parametrize("code", [None, grpc.StatusCode.UNIMPLEMENTED])
async def test_a_ray_that_answers_is_presented_the_token_and_left_to_its_client(
    code: grpc.StatusCode | None, tmp_path: Path
) -> None:
    async with ray_that_says(code) as (address, told):
        await outside_ray(address, tmp_path).ask()

    assert [metadata["authorization"] for metadata in told] == ["Bearer planted-ray"]


async def test_a_ray_that_refuses_the_token_is_told_from_one_that_is_not_there(tmp_path: Path) -> None:
    async with ray_that_says(grpc.StatusCode.UNAUTHENTICATED) as (address, _):
        with pytest.raises(RayRefusesError, match=f"Ray at {address} does not accept our token"):
            await outside_ray(address, tmp_path).ask()

    with pytest.raises(RayUnavailableError, match=f"Ray does not answer at {address}"):
        await outside_ray(address, tmp_path).ask()


@pytest.mark.parametrize(
    "others",
    [
        {"CONCORD_RAY__ADDRESS": ""},
        {"CONCORD_RAY__ADDRESS": "auto"},
        {"CONCORD_RAY__ADDRESS": "r:1", "CONCORD_RAY__TOKEN": ""},
    ],
    ids=["one of our own", "a node of it here", "no token"],
)
def test_a_ray_whose_place_or_token_we_do_not_know_is_left_to_its_client(
    others: dict[str, str], tmp_path: Path
) -> None:
    settings = load_settings(environment={**CLUSTER, **others}, data_dir=tmp_path)

    assert [server.kind for server in servers_outside(settings)] == ["kafka", "storage"]


def test_settings_of_an_earlier_release_that_are_gone_since_are_passed_over(tmp_path: Path) -> None:
    """A running system is restarted part by part: what it told its workers outlives the release that wrote it."""
    setup = started(tmp_path)
    told = json.loads(setup_path(tmp_path).read_bytes())
    told["settings"]["kafka"]["gone_since"] = 1
    told["settings"]["also_gone"] = {"since": "then"}
    setup_path(tmp_path).write_text(json.dumps(told))

    assert read_setup(tmp_path) == setup
    assert System.find(tmp_path).settings == setup.settings
