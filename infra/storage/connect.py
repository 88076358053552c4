"""From a URL to a storage. Adapters are imported only when named, so that none needs another's driver."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from infra.storage.errors import InvalidOperationError
from infra.storage.port import Storage

_FORMS = "use sqlite:///ABSOLUTE/DIRECTORY or memory:"


def connect(url: str) -> Storage:
    """The storage that `url` names; nothing is opened or created yet.

    `sqlite:///var/lib/concord` keeps one file for each namespace in that directory, `memory:` keeps everything in
    this process. Raises InvalidOperationError, which names the accepted forms.
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


_ADAPTERS: Mapping[str, Callable[[SplitResult], Storage]] = {"sqlite": _sqlite, "memory": _memory}
