"""What the exit status of `concord` says. Part of the command line's contract: numbers never change."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum


class ExitCode(IntEnum):
    DONE = 0
    """Done; for `send --wait` and `status`: committed."""
    FAILED = 1
    """An unexpected failure, or a check that found something."""
    USAGE = 2
    """Bad usage or wrong configuration: nothing was done."""
    REFUSED = 3
    DEAD_LETTERED = 4
    NO_ANSWER = 5
    """No answer in time, or no such command is known."""
    UNREACHABLE = 6
    """The system, its Kafka or its storage cannot be reached."""


OF_STATUS = {
    "committed": ExitCode.DONE,
    "refused": ExitCode.REFUSED,
    "dead-lettered": ExitCode.DEAD_LETTERED,
    "unknown": ExitCode.NO_ANSWER,
    "invalid": ExitCode.USAGE,
    "sent": ExitCode.DONE,
}
"""The exit code of one command's status."""


def worst(codes: Iterable[ExitCode]) -> ExitCode:
    """The code of many outcomes together: the highest number among them."""
    return max(codes, default=ExitCode.DONE)
