"""A whole system of profile cluster, in mode production, on protected servers: it works, lets nobody else in, and
leaves no secret lying."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from secure_servers import KEY_PASSWORD, PASSWORD, USER, SecureCassandra, SecureKafka

from scripts.preflight import free_port
from scripts.proof.running import NotAsAskedError, RunningSystem, clean_environment, concord_program
from scripts.up import RAY_STARTS

pytestmark = pytest.mark.system

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
        "CONCORD_WORKERS": "0",
    }


# --- a Ray of somebody else's


@dataclass(frozen=True)
class RayNode:
    """A Ray cluster of one node that asks for a token. `folder` is where it keeps its files."""

    folder: Path
    port: int
    dashboard: str

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def page(self, path: str) -> bytes:
        """A page of the dashboard, for one who has the token."""
        request = urllib.request.Request(f"{self.dashboard}{path}", headers=bearer(TOKEN))
        with urllib.request.urlopen(request, timeout=20) as answer:
            found: bytes = answer.read()
        return found

    def processes(self) -> Iterator[Path]:
        """Its own processes, and those of the actors on it: each has inherited the variable from the first."""
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if f"{MARK}={self.folder}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    yield entry


MARK = "NODE_OF_RAY_IN"


@pytest.fixture(scope="module")
def ray() -> Iterator[RayNode]:
    for _ in range(RAY_STARTS):
        with started_ray() as node:
            if node is not None:
                yield node
                return
    pytest.fail(f"Ray ended {RAY_STARTS} times while it started")


@contextmanager
def started_ray() -> Iterator[RayNode | None]:
    """None where Ray ended by itself: on a busy machine it gives its own agents up too early."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # Ray's sockets need a short path
    port, dashboard_port = free_port(), free_port()
    node = RayNode(folder, port, f"http://127.0.0.1:{dashboard_port}")
    process = subprocess.Popen(
        [
            *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--disable-usage-stats"),
            *(f"--port={port}", f"--dashboard-port={dashboard_port}", f"--temp-dir={folder}"),
            *("--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--num-cpus=2"),
            "--object-store-memory=80000000",
        ],
        env=clean_environment({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, MARK: str(folder)}),
        stdout=(folder / "start.log").open("wb"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        until(lambda: process.poll() is not None or status_of(f"{node.dashboard}/api/gcs_healthz") == 200)
        yield node if process.poll() is None else None
    finally:
        process.terminate()
        process.wait(30)
        for left_behind in node.processes():
            with suppress(ProcessLookupError):
                os.kill(int(left_behind.name), signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def bearer(token: str) -> Mapping[str, str]:
    return {"Authorization": f"Bearer {token}"}


def status_of(url: str, headers: Mapping[str, str] | None = None) -> int:
    """The HTTP status; 0 where nobody answers."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=dict(headers or {})), timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def until(condition: Callable[[], bool], *, within_s: float = 90) -> None:
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, "it took too long"
        time.sleep(0.1)


# --- it works


@pytest.mark.timeout(400)
async def test_a_system_in_parts_works_on_protected_servers_and_leaves_no_secret_lying(
    secure_kafka: SecureKafka, secure_cassandra: SecureCassandra, ray: RayNode, tmp_path: Path
) -> None:
    """As in Kubernetes: Ray is there, one program looks after the actors, a worker runs apart."""
    environment = {**settings(secure_kafka, secure_cassandra), "CONCORD_RAY__ADDRESS": ray.address}
    system = RunningSystem(tmp_path / "system", profile="cluster", environment=environment)
    await asyncio.to_thread(use, system, tmp_path, ray)


def use(system: RunningSystem, tmp_path: Path, ray: RayNode) -> None:
    system.start()
    try:
        with worker_apart(system, tmp_path / "worker") as worker:
            opened = system.concord("send", "--ndjson", "-", stdin=lines(STOCK, WALLET))
            placed = system.concord("send", "--ndjson", "-", stdin=lines(ORDER))
            events = system.concord("tail", "orders.events", "--until-end", "--headers-only")
            topics = system.concord("topics")
            told = [opened, placed, events, topics, system.concord("doctor"), system.concord("check")]
            assert [(done.code, done.stderr) for done in told] == [(0, "")] * len(told)
            assert [answer["status"] for done in (opened, placed) for answer in done.lines] == ["committed"] * 3
            placed_as = {event["headers"]["ce_causationid"]: event["headers"]["ce_type"] for event in events.lines}
            assert placed_as == {placed.lines[0]["id"]: "OrderPlaced"}
            assert [topic["topic"] for topic in topics.lines if topic["drift"]] == []

            supervisor = next(one.pid for one in system.processes(named=False) if one.role == "supervisor")
            running = [Path(f"/proc/{pid}") for pid in (supervisor, worker)] + list(ray.processes())
            commands = [command_of(process) for process in running]
            assert any(command.startswith(b"ray::ConcordActor") for command in commands)
            seen = [
                *commands,
                *((done.stdout + done.stderr).encode() for done in told),
                *map(ray.page, ("/api/jobs/", "/logical/actors", "/nodes?view=summary", "/api/v0/workers?detail=1")),
                page(f"{system.ready['http']}/metrics"),
            ]
            private = system.directory / "run" / "settings.json"
            assert_only_its_user_may_read(private)
            assert_the_dashboard_wants_the_token(system.ready["dashboard"])
    finally:
        system.stop()
    system.wait_until_gone()

    assert [text for text in seen if PLANTED in text] == []
    written = [path for folder in (tmp_path, ray.folder) for path in files(folder) if path != private]
    assert {system.log_path, system.directory / "runtime.json", ray.folder / "start.log"} <= set(written)
    assert any("gcs_server" in path.name for path in written)
    assert [path for path in written if PLANTED in content(path)] == []


def content(path: Path) -> bytes:
    """Nothing of a file that is gone: this Ray runs on, and writes some of its files beside their places first."""
    with suppress(FileNotFoundError):
        return path.read_bytes()
    return b""


STOCK = {
    "type": "RegisterProduct",
    "body": {
        "category": "tea",
        "product_id": "green",
        "name": "green tea",
        "quantity": 10,
        "unit_price": 250,
        "currency": "GBP",
        "low_stock_threshold": 0,
    },
}
WALLET = {"type": "OpenWallet", "body": {"customer_id": "alice", "currency": "GBP", "initial_balance": 1_000}}
ORDER = {
    "type": "PlaceOrder",
    "body": {
        "customer_id": "alice",
        "order_id": "o-1",
        "lines": [{"category": "tea", "product_id": "green", "quantity": 2, "unit_price": 250}],
        "currency": "GBP",
        "shipping_address": {"region": "United Kingdom"},
    },
}


def lines(*commands: Mapping[str, object]) -> bytes:
    return b"".join(json.dumps(command).encode() + b"\n" for command in commands)


@contextmanager
def worker_apart(system: RunningSystem, directory: Path) -> Iterator[int]:
    """`concord worker` with a directory of its own, until it has partitions; its pid."""
    log = directory.with_suffix(".log")
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [concord_program(), "worker", "--data", str(directory), "--output", "json"],
            env=system.environment,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, log.read_text()
        until(lambda: status_of(f"{json.loads(line)['health']}/readyz") == 200)
        yield process.pid
        process.terminate()
        assert process.wait(60) == 0, log.read_text()[-2000:]
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdout.close()


def page(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=20) as answer:
        found: bytes = answer.read()
    return found


def command_of(process: Path) -> bytes:
    """Its command line, or the title that it has given itself; nothing of one that has ended."""
    with suppress(OSError):
        return (process / "cmdline").read_bytes()
    return b""


def files(folder: Path) -> Iterator[Path]:
    for directory, _, names in os.walk(folder):
        for name in names:
            path = Path(directory) / name
            if path.is_file() and not path.is_symlink():
                yield path


def assert_only_its_user_may_read(private: Path) -> None:
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert PLANTED in private.read_bytes(), "it is what tells workers and commands the secrets"


def assert_the_dashboard_wants_the_token(dashboard: str) -> None:
    jobs = f"{dashboard}/api/jobs/"
    told = [status_of(jobs), status_of(jobs, bearer("planted-wrong")), status_of(jobs, bearer(TOKEN))]
    assert told == [401, 403, 200]


# --- it does not


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("CONCORD_KAFKA__SASL__PASSWORD", "does not accept our credentials"),
        ("CONCORD_CASSANDRA__PASSWORD", "refuses the user name or the password"),
        ("CONCORD_RAY__TOKEN", "does not accept our token"),
    ],
)
async def test_a_wrong_secret_ends_the_start_at_once_with_a_sentence(
    secure_kafka: SecureKafka, secure_cassandra: SecureCassandra, ray: RayNode, tmp_path: Path, wrong: str, said: str
) -> None:
    right = {**settings(secure_kafka, secure_cassandra), "CONCORD_RAY__ADDRESS": ray.address}
    system = RunningSystem(tmp_path / "system", profile="cluster", environment={**right, wrong: "planted-wrong"})

    with pytest.raises(NotAsAskedError, match="exit code 6") as caught:
        await asyncio.to_thread(system.start, timeout_s=60)

    assert said in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert "planted" not in str(caught.value)
