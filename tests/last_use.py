"""When a server or system that tests share may end, though its fixture lives on: with the last test that wants it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

Stop = Callable[[], Awaitable[None]]


def is_last_to_want_it(
    request: pytest.FixtureRequest, *, also: Callable[[pytest.Item], bool] = lambda item: False
) -> bool:
    """Of the tests of this run, in their order, that have the fixture which asks; and of those that `also` tells."""
    users = [
        item for item in request.session.items if request.fixturename in getattr(item, "fixturenames", ()) or also(item)
    ]
    return request.node is users[-1]
