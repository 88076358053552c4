"""The AsyncAPI document: as the models are, sound by its own rules, and true of real messages."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from message_samples import BODIES, NOW_MS, sample

from schemas import asyncapi
from schemas.envelope import RawMessage, build_command_message, build_dead_letter, build_result_message
from schemas.outcome import Answer
from schemas.registry import DOMAINS, default_registry
from schemas.topics import topic_specs

DOCUMENT = asyncapi.document()
COMPONENTS = DOCUMENT["components"]


def resolve(reference: str, document: Any = DOCUMENT) -> Any:
    assert reference.startswith("#/")
    for part in reference[2:].split("/"):
        document = document[part.replace("~1", "/").replace("~0", "~")]
    return document


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == "$ref":
                yield inner
            else:
                yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


def schema_at(reference: str) -> dict[str, Any]:
    """A schema that stands alone: references within it lead into the document's components."""
    return {"$ref": reference, "components": COMPONENTS}


def test_the_committed_file_is_what_the_models_say() -> None:
    assert asyncapi.PATH.read_text(encoding="utf-8") == asyncapi.text()


def test_check_exits_1_where_the_file_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(asyncapi, "PATH", tmp_path / "asyncapi.json")

    assert asyncapi.main(["--check"]) == 1
    assert "python -m schemas.asyncapi" in capsys.readouterr().err
    assert asyncapi.main([]) == 0
    assert asyncapi.main(["--check"]) == 0
    asyncapi.PATH.write_text(asyncapi.text().replace("PlaceOrder", "PlaceOder"))
    assert asyncapi.main(["--check"]) == 1


REFERENCE = {"type": "object", "required": ["$ref"], "properties": {"$ref": {"type": "string"}}, "maxProperties": 1}
KAFKA = {"type": "object", "required": ["kafka"], "properties": {"kafka": {"required": ["bindingVersion"]}}}
STRUCTURE = {
    # The parts of AsyncAPI 3.0.0's own JSON Schema that this document uses.
    "type": "object",
    "required": ["asyncapi", "info", "channels", "operations", "components"],
    "propertyNames": {
        "enum": ["asyncapi", "id", "info", "servers", "defaultContentType", "channels", "operations", "components"]
    },
    "properties": {
        "asyncapi": {"const": "3.0.0"},
        "info": {"type": "object", "required": ["title", "version"]},
        "channels": {
            "additionalProperties": {
                "type": "object",
                "required": ["address", "messages", "bindings"],
                "propertyNames": {
                    "enum": ["address", "messages", "title", "summary", "description", "servers", "bindings"]
                },
                "properties": {
                    "messages": {"minProperties": 1, "additionalProperties": REFERENCE},
                    "bindings": KAFKA,
                },
            }
        },
        "operations": {
            "additionalProperties": {
                "type": "object",
                "required": ["action", "channel"],
                "propertyNames": {"enum": ["action", "channel", "summary", "description", "messages", "reply"]},
                "properties": {
                    "action": {"enum": ["send", "receive"]},
                    "channel": REFERENCE,
                    "messages": {"type": "array", "minItems": 1, "items": REFERENCE},
                    "reply": {"properties": {"channel": REFERENCE, "messages": {"items": REFERENCE}}},
                },
            }
        },
        "components": {
            "propertyNames": {"enum": ["messages", "schemas", "correlationIds"]},
            "additionalProperties": {"propertyNames": {"pattern": r"^[\w\d\.\-_]+$"}},
            "properties": {
                "messages": {
                    "additionalProperties": {
                        "type": "object",
                        "required": ["name", "headers", "payload", "contentType", "bindings"],
                        "propertyNames": {
                            "pattern": "^(name|title|summary|contentType|headers|payload|correlationId|bindings|x-.*)$"
                        },
                        "properties": {"correlationId": REFERENCE, "bindings": KAFKA},
                    }
                },
                "correlationIds": {"additionalProperties": {"required": ["location"]}},
            },
        },
    },
}


def test_the_document_has_the_structure_of_asyncapi_3() -> None:
    jsonschema.validate(DOCUMENT, STRUCTURE)


@pytest.mark.parametrize("missing", ["asyncapi", "info", "channels", "operations", "components"])
def test_a_document_without_a_required_section_would_be_noticed(missing: str) -> None:
    broken = copy.deepcopy(DOCUMENT)
    del broken[missing]

    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, STRUCTURE)


