"""A command's life at its home: parse, run, decide, answer. One transaction of its own for each command.

    RawMessage ─► parse ─► is there an outcome already? ─► handler ─► outcome row ─► commit ─► Answer
                    │                │yes: the same answer              │                │
                    └─► dead letter  └─► other payload: id_conflict     └─► refused      └─► trouble: again

Every way ends in an outcome row, written in the transaction that has the effects (or, for a refusal, that validates
the reads it rests on: rule 3). Which trouble leads to which next step is the table NEXT_STEP.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from random import Random
from typing import Any

import structlog

from actors.domain import Domain, Refused
from actors.messages import Age, CommitRecords, CommitRequest, Decision, Emitted, Rollback, Share, Trouble
from actors.outcomes import outcome_row, outcomes_of
from actors.participation import Participation, Workspace, json_safe
from actors.pausing import Pausing
from actors.runtime import ActorBusyError, Mailroom, Placement
from actors.timing import Timing
from actors.work import CONCORD_NAMESPACE, Calls, TroubleError, Work, trouble_of
from infra.clock import Clock
from infra.consensus_commit.coordinator import CoordinatorStates
from infra.consensus_commit.errors import CommitConflictError, UnknownTransactionStatusError
from infra.consensus_commit.intents import new_intended_id
from infra.consensus_commit.retry import RetryPolicy
from infra.consensus_commit.states import TransactionState
from infra.failpoints import reach
from infra.storage.errors import StorageError
from infra.tracing import CALL, HANDLE, OFF, ONE_PHASE, UNKNOWN, Span, Tracer
from schemas.envelope import (
    DeadLetterError,
    DeadLetterReason,
    ParsedCommand,
    RawMessage,
    data_schema,
    derived_id,
    key_text,
    parse_command,
)
from schemas.outcome import (
    ANSWER_TOO_LARGE,
    COMMITTED,
    DEAD_LETTERED,
    ID_CONFLICT,
    MAX_ANSWER_BYTES,
    REFUSED,
    Answer,
    EmittedEvent,
)

log = structlog.get_logger()


class Step(Enum):
    AT_ONCE = auto()  # a new attempt, nothing counted: an older command went first, and will be done
    SOON = auto()  # a new attempt after a short pause, nothing counted: an actor is being restarted
    BACK_OFF = auto()  # a new attempt after a growing pause; counted, and after the last the command is refused
    WAIT = auto()  # a new attempt when storage may be back, for as long as it takes (rule 12)
    SUSPECT = auto()  # the handler is at fault, or the storage's content: a few tries, then a dead letter


NEXT_STEP = {
    Trouble.WOUNDED: Step.AT_ONCE,
    Trouble.FORGOTTEN: Step.SOON,
    Trouble.LOST: Step.SOON,
    Trouble.CONFLICT: Step.BACK_OFF,
    Trouble.UNAVAILABLE: Step.WAIT,
    Trouble.BROKEN: Step.SUSPECT,
}

BROKEN_TRIES = 3
"""How often a command is tried whose handler raises, or whose records cannot be understood."""

LET_GO_TRIES = 6
"""How often a participant that cannot be reached is asked to drop a transaction; after that it must find out."""

CONFLICT = "conflict"
"""The reason of a refusal after the last retry."""

MAX_OPEN_COMMANDS = 8_192
"""How many commands a home has in hand at most. Batches beyond that are not taken: they stay in Kafka.

Healthy workers never come near it: each has one batch a partition outstanding. But a worker that dies leaves its
batches here, and its successor sends them again; while storage is away, none of them ends.
"""


@dataclass(frozen=True)
class Verdict:
    """An answer that is settled before any handler runs: a dead letter, or a refusal after too many conflicts."""

    status: Any
    reason: str
    detail: dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """What an answer is about: a parsed command, or as much of a dead letter as could be read."""

    id: str
    type: str
    key: str
    digest: str
    correlation_id: str
    received_at_ms: int
    command: Any = None


@dataclass(slots=True)
class _Turn:
    """The lock of one key and how many hold it or wait for it."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0


