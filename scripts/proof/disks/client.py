"""A process that transfers for ever, and says what became of each transfer. Started by `clients.Client`.

    python -m scripts.proof.disks.client URL --name NAME [...]

On standard output, a JSON list a line, in the order in which things happened:

    ["begun", id]  ["committed", id]  ["unknown", id]
    ["failed", id, error, message, remedy]      nothing of it took effect
    ["read", ms] ["unreadable", error]          the quiet account, which nothing keeps in doubt
    ["sum", n]                                  of all accounts, as one transaction saw them
    ["mark", text, ms]                          a line of standard input, sent back: what follows came after it.
                                                With it, this process's clock
    ["ended"]                                   after SIGTERM or the end of standard input, when nothing is under way

A process of its own, since it is killed, traced and given a wrong clock.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import random
import select
import signal
import sys
import time

from infra.consensus_commit.errors import TransactionConflictError, TransactionError, UnknownTransactionStatusError
from infra.consensus_commit.manager import TransactionManager
from infra.storage.connect import connect
from infra.storage.errors import StorageError, UnknownOutcomeError
from infra.storage.operations import Key, Value
from scripts.proof.disks.accounts import QUIET, Bank, total_of

_PAUSE_S = 0.05


def say(*words: object) -> None:
    print(json.dumps(words), flush=True)


class _Client:
    def __init__(self, manager: TransactionManager, bank: Bank, numbers: range, note: str, seed: int) -> None:
        self._manager = manager
        self._bank = bank
        self._accounts, self._receipts = bank.tables
        self._numbers = numbers
        self._note = note
        self._random = random.Random(seed)
        self.ending = asyncio.Event()

    async def transfer_for_ever(self) -> None:
        while not self.ending.is_set():
            giver, taker = self._random.sample(self._numbers, 2)
            transaction = self._manager.begin()
            tx_id = transaction.tx_id
            say("begun", tx_id)
            try:
                for number, change in ((giver, -1), (taker, 1)):
                    row = await transaction.get(self._accounts, Key((number,)))
                    assert row is not None, f"account {number} is gone"
                    await transaction.update(
                        self._accounts,
                        Key((number,)),
                        {"balance": row["balance"] + change},  # type: ignore[operator]
                    )
                receipt: dict[str, Value] = {"giver": giver, "taker": taker, "note": self._note}
                await transaction.insert(self._receipts, Key((tx_id,)), receipt)
                await transaction.commit()
            except (UnknownTransactionStatusError, UnknownOutcomeError):
                say("unknown", tx_id)
                await asyncio.sleep(self._random.uniform(0, 0.1))
            except (TransactionError, StorageError) as error:
                say("failed", tx_id, type(error).__name__, str(error), getattr(error, "remedy", ""))
                patience_s = 0.05 if isinstance(error, TransactionConflictError) else 0.1
                await asyncio.sleep(self._random.uniform(0, patience_s))
            else:
                say("committed", tx_id)
                # Processes that never pause starve each other at SQLite's lock, which knows no queue.
                await asyncio.sleep(self._random.uniform(0, _PAUSE_S))

    async def read_for_ever(self) -> None:
        while not self.ending.is_set():
            started_s = time.perf_counter()
            try:
                async with self._manager.begin(read_only=True) as reading:
                    row = await reading.get(self._accounts, Key((QUIET,)))
                    await reading.commit()
                assert row is not None, "the quiet account is gone"
                say("read", round((time.perf_counter() - started_s) * 1000))
            except (TransactionError, StorageError) as error:
                say("unreadable", type(error).__name__)
            with contextlib.suppress(TransactionError, StorageError):
                say("sum", await total_of(self._manager, self._bank, self._numbers))
            await asyncio.sleep(0.1)


async def _echo(client: _Client) -> None:
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        say("mark", line.decode().strip(), time.time_ns() // 1_000_000)
    client.ending.set()


async def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.proof.disks.client", description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--name", required=True)
    parser.add_argument("--bank", default="main")
    parser.add_argument("--one-namespace", action="store_true")
    parser.add_argument("--accounts", type=int, default=8)
    parser.add_argument("--lanes", type=int, default=3)
    parser.add_argument("--lifetime-ms", type=int, default=2_000)
    parser.add_argument("--note-bytes", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()

    if "FAKETIME_TIMESTAMP_FILE" in os.environ:
        # libfaketime 0.9.10 shifts the end of an absolute sleep on the monotonic clock, too, though that clock is
        # right; the kernel refuses it (EINVAL). Python sleeps like that from 3.11 on.
        time.sleep = lambda seconds: select.select([], [], [], float(seconds)) and None
    logging.getLogger().setLevel(logging.CRITICAL)  # that a disk fails is what this is about
    storage = connect(arguments.url)
    manager = TransactionManager(storage, name=arguments.name, transaction_lifetime_ms=arguments.lifetime_ms)
    bank = Bank(arguments.bank, arguments.one_namespace)
    client = _Client(manager, bank, range(arguments.accounts), "x" * arguments.note_bytes, arguments.seed)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, client.ending.set)
    echoing = asyncio.create_task(_echo(client))
    sweeping = asyncio.create_task(manager.sweeper.run())
    lanes = [client.transfer_for_ever() for _ in range(arguments.lanes)]
    await asyncio.gather(*lanes, client.read_for_ever())
    for task in (echoing, sweeping):
        task.cancel()
    await asyncio.wait([echoing, sweeping])
    await manager.close()
    with contextlib.suppress(StorageError):
        await storage.close()
    say("ended")


if __name__ == "__main__":
    asyncio.run(main())
