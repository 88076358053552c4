"""Who depends on whom: the order of each record's versions, and the edges that follow from it.

    ww    the target made the version after one that the source made
    wr    the target read a version that the source made
    rw    the source read a version, and the target made the next (an anti-dependency)
    rt    the source had ended before the target began (real time)

A list shows the order of its versions in every read (this is why Elle prefers lists). For registers the order comes
from their version numbers, or, where those are not known, from transactions that read one value and wrote another.
On the way, everything comes to light that needs no graph: aborted and intermediate reads, values that nobody wrote,
lists that are not prefixes of each other, updates made from a version that was not the last.

Source: Kingsbury and Alvaro, "Elle: Inferring Isolation Anomalies from Experimental Observations" (VLDB 2020).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from scripts.proof.histories.history import Append, Outcome, Read, RecordKey, Transaction, Write

Elements = tuple[int, ...]


class Kind(StrEnum):
    WW = "ww"
    WR = "wr"
    RW = "rw"
    RT = "rt"


class Class(StrEnum):
    """Anomalies by Adya's names; `-realtime` where the cycle needs the order of real time."""

    GARBAGE_READ = "garbage read"
    DUPLICATE = "duplicate element"
    INTERNAL = "internal"
    INCOMPATIBLE_ORDER = "incompatible order"
    LOST_WRITE = "lost write"
    ABORTED_READ = "G1a"
    INTERMEDIATE_READ = "G1b"
    LOST_UPDATE = "P4"
    WRITE_CYCLE = "G0"
    CIRCULAR_FLOW = "G1c"
    READ_SKEW = "G-single"
    ANTI_DEPENDENCY_CYCLE = "G2"
    WRITE_CYCLE_IN_TIME = "G0-realtime"
    CIRCULAR_FLOW_IN_TIME = "G1c-realtime"
    READ_SKEW_IN_TIME = "G-single-realtime"
    ANTI_DEPENDENCY_CYCLE_IN_TIME = "G2-realtime"


@dataclass(frozen=True, slots=True)
class Anomaly:
    """One thing that went wrong, and why it is one, in words. `transactions` holds their ids."""

    kind: Class
    transactions: tuple[str, ...]
    explanation: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.explanation}"


@dataclass(frozen=True, slots=True)
class Dependency:
    """One edge, between positions in the history. `seen` and `made` are the versions it speaks of."""

    kind: Kind
    source: int
    target: int
    key: RecordKey = None
    seen: object = None
    made: object = None

    def explain(self, names: Sequence[str]) -> str:
        source, target = names[self.source], names[self.target]
        match self.kind:
            case Kind.WW:
                return f"{source} wrote {self.seen} to {self.key}, and {target} wrote {self.made} after it"
            case Kind.WR:
                return f"{source} wrote {self.seen} to {self.key}, and {target} read it"
            case Kind.RW:
                seen = "without any value" if self.seen is None else f"when {self.seen} was its last value"
                return f"{source} read {self.key} {seen}, and {target} wrote {self.made} after that"
            case Kind.RT:
                return f"{source} had ended before {target} began"


@dataclass(slots=True)
class Inference:
    """What the operations alone say: edges, and anomalies that need no cycle."""

    dependencies: list[Dependency] = field(default_factory=list)
    anomalies: list[Anomaly] = field(default_factory=list)

    def add(self, kind: Kind, source: int, target: int, key: RecordKey, seen: object, made: object) -> None:
        if source != target:
            self.dependencies.append(Dependency(kind, source, target, key, seen, made))


@dataclass(frozen=True, slots=True)
class _Writer:
    """The transaction that wrote a value, and whether it was its last word on that record."""

    transaction: int
    final: bool


def _writers(history: Sequence[Transaction]) -> dict[tuple[RecordKey, int], _Writer]:
    """Who wrote each value. Raises ValueError for a history that writes a value twice: it proves nothing."""
    writers: dict[tuple[RecordKey, int], _Writer] = {}
    for number, transaction in enumerate(history):
        last: dict[RecordKey, int] = {}
        for operation in transaction.operations:
            if isinstance(operation, Read):
                continue
            value = operation.element if isinstance(operation, Append) else operation.value
            if (operation.key, value) in writers:
                raise ValueError(f"{value} is written twice to {operation.key}: values must be unique")
            if operation.key in last:
                writers[(operation.key, last[operation.key])] = _Writer(number, final=False)
            writers[(operation.key, value)] = _Writer(number, final=True)
            last[operation.key] = value
    return writers


def _values(read: Read) -> Elements:
    if isinstance(read.value, tuple):
        return read.value
    return () if read.value is None else (read.value,)


