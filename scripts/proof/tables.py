"""Committed rows as they lie in the storage, and what of them two runs of the same commands must have in common.

They are read beside the system and without any of its code (`stored`). So a record in doubt is seen as one;
`comparable_rows` is for a system at rest that has none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from scripts.proof.stored import Row, Stored, stored, stored_at

COMMITTED = 3
"""`tx_state` of a record at rest; null is one that was there before transactions were."""

ABORTED = 4
"""`tx_state` of a transaction that is not committed and never will be."""

COMPARED = (
    "inventory.products",
    "inventory.reservations",
    "inventory.expiries",
    "inventory.outcomes",
    "payment.wallets",
    "payment.payments",
    "payment.outcomes",
    "shipping.shipments",
    "shipping.outcomes",
    "orders.orders",
    "orders.returns",
    "orders.outcomes",
    "views.order_history",
)

TRANSACTION_COLUMNS = ("tx_id", "tx_state", "tx_version", "tx_prepared_at", "tx_committed_at")

Tables = Mapping[str, Sequence[str]]
"""By its name, each table's rows as sorted lines of JSON: what is left of a system when it has ended."""

LEFT_OUT = ("transaction_id", "record_version", "period")
"""Columns that tell a transaction, a version or a time; other times are told by their names' ends."""


def in_doubt(directory: Path) -> list[str]:
    """Every record that is PREPARED or DELETED, in any table of the system's directory."""
    with stored(directory) as storage:
        return _in_doubt(storage)


def in_doubt_at(url: str) -> list[str]:
    """The same of the storage at an address."""
    with stored_at(url) as storage:
        return _in_doubt(storage)


def _in_doubt(storage: Stored) -> list[str]:
    return [
        f"{name}: {row['tx_id']} in state {row['tx_state']}"
        for name in storage.tables()
        if "before_tx_id" in storage.columns(name)  # the states of transactions are no records
        for row in storage.rows(name, ("tx_id", "tx_state"))
        if row["tx_state"] not in (None, COMMITTED)
    ]


def aborted(directory: Path) -> set[str]:
    """The transactions that the coordinator's table says are aborted."""
    return {row["tx_id"] for row in _rows(directory, "coordinator.state") if row["tx_state"] == ABORTED}


def intents(directory: Path) -> set[str]:
    """The transactions of which a coordinator has work left, be it only to forget that they were aborted."""
    return {row["tx_id"] for row in _rows(directory, "coordinator.intents")}


def comparable_rows(directory: Path, name: str, *, wanted: Callable[[Row], bool] = lambda row: True) -> list[str]:
    """The rows of a table without times, transaction ids and versions, each as one line of JSON, sorted.

    Of an outcome's answer, which holds all of these and what else there was at that moment, the ids and types of its
    events count. `wanted` chooses rows by their whole content.
    """
    return sorted(json.dumps(_comparable(row), sort_keys=True) for row in _rows(directory, name) if wanted(row))


def comparable(directory: Path, *, wanted: Callable[[Row], bool] = lambda row: True) -> Tables:
    """`comparable_rows` of every table that is compared."""
    return {name: comparable_rows(directory, name, wanted=wanted) for name in COMPARED}


def exact_rows(directory: Path, name: str) -> list[str]:
    """The rows of a table to the last column, each as one line of JSON, sorted."""
    return sorted(json.dumps(row, sort_keys=True) for row in _rows(directory, name))


def exact(directory: Path) -> Tables:
    """`exact_rows` of every table that is compared."""
    return {name: exact_rows(directory, name) for name in COMPARED}


def differences(one: Tables, other: Tables, *, shown: int = 5) -> tuple[dict[str, int], list[str]]:
    """How many rows each table has, and a sentence for each row that only one side has (`shown` a table)."""
    counted, found = {}, []
    for name, left in one.items():
        right = other[name]
        counted[name] = len(left)
        only_left, only_right = sorted(set(left) - set(right)), sorted(set(right) - set(left))
        found += [f"{name}: only the first has {row}" for row in only_left[:shown]]
        found += [f"{name}: only the second has {row}" for row in only_right[:shown]]
        if len(left) != len(right) and not (only_left or only_right):
            found.append(f"{name}: {len(left)} rows and {len(right)} rows")
    return counted, found


def traces(directory: Path, ids: Set[str]) -> list[str]:
    """A sentence for each of `ids` that a row of any table but the outcomes has, as a value, however deep within."""
    return [
        f"{name}: {id} in {row}"
        for name in COMPARED
        if not name.endswith(".outcomes")
        for row in _rows(directory, name)
        for id in sorted(ids & set(texts(row)))
    ]


def texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value, names aside; a text that is JSON itself is looked into."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)
    elif isinstance(value, str):
        if value[:1] in ("{", "["):
            yield from texts(json.loads(value))
        yield value


def _rows(directory: Path, name: str) -> list[Row]:
    with stored(directory) as storage:
        return storage.rows(name)


def _comparable(row: Mapping[str, Any]) -> Row:
    kept = {
        name: value
        for name, value in row.items()
        if name not in TRANSACTION_COLUMNS
        and not name.startswith("before_")
        and name not in LEFT_OUT
        and not _is_time(name)
    }
    if "answer" in kept:
        kept["answer"] = [(event["id"], event["type"]) for event in json.loads(kept["answer"])["events"]]
    if "steps" in kept:
        kept["steps"] = sorted(json.loads(kept["steps"]))
    if "history" in kept:
        entries = json.loads(kept["history"])
        kept["history"] = [{name: each[name] for name in each if not _is_time(name)} for each in entries]
    return kept


def _is_time(name: str) -> bool:
    return name == "at_ms" or name.endswith(("_at_ms", "_at"))
