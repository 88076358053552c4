"""Workers that come and go: how a group shares its partitions, and how soon those of a worker that leaves are taken.

Sessions last a minute here, so that nothing can be explained by one that ended.
"""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import pytest
from flow_world import FlowWorld, LocalWorker, until
from test_worker import assert_each_answered_in_key_order, commands, ids_by_key, in_key_order

from schemas.topics import TopicRole
from streams.app import StreamWorker

PATIENT_SESSION = {"session_timeout_s": 60.0, "heartbeat_s": 0.5}


def shares(*workers: LocalWorker) -> list[int]:
    return sorted(len(worker.stream_worker.assigned) for worker in workers if worker.stream_worker.ready)


async def test_workers_beyond_the_partitions_are_ready_and_take_over_when_another_leaves(world: FlowWorld) -> None:
    workers = [await world.start_local(f"worker-{number}", **PATIENT_SESSION) for number in range(3)]
    await until(lambda: shares(*workers) == [0, 1, 1])
    sent = commands(60)
    await world.send(sent)
    await world.wait_for_acknowledged(60)
    idle = next(worker for worker in workers if not worker.stream_worker.assigned)
    leaver, stayer = (worker for worker in workers if worker is not idle)

    leaver.stream_worker.leave()
    await leaver.run
    await until(lambda: shares(idle, stayer) == [1, 1])
    more = commands(60, prefix="m")
    await world.send(more)
    await world.wait_for_acknowledged(120)

    assert ids_by_key(await world.read(TopicRole.RESULTS)) == in_key_order([*sent, *more])
    assert [worker.ends for worker in workers] == [[], [], []]


async def test_a_worker_process_that_leaves_finishes_what_it_is_at_and_its_partitions_are_taken_at_once(
    world: FlowWorld,
) -> None:
    stayer = await world.start_local("worker-0", **PATIENT_SESSION)
    leaver = await world.start_worker("worker-1", **PATIENT_SESSION)
    await until(lambda: shares(stayer) == [1])
    world.hold_path.touch()
    held = [("h0", b"key-0", b"hold"), ("h1", b"key-1", b"hold")]  # one in each partition
    await world.send(held)
    await until(lambda: {"h0", "h1"} <= {id for line in world.journal() for id in line["ids"]})
    later = commands(40)
    await world.send(later)

    await leaver.has_heard(signal.SIGUSR1)
    await asyncio.sleep(0.3)  # nothing tells that it goes on waiting: time to do wrong
    assert leaver.process.poll() is None, "it did not wait for the batch at work"
    world.hold_path.unlink()
    assert await leaver.exit_code() == 0
    await until(lambda: shares(stayer) == [2])
    await world.wait_for_acknowledged(42)

    await assert_each_answered_in_key_order(world, [*held, *later])
    assert len(await world.result_ids()) == 42, "something was done twice without a fault"


async def test_a_worker_that_comes_back_under_its_name_finds_its_partitions_and_disturbs_nobody(
    world: FlowWorld,
) -> None:
    stayer = await world.start_local("worker-0", **PATIENT_SESSION)
    first = await world.start_worker("worker-1", **PATIENT_SESSION)
    await until(lambda: shares(stayer) == [1])
    before = set(stayer.stream_worker.assigned)
    generation = stayer.stream_worker.generation

    first.signal(signal.SIGTERM)
    assert await first.exit_code() == 0
    second = await world.start_worker("worker-1", **PATIENT_SESSION)
    sent = commands(60)
    await world.send(sent)
    await world.wait_for_acknowledged(60)

    assert (stayer.stream_worker.assigned, stayer.stream_worker.generation) == (before, generation)
    _, health = await second.get("/healthz")
    assert len(health["partitions"]) == 1
    await assert_each_answered_in_key_order(world, sent)


async def test_a_group_that_rebalances_while_a_worker_stops_does_not_keep_it_from_acknowledging_and_leaving(
    world: FlowWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[StreamWorker] = []
    on_revoked = StreamWorker._on_revoked

    async def noted(worker: StreamWorker, *arguments: Any, **named: Any) -> None:
        told.append(worker)
        await on_revoked(worker, *arguments, **named)

    monkeypatch.setattr(StreamWorker, "_on_revoked", noted)
    patient = {"stop_patience_s": 60.0, **PATIENT_SESSION}
    first, second, idle = [await world.start_local(f"worker-{number}", **patient) for number in range(3)]
    await until(lambda: shares(first, second, idle) == [0, 1, 1])
    world.hold_path.touch()
    await world.send([("h", b"key-0", b"hold")])
    await until(lambda: any("h" in line["ids"] for line in world.journal()))
    busy = next(one for one in (first, second, idle) if any(p.at_work for p in one.stream_worker.progress().values()))
    others = [one for one in (first, second, idle) if one is not busy]

    busy.stream_worker.leave()
    told.clear()
    others[0].stream_worker.leave()  # it has nothing to finish, so that the group rebalances at once
    await others[0].run
    await until(lambda: busy.stream_worker in told)  # by one of its heartbeats
    assert not busy.run.done()
    world.hold_path.unlink()
    await asyncio.wait_for(busy.run, 30)  # half of the time after which the group would help itself
    await until(lambda: shares(others[1]) == [2])
    await world.send([("later", b"key-0", b"{}")])
    await world.wait_for_acknowledged(2)

    assert await world.result_ids() == ["h", "later"], "something was done twice without a fault"
