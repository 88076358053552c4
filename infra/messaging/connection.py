"""How Kafka is reached: addresses, encryption and who we are, said once for every client of aiokafka's.

Theory of operation. A `KafkaConnection` is plain data. `client_options` turns it into aiokafka's own words, and every
client (producer, consumer, administration) is made from those; nothing else in the system spells them. Secrets are
asked for whenever a client is made, so that one that was exchanged in its file is used by the next client.

aiokafka tells a broker that is away from one that refuses us only in its log. So after a failed start one of the
servers is called again by hand (`why_unreachable`), and its refusal becomes an error that says what to put right.

OAUTHBEARER: tokens come from an endpoint by client credentials (RFC 6749 §4.4) and are used until shortly before they
expire. aiokafka presents a token once for each connection; Kafka ends a connection whose token has expired
(`connections.max.reauth.ms` 0, its default, never does), and the next one asks for a new token.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from aiokafka.abc import AbstractTokenProvider
from aiokafka.conn import collect_hosts, create_conn
from aiokafka.errors import (
    IllegalSaslStateError,
    KafkaConnectionError,
    KafkaError,
    SaslAuthenticationFailed,
    UnsupportedSaslMechanismError,
)

from infra.messaging import records  # noqa: F401 - consumers that are made from here read any header name
from infra.messaging.errors import (
    BrokerUnavailableError,
    MessagingError,
    NotAuthenticatedError,
    UntrustedBrokerError,
)

SecurityProtocol = Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"]
Mechanism = Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"]

_PROBE_TIMEOUT_MS = 5_000
_TOKEN_TIMEOUT_S = 10.0
_TOKEN_MAX_BYTES = 1 << 20
_RENEWED_BEFORE_S = 30.0
_DEFAULT_LIFETIME_S = 60.0


def _nothing() -> str:
    return ""


@dataclass(frozen=True)
class Tls:
    """Whom to trust (`ca_file` None: whom the operating system trusts), and our own certificate if there is one."""

    ca_file: Path | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None
    key_password: Callable[[], str] = field(default=_nothing, repr=False, compare=False)
    check_hostname: bool = True

    def context(self) -> ssl.SSLContext:
        """What a client uses. Raises MessagingError naming the file that cannot be used."""
        try:
            context = ssl.create_default_context(cafile=None if self.ca_file is None else str(self.ca_file))
        except (OSError, ssl.SSLError) as error:
            raise MessagingError(f"{self.ca_file} holds no certificates to trust: {_reason(error)}.") from error
        context.check_hostname = self.check_hostname
        if self.certificate_file is not None:
            try:
                # Given as bytes: a string that is empty would make OpenSSL ask the terminal for the password.
                context.load_cert_chain(self.certificate_file, self.key_file, self.key_password().encode())
            except (OSError, ssl.SSLError) as error:
                files = f"{self.certificate_file} and {self.key_file}"
                raise MessagingError(f"{files} are no certificate and its key: {_reason(error)}.") from error
        return context


@dataclass(frozen=True)
class Sasl:
    """Who we are. PLAIN and SCRAM use the name and the password, OAUTHBEARER what concerns tokens."""

    mechanism: Mechanism
    username: str = ""
    password: Callable[[], str] = field(default=_nothing, repr=False, compare=False)
    token_endpoint: str = ""
    client_id: str = ""
    client_secret: Callable[[], str] = field(default=_nothing, repr=False, compare=False)
    scope: str = ""
    token_endpoint_ca_file: Path | None = None


@dataclass(frozen=True)
class KafkaConnection:
    """How to reach a cluster. `bootstrap_servers` are host:port with commas between them."""

    bootstrap_servers: str
    security_protocol: SecurityProtocol = "PLAINTEXT"
    tls: Tls = Tls()
    sasl: Sasl | None = None

    @classmethod
    def of(cls, kafka: Kafka) -> KafkaConnection:
        """A bare address is a Kafka without protection."""
        return cls(kafka) if isinstance(kafka, str) else kafka

    @property
    def ssl_context(self) -> ssl.SSLContext | None:
        """What encrypts the connection; None where the protocol does not."""
        return self.tls.context() if self.security_protocol in ("SSL", "SASL_SSL") else None

    @property
    def authentication(self) -> Sasl | None:
        """Who we say we are; None where the protocol does not ask."""
        return self.sasl if self.security_protocol.startswith("SASL_") else None

    def client_options(self) -> dict[str, Any]:
        """The arguments of aiokafka's clients for this connection."""
        return {"bootstrap_servers": self.bootstrap_servers, **self._protection()}

    def _protection(self) -> dict[str, Any]:
        options: dict[str, Any] = {"security_protocol": self.security_protocol, "ssl_context": self.ssl_context}
        sasl = self.authentication
        if sasl is None:
            return options
        options["sasl_mechanism"] = sasl.mechanism
        if sasl.mechanism == "OAUTHBEARER":
            options["sasl_oauth_token_provider"] = TokenProvider(sasl)
        else:
            options |= {"sasl_plain_username": sasl.username, "sasl_plain_password": sasl.password()}
        return options

    async def probe(self) -> None:
        """Connect to one server, say who we are, and leave. Raises aiokafka's errors, OSError or TimeoutError."""
        host, port, _ = collect_hosts(self.bootstrap_servers)[0]
        connection = await create_conn(host, port, request_timeout_ms=_PROBE_TIMEOUT_MS, **self._protection())
        connection.close()


