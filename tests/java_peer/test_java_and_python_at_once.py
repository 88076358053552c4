"""A Java and a Python program transfer money between the same accounts and append to the same lists, both killed.

Each is held in the middle of a commit, killed there, and must be cleaned up after by the other, which has been working
all along and goes on. In the end everything that anybody was told must fit into one strictly serializable history.

Played by programs that each put a state row for every transaction; by a Python program that commits in groups beside a
Java program which has never heard of groups; and by two that both commit in groups, each in its own way.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import pytest

from infra.consensus_commit.coordinator import CoordinatorStates, group_and_child, id_in_group
from infra.consensus_commit.metadata import is_committed, transactional
from infra.consensus_commit.states import Isolation, TransactionState
from infra.storage.operations import Key, Row, TableSchema
from infra.storage.port import Storage
from scripts.java_peer.processes import Line, PeerProcess
from scripts.proof.histories.checker import lost_appends, violations
from scripts.proof.histories.history import Append, Operation, Outcome, Read, Transaction, Write
from tests.java_peer.conftest import MIXED, MIXED_IN_GROUPS, MIXED_IN_GROUPS_OF_BOTH, Peers
from tests.java_peer.mixed_tables import OPENING_BALANCE, account_table, list_table
from tests.java_peer.python_peer import start_python

ACCOUNTS, LISTS = 8, 6
AT_ONCE = 3
IN_GROUPS_AT_ONCE = 10  # More than groups that prepare at a time: else each transaction is alone.
TOKENS_A_PROGRAM = 1_000_000
COMMITS_BEFORE_A_KILL = 25
# The Python program's clock is late, so that a Java program, which waits for 15 s by its own clock, need not be waited
# for. It also means that each may overrule the other's transaction while that is merely slow: which must be harmless.
LATE_PYTHON = {"lifetime_ms": 4_000, "clock_behind_ms": 11_000}


@dataclass(frozen=True)
class Setting:
    """Where they play, and who is killed when. The coordinator says what Java does: see `COORDINATORS`."""

    coordinator: str
    namespace: str
    group_commit: bool
    kills: tuple[tuple[str, str], ...]
    python_at_once: int = AT_ONCE

    @property
    def account(self) -> TableSchema:
        return account_table(self.namespace)

    @property
    def list(self) -> TableSchema:
        return list_table(self.namespace)


SETTINGS = {
    "one state row for each": Setting(
        "java_plain",
        MIXED,
        False,
        (
            ("java", "commit_state"),
            ("python", "commit_state"),
            ("java", "commit_records"),
            ("python", "commit_records"),
        ),
    ),
    "python in groups": Setting(
        "python_grouping",
        MIXED_IN_GROUPS,
        True,
        (("python", "commit_state"), ("python", "commit_records")),
        IN_GROUPS_AT_ONCE,
    ),
    "both in groups": Setting(
        "java_grouping",
        MIXED_IN_GROUPS_OF_BOTH,
        True,
        (("java", "commit_records"), ("python", "commit_records")),
        IN_GROUPS_AT_ONCE,
    ),
}


class Both:
    """The two programs of the moment, all that there have been, and what they were told to do."""

    def __init__(self, peers: Peers, setting: Setting) -> None:
        self._peers = peers
        self._setting = setting
        self.ever: list[PeerProcess] = []
        self.running: dict[str, tuple[PeerProcess, asyncio.Future[Any]]] = {}

    async def start(self, who: str) -> PeerProcess:
        before_ns = time.monotonic_ns()
        if who == "java":
            program = await self._peers.java(self._setting.coordinator)
        else:
            program = await start_python()
            await program.ask(
                "open",
                port=self._peers.port,
                coordinator=self._setting.coordinator,
                group_commit=self._setting.group_commit,
                **LATE_PYTHON,
            )
        assert before_ns < program.events[0]["now_ns"] < time.monotonic_ns(), "all tell one and the same time"
        self.ever.append(program)
        mixing = program.begin(
            "mix",
            manager=self._setting.coordinator,
            namespace=self._setting.namespace,
            accounts=ACCOUNTS,
            lists=LISTS,
            at_once=self._setting.python_at_once if who == "python" else AT_ONCE,
            seed=len(self.ever),
            tokens_above=len(self.ever) * TOKENS_A_PROGRAM,
        )
        self.running[who] = (program, mixing)
        return program

    async def both_commit(self) -> None:
        """Until each has committed some more."""
        for program, mixing in self.running.values():
            wanted = committed_by(program.events) + COMMITS_BEFORE_A_KILL
            await program.events_until(lambda lines, wanted=wanted: committed_by(lines) >= wanted, during=[mixing])

    async def kill(self, who: str, phase: str) -> set[str]:
        """Kill one as it reaches `phase`; the transactions that it never heard the end of."""
        program, mixing = self.running.pop(who)
        await program.ask("hold", manager=self._setting.coordinator, at=phase)
        await program.event(lambda line: line["event"] == "held")
        await program.kill()
        assert mixing.exception() is not None
        return {own_id(line["tx_id"]) for line in program.events if line["event"] == "trying"}

    async def stop(self) -> None:
        for program, mixing in self.running.values():
            await program.ask("stop", manager=self._setting.coordinator)
            await mixing
            await program.stop()


def committed_by(lines: Iterable[Line]) -> int:
    return sum(line["event"] == "tried" and line["outcome"] == "committed" for line in lines)


def own_id(tx_id: str) -> str:
    """The id without its group's, if it has one: what a transaction is called before and after it joined."""
    in_group = group_and_child(tx_id)
    return tx_id if in_group is None else in_group[1]


