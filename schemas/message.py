"""What every command and event is: a frozen pydantic model that names its domain, version and routing key.

Strict when produced, ignoring unknown fields when consumed: `produce` refuses what the model does not know, so that
a typing error in a field's name is found by its author; `consume` lets fields of a newer version pass.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict


class Message(BaseModel):
    """Base of commands and events. Subclasses set `domain`, and `version` when it is no longer 1."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)

    domain: ClassVar[str]
    version: ClassVar[int] = 1

    @classmethod
    def type_name(cls) -> str:
        """The name on the wire (`ce_type`): the class's own."""
        return cls.__name__

    @property
    def routing_key(self) -> str:
        """The key that names the owner; also the Kafka key. Every subclass says which field it is."""
        raise NotImplementedError(type(self).__name__)

    @classmethod
    def produce(cls, body: bytes | str) -> Self:
        """The model in JSON `body`, refusing unknown fields. Raises pydantic.ValidationError."""
        return cls.model_validate_json(body, extra="forbid")

    @classmethod
    def consume(cls, body: dict[str, Any]) -> Self:
        """The model in the decoded JSON object `body`, ignoring unknown fields. Raises pydantic.ValidationError."""
        return cls.model_validate_json(json.dumps(body, ensure_ascii=False, allow_nan=False))


class Command(Message):
    """An order to one domain: imperative (`PlaceOrder`). Ends in exactly one outcome."""


class Event(Message):
    """What happened in one domain: past participle (`OrderPlaced`)."""
