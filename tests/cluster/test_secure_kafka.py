"""A real Kafka with SASL and TLS: every client of ours gets in with the right credentials, and says why not without."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from secure_servers import CLIENT_SECRET, PASSWORD, USER, Authority, SecureKafka

from infra.messaging.connection import KafkaConnection, Mechanism, Sasl, Tls, TokenError, TokenProvider
from infra.messaging.errors import (
    BrokerUnavailableError,
    MessagingError,
    NotAuthenticatedError,
    UntrustedBrokerError,
)
from infra.messaging.producer import EventProducer
from infra.messaging.reader import cluster_id, committed_offsets, read_all
from infra.messaging.topics import TopicSpec, describe_topics, ensure_topics
from scripts.cli.client import CommandClient
from streams.kafka_transport import credentials
from tests.flow.flow_world import flow_world

MECHANISMS: tuple[Mechanism, ...] = get_args(Mechanism)


async def round_trip(kafka: KafkaConnection) -> list[bytes | None]:
    """Create a topic, publish to it, read it: what was read."""
    topic = f"secure.{uuid.uuid4().hex[:12]}"
    await ensure_topics(kafka, [TopicSpec(topic, 1, configs={"min.insync.replicas": "1"})])
    assert (await describe_topics(kafka, [TopicSpec(topic, 1)]))[0].drift == ()
    producer = EventProducer(kafka)
    await producer.start()
    try:
        await producer.send_and_wait(topic, b"key", b"value")
    finally:
        await producer.stop()
    async with aclosing(read_all(kafka, [topic])) as records:  # type: ignore[type-var]
        return [record.value async for record in records]


async def topics(kafka: KafkaConnection) -> Any:
    return await ensure_topics(kafka, [TopicSpec("never", 1)])


async def publisher(kafka: KafkaConnection) -> Any:
    producer = EventProducer(kafka, delivery_timeout_ms=10_000)
    try:
        await producer.start()
    finally:
        await producer.stop()


async def client(kafka: KafkaConnection) -> Any:
    async with CommandClient(lambda: kafka, ["orders"]):
        pass


async def offsets(kafka: KafkaConnection) -> Any:
    return await committed_offsets(kafka, "concord")


CLIENTS: tuple[Callable[[KafkaConnection], Awaitable[Any]], ...] = (topics, publisher, client, offsets)
"""Every way in which our programs begin to talk to Kafka; a stream worker begins with `cluster_id`."""


@pytest.mark.parametrize("mechanism", MECHANISMS)
async def test_commands_cross_whatever_the_mechanism(secure_kafka: SecureKafka, mechanism: Mechanism) -> None:
    assert await round_trip(secure_kafka.connection(mechanism)) == [b"value"]


async def test_credentials_are_taken_without_encryption_where_that_is_meant(secure_kafka: SecureKafka) -> None:
    kafka = replace(
        secure_kafka.connection(),
        bootstrap_servers=secure_kafka.address_of("OPEN"),
        security_protocol="SASL_PLAINTEXT",
    )

    assert await round_trip(kafka) == [b"value"]


def certified(kafka: SecureKafka, *, password: str = "planted-key") -> KafkaConnection:
    certificate, key = kafka.authority.issue("client", password="planted-key")
    tls = Tls(kafka.authority.ca_file, certificate, key, lambda: password)
    return KafkaConnection(kafka.address_of("CERTIFIED"), "SSL", tls=tls)


async def test_a_certificate_of_our_own_is_enough(secure_kafka: SecureKafka) -> None:
    assert await round_trip(certified(secure_kafka)) == [b"value"]


async def test_without_a_certificate_of_our_own_where_it_is_asked_for_nobody_gets_in(secure_kafka: SecureKafka) -> None:
    kafka = replace(certified(secure_kafka), tls=Tls(secure_kafka.authority.ca_file))

    with pytest.raises(BrokerUnavailableError):
        await cluster_id(kafka)


async def test_a_key_that_does_not_open_is_named(secure_kafka: SecureKafka) -> None:
    with pytest.raises(MessagingError, match=r"client\.key are no certificate and its key"):
        await cluster_id(certified(secure_kafka, password=""))


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-512", "OAUTHBEARER", "SSL"])
async def test_a_stream_worker_works_on_a_protected_kafka(
    secure_kafka: SecureKafka, tmp_path: Path, mechanism: Any
) -> None:
    kafka = certified(secure_kafka) if mechanism == "SSL" else secure_kafka.connection(mechanism)
    async with flow_world(kafka, tmp_path) as world:  # type: ignore[arg-type]
        await world.send([(f"c{number}", b"key-%d" % number, b"{}") for number in range(20)])

        worker = await world.start_local()
        await world.wait_for_acknowledged(20)

        assert sorted(await world.result_ids()) == sorted(f"c{number}" for number in range(20))
        assert worker.ends == []


async def test_a_stream_worker_with_a_wrong_password_says_so_and_ends(
    secure_kafka: SecureKafka, tmp_path: Path
) -> None:
    async with flow_world(secure_kafka.connection(), tmp_path) as world:  # type: ignore[arg-type]
        world.bootstrap_servers = secure_kafka.connection(password="planted-wrong")  # type: ignore[assignment]
        worker = await world.start_local()
        world.local.clear()

        with pytest.raises(NotAuthenticatedError):
            await worker.run


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
async def test_a_wrong_password_is_told_as_such(secure_kafka: SecureKafka, mechanism: Mechanism) -> None:
    with pytest.raises(NotAuthenticatedError, match="does not accept our credentials") as caught:
        await cluster_id(secure_kafka.connection(mechanism, password="planted-wrong"))

    assert "CONCORD_KAFKA__SASL__" in str(caught.value)
    assert "planted" not in repr(caught.value)


@pytest.mark.parametrize("begin", CLIENTS, ids=lambda begin: begin.__name__)
async def test_every_client_tells_a_wrong_password_and_an_untrusted_certificate(
    secure_kafka: SecureKafka, tmp_path: Path, begin: Callable[[KafkaConnection], Awaitable[Any]]
) -> None:
    stranger = Authority(tmp_path, "stranger").begin()
    untrusted = replace(secure_kafka.connection(), tls=Tls(stranger.ca_file))

    with pytest.raises(NotAuthenticatedError):
        await begin(secure_kafka.connection(password="planted-wrong"))
    with pytest.raises(UntrustedBrokerError, match="CONCORD_KAFKA__TLS__CA_FILE"):
        await begin(untrusted)


async def test_a_certificate_for_another_name_is_not_trusted_unless_names_do_not_matter(
    secure_kafka: SecureKafka,
) -> None:
    right = secure_kafka.connection()
    elsewhere = replace(right, bootstrap_servers=right.bootstrap_servers.replace("127.0.0.1", "localhost"))

    with pytest.raises(UntrustedBrokerError, match="localhost"):
        await cluster_id(elsewhere)
    assert await cluster_id(replace(elsewhere, tls=replace(right.tls, check_hostname=False)))


async def test_a_client_without_encryption_does_not_hang_on_an_encrypted_listener(secure_kafka: SecureKafka) -> None:
    async with asyncio.timeout(20):
        with pytest.raises(BrokerUnavailableError):
            await cluster_id(secure_kafka.address_of("SECURE"))


async def test_a_refused_token_request_is_told_without_what_was_sent(secure_kafka: SecureKafka) -> None:
    right = secure_kafka.connection("OAUTHBEARER")
    assert right.sasl is not None
    wrong = replace(right, sasl=replace(right.sasl, client_secret=lambda: "planted-wrong"))

    with pytest.raises(NotAuthenticatedError, match=r"HTTP 401 \(invalid_client\)") as caught:
        await cluster_id(wrong)

    assert "planted" not in repr(caught.value)


async def test_a_token_is_asked_for_by_client_credentials_and_kept_until_shortly_before_it_expires(
    secure_kafka: SecureKafka,
) -> None:
    right = secure_kafka.connection("OAUTHBEARER").sasl
    assert right is not None
    now_s = 0.0
    provider = TokenProvider(replace(right, scope="read"), now_s=lambda: now_s)
    asked_before = len(secure_kafka.endpoint.asked)

    first = await provider.token()
    now_s = 269.0
    assert await provider.token() == first
    now_s = 270.0
    await provider.token()

    asked = secure_kafka.endpoint.asked[asked_before:]
    assert len(asked) == 2
    assert asked[0] == {
        "grant_type": "client_credentials",
        "client_id": USER,
        "client_secret": CLIENT_SECRET,
        "scope": "read",
    }


async def test_an_endpoint_that_is_away_or_not_trusted_gives_no_token(
    secure_kafka: SecureKafka, tmp_path: Path
) -> None:
    right = secure_kafka.connection("OAUTHBEARER").sasl
    assert right is not None
    stranger = Authority(tmp_path, "stranger").begin()

    with pytest.raises(TokenError, match="Connection refused"):
        await TokenProvider(replace(right, token_endpoint="https://127.0.0.1:1/token")).token()
    with pytest.raises(TokenError, match=r"self-signed|unable to get local issuer"):
        await TokenProvider(replace(right, token_endpoint_ca_file=stranger.ca_file)).token()


async def test_a_password_that_was_exchanged_is_used_by_the_next_client(secure_kafka: SecureKafka) -> None:
    held = ["planted-old"]
    right = secure_kafka.connection()
    assert right.sasl is not None
    kafka = replace(right, sasl=replace(right.sasl, password=lambda: held[0]))

    with pytest.raises(NotAuthenticatedError):
        await cluster_id(kafka)
    held[0] = PASSWORD
    assert await cluster_id(kafka)


def test_a_connection_shows_no_secret_and_knows_itself_again() -> None:
    def connection() -> KafkaConnection:
        sasl = Sasl("PLAIN", USER, lambda: PASSWORD, client_secret=lambda: CLIENT_SECRET)
        return KafkaConnection("k:9092", "SASL_PLAINTEXT", sasl=sasl)

    assert "planted" not in repr(connection())
    assert connection() == connection()
    assert "planted" not in repr(credentials(connection()))


def test_an_address_alone_is_a_kafka_without_protection() -> None:
    assert KafkaConnection.of("k:9092").client_options() == {
        "bootstrap_servers": "k:9092",
        "security_protocol": "PLAINTEXT",
        "ssl_context": None,
    }
    assert credentials(KafkaConnection("k:9092")) is None
