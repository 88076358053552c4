"""What a soak makes of its samples: growth after the warm-up is found, and growth before it is none."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from scripts.proof.on_stack.soak import PRUNED_BY, Sample, grown_processes, grown_tables, without_files_of
from scripts.proof.stored import stored_at

MINUTES = 60.0
SAMPLES = 360
MEBIBYTE = 2**20


def samples(*, warm_mb: float = 100, end_mb: float = 100, descriptors: int = 50) -> list[dict[str, Sample]]:
    """A process that starts with 50 MB, and goes evenly from `warm_mb` at minute ten to `end_mb`."""
    found = []
    for number in range(SAMPLES):
        mb = 50.0 if number < 60 else warm_mb + (end_mb - warm_mb) * (number - 60) / (SAMPLES - 60)
        last = descriptors if number > SAMPLES - 31 else 50
        found.append({"worker-0": Sample(1, int(mb * MEBIBYTE), int(2 * mb * MEBIBYTE), last)})
    return found


def test_growth_before_the_tenth_minute_is_none() -> None:
    [process] = grown_processes(samples(), MINUTES).values()
    assert process["growth"] == {"pss": 0.0, "rss": 0.0, "descriptors": 0.0, "files": 0.0}
    assert process["pss_mb"] == [100.0, 100.0]


def test_growth_after_it_is_told_of_memory_and_of_descriptors() -> None:
    [process] = grown_processes(samples(end_mb=120, descriptors=60), MINUTES).values()
    assert 0.14 < process["growth"]["pss"] < 0.2
    assert process["growth"]["descriptors"] == 0.2


def test_one_moment_decides_nothing() -> None:
    restless = samples()
    restless[-1] = {"worker-0": Sample(1, 900 * MEBIBYTE, 900 * MEBIBYTE, 900)}
    [process] = grown_processes(restless, MINUTES).values()
    assert process["growth"]["pss"] == 0.0


def test_a_file_of_the_data_is_no_descriptor_unless_it_is_opened_twice_or_deleted() -> None:
    data = ["/data/a-Data.db", "/data/a-Index.db"]
    assert without_files_of(Path("/data"), [*data, "socket:[1]", "/lib/x.jar"]) == (2, 2)
    assert without_files_of(Path("/data"), [*data, "/data/a-Index.db", "/data/old-Data.db (deleted)"]) == (2, 2)
    assert without_files_of(Path("/data"), ["/database/a-Data.db"]) == (1, 0)


def test_tables_that_grow_are_named_and_each_table_of_the_system_has_its_pruning() -> None:
    rows = [
        {"orders.orders": 1, "coordinator.intents": 3},
        {"orders.orders": 9, "coordinator.intents": 3, "new.one": 1},
    ]
    assert grown_tables(rows) == ["new.one", "orders.orders"]
    assert set(grown_tables(rows)) - set(PRUNED_BY) == {"new.one"}


def test_some_columns_of_a_table_are_read_as_of_all(tmp_path: Path) -> None:
    with sqlite3.connect(f"{tmp_path}/shop.db") as file:
        file.execute("CREATE TABLE goods (id TEXT, price INTEGER)")
        file.execute("INSERT INTO goods VALUES ('tea', 250)")
    file.close()
    with stored_at(f"sqlite://{tmp_path}") as storage:
        assert storage.rows("shop.goods") == [{"id": "tea", "price": 250}]
        assert storage.rows("shop.goods", ("price",)) == [{"price": 250}]
        assert storage.rows("shop.none", ("price",)) == []
