"""How commands find the system of a directory: DIR/runtime.json, which `concord up` writes, and beside it what only its
own user may read, DIR/run/settings.json, which has the secrets that the former leaves out.

A directory without either may still belong to a system: one of profile cluster, which is where the settings say.

`running` is not believed but tested: whoever holds DIR/run/supervisor.lock runs. Everything about files here is
standard library; the settings themselves are loaded only when asked for.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.cli.errors import CommandError
from scripts.cli.exit_codes import ExitCode

if TYPE_CHECKING:
    from infra.config import Settings
    from infra.messaging.connection import KafkaConnection
    from scripts.reading import CommittedReader


def runtime_path(directory: Path) -> Path:
    return directory / "runtime.json"


def settings_path(directory: Path) -> Path:
    return directory / "run" / "settings.json"


def lock_path(directory: Path) -> Path:
    return directory / "run" / "supervisor.lock"


def stack_lock_path(directory: Path) -> Path:
    """Held by whoever keeps the two servers of `concord stack`."""
    return directory / "run" / "stack.lock"


def stack_state_path(directory: Path) -> Path:
    """What the servers of `concord stack` are at, as their keeper wrote it last."""
    return directory / "run" / "stack.json"


def write_atomically(path: Path, value: Any) -> None:
    """Readers see the old content or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    temporary.replace(path)


def holder(directory: Path, *, lock: Path | None = None) -> int | None:
    """The pid of the `concord up` that runs on `directory`, 0 where it did not say, None if there is none.

    With `lock`, of whoever else holds that.
    """
    try:
        descriptor = os.open(lock or lock_path(directory), os.O_RDWR)
    except FileNotFoundError:
        return None
    except OSError:  # unreadable to this user: somebody's it is
        return 0
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return int(os.read(descriptor, 32).decode("ascii", "replace").strip() or 0)
    else:
        return None
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class System:
    """The system of one directory, as its last start described it."""

    directory: Path
    runtime: dict[str, Any]
    running: bool

    @classmethod
    def find(cls, directory: Path) -> System:
        """Of a directory that may never have had one: then `runtime` is empty."""
        try:
            runtime = json.loads(runtime_path(directory).read_text())
        except (FileNotFoundError, NotADirectoryError):
            runtime = {}
        except (OSError, ValueError) as error:
            raise CommandError(f"{runtime_path(directory)} cannot be read: {error}.", ExitCode.UNREACHABLE) from error
        return cls(directory, runtime, holder(directory) is not None)

    @property
    def settings(self) -> Settings:
        """The settings that the system was started with, else those that it would be started with.

        A system of an earlier release may tell of settings that are gone since: they are passed over.
        """
        from infra.config import Settings, load_settings

        for described in (self._private(), self.runtime):
            if "settings" in described:
                return Settings.model_validate_json(json.dumps(described["settings"]), extra="ignore")
        return load_settings(data_dir=self.directory)

    def _private(self) -> dict[str, Any]:
        """What the system tells its own user alone; empty where it told nothing or this is another user."""
        try:
            described = json.loads(settings_path(self.directory).read_text())
        except (OSError, ValueError):
            return {}
        return described if isinstance(described, dict) and self.runtime else {}

    @property
    def bootstrap_servers(self) -> str:
        """Where its Kafka is. Raises CommandError (UNREACHABLE) when the system does not run."""
        return self.kafka.bootstrap_servers

    @property
    def kafka(self) -> KafkaConnection:
        """How its Kafka is reached. Raises CommandError (UNREACHABLE) when the system does not run."""
        from scripts.connections import kafka_connection

        servers = self.runtime.get("bootstrap_servers")
        if not self.runtime and self.settings.profile == "cluster":
            return kafka_connection(self.settings)
        if not self.running or not servers:
            where = "" if self.directory == Path(".concord") else f" --data {self.directory}"
            raise CommandError(
                f"No system is running in {self.directory}. Start it with `concord up{where}`, or name its directory "
                "with --data.",
                ExitCode.UNREACHABLE,
            )
        return kafka_connection(self.settings, str(servers))

    @property
    def cassandra_rests(self) -> bool:
        """Whether its tables are in a Cassandra of its own that nobody is known to have started."""
        return not self.running and self.settings.profile == "stack"

    async def reader(self) -> CommittedReader:
        """Its tables, whether it runs or rests. Raises CommandError (UNREACHABLE) when there are none."""
        from infra.storage.errors import UnavailableStorageError
        from scripts.reading import NoTablesError, open_reader

        try:
            return await open_reader(self.settings)
        except UnavailableStorageError as error:
            if not self.cassandra_rests:
                raise
            raise CommandError(
                f"The Cassandra of {self.directory} rests with its system. Start it with `concord up --profile stack`, "
                "or alone with `concord stack up`.",
                ExitCode.UNREACHABLE,
            ) from error
        except NoTablesError as error:
            raise CommandError(
                f"{error}. Start a system there with `concord up`, or name its directory with --data.",
                ExitCode.UNREACHABLE,
            ) from None
