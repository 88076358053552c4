"""How long backups are kept: all of a month, one a week of a quarter, increments for a week, the newest for ever."""

from __future__ import annotations

import datetime
from pathlib import Path

from scripts.backup.form import MANIFEST
from scripts.backup.retention import Expired, Retention, expired, remove

NOW = datetime.datetime(2026, 11, 21, 3, tzinfo=datetime.UTC)


def name_of(days_ago: int) -> str:
    return (NOW - datetime.timedelta(days=days_ago)).strftime("%Y-%m-%dT%H-%M-%SZ")


def test_a_year_of_daily_backups_is_thinned_out_as_the_first_design_asks() -> None:
    what = expired(map(name_of, range(365)), NOW, Retention())

    kept = [age for age in range(365) if name_of(age) not in what.backups]
    assert kept[:31] == list(range(31))
    weekly = kept[31:]
    assert {(NOW - datetime.timedelta(days=age)).isoweekday() for age in weekly} == {1}
    assert weekly == list(range(weekly[0], 91, 7))
    assert max(weekly) > 90 - 7
    assert [age for age in kept if name_of(age) not in what.increments] == list(range(8))


def test_the_newest_backup_and_its_increments_stay_however_old_they_are() -> None:
    assert expired([name_of(1_000), name_of(2_000)], NOW, Retention()) == Expired((name_of(2_000),), ())


def test_only_finished_backups_and_their_increments_are_removed(tmp_path: Path) -> None:
    for name in ("old", name_of(50), name_of(9), name_of(0)):
        (tmp_path / name / "log" / "2026-01-01T00-00-00Z").mkdir(parents=True)
        (tmp_path / name / MANIFEST).touch()
        (tmp_path / name / "log" / "2026-01-01T00-00-00Z" / MANIFEST).touch()

    removed = remove(tmp_path, Expired((name_of(50),), (name_of(9),)))

    assert removed == [tmp_path / name_of(50), tmp_path / name_of(9) / "log"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["old", name_of(9), name_of(0)])
    assert (tmp_path / name_of(9) / MANIFEST).exists()
    assert (tmp_path / name_of(0) / "log").exists()
    assert expired(["old"], NOW, Retention()) == Expired((), ())
