"""The outcome of every command: one row, written in the transaction that has the command's effects.

Each domain has its own `outcomes` table. Its rows answer redeliveries for as long as the outcome window lasts
(rule 1), so that window must be longer than command topics are kept; older rows are pruned.
"""

from __future__ import annotations

from functools import cache

from actors.domain import Record, Table
from infra.consensus_commit.metadata import transactional
from infra.consensus_commit.states import TransactionState
from infra.storage.errors import NoMutationError
from infra.storage.operations import ColumnCondition, Delete, If, Key, Operator, Scan
from infra.storage.port import Storage
from schemas.outcome import Answer


class Outcome(Record):
    """`answer` is the whole answer as JSON; the other columns are what people look for in a table."""

    key: str
    id: str
    type: str
    status: str
    reason: str
    digest: str
    transaction_id: str
    received_at_ms: int
    committed_at_ms: int
    answer: str


@cache
def outcomes_of(domain: str) -> Table[Outcome]:
    """The outcomes table of a domain."""
    return Table(domain, "outcomes", Outcome, key=("key", "id"), routing="key", sliced_by="id", slices=4)


def outcome_row(answer: Answer) -> Outcome:
    return Outcome(
        key=answer.key,
        id=answer.id,
        type=answer.type,
        status=answer.status,
        reason=answer.reason,
        digest=answer.digest,
        transaction_id=answer.tx_id or "",
        received_at_ms=answer.received_at_ms,
        committed_at_ms=answer.committed_at_ms or 0,
        answer=answer.model_dump_json(),
    )


async def prune_outcomes(
    storage: Storage, table: Table[Outcome], buckets: list[int], *, before_ms: int, batch: int = 500
) -> int:
    """Delete the outcomes of these buckets that were committed before `before_ms`; returns how many.

    The age is a condition of every delete, so that no row that is younger, or in doubt, can go whatever was read.
    """
    old = ColumnCondition("committed_at_ms", Operator.LT, before_ms)
    settled = ColumnCondition("tx_state", Operator.EQ, TransactionState.COMMITTED.value)  # and not in doubt
    pruned = 0
    schema = transactional(table.schema)
    for bucket in buckets:
        for number in range(table.slices):
            while rows := await storage.scan(Scan(schema, (bucket, number), where=(old, settled), limit=batch)):
                deleted = 0
                for row in rows:
                    key = Key((bucket, number), (row["key"], row["id"]))
                    try:
                        await storage.mutate([Delete(schema, key, If((old, settled)))])
                        deleted += 1
                    except NoMutationError:
                        continue
                pruned += deleted
                if deleted == 0:
                    break
    return pruned
