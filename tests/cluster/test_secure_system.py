"""A whole system of profile cluster, in mode production, on protected servers: it works and leaves no secret lying."""

from __future__ import annotations

import asyncio
import json
import os
import re
import stat
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from secure_servers import KEY_PASSWORD, PASSWORD, USER, SecureCassandra, SecureKafka

from scripts.proof.running import NotAsAskedError, RunningSystem

TOKEN = "planted-ray-token-planted-ray-token"
PLANTED = b"planted-"


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


@pytest.mark.timeout(400)
async def test_a_system_works_on_protected_servers_and_leaves_no_secret_lying(
    secure_kafka: SecureKafka, secure_cassandra: SecureCassandra, tmp_path: Path
) -> None:
    system = RunningSystem(tmp_path / "system", profile="cluster", environment=settings(secure_kafka, secure_cassandra))
    await asyncio.to_thread(use, system, tmp_path)


def use(system: RunningSystem, tmp_path: Path) -> None:
    system.start()
    try:
        sessions = ray_sessions(system)
        wallet = json.dumps({"customer_id": "alice", "currency": "GBP", "initial_balance": 100})
        said = [
            system.concord("send", "OpenWallet", "--json", wallet),
            system.concord("topics"),
            system.concord("doctor"),
            system.concord("table", "dump", "payment.wallets"),
            system.concord("check"),
        ]
        assert [(done.code, done.stderr) for done in said] == [(0, "")] * len(said)
        assert said[0].lines[0]["status"] == "committed"
        assert [topic["topic"] for topic in said[1].lines if topic["drift"]] == []

        private = system.directory / "run" / "settings.json"
        assert stat.S_IMODE(private.stat().st_mode) == 0o600
        assert PLANTED in private.read_bytes(), "it is what tells workers and commands the secrets"
        with urllib.request.urlopen(f"{system.ready['http']}/metrics", timeout=20) as page:
            told = [page.read(), *((done.stdout + done.stderr).encode() for done in said), *command_lines(system)]
        assert_the_dashboard_wants_the_token(system.ready["dashboard"])
    finally:
        system.stop()
    system.wait_until_gone()

    assert [text for text in told if PLANTED in text] == []
    written = [path for folder in (tmp_path, *sessions) for path in files(folder) if path != private]
    assert system.log_path in written
    assert any(path.name == "runtime.json" for path in written)
    assert [path for path in written if PLANTED in path.read_bytes()] == []


def files(folder: Path) -> Iterator[Path]:
    for directory, _, names in os.walk(folder):
        for name in names:
            path = Path(directory) / name
            if path.is_file() and not path.is_symlink():
                yield path


def command_lines(system: RunningSystem) -> list[bytes]:
    return [Path(f"/proc/{process.pid}/cmdline").read_bytes() for process in system.processes(named=False)]


def ray_sessions(system: RunningSystem) -> set[Path]:
    """Where the Ray of this system writes its logs."""
    found = {name for line in command_lines(system) for name in re.findall(rb"/tmp/ray/session_[^/\0 ]+", line)}
    assert found
    return {Path(name.decode()) for name in found}


def assert_the_dashboard_wants_the_token(dashboard: str) -> None:
    def ask(headers: dict[str, str]) -> int:
        request = urllib.request.Request(f"{dashboard}/api/jobs/", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    assert ask({}) == 401
    assert ask({"Authorization": f"Bearer {TOKEN}"}) == 200


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
