"""What the process of an actor does before it is one: logging to stderr, metrics shared with the other processes.

Ray keeps an actor's stderr with its logs and shows it in the dashboard, under the actor's name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from actors.system import Observer
from infra.metrics import open_metrics
from infra.telemetry import configure_logging
from scripts.measuring import observer

PREPARE = "scripts.actor_process:prepare"
"""How the supervisor names `prepare` to the Ray runtime."""


@dataclass(frozen=True)
class ActorProcess:
    """What `prepare` must know, as JSON on its way."""

    log_level: str
    metrics_dir: str

    def to_argument(self) -> str:
        return json.dumps({"log_level": self.log_level, "metrics_dir": self.metrics_dir})


def prepare(name: str, argument: str) -> Observer:
    """Set up the process of actor `name`; `argument` comes from ActorProcess.to_argument."""
    process = ActorProcess(**json.loads(argument))
    configure_logging(process.log_level, process=name)
    return observer(open_metrics(Path(process.metrics_dir), name))
