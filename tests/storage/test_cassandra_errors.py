"""What Cassandra's errors mean: a write is unknown unless it is certain that nothing was or will be written."""

from __future__ import annotations

import pytest
from cassandra import (
    AlreadyExists,
    AuthenticationFailed,
    ConsistencyLevel,
    InvalidRequest,
    OperationTimedOut,
    ReadFailure,
    ReadTimeout,
    Unauthorized,
    Unavailable,
    WriteFailure,
    WriteTimeout,
    WriteType,
)
from cassandra.cluster import NoHostAvailable
from cassandra.connection import ConnectionBusy, ConnectionShutdown
from cassandra.protocol import (
    ConfigurationException,
    ErrorMessage,
    IsBootstrappingErrorMessage,
    OverloadedErrorMessage,
    ServerError,
    SyntaxException,
)

from infra.storage.cassandra_errors import CAS_WRITE_UNKNOWN, connect_error, read_error, write_error
from infra.storage.errors import InvalidOperationError, StorageError, UnavailableStorageError, UnknownOutcomeError

UNKNOWN: list[Exception] = [
    *(WriteTimeout("late", write_type=write_type) for write_type in sorted(WriteType.value_to_name)),
    WriteFailure("failed", write_type=WriteType.CAS),
    WriteFailure("failed", write_type=WriteType.SIMPLE),
    ErrorMessage(CAS_WRITE_UNKNOWN, "CAS operation result is unknown", None),
    OperationTimedOut(),
    ConnectionShutdown("the connection was reset"),
    ServerError(0x0000, "java.lang.NullPointerException", None),
    ReadTimeout("late", consistency=ConsistencyLevel.QUORUM),
    ReadFailure("failed"),
    ErrorMessage(0x7777, "an error that does not exist yet", None),
    RuntimeError("a bug of the driver"),
    NoHostAvailable("no other node", {}),
]

REFUSED: list[Exception] = [
    InvalidRequest("unconfigured table"),
    SyntaxException(0x2000, "line 1", None),
    ConfigurationException(0x2300, "no", None),
    AlreadyExists(keyspace="k", table="t"),
]

NOT_BEGUN: list[Exception] = [
    Unauthorized("no permission"),
    IsBootstrappingErrorMessage(0x1002, "joining", None),
    Unavailable("too few", consistency=ConsistencyLevel.SERIAL, required_replicas=2, alive_replicas=1),
]

BEGUN_ONLY_BY_PAXOS: list[Exception] = [
    Unavailable("too few", consistency=ConsistencyLevel.QUORUM, required_replicas=2, alive_replicas=1),
    OverloadedErrorMessage(0x1001, "too many hints", None),
]


def meaning(error: Exception, *, conditional: bool = True, sent: bool = True) -> StorageError:
    return write_error(error, "a write", conditional=conditional, sent=sent)


@pytest.mark.parametrize("error", UNKNOWN, ids=repr)
@pytest.mark.parametrize("conditional", [True, False])
def test_a_write_that_may_have_been_applied_is_unknown(error: Exception, conditional: bool):
    assert type(meaning(error, conditional=conditional)) is UnknownOutcomeError


@pytest.mark.parametrize("error", UNKNOWN, ids=repr)
def test_a_write_that_no_node_received_was_not_written(error: Exception):
    failure = meaning(error, sent=False)

    assert isinstance(failure, UnavailableStorageError)
    assert failure.remedy


@pytest.mark.parametrize("error", REFUSED, ids=repr)
@pytest.mark.parametrize("sent", [True, False])
def test_what_the_server_refuses_as_written_is_the_callers_mistake(error: Exception, sent: bool):
    assert type(meaning(error, sent=sent)) is InvalidOperationError
    assert type(read_error(error, "a read")) is InvalidOperationError


@pytest.mark.parametrize("error", NOT_BEGUN, ids=repr)
@pytest.mark.parametrize("conditional", [True, False])
def test_a_write_that_was_not_begun_was_not_written(error: Exception, conditional: bool):
    failure = meaning(error, conditional=conditional)

    assert isinstance(failure, UnavailableStorageError)
    assert failure.remedy


@pytest.mark.parametrize("error", BEGUN_ONLY_BY_PAXOS, ids=repr)
def test_what_may_come_from_the_commit_of_an_accepted_proposal_is_unknown_for_conditional_writes_alone(
    error: Exception,
):
    assert type(meaning(error, conditional=True)) is UnknownOutcomeError
    assert type(meaning(error, conditional=False)) is UnavailableStorageError


@pytest.mark.parametrize("error", [*UNKNOWN, *NOT_BEGUN, *BEGUN_ONLY_BY_PAXOS], ids=repr)
def test_a_read_that_failed_may_be_asked_again(error: Exception):
    failure = read_error(error, "a read")

    assert isinstance(failure, UnavailableStorageError)
    assert failure.remedy


def test_what_cannot_be_connected_to_says_what_to_do():
    wrong = connect_error(NoHostAvailable("no", {"a": AuthenticationFailed("bad credentials")}), "Cassandra")
    absent = connect_error(NoHostAvailable("no", {"a": ConnectionBusy("refused")}), "Cassandra")

    assert isinstance(wrong, UnavailableStorageError)
    assert "username and password" in wrong.remedy
    assert isinstance(absent, UnavailableStorageError)
    assert "address" in absent.remedy
