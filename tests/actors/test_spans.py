"""What the spans of one command tell, and that those of commands that travel together do not mix."""

from __future__ import annotations

import asyncio
from typing import Any

from harness import Fate, Foreigner, System, order, scripted, wallet
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from actors.domain import Transaction
from actors.payment.tables import WALLETS
from actors.system import Observer
from infra.config import TracingSettings
from infra.otlp import OtlpTracer
from infra.storage.port import Storage
from infra.tracing import SPANS
from schemas.orders import PlaceOrder
from schemas.trace_context import TraceContext


def context(number: int, *, sampled: bool = True) -> TraceContext:
    """The span of whoever handed command `number` on, in a trace of its own."""
    return TraceContext(f"00-{number:032x}-{number:016x}-{int(sampled):02x}")


class Traces:
    """Spans by the number of their trace, with the names of those above each."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        settings = TracingSettings(endpoint="http://127.0.0.1:1")
        self.tracer = OtlpTracer(settings, service="test", process="test-0", exporter=self._exporter)

    def observer(self) -> Observer:
        return Observer(tracer=self.tracer)

    def ended(self) -> tuple[ReadableSpan, ...]:
        self.tracer.close(10)
        return self._exporter.get_finished_spans()

    def of(self, number: int) -> list[ReadableSpan]:
        return [span for span in self.ended() if span.context.trace_id == number]

    def paths(self, number: int) -> set[str]:
        """`handle A > call B > handle C`, for each span of a trace, but for those of storage."""
        spans = {span.context.span_id: span for span in self.of(number)}

        def path(span: ReadableSpan) -> str:
            assert span.parent is not None
            if span.parent.span_id == number:
                return span.name
            return f"{path(spans[span.parent.span_id])} > {span.name}"

        return {path(span) for span in spans.values() if "db.operation.name" not in span.attributes}


async def send(system: System, command: Any, id: str, number: int, **options: Any) -> Any:
    raw = system.raw(command, id, trace=context(number, **options))
    return await system.deliver(system.home(command), raw)


CALLS = "handle PlaceOrder > call {} > handle {}"
COMMIT = "handle PlaceOrder > call coordinator > commit transaction"


async def test_the_spans_of_an_order_show_its_calls_and_the_phases_of_its_commit(memory: Storage) -> None:
    traces = Traces()
    async with System(memory, observer=traces.observer()) as system:
        await system.open_shop()
        answer = await send(system, order("o1"), "x1", 7)
        await system.check_at_rest()

    assert answer.status == "committed"
    assert traces.paths(7) == {
        "handle PlaceOrder",
        *(f"handle PlaceOrder > call {domain}" for domain in ("inventory", "payment", "shipping", "coordinator")),
        CALLS.format("inventory", "ReserveStock"),
        CALLS.format("payment", "TakePayment"),
        CALLS.format("shipping", "ArrangeShipment"),
        COMMIT,
        f"{COMMIT} > prepare",
        f"{COMMIT} > prepare > prepare records",
        f"{COMMIT} > commit state",
        f"{COMMIT} > commit",
        f"{COMMIT} > commit > commit records",
        *({f"{COMMIT} > validate", f"{COMMIT} > validate > validate records"} & traces.paths(7)),
    }
    spans = {span.name: span for span in traces.of(7)}
    assert spans["commit transaction"].attributes == {"concord.tx_id": answer.tx_id, "concord.participants": 5}
    assert spans["handle PlaceOrder"].attributes["concord.attempts"] == 1
    storage = [span for span in traces.of(7) if "db.operation.name" in span.attributes]
    by_id = {span.context.span_id: span.name for span in traces.of(7)}
    above = {by_id[span.parent.span_id] for span in storage if span.parent is not None}
    assert above >= {"handle PlaceOrder", "handle ReserveStock", "prepare records", "commit state", "commit records"}


async def test_commands_of_one_batch_keep_their_traces_apart_and_untraced_ones_have_none(memory: Storage) -> None:
    traces = Traces()
    async with System(memory, observer=traces.observer()) as system:
        await system.open_shop(customers=8)
        raws = [
            system.raw(
                order(f"o{n}", customer=f"c{n}"),
                f"x{n}",
                trace=None if n % 4 == 0 else context(n + 1, sampled=n % 4 != 1),
            )
            for n in range(8)
        ]
        by_home: dict[str, list[Any]] = {}
        for n, raw in enumerate(raws):
            by_home.setdefault(system.home(order(f"o{n}", customer=f"c{n}")), []).append(raw)
        answers = await asyncio.gather(*(system.runtime.ask(home, "execute", batch) for home, batch in by_home.items()))
        await system.check_at_rest()

    assert {answer.status for batch in answers for answer in batch} == {"committed"}
    spans = traces.ended()
    assert {span.context.trace_id for span in spans} == {3, 4, 7, 8}
    for number in (3, 4, 7, 8):
        assert {
            span.attributes["concord.tx_id"] for span in traces.of(number) if "concord.tx_id" in span.attributes
        } == {answer.tx_id for batch in answers for answer in batch if answer.id == f"x{number - 1}"}
        assert traces.paths(number) >= {CALLS.format("payment", "TakePayment"), f"{COMMIT} > commit state"}


async def test_each_further_try_of_a_command_is_an_event_that_says_why(memory: Storage) -> None:
    traces = Traces()
    async with System(memory, observer=traces.observer()) as system:
        await system.open_shop()
        foreigner = Foreigner(system)

        async def change() -> None:
            await foreigner.change(WALLETS, "c0", by=lambda purse: purse.with_(updated_at_ms=purse.updated_at_ms + 1))

        system.intercept("payment-0", "prepare", Fate.VISITED, times=2, visitor=change)
        answer = await send(system, order("o1"), "x1", 7)
        await system.check_at_rest()

    [handled] = [span for span in traces.of(7) if span.name == "handle PlaceOrder"]
    assert answer.status == "committed"
    assert handled.attributes["concord.attempts"] == 3
    assert [(event.name, dict(event.attributes)) for event in handled.events] == [
        ("retry", {"concord.trouble": "conflict", "concord.attempt": attempt}) for attempt in (1, 2)
    ]
    failed = [span for span in traces.of(7) if span.name == "prepare records" and "error.type" in span.attributes]
    assert [span.attributes["error.type"] for span in failed] == ["conflict", "conflict"]
    assert f"{COMMIT} > abort > roll back records" in traces.paths(7)


async def test_a_handler_that_raises_ends_in_a_failed_span_that_does_not_quote_it(memory: Storage) -> None:
    async def broken(tx: Transaction, command: Any) -> None:
        raise ZeroDivisionError("the card is 4711")

    traces = Traces()
    async with System(memory, observer=traces.observer()) as system:
        await system.open_shop()
        scripted("x1", PlaceOrder, broken)
        answer = await send(system, order("o1"), "x1", 7)

    [handled] = [span for span in traces.of(7) if span.name == "handle PlaceOrder"]
    assert (answer.status, handled.attributes["concord.outcome"]) == ("dead-lettered", "dead-lettered")
    assert handled.attributes["error.type"] == handled.attributes["concord.reason"] == "handler_error"
    assert handled.status.status_code.name == "ERROR"
    assert "4711" not in str([span.to_json() for span in traces.of(7)])


async def test_every_span_is_one_of_the_table(memory: Storage) -> None:
    traces = Traces()
    async with System(memory, observer=traces.observer()) as system:
        await system.open_shop()
        await send(system, order("o1"), "x1", 7)
        await send(system, order("o1", lines=[("art", "p0", 10**6)]), "x2", 8)
        await send(system, wallet("c0"), "x3", 9)
        await system.check_at_rest()

    rows = {row.name.partition("{}")[0].strip() or row.name.partition("{}")[2].strip(): row for row in SPANS}
    for span in traces.ended():
        first, last = span.name.partition(" ")[0], span.name.rpartition(" ")[2]
        row = next(
            row
            for name in (span.name, first, last, "")
            if (row := rows.get(name)) is not None and row.kind.name == span.kind.name
        )
        assert span.attributes.keys() <= set(row.attributes), (span.name, dict(span.attributes))
