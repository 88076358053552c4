"""From a URL to a storage. Adapters are imported only when named, so that none needs another's driver.

What is better not said in a URL, or is said once for several, comes beside it (`StorageAddress`).
"""

from __future__ import annotations

import re
import ssl
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from infra.storage.errors import InvalidOperationError
from infra.storage.port import Storage

_FORMS = (
    "use sqlite:///ABSOLUTE/DIRECTORY, cassandra://HOST[:PORT][,HOST…]/[?local_dc=NAME&replication_factor=NUMBER…], "
    "dynamodb://?region=NAME[&endpoint=URL][&prefix=NAME][&units=NUMBER], "
    "multi:///ABSOLUTE/FILE.toml or memory:"
)

_MULTI_FORM = """a file for multi: reads

    default = "local"

    [storages]
    local = "sqlite:///var/lib/concord"
    scratch = "memory:"

    [namespaces]
    basket = "scratch"
"""


_URL = re.compile(r"(?:([^:/?#]+):)?(?://([^/?#]*))?([^?#]*)(?:\?([^#]*))?(?:#(.*))?", re.DOTALL)
"""Scheme, authority, path, query and fragment (RFC 3986, appendix B)."""


def _nothing() -> str:
    return ""


@dataclass(frozen=True)
class CassandraAccess:
    """What every Cassandra is told that a URL names, unless the URL says otherwise.

    `encrypted` turns TLS on; `ca_file` None trusts whom the operating system trusts. `replication` is that of new
    keyspaces, by data centre. `only_authenticated` refuses nodes that say they let everybody in, and `allow_periodic`
    takes nodes that answer writes before these are on the disk.
    """

    data_center: str = ""
    username: str = ""
    password: Callable[[], str] = field(default=_nothing, repr=False, compare=False)
    encrypted: bool = False
    ca_file: Path | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None
    key_password: Callable[[], str] = field(default=_nothing, repr=False, compare=False)
    check_hostname: bool = True
    replication: Mapping[str, int] = field(default_factory=dict)
    only_authenticated: bool = False
    allow_periodic: bool = False

    def options(self) -> dict[str, Any]:
        """The arguments of CassandraStorage. Raises InvalidOperationError for files that cannot be used."""
        options: dict[str, Any] = {"only_authenticated": self.only_authenticated, "allow_periodic": self.allow_periodic}
        if self.data_center:
            options["local_dc"] = self.data_center
        if self.username:
            options |= {"username": self.username, "password": self.password()}
        if self.encrypted:
            options["ssl_context"] = self._ssl_context()
        if self.replication:
            options["replication"] = self.replication
        return options

    def _ssl_context(self) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cafile=None if self.ca_file is None else str(self.ca_file))
            context.check_hostname = self.check_hostname
            if self.certificate_file is not None:
                # Given as bytes: a string that is empty would make OpenSSL ask the terminal for the password.
                context.load_cert_chain(self.certificate_file, self.key_file, self.key_password().encode())
        except OSError as error:  # ssl.SSLError is one
            files = [file for file in (self.ca_file, self.certificate_file, self.key_file) if file is not None]
            raise InvalidOperationError(
                f"the certificates and the key for Cassandra ({', '.join(map(str, files))}) cannot be used: {error}"
            ) from error
        return context


@dataclass(frozen=True)
class StorageAddress:
    """Where records are: the URL of a storage, and how any Cassandra in it is spoken to. It shows no secret."""

    url: str = field(repr=False)  # may hold a password
    cassandra: CassandraAccess = CassandraAccess()


def connect(where: str | StorageAddress) -> Storage:
    """The storage that `where` names, by its URL or by that and what comes beside it; nothing is opened or created yet.

    `sqlite:///var/lib/concord` keeps one file for each namespace in that directory, `memory:` keeps everything in
    this process.

    `cassandra://10.0.0.1:9042,10.0.0.2/?local_dc=dc1` is a cluster; its parameters are local_dc, replication_factor,
    replication_strategy, compaction_strategy, username, password, request_timeout_s, max_in_flight and ssl_ca (the
    file of the certificates to trust; it turns TLS on). They go before those of `StorageAddress.cassandra`.

    `dynamodb://?region=ap-northeast-1` takes whatever AWS tools would take for what it does not name, and credentials
    from nowhere else; `endpoint` is another place than Amazon's, `prefix` stands before every namespace, `units` is
    the capacity of new tables (without it they are paid by request).

    `multi:///etc/concord/storages.toml` spreads namespaces over several storages as that file says; it is read at
    once. Raises InvalidOperationError, which names the accepted forms.
    """
    address = StorageAddress(where) if isinstance(where, str) else where
    parts = _split(address.url)
    open_storage = _ADAPTERS.get(parts.scheme)
    if open_storage is None:
        raise InvalidOperationError(f"there is no storage {parts.scheme + ':'!r}: {_FORMS}")
    return open_storage(parts, address.cassandra)


def _split(url: str) -> SplitResult:
    """A URL in its parts, by RFC 3986's own expression: `urlsplit` refuses lists of hosts that have an IPv6 address."""
    match = _URL.fullmatch(url)
    assert match is not None, "the expression fits every string"
    scheme, *others = (part or "" for part in match.groups())
    return SplitResult(scheme.lower(), *others)


def _sqlite(parts: SplitResult, _cassandra: CassandraAccess) -> Storage:
    from infra.storage.sqlite import SqliteStorage

    path = unquote(parts.path)
    if parts.netloc or parts.query or parts.fragment or not path.startswith("/"):
        raise InvalidOperationError(f"{parts.geturl()!r} names no absolute directory: {_FORMS}")
    return SqliteStorage(Path(path))


