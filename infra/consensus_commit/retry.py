"""How often a transaction is run again after a conflict, and how long is waited in between.

Waits grow so that the one who was in the way has ended by then, and are jittered so that two who collided do not
collide again. The defaults are those of the auditor's settings: 10 tries, 100 ms to 10 s, doubled.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """At most `tries` tries in all; between them `first_ms`, growing by `factor`, never above `most_ms`.

    `jitter` is the part of each wait that is left to chance: 0 waits exactly, 1 waits anything from nothing to the
    whole. Raises ValueError for numbers that are no policy.
    """

    tries: int = 10
    first_ms: float = 100
    most_ms: float = 10_000
    factor: float = 2
    jitter: float = 0.5

    def __post_init__(self) -> None:
        if self.tries < 1:
            raise ValueError(f"tries must be at least 1, not {self.tries}")
        if not 0 <= self.first_ms <= self.most_ms:
            raise ValueError(f"waits must grow from first_ms to most_ms, not from {self.first_ms} to {self.most_ms}")
        if self.factor < 1:
            raise ValueError(f"factor must be at least 1, not {self.factor}")
        if not 0 <= self.jitter <= 1:
            raise ValueError(f"jitter must lie between 0 and 1, not {self.jitter}")

    def wait_ms(self, attempt: int, random: Random) -> float:
        """How long to wait after the `attempt`th try has failed, counted from 1, in milliseconds."""
        whole = self.first_ms
        for _ in range(attempt - 1):
            if whole >= self.most_ms or self.factor == 1:
                break
            whole *= self.factor
        return min(whole, self.most_ms) * (1 - self.jitter * random.random())
