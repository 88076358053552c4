"""`concord tail`: messages of topics, as they come or as they are."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scripts.cli.options import DEFAULT_DIRECTORY, Data, Shape, command
from scripts.cli.output import Output, to_json
from scripts.cli.system import System

if TYPE_CHECKING:
    from infra.messaging.reader import Record


@dataclass(frozen=True)
class Wanted:
    """Which messages are shown; None lets all through."""

    key: str | None = None
    type: str | None = None
    id: str | None = None

    def admits(self, message: Mapping[str, Any]) -> bool:
        """`id` admits the message itself and what names it as its cause: its events, its answer, its dead letter."""
        headers = message["headers"]
        ids = (headers.get("ce_id"), headers.get("ce_causationid"), headers.get("dlq-command-id"))
        return (
            (self.key is None or message["key"] == self.key)
            and (self.type is None or headers.get("ce_type") == self.type)
            and (self.id is None or self.id in ids)
        )


def as_json(record: Record, *, with_value: bool) -> dict[str, Any]:
    """A message as JSON: the value as what it holds, as text, or as base64 where it is neither."""
    message: dict[str, Any] = {
        "topic": record.topic,
        "partition": record.partition,
        "offset": record.offset,
        "timestamp_ms": record.timestamp_ms,
        "key": _text(record.key),
        "headers": _headers(record.headers),
    }
    if with_value:
        message |= _value(record.value)
    return message


def _headers(headers: tuple[tuple[str, bytes | None], ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in headers:
        found[name] = [*_listed(found[name]), _text(value)] if name in found else _text(value)
    return found


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("utf-8", "backslashreplace")


def _value(value: bytes | None) -> dict[str, Any]:
    if value is None:
        return {"value": None}
    try:
        return {"value": json.loads(value)}
    except (ValueError, RecursionError):  # whatever it is, somebody wants to see it
        pass
    try:
        return {"value_text": value.decode()}
    except UnicodeDecodeError:
        return {"value_base64": base64.b64encode(value).decode()}


def for_people(message: Mapping[str, Any]) -> str:
    headers = message["headers"]
    place = f"{message['topic']}[{message['partition']}]@{message['offset']}"
    first = f"{place}  {headers.get('ce_type', '?')}  key {message['key']}  id {headers.get('ce_id', '?')}"
    rest = {name: value for name, value in headers.items() if name not in ("ce_type", "ce_id")}
    lines = [first, f"  headers {to_json(rest)}"]
    lines += [f"  {name:<7} {to_json(message[name])}" for name in message if name.startswith("value")]
    return "\n".join(lines)


def register(app: typer.Typer) -> None:
    @command(app, "tail")
    def tail(
        topics: Annotated[list[str], typer.Argument(metavar="TOPIC…", help="Which topics.")],
        from_beginning: Annotated[bool, typer.Option("--from-beginning", help="From the oldest message on.")] = False,
        until_end: Annotated[
            bool, typer.Option("--until-end", help="Stop at what is the newest message now (from the beginning).")
        ] = False,
        key: Annotated[str | None, typer.Option(help="Only messages with this key.")] = None,
        type: Annotated[str | None, typer.Option(help="Only messages of this type.")] = None,
        id: Annotated[str | None, typer.Option(help="Only this message, and those it caused.")] = None,
        headers_only: Annotated[bool, typer.Option("--headers-only", help="Without values.")] = False,
        data: Data = DEFAULT_DIRECTORY,
        output: Shape = None,
    ) -> None:
        """Messages as they come, until Ctrl-C."""
        import asyncio
        from contextlib import aclosing

        from infra.messaging.reader import read_all

        shape = Output.of(output)
        kafka = System.find(data).kafka
        wanted = Wanted(key, type, id)

        async def show() -> None:
            messages = read_all(kafka, topics, from_beginning=from_beginning or until_end, until_end=until_end)
            async with aclosing(messages):  # type: ignore[type-var]
                async for record in messages:
                    message = as_json(record, with_value=not headers_only)
                    if wanted.admits(message):
                        shape.show(message, for_people)

        asyncio.run(show())
