"""Actors on Ray: names, restarts, and the only import of Ray outside the entry points.

Every actor of the system is one named Ray actor in the namespace `concord`, so that operators see `orders-0` and
`coordinator-0` in the dashboard. Ray restarts an actor whose process died, without end; a call that was under way is
not repeated by Ray (`max_task_retries=0`), since only the caller knows whether it may be.

A batch crosses as one pickle in each direction. Pickle is Ray's own format and stays inside the cluster; nothing that
came from Kafka is ever unpickled.
"""

from __future__ import annotations

import asyncio
import importlib
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.actor
from ray.exceptions import RayActorError, RayError, RayTaskError

from actors.runtime import ActorLostError, ActorSilentError, Mailroom
from actors.system import Actor, Observer, SystemConfig, actor_names, build_actor
from infra.clock import SystemClock
from infra.storage.connect import StorageAddress
from infra.storage.connect import connect as connect_storage

NAMESPACE = "concord"

ANSWER_WITHIN_S = 5.0
"""How long an actor has to say how it is."""

METHODS = (
    "execute",
    "due",
    "invoke",
    "collect",
    "prepare",
    "validate",
    "commit",
    "rollback",
    "settle",
    "drain",
    "health",
    "apply",
    "pause",
    "renew_pause",
    "resume",
)
"""What actors can be asked; one Ray method each, so that the dashboard tells them apart."""


@dataclass(frozen=True)
class ActorSetup:
    """What a Ray worker process needs to become an actor.

    `prepare_process` names a `module:function` that is called first, with the actor's name and `prepare_argument`: it
    sets up logging and metrics and returns the Observer.
    """

    name: str
    config: SystemConfig
    storage: StorageAddress
    prepare_process: str = ""
    prepare_argument: str = ""


class ConcordActor:
    """The process around one actor. It starts on the first call, which the supervisor's health check makes."""

    def __init__(self, setup: ActorSetup) -> None:
        self._setup = setup
        self._actor: Actor | None = None
        self._starting: asyncio.Future[Actor] | None = None

    def __repr__(self) -> str:
        return self._setup.name

    async def _serve(self, method: str, payload: bytes) -> bytes:
        actor = self._actor or await self._started()
        replies = await getattr(actor, method)(pickle.loads(payload))
        return pickle.dumps(replies, protocol=5)

    async def _started(self) -> Actor:
        if self._starting is None:
            self._starting = asyncio.ensure_future(self._start())
        try:
            self._actor = await asyncio.shield(self._starting)
        except Exception:
            self._starting = None  # storage may be back at the next call
            raise
        return self._actor

    async def _start(self) -> Actor:
        observer = Observer()
        if self._setup.prepare_process:
            module, _, function = self._setup.prepare_process.partition(":")
            prepare = getattr(importlib.import_module(module), function)
            observer = prepare(self._setup.name, self._setup.prepare_argument)
        storage = connect_storage(self._setup.storage)
        actor = build_actor(
            self._setup.name,
            self._setup.config,
            storage=storage,
            mailroom=Mailroom(RayRuntime()),
            clock=SystemClock(),
            observer=observer,
        )
        await actor.start()
        return actor


def _add_method(name: str) -> None:
    async def call(self: ConcordActor, payload: bytes) -> bytes:
        return await self._serve(name, payload)

    call.__name__ = name
    call.__qualname__ = f"ConcordActor.{name}"
    setattr(ConcordActor, name, call)


for _name in METHODS:
    _add_method(_name)


SILENT_AFTER_S = 15.0
"""How long an actor may be without a sign of life before those that wait for it take it for lost.

A call has no deadline of its own, because what it waits for (a key, storage) may take any time and is no failure. What
has one is the life of the actor: while a call is outstanding, its `health` is asked, once for all calls of a process.
"""

ASKED_EVERY_S = 5.0
"""How often that is."""

MAX_PENDING_CALLS = 20_000
"""Calls of one process to one actor that may be outstanding. Only one that is paused for long could gather more."""


