"""A command's durable answer, with the events it emitted: the value of a result message and the body of an outcome row.

Written in the transaction that has the command's effects, so a redelivered command meets it and is answered with the
same words and the same event ids.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict

from schemas.topics import ROLES, TopicRole

AnswerStatus = Literal["committed", "refused", "dead-lettered"]

COMMITTED: AnswerStatus = "committed"
REFUSED: AnswerStatus = "refused"
DEAD_LETTERED: AnswerStatus = "dead-lettered"

ID_CONFLICT = "id_conflict"
"""Reason of the refusal that answers a known id with another payload. It is published, never stored."""

ANSWER_TOO_LARGE = "answer_too_large"
"""Reason of the refusal in place of an answer that Kafka would not take, result and events together."""

MAX_ANSWER_BYTES = ROLES[TopicRole.RESULTS].max_message_bytes - 128 * 1024
"""The largest answer as JSON. A result message holds it whole, beside key and headers, and each event is part of it."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class EmittedEvent(BaseModel):
    """An event as the transaction wrote it: complete, so that publishing it again gives the same bytes.

    `body` is the event's JSON; `subject` names the record it speaks of (`inventory.products/851/85123A`) and
    `record_version` that record's version, by which projections apply it (rule 10).
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    id: str
    type: str
    domain: str
    key: str
    body: str
    subject: str
    record_version: int
    data_schema: str


class Answer(BaseModel):
    """How a command ended. Times are ms since the epoch.

    `reason` is a snake_case word for refusals and dead letters and empty for committed commands, `detail` what a
    person wants to know besides. `digest` is of the payload that was answered. `committed_at_ms` is when the answer
    itself was committed, whatever its status; None in an answer that is only published (`id_conflict`).
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)

    id: str
    type: str
    key: str
    status: AnswerStatus
    digest: str
    tx_id: str | None = None
    reason: str = ""
    detail: dict[str, Any] = {}
    result: dict[str, Any] | None = None
    events: tuple[EmittedEvent, ...] = ()
    correlation_id: str = ""
    received_at_ms: int
    committed_at_ms: int | None = None

    def to_json(self) -> bytes:
        """Compact UTF-8 JSON of every field."""
        return self.__pydantic_serializer__.to_json(self)

    @classmethod
    def from_json(cls, data: bytes | str) -> Self:
        """The answer in `data`, which this system wrote. Raises pydantic.ValidationError."""
        return cls.model_validate_json(data)

    def to_status(self) -> dict[str, Any]:
        """What `concord status` prints; events by their ids, times as ISO 8601 in UTC."""
        return {
            "id": self.id,
            "type": self.type,
            "key": self.key,
            "status": self.status,
            "reason": self.reason or None,
            "result": self.result,
            "tx_id": self.tx_id,
            "committed_at": None if self.committed_at_ms is None else iso_time(self.committed_at_ms),
            "events": [event.id for event in self.events],
            "detail": self.detail,
            "correlation_id": self.correlation_id or self.id,
            "received_at": iso_time(self.received_at_ms),
        }


def unknown_status(command_id: str, key: str | None = None) -> dict[str, Any]:
    """What `concord status` prints for a command that no outcome row knows."""
    return {
        "id": command_id,
        "type": None,
        "key": key,
        "status": "unknown",
        "reason": None,
        "result": None,
        "tx_id": None,
        "committed_at": None,
        "events": [],
    }


def iso_time(time_ms: int) -> str:
    """RFC 3339 in UTC with milliseconds (`2010-12-01T08:26:00.000Z`). Raises OverflowError outside years 1 to 9999."""
    moment = _EPOCH + timedelta(milliseconds=time_ms)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03d}Z".rjust(24, "0")
