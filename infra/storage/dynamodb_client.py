"""Requests to DynamoDB: who repeats them, and what each answer means.

The driver repeats nothing; only here is known what may be repeated.

Reads are repeated, with growing pauses, whatever kept them from being served.
Writes are repeated only after an answer that says that nothing was written and that this may pass: another
transaction was at work on an item, or the capacity was used up. Then the conditions are evaluated anew, as if the
request had been made later.

What a write without an answer means
    refused      its connection was never made: nothing was sent, nothing was written (UnavailableStorageError)
    unknown      the connection broke, time ran out, or the server reported an error of its own (UnknownOutcomeError)

A TransactWriteItems of unknown outcome is sent once more under the same ClientRequestToken, which makes it apply at
most once within ten minutes. Only success is believed: it says that the batch is applied, by whichever of the two.
Every other answer leaves the outcome unknown, because the first request may still be on its way. A single UpdateItem
or DeleteItem has no token and is not sent again: after its own success its condition no longer holds.

Never here: the meaning of a request.
"""

from __future__ import annotations

import asyncio
import random
import socket
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import aiohttp
from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    HTTPClientError,
    NoCredentialsError,
    NoRegionError,
    PartialCredentialsError,
    SSLError,
    TokenRetrievalError,
)

from infra.storage.errors import (
    InvalidOperationError,
    NoMutationError,
    StorageError,
    UnavailableStorageError,
    UnknownOutcomeError,
)

Sleep = Callable[[float], Awaitable[None]]
Response = Mapping[str, Any]

MAX_CONNECTIONS = 64
MAX_UNANSWERED = 3
_FIRST_PAUSE_S = 0.01
_LONGEST_PAUSE_S = 1.0


class Meaning(Enum):
    """What became of a request that was not served."""

    CONDITION = auto()  # a condition did not hold; nothing was written
    INVALID = auto()  # it can never succeed
    ABSENT = auto()  # there is no such table (or index)
    BUSY = auto()  # the table or index is being made or removed, or exists
    CONFLICT = auto()  # another transaction is at work on the same item; nothing was written
    THROTTLED = auto()  # the capacity is used up; nothing was written
    REFUSED = auto()  # nothing was written, and repeating it at once is no use
    UNKNOWN = auto()  # it may have been applied


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request was not served, in words, and what to do about it."""

    meaning: Meaning
    message: str
    remedy: str = ""

    def as_error(self) -> StorageError:
        match self.meaning:
            case Meaning.CONDITION:
                return NoMutationError(self.message)
            case Meaning.INVALID:
                return InvalidOperationError(self.message)
            case Meaning.UNKNOWN:
                return UnknownOutcomeError(self.message)
            case _:
                return UnavailableStorageError(self.message, remedy=self.remedy)


class RequestFailedError(Exception):
    """A request of administration was not served; `failure` says why. It never leaves the adapter."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


_CODES: Mapping[str, Meaning] = {
    "ConditionalCheckFailedException": Meaning.CONDITION,
    "ValidationException": Meaning.INVALID,
    "SerializationException": Meaning.INVALID,
    "IdempotentParameterMismatchException": Meaning.INVALID,
    "ItemCollectionSizeLimitExceededException": Meaning.INVALID,
    "ResourceNotFoundException": Meaning.ABSENT,
    "TableNotFoundException": Meaning.ABSENT,
    "ResourceInUseException": Meaning.BUSY,
    "LimitExceededException": Meaning.BUSY,
    "TransactionConflictException": Meaning.CONFLICT,
    "ProvisionedThroughputExceededException": Meaning.THROTTLED,
    "RequestLimitExceeded": Meaning.THROTTLED,
    "ThrottlingException": Meaning.THROTTLED,
    "TransactionInProgressException": Meaning.UNKNOWN,
}

# The reasons of a cancelled transaction. The first of these that any item has is the reason of the whole.
_REASONS: Sequence[tuple[str, Meaning]] = (
    ("ConditionalCheckFailed", Meaning.CONDITION),
    ("ValidationError", Meaning.INVALID),
    ("ItemCollectionSizeLimitExceeded", Meaning.INVALID),
    ("ProvisionedThroughputExceeded", Meaning.THROTTLED),
    ("ThrottlingError", Meaning.THROTTLED),
    ("TransactionConflict", Meaning.CONFLICT),
)

