"""Which carrier serves a region and how long it takes; tracking numbers.

A tracking number is `CC`, twelve characters and a check character, all of Crockford's base 32 (no I, L, O, U). The
check is Luhn's algorithm modulo 32: it finds every single wrong character and nearly every swap of neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from uuid import UUID

ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
PREFIX = "CC"
LENGTH = 12

DAY_MS = 24 * 60 * 60 * 1000


@dataclass(frozen=True)
class Service:
    """A carrier and the days it takes from the order to the door."""

    carrier: str
    days: int


DEFAULT_SERVICE = Service("Globe Parcel", 10)

SERVICES: Mapping[str, Service] = {
    "東京都": Service("Kanto Express", 1),
    "神奈川県": Service("Kanto Express", 1),
    "大阪府": Service("Kansai Express", 2),
    "北海道": Service("Northern Freight", 3),
    "沖縄県": Service("Island Freight", 4),
    "Japan": Service("Kanto Express", 2),
    "United Kingdom": Service("Albion Post", 2),
    "EIRE": Service("Albion Post", 3),
    "Channel Islands": Service("Albion Post", 3),
    "France": Service("Continental Parcel", 4),
    "Germany": Service("Continental Parcel", 4),
    "Netherlands": Service("Continental Parcel", 4),
    "Belgium": Service("Continental Parcel", 4),
    "Spain": Service("Continental Parcel", 5),
    "Portugal": Service("Continental Parcel", 5),
    "Australia": Service("Southern Cross Freight", 12),
}


def service_for(region: str) -> Service:
    """The service of `region`, or the one that goes everywhere."""
    return SERVICES.get(region, DEFAULT_SERVICE)


def tracking_number(shipment_id: str) -> str:
    """The tracking number of a shipment, from 60 bits of its UUID."""
    number = UUID(shipment_id).int & (32**LENGTH - 1)
    digits = [number >> (5 * place) & 31 for place in reversed(range(LENGTH))]
    return PREFIX + "".join(ALPHABET[digit] for digit in (*digits, _check_digit(digits)))


def is_tracking_number(text: str) -> bool:
    """Whether `text` is a well-formed tracking number."""
    body = text.removeprefix(PREFIX)
    if len(text) != len(PREFIX) + LENGTH + 1 or len(body) != LENGTH + 1 or any(char not in ALPHABET for char in body):
        return False
    *digits, check = (ALPHABET.index(char) for char in body)
    return check == _check_digit(digits)


def _check_digit(digits: list[int]) -> int:
    """Luhn modulo 32: every second digit from the right is doubled, and the digits of the double are added."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        addend = digit * 2 if place % 2 == 0 else digit
        total += addend // 32 + addend % 32
    return -total % 32
