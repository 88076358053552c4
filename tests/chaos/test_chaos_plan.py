"""What chaos is made of, without a system: the table of faults, the schedule, the load and the proxy of Kafka."""

from __future__ import annotations

import asyncio
import struct
from collections import Counter
from itertools import islice
from typing import get_args

import pytest

from actors.audit import check_books
from actors.order_domains import ORDER_DOMAINS
from actors.rehearsal import COMMITTED, Rehearsal
from infra.failpoints import FAILPOINTS
from schemas.envelope import DeadLetterError, ParsedCommand, RawMessage, parse_command
from scripts.proof.on_stack import faults
from scripts.proof.on_stack.load import DOMAIN_OF, MIX, Load, Message, changed, with_repetitions
from scripts.proof.tcp_proxy import KafkaProxy


def read(message: Message) -> ParsedCommand:
    raw = RawMessage(message.topic, 0, 0, 0, message.key, message.headers, message.value, 0)
    command = parse_command(raw, domain=message.domain, max_bytes=2**20)
    assert command.key == message.key.decode()
    return command


def parsed(message: Message) -> str:
    return read(message).id


def test_the_table_has_every_way_to_hurt_and_every_role_is_killed_and_paused() -> None:
    ways = {type(fault.how) for fault in faults.FAULTS}
    roles = set(get_args(faults.Role))

    assert ways == set(get_args(faults.How))
    assert {fault.how.role for fault in faults.FAULTS if isinstance(fault.how, faults.Kill)} == roles
    assert {fault.how.role for fault in faults.FAULTS if isinstance(fault.how, faults.Pause)} == roles
    assert {(fault.how.server, fault.how.how) for fault in faults.FAULTS if isinstance(fault.how, faults.Mislead)} == {
        (server, lie) for server in get_args(faults.Server) for lie in get_args(faults.Lie)
    }
    assert len({fault.name for fault in faults.FAULTS}) == len(faults.FAULTS) >= 10


def test_a_seed_gives_one_schedule_which_has_each_kind_once_before_any_comes_again() -> None:
    one, again, other = (list(islice(faults.schedule(seed, pause_s=(1, 2)), 120)) for seed in (1, 1, 2))

    assert one == again != other
    kinds = [planned.fault.name for planned in one[: len(faults.FAULTS)]]
    assert sorted(kinds) == sorted(fault.name for fault in faults.FAULTS)
    assert all(1 <= planned.pause_s <= 2 for planned in one)


def test_every_failpoint_is_armed_or_said_not_to_be_met() -> None:
    assert set(faults.FAILPOINTS_ARMED) | set(faults.FAILPOINTS_NOT_MET) == set(FAILPOINTS)
    assert not set(faults.FAILPOINTS_ARMED) & set(faults.FAILPOINTS_NOT_MET)
    for name, lines in faults.FAILPOINTS_ARMED.items():
        assert name in [line.partition("=")[0] for line in lines]
    assert set(islice(faults.points(1), len(faults.FAILPOINTS_ARMED))) == set(faults.FAILPOINTS_ARMED)


def test_the_load_is_of_commands_that_the_system_reads_in_all_domains_and_about_hot_keys() -> None:
    load = Load(1)
    messages = [*load.opening(), *(load.next() for _ in range(3_000))]

    assert len({parsed(message) for message in messages}) == len(messages)
    assert {message.type for message in messages} == set(DOMAIN_OF)
    assert {message.domain for message in messages} == {"orders", "payment", "inventory", "shipping"}
    hot = Counter(message.key for message in messages if message.domain in ("orders", "payment")).most_common(2)
    assert hot[0][1] > 5 * hot[1][1]
    assert set(MIX) | {"OpenWallet", "RegisterProduct"} == set(DOMAIN_OF)


async def test_in_peace_every_command_of_the_load_commits() -> None:
    load, shop = Load(4), Rehearsal(ORDER_DOMAINS)
    for message in [*load.opening(), *(load.next() for _ in range(800))]:
        answer = await shop.run(read(message).command)
        assert (answer.status, answer.reason) == (COMMITTED, ""), message
    assert check_books(shop.tables()) == []


def test_an_order_is_shipped_completed_or_cancelled_by_its_customer_and_after_it_was_placed() -> None:
    load = Load(2)
    placed: dict[bytes, bytes] = {}
    ended: list[str] = []
    for message in (load.next() for _ in range(3_000)):
        if message.type in ("PlaceOrder", "ShipOrder", "CompleteOrder", "CancelOrder"):
            order_id = message.value.split(b'"order_id": ')[1].split(b'"')[1]
            if message.type == "PlaceOrder":
                placed[order_id] = message.key
            else:
                assert placed[order_id] == message.key
                ended.append(f"{message.type} {order_id!r}")
    assert len(ended) == len(set(ended)) > 100


def test_a_tenth_of_the_messages_repeats_an_id_and_some_of_these_have_other_content() -> None:
    messages = list(islice(with_repetitions(Load(3), 3), 5_000))
    first: dict[str, Message] = {}
    repeated = [message for message in messages if message.id in first or not first.setdefault(message.id, message)]
    other = [message for message in repeated if message != first[message.id]]

    assert 0.08 < len(repeated) / len(messages) < 0.12
    assert 0.005 < len(other) / len(messages) < 0.03
    assert {parsed(message) for message in other} <= set(first)
    assert list(islice(with_repetitions(Load(3), 3), 5_000)) == messages


def test_poison_is_what_nobody_can_carry_out() -> None:
    for message in Load(1).poison():
        oversize = len(message.value) > 2**20
        raw = RawMessage(
            message.topic,
            0,
            0,
            0,
            message.key,
            message.headers,
            None if oversize else message.value,
            len(message.value) if oversize else 0,
        )
        with pytest.raises(DeadLetterError):
            parse_command(raw, domain=message.domain, max_bytes=2**20)


def test_a_changed_command_has_the_same_id_and_key() -> None:
    load = Load(1)
    for type in ("PlaceOrder", "TopUpWallet", "TakePayment"):
        original = load.of_type(type)
        other = changed(original)
        assert (other.id, other.key, other.headers) == (original.id, original.key, original.headers)
        assert other.value != original.value
        assert parsed(other) == original.id


async def test_the_proxy_of_kafka_tells_clients_its_own_address_however_answers_are_cut() -> None:
    async def broker(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        port = server.sockets[0].getsockname()[1]
        body = b"\x00\x09127.0.0.1" + struct.pack(">i", port) + b"rest"
        answer = struct.pack(">i", len(body)) + body
        for byte in range(0, 2 * len(answer), 5):
            writer.write((answer * 2)[byte : byte + 5])
            await writer.drain()
            await asyncio.sleep(0.001)
        writer.close()

    server = await asyncio.start_server(broker, "127.0.0.1", 0)
    async with server, KafkaProxy("127.0.0.1", server.sockets[0].getsockname()[1]) as proxy:
        reader, writer = await asyncio.open_connection(proxy.host, proxy.port)
        writer.write(b"?")
        told = await reader.read(-1)
        writer.close()

    one = b"\x00\x09127.0.0.1" + struct.pack(">i", proxy.port) + b"rest"
    assert told == (struct.pack(">i", len(one)) + one) * 2
