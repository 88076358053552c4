"""The driver's connections, served by the event loop of those who ask.

The driver brings reactors that run in a thread of their own. Then every request and every answer changes threads, two
threads contend for the interpreter, and every request is a packet of its own. Here the loop that asks also reads and
writes the sockets:

    push       what a turn of the loop sends goes out together at its end, in one packet where it fits
    read       an answer is decoded and handed to whoever waits for it in the same turn
    others     the driver's own threads (connecting, heartbeats, reconnecting) may send as well: through the loop. A
               connection is opened in such a thread, TLS included, and only then served by the loop

    silence    the loop sends heartbeats too. The driver's would be judged by a thread, which cannot tell a server that
               does not answer from a loop that does not listen: a program that keeps its loop busy for a while, or
               runs it in pieces, would lose connections that nothing is wrong with

A connection lives as long as its loop: when that was closed, the connection is defunct. Nothing here waits.

Source: the driver's `cassandra.connection.Connection`, of which this is one more implementation.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar

from cassandra import OperationTimedOut
from cassandra.connection import Connection, ConnectionShutdown
from cassandra.protocol import OptionsMessage

logger = logging.getLogger(__name__)

_RECEIVED_AT_ONCE = 256 * 1024
_WOULD_BLOCK = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class LoopTimer:
    """A timer of the driver, kept by the loop: `callback` is called once after `timeout` seconds unless cancelled."""

    def __init__(self, loop: asyncio.AbstractEventLoop, timeout: float, callback: Callable[[], None]) -> None:
        self._loop = loop
        self._callback: Callable[[], None] | None = callback
        self._handle: asyncio.TimerHandle | None = None
        if runs_here(loop):
            self._begin(timeout)
        else:
            _from_outside(loop, lambda: self._begin(timeout))

    def _begin(self, timeout: float) -> None:
        if self._callback is not None:
            self._handle = self._loop.call_later(timeout, self._due)

    def _due(self) -> None:
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()

    def cancel(self) -> None:
        """From any thread. The handle is the loop's own: from another thread the timer only forgets what to call."""
        self._callback = None
        if self._handle is not None and runs_here(self._loop):
            self._handle.cancel()


