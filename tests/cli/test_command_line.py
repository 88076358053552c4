"""The contract of the command line: which commands there are, what they import, how they end."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import click
import pytest
import typer
from typer.testing import CliRunner

from infra.config import load_settings
from infra.servers.errors import AlreadyRunningError, DirectoryError, PortTakenError
from scripts import preflight
from scripts.cli import errors
from scripts.cli.errors import CommandError, expected
from scripts.cli.exit_codes import OF_STATUS, ExitCode, worst
from scripts.cli.main import app
from scripts.cli.options import command
from scripts.cli.system import System, holder, runtime_path, write_atomically

ROOT = Path(__file__).resolve().parents[2]

COMMANDS = {
    "up",
    "worker",
    "workers",
    "restart",
    "stack up",
    "stack down",
    "stack status",
    "stack logs",
    "send",
    "status",
    "replay",
    "table list",
    "table dump",
    "tail",
    "check",
    "topics",
    "doctor",
    "backup create",
    "backup increment",
    "backup list",
    "backup prune",
    "backup show",
    "backup verify",
    "redrive",
    "restore",
    "top",
    "slis",
    "schema apply",
    "schema show",
    "schema diff",
    "schema alter",
    "schema import",
    "schema repair",
    "schema drop",
    "schema coordinator create",
    "schema coordinator show",
    "schema coordinator drop",
    "tx show",
    "tx recover",
    "tx finish",
    "history",
    "rebuild order-history",
}
"""What the contract names, those that show what is measured, that read and rebuild the order history, and those for
tables and transactions."""

HEAVY = (
    "ray",
    "cassandra",
    "faust",
    "mode",
    "aiokafka",
    "aiohttp",
    "pydantic",
    "rich",
    "structlog",
    "actors",
    "streams",
)
"""What only the commands that need it may import."""


def leaves(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    for name, found in group.commands.items():
        if hasattr(found, "commands"):
            yield from leaves(found, (*path, name))
        else:
            yield " ".join((*path, name)), found


def concord(*arguments: str, timeout_s: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CONCORD_")}
    return subprocess.run(
        [sys.executable, "-m", "scripts.cli.main", *arguments],
        cwd=ROOT,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def invoke(*arguments: str, **options: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command run in this process."""
    done = CliRunner().invoke(app, list(arguments), **options)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


ROOT_COMMAND = typer.main.get_command(app)


def test_there_are_the_commands_of_the_contract_and_no_others() -> None:
    assert {name for name, _ in leaves(ROOT_COMMAND)} == COMMANDS


@pytest.mark.parametrize(("name", "found"), sorted(leaves(ROOT_COMMAND)))
def test_every_command_explains_itself_and_takes_a_directory_and_an_output(name: str, found: click.Command) -> None:
    code, out, _ = invoke(*name.split(), "--help")

    assert code == 0
    assert found.help
    assert {"--data", "--output"} <= {option for parameter in found.params for option in parameter.opts}
    undocumented = [parameter.name for parameter in found.params if not getattr(parameter, "help", None)]
    assert undocumented == []
    assert "--data" in out


def test_asking_for_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\nsys.argv = ['concord', '--help']\nfrom scripts.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)

    assert "Exit codes" in done.stdout
    assert set(HEAVY) & set(done.stderr.split()) == set()


def test_exit_codes_are_those_of_the_contract() -> None:
    assert {code.name: int(code) for code in ExitCode} == {
        "DONE": 0,
        "FAILED": 1,
        "USAGE": 2,
        "REFUSED": 3,
        "DEAD_LETTERED": 4,
        "NO_ANSWER": 5,
        "UNREACHABLE": 6,
    }
    assert [OF_STATUS[status] for status in ("committed", "refused", "dead-lettered", "unknown")] == [0, 3, 4, 5]


