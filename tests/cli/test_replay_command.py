"""The replay's own work: order, limits, waiting, counting. A client that answers by a script stands for the system."""

from __future__ import annotations

import asyncio
import csv
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from schemas.envelope import OutgoingMessage, decode_headers
from schemas.outcome import Answer
from scripts.cli.client import Submitted
from scripts.cli.replay import Existing, Options, Replay, percentile_ms
from scripts.cli.replay_command import for_people
from scripts.cli.retail import COLUMNS, UnreadableFileError, command_id

WHEN = "2010-12-01 08:26:00"
Respond = Callable[[str, str], tuple[str, str] | None]


class ScriptedClient:
    """Answers each command in a later turn of the loop with (status, reason), or never."""

    def __init__(self, respond: Respond = lambda type, id: ("committed", "")) -> None:
        self._respond = respond
        self.types: list[str] = []
        self.messages: list[OutgoingMessage] = []
        self.waiting = self.most_waiting = 0

    def submit(self, message: OutgoingMessage, *, id: str | None, digest: str | None) -> Submitted:
        loop = asyncio.get_running_loop()
        envelope = decode_headers(message.headers)
        self.types.append(envelope.type)
        self.messages.append(message)
        submitted = Submitted(0, message, id, digest, time.monotonic(), loop.create_future(), loop.create_future())
        self.waiting += 1
        self.most_waiting = max(self.most_waiting, self.waiting)
        response = self._respond(envelope.type, envelope.id)
        if response is not None:
            loop.call_soon(self._answer, submitted, envelope.type, response)
        return submitted

    def _answer(self, submitted: Submitted, type: str, response: tuple[str, str]) -> None:
        self.waiting -= 1
        submitted.answered_at_s = submitted.submitted_at_s + 0.010
        values: dict[str, Any] = {"id": submitted.id, "type": type, "key": "k", "digest": "d", "received_at_ms": 1}
        submitted.answer.set_result(Answer(**values, status=response[0], reason=response[1]))


def write(path: Path, *rows: str) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(row.replace("@", WHEN).split(",") for row in rows)
    return path


def replay_with(client: ScriptedClient, options: Options | None = None, existing: Existing | None = None) -> Replay:
    async def read() -> Existing:
        return existing or Existing(set(), set())

    return Replay(client, read, options or Options())  # type: ignore[arg-type]


ROWS = (
    "1,A1,a,2,@,1.50,7.0,UK",
    "1,A2,b,3,@,1,7.0,UK",
    "2,A1,,-4,@,0,,UK",
    "A3,B,debt,1,@,5,,UK",
    "C4,A1,a,-1,@,1.50,7.0,UK",
    "5,A1,a,x,@,1.50,7.0,UK",
)


async def test_products_and_wallets_come_first_and_then_the_invoices_in_file_order(tmp_path: Path) -> None:
    client = ScriptedClient()

    replay = replay_with(client)
    await replay.run([write(tmp_path / "a.csv", *ROWS)])

    assert client.types == [
        *("RegisterProduct", "RegisterProduct", "RegisterProduct", "OpenWallet", "OpenWallet"),
        *("PlaceOrder", "WriteOffStock", "ReturnGoods"),
    ]
    summary = replay.summary()
    assert {name: summary[name] for name in ("invoices", "orders", "returns", "write_offs", "lines", "committed")} == {
        "invoices": 5,
        "orders": 1,
        "returns": 1,
        "write_offs": 1,
        "lines": 4,
        "committed": 3,
    }
    assert [each["invoice"] for each in summary["skipped_invoices"]] == ["A3", "5"]
    assert (summary["products_registered"], summary["wallets_opened"]) == (3, 2)
    assert "5 invoices: 1 orders, 1 returns, 1 write-offs; 4 lines" in for_people(summary)


async def test_what_is_in_the_tables_already_is_left_alone(tmp_path: Path) -> None:
    client = ScriptedClient()

    existing = Existing({("A1", "A1"), ("A2", "A2")}, {"7", "guest"})
    await replay_with(client, existing=existing).run([write(tmp_path / "a.csv", *ROWS[:2])])

    assert client.types == ["PlaceOrder"]


