"""The driver's session, for one event loop at a time.

The driver answers through callbacks. Its connections are served by the event loop itself (`cassandra_reactor`), so
that a request and its answer change no thread; the few answers that threads of the driver give (of a statement that a
node had forgotten) come back to the loop through a queue. What does block (connecting, preparing, closing) runs on a
thread of this object. Another loop finds the connections of the one before closed and opens its own.

    permits     at most `max_in_flight` requests are outstanding; a permit returns with the driver's answer, which may
                come after its caller was cancelled
    retries     none, and no speculative execution: the driver passes every error on (FallthroughRetryPolicy). It only
                tries another node for what it could not send at all, and prepares a statement anew that a node forgot
    routing     to the first replica of a partition, always in the same order, so that one node leads its Paxos rounds
    tables      changes go through one node as long as it lives, the first of the data centre by address: two clients
                that create a table at once must not do it on two nodes. The answer waits until all nodes agree

Never here: what the statements mean. A session does not survive a fork and cannot be pickled.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cassandra import ConsistencyLevel, InvalidRequest, Unauthorized
from cassandra.cluster import EXEC_PROFILE_DEFAULT, Cluster, ExecutionProfile, ResponseFuture, ResultSet, Session
from cassandra.policies import (
    ConstantReconnectionPolicy,
    DCAwareRoundRobinPolicy,
    FallthroughRetryPolicy,
    TokenAwarePolicy,
)
from cassandra.query import BatchStatement, BatchType, BoundStatement, SimpleStatement, tuple_factory

from infra.storage.cassandra_errors import connect_error, read_error, write_error
from infra.storage.cassandra_reactor import LoopConnection, connections_of, runs_here
from infra.storage.cassandra_statements import Statement
from infra.storage.errors import InvalidOperationError, UnavailableStorageError, UnusableStorageError

logger = logging.getLogger(__name__)

MAX_PREPARED_STATEMENTS = 2_000
_RECONNECT_DELAY_S = 0.5
_LOOKS_FOR_ENDED_CONNECTIONS_EVERY_S = 5
_CONNECTS_WITHIN_S = 5.0
"""At least: connecting takes a dozen requests of its own, and a client's deadline may be short."""
_ADMINISTRATION_TIMEOUT_S = 60.0
_SCHEMA_AGREEMENT_WAIT_S = 30
_SETTING = "SELECT value FROM system_views.settings WHERE name = '{name}'"

Rows = list[tuple[Any, ...]]


class Page(NamedTuple):
    """Rows, where the next page begins (None after the last one), and the names of the columns."""

    rows: Rows
    next_page: bytes | None
    columns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """How to reach a cluster; `CassandraStorage` explains them."""

    contact_points: tuple[str, ...]
    port: int
    local_dc: str | None
    auth_provider: Any
    ssl_context: Any
    request_timeout_s: float
    max_in_flight: int
    protocol_version: int
    only_authenticated: bool = False
    allow_periodic: bool = False

    @property
    def where(self) -> str:
        return f"Cassandra at {', '.join(self.contact_points)} (port {self.port})"


@dataclass(frozen=True, slots=True)
class _Check:
    """A setting that no node may have a refused value for."""

    setting: str
    refused: Callable[[str], bool]
    applies: Callable[[SessionSettings], bool]
    wrong: str
    remedy: str
    if_unknown: str


_CHECKS = (
    _Check(
        "commitlog_sync",
        lambda value: value == "periodic",
        lambda settings: not settings.allow_periodic,
        "has commitlog_sync: periodic, so that it answers writes which a power failure can still take back",
        "set commitlog_sync to batch or group in the cassandra.yaml of every node and restart it",
        "see that it is batch or group on every node",
    ),
    _Check(
        "authenticator",
        lambda value: value == "None" or "AllowAllAuthenticator" in value,  # None: it is the default
        lambda settings: settings.only_authenticated,
        "has authenticator: AllowAllAuthenticator, so that it lets everybody in, whatever credentials they show",
        "set authenticator to PasswordAuthenticator in the cassandra.yaml of every node and restart it",
        "see that it is PasswordAuthenticator or a stricter one on every node",
    ),
)
"""Looked at on every node of the data centre when a session opens."""


@dataclass
class _LoopSide:
    """What belongs to one event loop."""

    loop: asyncio.AbstractEventLoop
    permits: asyncio.Semaphore
    connecting: asyncio.Task[Session] | None = None
    preparing: dict[str, asyncio.Future[Any]] = field(default_factory=dict)
    answers: deque[Callable[[], None]] = field(default_factory=deque)
    woken: bool = False

    def post(self, answer: Callable[[], None]) -> None:
        """Run `answer` on the loop; called from any thread. Many at once from elsewhere wake the loop once."""
        if runs_here(self.loop):
            answer()
            return
        self.answers.append(answer)
        if not self.woken:
            self.woken = True
            try:
                self.loop.call_soon_threadsafe(self._drain)
            except RuntimeError:  # The loop was closed, and whoever waited with it.
                self.woken = False

    def _drain(self) -> None:
        self.woken = False  # Before the queue is emptied: what comes after it wakes the loop again.
        while self.answers:
            self.answers.popleft()()


