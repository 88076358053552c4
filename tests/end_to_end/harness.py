"""How the tests talk to a whole system: messages made by hand, answers from an independent consumer, everything else
through the command line, the files and the processes that an operator has too."""

from __future__ import annotations

import asyncio
import json
import random
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.failpoints import arm, fired
from infra.messaging.producer import EventProducer
from scripts.cli.check import check_system
from scripts.cli.system import System as KnownSystem
from scripts.proof.judge import judge
from scripts.proof.running import RunningSystem
from scripts.proof.tables import in_doubt
from scripts.proof.witness import Witness

ANSWERED_WITHIN_S = 60.0
SETTLED_WITHIN_S = 20.0
"""Promise 5: so long after a fault heals, no record is in doubt."""

DOMAIN_OF = {
    **dict.fromkeys(
        (
            "RegisterProduct",
            "RestockProduct",
            "WriteOffStock",
            "ReserveStock",
            "ConfirmReservation",
            "CancelReservation",
            "CheckAvailability",
        ),
        "inventory",
    ),
    **dict.fromkeys(("OpenWallet", "TopUpWallet", "TakePayment", "RefundPayment"), "payment"),
    **dict.fromkeys(("PlaceOrder", "CancelOrder", "ReturnGoods", "ShipOrder", "CompleteOrder"), "orders"),
}
KEY_FIELD = {"inventory": "category", "payment": "customer_id", "orders": "customer_id"}
VERSION = {"RegisterProduct": 2}


@dataclass(frozen=True)
class Sent:
    """A command as a client in any language would publish it. Every part can be something else than it should."""

    type: str
    body: Mapping[str, Any]
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    traceparent: str | None = None

    @property
    def domain(self) -> str:
        return DOMAIN_OF[self.type]

    @property
    def topic(self) -> str:
        return f"{self.domain}.commands"

    @property
    def key(self) -> bytes:
        return str(self.body[KEY_FIELD[self.domain]]).encode()

    @property
    def value(self) -> bytes:
        return json.dumps(self.body, ensure_ascii=False).encode()

    @property
    def headers(self) -> dict[str, bytes]:
        made = {
            "ce_specversion": "1.0",
            "ce_id": self.id,
            "ce_type": self.type,
            "ce_source": "tests",
            "ce_dataschema": f"concord:/schemas/{self.domain}/{self.type}/{VERSION.get(self.type, 1)}",
            "content-type": "application/json",
        }
        if self.traceparent is not None:
            made["traceparent"] = self.traceparent
        return {name: value.encode() for name, value in made.items()}


def product(category: str, product_id: str, *, quantity: int = 1_000, price: int = 250, low: int = 0) -> Sent:
    body = {
        "category": category,
        "product_id": product_id,
        "name": f"product {product_id}",
        "quantity": quantity,
        "unit_price": price,
        "currency": "GBP",
        "low_stock_threshold": low,
    }
    return Sent("RegisterProduct", body)


def wallet(customer: str, *, balance: int = 1_000_000) -> Sent:
    return Sent("OpenWallet", {"customer_id": customer, "currency": "GBP", "initial_balance": balance})


def order(customer: str, order_id: str, *lines: tuple[str, str, int, int], region: str = "United Kingdom") -> Sent:
    """PlaceOrder of `lines`: category, product, quantity, unit price."""
    named = [
        {"category": category, "product_id": product_id, "quantity": quantity, "unit_price": price}
        for category, product_id, quantity, price in lines
    ]
    body = {
        "customer_id": customer,
        "order_id": order_id,
        "lines": named,
        "currency": "GBP",
        "shipping_address": {"region": region},
    }
    return Sent("PlaceOrder", body)


