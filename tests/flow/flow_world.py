"""What the tests of the stream worker stand on: actors that only remember, and a Kafka with topics of their own.

The actors here answer at once, from the message alone, so that every test is about the worker. What they were asked is
kept in a file that several worker processes share.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from actors.messages import Health
from actors.runtime import ActorLostError, Placement
from infra.messaging.producer import EventProducer
from infra.messaging.reader import Record, committed_offsets, read_all
from infra.messaging.topics import TopicSpec, ensure_topics
from schemas.envelope import RawMessage
from schemas.outcome import Answer, EmittedEvent
from schemas.topics import TopicRole, topic_name
from streams.app import StreamWorker, WorkerOptions
from streams.asking import Patience
from streams.partitions import Limits

HERE = Path(__file__).parent
NAMESPACE = uuid.UUID(int=7)


async def until(condition: Callable[[], Any], *, within_s: float = 30.0, every_s: float = 0.02) -> None:
    """Wait until `condition()`, a value or an awaitable, is true. TimeoutError if that takes longer than `within_s`."""
    async with asyncio.timeout(within_s):
        while True:
            held = condition()
            if await held if inspect.isawaitable(held) else held:
                return
            await asyncio.sleep(every_s)


def command_id(raw: RawMessage) -> str:
    return next((value or b"").decode() for name, value in raw.headers if name == "ce_id")


def answer_to(raw: RawMessage) -> Answer:
    """The same answer to the same message, always: one event, or a dead letter for poison and what is too long."""
    domain = raw.topic.removesuffix(".commands")
    id, key = command_id(raw), (raw.key or b"").decode("utf-8", "backslashreplace")
    if raw.oversize or (raw.value or b"").startswith(b"poison"):
        reason = "too_large" if raw.oversize else "not_json"
        return Answer(
            id=id, type="", key=key, status="dead-lettered", digest="", reason=reason,
            detail={"detail": "a test's poison"}, received_at_ms=raw.timestamp_ms, committed_at_ms=raw.timestamp_ms,
        )  # fmt: skip
    event = EmittedEvent(
        id=str(uuid.uuid5(NAMESPACE, id)),
        type="Tested",
        domain=domain,
        key=key,
        body=json.dumps({"command": id}),
        subject="test/1",
        record_version=1,
        data_schema=f"concord:/schemas/{domain}/Tested/1",
    )
    return Answer(
        id=id, type="Test", key=key, status="committed", digest="", events=(event,),
        received_at_ms=raw.timestamp_ms, committed_at_ms=raw.timestamp_ms,
    )  # fmt: skip


@dataclass
class RememberingRuntime:
    """Answers commands by itself. `journal` gets a line for the beginning and the end of each batch.

    While the file `hold` exists, commands whose value begins with `hold` wait; while `deaf` exists, nothing answers.
    """

    journal: Path | None = None
    hold: Path | None = None
    deaf: Path | None = None
    executed: list[str] = field(default_factory=list)
    open_batches: dict[tuple[str, int], int] = field(default_factory=dict)
    most_open: int = 0
    lose_next: int = 0

    async def ask(self, actor: str, method: str, items: Sequence[Any]) -> list[Any]:
        await until(lambda: self.deaf is None or not self.deaf.exists(), within_s=3600)
        match method:
            case "health":
                return [Health(actor, "1", os.getpid(), 0) for _ in items]
            case "due":
                return [[] for _ in items]
            case "execute":
                return await self._execute(items)
            case _:
                raise AssertionError(method)

    async def _execute(self, messages: Sequence[RawMessage]) -> list[Answer]:
        partition = (messages[0].topic, messages[0].partition)
        self._write("begin", messages)
        self.open_batches[partition] = self.open_batches.get(partition, 0) + 1
        self.most_open = max(self.most_open, self.open_batches[partition])
        try:
            await asyncio.sleep(0)
            if any((raw.value or b"").startswith(b"hold") for raw in messages):
                await until(lambda: self.hold is None or not self.hold.exists(), within_s=3600)
        finally:
            self.open_batches[partition] -= 1
        if self.lose_next:
            self.lose_next -= 1
            raise ActorLostError("a test's")
        self.executed += map(command_id, messages)
        self._write("end", messages)
        return [answer_to(raw) for raw in messages]

    def _write(self, what: str, messages: Sequence[RawMessage]) -> None:
        if self.journal is not None:
            line = {"what": what, "pid": os.getpid(), "ids": [command_id(raw) for raw in messages]}
            with self.journal.open("a") as file:
                file.write(json.dumps(line) + "\n")


class NullRuntime:
    """Answers at once and remembers nothing: what the worker itself costs."""

    async def ask(self, actor: str, method: str, items: Sequence[Any]) -> list[Any]:
        match method:
            case "execute":
                return [answer_to(raw) for raw in items]
            case "health":
                return [Health(actor, "1", os.getpid(), 0) for _ in items]
            case _:
                return [[] for _ in items]


PLACEMENT_BUCKETS = 16


def placement_of(domain: str) -> Placement:
    return Placement(PLACEMENT_BUCKETS, {domain: 2})


def raw_command(id: str, *, key: bytes = b"k", value: bytes = b"{}", offset: int = 0, partition: int = 0,
                topic: str = "test.commands") -> RawMessage:  # fmt: skip
    return RawMessage(topic, partition, offset, 1_600_000_000_000, key, (("ce_id", id.encode()),), value)


@dataclass
class FlowWorld:
    """One domain's topics on a Kafka, a consumer group and workers, all with names that no other test has."""

    bootstrap_servers: str
    directory: Path
    partitions: int = 2
    domain: str = field(default_factory=lambda: "d" + uuid.uuid4().hex[:10])
    workers: list[WorkerProcess] = field(default_factory=list)
    local: list[LocalWorker] = field(default_factory=list)

    @property
    def journal_path(self) -> Path:
        return self.directory / "journal"

    @property
    def hold_path(self) -> Path:
        return self.directory / "hold"

    @property
    def deaf_path(self) -> Path:
        return self.directory / "deaf"

    @property
    def group(self) -> str:
        return f"group-{self.domain}"

    def topic(self, role: TopicRole) -> str:
        return topic_name(self.domain, role)

    async def create_topics(self) -> None:
        specs = [
            TopicSpec(self.topic(role), self.partitions, configs={"max.message.bytes": str(5 << 20)})
            for role in TopicRole
        ]
        await ensure_topics(self.bootstrap_servers, specs)

    async def send(self, commands: Sequence[tuple[str, bytes, bytes]]) -> None:
        """Publish (id, key, value) in order."""
        producer = EventProducer(self.bootstrap_servers, linger_ms=1)
        await producer.start()
        try:
            topic = self.topic(TopicRole.COMMANDS)
            sent = [await producer.send(topic, key, value, [("ce_id", id.encode())]) for id, key, value in commands]
            await asyncio.gather(*sent)
        finally:
            await producer.stop()

    async def read(self, role: TopicRole) -> list[Record]:
        return [record async for record in read_all(self.bootstrap_servers, [self.topic(role)])]

    async def result_ids(self) -> list[str]:
        """Ids of the answered commands on the results topic, in order within each partition."""
        return [header(record, "ce_causationid") for record in await self.read(TopicRole.RESULTS)]

    async def wait_for_results(self, ids: set[str], *, within_s: float = 30.0) -> None:
        async def are_there() -> bool:
            return ids <= set(await self.result_ids())

        await until(are_there, within_s=within_s, every_s=0.1)

    async def acknowledged(self) -> dict[int, int]:
        """The group's offsets of the command topic, by partition."""
        offsets = await committed_offsets(self.bootstrap_servers, self.group)
        return {number: offset for (topic, number), offset in offsets.items() if topic.endswith(".commands")}

    async def wait_for_acknowledged(self, total: int, *, within_s: float = 60.0) -> None:
        async def are_there() -> bool:
            return sum((await self.acknowledged()).values()) >= total

        await until(are_there, within_s=within_s, every_s=0.1)

    def journal(self) -> list[dict[str, Any]]:
        if not self.journal_path.exists():
            return []
        return [json.loads(line) for line in self.journal_path.read_text().splitlines()]

    def spawn_worker(self, name: str = "worker-0", **settings: Any) -> WorkerProcess:
        worker = WorkerProcess(self, name, settings)
        self.workers.append(worker)
        return worker

    async def start_local(self, name: str = "worker-0", **settings: Any) -> LocalWorker:
        """A worker in this process, for tests that kill nothing."""
        worker = LocalWorker(self, name, settings)
        self.local.append(worker)
        await until(lambda: worker.stream_worker.ready or worker.run.done(), within_s=60)
        return worker

    async def start_worker(self, name: str = "worker-0", **settings: Any) -> WorkerProcess:
        """Start a worker process and wait until the group has given it partitions."""
        worker = self.spawn_worker(name, **settings)
        await worker.ready()
        return worker

    async def stop(self) -> None:
        self.hold_path.unlink(missing_ok=True)
        self.deaf_path.unlink(missing_ok=True)
        for worker in self.workers:
            worker.kill()
        for local in self.local:
            await local.stop()


