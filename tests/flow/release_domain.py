"""A domain in two releases, for rehearsing an upgrade. RELEASE says which one a process runs, RELEASE_DOMAIN its name.

release 1   WriteNote/1 (pad_id, text)          pads (pad_id, text, writes)
release 2   WriteNote/2 (pad_id, body, color)   pads (pad_id, text, writes, color), and an upcast from version 1
"""

from __future__ import annotations

import os
import sys
from typing import Any, ClassVar

from actors.domain import Domain, Record, Table, Transaction
from schemas import registry
from schemas.message import Command

NAME = os.environ["RELEASE_DOMAIN"]
RELEASE = int(os.environ["RELEASE"])


class PadCommand(Command):
    domain: ClassVar[str] = NAME
    pad_id: str

    @property
    def routing_key(self) -> str:
        return self.pad_id


class Pad(Record):
    pad_id: str
    text: str
    writes: int


pads = Domain(NAME, ())

if RELEASE == 1:

    class WriteNote(PadCommand):
        text: str

    PADS: Table[Any] = Table(NAME, "pads", Pad, key=("pad_id",), routing="pad_id")

    @pads.handles(WriteNote)
    async def write_note(tx: Transaction, command: WriteNote) -> dict[str, Any]:
        pad = await tx.get(PADS, command.pad_id)
        if pad is None:
            await tx.insert(PADS, Pad(pad_id=command.pad_id, text=command.text, writes=1))
        else:
            await tx.update(PADS, pad.with_(text=command.text, writes=pad.writes + 1))
        return {"release": RELEASE}

else:

    class WriteNote(PadCommand):  # type: ignore[no-redef]
        version: ClassVar[int] = 2
        body: str
        color: str | None = None

    class ColoredPad(Pad):
        color: str | None = None

    PADS = Table(NAME, "pads", ColoredPad, key=("pad_id",), routing="pad_id")

    @pads.handles(WriteNote)
    async def write_note(tx: Transaction, command: Any) -> dict[str, Any]:
        pad = await tx.get(PADS, command.pad_id)
        # What an older client does not say stays as it is.
        if pad is None:
            pad = ColoredPad(pad_id=command.pad_id, text=command.body, writes=1, color=command.color)
            await tx.insert(PADS, pad)
        else:
            color = command.color if command.color is not None else pad.color
            await tx.update(PADS, pad.with_(text=command.body, writes=pad.writes + 1, color=color))
        return {"release": RELEASE}


def _text_became_body(body: registry.Body) -> registry.Body:
    return {name: value for name, value in body.items() if name != "text"} | {"body": body["text"]}


pads.tables = (PADS,)
DOMAINS = (pads,)
COMMANDS = (WriteNote,)
EVENTS = ()


def install() -> None:
    """Make this domain the only one of this process."""
    sys.modules[f"schemas.{NAME}"] = sys.modules[__name__]
    registry.DOMAINS = (NAME,)  # type: ignore[assignment]
    registry.UPCASTS = {("WriteNote", 1): _text_became_body} if RELEASE == 2 else {}
    registry.default_registry.cache_clear()
