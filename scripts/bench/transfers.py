"""Transfers and four-table orders on one Cassandra: this engine beside ScalarDB, in the same run.

    python -m scripts.bench.transfers [--seconds N] [--at-once 1,8,32,64] [--work transfer,hot,order] [--storage URL]
                                      [--rounds N] [--buckets N] [--cache N] [--alone] [--profile FILE]

Method. Both sides run the same work at SERIALIZABLE on tables of their own with the same rows, each with N at once: the
Java side threads on ScalarDB 3.19 with its defaults, this side asyncio tasks on a TransactionManager behind the
PartitionGate, in this one process. They take turns in short rounds, so that whatever disturbs the machine disturbs
both; a first round of each, not counted, warms both up. A transaction that meets a conflict waits (10 ms, doubled up to
160 ms, jittered) and runs again with a new id; its latency counts from its first begin.

    transfer   between two of 10,000 accounts          hot   between two of 10
    order      10,000 products and customers: reads and updates a stock and a wallet, inserts a shipment and an order

Each side has its tables laid out as suits it: ScalarDB's have a partition for each row, ours all rows in one, where
batches that wait for a partition go together. `--buckets 16` gives ours so many, and 0 lays ours out as theirs. Ours
commits in groups (`--alone`: it does not); ScalarDB's group commit is off by default.

Printed as one JSON object a line: for each work and N committed transactions a second, p50 and p99 in ms, conflicts,
statements for each committed transaction by phase of the protocol, CPU seconds of this process, of the Java program and
of Cassandra while each side ran, and `ratio`, ours to theirs. `--one-phase` and `--sync` take ours with one-phase
commit (which ScalarDB's defaults have off, and which no work here is fit for) and with commits that are answered only
when their records are settled, as ScalarDB's are; `--cache N` lets ours keep N records between transactions. Nothing is
asserted. Without `--storage cassandra://HOST:PORT` it starts a Cassandra of its own; the Java side needs a `javac`, and
is left out where there is none.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import os
import pstats
import random
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from infra.consensus_commit.errors import TransactionConflictError
from infra.consensus_commit.manager import TransactionManager
from infra.consensus_commit.metadata import transactional
from infra.consensus_commit.transaction import Transaction
from infra.servers.cassandra import LocalCassandra
from infra.storage.cassandra import CassandraStorage
from infra.storage.operations import DataType, Key, Put, Row, TableSchema
from scripts.bench.watched import WatchedStorage
from scripts.java_peer.processes import (
    NO_COMPILER,
    PeerProcess,
    compile_java,
    java_compiler,
    scalardb_settings,
    start_java,
)

OURS, THEIRS = "concord", "scalardb"
KEYS: Mapping[str, int] = {"transfer": 10_000, "hot": 10, "order": 10_000}
LOADED_AT_ONCE = 64
WARMING_UP_S = 8.0  # A Java server that has just been started goes on becoming faster for a while.


def tables(namespace: str, buckets: int = 0) -> dict[str, TableSchema]:
    """Of one row a partition, or with `buckets` of so many partitions."""
    number, text = DataType.INT, DataType.TEXT
    line = {"id": text, "customer": number, "product": number, "status": text}
    columns: dict[str, dict[str, DataType]] = {
        "account": {"id": number, "balance": DataType.BIGINT},
        "stock": {"id": number, "reserved": number},
        "wallet": {"id": number, "balance": DataType.BIGINT},
        "shipment": line,
        "orders": line,
    }
    if not buckets:
        return {name: TableSchema(namespace, name, of, partition_key=("id",)) for name, of in columns.items()}
    return {
        name: TableSchema(namespace, name, {"bucket": number, **of}, partition_key=("bucket",), clustering_key=("id",))
        for name, of in columns.items()
    }


def key_of(identity: int | str, buckets: int) -> Key:
    if not buckets:
        return Key((identity,))
    number = identity if isinstance(identity, int) else int(identity[:8], 16)
    return Key((number % buckets,), (identity,))


@dataclass
class Tally:
    """What one side did in all its rounds of one level."""

    latencies_ms: list[float] = field(default_factory=list)
    conflicts: int = 0
    seconds: float = 0.0
    statements: Counter[str] = field(default_factory=Counter)
    cpu_s: dict[str, float] = field(default_factory=dict)

    def report(self) -> dict[str, Any]:
        self.latencies_ms.sort()
        committed = len(self.latencies_ms)
        percentiles = {
            f"p{percent}_ms": round(self.latencies_ms[min(committed * percent // 100, committed - 1)], 1)
            for percent in (50, 99)
            if committed
        }
        return {
            "tx_per_s": self.rate,
            **percentiles,
            "conflicts": self.conflicts,
            "statements_a_tx": {phase: round(n / max(committed, 1), 2) for phase, n in sorted(self.statements.items())},
            "cpu_ms_a_tx": {who: round(s * 1000 / max(committed, 1), 2) for who, s in self.cpu_s.items()},
        }

    @property
    def rate(self) -> float:
        return round(len(self.latencies_ms) / self.seconds, 1) if self.seconds else 0.0


class Ours:
    """This engine's side: tasks of this process."""

    def __init__(
        self,
        storage: CassandraStorage,
        *,
        one_phase: bool,
        async_commit: bool,
        group_commit: bool,
        cache: int,
        buckets: int,
    ) -> None:
        self.watched = WatchedStorage(storage)
        self.manager = TransactionManager(
            self.watched,  # the manager puts its gate before it
            one_phase_commit=one_phase,
            async_commit=async_commit,
            group_commit=group_commit,
            cache_records=cache,
            coordinator_namespace="bench_coordinator",
        )
        self._tables = tables(OURS, buckets)
        self._buckets = buckets
        self._chance = random.Random(1)

    async def round(self, work: str, at_once: int, seconds: float, tally: Tally) -> None:
        run = self._order if work == "order" else self._transfer
        before = Counter(self.watched.counts)
        started_s = time.perf_counter()

        async def worker() -> None:
            while time.perf_counter() < started_s + seconds:
                began_s = time.perf_counter()
                conflicts = await self._until_committed(run, KEYS[work])
                tally.conflicts += conflicts
                tally.latencies_ms.append((time.perf_counter() - began_s) * 1000)

        await asyncio.gather(*(worker() for _ in range(at_once)))
        await self.manager.drain()  # What was answered early is paid for here.
        tally.seconds += time.perf_counter() - started_s
        tally.statements += self.watched.counts - before

    async def _until_committed(self, run: Callable[[Transaction, int, int], Awaitable[None]], keys: int) -> int:
        """How many conflicts it took."""
        first = self._chance.randrange(keys)
        second = (first + 1 + self._chance.randrange(keys - 1)) % keys
        attempt = 0
        while True:
            transaction = self.manager.begin()
            try:
                await run(transaction, first, second)
                await transaction.commit()
                return attempt
            except TransactionConflictError:
                await asyncio.sleep(0.01 * 2 ** min(attempt, 4) * self._chance.uniform(0.5, 1.5))
                attempt += 1

    async def _transfer(self, transaction: Transaction, first: int, second: int) -> None:
        account = self._tables["account"]
        giver, taker = key_of(first, self._buckets), key_of(second, self._buckets)
        held, owed = await transaction.get_many(account, [giver, taker])
        assert held is not None
        assert owed is not None
        await transaction.update(account, giver, {"balance": cast(int, held["balance"]) - 1})
        await transaction.update(account, taker, {"balance": cast(int, owed["balance"]) + 1})

    async def _order(self, transaction: Transaction, product: int, customer: int) -> None:
        stock, wallet = self._tables["stock"], self._tables["wallet"]
        reserved, balance = await asyncio.gather(
            transaction.get(stock, key_of(product, self._buckets)),
            transaction.get(wallet, key_of(customer, self._buckets)),
        )
        assert reserved is not None
        assert balance is not None
        await transaction.update(
            stock, key_of(product, self._buckets), {"reserved": cast(int, reserved["reserved"]) + 1}
        )
        await transaction.update(
            wallet, key_of(customer, self._buckets), {"balance": cast(int, balance["balance"]) - 100}
        )
        line = {"customer": customer, "product": product, "status": "placed"}
        for name in ("shipment", "orders"):
            await transaction.insert(self._tables[name], key_of(transaction.tx_id, self._buckets), line)


