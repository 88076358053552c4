"""One batch of commands: to their actors, and what came of them to Kafka, in order, until Kafka has it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from flow_world import RememberingRuntime, answer_to, command_id, placement_of, raw_command, until

from actors.runtime import ActorLostError
from infra import failpoints
from infra.messaging.errors import BrokerUnavailableError, DeliveryFailedError, MessageTooLargeError, MessagingError
from infra.storage.errors import UnavailableStorageError
from schemas.envelope import RawMessage
from streams.asking import Patience
from streams.command_processor import CommandProcessor
from streams.partitions import Received

PARTITION = ("test.commands", 0)
QUICK = Patience(pause_s=0.001, longest_pause_s=0.001, health_every_s=0.01, health_within_s=0.01)


class FakeProducer:
    """Keeps what it is sent. `fail` maps the number of a send (from 0) to what its delivery comes to."""

    def __init__(self, fail: dict[int, MessagingError] | None = None) -> None:
        self.sent: list[tuple[str, bytes | None, bytes | None, dict[str, Any]]] = []
        self.confirmed: list[tuple[str, bytes | None]] = []
        self.confirm = asyncio.Event()
        self.confirm.set()
        self._fail = fail or {}

    async def send(
        self, topic: str, key: bytes | None, value: bytes | None, headers: Sequence[tuple[str, Any]] = ()
    ) -> asyncio.Future[None]:
        number = len(self.sent)
        self.sent.append((topic, key, value, dict(headers)))
        return asyncio.ensure_future(self._deliver(number, topic, value))

    async def _deliver(self, number: int, topic: str, value: bytes | None) -> None:
        await self.confirm.wait()
        if number in self._fail:
            raise self._fail[number]
        self.confirmed.append((topic, value))

    def told(self, topic: str) -> list[str]:
        """The commands that messages on `topic` are about, in the order of sending."""
        name = "dlq-command-id" if topic.endswith("dlq") else "ce_causationid"
        return [headers[name].decode() for sent, _, _, headers in self.sent if sent == topic]


def processor(runtime: Any, producer: FakeProducer, **more: Any) -> CommandProcessor:
    return CommandProcessor(
        domains=["test"],
        runtime=runtime,
        placement=placement_of("test"),
        producer=producer,
        consumer_group="concord",
        patience=QUICK,
        publish_pause_s=0.001,
        **more,
    )


def batch(*values: tuple[str, bytes, bytes]) -> list[Received]:
    return [
        Received(raw_command(id, key=key, value=value, offset=offset)) for offset, (id, key, value) in enumerate(values)
    ]


def nothing() -> None: ...


async def test_each_command_goes_to_the_actor_of_its_key_in_order() -> None:
    asked: dict[str, list[str]] = {}

    class Runtime(RememberingRuntime):
        async def ask(self, actor: str, method: str, items: Sequence[Any]) -> list[Any]:
            asked.setdefault(actor, []).extend(map(command_id, items))
            return await super().ask(actor, method, items)

    commands = batch(*((f"c{n}", b"key-%d" % (n % 5), b"{}") for n in range(20)))
    await processor(Runtime(), FakeProducer()).work(PARTITION, commands, nothing)

    placement = placement_of("test")
    assert set(asked) == {"test-0", "test-1"}
    for actor, ids in asked.items():
        expected = [c for c in commands if placement.actor_of("test", c.raw.key or b"") == actor]
        assert ids == [command_id(c.raw) for c in expected]


async def test_events_and_results_are_published_in_the_order_of_the_log() -> None:
    producer = FakeProducer()

    await processor(RememberingRuntime(), producer).work(
        PARTITION, batch(*((f"c{n}", b"key-%d" % (n % 3), b"{}") for n in range(10))), nothing
    )

    ids = [f"c{n}" for n in range(10)]
    assert producer.told("test.events") == ids
    assert producer.told("test.results") == ids
    assert producer.told("test.commands.dlq") == []
    assert len(producer.confirmed) == len(producer.sent) == 20


async def test_the_batch_is_done_only_when_kafka_has_everything() -> None:
    producer = FakeProducer()
    producer.confirm.clear()

    work = asyncio.ensure_future(
        processor(RememberingRuntime(), producer).work(PARTITION, batch(("c0", b"k", b"poison")), nothing)
    )
    for _ in range(20):
        await asyncio.sleep(0)
    assert producer.told("test.commands.dlq") == ["c0"]
    assert not work.done()

    producer.confirm.set()
    await asyncio.wait_for(work, 5)


async def test_poison_goes_to_the_dead_letters_with_its_bytes_and_the_others_go_on() -> None:
    producer = FakeProducer()

    await processor(RememberingRuntime(), producer).work(
        PARTITION, batch(("c0", b"k", b"{}"), ("c1", b"k", b"poison \x80\x04"), ("c2", b"k", b"{}")), nothing
    )

    (letter,) = [sent for sent in producer.sent if sent[0] == "test.commands.dlq"]
    assert letter[1:3] == (b"k", b"poison \x80\x04")
    assert letter[3]["dlq-reason"] == b"not_json"
    assert letter[3]["dlq-detail"] == b"a test's poison"
    assert letter[3]["dlq-original-offset"] == b"1"
    assert letter[3]["dlq-consumer-group"] == b"concord"
    assert letter[3]["ce_id"] == b"c1"
    assert producer.told("test.results") == ["c0", "c1", "c2"]
    assert producer.told("test.events") == ["c0", "c2"]


async def test_a_value_that_is_too_long_stays_here_and_its_bytes_reach_the_dead_letters() -> None:
    producer, seen = FakeProducer(), []

    class Runtime(RememberingRuntime):
        async def ask(self, actor: str, method: str, items: Sequence[Any]) -> list[Any]:
            seen.extend(items)
            return await super().ask(actor, method, items)

    original = b"y" * 2_000
    raw = RawMessage("test.commands", 0, 0, 1, b"k", (("ce_id", b"c0"),), b"", oversize=2_000)
    await processor(Runtime(), producer).work(PARTITION, [Received(raw, original)], nothing)

    assert [message.value for message in seen] == [b""]
    (letter,) = [sent for sent in producer.sent if sent[0] == "test.commands.dlq"]
    assert letter[2] == original
    assert letter[3]["dlq-reason"] == b"too_large"


async def test_a_lost_actor_is_asked_again_with_the_same_batch() -> None:
    runtime, producer, tries = RememberingRuntime(lose_next=3), FakeProducer(), []

    await processor(runtime, producer).work(PARTITION, batch(("c0", b"k", b"{}")), lambda: tries.append(1))

    assert runtime.executed == ["c0"]
    assert producer.told("test.results") == ["c0"]
    assert len(tries) >= 3


async def test_a_storage_that_is_away_is_waited_for() -> None:
    class Runtime(RememberingRuntime):
        away = 3

        async def ask(self, actor: str, method: str, items: Sequence[Any]) -> list[Any]:
            if method == "execute" and self.away:
                self.away -= 1
                raise UnavailableStorageError("a test's")
            return await super().ask(actor, method, items)

    producer = FakeProducer()
    await processor(Runtime(), producer).work(PARTITION, batch(("c0", b"k", b"{}")), nothing)

    assert producer.told("test.results") == ["c0"]


async def test_an_unexpected_error_of_an_actor_is_raised() -> None:
    class Runtime(RememberingRuntime):
        async def ask(self, actor: str, method: str, items: Sequence[Any]) -> list[Any]:
            raise ValueError("a test's")

    with pytest.raises(ExceptionGroup) as raised:
        await processor(Runtime(), FakeProducer()).work(PARTITION, batch(("c0", b"k", b"{}")), nothing)
    assert isinstance(raised.value.exceptions[0], ValueError)


async def test_a_silent_actor_that_lives_is_a_try_and_one_that_does_not_is_none() -> None:
    class Runtime(RememberingRuntime):
        alive = True
        release = asyncio.Event()

        async def ask(self, actor: str, method: str, items: Sequence[Any]) -> list[Any]:
            if method == "health":
                if not self.alive:
                    raise ActorLostError(actor)
                return [None]
            await self.release.wait()
            return [answer_to(raw) for raw in items]

    runtime, tries = Runtime(), []
    work = asyncio.ensure_future(
        processor(runtime, FakeProducer()).work(PARTITION, batch(("c0", b"k", b"{}")), lambda: tries.append(1))
    )
    await until(lambda: len(tries) >= 3)
    runtime.alive = False
    await asyncio.sleep(0.05)
    before = len(tries)
    await asyncio.sleep(0.1)
    assert len(tries) == before

    runtime.release.set()
    await asyncio.wait_for(work, 5)


@pytest.mark.parametrize("failure", [BrokerUnavailableError("kafka:9092"), DeliveryFailedError("a test's")])
async def test_after_a_failed_delivery_everything_from_there_is_sent_again_in_order(failure: MessagingError) -> None:
    producer, tries = FakeProducer({3: failure, 4: failure}), []

    await processor(RememberingRuntime(), producer).work(
        PARTITION, batch(*((f"c{n}", b"k", b"{}") for n in range(4))), lambda: tries.append(1)
    )

    sent = [(topic, headers["ce_causationid"].decode()) for topic, _, _, headers in producer.sent]
    once = [(topic, f"c{n}") for n in range(4) for topic in ("test.events", "test.results")]
    assert sent == once + once[3:]
    assert len(tries) == 1


class PickyProducer(FakeProducer):
    """Finds the event of one command too large, and with it what was sent just before, as a broker does by batches."""

    def __init__(self, command_id: str) -> None:
        super().__init__()
        self._command_id = command_id

    async def _deliver(self, number: int, topic: str, value: bytes | None) -> None:
        await asyncio.sleep(0)  # until all of a batch were sent
        if self._is_too_large(number):
            raise MessageTooLargeError(topic, 9)
        if number + 1 < len(self.sent) and self._is_too_large(number + 1):
            raise DeliveryFailedError("given up because an earlier message failed")
        await super()._deliver(number, topic, value)

    def _is_too_large(self, number: int) -> bool:
        topic, _, _, headers = self.sent[number]
        return topic == "test.events" and headers["ce_causationid"].decode() == self._command_id


async def test_a_message_that_its_topic_never_takes_is_replaced_by_a_word_about_it_and_nothing_else_is_lost() -> None:
    producer = PickyProducer("c1")
    commands = batch(*((f"c{n}", b"k", b"{}") for n in range(3)))

    await asyncio.wait_for(processor(RememberingRuntime(), producer).work(PARTITION, commands, nothing), 5)

    once = dict.fromkeys(topic for topic, _ in producer.confirmed)
    assert list(once) == ["test.events", "test.results", "test.commands.dlq"]
    confirmed = [(topic, value) for topic, value in producer.confirmed if topic != "test.commands.dlq"]
    assert {json.loads(value or b"")["id"] for topic, value in confirmed if topic == "test.results"} == {
        "c0",
        "c1",
        "c2",
    }
    assert len({value for topic, value in confirmed if topic == "test.events"}) == 2
    [(_, key, value, told)] = [sent for sent in producer.sent if sent[0] == "test.commands.dlq"]
    place = [told[f"dlq-original-{part}"] for part in ("topic", "partition", "offset")]
    assert (told["dlq-reason"], told["dlq-command-id"], place) == (
        b"unpublishable",
        b"c1",
        [b"test.commands", b"0", b"1"],
    )
    assert (key, value) == (None, None)
    assert b"concord status c1" in told["dlq-detail"]


async def test_a_message_that_was_only_too_large_together_with_others_is_published() -> None:
    producer = FakeProducer({2: MessageTooLargeError("test.events", 9), 3: MessageTooLargeError("test.results", 9)})

    await processor(RememberingRuntime(), producer).work(
        PARTITION, batch(*((f"c{n}", b"k", b"{}") for n in range(2))), nothing
    )

    assert not producer.told("test.commands.dlq")
    assert {topic for topic, _ in producer.confirmed} == {"test.events", "test.results"}
    assert len(set(producer.confirmed)) == 4


async def test_a_batch_that_is_done_again_publishes_the_same_messages() -> None:
    first, second = FakeProducer(), FakeProducer()
    commands = batch(("c0", b"k", b"{}"), ("c1", b"k", b"poison"), ("c2", b"l", b"{}"))

    await processor(RememberingRuntime(), first).work(PARTITION, commands, nothing)
    await processor(RememberingRuntime(), second).work(PARTITION, commands, nothing)

    assert first.sent == second.sent


async def test_answers_are_told_once_they_are_published() -> None:
    producer, told = FakeProducer(), []

    def answered(domain: str, answer: Any, sent_at_ms: int) -> None:
        assert len(producer.confirmed) == len(producer.sent)
        told.append((domain, answer.id, answer.status, sent_at_ms))

    commands = batch(("c0", b"k", b"{}"), ("c1", b"k", b"poison"))
    await processor(RememberingRuntime(), producer, answered=answered).work(PARTITION, commands, nothing)

    times_ms = [command.raw.timestamp_ms for command in commands]
    assert told == [("test", "c0", "committed", times_ms[0]), ("test", "c1", "dead-lettered", times_ms[1])]


async def test_every_failpoint_of_a_batch_is_reached_in_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    reached: list[str] = []

    async def note(name: str) -> None:
        assert name in failpoints.FAILPOINTS
        reached.append(name)

    monkeypatch.setattr("streams.command_processor.reach", note)
    await processor(RememberingRuntime(), FakeProducer()).work(PARTITION, batch(("c0", b"k", b"poison")), nothing)

    assert reached == [
        "worker.before_execute",
        "worker.after_execute",
        "worker.before_publish",
        "worker.before_dead_letter",
        "worker.after_dead_letter",
        "worker.after_publish",
    ]
