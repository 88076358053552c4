"""Every setting of the system: its meaning, unit, bounds and default in one place.

A setting comes from, in this order: an option of the command (`load_settings(data_dir=…)`), the environment
(`CONCORD_KAFKA__PORT`; two underscores lead into a group), the file `concord.toml` in the data directory, its default.
What does not hold is refused before anything starts, in sentences that name each setting as it was written.

`Settings` itself reads nothing: it is plain data, frozen, and goes to other processes as JSON or pickle.

Secrets (`Secret`) show their value to `secret_of` alone. What is printed, logged or dumped has none: JSON carries them
only with `context=WITH_SECRETS`, for files that nobody else can read. Beside each stands a setting that names a file to
read it from, which is read at every use, so that a secret may be exchanged while the system runs.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SecretStr,
    SerializationInfo,
    ValidationError,
    field_serializer,
)
from pydantic_settings import BaseSettings, EnvSettingsSource, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError

ENV_PREFIX = "CONCORD_"
CONFIG_FILE = "concord.toml"
_NESTING = "__"

MEBIBYTE = 1024 * 1024
HOUR_MS = 3_600_000

OPTION_NAMES: Mapping[str, str] = {"data_dir": "--data", "profile": "--profile", "workers": "--workers"}
"""Settings that the command line has an option for; it has none for the others."""


class ConfigurationError(Exception):
    """The settings cannot be used. The text names each offending setting as it was written, with the remedy."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


Port = Annotated[int, Field(ge=0, le=65_535)]

WITH_SECRETS: Mapping[str, Any] = {"secrets": True}
"""The `context` of `model_dump_json` for a file that nobody else can read; without it secrets are left out."""


def _carried(secret: SecretStr, info: SerializationInfo) -> str:
    return secret.get_secret_value() if _reveals(info) else ""


def _reveals(info: SerializationInfo) -> bool:
    return bool(info.context and info.context.get("secrets"))


def _listed(given: Any) -> Any:
    """A list as people write it into a variable: items between commas, or JSON."""
    if not isinstance(given, str):
        return given
    if given.lstrip().startswith("["):
        try:
            return json.loads(given)
        except ValueError:
            return given
    return [item.strip() for item in given.split(",") if item.strip()]


Secret = Annotated[SecretStr, PlainSerializer(_carried, return_type=str)]
NO_SECRET = SecretStr("")

# Processes of the system run in other directories, and must mean the same file.
File: TypeAlias = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())] | None
Listed = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], NoDecode, BeforeValidator(_listed)]

SECRET_PARAMETERS = frozenset({"password"})
"""What may be secret in the URL of a storage."""


def without_secrets(url: str) -> str:
    """The URL of a storage as it may be shown."""
    place, mark, query = url.partition("?")
    scheme, slashes, rest = place.partition("://")
    authority, slash, path = rest.partition("/")
    place = f"{scheme}{slashes}{authority.rpartition('@')[2]}{slash}{path}"
    kept = [(name, value) for name, value in parse_qsl(query, keep_blank_values=True) if name not in SECRET_PARAMETERS]
    return f"{place}{mark if kept else ''}{urlencode(kept, safe='/:,')}"


def secret_of(group: BaseModel, name: str) -> str:
    """The secret `name` of a group of settings, from the setting itself or from the file `name`_file; "" if neither.

    Raises ConfigurationError when the file cannot be read.
    """
    file: Path | None = getattr(group, f"{name}_file")
    if file is None:
        secret: SecretStr = getattr(group, name)
        return secret.get_secret_value()
    try:
        return file.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigurationError([f"The file {file}, which {name}_file names, cannot be read: {reason}."]) from None


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class TlsSettings(_Group):
    """Whom a TLS connection trusts, and who it says we are. Files are PEM."""

    ca_file: File = Field(None, description="certificates to trust; those of the operating system if unset")
    certificate_file: File = Field(None, description="our own certificate, where the server asks for one")
    key_file: File = Field(None, description="the key of our certificate")
    key_password: Secret = Field(NO_SECRET, description="what the key is encrypted with")
    key_password_file: File = Field(None, description="file of what the key is encrypted with")
    check_hostname: bool = Field(True, description="whether the server's certificate must be for the name we called")

    @property
    def is_set(self) -> bool:
        """Whether anything here would matter to a TLS connection."""
        return self != TlsSettings()


KafkaProtocol = Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"]
SaslMechanism = Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"]


