"""What must hold when a simulation has ended: the verdict on one seed.

Always       what clients were told is what was decided; no record is in doubt; every record holds what the last
             committed of those that prepared it wrote; no token of an aborted transaction was ever read; money is
             constant, and versions count the commits
SNAPSHOT     whoever reads a list sees every token that was acknowledged before it began
SERIALIZABLE every committed transaction can be pinned to one instant at which all that it read was so (`_replay`),
             and, from the lists alone, no order is contradicted by another (`_list_cycle`)

The two checks of SERIALIZABLE know nothing of each other. The replay trusts the witness for when a transaction's last
record was prepared, and checks every get, absence, scan, limit and index read exactly. The cycle check trusts nobody:
the lists tell the order of all appends, who read what tells the rest, and the clients' own clocks tell real time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias, cast

from infra.consensus_commit.states import Isolation, TransactionState
from infra.storage.operations import Row
from scripts.proof.simulation.witness import Witness, begun_as
from scripts.proof.simulation.workloads import BALANCE, Log, Place, Places, Values

Model: TypeAlias = dict[str, dict[tuple[int, int], Values]]


@dataclass(frozen=True)
class Evidence:
    """All that is left of a simulation; `rows` are the stored rows of each namespace."""

    isolation: Isolation
    imported: bool
    places: Places
    logs: Mapping[str, Log]
    witness: Witness
    rows: Mapping[str, list[Row]]


def judge(evidence: Evidence) -> list[str]:
    """Every violation found, in words."""
    violations = list(evidence.witness.violations)
    committed = [log for log in evidence.logs.values() if _is_committed(evidence, log)]
    final = {(namespace, row["part"], row["id"]): row for namespace, rows in evidence.rows.items() for row in rows}
    violations += _answers(evidence)
    violations += _at_rest(evidence)
    violations += _last_writers(evidence, final)
    violations += _money(evidence, committed, final)
    violations += _lists(evidence, committed, final)
    if evidence.isolation is Isolation.SERIALIZABLE:
        violations += _replay(evidence, committed, final)
        violations += _list_cycle(evidence, committed, final)
    return violations


def _is_committed(evidence: Evidence, log: Log) -> bool:
    """Whether a transaction took effect, by the state table or because it was written at once."""
    if evidence.witness.decided.get(log.tx_id) is TransactionState.COMMITTED or log.tx_id in evidence.witness.at_once:
        return True
    return not log.writes and log.answer == "committed"


def _answers(evidence: Evidence) -> list[str]:
    found = []
    for log in evidence.logs.values():
        is_committed = _is_committed(evidence, log)
        if log.answer == "committed" and not is_committed:
            found.append(f"{log.tx_id} was acknowledged and is not committed")
        if log.answer == "aborted" and is_committed:
            found.append(f"{log.tx_id} was answered as aborted and is committed")
        if is_committed and log.writes:
            written = evidence.witness.prepared.get(log.tx_id) or evidence.witness.at_once.get(log.tx_id) or set()
            places = {(namespace, key.partition[0], key.clustering[0]) for namespace, key in written}
            if places != set(log.writes):
                found.append(f"{log.tx_id} is committed with {len(places)} of its {len(log.writes)} records")
        if not log.writes and log.tx_id in evidence.witness.decided:
            found.append(f"{log.tx_id} only read and has a state row")
    return found


def _at_rest(evidence: Evidence) -> list[str]:
    return [
        f"{namespace} {row['part']!s} {row['id']!s} is left in state {row['tx_state']!s} by {row['tx_id']!s}"
        for namespace, rows in evidence.rows.items()
        for row in rows
        if row["tx_id"] is not None
        and (row["tx_state"] != TransactionState.COMMITTED or any(row[name] is not None for name in _BEFORE))
    ]


_BEFORE = ("before_tx_id", "before_tx_state", "before_tx_version", "before_value", "before_note", "before_color")


def _last_writers(evidence: Evidence, final: Mapping[Any, Row]) -> list[str]:
    """Each record holds what the last committed transaction in its chain left."""
    found = []
    for (namespace, key), chain in evidence.witness.chains.items():
        place: Place = (namespace, cast(int, key.partition[0]), cast(int, key.clustering[0]))
        effective = [t for t in chain if t in evidence.logs and _is_committed(evidence, evidence.logs[t])]
        row = final.get(place)
        if not effective:
            initial = place in evidence.places.initial()
            if (row is None) == initial or (row is not None and row["tx_id"] not in (None, "initial")):
                found.append(f"{place} was never written by a committed transaction, and changed")
            continue
        last = evidence.logs[effective[-1]]
        deleted = last.writes[place][0] == "delete"
        if (row is None) != deleted or (row is not None and begun_as(str(row["tx_id"])) != last.tx_id):
            found.append(f"{place} should be as {last.tx_id} left it, and is as {row and row['tx_id']!s} did")
    return found


def _money(evidence: Evidence, committed: list[Log], final: Mapping[Any, Row]) -> list[str]:
    accounts = [final.get(place) for place in evidence.places.accounts]
    if None in accounts:
        return ["an account is gone"]
    found = []
    total = sum(row["value"] for row in accounts)  # type: ignore[index, misc]
    if total != BALANCE * len(accounts):
        found.append(f"accounts hold {total} instead of {BALANCE * len(accounts)}")
    versions = sum(row["tx_version"] or 0 for row in accounts)  # type: ignore[index, misc]
    transfers = sum(log.kind == "transfer" for log in committed)
    expected = (0 if evidence.imported else len(accounts)) + 2 * transfers
    if versions != expected:
        found.append(f"versions of accounts add up to {versions}; {transfers} transfers make {expected}")
    return found


def _tokens(values: Any) -> list[str]:
    return str(values[1]).split() if values is not None else []


def _final_list(final: Mapping[Any, Row], place: Place) -> list[str]:
    row = final.get(place)
    return str(row["note"]).split() if row is not None else []


def _lists(evidence: Evidence, committed: list[Log], final: Mapping[Any, Row]) -> list[str]:
    """Each committed append is in its list once and nothing else is; whoever read a list saw a beginning of it."""
    found = []
    for place in evidence.places.lists:
        tokens = _final_list(final, place)
        appended = sorted(log.tx_id for log in committed if place in log.writes)
        if sorted(tokens) != appended:
            found.append(f"{place} holds {len(tokens)} appends of {len(appended)}: lost or doubled")
        for log in evidence.logs.values():
            for read in log.reads:
                if read[0] == "get" and read[1] == place:
                    seen = _tokens(read[2])
                    if seen != tokens[: len(seen)]:
                        found.append(f"{log.tx_id} saw in {place} what never was committed in this order")
                    elif evidence.isolation is Isolation.SNAPSHOT:
                        unseen = (evidence.logs[token] for token in tokens[len(seen) :] if token in evidence.logs)
                        if any(other.answer == "committed" and other.ended_at < log.began_at for other in unseen):
                            found.append(f"{log.tx_id} did not see in {place} what was acknowledged before it began")
    return found


# -- SERIALIZABLE, by the witness


def _replay(evidence: Evidence, committed: list[Log], final: Mapping[Any, Row]) -> list[str]:
    """Play the committed transactions one after another, each at an instant at which all that it read was so.

    From when its last record was prepared until it was decided, its writes are locked, so that any instant in between
    will do. Nearly always the first does; only an absence that was interrupted (a record inserted and deleted by
    others between reading and validating) makes it a later one.
    """
    model: Model = {namespace: {} for namespace in evidence.places.namespaces}
    for (namespace, part, number), values in evidence.places.initial().items():
        model[namespace][(part, number)] = values
    witness = evidence.witness

    def earliest(log: Log) -> int:
        return witness.pinned_at.get(log.tx_id, log.committing_at) if log.writes else log.committing_at

    def latest(log: Log) -> int:
        return witness.decided_at.get(log.tx_id, earliest(log)) if log.writes else log.ended_at

    found: list[str] = []
    waiting: list[Log] = []

    def play(log: Log) -> bool:
        if any(_read_now(model, read) != read[-1] for read in log.reads):
            return False
        for place, (verb, columns) in log.writes.items():
            problem = _write_now(model, place, verb, columns)
            if problem:
                found.append(f"{log.tx_id} ({log.kind}): {problem}")
        return True

    def play_waiting(now: int) -> None:
        progress = True
        while progress:
            progress = False
            for log in list(waiting):
                if play(log):
                    waiting.remove(log)
                    progress = True
                elif latest(log) < now:
                    waiting.remove(log)
                    wrong = [read for read in log.reads if _read_now(model, read) != read[-1]]
                    found.append(f"{log.tx_id} ({log.kind}) read what at no instant was so: {wrong}")

    for log in sorted(committed, key=earliest):
        if waiting:
            play_waiting(earliest(log))
        if not play(log):
            waiting.append(log)
        elif waiting:
            play_waiting(earliest(log))
    play_waiting(witness.instant + 1)
    for namespace, records in model.items():
        stored = {
            (row["part"], row["id"]): (row["value"], row["note"], row["color"]) for row in evidence.rows[namespace]
        }
        if stored != records:
            found.append(f"{namespace} does not hold what its committed transactions wrote")
    return found


def _read_now(model: Model, read: tuple[Any, ...]) -> Any:
    match read:
        case ("get", (namespace, part, number), _):
            return model[namespace].get((part, number))
        case ("everywhere", namespace, color, _):
            return frozenset(
                (*at, values) for at, values in model[namespace].items() if color is None or values[2] == color
            )
        case ("scan", namespace, part, first, limit, reverse, color, _):
            rows = [
                (*at, values)
                for at, values in sorted(model[namespace].items(), reverse=reverse)
                if at[0] == part and (first is None or at[1] >= first) and (color is None or values[2] == color)
            ]
            return tuple(rows[:limit] if limit else rows)
    raise AssertionError(read)


def _write_now(model: Model, place: Place, verb: str, columns: Mapping[str, Any]) -> str:
    namespace, *at = place
    records = model[namespace]
    before = records.get((at[0], at[1]))
    if verb == "delete":
        records.pop((at[0], at[1]), None)
        return ""
    if verb in ("insert", "put") and before is not None:
        return f"{verb} of {place}, which is there"
    value, note, color = before or (None, None, None)
    records[(at[0], at[1])] = (
        columns.get("value", value),
        columns.get("note", note),
        columns.get("color", color),
    )
    return ""


# -- SERIALIZABLE, by the lists alone


def _list_cycle(evidence: Evidence, committed: list[Log], final: Mapping[Any, Row]) -> list[str]:
    """A cycle of write-write, write-read, read-write and real-time edges among transactions that touched lists."""
    after: dict[str, set[str]] = {log.tx_id: set() for log in committed}
    for place in evidence.places.lists:
        order = _final_list(final, place)
        for earlier, later in pairwise(order):
            if earlier in after:
                after[earlier].add(later)
        for log in committed:
            for read in log.reads:
                if read[0] == "get" and read[1] == place:
                    seen = len(_tokens(read[2]))
                    if 0 < seen <= len(order) and order[seen - 1] in after and order[seen - 1] != log.tx_id:
                        after[order[seen - 1]].add(log.tx_id)
                    if seen < len(order) and order[seen] != log.tx_id:
                        after[log.tx_id].add(order[seen])
    for log in committed:
        if log.answer == "committed":  # What was answered otherwise may take effect any time later.
            after[log.tx_id].update(other.tx_id for other in committed if other.began_at > log.ended_at)
    cycle = _cycle(after)
    return [f"no order explains the lists: {' -> '.join(cycle)}"] if cycle else []


def _cycle(after: Mapping[str, set[str]]) -> list[str]:
    """Some cycle, or nothing. Transactions without predecessors are taken away until none is left."""
    before = dict.fromkeys(after, 0)
    for successors in after.values():
        for successor in successors & before.keys():
            before[successor] += 1
    free = [tx_id for tx_id, count in before.items() if not count]
    left = len(before)
    while free:
        left -= 1
        for successor in after[free.pop()] & before.keys():
            before[successor] -= 1
            if not before[successor]:
                free.append(successor)
    if not left:
        return []
    return sorted(tx_id for tx_id, count in before.items() if count)
