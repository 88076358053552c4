"""Cycles among dependencies, each with its class and its reasons.

A class is named by the edges that its cycles are made of: one edge of `through`, and a way back over `back`. Whether
there is a way back is known without walking it: `back` has strongly connected components, and among these
reachability is kept as one large integer for each, a bit for every component. Only the cycles that are reported are
walked, shortest first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scripts.proof.histories.dependencies import Anomaly, Class, Dependency, Kind

Edges = dict[int, dict[int, Dependency]]
"""Source -> target -> why."""

_EXAMINED = 24
_REPORTED = 3


@dataclass(frozen=True, slots=True)
class _Rule:
    kind: Class
    through: Kind
    back: frozenset[Kind]

    @property
    def in_time(self) -> bool:
        return Kind.RT in self.back


_WW, _WR, _RW, _RT = Kind.WW, Kind.WR, Kind.RW, Kind.RT
_RULES = (
    _Rule(Class.WRITE_CYCLE, _WW, frozenset({_WW})),
    _Rule(Class.CIRCULAR_FLOW, _WR, frozenset({_WW, _WR})),
    _Rule(Class.READ_SKEW, _RW, frozenset({_WW, _WR})),
    _Rule(Class.ANTI_DEPENDENCY_CYCLE, _RW, frozenset({_WW, _WR, _RW})),
    _Rule(Class.WRITE_CYCLE_IN_TIME, _RT, frozenset({_WW, _RT})),
    _Rule(Class.CIRCULAR_FLOW_IN_TIME, _WR, frozenset({_WW, _WR, _RT})),
    _Rule(Class.READ_SKEW_IN_TIME, _RW, frozenset({_WW, _WR, _RT})),
    _Rule(Class.ANTI_DEPENDENCY_CYCLE_IN_TIME, _RW, frozenset({_WW, _WR, _RW, _RT})),
)


def find_cycles(dependencies: Iterable[Dependency], names: Sequence[str]) -> list[Anomaly]:
    """At most three cycles of each class. `names` are the transactions that the positions in the edges stand for."""
    by_kind: dict[Kind, Edges] = {kind: {} for kind in Kind}
    for dependency in dependencies:
        by_kind[dependency.kind].setdefault(dependency.source, {}).setdefault(dependency.target, dependency)
    component = components(_union(by_kind, frozenset(Kind)))
    for kind, edges in by_kind.items():  # Only what lies within a component can lie on a cycle.
        by_kind[kind] = {
            source: inside
            for source, targets in edges.items()
            if (inside := {target: why for target, why in targets.items() if component[source] == component[target]})
        }
    if not any(by_kind.values()):
        return []
    found: list[Anomaly] = []
    milder: set[Dependency] = set()  # Anti-dependencies whose cycle has no other one are no G2.
    for rule in _RULES:
        back = _union(by_kind, rule.back)
        closing = _closing(by_kind[rule.through], back)
        if rule.kind in (Class.READ_SKEW, Class.READ_SKEW_IN_TIME):
            milder.update(closing)
        elif rule.through is _RW:
            closing = [edge for edge in closing if edge not in milder]
        cycles = [[edge, *_way(back, edge.target, edge.source)] for edge in closing[:_EXAMINED]]
        if rule.in_time:
            cycles = [cycle for cycle in cycles if any(edge.kind is _RT for edge in cycle)]
        for cycle in sorted(cycles, key=len)[:_REPORTED]:
            found.append(_anomaly(rule.kind, cycle, names))
    return found


def _anomaly(kind: Class, cycle: Sequence[Dependency], names: Sequence[str]) -> Anomaly:
    members = [names[edge.source] for edge in cycle]
    lines = [" → ".join([*members, members[0]])]
    lines += [f"    {edge.kind}  {edge.explain(names)}" for edge in cycle]
    return Anomaly(kind, tuple(members), "\n".join(lines))


def _union(by_kind: dict[Kind, Edges], kinds: frozenset[Kind]) -> Edges:
    """The edges of several kinds, one for each pair: data before real time, writes before reads."""
    union: Edges = {}
    for kind in Kind:
        if kind in kinds:
            for source, targets in by_kind[kind].items():
                mine = union.setdefault(source, {})
                for target, why in targets.items():
                    mine.setdefault(target, why)
    return union


def _closing(edges: Edges, back: Edges) -> list[Dependency]:
    """Those of `edges` whose target leads back to their source over `back`."""
    if not edges:
        return []
    component = components(back)
    reach = _reach(back, component)
    closing: list[Dependency] = []
    for source, targets in edges.items():
        home = component.get(source)
        if home is None:
            continue
        for target, edge in targets.items():
            away = component.get(target)
            if away is not None and (away == home or reach[away] >> home & 1):
                closing.append(edge)
    return closing


def components(edges: Edges) -> dict[int, int]:
    """The strongly connected component of each node that has an edge, numbered so that edges lead downwards.

    Tarjan's algorithm, with a stack of its own.
    """
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    component: dict[int, int] = {}
    path: list[int] = []
    nodes = [*edges, *(target for targets in edges.values() for target in targets)]
    nothing: dict[int, Dependency] = {}
    count = 0
    for root in nodes:
        if root in index:
            continue
        index[root] = low[root] = len(index)
        path.append(root)
        work = [(root, iter(edges.get(root, nothing)))]
        while work:
            node, targets = work[-1]
            for target in targets:
                if target not in index:
                    index[target] = low[target] = len(index)
                    path.append(target)
                    work.append((target, iter(edges.get(target, nothing))))
                    break
                if target not in component:
                    low[node] = min(low[node], index[target])
            else:
                work.pop()
                if work:
                    parent = work[-1][0]
                    low[parent] = min(low[parent], low[node])
                if low[node] == index[node]:
                    while True:
                        member = path.pop()
                        component[member] = count
                        if member == node:
                            break
                    count += 1
    return component


def _reach(edges: Edges, component: dict[int, int]) -> list[int]:
    """For each component, the set of components that can be reached from it, as bits."""
    neighbours: list[set[int]] = [set() for _ in range(max(component.values(), default=-1) + 1)]
    for source, targets in edges.items():
        home = component[source]
        neighbours[home].update(component[target] for target in targets)
    reach: list[int] = []
    for home, others in enumerate(neighbours):  # A component's edges lead to smaller numbers only.
        bits = 0
        for other in others:
            if other != home:
                bits |= reach[other] | 1 << other
        reach.append(bits)
    return reach


def _way(edges: Edges, start: int, goal: int) -> list[Dependency]:
    """A shortest way, which must exist."""
    came_by: dict[int, Dependency] = {}
    waiting = deque([start])
    while waiting:
        node = waiting.popleft()
        if node == goal:
            break
        for target, edge in edges.get(node, {}).items():
            if target != start and target not in came_by:
                came_by[target] = edge
                waiting.append(target)
    way: list[Dependency] = []
    node = goal
    while node != start:
        way.append(came_by[node])
        node = way[-1].source
    return way[::-1]
