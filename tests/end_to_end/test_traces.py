"""Traces of a running system, as a collector gets them: one trace from the client to the commit and the events."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import pytest_asyncio

from infra.tracing import SPANS
from tests.end_to_end.collector import Collector, SeenSpan, running_collector
from tests.end_to_end.harness import Sent, System, order, product, running_system, wallet

pytestmark = pytest.mark.system

SECRET_TOKEN = "canary-of-the-collector"
UNSAMPLED = "00-11112222333344445555666677778888-00f067aa0ba902b7-00"
SAMPLED = "00-aaaabbbbccccddddeeeeffff00001111-00f067aa0ba902b7-01"


@dataclass
class Traced:
    """A system whose spans go to a collector of this test's."""

    system: System
    collector: Collector

    async def trace_of(
        self, *arguments: str, names: Collection[str] = (), **options: Any
    ) -> tuple[dict[str, Any], list[SeenSpan]]:
        """`concord send` and wait: what it printed, and its trace once it is `complete`."""
        told = await self.system.concord("send", *arguments, "--wait", "30", **options)
        [line] = told.lines
        await self.complete(line["trace_id"], *names)
        return line, self.collector.of(line["trace_id"])

    async def complete(self, trace_id: str, *names: str) -> None:
        """Until nothing of a trace refers to what is not there, and the last of its work has been told.

        A process that has told nothing yet leaves no gap: the spans that a test wants to see are told by `names`.
        """

        def whole() -> bool:
            spans = self.collector.of(trace_id)
            known = {span.span_id for span in spans}
            orphans = [span for span in spans if span.parent_id and span.parent_id not in known]
            sent = {span.name for span in spans}
            last = any(name.endswith(".results") for name in sent)
            return bool(spans) and len(orphans) <= 1 and last and set(names) <= sent

        await self.collector.until(whole, f"trace {trace_id}")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def traced(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Traced]:
    parent = tmp_path_factory.mktemp("traced")
    (parent / "headers").write_text(f"authorization=Bearer {SECRET_TOKEN}\n")
    async with running_collector() as collector:
        environment = {
            "CONCORD_TRACING__ENDPOINT": collector.url,
            "CONCORD_TRACING__HEADERS_FILE": str(parent / "headers"),
            "CONCORD_TRACING__EXPORT_EVERY_MS": "100",
        }
        async with running_system(parent, environment=environment) as system:
            yield Traced(system, collector)


async def shop(system: System, name: str) -> tuple[str, str]:
    category, customer = f"{name}-goods", f"{name}-customer"
    await system.committed(product(category, "tea"), wallet(customer))
    return category, customer


def one(spans: Iterable[SeenSpan], name: str, process: str = "") -> SeenSpan:
    found = [span for span in spans if span.name == name and span.process.startswith(process)]
    assert len(found) == 1, (name, process, [(span.name, span.process) for span in spans])
    return found[0]


def line_of(command: Sent) -> list[str]:
    return [command.type, "--json", json.dumps(dict(command.body)), "--id", command.id]


async def test_an_order_is_one_trace_from_its_client_to_its_commit_and_its_events(traced: Traced) -> None:
    category, customer = await shop(traced.system, "one-trace")
    command = order(customer, "T-1", (category, "tea", 3, 250))

    told, _ = await traced.trace_of(*line_of(command))
    trace = told["trace_id"]

    assert told["status"] == "committed"

    def everything() -> bool:
        seen = traced.collector.of(trace)
        known, names = {span.span_id for span in seen}, Counter(span.name for span in seen)
        wanted = {
            "prepare",
            "commit state",
            "commit",
            "commit transaction",
            "process orders.events",
            "apply orders.events",
        }
        without_a_gap = all(span.parent_id in known for span in seen if span.parent_id)
        return wanted <= set(names) and names["commit records"] == 4 and without_a_gap

    await traced.collector.until(everything, "everything, the records of four domains included")
    spans = traced.collector.of(trace)
    by_id = {span.span_id: span for span in spans}

    def parent_of(span: SeenSpan) -> SeenSpan:
        return by_id[span.parent_id]

    roots = [span for span in spans if not span.parent_id]
    assert [(root.name, root.kind) for root in roots] == [("send orders.commands", "producer")]
    assert all(span.parent_id in by_id for span in spans if span.parent_id)

    process = one(spans, "process orders.commands")
    handle = one(spans, "handle PlaceOrder")
    assert parent_of(process) is roots[0]
    assert parent_of(handle) is process
    assert handle.process.startswith("orders-")
    assert (process.attributes["concord.outcome"], handle.attributes["concord.outcome"]) == ("committed", "committed")
    assert handle.attributes["concord.tx_id"] == told["tx_id"]
    for called, command_type in (
        ("inventory", "ReserveStock"),
        ("payment", "TakePayment"),
        ("shipping", "ArrangeShipment"),
    ):
        there = one(spans, f"handle {command_type}", called)
        assert (there.kind, there.attributes["concord.outcome"]) == ("server", "done")
        assert (parent_of(there).name, parent_of(there).kind) == (f"call {called}", "client")
        assert parent_of(parent_of(there)) is handle
        asked = [span for span in spans if span.parent_id == there.span_id]
        assert asked
        assert {span.attributes["db.system.name"] for span in asked} == {"sqlite"}

    decided = one(spans, "commit transaction")
    assert decided.process == "coordinator-0"
    assert parent_of(decided).name == "call coordinator"
    assert parent_of(parent_of(decided)) is handle
    phases = {span.name: span for span in spans if span.parent_id == decided.span_id}
    assert {"prepare", "commit state", "commit"} <= phases.keys()
    for phase in ("prepare", "commit"):
        theirs = [span for span in spans if span.parent_id == phases[phase].span_id]
        assert sorted(span.process.rpartition("-")[0] for span in theirs) == [
            "inventory", "orders", "payment", "shipping",
        ]  # fmt: skip
        assert {span.name for span in theirs} == {f"{phase} records"}

    published = sorted(span.name for span in spans if span.parent_id == process.span_id and span.kind == "producer")
    assert published == [
        "send inventory.events",
        "send orders.events",
        "send orders.results",
        "send payment.events",
        "send shipping.events",
    ]
    read = one(spans, "process orders.events")
    assert parent_of(read).name == "send orders.events"
    assert {span.process for span in spans} >= {
        "worker-0", "coordinator-0", "inventory-0", "payment-0", "shipping-0", "views-0",
    }  # fmt: skip
    assert len({span.resource["process.pid"] for span in spans}) >= 8


