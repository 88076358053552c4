"""Business ids: the same content again gets the first answer, other content under the same id is refused.

The outcome of a command id is kept for a window only. A business id (an order's, a payment's) is kept as long as its
row, so the row remembers what it was asked for.
"""

from __future__ import annotations

import hashlib
from typing import Any, TypeVar

from actors.domain import Record, Refused, Table, Transaction, canonical_json
from schemas.message import Command

R = TypeVar("R", bound=Record)


def content_digest(command: Command) -> str:
    """SHA-256 of what `command` says, in hex. Fields at their default do not count, so new ones change nothing."""
    content = {"type": command.type_name(), "content": command.model_dump(mode="json", exclude_defaults=True)}
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


async def made_before(tx: Transaction, table: Table[R], *key: Any, by: Command, refusal: Refused) -> R | None:
    """What a command with the content of `by` has made under this business id; None if the id is new.

    Raises `refusal` if the id stands for other content. The record has a column `content_digest`.
    """
    existing = await tx.get(table, *key)
    if existing is not None and getattr(existing, "content_digest") != content_digest(by):  # noqa: B009
        raise refusal
    return existing
