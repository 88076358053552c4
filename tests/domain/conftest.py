from __future__ import annotations

import pytest
from shop import Shop, product, wallet


@pytest.fixture
async def shop() -> Shop:
    """Three products of two categories, 100 of each, and ada's wallet with 10,000 pence."""
    shop = Shop()
    for command in (product("mug"), product("bowl"), product("rake", category="garden"), wallet("ada")):
        await shop.committed(command)
    return shop
