"""Rare paths that a run must have taken: a simulation that never met them has proven little about them.

What is watched is what storage sees (`witness.py`), what clients are told (`workloads.py`), and which failpoints the
engine passes. A run that is long enough and never hit one of `PROBES` fails.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from infra.failpoints import FAILPOINTS

ENGINE_FAILPOINTS = tuple(
    name
    for name in FAILPOINTS
    if name.split(".")[0]
    in ("intent", "prepare", "validate", "commit_state", "commit_records", "rollback", "one_phase", "recovery")
)

PROBES: dict[str, str] = {
    "abort_lost_to_committed": "whoever cleans up puts ABORTED, and the transaction was committed meanwhile",
    "commit_lost_to_aborted": "a transaction puts COMMITTED, and somebody has aborted it",
    "two_aborts": "two put ABORTED for one transaction",
    "commit_unanswered_then_found": "a COMMITTED put was applied but not answered, and met itself when tried again",
    "abort_unanswered": "an ABORTED put was applied but not answered",
    "late_prepare_after_abort": "a prepare arrived when its transaction was already aborted",
    "late_prepare_after_roll_back": "a prepare arrived when its transaction's other records were rolled back",
    "late_prepare_refused": "a prepare arrived late and its condition no longer held",
    "late_commit_state_lost": "a COMMITTED put arrived late, after ABORTED",
    "late_commit_state_won": "a COMMITTED put arrived late and decided",
    "request_outlived_its_process": "a write was applied whose process had died",
    "recoverer_died_between_abort_and_roll_back": "a recoverer put ABORTED and died before it rolled back",
    "died_between_prepares": "a process died with one atomic unit prepared and another not",
    "died_before_commit_state": "a process died with everything prepared and nothing decided",
    "died_before_commit_records": "a process died after its transaction was committed, with records PREPARED",
    "roll_forward_of_a_put": "a recoverer made a PREPARED record COMMITTED",
    "roll_forward_of_a_delete": "a recoverer removed a DELETED record",
    "roll_back_of_an_update": "a recoverer restored the before-image of a PREPARED record",
    "roll_back_of_a_delete": "a recoverer restored the before-image of a DELETED record",
    "roll_back_of_an_insert": "a recoverer removed a PREPARED record that had no before-image",
    "roll_back_of_a_deemed_committed": "a record that no transaction had written before got its NULL metadata back",
    "recoverer_came_second": "a recoverer found the record settled by somebody else",
    "prepared_again_while_resolved": "a recoverer found the record prepared by another transaction",
    "own_commit_came_second": "a transaction found its records committed by a recoverer",
    "own_roll_back_came_second": "a transaction found its records rolled back by a recoverer",
    "prepared_over_an_unsettled_commit": "a record was prepared over one that was committed but still PREPARED",
    "partly_settled_batch": "of a batch, some records were settled by others and the rest one by one",
    "refused_prepare": "a prepare's condition did not hold",
    "refused_one_phase": "a one-phase commit's condition did not hold",
    "one_phase_unknown_applied": "a one-phase commit was applied but not answered",
    "one_phase_unknown_not_applied": "a one-phase commit was neither applied nor answered",
    "one_phase_late": "a one-phase commit was applied long after its caller gave up",
    "aborted_while_alive": "a transaction was aborted by another process while its own was alive",
    "zombie_prepare_refused": "a process that had been paused tried to prepare a stale record",
    "zombie_commit_refused": "a process that had been paused tried to commit an aborted transaction",
    "expired_by_observation": "a record stamped in the future was aborted because it had been seen for long enough",
    "validation_conflict": "validation refused a transaction",
    "uncommitted_record_met": "a reader met a record whose transaction was under way",
    "unknown_was_committed": "a client was told 'unknown', and it was committed",
    "unknown_was_aborted": "a client was told 'unknown', and it was aborted or undecided",
    "died_and_was_committed": "a client died without an answer, and its transaction was committed",
    "commit_forgotten": "a COMMITTED row was pruned after every record had been settled",
    "abort_forgotten": "an ABORTED row was forgotten, by its own transaction or since its writer was gone",
    "group_committed": "several transactions were committed by one row",
    "member_committed_alone": "a member of a group was committed by a row of its own",
    "group_kept_from_committing": "whoever cleans up put ABORTED for a group that had not decided",
    "group_outran_its_aborter": "whoever cleans up put ABORTED for a group that had decided",
    "group_met_its_aborter": "a group's COMMITTED row met the ABORTED one of whoever cleans up",
    "one_store_down": "one store was down while another served",
} | {f"reached {name}": f"the engine passed the failpoint {name}" for name in ENGINE_FAILPOINTS}


RAREST = frozenset({"group_met_its_aborter"})
"""Paths that only a long run must take: about one seed in a thousand does."""


class Probes:
    """How often each rare path was taken."""

    def __init__(self) -> None:
        self.hits: Counter[str] = Counter()

    def hit(self, name: str) -> None:
        assert name in PROBES, name
        self.hits[name] += 1


def never_hit(hits: Mapping[str, int], *, long_run: bool = False) -> list[str]:
    """The probes that a run did not hit, and should have."""
    return [name for name in PROBES if not hits.get(name) and (long_run or name not in RAREST)]
