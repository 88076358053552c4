"""The replay itself: files in, commands out, answers counted. What a row means is `retail`'s affair.

For each file, in order: first the products and wallets that the tables lack, answers awaited; then the invoices'
commands in file order, at most `in_flight` without an answer. Commands reach Kafka in the order of the file, so those
of one key keep it. An invoice's date travels as its commands' `ce_time`.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from schemas.outcome import Answer
from scripts.cli import retail
from scripts.cli.client import CommandClient, Submitted
from scripts.cli.retail import Planned, Skipped
from scripts.cli.send_command import InvalidCommandError, Outgoing, outgoing

UNANSWERED = "unanswered"


@dataclass(frozen=True)
class Options:
    """`limit` is how many invoices in all, 0 all of them; `rate` commands a second, 0 as fast as they are answered.

    `initial_balance` is in pence. `patience_s`: how long no answer at all may come before the rest is given up.
    """

    limit: int = 0
    rate: float = 0
    in_flight: int = 64
    initial_stock: int = 1_000_000
    initial_balance: int = 1_000_000_000
    patience_s: float = 300


@dataclass(frozen=True)
class Existing:
    """What the tables hold already: products as (category, product id), and customers with a wallet."""

    products: set[tuple[str, str]]
    customers: set[str]


@dataclass
class Tally:
    """What came of the commands so far."""

    answers: dict[str, Counter[str]] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    lines: int = 0
    committed_lines: int = 0
    latencies_s: list[float] = field(default_factory=list)

    def add(self, planned: Planned, answer: Answer | None, latency_s: float) -> None:
        status = UNANSWERED if answer is None else answer.status
        self.answers.setdefault(planned.type, Counter())[status] += 1
        self.lines += planned.lines
        if answer is None:
            return
        self.latencies_s.append(latency_s)
        if answer.reason:
            self.reasons[answer.reason] += 1
        if answer.status == "committed":
            self.committed_lines += planned.lines

    def count(self, status: str) -> int:
        return sum(counts[status] for counts in self.answers.values())


OnProgress = Callable[[int, int], None]
"""Told how many commands have been answered, and how many there are."""


class Replay:
    """One replay. `existing` reads the tables; it is asked before each file."""

    def __init__(
        self,
        client: CommandClient,
        existing: Callable[[], Any],
        options: Options,
        on_progress: OnProgress = lambda done, total: None,
    ) -> None:
        self._client = client
        self._existing = existing
        self._options = options
        self._on_progress = on_progress
        self._done = self._total = 0
        self._last_answer_s = 0.0
        self.prepared = Tally()
        self.played = Tally()
        self.skipped: list[Skipped] = []
        self.not_prepared: list[str] = []
        self.invoices = 0
        self.seconds = 0.0

    async def run(self, files: Sequence[Path]) -> None:
        """Replay the files. Raises OSError and UnreadableFileError before anything of that file is sent."""
        left = self._options.limit or math.inf
        for file in files:
            if left <= 0:
                break
            invoices = await asyncio.to_thread(retail.read_file, file)
            invoices = invoices[: int(left)] if left < len(invoices) else invoices
            left -= len(invoices)
            self.invoices += len(invoices)
            await self._prepare(invoices)
            await self._play(invoices)

    async def _prepare(self, invoices: list[retail.Invoice]) -> None:
        existing: Existing = await self._existing()
        catalogue = retail.catalogue_of(invoices)
        options = self._options
        planned = [
            *retail.register_products(catalogue, existing=existing.products, initial_stock=options.initial_stock),
            *retail.open_wallets(catalogue, existing=existing.customers, initial_balance=options.initial_balance),
        ]
        now_ms = time.time_ns() // 1_000_000
        await self._send(self._checked(planned, lambda _: now_ms), self.prepared)

    async def _play(self, invoices: list[retail.Invoice]) -> None:
        dates = {invoice.number: _time_ms(invoice.invoiced_at) for invoice in invoices if not invoice.unreadable}
        planned = []
        for invoice in invoices:
            commands = retail.commands_of(invoice)
            if isinstance(commands, Skipped):
                self.skipped.append(commands)
            else:
                planned += commands
        checked = self._checked(planned, lambda command: dates[command.invoice])
        started_s = time.monotonic()
        await self._send(checked, self.played)
        self.seconds += time.monotonic() - started_s

    def _checked(self, planned: Iterable[Planned], time_of: Callable[[Planned], int]) -> list[tuple[Planned, Outgoing]]:
        """The commands with their messages. One that its model refuses takes its whole invoice with it."""
        made: list[tuple[Planned, Outgoing]] = []
        refused: dict[str, str] = {}
        for command in planned:
            body = json.dumps(command.body, ensure_ascii=False).encode()
            try:
                made.append((command, outgoing(command.type, body, key=None, id=command.id, time_ms=time_of(command))))
            except InvalidCommandError as error:
                if command.invoice:
                    refused.setdefault(command.invoice, str(error))
                else:
                    self.not_prepared.append(f"{command.type}: {error}")
        self.skipped += [Skipped(invoice, reason) for invoice, reason in refused.items()]
        return [(command, message) for command, message in made if command.invoice not in refused]

    async def _send(self, commands: list[tuple[Planned, Outgoing]], tally: Tally) -> None:
        self._total += len(commands)
        self._on_progress(self._done, self._total)
        window = asyncio.Semaphore(self._options.in_flight)
        self._last_answer_s = time.monotonic()
        async with asyncio.TaskGroup() as group:
            async for command, message in self._paced(commands):
                await window.acquire()
                submitted = self._client.submit(message.message, id=message.id, digest=message.digest)
                group.create_task(self._await_answer(command, submitted, window, tally))

    async def _paced(self, commands: list[tuple[Planned, Outgoing]]) -> AsyncIterator[tuple[Planned, Outgoing]]:
        started_s = time.monotonic()
        for number, command in enumerate(commands):
            if self._options.rate:
                early_s = started_s + number / self._options.rate - time.monotonic()
                if early_s > 0:
                    await asyncio.sleep(early_s)
            yield command

    async def _await_answer(
        self, command: Planned, submitted: Submitted, window: asyncio.Semaphore, tally: Tally
    ) -> None:
        answer: Answer | None = None
        while True:
            left_s = self._last_answer_s + self._options.patience_s - time.monotonic()
            done, _ = await asyncio.wait([submitted.answer], timeout=max(0.01, left_s))
            if done:
                answer = submitted.answer.result()
                self._last_answer_s = time.monotonic()
                break
            if time.monotonic() - self._last_answer_s >= self._options.patience_s:
                break
        window.release()
        tally.add(command, answer, submitted.latency_s)
        self._done += 1
        self._on_progress(self._done, self._total)

    def summary(self) -> dict[str, Any]:
        """What is printed at the end. Rates are over the time of the invoices' commands, not of the preparation."""
        played = self.played
        by_type = {type: dict(sorted(counts.items())) for type, counts in sorted(played.answers.items())}
        orders = sum(played.answers.get("PlaceOrder", Counter()).values())
        return {
            "invoices": self.invoices,
            "orders": orders,
            "returns": sum(played.answers.get("ReturnGoods", Counter()).values()),
            "write_offs": sum(played.answers.get("WriteOffStock", Counter()).values()),
            "lines": played.lines,
            "committed": played.count("committed"),
            "refused": played.count("refused"),
            "dead_lettered": played.count("dead-lettered"),
            "unanswered": played.count(UNANSWERED),
            "by_type": by_type,
            "reasons": dict(played.reasons.most_common()),
            "skipped": len(self.skipped),
            "skipped_invoices": [{"invoice": each.invoice, "reason": each.reason} for each in self.skipped],
            "products_registered": self.prepared.answers.get("RegisterProduct", Counter())["committed"],
            "wallets_opened": self.prepared.answers.get("OpenWallet", Counter())["committed"],
            "not_prepared": self.not_prepared
            + [
                f"{type}: {count} {status}"
                for type, counts in self.prepared.answers.items()
                for status, count in counts.items()
                if status != "committed"
            ],
            "seconds": round(self.seconds, 3),
            "orders_per_s": _per_second(orders, self.seconds),
            "lines_per_s": _per_second(played.lines, self.seconds),
            "latency_ms": {f"p{percent}": percentile_ms(played.latencies_s, percent) for percent in (50, 95, 99)},
        }


def percentile_ms(latencies_s: Sequence[float], percent: float) -> float | None:
    """The least latency that is not exceeded by `percent` of them (nearest rank), in ms; None of none."""
    if not latencies_s:
        return None
    rank = max(1, math.ceil(percent / 100 * len(latencies_s)))
    return round(sorted(latencies_s)[rank - 1] * 1000, 1)


def _per_second(count: int, seconds: float) -> float:
    return round(count / seconds, 1) if seconds else 0.0


def _time_ms(date: str) -> int:
    return int(datetime.fromisoformat(date).replace(tzinfo=UTC).timestamp() * 1000)
