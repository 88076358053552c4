from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from scripts.proof.replaying import replay
from tests.end_to_end.harness import System
from tests.end_to_end.shop_files import write_invoices

RETAIL_VARIABLE = "CONCORD_RETAIL_DATA"
RETAIL_DEFAULT = Path(__file__).parents[2].parent / "shared" / "data" / "online_retail"


@pytest.fixture(scope="session")
def december() -> Path:
    """Online Retail of December 2010: of the folder that CONCORD_RETAIL_DATA names, else of one beside the project."""
    folder = Path(os.environ.get(RETAIL_VARIABLE) or RETAIL_DEFAULT)
    file = folder / "2010-12.csv.gz"
    if not file.is_file():
        pytest.skip(f"{file} is not there: Online Retail is no part of the project; {RETAIL_VARIABLE} may say where")
    return file


@dataclass(frozen=True)
class Replayed:
    """A file of generated invoices, and what its replay on the shared system came to."""

    file: Path
    summary: dict[str, Any]


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def replayed(system: System, tmp_path_factory: pytest.TempPathFactory) -> Replayed:
    """Invoices that there is plenty of everything for, replayed on the shared system without any fault."""
    file = tmp_path_factory.mktemp("invoices") / "plenty.csv"
    write_invoices(file, invoices=90, seed=7, mark="77")
    return Replayed(file, await asyncio.to_thread(replay, system.running, [file]))
