"""What a command of `concord` cannot do, said in one sentence with its remedy; never a traceback.

Every error that a user can meet is one row of `EXPECTED`, by the class's full name, so that looking an error up
imports nothing: what was never imported cannot have been raised.
"""

from __future__ import annotations

from collections.abc import Mapping

from scripts.cli.exit_codes import ExitCode


class CommandError(Exception):
    """A sentence for the user, and the exit code."""

    def __init__(self, sentence: str, code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(sentence)
        self.code = code


EXPECTED: Mapping[str, ExitCode] = {
    "infra.config.ConfigurationError": ExitCode.USAGE,
    "infra.servers.errors.PortTakenError": ExitCode.USAGE,
    "infra.servers.errors.DirectoryError": ExitCode.USAGE,
    "infra.servers.errors.AlreadyRunningError": ExitCode.USAGE,
    "infra.servers.errors.ServerError": ExitCode.FAILED,
    "infra.consensus_commit.errors.IllegalOperationError": ExitCode.USAGE,
    "infra.consensus_commit.schema.SchemaRefusedError": ExitCode.REFUSED,
    "infra.storage.errors.InvalidOperationError": ExitCode.USAGE,
    "infra.storage.schema_file.SchemaFileError": ExitCode.USAGE,
    "infra.storage.errors.UnavailableStorageError": ExitCode.UNREACHABLE,
    "infra.messaging.errors.MessageTooLargeError": ExitCode.USAGE,
    "infra.messaging.errors.UnknownTopicError": ExitCode.USAGE,
    "infra.messaging.errors.MessagingError": ExitCode.UNREACHABLE,
    "scripts.reading.StillInDoubtError": ExitCode.UNREACHABLE,
    "scripts.backup.create.BackupFailedError": ExitCode.FAILED,
    "scripts.backup.form.DamagedBackupError": ExitCode.FAILED,
    "scripts.backup.log.ForeignLogError": ExitCode.REFUSED,
    "scripts.backup.log.LogGapError": ExitCode.REFUSED,
    "scripts.backup.pausing.PauseFailedError": ExitCode.FAILED,
    "scripts.backup.restore.RestoreRefusedError": ExitCode.REFUSED,
    "scripts.up.StartFailedError": ExitCode.FAILED,
    "scripts.outside.RayUnavailableError": ExitCode.UNREACHABLE,
    "scripts.outside.SilentServerError": ExitCode.UNREACHABLE,
    "builtins.OSError": ExitCode.FAILED,
}


def expected(error: BaseException) -> tuple[str, ExitCode] | None:
    """The sentence and the exit code of an error that is not a bug of ours; None for any other."""
    if isinstance(error, CommandError):
        return str(error), error.code
    for kind in type(error).__mro__:
        code = EXPECTED.get(f"{kind.__module__}.{kind.__qualname__}")
        if code is not None:
            remedy = getattr(error, "remedy", "")
            text = str(error) or kind.__name__
            return (text if remedy in text else f"{text}: {remedy}"), code
    if isinstance(error, ExceptionGroup):
        found = [pair for pair in map(expected, error.exceptions) if pair is not None]
        return found[0] if len(found) == len(error.exceptions) else None
    return None
