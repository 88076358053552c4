"""The outcome of every command: one row, written in the transaction that has the command's effects.

Each domain has its own `outcomes` table. Its rows answer redeliveries for as long as the outcome window lasts
(rule 1), so that window must be longer than command topics are kept; older rows are pruned.
"""

from __future__ import annotations

import asyncio
from functools import cache

import structlog

from actors.domain import Record, Table
from infra.consensus_commit.metadata import transactional
from infra.consensus_commit.parallel import in_parallel
from infra.consensus_commit.states import TransactionState
from infra.storage.conditions import all_hold
from infra.storage.errors import NoMutationError, TooMuchToReadError
from infra.storage.operations import Bound, ColumnCondition, Delete, If, Key, Operator, Row, Scan
from infra.storage.port import Storage
from schemas.outcome import Answer
from schemas.partitioning import slot

log = structlog.get_logger()

DELETED_SIDE_BY_SIDE = 32

ONE_IN = 1_000
KEPT_LONGER_MS = 11 * 24 * 3_600_000
"""Of old outcomes one in so many, by its id, stays so much longer.

Cassandra remembers deletions for ten days, and whoever reads a partition may pass over 100,000 of them from one row to
the next: without any row left, a busy month that is followed by quiet ones would keep pruning, backups and checks from
reading the table. By the time these go, what was deleted around them is forgotten.
"""


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
    """Delete the outcomes of these buckets that were committed before `before_ms`, but ONE_IN; returns how many.

    The age is a condition of every delete, so that no row that is younger, or in doubt, can go whatever was read. Each
    partition is read once, from one end to the other: beginning anew would pass over what has just been deleted. One
    that cannot be read to its end, since too much was deleted there, is left until the next time, and keeps no other
    waiting; a storage that does not serve at all raises its error.
    """
    settled = ColumnCondition("tx_state", Operator.EQ, TransactionState.COMMITTED.value)  # and not in doubt
    old = (ColumnCondition("committed_at_ms", Operator.LT, before_ms), settled)
    very_old = (ColumnCondition("committed_at_ms", Operator.LT, before_ms - KEPT_LONGER_MS), settled)
    schema = transactional(table.schema)

    async def delete(key: Key, conditions: tuple[ColumnCondition, ...]) -> int:
        try:
            await storage.mutate([Delete(schema, key, If(conditions))])
        except NoMutationError:
            return 0
        return 1

    async def prune(partition: tuple[int, int]) -> int:
        pruned = 0
        after: Bound | None = None
        while True:
            rows = await storage.scan(Scan(schema, partition, start=after, limit=batch))
            asked = [(row, old if slot(str(row["id"]), ONE_IN) else very_old) for row in rows]
            wanted = [(_key(partition, row), conditions) for row, conditions in asked if all_hold(conditions, row)]
            for first in range(0, len(wanted), DELETED_SIDE_BY_SIDE):
                some = wanted[first : first + DELETED_SIDE_BY_SIDE]
                pruned += sum(await in_parallel([delete(key, conditions) for key, conditions in some]))
            if len(rows) < batch:
                return pruned
            after = Bound(_key(partition, rows[-1]).clustering, inclusive=False)
            await asyncio.sleep(0)  # A storage in this process may answer without ever giving way.

    total = 0
    for bucket in buckets:
        for number in range(table.slices):
            try:
                total += await prune((bucket, number))
            except TooMuchToReadError as error:
                log.warning("pruning is done later", table=table.full_name, bucket=bucket, error=str(error))
    return total


def _key(partition: tuple[int, int], row: Row) -> Key:
    return Key(partition, (row["key"], row["id"]))