def took_effect(history: Sequence[Transaction]) -> list[int]:
    """Positions of the transactions that committed: those said to, and unknown ones whose writes one of them saw."""
    writers = _writers(history)
    effective = [number for number, transaction in enumerate(history) if transaction.outcome is Outcome.COMMITTED]
    known = set(effective)
    waiting = list(effective)
    while waiting:
        for operation in history[waiting.pop()].operations:
            for value in _values(operation) if isinstance(operation, Read) else ():
                writer = writers.get((operation.key, value))
                unheard = writer is not None and history[writer.transaction].outcome is Outcome.UNKNOWN
                if writer is not None and unheard and writer.transaction not in known:
                    known.add(writer.transaction)
                    waiting.append(writer.transaction)
    return sorted(known)


def real_time(history: Sequence[Transaction], effective: Iterable[int]) -> Iterator[Dependency]:
    """Edges of real time, without those that follow from others."""
    events: list[tuple[int, int, int]] = []
    for number in effective:
        transaction = history[number]
        events.append((transaction.began_at, 0, number))
        if transaction.ended_at is not None:
            events.append((transaction.ended_at, 1, number))
    events.sort()  # What ends at the instant at which another begins has not ended before it.
    ended: set[int] = set()  # Those that nobody who began later has outlived.
    before: dict[int, frozenset[int]] = {}
    for _, is_end, number in events:
        if not is_end:
            before[number] = frozenset(ended)
            for earlier in sorted(ended):
                yield Dependency(Kind.RT, earlier, number)
        else:
            ended -= before.pop(number)
            ended.add(number)


def infer(history: Sequence[Transaction]) -> Inference:
    """Edges and plain anomalies of lists and registers. A record is one or the other, never both."""
    inference = Inference()
    names = [transaction.id for transaction in history]
    writers = _writers(history)
    effective = took_effect(history)
    lists: dict[RecordKey, list[_ListUse]] = defaultdict(list)
    registers: dict[RecordKey, list[_RegisterUse]] = defaultdict(list)
    for number in effective:
        for key, use in _own_view(history[number], number, inference):
            if isinstance(use, _ListUse):
                lists[key].append(use)
            else:
                registers[key].append(use)
    for key, list_uses in lists.items():
        _infer_list(key, list_uses, history, names, writers, inference)
    for key, register_uses in registers.items():
        _infer_register(key, register_uses, history, names, writers, inference)
    return inference


@dataclass(slots=True)
class _ListUse:
    """What one transaction did with one list: what it found there (before its own appends), and what it added."""

    transaction: int
    found: list[Elements] = field(default_factory=list)
    found_before_writing: Elements | None = None
    added: list[int] = field(default_factory=list)
    whole: Elements = ()
    """The longest it saw, its own elements included."""


@dataclass(slots=True)
class _RegisterUse:
    """What one transaction did with one register."""

    transaction: int
    found: list[int | None] = field(default_factory=list)
    found_before_writing: bool = False
    written: list[int] = field(default_factory=list)
    version: int | None = None


_Use = _ListUse | _RegisterUse


def _own_view(transaction: Transaction, number: int, inference: Inference) -> Iterator[tuple[RecordKey, _Use]]:
    """What one transaction did with each record; what contradicts its own writes is told at once."""
    uses: dict[RecordKey, _Use] = {}
    for operation in transaction.operations:
        of_list = isinstance(operation, Append) or (isinstance(operation, Read) and isinstance(operation.value, tuple))
        use = uses.get(operation.key)
        if use is None:
            # A register that was read as absent looks like neither: it is a register unless it is used as a list.
            use = uses[operation.key] = _ListUse(number) if of_list else _RegisterUse(number)
        match use, operation:
            case _ListUse(), Append(element=element):
                use.added.append(element)
            case _ListUse(), Read(value=tuple() as value):
                own = tuple(use.added)
                if own and value[-len(own) :] != own:
                    text = f"{transaction.id} had appended {list(own)} to {operation.key} and then read {list(value)}"
                    inference.anomalies.append(Anomaly(Class.INTERNAL, (transaction.id,), text))
                    continue
                found = value[: len(value) - len(own)]
                use.found.append(found)
                if not own:
                    use.found_before_writing = found
                use.whole = max(use.whole, value, key=len)
            case _RegisterUse(), Write(value=value, version=version):
                use.written.append(value)
                use.version = version
            case _RegisterUse(), Read(value=int() | None as value):
                if not use.written:
                    use.found.append(value)
                    use.found_before_writing = True
                elif value != use.written[-1]:
                    text = f"{transaction.id} had written {use.written[-1]} to {operation.key} and then read {value}"
                    inference.anomalies.append(Anomaly(Class.INTERNAL, (transaction.id,), text))
            case _:
                raise ValueError(f"{operation.key} is used as a list and as a register")
    yield from uses.items()