def test_the_code_of_many_outcomes_is_the_worst() -> None:
    assert worst([ExitCode.DONE, ExitCode.DEAD_LETTERED, ExitCode.REFUSED]) is ExitCode.DEAD_LETTERED
    assert worst([]) is ExitCode.DONE


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("topics",), ExitCode.UNREACHABLE),
        (("tail", "orders.events"), ExitCode.UNREACHABLE),
        (("replay", __file__), ExitCode.UNREACHABLE),
        (("send", "OpenWallet", "--json", '{"customer_id": "a", "currency": "GBP"}'), ExitCode.UNREACHABLE),
        (("status", "an-id"), ExitCode.UNREACHABLE),
        (("table", "list"), ExitCode.UNREACHABLE),
        (("table", "dump", "orders.orders"), ExitCode.UNREACHABLE),
        (("history", "alice"), ExitCode.UNREACHABLE),
        (("rebuild", "order-history"), ExitCode.UNREACHABLE),
        (("check",), ExitCode.UNREACHABLE),
        (("schema", "show"), ExitCode.UNREACHABLE),
        (("schema", "alter"), ExitCode.UNREACHABLE),
        (("schema", "repair"), ExitCode.UNREACHABLE),
        (("schema", "import", __file__), ExitCode.UNREACHABLE),
        (("schema", "drop", "--all"), ExitCode.UNREACHABLE),
        (("schema", "drop"), ExitCode.USAGE),
        (("schema", "apply", "none.json"), ExitCode.USAGE),
        (("schema", "coordinator", "show"), ExitCode.UNREACHABLE),
        (("schema", "coordinator", "drop"), ExitCode.UNREACHABLE),
        (("tx", "show", "an-id"), ExitCode.UNREACHABLE),
        (("tx", "recover", "an-id"), ExitCode.UNREACHABLE),
        (("tx", "finish", "an-id"), ExitCode.UNREACHABLE),
        (("worker",), ExitCode.UNREACHABLE),
        (("workers",), ExitCode.UNREACHABLE),
        (("workers", "2"), ExitCode.UNREACHABLE),
        (("restart",), ExitCode.UNREACHABLE),
        (("worker", "--profile", "moon"), ExitCode.USAGE),
        (("up", "--profile", "moon"), ExitCode.USAGE),
    ],
)
def test_without_a_system_a_command_says_so_in_one_sentence_and_makes_nothing(
    tmp_path: Path, arguments: tuple[str, ...], code: ExitCode
) -> None:
    directory = tmp_path / "none"

    ended, out, err = invoke(*arguments, "--data", str(directory))

    assert (ended, out) == (code, "")
    assert err.startswith("concord: ")
    assert err.count("\n") == 1
    assert not directory.exists()


@pytest.mark.parametrize("arguments", [("nonsense",), ("status",), ("replay",), ("tail",), ("up", "--nonsense")])
def test_bad_usage_exits_2(arguments: tuple[str, ...]) -> None:
    assert invoke(*arguments)[0] == ExitCode.USAGE


# --- errors -------------------------------------------------------------------------------------------------------


def ends_with(error: BaseException) -> tuple[int, str]:
    """How a command ends that raises `error`."""
    failing = typer.Typer()

    @command(failing, "fail")
    def fail() -> None:
        raise error

    done = CliRunner().invoke(failing, [])
    return done.exit_code, done.stderr


def test_an_expected_error_is_a_sentence_with_its_remedy_and_no_traceback() -> None:
    error = PortTakenError("Port 9 is taken.", remedy="Choose another.", setting="CONCORD_HTTP_PORT")

    assert ends_with(error) == (ExitCode.USAGE, "concord: Port 9 is taken. Choose another.\n")


def test_an_unexpected_error_shows_its_traceback_and_exits_1() -> None:
    code, err = ends_with(ZeroDivisionError("a bug"))

    assert code == ExitCode.FAILED
    assert "Traceback" in err


def test_ctrl_c_is_no_error_of_ours() -> None:
    assert ends_with(KeyboardInterrupt()) == (130, "")


def test_an_expected_error_among_others_is_still_a_sentence() -> None:
    both = ExceptionGroup("tasks", [CommandError("First."), CommandError("Second.")])

    assert expected(both) == ("First.", ExitCode.FAILED)
    assert expected(ExceptionGroup("tasks", [CommandError("First."), ZeroDivisionError()])) is None


def test_every_row_of_the_table_of_expected_errors_names_a_class_that_is_there() -> None:
    for name in errors.EXPECTED:
        module, _, kind = name.rpartition(".")
        assert issubclass(getattr(__import__(module, fromlist=[kind]), kind), Exception)


# --- a start that must not begin ----------------------------------------------------------------------------------


def started(directory: Path) -> set[str]:
    """What lies in the directory that only a started system makes."""
    return {path.name for path in directory.iterdir()} - {"run"} if directory.is_dir() else set()


@pytest.mark.parametrize(
    "environment",
    [
        {"CONCORD_KAFKA__PORT": "eighty"},
        {"CONCORD_OUTCOME__WINDOW_HOURS": "1"},
        {"CONCORD_ACTORS__BUCKETS": "0"},
    ],
)
def test_a_wrong_setting_is_named_and_nothing_is_started(tmp_path: Path, environment: Mapping[str, str]) -> None:
    directory = tmp_path / "data"

    done = concord("up", "--data", str(directory), **environment)

    assert (done.returncode, done.stdout) == (ExitCode.USAGE, "")
    assert next(iter(environment)) in done.stderr
    assert "Traceback" not in done.stderr
    assert not directory.exists()