async def test_what_is_published_names_the_span_that_sent_it(traced: Traced) -> None:
    category, customer = await shop(traced.system, "headers")
    command = replace(order(customer, "H-1", (category, "tea", 1, 250)), traceparent=SAMPLED)

    await traced.system.committed(command)
    trace = SAMPLED[3:35]
    await traced.complete(trace)

    senders = {span.span_id: span.name for span in traced.collector.of(trace) if span.kind == "producer"}
    await traced.system.witness.catch_up()
    history = traced.system.witness.history
    published = [
        message
        for domain in ("orders", "payment", "shipping", "inventory")
        for message in (*history.events(domain), *history.results(domain))
        if message.header("ce_causationid") == command.id
    ]
    assert len(published) == 5
    for message in published:
        traceparent = message.header("traceparent") or ""
        assert traceparent[3:35] == trace
        assert senders[traceparent[36:52]] == f"send {message.topic}"


async def test_commands_that_travel_in_one_batch_have_a_trace_each_and_links_lead_to_the_batch(traced: Traced) -> None:
    customer = "batch-customer"
    traces = [f"{number + 1:032x}" for number in range(40)]
    commands = [
        replace(wallet(customer), id=f"batch-{n}", traceparent=f"00-{t}-00f067aa0ba902b7-01")
        for n, t in enumerate(traces)
    ]

    await traced.system.send(*commands)
    for trace in traces:
        await traced.complete(trace, "process payment.commands", "handle OpenWallet")

    processed = [one(traced.collector.of(trace), "process payment.commands") for trace in traces]
    linked = [span for span in processed if span.links]
    assert linked, "forty commands at once came one by one"
    for span in linked:
        [(batch_trace, batch_id)] = span.links
        await traced.collector.until(lambda t=batch_trace: bool(traced.collector.of(t)), "the batch")
        [batch] = traced.collector.of(batch_trace)
        assert (batch.name, batch.span_id) == ("batch payment.commands", batch_id)
        assert (span.trace_id, "00f067aa0ba902b7") in batch.links
        assert len(batch.links) == batch.attributes["messaging.batch.message_count"]
        handled = one(traced.collector.of(span.trace_id), "handle OpenWallet")
        assert handled.parent_id == span.span_id


async def test_a_refusal_says_its_reason_and_a_dead_letter_is_a_failure(traced: Traced) -> None:
    category, customer = await shop(traced.system, "refusals")

    refused, of_refused = await traced.trace_of(
        *line_of(order(customer, "R-1", (category, "tea", 10_000, 1))),
        names=("process orders.commands", "handle PlaceOrder", "handle ReserveStock"),
    )
    dead, of_dead = await traced.trace_of(
        *("PlaceOrder", "--raw", "--key", customer, "--json", '{"lines": 7}'),
        names=("process orders.commands", "handle unknown", "send orders.commands.dlq"),
    )

    handled = one(of_refused, "handle PlaceOrder")
    assert (refused["status"], handled.attributes["concord.outcome"]) == ("refused", "refused")
    assert handled.attributes["concord.reason"] == refused["reason"] == "out_of_stock"
    assert not handled.failed
    assert one(of_refused, "handle ReserveStock").attributes["concord.reason"] == "out_of_stock"
    assert dead["status"] == "dead-lettered"
    for span in (one(of_dead, "handle unknown"), one(of_dead, "process orders.commands")):
        assert span.failed
        assert span.attributes["error.type"] == span.attributes["concord.reason"] == dead["reason"] == "wrong_shape"
    assert one(of_dead, "send orders.commands.dlq").parent_id == one(of_dead, "process orders.commands").span_id


