"""A month of invoices, end to end: `concord replay` of a file on a fresh system, and where its time goes.

    python -m scripts.bench.replay FILE… [--data DIR] [--limit N] [--in-flight 64]

Method. Without --data a system of its own is started in a new directory and stopped at the end; with it the system that
runs there is used, which must not have seen these invoices, since answering them again is other work. The replay runs
as its own process with the given number of commands in flight; products and wallets are made first and are not part
of the rates. Latency is from publishing a command to its result. CPU seconds by process come from /proc, right
before and after; `share_of_time` is a process's CPU seconds by the seconds of the whole replay, so on two cores the
shares can add up to 2. Single orders are in `scripts.bench.orders`, which has a peer to compare with. Prints one JSON
object. Nothing is asserted but that every command was answered.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from scripts.bench.processes import spent, usage
from scripts.proof.running import clean_environment, concord_program, running

CLIENT = "client (concord replay)"
SHOWN_CPU_S = 0.05


def measure(files: list[Path], data: Path, *, limit: int, in_flight: int) -> dict[str, Any]:
    """Replay on the system that runs on `data`. Raises SystemExit with what the replay said if it fails."""
    runtime = json.loads((data / "runtime.json").read_text())
    before, client_before_s = usage(runtime), _children_cpu_s()
    started_s = time.perf_counter()
    done = subprocess.run(
        [
            *(concord_program(), "replay", *map(str, files), "--data", str(data), "--output", "json"),
            *("--limit", str(limit), "--in-flight", str(in_flight)),
        ],
        env=clean_environment(),
        capture_output=True,
        check=False,
    )
    seconds = time.perf_counter() - started_s
    after = usage(runtime)
    if done.returncode != 0:
        raise SystemExit(f"concord replay ended with {done.returncode}: {done.stderr.decode()[-2000:]}")
    summary = json.loads(done.stdout)
    if not summary["products_registered"]:
        raise SystemExit(f"{data} has seen these invoices before. Measure on a fresh directory.")
    cpu_s = {**spent(before, after), CLIENT: _children_cpu_s() - client_before_s}
    parts = {name: cpu for name, cpu in sorted(cpu_s.items(), key=lambda item: -item[1]) if cpu > SHOWN_CPU_S}
    return {
        "files": [file.name for file in files],
        "in_flight": in_flight,
        "seconds_with_preparation": round(seconds, 2),
        **{name: summary[name] for name in ("invoices", "orders", "returns", "write_offs", "lines")},
        **{name: summary[name] for name in ("committed", "refused", "seconds", "orders_per_s", "lines_per_s")},
        "latency_ms": summary["latency_ms"],
        "cpu_s": {name: round(cpu, 2) for name, cpu in parts.items()},
        "share_of_time": {name: round(cpu / seconds, 3) for name, cpu in parts.items()},
        "resident_mb": {name: round(part.resident_mb) for name, part in after.items()},
    }


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="Online Retail, .csv or .csv.gz")
    parser.add_argument("--data", type=Path, help="directory of a running system; without it one is started")
    parser.add_argument("--limit", type=int, default=0, help="only so many invoices; 0: all")
    parser.add_argument("--in-flight", type=int, default=64)
    arguments = parser.parse_args()
    options = {"limit": arguments.limit, "in_flight": arguments.in_flight}
    if arguments.data is not None:
        print(json.dumps(measure(arguments.files, arguments.data, **options)))
        return
    with tempfile.TemporaryDirectory(prefix="concord-bench.") as work:
        print("starting a system", file=sys.stderr)
        with running(Path(work) / "system") as system:
            print(json.dumps(measure(arguments.files, system.directory, **options)))


if __name__ == "__main__":
    main()