class LoopConnection(Connection):  # type: ignore[misc]
    """One connection to a node. Use a subclass made by `connections_of`, which knows its loop."""

    heartbeat_interval_s: ClassVar[float] = 5.0
    heartbeat_timeout_s: ClassVar[float] = 10.0
    """A connection that a network swallowed in silence is noticed after the sum of both."""

    is_idle: ClassVar[bool] = False
    """What the driver asks before it sends a heartbeat of its own."""

    loop: ClassVar[asyncio.AbstractEventLoop]
    is_closed: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._heard = False
        self._heartbeat: asyncio.TimerHandle | None = None
        self._outgoing: deque[bytes] = deque()
        self._flush_is_due = False
        self._waits_to_write = False
        self._connect_socket()
        self._socket.setblocking(False)
        _from_outside(self.loop, self._begin_reading)
        self._send_options_message()

    @classmethod
    def create_timer(cls, timeout: float, callback: Callable[[], None]) -> LoopTimer:
        return LoopTimer(cls.loop, timeout, callback)

    def push(self, data: bytes) -> None:
        """Send `data`, soon; from any thread."""
        self._outgoing.append(data)
        if self._flush_is_due:
            return
        self._flush_is_due = True
        if runs_here(self.loop):
            self.loop.call_soon(self._flush)
        elif not _from_outside(self.loop, self._flush):
            self.defunct(ConnectionShutdown("the event loop of this connection was closed", self.endpoint))

    def close(self) -> None:
        """Close, from any thread; requests without an answer fail."""
        with self.lock:
            if self.is_closed:
                return
            self.is_closed = True
        if runs_here(self.loop):
            self._close_socket()
        elif not _from_outside(self.loop, self._close_socket):
            self._socket.close()
        if not self.is_defunct:
            self.error_all_requests(ConnectionShutdown(f"the connection to {self.endpoint} was closed", self.endpoint))
            self.connected_event.set()  # Whoever waits for the connection to be ready has waited in vain.

    # -- on the loop

    def _begin_reading(self) -> None:
        if not self.is_closed:
            self.loop.add_reader(self._socket.fileno(), self._read)
            self._heartbeat = self.loop.call_later(self.heartbeat_interval_s, self._beat)

    def _beat(self) -> None:
        """Ask for a sign of life, where there was none for a while."""
        if self.is_closed or self.is_defunct:
            return
        if self._heard:
            self._heard = False
            self._heartbeat = self.loop.call_later(self.heartbeat_interval_s, self._beat)
            return
        with self.lock, suppress(ConnectionShutdown):  # by another thread, this moment
            if self.in_flight < self.max_request_id:  # Else there are answers enough to come.
                self.in_flight += 1
                self.send_msg(OptionsMessage(), self.get_request_id(), self._beat_answered)
        self._heartbeat = self.loop.call_later(self.heartbeat_timeout_s, self._judge)

    def _beat_answered(self, _response: Any) -> None:
        with self.lock:
            self.in_flight -= 1

    def _judge(self) -> None:
        """Give the connection up if nothing came. Of what came meanwhile, a loop that stood still reads first."""
        if self._heard:
            self._beat()
        elif not self.is_closed:
            silent = f"nothing was heard for {self.heartbeat_timeout_s} s after a heartbeat"
            self.defunct(OperationTimedOut(silent, self.endpoint))

    def _read(self) -> None:
        ended = False
        try:
            while True:
                received = self._socket.recv(_RECEIVED_AT_ONCE)
                self._iobuf.write(received)
                self._heard = True
                ended = not received
                # TLS gives a record at a time, and what it holds back wakes nobody: ask until it has no more.
                if ended or (self.ssl_context is None and len(received) < _RECEIVED_AT_ONCE):
                    break
        except _WOULD_BLOCK:
            pass
        except OSError as error:
            self.defunct(error)
            return
        if self._iobuf.tell():
            self.process_io_buffer()
        if ended:
            logger.debug("%s closed its connection", self.endpoint)
            self.defunct(ConnectionShutdown(f"{self.endpoint} closed the connection", self.endpoint))

    def _flush(self) -> None:
        # First: what another thread pushes from here on may ask for a flush of its own, which finds nothing to do.
        self._flush_is_due = False
        if self.is_closed or self.is_defunct:
            self._outgoing.clear()
            return
        if self._waits_to_write:
            return
        self._write()

    def _write(self) -> None:
        while self._outgoing:
            together = b"".join([self._outgoing.popleft() for _ in range(len(self._outgoing))])
            try:
                sent = self._socket.send(together)
            except _WOULD_BLOCK:
                sent = 0
            except OSError as error:
                self.defunct(error)
                return
            if sent < len(together):
                self._outgoing.appendleft(together[sent:])
                if not self._waits_to_write:
                    self._waits_to_write = True
                    self.loop.add_writer(self._socket.fileno(), self._write)
                return
        if self._waits_to_write:
            self._waits_to_write = False
            self.loop.remove_writer(self._socket.fileno())

    def _close_socket(self) -> None:
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        descriptor = self._socket.fileno()
        if descriptor >= 0:
            self.loop.remove_reader(descriptor)
            self.loop.remove_writer(descriptor)
            self._socket.close()


def connections_of(loop: asyncio.AbstractEventLoop) -> type[LoopConnection]:
    """A class of connections that `loop` serves: the driver makes them, and their timers, without arguments of ours."""
    return type("LoopConnection", (LoopConnection,), {"loop": loop})


def runs_here(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether the caller is called by `loop`."""
    return asyncio._get_running_loop() is loop


def _from_outside(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> bool:
    """Have the loop call it; False if it was closed."""
    try:
        loop.call_soon_threadsafe(call)
    except RuntimeError:
        return False
    return True
