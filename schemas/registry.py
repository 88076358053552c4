"""Message type -> model, for each domain, and the upcasts that carry bodies of older versions to the current one.

Adding a domain is a line in DOMAINS, a message a name in its module's COMMANDS or EVENTS, an older version a line in
UPCASTS. Types are unique over all domains: `concord send TYPE` needs no domain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from importlib import import_module
from typing import Any, TypeVar

from schemas.message import Command, Event, Message

DOMAINS = ("inventory", "payment", "shipping", "orders")
"""Every domain, in the order of a start; each has a module of its name beside this one."""

Body = dict[str, Any]
Upcast = Callable[[Body], Body]
M = TypeVar("M", bound=Message)


def _price_became_unit_price(body: Body) -> Body:
    """RegisterProduct 1 called it `price`; since lines carry prices too, version 2 says of what: `unit_price`."""
    moved = {name: value for name, value in body.items() if name not in ("price", "unit_price")}
    return moved | {"unit_price": body["price"]} if "price" in body else moved


UPCASTS: Mapping[tuple[str, int], Upcast] = {
    ("RegisterProduct", 1): _price_became_unit_price,
}
"""(type, version) -> the body as the next version has it. A new dict; the old one is left as it is."""


class UnknownTypeError(LookupError):
    """No message of this name."""


class UnknownVersionError(LookupError):
    """The message exists, but there is no way from this version to the current one."""


class Registry:
    """The messages of a system. Refuses, as it is made, two messages of one name and upcasts that lead nowhere."""

    def __init__(
        self,
        *,
        commands: Iterable[type[Command]],
        events: Iterable[type[Event]],
        upcasts: Mapping[tuple[str, int], Upcast],
    ) -> None:
        self.commands: dict[str, type[Command]] = _by_name(commands)
        self.events: dict[str, type[Event]] = _by_name(events)
        both = self.commands.keys() & self.events.keys()
        assert not both, f"both command and event: {sorted(both)}"
        self._upcasts = dict(upcasts)
        known: dict[str, type[Message]] = {**self.commands, **self.events}
        for name, version in self._upcasts:
            assert name in known, f"an upcast of {name}, which is not a message"
            assert 1 <= version < known[name].version, f"an upcast from {name}/{version}, which is not an older version"

    def command(self, type_name: str) -> type[Command]:
        """The command of that name. Raises UnknownTypeError."""
        return _look_up(self.commands, type_name)

    def event(self, type_name: str) -> type[Event]:
        """The event of that name. Raises UnknownTypeError."""
        return _look_up(self.events, type_name)

    def commands_of(self, domain: str) -> tuple[type[Command], ...]:
        return tuple(model for model in self.commands.values() if model.domain == domain)

    def events_of(self, domain: str) -> tuple[type[Event], ...]:
        return tuple(model for model in self.events.values() if model.domain == domain)

    def check_version(self, model: type[Message], version: int) -> None:
        """Raises UnknownVersionError when `version` is newer than the model or cannot be carried to it."""
        if version == model.version:
            return
        accepted = self.accepted_versions(model)
        if version not in accepted:
            known = " and ".join(map(str, accepted))
            raise UnknownVersionError(f"{model.type_name()}/{version}; understood: {known}")

    def accepted_versions(self, model: type[Message]) -> tuple[int, ...]:
        """The versions of `model` that are understood, oldest first."""
        oldest = model.version
        while (model.type_name(), oldest - 1) in self._upcasts:
            oldest -= 1
        return tuple(range(oldest, model.version + 1))

    def upcast(self, model: type[Message], version: int, body: Body) -> Body:
        """`body` of that version as the model's own version has it. Raises UnknownVersionError."""
        self.check_version(model, version)
        for old in range(version, model.version):
            body = self._upcasts[model.type_name(), old](body)
        return body


def _by_name(models: Iterable[type[M]]) -> dict[str, type[M]]:
    named: dict[str, type[M]] = {}
    for model in models:
        name = model.type_name()
        assert name not in named, f"two messages called {name}"
        named[name] = model
    return named


def _look_up(models: Mapping[str, type[M]], type_name: str) -> type[M]:
    model = models.get(type_name)
    if model is None:
        raise UnknownTypeError(type_name)
    return model


@lru_cache(maxsize=1)
def default_registry() -> Registry:
    """The messages of DOMAINS. Made once, at first use, so that importing this module stays cheap."""
    modules = [import_module(f"schemas.{domain}") for domain in DOMAINS]
    for domain, module in zip(DOMAINS, modules, strict=True):
        for model in (*module.COMMANDS, *module.EVENTS):
            assert model.domain == domain, f"{model.__name__} stands in schemas.{domain} but belongs to {model.domain}"
    return Registry(
        commands=[model for module in modules for model in module.COMMANDS],
        events=[model for module in modules for model in module.EVENTS],
        upcasts=UPCASTS,
    )
