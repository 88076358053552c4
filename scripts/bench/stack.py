"""Four-domain orders end to end on Kafka and Cassandra, beside ScalarDB's order transaction on the same Cassandra.

    python -m scripts.bench.stack [--seconds N] [--warm-up N] [--rounds N] [--in-flight 64,256] [--keys N]
                                  [--trace-one-in N] [--file FILE… [--limit N]] [--data DIR]

Method. A system of its own is started with `--profile stack`: Kafka, Cassandra, Ray with every actor, one worker; all
of them, and the clients, on this machine. `--keys` products and as many wallets are made. Then, for a random customer
and a random product each time, uniformly:

    full     PlaceOrder commands, so many in flight at a time as `--in-flight` says, one number after the other; each in
             rounds, in turns with ScalarDB at the same number of threads. The best of them is the full rate
    open     commands by the clock (Poisson arrivals, seed 1) at half, 80 % and all of the full rate, latency counted
             from the moment at which each was due, so that no one who falls behind hides it. At the full rate a queue
             must grow: that latency tells how long the load lasted, and is there to be compared between releases
    trace    the system is stopped and started again on its data with tracing, and one order in N (10) is traced at
             half of the full rate: the mean of the longest paths, step by step (`scripts.bench.paths`)
    replay   with `--file`: the invoices of these files, as `scripts.bench.replay` has it

A first load of each side, which is not counted, warms both up; each load warms up once more before it is counted.
Latency is from `submit` in this process to the answer read from the results topic. CPU ms by process come from /proc,
`client` is this process; statements are what actors asked of Cassandra, from their metrics, commit-records and intents
included; both are divided by the orders answered meanwhile. Tracing is off except in `trace`.

What is compared, and what is not. ScalarDB 3.19 (its defaults, SERIALIZABLE, in one Java program of threads) runs the
bare transaction: read and update a stock and a wallet, insert a shipment and an order, on tables of `--keys` rows. It
has no commands on topics, no actors in processes of their own, no deduplication by an outcome row, no events, no answer
on a topic, and nothing that looks for what a crash left before somebody reads it. `ratio` is orders answered end to end
by transactions committed; that one side does more is not taken out of it. `scripts.bench.transfers` has the engine
alone beside ScalarDB. Without a `javac` ScalarDB is left out, which is said.

Prints one JSON object for each load, and a table of them for people at the end (stderr). Nothing is asserted. All of it
takes about six minutes. Figures mean something only beside others of the same run on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from infra.config import TracingSettings
from infra.metrics import parse_metrics
from infra.storage.cassandra import CassandraStorage
from infra.tracing import open_tracer
from schemas.envelope import build_command_message
from schemas.message import Command
from scripts.bench import replay, transfers
from scripts.bench.loads import PERCENTILES, Tally, Window, arrivals, closed_loop, open_loop, report
from scripts.bench.orders import order_of, product_of, wallet_of
from scripts.bench.paths import SpanCollector, collecting, mean_path_ms
from scripts.bench.processes import actor_pids, usage
from scripts.cli.client import CommandClient
from scripts.cli.replay import percentile_ms
from scripts.java_peer.processes import NO_COMPILER, PeerError, java_compiler
from scripts.proof.running import RunningSystem

CONCORD, SCALARDB = "concord", "scalardb"
WORK = "order"
PARTS_OF_FULL = (0.5, 0.8, 1.0)
DOMAINS = ("inventory", "payment", "orders")
"""Those that answer commands of this benchmark."""

SETTLED_S = 2.0
SPANS_ARRIVE_S = 3.0
"""Processes send their spans about once a second."""

Line = dict[str, Any]


class Shop:
    """Products and wallets of this run's own, and orders for them, through one client."""

    def __init__(self, client: CommandClient, keys: int, mark: str) -> None:
        self._client = client
        self._mark = mark
        self._products = [f"{mark}-{number}" for number in range(keys)]
        self._customers = [f"{mark}-{number}" for number in range(keys)]
        self._chance = random.Random(1)
        self._numbers = itertools.count()

    async def open(self) -> None:
        opening = [*map(product_of, self._products), *map(wallet_of, self._customers)]
        await asyncio.gather(*map(self._answered, opening))

    async def place(self) -> str:
        """One order's status."""
        order_id = f"{self._mark}-{uuid.uuid4().hex}"
        return await self._answered(
            order_of(self._chance.choice(self._customers), self._chance.choice(self._products), order_id)
        )

    async def _answered(self, command: Command) -> str:
        id = f"{self._mark}-{uuid.uuid4().hex}"
        message = build_command_message(command, command_id=id, time_ms=time.time_ns() // 1_000_000)
        return (await self._client.submit(message, id=id, digest=None).answer).status


class SystemMeter:
    """CPU seconds by process (`cpu_s/NAME`) and statements on the storage (`statements/WHAT`) of a running system."""

    def __init__(self, runtime: dict[str, Any]) -> None:
        self._runtime = runtime
        self._actors = actor_pids(runtime["storage"])

    async def __call__(self) -> Mapping[str, float]:
        client_s = time.process_time()
        return await asyncio.to_thread(self._look, client_s)

    def _look(self, client_s: float) -> dict[str, float]:
        found = {f"cpu_s/{name}": used.cpu_s for name, used in usage(self._runtime, self._actors).items()}
        found["cpu_s/client"] = client_s
        with urllib.request.urlopen(f"{self._runtime['http']}/metrics", timeout=30) as page:
            return found | statements(parse_metrics(page.read()))


def statements(page: Mapping[tuple[str, tuple[tuple[str, str], ...]], float]) -> dict[str, float]:
    """`statements/NAMESPACE OPERATION` of a metrics page."""
    found: dict[str, float] = {}
    for (sample, labels), value in page.items():
        if sample == "concord_storage_seconds_count":
            told = dict(labels)
            name = f"statements/{told['storage_namespace']} {told['operation']}"
            found[name] = found.get(name, 0.0) + value
    return found


class ScalarDB:
    """The Java program, on the Cassandra of the system."""

    def __init__(self, side: transfers.Theirs, java_pid: int, meter: SystemMeter) -> None:
        self._side = side
        self._java = {"java": java_pid}
        self._meter = meter

    async def round(self, at_once: int, seconds: float, tally: transfers.Tally) -> None:
        before = await self._cpu_s()
        await self._side.round(WORK, at_once, seconds, tally)
        for who, after in (await self._cpu_s()).items():
            tally.cpu_s[who] = tally.cpu_s.get(who, 0.0) + after - before[who]

    async def _cpu_s(self) -> dict[str, float]:
        return {"cassandra": (await self._meter())["cpu_s/cassandra"], **transfers.cpu_s(self._java)}


async def open_scalardb(stack: AsyncExitStack, runtime: dict[str, Any], keys: int, meter: SystemMeter) -> ScalarDB:
    """Tables for ScalarDB on the system's Cassandra, and the program, warmed up."""
    port = urlsplit(runtime["storage"]).port or 9042
    storage = CassandraStorage(["127.0.0.1"], port)
    try:
        await transfers.load(storage, [WORK], 0, sides=(transfers.THEIRS,), rows_each=keys)
    finally:
        await storage.close()
    java = await transfers.open_scalardb(stack, port)
    theirs = transfers.Theirs(java, {WORK: keys})
    await theirs.round(WORK, 8, transfers.WARMING_UP_S, transfers.Tally())
    return ScalarDB(theirs, java.pid, meter)


def told_of_scalardb(tally: transfers.Tally) -> Line:
    told = tally.report()
    return {
        "orders_per_s": told["tx_per_s"],
        "latency_ms": {
            f"p{percent}": percentile_ms([ms / 1000 for ms in tally.latencies_ms], percent) for percent in PERCENTILES
        },
        "conflicts": told["conflicts"],
        "cores_busy": round(sum(tally.cpu_s.values()) / tally.seconds, 2) if tally.seconds else 0.0,
        "cpu_ms_an_order": told["cpu_ms_a_tx"],
        "statements_an_order": told["statements_a_tx"],
    }


class Told:
    """What this run has found so far: printed as it is found."""

    def __init__(self) -> None:
        self.lines: list[Line] = []

    def __call__(self, **line: Any) -> None:
        self.lines.append(line)
        print(json.dumps(line), flush=True)

    @property
    def full_per_s(self) -> float:
        """The best closed loop."""
        return max(
            float(line["orders_per_s"]) for line in self.lines if line["who"] == CONCORD and line["load"] == "full"
        )


async def rates(system: RunningSystem, options: argparse.Namespace, told: Told) -> None:
    """The full load in turns with ScalarDB, then the loads by the clock."""
    runtime = system.runtime
    meter = SystemMeter(runtime)
    async with AsyncExitStack() as stack:
        scalardb = None
        if java_compiler() is None:
            told(who=SCALARDB, load="left out", why=NO_COMPILER)
        else:
            _say("starting ScalarDB")
            scalardb = await open_scalardb(stack, runtime, options.keys, meter)
        client = await stack.enter_async_context(CommandClient(lambda: system.bootstrap_servers, DOMAINS))
        shop = Shop(client, options.keys, uuid.uuid4().hex[:8])
        await shop.open()
        _say("warming up")
        await closed_loop(shop.place, options.in_flight[0], Window(0, transfers.WARMING_UP_S), Tally(), meter)
        for in_flight in options.in_flight:
            await _full(shop, scalardb, in_flight, options, meter, told)
        full_per_s = told.full_per_s
        for part in PARTS_OF_FULL:
            _say(f"by the clock at {part:.0%} of {full_per_s}/s")
            window = Window(options.warm_up, options.seconds)
            tally = Tally()
            await open_loop(shop.place, arrivals(full_per_s * part, window.end_s), window, tally, meter)
            told(who=CONCORD, load=f"{part:.0%}", offered_per_s=round(full_per_s * part, 1), **report(tally))
            await asyncio.sleep(SETTLED_S)


async def _full(
    shop: Shop, scalardb: ScalarDB | None, in_flight: int, options: argparse.Namespace, meter: SystemMeter, told: Told
) -> None:
    ours, theirs = Tally(), transfers.Tally()
    seconds = options.seconds / options.rounds
    refused = ""
    for number in range(options.rounds):
        _say(f"{in_flight} in flight, round {number + 1} of {options.rounds}")
        await closed_loop(shop.place, in_flight, Window(options.warm_up, seconds), ours, meter)
        await asyncio.sleep(SETTLED_S)
        if scalardb is not None and not refused:
            try:
                await scalardb.round(in_flight, seconds, theirs)
            except PeerError as error:  # More than its Cassandra stands: that is what is to be told.
                refused = str(error)
    told(who=CONCORD, load="full", in_flight=in_flight, **report(ours))
    if scalardb is None:
        return
    if refused:
        told(who=SCALARDB, load="failed", in_flight=in_flight, why=refused)
        return
    theirs_told = told_of_scalardb(theirs)
    ratio = round(ours.per_s / max(theirs_told["orders_per_s"], 0.1), 2)
    told(who=SCALARDB, load="full", in_flight=in_flight, **theirs_told, ratio=ratio)


async def where_time_goes(
    system: RunningSystem, collector: SpanCollector, rate_per_s: float, options: argparse.Namespace, told: Told
) -> None:
    """Trace some of the orders that are offered by the clock."""
    _say(f"tracing one order in {options.trace_one_in} at {rate_per_s:.0f}/s")
    settings = TracingSettings(endpoint=collector.url, sample_ratio=1 / options.trace_one_in, export_every_ms=100)
    tracer = open_tracer(settings, service="bench", process="bench")
    mark = uuid.uuid4().hex[:8]
    window = Window(options.warm_up, options.seconds)
    tally = Tally()
    async with CommandClient(lambda: system.bootstrap_servers, DOMAINS) as client:
        await Shop(client, options.keys, mark).open()
    async with CommandClient(lambda: system.bootstrap_servers, DOMAINS, tracer=tracer) as client:
        shop = Shop(client, options.keys, mark)
        await open_loop(shop.place, arrivals(rate_per_s, window.end_s), window, tally, SystemMeter(system.runtime))
    tracer.close()
    await asyncio.sleep(SPANS_ARRIVE_S)
    counted_from_ns = time.time_ns() - int((SPANS_ARRIVE_S + tally.seconds) * 1e9)
    traces, path_ms = mean_path_ms(collector.of_traces_since(counted_from_ns))
    told(
        who=CONCORD,
        load="trace",
        offered_per_s=round(rate_per_s, 1),
        orders_per_s=tally.per_s,
        latency_ms=tally.latency_ms(),
        traces=traces,
        sum_ms=round(sum(path_ms.values()), 1),
        path_ms=path_ms,
    )


def run(options: argparse.Namespace, directory: Path) -> Told:
    """Every load on a system of `directory`, which is stopped at the end."""
    told = Told()
    with collecting() as collector:
        for environment in ({}, {"CONCORD_TRACING__ENDPOINT": collector.url}):
            _say("starting a system" + (" with tracing" if environment else ""))
            system = RunningSystem(directory, profile="stack", environment=environment)
            try:
                system.start()
                if environment:
                    asyncio.run(where_time_goes(system, collector, told.full_per_s / 2, options, told))
                else:
                    asyncio.run(rates(system, options, told))
                    if options.file:
                        _say("replaying")
                        replayed = replay.measure(options.file, directory, limit=options.limit, in_flight=64)
                        told(who=CONCORD, load="replay", **replayed)
            except BaseException:
                system.kill()
                raise
            system.stop()
            system.wait_until_gone()
    return told


def table(lines: Sequence[Line]) -> str:
    """The lines that told a rate, for people."""
    rows = [("", "load", "in flight", "orders/s", *(f"p{p} ms" for p in PERCENTILES), "CPU ms/order", "statements")]
    for line in lines:
        if "orders_per_s" not in line:
            rows.append((line["who"], line["load"], "", "", *("" for _ in PERCENTILES), "", ""))
            continue
        cpu, asked = line.get("cpu_ms_an_order"), line.get("statements_an_order")
        rows.append(
            (
                line["who"],
                line["load"],
                str(line.get("in_flight", "")),
                f"{line['orders_per_s']:.1f}",
                *("" if (ms := line["latency_ms"][f"p{p}"]) is None else f"{ms:.0f}" for p in PERCENTILES),
                "" if cpu is None else f"{sum(cpu.values()):.1f}",
                "" if asked is None else f"{sum(asked.values()):.1f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    told = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for line in lines:
        if "ratio" in line:
            told.append(
                f"orders/s end to end by ScalarDB's transactions/s, {line['in_flight']} in flight: {line['ratio']}"
            )
        if "path_ms" in line:
            told.append(f"the {line['sum_ms']} ms of an order at {line['offered_per_s']}/s (mean of {line['traces']}):")
            told += [f"  {ms:8.2f}  {part}" for part, ms in line["path_ms"].items()]
    return "\n".join(told)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, help="a new directory for the system (default: a temporary one)")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="that each load is counted for, over all its rounds"
    )
    parser.add_argument("--warm-up", type=float, default=5.0, help="seconds before that, each round")
    parser.add_argument("--rounds", type=int, default=2, help="turns that each side takes at full load")
    parser.add_argument("--in-flight", type=lambda text: [int(n) for n in text.split(",")], default=[64, 256])
    parser.add_argument("--keys", type=int, default=1000, help="products, and customers")
    parser.add_argument("--trace-one-in", type=int, default=10, help="orders of which one is traced")
    parser.add_argument("--file", type=Path, nargs="+", default=[], help="Online Retail, .csv or .csv.gz, to replay")
    parser.add_argument("--limit", type=int, default=0, help="only so many invoices of them; 0: all")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="concord-bench.") as work:
        told = run(options, options.data or Path(work) / "system")
    _say(table(told.lines))


if __name__ == "__main__":
    main()