class CassandraSession:
    """Sends statements and gives their rows. Connects at the first call."""

    def __init__(self, settings: SessionSettings) -> None:
        self._settings = settings
        self._cluster: Cluster | None = None
        self._session: Session | None = None
        self._side: _LoopSide | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._prepared: OrderedDict[str, Any] = OrderedDict()
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._warned: set[str] = set()
        self._closed = False

    @property
    def in_flight(self) -> int:
        """Requests that were sent and not answered."""
        return self._in_flight

    # -- statements

    async def read(
        self,
        statement: Statement,
        what: str,
        *,
        consistency: int,
        page_size: int | None = None,
        page: bytes | None = None,
    ) -> Page:
        """One page of rows. Raises UnavailableStorageError, or InvalidOperationError for what the server refuses."""
        bound = await self._bound(statement, what)
        bound.consistency_level = consistency
        if page_size is not None:
            bound.fetch_size = page_size
        return await self._send(bound, lambda error, _sent: read_error(error, what), paging_state=page)

    async def write(self, statements: Sequence[Statement], what: str) -> Page | None:
        """Execute statements of one partition, all or none.

        None, or what was found of the rows if a condition did not hold. Raises what `cassandra_errors` says.
        """
        conditional = any(statement.conditional for statement in statements)
        bound = [await self._bound(statement, what) for statement in statements]
        if len(bound) == 1:
            request = bound[0]
        else:
            request = BatchStatement(BatchType.LOGGED)
            for one in bound:
                request.add(one)
        request.consistency_level = ConsistencyLevel.QUORUM
        if conditional:
            request.serial_consistency_level = ConsistencyLevel.SERIAL
        answer = await self._send(
            request, lambda error, sent: write_error(error, what, conditional=conditional, sent=sent)
        )
        applied = not conditional or bool(answer.rows[0][0])  # The first column is "[applied]".
        return None if applied else answer

    async def administer(self, cql: str, what: str, parameters: tuple[Any, ...] = ()) -> Rows:
        """Execute a statement about tables, or read the schema, on the node that is asked for all of them."""
        session = await self._connected()
        statement: Any = SimpleStatement(cql)
        if parameters:
            statement = (await self._prepare(cql, what)).bind(parameters)
        statement.consistency_level = ConsistencyLevel.QUORUM if parameters else ConsistencyLevel.ONE
        host = next(iter(_connected_nodes(session)), None)
        rows: Rows = []
        page: bytes | None = None
        while True:
            answer = await self._send(
                statement,
                lambda error, _sent: read_error(error, what),
                paging_state=page,
                host=host,
                timeout_s=_ADMINISTRATION_TIMEOUT_S,
            )
            rows += answer.rows
            page = answer.next_page
            if page is None:
                return rows

    def forget(self, name: str) -> None:
        """Drop prepared statements that mention `name`, whose table is not what it was."""
        for cql in [cql for cql in self._prepared if name in cql]:
            del self._prepared[cql]

    async def live_nodes(self) -> Mapping[str, int]:
        """How many nodes of each data centre are up, as far as the driver knows."""
        session = await self._connected()
        live: dict[str, int] = {}
        for host in session.cluster.metadata.all_hosts():
            if host.is_up is not False:
                live[host.datacenter] = live.get(host.datacenter, 0) + 1
        return live

    async def on_every_node(self, cql: str, what: str) -> list[Rows]:
        """The rows that each live node of the data centre answers by itself."""
        session = await self._connected()
        answers = []
        for host in _connected_nodes(session):
            statement = SimpleStatement(cql, consistency_level=ConsistencyLevel.ONE)
            answer = await self._send(statement, lambda error, _sent: read_error(error, what), host=host)
            answers.append(answer.rows)
        return answers

    async def close(self) -> None:
        """Wait for what is outstanding, then close every connection."""
        self._closed = True
        side = self._loop_side()
        if side.connecting is not None:
            await asyncio.wait([side.connecting])
        await self._idle.wait()
        cluster, self._cluster, self._session = self._cluster, None, None
        if cluster is not None:
            await self._in_thread(cluster.shutdown)
        if self._threads is not None:
            self._threads.shutdown(wait=False)
            self._threads = None

    # -- connecting

    async def _connected(self) -> Session:
        """The session, opened by one task however many wait for it, which goes on if they give up."""
        side = self._loop_side()
        if self._session is not None:
            return self._session
        if self._closed:
            raise InvalidOperationError("this storage was closed")
        if side.connecting is None or side.connecting.done():
            side.connecting = asyncio.ensure_future(self._open())
            side.connecting.add_done_callback(_retrieved)
        return await asyncio.shield(side.connecting)

    async def _open(self) -> Session:
        cluster, session = await self._in_thread(self._connect, connections_of(asyncio.get_running_loop()))
        try:
            self._check_partitioner(cluster)
            await self._check_nodes(session)
        except BaseException:
            await self._in_thread(cluster.shutdown)
            raise
        self._cluster, self._session = cluster, session
        return session

    def _connect(self, connections: type[LoopConnection]) -> tuple[Cluster, Session]:
        settings = self._settings
        replicas_first = TokenAwarePolicy(DCAwareRoundRobinPolicy(settings.local_dc or ""), shuffle_replicas=False)
        profile = ExecutionProfile(
            load_balancing_policy=replicas_first,
            retry_policy=FallthroughRetryPolicy(),
            consistency_level=ConsistencyLevel.QUORUM,
            serial_consistency_level=ConsistencyLevel.SERIAL,
            request_timeout=settings.request_timeout_s,
            row_factory=tuple_factory,
        )
        connects_within_s = max(settings.request_timeout_s, _CONNECTS_WITHIN_S)
        cluster = None
        try:
            cluster = Cluster(
                settings.contact_points,
                port=settings.port,
                connection_class=connections,
                execution_profiles={EXEC_PROFILE_DEFAULT: profile},
                auth_provider=settings.auth_provider,
                ssl_context=settings.ssl_context,
                protocol_version=settings.protocol_version,
                reconnection_policy=ConstantReconnectionPolicy(_RECONNECT_DELAY_S, max_attempts=None),
                max_schema_agreement_wait=_SCHEMA_AGREEMENT_WAIT_S,
                # Connections send their own heartbeats; with this the driver sees which have ended.
                idle_heartbeat_interval=_LOOKS_FOR_ENDED_CONNECTIONS_EVERY_S,
                connect_timeout=connects_within_s,
                control_connection_timeout=connects_within_s,
            )
            session = cluster.connect()
        except Exception as error:
            if cluster is not None:
                self._refuse_unknown_data_centre(cluster)
                cluster.shutdown()
            raise connect_error(error, settings.where) from error
        # Plain writes take the server's timestamps: Paxos takes its ballots from the same clock, and clients disagree.
        session.use_client_timestamp = False
        return cluster, session

    def _refuse_unknown_data_centre(self, cluster: Cluster) -> None:
        local_dc = self._settings.local_dc
        centres = {str(host.datacenter) for host in cluster.metadata.all_hosts() if host.datacenter}
        if local_dc and centres and local_dc not in centres:
            cluster.shutdown()
            raise UnusableStorageError(
                f"{self._settings.where} has no data centre {local_dc!r}",
                remedy=f"set local_dc to one of {', '.join(sorted(centres))}",
            )

    def _check_partitioner(self, cluster: Cluster) -> None:
        """Reads of all partitions go by tokens, and of another partitioner's they would miss some."""
        partitioner = cluster.metadata.partitioner
        if partitioner is not None and not str(partitioner).endswith("Murmur3Partitioner"):
            raise UnusableStorageError(
                f"{self._settings.where} has the partitioner {str(partitioner).rpartition('.')[2]}",
                remedy="use a cluster with Murmur3Partitioner, Cassandra's default",
            )

    async def _check_nodes(self, session: Session) -> None:
        """Refuse nodes whose settings break what we promise."""
        for host in _connected_nodes(session):
            for check in _CHECKS:
                if not check.applies(self._settings):
                    continue
                value = await self._setting_of(host, check.setting, session)
                if value is not None and check.refused(value):
                    raise UnusableStorageError(f"the node {host.endpoint} {check.wrong}", remedy=check.remedy)
                if value is None and check.setting not in self._warned:
                    self._warned.add(check.setting)
                    logger.warning(
                        "%s does not let its setting %s be read: %s",
                        self._settings.where,
                        check.setting,
                        check.if_unknown,
                    )

    async def _setting_of(self, host: Any, name: str, session: Session) -> str | None:
        """What a node says of a setting of its own; None if it does not say."""
        statement = SimpleStatement(_SETTING.format(name=name), consistency_level=ConsistencyLevel.ONE)
        try:
            answer = await self._send(statement, lambda error, _sent: _Unreadable(error), host=host, session=session)
        except _Unreadable as unreadable:
            if not isinstance(unreadable.error, InvalidRequest | Unauthorized):
                raise connect_error(unreadable.error, self._settings.where) from unreadable.error
            return None
        return str(answer.rows[0][0]) if answer.rows else None

    # -- sending

    async def _bound(self, statement: Statement, what: str) -> BoundStatement:
        self._loop_side()  # Another loop prepares anew.
        prepared = self._prepared.get(statement.cql)
        if prepared is None:
            prepared = await self._prepare(statement.cql, what)
        return BoundStatement(prepared).bind(statement.parameters)

    async def _prepare(self, cql: str, what: str) -> Any:
        """The prepared statement, prepared by one caller however many wait for it."""
        found = self._prepared.get(cql)
        if found is not None:
            self._prepared.move_to_end(cql)
            return found
        session = await self._connected()
        side = self._loop_side()
        waiting = side.preparing.get(cql)
        if waiting is None:
            waiting = side.preparing[cql] = asyncio.ensure_future(self._in_thread(session.prepare, cql))
            waiting.add_done_callback(_retrieved)
            waiting.add_done_callback(lambda _done: side.preparing.pop(cql, None))
        try:
            prepared = await asyncio.shield(waiting)
        except Exception as error:  # Nothing but the statement's text was sent.
            raise read_error(error, what) from error
        self._prepared[cql] = prepared
        while len(self._prepared) > MAX_PREPARED_STATEMENTS:
            self._prepared.popitem(last=False)
        return prepared

    async def _send(
        self,
        request: Any,
        translated: Callable[[Exception, bool], Exception],
        *,
        paging_state: bytes | None = None,
        host: Any = None,
        timeout_s: float | None = None,
        session: Session | None = None,
    ) -> Page:
        if session is None:
            session = await self._connected()
        side = self._loop_side()
        await side.permits.acquire()
        if self._closed and session is self._session:
            side.permits.release()
            raise InvalidOperationError("this storage was closed")
        answer: asyncio.Future[Page] = side.loop.create_future()
        self._began()

        def settle(page: Page | None, error: Exception | None) -> None:
            self._ended(side)
            if answer.done():  # Its caller was cancelled.
                return
            if error is not None:
                answer.set_exception(error)
            elif page is not None:
                answer.set_result(page)

        def on_rows(rows: Any, response: ResponseFuture) -> None:
            if not response.is_schema_agreed:
                disagreed = UnavailableStorageError(
                    "the nodes do not agree on the schema yet",
                    remedy="see with `nodetool describecluster` which node differs, and do it again",
                )
                side.post(lambda: settle(None, disagreed))
                return
            result = ResultSet(response, rows or [])
            page = Page(rows or [], result.paging_state, tuple(result.column_names or ()))
            side.post(lambda: settle(page, None))

        def on_error(error: Exception, response: ResponseFuture) -> None:
            failure = translated(error, bool(response.attempted_hosts))
            failure.__cause__ = error
            side.post(lambda: settle(None, failure))

        try:
            timeout: dict[str, float] = {} if timeout_s is None else {"timeout": timeout_s}
            response = session.execute_async(request, paging_state=paging_state, host=host, **timeout)
            response.add_callbacks(on_rows, on_error, callback_args=(response,), errback_args=(response,))
        except Exception as error:  # The driver could not even begin.
            self._ended(side)
            raise translated(error, False) from error
        return await answer

    def _began(self) -> None:
        self._in_flight += 1
        self._idle.clear()

    def _ended(self, side: _LoopSide) -> None:
        side.permits.release()
        if side is not self._side:  # An answer for a loop that is no more ours; it was counted there.
            return
        self._in_flight -= 1
        if not self._in_flight:
            self._idle.set()

    def _loop_side(self) -> _LoopSide:
        loop = asyncio.get_running_loop()
        if self._side is None or self._side.loop is not loop:
            self._side = _LoopSide(loop, asyncio.Semaphore(self._settings.max_in_flight))
            self._in_flight = 0
            self._idle = asyncio.Event()
            self._idle.set()
            self._leave_behind()
        return self._side

    def _leave_behind(self) -> None:
        """Give up what belonged to a loop that was closed: its connections ended with it."""
        cluster, self._cluster, self._session = self._cluster, None, None
        self._prepared.clear()
        if cluster is not None:
            threading.Thread(target=cluster.shutdown, name="cassandra-shutdown", daemon=True).start()

    async def _in_thread(self, work: Callable[..., Any], *arguments: Any) -> Any:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="cassandra")
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)


def _retrieved(done: asyncio.Future[Any]) -> None:
    """Look at the error of a shared task, all of whose waiters may have given up."""
    if not done.cancelled():
        done.exception()


def _connected_nodes(session: Session) -> list[Any]:
    """The nodes that requests can be sent to, those of other data centres not among them, by address."""
    return sorted((host for host in session.get_pool_state() if host.is_up is not False), key=lambda h: str(h.endpoint))


class _Unreadable(Exception):
    """A node did not tell its setting."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error
