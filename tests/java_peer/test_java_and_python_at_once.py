"""A Java and a Python program transfer money between the same accounts and append to the same lists, both killed.

Each is held in the middle of a commit, killed there, and must be cleaned up after by the other, which has been working
all along and goes on. In the end everything that anybody was told must fit into one strictly serializable history.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Any, cast

from infra.consensus_commit.manager import TransactionManager
from infra.consensus_commit.metadata import is_committed, transactional
from infra.consensus_commit.states import Isolation, TransactionState
from infra.storage.operations import Key, Row
from scripts.java_peer.processes import Line, PeerProcess
from scripts.proof.histories.checker import lost_appends, violations
from scripts.proof.histories.history import Append, Operation, Outcome, Read, Transaction, Write
from tests.java_peer.conftest import MIXED, Peers
from tests.java_peer.mixed_tables import OPENING_BALANCE, account_table, list_table
from tests.java_peer.python_peer import start_python

ACCOUNTS, LISTS = 8, 6
AT_ONCE = 3
TOKENS_A_PROGRAM = 1_000_000
COMMITS_BEFORE_A_KILL = 25
COORDINATOR = "java_plain"
ACCOUNT, LIST = account_table(MIXED), list_table(MIXED)

# The Python program's clock is late, so that a Java program, which waits for 15 s by its own clock, need not be waited
# for. It also means that each may overrule the other's transaction while that is merely slow: which must be harmless.
LATE_PYTHON = {"coordinator": COORDINATOR, "lifetime_ms": 4_000, "clock_behind_ms": 11_000}


class Both:
    """The two programs of the moment, all that there have been, and what they were told to do."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self.ever: list[PeerProcess] = []
        self.running: dict[str, tuple[PeerProcess, asyncio.Future[Any]]] = {}

    async def start(self, who: str) -> PeerProcess:
        before_ns = time.monotonic_ns()
        if who == "java":
            program = await self._peers.java(COORDINATOR)
        else:
            program = await start_python()
            await program.ask("open", port=self._peers.port, **LATE_PYTHON)
        assert before_ns < program.events[0]["now_ns"] < time.monotonic_ns(), "all tell one and the same time"
        self.ever.append(program)
        mixing = program.begin(
            "mix",
            manager=COORDINATOR,
            namespace=MIXED,
            accounts=ACCOUNTS,
            lists=LISTS,
            at_once=AT_ONCE,
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
        await program.ask("hold", manager=COORDINATOR, at=phase)
        await program.event(lambda line: line["event"] == "held")
        await program.kill()
        assert mixing.exception() is not None
        return {line["tx_id"] for line in program.events if line["event"] == "trying"}

    async def stop(self) -> None:
        for program, mixing in self.running.values():
            await program.ask("stop", manager=COORDINATOR)
            await mixing
            await program.stop()


def committed_by(lines: Iterable[Line]) -> int:
    return sum(line["event"] == "tried" and line["outcome"] == "committed" for line in lines)


async def stored_rows(peers: Peers) -> list[Row]:
    """Every account and list as it is stored, whatever its state."""
    wanted = [(ACCOUNT, number) for number in range(ACCOUNTS)] + [(LIST, number) for number in range(LISTS)]
    rows = [await peers.storage.get(transactional(table), Key((number,))) for table, number in wanted]
    return [row for row in rows if row is not None]


async def settled_by_the_other(peers: Peers, dead: set[str], *, seconds: float = 90) -> None:
    """Wait until no record of the dead is in doubt.

    Some were: whoever is held at `commit_state` or `commit_records` has prepared records and settles them no more. The
    other may have done it before this looks for the first time.
    """

    async def in_doubt() -> list[Row]:
        return [row for row in await stored_rows(peers) if not is_committed(row) and row["tx_id"] in dead]

    async with asyncio.timeout(seconds):
        while await in_doubt():  # noqa: ASYNC110 - another program is awaited
            await asyncio.sleep(0.2)


async def test_they_share_accounts_and_lists_and_survive_each_others_deaths(peers: Peers) -> None:
    python = peers.python(COORDINATOR)
    async with python.begin() as transaction:
        for number in range(ACCOUNTS):
            await transaction.insert(ACCOUNT, Key((number,)), {"balance": OPENING_BALANCE, "token": None})
        for number in range(LISTS):
            await transaction.insert(LIST, Key((number,)), {"items": ""})
        await transaction.commit()
    await python.drain()

    both = Both(peers)
    await both.start("java")
    await both.start("python")
    for who, phase in (
        ("java", "commit_state"),
        ("python", "commit_state"),
        ("java", "commit_records"),
        ("python", "commit_records"),
    ):
        await both.both_commit()
        dead = await both.kill(who, phase)
        await settled_by_the_other(peers, dead)
        await both.start(who)
    await both.both_commit()
    await both.stop()

    history, totals = await history_of(python, both.ever)
    assert violations(history, Isolation.SERIALIZABLE) == []
    assert set(totals) == {ACCOUNTS * OPENING_BALANCE}

    async with python.begin() as transaction:
        accounts = [await transaction.get(ACCOUNT, Key((number,))) for number in range(ACCOUNTS)]
        lists = [await transaction.get(LIST, Key((number,))) for number in range(LISTS)]
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
    rows = await stored_rows(peers)
    assert all(row["tx_state"] == TransactionState.COMMITTED for row in rows)
    versions = [cast(int, row["tx_version"]) for row in rows]
    assert sum(versions[:ACCOUNTS]) == ACCOUNTS + writes[Write]  # two for each transfer
    assert sum(versions[ACCOUNTS:]) == LISTS + writes[Append]


async def history_of(python: TransactionManager, programs: list[PeerProcess]) -> tuple[list[Transaction], list[int]]:
    """What all programs were told, and the totals that committed audits saw.

    What they were not told, the state table says: a transaction that has no row there when all is settled never was.
    """
    history: list[Transaction] = []
    totals: list[int] = []
    for number, program in enumerate(programs):
        tried = {line["tx_id"]: line for line in program.events if line["event"] == "tried"}
        for line in program.events:
            if line["event"] != "trying":
                continue
            told = tried.get(line["tx_id"])
            outcome = Outcome.ABORTED
            if told is not None and told["outcome"] == "committed":
                outcome = Outcome.COMMITTED
            elif told is None or told["outcome"] == "unknown":
                state = await python.states.get_state(line["tx_id"])
                if state is not None and state.state is TransactionState.COMMITTED:
                    outcome = Outcome.COMMITTED
            if outcome is Outcome.COMMITTED and line["total"] is not None:
                totals.append(line["total"])
            history.append(
                Transaction(
                    line["tx_id"],
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
