"""The peer of the order benchmark: what a user would write by hand with the same parts, in one process.

An aiokafka consumer reads orders, one SQLite transaction (`synchronous=FULL`, one file) writes stock, wallet, shipment,
order and a row that remembers the command, the answer is published, the offset acknowledged. No actors, no two-phase
commit, no isolation between processes, no refusal logic beyond one check. `batch` orders share one SQLite transaction.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from pathlib import Path

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

_TABLES = """
CREATE TABLE stock (product TEXT PRIMARY KEY, quantity INTEGER, reserved INTEGER) WITHOUT ROWID;
CREATE TABLE wallet (customer TEXT PRIMARY KEY, balance INTEGER) WITHOUT ROWID;
CREATE TABLE shipment (id TEXT PRIMARY KEY, body TEXT) WITHOUT ROWID;
CREATE TABLE orders (customer TEXT, id TEXT, body TEXT, PRIMARY KEY (customer, id)) WITHOUT ROWID;
CREATE TABLE seen (id TEXT PRIMARY KEY, answer TEXT) WITHOUT ROWID;
"""


class ByHand:
    """Serves orders from one topic to another until cancelled; `batch` is the most that share a transaction."""

    def __init__(self, bootstrap: str, file: Path, *, orders: str, answers: str, batch: int) -> None:
        self._bootstrap = bootstrap
        self._orders, self._answers, self._batch = orders, answers, batch
        self._db = sqlite3.connect(file, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.executescript(_TABLES)

    def open(self, products: list[str], customers: list[str]) -> None:
        self._db.execute("BEGIN")
        self._db.executemany("INSERT INTO stock VALUES (?, 1000000000, 0)", [(product,) for product in products])
        self._db.executemany("INSERT INTO wallet VALUES (?, 1000000000000)", [(customer,) for customer in customers])
        self._db.execute("COMMIT")

    async def serve(self) -> None:
        consumer = AIOKafkaConsumer(
            self._orders,
            bootstrap_servers=self._bootstrap,
            group_id=f"by-hand-{self._orders}",
            enable_auto_commit=False,
            auto_offset_reset="earliest",
        )
        producer = AIOKafkaProducer(bootstrap_servers=self._bootstrap, acks="all", enable_idempotence=True, linger_ms=3)
        await consumer.start()
        await producer.start()
        try:
            while True:
                fetched = await consumer.getmany(timeout_ms=100, max_records=self._batch)
                records = [record for records in fetched.values() for record in records]
                if not records:
                    continue
                self._db.execute("BEGIN IMMEDIATE")
                answers = [self._place(json.loads(record.value)) for record in records]
                self._db.execute("COMMIT")
                sent = [await producer.send(self._answers, json.dumps(answer).encode()) for answer in answers]
                await asyncio.gather(*sent)
                await consumer.commit()
        finally:
            await consumer.stop()
            await producer.stop()

    def _place(self, order: dict[str, object]) -> dict[str, object]:
        known = self._db.execute("SELECT answer FROM seen WHERE id = ?", (order["id"],)).fetchone()
        if known is not None:
            answer: dict[str, object] = json.loads(known[0])
            return answer
        product, customer = order["product"], order["customer"]
        (available,) = self._db.execute(
            "SELECT quantity - reserved FROM stock WHERE product = ?", (product,)
        ).fetchone()
        (balance,) = self._db.execute("SELECT balance FROM wallet WHERE customer = ?", (customer,)).fetchone()
        placed = available >= 1 and balance >= 100
        answer = {"id": order["id"], "status": "committed" if placed else "refused"}
        if placed:
            body = json.dumps(order)
            self._db.execute("UPDATE stock SET reserved = reserved + 1 WHERE product = ?", (product,))
            self._db.execute("UPDATE wallet SET balance = balance - 100 WHERE customer = ?", (customer,))
            self._db.execute("INSERT INTO shipment VALUES (?, ?)", (order["id"], body))
            self._db.execute("INSERT INTO orders VALUES (?, ?, ?)", (customer, order["id"], body))
        self._db.execute("INSERT INTO seen VALUES (?, ?)", (order["id"], json.dumps(answer)))
        return answer
