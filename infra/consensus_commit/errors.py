"""What a transaction may raise. The class says what to do.

    TransactionError
    ├── TransactionConflictError        another transaction was in the way: run it again from the start, with a new id
    │   ├── CrudConflictError           met while reading
    │   │   └── UncommittedRecordError  the record belongs to a transaction that is still under way
    │   ├── PreparationConflictError    what was read, or was to be absent, has changed: found while preparing
    │   ├── ValidationConflictError     what was only read has changed (an anti-dependency): found while validating
    │   └── CommitConflictError         somebody aborted this transaction before it could commit
    ├── UnsatisfiedConditionError       a condition of a write did not hold: the answer to a question, not a fault
    ├── UnknownTransactionStatusError   committed or not, nobody told: ask the state table, never just try again
    ├── TransactionNotFoundError        nobody here knows this id: run it again from the start
    └── IllegalOperationError           the caller's mistake: fix the call

They mirror ScalarDB's CrudException family. Storage errors (`infra/storage/errors.py`) pass through wherever they
leave nothing undecided. All of them survive pickling, since they cross processes.
"""

from __future__ import annotations


class TransactionError(Exception):
    """Base of everything that the engine itself raises."""


class TransactionConflictError(TransactionError):
    """Another transaction was in the way; nothing of this one took effect."""


class CrudConflictError(TransactionConflictError):
    """A read could not be answered because of another transaction."""


class UncommittedRecordError(CrudConflictError):
    """A record belongs to a transaction that is neither decided nor expired. `tx_id` names it."""

    def __init__(self, message: str, tx_id: str = "") -> None:
        super().__init__(message, tx_id)
        self.tx_id = tx_id

    def __str__(self) -> str:
        return str(self.args[0])


class PreparationConflictError(TransactionConflictError):
    """A record that is to be written is not as it was read, or exists where it must not."""


class ValidationConflictError(TransactionConflictError):
    """A record or a scan that the transaction relies on would come out differently now."""


class CommitConflictError(TransactionConflictError):
    """The transaction had been aborted, by recovery for example, when it was about to commit."""


class UnsatisfiedConditionError(TransactionError):
    """A condition given with a write does not hold for the record as this transaction sees it."""


class UnknownTransactionStatusError(TransactionError):
    """The decisive write may or may not have been applied. `tx_id` is what to ask the state table for."""

    def __init__(self, message: str, tx_id: str = "") -> None:
        super().__init__(message, tx_id)
        self.tx_id = tx_id

    def __str__(self) -> str:
        return str(self.args[0])


class TransactionNotFoundError(TransactionError):
    """No transaction with this id is known here: it ended, or whoever held it has restarted."""


class IllegalOperationError(TransactionError):
    """An operation that this transaction cannot do as it stands (ScalarDB: IllegalArgumentException)."""
