"""How other commands ask a running supervisor for something: a socket in its directory.

    concord workers 3 ──► DIR/run/control.sock ──► supervisor
                      ◄── a JSON object a line, as things happen; the last one says "done" or why not

A Unix socket and not the HTTP endpoints, because those are open to everybody on the machine and only tell: this one
belongs to whoever owns the directory (mode 0600), and only changes how many processes there are and when they restart.

One request is carried out at a time; a second one is refused and says which is under way. What is asked for goes on
when whoever asked is gone, since half a rolling restart is worse than a whole one.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import structlog

log = structlog.get_logger()

Step = Mapping[str, Any]
"""Something that has happened, as it is told to whoever asked."""

Request = Mapping[str, Any]
Ability = Callable[[Request], AsyncIterator[Step]]
"""Carries a request out and yields its steps. Raises ValueError for a request that makes no sense."""

MAX_REQUEST_BYTES = 64 * 1024


class ControlError(Exception):
    """What was asked for was not done; the text says why."""


def socket_path(directory: Path) -> Path:
    return directory / "run" / "control.sock"


class ControlServer:
    """Serves `abilities` by their names until `stop`."""

    def __init__(self, directory: Path, abilities: Mapping[str, Ability]) -> None:
        self._path = socket_path(directory)
        self._abilities = abilities
        self._under_way = ""
        self._server: asyncio.Server | None = None
        self._work: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.unlink(missing_ok=True)  # of a supervisor that was killed: the directory's lock is ours
        with _short(self._path) as path:
            before = os.umask(0o177)
            try:
                self._server = await asyncio.start_unix_server(self._serve, path, limit=MAX_REQUEST_BYTES)
            finally:
                os.umask(before)

    async def stop(self) -> None:
        """Give up what is under way."""
        if self._server is not None:
            self._server.close()
        if self._work is not None:
            self._work.cancel()
            await asyncio.wait([self._work])
        self._path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def tell(step: Step) -> None:
            if not writer.is_closing():
                writer.write(json.dumps(step).encode() + b"\n")

        try:
            request = json.loads(await reader.readline())
            ability = self._abilities[request["do"]]
        except (ValueError, KeyError, TypeError):
            tell({"error": f"The supervisor can {' or '.join(self._abilities)}, and was asked for nothing of that."})
        else:
            if self._under_way:
                tell({"error": f"The supervisor is busy: {self._under_way} is under way. Ask again when it is done."})
            else:
                self._under_way = request["do"]
                self._work = asyncio.ensure_future(self._carry_out(ability, request, tell))
                await asyncio.wait([self._work])
        with suppress(OSError):
            await writer.drain()
            writer.close()
            await writer.wait_closed()

    async def _carry_out(self, ability: Ability, request: Request, tell: Callable[[Step], None]) -> None:
        try:
            async for step in ability(request):
                log.info("control", asked=request["do"], **step)
                tell(step)
        except Exception as error:
            log.error("control_failed", asked=request["do"], error=repr(error))
            tell({"error": str(error) or repr(error)})
        else:
            tell({"done": True})
        finally:
            self._under_way = ""


def ask_supervisor(directory: Path, request: Request) -> Iterator[Step]:
    """The steps of `request`, as the supervisor of `directory` tells them; ends when all is done.

    Raises ControlError with the supervisor's reason, or when it ends before it is done; OSError if there is none.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        with _short(socket_path(directory)) as path:
            connection.connect(path)
        connection.sendall(json.dumps(request).encode() + b"\n")
        with connection.makefile("rb") as lines:
            for line in lines:
                step = json.loads(line)
                if "error" in step:
                    raise ControlError(step["error"])
                if "done" in step:
                    return
                yield step
    raise ControlError("The supervisor ended before it was done.")


@contextmanager
def _short(path: Path) -> Iterator[str]:
    """`path` as the kernel takes it: the name of a socket has 107 bytes at most, and a directory may be deep."""
    descriptor = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{path.name}"
    finally:
        os.close(descriptor)
