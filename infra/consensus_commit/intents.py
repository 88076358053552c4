"""What is under way, written down before it begins: so that recovery knows where to look (architecture rules 6 to 8).

    coordinator                                             its successor after a restart
    ───────────                                             ─────────────────────────────
    record(intent)      before the first record is prepared
    prepare … commit    (the transaction)
    remove              every record was seen committed      of(coordinator): settle what is left
    mark_aborted        every record was seen rolled back    abort_state, settle_partition, then the same two
    …prune              once the writer is known to be gone

An intent names the actors and their incarnations, so that "the one who was writing is gone" can be decided, and the
partitions that the transaction touches, so that settling it reads these and no others. The intent of an aborted
transaction outlives its records: as long as its writer may only be paused, the ABORTED row must stay in its way.

The table is not transactional and all its writes are plain: one coordinator owns a partition, and repeating a write
does no harm. Never touches user records or state rows.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

from infra.clock import Clock
from infra.failpoints import reach
from infra.storage.operations import DataType, Delete, Key, Mutation, Put, Row, Scan, TableSchema, Value
from infra.storage.port import Storage

Partition: TypeAlias = tuple[str, str, tuple[Value, ...]]
"""(namespace, table, partition key values)."""


@dataclass(frozen=True, slots=True)
class Intent:
    """What a transaction is about to touch, and on whose word. `participants` are actor names."""

    tx_id: str
    coordinator: str
    coordinator_incarnation: str
    home: str
    home_incarnation: str
    partitions: tuple[Partition, ...]
    participants: tuple[str, ...]
    created_at_ms: int
    aborted: bool = False


def new_intended_id(clock: Clock) -> str:
    """An id for a transaction that records an intent: a UUID whose version reads 8 (RFC 9562: the maker's own).

    ScalarDB's ids, and those of transactions without intents, are version 4: `records_intent` tells them apart.
    """
    tx_id = clock.new_id()
    return f"{tx_id[:14]}8{tx_id[15:]}"


def records_intent(tx_id: str) -> bool:
    """Whether `tx_id` was made by `new_intended_id`: without an intent, such a transaction has nothing in doubt."""
    return len(tx_id) == 36 and tx_id[14] == "8"


class IntentLog:
    """The table of intents, one partition for each coordinator."""

    def __init__(self, storage: Storage, *, namespace: str = "coordinator") -> None:
        self._storage = storage
        self.table = TableSchema(
            namespace,
            "intents",
            {
                "coordinator": DataType.TEXT,
                "tx_id": DataType.TEXT,
                "coordinator_incarnation": DataType.TEXT,
                "home": DataType.TEXT,
                "home_incarnation": DataType.TEXT,
                "partitions": DataType.TEXT,
                "participants": DataType.TEXT,
                "created_at": DataType.BIGINT,
                "aborted": DataType.BOOLEAN,
            },
            partition_key=("coordinator",),
            clustering_key=("tx_id",),
            short_lived=True,  # One that came back would be found settled, and removed again.
        )

    async def create_tables(self) -> None:
        await self._storage.create_table(self.table)

    async def record(self, intents: Sequence[Intent]) -> None:
        """Write intents down; once this returns, their transactions may prepare. Storage errors pass through."""
        await reach("intent.before")
        await self._write(intents)
        await reach("intent.after")

    async def remove(self, coordinator: str, tx_ids: Iterable[str]) -> None:
        """Forget intents whose records were all seen settled. Those that are absent stay so."""
        await self._mutate([Delete(self.table, Key((coordinator,), (tx_id,))) for tx_id in tx_ids])

    async def mark_aborted(self, intents: Sequence[Intent]) -> None:
        """Note that every record of these transactions was seen rolled back; their ABORTED rows are still needed."""
        await self._write([replace(intent, aborted=True) for intent in intents])

    async def of(self, coordinator: str) -> list[Intent]:
        """Every intent of one coordinator, by transaction id."""
        return [_intent(row) for row in await self._storage.scan(Scan(self.table, (coordinator,)))]

    async def all(self) -> list[Intent]:
        """Every intent of every coordinator."""
        coordinators = sorted(cast(str, partition[0]) for partition in await self._storage.partitions(self.table))
        return [intent for coordinator in coordinators for intent in await self.of(coordinator)]

    async def _write(self, intents: Sequence[Intent]) -> None:
        by_coordinator: dict[str, list[Mutation]] = {}
        for intent in intents:
            put = Put(self.table, Key((intent.coordinator,), (intent.tx_id,)), _columns(intent))
            by_coordinator.setdefault(intent.coordinator, []).append(put)
        for mutations in by_coordinator.values():
            await self._mutate(mutations)

    async def _mutate(self, mutations: Sequence[Mutation]) -> None:
        size = self._storage.info_of(self.table.namespace).max_mutations or len(mutations)
        for first in range(0, len(mutations), size or 1):
            await self._storage.mutate(mutations[first : first + size])


def _columns(intent: Intent) -> Row:
    return {
        "coordinator_incarnation": intent.coordinator_incarnation,
        "home": intent.home,
        "home_incarnation": intent.home_incarnation,
        "partitions": json.dumps(
            [
                (namespace, table, [_to_json(value) for value in values])
                for namespace, table, values in intent.partitions
            ]
        ),
        "participants": json.dumps(intent.participants),
        "created_at": intent.created_at_ms,
        "aborted": intent.aborted,
    }


def _intent(row: Row) -> Intent:
    return Intent(
        tx_id=cast(str, row["tx_id"]),
        coordinator=cast(str, row["coordinator"]),
        coordinator_incarnation=cast(str, row["coordinator_incarnation"]),
        home=cast(str, row["home"]),
        home_incarnation=cast(str, row["home_incarnation"]),
        partitions=tuple(
            (namespace, table, tuple(_from_json(value) for value in values))
            for namespace, table, values in json.loads(cast(str, row["partitions"]))
        ),
        participants=tuple(json.loads(cast(str, row["participants"]))),
        created_at_ms=cast(int, row["created_at"]),
        aborted=bool(row["aborted"]),
    )


def _to_json(value: Value) -> Any:
    return {"base64": base64.b64encode(value).decode()} if isinstance(value, bytes) else value


def _from_json(value: Any) -> Value:
    return base64.b64decode(value["base64"]) if isinstance(value, dict) else cast(Value, value)
