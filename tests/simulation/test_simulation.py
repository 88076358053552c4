"""The engine in simulated weather: a short run of what `python -m scripts.proof simulate` does at length."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from infra.consensus_commit import compose
from scripts.proof.simulation.mutations import MUTATIONS, planted
from scripts.proof.simulation.probes import PROBES, never_hit
from scripts.proof.simulation.running import COMMITTED_AT_LEAST, FULL_RUN, found_after, simulate
from scripts.proof.simulation.weather import CallFault, Interface, Topology, weather_of
from scripts.proof.simulation.world import run_seed

ROOT = Path(__file__).resolve().parents[2]

TRACES = """
from scripts.proof.simulation.running import quiet
from scripts.proof.simulation.world import run_seed
with quiet():
    print([run_seed(seed).trace for seed in range(40, 60)])
"""


def test_no_seed_shows_a_violation_and_every_rare_path_is_taken() -> None:
    tally = simulate(range(FULL_RUN))

    assert tally.violations == {}
    assert never_hit(tally.probes) == []
    assert {str(fault) for fault in CallFault} | {"crash", "pause", "clock jump", "outage"} <= set(tally.faults)
    assert tally.transactions >= 20 * FULL_RUN
    assert sum(tally.faults.values()) >= 5 * FULL_RUN
    assert tally.committed >= COMMITTED_AT_LEAST * tally.transactions


def test_weather_comes_in_every_kind() -> None:
    weathers = [weather_of(seed) for seed in range(FULL_RUN)]

    assert {weather.topology for weather in weathers} == set(Topology)
    assert {weather.interface for weather in weathers} == set(Interface)
    assert {(weather.intents, weather.async_commit) for weather in weathers} == {
        (intents, late) for intents in (False, True) for late in (False, True)
    }


@pytest.mark.parametrize("seed", [3, 8, 21])
def test_a_seed_plays_the_same_twice(seed: int) -> None:
    assert run_seed(seed) == run_seed(seed)


def test_two_seeds_play_differently() -> None:
    assert run_seed(1).trace != run_seed(2).trace


def test_a_seed_plays_the_same_in_processes_that_hash_differently() -> None:
    traces = [
        subprocess.run(
            [sys.executable, "-c", TRACES],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout
        for hash_seed in ("0", "12345")
    ]

    assert traces[0] == traces[1]
    assert len(traces[0]) > 20 * 32


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_planted_bug_is_found(mutation: str) -> None:
    seeds, seed, violation = found_after(mutation, first=0, at_most=5_000)

    assert seed is not None, violation
    assert seeds <= 5_000


def test_a_planted_bug_is_taken_out_again() -> None:
    sound = compose.prepare

    with planted("lose_the_before_image"):
        assert compose.prepare is not sound

    assert compose.prepare is sound


def test_a_run_that_never_took_a_rare_path_is_told_so() -> None:
    hits = dict.fromkeys(PROBES, 1)
    del hits["late_prepare_after_abort"]

    assert never_hit(hits) == ["late_prepare_after_abort"]


def test_the_command_reports_what_it_ran(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.proof", "simulate", "--seeds", "30", "--first", "5", "--workers", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["holds"]
    assert report["seeds"] == 30
    assert report["violations"] == {}


def test_the_command_fails_where_a_planted_bug_is_not_found() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.proof", "simulate", "--seeds", "1", "--mutation", "stale_read"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["mutations"]["stale_read"]["found_after_seeds"] is None
