"""A real DynamoDB Local for tests, as plain functions; `tests/conftest.py` makes fixtures of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from infra.servers.dynamodb import LocalDynamoDb


@asynccontextmanager
async def running_dynamodb() -> AsyncIterator[LocalDynamoDb]:
    """A DynamoDB Local with its tables in memory, stopped at the end: 1 s and 200 MB.

    Tests must neither stop, kill nor pause it: those that do start one of their own.
    """
    dynamodb = LocalDynamoDb(None)
    await dynamodb.start()
    try:
        yield dynamodb
    finally:
        await dynamodb.stop()
