"""What each phase writes for one record: pure functions from a record to one conditional mutation.

Source: ScalarDB's PrepareMutationComposer, CommitMutationComposer, RollbackMutationComposer and
OnePhaseCommitMutationComposer. Every mutation is conditional, and compares `tx_id`s rather than versions: a record
deleted and inserted again starts over at version 1. They never write to the state table.

    prepare    IF tx_id = <as read>  (IS NULL where deemed committed), or IF NOT EXISTS
    commit     IF tx_id = me AND tx_state = PREPARED | DELETED
    roll back  IF tx_id = me AND tx_state = PREPARED | DELETED
    one phase  as prepare, but the record is COMMITTED at once
"""

from __future__ import annotations

from collections.abc import Mapping

from infra.consensus_commit.metadata import (
    BEFORE_TX_VERSION,
    TX_COMMITTED_AT,
    TX_ID,
    TX_PREPARED_AT,
    TX_STATE,
    TX_VERSION,
    Layout,
    is_committed,
    version_of,
)
from infra.consensus_commit.states import TransactionState
from infra.storage.operations import ColumnCondition, Delete, If, IfNotExists, Key, Mutation, Operator, Put, Row, Value

PREPARED = TransactionState.PREPARED.value
DELETED = TransactionState.DELETED.value
COMMITTED = TransactionState.COMMITTED.value

_ABSENT = IfNotExists()


def prepare(
    layout: Layout,
    key: Key,
    columns: Mapping[str, Value] | None,
    read: Row | None,
    *,
    tx_id: str,
    prepared_at_ms: int,
) -> Put:
    """Prepare one record: `columns` over the record that was `read`, or its deletion where `columns` is None."""
    written: Row = {} if columns is None else dict(columns)
    written[TX_ID] = tx_id
    written[TX_STATE] = DELETED if columns is None else PREPARED
    written[TX_PREPARED_AT] = prepared_at_ms
    if read is None:
        written[TX_VERSION] = 1
        return Put(layout.stored, key, written, _ABSENT)
    assert is_committed(read), f"{layout.full_name} {key}: only a committed record may become a before-image"
    written[TX_VERSION] = version_of(read) + 1
    for before, name in layout.before_pairs:
        written[before] = read[name]
    if written[BEFORE_TX_VERSION] is None:
        written[BEFORE_TX_VERSION] = 0  # NULL would say that there was no record
    return Put(layout.stored, key, written, _unchanged(read))


def commit(layout: Layout, key: Key, *, deleted: bool, tx_id: str, committed_at_ms: int) -> Mutation:
    """Make a prepared record committed (also the roll-forward of one that was found)."""
    if deleted:
        return Delete(layout.stored, key, _mine(tx_id, DELETED))
    columns: Row = {TX_STATE: COMMITTED, TX_COMMITTED_AT: committed_at_ms, **layout.no_before}
    return Put(layout.stored, key, columns, _mine(tx_id, PREPARED))


def roll_back(layout: Layout, key: Key, *, deleted: bool, tx_id: str, before: Row | None) -> Mutation:
    """Put a prepared record back to what it was: `before`, or nothing."""
    condition = _mine(tx_id, DELETED if deleted else PREPARED)
    if before is None:
        return Delete(layout.stored, key, condition)
    columns: Row = {name: before[name] for _, name in layout.before_pairs}
    columns.update(layout.no_before)
    return Put(layout.stored, key, columns, condition)


def commit_at_once(
    layout: Layout,
    key: Key,
    columns: Mapping[str, Value] | None,
    read: Row | None,
    *,
    tx_id: str,
    committed_at_ms: int,
) -> Mutation:
    """One-phase commit of one record. A deleted record must have been read as present.

    Deleting what is absent cannot be conditional on its absence, so that a conflict would go unseen.
    """
    if columns is None:
        assert read is not None
        return Delete(layout.stored, key, _unchanged(read))
    written: Row = {
        **columns,
        TX_ID: tx_id,
        TX_STATE: COMMITTED,
        TX_PREPARED_AT: committed_at_ms,
        TX_COMMITTED_AT: committed_at_ms,
    }
    if read is None:
        written[TX_VERSION] = 1
        return Put(layout.stored, key, written, _ABSENT)
    written[TX_VERSION] = version_of(read) + 1
    # What was read may still be stored as PREPARED under a committed transaction: then its before-image goes too.
    written.update(layout.no_before)
    return Put(layout.stored, key, written, _unchanged(read))


def _unchanged(read: Row) -> If:
    tx_id = read[TX_ID]
    if tx_id is None:
        return If((ColumnCondition(TX_ID, Operator.IS_NULL),))
    return If((ColumnCondition(TX_ID, Operator.EQ, tx_id),))


def _mine(tx_id: str, state: int) -> If:
    return If((ColumnCondition(TX_ID, Operator.EQ, tx_id), ColumnCondition(TX_STATE, Operator.EQ, state)))
