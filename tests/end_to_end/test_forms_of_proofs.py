"""`python -m scripts.proof` takes chaos in two forms, of a file and of some minutes, and never guesses which."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.proof import __main__ as command
from scripts.proof import scenarios
from scripts.proof.on_stack import chaos


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Which proof was run, with what; none is."""
    found: list[tuple[str, dict[str, Any]]] = []

    def instead(name: str) -> Any:
        def prove(*_: Any, **options: Any) -> dict[str, Any]:
            found.append((name, options))
            return {"holds": True}

        return prove

    monkeypatch.setattr(scenarios, "prove_chaos", instead("a file"))
    monkeypatch.setattr(scenarios, "prove_replay", instead("replay"))
    monkeypatch.setattr(chaos, "prove_chaos_on_the_stack", instead("minutes"))
    return found


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["scripts.proof", *arguments])
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    return command.main()


def test_chaos_of_a_file_is_played_on_the_profile_that_is_named(
    ran: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for profile in ("local", "stack"):
        assert run(monkeypatch, "chaos", "--file", __file__, "--profile", profile, "--limit", "7") == 0

    assert [(name, told["profile"], told["limit"], told["times"]) for name, told in ran] == [
        ("a file", "local", 7, 3),
        ("a file", "stack", 7, 3),
    ]


def test_chaos_on_the_stack_without_a_file_lasts_some_minutes(
    ran: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, "chaos", "--profile", "stack", "--minutes", "3") == 0
    assert run(monkeypatch, "chaos", "--profile", "stack") == 0

    assert [(name, told["minutes"]) for name, told in ran] == [("minutes", 3.0), ("minutes", 30)]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("chaos", "--profile", "stack", "--file", __file__, "--minutes", "3"), "--minutes"),
        (("chaos", "--profile", "stack", "--minutes", "3", "--times", "2"), "--times"),
        (("chaos", "--profile", "stack", "--limit", "9"), "--limit"),
        (("chaos", "--minutes", "3"), "--file"),
        (("replay", "--profile", "stack"), "--file"),
        (("replay", "--file", str(Path(__file__).with_name("nowhere.csv"))), "nowhere.csv"),
    ],
    ids=lambda value: " ".join(Path(word).name for word in value) if isinstance(value, tuple) else None,
)
def test_what_is_neither_form_is_bad_usage_that_names_the_option(
    ran: list[tuple[str, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    named: str,
) -> None:
    assert run(monkeypatch, *arguments) == 2

    assert ran == []
    assert named in capsys.readouterr().err
