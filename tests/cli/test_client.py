"""The client of the command topics against a real Kafka: answers find their commands, whatever happens to the broker.

A responder in this process stands for the system: it answers each command once, in the order of the log.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from infra.messaging.errors import BrokerUnavailableError, MessageTooLargeError, MessagingError, UnknownTopicError
from infra.messaging.producer import EventProducer
from infra.messaging.reader import Record, read_all
from infra.messaging.topics import TopicSpec, ensure_topics
from infra.servers.kafka import LocalKafka
from schemas.envelope import build_result_message
from schemas.outcome import Answer
from scripts.cli.check import identity
from scripts.cli.client import CommandClient, Submitted
from scripts.cli.send_command import Outgoing, outgoing, raw
from tests.end_to_end.harness import eventually

pytestmark = pytest.mark.system

TOPICS = [TopicSpec(f"payment.{role}", 1) for role in ("commands", "results")]


def wallet(number: int) -> Outgoing:
    body = b'{"customer_id": "c%d", "currency": "GBP"}' % number
    return outgoing("OpenWallet", body, key=None, id=f"id-{number}", time_ms=0)


def submit(client: CommandClient, command: Outgoing) -> Submitted:
    return client.submit(command.message, id=command.id, digest=command.digest)


@dataclass
class Responder:
    """Answers what is on the commands topic. `seen` are the ids in the order of the log, repeats included."""

    bootstrap: Callable[[], str]
    seen: list[str] = field(default_factory=list)
    read: int = 0
    ended: bool = False

    async def run(self) -> None:
        while not self.ended:
            with suppress(MessagingError):
                producer = EventProducer(self.bootstrap(), delivery_timeout_ms=2000)
                await producer.start()
                try:
                    while not self.ended:
                        await self._answer_all(producer)
                        await asyncio.sleep(0.05)
                finally:
                    await producer.stop()
            await asyncio.sleep(0.1)

    async def _answer_all(self, producer: EventProducer) -> None:
        async for record in read_all(self.bootstrap(), ["payment.commands"]):
            if record.offset >= self.read:
                message = build_result_message(self._answer(record), domain="payment")
                await producer.send_and_wait(message.topic, message.key, message.value, message.headers)  # type: ignore[arg-type]
                self.read = record.offset + 1

    def _answer(self, record: Record) -> Answer:
        key, id, digest = identity(record, "payment", 1 << 20)
        self.seen.append(id)
        return Answer(id=id, type="OpenWallet", key=key, status="committed", digest=digest, received_at_ms=1)


@asynccontextmanager
async def answering(bootstrap: Callable[[], str]) -> AsyncIterator[Responder]:
    responder = Responder(bootstrap)
    task = asyncio.create_task(responder.run())
    try:
        yield responder
    finally:
        responder.ended = True
        await task


async def test_each_command_gets_its_own_answer_through_a_killed_broker(tmp_path: Path) -> None:
    kafka = LocalKafka(tmp_path)
    await kafka.start()
    try:
        await ensure_topics(kafka.bootstrap_servers, TOPICS)
        async with (
            CommandClient(lambda: kafka.bootstrap_servers, ["payment"]) as client,
            answering(lambda: kafka.bootstrap_servers) as responder,
        ):
            before = [submit(client, wallet(number)) for number in range(20)]
            assert [(await each.answer).id for each in before] == [f"id-{number}" for number in range(20)]

            assert kafka.pid is not None
            os.kill(kafka.pid, signal.SIGKILL)
            await kafka.wait()
            during = [submit(client, wallet(number)) for number in range(20, 40)]
            await kafka.start()
            after = [submit(client, wallet(number)) for number in range(40, 60)]

            answers = [await each.answer for each in (*during, *after)]
            assert [answer.id for answer in answers] == [f"id-{number}" for number in range(20, 60)]
            assert [answer.digest for answer in answers] == [each.digest for each in (*during, *after)]
            # First occurrences are in the order of submission, whatever had to be published again.
            assert list(dict.fromkeys(responder.seen)) == [f"id-{number}" for number in range(60)]
            assert all(each.latency_s > 0 for each in (*before, *during, *after))
    finally:
        await kafka.stop()


@pytest.fixture
async def topics(kafka: LocalKafka) -> LocalKafka:
    await ensure_topics(kafka.bootstrap_servers, TOPICS)
    return kafka


async def test_a_command_without_a_readable_id_is_answered_under_its_place(topics: LocalKafka) -> None:
    def bootstrap() -> str:
        return topics.bootstrap_servers

    nameless = raw("OpenWallet", b"\x80", key="k", id=None, topic=None, headers=["ce_id="], time_ms=0)
    async with CommandClient(bootstrap, ["payment"]) as client, answering(bootstrap):
        submitted = submit(client, nameless)

        answer = await asyncio.wait_for(submitted.answer, 30)
        place = submitted.delivered.result()

    assert answer.id == f"unreadable:payment.commands:{place.partition}:{place.offset}"


async def test_an_answer_that_is_here_before_the_place_of_its_command_is_known_is_not_lost(
    topics: LocalKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bootstrap() -> str:
        return topics.bootstrap_servers

    confirm, confirmations = CommandClient._on_delivery, []
    monkeypatch.setattr(CommandClient, "_on_delivery", lambda *confirmation: confirmations.append(confirmation))
    nameless = raw("OpenWallet", b"\x80", key="k", id=None, topic=None, headers=["ce_id="], time_ms=0)
    async with CommandClient(bootstrap, ["payment"]) as client, answering(bootstrap):
        submitted = submit(client, nameless)
        await eventually(lambda: len(confirmations) == 1, "the broker's word", within_s=30)
        [(_, _, delivered)] = confirmations
        place = delivered.result()
        id = f"unreadable:payment.commands:{place.partition}:{place.offset}"
        # Among answers to commands of other tests.
        await eventually(lambda: id in client._early, "its answer", within_s=30)
        assert not submitted.answer.done()

        confirm(client, submitted, delivered)

        assert submitted.answer.result().id == id
        assert submitted.latency_s > 0
        assert client._early == {}


async def test_the_same_id_with_another_payload_gets_the_answer_to_its_own(topics: LocalKafka) -> None:
    def bootstrap() -> str:
        return topics.bootstrap_servers

    one = outgoing("OpenWallet", b'{"customer_id": "x", "currency": "GBP"}', key=None, id="same", time_ms=0)
    other = outgoing("OpenWallet", b'{"customer_id": "x", "currency": "EUR"}', key=None, id="same", time_ms=0)
    async with CommandClient(bootstrap, ["payment"]) as client, answering(bootstrap):
        answers = [await asyncio.wait_for(submit(client, each).answer, 30) for each in (one, other, one)]

    assert [answer.digest for answer in answers] == [one.digest, other.digest, one.digest]


async def test_a_message_that_can_never_be_sent_fails_alone(topics: LocalKafka) -> None:
    def bootstrap() -> str:
        return topics.bootstrap_servers

    huge = raw("OpenWallet", b"x" * (9 << 20), key="k", id="huge", topic=None, headers=[], time_ms=0)
    async with CommandClient(bootstrap, ["payment"]) as client, answering(bootstrap):
        failed, sent = submit(client, huge), submit(client, wallet(1000))

        with pytest.raises(MessageTooLargeError):
            await asyncio.wait_for(failed.answer, 30)
        assert (await asyncio.wait_for(sent.answer, 30)).id == "id-1000"


async def test_without_a_broker_entering_says_so() -> None:
    with pytest.raises(BrokerUnavailableError, match="concord up"):
        async with CommandClient(lambda: "127.0.0.1:1", ["payment"]):
            raise AssertionError("entered")


async def test_without_its_topics_entering_says_so(kafka: LocalKafka) -> None:
    with pytest.raises(UnknownTopicError):
        async with CommandClient(lambda: kafka.bootstrap_servers, ["nonsense"]):
            raise AssertionError("entered")