async def stored_rows(peers: Peers, setting: Setting) -> list[Row]:
    """Every account and list as it is stored, whatever its state."""
    wanted = [(setting.account, number) for number in range(ACCOUNTS)]
    wanted += [(setting.list, number) for number in range(LISTS)]
    rows = [await peers.storage.get(transactional(table), Key((number,))) for table, number in wanted]
    return [row for row in rows if row is not None]


async def settled_by_the_other(peers: Peers, setting: Setting, dead: set[str], *, seconds: float = 90) -> None:
    """Wait until no record of the dead is in doubt.

    Some were: whoever is held at `commit_state` or `commit_records` has prepared records and settles them no more. The
    other may have done it before this looks for the first time.
    """

    async def in_doubt() -> list[Row]:
        rows = await stored_rows(peers, setting)
        return [row for row in rows if not is_committed(row) and own_id(cast(str, row["tx_id"])) in dead]

    async with asyncio.timeout(seconds):
        while await in_doubt():  # noqa: ASYNC110 - another program is awaited
            await asyncio.sleep(0.2)


async def decided_to_commit(states: CoordinatorStates, storage: Storage) -> tuple[set[str], set[str]]:
    """The transactions that the state table commits, by their ids without a group's; and those that share a row."""
    await states.create_tables()  # It learns which columns the table has.
    committed: set[str] = set()
    in_groups: set[str] = set()
    for partition in await storage.partitions(states.table):
        found = await states.get_state(cast(str, partition[0]))
        if found is not None and found.state is TransactionState.COMMITTED:
            children = [id_in_group(found.tx_id, child_id) for child_id in found.child_ids]
            committed.update(map(own_id, children or [found.tx_id]))
            if len(children) > 1:
                in_groups.update(map(own_id, children))
    return committed, in_groups