class SaslSettings(_Group):
    """Who we are for Kafka: a name and a password, or for OAUTHBEARER a client of a token endpoint (RFC 6749 §4.4)."""

    mechanism: Annotated[SaslMechanism, BeforeValidator(lambda v: v.upper() if isinstance(v, str) else v)] = Field(
        "SCRAM-SHA-512", description="how we prove who we are"
    )
    username: str = Field("", description="our name; PLAIN and SCRAM")
    password: Secret = Field(NO_SECRET, description="our password; PLAIN and SCRAM")
    password_file: File = Field(None, description="file of our password")
    token_endpoint: str = Field("", description="URL that gives tokens for client credentials; OAUTHBEARER")
    client_id: str = Field("", description="our name at the token endpoint; OAUTHBEARER")
    client_secret: Secret = Field(NO_SECRET, description="our secret at the token endpoint; OAUTHBEARER")
    client_secret_file: File = Field(None, description="file of our secret at the token endpoint")
    scope: str = Field("", description="what tokens are asked for; OAUTHBEARER, if the endpoint wants it")
    token_endpoint_ca_file: File = Field(None, description="certificates to trust at the token endpoint")

    @property
    def is_set(self) -> bool:
        """Whether anything here would matter to a SASL connection."""
        return self != SaslSettings()


class KafkaSettings(_Group):
    """The broker and what is kept on it."""

    bootstrap_servers: Listed = Field((), description="host:port,… of your own Kafka; profile cluster only")
    security_protocol: Annotated[KafkaProtocol, BeforeValidator(lambda v: v.upper() if isinstance(v, str) else v)] = (
        Field("PLAINTEXT", description="how Kafka is spoken to; other than PLAINTEXT in profile cluster only")
    )
    tls: TlsSettings = TlsSettings()
    sasl: SaslSettings = SaslSettings()
    port: Port = Field(0, description="port of the local Kafka; 0 chooses a free one and keeps it")
    heap_mb: int = Field(512, ge=256, le=65_536, description="heap of the local Kafka, in MiB")
    command_partitions: int = Field(4, ge=1, le=1024, description="partitions of each command topic")
    replication: int = Field(1, ge=1, le=9, description="replicas of each topic; more than 1 needs profile cluster")
    min_insync_replicas: int = Field(
        1, ge=1, le=9, description="replicas that must have a message before it counts as stored"
    )
    max_command_bytes: int = Field(
        MEBIBYTE, ge=1024, le=64 * MEBIBYTE, description="largest command value; a larger one is dead-lettered"
    )
    command_topic_max_bytes: int = Field(
        4 * MEBIBYTE, ge=1024, le=64 * MEBIBYTE, description="largest message that a command topic accepts at all"
    )
    broker_max_bytes: int = Field(
        8 * MEBIBYTE, ge=1024, le=100 * MEBIBYTE, description="largest message of any topic, dead letters included"
    )
    retention_commands_hours: int = Field(
        72, ge=1, description="how long commands and their results are kept; shorter than outcome.window_hours"
    )
    retention_events_hours: int = Field(-1, ge=-1, description="how long events are kept; -1 for ever")
    retention_dlq_hours: int = Field(30 * 24, ge=1, description="how long dead letters are kept")
    delivery_timeout_ms: int = Field(
        30_000, ge=1000, le=600_000, description="how long a message may wait for the broker before its sender is told"
    )


class StorageSettings(_Group):
    """Where records and transaction states live."""

    url: str = Field(
        "",
        description="the storage; empty means SQLite files in the data directory",
        repr=False,  # may hold a password
        json_schema_extra={"secret": True},
    )

    @field_serializer("url")
    def _url_carried(self, url: str, info: SerializationInfo) -> str:
        return url if _reveals(info) else without_secrets(url)


class CassandraSettings(_Group):
    """The Cassandra that profile stack starts (port, heap), or your own: what `storage.url` says goes before these."""

    port: Port = Field(0, description="port of the local Cassandra; 0 chooses a free one and keeps it")
    heap_mb: int = Field(1024, ge=512, le=65_536, description="heap of the local Cassandra, in MiB")
    contact_points: Listed = Field((), description="host[:port],… of some nodes, in place of storage.url")
    data_center: str = Field("", description="whose nodes are asked; that of the first contact point if unset")
    username: str = Field("", description="our name; none for a cluster that lets everybody in")
    password: Secret = Field(NO_SECRET, description="our password")
    password_file: File = Field(None, description="file of our password")
    encrypted: bool = Field(False, description="whether connections use TLS")
    tls: TlsSettings = TlsSettings()
    replication: dict[str, Annotated[int, Field(ge=1, le=9)]] = Field(
        default_factory=dict, description="copies in each data centre of the keyspaces that we make, as {dc1: 3}"
    )


class RaySettings(_Group):
    """The cluster that actors live on."""

    address: str = Field(
        "", description="host:port of your own Ray cluster, or auto on one of its nodes; empty starts one here"
    )
    token: Secret = Field(NO_SECRET, description="what everything that talks to Ray must present; empty for none")
    token_file: File = Field(None, description="file of that token")
    dashboard: bool = Field(True, description="whether a Ray that is started here has its dashboard")


# On two cores every further actor costs more than it brings: messages become more and smaller (measure with
# scripts/bench/orders.py). Inventory has one, since the categories of one order would otherwise wait for each other
# across actors; orders has two, so that routing among shards is exercised wherever the defaults run.
DEFAULT_SHARDS: Mapping[str, int] = {"orders": 2, "inventory": 1, "payment": 1, "shipping": 1}


