"""What time itself asks for: commands that an actor finds due go through Kafka like everybody else's.

Each domain's actors are asked by the worker that has the first partition of the domain's command topic. During a
rebalance two workers may ask; the commands then carry the same ids, so the second of each is answered with the first's
answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import structlog

from actors.runtime import Placement, Runtime, actor_name
from infra.messaging.errors import MessagingError
from infra.tracing import OFF, SEND, Tracer
from schemas.envelope import build_command_message
from schemas.registry import Registry, default_registry
from schemas.topics import commands_topic
from streams.asking import PASSING
from streams.command_processor import Producer
from streams.partitions import Partition
from streams.traced_batch import send_attributes

log = structlog.get_logger()


REPEATED_AFTER_MS = 60_000
"""What is still due so long after it was published is published again: Kafka has it, but it may have been given up on.

Not at every interval: while storage is away nothing that is due gets done, and the log would fill with repetitions.
"""


class Timers:
    """Publishes due commands at every interval. `assigned` says which partitions this worker has now."""

    def __init__(
        self,
        *,
        domains: Sequence[str],
        runtime: Runtime,
        placement: Placement,
        producer: Producer,
        assigned: Callable[[], set[Partition]],
        now_ms: Callable[[], int],
        interval_s: float,
        registry: Registry | None = None,
        tracer: Tracer = OFF,
    ) -> None:
        self._tracer = tracer
        self._domains = domains
        self._runtime = runtime
        self._placement = placement
        self._producer = producer
        self._assigned = assigned
        self._now_ms = now_ms
        self._interval_s = interval_s
        self._registry = registry or default_registry()
        self._published_at_ms: dict[str, dict[tuple[str, str], int]] = {}
        """Of each domain, what was due at the last look, by key and id, and when it was published."""

    async def run(self) -> None:
        """Until cancelled. What cannot be asked or published now is due again at the next interval."""
        while True:
            await asyncio.sleep(self._interval_s)
            for domain in self._domains:
                if (commands_topic(domain), 0) not in self._assigned():
                    continue
                try:
                    await self.publish_due(domain)
                except (*PASSING, MessagingError) as error:
                    log.warning("timer_waits", domain=domain, error=repr(error))

    async def publish_due(self, domain: str) -> int:
        """Publish what is due in `domain` now; how many commands that were."""
        now_ms = self._now_ms()
        deliveries = []
        spans = []
        before, still_due = self._published_at_ms.get(domain, {}), {}
        for shard in range(self._placement.shards[domain]):
            (due,) = await self._runtime.ask(actor_name(domain, shard), "due", [now_ms])
            for command_id, type_name, body, routing_key in due:
                published_at_ms = before.get((routing_key, command_id))
                if published_at_ms is not None and abs(now_ms - published_at_ms) < REPEATED_AFTER_MS:
                    still_due[(routing_key, command_id)] = published_at_ms
                    continue
                still_due[(routing_key, command_id)] = now_ms
                command = self._registry.command(type_name).model_validate_json(body)
                topic = commands_topic(command.domain)
                told = {"messaging.message.id": command_id, "concord.message.type": type_name}
                span = self._tracer.start(SEND, topic, attributes={**send_attributes(topic), **told})
                spans.append(span)
                message = build_command_message(
                    command,
                    command_id=command_id,
                    time_ms=now_ms,
                    source=f"concord:/timers/{domain}",
                    trace=span.context,
                )
                deliveries.append(await self._producer.send(message.topic, message.key, message.value, message.headers))
        await asyncio.gather(*deliveries)
        self._published_at_ms[domain] = still_due
        for span in spans:
            span.end()
        return len(deliveries)
