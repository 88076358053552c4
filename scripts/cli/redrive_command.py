"""`concord redrive`: dead letters are sent again, as commands of their own, when their cause has been mended.

A dead letter is the durable answer of its command's id, and stays that. So the command goes out again under a new id,
with the old one as its cause. The new id is made from the old one and from where the command lay: redriving the same
dead letter twice sends the same command twice, which takes effect once. One that died again is a dead letter itself,
and goes out in place of the one that it came from.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from scripts.cli.errors import CommandError
from scripts.cli.exit_codes import ExitCode
from scripts.cli.options import DEFAULT_DIRECTORY, Data, Shape, command
from scripts.cli.output import Output
from scripts.cli.system import System

if TYPE_CHECKING:
    from infra.messaging.reader import Record
    from scripts.cli.send_command import Outgoing

WAIT_S = 60.0

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "urn:concord:redrive")
_TOLD = "dlq-"
"""What the names of headers begin with that say why a message is a dead letter."""

_PLACE = ("dlq-original-topic", "dlq-original-partition", "dlq-original-offset")


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
    def new_id(self) -> str:
        return str(uuid.uuid5(_NAMESPACE, "\0".join((*(self.told.get(name, "") for name in _PLACE), self.id))))

    def again(self) -> Outgoing:
        """The command that goes out: the same key and bytes, and the same headers but for its name and its cause."""
        from schemas.envelope import OutgoingMessage
        from scripts.cli.send_command import Outgoing

        known = dict(self.headers)
        given = {
            "ce_id": self.new_id.encode(),
            "ce_causationid": known.get("ce_id") or self.id.encode(),
            "ce_correlationid": known.get("ce_correlationid") or known.get("ce_id") or self.id.encode(),
        }
        kept = tuple((name, value) for name, value in self.headers if name not in given)
        return Outgoing(
            type=_text(known.get("ce_type")),
            key=None if self.record.key is None else self.record.key.decode("utf-8", "surrogateescape"),
            id=self.new_id,
            digest=None,
            message=OutgoingMessage(self.topic, self.record.key, self.record.value, (*kept, *given.items())),
        )


def chosen(records: Iterable[Record], *, reason: str | None, id: str | None) -> Iterator[DeadLetter]:
    """The dead letters of that reason and that id, None for any: each command once, and its latest death only."""
    letters: dict[str, DeadLetter] = {}
    died: set[str] = set()
    for letter in map(DeadLetter.of, records):
        died.add(letter.id)
        if reason in (None, letter.reason) and id in (None, letter.id):
            letters[letter.id] = letter
    return (letter for letter in letters.values() if letter.new_id not in died)


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
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be sent, and send nothing.")] = False,
        wait: Annotated[float, typer.Option(metavar="SECONDS", min=0, help="Wait so long for each outcome.")] = WAIT_S,
        data: Data = DEFAULT_DIRECTORY,
        output: Shape = None,
    ) -> ExitCode:
        """Send dead letters again, under new ids. Each outcome says in `redriven` which one it is of."""
        import asyncio

        from infra.messaging.reader import read_all
        from schemas.registry import DOMAINS
        from schemas.topics import dead_letters_topic
        from scripts.cli.send_command import send_each

        if not (reason or id or all_):
            raise CommandError("Say which: --reason, --id or --all.", ExitCode.USAGE)
        system = System.find(data)
        kafka = system.kafka
        shape = Output.of(output)

        async def read() -> list[DeadLetter]:
            wanted = topics or [dead_letters_topic(domain) for domain in DOMAINS]
            records = [record async for record in read_all(kafka, wanted, from_beginning=True, until_end=True)]
            return list(chosen(records, reason=reason, id=id))

        letters = asyncio.run(read())
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
            )
        )