def _with_default_shards(given: Any) -> Any:
    return {**DEFAULT_SHARDS, **given} if isinstance(given, Mapping) else given


class ActorSettings(_Group):
    """How keys are spread over actors."""

    buckets: int = Field(16, ge=1, le=65_536, description="buckets of each table; changes only by migration")
    shards: Annotated[dict[str, Annotated[int, Field(ge=1, le=1024)]], BeforeValidator(_with_default_shards)] = Field(
        default_factory=lambda: dict(DEFAULT_SHARDS),
        description="actors of each domain; those that are not named keep their default, others have one",
    )
    coordinators: int = Field(1, ge=1, le=1024, description="coordinator actors")

    def shards_of(self, domain: str) -> int:
        """How many actors the domain has."""
        return self.shards.get(domain, 1)


class RetrySettings(_Group):
    """What follows a conflict: tries with growing pauses, then the answer `conflict`."""

    tries: int = Field(10, ge=1, le=1000, description="tries of a command before it is refused with conflict")
    initial_ms: int = Field(100, ge=1, le=60_000, description="pause after the first conflict")
    max_ms: int = Field(10_000, ge=1, le=600_000, description="longest pause")
    factor: float = Field(2.0, ge=1.0, le=10.0, description="growth of the pause from try to try")
    jitter: float = Field(0.5, ge=0.0, le=1.0, description="part of each pause that is left to chance")


class BatchSettings(_Group):
    """How many commands cross a boundary at once."""

    max_commands: int = Field(256, ge=1, le=10_000, description="commands in a batch at most")
    max_wait_ms: int = Field(10, ge=0, le=10_000, description="how long a batch waits for more commands")


class OutcomeSettings(_Group):
    """How long a command's answer is kept."""

    window_hours: int = Field(
        168, ge=1, description="how long answers are kept; longer than kafka.retention_commands_hours"
    )


class RecoverySettings(_Group):
    """When a transaction counts as abandoned and who looks."""

    transaction_lifetime_ms: int = Field(
        15_000, ge=1000, le=600_000, description="age from which a transaction in doubt may be aborted by others"
    )
    sweep_interval_ms: int = Field(5_000, ge=100, le=600_000, description="pause between two looks for abandoned ones")


class TracingSettings(_Group):
    """Whether and where to spans are sent (OpenTelemetry, OTLP over HTTP); see `infra.tracing`."""

    endpoint: str = Field("", description="URL of an OTLP collector, such as http://127.0.0.1:4318; empty: no traces")
    sample_ratio: float = Field(
        1.0, ge=0.0, le=1.0, description="part of the traces that begin here that is recorded; others say it themselves"
    )
    headers: Secret = Field(NO_SECRET, description="what the collector asks for, as name=value,name=value")
    headers_file: File = Field(None, description="file of those headers")
    ca_file: File = Field(None, description="certificates to trust at the collector")
    export_every_ms: int = Field(1_000, ge=10, le=60_000, description="how often spans that have ended are sent")
    queue_spans: int = Field(
        8_192, ge=512, le=1_000_000, description="spans that may wait in a process while the collector is away"
    )


Mode = Literal["development", "production"]
Insecurity = Literal[
    "kafka_plaintext",
    "kafka_anonymous",
    "kafka_replication",
    "kafka_min_insync",
    "cassandra_plaintext",
    "cassandra_anonymous",
    "storage_replication",
    "periodic_commitlog",
    "open_ray",
]
"""What mode production refuses, by the name under which `allow_insecure` lets it pass; see `_PRODUCTION_RULES`."""