class Home:
    def __init__(
        self,
        *,
        domain: Domain,
        participation: Participation,
        placement: Placement,
        mailroom: Mailroom,
        states: CoordinatorStates,
        clock: Clock,
        retry: RetryPolicy,
        timing: Timing,
        max_command_bytes: int,
        max_open_commands: int = MAX_OPEN_COMMANDS,
        on_answer: Callable[[str, Answer, float], None] = lambda domain, answer, seconds: None,
        on_committed: Callable[[str], None] = lambda domain: None,
        on_trouble: Callable[[str, Trouble], None] = lambda domain, trouble: None,
        tracer: Tracer = OFF,
    ) -> None:
        self.open_commands = 0
        self.draining = False
        self._max_open_commands = max_open_commands
        self._domain = domain
        self._participation = participation
        self._placement = placement
        self._mailroom = mailroom
        self._states = states
        self._clock = clock
        self._retry = retry
        self._random = Random()
        self._timing = timing
        self._max_command_bytes = max_command_bytes
        self._on_answer = on_answer
        self._on_committed = on_committed
        self._on_trouble = on_trouble
        self._tracer = tracer
        self._outcomes = outcomes_of(domain.name)
        self._coordinator = placement.coordinator_of(participation.actor)
        self.pausing = Pausing(participation.actor)
        self._turns: dict[bytes, _Turn] = {}
        self._letting_go: set[asyncio.Task[None]] = set()

    @property
    def in_hand(self) -> tuple[int, int]:
        """How many commands were taken and are not answered, and how many are taken at most."""
        return self.open_commands, self._max_open_commands

    async def execute(self, batch: list[RawMessage]) -> list[Answer]:
        """The answer of each message, in order. Those with one key run one after another, others side by side.

        Raises ActorBusyError, with nothing done, for what this home cannot take now.
        """
        if self.draining:
            raise ActorBusyError(f"{self._participation.actor} is being restarted")
        if self.open_commands and self.open_commands + len(batch) > self._max_open_commands:
            raise ActorBusyError(f"{self._participation.actor} has {self.open_commands} commands in hand")
        self.open_commands += len(batch)
        try:
            return await self._execute(batch)
        finally:
            self.open_commands -= len(batch)

    async def _execute(self, batch: list[RawMessage]) -> list[Answer]:
        chains: dict[bytes, list[int]] = {}
        for index, raw in enumerate(batch):
            chains.setdefault(raw.key or b"", []).append(index)
        answers: dict[int, Answer] = {}

        async def run(key: bytes, chain: list[int]) -> None:
            # A lock besides the chain: after a rebalance two workers may hold batches with the same key.
            turn = self._turns.setdefault(key, _Turn())
            turn.users += 1
            try:
                async with turn.lock:
                    for index in chain:
                        async with self.pausing.command():
                            answers[index] = await self.answer(batch[index])
            finally:
                turn.users -= 1
                if not turn.users:
                    del self._turns[key]

        await asyncio.gather(*(run(key, chain) for key, chain in chains.items()))
        return [answers[index] for index in range(len(batch))]

    async def answer(self, raw: RawMessage) -> Answer:
        """Carry out one message and return its durable answer, however long that takes."""
        with self._tracer.under(raw.trace, HANDLE, UNKNOWN) as span:
            return await self._answer(raw, span)

    async def _answer(self, raw: RawMessage, span: Span) -> Answer:
        started_s = self._clock.monotonic_s()
        try:
            parsed = parse_command(raw, domain=self._domain.name, max_bytes=self._max_command_bytes)
            subject, verdict = self._subject(parsed), None
        except DeadLetterError as error:
            subject = Subject(
                error.command_id, error.type, error.key, error.digest, error.correlation_id, self._clock.now_ms()
            )
            verdict = Verdict(DEAD_LETTERED, error.reason.value, {"detail": error.detail})
        if span.recording and subject.command is not None:
            span.rename(subject.type)
        answer = await self._until_answered(subject, verdict, raw, span)
        if span.recording:
            self._describe(span, answer, known=subject.command is not None)
        seconds = self._clock.monotonic_s() - started_s
        self._on_answer(self._domain.name, answer, seconds)
        log.info(
            "answered",
            command_id=answer.id,
            tx_id=answer.tx_id,
            correlation_id=answer.correlation_id,
            type=answer.type,
            status=answer.status,
            reason=answer.reason,
            milliseconds=round(seconds * 1000, 1),
        )
        return answer

    def _describe(self, span: Span, answer: Answer, *, known: bool) -> None:
        """What a span tells of the answer: its detail may quote the command, so it is not told."""
        span.note(
            {
                "concord.actor": self._participation.actor,
                "concord.message.type": answer.type if known else UNKNOWN,
                "messaging.message.id": answer.id,
                "concord.outcome": answer.status,
                "concord.reason": answer.reason,
                "concord.tx_id": answer.tx_id or "",
            }
        )
        # A refusal is an answer, as 4xx is to HTTP servers; a dead letter or a command that found no gap is a failure.
        if answer.status == DEAD_LETTERED or answer.reason == CONFLICT:
            span.fail(answer.reason)

    async def let_go(self, actor: str, tx_id: str) -> None:
        """Have a participant drop a transaction that was not prepared there.

        If it cannot be reached it is asked again in the background: it died, and knows nothing of it, or it lives and
        still holds keys that others wait for.
        """
        if not await self._let_go_once(actor, tx_id):
            task = asyncio.ensure_future(self._let_go_later(actor, tx_id))
            self._letting_go.add(task)
            task.add_done_callback(self._letting_go.discard)

    async def _let_go_once(self, actor: str, tx_id: str) -> bool:
        try:
            await self._mailroom.ask(actor, "rollback", Rollback(tx_id))
        except Exception:
            return False
        return True

    async def _let_go_later(self, actor: str, tx_id: str) -> None:
        for attempt in range(LET_GO_TRIES):
            await asyncio.sleep(self._timing.soon_s * 2**attempt)
            if await self._let_go_once(actor, tx_id):
                return

    def _subject(self, parsed: ParsedCommand) -> Subject:
        return Subject(
            parsed.id,
            parsed.type,
            parsed.key,
            parsed.digest,
            parsed.correlation_id,
            self._clock.now_ms(),
            parsed.command,
        )

    async def _until_answered(self, subject: Subject, verdict: Verdict | None, raw: RawMessage, span: Span) -> Answer:
        age = (self._clock.now_ms(), self._clock.new_id())
        conflicts = broken = waits = attempts = 0
        while True:
            attempts += 1
            try:
                await reach("home.before_handler")
                answer = await Attempt(self, subject, verdict, age).run()
            except Exception as error:
                trouble = trouble_of(error)
                if trouble.trouble is Trouble.BROKEN:
                    log.exception("an attempt failed", command_id=subject.id)
            else:
                if answer.reason == ID_CONFLICT and subject.command is None:
                    subject = _renamed(subject, raw)
                    continue
                span.note({"concord.attempts": attempts})
                return answer
            self._on_trouble(self._domain.name, trouble.trouble)
            span.event("retry", {"concord.trouble": trouble.trouble.value, "concord.attempt": attempts})
            match NEXT_STEP[trouble.trouble]:
                case Step.AT_ONCE:
                    await asyncio.sleep(0)
                case Step.SOON:
                    await asyncio.sleep(self._timing.soon_s)
                case Step.BACK_OFF:
                    conflicts += 1
                    if conflicts >= self._retry.tries and verdict is None:
                        verdict = Verdict(REFUSED, CONFLICT, {"tries": conflicts})
                        continue
                    await asyncio.sleep(self._retry.wait_ms(conflicts, self._random) / 1000)
                case Step.WAIT:
                    if not waits & (waits - 1):  # the 1st, 2nd, 4th, 8th … time: thousands may wait for an hour
                        log.warning("waiting for storage", command_id=subject.id, waits=waits, error=trouble.detail)
                    first_s, longest_s = self._timing.wait_s
                    await asyncio.sleep(min(first_s * 2 ** min(waits, 10), longest_s))
                    waits += 1
                case Step.SUSPECT:
                    broken += 1
                    if broken >= BROKEN_TRIES and verdict is None:
                        verdict = Verdict(
                            DEAD_LETTERED, DeadLetterReason.HANDLER_ERROR.value, {"detail": trouble.detail}
                        )
                        continue
                    await asyncio.sleep(self._retry.wait_ms(broken, self._random) / 1000)


