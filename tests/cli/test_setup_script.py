"""The set-up script finds a Python that will do, or says which package is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A folder for PATH with nothing in it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    return folder


def install(folder: Path, name: str, *, old: bool = False, without_venv: bool = False) -> None:
    """A `python` that is what it says: this one, an older one, or one whose venv is packaged apart."""
    refuse = {"version_info": old, "ensurepip": without_venv}
    cases = "".join(f'case "$2" in *{word}*) exit 1;; esac\n' for word, wanted in refuse.items() if wanted)
    (folder / name).write_text(f'#!/bin/sh\n{cases}exec {sys.executable} "$@"\n')
    (folder / name).chmod(0o755)


def find_python(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/bash", "-c", f". {ROOT}/scripts/setup.sh; find_python"],
        env={"PATH": str(folder), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_shim_for_a_version_that_is_not_there_is_passed_over(path: Path) -> None:
    install(path, "python3.11", old=True)  # fails whatever it is asked
    install(path, "python3")

    assert find_python(path).stdout == "python3\n"


def test_a_named_python_comes_first(path: Path) -> None:
    install(path, "python3.11")
    install(path, "mine")

    assert find_python(path, CONCORD_PYTHON=str(path / "mine")).stdout == f"{path / 'mine'}\n"


def test_where_venv_is_missing_the_package_is_named(path: Path) -> None:
    install(path, "python3", without_venv=True)

    done = find_python(path)

    assert (done.returncode, done.stdout) == (1, "")
    assert "apt-get install python3-venv" in done.stderr


def test_where_python_is_too_old_that_is_said(path: Path) -> None:
    install(path, "python3", old=True)

    done = find_python(path)

    assert done.returncode == 1
    assert "Python 3.11 or newer was not found" in done.stderr


@pytest.mark.parametrize("script", ["demo", "test", "setup.sh"])
def test_scripts_have_no_syntax_errors(script: str) -> None:
    subprocess.run(["/bin/bash", "-n", str(ROOT / "scripts" / script)], check=True)
