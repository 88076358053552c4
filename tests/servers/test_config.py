from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from infra.config import ConfigurationError, Settings, describe_settings, load_settings
from infra.storage.connect import connect


def problems(environment: dict[str, str] | None = None, **options: Any) -> str:
    """What `load_settings` says against these settings."""
    with pytest.raises(ConfigurationError) as caught:
        load_settings(environment=environment or {}, **options)
    return str(caught.value)


def test_the_defaults_are_the_local_profile() -> None:
    settings = load_settings(environment={})

    assert settings.profile == "local"
    assert settings.data_dir == Path.cwd() / ".concord"
    assert settings.kafka.command_partitions == 4
    assert settings.actors.shards == {"orders": 2, "inventory": 1, "payment": 1, "shipping": 1}
    assert (settings.retry.tries, settings.retry.initial_ms, settings.retry.max_ms) == (10, 100, 10_000)
    assert (settings.kafka.retention_commands_hours, settings.outcome.window_hours) == (72, 168)


def test_an_option_beats_the_environment_beats_the_file_beats_the_default(tmp_path: Path) -> None:
    (tmp_path / "concord.toml").write_text(
        "workers = 2\n[kafka]\nport = 2\nheap_mb = 1024\n[batch]\nmax_commands = 9\n"
    )
    environment = {"CONCORD_KAFKA__PORT": "3", "CONCORD_WORKERS": "3", "CONCORD_DATA_DIR": str(tmp_path)}

    settings = load_settings(environment=environment, workers=4)

    assert settings.workers == 4
    assert settings.kafka.port == 3
    assert settings.kafka.heap_mb == 1024
    assert settings.batch.max_commands == 9
    assert settings.batch.max_wait_ms == 10


def test_an_option_that_was_not_given_changes_nothing() -> None:
    assert load_settings(environment={"CONCORD_WORKERS": "3"}, workers=None, data_dir=None).workers == 3


def test_options_reach_into_groups() -> None:
    settings = load_settings(environment={}, kafka__port=1234, batch={"max_wait_ms": 5})

    assert (settings.kafka.port, settings.batch.max_wait_ms, settings.batch.max_commands) == (1234, 5, 256)


def test_a_domain_without_shards_of_its_own_keeps_the_default() -> None:
    for value in ({"CONCORD_ACTORS__SHARDS__ORDERS": "4"}, {"CONCORD_ACTORS__SHARDS": '{"orders": 4}'}):
        actors = load_settings(environment=value).actors

        assert [actors.shards_of(name) for name in ("orders", "inventory", "payment", "chat")] == [4, 1, 1, 1]


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("CONCORD_KAFKA__PORT", "ninety", "CONCORD_KAFKA__PORT must be a whole number."),
        ("CONCORD_KAFKA__PORT", "70000", "CONCORD_KAFKA__PORT must be at most 65535."),
        ("CONCORD_KAFKA__HEAP_MB", "1", "CONCORD_KAFKA__HEAP_MB must be at least 256."),
        ("CONCORD_RETRY__FACTOR", "double", "CONCORD_RETRY__FACTOR must be a number."),
        ("CONCORD_WORKERS", "-1", "CONCORD_WORKERS must be at least 0."),
        ("CONCORD_LOG_LEVEL", "loud", "CONCORD_LOG_LEVEL must be one of 'debug', 'info', 'warning' or 'error'."),
        ("CONCORD_PROFILE", "laptop", "CONCORD_PROFILE must be one of 'local', 'stack' or 'cluster'."),
        ("concord_workers", "x", "concord_workers must be a whole number."),
        ("CONCORD_ACTORS__SHARDS__ORDERS", "0", "CONCORD_ACTORS__SHARDS__ORDERS must be at least 1."),
        ("CONCORD_ACTORS__SHARDS", '{"orders": 0}', "CONCORD_ACTORS__SHARDS must be at least 1."),
        ("CONCORD_ACTORS__SHARDS", "{orders: 1", "CONCORD_ACTORS__SHARDS must be a JSON object."),
        ("CONCORD_KAFKA__PROT", "1", "CONCORD_KAFKA__PROT is no setting. Did you mean CONCORD_KAFKA__PORT?"),
        ("CONCORD_KAFAK__PORT", "1", "CONCORD_KAFAK__PORT is no setting. Did you mean CONCORD_KAFKA__PORT?"),
        ("CONCORD_HTTP_PRT", "1", "CONCORD_HTTP_PRT is no setting. Did you mean CONCORD_HTTP_PORT?"),
    ],
)
def test_a_bad_value_names_its_environment_variable(variable: str, value: str, sentence: str) -> None:
    assert sentence in problems({variable: value})


def test_a_bad_option_is_named_as_an_option() -> None:
    assert problems(profile="laptop") == "--profile must be one of 'local', 'stack' or 'cluster'."
    assert problems(kafka__port=70_000) == "kafka.port must be at most 65535."


def test_a_bad_line_of_the_file_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "concord.toml"
    file.write_text("[kafka]\nheap_mb = 1\nprot = 2\n")

    said = problems(data_dir=tmp_path)

    assert f"kafka.heap_mb in {file} must be at least 256." in said
    assert f"kafka.prot in {file} is no setting. Did you mean kafka.port?" in said


