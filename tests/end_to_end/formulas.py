"""What stock and wallets must be after a replay, computed from the CSV alone. A program of its own.

    python tests/end_to_end/formulas.py FILE… --tables DIR [--limit N] [--initial-stock N] [--initial-balance PENCE]
                                        [--only-theirs]

It imports nothing of the project: invoices are read, ids are made and sums are done here once more, from the replay
rules as they are written down, with the standard library's csv and decimal. DIR holds what `concord table dump`
printed, a file `NAMESPACE.TABLE.ndjson` for each of `inventory.products`, `inventory.outcomes`, `payment.wallets`,
`orders.outcomes`, `orders.orders` and `orders.returns`.

Of every invoice's commands the status is looked up among the outcomes; over those that were committed:

    per product   quantity − reserved = initial − sold + returned − written off
    per wallet    balance             = initial − paid + refunded

and the orders and returns in the tables are exactly those that were committed, with their totals. With --only-theirs
the tables may hold more than the files brought. Prints one JSON object; exit code 1 if anything differs, with the
differences in it.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import sys
import uuid
from collections import Counter
from decimal import ROUND_HALF_EVEN, Decimal, InvalidOperation
from pathlib import Path
from typing import Any

NEEDED = (
    "inventory.products",
    "inventory.outcomes",
    "payment.wallets",
    "orders.outcomes",
    "orders.orders",
    "orders.returns",
)


def concord_id(*parts: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, "concord:" + ":".join(parts)))


def invoices_of(path: Path, encoding: str = "utf-8-sig") -> dict[str, list[dict[str, str]]]:
    """Rows by invoice number, in the order of each invoice's first row."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    found: dict[str, list[dict[str, str]]] = {}
    for row in csv.DictReader(io.StringIO(content.decode(encoding), newline="")):
        found.setdefault(row["InvoiceNo"], []).append(row)
    return found


def pence(text: str) -> int:
    return int((Decimal(text) * 100).quantize(Decimal("1"), rounding=ROUND_HALF_EVEN))


def customer(text: str) -> str:
    return str(int(Decimal(text))) if text else "guest"


class Expected:
    """Sums over the committed commands of the files."""

    def __init__(self, outcomes: dict[str, str]) -> None:
        self._outcomes = outcomes
        self.stock: Counter[str] = Counter()
        self.money: Counter[str] = Counter()
        self.products: set[str] = set()
        self.customers: set[str] = set()
        self.orders: dict[str, int] = {}
        self.returns: dict[str, int] = {}
        self.statuses: Counter[str] = Counter()
        self.numbers: set[str] = set()
        self.lines = 0
        self.skipped: list[str] = []
        self.unanswered: list[str] = []

    def add(self, number: str, rows: list[dict[str, str]]) -> None:
        self.numbers.add(number)
        self.lines += len(rows)
        try:
            read = [
                (row["StockCode"], int(row["Quantity"]), pence(row["UnitPrice"]), customer(row["CustomerID"]))
                for row in rows
            ]
        except (ValueError, InvalidOperation, TypeError):
            self.skipped.append(number)
            return
        buyer = read[0][3]
        self.products |= {code for code, *_ in read}
        self.customers.add(buyer)
        if number.isascii() and number.isdigit():
            self._order(number, buyer, read)
        elif number.startswith("C"):
            self._return(number, buyer, read)
        else:
            self.skipped.append(number)

    def _order(self, number: str, buyer: str, read: list[tuple[str, int, int, str]]) -> None:
        sold = [line for line in read if line[1] > 0]
        if any(price < 0 for _, _, price, _ in sold):
            self.skipped.append(number)
            return
        if sold and self._committed("PlaceOrder", concord_id("place", number)):
            total = sum(quantity * price for _, quantity, price, _ in sold)
            self.orders[number] = total
            self.money[buyer] -= total
            for code, quantity, *_ in sold:
                self.stock[code] -= quantity
        for position, (code, quantity, *_) in enumerate(read, start=1):
            if quantity < 0 and self._committed("WriteOffStock", concord_id("write-off", number, str(position))):
                self.stock[code] += quantity
        if all(quantity == 0 for _, quantity, *_ in read):
            self.skipped.append(number)

    def _return(self, number: str, buyer: str, read: list[tuple[str, int, int, str]]) -> None:
        back = [line for line in read if line[1] != 0]
        if not back or any(price < 0 for _, _, price, _ in back):
            self.skipped.append(number)
            return
        if self._committed("ReturnGoods", concord_id("return", number)):
            total = sum(abs(quantity) * price for _, quantity, price, _ in back)
            self.returns[number] = total
            self.money[buyer] += total
            for code, quantity, *_ in back:
                self.stock[code] += abs(quantity)

    def _committed(self, type: str, id: str) -> bool:
        status = self._outcomes.get(id)
        if status is None:
            self.unanswered.append(f"{type} {id}")
        self.statuses[f"{type} {status}"] += 1
        return status == "committed"


