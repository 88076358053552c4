"""What counts as standing still, and that a process that does ends."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
from collections.abc import Mapping

from streams.lag import LagMonitor
from streams.partitions import Partition, Progress
from streams.watchdog import EXIT_FAILED, EXIT_STALLED, Look, StallJudge

P0 = ("orders.commands", 0)


class Watch:
    """A StallJudge with its own time, ticking every second."""

    def __init__(self) -> None:
        self.judge = StallJudge(stalled_after_s=60, tick_s=1)
        self.now_s = 1_000.0
        self.beat_s = 1_000.0

    def until(self, now_s: float, partitions: Mapping[Partition, Look], *, beating: bool = True) -> str | None:
        while self.now_s < now_s:
            self.now_s += 1
            if beating:
                self.beat_s = self.now_s
            reason = self.judge.judge(self.now_s, beat_s=self.beat_s, partitions=partitions)
            if reason is not None:
                return reason
        return None


def test_a_loop_that_does_not_turn_is_standing_still() -> None:
    watch = Watch()
    assert watch.until(1_050, {}) is None
    assert watch.until(1_105, {}, beating=False) is None
    assert "event loop" in (watch.until(1_200, {}, beating=False) or "")


def test_work_that_nobody_tries_is_standing_still() -> None:
    watch = Watch()
    stuck = {P0: Look(has_work=True, last_attempt_s=1_000.0)}
    assert watch.until(1_060, stuck) is None
    assert "orders.commands[0]" in (watch.until(1_070, stuck) or "")
    assert watch.now_s < 1_065


def test_waiting_is_not_standing_still() -> None:
    watch = Watch()
    for now_s in range(1_003, 1_600, 3):
        assert watch.until(now_s, {P0: Look(has_work=True, last_attempt_s=float(now_s))}) is None


def test_nothing_to_do_is_not_standing_still() -> None:
    watch = Watch()
    assert watch.until(2_000, {P0: Look(has_work=False, last_attempt_s=1_000.0)}) is None


def test_work_that_comes_after_a_long_rest_has_its_own_time() -> None:
    watch = Watch()
    assert watch.until(2_000, {P0: Look(has_work=False, last_attempt_s=1_000.0)}) is None

    late = {P0: Look(has_work=True, last_attempt_s=1_000.0)}
    assert watch.until(2_055, late) is None
    assert watch.until(2_070, late) is not None


def test_a_partition_that_is_given_back_and_comes_again_has_its_own_time() -> None:
    watch = Watch()
    stuck = {P0: Look(has_work=True, last_attempt_s=0.0)}
    assert watch.until(1_050, stuck) is None
    assert watch.until(1_055, {}) is None
    assert watch.until(1_110, stuck) is None
    assert watch.until(1_120, stuck) is not None


def test_a_machine_that_was_asleep_is_given_time() -> None:
    watch = Watch()
    stuck = {P0: Look(has_work=True, last_attempt_s=1_000.0)}
    assert watch.until(1_040, stuck) is None
    watch.now_s = 5_000.0

    assert watch.until(5_050, stuck, beating=False) is None
    assert watch.until(5_100, stuck) is not None


# --- Lag


class Broker:
    def __init__(self) -> None:
        self.ends: dict[Partition, int] = {P0: 10}
        self.messages: set[int] = set(range(10))
        self.away = False
        self.looked = 0

    async def end_offsets(self, partitions: object) -> dict[Partition, int]:
        if self.away:
            raise ConnectionError("a test's")
        return dict(self.ends)

    async def first_offset(self, partition: Partition, offset: int) -> int | None:
        self.looked += 1
        return min((there for there in self.messages if there >= offset), default=None)


def monitor(broker: Broker, finished: int | None, progress: Progress | None = None) -> LagMonitor:
    return LagMonitor(
        assigned=lambda: {P0},
        finished=lambda partition: finished,
        progress=lambda: {} if progress is None else {P0: progress},
        end_offsets=broker.end_offsets,
        first_offset=broker.first_offset,
        suspicious_after=2,
    )


async def test_lag_is_what_the_broker_has_beyond_what_is_finished() -> None:
    lag = monitor(Broker(), finished=4)
    await lag.measure()

    assert lag.states()[P0].lag == 6
    assert lag.look()[P0].has_work


async def test_a_client_that_fetches_nothing_has_work_all_the_same() -> None:
    lag = monitor(Broker(), finished=4, progress=None)
    for _ in range(5):
        await lag.measure()

    assert lag.look() == {P0: Look(has_work=True, last_attempt_s=0.0)}


async def test_a_log_that_ends_in_no_message_is_no_lag() -> None:
    broker = Broker()
    broker.messages = set(range(9))  # offset 9 is a transaction's marker
    lag = monitor(broker, finished=9, progress=Progress(0, 0, 9, 5.0))
    for _ in range(4):
        await lag.measure()

    assert lag.states()[P0].lag == 0
    assert not lag.look()[P0].has_work
    assert broker.looked == 1


async def test_without_an_answer_from_the_broker_nothing_counts_as_standing_still() -> None:
    broker = Broker()
    lag = monitor(broker, finished=4, progress=Progress(3, 0, 4, 5.0))
    await lag.measure()
    assert lag.look() == {P0: Look(has_work=True, last_attempt_s=5.0)}

    broker.away = True
    await lag.measure()

    assert lag.look() == {}
    assert lag.states()[P0].lag is None


async def test_messages_at_work_are_work_even_without_lag() -> None:
    lag = monitor(Broker(), finished=10, progress=Progress(0, 2, 10, 7.0))
    await lag.measure()

    assert lag.look() == {P0: Look(has_work=True, last_attempt_s=7.0)}


# --- The process


def run(body: str) -> subprocess.CompletedProcess[str]:
    program = textwrap.dedent(
        """
        import asyncio, time
        from streams.watchdog import Look, Watchdog
        P0 = ("orders.commands", 0)
        STUCK = {P0: Look(has_work=True, last_attempt_s=0.0)}
        async def beating(dog):
            dog.start()
            while True:
                dog.beat()
                await asyncio.sleep(0.05)
        """
    ) + textwrap.dedent(body)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)


async def test_a_process_that_stands_still_ends() -> None:
    ended = await asyncio.to_thread(
        run, "asyncio.run(beating(Watchdog(look=lambda: STUCK, stalled_after_s=2, tick_s=0.1)))"
    )
    assert ended.returncode == EXIT_STALLED
    assert "nothing was tried in orders.commands[0]" in ended.stdout


async def test_a_process_whose_loop_is_blocked_ends() -> None:
    ended = await asyncio.to_thread(
        run,
        """
        async def blocked():
            Watchdog(look=dict, stalled_after_s=0.5, tick_s=0.1).start()
            time.sleep(50)
        asyncio.run(blocked())
        """,
    )
    assert ended.returncode == EXIT_STALLED
    assert "the event loop does not turn" in ended.stdout


async def test_a_process_that_its_group_has_lost_ends_at_once() -> None:
    ended = await asyncio.to_thread(
        run,
        """
        lost = lambda: RuntimeError("fenced")
        asyncio.run(beating(Watchdog(look=dict, membership_error=lost, stalled_after_s=60, tick_s=0.1)))
        """,
    )
    assert ended.returncode == EXIT_STALLED
    assert "fenced" in ended.stdout


async def test_a_watchdog_that_cannot_look_ends_its_process() -> None:
    ended = await asyncio.to_thread(
        run,
        """
        def look():
            raise ValueError("blind")
        asyncio.run(beating(Watchdog(look=look, stalled_after_s=60, tick_s=0.1)))
        """,
    )
    assert ended.returncode == EXIT_FAILED