class Theirs:
    """ScalarDB's side: threads of a Java program, on `keys` rows of each kind of work."""

    def __init__(self, java: PeerProcess, keys: Mapping[str, int] = KEYS) -> None:
        self._java = java
        self._keys = keys

    async def round(self, work: str, at_once: int, seconds: float, tally: Tally) -> None:
        before = await self._java.ask("counts", manager=THEIRS)
        told = await self._java.ask(
            "bench",
            manager=THEIRS,
            namespace=THEIRS,
            work="order" if work == "order" else "transfer",
            keys=self._keys[work],
            at_once=at_once,
            milliseconds=int(seconds * 1000),
        )
        tally.latencies_ms += [us / 1000 for us in told["latencies_us"]]
        tally.conflicts += told["conflicts"]
        tally.seconds += told["took_us"] / 1_000_000
        tally.statements += Counter(await self._java.ask("counts", manager=THEIRS)) - Counter(before)


async def load(
    storage: CassandraStorage,
    works: Sequence[str],
    our_buckets: int,
    *,
    sides: Sequence[str] = (OURS, THEIRS),
    rows_each: int = 10_000,
) -> None:
    """The same rows for all `sides`, as transactions left them long ago. By plain writes, for nobody else is here."""
    manager = TransactionManager(storage, group_commit=True, coordinator_namespace="bench_coordinator")
    await manager.create_coordinator_tables()
    for side in sides:
        buckets = our_buckets if side == OURS else 0
        named = tables(side, buckets)
        for table in named.values():
            await manager.create_table(table)
        columns: dict[str, str] = {}
        if {"transfer", "hot"} & {*works}:
            columns |= {"account": "balance"}
        if "order" in works:
            columns |= {"stock": "reserved", "wallet": "balance"}
        rows = ((named[name], number, column) for name, column in columns.items() for number in range(rows_each))

        async def worker(rows: Iterator[tuple[TableSchema, int, str]] = rows, buckets: int = buckets) -> None:
            for table, number, column in rows:
                committed: Row = {column: 1_000_000_000, "tx_id": str(uuid.uuid4()), "tx_state": 3, "tx_version": 1}
                committed |= {"tx_prepared_at": 1_600_000_000_000, "tx_committed_at": 1_600_000_000_001}
                await storage.mutate([Put(transactional(table), key_of(number, buckets), committed)])

        await asyncio.gather(*(worker() for _ in range(LOADED_AT_ONCE)))


