"""What holds for all four domains: reasons are listed, commands are handled, rows find their owner."""

from __future__ import annotations

import ast
import inspect
import re
from importlib import import_module
from types import ModuleType

import pytest

from actors.audit import AUDITED
from actors.domain import Domain, Table
from actors.order_domains import ORDER_DOMAINS

NAMES = [domain.name for domain in ORDER_DOMAINS]
TABLES = [table for domain in ORDER_DOMAINS for table in domain.tables]


def handlers_of(name: str) -> ModuleType:
    return import_module(f"actors.{name}.handlers")


def reasons_raised(module: ModuleType) -> set[str]:
    """The first argument of every `Refused(...)` in the module's source."""
    reasons = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Refused":
            (reason, *_) = node.args
            assert isinstance(reason, ast.Constant), f"a reason that is not a literal, line {node.lineno}"
            reasons.add(reason.value)
    return reasons


@pytest.mark.parametrize("name", NAMES)
def test_every_reason_that_is_raised_is_listed_and_the_other_way_round(name: str) -> None:
    module = handlers_of(name)
    assert reasons_raised(module) == set(module.REASONS)
    assert import_module(f"actors.{name}").REASONS is module.REASONS


@pytest.mark.parametrize("name", NAMES)
def test_reasons_are_snake_case_with_one_sentence_each(name: str) -> None:
    for reason, sentence in handlers_of(name).REASONS.items():
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", reason)
        assert sentence.endswith(".")
        assert ". " not in sentence


@pytest.mark.parametrize("domain", ORDER_DOMAINS, ids=NAMES)
def test_every_command_of_a_domain_has_a_handler(domain: Domain) -> None:
    assert set(domain.handlers) == set(import_module(f"schemas.{domain.name}").COMMANDS)


@pytest.mark.parametrize("domain", ORDER_DOMAINS, ids=NAMES)
def test_commands_and_events_name_their_domain(domain: Domain) -> None:
    schemas = import_module(f"schemas.{domain.name}")
    assert {message.domain for message in (*schemas.COMMANDS, *schemas.EVENTS)} == {domain.name}


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.full_name)
def test_tables_find_rows_by_routing_key(table: Table) -> None:
    assert table.routing in table.key
    assert not table.sliced_by or table.sliced_by in table.key
    assert set(table.key) <= set(table.record.model_fields)
    assert table.namespace in NAMES


def test_every_table_is_audited() -> None:
    assert set(AUDITED) == set(TABLES)
