"""From a URL to a storage. Adapters are imported only when named, so that none needs another's driver."""

from __future__ import annotations

import tomllib
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from infra.storage.errors import InvalidOperationError
from infra.storage.port import Storage

_FORMS = "use sqlite:///ABSOLUTE/DIRECTORY, multi:///ABSOLUTE/FILE.toml or memory:"

_MULTI_FORM = """a file for multi: reads

    default = "local"

    [storages]
    local = "sqlite:///var/lib/concord"
    scratch = "memory:"

    [namespaces]
    basket = "scratch"
"""


def connect(url: str) -> Storage:
    """The storage that `url` names; nothing is opened or created yet.

    `sqlite:///var/lib/concord` keeps one file for each namespace in that directory, `memory:` keeps everything in
    this process. `multi:///etc/concord/storages.toml` spreads namespaces over several storages as that file says; it
    is read at once. Raises InvalidOperationError, which names the accepted forms.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise InvalidOperationError(f"{url!r} is not a URL ({error}): {_FORMS}") from error
    open_storage = _ADAPTERS.get(parts.scheme)
    if open_storage is None:
        raise InvalidOperationError(f"there is no storage {parts.scheme + ':'!r}: {_FORMS}")
    return open_storage(parts)


def _sqlite(parts: SplitResult) -> Storage:
    from infra.storage.sqlite import SqliteStorage

    path = unquote(parts.path)
    if parts.netloc or parts.query or parts.fragment or not path.startswith("/"):
        raise InvalidOperationError(f"{parts.geturl()!r} names no absolute directory: {_FORMS}")
    return SqliteStorage(Path(path))


def _memory(parts: SplitResult) -> Storage:
    from infra.storage.memory import MemoryStorage

    if parts.netloc or parts.path or parts.query or parts.fragment:
        raise InvalidOperationError(f"{parts.geturl()!r}: memory: takes nothing after the colon")
    return MemoryStorage()


def _multi(parts: SplitResult) -> Storage:
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
        return MultiStorage({alias: connect(url) for alias, url in urls.items()}, namespaces, default)
    except InvalidOperationError as error:
        raise InvalidOperationError(f"{path}: {error}") from error


def _maps_strings(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(held, str) for held in value.values())


_ADAPTERS: Mapping[str, Callable[[SplitResult], Storage]] = {
    "sqlite": _sqlite,
    "multi": _multi,
    "memory": _memory,
}
