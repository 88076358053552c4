"""Which backups are kept for how long, and the removal of the others.

Daily ones, hourly increments and weekly ones in the terms of the first design: every backup for 30 days, its increments
for 7, and of those older than that the first of each week for 90. The newest stays whatever its age, increments
included. Ages are told by the names; what is not called like a backup, or is not finished, is never touched.
"""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from scripts.backup.form import LOG, MANIFEST, NAME

_DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Retention:
    """For how many days what is kept."""

    full_days: int = 30
    increment_days: int = 7
    weekly_days: int = 90


@dataclass(frozen=True)
class Expired:
    """Names of backups that go, and of those that stay without their increments."""

    backups: tuple[str, ...]
    increments: tuple[str, ...]


def made_at(name: str) -> datetime.datetime:
    """When a backup of that name was begun. Raises ValueError for another name."""
    return datetime.datetime.strptime(name, "%Y-%m-%dT%H-%M-%SZ").replace(tzinfo=datetime.UTC)


def expired(names: Iterable[str], now: datetime.datetime, retention: Retention) -> Expired:
    """What of the backups called `names` is older than it is kept."""
    known = sorted(name for name in names if NAME.fullmatch(name))
    backups, increments = [], []
    weeks: set[tuple[int, int]] = set()
    for name in known:
        age = now - made_at(name)
        week = made_at(name).isocalendar()[:2]
        is_first_of_week = week not in weeks
        weeks.add(week)
        kept_days = retention.weekly_days if is_first_of_week else 0
        if name == known[-1]:
            continue
        if age > max(retention.full_days, kept_days) * _DAY:
            backups.append(name)
        elif age > retention.increment_days * _DAY:
            increments.append(name)
    return Expired(tuple(backups), tuple(increments))


def remove(directory: Path, what: Expired) -> list[Path]:
    """Remove it; what was there to be removed. One that is interrupted leaves no backup that looks whole."""
    removed = []
    for name in what.backups:
        (directory / name / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(directory / name)
        removed.append(directory / name)
    for name in what.increments:
        if (directory / name / LOG).is_dir():
            # Newest first: what is left of an interrupted removal still follows what is before it.
            for increment in sorted((directory / name / LOG).iterdir(), reverse=True):
                (increment / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(increment)
            (directory / name / LOG).rmdir()
            removed.append(directory / name / LOG)
    return removed
