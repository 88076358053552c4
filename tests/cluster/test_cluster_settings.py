"""What `--profile cluster` can be told, and what mode production refuses."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from infra.config import (
    WITH_SECRETS,
    ConfigurationError,
    Insecurity,
    Settings,
    describe_settings,
    load_settings,
    secret_of,
    without_secrets,
)

CLUSTER = {
    "CONCORD_PROFILE": "cluster",
    "CONCORD_KAFKA__BOOTSTRAP_SERVERS": "k1:9092, k2:9092",
    "CONCORD_CASSANDRA__CONTACT_POINTS": "c1,c2:9043",
}
"""The least that profile cluster must be told."""

SAFE = {
    **CLUSTER,
    "CONCORD_MODE": "production",
    "CONCORD_KAFKA__SECURITY_PROTOCOL": "sasl_ssl",
    "CONCORD_KAFKA__SASL__USERNAME": "concord",
    "CONCORD_KAFKA__SASL__PASSWORD": "planted-kafka",
    "CONCORD_KAFKA__REPLICATION": "3",
    "CONCORD_KAFKA__MIN_INSYNC_REPLICAS": "2",
    "CONCORD_CASSANDRA__ENCRYPTED": "true",
    "CONCORD_CASSANDRA__USERNAME": "concord",
    "CONCORD_CASSANDRA__PASSWORD": "planted-cassandra",
    "CONCORD_CASSANDRA__REPLICATION": '{"dc1": 3}',
    "CONCORD_RAY__TOKEN": "planted-ray",
}
"""What mode production takes."""


def problems(environment: dict[str, str], **options: Any) -> str:
    """What `load_settings` says against these settings."""
    with pytest.raises(ConfigurationError) as caught:
        load_settings(environment=environment, **options)
    return str(caught.value)


def without(environment: dict[str, str], *names: str, **others: str) -> dict[str, str]:
    """`environment` without CONCORD_`names`, and with CONCORD_`others`."""
    left = {name: value for name, value in environment.items() if name.removeprefix("CONCORD_") not in names}
    return {**left, **{f"CONCORD_{name}": value for name, value in others.items()}}


@pytest.mark.parametrize("written", ["k1:9092,k2:9092", " k1:9092 , k2:9092,", '["k1:9092", "k2:9092"]'])
def test_servers_are_a_list_however_they_are_written(written: str) -> None:
    settings = load_settings(environment=without(CLUSTER, KAFKA__BOOTSTRAP_SERVERS=written))

    assert settings.kafka.bootstrap_servers == ("k1:9092", "k2:9092")


def test_the_file_may_write_servers_as_a_list_or_as_a_line(tmp_path: Path) -> None:
    for written in ('["k1:9092", "k2:9092"]', '"k1:9092,k2:9092"'):
        (tmp_path / "concord.toml").write_text(
            f'profile = "cluster"\n[kafka]\nbootstrap_servers = {written}\n[cassandra]\ncontact_points = "c1"\n'
        )

        assert load_settings(environment={}, data_dir=tmp_path).kafka.bootstrap_servers == ("k1:9092", "k2:9092")


def test_contact_points_are_an_address_of_the_storage() -> None:
    assert load_settings(environment=CLUSTER).storage_url == "cassandra://c1,c2:9043/"


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        (
            without(CLUSTER, STORAGE__URL="cassandra://c1/"),
            "CONCORD_STORAGE__URL and CONCORD_CASSANDRA__CONTACT_POINTS",
        ),
        ({"CONCORD_KAFKA__SECURITY_PROTOCOL": "SSL"}, "profile local starts a Kafka of its own"),
        ({"CONCORD_RAY__ADDRESS": "head:6379"}, "profile local starts a Ray of its own"),
        (without(CLUSTER, KAFKA__SECURITY_PROTOCOL="tls"), "must be one of 'PLAINTEXT', 'SSL', 'SASL_PLAINTEXT' or"),
        (without(CLUSTER, KAFKA__TLS__CHECK_HOSTNAME="false"), "protocol PLAINTEXT has no TLS"),
        (without(CLUSTER, KAFKA__SASL__USERNAME="x"), "protocol PLAINTEXT asks for no credentials"),
        (without(SAFE, "KAFKA__SASL__PASSWORD"), "SCRAM-SHA-512 needs a name and a password"),
        (without(SAFE, "KAFKA__SASL__USERNAME"), "SCRAM-SHA-512 needs a name and a password"),
        (without(SAFE, KAFKA__SASL__MECHANISM="OAUTHBEARER"), "OAUTHBEARER needs an http or https URL"),
        (without(SAFE, KAFKA__SASL__MECHANISM="GSSAPI"), "CONCORD_KAFKA__SASL__MECHANISM must be one of"),
        (without(CLUSTER, CASSANDRA__TLS__CHECK_HOSTNAME="false"), "nothing of cassandra.tls would be used"),
        (without(SAFE, "CASSANDRA__PASSWORD"), "a name and a password belong together"),
        (without(SAFE, "CASSANDRA__USERNAME"), "a name and a password belong together"),
        (without(SAFE, KAFKA__TLS__CERTIFICATE_FILE=__file__), "a certificate and its key belong together"),
        (without(SAFE, CASSANDRA__TLS__KEY_FILE=__file__), "a certificate and its key belong together"),
        (without(SAFE, KAFKA__MIN_INSYNC_REPLICAS="4"), "4 of 3 replicas cannot have a message"),
        (without(SAFE, CASSANDRA__REPLICATION='{"dc1": 0}'), "CONCORD_CASSANDRA__REPLICATION must be at least 1"),
        (without(SAFE, ALLOW_INSECURE="everything"), "CONCORD_ALLOW_INSECURE must be one of 'kafka_plaintext'"),
        (without(SAFE, KAFKA__SASL__PASSWORD_FILE=__file__), "the same secret is given twice"),
        (
            without(SAFE, KAFKA__TLS__CA_FILE="/nowhere/ca.pem"),
            "CONCORD_KAFKA__TLS__CA_FILE: /nowhere/ca.pem cannot be",
        ),
        (
            without(
                SAFE,
                "CASSANDRA__CONTACT_POINTS",
                STORAGE__URL="cassandra://c1/?replication_factor=3",
            ),
            "both say how many copies",
        ),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_by_name(environment: dict[str, str], sentence: str) -> None:
    assert sentence in problems(environment)


REFUSED: dict[Insecurity, dict[str, str]] = {
    "kafka_plaintext": without(SAFE, KAFKA__SECURITY_PROTOCOL="SASL_PLAINTEXT"),
    "kafka_anonymous": without(SAFE, "KAFKA__SASL__USERNAME", "KAFKA__SASL__PASSWORD", KAFKA__SECURITY_PROTOCOL="SSL"),
    "kafka_replication": without(SAFE, KAFKA__REPLICATION="2"),
    "kafka_min_insync": without(SAFE, "KAFKA__MIN_INSYNC_REPLICAS"),
    "cassandra_plaintext": without(SAFE, "CASSANDRA__ENCRYPTED"),
    "cassandra_anonymous": without(SAFE, "CASSANDRA__USERNAME", "CASSANDRA__PASSWORD"),
    "storage_replication": without(SAFE, CASSANDRA__REPLICATION='{"dc1": 3, "dc2": 1}'),
    "open_ray": without(SAFE, "RAY__TOKEN"),
}


def test_mode_production_takes_what_is_safe() -> None:
    assert load_settings(environment=SAFE).mode == "production"


@pytest.mark.parametrize("name", REFUSED)
def test_mode_production_refuses_what_is_not_safe_unless_it_is_allowed_by_name(name: Insecurity) -> None:
    said = problems(REFUSED[name])

    assert len(said.splitlines()) == 1, said
    assert "Mode production refuses that" in said
    assert f"CONCORD_ALLOW_INSECURE={name}" in said
    assert load_settings(environment={**REFUSED[name], "CONCORD_ALLOW_INSECURE": name}).allow_insecure == (name,)
    assert load_settings(environment={**REFUSED[name], "CONCORD_MODE": "development"})


def test_everything_that_can_be_allowed_is_refused_first() -> None:
    # The commit log of Cassandra shows only when it is there: tests/cluster/test_secure_cassandra.py.
    assert {*REFUSED, "periodic_commitlog"} == set(get_args(Insecurity))


def test_a_storage_url_may_say_what_production_asks_for(tmp_path: Path) -> None:
    url = f"cassandra://c1/?username=u&password=p&ssl_ca={tmp_path}/ca.pem&replication_factor=3"
    names = [name.removeprefix("CONCORD_") for name in SAFE if "CASSANDRA" in name]

    assert load_settings(environment=without(SAFE, *names, STORAGE__URL=url)).storage_url == url


def test_records_on_one_machine_are_refused_by_production() -> None:
    names = [name.removeprefix("CONCORD_") for name in SAFE if "CASSANDRA" in name]

    assert "CONCORD_ALLOW_INSECURE=storage_replication" in problems(without(SAFE, *names, STORAGE__URL="memory:"))


def test_a_secret_may_come_from_a_file_and_is_read_anew_at_every_use(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("planted-first\n")
    settings = load_settings(environment=without(SAFE, "KAFKA__SASL__PASSWORD", KAFKA__SASL__PASSWORD_FILE=str(file)))
    first = secret_of(settings.kafka.sasl, "password")
    file.write_text("planted-second")

    assert (first, secret_of(settings.kafka.sasl, "password")) == ("planted-first", "planted-second")
    file.unlink()
    with pytest.raises(ConfigurationError, match="password_file names, cannot be read"):
        secret_of(settings.kafka.sasl, "password")


def test_a_relative_file_means_the_same_one_in_every_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("t")
    monkeypatch.chdir(tmp_path)

    assert load_settings(environment={"CONCORD_RAY__TOKEN_FILE": "token"}).ray.token_file == tmp_path / "token"


def test_secrets_are_in_nothing_that_is_shown() -> None:
    environment = without(
        SAFE,
        "CASSANDRA__CONTACT_POINTS",
        STORAGE__URL="cassandra://c1/?local_dc=dc1&password=planted-url&username=u",
        KAFKA__TLS__KEY_PASSWORD="planted-key",
        KAFKA__SASL__CLIENT_SECRET="planted-client",
    )
    settings = load_settings(environment=environment)
    shown = [
        repr(settings),
        str(settings),
        settings.model_dump_json(),
        repr(settings.model_dump()),
        repr(describe_settings(settings)),
        problems({**environment, "CONCORD_RETRY__TRIES": "0", "CONCORD_KAFKA__REPLICATION": "1"}),
        problems({**environment, "CONCORD_KAFKA__SASL__PASSWORD": '["planted-broken'}, retry__tries=0),
    ]

    assert [text for text in shown if "planted" in text] == []
    assert sum(line.value == "(set)" for line in describe_settings(settings)) == 6


def test_only_a_file_that_nobody_else_reads_carries_secrets() -> None:
    settings = load_settings(environment=SAFE)

    carried = settings.model_dump_json(context=WITH_SECRETS)

    assert Settings.model_validate_json(carried) == settings
    assert json.loads(carried)["kafka"]["sasl"]["password"] == "planted-kafka"
    assert Settings.model_validate_json(settings.model_dump_json()) != settings
    assert pickle.loads(pickle.dumps(settings)) == settings


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("memory:", "memory:"),
        ("sqlite:///var/lib/a%20folder", "sqlite:///var/lib/a%20folder"),
        ("cassandra://a:9042,b/?local_dc=dc1", "cassandra://a:9042,b/?local_dc=dc1"),
        ("cassandra://a/?password=p&local_dc=dc1", "cassandra://a/?local_dc=dc1"),
        ("cassandra://a/?password=p", "cassandra://a/"),
        ("cassandra://name:word@a/", "cassandra://a/"),
        ("cassandra://a/?ssl_ca=/etc/ca.pem", "cassandra://a/?ssl_ca=/etc/ca.pem"),
        ("dynamodb://?region=x&endpoint=http://127.0.0.1:8000", "dynamodb://?region=x&endpoint=http://127.0.0.1:8000"),
    ],
)
def test_the_url_of_a_storage_is_shown_without_its_password(url: str, shown: str) -> None:
    assert without_secrets(url) == shown


def test_every_setting_is_read_somewhere() -> None:
    """As an attribute, or by its name as a text (`secret_of`, which also finds the file of a secret)."""
    root = Path(__file__).resolve().parents[2]
    read = {
        name
        for package in ("actors", "infra", "schemas", "scripts", "streams")
        for file in (root / package).rglob("*.py")
        if file != root / "infra" / "config.py"
        for name in re.findall(r"""[."'](\w+)""", file.read_text())
    }

    settings = [line.name.rpartition(".")[2] for line in describe_settings(Settings())]
    assert [name for name in settings if not {name, name.removesuffix("_file")} & read] == []
