"""Many seeds, in several worker processes, and what they came to."""

from __future__ import annotations

import gc
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from typing import Any

from scripts.proof.simulation.mutations import MUTATIONS, planted
from scripts.proof.simulation.probes import never_hit
from scripts.proof.simulation.world import run_seed

CHUNK = 50
PROGRESS = 1_000
FULL_RUN = 500
"""So many seeds hit every probe: a run of as many that did not has proven too little."""
LONG_RUN = 20_000
"""Seeds after which even the rarest probe must have been hit."""

COMMITTED_AT_LEAST = 0.5
"""Share of transactions that must have committed, faults and conflicts included: else nothing was put to the test."""


_PROGRAM_ERRORS = ("TypeError", "AttributeError", "NameError", "KeyError")
"""A mutation that no longer fits the engine's code raises these, which proves nothing."""


@dataclass
class Tally:
    """What a number of seeds came to."""

    seeds: int = 0
    transactions: int = 0
    committed: int = 0
    calls: int = 0
    cpu_s: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    probes: Counter[str] = field(default_factory=Counter)
    violations: dict[int, tuple[str, ...]] = field(default_factory=dict)

    def add(self, other: Tally) -> None:
        self.seeds += other.seeds
        self.transactions += other.transactions
        self.committed += other.committed
        self.calls += other.calls
        self.cpu_s += other.cpu_s
        self.faults += other.faults
        self.probes += other.probes
        self.violations |= other.violations


def simulate(seeds: range, *, mutation: str | None = None, stop_at_violation: bool = False) -> Tally:
    """Run `seeds` here, one after another."""
    tally = Tally()
    began_s = time.process_time()
    with planted(mutation) if mutation else nullcontext(), quiet():
        for seed in seeds:
            verdict = run_seed(seed)
            tally.seeds += 1
            tally.transactions += verdict.transactions
            tally.committed += verdict.committed
            tally.calls += verdict.calls
            tally.faults += verdict.faults
            tally.probes += verdict.probes
            if verdict.violations:
                tally.violations[seed] = verdict.violations
                if stop_at_violation:
                    break
            if seed % CHUNK == 0:
                gc.collect()
    tally.cpu_s = time.process_time() - began_s
    return tally


@contextmanager
def quiet() -> Iterator[None]:
    """No log lines (there would be millions), and memory reclaimed between seeds rather than within."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        logging.disable(before)


def simulate_in_parallel(first: int, count: int, *, workers: int) -> Tally:
    """Run `count` seeds from `first` on in `workers` processes."""
    chunks = [range(begin, min(begin + CHUNK, first + count)) for begin in range(first, first + count, CHUNK)]
    tally = Tally()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for done in pool.map(simulate, chunks):
            tally.add(done)
            if tally.seeds % PROGRESS == 0:
                print(
                    f"{tally.seeds} seeds, {tally.transactions} transactions, {sum(tally.faults.values())} faults,"
                    f" {len(tally.violations)} seeds with violations",
                    file=sys.stderr,
                    flush=True,
                )
    return tally


def found_after(mutation: str, *, first: int, at_most: int) -> tuple[int, int | None, str]:
    """(seeds run, seed that found it or None, what it found) of one planted bug."""
    tally = simulate(range(first, first + at_most), mutation=mutation, stop_at_violation=True)
    for seed, violations in tally.violations.items():
        if not any(f"raised {name}" in violations[0] for name in _PROGRAM_ERRORS):
            return tally.seeds, seed, violations[0]
        return tally.seeds, None, f"the mutation itself is broken: {violations[0]}"
    return tally.seeds, None, ""


def prove_simulation(first: int, count: int, *, workers: int) -> dict[str, Any]:
    """Report on `count` seeds; `holds` only if none shows a violation and the run was not vacuous."""
    started_s = time.monotonic()
    tally = simulate_in_parallel(first, count, workers=workers)
    seconds = time.monotonic() - started_s
    missed = never_hit(tally.probes, long_run=count >= LONG_RUN) if count >= FULL_RUN else []
    share = tally.committed / max(tally.transactions, 1)
    return {
        "holds": not tally.violations and not missed and share >= COMMITTED_AT_LEAST,
        "seeds": tally.seeds,
        "transactions": tally.transactions,
        "committed": tally.committed,
        "storage_calls": tally.calls,
        "faults": sum(tally.faults.values()),
        "faults_by_kind": {str(kind): number for kind, number in sorted(tally.faults.items())},
        "probes": dict(sorted(tally.probes.items())),
        "probes_never_hit": missed,
        "seeds_per_second": round(tally.seeds / seconds, 1),
        "seeds_per_cpu_second": round(tally.seeds / tally.cpu_s, 1),
        "violations": {str(seed): list(found) for seed, found in list(tally.violations.items())[:20]},
        "seeds_with_violations": len(tally.violations),
    }


def prove_mutations(names: list[str], *, first: int, at_most: int, workers: int) -> dict[str, Any]:
    """Report on planted bugs; `holds` only if each was found within `at_most` seeds."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        results = dict(zip(names, pool.map(partial(found_after, first=first, at_most=at_most), names), strict=True))
    return {
        "holds": all(seed is not None for _, seed, _ in results.values()),
        "mutations": {
            name: {
                "mistake": MUTATIONS[name].mistake,
                "found_after_seeds": seeds if seed is not None else None,
                "seed": seed,
                "violation": violation,
            }
            for name, (seeds, seed, violation) in results.items()
        },
    }
