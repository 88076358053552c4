"""What a storage adapter raises. Adapters translate foreign exceptions at their boundary.

    StorageError
    ├── InvalidOperationError    the caller's mistake (unknown column, wrong type, two atomic units): fix the call
    ├── NoMutationError          a condition did not hold: nothing was written, read again
    ├── UnavailableStorageError  nothing was written and the cause may pass (locked, full, unreachable): wait
    │   ├── UnusableStorageError     as it and the settings are: waiting does not help
    │   └── TooMuchToReadError       of a read: one of less may pass
    └── UnknownOutcomeError      the write may or may not have been applied: read before you decide

The classes mirror ScalarDB's NoMutationException and RetriableExecutionException; an unknown outcome is a
class of its own because ScalarDB's plain ExecutionException leaves the caller to guess.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from infra.storage.operations import Key


class StorageError(Exception):
    """Base of everything that a storage adapter raises."""


class InvalidOperationError(StorageError):
    """The operation can never succeed as written."""


class NoMutationError(StorageError):
    """A condition of a mutation did not hold; no mutation of its batch was applied.

    `unmet`: the keys of mutations whose conditions were seen not to hold, where the storage says so. Others of the
    batch may have failed as well; empty means that nothing is known.
    """

    def __init__(self, message: str, *, unmet: frozenset[Key] = frozenset()) -> None:
        super().__init__(message)
        self.unmet = unmet


class UnavailableStorageError(StorageError):
    """The storage cannot serve now; nothing was written. Waiting may help, `remedy` says what else would."""

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy


class UnusableStorageError(UnavailableStorageError):
    """As it and the settings are, the storage cannot be used: credentials, trust, a server's settings. Waiting does not
    help."""


class TooMuchToReadError(UnavailableStorageError):
    """The storage gave a read up, mostly since it passed over too much that was deleted. One of less may pass."""


class UnknownOutcomeError(StorageError):
    """The batch may have been applied wholly or not at all; only reading tells."""