class Settings(_Group):
    """All settings. Made by `load_settings`; `model_dump_json(context=WITH_SECRETS)` and `model_validate_json` carry
    it between processes."""

    data_dir: Path = Field(Path(".concord"), description="directory of everything that the system keeps")
    profile: Literal["local", "stack", "cluster"] = Field("local", description="which servers the system runs on")
    mode: Mode = Field("development", description="production refuses what is open, in plain text or kept once")
    allow_insecure: Annotated[tuple[Insecurity, ...], NoDecode, BeforeValidator(_listed)] = Field(
        (), description="what mode production lets pass all the same, by name"
    )
    kafka: KafkaSettings = KafkaSettings()
    storage: StorageSettings = StorageSettings()
    cassandra: CassandraSettings = CassandraSettings()
    ray: RaySettings = RaySettings()
    actors: ActorSettings = ActorSettings()
    retry: RetrySettings = RetrySettings()
    batch: BatchSettings = BatchSettings()
    outcome: OutcomeSettings = OutcomeSettings()
    recovery: RecoverySettings = RecoverySettings()
    tracing: TracingSettings = TracingSettings()
    watchdog_seconds: int = Field(
        60, ge=5, le=3600, description="a worker whose loop makes no attempt for so long ends and is restarted"
    )
    http_host: str = Field("127.0.0.1", description="address that metrics and health listen on; 0.0.0.0 in a container")
    http_port: Port = Field(8180, description="port of metrics and health; 0 chooses a free one")
    dashboard_port: Port = Field(8265, description="port of the Ray dashboard; 0 chooses a free one")
    workers: int = Field(1, ge=0, le=256, description="stream worker processes; 0 where all of them run apart")
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], BeforeValidator(lambda v: v.lower() if isinstance(v, str) else v)
    ] = Field("info", description="least level that is logged")

    @property
    def storage_url(self) -> str:
        """The storage's address, with the default filled in. May hold a password: show `without_secrets` of it.

        Of profile stack without a port that was chosen beforehand it is one where nobody answers, until `located`.
        """
        if self.storage.url:
            return self.storage.url
        if self.cassandra.contact_points:
            return f"cassandra://{','.join(self.cassandra.contact_points)}/"
        if self.profile == "stack":
            return cassandra_url("127.0.0.1", self.cassandra.port)
        return f"sqlite://{quote(str(self.data_dir.absolute() / 'tables'))}"

    def refuses(self, insecurity: Insecurity) -> bool:
        """Whether the mode is production and this was not allowed."""
        return self.mode == "production" and insecurity not in self.allow_insecure

    def located(self, *, bootstrap_servers: str, storage_url: str) -> Settings:
        """The same settings with the addresses that the servers turned out to have."""
        kafka = self.kafka.model_copy(update={"bootstrap_servers": tuple(bootstrap_servers.split(","))})
        storage = self.storage.model_copy(update={"url": storage_url})
        return self.model_copy(update={"kafka": kafka, "storage": storage})


def cassandra_url(host: str, port: int) -> str:
    """The address of a Cassandra without credentials, as `storage.url` wants it."""
    return f"cassandra://{host}:{port}/"


@dataclass(frozen=True, slots=True)
class _Rule:
    """Something that must hold between settings: whether it does, which settings it is about, and what to say."""

    holds: Callable[[Settings], bool]
    about: tuple[str, ...]
    otherwise: Callable[[Settings], str]