Kafka: TypeAlias = KafkaConnection | str
"""How to reach Kafka; an address alone means a broker without protection."""


class Startable(Protocol):
    """A client of aiokafka's that has not been started."""

    async def start(self) -> None: ...


async def start(client: Startable, kafka: Kafka) -> None:
    """Start a client. Raises BrokerUnavailableError (its kinds say who refused whom) and aiokafka's other errors."""
    try:
        await client.start()
    except KafkaConnectionError as error:
        raise await why_unreachable(kafka, error) from error


async def why_unreachable(kafka: Kafka, error: BaseException) -> BrokerUnavailableError:
    """The error to raise after a client could not be started for `error`: asks a server what it has against us."""
    connection = KafkaConnection.of(kafka)
    servers = connection.bootstrap_servers
    if connection.security_protocol == "PLAINTEXT":
        return BrokerUnavailableError(servers, str(error))
    try:
        async with asyncio.timeout(_PROBE_TIMEOUT_MS / 1000):
            await connection.probe()
    except ssl.SSLCertVerificationError as refusal:
        return UntrustedBrokerError(servers, refusal.verify_message)
    except ssl.SSLError as refusal:
        return UntrustedBrokerError(servers, _reason(refusal))
    except TokenError as refusal:
        return NotAuthenticatedError(servers, str(refusal))
    except (SaslAuthenticationFailed, UnsupportedSaslMechanismError, IllegalSaslStateError) as refusal:
        return NotAuthenticatedError(servers, str(refusal.args[0]) if refusal.args else type(refusal).__name__)
    except (KafkaError, OSError, TimeoutError) as refusal:
        return BrokerUnavailableError(servers, str(refusal) or type(refusal).__name__)
    return BrokerUnavailableError(servers, str(error))


class TokenError(KafkaError):  # type: ignore[misc]  # aiokafka has no types
    """No token could be had. One of aiokafka's errors, so that its clients try again as they do for any broker."""


class TokenProvider(AbstractTokenProvider):  # type: ignore[misc]
    """Tokens for one client of Kafka; `now_s` is a monotonic clock."""

    def __init__(self, sasl: Sasl, *, now_s: Callable[[], float] = time.monotonic) -> None:
        self._sasl = sasl
        self._now_s = now_s
        self._token = ""
        self._good_until_s = -1.0

    async def token(self) -> str:
        """A token that is good for a while. Raises TokenError."""
        if self._now_s() >= self._good_until_s:
            asked_s = self._now_s()
            self._token, lifetime_s = await asyncio.to_thread(self._ask)
            self._good_until_s = asked_s + max(lifetime_s - _RENEWED_BEFORE_S, lifetime_s / 2)
        return self._token

    def _ask(self) -> tuple[str, float]:
        """A new token and how long it is good, in seconds. What the endpoint says is not repeated but for its code."""
        sasl = self._sasl
        form = {
            "grant_type": "client_credentials",
            "client_id": sasl.client_id,
            "client_secret": sasl.client_secret(),
            **({"scope": sasl.scope} if sasl.scope else {}),
        }
        request = urllib.request.Request(
            sasl.token_endpoint, urllib.parse.urlencode(form).encode(), {"Accept": "application/json"}
        )
        context = None
        if sasl.token_endpoint.startswith("https:"):
            context = Tls(ca_file=sasl.token_endpoint_ca_file).context()
        try:
            with urllib.request.urlopen(request, timeout=_TOKEN_TIMEOUT_S, context=context) as response:
                answer = json.loads(response.read(_TOKEN_MAX_BYTES))
            token, lifetime_s = answer["access_token"], float(answer.get("expires_in", _DEFAULT_LIFETIME_S))
        except urllib.error.HTTPError as error:
            code = _error_code(error)
            raise TokenError(f"{sasl.token_endpoint} gave no token: HTTP {error.code}{code}") from None
        except (OSError, TimeoutError) as error:
            reason = _reason(error.reason if isinstance(error, urllib.error.URLError) else error)
            raise TokenError(f"{sasl.token_endpoint} gave no token: {reason}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise TokenError(f"{sasl.token_endpoint} gave no token: its answer is not that of RFC 6749 §5.1") from None
        if not isinstance(token, str) or not token:
            raise TokenError(f"{sasl.token_endpoint} gave no token: its access_token is no text")
        return token, lifetime_s


def _error_code(error: urllib.error.HTTPError) -> str:
    """`error` of an error response (RFC 6749 §5.2), which is one of few words; anything else may quote what we sent."""
    with suppress(Exception):
        code = json.loads(error.read(_TOKEN_MAX_BYTES))["error"]
        if code in ("invalid_request", "invalid_client", "invalid_grant", "unauthorized_client", "invalid_scope"):
            return f" ({code})"
    return ""


def _reason(error: object) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, ssl.SSLError):
        return error.reason or "TLS failed"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error)
