"""Who is known to be gone: a process that has ended, and nobody who is only silent."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import pytest

from actors.incarnations import INCARNATIONS, Incarnations, boot_id, process_started
from infra.clock import ManualClock
from infra.storage.operations import Key, Put, Value
from infra.storage.port import Storage


@pytest.fixture
async def incarnations(memory: Storage) -> Incarnations:
    made = Incarnations(memory, ManualClock())
    await made.create_tables()
    return made


async def registered(memory: Storage, incarnations: Incarnations, **columns: Value) -> str:
    """An incarnation of this process, changed in some columns."""
    incarnation = await incarnations.register("orders-0")
    if columns:
        await memory.mutate([Put(INCARNATIONS, Key(("orders-0",), (incarnation,)), columns)])
    return incarnation


async def test_a_living_process_is_not_gone(memory: Storage, incarnations: Incarnations) -> None:
    incarnation = await registered(memory, incarnations)

    assert not await incarnations.known_gone("orders-0", incarnation)
    assert await incarnations.of("orders-0") == [incarnation]
    assert await incarnations.of("orders-1") == []


async def test_a_process_that_has_ended_is_gone(memory: Storage, incarnations: Incarnations) -> None:
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", "input()", stdin=asyncio.subprocess.PIPE)
    incarnation = await registered(memory, incarnations, pid=child.pid, process_started=process_started(child.pid))
    assert not await incarnations.known_gone("orders-0", incarnation)

    child.kill()
    await child.wait()
    assert await incarnations.known_gone("orders-0", incarnation)


def test_a_process_that_is_dead_and_not_yet_buried_by_its_parent_has_ended() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert process_started(child.pid) is not None
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert process_started(child.pid) is None


async def test_another_process_of_the_same_number_does_not_pass_for_it(
    memory: Storage, incarnations: Incarnations
) -> None:
    started = process_started(os.getpid())
    assert started is not None
    incarnation = await registered(memory, incarnations, process_started=started - 1)

    assert await incarnations.known_gone("orders-0", incarnation)


async def test_a_process_of_an_earlier_boot_is_gone_and_one_of_another_machine_may_live(
    memory: Storage, incarnations: Incarnations
) -> None:
    machine = boot_id().partition("/")[0]
    earlier = await registered(memory, incarnations, boot_id=f"{machine}/earlier")
    elsewhere = await registered(memory, incarnations, boot_id="elsewhere/earlier")

    assert await incarnations.known_gone("orders-0", earlier)
    assert not await incarnations.known_gone("orders-0", elsewhere)


async def test_of_an_incarnation_that_never_registered_nothing_is_known(incarnations: Incarnations) -> None:
    assert not await incarnations.known_gone("orders-0", "who?")
