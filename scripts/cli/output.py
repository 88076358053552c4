"""What commands print: NDJSON for programs, text and tables for people. Logs and progress go to stderr, never here.

A command yields JSON objects; `Output` writes each as one line, or hands it to the command's own way of showing it
to a person. Rich is imported only where a table is drawn.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TextIO


class Format(StrEnum):
    """How results are printed."""

    HUMAN = "human"
    JSON = "json"


@dataclass(frozen=True)
class Output:
    """Where results go, and whether a person reads them."""

    human: bool
    stream: TextIO

    @classmethod
    def of(cls, chosen: Format | None) -> Output:
        """What was asked for; otherwise for a person exactly when stdout is a terminal."""
        human = sys.stdout.isatty() if chosen is None else chosen is Format.HUMAN
        return cls(human, sys.stdout)

    def json(self, value: Any) -> None:
        print(to_json(value), file=self.stream, flush=True)

    def show(self, value: Mapping[str, Any], for_people: Callable[[Mapping[str, Any]], str]) -> None:
        """One result."""
        if self.human:
            print(for_people(value), file=self.stream, flush=True)
        else:
            self.json(value)

    def table(self, rows: Iterable[Mapping[str, Any]], columns: Sequence[str], *, title: str = "") -> None:
        """Many results with the same fields: a line each, or a table of `columns`."""
        if not self.human:
            for row in rows:
                self.json(row)
            return
        from rich.console import Console
        from rich.table import Table

        drawn = Table(*columns, title=title or None, title_justify="left")
        count = 0
        for row in rows:
            drawn.add_row(*(cell(row.get(column)) for column in columns))
            count += 1
        Console(file=self.stream).print(drawn if count else "(no rows)", markup=False)


def to_json(value: Any) -> str:
    """One line of JSON. Text that cannot be UTF-8 (a lone surrogate) is escaped rather than refused."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
        text.encode()
        return text
    except UnicodeEncodeError:
        return json.dumps(value, default=str)


def cell(value: Any) -> str:
    """A value as a person reads it in a table."""
    if value is None:
        return ""
    if isinstance(value, (dict, list)):
        return to_json(value)
    return str(value)


def note(text: str) -> None:
    """A remark about what is going on, to stderr."""
    print(text, file=sys.stderr, flush=True)


def quiet_stdout() -> None:
    """After a reader has gone (`concord tail … | head`), keep the interpreter's last flush from complaining."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