_RULES: tuple[_Rule, ...] = (
    _Rule(
        lambda s: s.outcome.window_hours > s.kafka.retention_commands_hours,
        ("outcome.window_hours", "kafka.retention_commands_hours"),
        lambda s: (
            f"answers are kept for {s.outcome.window_hours} h and commands for {s.kafka.retention_commands_hours} h: "
            "a redelivered command might not find its answer and take effect again. Keep answers longer than commands"
        ),
    ),
    _Rule(
        lambda s: (
            s.actors.buckets % s.kafka.command_partitions == 0 or s.kafka.command_partitions % s.actors.buckets == 0
        ),
        ("actors.buckets", "kafka.command_partitions"),
        lambda s: (
            f"{s.actors.buckets} buckets and {s.kafka.command_partitions} partitions do not divide each other, so"
            "one bucket's commands would come from several partitions. Make one a multiple of the other"
        ),
    ),
    _Rule(
        lambda s: max(s.actors.shards.values(), default=1) <= s.actors.buckets,
        ("actors.shards", "actors.buckets"),
        lambda s: (
            f"a domain has {max(s.actors.shards.values())} shards for {s.actors.buckets} buckets, so some would "
            "own none. Use at most as many shards as buckets"
        ),
    ),
    _Rule(
        lambda s: s.retry.max_ms >= s.retry.initial_ms,
        ("retry.max_ms", "retry.initial_ms"),
        lambda s: (
            f"the longest pause ({s.retry.max_ms} ms) is shorter than the first ({s.retry.initial_ms} ms). "
            "Raise the one or lower the other"
        ),
    ),
    _Rule(
        lambda s: s.kafka.max_command_bytes + 64 * 1024 <= s.kafka.command_topic_max_bytes,
        ("kafka.max_command_bytes", "kafka.command_topic_max_bytes"),
        lambda s: (
            "a command topic must accept the largest command and 64 KiB of key and headers. "
            "Raise the topic's limit or lower the command's"
        ),
    ),
    _Rule(
        lambda s: s.kafka.command_topic_max_bytes + MEBIBYTE <= s.kafka.broker_max_bytes,
        ("kafka.command_topic_max_bytes", "kafka.broker_max_bytes"),
        lambda s: (
            "a dead letter carries the original message and up to 1 MiB of headers, so the broker's limit must "
            "exceed the command topic's by that much. Raise the one or lower the other"
        ),
    ),
    _Rule(
        lambda s: s.recovery.sweep_interval_ms <= s.recovery.transaction_lifetime_ms,
        ("recovery.sweep_interval_ms", "recovery.transaction_lifetime_ms"),
        lambda s: (
            "abandoned transactions would be looked for less often than they arise. "
            "Make the interval no longer than the lifetime"
        ),
    ),
    _Rule(
        lambda s: s.watchdog_seconds * 1000 > s.batch.max_wait_ms,
        ("watchdog_seconds", "batch.max_wait_ms"),
        lambda s: "a worker would be ended while it waits for a batch. Raise the watchdog's time or lower the wait",
    ),
    _Rule(
        lambda s: s.profile != "cluster" or bool(s.kafka.bootstrap_servers),
        ("kafka.bootstrap_servers", "profile"),
        lambda s: "profile cluster uses your own Kafka. Name it as host:port",
    ),
    _Rule(
        lambda s: s.profile != "cluster" or bool(s.storage.url or s.cassandra.contact_points),
        ("storage.url", "profile"),
        lambda s: "profile cluster uses your own storage. Name it, here or as cassandra.contact_points",
    ),
    _Rule(
        lambda s: not (s.storage.url and s.cassandra.contact_points),
        ("storage.url", "cassandra.contact_points"),
        lambda s: "both say where the records are. Set one of them",
    ),
    _Rule(
        lambda s: s.profile == "cluster" or s.kafka.security_protocol == "PLAINTEXT",
        ("kafka.security_protocol", "profile"),
        lambda s: f"profile {s.profile} starts a Kafka of its own, for this machine alone. Use profile cluster",
    ),
    _Rule(
        lambda s: s.profile == "cluster" or not s.ray.address,
        ("ray.address", "profile"),
        lambda s: f"profile {s.profile} starts a Ray of its own. Leave the address unset, or use profile cluster",
    ),
    _Rule(
        lambda s: _uses_tls(s) or not s.kafka.tls.is_set,
        ("kafka.tls", "kafka.security_protocol"),
        lambda s: f"protocol {s.kafka.security_protocol} has no TLS. Use SSL or SASL_SSL, or leave kafka.tls unset",
    ),
    _Rule(
        lambda s: _uses_sasl(s) or not s.kafka.sasl.is_set,
        ("kafka.sasl", "kafka.security_protocol"),
        lambda s: (
            f"protocol {s.kafka.security_protocol} asks for no credentials. "
            "Use SASL_SSL or SASL_PLAINTEXT, or leave kafka.sasl unset"
        ),
    ),
    _Rule(
        lambda s: not _uses_sasl(s) or s.kafka.sasl.mechanism == "OAUTHBEARER" or _has_password(s),
        ("kafka.sasl.username", "kafka.sasl.password_file"),
        lambda s: (
            f"{s.kafka.sasl.mechanism} needs a name and a password. Set both; "
            "the password as kafka.sasl.password or in a file"
        ),
    ),
    _Rule(
        lambda s: not _uses_sasl(s) or s.kafka.sasl.mechanism != "OAUTHBEARER" or _has_client(s),
        ("kafka.sasl.token_endpoint", "kafka.sasl.client_id", "kafka.sasl.client_secret_file"),
        lambda s: "OAUTHBEARER needs an http or https URL that gives tokens, and a client's name and secret. Set them",
    ),
    _Rule(
        lambda s: s.cassandra.encrypted or not s.cassandra.tls.is_set,
        ("cassandra.tls", "cassandra.encrypted"),
        lambda s: "without TLS nothing of cassandra.tls would be used. Set cassandra.encrypted, or leave it unset",
    ),
    _Rule(
        lambda s: bool(s.cassandra.username) == bool(s.cassandra.password_file or s.cassandra.password),
        ("cassandra.username", "cassandra.password_file"),
        lambda s: "a name and a password belong together. Set both, or neither",
    ),
    _Rule(
        lambda s: not (s.cassandra.replication and "replication_factor" in _parameters(s)),
        ("cassandra.replication", "storage.url"),
        lambda s: "both say how many copies a new keyspace has. Set one of them",
    ),
    *(
        _Rule(
            lambda s, tls=tls: bool(tls(s).certificate_file) == bool(tls(s).key_file),  # type: ignore[misc]
            (f"{group}.tls.certificate_file", f"{group}.tls.key_file"),
            lambda s: "a certificate and its key belong together. Set both, or neither",
        )
        for group, tls in (("kafka", lambda s: s.kafka.tls), ("cassandra", lambda s: s.cassandra.tls))
    ),
    _Rule(
        lambda s: s.kafka.min_insync_replicas <= s.kafka.replication,
        ("kafka.min_insync_replicas", "kafka.replication"),
        lambda s: (
            f"{s.kafka.min_insync_replicas} of {s.kafka.replication} replicas cannot have a message, so that none "
            "would ever count as stored. Use at most as many as there are"
        ),
    ),
    _Rule(
        lambda s: s.profile != "stack" or not (s.storage.url or s.cassandra.contact_points),
        ("storage.url", "cassandra.contact_points", "profile"),
        lambda s: "profile stack starts a Cassandra of its own. Leave the address unset, or use profile cluster",
    ),
    _Rule(
        lambda s: s.profile == "cluster" or not s.kafka.bootstrap_servers,
        ("kafka.bootstrap_servers", "profile"),
        lambda s: f"profile {s.profile} starts a Kafka of its own. Leave the address unset, or use profile cluster",
    ),
    _Rule(
        lambda s: s.profile == "cluster" or s.kafka.replication == 1,
        ("kafka.replication", "profile"),
        lambda s: f"profile {s.profile} has one Kafka node. Use 1, or profile cluster",
    ),
    _Rule(
        lambda s: not s.tracing.endpoint or _is_plain_url(s.tracing.endpoint),
        ("tracing.endpoint",),
        lambda s: (
            "spans are sent to an http or https URL with a host, without credentials (those are tracing.headers) "
            "and without a query. Write it like http://127.0.0.1:4318"
        ),
    ),
    _Rule(
        lambda s: bool(s.tracing.endpoint) or not (s.tracing.headers or s.tracing.headers_file or s.tracing.ca_file),
        ("tracing.endpoint", "tracing.headers_file"),
        lambda s: "without an endpoint nothing is sent anywhere. Set it, or leave the rest of tracing unset",
    ),
    _Rule(
        lambda s: (
            not (s.tracing.headers or s.tracing.headers_file)
            or s.tracing.endpoint.startswith("https://")
            or urlsplit(s.tracing.endpoint).hostname in ("localhost", "127.0.0.1", "::1")
        ),
        ("tracing.headers_file", "tracing.endpoint"),
        lambda s: "the headers would cross the network in plain text. Use https",
    ),
    _Rule(
        lambda s: _distinct(
            s.kafka.port, s.cassandra.port if s.profile == "stack" else 0, s.http_port, s.dashboard_port
        ),
        ("kafka.port", "cassandra.port", "http_port", "dashboard_port"),
        lambda s: "two servers cannot share a port. Choose different ones, or 0 for free ones",
    ),
)


