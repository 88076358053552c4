"""Java archives of the servers: pinned, downloaded once, verified at every start.

A server's archives are named in a committed lock file beside this module: one line each, `sha256  path`, where
path is the archive's place in a Maven repository. Only these archives are fetched: nothing is resolved while
the system starts, so neither a changed pom nor a changed mirror can alter what runs. jgo knows the repository
(and the user's own mirrors, in its configuration file); it is given a staging folder, and an archive moves from
there into the cache only after its checksum was right. A file in the cache is therefore whole, whatever was
interrupted.

To move to another version, change the table and run `python -m infra.servers.artifacts SERVER`: that resolves
the dependency graph and writes the lock file anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from infra.servers.errors import ArtifactError

CACHE_VARIABLE = "CONCORD_CACHE_DIR"
_DOWNLOADS_AT_ONCE = 6
_HERE = Path(__file__).parent

Progress = Callable[[str], None]
"""Told one line at a time what is being done, for people."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server that runs from Java archives: Maven coordinates of its roots; their graph is in the lock file.

    `excluded` names what is left out of that graph, with all that only it needs: `group:artifact`, where `*` stands
    for any, as in a pom's exclusions.
    """

    name: str
    version: str
    coordinates: tuple[str, ...]
    lock_dir: Path = _HERE
    excluded: tuple[str, ...] = ()

    @property
    def lock_path(self) -> Path:
        return self.lock_dir / f"{self.name}-{self.version}.sha256"


SERVERS: Mapping[str, Server] = {
    "kafka": Server(
        name="kafka",
        version="4.1.0",
        # Kafka logs through SLF4J and leaves the binding to its distribution, so it is named here; the "!" keeps
        # log4j's parent pom from choosing the versions of Kafka's own libraries.
        coordinates=("org.apache.kafka:kafka_2.13:4.1.0", "org.apache.logging.log4j:log4j-slf4j-impl:2.24.3!"),
    ),
    "cassandra": Server(
        name="cassandra",
        version="5.0.8",
        coordinates=("org.apache.cassandra:cassandra-all:5.0.8",),
    ),
    "dynamodb": Server(
        name="dynamodb",
        version="2.6.1",
        coordinates=("com.amazonaws:DynamoDBLocal:2.6.1",),
        # The native SQLite libraries of systems that Concord does not run on.
        excluded=(
            "com.almworks.sqlite4java:sqlite4java-win32-x64",
            "com.almworks.sqlite4java:sqlite4java-win32-x86",
            "com.almworks.sqlite4java:libsqlite4java-linux-i386",
        ),
    ),
}


@dataclass(frozen=True, slots=True)
class LockedArtifact:
    """One archive of a lock file. `path` is relative, in the layout of a Maven repository."""

    path: str
    sha256: str

    @property
    def coordinate(self) -> str:
        """group:artifact:version, the classifier where the file name has one, the packaging where it is no jar."""
        *group, artifact, version, file = self.path.split("/")
        classifier, _, packaging = file.removeprefix(f"{artifact}-{version}").rpartition(".")
        parts = (".".join(group), artifact, version, classifier.removeprefix("-"))
        if packaging != "jar":  # an empty part makes jgo take the parts by position: …:classifier:packaging:scope
            return ":".join((*parts, packaging, ""))
        return ":".join(filter(None, parts))


def default_cache_dir(environment: Mapping[str, str] | None = None) -> Path:
    """Where archives are kept between runs: CONCORD_CACHE_DIR, else `concord` in the user's cache folder."""
    environment = os.environ if environment is None else environment
    if named := environment.get(CACHE_VARIABLE):
        return Path(named).expanduser()
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "concord"


def read_lock(path: Path) -> list[LockedArtifact]:
    """The archives that a lock file pins, in its order (which is the order of the class path)."""
    lines = (line.split(maxsplit=1) for line in path.read_text().splitlines() if line and not line.startswith("#"))
    return [LockedArtifact(path=name, sha256=digest) for digest, name in lines]


def class_path(server: Server, *, cache_dir: Path | None = None, progress: Progress | None = None) -> list[Path]:
    """The server's archives on this machine, each with its pinned checksum; downloads what is missing.

    Every archive is hashed every time: 45 MB take a tenth of a second, less than explaining a damaged one.
    Two processes may call this at once; the second waits and finds the work done.
    Raises ArtifactError when something cannot be downloaded, stored or is not what was pinned.
    """
    root = (default_cache_dir() if cache_dir is None else cache_dir) / "jars"
    locked = read_lock(server.lock_path)
    missing = _missing(root, locked)
    if missing:
        with _exclusive(root):
            missing = _missing(root, locked)  # another process may have been faster
            if missing:
                _download(server, missing, root, progress or _print_progress)
    return [root / artifact.path for artifact in locked]


def _missing(root: Path, locked: Sequence[LockedArtifact]) -> list[LockedArtifact]:
    return [artifact for artifact in locked if _sha256(root / artifact.path) != artifact.sha256]


