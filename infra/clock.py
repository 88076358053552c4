"""Time and identity, passed in wherever they are needed so that tests and simulation can own them."""

from __future__ import annotations

import time
import uuid
from typing import Protocol


class Clock(Protocol):
    """Wall time for stamps that others read, monotonic time for measuring how long something took."""

    def now_ms(self) -> int:
        """Wall-clock time in milliseconds since the epoch (UTC)."""

    def monotonic_s(self) -> float:
        """Seconds on a clock that never jumps; only differences mean anything."""

    def new_id(self) -> str:
        """A fresh identifier (UUIDv4 in its 36-character form)."""


class SystemClock:
    """The machine's clocks and the system's randomness."""

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def monotonic_s(self) -> float:
        return time.monotonic()

    def new_id(self) -> str:
        return str(uuid.uuid4())


class ManualClock:
    """A clock that moves only when told to, with countable ids: for tests and simulation."""

    def __init__(self, now_ms: int = 1_600_000_000_000) -> None:
        self._now_ms = now_ms
        self._start_ms = now_ms
        self._ids = 0

    def now_ms(self) -> int:
        return self._now_ms

    def monotonic_s(self) -> float:
        return (self._now_ms - self._start_ms) / 1000

    def new_id(self) -> str:
        self._ids += 1
        return str(uuid.UUID(int=self._ids, version=4))

    def advance(self, milliseconds: int) -> None:
        self._now_ms += milliseconds