LONG = () if os.environ.get("EVERY_STORAGE") else ("both in groups",)
"""What takes a minute more, and is played with `EVERY_STORAGE=1` in the environment."""


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in LONG])
async def test_they_share_accounts_and_lists_and_survive_each_others_deaths(peers: Peers, name: str) -> None:
    setting = SETTINGS[name]
    python = peers.python(setting.coordinator)  # One that forms no groups, to open and to judge.
    async with python.begin() as transaction:
        for number in range(ACCOUNTS):
            await transaction.insert(setting.account, Key((number,)), {"balance": OPENING_BALANCE, "token": None})
        for number in range(LISTS):
            await transaction.insert(setting.list, Key((number,)), {"items": ""})
        await transaction.commit()
    await python.drain()

    both = Both(peers, setting)
    await both.start("java")
    await both.start("python")
    for who, phase in setting.kills:
        await both.both_commit()
        dead = await both.kill(who, phase)
        await settled_by_the_other(peers, setting, dead)
        await both.start(who)
    await both.both_commit()
    await both.stop()

    committed, in_groups = await decided_to_commit(python.states, peers.storage)
    assert bool(in_groups) is setting.group_commit, "groups were formed where they were asked for"
    history, totals = await history_of(both.ever, committed)
    assert violations(history, Isolation.SERIALIZABLE) == []
    assert set(totals) == {ACCOUNTS * OPENING_BALANCE}

    async with python.begin() as transaction:
        accounts = [await transaction.get(setting.account, Key((number,))) for number in range(ACCOUNTS)]
        lists = [await transaction.get(setting.list, Key((number,))) for number in range(LISTS)]
        await transaction.commit()
    await python.drain()
    assert sum(cast(int, row["balance"]) for row in accounts if row) == ACCOUNTS * OPENING_BALANCE

    final = {f"list {number}": tokens(cast(Row, row)["items"]) for number, row in enumerate(lists)}
    assert lost_appends(history, final) == []
    for name, elements in final.items():
        appended = [
            operation.element
            for transaction in history
            if transaction.outcome is Outcome.COMMITTED
            for operation in transaction.operations
            if isinstance(operation, Append) and operation.key == name
        ]
        assert sorted(elements) == sorted(appended)

    writes = {Append: 0, Write: 0}
    for done in history:
        if done.outcome is Outcome.COMMITTED:
            for operation in done.operations:
                if not isinstance(operation, Read):
                    writes[type(operation)] += 1
    rows = await stored_rows(peers, setting)
    assert all(row["tx_state"] == TransactionState.COMMITTED for row in rows)
    versions = [cast(int, row["tx_version"]) for row in rows]
    assert sum(versions[:ACCOUNTS]) == ACCOUNTS + writes[Write]  # two for each transfer
    assert sum(versions[ACCOUNTS:]) == LISTS + writes[Append]


async def history_of(programs: list[PeerProcess], committed: set[str]) -> tuple[list[Transaction], list[int]]:
    """What all programs were told, and the totals that committed audits saw.

    What they were not told, the state table says: a transaction that it does not commit when all is settled never was.
    """
    history: list[Transaction] = []
    totals: list[int] = []
    for number, program in enumerate(programs):
        tried = {own_id(line["tx_id"]): line for line in program.events if line["event"] == "tried"}
        for line in program.events:
            if line["event"] != "trying":
                continue
            tx_id = own_id(line["tx_id"])
            told = tried.get(tx_id)
            heard = "unknown" if told is None else told["outcome"]
            took_effect = heard == "committed" or (heard == "unknown" and tx_id in committed)
            outcome = Outcome.COMMITTED if took_effect else Outcome.ABORTED
            if outcome is Outcome.COMMITTED and line["total"] is not None:
                totals.append(line["total"])
            history.append(
                Transaction(
                    tx_id,
                    f"program {number}",
                    tuple(operation_of(*operation) for operation in line["operations"]),
                    outcome,
                    line["began_ns"],
                    told and told["ended_ns"],
                )
            )
    return history, totals


def operation_of(what: str, table: str, number: int, value: Any) -> Operation:
    key = f"{table} {number}"
    match what, table:
        case "read", "list":
            return Read(key, tokens(value))
        case "read", _:
            return Read(key, value)
        case "append", _:
            return Append(key, value)
        case _:
            return Write(key, value)


def tokens(items: Any) -> tuple[int, ...]:
    return tuple(int(token) for token in items.split(",")) if items else ()
