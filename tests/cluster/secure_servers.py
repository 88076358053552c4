"""A Kafka and a Cassandra that ask who one is and encrypt everything, as a cluster's do; certificates; tokens."""

from __future__ import annotations

import asyncio
import base64
import datetime
import http.server
import ipaddress
import json
import ssl
import threading
import time
import urllib.parse
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cassandra.auth import PlainTextAuthProvider
from cassandra.cluster import Cluster
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from infra.messaging.connection import KafkaConnection, Mechanism, Sasl, Tls
from infra.servers.cassandra import LocalCassandra
from infra.servers.kafka import LocalKafka
from infra.storage.connect import CassandraAccess

USER = "concord"
PASSWORD = "planted-password"
CLIENT_SECRET = "planted-client-secret"
KEY_PASSWORD = "planted-key-password"
AUDIENCE = "concord-tests"


# Certificates


@dataclass(frozen=True)
class Authority:
    """A certificate authority, and the certificates that it has signed, in one folder."""

    folder: Path
    name: str
    key: rsa.RSAPrivateKey = field(default_factory=lambda: rsa.generate_private_key(65_537, 2048))

    @property
    def ca_file(self) -> Path:
        return self.folder / f"{self.name}.ca.pem"

    def begin(self) -> Authority:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.ca_file.write_bytes(_pem(self._certificate(self.key, self.name, ca=True)))
        return self

    def issue(self, name: str, *, hosts: Sequence[str] = (), password: str = "") -> tuple[Path, Path]:
        """A certificate for `name`, good for `hosts`, and its key: two files."""
        key = rsa.generate_private_key(65_537, 2048)
        certificate, key_file = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        certificate.write_bytes(_pem(self._certificate(key, name, hosts=hosts)))
        locked = serialization.BestAvailableEncryption(password.encode()) if password else serialization.NoEncryption()
        key_file.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked))
        return certificate, key_file

    def _certificate(
        self, key: rsa.RSAPrivateKey, name: str, *, ca: bool = False, hosts: Sequence[str] = ()
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(_named(name))
            .issuer_name(_named(self.name))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )
        if not ca:
            usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        if hosts:
            builder = builder.add_extension(x509.SubjectAlternativeName(list(map(_host, hosts))), critical=False)
        return builder.sign(self.key, hashes.SHA256())


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


# Tokens


class TokenEndpoint:
    """Gives signed tokens (RS256) to the one client whose secret is right, over TLS."""

    def __init__(self, authority: Authority) -> None:
        self._key = rsa.generate_private_key(65_537, 2048)
        self.asked: list[Mapping[str, str]] = []
        certificate, key_file = authority.issue("token-endpoint", hosts=["127.0.0.1"])
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key_file)
        endpoint = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                form = dict(urllib.parse.parse_qsl(self.rfile.read(int(self.headers["Content-Length"])).decode()))
                endpoint.asked.append(form)
                right = form.get("client_secret") == CLIENT_SECRET and form.get("grant_type") == "client_credentials"
                status, answer = (200, endpoint.grant()) if right else (401, {"error": "invalid_client", "sent": form})
                body = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"https://127.0.0.1:{self._server.server_address[1]}/token"

    def grant(self, *, lifetime_s: int = 300) -> dict[str, Any]:
        now_s = int(time.time())
        claims = {"sub": USER, "aud": AUDIENCE, "iss": "tests", "iat": now_s, "exp": now_s + lifetime_s, "scope": "x"}
        head = _encoded({"alg": "RS256", "typ": "JWT", "kid": "one"}) + "." + _encoded(claims)
        signature = self._key.sign(head.encode(), padding.PKCS1v15(), hashes.SHA256())
        return {"access_token": f"{head}.{_base64(signature)}", "token_type": "Bearer", "expires_in": lifetime_s}

    def jwks(self) -> str:
        """The public key, by which Kafka knows our tokens."""
        numbers = self._key.public_key().public_numbers()
        key = {"kty": "RSA", "kid": "one", "use": "sig", "alg": "RS256"}
        return json.dumps({"keys": [{**key, "n": _number(numbers.n), "e": _number(numbers.e)}]})

    @contextmanager
    def serving(self) -> Iterator[TokenEndpoint]:
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()