async def test_a_malformed_traceparent_is_ignored_and_begins_a_trace_of_its_own(traced: Traced) -> None:
    command = replace(wallet("malformed-customer"), traceparent="00-zzz")

    await traced.system.committed(command)

    def mine() -> list[SeenSpan]:
        return [
            span
            for span in traced.collector.spans
            if span.name == "process payment.commands" and span.attributes["messaging.message.id"] == command.id
        ]

    await traced.collector.until(lambda: bool(mine()), "the command")
    assert mine()[0].parent_id == ""


async def test_a_trace_that_is_not_sampled_sends_nothing_and_is_handed_on_all_the_same(traced: Traced) -> None:
    category, customer = await shop(traced.system, "unsampled")
    command = replace(order(customer, "U-1", (category, "tea", 1, 250)), traceparent=UNSAMPLED)

    await traced.system.committed(command)
    later = replace(wallet("after-unsampled"), traceparent=SAMPLED.replace("aaaa", "abab"))
    await traced.system.committed(later)
    await traced.complete("ababbbbbccccddddeeeeffff00001111")

    assert traced.collector.of(UNSAMPLED[3:35]) == []
    await traced.system.witness.catch_up()
    mine = [m for m in traced.system.witness.history.events("orders") if m.header("ce_causationid") == command.id]
    assert [message.header("traceparent") for message in mine] == [UNSAMPLED]


async def test_no_span_holds_a_key_a_payload_or_a_secret_and_each_is_one_of_the_table(traced: Traced) -> None:
    secret = "canary-9f3b"
    body = {**order(f"{secret}-customer", f"{secret}-order", (f"{secret}-goods", f"{secret}-tea", 1, 1)).body}
    body["shipping_address"] = {"region": f"{secret}-region"}
    await traced.system.committed(product(f"{secret}-goods", f"{secret}-tea"), wallet(f"{secret}-customer"))
    await traced.trace_of("PlaceOrder", "--json", json.dumps(body), "--id", "plain-id-1")
    wrong = {**body, "lines": f"{secret}-lines"}
    await traced.trace_of(
        "PlaceOrder", "--raw", "--key", f"{secret}-customer", "--id", "plain-id-2", "--json", json.dumps(wrong)
    )

    for body_bytes in traced.collector.bodies:
        assert secret.encode() not in body_bytes
        assert SECRET_TOKEN.encode() not in body_bytes
    assert {headers["authorization"] for headers in traced.collector.headers} == {f"Bearer {SECRET_TOKEN}"}
    for span in traced.collector.spans:
        rows = [row for row in SPANS if _may_be(span.name, row.name) and row.kind.value == span.kind]
        assert rows, (span.name, span.kind)
        assert any(span.attributes.keys() <= set(row.attributes) for row in rows), (span.name, span.attributes)
        assert span.status_text == ""


def _may_be(name: str, pattern: str) -> bool:
    before, _, after = pattern.partition("{}")
    return name == pattern if "{}" not in pattern else name.startswith(before) and name.endswith(after)


async def test_the_log_lines_of_a_command_name_its_trace(traced: Traced) -> None:
    command = replace(wallet("logged-customer"), traceparent=SAMPLED.replace("aaaa", "acac"))

    await traced.system.committed(command)

    # Ray keeps what an actor writes to stderr in a file of its own.
    pid = await traced.system.pid_of("payment-0")
    with open(f"/proc/{pid}/fd/2", errors="replace") as stderr:  # noqa: ASYNC230
        lines = [json.loads(line) for line in stderr if command.id in line and line.startswith("{")]
    assert [line["event"] for line in lines] == ["answered"]
    assert {line.get("trace_id") for line in lines} == {"acacbbbbccccddddeeeeffff00001111"}
    assert all(len(line["span_id"]) == 16 for line in lines)


async def test_a_collector_that_is_away_neither_holds_up_nor_loses_a_command(traced: Traced) -> None:
    traced.collector.refusing = 503
    try:
        commands = [
            replace(wallet(f"away-{n}"), traceparent=f"00-{0xA0000 + n:032x}-00f067aa0ba902b7-01") for n in range(100)
        ]
        answers = await traced.system.send(*commands, within_s=20)
    finally:
        traced.collector.refusing = 0

    assert [answer["status"] for answer in answers] == ["committed"] * 100
