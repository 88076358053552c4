"""Servers that others run: waited for at a start, and asked for as long as the system runs, so that readiness tells.

Asking changes nothing: Kafka and Ray are asked for the identity of their clusters, a storage for its tables.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol

from infra.config import Settings, secret_of, without_secrets
from infra.messaging.errors import BrokerUnavailableError, NotAuthenticatedError, UntrustedBrokerError
from infra.messaging.reader import cluster_id
from infra.storage.errors import UnavailableStorageError, UnusableStorageError
from infra.storage.port import Storage
from scripts.connections import kafka_connection, open_storage

REACHED_WITHIN_S = 60.0
"""How long a start waits for servers that do not answer yet."""

ASK_AGAIN_S = 1.0
RAY_ANSWERS_WITHIN_S = 5.0
ANSWER_WITHIN_S = 20.0
"""Longer than a client's own patience, whose error says more."""


class RayUnavailableError(Exception):
    """Nobody answers where the settings say that Ray is."""

    def __init__(self, address: str) -> None:
        super().__init__(f"Ray does not answer at {address}. See that it is healthy, or check CONCORD_RAY__ADDRESS.")


class RayRefusesError(RayUnavailableError):
    """Ray is there, and does not accept the token that we present."""

    def __init__(self, address: str) -> None:
        Exception.__init__(
            self,
            f"Ray at {address} does not accept our token. Set CONCORD_RAY__TOKEN_FILE or CONCORD_RAY__TOKEN to that of "
            "the cluster.",
        )


UNREACHABLE = (BrokerUnavailableError, UnavailableStorageError, RayUnavailableError, TimeoutError)

HOPELESS = (NotAuthenticatedError, UntrustedBrokerError, UnusableStorageError, RayRefusesError)
"""Those of them that no waiting changes."""


class SilentServerError(Exception):
    """A server takes connections and answers nothing."""


class Outside(Protocol):
    """A server of somebody else's. `kind` is what it is for us (kafka, storage), `name` what it is."""

    kind: str
    name: str
    address: str

    async def ask(self) -> None:
        """Returns when it answers. Raises one of UNREACHABLE, or what is wrong with the settings."""

    async def close(self) -> None: ...


class OutsideKafka:
    """The Kafka that the settings name."""

    kind = name = "kafka"

    def __init__(self, settings: Settings) -> None:
        self.address = ",".join(settings.kafka.bootstrap_servers)
        self._connection = kafka_connection(settings)

    async def ask(self) -> None:
        await cluster_id(self._connection)

    async def close(self) -> None:
        """It holds no connection between two questions."""


class OutsideStorage:
    """The storage that the settings name."""

    kind = "storage"

    def __init__(self, settings: Settings) -> None:
        self.address = without_secrets(settings.storage_url)
        self.name = self.address.partition(":")[0]
        self._settings = settings
        self._storage: Storage | None = None

    async def ask(self) -> None:
        if self._storage is None:
            self._storage = open_storage(self._settings)
        await self._storage.tables()

    async def close(self) -> None:
        storage, self._storage = self._storage, None
        if storage is not None:
            await storage.close()


class OutsideRay:
    """The Ray that the settings name.

    Its own client tries for 20 seconds whatever is wrong and then does not say what was, so it is asked by a call of
    its protocol. What it says otherwise than that it refuses us is left to the client.
    """

    kind = name = "ray"

    def __init__(self, settings: Settings) -> None:
        self.address = settings.ray.address
        self._token = partial(secret_of, settings.ray, "token")

    async def ask(self) -> None:
        import grpc  # type: ignore[import-untyped]  # a part of ray[default]

        token = self._token()
        async with grpc.aio.insecure_channel(self.address) as channel:
            question = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
            try:
                await question(b"", timeout=RAY_ANSWERS_WITHIN_S, metadata=(("authorization", f"Bearer {token}"),))
            except grpc.aio.AioRpcError as error:
                if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    raise RayUnavailableError(self.address) from None
                if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                    raise RayRefusesError(self.address) from None

    async def close(self) -> None:
        """It holds no connection between two questions."""


def servers_outside(settings: Settings) -> Sequence[Outside]:
    """Those that this profile uses and does not start. What asking them comes to is said here, not by their clients."""
    if settings.profile != "cluster":
        return ()
    for client in ("aiokafka", "cassandra"):
        logging.getLogger(client).setLevel(logging.CRITICAL)
    servers = (OutsideKafka(settings), OutsideStorage(settings))
    return (*servers, OutsideRay(settings)) if _can_be_asked(settings) else servers


def _can_be_asked(settings: Settings) -> bool:
    """Whether we know what Ray's client will do: where it goes, which token it presents, and that it speaks no TLS."""
    ray = settings.ray
    has_place = ":" in ray.address and "://" not in ray.address
    return has_place and bool(ray.token_file or ray.token) and os.environ.get("RAY_USE_TLS", "0") in ("", "0")


async def wait_until_reachable(servers: Sequence[Outside], progress: Callable[[str], None]) -> None:
    """Until each has answered once. Raises a group of what the last questions to those came to that do not in time."""
    within_s = REACHED_WITHIN_S

    async def wait(server: Outside) -> None:
        until_s = time.monotonic() + within_s
        told = False
        while True:
            try:
                async with asyncio.timeout(ANSWER_WITHIN_S):
                    return await server.ask()
            except HOPELESS:
                raise
            except UNREACHABLE as error:
                said = str(error) or "no answer"
                if time.monotonic() > until_s:
                    if not isinstance(error, TimeoutError):
                        raise
                    raise SilentServerError(
                        f"{server.name} at {server.address} does not answer. See that it is healthy, and that the "
                        "address is that of the settings."
                    ) from error
                if not told:
                    progress(f"Waiting for {server.name} at {server.address}, at most {within_s:.0f} s: {said}")
                    told = True
            await asyncio.sleep(ASK_AGAIN_S)

    async with asyncio.TaskGroup() as group:
        for server in servers:
            group.create_task(wait(server))


async def trouble_of(server: Outside) -> str:
    """Empty if it answers, else in a word what came of asking."""
    try:
        async with asyncio.timeout(ANSWER_WITHIN_S):
            await server.ask()
    except Exception as error:  # of whatever kind: it does not serve
        return type(error).__name__
    return ""


async def close_all(servers: Sequence[Outside]) -> None:
    for server in servers:
        with suppress(Exception):
            await server.close()