def read_table(directory: Path, name: str) -> list[dict[str, Any]]:
    with (directory / f"{name}.ndjson").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def theirs(expected: Expected, tables: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """The rows that the files speak of."""
    wanted = {
        "inventory.products": ("product_id", expected.products),
        "payment.wallets": ("customer_id", expected.customers),
        "orders.orders": ("order_id", expected.numbers),
        "orders.returns": ("return_id", expected.numbers),
    }
    return {name: [row for row in tables[name] if row[column] in ids] for name, (column, ids) in wanted.items()}


def differences(
    expected: Expected, tables: dict[str, list[dict[str, Any]]], *, initial_stock: int, initial_balance: int
) -> list[str]:
    found = [f"no outcome: {what}" for what in expected.unanswered]
    products = {row["product_id"]: row for row in tables["inventory.products"]}
    wallets = {row["customer_id"]: row for row in tables["payment.wallets"]}
    found += [f"product {code} is missing" for code in sorted(expected.products - products.keys())]
    found += [f"wallet {who} is missing" for who in sorted(expected.customers - wallets.keys())]
    for code, row in products.items():
        available, computed = row["quantity"] - row["reserved"], initial_stock + expected.stock[code]
        if available != computed:
            found.append(f"product {code}: {available} are available, the files say {computed}")
        if row["category"] != code[:3]:
            found.append(f"product {code} stands in category {row['category']}")
    for who, row in wallets.items():
        computed = initial_balance + expected.money[who]
        if row["balance"] != computed:
            found.append(f"wallet {who}: balance is {row['balance']}, the files say {computed}")
    for name, column, computed_totals in (
        ("orders.orders", "order_id", expected.orders),
        ("orders.returns", "return_id", expected.returns),
    ):
        actual = {row[column]: row["total"] for row in tables[name]}
        for number in sorted(actual.keys() | computed_totals.keys()):
            if actual.get(number) != computed_totals.get(number):
                told = f"total {actual.get(number)}, the files say {computed_totals.get(number)}"
                found.append(f"{name} {number}: {told}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tables", type=Path, required=True, help="directory of NAMESPACE.TABLE.ndjson")
    parser.add_argument("--limit", type=int, default=0, help="only so many invoices in all; 0: all")
    parser.add_argument("--initial-stock", type=int, default=1_000_000)
    parser.add_argument("--initial-balance", type=int, default=1_000_000_000, help="pence")
    parser.add_argument("--only-theirs", action="store_true", help="look only at what the files speak of")
    arguments = parser.parse_args()
    tables = {name: read_table(arguments.tables, name) for name in NEEDED}
    outcomes = {row["id"]: row["status"] for name in ("inventory", "orders") for row in tables[f"{name}.outcomes"]}
    expected = Expected(outcomes)
    left = arguments.limit or sys.maxsize
    for file in arguments.files:
        for number, rows in list(invoices_of(file).items())[:left]:
            expected.add(number, rows)
            left -= 1
    if arguments.only_theirs:
        tables = theirs(expected, tables)
    found = differences(
        expected, tables, initial_stock=arguments.initial_stock, initial_balance=arguments.initial_balance
    )
    report = {
        "agrees": not found,
        "invoices": len(expected.numbers),
        "lines": expected.lines,
        "statuses": dict(sorted(expected.statuses.items())),
        "skipped": expected.skipped,
        "products": len(tables["inventory.products"]),
        "wallets": len(tables["payment.wallets"]),
        "differences": found,
    }
    print(json.dumps(report))
    return 0 if not found else 1


if __name__ == "__main__":
    sys.exit(main())
