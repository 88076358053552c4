"""`concord tx`: a transaction is looked up, recovered and finished by its id."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from typer.testing import CliRunner

from infra.clock import SystemClock
from infra.consensus_commit.coordinator import CoordinatorStates
from infra.consensus_commit.intents import Intent, IntentLog, new_intended_id
from infra.consensus_commit.manager import TransactionManager
from infra.consensus_commit.metadata import transactional
from infra.consensus_commit.participant import ParticipantTransaction
from infra.consensus_commit.states import Isolation, TransactionState
from infra.storage.operations import DataType, Key, Row, TableSchema
from infra.storage.sqlite import SqliteStorage
from scripts.cli.exit_codes import ExitCode
from scripts.cli.main import app

ACCOUNT = TableSchema("bank", "account", {"id": DataType.INT, "balance": DataType.INT}, ("id",))
OTHER = TableSchema("shop", "stock", {"id": DataType.INT, "balance": DataType.INT}, ("id",))
COMMITTED, ABORTED = TransactionState.COMMITTED, TransactionState.ABORTED
T = TypeVar("T")


class Bank:
    """Two accounts in a SQLite storage, transactions that died in it, and `concord tx` upon it."""

    def __init__(self, directory: Path) -> None:
        self.url = f"sqlite://{directory / 'tables'}"
        self._directory = directory / "tables"
        self.clock = SystemClock()

    def storage(self, work: Callable[[SqliteStorage, TransactionManager], Awaitable[T]]) -> T:
        async def run() -> T:
            storage = SqliteStorage(self._directory)
            manager = TransactionManager(storage)
            try:
                return await work(storage, manager)
            finally:
                await manager.close()
                await storage.close()

        return asyncio.run(run())

    def opens(self) -> None:
        async def work(storage: SqliteStorage, manager: TransactionManager) -> None:
            await manager.create_coordinator_tables()
            await manager.create_table(ACCOUNT)
            await manager.create_table(OTHER)
            async with manager.begin() as transaction:
                await transaction.insert(ACCOUNT, Key((1,)), {"balance": 10})
                await transaction.commit()

        self.storage(work)

    def orphan(self, decided: TransactionState | None = None, *, intent: bool = False) -> str:
        """A transaction that died after it had prepared account 1 and a new record of the other table; its id."""

        async def work(storage: SqliteStorage, manager: TransactionManager) -> str:
            tx_id = new_intended_id(self.clock) if intent else self.clock.new_id()
            if intent:
                log = IntentLog(storage)
                await log.create_tables()
                partitions = (("bank", "account", (1,)), ("shop", "stock", (7,)))
                await log.record(
                    [Intent(tx_id, "coordinator-0", "first", "orders-0", "first", partitions, (), self.clock.now_ms())]
                )
            participant = ParticipantTransaction(
                tx_id,
                isolation=Isolation.SNAPSHOT,
                storage=storage,
                recovery=manager.recovery,
                clock=self.clock,
            )
            await participant.get(ACCOUNT, Key((1,)))
            await participant.update(ACCOUNT, Key((1,)), {"balance": 99})
            await participant.insert(OTHER, Key((7,)), {"balance": 5})
            await participant.prepare_records(self.clock.now_ms())
            if decided is COMMITTED:
                await manager.states.commit_state(tx_id, self.clock.now_ms())
            elif decided is ABORTED:
                await manager.states.abort_state(tx_id)
            return tx_id

        return self.storage(work)

    def tx(self, *arguments: str, human: bool = False) -> tuple[int, Any, str]:
        """(exit code, the line of stdout, stderr)."""
        shape = "human" if human else "json"
        done = CliRunner().invoke(app, ["tx", *arguments, "--storage", self.url, "--output", shape])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        out = done.stdout if human else json.loads(done.stdout) if done.stdout else None
        return done.exit_code, out, done.stderr

    def rows(self) -> tuple[Row | None, Row | None]:
        """Account 1 and the other record, as they are stored."""

        async def work(storage: SqliteStorage, manager: TransactionManager) -> tuple[Row | None, Row | None]:
            return (
                await storage.get(transactional(ACCOUNT), Key((1,))),
                await storage.get(transactional(OTHER), Key((7,))),
            )

        return self.storage(work)

    def balances(self) -> tuple[Any, Any]:
        """Of both records, which must be at rest; None where there is no record."""
        found = []
        for row in self.rows():
            assert row is None or row["tx_state"] == COMMITTED
            found.append(None if row is None else row["balance"])
        return found[0], found[1]

    def decisions(self) -> int:
        async def work(storage: SqliteStorage, manager: TransactionManager) -> int:
            await manager.states.create_tables()  # It learns which columns the table has.
            return len(await storage.partitions(manager.states.table))

        return self.storage(work)

    def intents(self) -> int:
        async def work(storage: SqliteStorage, manager: TransactionManager) -> int:
            return len(await IntentLog(storage).all())

        return self.storage(work)


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    made = Bank(tmp_path)
    made.opens()
    return made


@pytest.mark.parametrize("intent", [False, True], ids=["found by scanning", "found by its intent"])
def test_a_transaction_is_shown_with_the_records_that_wait_for_it(bank: Bank, intent: bool) -> None:
    tx_id = bank.orphan(COMMITTED, intent=intent)

    code, shown, _ = bank.tx("show", tx_id)

    assert code == ExitCode.DONE
    assert (shown["tx_id"], shown["state"]) == (tx_id, "COMMITTED")
    assert (shown["looked_by"], shown["intent"] is not None) == (("intent", True) if intent else ("scan", False))
    assert [(record["table"], record["key"], record["tx_state"]) for record in shown["waiting"]] == [
        ("bank.account", [1], "PREPARED"),
        ("shop.stock", [7], "PREPARED"),
    ]
    assert bank.tx("show", tx_id, human=True)[1].startswith(f"{tx_id}  COMMITTED\n")


@pytest.mark.parametrize("intent", [False, True], ids=["found by scanning", "found by its intent"])
@pytest.mark.parametrize(
    ("decided", "balances"), [(COMMITTED, (99, 5)), (ABORTED, (10, None))], ids=["committed", "aborted"]
)
def test_recovering_brings_every_record_to_rest_as_was_decided(
    bank: Bank, decided: TransactionState, balances: tuple[int, int | None], intent: bool
) -> None:
    tx_id = bank.orphan(decided, intent=intent)

    assert bank.tx("recover", tx_id)[:2] == (
        ExitCode.DONE,
        {"tx_id": tx_id, "state": decided.name, "settled": 2},
    )

    assert bank.balances() == balances
    assert bank.tx("recover", tx_id)[1]["settled"] == 0
    assert bank.decisions() == 1


def test_an_undecided_transaction_is_only_aborted_when_that_is_said(bank: Bank) -> None:
    tx_id = bank.orphan()

    code, _, err = bank.tx("recover", tx_id)
    assert code == ExitCode.REFUSED
    assert "2 records wait for it" in err
    assert "--abort" in err
    assert bank.decisions() == 0
    assert bank.tx("finish", tx_id)[0] == ExitCode.REFUSED
    assert bank.tx("show", tx_id)[0] == ExitCode.NO_ANSWER

    assert bank.tx("recover", tx_id, "--abort")[1] == {"tx_id": tx_id, "state": "ABORTED", "settled": 2}
    assert bank.balances() == (10, None)
    assert bank.decisions() == 1


def test_aborting_obeys_a_decision_that_stands(bank: Bank) -> None:
    tx_id = bank.orphan(COMMITTED)

    assert bank.tx("recover", tx_id, "--abort")[1]["state"] == "COMMITTED"

    assert bank.balances() == (99, 5)


def test_recovering_may_be_confined_to_some_tables(bank: Bank) -> None:
    tx_id = bank.orphan(COMMITTED)

    assert bank.tx("recover", tx_id, "--table", "shop.stock")[1]["settled"] == 1

    account, _ = bank.rows()
    assert account is not None
    assert account["tx_state"] == TransactionState.PREPARED
    code, _, err = bank.tx("recover", tx_id, "--table", "shop.none")
    assert code == ExitCode.USAGE
    assert "shop.stock" in err


def test_of_an_unknown_transaction_nothing_is_known(bank: Bank) -> None:
    assert bank.tx("show", "none")[:2] == (
        ExitCode.NO_ANSWER,
        {
            "tx_id": "none",
            "state": "UNDECIDED",
            "decided_at_ms": None,
            "intent": None,
            "looked_by": "scan",
            "waiting": [],
        },
    )
    assert bank.tx("recover", "none")[0] == ExitCode.NO_ANSWER
    assert bank.decisions() == 0


@pytest.mark.parametrize("intent", [False, True], ids=["found by scanning", "found by its intent"])
def test_finishing_a_commit_settles_its_records_and_forgets_it(bank: Bank, intent: bool) -> None:
    tx_id = bank.orphan(COMMITTED, intent=intent)

    assert bank.tx("finish", tx_id)[:2] == (
        ExitCode.DONE,
        {"tx_id": tx_id, "state": "COMMITTED", "settled": 2, "finished": True},
    )

    assert bank.balances() == (99, 5)
    assert bank.decisions() == 0
    if intent:
        assert bank.intents() == 0
    assert bank.tx("finish", tx_id)[1] == {"tx_id": tx_id, "state": None, "settled": 0, "finished": True}


def test_an_abort_is_forgotten_only_when_its_writer_is_said_to_be_gone(bank: Bank) -> None:
    tx_id = bank.orphan(ABORTED)

    code, _, err = bank.tx("finish", tx_id)
    assert code == ExitCode.REFUSED
    assert "--writer-is-gone" in err
    assert bank.decisions() == 1

    assert bank.tx("finish", tx_id, "--writer-is-gone")[1]["state"] == "ABORTED"
    assert bank.balances() == (10, None)
    assert bank.decisions() == 0


def test_another_transactions_records_are_left_alone(bank: Bank) -> None:
    waiting = bank.orphan()
    decided = bank.storage(lambda storage, manager: manager.states.abort_state("another"))

    assert bank.tx("recover", decided.tx_id)[1]["settled"] == 0
    assert len(bank.tx("show", waiting)[1]["waiting"]) == 2


def test_where_nothing_was_ever_decided_the_command_says_so(tmp_path: Path) -> None:
    code, _, err = Bank(tmp_path).tx("show", "an-id")

    assert code == ExitCode.UNREACHABLE
    assert "--storage" in err
    assert not (tmp_path / "tables").exists()


GROUP = "0123456789abcdef01234567"


def in_group(bank: Bank, *, decided: bool) -> tuple[str, str]:
    """Two transactions of a group that died after they had prepared a record each; their ids."""

    async def work(storage: SqliteStorage, manager: TransactionManager) -> tuple[str, str]:
        states = CoordinatorStates(storage, bank.clock, group_commit=True)
        await states.create_tables()
        for child, table, number in (("one", ACCOUNT, 1), ("other", OTHER, 7)):
            participant = ParticipantTransaction(
                f"{GROUP}${child}",
                isolation=Isolation.SNAPSHOT,
                storage=storage,
                recovery=manager.recovery,
                clock=bank.clock,
            )
            await participant.get(table, Key((number,)))
            await participant.upsert(table, Key((number,)), {"balance": 99})
            await participant.prepare_records(bank.clock.now_ms())
        if decided:
            await states.commit_group(GROUP, ["one", "other"], bank.clock.now_ms())
        return f"{GROUP}$one", f"{GROUP}$other"

    return bank.storage(work)


def test_a_member_is_shown_with_the_decision_of_its_group(bank: Bank) -> None:
    one, other = in_group(bank, decided=True)

    code, shown, _ = bank.tx("show", one)

    assert (code, shown["tx_id"], shown["state"], shown["children"]) == (0, one, "COMMITTED", ["one", "other"])
    assert [(record["tx_id"], record["table"]) for record in shown["waiting"]] == [(one, "bank.account")]
    assert "decided by the row of a group of 2" in bank.tx("show", other, human=True)[1]


@pytest.mark.parametrize("decided", [True, False], ids=["committed", "undecided"])
def test_a_group_is_shown_with_the_records_of_all_its_members(bank: Bank, decided: bool) -> None:
    one, other = in_group(bank, decided=decided)

    code, shown, _ = bank.tx("show", GROUP)

    assert (code, shown["state"]) == ((0, "COMMITTED") if decided else (ExitCode.NO_ANSWER, "UNDECIDED"))
    assert [(record["tx_id"], record["table"]) for record in shown["waiting"]] == [
        (one, "bank.account"),
        (other, "shop.stock"),
    ]
    assert f"[1]  {one}" in bank.tx("show", GROUP, human=True)[1]


def test_a_member_is_recovered_and_finished_by_itself(bank: Bank) -> None:
    one, other = in_group(bank, decided=True)

    assert bank.tx("recover", one)[1] == {"tx_id": one, "state": "COMMITTED", "settled": 1}
    assert bank.tx("finish", one)[0] == 0

    assert bank.decisions() == 1, "the other still needs the row of their group"
    assert bank.tx("recover", other)[1]["settled"] == 1
    assert bank.balances() == (99, 99)


@pytest.mark.parametrize("command", ["recover", "finish"])
def test_a_group_is_recovered_and_finished_with_all_its_members(bank: Bank, command: str) -> None:
    in_group(bank, decided=True)

    code, done, _ = bank.tx(command, GROUP)

    assert (code, done["state"], done["settled"]) == (0, "COMMITTED", 2)
    assert bank.balances() == (99, 99)
    assert bank.decisions() == (1 if command == "recover" else 0)


def test_a_group_that_is_undecided_is_only_aborted_when_that_is_said(bank: Bank) -> None:
    one, _ = in_group(bank, decided=False)

    code, _, said = bank.tx("recover", GROUP)
    assert code == ExitCode.REFUSED
    assert one in said
    assert bank.decisions() == 0

    assert bank.tx("recover", GROUP, "--abort")[1] == {"tx_id": GROUP, "state": "ABORTED", "settled": 2}
    assert bank.balances() == (10, None)
    assert bank.decisions() == 3, "the group is barred, and each of its members aborted"
