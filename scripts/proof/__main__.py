"""`python -m scripts.proof replay|small-stock|chaos|…`: run a long proof, print a JSON report.

`replay`, `small-stock` and `chaos` replay files, on SQLite or with `--profile stack` on Cassandra. Without a file,
`chaos --profile stack --minutes M` invents its load, and hurts Kafka and Cassandra as well, alone and in every way.

`simulate --seeds N` plays the engine in simulated weather and starts nothing; `--seeds 1 --first SEED` plays one seed
again; `--mutation NAME|all` plants bugs into the engine, and what is proven is that they are found.

Exit code 0 only if everything held. Systems are started and stopped by the proof itself, in a new directory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infra.consensus_commit.states import Isolation
from infra.storage.errors import InvalidOperationError
from scripts.proof import scenarios
from scripts.proof.disks.injury import ToolMissingError
from scripts.proof.histories.command import NAMED, prove_histories
from scripts.proof.simulation.mutations import MUTATIONS
from scripts.proof.simulation.running import prove_mutations, prove_simulation


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scripts.proof", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="scenario", required=True)
    for name, help in (
        ("replay", "a file, its formulas, and the file again"),
        ("small-stock", "a file with little stock and money: refused orders leave only their answers"),
        (
            "chaos",
            "with --file: a file while processes are killed, compared with the same file in peace; "
            "with --profile stack and no file: minutes of load under every kind of fault",
        ),
    ):
        command = commands.add_parser(name, help=help, description=help)
        command.add_argument("--file", type=Path, action="append", default=[], help="Online Retail, .csv or .csv.gz")
        command.add_argument("--limit", type=int, help="only so many invoices of the files (default: all)")
        command.add_argument("--work", type=Path, help="keep systems and their data in this directory")
        command.add_argument("--profile", choices=("local", "stack"), default="local")
        if name == "small-stock":
            command.add_argument("--initial-stock", type=int, default=100)
            command.add_argument("--initial-balance", type=int, default=100_000, help="pence")
        if name == "chaos":
            command.add_argument("--seed", type=int, default=1)
            command.add_argument("--times", type=int, help="with --file: how often each is killed (default: 3)")
            command.add_argument("--minutes", type=float, help="without --file: of load and faults (default: 30)")
    times = commands.add_parser("recovery-times", help="each part killed: how soon a new command commits")
    times.add_argument("--profile", choices=("local", "stack"), default="stack")
    times.add_argument("--tries", type=int, default=10)
    times.add_argument("--seed", type=int, default=1)
    times.add_argument("--work", type=Path, help="keep the system and its data in this directory")
    soak = commands.add_parser("soak", help="steady work: memory, descriptors and tables over an hour")
    soak.add_argument("--profile", choices=("local", "stack"), default="stack")
    soak.add_argument("--minutes", type=float, default=60)
    soak.add_argument("--rate", type=float, required=True, help="messages a second: half of what is sustainable")
    soak.add_argument("--seed", type=int, default=1)
    soak.add_argument("--work", type=Path, help="keep the system and its data in this directory")
    command = commands.add_parser("histories", help="random transactions under faults, and their histories checked")
    command.add_argument("--storage", default="sqlite", help=f"{', '.join(NAMED)}, or a URL")
    command.add_argument("--transactions", type=int, default=20_000, help="attempts in all (default: 20000)")
    command.add_argument("--seed", type=int, default=1)
    command.add_argument("--isolation", type=Isolation, choices=list(Isolation), action="append", help="default: all")
    command.add_argument("--work", type=Path, help="keep the storage's data in this directory")
    simulate = commands.add_parser("simulate", help="the engine in simulated weather: nothing is started")
    simulate.add_argument("--seeds", type=int, default=1_000, help="how many; with --mutation: at most, for each")
    simulate.add_argument("--first", type=int, default=0, metavar="SEED")
    simulate.add_argument("--workers", type=int, default=2, help="processes to simulate in")
    simulate.add_argument("--mutation", choices=(*MUTATIONS, "all"), help="plant this bug, which must be found")
    disks = commands.add_parser("disks", help="full, failing and slow disks, and wrong clocks (root, strace, faketime)")
    disks.add_argument("--only", default="", metavar="TEXT", help="only the scenes with this in their name")
    disks.add_argument("--rounds", type=int, default=3)
    disks.add_argument("--work", type=Path, help="keep what the scenes leave in this directory")
    return parser


def _simulate(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.mutation is None:
        return prove_simulation(arguments.first, arguments.seeds, workers=arguments.workers)
    names = list(MUTATIONS) if arguments.mutation == "all" else [arguments.mutation]
    return prove_mutations(names, first=arguments.first, at_most=arguments.seeds, workers=arguments.workers)


def _disks(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    from scripts.proof.disks.command import prove_disks  # brings both drivers, which nothing else here needs

    return prove_disks(work, only=arguments.only, rounds=arguments.rounds)


def _chaos(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    if not arguments.file:
        from scripts.proof.on_stack.chaos import prove_chaos_on_the_stack

        return prove_chaos_on_the_stack(
            work, minutes=30 if arguments.minutes is None else arguments.minutes, seed=arguments.seed
        )
    return scenarios.prove_chaos(
        arguments.file,
        work,
        profile=arguments.profile,
        limit=arguments.limit or 0,
        seed=arguments.seed,
        times=3 if arguments.times is None else arguments.times,
    )


def _recovery_times(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    from scripts.proof.on_stack.recovery import prove_recovery_times

    return prove_recovery_times(work, profile=arguments.profile, tries=arguments.tries, seed=arguments.seed)


def _soak(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    from scripts.proof.on_stack.soak import prove_soak

    return prove_soak(
        work, profile=arguments.profile, minutes=arguments.minutes, rate=arguments.rate, seed=arguments.seed
    )


def _run(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    run: dict[str, Callable[[], dict[str, Any]]] = {
        "replay": lambda: scenarios.prove_replay(
            arguments.file, work, profile=arguments.profile, limit=arguments.limit or 0
        ),
        "small-stock": lambda: scenarios.prove_small_stock(
            arguments.file,
            work,
            profile=arguments.profile,
            limit=arguments.limit or 0,
            initial_stock=arguments.initial_stock,
            initial_balance=arguments.initial_balance,
        ),
        "chaos": lambda: _chaos(arguments, work),
        "recovery-times": lambda: _recovery_times(arguments, work),
        "soak": lambda: _soak(arguments, work),
        "histories": lambda: prove_histories(
            arguments.storage,
            work,
            transactions=arguments.transactions,
            seed=arguments.seed,
            isolations=tuple(arguments.isolation or Isolation),
        ),
        "simulate": lambda: _simulate(arguments),
        "disks": lambda: _disks(arguments, work),
    }
    return run[arguments.scenario]()


def _bad_usage(arguments: argparse.Namespace) -> str | None:
    """What is wrong with arguments that argparse lets pass; None of good ones."""
    if not hasattr(arguments, "file"):
        return None
    if not arguments.file and (arguments.scenario != "chaos" or arguments.profile != "stack"):
        return f"{arguments.scenario} --profile {arguments.profile} needs a file: --file"
    if arguments.scenario != "chaos":
        return None
    if arguments.file:
        return (
            "chaos with --file lasts as long as the file: leave out --minutes"
            if arguments.minutes is not None
            else None
        )
    given = [f"--{name}" for name in ("limit", "times") if getattr(arguments, name) is not None]
    return f"chaos without --file lasts some minutes: {' and '.join(given)} would need a --file" if given else None


def main() -> int:
    arguments = _parser().parse_args()
    if complaint := _bad_usage(arguments):
        print(complaint, file=sys.stderr)
        return 2
    files: list[Path] = getattr(arguments, "file", [])
    for file in files:
        if not file.is_file():
            print(f"There is no file {file}.", file=sys.stderr)
            return 2
    kept: Path | None = getattr(arguments, "work", None)
    if kept is not None and kept.exists() and any(kept.iterdir()):
        print(f"{kept} is not empty: a proof begins with nothing.", file=sys.stderr)
        return 2
    work = kept or Path(tempfile.mkdtemp(prefix="concord-proof."))
    # A proof that is told to end takes its systems with it, as after Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    started_s = time.monotonic()
    try:
        report: dict[str, Any] = {"scenario": arguments.scenario}
        if files:
            report["files"] = [str(file) for file in files]
        report |= _run(arguments, work)
    # --storage is neither a name nor a URL, --only no scene's; a tool that a proof needs is not installed
    except (InvalidOperationError, ToolMissingError) as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        if kept is None:
            shutil.rmtree(work, ignore_errors=True)
    print(json.dumps({**report, "seconds": round(time.monotonic() - started_s, 1)}, indent=1, ensure_ascii=False))
    return 0 if report["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