def _encoded(value: Mapping[str, Any]) -> str:
    return _base64(json.dumps(value).encode())


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _number(value: int) -> str:
    return _base64(value.to_bytes((value.bit_length() + 7) // 8, "big"))


# Kafka


class SecureKafka(LocalKafka):
    """A Kafka with three more listeners: SASL over TLS, SASL in plain text, and TLS with client certificates."""

    def __init__(self, directory: Path, authority: Authority, endpoint: TokenEndpoint) -> None:
        certificate, key_file = authority.issue("kafka", hosts=["127.0.0.1"])
        keys = directory / "kafka.pem"
        keys.parent.mkdir(parents=True, exist_ok=True)
        keys.write_text(key_file.read_text() + certificate.read_text())
        self._jwks = directory / "jwks.json"
        self._jwks.write_text(endpoint.jwks())
        self.authority = authority
        self.endpoint = endpoint
        super().__init__(
            directory,
            extra_listeners={"SECURE": "SASL_SSL", "OPEN": "SASL_PLAINTEXT", "CERTIFIED": "SSL"},
            extra_properties={
                **_sasl("secure", self._jwks),
                **_sasl("open", self._jwks),
                **_tls("secure", keys, authority.ca_file),
                **_tls("certified", keys, authority.ca_file),
                "listener.name.certified.ssl.client.auth": "required",
            },
            format_arguments=[
                part
                for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512")
                for part in ("--add-scram", f"{mechanism}=[name={USER},password={PASSWORD}]")
            ],
        )

    def _command(self, archives: Sequence[Path], ports: Mapping[str, int]) -> Sequence[str]:
        # Kafka 4 reads keys for tokens from nowhere that it was not told of here.
        return [
            f"-Dorg.apache.kafka.sasl.oauthbearer.allowed.urls={self._jwks.as_uri()}",
            *super()._command(archives, ports),
        ]

    def connection(self, mechanism: Mechanism = "SCRAM-SHA-512", *, password: str = PASSWORD) -> KafkaConnection:
        """The way in that is right, but for what is said otherwise."""
        return KafkaConnection(
            self.address_of("SECURE"),
            "SASL_SSL",
            tls=Tls(ca_file=self.authority.ca_file),
            sasl=Sasl(
                mechanism,
                USER,
                lambda: password,
                token_endpoint=self.endpoint.url,
                client_id=USER,
                client_secret=lambda: CLIENT_SECRET,
                token_endpoint_ca_file=self.authority.ca_file,
            ),
        )


def _sasl(listener: str, jwks: Path) -> dict[str, str]:
    modules = "org.apache.kafka.common.security"
    jaas = {
        "plain": f'{modules}.plain.PlainLoginModule required user_{USER}="{PASSWORD}";',
        "scram-sha-256": f"{modules}.scram.ScramLoginModule required;",
        "scram-sha-512": f"{modules}.scram.ScramLoginModule required;",
        "oauthbearer": f"{modules}.oauthbearer.OAuthBearerLoginModule required;",
    }
    handler = f"{modules}.oauthbearer.OAuthBearerValidatorCallbackHandler"
    prefix = f"listener.name.{listener}"
    return {
        f"{prefix}.sasl.enabled.mechanisms": ",".join(map(str.upper, jaas)),
        **{f"{prefix}.{mechanism}.sasl.jaas.config": value for mechanism, value in jaas.items()},
        f"{prefix}.oauthbearer.sasl.server.callback.handler.class": handler,
        f"{prefix}.oauthbearer.sasl.oauthbearer.jwks.endpoint.url": jwks.as_uri(),
        f"{prefix}.oauthbearer.sasl.oauthbearer.expected.audience": AUDIENCE,
    }


def _tls(listener: str, keys: Path, ca_file: Path) -> dict[str, str]:
    prefix = f"listener.name.{listener}.ssl"
    return {
        f"{prefix}.keystore.type": "PEM",
        f"{prefix}.keystore.location": str(keys),
        f"{prefix}.truststore.type": "PEM",
        f"{prefix}.truststore.location": str(ca_file),
    }


@asynccontextmanager
async def running_secure_kafka(directory: Path) -> AsyncIterator[SecureKafka]:
    authority = Authority(directory / "certificates", "tests").begin()
    endpoint = TokenEndpoint(authority)
    kafka = SecureKafka(directory / "kafka", authority, endpoint)
    with endpoint.serving():
        await kafka.start()
        try:
            yield kafka
        finally:
            await kafka.stop()


# Cassandra


class SecureCassandra(LocalCassandra):
    """A Cassandra that takes a name and a password, over TLS alone, from those that have a certificate."""

    def __init__(self, directory: Path, authority: Authority) -> None:
        certificate, key_file = authority.issue("cassandra", hosts=["127.0.0.1"])
        self.authority = authority
        self._client = authority.issue("client", password=KEY_PASSWORD)
        super().__init__(
            directory,
            heap_mb=768,
            settings={
                "authenticator": {"class_name": "org.apache.cassandra.auth.PasswordAuthenticator"},
                "client_encryption_options": {
                    "enabled": True,
                    "optional": False,
                    "require_client_auth": True,
                    "ssl_context_factory": {
                        "class_name": "org.apache.cassandra.security.PEMBasedSslContextFactory",
                        "parameters": {
                            "private_key": key_file.read_text() + certificate.read_text(),
                            "trusted_certificates": authority.ca_file.read_text(),
                        },
                    },
                },
            },
        )

    def access(self, **others: Any) -> CassandraAccess:
        """The way in that is right, but for `others`."""
        certificate, key_file = self._client
        right: dict[str, Any] = {
            "username": USER,
            "password": lambda: PASSWORD,
            "encrypted": True,
            "ca_file": self.authority.ca_file,
            "certificate_file": certificate,
            "key_file": key_file,
            "key_password": lambda: KEY_PASSWORD,
        }
        return CassandraAccess(**{**right, **others})

    @property
    def url(self) -> str:
        return f"cassandra://{self.address}/"

    def _command(self, archives: Sequence[Path], ports: Mapping[str, int]) -> Sequence[str]:
        # The first user is made ten seconds after the start, for the sake of clusters that are still joining.
        return ["-Dcassandra.superuser_setup_delay_ms=0", *super()._command(archives, ports)]

    async def _serves(self) -> bool:
        """The question of `LocalCassandra` needs a server that answers anybody."""
        return await asyncio.to_thread(self._lets_us_in)

    def _lets_us_in(self) -> bool:
        """As the user that a new cluster has; makes ours."""
        provider = PlainTextAuthProvider("cassandra", "cassandra")
        context = self.access().options()["ssl_context"]
        cluster = Cluster([self.contact_point], port=self.port, auth_provider=provider, ssl_context=context)
        try:
            session = cluster.connect()
            session.execute(
                f"CREATE ROLE IF NOT EXISTS {USER} WITH PASSWORD = '{PASSWORD}' AND LOGIN = true AND SUPERUSER = true"
            )
            return bool(session.execute("SELECT cluster_name FROM system.local").one()[0] == self.cluster_name)
        except Exception:  # whatever it is, it does not serve us yet
            return False
        finally:
            cluster.shutdown()


@asynccontextmanager
async def running_secure_cassandra(directory: Path) -> AsyncIterator[SecureCassandra]:
    cassandra = SecureCassandra(directory / "cassandra", Authority(directory / "certificates", "tests").begin())
    await cassandra.start()
    try:
        yield cassandra
    finally:
        await cassandra.stop()
