"""Business ids: the same content again gets the first answer, other content under the same id is refused.

The outcome of a command id is kept for a window only. A business id (an order's, a payment's) is kept as long as its
row, so the row remembers what it was asked for.
"""

from __future__ import annotations

import hashlib

from actors.domain import canonical_json
from schemas.message import Command


def content_digest(command: Command) -> str:
    """SHA-256 of what `command` says, in hex. Fields at their default do not count, so new ones change nothing."""
    content = {"type": command.type_name(), "content": command.model_dump(mode="json", exclude_defaults=True)}
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()
