"""`concord send`: publishes commands, and waits for their outcomes."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from scripts.cli.errors import CommandError
from scripts.cli.exit_codes import OF_STATUS, ExitCode, worst
from scripts.cli.options import DEFAULT_DIRECTORY, Data, Shape, command
from scripts.cli.output import Output
from scripts.cli.status_command import for_people
from scripts.cli.system import System

if TYPE_CHECKING:
    from schemas.envelope import OutgoingMessage
    from scripts.cli.client import CommandClient, Submitted

MANY_WAIT_S = 60.0
"""How long each of many commands is waited for when --wait does not say."""

IN_FLIGHT = 256
"""How many of many commands may be on their way at once."""


class InvalidCommandError(ValueError):
    """What was given is no command that could be sent; the text says why."""


@dataclass(frozen=True)
class Outgoing:
    """A command ready to be published. `id` None: it carries no readable one."""

    type: str
    key: str | None
    id: str | None
    digest: str | None
    message: OutgoingMessage


def outgoing(type: str, body: bytes, *, key: str | None, id: str | None, time_ms: int) -> Outgoing:
    """The command in JSON `body`, validated as strictly as its model can. Raises InvalidCommandError.

    Without `key` it is the routing key of the body; a given one is used as it is, right or wrong.
    """
    import uuid

    from pydantic import ValidationError

    from schemas.decoding import DecodingError, decode_json
    from schemas.envelope import EnvelopeError, build_command_message, payload_digest
    from schemas.registry import UnknownTypeError, default_registry

    registry = default_registry()
    try:
        model = registry.command(type)
    except UnknownTypeError:
        known = ", ".join(sorted(registry.commands))
        raise InvalidCommandError(f"{type!r} is no command. There are: {known}.") from None
    id = id or str(uuid.uuid4())
    try:
        decode_json(body)
        made = model.produce(body)
        message = build_command_message(made, command_id=id, time_ms=time_ms)
    except DecodingError as error:
        raise InvalidCommandError(f"The body of {type} cannot be taken: {error}.") from None
    except ValidationError as error:
        raise InvalidCommandError(f"The body of {type} cannot be taken: {_problems(error)}.") from None
    except EnvelopeError as error:
        raise InvalidCommandError(f"{type} cannot be sent: {error}.") from None
    if key is not None:
        message = replace(message, key=key.encode("utf-8", "surrogateescape"))
    value = message.value or b""
    return Outgoing(
        type=type,
        key=made.routing_key if key is None else key,
        id=id,
        digest=payload_digest(type, str(model.version), value),
        message=message,
    )


def _problems(error: Any) -> str:
    found = error.errors(include_url=False, include_context=False, include_input=False)
    return "; ".join(f"{'.'.join(map(str, item['loc'])) or 'body'}: {item['msg']}" for item in found[:5])


def raw(
    type: str, body: bytes, *, key: str | None, id: str | None, topic: str | None, headers: list[str], time_ms: int
) -> Outgoing:
    """`body` as it is, with the headers of an ordinary command but for those in `headers` (NAME=VALUE; empty: none).

    Raises InvalidCommandError when the topic is not named and the type does not tell it.
    """
    import uuid

    from schemas.envelope import Envelope, OutgoingMessage, data_schema_of, encode_headers
    from schemas.registry import UnknownTypeError, default_registry
    from schemas.topics import commands_topic

    try:
        model = default_registry().command(type)
    except UnknownTypeError:
        if topic is None:
            raise InvalidCommandError(f"{type!r} is no command, so --topic must say where it goes.") from None
        schema = None
    else:
        schema = data_schema_of(model)
        topic = topic or commands_topic(model.domain)
    id = id or str(uuid.uuid4())
    envelope = Envelope(id=id, type=type, source="concord-cli", time_ms=time_ms, data_schema=schema)
    encoded = dict(encode_headers(envelope))
    for header in headers:
        name, _, value = header.partition("=")
        encoded.pop(name, None)
        if value:
            encoded[name] = value.encode("utf-8", "surrogateescape")
    told = encoded.get("ce_id")
    return Outgoing(
        type=type,
        key=key,
        id=None if told is None else told.decode("utf-8", "replace"),
        digest=None,
        message=OutgoingMessage(
            topic, None if key is None else key.encode("utf-8", "surrogateescape"), body, tuple(encoded.items())
        ),
    )


def read_lines(file: BinaryIO, *, time_ms: int) -> Iterator[Outgoing | dict[str, Any]]:
    """Commands of NDJSON lines {"type", "key", "id", "body"}; for a line that holds none, what is printed instead."""
    import json

    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            yield _of_line(line, time_ms=time_ms)
        except InvalidCommandError as error:
            yield {"line": number, "status": "invalid", "reason": str(error)}
        except json.JSONDecodeError as error:
            yield {"line": number, "status": "invalid", "reason": f"not JSON: {error}"}


def _of_line(line: bytes, *, time_ms: int) -> Outgoing:
    from schemas.decoding import DecodingError, decode_json

    try:
        given = decode_json(line, max_bytes=64 * 2**20)
    except DecodingError as error:
        raise InvalidCommandError(f"The line cannot be taken: {error}.") from None
    unknown = given.keys() - {"type", "key", "id", "body"}
    if unknown:
        raise InvalidCommandError(f"A line has type, key, id and body, not {', '.join(sorted(unknown))}.")
    for name in ("type", "key", "id"):
        if not isinstance(given.get(name), str) and (name == "type" or given.get(name) is not None):
            raise InvalidCommandError(f"{name} must be text.")
    if not isinstance(given.get("body"), dict):
        raise InvalidCommandError("body must be a JSON object.")
    import json

    body = json.dumps(given["body"], ensure_ascii=False).encode()
    return outgoing(given["type"], body, key=given.get("key"), id=given.get("id"), time_ms=time_ms)


def register(app: typer.Typer) -> None:
    @command(app, "send")
    def send(
        type: Annotated[str | None, typer.Argument(metavar="TYPE", help="The command, such as PlaceOrder.")] = None,
        key: Annotated[str | None, typer.Option(help="The Kafka key; by default the routing key of the body.")] = None,
        body: Annotated[
            str | None, typer.Option("--json", metavar="BODY", help="The body; @FILE or - reads it from there.")
        ] = None,
        id: Annotated[str | None, typer.Option(help="The command's id; by default a new one.")] = None,
        wait: Annotated[
            float | None, typer.Option(metavar="SECONDS", min=0, help="Wait so long for the outcome and print it.")
        ] = None,
        ndjson: Annotated[
            str | None,
            typer.Option(metavar="FILE|-", help='Send many: a line {"type", "key", "id", "body"} for each.'),
        ] = None,
        raw_: Annotated[
            bool, typer.Option("--raw", help="Publish the body's bytes unlooked at, to try what bad input does.")
        ] = False,
        topic: Annotated[str | None, typer.Option(help="With --raw: the topic.")] = None,
        header: Annotated[
            list[str] | None, typer.Option(metavar="NAME=VALUE", help="With --raw: a header; NAME= leaves one out.")
        ] = None,
        data: Data = DEFAULT_DIRECTORY,
        output: Shape = None,
    ) -> ExitCode:
        """Publish one command, or many. The body is checked before anything is sent."""
        import asyncio
        import time

        shape = Output.of(output)
        system = System.find(data)
        time_ms = time.time_ns() // 1_000_000
        if (topic or header) and not raw_:
            raise CommandError("--topic and --header go with --raw.", ExitCode.USAGE)
        if ndjson is not None:
            if type or key or body or id or raw_:
                raise CommandError("--ndjson takes types, keys, ids and bodies from its lines.", ExitCode.USAGE)
            with _opened(ndjson) as file:
                lines = read_lines(file, time_ms=time_ms)
                return asyncio.run(send_each(system, lines, MANY_WAIT_S if wait is None else wait, shape, many=True))
        if type is None or body is None:
            raise CommandError("Name a TYPE and its body with --json, or many with --ndjson.", ExitCode.USAGE)
        try:
            content = _content(body)
            if raw_:
                one = raw(type, content, key=key, id=id, topic=topic, headers=header or [], time_ms=time_ms)
            else:
                one = outgoing(type, content, key=key, id=id, time_ms=time_ms)
        except InvalidCommandError as error:
            raise CommandError(str(error), ExitCode.USAGE) from None
        return asyncio.run(send_each(system, iter([one]), wait or 0, shape))


def _content(body: str) -> bytes:
    if body == "-":
        return sys.stdin.buffer.read()
    if body.startswith("@"):
        return Path(body[1:]).read_bytes()
    return body.encode("utf-8", "surrogateescape")


def _opened(file: str) -> BinaryIO:
    return sys.stdin.buffer if file == "-" else Path(file).open("rb")


async def send_each(
    system: System,
    commands: Iterator[Outgoing | dict[str, Any]],
    wait_s: float,
    shape: Output,
    as_told: Callable[[dict[str, Any]], dict[str, Any]] = lambda outcome: outcome,
    *,
    many: bool = False,
) -> ExitCode:
    """Publish and print one outcome a line, `as_told` of it, in the order of the input; the worst exit code.

    Raises MessageTooLargeError, unless they are `many`: then that is the outcome of one, and no other is held up.
    """
    codes = [ExitCode.DONE]
    async for outcome in _outcomes(system, commands, wait_s, many=many):
        codes = [worst((*codes, OF_STATUS[outcome["status"]]))]
        shape.show(as_told(outcome), _for_people)
    return codes[0]


async def _outcomes(
    system: System, commands: Iterator[Outgoing | dict[str, Any]], wait_s: float, *, many: bool
) -> AsyncIterator[dict[str, Any]]:
    import asyncio
    from collections import deque

    from infra.tracing import open_tracer
    from schemas.registry import DOMAINS
    from schemas.trace_context import TRACEPARENT, TRACESTATE, trace_context_of
    from scripts.cli.client import CommandClient

    system.bootstrap_servers  # noqa: B018 - says so if there is no system, before anything is read
    tracer = open_tracer(system.settings.tracing, service="cli", process=f"cli-{os.getpid()}")
    client = CommandClient(
        lambda: System.find(system.directory).kafka,
        DOMAINS if wait_s else (),
        tracer=tracer,
        parent=trace_context_of([(name, os.environb.get(name.upper().encode())) for name in (TRACEPARENT, TRACESTATE)]),
    )
    waiting: deque[asyncio.Task[dict[str, Any]]] = deque()
    async with client:
        try:
            while True:
                # A line may be long in coming (`--ndjson -`): what is answered meanwhile should not wait for it.
                given = await asyncio.to_thread(next, commands, None)
                if given is None:
                    break
                waiting.append(asyncio.ensure_future(_outcome(client, given, wait_s, many=many)))
                while waiting and (waiting[0].done() or len(waiting) >= IN_FLIGHT):
                    yield await waiting.popleft()
            while waiting:
                yield await waiting.popleft()
        finally:
            for task in waiting:
                task.cancel()
            tracer.close()


async def _outcome(
    client: CommandClient, given: Outgoing | dict[str, Any], wait_s: float, *, many: bool
) -> dict[str, Any]:
    """What became of one command, as it is printed."""
    from infra.messaging.errors import MessageTooLargeError

    if isinstance(given, dict):
        return given
    submitted = client.submit(given.message, id=given.id, digest=given.digest)
    try:
        return await _became(given, submitted, wait_s)
    except MessageTooLargeError as error:
        if not many:
            raise
        return {"id": given.id, "type": given.type, "key": given.key, "status": "invalid", "reason": str(error)}


async def _became(given: Outgoing, submitted: Submitted, wait_s: float) -> dict[str, Any]:
    import asyncio

    if not wait_s:
        place = await submitted.delivered
        return {
            "id": given.id,
            "type": given.type,
            "key": given.key,
            "status": "sent",
            "topic": place.topic,
            "partition": place.partition,
            "offset": place.offset,
            **_trace(submitted),
        }
    try:
        async with asyncio.timeout(wait_s):
            answer = await asyncio.shield(submitted.answer)
    except TimeoutError:
        return _no_answer(given, submitted, wait_s) | _trace(submitted)
    return answer.to_status() | _trace(submitted)


def _trace(submitted: Submitted) -> dict[str, str]:
    """Which trace shows what became of the command, where it is recorded."""
    context = submitted.span.context
    return {"trace_id": context.trace_id} if submitted.span.recording and context is not None else {}


def _no_answer(given: Outgoing, submitted: Submitted, wait_s: float) -> dict[str, Any]:
    from schemas.outcome import unknown_status

    said = "no_answer_in_time" if submitted.delivered.done() else "not_delivered_in_time"
    return {**unknown_status(given.id or "", given.key), "type": given.type, "reason": said}


def _for_people(outcome: Mapping[str, Any]) -> str:
    if outcome["status"] == "sent":
        place = f"{outcome['topic']}[{outcome['partition']}]@{outcome['offset']}"
        return f"sent  {outcome['type']} {outcome['id']}  to {place}{_trace_for_people(outcome)}"
    if outcome["status"] == "invalid":
        which = f"line {outcome['line']}" if "line" in outcome else outcome["id"]
        return f"invalid  {which}: {outcome['reason']}"
    return f"{for_people(outcome)}{_trace_for_people(outcome)}"


def _trace_for_people(outcome: Mapping[str, Any]) -> str:
    return f"\n  {'trace_id':<13} {outcome['trace_id']}" if "trace_id" in outcome else ""
