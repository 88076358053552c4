"""Consumer groups named by domain: who is in which, and that two kinds of workers do not do the same work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from infra.config import Settings
from infra.messaging.reader import group_members, known_groups, lag
from infra.servers.kafka import LocalKafka
from schemas.registry import DOMAINS
from schemas.topics import CONSUMER_GROUP, TopicRole, consumer_group
from scripts.worker import DoubleWorkError, WorkerSetup, refuse_double_work, worker_options
from tests.flow.flow_world import flow_world


def setup(kafka: str = "127.0.0.1:9") -> WorkerSetup:
    return WorkerSetup(settings=Settings(), bootstrap_servers=kafka, ray_address="127.0.0.1:8")


def test_a_worker_of_every_domain_is_in_the_group_of_the_system() -> None:
    options = worker_options(setup(), name="w", health_port=0)

    assert (options.domains, options.consumer_group) == (DOMAINS, "concord")
    assert options.projected_domain == "orders"


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_worker_of_one_domain_is_in_a_group_named_after_it(domain: str) -> None:
    options = worker_options(setup(), name="w", health_port=0, domain=domain)

    assert (options.domains, options.consumer_group) == ((domain,), f"concord.{domain}")
    assert options.projected_domain == ("orders" if domain == "orders" else ""), "one of them keeps the order history"


async def test_workers_of_both_kinds_do_not_work_beside_each_other(kafka: LocalKafka, tmp_path: Path) -> None:
    of_all = worker_options(setup(kafka.bootstrap_servers), name="w", health_port=0)
    of_orders = worker_options(setup(kafka.bootstrap_servers), name="w", health_port=0, domain="orders")
    of_payment = worker_options(setup(kafka.bootstrap_servers), name="w", health_port=0, domain="payment")
    async with flow_world(kafka.bootstrap_servers, tmp_path) as world:
        for options in (of_all, of_orders):
            await refuse_double_work(options)  # nobody is at work
        worker = await world.start_local(consumer_group=consumer_group("orders"))

        assert await group_members(kafka.bootstrap_servers, [consumer_group("orders"), CONSUMER_GROUP]) == {
            "concord.orders": 1,
            "concord": 0,
        }
        with pytest.raises(DoubleWorkError, match=r"group concord\.orders take the commands"):
            await refuse_double_work(of_all)
        await refuse_double_work(replace(of_orders, name="another"))
        await refuse_double_work(of_payment)
        assert worker.ends == []


async def test_the_lag_of_several_groups_is_that_of_the_foremost(kafka: LocalKafka, tmp_path: Path) -> None:
    async with flow_world(kafka.bootstrap_servers, tmp_path, partitions=1) as world:
        await world.send([(f"c{number}", b"key", b"{}") for number in range(10)])
        await world.start_local()
        await world.wait_for_acknowledged(10)
        topic = world.topic(TopicRole.COMMANDS)
        unknown = f"never-{world.group}"

        assert await known_groups(kafka.bootstrap_servers, [unknown, world.group]) == [world.group]
        assert await lag(kafka.bootstrap_servers, [unknown, world.group], [topic]) == {(topic, 0): 0}
        assert await lag(kafka.bootstrap_servers, unknown, [topic]) == {(topic, 0): 10}
