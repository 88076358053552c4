"""Events from Kafka to the actor that holds the views.

One batch of one partition at a time, as for commands (`partitions.py`). A batch that is sent again changes nothing, so
the group's acknowledged offsets only save work: what has been applied is decided by the positions beside the rows.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog

from actors.history_view import Applied, EventBatch
from actors.runtime import Runtime
from infra.failpoints import reach
from infra.tracing import OFF, Tracer
from streams.asking import Patience, ask_until_answered
from streams.partitions import Partition, Received
from streams.traced_batch import trace_batch

log = structlog.get_logger()

VIEW_ACTOR = "views-0"


class Projection:
    """The work of the event topics. `log_identity` is the id of the Kafka cluster that the events come from."""

    def __init__(
        self,
        *,
        runtime: Runtime,
        log_identity: str,
        actor: str = VIEW_ACTOR,
        patience: Patience | None = None,
        tracer: Tracer = OFF,
        consumer_group: str = "",
        client_id: str = "",
    ) -> None:
        self._runtime = runtime
        self._log_identity = log_identity
        self._actor = actor
        self._patience = patience or Patience()
        self._tracer = tracer
        self._consumer_group = consumer_group
        self._client_id = client_id

    async def work(self, partition: Partition, batch: list[Received], tried: Callable[[], None]) -> None:
        """Have a batch of events applied, whatever it takes."""
        with trace_batch(
            self._tracer, partition, batch, consumer_group=self._consumer_group, client_id=self._client_id
        ) as traced:
            await reach("projection.before_apply")
            raws = tuple(received.raw for received in batch)
            events = EventBatch(*partition, self._log_identity, raws, traced.context)
            replies = await ask_until_answered(self._runtime, self._actor, "apply", [events], self._patience, tried)
        applied: Applied = replies[0]
        if applied.unreadable:
            log.error("events_unreadable", topic=partition[0], partition=partition[1], events=applied.unreadable)
        await reach("projection.after_apply")
