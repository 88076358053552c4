"""Single-line orders over four domains, end to end: from publishing the command to reading its answer.

    python -m scripts.bench.orders --data DIR [--orders N] [--in-flight 1,16,64,256] [--customers N] [--products N]

Method. A system runs on DIR (`concord up --data DIR`). This process registers products and wallets of its own, then
for each level keeps that many PlaceOrder commands in flight, each for a random customer and a random product, until N
are answered. Latency is from handing the command to the producer until its answer is read from the results topic. CPU
seconds by process come from /proc, before and after. In the same run, on the same broker and disk, the peer of
`by_hand.py` serves orders of the same shape, one a transaction and 64 a transaction, with the same client loop; the
ratio to it is what to quote, since machines differ. Prints one JSON object a level. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from infra.messaging.topics import TopicSpec, ensure_topics
from schemas.common import Address
from schemas.envelope import build_command_message
from schemas.inventory import RegisterProduct
from schemas.message import Command
from schemas.orders import OrderLine, PlaceOrder
from schemas.payment import OpenWallet
from scripts.bench.by_hand import ByHand
from scripts.bench.processes import spent, usage
from scripts.cli.client import CommandClient
from scripts.cli.replay import percentile_ms

Ask = Callable[[int], Awaitable[str]]
"""Place one order; its status."""


async def level(name: str, ask: Ask, *, orders: int, in_flight: int) -> dict[str, Any]:
    """Keep `in_flight` orders going until `orders` are answered."""
    numbers = iter(range(orders))
    latencies: list[float] = []
    statuses: dict[str, int] = {}

    async def one_after_another() -> None:
        for number in numbers:
            started_s = time.perf_counter()
            status = await ask(number)
            latencies.append(time.perf_counter() - started_s)
            statuses[status] = statuses.get(status, 0) + 1

    started_s = time.perf_counter()
    await asyncio.gather(*(one_after_another() for _ in range(in_flight)))
    seconds = time.perf_counter() - started_s
    return {
        "who": name,
        "in_flight": in_flight,
        "orders": orders,
        "statuses": statuses,
        "seconds": round(seconds, 2),
        "orders_per_s": round(orders / seconds, 1),
        "latency_ms": {f"p{percent}": percentile_ms(latencies, percent) for percent in (50, 95, 99)},
    }


async def run(options: argparse.Namespace) -> None:
    runtime = json.loads((options.data / "runtime.json").read_text())
    mark = uuid.uuid4().hex[:8]
    products = [f"{mark}-{number}" for number in range(options.products)]
    customers = [f"{mark}-{number}" for number in range(options.customers)]
    chance = random.Random(1)
    results: list[dict[str, Any]] = []
    async with CommandClient(lambda: runtime["bootstrap_servers"], ("inventory", "payment", "orders")) as client:

        async def ask(command: Command, id: str) -> str:
            message = build_command_message(command, command_id=id, time_ms=time.time_ns() // 1_000_000)
            return (await client.submit(message, id=id, digest=None).answer).status

        opening = [
            *map(product_of, products),
            *map(wallet_of, customers),
        ]
        await asyncio.gather(*(ask(command, f"{mark}-open-{n}") for n, command in enumerate(opening)))
        for in_flight in options.in_flight:
            await _settled()
            orders = options.orders if in_flight > 1 else max(options.orders // 10, 50)

            async def place(number: int, in_flight: int = in_flight) -> str:
                order = order_of(chance.choice(customers), chance.choice(products), f"{mark}-{in_flight}-{number}")
                return await ask(order, f"{mark}-{in_flight}-{number}")

            before = usage(runtime)
            result = await level("concord", place, orders=orders, in_flight=in_flight)
            result["cpu_s"] = {name: round(cpu, 2) for name, cpu in spent(before, usage(runtime)).items() if cpu > 0.05}
            results.append(result)
            print(json.dumps(result), flush=True)
    for batch in (1, 64):
        for in_flight in options.in_flight:
            peer = await _by_hand(runtime["bootstrap_servers"], options, mark, batch=batch, in_flight=in_flight)
            ours = next(result for result in results if result["in_flight"] == in_flight)
            peer["concord_to_this"] = round(ours["orders_per_s"] / peer["orders_per_s"], 3)
            print(json.dumps(peer), flush=True)


async def _by_hand(
    bootstrap: str, options: argparse.Namespace, mark: str, *, batch: int, in_flight: int
) -> dict[str, Any]:
    orders_topic, answers_topic = (f"bench-{mark}-{batch}-{in_flight}-{what}" for what in ("orders", "answers"))
    await ensure_topics(bootstrap, [TopicSpec(topic, 4, 1, {}) for topic in (orders_topic, answers_topic)])
    products = [f"p{number}" for number in range(options.products)]
    customers = [f"c{number}" for number in range(options.customers)]
    chance = random.Random(1)
    waiting: dict[str, asyncio.Future[str]] = {}
    with tempfile.TemporaryDirectory(dir=options.data) as folder:
        peer = ByHand(bootstrap, Path(folder) / "shop.db", orders=orders_topic, answers=answers_topic, batch=batch)
        peer.open(products, customers)
        serving = asyncio.create_task(peer.serve())
        producer = AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all", enable_idempotence=True, linger_ms=3)
        consumer = AIOKafkaConsumer(answers_topic, bootstrap_servers=bootstrap, auto_offset_reset="earliest")
        await producer.start()
        await consumer.start()

        async def read() -> None:
            async for record in consumer:
                answer = json.loads(record.value)
                waiting.pop(answer["id"]).set_result(answer["status"])

        reading = asyncio.create_task(read())

        async def place(number: int) -> str:
            id = f"{number}"
            order = {"id": id, "customer": chance.choice(customers), "product": chance.choice(products)}
            waiting[id] = asyncio.get_running_loop().create_future()
            answered = waiting[id]
            await producer.send(orders_topic, json.dumps(order).encode(), key=order["customer"].encode())
            return await answered

        try:
            await place(-1)  # until both consumers are in place
            orders = options.orders if in_flight > 1 else max(options.orders // 10, 50)
            return await level(f"by hand, {batch} a transaction", place, orders=orders, in_flight=in_flight)
        finally:
            for task in (serving, reading):
                task.cancel()
            await asyncio.gather(serving, reading, return_exceptions=True)
            await producer.stop()
            await consumer.stop()


def product_of(product: str) -> RegisterProduct:
    return RegisterProduct(
        category=product[-3:], product_id=product, name=product, quantity=10**8, unit_price=100, currency="GBP"
    )


def wallet_of(customer: str) -> OpenWallet:
    return OpenWallet(customer_id=customer, currency="GBP", initial_balance=10**12)


def order_of(customer: str, product: str, order_id: str) -> PlaceOrder:
    return PlaceOrder(
        customer_id=customer,
        order_id=order_id,
        lines=(OrderLine(category=product[-3:], product_id=product, quantity=1, unit_price=100),),
        currency="GBP",
        shipping_address=Address(region="Kent"),
    )


async def _settled() -> None:
    """Let what is committed after its answer come to rest, so that it is not counted for the next level."""
    await asyncio.sleep(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="directory of a running system")
    parser.add_argument("--orders", type=int, default=2000, help="orders a level (a tenth with one in flight)")
    parser.add_argument("--customers", type=int, default=500)
    parser.add_argument("--products", type=int, default=500)
    parser.add_argument(
        "--in-flight", type=lambda text: [int(part) for part in text.split(",")], default=[1, 16, 64, 256]
    )
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
