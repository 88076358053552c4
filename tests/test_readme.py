"""The README is true: its links lead somewhere, its tests exist, its example runs, its tables name what there is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
LINKS = re.findall(r"\]\(([^)\s]+)\)", README)
TEST_LINKS = [link for link in LINKS if link.startswith("tests/") and "#" in link]


@pytest.mark.parametrize("link", sorted({link.partition("#")[0] for link in LINKS if "://" not in link}))
def test_every_link_leads_to_a_file_of_the_project(link: str) -> None:
    assert (ROOT / link).exists()


@pytest.mark.parametrize("link", TEST_LINKS)
def test_every_promise_names_a_test_that_exists(link: str) -> None:
    file, _, name = link.partition("#")

    assert re.search(rf"def {re.escape(name)}\(", (ROOT / file).read_text())


def test_each_promise_has_a_test() -> None:
    promises = README.partition("| promise | shown by |")[2].partition("\n\n")[0].splitlines()[2:]

    assert promises
    assert all("](tests/" in promise for promise in promises)


def test_the_example_of_the_engine_alone_runs(tmp_path: Path) -> None:
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "asyncio.run" in code]

    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, timeout=60)

    assert done.stdout == "in both accounts: 100\n", done.stderr


def test_every_command_of_the_command_line_is_explained() -> None:
    from scripts.cli.main import app

    names = {command.name for command in app.registered_commands} | {group.name for group in app.registered_groups}

    assert names
    assert [name for name in sorted(filter(None, names)) if f"concord {name}" not in README] == []