_PRODUCTION_RULES: Mapping[Insecurity, _Rule] = {
    "kafka_plaintext": _Rule(
        lambda s: _uses_tls(s),
        ("kafka.security_protocol",),
        lambda s: "whoever is on the network between reads and changes every command. Use SASL_SSL or SSL",
    ),
    "kafka_anonymous": _Rule(
        lambda s: _uses_sasl(s) or s.kafka.tls.certificate_file is not None,
        ("kafka.security_protocol", "kafka.tls.certificate_file"),
        lambda s: "Kafka would take commands from anybody. Use SASL_SSL, or a certificate of our own",
    ),
    "kafka_replication": _Rule(
        lambda s: s.kafka.replication >= 3,
        ("kafka.replication",),
        lambda s: f"with {s.kafka.replication} replicas one broken disk can lose commands. Use at least 3",
    ),
    "kafka_min_insync": _Rule(
        lambda s: s.kafka.min_insync_replicas >= 2,
        ("kafka.min_insync_replicas",),
        lambda s: "a message that one broker has counts as stored, and is lost with it. Use at least 2",
    ),
    "cassandra_plaintext": _Rule(
        lambda s: not _is_cassandra(s) or s.cassandra.encrypted or "ssl_ca" in _parameters(s),
        ("cassandra.encrypted",),
        lambda s: "whoever is on the network between reads and changes every record. Set it to true",
    ),
    "cassandra_anonymous": _Rule(
        lambda s: not _is_cassandra(s) or bool(s.cassandra.username) or "username" in _parameters(s),
        ("cassandra.username", "cassandra.password_file"),
        lambda s: "a cluster that asks for no credentials (AllowAllAuthenticator) lets anybody in. Set both",
    ),
    "storage_replication": _Rule(
        lambda s: not _keeps_few_copies(s),
        ("cassandra.replication", "storage.url"),
        lambda s: 'fewer than 3 copies of a record do not survive two failures. Use Cassandra with {"NAME": 3} or more',
    ),
    "open_ray": _Rule(
        lambda s: bool(s.ray.token_file or s.ray.token),
        ("ray.token_file",),
        lambda s: "without a token Ray and its dashboard run the programs of anybody who reaches them. Set it",
    ),
}
"""What mode production refuses before anything starts, unless `allow_insecure` has its name.

`periodic_commitlog` and the authenticator behind `cassandra_anonymous` show only when Cassandra is there: whoever
connects looks (`infra.storage.cassandra_session`).
"""


def _is_plain_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return bool(
            parts.scheme in ("http", "https")
            and parts.hostname
            and parts.port != 0
            and "@" not in parts.netloc
            and not parts.query
            and not parts.fragment
        )
    except ValueError:
        return False


def _distinct(*ports: int) -> bool:
    fixed = [port for port in ports if port]
    return len(fixed) == len(set(fixed))


def _uses_tls(settings: Settings) -> bool:
    return settings.kafka.security_protocol in ("SSL", "SASL_SSL")


def _uses_sasl(settings: Settings) -> bool:
    return settings.kafka.security_protocol in ("SASL_PLAINTEXT", "SASL_SSL")


def _has_password(settings: Settings) -> bool:
    sasl = settings.kafka.sasl
    return bool(sasl.username and (sasl.password_file or sasl.password))


def _has_client(settings: Settings) -> bool:
    sasl = settings.kafka.sasl
    has_url = sasl.token_endpoint.startswith(("http://", "https://"))
    return bool(has_url and sasl.client_id and (sasl.client_secret_file or sasl.client_secret))


