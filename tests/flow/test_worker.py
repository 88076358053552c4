"""The stream worker as a process, against a real Kafka: what is acknowledged, in which order, after which fault."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import defaultdict

from aiokafka import AIOKafkaProducer
from flow_world import FlowWorld, header, until

from infra.failpoints import arm, fired
from infra.messaging.reader import Record
from schemas.topics import TopicRole
from streams.watchdog import EXIT_FAILED, EXIT_STALLED


def commands(count: int, *, keys: int = 5, prefix: str = "c", value: bytes = b"{}") -> list[tuple[str, bytes, bytes]]:
    return [(f"{prefix}{number}", b"key-%d" % (number % keys), value) for number in range(count)]


def ids_by_key(records: list[Record]) -> dict[bytes | None, list[str]]:
    """Ids of the commands that `records` are about, for each key in the order of first appearance."""
    found: dict[bytes | None, list[str]] = defaultdict(list)
    for record in records:
        id = header(record, "ce_causationid")
        if id not in found[record.key]:
            found[record.key].append(id)
    return dict(found)


def in_key_order(sent: list[tuple[str, bytes, bytes]]) -> dict[bytes | None, list[str]]:
    found: dict[bytes | None, list[str]] = defaultdict(list)
    for id, key, _ in sent:
        found[key].append(id)
    return dict(found)


async def assert_each_answered_in_key_order(world: FlowWorld, sent: list[tuple[str, bytes, bytes]]) -> None:
    assert ids_by_key(await world.read(TopicRole.RESULTS)) == in_key_order(sent)
    assert ids_by_key(await world.read(TopicRole.EVENTS)) == in_key_order(sent)


async def test_commands_are_answered_in_the_order_of_their_keys_and_acknowledged(world: FlowWorld) -> None:
    sent = commands(300)
    await world.send(sent)

    worker = await world.start_local()
    await world.wait_for_acknowledged(300)

    await assert_each_answered_in_key_order(world, sent)
    assert len(await world.result_ids()) == 300, "something was done twice without a fault"
    progress = worker.stream_worker.progress()
    assert sum(one.next_finished or 0 for one in progress.values()) == 300
    assert worker.ends == []


async def test_a_slow_partition_holds_up_no_other_and_is_acknowledged_only_when_done(world: FlowWorld) -> None:
    world.hold_path.touch()
    await world.start_local()
    held, free = b"key-0", b"key-1"  # murmur2 puts them into partitions 1 and 0
    await world.send([("h0", held, b"hold")])
    await until(lambda: any("h0" in line["ids"] for line in world.journal()))

    await world.send([("h1", held, b"{}"), *((f"f{n}", free, b"{}") for n in range(50))])
    await world.wait_for_results({f"f{n}" for n in range(50)})
    await world.wait_for_acknowledged(50)

    assert sorted((await world.acknowledged()).values()) in ([50], [0, 50])
    assert not any("h1" in line["ids"] for line in world.journal()), "a second batch of the partition began"
    world.hold_path.unlink()
    await world.wait_for_acknowledged(52)
    assert ids_by_key(await world.read(TopicRole.RESULTS))[held] == ["h0", "h1"]


async def test_poison_and_what_is_too_long_go_to_the_dead_letters_and_the_partition_moves_on(world: FlowWorld) -> None:
    worker = await world.start_local(max_command_bytes=1_000)
    long = b"y" * 3_000_000

    await world.send(
        [("a", b"k", b"{}"), ("p", b"k", b"poison \x80"), ("b", b"k", b"{}"), ("l", b"k", long), ("c", b"k", b"{}")]
    )
    await world.wait_for_acknowledged(5)

    letters = await world.read(TopicRole.DEAD_LETTERS)
    assert [(header(one, "dlq-command-id"), header(one, "dlq-reason")) for one in letters] == [
        ("p", "not_json"),
        ("l", "too_large"),
    ]
    assert [one.value for one in letters] == [b"poison \x80", long]
    assert await world.result_ids() == ["a", "p", "b", "l", "c"]
    assert worker.ends == []


async def test_a_message_without_a_key_and_a_value_is_carried_through(world: FlowWorld) -> None:
    await world.start_local()

    await world.send([("n", None, None), ("e", b"", b"")])  # type: ignore[list-item]
    await world.wait_for_acknowledged(2)

    assert set(await world.result_ids()) == {"n", "e"}


async def test_a_killed_worker_loses_nothing_and_its_successor_goes_on_at_once(world: FlowWorld) -> None:
    world.hold_path.touch()
    worker = await world.start_worker()
    sent = [*commands(40, prefix="a"), ("h", b"key-0", b"hold"), *commands(40, prefix="b")]
    await world.send(sent)
    await until(lambda: any("h" in line["ids"] for line in world.journal()))
    worker.kill()
    before = await world.acknowledged()
    world.hold_path.unlink()

    await world.start_local()
    await world.wait_for_acknowledged(81)

    assert sum(before.values()) < 81
    await assert_each_answered_in_key_order(world, sent)


async def test_what_was_published_and_not_acknowledged_is_published_again_with_the_same_ids(world: FlowWorld) -> None:
    failpoints = world.directory / "failpoints"
    arm(failpoints, ["worker.after_publish=kill@1"])
    await world.send([("a", b"k", b"{}"), ("b", b"k", b"{}")])
    worker = world.spawn_worker(failpoints=failpoints)
    assert await worker.exit_code() == -signal.SIGKILL

    await world.start_local()
    await world.wait_for_acknowledged(2)

    assert fired(failpoints) == ["worker.after_publish"]
    for role in (TopicRole.EVENTS, TopicRole.RESULTS):
        records = await world.read(role)
        assert [header(record, "ce_causationid") for record in records] == ["a", "b", "a", "b"]
        ids = [header(record, "ce_id") for record in records]
        assert ids[:2] == ids[2:]


async def test_a_dead_letter_reaches_its_topic_before_it_is_acknowledged(world: FlowWorld) -> None:
    failpoints = world.directory / "failpoints"
    arm(failpoints, ["worker.after_dead_letter=kill@1", "worker.before_dead_letter=kill@2"])
    await world.send([("p", b"k", b"poison")])

    assert await world.spawn_worker(failpoints=failpoints).exit_code() == -signal.SIGKILL
    assert len(await world.read(TopicRole.DEAD_LETTERS)) == 1
    assert sum((await world.acknowledged()).values()) == 0
    assert await world.spawn_worker(failpoints=failpoints).exit_code() == -signal.SIGKILL
    assert len(await world.read(TopicRole.DEAD_LETTERS)) == 1
    await world.start_local()
    await world.wait_for_acknowledged(1)

    assert fired(failpoints) == ["worker.after_dead_letter", "worker.before_dead_letter"]
    letters = await world.read(TopicRole.DEAD_LETTERS)
    assert [letter.value for letter in letters] == [b"poison", b"poison"]
    assert letters[0].headers == letters[1].headers


async def test_an_error_nobody_expected_ends_the_process_with_nothing_acknowledged(world: FlowWorld) -> None:
    failpoints = world.directory / "failpoints"
    arm(failpoints, ["worker.before_publish=raise@1"])
    await world.send(commands(5, keys=1))

    worker = world.spawn_worker(failpoints=failpoints)

    assert await worker.exit_code() == EXIT_FAILED
    assert "ending_the_process" in worker.log
    assert await world.acknowledged() == {}
    await world.start_local()
    await world.wait_for_acknowledged(5)
    assert await world.result_ids() == [f"c{n}" for n in range(5)]


async def test_a_stop_finishes_what_is_at_work_acknowledges_it_and_leaves_the_rest(world: FlowWorld) -> None:
    world.hold_path.touch()
    worker = await world.start_worker()
    await world.send([("h", b"k", b"hold")])
    await until(lambda: any("h" in line["ids"] for line in world.journal()))
    await world.send([("later", b"k", b"{}")])

    async def later_waits() -> bool:
        return await worker.waiting() == 1

    await until(later_waits)
    await worker.has_heard(signal.SIGTERM)
    await asyncio.sleep(0.3)  # nothing tells that it goes on waiting: time to do wrong
    assert worker.process.poll() is None, "it did not wait for the batch at work"
    world.hold_path.unlink()

    assert await worker.exit_code() == 0
    assert await world.result_ids() == ["h"]
    assert sum((await world.acknowledged()).values()) == 1
    await world.start_local()
    await world.wait_for_acknowledged(2)
    assert await world.result_ids() == ["h", "later"]


async def test_a_stop_does_not_wait_for_ever_for_what_is_at_work(world: FlowWorld) -> None:
    world.hold_path.touch()
    worker = await world.start_local(stop_patience_s=0.3)
    await world.send([("h", b"k", b"hold")])
    await until(lambda: any("h" in line["ids"] for line in world.journal()))

    await asyncio.wait_for(worker.stop(), 60)

    assert sum((await world.acknowledged()).values()) == 0
    world.hold_path.unlink()


async def test_a_worker_whose_actors_are_deaf_ends_and_one_whose_actors_wait_does_not(world: FlowWorld) -> None:
    # Longer than the watchdog takes a standing clock for a machine that slept (5 s): no busy machine can trip it.
    quick = {"patience": {"health_every_s": 0.2, "health_within_s": 0.5}, "stalled_after_s": 6.5}
    world.hold_path.touch()
    worker = await world.start_worker(**quick)
    await world.send([("h", b"k", b"hold")])
    await asyncio.sleep(8)  # longer than `stalled_after_s`, in which nothing may happen
    assert worker.process.poll() is None, "waiting counted as standing still"

    world.deaf_path.touch()

    assert await worker.exit_code() == EXIT_STALLED
    assert "standing_still" in worker.log


async def test_partitions_move_between_workers_and_nothing_is_lost_or_out_of_order(world: FlowWorld) -> None:
    session = {"session_timeout_s": 6.0, "heartbeat_s": 1.0}
    sent: list[tuple[str, bytes, bytes]] = []
    first = await world.start_local("worker-0", **session)

    enough = asyncio.Event()

    async def send_on() -> None:
        while not enough.is_set():  # Not cancelled: what was sent must have been noted.
            some = commands(20, prefix=f"s{len(sent)}-")
            await world.send(some)
            sent.extend(some)
            await asyncio.sleep(0.05)

    sending = asyncio.ensure_future(send_on())
    second = await world.start_worker("worker-1", **session)
    await until(lambda: len(first.stream_worker.assigned) == 1)
    begun = len(world.journal())
    both = {os.getpid(), second.process.pid}
    await until(lambda: {line["pid"] for line in world.journal()[begun:]} == both)
    enough.set()
    await sending
    await world.wait_for_acknowledged(len(sent))

    more = commands(100, prefix="m")
    second.kill()  # and not restarted: the other takes over when its session ends
    await world.send(more)
    await world.wait_for_acknowledged(len(sent) + 100, within_s=30)

    assert ids_by_key(await world.read(TopicRole.RESULTS)) == in_key_order([*sent, *more])


async def test_a_worker_that_was_stopped_and_lost_its_partitions_publishes_nothing_wrong(world: FlowWorld) -> None:
    session = {"session_timeout_s": 6.0, "heartbeat_s": 1.0}
    zombie = await world.start_worker("worker-0", **session)
    await world.send(commands(50, prefix="a"))
    await world.wait_for_acknowledged(50)
    zombie.signal(signal.SIGSTOP)
    await world.send(commands(50, prefix="b"))

    await world.start_local("worker-1", **session)
    await world.wait_for_acknowledged(100, within_s=30)
    zombie.signal(signal.SIGCONT)
    await world.send(commands(50, prefix="c"))
    await world.wait_for_acknowledged(150, within_s=30)

    sent = [*commands(50, prefix="a"), *commands(50, prefix="b"), *commands(50, prefix="c")]
    await assert_each_answered_in_key_order(world, sent)


async def test_a_rebalance_before_anything_was_acknowledged_loses_nothing(world: FlowWorld) -> None:
    world.hold_path.touch()
    sent = [("h0", b"key-0", b"hold"), ("h1", b"key-1", b"hold"), *commands(40)]
    await world.send(sent)
    quick = {"session_timeout_s": 6.0, "heartbeat_s": 0.5, "revoke_patience_s": 0.3}
    first = await world.start_local("worker-0", **quick)
    await until(lambda: {"h0", "h1"} <= {id for line in world.journal() for id in line["ids"]})

    second = await world.start_local("worker-1", **quick)
    await until(lambda: len(first.stream_worker.assigned) == len(second.stream_worker.assigned) == 1)
    world.hold_path.unlink()
    await world.wait_for_acknowledged(42)

    await assert_each_answered_in_key_order(world, sent)
    assert first.ends == second.ends == []


async def test_a_worker_that_is_behind_keeps_what_waits_bounded(world: FlowWorld) -> None:
    world.hold_path.touch()
    limits = {"batch_messages": 64, "partition_messages": 128}
    worker = await world.start_local(limits=limits)
    sent = [("h", b"key-0", b"hold"), *commands(2_000, keys=1)]
    await world.send(sent)

    def waiting() -> int:
        return sum(one.waiting for one in worker.stream_worker.progress().values())

    await until(lambda: waiting() >= 128)
    await asyncio.sleep(1)  # nothing tells that nothing more comes: the time of several fetches

    assert waiting() <= 128 + 1_000, "more than a fetch arrived after the partition was paused"
    world.hold_path.unlink()
    await world.wait_for_acknowledged(2_001)
    assert ids_by_key(await world.read(TopicRole.RESULTS)) == in_key_order(sent)


async def test_of_commands_sent_in_kafka_transactions_those_committed_are_carried_out(world: FlowWorld) -> None:
    topic = world.topic(TopicRole.COMMANDS)
    producer = AIOKafkaProducer(bootstrap_servers=world.bootstrap_servers, transactional_id=world.domain)
    await producer.start()
    for id in ("a", "aborted", "b"):
        await producer.begin_transaction()
        await producer.send_and_wait(topic, b"{}", b"k", headers=[("ce_id", id.encode())])
        await (producer.abort_transaction() if id == "aborted" else producer.commit_transaction())
    await producer.stop()

    worker = await world.start_local()
    await world.wait_for_acknowledged(5)  # of a, its marker, the aborted one, its marker, b, and b's marker

    assert await world.result_ids() == ["a", "b"]
    lag = worker.stream_worker.lag
    for _ in range(lag.suspicious_after + 1):
        await lag.measure()
    assert {state.lag for state in lag.states().values()} == {0}, "a marker at the end of the log counts as work"
    assert worker.ends == []
