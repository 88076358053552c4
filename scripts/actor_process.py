"""What the process of an actor does before it is one: logging to stderr, metrics shared with the other processes.

Ray keeps an actor's stderr with its logs and shows it in the dashboard, under the actor's name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from actors.system import Observer
from infra.config import WITH_SECRETS, TracingSettings
from infra.metrics import open_metrics
from infra.telemetry import configure_logging
from infra.tracing import open_tracer
from scripts.measuring import observer

PREPARE = "scripts.actor_process:prepare"
"""How the supervisor names `prepare` to the Ray runtime."""


@dataclass(frozen=True)
class ActorProcess:
    """What `prepare` must know, as JSON on its way."""

    log_level: str
    metrics_dir: str
    tracing: TracingSettings = field(default_factory=TracingSettings)

    def to_argument(self) -> str:
        tracing = json.loads(self.tracing.model_dump_json(context=WITH_SECRETS))
        return json.dumps({"log_level": self.log_level, "metrics_dir": self.metrics_dir, "tracing": tracing})

    @classmethod
    def of_argument(cls, argument: str) -> ActorProcess:
        given = json.loads(argument)
        return cls(**{**given, "tracing": TracingSettings.model_validate(given["tracing"])})


def prepare(name: str, argument: str) -> Observer:
    """Set up the process of actor `name`; `argument` comes from ActorProcess.to_argument."""
    process = ActorProcess.of_argument(argument)
    configure_logging(process.log_level, process=name)
    counting = observer(open_metrics(Path(process.metrics_dir), name))
    # Nobody closes it: actors are ended by SIGKILL, and what they have not sent by then is lost with them.
    return replace(counting, tracer=open_tracer(process.tracing, service=name.rpartition("-")[0], process=name))
