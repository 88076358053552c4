"""The start of a system of profile cluster, in mode production, on protected servers with a wrong password."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from secure_servers import KEY_PASSWORD, PASSWORD, USER, SecureCassandra, SecureKafka

from scripts.proof.running import NotAsAskedError, RunningSystem

pytestmark = pytest.mark.system

TOKEN = "planted-ray-token-planted-ray-token"


def settings(kafka: SecureKafka, cassandra: SecureCassandra) -> dict[str, str]:
    """What an operator would set, but for copies: there is one server of each kind here."""
    access = cassandra.access()
    return {
        "CONCORD_MODE": "production",
        "CONCORD_ALLOW_INSECURE": "kafka_replication,kafka_min_insync,storage_replication",
        "CONCORD_LOG_LEVEL": "debug",
        "CONCORD_KAFKA__BOOTSTRAP_SERVERS": kafka.address_of("SECURE"),
        "CONCORD_KAFKA__SECURITY_PROTOCOL": "SASL_SSL",
        "CONCORD_KAFKA__SASL__USERNAME": USER,
        "CONCORD_KAFKA__SASL__PASSWORD": PASSWORD,
        "CONCORD_KAFKA__TLS__CA_FILE": str(kafka.authority.ca_file),
        "CONCORD_CASSANDRA__CONTACT_POINTS": cassandra.address,
        "CONCORD_CASSANDRA__USERNAME": USER,
        "CONCORD_CASSANDRA__PASSWORD": PASSWORD,
        "CONCORD_CASSANDRA__ENCRYPTED": "true",
        "CONCORD_CASSANDRA__TLS__CA_FILE": str(access.ca_file),
        "CONCORD_CASSANDRA__TLS__CERTIFICATE_FILE": str(access.certificate_file),
        "CONCORD_CASSANDRA__TLS__KEY_FILE": str(access.key_file),
        "CONCORD_CASSANDRA__TLS__KEY_PASSWORD": KEY_PASSWORD,
        "CONCORD_CASSANDRA__REPLICATION": '{"datacenter1": 1}',
        "CONCORD_RAY__TOKEN": TOKEN,
    }


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("CONCORD_KAFKA__SASL__PASSWORD", "does not accept our credentials"),
        ("CONCORD_CASSANDRA__PASSWORD", "refuses the user name or the password"),
    ],
)
async def test_a_wrong_password_ends_the_start_at_once_with_a_sentence(
    secure_kafka: SecureKafka, secure_cassandra: SecureCassandra, tmp_path: Path, wrong: str, said: str
) -> None:
    environment = {**settings(secure_kafka, secure_cassandra), wrong: "planted-wrong"}
    system = RunningSystem(tmp_path / "system", profile="cluster", environment=environment)

    with pytest.raises(NotAsAskedError, match="exit code 6") as caught:
        await asyncio.to_thread(system.start, timeout_s=45)

    assert said in str(caught.value)
    assert "planted" not in str(caught.value)
