"""The README is true: its links lead somewhere, its tests exist, its example runs, its tables name what there is."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
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


GUIDE = (ROOT / "infra/consensus_commit/README.md").read_text()
EXAMPLES = dict(re.findall(r"```python\n# (\w+)\n(.*?)```", GUIDE, re.DOTALL))


@pytest.mark.parametrize("storage", ["sqlite", "cassandra"])
def test_the_examples_of_the_engines_guide_run(storage: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    address = ""
    if storage == "cassandra":
        server = request.getfixturevalue("cassandra")
        address = f"{server.contact_point}:{server.port}"
    example = EXAMPLES[storage].replace("/var/lib/bank", str(tmp_path)).replace("127.0.0.1:9042", address)
    whole = example + EXAMPLES["any"] + EXAMPLES["groups"] + "await storage.close()\n"
    # Keyspaces of its own: the server is shared with other tests.
    whole = whole.replace('"bank"', '"bank_of_the_guide"')
    whole = whole.replace("(storage", '(storage, coordinator_namespace="coordinator_of_the_guide"')
    program = "import asyncio\n\nasync def main():\n" + textwrap.indent(whole, "    ") + "\nasyncio.run(main())\n"

    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100)

    assert done.stdout == "[70, 30] 30\n[71, 31]\n", done.stderr


@pytest.mark.parametrize("link", sorted({link for link in re.findall(r"\]\(([^)\s]+)\)", GUIDE) if "://" not in link}))
def test_every_link_of_the_engines_guide_leads_to_a_file(link: str) -> None:
    assert (ROOT / "infra/consensus_commit" / link).exists()


def test_every_command_of_the_command_line_is_explained() -> None:
    from scripts.cli.main import app

    names = {command.name for command in app.registered_commands} | {group.name for group in app.registered_groups}

    assert names
    assert [name for name in sorted(filter(None, names)) if f"concord {name}" not in README] == []
