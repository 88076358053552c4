"""Every order of a backup is in all of its tables or in none, however busy the actors are when it is made."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from actors.audit import AUDITED, check_books
from actors.local_runtime import LocalRuntime
from actors.runtime import Placement
from actors.system import SystemConfig
from infra.config import load_settings
from infra.storage.memory import MemoryStorage
from infra.storage.operations import Atomicity
from infra.storage.port import Storage
from infra.storage.sqlite import SqliteStorage
from schemas.common import Address
from schemas.envelope import RawMessage, build_command_message
from schemas.inventory import RegisterProduct
from schemas.message import Command
from schemas.orders import OrderLine, PlaceOrder
from schemas.outcome import Answer
from schemas.payment import OpenWallet
from scripts.backup import create, log, tables
from scripts.backup.create import Options
from scripts.backup.form import StoredPartition
from scripts.backup.pausing import paused
from scripts.backup.place import AtRest
from scripts.backup.restore import settle
from scripts.reading import CommittedReader

PLACEMENT = Placement(buckets=8, shards={"orders": 2, "inventory": 1, "payment": 1, "shipping": 1})
ACTORS = [name for name in PLACEMENT.actors() if not name.startswith("coordinator")]


@pytest.fixture(params=["memory", "sqlite"])
async def storage(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Storage]:
    made: Storage = (
        MemoryStorage(atomicity=Atomicity.PARTITION)
        if request.param == "memory"
        else SqliteStorage(tmp_path / "tables")
    )
    yield made
    await made.close()


class Shop:
    def __init__(self, runtime: LocalRuntime) -> None:
        self.runtime = runtime
        self.begun = 0
        self.answers: list[Answer] = []
        self._news = asyncio.Event()

    async def send(self, command: Command, id: str) -> Answer:
        message = build_command_message(command, command_id=id, time_ms=1)
        raw = RawMessage(message.topic, 0, 0, 1, message.key, tuple(message.headers), message.value)
        home = PLACEMENT.actor_of(command.domain, command.routing_key)
        [answer] = await self.runtime.ask(home, "execute", [raw])
        self.answers.append(answer)
        self._news.set()
        return answer

    @property
    def placed(self) -> int:
        """How many orders have been answered as committed."""
        return sum((answer.type, answer.status) == ("PlaceOrder", "committed") for answer in self.answers)

    async def until(self, count: int) -> None:
        """Until so many commands have been answered."""
        while len(self.answers) < count:
            self._news.clear()
            await self._news.wait()

    async def open(self) -> None:
        for category in ("tea", "cup"):
            product = RegisterProduct(
                category=category, product_id=category, name=category, quantity=10_000, unit_price=100, currency="GBP"
            )
            await self.send(product, f"product-{category}")
        for customer in ("ann", "bob", "cid"):
            await self.send(
                OpenWallet(customer_id=customer, currency="GBP", initial_balance=10**7), f"wallet-{customer}"
            )

    async def sell(self, customer: str) -> None:
        """One order after another, until cancelled."""
        while True:
            self.begun += 1
            number = self.begun
            lines = tuple(
                OrderLine(category=category, product_id=category, quantity=1, unit_price=100)
                for category in ("tea", "cup")
            )
            order = PlaceOrder(
                customer_id=customer,
                order_id=f"o{number}",
                lines=lines,
                currency="GBP",
                shipping_address=Address(region="Kent"),
            )
            await self.send(order, f"order-{number}")


async def test_a_backup_of_busy_actors_holds_whole_orders_alone_and_they_go_on_afterwards(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_topics(kafka: object, names: object) -> list[StoredPartition]:
        return []

    monkeypatch.setattr(log, "positions", no_topics)
    settings = load_settings(data_dir=tmp_path, environment={})
    async with LocalRuntime(SystemConfig(placement=PLACEMENT), storage) as runtime:
        shop = Shop(runtime)
        await shop.open()
        selling = [asyncio.ensure_future(shop.sell(customer)) for customer in ("ann", "bob", "cid") for _ in range(2)]
        reached = create.Reached(AtRest(settings, storage, ""), runtime, ACTORS)
        sold, at = [0], dict[str, int]()
        for number in range(3):
            await shop.until(sold[-1] + 10)
            directory = tmp_path / f"backup-{number}"
            directory.mkdir()
            copied = await create.copy(reached, directory, Options(), lambda line: at.update({line: shop.placed}))
            sold.append(len(shop.answers))

            target = SqliteStorage(tmp_path / f"restored-{number}")
            for stored in copied.tables:
                await target.create_table(stored.schema_of)
                await tables.copy_in(target, stored, directory)
            await settle(target)
            reader = CommittedReader(target)
            rows = {table.full_name: [row async for row in reader.rows(table.schema)] for table in AUDITED}
            assert await reader.in_doubt() == []
            assert check_books(rows) == []
            answered = at["Copying the tables"]  # In the pause: what has been committed besides was just about to be.
            assert answered <= len(rows["orders.orders"]) <= answered + len(selling)
            await reader.manager.close()
            await target.close()
        for task in selling:
            task.cancel()
        await asyncio.gather(*selling, return_exceptions=True)


async def test_during_the_pause_nothing_is_sold_at_all(storage: Storage) -> None:
    async with LocalRuntime(SystemConfig(placement=PLACEMENT), storage) as runtime:
        shop = Shop(runtime)
        await shop.open()
        selling = asyncio.ensure_future(shop.sell("ann"))
        await shop.until(8)

        async with paused(runtime, ACTORS, within_s=10):
            during = len(shop.answers)
            await asyncio.sleep(0.2)
            assert len(shop.answers) == during

        await shop.until(during + 3)
        selling.cancel()
        await asyncio.gather(selling, return_exceptions=True)
