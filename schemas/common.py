"""Types that several domains share: identifiers, money, quantities, addresses, and the base of nested models.

Bounds are chosen so that sums stay inside a signed 64-bit column: one amount is at most `AMOUNT_MAX`, and handlers
refuse what would carry a balance past `BALANCE_MAX` or a stock past `STOCK_MAX`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Annotated, Any, Self, TypeVar

from annotated_types import Len
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

AMOUNT_MAX = 10**15
"""The largest single amount of money, in minor units: a price, a total, a refund."""

BALANCE_MAX = 9 * 10**15
"""The largest balance of a wallet, in minor units: what ScalarDB's BIGINT (2^53) holds, too."""

QUANTITY_MAX = 10**9
"""The largest quantity of one product that one command can speak of."""

STOCK_MAX = 10**15
"""The largest stock of one product."""

LINES_MAX = 2_000
"""The most lines an order or a list of items may have."""

PRINTABLE = r"^[^\x00-\x1f\x7f-\x9f]+$"
"""No control characters. Lone surrogates never get this far: they are not text to pydantic."""

Identifier = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=PRINTABLE)]
"""An id or a key that a client chose."""

Text = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=PRINTABLE)]
"""One line of text for people."""

Region = Annotated[str, StringConstraints(min_length=1, max_length=100, pattern=PRINTABLE)]
"""A prefecture or country. Shorter than an identifier, since the shipping key adds its slot to it."""

Currency = Annotated[str, StringConstraints(pattern=r"^[A-Z]{3}$")]
"""An ISO 4217 code."""

Amount = Annotated[int, Field(ge=0, le=AMOUNT_MAX)]
"""Money in the currency's minor unit; 0 is an amount too."""

Quantity = Annotated[int, Field(ge=1, le=QUANTITY_MAX)]
"""How many of a product."""

Count = Annotated[int, Field(ge=0, le=QUANTITY_MAX)]
"""How many, none included: an initial stock, a threshold."""

Milliseconds = Annotated[int, Field(ge=0)]
"""A point in time, in ms since the epoch."""


class Part(BaseModel):
    """Base of models nested in commands, events and records: frozen and strict as the messages are."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)

    @classmethod
    def of(cls, source: Any) -> Self:
        """The part whose fields have the values of `source`'s attributes of the same names."""
        return cls(**{name: getattr(source, name) for name in cls.model_fields})

    def as_json(self) -> dict[str, Any]:
        """As a command's result holds it: JSON types only."""
        return self.model_dump(mode="json")


class Address(Part):
    """Where goods go. Only the region matters to routing; the rest is for the carrier."""

    region: Region
    postal_code: Text | None = None
    city: Text | None = None
    street: Text | None = None
    recipient: Text | None = None


P = TypeVar("P")

Several = Annotated[tuple[P, ...], Len(1, LINES_MAX)]
"""At least one, at most `LINES_MAX`."""


def named_once(names: Iterable[Hashable]) -> bool:
    """Whether no name comes twice."""
    listed = list(names)
    return len(set(listed)) == len(listed)
