"""Commands that time asks for, and what a worker tells over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from flow_world import RememberingRuntime, until
from test_command_processor import FakeProducer

from actors.runtime import ActorLostError, Placement
from infra.messaging.connection import KafkaConnection
from infra.messaging.errors import BrokerUnavailableError
from schemas.inventory import CancelReservation
from schemas.registry import default_registry
from streams.health import HealthServer
from streams.lag import PartitionState
from streams.partitions import Partition, Progress
from streams.timers import Timers

PLACEMENT = Placement(16, {"inventory": 2, "orders": 1})


class Clockwork(RememberingRuntime):
    """`inventory-1` finds one reservation expired, whenever it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, int]] = []

    async def ask(self, actor: str, method: str, items: Sequence[Any]) -> list[Any]:
        if method != "due":
            return await super().ask(actor, method, items)
        if self.lose_next:
            self.lose_next -= 1
            raise ActorLostError(actor)
        self.asked += [(actor, item) for item in items]
        if actor != "inventory-1":
            return [[] for _ in items]
        body = CancelReservation(category="851", order_id="order-1").model_dump_json().encode()
        return [[("expiry-1", "CancelReservation", body, "851")] for _ in items]


def timers(runtime: Any, producer: Any, assigned: set[Partition], **more: Any) -> Timers:
    return Timers(
        domains=["inventory", "orders"],
        runtime=runtime,
        placement=PLACEMENT,
        producer=producer,
        assigned=lambda: assigned,
        interval_s=0.005,
        **{"now_ms": lambda: 1_600_000_000_000, **more},
    )


async def test_what_is_due_is_published_as_the_command_that_it_is() -> None:
    runtime, producer = Clockwork(), FakeProducer()

    assert await timers(runtime, producer, set()).publish_due("inventory") == 1

    assert runtime.asked == [("inventory-0", 1_600_000_000_000), ("inventory-1", 1_600_000_000_000)]
    ((topic, key, value, headers),) = producer.sent
    assert (topic, key) == ("inventory.commands", b"851")
    assert (headers["ce_id"], headers["ce_type"]) == (b"expiry-1", b"CancelReservation")
    model = default_registry().command("CancelReservation")
    assert model.produce(value or b"") == CancelReservation(category="851", order_id="order-1")


async def test_a_command_that_two_workers_find_due_is_the_same_message() -> None:
    producer = FakeProducer()
    await timers(Clockwork(), producer, set()).publish_due("inventory")
    await timers(Clockwork(), producer, set()).publish_due("inventory")

    assert producer.sent[0] == producer.sent[1]


async def test_what_stays_due_is_published_again_after_a_while_and_not_at_every_look() -> None:
    producer, now_ms = FakeProducer(), [1_600_000_000_000]
    ticking = timers(Clockwork(), producer, set(), now_ms=lambda: now_ms[0])

    published = []
    for _ in range(6):
        published.append(await ticking.publish_due("inventory"))
        now_ms[0] += 20_000

    assert published == [1, 0, 0, 1, 0, 0]
    assert {headers["ce_id"] for _, _, _, headers in producer.sent} == {b"expiry-1"}


async def test_only_the_worker_with_the_first_partition_asks() -> None:
    runtime = Clockwork()
    running = asyncio.ensure_future(timers(runtime, FakeProducer(), {("orders.commands", 0)}).run())
    await until(lambda: len(runtime.asked) >= 2)
    running.cancel()

    assert {actor for actor, _ in runtime.asked} == {"orders-0"}


async def test_a_timer_goes_on_after_what_could_not_be_asked_or_published() -> None:
    runtime, producer = Clockwork(), FakeProducer({0: BrokerUnavailableError("kafka:9092")})
    runtime.lose_next = 2
    running = asyncio.ensure_future(timers(runtime, producer, {("inventory.commands", 0)}).run())
    await until(lambda: len(producer.confirmed) >= 1)
    running.cancel()

    assert len(producer.sent) >= 2


# --- Health


class Fleet(RememberingRuntime):
    def __init__(self) -> None:
        super().__init__()
        self.lost: set[str] = set()
        self.silent: set[str] = set()

    async def ask(self, actor: str, method: str, items: Sequence[Any]) -> list[Any]:
        if actor in self.lost:
            raise ActorLostError(actor)
        if actor in self.silent:
            await asyncio.sleep(3600)
        return await super().ask(actor, method, items)


