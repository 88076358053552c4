"""What actors say to each other. Every method takes a list of these and answers with a list, one reply for each.

    home ──execute──►  (from the stream processor: RawMessage -> Answer)
    home ──invoke────► participant     Invocation     -> InvocationReply | Deferred (ask `collect` for it)
    home ──collect───► participant     Ticket         -> InvocationReply
    home ──commit────► coordinator     CommitRequest  -> Decision
    coordinator ──prepare─► participant   Prepare     -> Verdict
    coordinator ──validate► participant   Validate    -> Verdict
    coordinator ──commit──► participant   CommitRecords -> bool (every record was seen committed)
    coordinator ──settle──► participant   Settle      -> bool (nothing of that transaction is left in doubt)
    coordinator, home ──rollback► participant  Rollback -> bool (every record was seen rolled back)

`trace` is the span that an item is a part of, where that is recorded (`infra.tracing`): a batch holds items of many.

They are frozen and small, and hold bytes rather than models, because they cross processes; without slots, because
Python pickles frozen dataclasses with slots four times slower.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from infra.storage.operations import Value
from schemas.trace_context import TraceContext

Age = tuple[int, str]
"""When a command was first tried (ms), and a name that nobody else has, because command ids are unique within their
routing key only: the older command has the right of way, in every attempt, and no two are of one age."""

Partition = tuple[str, str, tuple[Value, ...]]
"""(namespace, table, partition key values) of a stored partition."""


@dataclass(frozen=True)
class Call:
    """One command of a transaction to a participant, as JSON."""

    type: str
    body: bytes


@dataclass(frozen=True)
class Invocation:
    """The calls that one command made to one participant in one turn; `first` is the number of the first, from 0."""

    tx_id: str
    home: str
    home_incarnation: str
    age: Age
    command_id: str
    routing_key: str
    now_ms: int
    first: int
    calls: tuple[Call, ...]
    trace: TraceContext | None = None


@dataclass(frozen=True)
class Emitted:
    """An event that a handler emitted, about a record that will have `record_version` after the commit."""

    type: str
    domain: str
    version: int
    key: str
    subject: str
    record_version: int
    body: str


class Trouble(StrEnum):
    """Why a participant or the coordinator could not go on. Each tells its reader what to do."""

    CONFLICT = "conflict"  # somebody else changed what was read: back off, then try again from the start
    WOUNDED = "wounded"  # an older command took a key of ours: try again from the start, at once
    FORGOTTEN = "forgotten"  # the participant restarted or dropped us (rule 4): try again from the start
    UNAVAILABLE = "unavailable"  # storage cannot serve now: wait (rule 12)
    LOST = "lost"  # an actor died: what it did is unknown until the state table is asked
    BROKEN = "broken"  # a handler raised what it should not: a few tries, then a dead letter


@dataclass(frozen=True)
class CallResult:
    """What one call came to: a result, a refusal (`refused` is its reason) or trouble."""

    result: dict[str, Any] | None = None
    events: tuple[Emitted, ...] = ()
    refused: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    trouble: Trouble | None = None
    trouble_detail: str = ""


@dataclass(frozen=True)
class Share:
    """A participant's part in a transaction, as it last told the home (rule 4: whose memory it is, and how much)."""

    actor: str
    incarnation: str
    calls: int
    has_writes: bool
    needs_validation: bool
    partitions: tuple[Partition, ...]


@dataclass(frozen=True)
class InvocationReply:
    share: Share
    results: tuple[CallResult, ...]


@dataclass(frozen=True)
class Deferred:
    """The calls wait for a key that another transaction owns: ask `collect`, alone, for their reply.

    Without it a reply would wait for the slowest item of its batch, which may itself wait for the transaction that
    the reply belongs to.
    """


@dataclass(frozen=True)
class Ticket:
    tx_id: str
    first: int
    calls: int


@dataclass(frozen=True)
class CommitRequest:
    """Commit what the named participants hold for one transaction."""

    tx_id: str
    home: str
    home_incarnation: str
    shares: tuple[Share, ...]
    drop_writes_except: str = ""
    """Of a refused command only the participant named here (its home) keeps its writes; "" when nothing is dropped."""
    trace: TraceContext | None = None


@dataclass(frozen=True)
class Decision:
    """Committed at a time (ms), or not, for a reason."""

    committed_at_ms: int = 0
    trouble: Trouble | None = None
    detail: str = ""


@dataclass(frozen=True)
class Prepare:
    tx_id: str
    incarnation: str
    calls: int
    prepared_at_ms: int
    trace: TraceContext | None = None


@dataclass(frozen=True)
class Validate:
    tx_id: str
    incarnation: str
    calls: int
    drop_writes: bool
    trace: TraceContext | None = None


@dataclass(frozen=True)
class Verdict:
    """None: the phase is done. Otherwise why not."""

    trouble: Trouble | None = None
    detail: str = ""


@dataclass(frozen=True)
class CommitRecords:
    tx_id: str
    committed_at_ms: int
    trace: TraceContext | None = None


@dataclass(frozen=True)
class Rollback:
    tx_id: str
    trace: TraceContext | None = None


@dataclass(frozen=True)
class Settle:
    """Bring every record of a decided transaction in these partitions to rest."""

    tx_id: str
    committed: bool
    decided_at_ms: int
    partitions: tuple[Partition, ...]


@dataclass(frozen=True)
class Health:
    """An actor's word that its loop turns."""

    actor: str
    incarnation: str
    pid: int
    busy: int
