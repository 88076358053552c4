"""An upgrade rehearsed: two releases side by side, as processes that share topics, consumer group and tables.

The later release has a new version of a command and a new column. What must hold, in the order of the operator's
steps: the earlier release goes on when the column is there and starts again with it; commands of the old version are
carried out by either; a command of the new version that reaches the earlier release is not lost, but a dead letter
that goes out again when every worker is new; and nobody overwrites what he does not know.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest_asyncio
from flow_world import HERE, FlowWorld, until

from infra.consensus_commit.metadata import is_committed
from infra.messaging.producer import EventProducer
from infra.messaging.reader import Record
from infra.storage.operations import ScanAll
from infra.storage.sqlite import SqliteStorage
from schemas.envelope import Envelope, encode_headers
from schemas.outcome import Answer
from schemas.topics import TopicRole
from scripts.cli.redrive_command import Choice

PADS = [f"pad-{number}" for number in range(12)]
BODY_FIELD = {1: "text", 2: "body"}


@dataclass
class Releases:
    """The processes of a rehearsal. `sent` counts the commands that were committed, by pad."""

    world: FlowWorld
    tables: Path
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    answers: dict[str, Answer] = field(default_factory=dict)

    def start(self, name: str, release: int) -> None:
        arguments = {
            "bootstrap_servers": self.world.bootstrap_servers,
            "group": self.world.group,
            "name": name,
            "tables": str(self.tables),
            "work": str(self.world.directory),
        }
        self._assigned_path(name).unlink(missing_ok=True)
        self.running[name] = subprocess.Popen(
            [sys.executable, str(HERE / "release_process.py"), json.dumps(arguments)],
            env={**os.environ, "RELEASE": str(release), "RELEASE_DOMAIN": self.world.domain},
            stdout=self._log_path(name).open("ab"),
            stderr=subprocess.STDOUT,
        )

    async def shared_by(self, *names: str) -> None:
        """Until each of these workers has partitions, and together they have all."""

        def shared() -> bool:
            for name in names:
                assert self.running[name].poll() is None, self._log_path(name).read_text()[-3000:]
            held = [self._assigned(name) for name in names]
            return all(held) and sorted(itertools.chain(*held)) == list(range(self.world.partitions))

        await until(shared, within_s=60)

    def _assigned(self, name: str) -> list[int]:
        try:
            return json.loads(self._assigned_path(name).read_text()) or []
        except (FileNotFoundError, ValueError):
            return []

    def _assigned_path(self, name: str) -> Path:
        return self.world.directory / f"{name}.assigned"

    def _log_path(self, name: str) -> Path:
        return self.world.directory / f"{name}.log"

    def kill(self, name: str) -> None:
        self.running[name].kill()
        self.running.pop(name).wait()

    def stop(self, name: str) -> None:
        self.running[name].send_signal(signal.SIGUSR1)  # for good: others get its partitions at once
        assert self.running.pop(name).wait(30) == 0, self._log_path(name).read_text()[-3000:]

    async def write(self, label: str, version: int, **more: Any) -> list[Answer]:
        """A WriteNote of that version to every pad, and their answers."""
        ids = {f"{label}-{pad}": pad for pad in PADS}
        producer = EventProducer(self.world.bootstrap_servers, linger_ms=1)
        await producer.start()
        try:
            for id, pad in ids.items():
                schema = f"concord:/schemas/{self.world.domain}/WriteNote/{version}"
                headers = encode_headers(Envelope(id=id, type="WriteNote", source="tests", data_schema=schema))
                body = {"pad_id": pad, BODY_FIELD[version]: label, "of_a_release_to_come": 1, **more}
                topic = self.world.topic(TopicRole.COMMANDS)
                await producer.send_and_wait(topic, pad.encode(), json.dumps(body).encode(), headers)
        finally:
            await producer.stop()
        return await self.answered(list(ids))

    async def answered(self, ids: list[str]) -> list[Answer]:
        async def there() -> bool:
            results = await self.world.read(TopicRole.RESULTS)
            told = [Answer.from_json(record.value or b"") for record in results]
            self.answers |= {answer.id: answer for answer in told}
            return set(ids) <= self.answers.keys()

        await until(there, within_s=60, every_s=0.1)
        return [self.answers[id] for id in ids]

    async def redrive(self, reason: str) -> list[Answer]:
        """What `concord redrive --reason` sends."""
        choice = Choice(reason)
        for record in await self.dead_letters():
            choice.take(record)
        letters = [letter.again() for letter in choice.letters()]
        producer = EventProducer(self.world.bootstrap_servers, linger_ms=1)
        await producer.start()
        try:
            for each in letters:
                message = each.message
                headers = [(name, value or b"") for name, value in message.headers]
                await producer.send_and_wait(message.topic, message.key, message.value, headers)
        finally:
            await producer.stop()
        return await self.answered([each.id or "" for each in letters])

    async def dead_letters(self) -> list[Record]:
        return await self.world.read(TopicRole.DEAD_LETTERS)

    async def pads(self) -> dict[str, dict[str, Any]]:
        """Every pad, straight from the tables."""
        storage = SqliteStorage(self.tables)
        try:
            [stored] = [table for table in await storage.tables() if table.name == "pads"]
            rows = [row async for page in storage.pages(ScanAll(stored)) for row in page]
        finally:
            await storage.close()
        assert all(map(is_committed, rows))
        return {str(row["pad_id"]): row for row in rows}

    async def add_column(self) -> None:
        """`concord schema alter`, as an operator would."""
        domain = self.world.domain
        columns = {"bucket": "INT", "pad_id": "TEXT", "text": "TEXT", "writes": "BIGINT", "color": "TEXT"}
        declared = {"transaction": True, "partition-key": ["bucket"], "clustering-key": ["pad_id"], "columns": columns}
        file = self.world.directory / "later.json"
        file.write_text(json.dumps({f"{domain}.pads": declared}))
        program = Path(sys.executable).with_name("concord")
        arguments = [program, "schema", "alter", str(file), "--storage", f"sqlite://{self.tables}", "--output", "json"]
        done = await asyncio.to_thread(subprocess.run, arguments, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr


@pytest_asyncio.fixture
async def releases(world: FlowWorld, tmp_path: Path) -> AsyncIterator[Releases]:
    made = Releases(world, tmp_path / "tables")
    await world.create_topics()
    try:
        yield made
    finally:
        for name in list(made.running):
            made.kill(name)


async def test_a_later_release_takes_over_from_an_earlier_one_and_no_command_and_no_column_is_lost(
    releases: Releases,
) -> None:
    committed: Counter[str] = Counter()

    def count(answers: list[Answer]) -> None:
        committed.update(answer.key for answer in answers if answer.status == "committed")

    # The earlier release alone, then with a column that it does not know; it also starts again with it.
    releases.start("earlier", 1)
    await releases.shared_by("earlier")
    count(await releases.write("before", 1))
    await releases.add_column()
    count(await releases.write("altered", 1))
    releases.kill("earlier")
    releases.start("earlier", 1)

    # Both, with old commands: whoever has the partition carries them out.
    releases.start("later", 2)
    await releases.shared_by("earlier", "later")
    both = await releases.write("side-by-side", 1)
    count(both)
    assert {answer.status for answer in releases.answers.values()} == {"committed"}
    assert {answer.result["release"] for answer in both if answer.result} == {1, 2}

    # A producer that is early: done by the later release, dead letters of the earlier one.
    early = await releases.write("early", 2, color="red")
    count(early)
    done = [answer for answer in early if answer.status == "committed"]
    dead = [answer for answer in early if answer.status == "dead-lettered"]
    assert done
    assert dead
    assert len(done) + len(dead) == len(PADS)
    assert {answer.reason for answer in dead} == {"unknown_version"}
    assert sorted(str(record.key, "utf-8") for record in await releases.dead_letters() if record.key) == sorted(
        answer.key for answer in dead
    )

    # Old commands again, to rows that have the new column by now, also when the partitions have changed hands.
    releases.stop("later")
    await releases.shared_by("earlier")
    count(await releases.write("earlier-alone", 1))
    pads = await releases.pads()
    assert {pads[answer.key]["color"] for answer in done} == {"red"}
    assert {pads[answer.key]["color"] for answer in dead} == {None}

    # The later release alone: what was dead goes out again, twice, and takes effect once.
    releases.stop("earlier")
    releases.start("later", 2)
    await releases.shared_by("later")
    again = await releases.redrive("unknown_version")
    assert {answer.status for answer in again} == {"committed"}
    assert sorted(answer.key for answer in again) == sorted(answer.key for answer in dead)
    count(again)
    assert {answer.status for answer in await releases.redrive("unknown_version")} == {"committed"}
    count(await releases.write("after", 2))

    pads = await releases.pads()
    assert {pad["color"] for pad in pads.values()} == {"red"}
    assert {pad["text"] for pad in pads.values()} == {"after"}
    assert {name: pad["writes"] for name, pad in pads.items()} == dict(committed)
