"""The processes that transfer, seen from the one that hurts them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.proof.disks.accounts import Ledger

_PATIENCE_S = 120.0


class Client:
    """One process of `client.py`, and what it has said so far."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self.ledger = Ledger(set(), set(), set(), set())
        self.errors: Counter[str] = Counter()
        """How often each error was met, by its name."""
        self.remedies: Counter[str] = Counter()
        self.messages: Counter[str] = Counter()
        self.reads = 0
        self.unreadable: Counter[str] = Counter()
        self.sums: Counter[int] = Counter()
        self.clock_errors_s: list[int] = []
        """By how much its clock differed from ours, at each mark."""
        self._process = process
        self._ended = False
        self._marks: set[str] = set()
        self._said = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    @property
    def pid(self) -> int:
        return self._process.pid

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            if not line.endswith(b"\n"):
                break  # killed in the middle of a word
            self._hear(json.loads(line))
            self._said.set()
        self._said.set()

    def _hear(self, words: Sequence[Any]) -> None:
        match words:
            case ["begun", tx_id]:
                self.ledger.begun.add(tx_id)
            case ["committed", tx_id]:
                self.ledger.committed.add(tx_id)
            case ["unknown", tx_id]:
                self.ledger.unknown.add(tx_id)
                self.errors["unknown"] += 1
            case ["failed", tx_id, error, message, remedy]:
                self.ledger.failed.add(tx_id)
                self.errors[error] += 1
                if remedy:
                    self.remedies[remedy] += 1
                if error == "UnavailableStorageError":
                    self.messages[message] += 1
            case ["read", _ms]:
                self.reads += 1
            case ["unreadable", error]:
                self.unreadable[error] += 1
            case ["sum", total]:
                self.sums[total] += 1
            case ["mark", text, ms]:
                self.clock_errors_s.append(round(ms / 1000 - time.time()))
                self._marks.add(text)
            case ["ended"]:
                self._ended = True
            case _:
                raise ValueError(f"client {self.name} said {words}")

    @property
    def refused(self) -> int:
        """How many transfers the storage refused, conflicts apart."""
        return self.errors["UnavailableStorageError"]

    async def until(self, condition: Callable[[], bool], what: str, *, within_s: float = _PATIENCE_S) -> None:
        """Wait until something that this client says makes `condition` true; AssertionError after `within_s`."""
        try:
            async with asyncio.timeout(within_s):
                while not condition():
                    self._said.clear()
                    if self._reading.done():
                        self._reading.result()
                        raise AssertionError(f"client {self.name} ended before {what}")
                    await self._said.wait()
        except TimeoutError:
            raise AssertionError(
                f"client {self.name}: {what} did not come about within {within_s:.0f} s; {self.summary()}"
            ) from None

    async def more_commits(self, count: int, *, within_s: float = _PATIENCE_S) -> None:
        """Wait until `count` more transfers were acknowledged."""
        goal = len(self.ledger.committed) + count
        await self.until(lambda: len(self.ledger.committed) >= goal, f"{count} more commits", within_s=within_s)

    async def mark(self, text: str) -> None:
        """Wait until all that this client said before now was heard."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{text}\n".encode())
        await self._process.stdin.drain()
        await self.until(lambda: text in self._marks, f"the mark {text!r}")

    def kill(self) -> None:
        """SIGKILL."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        # asyncio's `send_signal` looks first, and would take the end of a process from the watcher that waits for it.
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def wait(self) -> None:
        """Wait for its end, and until its last word was heard."""
        await self._process.wait()
        await self._reading

    async def end(self) -> None:
        """Let it finish what is under way, and wait for its end."""
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(60):
                await self.wait()
        except TimeoutError:
            self.kill()
            await self.wait()
            raise AssertionError(f"client {self.name} did not end; {self.summary()}") from None
        if not self._ended:
            raise AssertionError(f"client {self.name} died of itself; {self.summary()}")

    def summary(self) -> dict[str, Any]:
        """What it has said, in numbers."""
        ledger = self.ledger
        return {
            "begun": len(ledger.begun),
            "committed": len(ledger.committed),
            "unknown": len(ledger.unknown),
            "errors": dict(sorted(self.errors.items())),
            "reads": self.reads,
            "sums": self.sums.total(),
            "unreadable": dict(sorted(self.unreadable.items())),
            "refused": dict(self.messages.most_common(3)),
        }


@contextlib.asynccontextmanager
async def client(
    url: str, name: str, *options: str, environment: Mapping[str, str] | None = None
) -> AsyncIterator[Client]:
    """A client of the storage at `url` until the end of the block, when it is killed if it still runs."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "scripts.proof.disks.client", url, "--name", name, *options),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[3],
        env={**os.environ, **(environment or {})},
    )
    started = Client(name, process)
    try:
        yield started
    finally:
        started.kill()
        await started.wait()
