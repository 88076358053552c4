"""Archives come from a repository on this machine, so that these tests need no network."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from infra.servers.artifacts import (
    SERVERS,
    LockedArtifact,
    Server,
    class_path,
    default_cache_dir,
    read_lock,
    write_lock,
)
from infra.servers.errors import ArtifactError

ARCHIVES = {
    "org/example/alpha/1.0/alpha-1.0.jar": b"alpha" * 1000,
    "org/example/beta/2.1/beta-2.1.jar": b"beta" * 1000,
    "org/example/gamma/3/gamma-3-linux-x86_64.jar": b"gamma" * 1000,
    "org/example/libdelta/4.0/libdelta-4.0.so": b"delta" * 1000,
}


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A Maven repository on this machine, named as the user's mirror in jgo's configuration file."""
    root = tmp_path / "repository"
    for name, content in ARCHIVES.items():
        file = root / name
        file.parent.mkdir(parents=True)
        file.write_bytes(content)
        file.with_name(file.name + ".sha1").write_text(hashlib.sha1(content).hexdigest())
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(root)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    mirror(tmp_path, monkeypatch, server.server_address[1])
    yield root
    server.shutdown()
    server.server_close()
    thread.join()


def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    configuration = tmp_path / "jgo.conf"
    configuration.write_text(f"[repositories]\ncentral = http://127.0.0.1:{port}\n")
    monkeypatch.setenv("JGO_CONFIG_FILE", str(configuration))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server(tmp_path: Path) -> Server:
    lock_dir = tmp_path / "lock"
    lock_dir.mkdir()
    lines = [f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in ARCHIVES.items()]
    (lock_dir / "example-1.0.sha256").write_text("# an example\n" + "".join(lines))
    return Server("example", "1.0", ("org.example:alpha:1.0",), lock_dir)


def test_missing_archives_are_downloaded_and_the_work_is_shown(
    tmp_path: Path, repository: Path, server: Server
) -> None:
    lines: list[str] = []

    paths = class_path(server, cache_dir=tmp_path / "cache", progress=lines.append)

    assert [path.read_bytes() for path in paths] == list(ARCHIVES.values())
    assert "example 1.0: 4 Java archives" in lines[0]
    assert lines[-1].endswith("4 of 4")