def _is_cassandra(settings: Settings) -> bool:
    return settings.storage_url.startswith("cassandra:")


def _parameters(settings: Settings) -> Mapping[str, str]:
    return dict(parse_qsl(settings.storage_url.partition("?")[2], keep_blank_values=True))


def _keeps_few_copies(settings: Settings) -> bool:
    """As far as the settings say. What is neither Cassandra nor on this machine keeps its own."""
    if _is_cassandra(settings):
        in_url = _parameters(settings).get("replication_factor", "0")
        return min(settings.cassandra.replication.values(), default=int(in_url) if in_url.isdecimal() else 0) < 3
    return settings.storage_url.startswith(("sqlite:", "memory:"))


class _Sources(Settings, BaseSettings):
    """Gathers what options, environment and file say. Never leaves this module, since it reads on construction."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter=_NESTING,
        env_ignore_empty=True,
        frozen=True,
        extra="forbid",
        validate_default=True,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # The options and the file arrive merged by `load_settings`, which knows the file only after the first two.
        return (init_settings,)


def load_settings(*, environment: Mapping[str, str] | None = None, **options: Any) -> Settings:
    """The settings from options, environment, `concord.toml` and defaults, checked.

    An option is named as its setting; one in a group as `group__name` or as a mapping (`kafka={"port": 9092}`).
    None means that the option was not given. Raises ConfigurationError.
    """
    environment = dict(os.environ if environment is None else environment)
    given = _nested({name: value for name, value in options.items() if value is not None})
    problems = list(_misspelt(environment))
    try:
        from_environment = _EnvironmentReader(environment)()
    except SettingsError as error:
        raise ConfigurationError([*problems, _unreadable(error, environment)]) from error
    data_dir = Path(
        given.get("data_dir") or from_environment.get("data_dir") or Settings.model_fields["data_dir"].default
    )
    file = data_dir / CONFIG_FILE
    origin = _Origin(options=given, environment=environment, file_path=file, file=_read_file(file))
    merged = _merged(origin.file, _merged(from_environment, given))
    if "data_dir" in origin.file:
        problems.append(f"data_dir in {file} cannot name another directory: it is found through it. Remove it there.")
    # Processes of the system run in other directories, and must mean the same one.
    merged["data_dir"] = data_dir.expanduser().absolute()
    try:
        settings = Settings.model_validate(merged)
    except ValidationError as error:
        problems += [_sentence(item, origin) for item in error.errors()]
        raise ConfigurationError(problems) from None  # pydantic's text would show values, secret ones too
    problems += [_broken(rule, settings, origin) for rule in _RULES if not rule.holds(settings)]
    problems += [
        f"{_broken(rule, settings, origin)} Mode production refuses that; CONCORD_ALLOW_INSECURE={name} lets it pass."
        for name, rule in _PRODUCTION_RULES.items()
        if settings.refuses(name) and not rule.holds(settings)
    ]
    problems += _unusable_files(settings, origin)
    if problems:
        raise ConfigurationError(problems)
    return settings


def _broken(rule: _Rule, settings: Settings, origin: _Origin) -> str:
    return f"{' and '.join(origin.name(setting) for setting in rule.about)}: {rule.otherwise(settings)}."


def _unusable_files(settings: Settings, origin: _Origin) -> Iterator[str]:
    """Files that settings name and that cannot be read; secrets that are given twice."""
    for path, group, name in _files(settings, ()):
        file: Path | None = getattr(group, name)
        if file is None:
            continue
        setting = ".".join((*path, name))
        secret = name.removesuffix("_file")
        if getattr(group, secret, None):
            twin = ".".join((*path, secret))
            yield f"{origin.name(setting)} and {origin.name(twin)}: the same secret is given twice. Keep one of them."
        try:
            with file.open("rb") as opened:
                opened.read(1)
        except OSError as error:
            yield f"{origin.name(setting)}: {file} cannot be read ({error.strerror}). Name one that this user can read."


def _files(group: BaseModel, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], BaseModel, str]]:
    for name in type(group).model_fields:
        value = getattr(group, name)
        if isinstance(value, BaseModel):
            yield from _files(value, (*path, name))
        elif name.endswith("_file"):
            yield path, group, name


@dataclass(frozen=True, slots=True)
class SettingLine:
    """One setting for people: `value` is masked where it may hold a secret."""

    name: str
    variable: str
    value: str
    default: str
    description: str


def describe_settings(settings: Settings) -> list[SettingLine]:
    """Every setting with its value, for `concord doctor` and for documentation."""
    return list(_describe(settings, ()))


def _describe(group: BaseModel, path: tuple[str, ...]) -> Iterator[SettingLine]:
    for name, field in type(group).model_fields.items():
        value = getattr(group, name)
        if isinstance(value, BaseModel):
            yield from _describe(value, (*path, name))
            continue
        declared_secret = isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("secret")
        secret = (declared_secret or isinstance(value, SecretStr)) and value
        yield SettingLine(
            name=".".join((*path, name)),
            variable=_variable((*path, name)),
            value="(set)" if secret else _shown(value),
            default=_shown(field.get_default(call_default_factory=True)),
            description=field.description or "",
        )


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


# Where a value came from.


@dataclass(frozen=True, slots=True)
class _Origin:
    options: Mapping[str, Any]
    environment: Mapping[str, str]
    file_path: Path
    file: Mapping[str, Any]

    def name(self, setting: str) -> str:
        """The setting as whoever set it wrote it; the environment variable to use when nobody did."""
        path = tuple(setting.split("."))
        if _has(self.options, path):
            return OPTION_NAMES.get(setting, setting)
        if (variable := self._variable_in_use(path)) is not None:
            return variable
        if _has(self.file, path):
            return f"{setting} in {self.file_path}"
        return _variable(path)

    def _variable_in_use(self, path: tuple[str, ...]) -> str | None:
        present = {name.upper(): name for name in self.environment}
        for length in range(len(path), 0, -1):  # a whole group may have been given as JSON
            if (name := present.get(_variable(path[:length]))) is not None:
                return name
        return None


def _variable(path: tuple[str, ...]) -> str:
    return ENV_PREFIX + _NESTING.join(path).upper()


def _has(values: Mapping[str, Any], path: tuple[str, ...]) -> bool:
    for name in path:
        if not isinstance(values, Mapping) or name not in values:
            return False
        values = values[name]
    return True


class _EnvironmentReader(EnvSettingsSource):
    """pydantic-settings' reader of the environment, given the environment to read."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = {name.lower(): value for name, value in environment.items()}
        super().__init__(_Sources)

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return {name: value for name, value in self._environment.items() if value != ""}