_REMEDIES: Mapping[Meaning, str] = {
    Meaning.THROTTLED: "raise the table's capacity, or pay by request; spread hot keys",
    Meaning.CONFLICT: "try again: another transaction is writing the same items",
    Meaning.BUSY: "wait until the table is ACTIVE; the number of tables and of changes at once is limited",
}

_CREDENTIALS_REMEDY = (
    "give the region in the URL (region=…) or in AWS_DEFAULT_REGION, and credentials in AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY or in the shared files that AWS tools read"
)
_ENDPOINT_REMEDY = "check that the endpoint is right and that this machine reaches it"


def meaning_of(error: Exception) -> Failure:
    """What an exception of the driver says about the request that raised it."""
    match error:
        case ClientError():
            return _meaning_of_answer(error)
        case NoCredentialsError() | PartialCredentialsError() | NoRegionError() | TokenRetrievalError():
            return Failure(Meaning.REFUSED, f"DynamoDB cannot be asked: {error}", _CREDENTIALS_REMEDY)
        case ConnectTimeoutError() | SSLError():
            return Failure(Meaning.REFUSED, f"DynamoDB cannot be reached: {error}", _ENDPOINT_REMEDY)
        case EndpointConnectionError():
            # The driver says this of a connection that breaks in the middle, too.
            if isinstance(error.kwargs.get("error"), aiohttp.ClientConnectorError | socket.gaierror):
                return Failure(Meaning.REFUSED, f"DynamoDB cannot be reached: {error}", _ENDPOINT_REMEDY)
            return Failure(Meaning.UNKNOWN, f"DynamoDB's answer was lost: {error}", _ENDPOINT_REMEDY)
        case HTTPClientError():
            return Failure(Meaning.UNKNOWN, f"DynamoDB's answer was lost: {error}", _ENDPOINT_REMEDY)
        case BotoCoreError():
            return Failure(Meaning.UNKNOWN, f"DynamoDB's answer was not understood: {error}")
        case _:
            return Failure(Meaning.UNKNOWN, f"DynamoDB's answer was lost: {type(error).__name__}", _ENDPOINT_REMEDY)


def _meaning_of_answer(error: ClientError) -> Failure:
    code = str(error.response.get("Error", {}).get("Code", ""))
    said = str(error.response.get("Error", {}).get("Message", "")) or code
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
    if code == "TransactionCanceledException":
        reasons = {reason.get("Code") for reason in error.response.get("CancellationReasons", ())}
        for reason, meaning in _REASONS:
            if reason in reasons:
                return Failure(meaning, f"DynamoDB cancelled the batch: {reason}", _REMEDIES.get(meaning, ""))
        return Failure(Meaning.REFUSED, f"DynamoDB cancelled the batch: {said}")
    meaning = _CODES.get(code, Meaning.REFUSED if 400 <= status < 500 else Meaning.UNKNOWN)
    remedy = _REMEDIES.get(meaning, "")
    if meaning is Meaning.REFUSED:
        remedy = "check the credentials and what they allow" if status in (400, 401, 403) else ""
    return Failure(meaning, f"DynamoDB: {code}: {said}", remedy)


