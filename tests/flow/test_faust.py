"""What Faust does with offsets when it is left to do it, and that it does none of it here.

The first tests show the losses that the stream side is built around. If one of them fails after an update of Faust,
Faust has changed: read `streams/kafka_transport.py` again, whose reasons these are.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import faust
from flow_world import FlowWorld, placement_of, until

from infra.messaging.reader import committed_offsets
from schemas.topics import TopicRole
from streams.app import WorkerOptions, build_faust_app
from streams.kafka_transport import first_offset

VALUES = [b"a", b"b", b"bad", b"c"]


async def send(world: FlowWorld) -> None:
    await world.send([(value.decode(), b"k", value) for value in VALUES])


async def committed(world: FlowWorld) -> int | None:
    """The group's offset of the one partition that has messages."""
    return next(iter((await committed_offsets(world.bootstrap_servers, world.group)).values()), None)


def plain_app(world: FlowWorld) -> faust.App:
    """Faust as its manual has it, raw bytes and frequent commits apart."""
    return faust.App(
        world.group,
        broker=f"aiokafka://{world.bootstrap_servers}",
        value_serializer="raw",
        key_serializer="raw",
        consumer_auto_offset_reset="earliest",
        broker_commit_interval=0.2,
        topic_allow_declare=False,
        topic_disable_leader=True,
        web_enabled=False,
        datadir=str(world.directory / "plain"),
    )


def our_app(world: FlowWorld) -> faust.App:
    return build_faust_app(
        WorkerOptions(
            kafka=world.bootstrap_servers,
            name="worker-0",
            domains=(world.domain,),
            placement=placement_of(world.domain),
            work_dir=Path(world.directory),
            consumer_group=world.group,
        )
    )


@asynccontextmanager
async def running(app: faust.App) -> AsyncIterator[None]:
    worker = faust.Worker(
        app, loop=asyncio.get_running_loop(), redirect_stdouts=False, override_logging=False, quiet=True
    )
    worker.spinner = None
    worker.install_signal_handlers = lambda: None
    worker._setproctitle = lambda *_, **__: None
    run = asyncio.ensure_future(worker.start())
    try:
        yield
    finally:
        await worker.stop()
        await run


async def test_by_itself_faust_acknowledges_what_an_agent_could_not_do(world: FlowWorld) -> None:
    app, done = plain_app(world), []

    @app.agent(app.topic(world.topic(TopicRole.COMMANDS)))
    async def agent(stream: Any) -> None:
        async for value in stream:
            if value == b"bad":
                raise ValueError("a test's")
            done.append(value)

    await send(world)
    async with running(app):
        await until(lambda: done == [b"a", b"b", b"c"])
        await _until_committed(world, 4)

    assert await committed(world) == 4, "Faust no longer acknowledges what raised"


async def test_without_acknowledging_faust_commits_over_a_missing_message_all_the_same(world: FlowWorld) -> None:
    app, done = plain_app(world), []

    @app.agent(app.topic(world.topic(TopicRole.COMMANDS)))
    async def agent(stream: Any) -> None:
        async for event in stream.noack().events():
            if event.value == b"bad":
                await _until_committed(world, 2)  # the missing message is then the first after the committed ones
                continue
            done.append(event.value)
            event.ack()

    await send(world)
    async with running(app):
        await until(lambda: done == [b"a", b"b", b"c"])
        await _until_committed(world, 4)

    assert await committed(world) == 4, "issue 606 is mended"


async def test_here_faust_acknowledges_nothing_whatever_an_agent_does(world: FlowWorld) -> None:
    app, done = our_app(world), []
    app.conf.broker_commit_interval = 0.2

    @app.agent(app.topic(world.topic(TopicRole.COMMANDS), acks=False))
    async def agent(stream: Any) -> None:
        async for event in stream.events():
            done.append(event.value)
            event.ack()

    await send(world)
    async with running(app):
        await until(lambda: done == VALUES)
        await app.consumer.commit()
        await app.consumer.acknowledge({(world.topic(TopicRole.COMMANDS), partition_of(app)): 2})
        await app.consumer.commit()

    assert app.topics.acking_topics == set()
    assert await committed(world) == 2, "only what was acknowledged by name may be committed"


async def test_a_partition_without_acknowledged_messages_is_read_from_its_beginning_again(world: FlowWorld) -> None:
    app, done = our_app(world), []

    @app.agent(app.topic(world.topic(TopicRole.COMMANDS), acks=False))
    async def agent(stream: Any) -> None:
        async for event in stream.noack().events():
            done.append(event.value)

    await send(world)
    async with running(app):
        await until(lambda: done == VALUES)

        await app.consumer.perform_seek()  # as Faust does after a rebalance

        await until(lambda: done == VALUES * 2)
        assert {app.consumer.start_of((world.topic(TopicRole.COMMANDS), n)) for n in (0, 1)} == {0}


async def test_the_first_message_at_or_after_an_offset_is_found(world: FlowWorld) -> None:
    await send(world)
    topic = world.topic(TopicRole.COMMANDS)
    found = [
        [await first_offset(world.bootstrap_servers, (topic, number), offset) for offset in (0, 3, 4)]
        for number in (0, 1)
    ]
    assert sorted(found, key=repr) == [[0, 3, None], [None, None, None]]


def partition_of(app: faust.App) -> int:
    """The partition that had the messages."""
    consumer = app.consumer
    return next(tp.partition for tp in consumer.assignment() if consumer.highwater(tp))


async def _until_committed(world: FlowWorld, offset: int) -> None:
    async def is_there() -> bool:
        return (await committed(world) or 0) >= offset

    await until(is_there, every_s=0.1)
