"""Running several operations side by side, all to their end (ScalarDB's ParallelExecutor)."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from infra.consensus_commit.errors import TransactionConflictError

T = TypeVar("T")


async def in_parallel(operations: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all operations, in order.

    None is left running: when some fail, the others are still waited for, so that what was begun is known. Then the
    first conflict is raised, or else the first error.
    """
    if len(operations) == 1:
        return [await operations[0]]
    results = await asyncio.gather(*operations, return_exceptions=True)
    errors = [result for result in results if isinstance(result, BaseException)]
    if errors:
        raise next((error for error in errors if isinstance(error, TransactionConflictError)), errors[0])
    return [result for result in results if not isinstance(result, BaseException)]
