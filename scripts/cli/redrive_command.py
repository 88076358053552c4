"""`concord redrive`: dead letters are sent again, as commands of their own, when their cause has been mended.

A dead letter is the durable answer of its command's id, and stays that. So the command goes out again under a new id,
with the old one as its cause. The new id is made from what the command is known by (its topic, key and id): redriving
the same dead letter twice sends the same command twice, which takes effect once. One that died again is a dead letter
itself, and goes out in place of the one that it came from.

That it takes effect once rests on the answer to the new id, which is kept for `outcome.window_hours`. A command that
died longer ago than that, less the time that it may wait in its topic, may have been carried out under its new id
without anybody knowing any more: it goes out only when asked for (`--older`).
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import typer

from scripts.cli.errors import CommandError
from scripts.cli.exit_codes import ExitCode
from scripts.cli.options import DEFAULT_DIRECTORY, Data, Shape, command
from scripts.cli.output import Output, note
from scripts.cli.system import System

if TYPE_CHECKING:
    from infra.config import Settings
    from infra.messaging.reader import Record
    from scripts.cli.send_command import Outgoing

WAIT_S = 60.0

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "urn:concord:redrive")
_TOLD = "dlq-"
"""What the names of headers begin with that say why a message is a dead letter."""


@dataclass(frozen=True)
class DeadLetter:
    """One message of a dead-letter topic. `headers` are those of the command; `told` those that came with its death."""

    record: Record
    headers: tuple[tuple[str, bytes | None], ...]
    told: dict[str, str]

    @classmethod
    def of(cls, record: Record) -> DeadLetter:
        told = {name: _text(value) for name, value in record.headers if name.startswith(_TOLD)}  # the last one counts
        headers = tuple(header for header in record.headers if not header[0].startswith(_TOLD))
        return cls(record, headers, told)

    @property
    def id(self) -> str:
        """The id under which the command was answered."""
        return self.told.get("dlq-command-id", "")

    @property
    def reason(self) -> str:
        return self.told.get("dlq-reason", "")

    @property
    def topic(self) -> str:
        """Where the command goes."""
        return self.told.get("dlq-original-topic") or self.record.topic.removesuffix(".dlq")

    @property
    def command(self) -> tuple[str, bytes, str]:
        """What the command is known by: the same for each of its deaths, whoever published it how often."""
        return self.topic, self.record.key or b"", self.id

    @property
    def new_id(self) -> str:
        topic, key, id = self.command
        return str(uuid.uuid5(_NAMESPACE, "\0".join((topic, key.hex(), id))))

    def again(self) -> Outgoing:
        """The command that goes out: the same key and bytes, and the same headers but for its name and its cause."""
        from schemas.envelope import OutgoingMessage
        from scripts.cli.send_command import Outgoing

        known = dict(self.headers)
        # By the id that it was answered under: the one in its headers may be what it died of.
        given = {
            "ce_id": self.new_id.encode(),
            "ce_causationid": self.id.encode(),
            "ce_correlationid": known.get("ce_correlationid") or self.id.encode(),
        }
        kept = tuple((name, value) for name, value in self.headers if name not in given)
        return Outgoing(
            type=_text(known.get("ce_type")),
            key=None if self.record.key is None else self.record.key.decode("utf-8", "surrogateescape"),
            id=self.new_id,
            digest=None,
            message=OutgoingMessage(self.topic, self.record.key, self.record.value, (*kept, *given.items())),
        )


@dataclass
class Choice:
    """The dead letters of that reason and that id, None for any: each command once, and its latest death only.

    Takes in the messages of the dead-letter topics in their order, and keeps only those that may go out. The id of a
    command stands for those that it was redriven under, too.
    """

    reason: str | None = None
    id: str | None = None
    not_before_ms: int = 0
    """Letters of commands that died before it do not go out."""
    too_old: int = field(default=0, init=False)
    """How many would have gone out but for that."""
    _letters: dict[tuple[str, bytes, str], tuple[int, DeadLetter]] = field(default_factory=dict, init=False)
    _first_died_ms: dict[tuple[str, bytes, str], int] = field(default_factory=dict, init=False)
    _first_ids: dict[str, str] = field(default_factory=dict, init=False)
    _died: set[str] = field(default_factory=set, init=False)

    def take(self, record: Record) -> None:
        letter = DeadLetter.of(record)
        first_id = self._first_ids.setdefault(letter.new_id, self._first_ids.get(letter.id, letter.id))
        died_ms = self._first_died_ms.setdefault(letter.command, record.timestamp_ms)
        self._died.add(letter.id)
        if self.reason in (None, letter.reason) and self.id in (None, letter.id, first_id):
            self._letters[letter.command] = (died_ms, letter)

    def letters(self) -> list[DeadLetter]:
        """Those that go out, of the messages so far."""
        latest = [(died_ms, letter) for died_ms, letter in self._letters.values() if letter.new_id not in self._died]
        young = [letter for died_ms, letter in latest if died_ms >= self.not_before_ms]
        self.too_old = len(latest) - len(young)
        return young


def known_for_hours(settings: Settings) -> int:
    """How long after a command's death the answer to its successor is sure to be there, if it has had one."""
    return settings.outcome.window_hours - settings.kafka.retention_commands_hours


