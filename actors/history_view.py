"""Order history by customer: which row an order event makes, and which of two rows counts. Pure.

A row is the order as its newest event tells it, with the version of the order's record. Events may be repeated, and
may come out of order after a fault; so a row is replaced by version and never by arrival (rule 10). Beside the rows
lie positions: how far each partition of the event topic has been read, of which log. Another log (a new Kafka over
old tables) begins anew at its own offsets, and versions drop what is known already.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from actors.domain import Record, Table
from schemas.envelope import ParsedEvent, RawMessage
from schemas.orders import OrderEvent, OrderSummary
from schemas.trace_context import TraceContext

PROJECTION = "order_history"

VIEW_BUCKETS = 16
"""Buckets of the view's tables. Its own: the view lives in one actor and may be rebuilt at will."""


class OrderHistoryRow(Record):
    """One order as its customer's history shows it. Money in minor units, times in ms since the epoch."""

    customer_id: str
    order_id: str
    status: str
    total: int
    currency: str
    payment_method: str
    region: str
    line_count: int
    item_count: int
    returned_count: int
    returned_total: int
    tracking_number: str
    carrier: str
    estimated_delivery_at_ms: int
    created_at_ms: int
    updated_at_ms: int
    record_version: int


class PositionRow(Record):
    """How far a projection has read one partition of the log called `log_identity`."""

    projection: str
    topic: str
    partition: int
    log_identity: str
    next_offset: int


ORDER_HISTORY = Table(
    "views",
    "order_history",
    OrderHistoryRow,
    key=("customer_id", "order_id"),
    routing="customer_id",
    sliced_by="order_id",
    slices=4,
)

POSITIONS = Table(
    "views",
    "positions",
    PositionRow,
    key=("projection", "topic", "partition"),
    routing="projection",
)


@dataclass(frozen=True, slots=True)
class EventBatch:
    """Messages of one partition in the order of the log. `log_identity` is the id of the Kafka cluster."""

    topic: str
    partition: int
    log_identity: str
    messages: tuple[RawMessage, ...]
    trace: TraceContext | None = None


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of a batch: rows written, events that were known or told nothing new, messages nobody could read."""

    written: int
    skipped: int
    unreadable: int
    next_offset: int


def row_of(order: OrderSummary, record_version: int) -> OrderHistoryRow:
    """The row of `order` as it was at that version of its record."""
    return OrderHistoryRow(**order.model_dump(mode="json"), record_version=record_version)


def row_of_event(parsed: ParsedEvent) -> OrderHistoryRow | None:
    """The row that an event makes; None for events that speak of no order."""
    return row_of(parsed.event.order, parsed.record_version) if isinstance(parsed.event, OrderEvent) else None


def newest_rows(rows: Iterable[OrderHistoryRow]) -> dict[tuple[str, str], OrderHistoryRow]:
    """The newest row of each order, by (customer, order)."""
    newest: dict[tuple[str, str], OrderHistoryRow] = {}
    for row in rows:
        key = (row.customer_id, row.order_id)
        if supersedes(row, newest.get(key)):
            newest[key] = row
    return newest


def supersedes(row: OrderHistoryRow, known: OrderHistoryRow | None) -> bool:
    """Whether `row` tells something newer than `known`."""
    return known is None or row.record_version > known.record_version


def starts_at(batch: EventBatch, position: PositionRow | None) -> int:
    """The first offset of the batch's partition that is not applied yet; 0 where the position is of another log."""
    return 0 if position is None or position.log_identity != batch.log_identity else position.next_offset


def not_yet_applied(batch: EventBatch, position: PositionRow | None) -> Sequence[RawMessage]:
    """The messages after the stored position; all of them where the position is of another log."""
    start = starts_at(batch, position)
    return [raw for raw in batch.messages if raw.offset >= start]


def position_after(batch: EventBatch, position: PositionRow | None) -> PositionRow:
    """Where the projection stands once `batch` is applied: never further back than it stood in the same log."""
    next_offset = max(batch.messages[-1].offset + 1, starts_at(batch, position))
    return PositionRow(
        projection=PROJECTION,
        topic=batch.topic,
        partition=batch.partition,
        log_identity=batch.log_identity,
        next_offset=next_offset,
    )
