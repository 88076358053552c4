"""`concord doctor`: what is installed, reachable and configured, with the remedy for what is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import typer

from scripts.cli.exit_codes import ExitCode
from scripts.cli.options import DEFAULT_DIRECTORY, Data, Shape, command
from scripts.cli.output import Output
from scripts.cli.system import System

PACKAGES = ("aiokafka", "faust-streaming", "jgo", "prometheus-client", "pydantic", "ray", "structlog", "typer")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `remedy` is what to do where `ok` is False."""

    check: str
    ok: bool
    found: str
    remedy: str = ""


def register(app: typer.Typer) -> None:
    @command(app, "doctor")
    def doctor(data: Data = DEFAULT_DIRECTORY, output: Shape = None) -> ExitCode:
        """What is installed, reachable and configured; exit code 1 if something is not in order."""
        findings = list(examine(data))
        shape = Output.of(output)
        rows: list[dict[str, Any]] = [asdict(finding) for finding in findings]
        if shape.human:
            rows = [{**row, "ok": "ok" if row["ok"] else "NO"} for row in rows]
        shape.table(rows, ("check", "ok", "found", "remedy"))
        return ExitCode.DONE if all(finding.ok for finding in findings) else ExitCode.FAILED


def examine(directory: Path) -> Iterator[Finding]:
    """Every finding. Checks go on after one that fails."""
    yield _python()
    yield from _packages()
    yield _attempt("java", _java)
    for server in ("kafka", "cassandra", "dynamodb"):
        yield _attempt(f"{server} archives", partial(_archives, server))
    yield _attempt("settings", lambda: _settings(directory))
    yield _attempt("directory", lambda: _directory(directory))
    system = System.find(directory)
    if system.running:
        yield Finding("system", True, f"runs in {directory}")
        yield _attempt("kafka", lambda: _kafka(system))
        yield _attempt("topics", lambda: _topics(system))
        yield _attempt("http", lambda: _http(system))
    elif _is_elsewhere(system):
        yield Finding("system", True, "the one of profile cluster, where the settings say")
        yield _attempt("kafka", lambda: _kafka(system))
        yield _attempt("topics", lambda: _topics(system))
    else:
        yield Finding("system", True, f"rests in {directory}; `concord up` starts it")
        yield _attempt("ports", lambda: _ports(directory))
    yield _attempt("storage", lambda: _storage(system))


def _attempt(check: str, look: Callable[[], str]) -> Finding:
    """The finding of `look`, which returns what it found or raises why it is not in order."""
    try:
        return Finding(check, True, look())
    except Exception as error:  # whatever it is, the next check is still worth making
        said = getattr(error, "message", "") or str(error) or type(error).__name__
        return Finding(check, False, said, getattr(error, "remedy", "") or "")


def _python() -> Finding:
    import platform
    import sys

    ok = sys.version_info >= (3, 11)
    found = f"{platform.python_version()} at {sys.executable}"
    return Finding("python", ok, found, "" if ok else "Install Python 3.11 or newer.")


def _packages() -> Iterator[Finding]:
    from importlib.metadata import PackageNotFoundError, version

    for name in PACKAGES:
        try:
            yield Finding(name, True, version(name))
        except PackageNotFoundError:
            yield Finding(name, False, "not installed", "Run ./scripts/demo or ./scripts/test, which install it.")


def _java() -> str:
    from infra.servers.java import find_java

    java = find_java()
    return f"version {java.version} from {java.source}: {java.executable}"


def _archives(server: str) -> str:
    from infra.servers.artifacts import SERVERS, default_cache_dir, read_lock

    root = default_cache_dir() / "jars"
    locked = read_lock(SERVERS[server].lock_path)
    missing = sum(not (root / artifact.path).exists() for artifact in locked)
    rest = f"; {missing} will be downloaded by its first start" if missing else ""
    return f"{len(locked) - missing} of {len(locked)} in {root}{rest}"


def _settings(directory: Path) -> str:
    from infra.config import describe_settings, load_settings

    changed = [
        f"{line.name} = {line.value}"
        for line in describe_settings(load_settings(data_dir=directory))
        if line.value != line.default and line.name != "data_dir"
    ]
    return "; ".join(changed) or "all at their defaults"


def _directory(directory: Path) -> str:
    import shutil

    from scripts.preflight import check_directory

    if not directory.exists():
        return f"{directory.absolute()} will be made by the first start"
    check_directory(directory)
    return f"{directory.absolute()}, {shutil.disk_usage(directory).free // 2**20} MB free"


def _ports(directory: Path) -> str:
    from infra.config import load_settings
    from scripts.preflight import PORTS, check_ports

    settings = load_settings(data_dir=directory)
    check_ports(settings)
    return ", ".join(f"{purpose}: {value(settings) or 'any'}" for _, purpose, value in PORTS)


def _kafka(system: System) -> str:
    import asyncio

    from infra.messaging.reader import cluster_id

    kafka = system.kafka
    return f"{kafka.bootstrap_servers} ({kafka.security_protocol}), cluster {asyncio.run(cluster_id(kafka))}"


def _is_elsewhere(system: System) -> bool:
    """Whether there is a system without a directory here."""
    try:
        return not system.runtime and system.settings.profile == "cluster"
    except Exception:  # settings that cannot be used were told of above
        return False


class _Drift(Exception):
    """Topics are not as they are declared."""

    remedy = (
        "See `concord topics`. Create what is missing with `concord topics --create`; change what differs with Kafka's "
        "own tools, or the settings. More partitions send a key's next command elsewhere than its last: drain first."
    )


def _topics(system: System) -> str:
    import asyncio

    from infra.messaging.topics import describe_topics
    from scripts.wiring import kafka_topics

    found = asyncio.run(describe_topics(system.kafka, kafka_topics(system.settings)))
    if drifted := [f"{topic.name}: {', '.join(topic.drift)}" for topic in found if topic.drift]:
        raise _Drift("; ".join(drifted))
    return f"all {len(found)} as declared"


def _http(system: System) -> str:
    import urllib.request

    url = f"{system.runtime['http']}/readyz"
    with urllib.request.urlopen(url, timeout=5) as response:
        return f"{url} says {response.status}"


def _storage(system: System) -> str:
    import asyncio

    from infra.config import without_secrets
    from infra.storage.errors import UnavailableStorageError
    from scripts.connections import open_storage

    settings = system.settings

    async def look() -> int:
        storage = open_storage(settings)
        try:
            return len(await storage.tables())
        finally:
            await storage.close()

    try:
        return f"{without_secrets(settings.storage_url)}, {asyncio.run(look())} tables"
    except UnavailableStorageError:
        if not system.cassandra_rests:
            raise
        return f"Cassandra in {settings.data_dir / 'cassandra'}, which rests with the system"
