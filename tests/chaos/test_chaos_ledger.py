"""The ledger finds what it is there to find: each check is given a history that is right, and the same one broken."""

from __future__ import annotations

import json
from typing import Any

from scripts.proof.judge import History, Seen
from scripts.proof.on_stack.ledger import Made, check_time, check_versions, check_wallets, made


def movement(version: int, amount: int, balance: int, *, tx: str = "", type: str = "WalletToppedUp") -> Made:
    body = {"wallet": {"customer_id": "ann", "balance": balance}, "payment": {"amount": amount}}
    return Made("payment.wallets/ann", version, tx or f"t{version}", type, body)


RIGHT = [
    movement(1, 100, 100, type="WalletOpened"),
    movement(2, 5, 105),
    movement(3, 30, 75, type="PaymentTaken"),
    movement(3, 10, 85, type="PaymentRefunded"),
]


def row(balance: int = 85, version: int = 3) -> dict[str, Any]:
    return {"customer_id": "ann", "balance": balance, "tx_version": version}


def test_movements_that_lead_to_the_balance_are_exact_in_any_order_within_a_transaction() -> None:
    assert not list(check_wallets(RIGHT, [row()]))
    assert not list(check_wallets([*RIGHT[:2], RIGHT[3], RIGHT[2]], [row()]))


def test_a_balance_that_the_movements_do_not_come_to_is_found() -> None:
    assert list(check_wallets(RIGHT, [row(balance=90)])) == ["wallet ann: its movements come to 85, the table has 90"]
    assert list(check_wallets(RIGHT, []))
    assert list(check_wallets([], [row()]))


def test_two_movements_of_one_balance_are_found_though_the_sum_is_right() -> None:
    lost = [RIGHT[0], movement(2, 5, 105), movement(3, 7, 107)]
    assert list(check_wallets(lost, [row(balance=112)])) == [
        "wallet ann: version 3 does not lead from 105 to 112",
    ]


def test_versions_from_one_to_that_of_the_table_are_exact() -> None:
    assert not list(check_versions(RIGHT, [row()], []))
    placed = Made("orders.orders/ann/o1", 1, "t9", "OrderPlaced", {})
    assert not list(check_versions([placed], [], [{"customer_id": "ann", "order_id": "o1", "tx_version": 1}]))


def test_a_version_missing_or_too_many_is_found() -> None:
    assert list(check_versions(RIGHT[:1] + RIGHT[2:], [row()], []))
    assert list(check_versions(RIGHT, [row(version=2)], []))
    assert list(check_versions(RIGHT, [row(version=4)], []))
    assert list(check_versions(RIGHT, [], []))


def history(*made_by: tuple[str, str, list[tuple[str, int]]]) -> History:
    """Of (command, transaction, [(record, version)])."""
    found = History()
    for id, tx, versions in made_by:
        answer = {"id": id, "status": "committed", "tx_id": tx}
        found.add(Seen("payment.results", 0, 0, b"k", json.dumps(answer).encode(), ()))
        for record, version in versions:
            headers = {
                "ce_id": f"{id} {record} {version}",
                "ce_subject": record,
                "ce_recordversion": str(version),
                "ce_txid": tx,
            }
            found.add(Seen("payment.events", 0, 0, b"k", b"{}", tuple((n, v.encode()) for n, v in headers.items())))
    return found


def cycles(seen: History, sent_at_s: dict[str, float], answered_at_s: dict[str, float]) -> list[str]:
    return check_time(seen, made(seen), sent_at_s=sent_at_s, answered_at_s=answered_at_s)


def test_transactions_one_after_the_other_have_a_serial_order_in_time() -> None:
    seen = history(("a", "ta", [("x", 1), ("y", 1)]), ("b", "tb", [("x", 2), ("y", 2)]))
    assert not cycles(seen, {"a": 0, "b": 0.5}, {"a": 1, "b": 2})
    # They overlap, so either may come first.
    assert not cycles(seen, {"a": 0.5, "b": 0}, {"a": 2, "b": 1})


def test_two_transactions_before_each_other_are_found() -> None:
    seen = history(("a", "ta", [("x", 1), ("y", 2)]), ("b", "tb", [("x", 2), ("y", 1)]))
    assert len(cycles(seen, {"a": 0, "b": 0}, {"a": 1, "b": 1})) == 2


def test_a_transaction_before_one_that_was_over_before_it_was_asked_for_is_found() -> None:
    seen = history(("late", "tl", [("x", 1)]), ("early", "te", [("x", 2)]))
    assert cycles(seen, {"early": 0, "late": 5}, {"early": 1, "late": 6})
    # Also when only a third one stands between them.
    seen = history(("late", "tl", [("x", 1)]), ("mid", "tm", [("x", 2), ("y", 1)]), ("early", "te", [("y", 2)]))
    assert cycles(seen, {"early": 0, "late": 5, "mid": 0}, {"early": 1, "late": 6, "mid": 9})


def test_a_transaction_of_several_commands_is_over_with_its_first_answer_and_began_after_its_last_command() -> None:
    seen = history(("a", "t", [("x", 2)]), ("b", "t", []), ("c", "tc", [("x", 1)]))
    assert not cycles(seen, {"a": 0, "b": 3, "c": 1}, {"a": 4, "b": 9, "c": 2})
    assert cycles(seen, {"a": 0, "b": 3, "c": 5}, {"a": 4, "b": 9, "c": 6})
