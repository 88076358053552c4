"""Order events from a real Kafka into the view, by the worker."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from flow_world import FlowWorld, RememberingRuntime, until
from order_events import message, placed, shipped

from actors.incarnations import Incarnations
from actors.runtime import ActorLostError
from actors.view_actor import ViewActor, order_history, positions
from infra.clock import ManualClock
from infra.failpoints import arm, fired
from infra.messaging.producer import EventProducer
from infra.messaging.reader import cluster_id, committed_offsets
from infra.storage.connect import connect
from schemas.envelope import RawMessage
from schemas.topics import TopicRole
from streams.watchdog import EXIT_FAILED


class ViewRuntime(RememberingRuntime):
    """A runtime with the one actor that these tests are about. It is lost as often as `lose_next` says."""

    def __init__(self) -> None:
        super().__init__()
        self.storage = connect("memory:")
        clock = ManualClock()
        incarnations = Incarnations(self.storage, clock)
        self.view = ViewActor(name="views-0", storage=self.storage, incarnations=incarnations, clock=clock)

    async def ask(self, actor: str, method: str, items: Sequence[Any]) -> list[Any]:
        if method != "apply":
            return await super().ask(actor, method, items)
        assert actor == "views-0"
        applied = await self.view.apply(list(items))
        if self.lose_next:
            self.lose_next -= 1
            raise ActorLostError("a test's")
        return applied


async def runtime_with_tables() -> ViewRuntime:
    runtime = ViewRuntime()
    await runtime.view.start()
    return runtime


async def publish(world: FlowWorld, events: Sequence[RawMessage]) -> None:
    producer = EventProducer(world.bootstrap_servers, linger_ms=1)
    await producer.start()
    topic = world.topic(TopicRole.EVENTS)
    headers = [[(name, value or b"") for name, value in raw.headers] for raw in events]
    sent = [await producer.send(topic, raw.key, raw.value, own) for raw, own in zip(events, headers, strict=True)]
    await asyncio.gather(*sent)
    await producer.stop()


async def acknowledged_events(world: FlowWorld) -> int:
    offsets = await committed_offsets(world.bootstrap_servers, world.group)
    return sum(offset for (topic, _), offset in offsets.items() if topic == world.topic(TopicRole.EVENTS))


async def wait_for_events(world: FlowWorld, count: int) -> None:
    async def are_applied() -> bool:
        return await acknowledged_events(world) >= count

    await until(are_applied, every_s=0.1)


async def test_events_become_rows_with_positions_of_this_log(world: FlowWorld) -> None:
    runtime = await runtime_with_tables()
    customers = [f"customer-{n}" for n in range(6)]
    events = [message(placed(f"order-{c}", c), offset=0) for c in customers]
    events += [message(shipped(f"order-{c}", c), offset=0, version=2) for c in customers]
    await publish(world, events)

    worker = await world.start_local(runtime=runtime, projected_domain=world.domain)
    await wait_for_events(world, 12)

    for customer in customers:
        (row,) = await order_history(runtime.storage, customer)
        assert (row.order_id, row.status, row.record_version) == (f"order-{customer}", "shipped", 2)
    found = await positions(runtime.storage)
    assert sum(one.next_offset for one in found) == 12
    assert {one.log_identity for one in found} == {await cluster_id(world.bootstrap_servers)}
    assert worker.ends == []


async def test_a_batch_that_was_applied_and_not_acknowledged_changes_nothing(
    world: FlowWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    failpoints = world.directory / "failpoints"
    monkeypatch.setattr("infra.failpoints._file", str(failpoints))
    arm(failpoints, ["projection.after_apply=raise@1"])
    runtime = await runtime_with_tables()
    await publish(world, [message(placed(), offset=0), message(shipped(), offset=1, version=2)])

    first = await world.start_local(runtime=runtime, projected_domain=world.domain)
    await until(lambda: first.ends == [EXIT_FAILED])
    await first.stop()
    assert await acknowledged_events(world) == 0
    rows = await order_history(runtime.storage, "customer-1")
    assert [row.status for row in rows] == ["shipped"]
    await world.start_local(runtime=runtime, projected_domain=world.domain)
    await wait_for_events(world, 2)

    assert fired(failpoints) == ["projection.after_apply"]
    assert await order_history(runtime.storage, "customer-1") == rows


async def test_a_lost_view_actor_is_asked_again_and_unreadable_events_are_passed_over(world: FlowWorld) -> None:
    runtime = await runtime_with_tables()
    runtime.lose_next = 2
    broken = RawMessage("", 0, 0, 0, b"customer-1", (), b"\x80")
    await publish(world, [message(placed(), offset=0), broken, message(shipped(), offset=2, version=2)])

    worker = await world.start_local(runtime=runtime, projected_domain=world.domain)
    await wait_for_events(world, 3)

    (row,) = await order_history(runtime.storage, "customer-1")
    assert row.status == "shipped"
    assert worker.ends == []