def _renamed(dead_letter: Subject, raw: RawMessage) -> Subject:
    """A dead letter whose id another payload has taken is kept under a name of its own: its place in the log.

    Of that, too, there may be two: a topic that was made anew counts from 0 again.
    """
    place = derived_id(raw)
    name = f"{place}:{dead_letter.digest}" if dead_letter.id == place else place
    return replace(dead_letter, id=name, key=key_text(raw))


class Attempt:
    """One transaction that tries to answer one command."""

    def __init__(self, home: Home, subject: Subject, verdict: Verdict | None, age: Age) -> None:
        self._home = home
        self._left_to_coordinator = False
        self._subject = subject
        self._verdict = verdict
        participation = home._participation
        self._workspace: Workspace = participation.open(
            new_intended_id(home._clock), home=participation.actor, home_incarnation=participation.incarnation, age=age
        )
        now_ms = home._clock.now_ms()
        self._calls = Calls(
            placement=home._placement,
            mailroom=home._mailroom,
            tx_id=self._workspace.tx_id,
            home=participation.actor,
            home_incarnation=participation.incarnation,
            age=age,
            command_id=subject.id,
            routing_key=subject.key,
            now_ms=now_ms,
            tracer=home._tracer,
        )
        self._work: Work = participation.work(
            self._workspace, command_id=subject.id, routing_key=subject.key, now_ms=now_ms, calls=self._calls
        )
        # The outcome is not the handler's: it is read before the handler runs and written when that has ended.
        self._outcome: Work = participation.work(
            self._workspace, command_id=subject.id, routing_key=subject.key, now_ms=now_ms
        )

    async def run(self) -> Answer:
        """The durable answer. Raises whatever trouble ended the attempt, after everything of it is taken back."""
        self._workspace.running += 1
        try:
            known = await self._outcome.get(self._home._outcomes, self._subject.key, self._subject.id)
            if known is not None:
                await self._take_back()
                return self._known(Answer.from_json(known.answer))
            answer = await self._compose()
            row = outcome_row(answer)
            if (size_bytes := len(row.answer.encode())) > MAX_ANSWER_BYTES:
                answer = self._refused_for_size(answer, size_bytes)
                row = outcome_row(answer)
            await self._outcome.insert(self._home._outcomes, row)
            decision = await self._commit(keep_writes=answer.status == COMMITTED)
        except BaseException:
            if not self._left_to_coordinator:  # else only the state row knows whether there is anything to take back
                await self._work.end()  # rule 5: nothing of this attempt may arrive after its end
                await self._take_back()
            raise
        finally:
            self._workspace.running -= 1
        if decision.trouble is not None:
            raise TroubleError(decision.trouble, decision.detail)
        self._home._on_committed(self._home._domain.name)
        await reach("home.after_decision")
        return answer

    async def _compose(self) -> Answer:
        """Run the handler and put its end into words."""
        result: dict[str, Any] | None = None
        emitted: tuple[Emitted, ...] = ()
        status, reason, detail = COMMITTED, "", {}
        if self._verdict is not None:
            status, reason, detail = self._verdict.status, self._verdict.reason, self._verdict.detail
        else:
            handler = self._home._domain.handlers[type(self._subject.command)]
            try:
                try:
                    result = json_safe(await handler(self._work, self._subject.command))
                finally:
                    await self._work.end()
                emitted = await self._work.events()
            except Refused as refusal:
                self._workspace.records.drop_writes()
                status, reason, detail = REFUSED, refusal.reason, json_safe(refusal.details)
            if self._calls.trouble is not None:
                raise self._calls.trouble  # what a call has done is not known, whatever the handler made of that
            await reach("home.after_handler")
        subject = self._subject
        return Answer(
            id=subject.id,
            type=subject.type,
            key=subject.key,
            status=status,
            digest=subject.digest,
            tx_id=self._workspace.tx_id,
            reason=reason,
            detail=detail,
            result=result,
            events=tuple(self._event(number, event) for number, event in enumerate(emitted)),
            correlation_id=subject.correlation_id,
            received_at_ms=subject.received_at_ms,
            committed_at_ms=self._home._clock.now_ms(),
        )

    def _refused_for_size(self, answer: Answer, size_bytes: int) -> Answer:
        """In place of an answer that no topic would take. Nothing is decided yet: what it tells of has no effect."""
        self._workspace.records.drop_writes()
        detail = {"bytes": size_bytes, "limit": MAX_ANSWER_BYTES}
        if answer.status == DEAD_LETTERED:
            return answer.model_copy(update={"detail": detail})
        update = {"status": REFUSED, "reason": ANSWER_TOO_LARGE, "detail": detail, "result": None, "events": ()}
        return answer.model_copy(update=update)

    def _event(self, number: int, event: Emitted) -> EmittedEvent:
        name = "\x1f".join((self._home._domain.name, self._subject.key, self._subject.id, "event", str(number)))
        return EmittedEvent(
            id=str(uuid.uuid5(CONCORD_NAMESPACE, name)),
            type=event.type,
            domain=event.domain,
            key=event.key,
            body=event.body,
            subject=event.subject,
            record_version=event.record_version,
            data_schema=data_schema(event.domain, event.type, event.version),
        )

    def _known(self, answer: Answer) -> Answer:
        """The stored answer for the same payload; an `id_conflict` for another one, which changes nothing (rule 1)."""
        if answer.digest == self._subject.digest:
            return answer
        return Answer(
            id=self._subject.id,
            type=self._subject.type,
            key=self._subject.key,
            status=REFUSED,
            digest=self._subject.digest,
            reason=ID_CONFLICT,
            detail={"answered": answer.digest},
            correlation_id=self._subject.correlation_id,
            received_at_ms=self._subject.received_at_ms,
        )

    async def _commit(self, *, keep_writes: bool) -> Decision:
        home, workspace = self._home, self._workspace
        own = home._participation.share(workspace)
        shares = [own, *(share for actor, share in self._calls.shares.items() if actor != own.actor)]
        if len(shares) == 1 and workspace.records.one_phase_unit() is not None:
            return await self._commit_alone()
        with home._tracer.child(CALL, "coordinator") as span:
            request = CommitRequest(
                tx_id=workspace.tx_id,
                home=own.actor,
                home_incarnation=own.incarnation,
                shares=tuple(shares),
                drop_writes_except="" if keep_writes else own.actor,
                trace=span.context,
            )
            span.note({"rpc.system": "concord", "rpc.service": home._coordinator, "rpc.method": "commit"})
            await reach("home.before_commit_request")
            self._left_to_coordinator = True
            try:
                decision: Decision = await home._mailroom.ask(home._coordinator, "commit", request)
            except Exception as error:  # lost, or broken half-way: only the state row knows
                span.fail(Trouble.LOST)
                return await self._ask_the_state(str(error), shares)
            if decision.trouble is not None:
                span.fail(decision.trouble)
            return decision

    async def _commit_alone(self) -> Decision:
        """Everything lies in one atomic unit of the storage: one write, no state row, no coordinator."""
        participation, workspace = self._home._participation, self._workspace
        committed_at_ms = self._home._clock.now_ms()
        if workspace.owner.wounded:
            participation.close(workspace)
            return Decision(trouble=Trouble.WOUNDED)
        workspace.owner.prepared = True
        try:
            with self._home._tracer.child(ONE_PHASE, attributes={"concord.tx_id": workspace.tx_id}):
                await workspace.records.commit_one_phase(committed_at_ms)
        except CommitConflictError as error:
            return Decision(trouble=Trouble.CONFLICT, detail=str(error))
        except UnknownTransactionStatusError as error:
            # The outcome row is part of the write: the next attempt finds it, or finds nothing of this one.
            return Decision(trouble=Trouble.LOST, detail=str(error))
        except StorageError as error:
            trouble = trouble_of(error)  # unavailable, or a value that the storage will never take
            return Decision(trouble=trouble.trouble, detail=trouble.detail)
        finally:
            participation.close(workspace)
        return Decision(committed_at_ms=committed_at_ms)

    async def _ask_the_state(self, detail: str, shares: list[Share]) -> Decision:
        """The coordinator is gone: put ABORTED if absent, obey the winner (rule 6), and let the participants know."""
        tx_id, pause_s = self._workspace.tx_id, 0.05
        while True:
            try:
                winner = await self._home._states.abort_state(tx_id)
                break
            except (UnknownTransactionStatusError, StorageError) as error:
                log.warning("the state table does not answer", tx_id=tx_id, error=str(error))
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, 2.0)
        # The intent stays: the coordinator's successor sees to it that nothing is left.
        if winner.state is TransactionState.COMMITTED:
            await self._tell(shares, "commit", CommitRecords(tx_id, winner.created_at_ms))
            return Decision(committed_at_ms=winner.created_at_ms)
        await self._tell(shares, "rollback", Rollback(tx_id))
        return Decision(trouble=Trouble.LOST, detail=detail)

    async def _tell(self, shares: list[Share], method: str, message: Any) -> None:
        asked = (self._home._mailroom.ask(share.actor, method, message) for share in shares)
        await asyncio.gather(*asked, return_exceptions=True)

    async def _take_back(self) -> None:
        """Let go everywhere of an attempt that has asked for no decision."""
        home = self._home
        home._participation.close(self._workspace)
        others = [actor for actor in self._calls.touched if actor != home._participation.actor]
        await asyncio.gather(*(home.let_go(actor, self._workspace.tx_id) for actor in others))
