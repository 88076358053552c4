"""One stream worker: a Faust application, its agents, and everything that watches over them.

    Faust: reads, heartbeats, rebalances          here: everything that a message's fate depends on
    ────────────────────────────────────          ─────────────────────────────────────────────────
    agent for each topic ── raw bytes ──────────► Pipelines ──► CommandProcessor, Projection
    consumer (kafka_transport.py) ◄─ offsets ──── Acknowledger ◄─┘ finished
    revoked, assigned ──────────────────────────► drop what waits, finish what is at work

Agents only hand on: they do not decode, do not fail and do not wait. `acks=False` keeps Faust from acknowledging
anything by itself (see `kafka_transport.py`). Any error that nothing was prepared for ends the process at once, with
nothing acknowledged that is not finished; whoever started it starts it again.

On SIGTERM: fetching ends, batches at work get `stop_patience_s` to be finished and acknowledged, the process ends
with 0. What was waiting is read again by whoever comes next. SIGUSR1 does the same for good (`keeps_place`).
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faust
import structlog
from faust.exceptions import ConsumerNotStarted
from faust.types import TP

from actors.runtime import Placement, Runtime
from infra.clock import Clock, SystemClock
from infra.messaging.connection import Kafka, KafkaConnection
from infra.messaging.producer import EventProducer
from infra.messaging.reader import cluster_id, end_offsets
from infra.tracing import OFF, Tracer
from schemas.envelope import RawMessage
from schemas.outcome import Answer
from schemas.topics import commands_topic, events_topic
from streams.acknowledger import Acknowledger
from streams.asking import Patience
from streams.command_processor import CommandProcessor
from streams.health import HealthServer
from streams.kafka_transport import App, Consumer, Transport, credentials, first_offset
from streams.lag import LagMonitor
from streams.partitions import Limits, Partition, Pipelines, Progress, Received
from streams.projections import VIEW_ACTOR, Projection
from streams.timers import Timers
from streams.watchdog import EXIT_FAILED, Watchdog, end_process

log = structlog.get_logger()

END_OFFSETS_WITHIN_S = 3.0


@dataclass(frozen=True)
class WorkerOptions:
    """What a stream worker needs to know. `name` is unique among the workers of a group, and the same after a restart:
    Kafka then gives the restarted worker its partitions back without asking the others (static membership)."""

    kafka: Kafka
    name: str
    domains: tuple[str, ...]
    placement: Placement
    work_dir: Path
    consumer_group: str = "concord"
    health_host: str = "127.0.0.1"
    health_port: int = 0
    keeps_place: bool = True
    """Whether a worker of this name comes back after SIGTERM, so that its partitions are kept for it until its session
    ends. Otherwise, and after SIGUSR1, it leaves the group and others get them at once."""
    max_command_bytes: int = 1 << 20
    limits: Limits = field(default_factory=Limits)
    patience: Patience = field(default_factory=Patience)
    delivery_timeout_ms: int = 30_000
    acknowledge_every_s: float = 0.5
    session_timeout_s: float = 10.0
    heartbeat_s: float = 3.0
    revoke_patience_s: float = 5.0
    stop_patience_s: float = 10.0
    stalled_after_s: float = 60.0
    timers_every_s: float = 2.0
    projected_domain: str = "orders"
    """Whose events the order history is made of; "" for a worker that projects nothing."""


@dataclass(frozen=True)
class WorkerObserver:
    """What a worker tells telemetry; does nothing by default."""

    answered: Callable[[str, Answer, int], None] = lambda domain, answer, sent_at_ms: None
    batch: Callable[[str, int], None] = lambda domain, commands: None
    lag: Callable[[Partition, int], None] = lambda partition, lag: None
    oldest: Callable[[Partition, int | None], None] = lambda partition, oldest_ms: None
    """The timestamp of the oldest message that this worker has taken and not finished."""
    in_flight: Callable[[int, int], None] = lambda messages, waiting_bytes: None
    last_progress: Callable[[Partition, float], None] = lambda partition, seconds_ago: None
    page: Callable[[], bytes] = lambda: b""
    tracer: Tracer = OFF


def build_faust_app(options: WorkerOptions) -> faust.App:
    """The Faust application of one worker, without agents. Faust declares no topics and serves no pages."""
    kafka = KafkaConnection.of(options.kafka)
    app = App(
        options.consumer_group,
        broker=[f"aiokafka://{server.strip()}" for server in kafka.bootstrap_servers.split(",")],
        broker_credentials=credentials(kafka),
        broker_client_id=options.name,
        consumer_group_instance_id=options.name,
        consumer_auto_offset_reset="earliest",
        # Kafka sends at least one message, however large (KIP-74): this bounds memory, not messages.
        consumer_max_fetch_size=1024 * 1024,
        broker_session_timeout=options.session_timeout_s,
        broker_heartbeat_interval=options.heartbeat_s,
        broker_request_timeout=max(options.session_timeout_s, 30.0),
        broker_rebalance_timeout=options.session_timeout_s + 2 * options.revoke_patience_s,
        # A partition that waits for storage is not polled. Whether this process lives is the watchdog's question.
        broker_max_poll_interval=24 * 3600.0,
        broker_max_poll_records=500,
        broker_commit_interval=60.0,  # Faust has nothing to commit
        stream_buffer_maxsize=1024,
        stream_wait_empty=False,
        processing_guarantee="at_least_once",
        key_serializer="raw",
        value_serializer="raw",
        topic_allow_declare=False,
        topic_disable_leader=True,
        web_enabled=False,
        worker_redirect_stdouts=False,
        datadir=str(options.work_dir / options.name),
        store="memory://",
    )
    app.transport = Transport(app.conf.broker_consumer, app)
    return app


class StreamWorker:
    """Build it and `run` it, once, inside a running event loop."""

    def __init__(
        self,
        options: WorkerOptions,
        runtime: Runtime,
        *,
        clock: Clock | None = None,
        observer: WorkerObserver | None = None,
        end: Callable[[int], None] = end_process,
    ) -> None:
        self._options = options
        self._runtime = runtime
        self._clock = clock or SystemClock()
        self._observer = observer or WorkerObserver()
        self._end = end
        self._assigned: set[Partition] | None = None
        self._faust_worker: _Worker | None = None
        self._keeps_place = options.keeps_place
        self._kinds: list[Pipelines] = []
        self._app = build_faust_app(options)
        self._acknowledger = Acknowledger(self._acknowledge, interval_s=options.acknowledge_every_s)
        self._producer = EventProducer(
            options.kafka, client_id=options.name, delivery_timeout_ms=options.delivery_timeout_ms
        )
        self.lag = LagMonitor(
            assigned=lambda: self.assigned,
            finished=self._finished_until,
            progress=self.progress,
            end_offsets=self._end_offsets,
            first_offset=self.first_offset,
        )
        self._watchdog = Watchdog(
            look=self.lag.look,
            membership_error=self._membership_error,
            stalled_after_s=options.stalled_after_s,
            end=end,
        )
        self.health = HealthServer(
            name=options.name,
            runtime=runtime,
            actors=[*options.placement.actors(), *([VIEW_ACTOR] if options.projected_domain else [])],
            assignment_known=lambda: self.ready,
            states=self.lag.states,
            metrics_page=self._observer.page,
        )

    async def run(self, *, handle_signals: bool = True) -> None:
        """Until SIGTERM or SIGINT, or `stop`. Raises what keeps the worker from starting, or what crashed Faust."""
        options = self._options
        options.work_dir.mkdir(parents=True, exist_ok=True)  # Faust makes its own folder, but not those above
        async with AsyncExitStack() as stack:
            await self.health.start(options.health_port, host=options.health_host)
            stack.push_async_callback(self.health.stop)
            log_identity = await cluster_id(options.kafka)
            await self._producer.start()
            stack.push_async_callback(self._producer.stop)
            self._declare_agents(log_identity)
            self._watchdog.start()
            stack.callback(self._watchdog.stop)
            timers = Timers(
                domains=options.domains,
                runtime=self._runtime,
                placement=options.placement,
                producer=self._producer,
                assigned=lambda: self.assigned,
                now_ms=self._clock.now_ms,
                interval_s=options.timers_every_s,
                tracer=self._observer.tracer,
            )
            jobs = (self._acknowledger.run(), timers.run(), self.lag.run(), self._beat())
            await stack.enter_async_context(_background(*map(self._guarded, jobs)))
            await self._run_faust(handle_signals=handle_signals)

    def leave(self) -> None:
        """Begin to stop for good, as SIGUSR1 does: others get the partitions as soon as this worker has ended."""
        self._keeps_place = False
        self.stop()

    def stop(self) -> None:
        """Begin to stop, as SIGTERM does; `run` returns when that is done."""
        if self._faust_worker is not None:
            self._faust_worker.begin_stop()

    @property
    def assigned(self) -> set[Partition]:
        """The partitions that this worker has now."""
        return self._assigned or set()

    @property
    def generation(self) -> int:
        """Counts the rebalances of the group, as Kafka does."""
        return int(self._app.consumer_generation_id)

    @property
    def ready(self) -> bool:
        """Whether the group has assigned partitions (or none, where others have them all)."""
        return self._assigned is not None

    # --- what Pipelines ask of Kafka's client (partitions.Source) -------------------------------------------------

    def pause(self, partition: Partition) -> None:
        self._consumer.pause(partition)

    def resume(self, partition: Partition) -> None:
        self._consumer.resume(partition)

    def start_of(self, partition: Partition) -> int | None:
        return self._consumer.start_of(partition)

    async def first_offset(self, partition: Partition, offset: int) -> int | None:
        return await first_offset(self._options.kafka, partition, offset)

    # --- Faust ------------------------------------------------------------------------------------------------------

    async def _run_faust(self, *, handle_signals: bool) -> None:
        worker = _Worker(self._app, loop=asyncio.get_running_loop(), handle_signals=handle_signals)
        self._faust_worker = worker
        if handle_signals:
            asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, self.leave)
        try:
            await worker.start()  # returns as soon as a stop has begun
        finally:
            await worker.stopped()
        if worker.crash_reason is not None:
            raise worker.crash_reason

    def _declare_agents(self, log_identity: str) -> None:
        options = self._options
        commands = CommandProcessor(
            domains=options.domains,
            runtime=self._runtime,
            placement=options.placement,
            producer=self._producer,
            consumer_group=options.consumer_group,
            patience=options.patience,
            answered=self._observer.answered,
            tracer=self._observer.tracer,
            client_id=options.name,
        )
        domain_of = {commands_topic(domain): domain for domain in options.domains}

        async def work_on_commands(partition: Partition, batch: list[Received], tried: Callable[[], None]) -> None:
            self._observer.batch(domain_of[partition[0]], len(batch))
            await commands.work(partition, batch, tried)

        pipelines = self._pipelines(work_on_commands)
        for topic in domain_of:
            self._declare_agent(topic, pipelines, max_value_bytes=options.max_command_bytes)
        if options.projected_domain:
            projection = Projection(
                runtime=self._runtime,
                log_identity=log_identity,
                patience=options.patience,
                tracer=self._observer.tracer,
                consumer_group=options.consumer_group,
                client_id=options.name,
            )
            topic = events_topic(options.projected_domain)
            self._declare_agent(topic, self._pipelines(projection.work), max_value_bytes=None)
        self._app.on_partitions_revoked.connect(self._on_revoked, weak=False)
        self._app.on_partitions_assigned.connect(self._on_assigned, weak=False)
        self._app.on_before_shutdown.connect(self._on_shutdown, weak=False)

    def _pipelines(self, work: Any) -> Pipelines:
        made = Pipelines(
            work=work,
            source=self,
            finished=self._acknowledger.finished,
            failed=self._failed,
            limits=self._options.limits,
        )
        self._kinds.append(made)
        return made

    def _declare_agent(self, topic: str, pipelines: Pipelines, *, max_value_bytes: int | None) -> None:
        app = self._app

        async def hand_on(stream: Any) -> None:
            try:
                async for event in stream.noack().events():
                    message = event.message
                    if message.generation_id == app.consumer_generation_id:
                        received = received_of(message, max_value_bytes=max_value_bytes)
                        pipelines.offer((message.topic, message.partition), message.generation_id, received)
            except asyncio.CancelledError:
                if not app.should_stop:
                    raise
            except Exception as error:
                self._failed(error)
                raise

        app.agent(app.topic(topic, acks=False), name=topic, concurrency=1)(hand_on)

    async def _on_revoked(self, _app: Any, revoked: set[TP], **_: Any) -> None:
        self._assigned = None
        await self._end_assignment(self._options.revoke_patience_s)

    async def _on_assigned(self, _app: Any, assigned: set[TP], **_: Any) -> None:
        self._assigned = {(partition.topic, partition.partition) for partition in assigned}
        log.info("assigned", partitions=len(self._assigned))

    async def _on_shutdown(self, _app: Any, **_: Any) -> None:
        self._assigned = None
        patience_s = self._options.stop_patience_s
        await asyncio.gather(*(pipelines.close(patience_s=patience_s) for pipelines in self._kinds))
        await self._acknowledger.end_assignment(patience_s=patience_s)
        if not self._keeps_place:
            with suppress(ConsumerNotStarted):
                self._consumer.give_up_place()

    async def _end_assignment(self, patience_s: float) -> None:
        await asyncio.gather(*(pipelines.revoke(patience_s=patience_s) for pipelines in self._kinds))
        await self._acknowledger.end_assignment(patience_s=patience_s)

    # --- watching -----------------------------------------------------------------------------------------------------

    def progress(self) -> Mapping[Partition, Progress]:
        """Every partition that has had a message in this assignment."""
        return {partition: one for pipelines in self._kinds for partition, one in pipelines.progress().items()}

    def _finished_until(self, partition: Partition) -> int | None:
        progress = self.progress().get(partition)
        return self.start_of(partition) if progress is None else progress.next_finished

    async def _end_offsets(self, partitions: Iterable[Partition]) -> Mapping[Partition, int]:
        wanted = set(partitions)
        try:
            async with asyncio.timeout(END_OFFSETS_WITHIN_S):
                return await self._consumer.end_offsets(wanted)
        except Exception as error:
            # The broker or the consumer's thread? A thread that hangs must not look like a broker that is away.
            log.warning("consumer_silent", error=repr(error))
            ends = await end_offsets(self._options.kafka, sorted({topic for topic, _ in wanted}))
            return {partition: ends[partition] for partition in wanted}

    def _membership_error(self) -> BaseException | None:
        return None if self._assigned is None else self._consumer.membership_error()

    async def _beat(self) -> None:
        told: set[Partition] = set()
        while True:
            self._watchdog.beat()
            told = self._tell(told)
            await asyncio.sleep(1.0)

    def _tell(self, before: set[Partition]) -> set[Partition]:
        """Tell telemetry how things stand; the partitions that were told of. Those `before` that are gone lag no more
        here: whoever has them now says how they do."""
        now_s = asyncio.get_running_loop().time()
        states = self.lag.states()
        for partition in before - states.keys():
            self._observer.lag(partition, 0)
            self._observer.oldest(partition, None)
        in_flight = 0
        for partition, state in states.items():
            if state.lag is not None:
                self._observer.lag(partition, state.lag)
            progress = state.progress
            if progress is not None:
                in_flight += progress.waiting + progress.at_work
                self._observer.last_progress(partition, now_s - progress.last_attempt_s)
            self._observer.oldest(partition, None if progress is None else progress.oldest_ms)
        self._observer.in_flight(in_flight, sum(pipelines.waiting_bytes for pipelines in self._kinds))
        return set(states)

    async def _acknowledge(self, offsets: Mapping[Partition, int]) -> None:
        await self._consumer.acknowledge(offsets)

    @property
    def _consumer(self) -> Consumer:
        consumer = self._app.consumer
        assert isinstance(consumer, Consumer)
        return consumer

    async def _guarded(self, job: Any) -> None:
        try:
            await job
        except Exception as error:
            self._failed(error)
            raise

    def _failed(self, error: BaseException) -> None:
        """Nothing was prepared for this: going on might mean going past a message."""
        log.critical("ending_the_process", error=repr(error), exc_info=error)
        self._end(EXIT_FAILED)


def received_of(message: Any, *, max_value_bytes: int | None) -> Received:
    """Faust's message as the pipelines take it. A value longer than `max_value_bytes` is set aside."""
    value: bytes | None = message.value
    oversize = len(value) if value is not None and max_value_bytes is not None and len(value) > max_value_bytes else 0
    raw = RawMessage(
        topic=message.topic,
        partition=message.partition,
        offset=message.offset,
        timestamp_ms=round((message.timestamp or 0) * 1000),
        key=message.key,
        headers=tuple(message.headers or ()),
        value=b"" if oversize else value,
        oversize=oversize,
    )
    return Received(raw, original=value if oversize else None)


class _Worker(faust.Worker):
    """Faust's worker without its logging, its spinner and its process title.

    The title matters: it is written over the process's environment, by which a system finds its processes.
    """

    def __init__(self, app: faust.App, *, loop: asyncio.AbstractEventLoop, handle_signals: bool) -> None:
        super().__init__(app, loop=loop, redirect_stdouts=False, override_logging=False, quiet=True)
        self.spinner = None
        self._handle_signals = handle_signals

    def _setproctitle(self, info: str, *, ident: str = "") -> None:
        pass

    async def stopped(self) -> None:
        """Until the stop that a signal began has ended; begins one if there was none."""
        await (self._signal_stop_future or self.stop())

    def _install_signal_handlers_unix(self) -> None:
        if self._handle_signals:
            for number in (signal.SIGINT, signal.SIGTERM):
                self.loop.add_signal_handler(number, self._schedule_shutdown, number)

    def begin_stop(self) -> None:
        self._schedule_shutdown(signal.SIGTERM)


@asynccontextmanager
async def _background(*jobs: Any):  # type: ignore[no-untyped-def]
    """Run `jobs` beside the block and cancel them after it."""
    tasks = [asyncio.create_task(job) for job in jobs]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError, Exception):
                await task
