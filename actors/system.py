"""Which actors a system has, and how one is put together from a configuration that can cross processes.

Every runtime builds actors here and only here, so that an actor on Ray, in a test and in a simulation is the same.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from actors.coordinator_actor import CoordinatorActor
from actors.domain import Domain
from actors.domain_actor import DomainActor
from actors.incarnations import Incarnations
from actors.messages import Trouble
from actors.runtime import Mailroom, Placement
from actors.timing import Timing
from infra.clock import Clock
from infra.consensus_commit.coordinator import CoordinatorStates
from infra.consensus_commit.intents import IntentLog
from infra.consensus_commit.retry import RetryPolicy
from infra.storage.gate import PartitionGate
from infra.storage.observed import ObservedStorage, OnCall
from infra.storage.port import Storage
from infra.traced_storage import TracedStorage
from infra.tracing import OFF, Tracer
from schemas.outcome import Answer

COORDINATOR = "coordinator"
VIEWS = "views"


@dataclass(frozen=True)
class SystemConfig:
    """All that an actor needs to know. `domains` says where the domains are: `module:ATTRIBUTE`."""

    placement: Placement
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    domains: str = "actors.order_domains:ORDER_DOMAINS"
    max_command_bytes: int = 1 << 20
    outcome_window_ms: int = 7 * 24 * 3_600_000
    sweep_interval_s: float = 5.0
    timing: Timing = field(default_factory=Timing)


@dataclass(frozen=True)
class Observer:
    """What an actor tells telemetry; does nothing by default."""

    on_answer: Callable[[str, Answer, float], None] = lambda domain, answer, seconds: None
    on_committed: Callable[[str], None] = lambda domain: None
    """A transaction of this domain's commands was committed, also one that holds nothing but a refusal."""
    on_trouble: Callable[[str, Trouble], None] = lambda domain, trouble: None
    on_recovered: Callable[[str], None] = lambda kind: None
    tracer: Tracer = OFF
    on_sweep: Callable[[str, int, int | None], None] = lambda coordinator, pending, oldest_ms: None
    """What a coordinator finds not settled: how many transactions, and when the oldest began."""
    on_pruned: Callable[[str, int], None] = lambda table, rows: None
    on_in_hand: Callable[[str, int, int], None] = lambda actor, commands, limit: None
    """How many commands an actor has taken and not answered, and how many it takes at most; told every now and then."""
    on_storage_call: OnCall | None = None


class Actor(Protocol):
    name: str

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def drain(self, within_s: list[float]) -> list[bool]: ...

    async def health(self, batch: list[Any]) -> list[Any]: ...


def load_domains(config: SystemConfig) -> dict[str, Domain]:
    """The domains by name."""
    module, _, attribute = config.domains.partition(":")
    domains: tuple[Domain, ...] = getattr(importlib.import_module(module), attribute)
    return {domain.name: domain for domain in domains}


def actor_names(config: SystemConfig) -> list[str]:
    """Every actor of the system: coordinators, domains' shards, views."""
    return [*config.placement.actors(), f"{VIEWS}-0"]


def build_actor(
    name: str,
    config: SystemConfig,
    *,
    storage: Storage,
    mailroom: Mailroom,
    clock: Clock,
    observer: Observer,
    incarnations: Incarnations | None = None,
) -> Actor:
    """The actor called `name`, not started. `incarnations` where a process is not what an actor lives and dies with."""
    kind, _, number = name.rpartition("-")
    if observer.on_storage_call is not None:
        storage = ObservedStorage(storage, observer.on_storage_call)
    gated: Storage = PartitionGate(storage)
    if observer.tracer.on:
        storage, gated = TracedStorage(storage, observer.tracer), TracedStorage(gated, observer.tracer)
    states = CoordinatorStates(gated, clock, backoff_ms=config.timing.state_backoff_ms)
    incarnations = incarnations or Incarnations(storage, clock)
    if kind == COORDINATOR:
        return CoordinatorActor(
            name=name,
            placement=config.placement,
            states=states,
            intents=IntentLog(storage),
            incarnations=incarnations,
            mailroom=mailroom,
            clock=clock,
            sweep_interval_s=config.sweep_interval_s,
            state_window_ms=config.outcome_window_ms,
            tracer=observer.tracer,
            timing=config.timing,
            on_sweep=observer.on_sweep,
            on_pruned=observer.on_pruned,
        )
    if kind == VIEWS:
        from actors.view_actor import ViewActor

        return ViewActor(name=name, storage=gated, incarnations=incarnations, clock=clock, tracer=observer.tracer)
    return DomainActor(
        domain=load_domains(config)[kind],
        shard=int(number),
        placement=config.placement,
        storage=gated,
        states=states,
        incarnations=incarnations,
        mailroom=mailroom,
        clock=clock,
        retry=config.retry,
        max_command_bytes=config.max_command_bytes,
        outcome_window_ms=config.outcome_window_ms,
        timing=config.timing,
        on_answer=observer.on_answer,
        on_committed=observer.on_committed,
        on_trouble=observer.on_trouble,
        on_in_hand=observer.on_in_hand,
        on_recovered=observer.on_recovered,
        tracer=observer.tracer,
        on_pruned=observer.on_pruned,
    )
