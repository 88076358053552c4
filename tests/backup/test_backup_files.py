"""A backup's files: whatever was damaged is found and named, and what is not finished is no backup."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.storage.operations import DataType, TableSchema
from scripts.backup.form import (
    MANIFEST,
    DamagedBackupError,
    Increment,
    LineFile,
    Manifest,
    StoredPartition,
    StoredTable,
    backups_in,
    check_files,
    increments_of,
    read_lines,
    read_manifest,
    write_manifest,
)
from scripts.backup.log import ForeignLogError, LogGapError, resume_on_survivor

TABLE = TableSchema("shop", "goods", {"id": DataType.INT, "name": DataType.TEXT}, ("id",))
LINES = [b'[%d,"thing"]' % number for number in range(5_000)]


@pytest.fixture
def backup(tmp_path: Path) -> Path:
    directory = tmp_path / "2026-11-21T17-05-12Z"
    directory.mkdir()
    goods = LineFile(directory, "tables/shop.goods.ndjson.gz")
    goods.write(LINES)
    commands = LineFile(directory, "topics/orders.commands-0.ndjson.gz")
    commands.write([b"{}"])
    manifest = Manifest(
        name=directory.name,
        made_by="0",
        profile="local",
        storage="sqlite",
        buckets=16,
        command_partitions=4,
        log_identity="log",
        was_running=True,
        paused_ms=5,
        tables_by="rows",
        tables=(StoredTable.of(TABLE, rows=len(LINES), digest="0", file=goods.finish()),),
        partitions=(
            StoredPartition(
                topic="orders.commands",
                partition=0,
                start=0,
                acknowledged=0,
                end=1,
                copied_from=0,
                messages=1,
                file=commands.finish(),
            ),
        ),
    )
    write_manifest(directory, manifest)
    return directory


def test_a_backup_says_what_it_holds_and_is_readable_by_its_owner_alone(backup: Path) -> None:
    manifest = check_files(backup)

    assert manifest == read_manifest(backup)
    assert [table.schema_of for table in manifest.tables] == [TABLE]
    assert [line for lines in read_lines(backup, next(manifest.files())) for line in lines] == LINES
    files = [path for path in backup.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert backups_in(backup.parent) == [backup]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink], ids=["flipped bit", "cut off", "missing"])
@pytest.mark.parametrize("name", ["tables/shop.goods.ndjson.gz", "topics/orders.commands-0.ndjson.gz", MANIFEST])
def test_a_damaged_file_is_found_and_named(backup: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(backup / name)

    with pytest.raises(DamagedBackupError) as found:
        check_files(backup)

    assert name in str(found.value)


def test_a_manifest_that_was_changed_by_hand_is_refused(backup: Path) -> None:
    content = json.loads((backup / MANIFEST).read_text())
    content["tables"][0]["rows"] = 1
    (backup / MANIFEST).write_text(json.dumps(content))

    with pytest.raises(DamagedBackupError, match="not as it was written"):
        read_manifest(backup)


def test_a_manifest_of_another_format_names_the_version_that_made_it(backup: Path) -> None:
    manifest = read_manifest(backup)
    write_manifest(backup, manifest.model_copy(update={"format": 2, "made_by": "9.9"}))

    with pytest.raises(DamagedBackupError, match=r"format 2.*9\.9"):
        read_manifest(backup)


def add_increment(backup: Path, name: str, *, begin: int, end: int) -> Path:
    directory = backup / "log" / name
    file = LineFile(directory, "topics/orders.commands-0.ndjson.gz")
    file.write([b"{}"])
    added = stored(start=0, acknowledged=None, end=end).model_copy(
        update={"copied_from": begin, "messages": end - begin, "file": file.finish()}
    )
    write_manifest(
        directory, Increment(name=name, of=backup.name, made_by="0", log_identity="log", partitions=(added,))
    )
    return directory


def test_increments_follow_each_other_and_are_read_through_with_their_backup(backup: Path) -> None:
    first = add_increment(backup, "2026-11-21T18-00-00Z", begin=1, end=4)
    second = add_increment(backup, "2026-11-21T19-00-00Z", begin=4, end=9)

    assert [path for path, _ in increments_of(backup, check_files(backup))] == [first, second]
    flip(second / "topics/orders.commands-0.ndjson.gz")
    with pytest.raises(DamagedBackupError, match=r"19-00-00Z/topics/orders\.commands-0"):
        check_files(backup)


def test_an_increment_that_is_missing_in_between_is_noticed(backup: Path) -> None:
    add_increment(backup, "2026-11-21T18-00-00Z", begin=1, end=4)
    add_increment(backup, "2026-11-21T20-00-00Z", begin=5, end=9)

    with pytest.raises(DamagedBackupError, match=r"20-00-00Z does not follow"):
        check_files(backup)


# --- where a surviving Kafka is read on ------------------------------------------------------------------------------


def stored(topic: str = "orders.commands", *, start: int = 0, acknowledged: int | None = 40, end: int = 50):  # type: ignore[no-untyped-def]
    return StoredPartition(topic=topic, partition=0, start=start, acknowledged=acknowledged, end=end, copied_from=start)


@pytest.mark.parametrize(
    ("before", "there", "expected"),
    [
        (stored(), (0, 90), 40),
        (stored(acknowledged=None), (0, 90), 0),
        (stored(start=10, acknowledged=None), (0, 90), 10),
        (stored(start=5, acknowledged=3), (5, 90), 5),
        (stored(), (40, 90), 40),
        (stored("orders.events"), (0, 90), 90),
    ],
    ids=["acknowledged", "never acknowledged", "begun later", "acknowledged long ago", "at the gap", "events"],
)
def test_commands_are_read_from_where_the_backup_stood_and_events_from_their_end(
    before: StoredPartition, there: tuple[int, int], expected: int
) -> None:
    position = (before.topic, 0)

    assert resume_on_survivor([before], {position: there}, accept_gap=False) == {position: expected}


def test_commands_that_the_topic_has_lost_since_are_counted_and_may_be_accepted() -> None:
    there = {("orders.commands", 0): (47, 90)}

    with pytest.raises(LogGapError, match=r"orders\.commands\[0\] begins at 47.*7 commands"):
        resume_on_survivor([stored()], there, accept_gap=False)
    assert resume_on_survivor([stored()], there, accept_gap=True) == {("orders.commands", 0): 47}


def test_a_log_that_ends_before_the_backup_or_lacks_a_partition_is_not_taken_for_a_survivor() -> None:
    with pytest.raises(ForeignLogError, match="has lost messages"):
        resume_on_survivor([stored()], {("orders.commands", 0): (0, 49)}, accept_gap=True)
    with pytest.raises(ForeignLogError, match="no partition 0"):
        resume_on_survivor([stored()], {}, accept_gap=True)