@pytest.mark.parametrize("content", [b"[kafka\n", b"\xff\xfe"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "concord.toml").write_bytes(content)

    assert str(tmp_path / "concord.toml") in problems(data_dir=tmp_path)


def test_the_file_cannot_name_another_directory(tmp_path: Path) -> None:
    (tmp_path / "concord.toml").write_text('data_dir = "/elsewhere"\n')

    assert problems(data_dir=tmp_path).startswith("data_dir in ")


def test_all_problems_are_told_at_once() -> None:
    said = problems({"CONCORD_KAFKA__PORT": "x", "CONCORD_WORKERS": "y", "CONCORD_RETRY__TRIES": "0"})

    assert len(said.splitlines()) == 3


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        # Rule 1: a redelivered command meets its outcome.
        ({"CONCORD_OUTCOME__WINDOW_HOURS": "72"}, ["CONCORD_OUTCOME__WINDOW_HOURS", "RETENTION_COMMANDS_HOURS"]),
        ({"CONCORD_KAFKA__RETENTION_COMMANDS_HOURS": "168"}, ["CONCORD_KAFKA__RETENTION_COMMANDS_HOURS"]),
        ({"CONCORD_KAFKA__COMMAND_PARTITIONS": "6"}, ["CONCORD_ACTORS__BUCKETS", "CONCORD_KAFKA__COMMAND_PARTITIONS"]),
        ({"CONCORD_ACTORS__BUCKETS": "4", "CONCORD_ACTORS__SHARDS__ORDERS": "5"}, ["CONCORD_ACTORS__SHARDS"]),
        ({"CONCORD_RETRY__MAX_MS": "50"}, ["CONCORD_RETRY__MAX_MS", "CONCORD_RETRY__INITIAL_MS"]),
        ({"CONCORD_KAFKA__MAX_COMMAND_BYTES": "4194304"}, ["MAX_COMMAND_BYTES", "COMMAND_TOPIC_MAX_BYTES"]),
        ({"CONCORD_KAFKA__BROKER_MAX_BYTES": "4194304"}, ["COMMAND_TOPIC_MAX_BYTES", "BROKER_MAX_BYTES"]),
        ({"CONCORD_RECOVERY__SWEEP_INTERVAL_MS": "20000"}, ["SWEEP_INTERVAL_MS", "TRANSACTION_LIFETIME_MS"]),
        ({"CONCORD_WATCHDOG_SECONDS": "5", "CONCORD_BATCH__MAX_WAIT_MS": "5000"}, ["WATCHDOG_SECONDS", "MAX_WAIT_MS"]),
        ({"CONCORD_PROFILE": "cluster"}, ["CONCORD_KAFKA__BOOTSTRAP_SERVERS", "CONCORD_STORAGE__URL"]),
        ({"CONCORD_KAFKA__BOOTSTRAP_SERVERS": "k:9092"}, ["CONCORD_KAFKA__BOOTSTRAP_SERVERS", "profile local"]),
        ({"CONCORD_KAFKA__REPLICATION": "3"}, ["CONCORD_KAFKA__REPLICATION"]),
        ({"CONCORD_KAFKA__PORT": "8180"}, ["CONCORD_KAFKA__PORT", "CONCORD_HTTP_PORT"]),
    ],
)
def test_settings_that_contradict_each_other_are_both_named(environment: dict[str, str], named: list[str]) -> None:
    said = problems(environment)

    assert all(name in said for name in named), said


def test_a_secret_is_shown_neither_in_errors_nor_in_descriptions() -> None:
    url = "cassandra://concord:hunter2@db/keyspace"
    settings = load_settings(environment={"CONCORD_STORAGE__URL": url})
    said = problems({"CONCORD_STORAGE__URL": url, "CONCORD_WORKERS": "-1"})

    assert "hunter2" not in said
    assert all("hunter2" not in str(line) for line in describe_settings(settings))
    assert settings.storage_url == url


def test_every_setting_is_described() -> None:
    lines = describe_settings(Settings())

    assert len(lines) > 30
    assert [line.name for line in lines if not line.description] == []
    assert {"kafka.port": "CONCORD_KAFKA__PORT"}.items() <= {line.name: line.variable for line in lines}.items()


def test_settings_travel_to_other_processes_unchanged() -> None:
    settings = load_settings(environment={"CONCORD_ACTORS__SHARDS__CHAT": "3", "CONCORD_STORAGE__URL": "memory:"})

    assert Settings.model_validate_json(settings.model_dump_json()) == settings
    assert pickle.loads(pickle.dumps(settings)) == settings


def test_a_process_that_receives_settings_does_not_look_into_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    text = load_settings(environment={}).model_dump_json()
    monkeypatch.setenv("CONCORD_WORKERS", "9")

    assert Settings.model_validate_json(text).workers == 1
    assert load_settings().workers == 9


def test_settings_are_frozen() -> None:
    settings = load_settings(environment={})

    with pytest.raises(ValueError, match="frozen"):
        settings.kafka.port = 1  # type: ignore[misc]


def test_variables_of_others_with_our_prefix_are_left_alone() -> None:
    assert load_settings(environment={"CONCORD_RUN": "1", "CONCORD_CACHE_DIR": "/x", "CONCORD_FAILPOINTS": "a=kill"})


async def test_the_default_storage_is_one_that_the_storage_layer_opens(tmp_path: Path) -> None:
    settings = load_settings(environment={}, data_dir=tmp_path / "a folder with spaces")

    storage = connect(settings.storage_url)

    assert storage.info is not None
    await storage.close()
