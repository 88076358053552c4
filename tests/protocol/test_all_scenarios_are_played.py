"""That every scenario of the protocol is played, on every storage: told by the names of the tests.

What a scenario does elsewhere than its short description says, and why:

19      A process that has committed a transaction itself shows it under READ_COMMITTED even before its records say so.
20-22   On DynamoDB at SNAPSHOT: its global indexes lag behind (ScalarDB's, too), so SERIALIZABLE refuses them. 44 and
        45 then are that refusal.
22, 37  A get by an index counts as a scan: it is refused where it would return what its transaction has written.
        ScalarDB merges the write into what it returns, the index's value included.
44      Records that the transaction itself has written count as they were before. ScalarDB passes over them.
47-53   On DynamoDB with units no larger than a namespace: the whole storage is one unit there, and a transaction one
        write (55).
54      A read-only transaction under SERIALIZABLE is validated: it leaves no state row, but may be refused.
60      Participants are driven by one coordinator; that each puts the COMMITTED row itself is ScalarDB's older way,
        which works here because the row is the same.
61      Only where there is something to validate; what was written was checked when it was prepared.
64      Groups are read, not formed.
Values  TIMESTAMP is in no table of Cassandra, as in ScalarDB.
"""

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
