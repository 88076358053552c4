"""`concord stack`: Kafka and Cassandra on this machine without a system, for development against them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from scripts.cli.errors import CommandError
from scripts.cli.exit_codes import ExitCode
from scripts.cli.options import DEFAULT_DIRECTORY, Data, Shape, command
from scripts.cli.output import Output, note
from scripts.cli.system import holder, stack_lock_path, stack_state_path

STOPPED_WITHIN_S = 90.0
FOLLOWED_EVERY_S = 0.2

COLUMNS = ("server", "state", "pid", "address", "heap_mb", "data_mb")


class ServerName(StrEnum):
    """The two servers, named as their folders in DIR."""

    KAFKA = "kafka"
    CASSANDRA = "cassandra"


def register(app: typer.Typer) -> None:
    stack = typer.Typer(no_args_is_help=True)
    app.add_typer(stack, name="stack", help="Kafka and Cassandra alone, on this machine.")

    @command(stack, "up")
    def up(
        foreground: Annotated[
            bool, typer.Option("--foreground", help="Stay, and stop both at Ctrl-C, instead of leaving them running.")
        ] = False,
        data: Data = DEFAULT_DIRECTORY,
        output: Shape = None,
    ) -> None:
        """Start Kafka and Cassandra and leave them running; returns when both serve.

        Their data lie in DIR, where profile stack has them. Prints their addresses and the environment in which
        `concord up` uses them. Running already, they stay as they are. Settings: CONCORD_KAFKA__PORT and __HEAP_MB,
        CONCORD_CASSANDRA__PORT and __HEAP_MB.
        """
        shape = Output.of(output)
        directory = data.expanduser().absolute()
        if foreground:
            _stay(directory, shape)
            return
        running = _running_line(directory)
        shape.show(running or _start(directory), _for_people)

    @command(stack, "down")
    def down(data: Data = DEFAULT_DIRECTORY, output: Shape = None) -> None:
        """Stop both cleanly; returns when they have ended. Their data stay."""
        directory = data.expanduser().absolute()
        started_s = time.monotonic()
        pid = _holder(directory)
        if pid:
            _stop(directory, pid)
        Output.of(output).show(
            {"stopped": bool(pid), "pid": pid, "seconds": round(time.monotonic() - started_s, 1)},
            lambda line: (
                f"Stopped after {line['seconds']} s."
                if line["stopped"]
                else f"Nothing of `concord stack` runs in {data}."
            ),
        )

    @command(stack, "status")
    def status(data: Data = DEFAULT_DIRECTORY, output: Shape = None) -> ExitCode:
        """State, process, address, heap and size of data of both; exit code 6 unless both serve."""
        directory = data.expanduser().absolute()
        rows = [_described(directory, name) for name in ServerName]
        Output.of(output).table(rows, COLUMNS)
        return ExitCode.DONE if all(row["state"] == "ready" for row in rows) else ExitCode.UNREACHABLE

    @command(stack, "logs")
    def logs(
        server: Annotated[ServerName | None, typer.Argument(help="Which server; both if not said.")] = None,
        follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is written from now on.")] = False,
        lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many of the last lines.")] = 20,
        data: Data = DEFAULT_DIRECTORY,
        output: Shape = None,
    ) -> None:
        """What the servers wrote to their logs."""
        shape = Output.of(output)
        directory = data.expanduser().absolute()
        names = [server] if server is not None else list(ServerName)
        files = {str(name): directory / name / "server.log" for name in names}
        if not follow and not any(file.exists() for file in files.values()):
            raise CommandError(
                f"No server has run in {data} yet. Start them with `concord stack up`.", ExitCode.UNREACHABLE
            )
        for name, line in _lines(files, last=lines, follow=follow):
            shape.show(
                {"server": name, "line": line},
                lambda shown: f"{shown['server']}: {shown['line']}" if len(names) > 1 else shown["line"],
            )


def _for_people(line: Mapping[str, Any]) -> str:
    variables = "\n".join(f"export {name}={value}" for name, value in line["environment"].items())
    return (
        f"Kafka serves at {line['kafka']}, Cassandra at {line['cassandra']}. `concord stack down` stops them. "
        f"To use them with `concord up --profile cluster`:\n{variables}"
    )


# --- up and down -------------------------------------------------------------------------------------------------


def _stay(directory: Path, shape: Output) -> None:
    import asyncio

    from infra.config import load_settings
    from infra.telemetry import configure_logging
    from scripts.stack import run

    settings = load_settings(data_dir=directory)
    configure_logging(settings.log_level, process="stack")
    asyncio.run(run(settings, on_ready=lambda line: shape.show(line, _for_people), progress=note))


def _running_line(directory: Path) -> dict[str, Any] | None:
    """What a start said that is running and whose servers serve; None where there is none."""
    pid = _holder(directory)
    if pid is None:
        return None
    state = _state(directory)
    states = {name: server["state"] for name, server in state.get("servers", {}).items()}
    if state.get("pid") != pid or set(states.values()) != {"ready"}:
        raise CommandError(
            f"The servers of `concord stack` are running in {directory} already (process {pid}) and do not serve yet: "
            f"{json.dumps(states)}. Wait, see `concord stack logs`, or stop them with `concord stack down`."
        )
    from scripts.stack import ready_line

    return ready_line(state)


def _start(directory: Path) -> dict[str, Any]:
    """Start the keeper and wait for what it says. Raises CommandError with the reason when it cannot start."""
    log = directory / "logs" / "stack.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    reads, tells = os.pipe()
    with log.open("ab") as file:
        keeper = subprocess.Popen(
            [sys.executable, "-m", "scripts.stack", "--data", str(directory), "--tell", str(tells)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            pass_fds=(tells,),
            start_new_session=True,
        )
    os.close(tells)
    try:
        with open(reads, encoding="utf-8") as said:
            for line in map(json.loads, said):
                if "note" in line:
                    note(line["note"])
                elif "error" in line:
                    raise CommandError(line["error"], ExitCode(line["code"]))
                else:
                    return dict(line)
    except KeyboardInterrupt:
        keeper.terminate()
        keeper.wait(STOPPED_WITHIN_S)
        raise
    raise CommandError(f"The servers' keeper ended with {keeper.wait()} before they served. It wrote to {log}.")


def _stop(directory: Path, pid: int) -> None:
    until_s = time.monotonic() + STOPPED_WITHIN_S
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    while _holder(directory) == pid:
        if time.monotonic() > until_s:
            raise CommandError(
                f"Process {pid} has not stopped its servers within {STOPPED_WITHIN_S:.0f} s. See "
                f"{directory / 'logs' / 'stack.log'}, or end it with `kill -9 {pid}`: its servers end with it."
            )
        time.sleep(0.05)


def _holder(directory: Path) -> int | None:
    return holder(directory, lock=stack_lock_path(directory))


# --- what there is -----------------------------------------------------------------------------------------------


def _state(directory: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(stack_state_path(directory).read_text())
    except (OSError, ValueError):
        return {}
    return found


def _described(directory: Path, name: str) -> dict[str, Any]:
    state = _state(directory)
    runs = _holder(directory) is not None and state
    server = state["servers"][name] if runs else {"state": "stopped"}
    size = sum(_sizes(directory / name))
    return {
        "server": str(name),
        "state": server["state"],
        "pid": server.get("pid"),
        "address": server.get("address"),
        "heap_mb": server.get("heap_mb"),
        "data_mb": round(size / 2**20, 1),
    }


def _sizes(directory: Path) -> Iterator[int]:
    """Of every file below; those that vanish meanwhile are passed over."""
    for folder, _, names in os.walk(directory):
        for name in names:
            with suppress(OSError):
                yield (Path(folder) / name).lstat().st_size


# --- logs --------------------------------------------------------------------------------------------------------


def _lines(files: Mapping[str, Path], *, last: int, follow: bool) -> Iterator[tuple[str, str]]:
    """(server, line): the last lines of each file, then, to follow, what is added to any of them."""
    tails = {name: _Tail(file) for name, file in files.items()}
    for name, tail in tails.items():
        for line in (tail.more() or [])[-last:] if last else ():
            yield name, line
        if not last:
            tail.more()
    while follow:
        time.sleep(FOLLOWED_EVERY_S)
        for name, tail in tails.items():
            for line in tail.more():
                yield name, line


class _Tail:
    """Whole lines that were added to a file since they were last asked for; begins anew when it was rotated."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._at = 0
        self._inode = 0

    def more(self) -> Sequence[str]:
        try:
            with self._file.open("rb") as opened:
                about = os.fstat(opened.fileno())
                if about.st_ino != self._inode or about.st_size < self._at:
                    self._inode, self._at = about.st_ino, 0
                opened.seek(self._at)
                read = opened.read()
        except OSError:
            return ()
        whole = read[: read.rfind(b"\n") + 1]
        self._at += len(whole)
        return whole.decode("utf-8", "replace").splitlines()
