"""`concord backup` and `concord restore`: the system's data in a directory, and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scripts.cli.errors import CommandError
from scripts.cli.exit_codes import ExitCode
from scripts.cli.options import DEFAULT_DIRECTORY, Data, Shape, command
from scripts.cli.output import Output, note
from scripts.cli.system import System

if TYPE_CHECKING:
    from scripts.backup.form import Manifest

COLUMNS = ("backup", "made_by", "profile", "rows", "messages", "paused_ms", "size_bytes")

Backup = Annotated[Path, typer.Argument(metavar="BACKUP", help="The directory of one backup.")]
Newest = Annotated[
    Path | None,
    typer.Argument(metavar="[BACKUP]", help="The directory of one backup. Default: the newest of DIR-backups."),
]
Repository = Annotated[
    Path | None, typer.Argument(metavar="[PATH]", help="A directory of backups. Default: DIR-backups, beside DIR.")
]


def default_repository(data: Path) -> Path:
    """Beside the system's directory, never in it: what destroys the one should leave the other."""
    data = data.absolute()
    return data.with_name(f"{data.name.lstrip('.')}-backups")


def newest(data: Path) -> Path:
    """The newest backup in the default place. Raises CommandError where there is none."""
    from scripts.backup.form import backups_in

    found = backups_in(default_repository(data))
    if not found:
        raise CommandError(f"There is no backup in {default_repository(data)}. Name one.", ExitCode.USAGE)
    return found[-1]


def register(app: typer.Typer) -> None:
    family = typer.Typer(no_args_is_help=True)
    app.add_typer(family, name="backup", help="Backups of the system's tables and topics.")

    @command(family, "create")
    def create(
        to: Annotated[
            Path | None, typer.Option(metavar="PATH", help="Directory of backups. Default: DIR-backups, beside DIR.")
        ] = None,
        unfinished_only: Annotated[
            bool,
            typer.Option("--unfinished-only", help="Of the topics, only commands that nobody has carried out yet."),
        ] = False,
        snapshot_command: Annotated[
            str,
            typer.Option(
                metavar="LINE",
                help="Shell line that takes a snapshot of the tables while the system is paused, instead of reading "
                "every row; CONCORD_BACKUP_NAME is the backup's name.",
            ),
        ] = "",
        within: Annotated[
            float, typer.Option(metavar="SECONDS", min=1, help="How long commands under way may take to end.")
        ] = 30,
        data: Data = DEFAULT_DIRECTORY,
        output: Shape = None,
    ) -> None:
        """Back the system up, running or at rest.

        A running one is paused while its tables are copied: commands wait on their topics, nothing is refused.
        """
        import asyncio
        import sys
        from contextlib import redirect_stdout

        from infra.telemetry import configure_logging
        from scripts.backup.create import Options, create_backup

        shape = Output.of(output)
        configure_logging("warning", process="backup")
        options = Options(everything=not unfinished_only, command=snapshot_command, within_s=within)
        with redirect_stdout(sys.stderr):  # what Ray prints is no result
            made, manifest = asyncio.run(
                create_backup(System.find(data), to or default_repository(data), options, note)
            )
        shape.show(_summary(made, manifest), _for_people)

    @command(family, "increment")
    def increment(backup: Newest = None, data: Data = DEFAULT_DIRECTORY, output: Shape = None) -> None:
        """Add to a backup the commands that were accepted since: for the day on which Kafka is lost as well.

        Needs no pause; made hourly, say, no more than an hour of commands can be lost.
        """
        import asyncio

        from scripts.backup.increments import add_increment

        path = backup or newest(data)
        made, added = asyncio.run(add_increment(System.find(data), path))
        messages = sum(stored.messages for stored in added.partitions)
        Output.of(output).show(
            {"increment": str(made), "of": str(path), "messages": messages},
            lambda line: f"{line['increment']}: {line['messages']} commands since the one before",
        )

    @command(family, "list")
    def list_(path: Repository = None, data: Data = DEFAULT_DIRECTORY, output: Shape = None) -> None:
        """The finished backups in a directory, oldest first."""
        from scripts.backup.form import backups_in, read_manifest

        rows = [_summary(made, read_manifest(made)) for made in backups_in(path or default_repository(data))]
        Output.of(output).table(rows, COLUMNS)

    @command(family, "prune")
    def prune(
        path: Repository = None,
        full_days: Annotated[int, typer.Option(min=1, help="Days for which every backup is kept.")] = 30,
        increment_days: Annotated[int, typer.Option(min=1, help="Days for which increments are kept.")] = 7,
        weekly_days: Annotated[int, typer.Option(min=1, help="Days for which the first of each week is kept.")] = 90,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Remove nothing, only say what would go.")] = False,
        data: Data = DEFAULT_DIRECTORY,
        output: Shape = None,
    ) -> None:
        """Remove backups and increments that are older than they are kept. The newest backup always stays."""
        import datetime

        from scripts.backup.form import backups_in
        from scripts.backup.retention import Retention, expired, remove

        directory = path or default_repository(data)
        names = [made.name for made in backups_in(directory)]
        what = expired(names, datetime.datetime.now(datetime.UTC), Retention(full_days, increment_days, weekly_days))
        if not dry_run:
            remove(directory, what)
        rows = [{"backup": str(directory / name), "removed": "all of it"} for name in what.backups]
        rows += [{"backup": str(directory / name), "removed": "its increments"} for name in what.increments]
        Output.of(output).table(rows, ("backup", "removed"))

    @command(family, "show")
    def show(backup: Newest = None, data: Data = DEFAULT_DIRECTORY, output: Shape = None) -> None:
        """What a backup holds: tables with their rows, topics with their offsets."""
        from scripts.backup.form import read_manifest

        path = backup or newest(data)
        shape, manifest = Output.of(output), read_manifest(path)
        if not shape.human:
            shape.json(manifest.model_dump(mode="json"))
            return
        shape.show(_summary(path, manifest), _for_people)
        shape.table([{"table": table.full_name, "rows": table.rows} for table in manifest.tables], ("table", "rows"))
        partitions = [
            {
                "partition": f"{stored.topic}[{stored.partition}]",
                "finished until": stored.acknowledged,
                "end": stored.end,
                "messages": stored.messages,
            }
            for stored in manifest.partitions
        ]
        shape.table(partitions, ("partition", "finished until", "end", "messages"))

    @command(family, "verify")
    def verify(backup: Newest = None, data: Data = DEFAULT_DIRECTORY, output: Shape = None) -> None:
        """Read a backup through: every file is there, as long as it was, and as it was written.

        Exit code 1 with the name of the first file that is not.
        """
        from scripts.backup.form import check_files

        path = backup or newest(data)
        Output.of(output).show(_summary(path, check_files(path)), _for_people)

    @command(app, "restore")
    def restore(
        path: Backup,
        yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
        profile: Annotated[
            str | None, typer.Option(help="Which servers the restored system runs on: local, stack or cluster.")
        ] = None,
        tables_are_there: Annotated[
            bool, typer.Option("--tables-are-there", help="The snapshot of --snapshot-command has been put back.")
        ] = False,
        accept_gap: Annotated[
            bool,
            typer.Option("--accept-gap", help="Commands that the topics do not have any more may be missing."),
        ] = False,
        data: Data = DEFAULT_DIRECTORY,
        output: Shape = None,
    ) -> None:
        """Restore a backup into a new directory and empty tables, and check it. Then `concord up` goes on from it.

        Move a Kafka that survived (DIR/kafka) into the new directory first: commands after the backup are on it.
        """
        import asyncio
        import sys
        from contextlib import redirect_stdout
        from dataclasses import asdict

        from infra.config import load_settings
        from infra.telemetry import configure_logging
        from scripts.backup.form import read_manifest
        from scripts.backup.restore import Options, restore_backup

        shape = Output.of(output)
        configure_logging("warning", process="restore")
        settings = load_settings(data_dir=data, profile=profile)
        manifest = read_manifest(path)
        if not yes:
            _confirm(path, manifest, data, settings.profile)
        options = Options(tables_are_there=tables_are_there, accept_gap=accept_gap)
        with redirect_stdout(sys.stderr):
            restored = asyncio.run(restore_backup(path, settings, options, note))
        shape.show({"restored": str(path), "data": str(data), **asdict(restored)}, _restored_for_people)