class DynamoDbClient:
    """A connection to one endpoint in one region, opened by its first request; it belongs to one event loop.

    `credentials`: access key and secret; None takes what AWS tools would take. `tries`: how often a request is made
    at most; a read that is not answered at all, MAX_UNANSWERED times. `timeout_ms`: how long one answer may take.
    """

    def __init__(
        self,
        *,
        region: str | None,
        endpoint: str | None,
        credentials: tuple[str, str] | None,
        timeout_ms: int,
        tries: int,
        randomness: random.Random,
        sleep: Sleep,
    ) -> None:
        self._region = region
        self._endpoint = endpoint
        self._credentials = credentials
        self._timeout_s = timeout_ms / 1000
        self._tries = tries
        self._random = randomness
        self._sleep = sleep
        self._loop: asyncio.AbstractEventLoop | None = None
        self._opening = asyncio.Lock()
        self._connection: Any = None
        self._stack = AsyncExitStack()
        self._closed = False
        self._requests = 0
        self._idle = asyncio.Event()

    async def read(self, operation: str, request: Mapping[str, Any]) -> Response:
        """Ask until there is an answer; RequestFailedError for one that another try would not change."""
        unanswered = 0
        for attempt in range(self._tries):
            try:
                return await self._ask(operation, request)
            except RequestFailedError as error:
                is_last = attempt == self._tries - 1
                if error.failure.meaning is Meaning.UNKNOWN:
                    unanswered += 1
                    if is_last or unanswered == MAX_UNANSWERED:
                        failure = Failure(Meaning.REFUSED, error.failure.message, error.failure.remedy)
                        raise RequestFailedError(failure) from error
                elif is_last or error.failure.meaning not in (Meaning.THROTTLED, Meaning.CONFLICT):
                    raise
            await self._pause(attempt)
        raise ValueError("tries must be at least 1")

    async def write(self, operation: str, request: Mapping[str, Any]) -> None:
        """One write; repeated only where nothing was written."""
        for attempt in range(self._tries):
            try:
                await self._ask(operation, request)
                return
            except RequestFailedError as error:
                may_pass = error.failure.meaning in (Meaning.THROTTLED, Meaning.CONFLICT)
                if not may_pass or attempt == self._tries - 1:
                    raise
            await self._pause(attempt)
        raise ValueError("tries must be at least 1")

    async def transact(self, items: Sequence[Mapping[str, Any]]) -> None:
        """One batch, applied wholly or not at all; see the top about answers that are lost."""
        request = {"TransactItems": items, "ClientRequestToken": self._token()}
        try:
            await self.write("transact_write_items", request)
        except RequestFailedError as error:
            if error.failure.meaning is not Meaning.UNKNOWN:
                raise
            try:
                await self._ask("transact_write_items", request)
            except RequestFailedError:
                raise error from None

    async def close(self) -> None:
        """Let the requests under way finish, then hang up."""
        self._closed = True
        if self._loop is asyncio.get_running_loop():
            while self._requests:
                self._idle.clear()
                await self._idle.wait()
            await self._stack.aclose()
        self._connection = None

    def _token(self) -> str:
        return uuid.UUID(int=self._random.getrandbits(128), version=4).hex

    async def _pause(self, attempt: int) -> None:
        pause_s = min(_FIRST_PAUSE_S * 2**attempt, _LONGEST_PAUSE_S)
        await self._sleep(pause_s * self._random.uniform(0.5, 1.5))

    async def _ask(self, operation: str, request: Mapping[str, Any]) -> Response:
        try:
            connection = self._connection if self._is_here() else await self._open()
        except BotoCoreError as error:
            raise RequestFailedError(Failure(Meaning.REFUSED, f"DynamoDB: {error}", _CREDENTIALS_REMEDY)) from error
        self._requests += 1
        try:
            response: Response = await getattr(connection, operation)(**request)
            return response
        except Exception as error:
            raise RequestFailedError(meaning_of(error)) from error
        finally:
            self._requests -= 1
            if not self._requests:
                self._idle.set()

    def _is_here(self) -> bool:
        """Whether the connection is open, on the loop that runs."""
        if self._closed:
            raise InvalidOperationError("this storage was closed")
        loop = asyncio.get_running_loop()
        if self._loop is loop:
            return self._connection is not None
        if self._loop is not None and not self._loop.is_closed():
            raise InvalidOperationError("DynamoDB is being used from another event loop")
        # A closed loop took its connections with it.
        self._loop, self._connection, self._requests = loop, None, 0
        self._opening, self._idle, self._stack = asyncio.Lock(), asyncio.Event(), AsyncExitStack()
        return False

    async def _open(self) -> Any:
        async with self._opening:
            if self._connection is None:
                key, secret = self._credentials or (None, None)
                client = get_session().create_client(
                    "dynamodb",
                    region_name=self._region,
                    endpoint_url=self._endpoint,
                    aws_access_key_id=key,
                    aws_secret_access_key=secret,
                    config=AioConfig(
                        connect_timeout=self._timeout_s,
                        read_timeout=self._timeout_s,
                        max_pool_connections=MAX_CONNECTIONS,
                        retries={"total_max_attempts": 1, "mode": "standard"},
                        parameter_validation=False,
                    ),
                )
                self._connection = await self._stack.enter_async_context(client)
            return self._connection
