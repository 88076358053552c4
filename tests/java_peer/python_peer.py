"""The Python counterpart of `scripts/java_peer`: steered by the same lines, so that a test can kill it like the other.

    python -m tests.java_peer.python_peer

It knows the commands `open` (`port` of Cassandra, `coordinator`, `lifetime_ms`, `clock_behind_ms`, perhaps
`group_commit`), `transaction`, `mix`, `stop` and `hold`. With `group_commit` a transaction is `trying` under the id
that it began with, and has `tried` under that which it has in its group.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Mapping
from typing import Any, cast

from infra.clock import SystemClock
from infra.consensus_commit.errors import TransactionConflictError, UnknownTransactionStatusError
from infra.consensus_commit.manager import TransactionManager
from infra.consensus_commit.metadata import is_transactional, layout_of
from infra.consensus_commit.transaction import Transaction
from infra.storage.cassandra import CassandraStorage
from infra.storage.errors import StorageError
from infra.storage.gate import PartitionGate
from infra.storage.operations import Key, Row, TableSchema
from scripts.bench.watched import WatchedStorage
from scripts.java_peer.processes import PeerProcess
from tests.java_peer.mixed_tables import account_table, list_table
from tests.java_peer.values import key_of, row_from_json


async def start_python(*, env: Mapping[str, str] | None = None) -> PeerProcess:
    """Start this program in a process of its own."""
    return await PeerProcess.start([sys.executable, "-m", "tests.java_peer.python_peer"], env=env)


def say(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


class LateClock(SystemClock):
    """A clock whose wall time is behind, so that what it stamps has expired sooner for everybody else."""

    def __init__(self, behind_ms: int) -> None:
        self._behind_ms = behind_ms

    def now_ms(self) -> int:
        return super().now_ms() - self._behind_ms


async def run_steps(manager: TransactionManager, tables: dict[str, TableSchema], steps: list[dict[str, Any]]) -> None:
    """One transaction of writes, as `Peer.java` takes them."""
    async with manager.begin() as transaction:
        for step in steps:
            table = tables[step["table"]]
            key = key_of(table, step["key"])
            columns = row_from_json(table, step.get("columns")) or {}
            match step["do"]:
                case "get":
                    await transaction.get(table, key)
                case "insert":
                    await transaction.insert(table, key, columns)
                case "update":
                    await transaction.update(table, key, columns)
                case "delete":
                    await transaction.delete(table, key)
        await transaction.commit()


class Mix:
    """What `Mix.java` does, with its events."""

    def __init__(self, manager: TransactionManager, command: dict[str, Any]) -> None:
        self._manager = manager
        self._command = command
        self._account: TableSchema = account_table(command["namespace"])
        self._list: TableSchema = list_table(command["namespace"])
        self._tokens: int = command["tokens_above"]
        self._conflicts = 0
        self.stopping = False

    async def run(self) -> dict[str, int]:
        await asyncio.gather(*(self._worker(number) for number in range(self._command["at_once"])))
        return {"conflicts": self._conflicts}

    async def _worker(self, number: int) -> None:
        chance = random.Random(self._command["seed"] * 1000 + number)
        while not self.stopping:
            await self._one(chance)

    async def _one(self, chance: random.Random) -> None:
        began_ns = time.monotonic_ns()
        transaction = self._manager.begin()
        operations: list[list[Any]] = []
        outcome = "committed"
        try:
            total = await self._work(transaction, chance, operations)
            trying = {"began_ns": began_ns, "operations": operations, "total": total}
            say({"event": "trying", "tx_id": transaction.tx_id, **trying})
            await transaction.commit()
        except UnknownTransactionStatusError:
            outcome = "unknown"
        except TransactionConflictError:
            outcome = "conflict"
        except StorageError:
            outcome = "failed"
        say({"event": "tried", "tx_id": transaction.tx_id, "ended_ns": time.monotonic_ns(), "outcome": outcome})
        if outcome != "committed":
            self._conflicts += 1
            await asyncio.sleep(chance.uniform(0.005, 0.025))

    async def _work(self, transaction: Transaction, chance: random.Random, operations: list[list[Any]]) -> int | None:
        accounts, lists = self._command["accounts"], self._command["lists"]

        async def read_account(number: int) -> Row:
            row = await transaction.get(self._account, Key((number,)))
            assert row is not None
            operations.append(["read", "account", number, row["token"]])
            return row

        async def write_account(number: int, balance: int) -> None:
            self._tokens += 1
            token = self._tokens
            await transaction.update(self._account, Key((number,)), {"balance": balance, "token": token})
            operations.append(["write", "account", number, token])

        async def read_list(number: int) -> str:
            row = await transaction.get(self._list, Key((number,)))
            assert row is not None
            operations.append(["read", "list", number, row["items"]])
            return cast(str, row["items"])

        async def append(number: int, items: str) -> None:
            self._tokens += 1
            token = self._tokens
            await transaction.update(self._list, Key((number,)), {"items": f"{items},{token}" if items else f"{token}"})
            operations.append(["append", "list", number, token])

        kind = chance.randrange(10)
        if kind < 4:
            first, second = chance.sample(range(accounts), 2)
            amount = chance.randrange(1, 10)
            held, owed = await read_account(first), await read_account(second)
            await write_account(first, cast(int, held["balance"]) - amount)
            await write_account(second, cast(int, owed["balance"]) + amount)
            return None
        if kind < 9:
            first, second = chance.sample(range(lists), 2)
            await append(first, await read_list(first))
            items = await read_list(second)
            if kind < 6:
                await append(second, items)
            elif kind == 6:
                await read_account(chance.randrange(accounts))
            return None
        total = sum([cast(int, (await read_account(number))["balance"]) for number in range(accounts)])
        await read_list(chance.randrange(lists))
        return total


async def main() -> None:
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader(limit=64 * 1024 * 1024)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    say({"event": "ready", "now_ns": time.monotonic_ns()})
    storage: WatchedStorage | None = None
    manager: TransactionManager | None = None
    mix: Mix | None = None
    tasks: set[asyncio.Task[None]] = set()

    def held(phase: str) -> None:
        say({"event": "held", "at": phase})

    def recovered(kind: str) -> None:
        say({"event": "recovered", "kind": kind})

    async def answer(command: dict[str, Any]) -> Any:
        nonlocal storage, manager, mix
        match command["do"]:
            case "open":
                storage = WatchedStorage(
                    CassandraStorage(["127.0.0.1"], command["port"]), lambda phase: say({"event": "held", "at": phase})
                )
                manager = TransactionManager(
                    PartitionGate(storage),
                    LateClock(command["clock_behind_ms"]),
                    one_phase_commit=False,  # so that each has a state row, which tells what became of it
                    coordinator_namespace=command["coordinator"],
                    transaction_lifetime_ms=command["lifetime_ms"],
                    on_recovered=recovered,
                    group_commit=command.get("group_commit", False),
                )
            case "hold":
                assert storage is not None
                storage.hold_at = command["at"]
            case "transaction":
                assert manager is not None
                assert storage is not None
                tables = {
                    table.full_name: layout_of(table).user
                    for table in await storage.tables()
                    if is_transactional(table)
                }
                await run_steps(manager, tables, command["steps"])
            case "mix":
                assert manager is not None
                mix = Mix(manager, command)
                result = await mix.run()
                await manager.drain()
                return result
            case "stop":
                assert mix is not None
                mix.stopping = True
            case unknown:
                raise ValueError(f"unknown command {unknown}")
        return None

    async def serve(command: dict[str, Any]) -> None:
        try:
            say({"id": command["id"], "result": await answer(command)})
        except Exception as error:
            say({"id": command["id"], "error": type(error).__name__, "message": str(error)})

    while text := await lines.readline():
        task = asyncio.create_task(serve(json.loads(text)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    for task in tasks:
        task.cancel()
    if manager is not None and storage is not None:
        await manager.close()
        await storage.close()


if __name__ == "__main__":
    asyncio.run(main())