def _check_origin(
    key: RecordKey,
    reader: int,
    value: int,
    history: Sequence[Transaction],
    writers: Mapping[tuple[RecordKey, int], _Writer],
    inference: Inference,
    *,
    last: bool,
) -> None:
    """Whether a value that was read could have been: somebody wrote it, did not abort, and meant it to last."""
    writer = writers.get((key, value))
    name = history[reader].id
    if writer is None:
        text = f"{name} read {value} of {key}, which nobody wrote"
        inference.anomalies.append(Anomaly(Class.GARBAGE_READ, (name,), text))
        return
    author = history[writer.transaction]
    if author.outcome is Outcome.ABORTED:
        text = f"{name} read {value} of {key}, which {author.id} wrote, and {author.id} aborted"
        inference.anomalies.append(Anomaly(Class.ABORTED_READ, (name, author.id), text))
    elif last and not writer.final and writer.transaction != reader:
        text = f"{name} read {value} of {key}, after which {author.id} wrote to {key} again"
        inference.anomalies.append(Anomaly(Class.INTERMEDIATE_READ, (name, author.id), text))


def _infer_list(
    key: RecordKey,
    list_uses: Sequence[_ListUse],
    history: Sequence[Transaction],
    names: Sequence[str],
    writers: Mapping[tuple[RecordKey, int], _Writer],
    inference: Inference,
) -> None:
    order: Elements = max((use.whole for use in list_uses), key=len, default=())
    longest_reader = next((use.transaction for use in list_uses if use.whole == order), 0)
    if len(set(order)) != len(order):
        twice = sorted({element for element in order if order.count(element) > 1})
        text = f"{names[longest_reader]} read {list(order)} of {key}: {twice} more than once"
        inference.anomalies.append(Anomaly(Class.DUPLICATE, (names[longest_reader],), text))

    def author(position: int) -> int | None:
        writer = writers.get((key, order[position]))
        return None if writer is None else writer.transaction

    checked = 0  # Prefixes of one order share their origins: each element is checked in the first read that shows it.
    for use in sorted(list_uses, key=lambda use: len(use.whole)):
        for found in dict.fromkeys([*use.found, use.whole]):
            if found != order[: len(found)]:
                pair = (names[use.transaction], names[longest_reader])
                text = f"{pair[0]} read {list(found)} of {key}, and {pair[1]} read {list(order)}: no prefix"
                inference.anomalies.append(Anomaly(Class.INCOMPATIBLE_ORDER, pair, text))
                for element in found:
                    _check_origin(key, use.transaction, element, history, writers, inference, last=False)
                continue
            for element in found[checked:]:
                _check_origin(key, use.transaction, element, history, writers, inference, last=False)
            checked = max(checked, len(found))
            if found and author(len(found) - 1) != use.transaction:
                _check_last(key, use.transaction, found[-1], history, writers, inference)

    position_of = {element: position for position, element in enumerate(order)}
    for use in list_uses:
        positions = [position_of[element] for element in use.added if element in position_of]
        if positions != sorted(positions):
            name = names[use.transaction]
            text = f"{name} appended {use.added} to {key}, and they came out as {list(order)}"
            inference.anomalies.append(Anomaly(Class.INCOMPATIBLE_ORDER, (name,), text))

    unseen = [(use.transaction, use.added[0]) for use in list_uses if use.added and not set(use.added) & set(order)]
    for position in range(1, len(order)):
        before, after = author(position - 1), author(position)
        if before is not None and after is not None:
            inference.add(Kind.WW, before, after, key, order[position - 1], order[position])
    last_author = author(len(order) - 1) if order else None
    for transaction, element in unseen:
        if last_author is not None:
            inference.add(Kind.WW, last_author, transaction, key, order[-1], element)
    for use in list_uses:
        for found in dict.fromkeys(use.found):
            if found != order[: len(found)]:
                continue
            seen = found[-1] if found else None
            source = author(len(found) - 1) if found else None
            if source is not None:
                inference.add(Kind.WR, source, use.transaction, key, seen, None)
            following = [(author(len(found)), order[len(found)])] if len(found) < len(order) else unseen
            for target, element in following:
                if target is not None:
                    inference.add(Kind.RW, use.transaction, target, key, seen, element)

    updates: dict[Elements, list[_ListUse]] = defaultdict(list)
    for use in list_uses:
        if use.added and use.found_before_writing is not None:
            updates[use.found_before_writing].append(use)
    for found, updaters in updates.items():
        for use in updaters:
            next_author = author(len(found)) if found == order[: len(found)] and len(found) < len(order) else None
            overtaken = _overtaken(use, updaters, next_author, names)
            if overtaken is not None:
                text = f"{overtaken[0]} read {list(found)} of {key} and appended to that, and so did {overtaken[1]}"
                inference.anomalies.append(Anomaly(Class.LOST_UPDATE, overtaken, text))


