"""A TCP proxy that loses, holds back, delays or breaks what passes through it, as a network would.

    async with TcpProxy(host, port) as proxy:
        storage = CassandraStorage([proxy.host], proxy.port)
        ...
        proxy.swallow_answers()     # requests arrive and are executed; nobody hears of it
        ...
        proxy.pass_on()             # whole again: connections that lost bytes are broken, as no protocol survives that

Requests are what clients send, answers what the server sends. Modes hold for all connections, old and new, until the
next one is set. It runs on the event loop of its caller and knows nothing of what it carries, but for `KafkaProxy`: a
broker tells its clients where it is, so its answers are made to say where the proxy is.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import suppress
from types import TracebackType
from typing import Literal, Self

Mode = Literal["pass", "hold answers", "swallow answers", "swallow requests", "break on answer", "refuse"]

_CHUNK = 65_536
_SIZE = struct.Struct(">i")
"""Before each of Kafka's answers."""


class _Link:
    """One client's connection and ours to the server for it."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self.client = client
        self.server = server
        self.lost_bytes = False
        self.unfinished = b""
        """The beginning of an answer whose end has not come yet; where answers are looked into."""

    def reset(self) -> None:
        """Close both ends with RST, without sending what is buffered."""
        for writer in (self.client, self.server):
            end = writer.get_extra_info("socket")
            if end is not None:
                with suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()


class TcpProxy:
    """Listens on a free port of `host` and connects each client to `target_host`:`target_port`."""

    def __init__(self, target_host: str, target_port: int, host: str = "127.0.0.1") -> None:
        self.host = host
        self.port = 0
        self.delay_s = 0.0
        self.answers_lost = 0
        self._target = (target_host, target_port)
        self._mode: Mode = "pass"
        self._passing = asyncio.Event()
        self._passing.set()
        self._loss = asyncio.Event()
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, self.host, 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.reset()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return len(self._links)

    def pass_on(self) -> None:
        """Carry everything, first what was held back. Connections that lost bytes are broken."""
        self.delay_s = 0.0
        for link in [link for link in self._links if link.lost_bytes]:
            link.reset()
        self._set("pass")

    def delay(self, seconds: float) -> None:
        """Carry everything, answers `seconds` late."""
        self._set("pass")
        self.delay_s = seconds

    def hold_answers(self) -> None:
        """Keep answers back until `pass_on`."""
        self._set("hold answers")

    def swallow_answers(self) -> None:
        """Lose answers; connections stay open."""
        self._set("swallow answers")

    def swallow_requests(self) -> None:
        """Lose requests; connections stay open."""
        self._set("swallow requests")

    def break_on_answer(self) -> None:
        """Break a connection when its next answer comes, in place of it."""
        self._set("break on answer")

    def refuse(self) -> None:
        """Break all connections, and every new one at once."""
        self._set("refuse")
        self.reset()

    def reset(self) -> None:
        """Break all connections; new ones are carried as the mode says."""
        for link in list(self._links):
            link.reset()

    async def lost_an_answer(self) -> None:
        """Return when an answer was lost since the mode was set: the server had dealt with its request by then."""
        await self._loss.wait()

    def _set(self, mode: Mode) -> None:
        self._mode = mode
        self._loss.clear()
        if mode == "hold answers":
            self._passing.clear()
        else:
            self._passing.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._mode == "refuse":
            writer.transport.abort()
            return
        try:
            server_reader, server_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        link = _Link(writer, server_writer)
        self._links.add(link)
        pumps = [
            asyncio.ensure_future(self._requests(link, reader)),
            asyncio.ensure_future(self._answers(link, server_reader)),
        ]
        self._tasks.update(pumps)
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._links.discard(link)
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            self._tasks.difference_update(pumps)
            for end in (link.client, link.server):
                end.close()

    async def _requests(self, link: _Link, source: asyncio.StreamReader) -> None:
        with suppress(OSError):
            while chunk := await source.read(_CHUNK):
                if self._mode == "swallow requests":
                    link.lost_bytes = True
                    continue
                link.server.write(chunk)
                await link.server.drain()

    async def _answers(self, link: _Link, source: asyncio.StreamReader) -> None:
        with suppress(OSError):
            while chunk := await source.read(_CHUNK):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                await self._passing.wait()
                if self._mode in ("swallow answers", "break on answer"):
                    link.lost_bytes = True
                    self.answers_lost += 1
                    self._loss.set()
                    if self._mode == "break on answer":
                        link.reset()
                    continue
                link.client.write(self._told(link, chunk))
                await link.client.drain()

    def _told(self, link: _Link, chunk: bytes) -> bytes:
        """What clients are told in place of the server's next bytes."""
        return chunk


class KafkaProxy(TcpProxy):
    """In front of one broker that calls itself `target_host`:`target_port`; its clients stay with the proxy.

    Brokers name themselves in the answers to Metadata and FindCoordinator as a string and an INT32, whatever the
    version, so the name of the proxy takes as many bytes. Source: kafka.apache.org/protocol, "Metadata Response".
    """

    def __init__(self, target_host: str, target_port: int) -> None:
        super().__init__(target_host, target_port, host=target_host)
        self._broker = target_host.encode() + struct.pack(">i", target_port)

    def _told(self, link: _Link, chunk: bytes) -> bytes:
        waiting = link.unfinished + chunk
        end = 0
        while len(waiting) - end >= _SIZE.size:
            (size,) = _SIZE.unpack_from(waiting, end)
            if len(waiting) < end + _SIZE.size + size:
                break
            end += _SIZE.size + size
        link.unfinished = waiting[end:]
        return waiting[:end].replace(self._broker, self.host.encode() + struct.pack(">i", self.port))