class System:
    """One running system with its witness."""

    def __init__(self, running: RunningSystem, failpoints: Path, witness: Witness, producer: EventProducer) -> None:
        self.running = running
        self.failpoints = failpoints
        self.witness = witness
        self._producer = producer
        self.known = KnownSystem.find(running.directory)

    @property
    def directory(self) -> Path:
        return self.running.directory

    # --- commands in, answers out -----------------------------------------------------------------------------------

    async def publish(
        self, topic: str, key: bytes | None, value: bytes | None, headers: Mapping[str, bytes] | Sequence[Any]
    ) -> str:
        """Put a message on a topic as it is; the id that it has when it carries no readable one."""
        listed = list(headers.items()) if isinstance(headers, Mapping) else list(headers)
        stored = await self._producer.send_and_wait(topic, key, value, listed)
        return f"unreadable:{stored.topic}:{stored.partition}:{stored.offset}"

    async def publish_all(self, *commands: Sent) -> None:
        """In order, and confirmed by the broker when this returns."""
        handed = [await self._producer.send(c.topic, c.key, c.value, list(c.headers.items())) for c in commands]
        await asyncio.gather(*handed)

    async def answers(self, *ids: str, within_s: float = ANSWERED_WITHIN_S) -> list[dict[str, Any]]:
        found = await self.witness.answers_to(list(ids), timeout_s=within_s)
        return [found[id] for id in ids]

    async def send(self, *commands: Sent, within_s: float = ANSWERED_WITHIN_S) -> list[dict[str, Any]]:
        """Publish and wait: the answers, in the order of the commands."""
        await self.publish_all(*commands)
        return await self.answers(*(command.id for command in commands), within_s=within_s)

    async def committed(self, *commands: Sent) -> list[dict[str, Any]]:
        """`send` what must be committed: the set-up of a test."""
        answers = await self.send(*commands)
        others = [
            (answer["type"], answer["id"], answer["reason"]) for answer in answers if answer["status"] != "committed"
        ]
        assert not others, others
        return answers

    # --- the operator's side ----------------------------------------------------------------------------------------

    async def concord(self, *arguments: str, stdin: bytes = b"", timeout_s: float = 120) -> Any:
        return await asyncio.to_thread(self.running.concord, *arguments, stdin=stdin, timeout_s=timeout_s)

    async def pid_of(self, role: str) -> int:
        return await asyncio.to_thread(self.running.pid_of, role)

    async def ready(self) -> None:
        await asyncio.to_thread(self.running.wait_until_ready)

    def arm(self, *lines: str) -> int:
        """Arm failpoints; how many have fired before."""
        before = len(fired(self.failpoints))
        arm(self.failpoints, list(lines))
        return before

    def fired_since(self, before: int) -> list[str]:
        return fired(self.failpoints)[before:]

    # --- the standing check -----------------------------------------------------------------------------------------

    async def check(self) -> None:
        """The standing check of a system at rest: nothing in doubt, `concord check`, and an independent consumer."""
        await self.ready()  # What was killed is there again: until then nothing need be settled.
        await self._settled()
        report = await check_system(self.known, wait_s=30)
        assert report["ok"], report["offenders"]
        await self.witness.catch_up()
        judgement = judge(self.witness.history)
        assert judgement.holds, judgement.offenders

    async def _settled(self) -> None:
        await eventually(lambda: not in_doubt(self.directory), "no record to be in doubt")


async def eventually(holds: Callable[[], bool], what: str, *, within_s: float = SETTLED_WITHIN_S) -> None:
    """Wait until something holds that only time can bring, at most `within_s`."""
    deadline_s = asyncio.get_running_loop().time() + within_s
    while not holds():
        assert asyncio.get_running_loop().time() < deadline_s, f"waited {within_s:.0f} s for {what}"
        await asyncio.sleep(0.1)


@asynccontextmanager
async def running_system(
    parent: Path, *, profile: str = "local", environment: Mapping[str, str] | None = None
) -> AsyncIterator[System]:
    """A system in a new directory below `parent`, with failpoints that can be armed and settings of `environment`."""
    failpoints = parent / "failpoints"
    running = RunningSystem(
        parent / "data",
        profile=profile,
        environment={
            "CONCORD_FAILPOINTS": str(failpoints),
            "CONCORD_RECOVERY__SWEEP_INTERVAL_MS": "1000",
            **(environment or {}),
        },
    )
    await asyncio.to_thread(running.start)
    try:
        witness = Witness(running.bootstrap_servers)
        producer = EventProducer(running.bootstrap_servers, client_id="tests")
        await witness.start()
        await producer.start()
        try:
            yield System(running, failpoints, witness, producer)
        finally:
            await producer.stop()
            await witness.stop()
    except BaseException:
        await asyncio.to_thread(running.kill)
        raise
    assert await asyncio.to_thread(running.stop) == 0, running.last_words()
    await asyncio.to_thread(running.wait_until_gone)
    assert len(running.stdout_path.read_text().splitlines()) == 1, running.stdout_path.read_text()


def seeded(name: str) -> random.Random:
    """Chance that is the same in every run of the test called `name`."""
    return random.Random(f"concord {name}")
