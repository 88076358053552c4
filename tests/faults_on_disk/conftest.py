"""What these tests need of the machine. What is missing is a visible skip with its remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.proof.disks.clocks import libfaketime
from scripts.proof.disks.injury import SmallDisk, ToolMissingError, check_strace


@pytest.fixture(scope="session")
def tools(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A small file system can be mounted and a process traced."""
    try:
        with SmallDisk(tmp_path_factory.mktemp("disk"), 1):
            pass
        check_strace()
    except ToolMissingError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def wrong_clocks() -> Path:
    """The library that makes clocks wrong."""
    try:
        return libfaketime()
    except ToolMissingError as missing:
        pytest.skip(str(missing))
