"""The states of records and transactions, and the isolation levels: ScalarDB's names and numbers.

A record moves between them by conditional writes alone:

                    prepare                commit
    absent/COMMITTED ─────► PREPARED ────────────────► COMMITTED
           ▲                   │ roll back
           └───────────────────┘
                    prepare (a delete)     commit
    absent/COMMITTED ─────► DELETED ─────────────────► absent

The state table holds COMMITTED or ABORTED for a transaction, written once and never changed.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum


class TransactionState(IntEnum):
    """ScalarDB's TransactionState, as stored in `tx_state`."""

    PREPARED = 1
    DELETED = 2
    COMMITTED = 3
    ABORTED = 4


class Isolation(StrEnum):
    """How much a transaction may see of others.

    READ_COMMITTED reads afresh each time and takes what was last seen committed: no dirty or intermediate reads, but
    a record whose transaction has just committed may still be seen as it was, and a lost update is prevented only
    for a record that was read when it was written.
    SNAPSHOT prevents dirty, intermediate and vanishing reads and lost updates, but allows read skew, write skew and
    phantoms. SERIALIZABLE also validates everything that was read, after preparing and before committing (ScalarDB's
    EXTRA_READ), and is then strictly serializable.
    """

    READ_COMMITTED = "READ_COMMITTED"
    SNAPSHOT = "SNAPSHOT"
    SERIALIZABLE = "SERIALIZABLE"