def _sha256(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unusable_cache(path, error) from error


@contextmanager
def _exclusive(root: Path) -> Iterator[None]:
    try:
        root.mkdir(parents=True, exist_ok=True)
        file = (root / ".lock").open("w")
    except OSError as error:
        raise _unusable_cache(root, error) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file gives the lock back


def _download(server: Server, missing: Sequence[LockedArtifact], root: Path, progress: Progress) -> None:
    title = f"{server.name} {server.version}"
    progress(f"Downloading {title}: {len(missing)} Java archives, once; they are kept in {root}.")
    try:
        staging = Path(tempfile.mkdtemp(prefix="staging-", dir=root))
    except OSError as error:
        raise _unusable_cache(root, error) from error
    try:
        context = _maven_context(staging)
        with ThreadPoolExecutor(_DOWNLOADS_AT_ONCE) as pool:
            downloads = pool.map(lambda artifact: _fetch(context, artifact, staging), missing)
            for done, (artifact, staged) in enumerate(zip(missing, downloads, strict=True), start=1):
                _keep(staged, root / artifact.path)
                if done % 5 == 0 or done == len(missing):
                    progress(f"Downloading {title}: {done} of {len(missing)}")
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _fetch(context: Any, artifact: LockedArtifact, staging: Path) -> Path:
    dependency = context.create_dependency(artifact.coordinate)
    try:
        staged = Path(dependency.artifact.resolve())
    except OSError as error:
        # requests' exceptions are OSErrors too; those of the file system alone carry the staging folder's name.
        if error.filename is not None and str(error.filename).startswith(str(staging)):
            raise _unusable_cache(staging, error) from error
        raise _not_downloaded(artifact, error) from error
    except (RuntimeError, ValueError) as error:
        raise _not_downloaded(artifact, error) from error
    actual = _sha256(staged)
    if actual != artifact.sha256:
        raise ArtifactError(
            f"{artifact.coordinate} was downloaded with SHA-256 {actual}, but {artifact.sha256} is pinned.",
            remedy="Do not use it: check the mirror in jgo's configuration file, and try again.",
        )
    return staged


def _keep(staged: Path, place: Path) -> None:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(staged, place)
    except OSError as error:
        raise _unusable_cache(place, error) from error


def _maven_context(repo_cache: Path) -> Any:
    # The parts of jgo below `jgo.build`: building an environment would look for a JDK to classify modules with,
    # in an index elsewhere, and all that is wanted here are the files.
    from jgo.config import GlobalSettings
    from jgo.constants import MAVEN_CENTRAL_URL
    from jgo.maven import MavenContext

    repositories = dict(GlobalSettings.load().repositories)  # the user's mirrors come first, and may be `central`
    repositories.setdefault("central", MAVEN_CENTRAL_URL)
    return MavenContext(repo_cache=repo_cache, remote_repos=repositories)


def _not_downloaded(artifact: LockedArtifact, error: Exception) -> ArtifactError:
    reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    return ArtifactError(
        f"{artifact.coordinate} could not be downloaded ({reason}).",
        remedy="The first start needs the Maven repository: connect to the network or name a mirror under "
        f"[repositories] in jgo's configuration file, or copy {CACHE_VARIABLE} from a machine that has started once.",
        setting=CACHE_VARIABLE,
    )


def _unusable_cache(path: Path, error: OSError) -> ArtifactError:
    return ArtifactError(
        f"The cache of Java archives cannot be used: {path}: {error.strerror or error}.",
        remedy=f"Make room or permissions there, or set {CACHE_VARIABLE} to another folder.",
        setting=CACHE_VARIABLE,
    )


def _print_progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def write_lock(server: Server, *, progress: Progress = _print_progress) -> None:
    """Resolve the server's dependency graph and write its lock file: for whoever changes a version."""
    from jgo.parse import Coordinate

    with tempfile.TemporaryDirectory() as staging:
        context = _maven_context(Path(staging))
        excluded = [context.project(*name.split(":")) for name in server.excluded]
        roots = [
            context.create_dependency(replace(Coordinate.parse(name), scope="compile"), exclusions=excluded)
            for name in server.coordinates
        ]
        inputs, transitive = context.resolver.resolve(roots)
        runtime = [*inputs, *(item for item in transitive if item.scope in ("compile", "runtime"))]
        lines = []
        for dependency in runtime:
            path = Path(dependency.artifact.resolve())
            progress(f"{dependency.artifact}")
            lines.append(f"{_sha256(path)}  {path.relative_to(staging).as_posix()}\n")
    header = f"# {server.name} {server.version}: {' + '.join(server.coordinates)} and what they need at run time.\n"
    server.lock_path.write_text(header + "".join(sorted(lines, key=lambda line: line.split()[1])))


if __name__ == "__main__":
    write_lock(SERVERS[sys.argv[1]])
