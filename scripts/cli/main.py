"""`concord`: every command of the command line, one module for each family.

Modules of commands import nothing but typer and small things of their own at the top; what a command needs (Kafka,
storage, Ray) is imported inside it. So `concord --help` stays quick, whatever the system grows to.
"""

from __future__ import annotations

import typer

from scripts.cli import (
    backup_command,
    check_command,
    doctor_command,
    history_command,
    metrics_command,
    redrive_command,
    replay_command,
    schema_command,
    send_command,
    stack_command,
    status_command,
    table_command,
    tail_command,
    topics_command,
    tx_command,
    up_command,
    worker_command,
)

app = typer.Typer(
    name="concord",
    help="Message-driven actors with ACID transactions: commands in on Kafka, events and answers out on Kafka.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich takes longer to import than all the rest
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done (send --wait, status: committed), 1 failed, 2 bad usage, 3 refused, 4 dead-lettered, "
    "5 no answer or unknown, 6 not reachable.",
)

for family in (
    up_command,
    stack_command,
    worker_command,
    send_command,
    status_command,
    redrive_command,
    replay_command,
    table_command,
    history_command,
    metrics_command,
    tail_command,
    check_command,
    topics_command,
    doctor_command,
    backup_command,
    schema_command,
    tx_command,
):
    family.register(app)


def main() -> None:
    """The entry point that the package installs."""
    app()


if __name__ == "__main__":
    main()
