"""Does a history keep what an isolation level promises? Pure, and sharing no code with the engine.

history ──► dependencies ──► cycles
                 │              │
                 └──────┬───────┘
                        ▼
                    anomalies ──► those that the level forbids
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from infra.consensus_commit.states import Isolation
from scripts.proof.histories.cycles import find_cycles
from scripts.proof.histories.dependencies import Anomaly, Class, infer, real_time, took_effect
from scripts.proof.histories.history import Append, Outcome, RecordKey, Transaction

_NEVER_DATA = frozenset(
    {
        Class.GARBAGE_READ,
        Class.DUPLICATE,
        Class.INTERNAL,
        Class.INCOMPATIBLE_ORDER,
        Class.LOST_WRITE,
        Class.ABORTED_READ,
        Class.INTERMEDIATE_READ,
        Class.LOST_UPDATE,
        Class.WRITE_CYCLE,
        Class.CIRCULAR_FLOW,
        # Committing is one instant, and whoever writes or reads after it does so later: no level turns time round.
        Class.WRITE_CYCLE_IN_TIME,
        Class.CIRCULAR_FLOW_IN_TIME,
    }
)

FORBIDDEN: Mapping[Isolation, frozenset[Class]] = {
    Isolation.READ_COMMITTED: _NEVER_DATA,
    Isolation.SNAPSHOT: _NEVER_DATA,
    Isolation.SERIALIZABLE: frozenset(Class),
}
"""What must not be found, for each level. At SERIALIZABLE nothing may: it is strict."""


def find_anomalies(history: Sequence[Transaction]) -> list[Anomaly]:
    """Everything that is wrong with a history at some level, at most three cycles of each class.

    Raises ValueError for a history that cannot be judged (a value written twice).
    """
    inference = infer(history)
    names = [transaction.id for transaction in history]
    dependencies = [*inference.dependencies, *real_time(history, took_effect(history))]
    return inference.anomalies + find_cycles(dependencies, names)


def violations(history: Sequence[Transaction], isolation: Isolation) -> list[Anomaly]:
    """What a history shows that `isolation` forbids."""
    forbidden = FORBIDDEN[isolation]
    return [anomaly for anomaly in find_anomalies(history) if anomaly.kind in forbidden]


def lost_appends(history: Sequence[Transaction], final: Mapping[RecordKey, tuple[int, ...]]) -> list[Anomaly]:
    """Committed appends that are not in the lists as they are when everything is over."""
    lost: list[Anomaly] = []
    for transaction in history:
        if transaction.outcome is not Outcome.COMMITTED:
            continue
        for operation in transaction.operations:
            if isinstance(operation, Append) and operation.element not in final.get(operation.key, ()):
                text = f"{transaction.id} committed {operation.element} to {operation.key}, and in the end it is gone"
                lost.append(Anomaly(Class.LOST_WRITE, (transaction.id,), text))
    return lost
