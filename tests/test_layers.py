"""Drift guards: who may import whom, and that the engine could be copied elsewhere."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENGINE = (
    "infra/__init__.py",
    "infra/clock.py",
    "infra/failpoints.py",
    "infra/recent.py",
    "infra/storage",
    "infra/consensus_commit",
)
"""What stands alone. `failpoints` are no-ops that the engine's steps are named by."""

NOT_ENGINE = {
    "infra.config",
    "infra.messaging",
    "infra.metrics",
    "infra.monitoring",
    "infra.otlp",
    "infra.servers",
    "infra.telemetry",
    "infra.traced_storage",
    "infra.tracing",
}


def lint_imports(directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(directory)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def contract(name: str) -> configparser.SectionProxy:
    contracts = configparser.ConfigParser()
    contracts.read(ROOT / ".importlinter")
    return contracts[f"importlinter:contract:{name}"]


def test_every_import_respects_the_layers() -> None:
    done = lint_imports(ROOT)

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("schemas/topics.py", "import infra.clock", "Layers"),
        ("infra/storage/port.py", "import pydantic", "The engine stands alone"),
        ("infra/consensus_commit/commit.py", "import infra.config", "The engine stands alone"),
        ("infra/storage/port.py", "import infra.consensus_commit.states", "Storage knows no transactions"),
        ("streams/app.py", "import ray", "Ray"),
        ("actors/home.py", "import faust", "Faust"),
        ("actors/home.py", "import aiokafka", "Domains and actors know no Kafka"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, module: str, line: str, contract: str) -> None:
    for package in ("schemas", "infra", "actors", "streams", "scripts"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".importlinter", tmp_path)
    with (tmp_path / module).open("a") as file:
        file.write(f"\n{line}\n")

    done = lint_imports(tmp_path)

    assert done.returncode != 0
    broken = [report for report in done.stdout.splitlines() if "BROKEN" in report]
    assert any(report.startswith(contract) for report in broken), done.stdout


def test_every_part_of_infra_is_either_the_engine_or_forbidden_to_it() -> None:
    parts = {f"infra.{path.stem}" for path in (ROOT / "infra").glob("*.py") if path.stem != "__init__"}
    parts |= {f"infra.{path.parent.name}" for path in (ROOT / "infra").glob("*/__init__.py")}
    engine = {name.removesuffix(".py").replace("/", ".") for name in ENGINE[1:]}

    assert parts == engine | NOT_ENGINE
    assert set(contract("engine")["source_modules"].split()) == engine
    assert set(contract("engine")["forbidden_modules"].split()) >= NOT_ENGINE


def test_the_engine_works_when_it_is_copied_elsewhere(tmp_path: Path) -> None:
    for name in ENGINE:
        source, target = ROOT / name, tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    program = """
import asyncio
from pathlib import Path
from infra.consensus_commit.manager import TransactionManager
from infra.storage.operations import DataType, Key, TableSchema
from infra.storage.connect import connect

async def main():
    storage = connect(f"sqlite://{Path('data').absolute()}")
    manager = TransactionManager(storage)
    await manager.create_coordinator_tables()
    table = TableSchema("bank", "accounts", {"id": DataType.INT, "balance": DataType.BIGINT}, ("id",))
    await manager.create_table(table)
    async def work(transaction):
        await transaction.insert(table, Key((1,)), {"balance": 5})
    await manager.run(work)
    async with manager.begin() as transaction:
        print((await transaction.get(table, Key((1,))))["balance"])
    await manager.close()
    await storage.close()

asyncio.run(main())
"""
    # -I -S: neither this project nor any installed package can be found.
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{program}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.stdout.strip() == "5", done.stderr