def _confirm(path: Path, manifest: Manifest, data: Path, profile: str) -> None:
    import sys

    if not sys.stdin.isatty():
        raise CommandError("A restore asks first: run it on a terminal, or with --yes.", ExitCode.USAGE)
    rows = sum(table.rows for table in manifest.tables)
    if not typer.confirm(f"Restore {path} ({rows} rows) into {data}, profile {profile}?", err=True):
        raise CommandError("Nothing was restored.", ExitCode.REFUSED)


def _summary(path: Path, manifest: Manifest) -> dict[str, Any]:
    return {
        "backup": str(path),
        "made_by": manifest.made_by,
        "profile": manifest.profile,
        "storage": manifest.storage,
        "was_running": manifest.was_running,
        "paused_ms": manifest.paused_ms,
        "tables": len(manifest.tables),
        "rows": sum(table.rows for table in manifest.tables),
        "messages": sum(stored.messages for stored in manifest.partitions),
        "size_bytes": sum(file.size_bytes for file in manifest.files()),
    }


def _for_people(summary: Mapping[str, Any]) -> str:
    paused = f"paused for {summary['paused_ms']} ms" if summary["was_running"] else "at rest"
    return (
        f"{summary['backup']}\n  {summary['rows']} rows of {summary['tables']} tables, {summary['messages']} messages, "
        f"{summary['size_bytes']} bytes; profile {summary['profile']} ({summary['storage']}), {paused}"
    )


def _restored_for_people(restored: Mapping[str, Any]) -> str:
    kafka = (
        f"Kafka survived: {restored['to_apply']} commands after the backup are carried out when the system starts."
        if restored["kafka_survived"]
        else f"Kafka is new: {restored['messages']} messages were published again, {restored['to_apply']} of them "
        "commands that nobody had carried out."
    )
    return (
        f"{restored['rows']} rows of {restored['tables']} tables are back and hold; {restored['settled']} records were "
        f"settled. {kafka}\nStart it: concord up --data {restored['data']}"
    )
