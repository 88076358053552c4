"""The storages that the scenarios play on.

In full on memory (atomic within a partition, as Cassandra is) and on SQLite (within a namespace). On real servers,
where a statement costs milliseconds, every scenario plays too, but of a test with parameters only some: those that
`SAMPLES` says, spread over all that it has. `EVERY_STORAGE=1` in the environment plays them all everywhere.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
from protocol_world import World

from infra.storage.port import Storage
from tests.storages import LOCAL, SERVERS, STORAGES, in_namespaces, opened

SCENARIO = "test_scenario_"
SAMPLES = {"cassandra": 1, "dynamodb": 1, "multi": 1}
"""How many cases of each test a server plays."""
MORE_SAMPLES = {
    "test_scenario_53_all_or_nothing_whichever_call_fails": 3,
    # One with each way to read.
    "test_scenario_07_a_prepared_record_whose_state_is_committed_is_read_as_its_after_image_and_rolled_forward": 6,
    "test_scenario_08_a_prepared_record_whose_state_is_aborted_is_read_as_its_before_image_and_rolled_back": 6,
    "test_scenario_10_an_expired_undecided_record_is_aborted_and_read_as_its_before_image": 6,
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = {mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")}
    for fixture in ("opening", "new_world"):
        if fixture in metafunc.fixturenames and fixture not in chosen:
            everywhere = metafunc.function.__name__.startswith(SCENARIO)
            metafunc.parametrize(fixture, STORAGES if everywhere else LOCAL, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what real servers need not play."""
    if os.environ.get("EVERY_STORAGE"):
        return
    cases: dict[tuple[str, str], list[pytest.Item]] = defaultdict(list)
    for item in items:
        if isinstance(item, pytest.Function) and item.path.parent == Path(__file__).parent:
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            storage = parameters.get("opening") or parameters.get("new_world")
            if storage in SERVERS:
                cases[(item.originalname, storage)].append(item)
    left_out = {
        item
        for (name, storage), found in cases.items()
        for item in set(found).difference(_spread(found, MORE_SAMPLES.get(name, SAMPLES[storage]), storage))
    }
    if left_out:
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=sorted(left_out, key=lambda item: item.nodeid))


def _spread(cases: Sequence[pytest.Item], count: int, storage: str) -> list[pytest.Item]:
    """`count` of the cases, evenly spread; each server begins with another one."""
    if len(cases) <= count:
        return list(cases)
    offset = SERVERS.index(storage) * len(cases) // len(SERVERS)
    return [cases[(offset + number * len(cases) // count) % len(cases)] for number in range(count)]


@pytest.fixture
def opening(request: pytest.FixtureRequest, tmp_path: Path) -> AbstractAsyncContextManager[Storage]:
    return opened(request.param, request, tmp_path)


@pytest.fixture
async def storage(opening: AbstractAsyncContextManager[Storage]) -> AsyncIterator[Storage]:
    async with opening as made:
        yield in_namespaces(made)


@pytest.fixture
async def world(storage: Storage) -> AsyncIterator[World]:
    made = World(storage)
    await made.create()
    yield made
    made.storage.heal()
    await made.settled()
