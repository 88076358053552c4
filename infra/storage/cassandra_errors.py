"""What an error of Cassandra or its driver means to a caller of the storage port.

A write that failed is unknown unless it is certain that nothing was or will be written. Certain are only these:

    never sent                    no connection could take it: the driver names no host that it attempted
    refused as written            invalid, not authorized, syntax, configuration: judged before anything is done
    bootstrapping                 the node does not serve yet
    unavailable                   too few replicas when it began. For a conditional write only if the error names the
                                  consistency SERIAL: with QUORUM it may come from the commit of an accepted proposal
    overloaded                    an unconditional write that was not begun; a conditional one may have been accepted

Everything else is unknown: timeouts of either side, whatever their write type (CAS: in the middle of Paxos; SIMPLE:
while it commits; BATCH: logged), write failures, an error of the server, a connection that broke, and CAS_WRITE_UNKNOWN
(0x1700), which the driver passes on as a bare error message. A late answer changes nothing: the write may still be
applied then, so only a read at SERIAL (which completes or discards it) or a competing write tells.
"""

from __future__ import annotations

import re

from cassandra import (
    AlreadyExists,
    ConsistencyLevel,
    InvalidRequest,
    OperationTimedOut,
    ReadFailure,
    Unauthorized,
    Unavailable,
)
from cassandra import AuthenticationFailed as _AuthenticationFailed
from cassandra.cluster import NoHostAvailable
from cassandra.connection import ConnectionException
from cassandra.protocol import (
    ConfigurationException,
    ErrorMessage,
    IsBootstrappingErrorMessage,
    OverloadedErrorMessage,
    SyntaxException,
)

from infra.storage.errors import (
    InvalidOperationError,
    StorageError,
    TooMuchToReadError,
    UnavailableStorageError,
    UnknownOutcomeError,
    UnusableStorageError,
)

CAS_WRITE_UNKNOWN = 0x1700

_REFUSED = (AlreadyExists, InvalidRequest, SyntaxException, ConfigurationException)

_TLS = re.compile(r"\[SSL[^\]]*\] (.+?) \(_ssl")

_REMEDY_UNREACHABLE = "see that Cassandra runs and that its address, port and data centre are those in the settings"
_REMEDY_UNTRUSTED = (
    "see that TLS is on in the settings just where it is on in Cassandra, that the certificates to trust are those that"
    " signed its own, and that its certificate has the address that is called"
)
_REMEDY_REPLICAS = "bring the nodes that are down back: a quorum of every partition's replicas must be up"
_REMEDY_DELETIONS = (
    "see in the server's log why a replica gave up: after too many deletions it passes once they are older than the"
    " table's gc_grace_seconds and `nodetool garbagecollect` or a compaction has removed them"
)
_REMEDY_SLOW = "wait for the server to recover, and see its log if it does not"


def connect_error(error: Exception, what: str) -> StorageError:
    """Why no session could be opened at `what`."""
    causes = (
        list(error.errors.values()) if isinstance(error, NoHostAvailable) and isinstance(error.errors, dict) else []
    )
    if any(isinstance(cause, _AuthenticationFailed) for cause in (error, *causes)):
        return UnusableStorageError(
            f"{what} refuses the user name or the password", remedy="correct username and password in the settings"
        )
    cause = causes[0] if causes else error
    # The driver passes on what TLS said in words alone.
    refusal = next((found for each in (*causes, error) if (found := _TLS.search(str(each)))), None)
    if refusal is not None:
        return UnusableStorageError(f"{what} cannot be trusted: {refusal[1]}", remedy=_REMEDY_UNTRUSTED)
    return UnavailableStorageError(f"{what} cannot be reached: {_said(cause)}", remedy=_REMEDY_UNREACHABLE)


def read_error(error: Exception, what: str) -> StorageError:
    """Why `what`, a read or anything else that may simply be asked again, failed."""
    if isinstance(error, _REFUSED):
        return InvalidOperationError(f"{what}: Cassandra refuses it: {_said(error)}")
    if isinstance(error, ReadFailure):
        return TooMuchToReadError(f"{what}: {_said(error)}", remedy=_REMEDY_DELETIONS)
    return UnavailableStorageError(f"{what}: {_said(error)}", remedy=_remedy(error))


def write_error(error: Exception, what: str, *, conditional: bool, sent: bool) -> StorageError:
    """What became of `what`, a write that failed. `sent`: a node may have received it."""
    if isinstance(error, _REFUSED):
        return InvalidOperationError(f"{what}: Cassandra refuses it: {_said(error)}")
    if not sent or _was_not_begun(error, conditional):
        return UnavailableStorageError(f"{what} was not written: {_said(error)}", remedy=_remedy(error))
    return UnknownOutcomeError(f"{what} may have been written: {_said(error)}")


def _was_not_begun(error: Exception, conditional: bool) -> bool:
    match error:
        case Unavailable():
            return not conditional or error.consistency == ConsistencyLevel.SERIAL
        case OverloadedErrorMessage():
            return not conditional
        case Unauthorized() | IsBootstrappingErrorMessage():
            return True
        case _:
            return False


def _remedy(error: Exception) -> str:
    match error:
        case Unavailable():
            return _REMEDY_REPLICAS
        case Unauthorized():
            return "grant this user SELECT and MODIFY on the keyspace"
        case NoHostAvailable() | ConnectionException():
            return _REMEDY_UNREACHABLE
        case _:
            return _REMEDY_SLOW


def _said(error: Exception) -> str:
    match error:
        case ErrorMessage(code=code) if code == CAS_WRITE_UNKNOWN:
            return f"the server does not know the outcome (CAS_WRITE_UNKNOWN): {error.message}"
        case OperationTimedOut():
            return "no answer within the client's timeout"
        case _:
            return f"{type(error).__name__}: {error}"
