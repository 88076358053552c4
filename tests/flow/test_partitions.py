"""Pipelines: one outstanding batch a partition, in order, bounded, and nothing passed over."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from flow_world import raw_command, until

from streams.partitions import Limits, LostMessageError, Partition, Pipelines, Received

P0, P1 = ("test.commands", 0), ("test.commands", 1)


class FakeSource:
    """Kafka's client. `log` says which offsets exist in each partition, for those that ask."""

    def __init__(self) -> None:
        self.paused: set[Partition] = set()
        self.starts: dict[Partition, int] = {}
        self.log: dict[Partition, list[int]] = {}
        self.asked: list[tuple[Partition, int]] = []

    def pause(self, partition: Partition) -> None:
        self.paused.add(partition)

    def resume(self, partition: Partition) -> None:
        self.paused.discard(partition)

    def start_of(self, partition: Partition) -> int | None:
        return self.starts.get(partition)

    async def first_offset(self, partition: Partition, offset: int) -> int | None:
        self.asked.append((partition, offset))
        return next((there for there in self.log.get(partition, []) if there >= offset), None)


class Bench:
    """Pipelines whose batches end when the test says so."""

    def __init__(self, *, limits: Limits | None = None, hold: bool = False) -> None:
        self.source = FakeSource()
        self.batches: list[tuple[Partition, list[int]]] = []
        self.finished: list[tuple[Partition, int]] = []
        self.failures: list[BaseException] = []
        self.at_work: dict[Partition, int] = {}
        self.most_at_work = 0
        self.go = asyncio.Event()
        self.time_s = 100.0
        if not hold:
            self.go.set()
        self.fail_at: int | None = None
        self.tried: list[Callable[[], None]] = []
        self.pipelines = Pipelines(
            work=self._work,
            source=self.source,
            finished=lambda partition, offset: self.finished.append((partition, offset)),
            failed=self.failures.append,
            limits=limits or Limits(linger_s=0),
            monotonic_s=lambda: self.time_s,
        )

    async def _work(self, partition: Partition, batch: list[Received], tried: Callable[[], None]) -> None:
        offsets = [received.raw.offset for received in batch]
        self.batches.append((partition, offsets))
        self.tried.append(tried)
        self.at_work[partition] = self.at_work.get(partition, 0) + 1
        self.most_at_work = max(self.most_at_work, self.at_work[partition])
        try:
            await self.go.wait()
            if self.fail_at in offsets:
                raise ValueError("a test's")
        finally:
            self.at_work[partition] -= 1

    def offer(self, *offsets: int, partition: Partition = P0, generation: int = 1, size: int = 2) -> None:
        for offset in offsets:
            raw = raw_command(f"c{offset}", value=b"x" * size, offset=offset, partition=partition[1])
            self.pipelines.offer(partition, generation, Received(raw))


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_what_waits_together_is_worked_on_together() -> None:
    bench = Bench()

    bench.offer(0, 1, 2)
    await settle()

    assert bench.batches == [(P0, [0, 1, 2])]
    assert bench.finished == [(P0, 3)]


async def test_a_partition_has_one_batch_at_work_and_others_go_on() -> None:
    bench = Bench(hold=True)
    bench.offer(0, 1)
    await settle()

    bench.offer(2, 3)
    bench.offer(0, partition=P1)
    await settle()

    assert bench.batches == [(P0, [0, 1]), (P1, [0])]
    bench.go.set()
    await settle()
    assert bench.batches == [(P0, [0, 1]), (P1, [0]), (P0, [2, 3])]
    assert bench.most_at_work == 1
    assert sorted(bench.finished) == [(P0, 2), (P0, 4), (P1, 1)]


async def test_a_batch_is_bounded_in_messages_and_in_bytes() -> None:
    bench = Bench(limits=Limits(batch_messages=2, linger_s=0))
    bench.offer(*range(5))
    await settle()
    assert [offsets for _, offsets in bench.batches] == [[0, 1], [2, 3], [4]]

    large = Bench(limits=Limits(batch_bytes=6_000, linger_s=0))
    large.offer(*range(4), size=2_000)
    await settle()
    assert [offsets for _, offsets in large.batches] == [[0, 1], [2, 3]]


async def test_a_message_larger_than_a_batch_is_a_batch_of_its_own() -> None:
    bench = Bench(limits=Limits(batch_bytes=1_000, linger_s=0))

    bench.offer(0, 1, size=5_000)
    await settle()

    assert [offsets for _, offsets in bench.batches] == [[0], [1]]


async def test_a_lone_message_waits_a_moment_for_company() -> None:
    bench = Bench(limits=Limits(linger_s=0.5))
    bench.offer(0)
    await settle()
    assert bench.batches == []

    bench.offer(1)
    await until(lambda: bench.batches != [])

    assert bench.batches == [(P0, [0, 1])]


async def test_nothing_is_finished_after_an_error_and_the_error_is_told() -> None:
    bench = Bench(limits=Limits(batch_messages=1, linger_s=0))
    bench.fail_at = 1

    bench.offer(0, 1, 2)
    await settle()

    assert bench.finished == [(P0, 1)]
    assert [str(error) for error in bench.failures] == ["a test's"]
    assert (P0, [2]) not in bench.batches


