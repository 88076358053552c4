"""Messages that a topic never takes, on a real broker: the partition moves on, and nothing but they is missing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flow_world import FlowWorld, RememberingRuntime, header

from schemas.topics import TopicRole

FIVE_MIB = 5 << 20
"""What the topics of these tests take."""


class Talkative(RememberingRuntime):
    """Answers some commands with an event, or a result, that no topic of these tests takes."""

    async def ask(self, actor: str, method: str, items: Sequence[Any]) -> list[Any]:
        replies = await super().ask(actor, method, items)
        if method != "execute":
            return replies
        return [self._swollen(raw.value, answer) for raw, answer in zip(items, replies, strict=True)]

    def _swollen(self, value: bytes, answer: Any) -> Any:
        if value == b"event":
            (event, *others) = answer.events
            large = event.model_copy(update={"body": event.body + " " * (FIVE_MIB + 1000)})
            return answer.model_copy(update={"events": (large, *others)})
        if value == b"result":
            return answer.model_copy(update={"result": {"words": "x" * (FIVE_MIB + 1000)}})
        return answer


async def test_an_event_and_a_result_that_no_topic_takes_become_dead_letters_by_place_and_the_rest_is_published(
    world: FlowWorld,
) -> None:
    worker = await world.start_local(runtime=Talkative())
    sent = [("a", b"k", b"{}"), ("e", b"k", b"event"), ("b", b"k", b"{}"), ("r", b"k", b"result"), ("c", b"k", b"{}")]

    await world.send(sent)
    await world.wait_for_acknowledged(5, within_s=30)

    letters = await world.read(TopicRole.DEAD_LETTERS)
    told = {header(letter, "dlq-command-id"): letter for letter in letters}
    assert set(told) == {"e", "r"}
    for id, letter in told.items():
        assert header(letter, "dlq-reason") == "unpublishable"
        assert f"concord status {id}" in header(letter, "dlq-detail")
        assert (letter.key, letter.value) == (None, None)
    offsets = {id: int(header(letter, "dlq-original-offset")) for id, letter in told.items()}
    assert offsets == {"e": 1, "r": 3}
    # The answer of "e" holds its event, so it is too large as well.
    assert {header(record, "ce_causationid") for record in await world.read(TopicRole.RESULTS)} == {"a", "b", "c"}
    assert {header(record, "ce_causationid") for record in await world.read(TopicRole.EVENTS)} == {"a", "b", "c", "r"}
    assert worker.ends == []
