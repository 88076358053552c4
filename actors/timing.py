"""How long actors wait for each other, for storage, and for what may never come."""

from __future__ import annotations

from dataclasses import dataclass

from infra.consensus_commit.recovery import TRANSACTION_LIFETIME_MS


@dataclass(frozen=True)
class Timing:
    """Every promise holds whatever these are; they choose between speed, load and how soon something is at rest."""

    patience_s: float = 0.1
    """How long an older command waits for a younger owner of a key before it wounds it."""

    deferred_after_s: float = 0.01
    """How long the reply to a batch of calls waits for its slowest item."""

    soon_s: float = 0.2
    """The pause before an attempt that follows an actor's restart."""

    wait_s: tuple[float, float] = (0.2, 2.0)
    """The first and the longest pause between attempts while storage cannot serve."""

    state_backoff_ms: int = 50
    """The first pause between tries to write a state row; doubled each time."""

    tidy_interval_s: float = 1.0
    """How often a participant looks for transactions that nobody cares for any more."""

    homes_asked_after_s: float = 2.0
    """A workspace that was idle for so long, and has not prepared, has its home asked whether it still lives."""

    health_timeout_s: float = 1.0
    """How long an actor that may be gone has to say that it lives."""

    abandoned_after_s: float = 30.0
    """A workspace that was idle for so long, and has not prepared, is dropped whatever its home is."""

    silent_after_s: float = 10.0
    """A prepared workspace whose coordinator said nothing for so long is decided through the state table."""

    drain_poll_s: float = 0.02
    """How often an actor that is being emptied looks whether it is empty."""

    transaction_lifetime_ms: int = TRANSACTION_LIFETIME_MS
    """After so long, whoever meets an undecided transaction that is not its own may abort it; and for so long an
    ABORTED row stays at least where a write may still be on its way in the storage."""
