"""Programs that are steered by JSON lines, in Java or Python, and may be killed at any time.

A command is one line, `{"id": …, "do": …, …}`; its answer is the line with that id and `result` or `error`. Lines with
`event` tell what happens meanwhile; they are kept in order, so that a test can wait for one, or read them all at the
end. Commands run side by side in the program. The end of its standard input ends it, so it never outlives the test.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from infra.servers.java import find_java
from scripts.java_peer.peer import scalardb_class_path

ROOT = Path(__file__).parents[2]
SOURCES = Path(__file__).with_name("java")
NO_COMPILER = (
    "no javac was found: install a JDK of version 11 or newer (Debian: apt-get install openjdk-17-jdk-headless),"
    " or point JAVA_HOME at one"
)

_PATIENCE_S = 60

Line = dict[str, Any]


class PeerError(Exception):
    """The program answered with an error; `kind` is the simple name of its class."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class PeerGoneError(Exception):
    """The program ended before it answered."""


class PeerProcess:
    """A running program. `events` holds every event so far."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self._log = log
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._grown = asyncio.Condition()
        self.events: list[Line] = []
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, argv: list[str], *, env: Mapping[str, str] | None = None) -> PeerProcess:
        """Start a program and wait until it says that it is ready."""
        descriptor, name = tempfile.mkstemp(prefix="peer-", suffix=".log")
        try:
            process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=descriptor,
                cwd=ROOT,
                env=os.environ | dict(env or {}),
                limit=64 * 1024 * 1024,
            )
        finally:
            os.close(descriptor)
        peer = cls(process, Path(name))
        await peer.event(lambda line: line["event"] == "ready")
        return peer

    @property
    def pid(self) -> int:
        return self._process.pid

    def begin(self, do: str, **command: Any) -> asyncio.Future[Any]:
        """Send a command; its answer, as a future, which raises PeerError or PeerGoneError."""
        assert self._process.stdin is not None
        number = len(self._answers) + 1
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        self._process.stdin.write(json.dumps({"id": number, "do": do, **command}).encode() + b"\n")
        return answer

    async def ask(self, do: str, **command: Any) -> Any:
        """Send a command and wait for its answer."""
        return await self.begin(do, **command)

    async def event(self, wanted: Callable[[Line], bool]) -> Line:
        """The first event that is `wanted`, had or to come."""
        await self.events_until(lambda events: any(map(wanted, events)))
        return next(filter(wanted, self.events))

    async def events_until(
        self, enough: Callable[[list[Line]], bool], *, during: Sequence[asyncio.Future[Any]] = ()
    ) -> None:
        """Wait until the events are `enough`. None of the commands `during` which they come may end before that."""
        async with asyncio.timeout(_PATIENCE_S), self._grown:
            while not enough(self.events):
                if self._reading.done():
                    raise PeerGoneError(self._last_words())
                for ended in (answer for answer in during if answer.done()):
                    raise AssertionError(f"it was to be held, and ended: {ended.result()}")
                await self._grown.wait()

    async def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self._process.send_signal(signal.SIGKILL)
        await self._ended()

    async def stop(self) -> None:
        """Close its standard input, and wait for the end. Nothing happens when it has ended."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(asyncio.shield(self._reading), 15)
        except TimeoutError:
            self._process.kill()
        await self._ended()

    async def _ended(self) -> None:
        await self._reading
        await self._process.wait()
        self._log.unlink(missing_ok=True)

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for text in self._process.stdout:
            try:
                line: Line = json.loads(text)
            except ValueError:  # A killed program may leave half a line.
                continue
            if "event" in line:
                self.events.append(line)
                async with self._grown:
                    self._grown.notify_all()
                continue
            answer = self._answers[line["id"]]
            if answer.done():
                continue
            if "error" in line:
                answer.set_exception(PeerError(line["error"], line["message"]))
                answer.exception()  # Whoever began a command may not ask.
            else:
                answer.set_result(line["result"])
            async with self._grown:
                self._grown.notify_all()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(PeerGoneError(self._last_words()))
                answer.exception()  # Whoever killed the program may not ask.
        async with self._grown:
            self._grown.notify_all()

    def _last_words(self) -> str:
        return self._log.read_text(errors="replace")[-2000:] if self._log.exists() else "the program has ended"


def java_compiler() -> Path | None:
    """`javac`, of JAVA_HOME or on PATH; None if there is none."""
    home = os.environ.get("JAVA_HOME")
    if home and (Path(home) / "bin" / "javac").exists():
        return Path(home) / "bin" / "javac"
    on_path = shutil.which("javac")
    return Path(on_path) if on_path else None


async def compile_java(classes: Path) -> None:
    """Compile the Java program into `classes`. RuntimeError with the compiler's words, or where there is none."""
    compiler = java_compiler()
    if compiler is None:
        raise RuntimeError(NO_COMPILER)
    sources = sorted(map(str, SOURCES.glob("*.java")))
    process = await asyncio.create_subprocess_exec(
        *(str(compiler), "--release", "11", "-nowarn", "-d", str(classes), "-cp", scalardb_class_path(), *sources),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    if process.returncode != 0:
        raise RuntimeError(output.decode())
    shutil.copytree(SOURCES / "META-INF", classes / "META-INF")


async def start_java(classes: Path, *, heap_mb: int = 384) -> PeerProcess:
    """Start the compiled Java program. Whatever `javac` there is, it runs on the `java` that the servers run on."""
    java = find_java(minimum=11)
    return await PeerProcess.start(
        [
            str(java.executable),
            f"-Xmx{heap_mb}m",
            "-XX:+UseSerialGC",
            "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
            "-cp",
            f"{classes}:{scalardb_class_path()}",
            "Peer",
        ]
    )


def scalardb_settings(port: int, **more: str) -> dict[str, str]:
    """ScalarDB's properties for the Cassandra at `port`, SERIALIZABLE; `more` by their names with `__` for a dot."""
    return {
        "scalar.db.contact_points": "127.0.0.1",
        "scalar.db.contact_port": str(port),
        "scalar.db.storage": "cassandra",
        "scalar.db.consensus_commit.isolation_level": "SERIALIZABLE",
        **{name.replace("__", "."): value for name, value in more.items()},
    }
