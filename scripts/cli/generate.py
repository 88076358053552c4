"""Invoices of the shape of Online Retail, for a machine that does not have that data set.

    python -m scripts.cli.generate --invoices 300 --seed 1 > invoices.csv

The same seed gives the same file. What it imitates of the real shop's file, in roughly its proportions: most
customers in the United Kingdom; a few hot products and a long tail; half of the invoices with more than ten lines
and a few with very many; one product on several lines of an invoice at different prices; guests; cancellations
(`C…`, negative quantities); stock write-offs (no customer, negative quantity, price 0); orders that total 0; prices
with three decimals; descriptions that are empty or full of punctuation; codes that are no products (`POST`, `M`) or
that differ in case only; a bad-debt correction (`A…`); an invoice that another one splits in two.
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TextIO

from scripts.cli.retail import COLUMNS

_ADJECTIVES = ("WHITE", "RED", "VINTAGE", "HANGING", "SET OF 6", "ROSE", "WOODEN", "METAL", "GLASS", "PAPER")
_NOUNS = ("LANTERN", "T-LIGHT HOLDER", "CUP, SAUCER", 'RECORD FRAME 7" SINGLE SIZE', "MUG", "BUNTING", "CLOCK", "CARD")
_COUNTRIES = ("United Kingdom",) * 93 + ("France", "Germany", "EIRE", "Netherlands", "Norway", "Spain", "Japan")
_SPECIAL_CODES = (
    ("POST", "POSTAGE", "18.0"),
    ("M", "Manual", "1.25"),
    ("m", "Manual", "2.55"),
    ("PADS", "PADS TO MATCH ALL CUSHIONS", "0.001"),
)
_FIRST_INVOICE = 536365
_START = datetime(2010, 12, 1, 8, 26)


@dataclass(frozen=True)
class _Product:
    code: str
    description: str
    prices: tuple[str, ...]


_SPECIAL = tuple(_Product(code, name, (price,)) for code, name, price in _SPECIAL_CODES)


def generate(*, invoices: int, seed: int) -> Iterator[list[str]]:
    """CSV rows, the header first: `invoices` invoices and the one that splits another, all decided by `seed`."""
    rng = random.Random(seed)
    yield list(COLUMNS)
    products = _products(rng, max(60, invoices))
    weights = [1 / (rank + 1) for rank in range(len(products))]  # Zipf: a few codes are hot
    customers = [f"{number}.0" for number in rng.sample(range(12346, 18287), max(20, invoices // 3))]
    number, now = _FIRST_INVOICE, _START
    sold: list[tuple[str, str, list[list[str]]]] = []
    for position in range(invoices):
        now += timedelta(minutes=rng.randrange(1, 12))
        stamp = now.strftime("%Y-%m-%d %H:%M:00")
        kind = rng.random()
        if position == invoices // 2 and invoices >= 20:
            rows = [[f"A{number}", "B", "Adjust bad debt", "1", stamp, "-11062.06", "", "United Kingdom"]]
        elif kind < 0.14 and sold:
            customer, country, lines = rng.choice(sold)
            chosen = rng.sample(lines, min(len(lines), rng.choice((1, 1, 1, 2, 4))))
            rows = [
                [f"C{number}", line[1], line[2], str(-rng.randint(1, int(line[3]))), stamp, line[5], customer, country]
                for line in chosen
            ]
        elif kind < 0.18:
            product = rng.choice(products)
            note = rng.choice(("", "damaged", "?", "lost"))
            rows = [[str(number), product.code, note, str(-rng.randint(1, 60)), stamp, "0.0", "", "United Kingdom"]]
        else:
            customer = "" if rng.random() < 0.08 else rng.choice(customers)
            country = rng.choice(_COUNTRIES)
            rows = _order(rng, str(number), stamp, customer, country, products, weights)
            sold.append((customer, country, rows))
        if position == invoices // 3 and len(rows) > 1:  # split by the next invoice, as 542806 is
            late = [*rows.pop()]
            late[4] = (now + timedelta(minutes=1)).strftime("%Y-%m-%d %H:%M:00")
            yield from rows
            yield [f"C{number + 1}", late[1], late[2], "-1", stamp, late[5], late[6], late[7]]
            yield late
            number += 1
        else:
            yield from rows
        number += 1


def _products(rng: random.Random, count: int) -> list[_Product]:
    products = list(_SPECIAL)
    products.append(_Product("85123A", "WHITE HANGING HEART T-LIGHT HOLDER", ("2.55", "2.95")))
    products.append(_Product("85123a", "white hanging heart t-light holder", ("5.79",)))
    taken = {product.code for product in products}
    while len(products) < count:
        prefix = "22" if rng.random() < 0.47 else str(rng.choice((20, 21, 84, 85, 47, 71)))
        code = f"{prefix}{rng.randrange(1000):03d}{rng.choice(('', '', '', 'A', 'B'))}"
        if code in taken:
            continue
        taken.add(code)
        name = "" if rng.random() < 0.02 else f"{rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)} "
        price = f"{rng.randrange(12, 1500) / 100:.2f}"
        prices = (price, f"{float(price) * 1.4:.2f}") if rng.random() < 0.66 else (price,)
        products.append(_Product(code, name, prices))
    rng.shuffle(products)
    return products


def _order(
    rng: random.Random,
    number: str,
    stamp: str,
    customer: str,
    country: str,
    products: list[_Product],
    weights: list[float],
) -> list[list[str]]:
    count = max(1, min(round(rng.lognormvariate(2.3, 1.1)), len(products) // 2))
    chosen = rng.choices(products, weights, k=count)  # with repetition: a code stands on several lines
    if rng.random() < 0.05:
        chosen.append(rng.choice(_SPECIAL))
    free = rng.random() < 0.04
    return [
        [
            number,
            product.code,
            product.description,
            str(rng.choice((1, 1, 2, 2, 3, 4, 6, 6, 12, 12, 24, 48))),
            stamp,
            "0.0" if free else rng.choice(product.prices),
            customer,
            country,
        ]
        for product in chosen
    ]


def write(file: TextIO, *, invoices: int, seed: int) -> None:
    csv.writer(file, lineterminator="\n").writerows(generate(invoices=invoices, seed=seed))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write invoices of the shape of Online Retail as CSV to stdout.")
    parser.add_argument("--invoices", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    write(sys.stdout, invoices=arguments.invoices, seed=arguments.seed)
