"""Named places where a test may stop, kill or break this process: no-ops unless armed.

Armed by the file that `CONCORD_FAILPOINTS` names. A line `NAME=ACTION@NTH` arms one point: the NTH time (from 1,
counted over all processes of the run, each line fires once) that any process reaches NAME, it is killed (`kill`),
raises FailpointError (`raise`), sleeps two seconds (`sleep`) or hangs until killed (`hang`). Every firing appends a
line `NAME ACTION PID` to `<file>.fired`, before it acts, so that a test can prove that its point was reached.

Counting over processes goes through the file itself (a lock around read, decrement, write): points are reached
rarely enough in tests, and never looked up at all where the variable is unset.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import threading
from pathlib import Path

FAILPOINTS = (
    # infra/consensus_commit: one transaction's steps
    "intent.before",
    "intent.after",
    "prepare.before_records",
    "prepare.between_units",
    "prepare.after_records",
    "validate.after_records",
    "commit_state.before",
    "commit_state.after",
    "commit_records.before",
    "commit_records.between_units",
    "commit_records.after",
    "rollback.before_records",
    "rollback.after_records",
    "one_phase.before",
    "one_phase.after",
    # infra/consensus_commit: the one who cleans up
    "recovery.before_abort",
    "recovery.before_roll_forward",
    "recovery.before_roll_back",
    # actors: a command's life at its home, its participants and its coordinator
    "home.before_handler",
    "home.after_handler",
    "home.before_commit_request",
    "home.after_decision",
    "participant.before_call",
    "participant.after_call",
    "coordinator.before_prepare",
    "coordinator.after_prepare",
    "coordinator.before_commit_records",
    "settle.before",
    # streams: from the topic and back to it
    "worker.before_execute",
    "worker.after_execute",
    "worker.before_publish",
    "worker.after_publish",
    "worker.before_dead_letter",
    "worker.after_dead_letter",
    "worker.after_acknowledge",
    "projection.before_apply",
    "projection.after_apply",
)
"""Every failpoint of the system; `reach` refuses others, so that this list stays the truth."""

_file = os.environ.get("CONCORD_FAILPOINTS")


class FailpointError(Exception):
    """What the action `raise` raises: no part of the system expects it."""


async def reach(name: str) -> None:
    """Do what is armed for `name`; nothing, at the price of one comparison, when failpoints are off."""
    if _file is None:
        return
    action = _take(Path(_file), name)
    if action is None:
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "raise":
        raise FailpointError(name)
    elif action == "sleep":
        await asyncio.sleep(2)
    elif action == "hang":
        # To this very thread: sent to the process, it is some other thread that takes it, and this one goes on until
        # that has happened, into the next step and perhaps the middle of a write.
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
    else:
        raise ValueError(f"failpoint {name}: unknown action {action!r}")


def arm(file: Path, lines: list[str]) -> None:
    """Replace what is armed in `file` by `lines` (`NAME=ACTION@NTH`); ValueError for an unknown name."""
    for line in lines:
        if line.partition("=")[0] not in FAILPOINTS:
            raise ValueError(f"no failpoint is called {line.partition('=')[0]!r}")
    with open(f"{file}.lock", "w") as lock:  # some process may be taking a line at this moment
        fcntl.flock(lock, fcntl.LOCK_EX)
        temporary = file.with_suffix(".new")
        temporary.write_text("".join(f"{line}\n" for line in lines))
        temporary.replace(file)


def fired(file: Path) -> list[str]:
    """Names of the points that fired since the file was made, in order."""
    log = Path(f"{file}.fired")
    return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []


def _take(file: Path, name: str) -> str | None:
    assert name in FAILPOINTS, f"failpoint {name!r} is not in the list"
    try:
        if not os.stat(file).st_size:  # Nearly always nothing is armed, and points are reached all the time.
            return None
        text = file.read_text()
    except FileNotFoundError:
        return None
    if f"{name}=" not in text:
        return None
    with open(f"{file}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lines = file.read_text().splitlines()
        action = None
        kept = []
        for line in lines:
            armed, _, rest = line.partition("=")
            if armed != name or action is not None:
                kept.append(line)
                continue
            what, _, nth = rest.partition("@")
            if int(nth or 1) > 1:
                kept.append(f"{armed}={what}@{int(nth) - 1}")
            else:
                action = what
                with open(f"{file}.fired", "a") as log:
                    log.write(f"{name} {what} {os.getpid()}\n")
        temporary = file.with_suffix(".new")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        temporary.replace(file)
        return action
