"""What is made of the last words of a server whose disk failed."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.servers.cassandra import SETTINGS, LocalCassandra
from infra.servers.errors import DirectoryError, ServerDiedError, ServerError
from infra.servers.kafka import LocalKafka

ARGUMENTS = "INFO  CassandraDaemon: JVM Arguments: [-Xmx768m, -XX:+UseSerialGC, -XX:+ExitOnOutOfMemoryError]"
UNMAPPED = (
    "java.lang.InternalError: a fault occurred in a recent unsafe memory access operation in compiled Java code",
    "\tat org.apache.cassandra.db.commitlog.MemoryMappedSegment.<init>(MemoryMappedSegment.java:54)",
)
CRASHED = (
    "# A fatal error has been detected by the Java Runtime Environment:",
    "#  SIGBUS (0x7) at pc=0x00007f554093914e, pid=20381, tid=21047",
    "# v  ~StubRoutines::updateBytesCRC32",
)


def explained(server: type[LocalCassandra] | type[LocalKafka], directory: Path, *lines: str) -> ServerError:
    return server(directory)._explain(f"{server.server} ended.", lines)


@pytest.mark.parametrize("server", [LocalCassandra, LocalKafka])
@pytest.mark.parametrize("said", [UNMAPPED, CRASHED], ids=["InternalError", "SIGBUS"])
def test_a_file_in_memory_without_a_page_is_a_full_disk(
    tmp_path: Path, server: type[LocalCassandra] | type[LocalKafka], said: tuple[str, ...]
) -> None:
    error = explained(server, tmp_path, ARGUMENTS, *said)

    assert isinstance(error, DirectoryError)
    assert "the disk is full" in str(error)
    assert "Make room" in error.remedy


@pytest.mark.parametrize("server", [LocalCassandra, LocalKafka])
def test_no_space_left_is_a_full_disk_and_an_option_of_the_jvm_is_no_lack_of_memory(
    tmp_path: Path, server: type[LocalCassandra] | type[LocalKafka]
) -> None:
    full = explained(server, tmp_path, ARGUMENTS, "java.io.IOException: No space left on device")
    other = explained(server, tmp_path, ARGUMENTS, "ERROR CommitLogReadException: Encountered bad header at 314856")
    starved = explained(server, tmp_path, ARGUMENTS, "java.lang.OutOfMemoryError: Java heap space")

    assert isinstance(full, DirectoryError)
    assert type(other) is ServerDiedError
    assert "bad header" in str(other)
    assert "ran out of memory" in str(starved)


def test_our_cassandra_ends_when_its_disk_fails() -> None:
    """Unset, they would be `ignore` and `stop`: on with a hole, or alive and silent."""
    assert (SETTINGS["disk_failure_policy"], SETTINGS["commit_failure_policy"]) == ("die", "die")
