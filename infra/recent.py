"""What is remembered for a while: by time, so that memory follows the rate of work and not the time that it goes on."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

from infra.clock import Clock

K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """Values by key, each kept `for_s` seconds from when it was put, and then until the next one is put.

    At most `most` of them: beyond that the oldest goes before its time.
    """

    def __init__(self, clock: Clock, *, for_s: float, most: int) -> None:
        self._clock = clock
        self._for_s = for_s
        self._most = most
        self._kept: OrderedDict[K, tuple[float, V]] = OrderedDict()

    def put(self, key: K, value: V) -> None:
        """Keep `value` from now on; one that was kept under `key` gives way."""
        now_s = self._clock.monotonic_s()
        self._kept.pop(key, None)
        self._kept[key] = (now_s + self._for_s, value)
        while len(self._kept) > self._most or next(iter(self._kept.values()))[0] <= now_s:
            self._kept.popitem(last=False)

    def get(self, key: K) -> V | None:
        """None if nothing is kept under `key`."""
        kept = self._kept.get(key)
        return None if kept is None else kept[1]

    def drop(self, key: K) -> None:
        """Forget `key` at once, if it is kept."""
        self._kept.pop(key, None)

    def __contains__(self, key: K) -> bool:
        return key in self._kept

    def __len__(self) -> int:
        return len(self._kept)