async def test_a_full_partition_is_paused_and_resumed_when_half_of_it_is_gone() -> None:
    bench = Bench(limits=Limits(batch_messages=1, partition_messages=4, linger_s=0), hold=True)
    bench.offer(0)
    await settle()

    bench.offer(1, 2, 3)
    assert bench.source.paused == set()
    bench.offer(4)
    assert bench.source.paused == {P0}

    bench.go.set()
    await settle()
    assert bench.source.paused == set()
    assert bench.finished[-1] == (P0, 5)


async def test_the_total_is_bounded_in_bytes_over_all_partitions() -> None:
    bench = Bench(limits=Limits(batch_messages=1, total_bytes=10_000, linger_s=0), hold=True)
    bench.offer(0, 1, size=4_000)
    bench.offer(0, 1, size=4_000, partition=P1)
    assert bench.source.paused == {P1}

    bench.go.set()
    await settle()

    assert bench.source.paused == set()
    assert bench.pipelines.waiting_bytes == 0


async def test_a_message_that_is_offered_twice_is_worked_on_once() -> None:
    bench = Bench()

    bench.offer(0, 1, 0, 1, 2)
    await settle()

    assert bench.batches == [(P0, [0, 1, 2])]


async def test_a_revocation_drops_what_waits_and_reports_what_ends_in_time() -> None:
    bench = Bench(hold=True)
    bench.offer(0)
    await settle()
    bench.offer(1, 2)

    revoking = asyncio.ensure_future(bench.pipelines.revoke(patience_s=5))
    await settle()
    bench.go.set()
    await revoking

    assert bench.batches == [(P0, [0])]
    assert bench.finished == [(P0, 1)]
    assert bench.pipelines.waiting_bytes == 0


async def test_a_batch_that_ends_after_a_revocation_is_not_reported() -> None:
    bench = Bench(hold=True)
    bench.offer(0, 1)
    await settle()

    await bench.pipelines.revoke(patience_s=0)
    bench.go.set()
    await settle()

    assert bench.finished == []


async def test_after_a_revocation_the_next_batch_waits_for_the_old_one() -> None:
    bench = Bench(hold=True)
    bench.offer(0, 1)
    await settle()
    await bench.pipelines.revoke(patience_s=0)

    bench.offer(0, 1, 2, generation=2)
    await settle()
    assert bench.batches == [(P0, [0, 1])]
    bench.go.set()
    await settle()

    assert bench.batches == [(P0, [0, 1]), (P0, [0, 1, 2])]
    assert bench.finished == [(P0, 3)]
    assert bench.most_at_work == 1


async def test_a_generation_with_the_number_of_the_last_one_is_still_another() -> None:
    bench = Bench(hold=True)
    bench.offer(0, 1)
    await settle()
    await bench.pipelines.revoke(patience_s=0)

    bench.offer(0, generation=1)
    bench.go.set()
    await settle()

    assert bench.finished == [(P0, 1)], "the batch of the generation before was reported"


async def test_a_gap_that_is_in_the_log_too_is_stepped_over() -> None:
    bench = Bench()
    bench.source.log[P0] = [0, 1, 5, 6]

    bench.offer(0, 1, 5, 6)
    await settle()

    assert bench.batches == [(P0, [0, 1]), (P0, [5, 6])]
    assert bench.finished == [(P0, 2), (P0, 7)]
    assert bench.source.asked == [(P0, 2)]


async def test_a_gap_that_is_not_in_the_log_ends_the_process() -> None:
    bench = Bench()
    bench.source.log[P0] = [0, 1, 2, 3]

    bench.offer(0, 1, 3)
    await settle()

    assert bench.finished == [(P0, 2)]
    assert [type(error) for error in bench.failures] == [LostMessageError]


async def test_a_first_message_that_is_not_the_one_read_from_ends_the_process() -> None:
    bench = Bench()
    bench.source.starts[P0] = 10
    bench.source.log[P0] = list(range(60))

    bench.offer(50, 51)
    await settle()

    assert bench.batches == []
    assert [type(error) for error in bench.failures] == [LostMessageError]


async def test_messages_before_the_beginning_of_a_generation_are_ignored() -> None:
    bench = Bench()
    bench.source.starts[P0] = 10

    bench.offer(8, 9, 10, 11)
    await settle()

    assert bench.batches == [(P0, [10, 11])]


async def test_a_closed_pipeline_takes_nothing_more() -> None:
    bench = Bench()
    await bench.pipelines.close(patience_s=1)

    bench.offer(0)
    await settle()

    assert bench.batches == []


async def test_a_try_that_a_long_batch_reports_is_progress() -> None:
    bench = Bench(hold=True)
    bench.offer(0)
    await settle()
    assert bench.pipelines.progress()[P0].last_attempt_s == 100.0

    bench.time_s = 130.0
    bench.tried[0]()

    progress = bench.pipelines.progress()[P0]
    assert (progress.last_attempt_s, progress.at_work, progress.waiting) == (130.0, 1, 0)


@pytest.mark.parametrize("batch_messages", [1, 3, 256])
async def test_order_holds_whatever_the_batches_are(batch_messages: int) -> None:
    bench = Bench(limits=Limits(batch_messages=batch_messages, linger_s=0))

    for offset in range(100):
        bench.offer(offset)
        if offset % 7 == 0:
            await settle()
    for _ in range(100):
        await settle()

    assert [offset for _, offsets in bench.batches for offset in offsets] == list(range(100))
    assert bench.finished[-1] == (P0, 100)
