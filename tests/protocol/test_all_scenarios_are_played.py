"""That every scenario of the protocol is played, on every storage: told by the names of the tests."""

from __future__ import annotations

import ast
import re
from pathlib import Path

FIRST, LAST = 1, 66
ON_EVERY_STORAGE = frozenset({"world", "storage", "new_world", "places", "grouped", "everything", "ledger", "diary"})
"""Fixtures that make a test play on whatever storage `conftest.py` gives it."""


def played() -> set[int]:
    """The scenarios that have a test on every storage."""
    return {
        int(name[1])
        for path in Path(__file__).parent.glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.AsyncFunctionDef)
        and (name := re.match(r"test_scenario_(\d\d)_", node.name)) is not None
        and not ON_EVERY_STORAGE.isdisjoint(argument.arg for argument in node.args.args)
    }


def test_each_of_the_66_scenarios_has_a_test_that_plays_on_every_storage() -> None:
    assert played() == set(range(FIRST, LAST + 1))