@asynccontextmanager
async def serving(runtime: Fleet, *, assigned: bool = True) -> AsyncIterator[Any]:
    """A health server, and a function that asks it for a page."""
    server = HealthServer(
        name="worker-0",
        runtime=runtime,
        actors=["coordinator-0", "orders-0", "views-0"],
        assignment_known=lambda: assigned,
        states=lambda: {("orders.commands", 1): PartitionState(7, Progress(3, 4, 12, 5.0))},
        metrics_page=lambda: b"concord_commands_total 3\n",
        actor_within_s=0.05,
    )
    await server.start(0)

    async def get(path: str) -> tuple[int, Any]:
        url = f"http://127.0.0.1:{server.port}{path}"
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            if response.content_type == "application/json":
                return response.status, await response.json()
            return response.status, await response.read()

    try:
        yield get
    finally:
        await server.stop()


async def test_a_worker_with_partitions_and_actors_is_ready() -> None:
    async with serving(Fleet()) as get:
        status, body = await get("/readyz")

    assert (status, body["status"], body["missing"]) == (200, "ready", [])


async def test_a_worker_without_an_assignment_is_not_ready() -> None:
    async with serving(Fleet(), assigned=False) as get:
        status, body = await get("/readyz")
        assert (await get("/healthz"))[0] == 200

    assert status == 503
    assert ["partitions" in missing for missing in body["missing"]] == [True]


@pytest.mark.parametrize(("lost", "silent"), [({"orders-0"}, set()), (set(), {"orders-0"})])
async def test_a_worker_whose_actors_do_not_answer_is_not_ready(lost: set[str], silent: set[str]) -> None:
    fleet = Fleet()
    fleet.lost, fleet.silent = lost, silent
    async with serving(fleet) as get:
        status, body = await get("/readyz")

    assert status == 503
    assert [missing.split(":")[0] for missing in body["missing"]] == ["orders-0"]


async def test_health_tells_what_each_partition_is_doing() -> None:
    async with serving(Fleet()) as get:
        _, body = await get("/healthz")

    (partition,) = body["partitions"]
    assert partition.pop("last_progress_s_ago") > 0
    assert partition == {
        "topic": "orders.commands", "partition": 1, "lag": 7, "waiting": 3, "at_work": 4, "next_offset": 12,
    }  # fmt: skip
    assert body["worker"] == "worker-0"


async def test_metrics_are_served_as_text() -> None:
    async with serving(Fleet()) as get:
        assert await get("/metrics") == (200, b"concord_commands_total 3\n")


async def test_a_taken_port_is_an_error_and_not_another_port() -> None:
    async with serving(Fleet()):
        server = HealthServer(
            name="worker-1", runtime=Fleet(), actors=[], assignment_known=lambda: True, states=dict,
            metrics_page=bytes,
        )  # fmt: skip
        taken = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
        port = taken.sockets[0].getsockname()[1]
        with pytest.raises(OSError, match=str(port)):
            await server.start(port)
        await server.stop()
        taken.close()


# --- The entry point


def test_the_entry_point_turns_settings_into_options(tmp_path: Path) -> None:
    from infra.config import load_settings
    from scripts.worker import WorkerSetup, worker_options

    settings = load_settings(data_dir=tmp_path, environment={"CONCORD_BATCH__MAX_COMMANDS": "7"})
    setup = WorkerSetup(settings=settings, bootstrap_servers="127.0.0.1:9", ray_address="127.0.0.1:8")
    again = WorkerSetup.model_validate_json(setup.model_dump_json())

    options = worker_options(again, name="worker-3", health_port=5)

    assert (options.name, options.health_port, options.kafka) == ("worker-3", 5, KafkaConnection("127.0.0.1:9"))
    assert options.domains == ("inventory", "payment", "shipping", "orders")
    assert options.limits.batch_messages == 7
    assert options.placement.shards["orders"] == settings.actors.shards_of("orders")
    assert options.stalled_after_s == settings.watchdog_seconds