def _text(value: bytes | None) -> str:
    return (value or b"").decode("utf-8", "replace")


def register(app: typer.Typer) -> None:
    @command(app, "redrive")
    def redrive(
        topics: Annotated[
            list[str] | None, typer.Argument(metavar="[TOPIC…]", help="Dead-letter topics; by default all.")
        ] = None,
        reason: Annotated[
            str | None, typer.Option(help="Only dead letters of this reason, as `unknown_version`.")
        ] = None,
        id: Annotated[str | None, typer.Option(help="Only the command that was answered under this id.")] = None,
        all_: Annotated[bool, typer.Option("--all", help="Whatever their reason is.")] = False,
        older: Annotated[
            bool,
            typer.Option(
                "--older",
                help="Also those so old that nobody knows whether they were redriven before: they may be done twice.",
            ),
        ] = False,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be sent, and send nothing.")] = False,
        wait: Annotated[float, typer.Option(metavar="SECONDS", min=0, help="Wait so long for each outcome.")] = WAIT_S,
        data: Data = DEFAULT_DIRECTORY,
        output: Shape = None,
    ) -> ExitCode:
        """Send dead letters again, under new ids. Each outcome says in `redriven` which one it is of."""
        import asyncio
        import time

        from infra.messaging.reader import read_all
        from schemas.registry import DOMAINS
        from schemas.topics import dead_letters_topic
        from scripts.cli.send_command import send_each

        if not (reason or id or all_):
            raise CommandError("Say which: --reason, --id or --all.", ExitCode.USAGE)
        system = System.find(data)
        kafka = system.kafka
        shape = Output.of(output)

        hours = known_for_hours(system.settings)
        now_ms = time.time_ns() // 1_000_000
        choice = Choice(reason, id, not_before_ms=0 if older else now_ms - hours * 3_600_000)

        async def read() -> list[DeadLetter]:
            wanted = topics or [dead_letters_topic(domain) for domain in DOMAINS]
            async for record in read_all(kafka, wanted, from_beginning=True, until_end=True):
                choice.take(record)
            return choice.letters()

        letters = asyncio.run(read())
        if choice.too_old:
            note(
                f"{choice.too_old} dead letters of more than {hours} hours ago stay where they are: nobody knows any "
                "more whether they were redriven before. --older sends them, too."
            )
        if dry_run:
            for letter in letters:
                told = {"redriven": letter.id, "id": letter.new_id, "reason": letter.reason, "topic": letter.topic}
                shape.show(told, lambda line: f"{line['redriven']}  {line['reason']}  would go to {line['topic']}")
            return ExitCode.DONE
        old_ids = {letter.new_id: letter.id for letter in letters}
        return asyncio.run(
            send_each(
                system,
                iter([letter.again() for letter in letters]),
                wait,
                shape,
                lambda outcome: {**outcome, "redriven": old_ids.get(outcome.get("id", ""), "")},
                many=True,
            )
        )
