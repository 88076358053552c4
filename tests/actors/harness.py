"""A whole system in this process, with its weather, its post office and its clock in a test's hand.

    async with System(storage) as system:
        answer = await system.send(PlaceOrder(...), "order-1")
        await system.check_at_rest()

The clock moves only when it is told to: what is measured in seconds (silence, expiry, lifetimes) passes by `advance`.
Pauses between attempts are real, and a few milliseconds long.

`scripted` lets a test say what the handler of one command does, wherever that command runs.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, TypeVar

from weather import PATIENT_S, PatientEvent, Weather

from actors.audit import AUDITED, check_books
from actors.coordinator_actor import CoordinatorActor
from actors.domain import Domain, Handler, Record, Table, Transaction
from actors.local_runtime import LocalRuntime
from actors.messages import Trouble
from actors.order_domains import ORDER_DOMAINS
from actors.outcomes import outcomes_of
from actors.runtime import ActorLostError, Placement
from actors.system import Actor, Observer, SystemConfig
from actors.timing import Timing
from infra.clock import ManualClock
from infra.consensus_commit.coordinator import CoordinatorStates, StateRow
from infra.consensus_commit.intents import Intent, IntentLog
from infra.consensus_commit.manager import TransactionManager
from infra.consensus_commit.metadata import TX_STATE, transactional
from infra.consensus_commit.retry import RetryPolicy
from infra.storage.errors import StorageError
from infra.storage.operations import Row, Scan, Value
from infra.storage.port import Storage
from schemas.common import Address
from schemas.envelope import RawMessage, build_command_message
from schemas.inventory import RegisterProduct
from schemas.message import Command
from schemas.orders import OrderLine, PlaceOrder
from schemas.outcome import Answer
from schemas.payment import OpenWallet

R = TypeVar("R", bound=Record)

QUICK = Timing(
    patience_s=0.02,
    deferred_after_s=0.005,
    soon_s=0.005,
    wait_s=(0.005, 0.05),
    state_backoff_ms=2,
    tidy_interval_s=0.02,
)

PLACEMENT = Placement(buckets=8, shards={"orders": 2, "inventory": 2, "payment": 1, "shipping": 1})

COORDINATOR = "coordinator-0"

_scripts: dict[tuple[str, str], Handler] = {}


def scripted(command_id: str, command: type[Command], handler: Handler) -> None:
    """Let `handler` do what `command` does, at home or called, in the transaction of `command_id`."""
    _scripts[(command_id, command.type_name())] = handler


def _with_scripts(domain: Domain) -> Domain:
    def choosing(model: type[Command], usual: Handler) -> Handler:
        async def handle(tx: Transaction, command: Any) -> dict[str, Any] | None:
            return await _scripts.get((tx.command_id, model.type_name()), usual)(tx, command)

        return handle

    handlers = {model: choosing(model, handler) for model, handler in domain.handlers.items()}
    return Domain(domain.name, domain.tables, handlers, domain.due)


TABLES: tuple[Table[Any], ...] = tuple(
    table for domain in ORDER_DOMAINS for table in (*domain.tables, outcomes_of(domain.name))
)

SCRIPTED_DOMAINS = tuple(map(_with_scripts, ORDER_DOMAINS))


class Fate(StrEnum):
    """What becomes of one message between actors."""

    LOST = "lost"  # it never arrives, and its sender is told that the actor is lost
    UNANSWERED = "unanswered"  # it is worked on, and its sender is told that the actor is lost
    LATE = "late"  # its sender is told that the actor is lost, and later it does arrive
    TWICE = "twice"  # it arrives twice; the first answer is the one that counts
    KILLS_BEFORE = "kills before"  # the actor dies as it arrives
    KILLS_AFTER = "kills after"  # the actor dies when it is done, before it can answer
    VISITED = "visited"  # somebody does something else first
    HELD = "held"  # it waits until it is let go
    ANSWER_HELD = "answer held"  # it is worked on; the answer waits until it is let go


@dataclass(eq=False)
class Interception:
    """What is to become of the `nth` message (from 1), and the `times` - 1 that follow, of one method to one actor.

    "" stands for any.
    """

    actor: str
    method: str
    fate: Fate
    nth: int = 1
    times: int = 1
    visitor: Callable[[], Awaitable[object]] | None = None
    seen: int = 0
    reached: asyncio.Event = field(default_factory=PatientEvent)
    released: asyncio.Event = field(default_factory=asyncio.Event)
    arrived: asyncio.Event = field(default_factory=PatientEvent)

    def let_go(self) -> None:
        self.released.set()

    def takes(self, actor: str, method: str) -> bool:
        """Whether this message is the one; counts it."""
        if self.actor not in ("", actor) or self.method not in ("", method):
            return False
        self.seen += 1
        return self.nth <= self.seen < self.nth + self.times


class PostOffice(LocalRuntime):
    """A LocalRuntime whose messages can be lost, held, doubled, or deadly."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.interceptions: list[Interception] = []
        self.carried: Counter[tuple[str, str]] = Counter()
        self._late: set[asyncio.Future[Any]] = set()

    async def ask(self, actor: str, method: str, items: Sequence[Any]) -> list[Any]:
        self.carried[(actor, method)] += 1
        for interception in self.interceptions:
            if interception.takes(actor, method):
                return await self._intercepted(interception, actor, method, items)
        return await super().ask(actor, method, items)

    async def _intercepted(self, what: Interception, actor: str, method: str, items: Sequence[Any]) -> list[Any]:
        what.reached.set()
        match what.fate:
            case Fate.LOST:
                raise ActorLostError(f"{actor}: the message was lost")
            case Fate.UNANSWERED:
                await super().ask(actor, method, items)
                raise ActorLostError(f"{actor}: the answer was lost")
            case Fate.LATE:
                late = asyncio.ensure_future(self._arrive_late(what, actor, method, items))
                self._late.add(late)
                late.add_done_callback(self._late.discard)
                raise ActorLostError(f"{actor}: the message is late")
            case Fate.TWICE:
                second = asyncio.ensure_future(super().ask(actor, method, items))
                self._late.add(second)
                second.add_done_callback(self._late.discard)
                return await super().ask(actor, method, items)
            case Fate.KILLS_BEFORE:
                await self._die(actor)
            case Fate.KILLS_AFTER:
                await super().ask(actor, method, items)
                await self._die(actor)
            case Fate.VISITED:
                assert what.visitor is not None
                visit = asyncio.ensure_future(what.visitor())  # it is done even if the sender dies of it
                self._late.add(visit)
                visit.add_done_callback(self._late.discard)
                await asyncio.shield(visit)
            case Fate.HELD:
                await what.released.wait()
            case Fate.ANSWER_HELD:
                answer = await super().ask(actor, method, items)
                await what.released.wait()
                return answer
        return await super().ask(actor, method, items)

    async def _die(self, actor: str) -> None:
        await asyncio.shield(self.kill_and_restart(actor))
        raise ActorLostError(f"{actor}: died")

    async def restart(self, name: str) -> None:
        """As a supervisor does it: again, if storage could not serve."""
        while True:
            try:
                return await super().restart(name)
            except StorageError:
                await asyncio.sleep(0.002)

    async def kill_and_restart(self, actor: str) -> None:
        if actor in self.names():
            await self.kill(actor)
            await self.restart(actor)

    async def bury_replaced(self) -> None:
        """Let everyone die who was taken for dead."""
        for living in list(self._replaced):
            await self.bury(living.actor)

    async def _arrive_late(self, what: Interception, actor: str, method: str, items: Sequence[Any]) -> None:
        await what.released.wait()
        try:
            await super().ask(actor, method, items)
        finally:
            what.arrived.set()


