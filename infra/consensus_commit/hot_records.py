"""Transactions of one process that want the same records stand in line, where they have got in each other's way before.

Without it, of several transactions that read a record and then write it, one commits and the others learn of it when
they have prepared: the more there are, the fewer get anywhere. So a record is *hot* for a while once a prepare was
refused for it or a read met somebody else's; from then on a transaction takes a place in the record's line before it
reads, and leaves it when it is decided, committed or not.

    a line is advice        nothing is promised by it, and nothing depends on it: conditions and validation decide. It
                            covers this process; others are met as before
    no deadlock             who would wait for somebody that waits for him goes on without a place
    no waiting for ever     a holder whom others have waited for as long as `patience_s` loses its place

Transactions that only read take no places. Never touches storage.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass

from infra.clock import Clock
from infra.consensus_commit.snapshot import RecordId


@dataclass(slots=True, eq=False)
class _Place:
    tx_id: str
    turn: asyncio.Future[None]


class HotRecords:
    """The lines of one process. `hot_for_s`: how long a record stays hot after it was last in somebody's way."""

    def __init__(self, clock: Clock, *, hot_for_s: float = 10.0, patience_s: float = 1.0, most: int = 10_000) -> None:
        self._clock = clock
        self._hot_for_s = hot_for_s
        self._patience_s = patience_s
        self._most = most
        self._hot_until_s: OrderedDict[RecordId, float] = OrderedDict()
        self._lines: dict[RecordId, deque[_Place]] = {}
        self._places: dict[str, dict[RecordId, _Place]] = {}

    def note(self, record_ids: Iterable[RecordId]) -> None:
        """These records were in the way of a transaction."""
        until_s = self._clock.monotonic_s() + self._hot_for_s
        for record_id in record_ids:
            self._hot_until_s[record_id] = until_s
            self._hot_until_s.move_to_end(record_id)
            if len(self._hot_until_s) > self._most:
                self._hot_until_s.popitem(last=False)

    def is_hot(self, record_id: RecordId) -> bool:
        until_s = self._hot_until_s.get(record_id)
        if until_s is None:
            return False
        if until_s >= self._clock.monotonic_s():
            return True
        del self._hot_until_s[record_id]
        return False

    async def enter(self, record_id: RecordId, tx_id: str) -> None:
        """Wait for the turn of `tx_id` at a hot record. Returns at once for any other, and for one that it holds."""
        if not self.is_hot(record_id):
            return
        mine = self._places.setdefault(tx_id, {})
        line = self._lines.setdefault(record_id, deque())
        if record_id in mine or self._is_waited_for(tx_id, line):
            return
        place = _Place(tx_id, asyncio.get_running_loop().create_future())
        line.append(place)
        mine[record_id] = place
        while place in line and line[0] is not place:
            holder = line[0]
            done, _ = await self._wait(place)
            if not done and line and line[0] is holder:
                self._give_up(record_id, holder)

    def leave(self, tx_id: str) -> None:
        """The transaction is decided: its places are free."""
        for record_id, place in self._places.pop(tx_id, {}).items():
            self._remove(record_id, place)

    async def _wait(self, place: _Place) -> tuple[set[asyncio.Future[None]], set[asyncio.Future[None]]]:
        try:
            return await asyncio.wait([place.turn], timeout=self._patience_s)
        except asyncio.CancelledError:
            self.leave(place.tx_id)
            raise

    def _give_up(self, record_id: RecordId, holder: _Place) -> None:
        places = self._places.get(holder.tx_id, {})
        if places.get(record_id) is holder:
            del places[record_id]
        self._remove(record_id, holder)

    def _remove(self, record_id: RecordId, place: _Place) -> None:
        line = self._lines.get(record_id)
        if line is None or place not in line:
            return
        line.remove(place)
        if not line:
            del self._lines[record_id]
        elif not line[0].turn.done():
            line[0].turn.set_result(None)

    def _is_waited_for(self, tx_id: str, line: deque[_Place]) -> bool:
        """Whether somebody in `line` waits, perhaps through others, for a record that `tx_id` holds or waits for."""
        pending = [place.tx_id for place in line]
        seen: set[str] = set()
        while pending:
            other = pending.pop()
            if other == tx_id:
                return True
            if other in seen:
                continue
            seen.add(other)
            for record_id, place in self._places.get(other, {}).items():
                for ahead in self._lines.get(record_id, ()):
                    if ahead is place:
                        break
                    pending.append(ahead.tx_id)
        return False