class LocalWorker:
    """A StreamWorker in this process. `ends` gets the exit codes with which it would have ended its process."""

    def __init__(self, world: FlowWorld, name: str, settings: dict[str, Any]) -> None:
        self.ends: list[int] = []
        runtime = settings.pop("runtime", None) or RememberingRuntime(
            world.journal_path, world.hold_path, world.deaf_path
        )
        self.stream_worker = StreamWorker(
            worker_options(world.bootstrap_servers, world.domain, world.group, name, world.directory, settings),
            runtime,
            end=self.ends.append,
        )
        self.run = asyncio.ensure_future(self.stream_worker.run(handle_signals=False))

    async def stop(self) -> None:
        self.stream_worker.stop()
        await self.run


def worker_options(
    bootstrap_servers: str, domain: str, group: str, name: str, directory: Path, settings: dict[str, Any]
) -> WorkerOptions:
    """`settings` are fields of WorkerOptions; limits and patience are mappings."""
    made = {"projected_domain": "", "consumer_group": group, "acknowledge_every_s": 0.05, **settings}
    made["limits"] = Limits(**made.get("limits", {}))
    made["patience"] = Patience(**made.get("patience", {}))
    return WorkerOptions(
        kafka=bootstrap_servers,
        name=name,
        domains=(domain,),
        placement=placement_of(domain),
        work_dir=directory,
        **made,
    )