class System:
    """Every actor of the order domains over one storage. `answers` holds the answer of everything that was sent."""

    def __init__(
        self,
        storage: Storage,
        *,
        clock: ManualClock | None = None,
        timing: Timing = QUICK,
        placement: Placement = PLACEMENT,
        retry: RetryPolicy | None = None,
        sweep_interval_s: float = 0.02,
        outcome_window_ms: int = 7 * 24 * 3_600_000,
        serializes_batches: bool | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.clock = clock or ManualClock()
        self.storage = Weather(storage, serializes_batches=serializes_batches)
        self.config = SystemConfig(
            placement,
            # Ten tries in a second: what stands in their way is settled by then, be the disk as slow as it may.
            retry=retry or RetryPolicy(first_ms=2, most_ms=1_000),
            domains="harness:SCRIPTED_DOMAINS",
            outcome_window_ms=outcome_window_ms,
            sweep_interval_s=sweep_interval_s,
            timing=timing,
        )
        self.troubles: Counter[Trouble] = Counter()
        self.runtime = PostOffice(
            self.config,
            self.storage,
            clock=self.clock,
            observer=replace(
                observer or Observer(), on_trouble=lambda domain, trouble: self.troubles.update([trouble])
            ),
            names=placement.actors(),
        )
        self.answers: dict[tuple[str, str, str], Answer] = {}
        self._offset = 0

    async def __aenter__(self) -> System:
        await self.runtime.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        self.storage.down = False
        for interception in self.runtime.interceptions:
            interception.let_go()
        await self.runtime.stop()

    # ---- commands --------------------------------------------------------------------------------------------

    def raw(self, command: Command, id: str, **changes: Any) -> RawMessage:
        """`command` as it lies in its topic."""
        self._offset += 1
        message = build_command_message(command, command_id=id, time_ms=1)
        raw = RawMessage(message.topic, 0, self._offset, 1, message.key, message.headers, message.value)
        return replace(raw, **changes)

    def home(self, command: Command) -> str:
        return self.config.placement.actor_of(command.domain, command.routing_key)

    async def send(self, command: Command, id: str) -> Answer:
        """The answer of a command, delivered again whenever its home dies."""
        return await self.deliver(self.home(command), self.raw(command, id))

    async def send_all(self, commands: Iterable[tuple[str, Command]]) -> list[Answer]:
        """The answers of many, side by side."""
        return list(await asyncio.gather(*(self.send(command, id) for id, command in commands)))

    async def deliver(self, home: str, raw: RawMessage) -> Answer:
        async with asyncio.timeout(PATIENT_S):
            while True:
                try:
                    (answer,) = await self.runtime.ask(home, "execute", [raw])
                    break
                except ActorLostError:
                    await asyncio.sleep(0.002)
        domain = home.rpartition("-")[0]
        self.answers[(domain, answer.key, answer.id)] = answer
        return answer

    async def open_shop(self, *, products: int = 2, quantity: int = 1000, customers: int = 2) -> None:
        """Products p0… in each of the categories of CATEGORIES, and wallets of customers c0…; all of it at rest."""
        commands: list[tuple[str, Command]] = [
            (f"register-{category}-{number}", product(category, f"p{number}", quantity))
            for category in CATEGORIES
            for number in range(products)
        ]
        commands += [(f"open-{number}", wallet(f"c{number}")) for number in range(customers)]
        answers = await self.send_all(commands)
        assert {answer.status for answer in answers} == {"committed"}, answers

        async def nothing_is_left() -> bool:
            return not await self.intents()

        await until(nothing_is_left)  # An answer is given before its intent goes.

    # ---- messages and actors ---------------------------------------------------------------------------------

    def intercept(
        self,
        actor: str,
        method: str,
        fate: Fate,
        *,
        nth: int = 1,
        times: int = 1,
        visitor: Callable[[], Awaitable[object]] | None = None,
    ) -> Interception:
        """Let `fate` befall the `nth` message of `method` to `actor` from now on, and the `times` - 1 that follow;
        "" stands for any."""
        interception = Interception(actor, method, fate, nth, times, visitor)
        self.runtime.interceptions.append(interception)
        return interception

    async def kill(self, actor: str) -> None:
        await self.runtime.kill(actor)

    async def restart(self, actor: str) -> None:
        await self.runtime.restart(actor)

    async def replace(self, actor: str) -> Actor:
        return await self.runtime.replace(actor)

    def workspaces(self, actor: str) -> int:
        return int(self.runtime.actor(actor)._as_participant.open_workspaces)

    def participants(self) -> list[Any]:
        """Every domain actor that lives, in its own flesh."""
        actors = [self.runtime.actor(name) for name in self.runtime.names()]
        return [actor for actor in actors if not isinstance(actor, CoordinatorActor)]

    def advance(self, seconds: float) -> None:
        self.clock.advance(int(seconds * 1000))

    @asynccontextmanager
    async def passing_time(self) -> AsyncIterator[None]:
        """Let the clock run, twenty times as fast as it should; slower where this process is starved of the CPU."""
        loop = asyncio.get_running_loop()

        async def tick() -> None:
            while True:
                began_s = loop.time()
                await asyncio.sleep(0.01)
                self.advance(0.2 * min(1, 0.015 / (loop.time() - began_s)))

        async with in_background(tick()):
            yield

    # ---- what storage holds ----------------------------------------------------------------------------------

    async def dump(self, table: str) -> list[Row]:
        """Every row of a table (full name) as storage has it, transaction columns included."""
        schema = next(schema for schema in await self.storage.storage.tables() if schema.full_name == table)
        rows: list[Row] = []
        for partition in sorted(await self.storage.storage.partitions(schema), key=repr):
            rows.extend(await self.storage.storage.scan(Scan(schema, partition)))
        return rows

    async def tables(self) -> dict[str, list[Row]]:
        """Every table of the domains."""
        return {
            schema.full_name: await self.dump(schema.full_name)
            for schema in await self.storage.storage.tables()
            if TX_STATE in schema.columns and schema.namespace != "coordinator"
        }

    async def in_doubt(self) -> list[Row]:
        """Every PREPARED or DELETED record."""
        return [row for rows in (await self.tables()).values() for row in rows if row[TX_STATE] in (1, 2)]

    async def intents(self) -> list[Intent]:
        return await IntentLog(self.storage.storage).all()

    async def state(self, tx_id: str) -> StateRow | None:
        return await CoordinatorStates(self.storage.storage, self.clock).get_state(tx_id)

    async def record(self, table: Table[R], *key: Value) -> R | None:
        """One record as storage has it; of one that is in doubt, what it would become."""
        where = table.storage_key(key, buckets=self.config.placement.buckets)
        row = await self.storage.storage.get(transactional(table.schema), where)
        return None if row is None else table.from_row(row)

    async def records_about(self, subject: str) -> list[Row]:
        """The stored rows that an event's subject names."""
        table = next(table for table in TABLES if subject.startswith(f"{table.full_name}/"))
        rows = await self.dump(table.full_name)
        return [row for row in rows if "/".join((table.full_name, *(str(row[name]) for name in table.key))) == subject]

    async def outcome(self, domain: str, id: str) -> list[Row]:
        """Every outcome row of one command id."""
        return [row for row in await self.dump(outcomes_of(domain).full_name) if row["id"] == id]

    # ---- checks ----------------------------------------------------------------------------------------------

    async def settle(self) -> None:
        """Let time pass, and everybody do what is theirs to do, until nothing is left or patience ends."""
        async with asyncio.timeout(PATIENT_S):
            while await self.unrest():
                self.advance(5)
                for actor in map(self.runtime.actor, self.runtime.names()):
                    keep_house = actor.sweep if isinstance(actor, CoordinatorActor) else actor._as_participant.tidy
                    with suppress(StorageError, ZeroDivisionError):  # faults that are still to strike
                        await keep_house()
                await asyncio.sleep(0.01)

    async def unrest(self) -> list[str]:
        """What is not at rest, in words."""
        found = [f"in doubt: {row}" for row in await self.in_doubt()]
        found += [f"intent: {intent}" for intent in await self.intents()]
        for actor in self.participants():
            found += [f"{actor.name} holds {tx_id}" for tx_id in actor._as_participant._workspaces]
            if actor._as_participant.ownership.owned:
                found.append(f"{actor.name} owns {list(actor._as_participant.ownership._owners)}")
            if actor._as_home._turns:
                found.append(f"{actor.name} has turns {list(actor._as_home._turns)}")
        return found

    async def check_at_rest(self) -> None:
        """The standing check: nothing in doubt, nothing remembered, one outcome for each answer, books that add up."""
        try:
            await self.settle()
        except TimeoutError:
            raise AssertionError("\n".join(await self.unrest())) from None
        assert check_books({table.full_name: await self.dump(table.full_name) for table in AUDITED}) == []
        for domain in self.config.placement.shards:
            stored = Counter((row["key"], row["id"]) for row in await self.dump(outcomes_of(domain).full_name))
            assert set(stored.values()) <= {1}
        for (domain, key, id), answer in self.answers.items():
            if answer.reason == "id_conflict":
                continue
            (row,) = [row for row in await self.outcome(domain, id) if row["key"] == key]
            assert Answer.from_json(str(row["answer"])) == answer


class Foreigner:
    """Another program that shares the tables, by the same protocol, and asks no actor."""

    def __init__(self, system: System) -> None:
        self._buckets = system.config.placement.buckets
        self.manager = TransactionManager(system.storage.storage, system.clock)

    async def read(self, table: Table[R], *key: Value) -> R | None:
        async with self.manager.begin() as transaction:
            row = await transaction.get(table.schema, table.storage_key(key, buckets=self._buckets))
            await transaction.commit()
        return None if row is None else table.from_row(row)

    async def change(self, table: Table[R], *key: Value, by: Callable[[R], R]) -> None:
        """Read a record and write it changed."""
        where = table.storage_key(key, buckets=self._buckets)
        async with self.manager.begin() as transaction:
            row = await transaction.get(table.schema, where)
            assert row is not None, key
            await transaction.update(table.schema, where, table.to_columns(by(table.from_row(row))))
            await transaction.commit()

    async def insert(self, table: Table[R], record: R) -> None:
        async with self.manager.begin() as transaction:
            where = table.storage_key(table.key_of(record), buckets=self._buckets)
            await transaction.insert(table.schema, where, table.to_columns(record))
            await transaction.commit()


CATEGORIES = ("art", "books", "coins")
"""Categories that fall on both inventory shards."""


def product(category: str, product_id: str, quantity: int) -> RegisterProduct:
    return RegisterProduct(
        category=category,
        product_id=product_id,
        name=product_id,
        quantity=quantity,
        unit_price=100,
        currency="GBP",
        low_stock_threshold=0,
    )


def wallet(customer_id: str, balance: int = 10**9) -> OpenWallet:
    return OpenWallet(customer_id=customer_id, currency="GBP", initial_balance=balance)


def order(
    order_id: str,
    *,
    customer: str = "c0",
    lines: Sequence[tuple[str, str, int]] = (("art", "p0", 1), ("books", "p0", 1)),
) -> PlaceOrder:
    """An order of (category, product, quantity)."""
    return PlaceOrder(
        customer_id=customer,
        order_id=order_id,
        lines=tuple(
            OrderLine(product_id=product_id, category=category, quantity=quantity, unit_price=100)
            for category, product_id, quantity in lines
        ),
        currency="GBP",
        payment_method="wallet",
        shipping_address=Address(region="UK"),
    )


async def until(condition: Callable[[], Any]) -> None:
    """Wait until `condition` (a function or coroutine function) is true; AssertionError if it never is."""
    try:
        async with asyncio.timeout(PATIENT_S):
            while True:
                met = condition()
                if asyncio.iscoroutine(met):
                    met = await met
                if met:
                    return
                await asyncio.sleep(0.002)
    except TimeoutError:
        raise AssertionError(f"never came true: {condition}") from None


async def side_by_side(cases: Iterable[Any], run: Callable[[Any], Awaitable[None]], *, at_once: int = 6) -> None:
    """Run every case to its end, a few at a time; then AssertionError with what went wrong in which."""
    room = asyncio.Semaphore(at_once)
    failures: list[str] = []

    async def one(case: Any) -> None:
        async with room:
            try:
                await run(case)
            except Exception as error:
                failures.append(f"{case}: {type(error).__name__}: {error}")

    await asyncio.gather(*map(one, cases))
    assert not failures, "\n\n".join(failures)


@asynccontextmanager
async def in_background(work: Any) -> AsyncIterator[asyncio.Task[Any]]:
    """Run a coroutine beside the test; it is awaited, or ended, when the test leaves."""
    task = asyncio.ensure_future(work)
    try:
        yield task
    finally:
        if not task.done():
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
