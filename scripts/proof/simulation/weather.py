"""What may go wrong in one seed, and how the engine is set up there. Every seed has a weather of its own."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from infra.consensus_commit.states import Isolation


class CallFault(StrEnum):
    """What may become of one call to storage. Reads know no LOST, UNANSWERED and LATE."""

    UNAVAILABLE = "unavailable"  # not applied, and the caller is told so
    LOST = "lost"  # not applied, and the caller is told nothing
    UNANSWERED = "unanswered"  # applied, and the caller is told nothing
    LATE = "late"  # applied long after the caller was told nothing
    SLOW = "slow"  # applied and answered, but after seconds
    CRASH_BEFORE = "crash_before"  # the caller dies, its call with it
    CRASH_SENT = "crash_sent"  # the caller dies, its call is on its way
    CRASH_AFTER = "crash_after"  # the caller dies when the call is applied, before the answer


_DEADLY = (CallFault.CRASH_BEFORE, CallFault.CRASH_SENT, CallFault.CRASH_AFTER)
READ_FAULTS = (CallFault.UNAVAILABLE, CallFault.SLOW, CallFault.CRASH_BEFORE)


class Topology(StrEnum):
    """The storages behind the namespaces `one`, `two` and `three`."""

    ONE_STORE = "one store"
    TWO_STORES = "two stores"
    THREE_STORES = "two stores, and one that is atomic within a namespace"


class Interface(StrEnum):
    """How clients drive the engine."""

    MANAGER = "a manager"
    TWO_PHASE = "a coordinator, and a participant for each namespace"


@dataclass(frozen=True)
class Weather:
    """Probabilities are for one occasion (a call, a failpoint passed); durations are at most, in virtual time."""

    topology: Topology
    isolation: Isolation
    interface: Interface
    one_phase_commit: bool
    async_commit: bool
    group_commit: bool
    intents: bool
    cache_records: int
    imported: bool
    shuffled: bool
    processes: int
    clients: int
    transactions: int
    lifetime_ms: int
    latency_s: float
    slow_s: float
    late_s: float
    think_s: float
    call_fault: float
    call_faults: Mapping[CallFault, float]
    pass_crash: float
    pass_delay: float
    pauses: int
    clock_jumps: int
    outages: int
    prunings: int


def weather_of(seed: int) -> Weather:
    """The weather of a seed."""
    draw = random.Random(f"weather {seed}")
    together = random.Random(f"groups {seed}")
    group_commit = together.random() < 0.3
    lifetime_ms = draw.choice((400, 2_000, 15_000))
    fair = draw.random() < 0.08
    kinds = {kind: draw.choice((0.0, 1.0, 3.0)) * (0.2 if kind in _DEADLY else 1.0) for kind in CallFault}
    if not any(kinds.values()):
        kinds[CallFault.UNANSWERED] = 1.0
    return Weather(
        topology=draw.choice(list(Topology)),
        isolation=draw.choices((Isolation.SERIALIZABLE, Isolation.SNAPSHOT, Isolation.READ_COMMITTED), (80, 14, 6))[0],
        interface=draw.choice((Interface.MANAGER, Interface.MANAGER, Interface.TWO_PHASE)),
        one_phase_commit=draw.random() < 0.6,
        async_commit=draw.random() < 0.5,
        group_commit=group_commit,
        intents=draw.random() < 0.5,
        cache_records=draw.choice((0, 0, 50)),
        imported=draw.random() < 0.3,
        shuffled=draw.random() < 0.7,
        processes=draw.choice((2, 3)),
        clients=draw.choice((1, 2, 2)) + 2 * group_commit,
        transactions=draw.randint(22, 28),
        lifetime_ms=lifetime_ms,
        latency_s=draw.choice((0.001, 0.01, 0.05)),
        slow_s=draw.choice((0.2, 3.0, 20.0)),
        late_s=draw.choice((0.1, 3.0, 25.0)),
        think_s=draw.choice((0.0, 0.01, 0.1)),
        call_fault=0.0 if fair else draw.choice((0.015, 0.04, 0.08)),
        call_faults=kinds,
        pass_crash=0.0 if fair else draw.choice((0.0, 0.003, 0.01)),
        pass_delay=draw.choice((0.0, 0.02, 0.1)),
        pauses=0 if fair else draw.choice((0, 0, 1, 2)),
        clock_jumps=0 if fair else draw.choice((0, 0, 1, 3)),
        outages=0 if fair else draw.choice((0, 0, 1)),
        prunings=draw.choice((0, 1, 3)),
    )
