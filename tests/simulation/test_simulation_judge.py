"""The judge of simulations is shown what is wrong, piece by piece, and has to say so each time."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from infra.consensus_commit.metadata import transactional
from infra.consensus_commit.states import Isolation, TransactionState
from infra.storage.memory import MemoryStorage
from infra.storage.operations import ColumnCondition, Delete, If, Operator
from scripts.proof.simulation.judge import Evidence, judge
from scripts.proof.simulation.loop import Process, SimulatedClock, SimulatedLoop
from scripts.proof.simulation.running import quiet
from scripts.proof.simulation.weather import Weather, weather_of
from scripts.proof.simulation.witness import Write
from scripts.proof.simulation.workloads import TABLES, Log, Place, key_of
from scripts.proof.simulation.world import World

CALM: Weather = replace(
    weather_of(0),
    isolation=Isolation.SERIALIZABLE,
    imported=False,
    call_fault=0.0,
    pass_crash=0.0,
    pauses=0,
    clock_jumps=0,
    outages=0,
)


def evidence() -> Evidence:
    """What a sound run in calm weather leaves."""
    world = World(11, CALM)
    with quiet():
        verdict = world.run()
    assert verdict.violations == ()
    return world.evidence()


def written(found: Evidence, kind: str) -> Log:
    """The last committed transaction of a kind that wrote."""
    logs = [log for log in found.logs.values() if log.kind == kind and log.writes and log.answer == "committed"]
    return logs[-1]


def a_lost_commit(found: Evidence) -> None:
    tx_id = written(found, "append").tx_id
    found.witness.decided.pop(tx_id, None)
    found.witness.at_once.pop(tx_id, None)


def an_abort_that_took_effect(found: Evidence) -> None:
    written(found, "transfer").answer = "aborted"


def a_record_in_doubt(found: Evidence) -> None:
    found.rows["one"][0]["tx_state"] = TransactionState.PREPARED.value


def a_before_image_left_behind(found: Evidence) -> None:
    found.rows["one"][0]["before_note"] = "old"


def money_from_nowhere(found: Evidence) -> None:
    next(row for row in found.rows["one"] if row["part"] == 0)["value"] += 5  # type: ignore[operator]


def a_version_too_many(found: Evidence) -> None:
    next(row for row in found.rows["one"] if row["part"] == 0)["tx_version"] += 1  # type: ignore[operator]


def a_record_of_another_writer(found: Evidence) -> None:
    next(row for row in found.rows["one"] if row["part"] == 0 and row["tx_id"] in found.logs)["tx_id"] = "somebody"


def a_doubled_append(found: Evidence) -> None:
    row = next(row for row in found.rows["one"] if row["part"] in (10, 11) and row["note"])
    row["note"] = f"{row['note']} {str(row['note']).split()[0]}"


def a_stale_read(found: Evidence) -> None:
    log = written(found, "transfer")
    place, values = log.reads[0][1], log.reads[0][2]
    log.reads[0] = ("get", place, (values[0] + 1, *values[1:]))


def a_phantom(found: Evidence) -> None:
    log = written(found, "append")
    log.reads.append(("scan", "one", 20, None, 0, False, None, ((20, 77, (1, "", "red")),)))


def a_read_of_what_was_never_committed(found: Evidence) -> None:
    log = written(found, "append")
    log.reads.append(("get", found.places.lists[0], (None, "nobody", None)))


def a_read_that_contradicts_real_time(found: Evidence) -> None:
    """A reader that began last of all and saw a list as it was before its first append."""
    place = next(iter(written(found, "append").writes))
    late = Log("late", "read", Isolation.SERIALIZABLE, found.witness.instant + 1, [("get", place, None)])
    late.committing_at = late.ended_at = found.witness.instant + 2
    late.answer = "committed"
    found.logs["late"] = late  # type: ignore[index]


@pytest.mark.parametrize(
    ("tamper", "verdict"),
    [
        (a_lost_commit, "is not committed"),
        (an_abort_that_took_effect, "answered as aborted and is committed"),
        (a_record_in_doubt, "is left in state"),
        (a_before_image_left_behind, "is left in state"),
        (money_from_nowhere, "accounts hold"),
        (a_version_too_many, "versions of accounts"),
        (a_record_of_another_writer, "should be as"),
        (a_doubled_append, "lost or doubled"),
        (a_stale_read, "at no instant was so"),
        (a_phantom, "at no instant was so"),
        (a_read_of_what_was_never_committed, "never was committed in this order"),
        (a_read_that_contradicts_real_time, "no order explains the lists"),
    ],
)
def test_what_is_wrong_is_found(tamper: Callable[[Evidence], None], verdict: str) -> None:
    found = evidence()
    assert judge(found) == []

    tamper(found)

    assert any(verdict in violation for violation in judge(found)), judge(found)


def somebody() -> Process:
    loop = SimulatedLoop(random.Random(1), shuffled=False)  # type: ignore[abstract]
    return Process(1, 0, SimulatedClock(loop, 1))


def deletes(place: Place, tx_id: str) -> Delete:
    return Delete(transactional(TABLES[place[0]]), key_of(place), If((ColumnCondition("tx_id", Operator.EQ, tx_id),)))


def test_a_delete_that_travels_in_the_batch_of_another_is_counted_as_its_own_transactions() -> None:
    """Seed 2017650 did so: a delete of a process that died unanswered, in a batch that its recovery had begun."""
    witness = World(11, CALM).witness
    its_own, taken_along = ("one", 20, 0), ("one", 20, 1)
    mutations = (deletes(its_own, "before"), deletes(taken_along, "before"))
    witness.sent(mutations[:1], "leads")
    witness.sent(mutations[1:], "is taken along")

    witness.wrote(
        somebody(),
        MemoryStorage(),
        Write(mutations, "leads"),
        applied=True,
        fault=None,
    )

    assert witness.at_once == {
        "leads": {("one", key_of(its_own))},
        "is taken along": {("one", key_of(taken_along))},
    }
    assert witness.violations == []


def test_a_record_that_no_transaction_wrote_at_once_is_told() -> None:
    witness = World(11, CALM).witness

    witness.wrote(somebody(), MemoryStorage(), Write((deletes(("one", 20, 0), "x"),), ""), applied=True, fault=None)

    assert any("by no transaction" in violation for violation in witness.violations)
