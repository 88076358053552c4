"""The AsyncAPI 3.0.0 document of the system, made from the models and the topics: schemas/asyncapi.json.

    python -m schemas.asyncapi            writes it
    python -m schemas.asyncapi --check    exits 1 when the file differs from what would be written

Operations are seen from this system: it receives commands and sends events, answers and dead letters. Partitions and
retention are the defaults; a running system may be configured otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from schemas.envelope import ANSWER_TYPE, CONTENT_TYPE, MAX_ID_CHARS, SPEC_VERSION, DeadLetterReason, data_schema
from schemas.message import Command, Message
from schemas.outcome import Answer
from schemas.registry import DOMAINS, Registry, default_registry
from schemas.topics import Topic, TopicRole, topic_specs

PATH = Path(__file__).with_name("asyncapi.json")
KAFKA_BINDING_VERSION = "0.5.0"
DEAD_LETTER = "DeadLetter"

Json = dict[str, Any]


def document(registry: Registry | None = None, domains: Iterable[str] = DOMAINS) -> Json:
    """The AsyncAPI document as JSON values."""
    registry = registry or default_registry()
    topics = topic_specs(domains)
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Concord",
            "version": "1",
            "description": "Commands in, events and answers out. Every message is a CloudEvent in Kafka's binary mode.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": CONTENT_TYPE,
        "channels": {topic.name: _channel(topic, registry) for topic in topics},
        "operations": dict(_operation(topic, registry) for topic in topics),
        "components": {
            "messages": _messages(registry),
            "schemas": {**_HEADERS, **_payloads(registry)},
            "correlationIds": {
                "command": {
                    "description": "The id of the command that all this began with.",
                    "location": "$message.header#/ce_correlationid",
                }
            },
        },
    }


def text(registry: Registry | None = None) -> str:
    """The document as it stands in the file."""
    return json.dumps(document(registry), indent=2, ensure_ascii=False) + "\n"


# --- Channels and operations -------------------------------------------------------------------------------------


def _channel(topic: Topic, registry: Registry) -> Json:
    return {
        "address": topic.name,
        "description": topic.carries,
        "messages": {name: _ref("components", "messages", name) for name in _message_names(topic, registry)},
        "bindings": {
            "kafka": {
                "topic": topic.name,
                "partitions": topic.partitions,
                "topicConfiguration": {
                    "cleanup.policy": [topic.cleanup_policy],
                    "retention.ms": topic.retention_ms,
                    "max.message.bytes": topic.max_message_bytes,
                },
                "bindingVersion": KAFKA_BINDING_VERSION,
            }
        },
    }


def _message_names(topic: Topic, registry: Registry) -> list[str]:
    models: dict[TopicRole, tuple[type[Message], ...]] = {
        TopicRole.COMMANDS: registry.commands_of(topic.domain),
        TopicRole.EVENTS: registry.events_of(topic.domain),
    }
    names = {TopicRole.RESULTS: [ANSWER_TYPE], TopicRole.DEAD_LETTERS: [DEAD_LETTER]}
    return names.get(topic.role) or [model.type_name() for model in models[topic.role]]


def _operation(topic: Topic, registry: Registry) -> tuple[str, Json]:
    receives = topic.role is TopicRole.COMMANDS
    domain = topic.domain.capitalize()
    what = {
        TopicRole.COMMANDS: f"receive{domain}Commands",
        TopicRole.EVENTS: f"send{domain}Events",
        TopicRole.RESULTS: f"send{domain}Results",
        TopicRole.DEAD_LETTERS: f"send{domain}DeadLetters",
    }
    operation: Json = {
        "action": "receive" if receives else "send",
        "channel": _ref("channels", topic.name),
        "summary": f"{topic.carries}; key: {topic.key}",
        "messages": [_ref("channels", topic.name, "messages", name) for name in _message_names(topic, registry)],
    }
    if receives:
        results = f"{topic.domain}.{TopicRole.RESULTS}"
        operation["reply"] = {
            "channel": _ref("channels", results),
            "messages": [_ref("channels", results, "messages", ANSWER_TYPE)],
        }
    return what[topic.role], operation


# --- Messages ----------------------------------------------------------------------------------------------------


def _messages(registry: Registry) -> Json:
    models: list[type[Message]] = [*registry.commands.values(), *registry.events.values()]
    messages = {model.type_name(): _model_message(model, registry) for model in models}
    messages[ANSWER_TYPE] = {
        "name": ANSWER_TYPE,
        "title": ANSWER_TYPE,
        "summary": _first_line(Answer),
        "contentType": CONTENT_TYPE,
        "headers": _headers("ResultHeaders", ANSWER_TYPE),
        "payload": _ref("components", "schemas", ANSWER_TYPE),
        "correlationId": _ref("components", "correlationIds", "command"),
        "bindings": _key_binding("The key of the command that is answered."),
    }
    messages[DEAD_LETTER] = {
        "name": DEAD_LETTER,
        "title": DEAD_LETTER,
        "summary": "A command nobody could carry out: its key, value and headers byte for byte, and why.",
        "contentType": "application/octet-stream",
        "headers": _ref("components", "schemas", "DeadLetterHeaders"),
        "payload": {"description": "The original bytes, whatever they are."},
        "bindings": _key_binding("The original key, which may be missing."),
    }
    return messages


def _model_message(model: type[Message], registry: Registry) -> Json:
    name = model.type_name()
    versions = registry.accepted_versions(model)
    schemas = [data_schema(model.domain, name, version) for version in versions]
    headers = "CommandHeaders" if issubclass(model, Command) else "EventHeaders"
    return {
        "name": name,
        "title": name,
        "summary": _first_line(model),
        "contentType": CONTENT_TYPE,
        "headers": _headers(headers, name, schemas),
        "payload": _ref("components", "schemas", name),
        "correlationId": _ref("components", "correlationIds", "command"),
        "bindings": _key_binding("The routing key."),
        "x-version": model.version,
        "x-accepted-versions": list(versions),
    }


def _headers(base: str, type_name: str, data_schemas: Iterable[str] = ()) -> Json:
    own: Json = {"ce_type": {"const": type_name}}
    if data_schemas:
        own["ce_dataschema"] = {"examples": list(data_schemas)}
    return {"allOf": [_ref("components", "schemas", base), {"type": "object", "properties": own}]}


def _key_binding(meaning: str) -> Json:
    return {"kafka": {"key": {"type": "string", "description": meaning}, "bindingVersion": KAFKA_BINDING_VERSION}}


def _first_line(model: type[BaseModel]) -> str:
    # Not inherited: what a base class says of all its messages is no summary of one.
    lines = (model.__dict__.get("__doc__") or "").strip().splitlines()
    return lines[0] if lines else model.__name__


# --- Schemas -----------------------------------------------------------------------------------------------------


def _payloads(registry: Registry) -> Json:
    """The JSON Schema of every message and of what they contain, by name."""
    models: list[type[BaseModel]] = [*registry.commands.values(), *registry.events.values(), Answer]
    _, schemas = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    definitions: Json = schemas["$defs"]
    return dict(sorted(definitions.items()))


def _text_header(description: str, **more: Any) -> Json:
    return {"type": "string", "description": description, **more}


_ID = {"minLength": 1, "maxLength": MAX_ID_CHARS}
_CLOUD_EVENT: Json = {
    "ce_specversion": {"const": SPEC_VERSION},
    "ce_id": _text_header("Names the message: the same again is the same message.", **_ID),
    "ce_type": _text_header("The message's name.", **_ID),
    "ce_source": _text_header("Who sent it.", minLength=1),
    "ce_subject": _text_header("What it is about: a command's routing key, an event's record."),
    "ce_time": _text_header("When it was made, RFC 3339.", format="date-time"),
    "ce_correlationid": _text_header("The command that all this began with; the message's own id if absent.", **_ID),
    "ce_causationid": _text_header("The message that led to this one.", **_ID),
    "ce_dataschema": _text_header(
        "Ends in /<Type>/<version>; version 1 if absent.", pattern=r"(^|/)[A-Za-z][A-Za-z0-9_]*/[1-9][0-9]{0,8}$"
    ),
    "traceparent": _text_header("W3C Trace Context; dropped if malformed."),
    "tracestate": _text_header("W3C Trace Context; handed on with the traceparent, dropped if malformed."),
    "content-type": {"const": CONTENT_TYPE},
}
_REQUIRED = ["ce_specversion", "ce_id", "ce_type", "ce_source"]
_OF_THE_TRANSACTION: Json = {"ce_txid": _text_header("The transaction that committed it.", **_ID)}
_OF_THE_RECORD: Json = {
    "ce_recordversion": _text_header(
        "The version of the record that the subject names; projections apply by it.", pattern="^(0|[1-9][0-9]*)$"
    )
}
_HEADERS: Json = {
    "CommandHeaders": {"type": "object", "required": _REQUIRED, "properties": _CLOUD_EVENT},
    "EventHeaders": {
        "type": "object",
        "required": [*_REQUIRED, "ce_subject", "ce_recordversion"],
        "properties": {**_CLOUD_EVENT, **_OF_THE_TRANSACTION, **_OF_THE_RECORD},
    },
    "ResultHeaders": {
        "type": "object",
        "required": [*_REQUIRED, "ce_causationid"],
        "properties": {**_CLOUD_EVENT, **_OF_THE_TRANSACTION},
    },
    "DeadLetterHeaders": {
        "type": "object",
        "required": ["dlq-reason", "dlq-command-id", "dlq-original-topic"],
        "properties": {
            "dlq-reason": {"type": "string", "examples": [str(reason) for reason in DeadLetterReason]},
            "dlq-detail": _text_header("What a person wants to know besides."),
            "dlq-command-id": _text_header("The id under which `concord status` finds the answer."),
            "dlq-original-topic": _text_header("Where it came from."),
            "dlq-original-partition": _text_header("A number."),
            "dlq-original-offset": _text_header("A number."),
            "dlq-original-timestamp": _text_header("The broker's time, ms since the epoch."),
            "dlq-consumer-group": _text_header("Who gave it up."),
            "dlq-attempts": _text_header("How often it was tried."),
        },
    },
}


def _ref(*path: str) -> Json:
    return {"$ref": "#/" + "/".join(part.replace("~", "~0").replace("/", "~1") for part in path)}


def main(arguments: list[str] | None = None) -> int:
    """Write the file or, with --check, compare it. The exit code."""
    parser = argparse.ArgumentParser(prog="python -m schemas.asyncapi", description="Writes schemas/asyncapi.json.")
    parser.add_argument("--check", action="store_true", help="only compare: exit 1 when the file is out of date")
    if not parser.parse_args(arguments).check:
        PATH.write_text(text(), encoding="utf-8")
        return 0
    if PATH.exists() and PATH.read_text(encoding="utf-8") == text():
        return 0
    print(f"{PATH} differs from the models: run `python -m schemas.asyncapi` and commit it", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