class WorkerProcess:
    """`worker_process.py` with this world's names. `settings` are fields of WorkerOptions, or `failpoints`."""

    def __init__(self, world: FlowWorld, name: str, settings: dict[str, Any]) -> None:
        environment = dict(os.environ)
        failpoints = settings.pop("failpoints", None)
        if failpoints is not None:
            environment["CONCORD_FAILPOINTS"] = str(failpoints)
        self.log_path = world.directory / f"{name}-{uuid.uuid4().hex[:6]}.log"
        self._port_path = self.log_path.with_suffix(".port")
        arguments = {
            "bootstrap_servers": world.bootstrap_servers,
            "domain": world.domain,
            "group": world.group,
            "name": name,
            "directory": str(world.directory),
            "port_path": str(self._port_path),
            "settings": settings,
        }
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "worker_process.py"), json.dumps(arguments)],
            env=environment,
            stdout=self.log_path.open("wb"),
            stderr=subprocess.STDOUT,
        )

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    async def ready(self, *, within_s: float = 40.0) -> None:
        async def is_ready() -> bool:
            assert self.process.poll() is None, self.log
            return (await self.get("/readyz"))[0] == 200

        await until(is_ready, within_s=within_s, every_s=0.05)

    async def get(self, path: str) -> tuple[int, dict[str, Any]]:
        """Status and JSON of one of the worker's pages; status 0 while it does not listen."""
        if not self._port_path.exists():
            return 0, {}
        try:
            async with (
                aiohttp.ClientSession() as session,
                session.get(f"http://127.0.0.1:{self._port_path.read_text()}{path}") as response,
            ):
                return response.status, await response.json()
        except aiohttp.ClientError:
            return 0, {}

    async def has_heard(self, number: signal.Signals) -> None:
        """Send a signal to stop, and wait until the stop has begun."""
        self.signal(number)

        async def is_ready_no_more() -> bool:
            return (await self.get("/readyz"))[0] != 200

        await until(is_ready_no_more)

    async def waiting(self) -> int:
        """Messages that it has read and not yet begun."""
        _, health = await self.get("/healthz")
        return sum(partition["waiting"] for partition in health["partitions"])

    async def exit_code(self, *, within_s: float = 60.0) -> int:
        await until(lambda: self.process.poll() is not None, within_s=within_s)
        return self.process.returncode

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


def header(record: Record, name: str) -> str:
    return next(value.decode() for found, value in record.headers if found == name)


@asynccontextmanager
async def flow_world(bootstrap_servers: str, directory: Path, *, partitions: int = 2) -> AsyncIterator[FlowWorld]:
    world = FlowWorld(bootstrap_servers, directory, partitions)
    await world.create_topics()
    try:
        yield world
    finally:
        await world.stop()