def _misspelt(environment: Mapping[str, str]) -> Iterator[str]:
    """Variables that look like a setting of ours and are none; others with our prefix are somebody else's business."""
    known = [line.variable for line in describe_settings(Settings())]
    groups = {name for name in known if _NESTING in name}
    for name in environment:
        upper = name.upper()
        if not upper.startswith(ENV_PREFIX) or upper in known:
            continue
        if any(group.startswith(upper + _NESTING) for group in groups) or upper.startswith(
            tuple(f"{ENV_PREFIX}{group.upper()}{_NESTING}" for group in Settings.model_fields)
        ):
            continue  # a whole group, or a name within one: the models judge it
        close = difflib.get_close_matches(upper, known, n=1, cutoff=0.85)
        if close:
            yield f"{name} is no setting. Did you mean {close[0]}?"


def _unreadable(error: SettingsError, environment: Mapping[str, str]) -> str:
    """pydantic-settings names only the group whose JSON it could not read; find the variable itself."""
    for name, value in environment.items():
        group = name.upper().removeprefix(ENV_PREFIX).lower().split(_NESTING)[0]
        if name.upper().startswith(ENV_PREFIX) and f'"{group}"' in str(error) and not _is_json(value):
            return f"{name} must be a JSON object. Correct it, or set its parts one by one as {name}{_NESTING}NAME."
    return f"The environment cannot be read: {error}. Check the variables that begin with {ENV_PREFIX}."


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return not text.lstrip().startswith(("{", "["))
    return True


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError([f"{path} cannot be read: {error}. Make it a readable UTF-8 file."]) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError([f"{path} is not TOML: {error}. Correct it or remove it."]) from error


def _nested(options: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in options.items():
        *groups, last = name.split(_NESTING)
        leaf: Any = {last: value}
        for group in reversed(groups):
            leaf = {group: leaf}
        nested = _merged(nested, leaf)
    return nested


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` wins; groups are merged."""
    merged = dict(below)
    for name, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merged(merged[name], value) if both else value
    return merged


def _sentence(item: Any, origin: _Origin) -> str:
    """One of pydantic's errors for people; never shows the value, which may be a secret."""
    path = tuple(part for part in item["loc"] if isinstance(part, str))  # without the places in a list
    name = origin.name(".".join(path))
    context = item.get("ctx", {})
    match item["type"]:
        case "extra_forbidden":
            known = [line.name for line in describe_settings(Settings())]
            close = difflib.get_close_matches(".".join(path), known, n=1, cutoff=0.6)
            if not close:
                return f"{name} is no setting. Remove it."
            meant = _variable(tuple(close[0].split("."))) if name.upper().startswith(ENV_PREFIX) else close[0]
            return f"{name} is no setting. Did you mean {meant}?"
        case "greater_than_equal":
            return f"{name} must be at least {context['ge']}."
        case "less_than_equal":
            return f"{name} must be at most {context['le']}."
        case "literal_error":
            return f"{name} must be one of {context['expected']}."
        case "int_parsing" | "int_type" | "int_from_float":
            return f"{name} must be a whole number."
        case "float_parsing" | "float_type":
            return f"{name} must be a number."
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"{name} must be a group of settings. Set its parts one by one."
        case _:
            return f"{name} cannot be used: {item['msg']}."