def _overtaken(
    use: _ListUse | _RegisterUse,
    updaters: Sequence[_ListUse] | Sequence[_RegisterUse],
    known: int | None,
    names: Sequence[str],
) -> tuple[str, str] | None:
    """The names of one that wrote over what it had found and of one that had done so too; None if there is no other.

    The other is the `known` one, or else any of the `updaters`, which had found the same.
    """
    overtaker = known
    if overtaker is None and len(updaters) > 1:
        overtaker = next(other.transaction for other in updaters if other is not use)
    if overtaker is None or overtaker == use.transaction:
        return None
    return names[use.transaction], names[overtaker]


def _check_last(
    key: RecordKey,
    reader: int,
    value: int,
    history: Sequence[Transaction],
    writers: Mapping[tuple[RecordKey, int], _Writer],
    inference: Inference,
) -> None:
    writer = writers.get((key, value))
    if writer is not None and history[writer.transaction].outcome is not Outcome.ABORTED:
        _check_origin(key, reader, value, history, writers, inference, last=True)


def _infer_register(
    key: RecordKey,
    register_uses: Sequence[_RegisterUse],
    history: Sequence[Transaction],
    names: Sequence[str],
    writers: Mapping[tuple[RecordKey, int], _Writer],
    inference: Inference,
) -> None:
    readers: dict[int | None, list[int]] = defaultdict(list)
    for use in register_uses:
        for value in dict.fromkeys(use.found):
            if value is not None:
                _check_origin(key, use.transaction, value, history, writers, inference, last=True)
                if (writer := writers.get((key, value))) is not None:
                    inference.add(Kind.WR, writer.transaction, use.transaction, key, value, None)
            readers[value].append(use.transaction)

    updates: dict[int | None, list[_RegisterUse]] = defaultdict(list)
    for use in register_uses:
        if use.written and use.found_before_writing:
            updates[use.found[-1]].append(use)

    last_of = {use.written[-1]: use for use in register_uses if use.written}
    successions = list(_successions(key, last_of, updates, names, inference))
    for before, after in successions:
        target = last_of[after].transaction
        if before is not None:
            inference.add(Kind.WW, last_of[before].transaction, target, key, before, after)
        for reader in readers.get(before, ()):
            inference.add(Kind.RW, reader, target, key, before, after)

    next_of = dict(successions) if all(use.version is not None for use in last_of.values()) else {}
    for found, updaters in updates.items():
        for use in updaters:
            overtaken_by = next_of.get(found)
            known = None if overtaken_by is None else last_of[overtaken_by].transaction
            overtaken = _overtaken(use, updaters, known, names)
            if overtaken is not None:
                writer, between = overtaken
                text = f"{writer} read {found} of {key} and wrote {use.written[-1]}, but {between} came in between"
                inference.anomalies.append(Anomaly(Class.LOST_UPDATE, overtaken, text))


def _successions(
    key: RecordKey,
    last_of: Mapping[int, _RegisterUse],
    updates: Mapping[int | None, Sequence[_RegisterUse]],
    names: Sequence[str],
    inference: Inference,
) -> Iterator[tuple[int | None, int]]:
    """Pairs of values of which the second came after the first: neighbours, if every version is known."""
    if all(use.version is not None for use in last_of.values()):
        by_version: dict[int, int] = {}
        for value, use in last_of.items():
            assert use.version is not None
            other = by_version.setdefault(use.version, value)
            if other != value:
                pair = (names[last_of[other].transaction], names[use.transaction])
                text = f"{pair[0]} and {pair[1]} both made version {use.version} of {key}: {other} and {value}"
                inference.anomalies.append(Anomaly(Class.LOST_UPDATE, pair, text))
        before: int | None = None
        for version in sorted(by_version):
            yield before, by_version[version]
            before = by_version[version]
        return
    for value in last_of:
        yield None, value
    for found, updaters in updates.items():
        if found is not None and found in last_of:
            yield from ((found, use.written[-1]) for use in updaters)
