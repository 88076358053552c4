"""Invoices of a shop: the summary counts right, the formulas agree, again changes nothing, refusals leave no trace.

The formulas are computed from the CSV by a program of its own (formulas.py), which shares no code with the replay.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from scripts.proof.replaying import check_formulas, replay
from scripts.proof.tables import COMPARED, exact_rows, texts, traces
from tests.end_to_end.conftest import Replayed
from tests.end_to_end.harness import System
from tests.end_to_end.shop_files import write_invoices

pytestmark = pytest.mark.system


def assert_counts_agree(summary: dict[str, Any], report: dict[str, Any]) -> None:
    """The replay's summary says of the file what the independent program says of it."""
    assert summary["unanswered"] == summary["dead_lettered"] == 0
    assert summary["invoices"] == report["invoices"]
    counted = {
        f"{type} {status}": count for type, counts in summary["by_type"].items() for status, count in counts.items()
    }
    assert counted == report["statuses"]
    assert sorted(skipped["invoice"] for skipped in summary["skipped_invoices"]) == sorted(report["skipped"])


async def test_the_formulas_agree_with_the_tables_after_a_replay(system: System, replayed: Replayed) -> None:
    report = await asyncio.to_thread(check_formulas, system.running, [replayed.file], only_theirs=True)

    assert report["agrees"], report["differences"]
    assert_counts_agree(replayed.summary, report)
    assert replayed.summary["refused"] == 0
    assert replayed.summary["orders"] > 50
    assert replayed.summary["returns"] > 3
    assert replayed.summary["write_offs"] > 0
    assert replayed.summary["skipped"] > 0
    await system.check()


async def test_the_same_file_again_changes_nothing(system: System, replayed: Replayed) -> None:
    await system.check()
    before = {name: exact_rows(system.directory, name) for name in COMPARED}

    again = await asyncio.to_thread(replay, system.running, [replayed.file])

    assert again["by_type"] == replayed.summary["by_type"]
    assert again["products_registered"] == again["wallets_opened"] == 0
    await system.check()
    for name in COMPARED:
        assert exact_rows(system.directory, name) == before[name], name


async def test_with_small_stocks_and_balances_the_formulas_hold_and_refusals_leave_only_their_answers(
    system: System, tmp_path: Path
) -> None:
    file = tmp_path / "scarce.csv"
    write_invoices(file, invoices=90, seed=8, mark="88")
    scarce = {"initial_stock": 60, "initial_balance": 60_000}

    summary = await asyncio.to_thread(replay, system.running, [file], **scarce)

    report = await asyncio.to_thread(check_formulas, system.running, [file], only_theirs=True, **scarce)
    assert report["agrees"], report["differences"]
    assert_counts_agree(summary, report)
    assert summary["by_type"]["PlaceOrder"]["committed"] > 10
    assert summary["reasons"]["out_of_stock"] > 3
    assert summary["reasons"]["insufficient_funds"] > 3
    await system.check()
    refused = refused_orders(system, "88")
    assert len(refused) == summary["by_type"]["PlaceOrder"]["refused"]
    assert not traces(system.directory, refused)
    for topic, messages in system.witness.history.messages.items():
        if topic.endswith(".events"):
            assert not [message for message in messages if refused & set(texts(message.body))], topic


async def test_real_invoices_of_december_agree_with_the_formulas(system: System, december: Path) -> None:
    summary = await asyncio.to_thread(replay, system.running, [december], limit=150)

    report = await asyncio.to_thread(check_formulas, system.running, [december], limit=150, only_theirs=True)
    assert report["agrees"], report["differences"]
    assert_counts_agree(summary, report)
    assert summary["invoices"] == 150
    assert summary["refused"] == 0
    await system.check()


def refused_orders(system: System, mark: str) -> set[str]:
    """The ids of the refused orders of one file, from the commands on the topic and their answers."""
    return {
        command.body["order_id"]
        for command in system.witness.history.commands("orders")
        if command.header("ce_type") == "PlaceOrder" and (command.key or b"").startswith(mark.encode())
        for answer in system.witness.answers(command.header("ce_id") or "")
        if answer["status"] == "refused"
    }
