"""Pieces of statements that CQL and SQLite's SQL have in common. Pure: names in, text out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from infra.storage.validation import check_identifier

MAX_CACHED_STATEMENTS = 500
"""Shapes of statements that one table keeps."""

Item = TypeVar("Item")


def quoted(name: str) -> str:
    """A name as it stands in a statement; InvalidOperationError for one that could be more than a name."""
    return f'"{check_identifier(name)}"'


def listed(columns: Iterable[str]) -> str:
    return ", ".join(map(quoted, columns))


def placeholders(count: int) -> str:
    """Places for so many parameters."""
    return ", ".join("?" * count)


def conjunction(terms: Iterable[str]) -> str:
    return " AND ".join(terms)


def remember(cache: dict[object, Item], shape: object, value: Item) -> Item:
    """Keep `value` under `shape`, and nothing else once there are too many."""
    if len(cache) >= MAX_CACHED_STATEMENTS:
        cache.clear()
    cache[shape] = value
    return value
