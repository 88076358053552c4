"""The rehearsal itself: what handlers may rely on, and which mistakes of theirs it finds."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar

import pytest

from actors.domain import Domain, Record, Refused, Table, Transaction
from actors.rehearsal import Rehearsal
from schemas.message import Command, Event


class Tally(Record):
    name: str
    count: int


class Count(Command):
    domain: ClassVar[str] = "left"

    name: str = "n"
    by: int = 1

    @property
    def routing_key(self) -> str:
        return self.name


class CountThere(Count):
    domain: ClassVar[str] = "right"


class Counted(Event):
    domain: ClassVar[str] = "left"

    name: str

    @property
    def routing_key(self) -> str:
        return self.name


LEFT = Table("left", "tallies", Tally, key=("name",), routing="name")
RIGHT = Table("right", "tallies", Tally, key=("name",), routing="name")

Body = Callable[[Transaction, Any], Awaitable[dict[str, Any] | None]]


async def add(tx: Transaction, table: Table[Tally], command: Count) -> int:
    tally = await tx.get(table, command.name)
    if tally is None:
        tally = Tally(name=command.name, count=0)
        await tx.insert(table, tally)
    await tx.update(table, tally.with_(count=tally.count + command.by))
    return tally.count + command.by


def rehearsal(body: Body) -> Rehearsal:
    """Two domains: `body` handles Count, and CountThere counts, refusing negative numbers after it has written."""
    left, right = Domain("left", (LEFT,)), Domain("right", (RIGHT,))
    left.handles(Count)(body)

    @right.handles(CountThere)
    async def count_there(tx: Transaction, command: CountThere) -> dict[str, Any]:
        count = await add(tx, RIGHT, command)
        if command.by < 0:
            raise Refused("negative", by=command.by)
        if command.by > 100:
            await tx.call(CountThere())
        return {"count": count}

    return Rehearsal((left, right))


def counts(world: Rehearsal) -> list[tuple[int, int]]:
    return [(row.count, other.count) for row, other in zip(world.rows(LEFT), world.rows(RIGHT), strict=True)]


async def both(tx: Transaction, command: Count) -> dict[str, Any]:
    await add(tx, LEFT, command)
    tx.emit(Counted(name=command.name), about=(LEFT, command.name))
    return await tx.call(CountThere(by=command.by))


async def test_a_command_takes_effect_in_every_domain_it_calls() -> None:
    world = rehearsal(both)
    answer = await world.run(Count(by=2))
    assert (answer.status, answer.result, counts(world)) == ("committed", {"count": 2}, [(2, 2)])


async def test_a_refusal_undoes_everything_in_every_domain() -> None:
    world = rehearsal(both)
    await world.run(Count(by=2))
    answer = await world.run(Count(by=-1))
    assert (answer.status, answer.reason, answer.details) == ("refused", "negative", {"by": -1})
    assert answer.events == ()
    assert counts(world) == [(2, 2)]


async def test_the_same_command_id_gets_the_same_answer_within_its_routing_key() -> None:
    world = rehearsal(both)
    first = await world.run(Count(), command_id="c1")
    assert await world.run(Count(), command_id="c1") is first
    assert await world.run(Count(), command_id="c2") != first
    assert counts(world) == [(2, 2)]


async def test_events_carry_the_version_after_the_commit_however_often_the_record_was_written() -> None:
    world = rehearsal(both)
    versions = [(await world.run(Count())).events[0].record_version for _ in range(3)]
    assert versions == [1, 2, 3]


async def test_ids_are_the_same_in_every_attempt_and_differ_by_command_and_parts() -> None:
    async def name_things(tx: Transaction, command: Count) -> dict[str, Any]:
        return {"a": tx.new_id("a"), "again": tx.new_id("a"), "b": tx.new_id("b"), "ab": tx.new_id("a", "b")}

    world, other = rehearsal(name_things), rehearsal(name_things)
    first = (await world.run(Count(), command_id="c1")).result
    assert (await other.run(Count(), command_id="c1")).result == first
    assert first["a"] == first["again"]
    assert len({*first.values(), *(await world.run(Count(), command_id="c2")).result.values()}) == 6


async def test_calls_made_at_once_run_in_the_order_they_were_made() -> None:
    async def several(tx: Transaction, command: Count) -> dict[str, Any]:
        answers = await asyncio.gather(*(tx.call(CountThere(by=by)) for by in (1, 10, 100)))
        return {"counts": [answer["count"] for answer in answers]}

    assert (await rehearsal(several).run(Count())).result == {"counts": [1, 11, 111]}


async def test_scans_see_committed_rows_and_the_commands_own_in_key_order() -> None:
    class Entry(Record):
        name: str
        number: int

    table = Table("left", "entries", Entry, key=("name", "number"), routing="name")
    left = Domain("left", (table,))

    @left.handles(Count)
    async def note(tx: Transaction, command: Count) -> dict[str, Any]:
        await tx.insert(table, Entry(name=command.name, number=command.by))
        if command.by == 5:
            await tx.delete(table, command.name, (await tx.scan(table, command.name))[0].number)
        everything = await tx.scan(table, command.name)
        return {"all": [row.number for row in everything], "one": len(await tx.scan(table, command.name, command.by))}

    world = Rehearsal((left,))
    await world.run(Count(by=7))
    await world.run(Count(by=3))
    await world.run(Count(name="other", by=4))
    assert (await world.run(Count(by=5))).result == {"all": [5, 7], "one": 1}


async def test_time_stands_still_until_it_is_told_to_pass() -> None:
    async def look(tx: Transaction, command: Count) -> dict[str, Any]:
        return {"now_ms": tx.now_ms}

    world = rehearsal(look)
    first = (await world.run(Count())).result["now_ms"]
    world.advance(5)
    assert (await world.run(Count())).result["now_ms"] == first + 5


async def other_domains_table(tx: Transaction, command: Count) -> None:
    await tx.get(RIGHT, command.name)


async def other_routing_key(tx: Transaction, command: Count) -> None:
    await tx.get(LEFT, "m")


async def insert_twice(tx: Transaction, command: Count) -> None:
    await tx.insert(LEFT, Tally(name=command.name, count=1))
    await tx.insert(LEFT, Tally(name=command.name, count=2))


async def update_unread(tx: Transaction, command: Count) -> None:
    await tx.update(LEFT, Tally(name=command.name, count=1))


async def update_absent(tx: Transaction, command: Count) -> None:
    await tx.get(LEFT, command.name)
    await tx.update(LEFT, Tally(name=command.name, count=1))


async def delete_unread(tx: Transaction, command: Count) -> None:
    await tx.delete(LEFT, command.name)


async def about_unwritten(tx: Transaction, command: Count) -> None:
    tx.emit(Counted(name=command.name), about=(LEFT, command.name))


async def event_of_other_key(tx: Transaction, command: Count) -> None:
    tx.emit(Counted(name="m"), about=(LEFT, command.name))


async def swallows(tx: Transaction, command: Count) -> None:
    with contextlib.suppress(Refused):
        await tx.call(CountThere(by=-1))


async def calls_on(tx: Transaction, command: Count) -> None:
    await tx.call(CountThere(by=101))


async def unreadable(tx: Transaction, command: Count) -> None:
    await tx.upsert(LEFT, Tally(name=command.name, count=1).with_(count=True))


@pytest.mark.parametrize(
    ("mistake", "complaint"),
    [
        (other_domains_table, "not a table of left"),
        (other_routing_key, "not Count's routing key"),
        (insert_twice, "insert of a row that is there"),
        (update_unread, "update of a row that was not read"),
        (update_absent, "update of a row that is not there"),
        (delete_unread, "delete of a row that was not read"),
        (about_unwritten, "about an unwritten"),
        (event_of_other_key, "another routing key"),
        (swallows, "swallowed"),
        (calls_on, "cannot call on"),
    ],
)
async def test_a_handlers_mistake_is_found_and_leaves_nothing(mistake: Body, complaint: str) -> None:
    world = rehearsal(mistake)
    with pytest.raises(AssertionError, match=complaint):
        await world.run(Count())
    assert world.tables() == {"left.tallies": [], "right.tallies": []}


async def test_a_record_that_storage_could_not_give_back_is_found() -> None:
    with pytest.raises(ValueError, match="count"):
        await rehearsal(unreadable).run(Count())


async def test_a_result_that_is_not_json_is_found() -> None:
    async def answers_a_set(tx: Transaction, command: Count) -> dict[str, Any]:
        return {"names": {command.name}}

    with pytest.raises(TypeError, match="not JSON serializable"):
        await rehearsal(answers_a_set).run(Count())