class RayRuntime:
    """Implements actors.runtime.Runtime in any process that is connected to the cluster."""

    def __init__(self, *, silent_after_s: float = SILENT_AFTER_S, asked_every_s: float = ASKED_EVERY_S) -> None:
        self._handles: dict[str, ray.actor.ActorHandle[Any]] = {}
        self._silent_after_s = silent_after_s
        self._asked_every_s = asked_every_s
        self._asking_health: dict[str, asyncio.Future[list[Any]]] = {}

    async def ask(self, actor: str, method: str, items: Sequence[Any]) -> list[Any]:
        call = asyncio.ensure_future(self._call(actor, method, items))
        try:
            while not (await asyncio.wait({call}, timeout=self._asked_every_s))[0]:
                await self._until_a_sign_of_life(actor, call)
            return await call
        finally:
            call.cancel()

    async def _call(self, actor: str, method: str, items: Sequence[Any]) -> list[Any]:
        try:
            handle = self._handles.get(actor)
            if handle is None:
                # Ray asks its control service for it, a minute long if that is gone: not on the loop.
                handle = await asyncio.to_thread(ray.get_actor, actor, namespace=NAMESPACE)
                self._handles[actor] = handle
            reply: bytes = await getattr(handle, method).remote(pickle.dumps(list(items), protocol=5))
        except RayTaskError as error:
            raise error.as_instanceof_cause() from None
        except (RayActorError, RayError, ValueError) as error:  # ValueError: no actor of that name (yet)
            self._handles.pop(actor, None)
            raise ActorLostError(f"{actor}: {type(error).__name__}") from error
        replies: list[Any] = pickle.loads(reply)
        return replies

    async def _until_a_sign_of_life(self, actor: str, call: asyncio.Future[list[Any]]) -> None:
        """Until the actor has answered, `call` itself or the question how it is. Raises ActorSilentError."""
        asking = self._asking_health.get(actor)
        if asking is None:
            # One question at a time, however many wait: those to a paused actor would pile up in Ray.
            asking = self._asking_health[actor] = asyncio.ensure_future(self._call(actor, "health", [None]))
            asking.add_done_callback(lambda asked: self._heard(actor, asked))
        done, _ = await asyncio.wait({call, asking}, timeout=self._silent_after_s, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            raise ActorSilentError(f"{actor}: no sign of life for {self._silent_after_s:g} s")

    def _heard(self, actor: str, asked: asyncio.Future[list[Any]]) -> None:
        if self._asking_health.get(actor) is asked:
            del self._asking_health[actor]
        if not asked.cancelled():
            asked.exception()  # that it was lost, its callers learn from their calls


class RayCluster:
    """A Ray and the system's actors on it, which are owned by this process: they end with it. So does the Ray, if this
    process started it."""

    def __init__(self, address: str, dashboard_url: str, handles: dict[str, Any]) -> None:
        self.address = address
        self.dashboard_url = dashboard_url
        self._handles = handles
        self.runtime = RayRuntime()

    async def health(self, timeout_s: float = 5.0) -> dict[str, Any]:
        """Each actor's Health, or the exception that asking it came to. Also what starts a restarted actor's work."""

        async def ask(name: str) -> Any:
            try:
                return (await asyncio.wait_for(self.runtime.ask(name, "health", [None]), timeout_s))[0]
            except Exception as error:
                return error

        names = list(self._handles)
        return dict(zip(names, await asyncio.gather(*map(ask, names)), strict=True))

    async def drain(self, name: str, *, within_s: float) -> bool:
        """Have an actor finish what it is at and take nothing new, before its restart; whether it was done in time."""
        try:
            (empty,) = await asyncio.wait_for(self.runtime.ask(name, "drain", [within_s]), within_s + ANSWER_WITHIN_S)
        except (ActorLostError, TimeoutError):
            return False
        return bool(empty)

    async def restart(self, name: str, *, within_s: float) -> None:
        """End an actor's process and wait until another one serves in its place. Raises ActorLostError after a while.

        It may be ended at any instant; `drain` it first, so that less has to be done twice.
        """
        before = (await self._health_of(name, within_s=ANSWER_WITHIN_S)) or None
        await asyncio.to_thread(ray.kill, self._handles[name], no_restart=False)
        loop = asyncio.get_running_loop()
        until_s = loop.time() + within_s
        while loop.time() < until_s:
            now = await self._health_of(name, within_s=ANSWER_WITHIN_S)
            if now is not None and (before is None or (now.pid, now.incarnation) != (before.pid, before.incarnation)):
                return
            await asyncio.sleep(0.1)
        raise ActorLostError(f"{name} did not come back within {within_s:.0f} s")

    async def _health_of(self, name: str, *, within_s: float) -> Any:
        try:
            return (await asyncio.wait_for(self.runtime.ask(name, "health", [None]), within_s))[0]
        except (Exception, TimeoutError):
            return None

    def stop(self) -> None:
        """End the actors, and the cluster if it is ours. They may be ended at any instant: nothing is asked of them."""
        for handle in self._handles.values():
            ray.kill(handle, no_restart=True)
        ray.shutdown()


def start_cluster(
    config: SystemConfig,
    *,
    storage: StorageAddress,
    address: str = "",
    prepare_process: str = "",
    prepare_argument: str = "",
    dashboard_port: int = 8265,
    include_dashboard: bool = True,
    num_cpus: int = 2,
    restore_signals: Callable[[], None] = lambda: None,
) -> RayCluster:
    """Start Ray on this machine and every actor of the system; blocks for about ten seconds.

    With an `address` Ray runs already: this machine is one of its nodes, and the actors are spread over all of them.

    Ray puts its own SIGTERM handler in place; `restore_signals` is called when that is done.
    """
    here: dict[str, Any] = {
        "num_cpus": num_cpus,
        "object_store_memory": 80 * 2**20,  # what crosses is small and inline
        "include_dashboard": include_dashboard,
        "dashboard_host": "127.0.0.1",
        "dashboard_port": dashboard_port,
        "_node_ip_address": "127.0.0.1",
    }
    context = ray.init(
        namespace=NAMESPACE, log_to_driver=False, configure_logging=False, **({"address": address} if address else here)
    )
    restore_signals()
    setups = [ActorSetup(name, config, storage, prepare_process, prepare_argument) for name in actor_names(config)]
    handles = {setup.name: _create(setup, spread=bool(address)) for setup in setups}
    return RayCluster(context.address_info["address"], context.dashboard_url or "", handles)


NAME_FREE_WITHIN_S = 30.0
"""How long an actor of a predecessor that was killed may keep its name."""


def _create(setup: ActorSetup, *, spread: bool) -> Any:
    """One actor. Raises ValueError if another driver has one of that name and does not end."""
    options = ray.remote(ConcordActor).options(
        name=setup.name,
        namespace=NAMESPACE,
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=0,
        max_pending_calls=MAX_PENDING_CALLS,
        max_concurrency=10_000,  # what waits for storage or for a key must not keep a decision out
        **({"scheduling_strategy": "SPREAD"} if spread else {}),
    )
    until_s = time.monotonic() + NAME_FREE_WITHIN_S
    while True:
        try:
            return options.remote(setup)
        except ValueError:
            if time.monotonic() > until_s:
                raise
            time.sleep(0.5)


def connect(address: str) -> RayRuntime:
    """Join a running cluster as a driver (a stream worker); blocks for a second or two."""
    ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
    return RayRuntime()