def test_every_reference_leads_somewhere() -> None:
    found = list(references(DOCUMENT))

    assert found
    for reference in found:
        assert resolve(reference) is not None


def test_operations_speak_of_messages_of_their_own_channel() -> None:
    """AsyncAPI 3.0.0, Operation Object: every message MUST be one of the channel's."""
    for operation in DOCUMENT["operations"].values():
        for part in (operation, operation.get("reply", operation)):
            prefix = part["channel"]["$ref"] + "/messages/"
            assert all(message["$ref"].startswith(prefix) for message in part["messages"])


def test_every_topic_is_a_channel_with_its_own_settings() -> None:
    topics = {topic.name: topic for topic in topic_specs(DOMAINS)}

    assert DOCUMENT["channels"].keys() == topics.keys()
    for name, channel in DOCUMENT["channels"].items():
        kafka = channel["bindings"]["kafka"]
        assert channel["address"] == kafka["topic"] == name
        assert kafka["partitions"] == topics[name].partitions
        assert kafka["topicConfiguration"]["retention.ms"] == topics[name].retention_ms


def test_commands_are_received_and_answered_and_all_else_is_sent() -> None:
    actions = {
        operation["channel"]["$ref"]: (operation["action"], "reply" in operation)
        for operation in DOCUMENT["operations"].values()
    }

    assert actions == {
        f"#/channels/{name}": ("receive", True) if name.endswith(".commands") else ("send", False)
        for name in DOCUMENT["channels"]
    }


def test_every_command_and_event_is_a_message_of_its_domains_channel() -> None:
    registry = default_registry()

    for domain in DOMAINS:
        for role, models in (("commands", registry.commands_of(domain)), ("events", registry.events_of(domain))):
            channel = DOCUMENT["channels"][f"{domain}.{role}"]
            assert channel["messages"].keys() == {model.type_name() for model in models}
    assert COMPONENTS["messages"].keys() == {*registry.commands, *registry.events, "Answer", "DeadLetter"}


def test_every_message_but_a_dead_letter_is_correlated_by_its_header() -> None:
    for name, message in COMPONENTS["messages"].items():
        if name != "DeadLetter":
            assert resolve(message["correlationId"]["$ref"])["location"] == "$message.header#/ce_correlationid"


@pytest.mark.parametrize("name", COMPONENTS["schemas"])
def test_every_schema_is_sound_json_schema_of_the_draft_that_asyncapi_uses(name: str) -> None:
    jsonschema.Draft7Validator.check_schema(COMPONENTS["schemas"][name])


def headers_of(message: Any) -> dict[str, str]:
    return {name: value.decode() for name, value in message.headers}


@pytest.mark.parametrize("type_name", BODIES)
def test_real_commands_are_as_the_document_says(type_name: str) -> None:
    message = build_command_message(sample(type_name), command_id="c-1", time_ms=NOW_MS)

    described = COMPONENTS["messages"][type_name]
    jsonschema.validate(json.loads(message.value or b""), schema_at(described["payload"]["$ref"]))
    jsonschema.validate(headers_of(message), described["headers"] | {"components": COMPONENTS})


def test_a_command_that_is_not_as_the_document_says_is_noticed() -> None:
    body = BODIES["OpenWallet"] | {"initial_balance": -1}

    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(body, schema_at("#/components/schemas/OpenWallet"))


def test_real_answers_and_dead_letters_are_as_the_document_says() -> None:
    answer = Answer(id="c-1", type="OpenWallet", key="k", status="committed", digest="d", received_at_ms=NOW_MS)
    result = build_result_message(answer, domain="payment")
    command = build_command_message(sample("OpenWallet"), command_id="c-1", time_ms=NOW_MS)
    dead = COMPONENTS["messages"]["DeadLetter"]

    described = COMPONENTS["messages"]["Answer"]
    jsonschema.validate(json.loads(result.value or b""), schema_at("#/components/schemas/Answer"))
    jsonschema.validate(headers_of(result), described["headers"] | {"components": COMPONENTS})
    raw = RawMessage(command.topic, 0, 0, NOW_MS, command.key, command.headers, command.value)
    letter = build_dead_letter(raw, reason="too_large", detail="", command_id="c-1")
    jsonschema.validate(headers_of(letter), dead["headers"] | {"components": COMPONENTS})


def test_the_document_says_which_older_versions_are_understood() -> None:
    message = COMPONENTS["messages"]["RegisterProduct"]

    assert (message["x-version"], message["x-accepted-versions"]) == (2, [1, 2])