def cpu_s(pids: Mapping[str, int]) -> dict[str, float]:
    """CPU seconds that processes have used so far (/proc; Linux only)."""
    used: dict[str, float] = {}
    for who, pid in pids.items():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        used[who] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return used


async def open_scalardb(stack: AsyncExitStack, port: int) -> PeerProcess:
    """The Java program with a ScalarDB on the Cassandra at `port`, until `stack` is left. Needs a `java_compiler`."""
    classes = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-classes-")))
    await compile_java(classes)
    java = await start_java(classes, heap_mb=768)
    stack.push_async_callback(java.stop)
    settings = scalardb_settings(
        port,
        scalar__db__storage="watched-cassandra",
        peer__watch=THEIRS,
        scalar__db__consensus_commit__coordinator__namespace="bench_coordinator",
    )
    await java.ask("open", manager=THEIRS, properties=settings)
    return java


async def measure(options: argparse.Namespace, stack: AsyncExitStack) -> None:
    pids = {"python": os.getpid()}
    if options.storage is None:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-cassandra-"))
        node = LocalCassandra(Path(folder), heap_mb=1024)
        await node.start()
        stack.push_async_callback(node.stop)
        port = node.port
        pids["cassandra"] = cast(int, node.pid)
    else:
        port = urlsplit(options.storage).port or 9042
    storage = CassandraStorage(["127.0.0.1"], port)
    stack.push_async_callback(storage.close)
    await load(storage, options.work, options.buckets)

    ours = Ours(
        storage,
        one_phase=options.one_phase,
        async_commit=not options.sync,
        group_commit=not options.alone,
        cache=options.cache,
        buckets=options.buckets,
    )
    sides: dict[str, Ours | Theirs] = {OURS: ours}
    if java_compiler() is None:
        print(json.dumps({"left_out": THEIRS, "why": NO_COMPILER}), flush=True)
    else:
        java = await open_scalardb(stack, port)
        sides[THEIRS] = Theirs(java)
        pids["java"] = java.pid

    for work in options.work:
        for side in sides.values():
            await side.round(work, 8, WARMING_UP_S, Tally())
        for at_once in options.at_once:
            tallies = {name: Tally() for name in sides}
            for _ in range(options.rounds):
                for name, side in sides.items():
                    before = cpu_s(pids)
                    await side.round(work, at_once, options.seconds / options.rounds, tallies[name])
                    for who, after in cpu_s(pids).items():
                        tallies[name].cpu_s[who] = tallies[name].cpu_s.get(who, 0.0) + after - before[who]
            reports: dict[str, Any] = {name: tally.report() for name, tally in tallies.items()}
            if THEIRS in tallies:
                reports["ratio"] = round(tallies[OURS].rate / max(tallies[THEIRS].rate, 0.1), 2)
            print(json.dumps({"work": work, "at_once": at_once, **reports}), flush=True)
    if options.profile:
        profile = cProfile.Profile(time.thread_time)  # CPU of the event loop's thread, whoever else wants the machine
        profile.enable()
        await ours.round(options.work[0], options.at_once[-1], options.seconds, Tally())
        profile.disable()
        with options.profile.open("w") as file:
            pstats.Stats(profile, stream=file).sort_stats("tottime").print_stats(60)
    await ours.manager.close()


async def run(options: argparse.Namespace) -> None:
    async with AsyncExitStack() as stack:
        await measure(options, stack)


def main() -> None:
    parser = argparse.ArgumentParser(description="Transfers and orders beside ScalarDB.")
    parser.add_argument("--seconds", type=float, default=12.0, help="for each side of a level, over all its rounds")
    parser.add_argument("--rounds", type=int, default=4, help="turns that each side takes at a level")
    parser.add_argument("--at-once", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 32, 64])
    parser.add_argument("--work", type=lambda text: text.split(","), default=["transfer", "hot", "order"])
    parser.add_argument("--storage", help="cassandra://HOST:PORT of one that runs (default: one is started)")
    parser.add_argument("--one-phase", action="store_true", help="ours with one-phase commit where it applies")
    parser.add_argument("--sync", action="store_true", help="ours answering only when records are settled")
    parser.add_argument("--alone", action="store_true", help="ours without group commit")
    parser.add_argument("--buckets", type=int, default=1, help="partitions of each of our tables; 0: one for each row")
    parser.add_argument("--cache", type=int, default=0, help="records that ours keeps between transactions")
    parser.add_argument("--profile", type=Path, help="where to write what this process spends its time on")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
