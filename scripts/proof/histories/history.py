"""What a workload writes down: transactions as their clients saw them.

Nothing here knows of the system under test; another program's history (a Java peer's, say) is judged the same way.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

RecordKey: TypeAlias = Hashable
"""What names a list or a register: any value with a readable text."""


class Outcome(StrEnum):
    """What the client was told. UNKNOWN: nothing, or that nobody can tell; the checker then goes by what others saw."""

    COMMITTED = "committed"
    ABORTED = "aborted"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Read:
    """A list's elements in order, or a register's value; an absent list is (), an absent register None."""

    key: RecordKey
    value: tuple[int, ...] | int | None


@dataclass(frozen=True, slots=True)
class Append:
    """An element put at the end of a list. No two appends of a history put the same element into one list."""

    key: RecordKey
    element: int


@dataclass(frozen=True, slots=True)
class Write:
    """A register's new value. No two writes of a history give one register the same value.

    `version` counts the register's committed changes from 1, where the system tells (`tx_version`); else None.
    """

    key: RecordKey
    value: int
    version: int | None = None


Operation: TypeAlias = Read | Append | Write


@dataclass(frozen=True, slots=True)
class Transaction:
    """One attempt: what it did in order, between two instants of one clock that all processes share.

    `ended_at` None: its client never heard. Only the order of instants means anything.
    """

    id: str
    process: str
    operations: tuple[Operation, ...]
    outcome: Outcome
    began_at: int
    ended_at: int | None