async def test_the_date_of_an_invoice_travels_with_its_command(tmp_path: Path) -> None:
    client = ScriptedClient()

    await replay_with(client).run([write(tmp_path / "a.csv", ROWS[0])])

    assert decode_headers(client.messages[-1].headers).time_ms == 1_291_191_960_000  # 2010-12-01T08:26:00Z


async def test_the_same_file_is_the_same_messages(tmp_path: Path) -> None:
    first, second = ScriptedClient(), ScriptedClient()
    for client in (first, second):
        await replay_with(client).run([write(tmp_path / "a.csv", *ROWS)])

    assert [(m.key, m.value) for m in first.messages] == [(m.key, m.value) for m in second.messages]


async def test_no_more_than_in_flight_commands_are_without_an_answer(tmp_path: Path) -> None:
    client = ScriptedClient()
    rows = [f"{number},A1,a,1,@,1,7.0,UK" for number in range(1, 60)]

    await replay_with(client, Options(in_flight=3)).run([write(tmp_path / "a.csv", *rows)])

    assert client.most_waiting == 3
    assert len(client.types) == 61


async def test_a_limit_is_counted_over_all_files(tmp_path: Path) -> None:
    client = ScriptedClient()
    files = [
        write(tmp_path / f"{first}.csv", *(f"{number},A1,a,1,@,1,7.0,UK" for number in range(first, first + 3)))
        for first in (1, 4, 7)
    ]

    replay = replay_with(client, Options(limit=4))
    await replay.run(files)

    assert replay.invoices == 4
    assert client.types.count("PlaceOrder") == 4


async def test_refusals_and_dead_letters_are_counted_with_their_reasons(tmp_path: Path) -> None:
    responses = {
        command_id("place", "1"): ("refused", "out_of_stock"),
        command_id("place", "2"): ("dead-lettered", "handler_error"),
    }
    client = ScriptedClient(lambda type, id: responses.get(id, ("committed", "")))
    rows = [f"{number},A1,a,1,@,1,7.0,UK" for number in (1, 2, 3)]

    replay = replay_with(client)
    await replay.run([write(tmp_path / "a.csv", *rows)])

    summary = replay.summary()
    assert (summary["committed"], summary["refused"], summary["dead_lettered"]) == (1, 1, 1)
    assert summary["reasons"] == {"out_of_stock": 1, "handler_error": 1}
    assert summary["by_type"] == {"PlaceOrder": {"committed": 1, "dead-lettered": 1, "refused": 1}}


async def test_a_command_that_is_never_answered_ends_the_wait_when_patience_is_over(tmp_path: Path) -> None:
    client = ScriptedClient(lambda type, id: None if type == "PlaceOrder" else ("committed", ""))

    replay = replay_with(client, Options(patience_s=0.05))
    await replay.run([write(tmp_path / "a.csv", ROWS[0])])

    assert replay.summary()["unanswered"] == 1


async def test_an_invoice_that_its_model_refuses_is_skipped_whole(tmp_path: Path) -> None:
    client = ScriptedClient()
    long_code = "X" * 300

    replay = replay_with(client)
    await replay.run([write(tmp_path / "a.csv", f"1,{long_code},a,1,@,1,7.0,UK", "2,A1,a,1,@,1,7.0,UK")])

    assert client.types == ["RegisterProduct", "OpenWallet", "PlaceOrder"]
    summary = replay.summary()
    [skipped] = summary["skipped_invoices"]
    assert skipped["invoice"] == "1"
    assert "lines.0" in skipped["reason"]
    [not_prepared] = summary["not_prepared"]
    assert not_prepared.startswith("RegisterProduct: ")


async def test_a_file_of_another_kind_sends_nothing(tmp_path: Path) -> None:
    client = ScriptedClient()
    (tmp_path / "a.csv").write_text("a,b\n")

    with pytest.raises(UnreadableFileError):
        await replay_with(client).run([tmp_path / "a.csv"])

    assert client.types == []


@pytest.mark.parametrize(
    ("percent", "value"), [(50, 20.0), (95, 40.0), (99, 40.0), (25, 10.0), (26, 20.0), (100, 40.0)]
)
def test_percentiles_are_of_the_nearest_rank(percent: int, value: float) -> None:
    assert percentile_ms([0.040, 0.010, 0.020, 0.030], percent) == value
    assert percentile_ms([], percent) is None
