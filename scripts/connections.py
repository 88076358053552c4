"""How settings become connections to Kafka and to the storage, in one place for every process.

Secrets stay where they are until a client is made: what is handed on here is a question for them.
"""

from __future__ import annotations

from functools import partial

from infra.config import Insecurity, Settings, secret_of
from infra.messaging.connection import KafkaConnection, Sasl, Tls
from infra.storage.connect import CassandraAccess, StorageAddress, connect
from infra.storage.port import Storage


def kafka_connection(settings: Settings, bootstrap_servers: str = "") -> KafkaConnection:
    """How Kafka is reached: at the addresses in the settings, or at those where it turned out to be."""
    kafka = settings.kafka
    tls, sasl = kafka.tls, kafka.sasl
    asks_who_we_are = kafka.security_protocol.startswith("SASL_")
    return KafkaConnection(
        bootstrap_servers or ",".join(kafka.bootstrap_servers),
        security_protocol=kafka.security_protocol,
        tls=Tls(
            ca_file=tls.ca_file,
            certificate_file=tls.certificate_file,
            key_file=tls.key_file,
            key_password=partial(secret_of, tls, "key_password"),
            check_hostname=tls.check_hostname,
        ),
        sasl=Sasl(
            mechanism=sasl.mechanism,
            username=sasl.username,
            password=partial(secret_of, sasl, "password"),
            token_endpoint=sasl.token_endpoint,
            client_id=sasl.client_id,
            client_secret=partial(secret_of, sasl, "client_secret"),
            scope=sasl.scope,
            token_endpoint_ca_file=sasl.token_endpoint_ca_file,
        )
        if asks_who_we_are
        else None,
    )


def storage_address(settings: Settings) -> StorageAddress:
    """Where records are, and how any Cassandra there is spoken to. Crosses to other processes as pickle."""
    cassandra = settings.cassandra
    tls = cassandra.tls
    lets_pass: Insecurity = "periodic_commitlog"
    return StorageAddress(
        settings.storage_url,
        CassandraAccess(
            data_center=cassandra.data_center,
            username=cassandra.username,
            password=partial(secret_of, cassandra, "password"),
            encrypted=cassandra.encrypted,
            ca_file=tls.ca_file,
            certificate_file=tls.certificate_file,
            key_file=tls.key_file,
            key_password=partial(secret_of, tls, "key_password"),
            check_hostname=tls.check_hostname,
            replication=dict(cassandra.replication),
            only_authenticated=settings.refuses("cassandra_anonymous"),
            allow_periodic=lets_pass in settings.allow_insecure,
        ),
    )


def ray_environment(settings: Settings) -> dict[str, str]:
    """What Ray must find in its environment to present the token of the settings, and to ask for it."""
    if settings.ray.token_file is not None:
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(settings.ray.token_file)}
    token = secret_of(settings.ray, "token")
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {}


def open_storage(settings: Settings) -> Storage:
    """The storage of the settings; nothing is opened yet. Raises InvalidOperationError and ConfigurationError."""
    return connect(storage_address(settings))