@pytest.mark.parametrize("setting", ["CONCORD_HTTP_PORT", "CONCORD_DASHBOARD_PORT", "CONCORD_KAFKA__PORT"])
def test_a_taken_port_is_named_with_its_setting_and_nothing_is_started(tmp_path: Path, setting: str) -> None:
    free = {"CONCORD_HTTP_PORT": "0", "CONCORD_DASHBOARD_PORT": "0"}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        settings = load_settings(data_dir=tmp_path, environment=free | {setting: port})

        with pytest.raises(PortTakenError, match=rf"{port}.*{setting}"):
            preflight.check_ports(settings)
        done = concord("up", "--data", str(tmp_path), **free | {setting: port})

    assert (done.returncode, done.stdout) == (ExitCode.USAGE, "")
    assert port in done.stderr
    assert setting in done.stderr
    assert started(tmp_path) == set()


def test_a_directory_that_cannot_be_written_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    done = concord("up", "--data", str(tmp_path / "file" / "data"))

    assert (done.returncode, done.stdout) == (ExitCode.USAGE, "")
    assert "cannot be written" in done.stderr
    assert "--data" in done.stderr


def test_a_full_disk_is_refused_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "MIN_FREE_MB", 10**9)

    with pytest.raises(DirectoryError, match=r"MB left.*--data"):
        preflight.check_directory(tmp_path)


def test_a_second_start_on_a_directory_is_refused_with_the_pid_of_the_first(tmp_path: Path) -> None:
    assert holder(tmp_path) is None
    with preflight.hold(tmp_path):
        assert holder(tmp_path) == os.getpid()
        with pytest.raises(AlreadyRunningError, match=rf"process {os.getpid()}"), preflight.hold(tmp_path):
            raise AssertionError("two supervisors at once")

        done = concord("up", "--data", str(tmp_path))

        assert (done.returncode, done.stdout) == (ExitCode.USAGE, "")
        assert f"kill {os.getpid()}" in done.stderr
    assert holder(tmp_path) is None


def test_a_system_that_was_killed_is_known_to_be_gone_whatever_its_file_says(tmp_path: Path) -> None:
    write_atomically(runtime_path(tmp_path), {"running": True, "bootstrap_servers": "127.0.0.1:1"})

    system = System.find(tmp_path)

    assert not system.running
    with pytest.raises(CommandError, match="No system is running"):
        system.bootstrap_servers  # noqa: B018


def test_a_system_is_read_with_the_settings_that_it_was_started_with(tmp_path: Path) -> None:
    settings = load_settings(data_dir=tmp_path, environment={"CONCORD_ACTORS__BUCKETS": "32"})
    write_atomically(runtime_path(tmp_path), {"settings": json.loads(settings.model_dump_json())})

    assert System.find(tmp_path).settings == settings


def test_an_unreadable_description_of_a_system_is_named(tmp_path: Path) -> None:
    runtime_path(tmp_path).write_text("{")

    code, _, err = invoke("topics", "--data", str(tmp_path))

    assert code == ExitCode.UNREACHABLE
    assert str(runtime_path(tmp_path)) in err


def test_doctor_tells_what_is_there_and_makes_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "none"

    _, out, _ = invoke("doctor", "--data", str(directory), "--output", "json")
    findings = {finding["check"]: finding for finding in map(json.loads, out.splitlines())}

    assert findings["python"]["ok"]
    assert findings["ray"]["ok"]
    assert "`concord up`" in findings["system"]["found"]
    assert not directory.exists()


def test_doctor_names_the_remedy_for_what_is_not_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("CONCORD_HTTP_PORT", str(taken.getsockname()[1]))

        code, out, _ = invoke("doctor", "--data", str(tmp_path), "--output", "json")

    findings = {finding["check"]: finding for finding in map(json.loads, out.splitlines())}
    assert code == ExitCode.FAILED
    assert not findings["ports"]["ok"]
    assert "CONCORD_HTTP_PORT" in findings["ports"]["remedy"]


def test_the_supervisor_checks_before_it_makes_any_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scripts import up

    def refuse(settings: object) -> None:
        raise PortTakenError("taken", remedy="", setting="")

    def start(*_: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(preflight, "check_ports", refuse)
    monkeypatch.setattr(up, "Guard", start)
    monkeypatch.setattr(up, "_Supervisor", start)

    with pytest.raises(PortTakenError):
        asyncio.run(up.supervise(load_settings(data_dir=tmp_path, environment={}), on_ready=lambda addresses: None))
