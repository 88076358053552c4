"""Replays on a running system, and the independent program that holds the tables against the files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from scripts.proof.running import NotAsAskedError, RunningSystem

FORMULAS = Path(__file__).parents[2] / "tests" / "end_to_end" / "formulas.py"
"""A program of its own, which shares no code with the system; run from its file."""

DUMPED_WITHIN_S = 600.0

DUMPED = (
    "inventory.products",
    "inventory.outcomes",
    "payment.wallets",
    "orders.outcomes",
    "orders.orders",
    "orders.returns",
)


def replay(system: RunningSystem, files: Sequence[Path], *, timeout_s: float = 3600, **options: int) -> dict[str, Any]:
    """`concord replay`, to its end; its summary. Raises NotAsAskedError unless it ends with 0."""
    told = system.concord("replay", *map(str, files), *_flags(options), timeout_s=timeout_s)
    if told.code != 0:
        raise NotAsAskedError(f"concord replay ended with {told.code}: {told.stdout[-2000:]} {told.stderr[-2000:]}")
    summary: dict[str, Any] = told.lines[-1]
    return summary


def start_replay(system: RunningSystem, files: Sequence[Path], **options: int) -> subprocess.Popen[bytes]:
    """`concord replay` beside whatever else is done to the system; its summary comes on stdout."""
    return system.start_concord("replay", *map(str, files), *_flags(options))


def check_formulas(
    system: RunningSystem,
    files: Sequence[Path],
    *,
    limit: int = 0,
    initial_stock: int = 1_000_000,
    initial_balance: int = 1_000_000_000,
    only_theirs: bool = False,
) -> dict[str, Any]:
    """What the independent program says of the tables as `concord table dump` prints them."""
    with TemporaryDirectory() as directory:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda name: _dump(system, name, Path(directory)), DUMPED))
        flags = {"limit": limit, "initial_stock": initial_stock, "initial_balance": initial_balance}
        done = subprocess.run(
            [
                *(sys.executable, "-I", str(FORMULAS), *map(str, files), "--tables", directory),
                *_flags(flags),
                *(["--only-theirs"] if only_theirs else []),
            ],
            capture_output=True,
            check=False,
        )
    if done.returncode not in (0, 1) or not done.stdout:
        raise NotAsAskedError(f"{FORMULAS} ended with {done.returncode}: {done.stderr.decode()[-2000:]}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def _dump(system: RunningSystem, name: str, directory: Path) -> None:
    told = system.concord("table", "dump", name, timeout_s=DUMPED_WITHIN_S)
    if told.code != 0:
        raise NotAsAskedError(f"concord table dump {name} ended with {told.code}: {told.stderr[-2000:]}")
    (directory / f"{name}.ndjson").write_text(told.stdout, encoding="utf-8")


def _flags(options: Mapping[str, int]) -> list[str]:
    return [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
