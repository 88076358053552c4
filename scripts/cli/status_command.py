"""`concord status`: the durable answer of one command, from the tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from scripts.cli.exit_codes import OF_STATUS, ExitCode
from scripts.cli.options import DEFAULT_DIRECTORY, Data, Shape, command
from scripts.cli.output import Output, note, to_json
from scripts.cli.system import System

SHOWN_CHARS = 300


def for_people(answer: Mapping[str, Any]) -> str:
    """An answer in a few lines."""
    about = " ".join(str(part) for part in (answer["type"], answer["id"]) if part)
    lines = [f"{answer['status']}  {about}"]
    for name in ("key", "reason", "detail", "result", "tx_id", "committed_at"):
        value = answer.get(name)
        if value not in (None, "", {}):
            text = value if isinstance(value, str) else to_json(value)
            lines.append(f"  {name:<13} {text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + '…'}")
    if answer["events"]:
        lines.append(f"  {'events':<13} {len(answer['events'])}, the first is {answer['events'][0]}")
    return "\n".join(lines)


def register(app: typer.Typer) -> None:
    @command(app, "status")
    def status(
        id: Annotated[str, typer.Argument(metavar="ID", help="The command's id.")],
        key: Annotated[str | None, typer.Option(help="Its key; without it every bucket is asked.")] = None,
        data: Data = DEFAULT_DIRECTORY,
        output: Shape = None,
    ) -> ExitCode:
        """The durable answer of a command, while the system runs or rests."""
        import asyncio

        from schemas.outcome import unknown_status

        async def find() -> list[dict[str, Any]]:
            system = System.find(data)
            async with await system.reader() as reader:
                answers = await reader.answers(id, key, buckets=system.settings.actors.buckets)
            return [answer.to_status() for answer in answers]

        found = asyncio.run(find())
        if len(found) > 1:
            keys = ", ".join(str(answer["key"]) for answer in found)
            note(f"concord: {len(found)} commands have this id, under the keys {keys}; the first is shown.")
        answer = found[0] if found else unknown_status(id, key)
        Output.of(output).show(answer, for_people)
        return OF_STATUS[answer["status"]]
