"""The short form of the chaos, about three minutes with a fixed seed: every kind of fault, and everything judged.

The long one is `python -m scripts.proof chaos --profile stack --minutes 30 --seed N`.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.system

MINUTES = 2.5
"""Of load and faults at least: a slow machine takes longer until each kind has happened."""

WITHIN_S = 1_500
ENDED_WITHIN_S = 60


@pytest.mark.timeout(WITHIN_S + 2 * ENDED_WITHIN_S)
def test_minutes_of_every_kind_of_fault_on_kafka_and_cassandra_break_no_promise(tmp_path: Path) -> None:
    code, stdout, stderr = proved("--minutes", str(MINUTES), "--seed", "1", "--work", str(tmp_path / "work"))

    assert stdout, stderr[-4000:]
    report = json.loads(stdout)
    assert (code, report["broken_promises"]) == (0, []), stderr[-4000:]
    assert report["holds"]
    assert len(report["faults_by_kind"]) >= 10
    assert report["commands"] >= 500, "hardly anything was asked for"


def proved(*arguments: str) -> tuple[int, str, str]:
    """Exit code and output. One that takes too long is told to end, so that it takes its servers with it."""
    proof = subprocess.Popen(
        [sys.executable, "-m", "scripts.proof", "chaos", "--profile", "stack", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        stdout, stderr = proof.communicate(timeout=WITHIN_S)
    except subprocess.TimeoutExpired:
        proof.send_signal(signal.SIGINT)
        stdout, stderr = proof.communicate(timeout=ENDED_WITHIN_S)
        pytest.fail(f"it did not end within {WITHIN_S} s: {stderr[-4000:]}")
    finally:
        proof.kill()
    return proof.returncode, stdout, stderr
