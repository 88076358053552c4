"""What may happen to the system, as data, and when it does: a schedule is drawn from a seed.

The tables are the policy: FAULTS says what can happen, how often in proportion, how it is done, what ends it and how
long that may take; FAILPOINTS_ARMED says what must be armed for each named place in the code to be reached. Nothing
here touches a process; `injecting` does.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from infra.failpoints import FAILPOINTS

Server = Literal["kafka", "cassandra"]
Role = Literal["worker", "domain actor", "coordinator", "raylet", "kafka", "cassandra"]
Lie = Literal["swallow answers", "delay answers", "break connections"]
Span = tuple[float, float]
"""At least and at most so many seconds."""


@dataclass(frozen=True)
class Kill:
    """SIGKILL to one process of a role."""

    role: Role


@dataclass(frozen=True)
class KillAll:
    """SIGKILL to every worker and every actor, in random order."""


@dataclass(frozen=True)
class Pause:
    """SIGSTOP to one process of a role, SIGCONT after a while."""

    role: Role
    for_s: Span


@dataclass(frozen=True)
class Mislead:
    """The proxy in front of a server does this to its answers for a while."""

    server: Server
    how: Lie
    for_s: Span


@dataclass(frozen=True)
class Storm:
    """Workers join and leave: `concord workers N`, one number after the other."""

    counts: tuple[int, ...]


@dataclass(frozen=True)
class Repeat:
    """So many of the commands that were published before are published again at once; `changed`: with other content."""

    commands: int
    changed: bool


@dataclass(frozen=True)
class Poison:
    """One message of every kind that nobody can carry out."""


@dataclass(frozen=True)
class JumpClock:
    """The clock of one worker is wrong by this, one value after the other, each for a while."""

    by_s: tuple[int, ...]
    each_s: float


@dataclass(frozen=True)
class Break:
    """A named place in the code kills the process that reaches it, or fails it; the next place of FAILPOINTS_ARMED."""


How = Kill | KillAll | Pause | Mislead | Storm | Repeat | Poison | JumpClock | Break


@dataclass(frozen=True)
class Fault:
    """One kind. `bound_s`: how long after its injection has ended everything may take to be whole again."""

    name: str
    weight: int
    how: How
    healing: str
    bound_s: float


RESTARTED = "the supervisor starts it again, and its work is taken up where the log and the tables say"
RAY_RESTARTS = "Ray starts the actor again; what it was at is settled by its successor and the sweepers"
RAY_ANEW = "the supervisor starts Ray and every actor anew"
KEPT = "its keeper starts it again on the same port and data; clients connect again"
WAKES = "it wakes up; what it held back is refused by conditions, fences and deadlines, or goes on"
ASKED_AGAIN = "outcomes that nobody heard of are read or contested, never guessed"
FIRST_WINS = "the first payload under an id has its effect once; repetitions have its answer, others id_conflict"

FAULTS: tuple[Fault, ...] = (
    Fault("worker killed", 9, Kill("worker"), RESTARTED, 45),
    Fault("worker paused", 6, Pause("worker", (2, 6)), WAKES, 45),
    Fault("domain actor killed", 9, Kill("domain actor"), RAY_RESTARTS, 45),
    Fault("domain actor paused", 6, Pause("domain actor", (2, 6)), WAKES, 45),
    Fault("coordinator killed", 8, Kill("coordinator"), RAY_RESTARTS, 45),
    Fault("coordinator paused", 6, Pause("coordinator", (2, 6)), WAKES, 45),
    Fault("every worker and actor killed", 2, KillAll(), RESTARTED, 60),
    Fault("raylet killed", 2, Kill("raylet"), RAY_ANEW, 90),
    Fault("raylet paused", 3, Pause("raylet", (2, 4)), WAKES, 45),
    Fault("kafka killed", 3, Kill("kafka"), KEPT, 75),
    Fault("kafka paused", 4, Pause("kafka", (3, 8)), WAKES, 45),
    Fault("cassandra killed", 3, Kill("cassandra"), KEPT, 90),
    # Longer than a storage call may take (10 s): a write may take effect after its caller has given it up.
    Fault("cassandra paused", 3, Pause("cassandra", (3, 13)), WAKES, 45),
    Fault("cassandra's answers swallowed", 6, Mislead("cassandra", "swallow answers", (1, 4)), ASKED_AGAIN, 45),
    Fault("cassandra's answers delayed", 5, Mislead("cassandra", "delay answers", (3, 6)), "they come late", 45),
    Fault("connections to cassandra broken", 5, Mislead("cassandra", "break connections", (1, 2)), ASKED_AGAIN, 45),
    Fault("kafka's answers swallowed", 4, Mislead("kafka", "swallow answers", (1, 4)), "requests are repeated", 45),
    Fault("kafka's answers delayed", 4, Mislead("kafka", "delay answers", (3, 6)), "they come late", 45),
    Fault("connections to kafka broken", 4, Mislead("kafka", "break connections", (1, 2)), "requests are repeated", 45),
    Fault("rebalance storm", 3, Storm((3, 2)), "partitions find their workers", 60),
    Fault("commands repeated", 5, Repeat(40, changed=False), FIRST_WINS, 45),
    Fault("ids repeated with other content", 5, Repeat(20, changed=True), FIRST_WINS, 45),
    Fault("poison", 5, Poison(), "dead letters, and their partitions move on", 45),
    Fault("clock jumps", 4, JumpClock((600, -600, 30), 1.5), "no clock decides what commits", 45),
    Fault("failpoint", 6, Break(), "as of the process that it was in", 60),
)

_AFTER_ROLLBACK = ("coordinator.after_prepare=raise@1",)
_AFTER_STATE = ("commit_state.after=kill@1",)

FAILPOINTS_NOT_MET = {
    "recovery.before_abort": "needs what another program left long ago in the tables that it shares; "
    "tests/end_to_end/test_failpoints.py fires it",
}

FAILPOINTS_ARMED: Mapping[str, tuple[str, ...]] = {
    name: (f"{name}=kill@1",) for name in FAILPOINTS if name not in FAILPOINTS_NOT_MET
} | {
    # What cleans up needs something to clean up.
    "rollback.before_records": (*_AFTER_ROLLBACK, "rollback.before_records=kill@1"),
    "rollback.after_records": (*_AFTER_ROLLBACK, "rollback.after_records=kill@1"),
    "recovery.before_roll_back": (
        *_AFTER_ROLLBACK,
        "rollback.before_records=kill@1",
        "recovery.before_roll_back=kill@1",
    ),
    "settle.before": (*_AFTER_STATE, "settle.before=kill@1"),
    "recovery.before_roll_forward": (
        *_AFTER_STATE,
        "commit_records.before=kill@1",
        "recovery.before_roll_forward=kill@1",
    ),
}
"""By its name, what is armed for a failpoint of FAILPOINTS to fire while orders are placed."""


@dataclass(frozen=True)
class Planned:
    """One fault of a schedule: so long after the one before is over."""

    fault: Fault
    pause_s: float


def schedule(seed: int, *, pause_s: Span) -> Iterator[Planned]:
    """Faults without end: first each kind once in random order, then by their weights."""
    rng = random.Random(f"faults {seed}")
    first = list(FAULTS)
    rng.shuffle(first)
    for fault in first:
        yield Planned(fault, rng.uniform(*pause_s))
    weights = [fault.weight for fault in FAULTS]
    while True:
        (fault,) = rng.choices(FAULTS, weights)
        yield Planned(fault, rng.uniform(*pause_s))


def points(seed: int) -> Iterator[str]:
    """Failpoints without end: each once in random order, and again."""
    rng = random.Random(f"failpoints {seed}")
    while True:
        names = list(FAILPOINTS_ARMED)
        rng.shuffle(names)
        yield from names