def test_what_is_cached_needs_no_repository(
    tmp_path: Path, repository: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    class_path(server, cache_dir=tmp_path / "cache", progress=lambda _: None)
    mirror(tmp_path, monkeypatch, 1)
    lines: list[str] = []

    paths = class_path(server, cache_dir=tmp_path / "cache", progress=lines.append)

    assert len(paths) == len(ARCHIVES)
    assert lines == []


def test_a_damaged_archive_is_noticed_and_replaced(tmp_path: Path, repository: Path, server: Server) -> None:
    paths = class_path(server, cache_dir=tmp_path / "cache", progress=lambda _: None)
    paths[1].write_bytes(paths[1].read_bytes()[:-1] + b"!")

    class_path(server, cache_dir=tmp_path / "cache", progress=lambda _: None)

    assert paths[1].read_bytes() == ARCHIVES["org/example/beta/2.1/beta-2.1.jar"]


def test_an_archive_that_is_not_the_pinned_one_is_refused_and_not_kept(
    tmp_path: Path, repository: Path, server: Server
) -> None:
    changed = repository / "org/example/beta/2.1/beta-2.1.jar"
    changed.write_bytes(b"something else")
    changed.with_name(changed.name + ".sha1").write_text(hashlib.sha1(b"something else").hexdigest())

    with pytest.raises(ArtifactError, match=r"org.example:beta:2.1 was downloaded with SHA-256 \w+, but \w+ is pinned"):
        class_path(server, cache_dir=tmp_path / "cache", progress=lambda _: None)

    assert not (tmp_path / "cache/jars/org/example/beta/2.1/beta-2.1.jar").exists()


def test_without_a_network_the_sentence_says_what_is_missing_and_what_to_do(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror(tmp_path, monkeypatch, 1)  # nothing listens on port 1

    with pytest.raises(ArtifactError) as caught:
        class_path(server, cache_dir=tmp_path / "cache", progress=lambda _: None)

    assert re.search(r"org\.example:\w+:[\d.]+(:\S+)? could not be downloaded", str(caught.value))
    assert "connect to the network" in str(caught.value)
    assert "CONCORD_CACHE_DIR" in str(caught.value)
    assert [path.name for path in (tmp_path / "cache/jars").iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, repository: Path, server: Server) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")

    with pytest.raises(ArtifactError, match=r"cache of Java archives cannot be used.*CONCORD_CACHE_DIR"):
        class_path(server, cache_dir=tmp_path / "cache", progress=lambda _: None)


def test_two_processes_that_download_at_once_both_get_whole_archives(
    tmp_path: Path, repository: Path, server: Server
) -> None:
    program = (
        "import sys; from pathlib import Path; from infra.servers.artifacts import Server, class_path;"
        f"server = Server('example', '1.0', (), Path({str(server.lock_dir)!r}));"
        f"print(len(class_path(server, cache_dir=Path({str(tmp_path / 'cache')!r}))))"
    )
    both = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]

    assert [process.communicate(timeout=60)[0].strip() for process in both] == ["4", "4"]
    assert len(class_path(server, cache_dir=tmp_path / "cache")) == 4


def test_a_classifier_is_part_of_the_coordinate() -> None:
    artifact = LockedArtifact("org/example/gamma/3/gamma-3-linux-x86_64.jar", "0" * 64)

    assert artifact.coordinate == "org.example:gamma:3:linux-x86_64"


def test_a_packaging_other_than_jar_is_part_of_the_coordinate_at_its_position() -> None:
    plain = LockedArtifact("org/example/libdelta/4.0/libdelta-4.0.so", "0" * 64)
    classified = LockedArtifact("org/example/gamma/3/gamma-3-linux.dylib", "0" * 64)

    assert plain.coordinate == "org.example:libdelta:4.0::so:"
    assert classified.coordinate == "org.example:gamma:3:linux:dylib:"


def test_a_lock_file_names_the_whole_graph_except_what_is_excluded_with_what_only_that_needs(
    tmp_path: Path, repository: Path
) -> None:
    dependencies = {
        "alpha": [("beta", "2.1", "jar"), ("libdelta", "4.0", "so")],
        "beta": [("epsilon", "5", "jar")],  # of which there is no archive: resolving it would fail
        "libdelta": [],
    }
    versions = {"alpha": "1.0", "beta": "2.1", "libdelta": "4.0"}
    for name, needed in dependencies.items():
        elements = "".join(
            f"<dependency><groupId>org.example</groupId><artifactId>{artifact}</artifactId>"
            f"<version>{version}</version><type>{packaging}</type></dependency>"
            for artifact, version, packaging in needed
        )
        pom = (
            f"<project><modelVersion>4.0.0</modelVersion><groupId>org.example</groupId><artifactId>{name}</artifactId>"
            f"<version>{versions[name]}</version><dependencies>{elements}</dependencies></project>"
        )
        file = repository / "org/example" / name / versions[name] / f"{name}-{versions[name]}.pom"
        file.write_text(pom)
        file.with_name(file.name + ".sha1").write_text(hashlib.sha1(pom.encode()).hexdigest())
    server = Server("graph", "1", ("org.example:alpha:1.0",), tmp_path, excluded=("org.example:beta",))

    write_lock(server, progress=lambda _: None)

    assert [(artifact.path, artifact.sha256) for artifact in read_lock(tmp_path / "graph-1.sha256")] == [
        (path, hashlib.sha256(ARCHIVES[path]).hexdigest())
        for path in ("org/example/alpha/1.0/alpha-1.0.jar", "org/example/libdelta/4.0/libdelta-4.0.so")
    ]


@pytest.mark.parametrize(
    ("name", "root"),
    [("cassandra", "org.apache.cassandra:cassandra-all"), ("dynamodb", "com.amazonaws:DynamoDBLocal")],
)
def test_a_lock_names_the_server_in_the_pinned_version(name: str, root: str) -> None:
    server = SERVERS[name]
    locked = read_lock(server.lock_path)

    assert f"{root}:{server.version}" in {artifact.coordinate for artifact in locked}
    assert all(re.fullmatch("[0-9a-f]{64}", artifact.sha256) for artifact in locked)
    assert len({artifact.coordinate for artifact in locked}) == len(locked)


def test_kafkas_lock_names_the_broker_in_the_pinned_version_and_a_logging_binding() -> None:
    kafka = SERVERS["kafka"]
    locked = read_lock(kafka.lock_path)
    coordinates = {artifact.coordinate for artifact in locked}

    assert f"org.apache.kafka:kafka_2.13:{kafka.version}" in coordinates
    assert any(coordinate.startswith("org.apache.logging.log4j:log4j-slf4j-impl:") for coordinate in coordinates)
    assert all(re.fullmatch("[0-9a-f]{64}", artifact.sha256) for artifact in locked)
    assert len(coordinates) == len(locked)


def test_the_cache_is_in_the_users_cache_folder_unless_named() -> None:
    assert default_cache_dir({"XDG_CACHE_HOME": "/caches"}) == Path("/caches/concord")
    assert default_cache_dir({"CONCORD_CACHE_DIR": "/mine", "XDG_CACHE_HOME": "/caches"}) == Path("/mine")
