"""What starting, watching and stopping a server of our own can raise.

ServerError                 something that the user can put right: text, setting and remedy
├── JavaNotFoundError       no Java runtime that is new enough
├── ArtifactError           a jar could not be fetched, or is not the one that was pinned
├── PortTakenError          somebody else listens where the server should
├── DirectoryError          the data directory cannot be written, or its disk is full
├── AlreadyRunningError     another process holds the same data directory
└── ServerDiedError         the server ended, or did not become ready, during its start
"""

from __future__ import annotations


class ServerError(Exception):
    """A server could not be started.

    `str(error)` is the whole sentence for the user: what happened, then the remedy. `setting` is the
    environment variable or option that the remedy is about, empty where there is none.
    """

    def __init__(self, message: str, *, remedy: str, setting: str = "") -> None:
        super().__init__(f"{message} {remedy}".strip())
        self.message = message
        self.remedy = remedy
        self.setting = setting


class JavaNotFoundError(ServerError):
    """No Java runtime of a version that the server can use."""


class ArtifactError(ServerError):
    """A Java archive could not be downloaded or does not have the pinned checksum."""


class PortTakenError(ServerError):
    """Another process listens on the port."""


class DirectoryError(ServerError):
    """The data directory cannot be created or written, or its disk is full."""


class AlreadyRunningError(ServerError):
    """A living process holds the data directory."""


class ServerDiedError(ServerError):
    """The server ended or stayed silent during its start; the message quotes its last log lines."""