def _memory(parts: SplitResult, _cassandra: CassandraAccess) -> Storage:
    from infra.storage.memory import MemoryStorage

    if parts.netloc or parts.path or parts.query or parts.fragment:
        raise InvalidOperationError(f"{parts.geturl()!r}: memory: takes nothing after the colon")
    return MemoryStorage()


def _dynamodb(parts: SplitResult, _cassandra: CassandraAccess) -> Storage:
    from infra.storage.dynamodb import DynamoDbStorage

    asked = dict(parse_qsl(parts.query, keep_blank_values=True))
    if parts.netloc or parts.path or parts.fragment or asked.keys() - {"region", "endpoint", "prefix", "units"}:
        raise InvalidOperationError(f"a dynamodb: URL has nothing but its settings, and no credentials: {_FORMS}")
    units = asked.get("units")
    if units is not None and (not units.isdecimal() or not int(units)):
        raise InvalidOperationError(f"units={units} is no positive number: {_FORMS}")
    endpoint = asked.get("endpoint")
    if endpoint is not None and (urlsplit(endpoint).scheme not in ("http", "https") or "@" in endpoint):
        raise InvalidOperationError(f"the endpoint is no address like http://127.0.0.1:8000: {_FORMS}")
    return DynamoDbStorage(
        region=asked.get("region") or None,
        endpoint=endpoint,
        prefix=asked.get("prefix", ""),
        units=None if units is None else int(units),
    )


def _cassandra(parts: SplitResult, access: CassandraAccess) -> Storage:
    from infra.storage.cassandra import DEFAULT_PORT, CassandraStorage

    # The URL may hold a password, so that no message repeats it.
    if "@" in parts.netloc or parts.path not in ("", "/") or parts.fragment:
        raise InvalidOperationError(f"a Cassandra URL holds hosts, a port and parameters: {_FORMS}")
    hosts, ports = [], set()
    for place in parts.netloc.split(","):
        try:
            one = urlsplit(f"//{place}")
            host, port = one.hostname, one.port
        except ValueError as error:
            raise InvalidOperationError(f"{place!r} is no host with a port ({error}): {_FORMS}") from error
        if not host:
            raise InvalidOperationError(f"a Cassandra URL names at least one host: {_FORMS}")
        hosts.append(host)
        ports |= set() if port is None else {port}
    if len(ports) > 1:
        raise InvalidOperationError("all nodes of a Cassandra cluster listen on one port: name it once")
    options: dict[str, Any] = {}
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        read = _CASSANDRA_PARAMETERS.get(name)
        if read is None or name in options:
            known = ", ".join(sorted(_CASSANDRA_PARAMETERS))
            raise InvalidOperationError(f"{name!r} is there twice, or none of a Cassandra URL's parameters: {known}")
        try:
            options[name] = read(value)
        except (ValueError, OSError) as error:
            raise InvalidOperationError(f"{name} of a Cassandra URL: {error}") from error
    if "ssl_ca" in options:
        options["ssl_context"] = options.pop("ssl_ca")
    return CassandraStorage(hosts, next(iter(ports), DEFAULT_PORT), **{**access.options(), **options})


_CASSANDRA_PARAMETERS: Mapping[str, Callable[[str], Any]] = {
    "local_dc": str,
    "replication_factor": int,
    "replication_strategy": str,
    "compaction_strategy": str,
    "username": str,
    "password": str,
    "request_timeout_s": float,
    "max_in_flight": int,
    "ssl_ca": lambda path: ssl.create_default_context(cafile=path),
}


def _multi(parts: SplitResult, cassandra: CassandraAccess) -> Storage:
    from infra.storage.multi import MultiStorage

    path = unquote(parts.path)
    if parts.netloc or parts.query or parts.fragment or not path.startswith("/"):
        raise InvalidOperationError(f"{parts.geturl()!r} names no absolute path of a file: {_FORMS}")
    try:
        described = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidOperationError(f"{path} cannot be read ({error.strerror}); {_MULTI_FORM}") from error
    except ValueError as error:  # no TOML, no UTF-8, or NUL in the path
        raise InvalidOperationError(f"{path} is no TOML file ({error}); {_MULTI_FORM}") from error
    default, urls, namespaces = (described.pop(name, None) for name in ("default", "storages", "namespaces"))
    namespaces = {} if namespaces is None else namespaces
    if described or not isinstance(default, str) or not _maps_strings(urls) or not _maps_strings(namespaces):
        raise InvalidOperationError(f"{path} says something else than is understood; {_MULTI_FORM}")
    if any(urlsplit(url).scheme == parts.scheme for url in urls.values()):
        raise InvalidOperationError(f"{path}: a storage of multi: cannot be multi: itself")
    try:
        storages = {alias: connect(StorageAddress(url, cassandra)) for alias, url in urls.items()}
        return MultiStorage(storages, namespaces, default)
    except InvalidOperationError as error:
        raise InvalidOperationError(f"{path}: {error}") from error


def _maps_strings(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(held, str) for held in value.values())


_ADAPTERS: Mapping[str, Callable[[SplitResult, CassandraAccess], Storage]] = {
    "sqlite": _sqlite,
    "cassandra": _cassandra,
    "dynamodb": _dynamodb,
    "multi": _multi,
    "memory": _memory,
}
