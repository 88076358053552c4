"""Generated invoices of a test's own: marked, so that several files can be replayed on one system without meeting."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from scripts.cli.generate import generate


def write_invoices(file: Path, *, invoices: int, seed: int, mark: str) -> None:
    """Invoices of the shape of Online Retail; every invoice number, customer and stock code begins with `mark`.

    `mark` is of digits, so that numbers stay numbers. There are no guests: all files would share that customer.
    """
    header, *rows = generate(invoices=invoices, seed=seed)
    number, code, customer = (header.index(name) for name in ("InvoiceNo", "StockCode", "CustomerID"))
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(header)
        for row in rows:
            marked = [*row]
            digits = row[number].lstrip("AC")
            marked[number] = row[number][: len(row[number]) - len(digits)] + mark + digits
            marked[code] = f"{mark}-{row[code]}"
            marked[customer] = mark + (row[customer] or "00000.0")
            writer.writerow(marked)


def of_mark(mark: str) -> Callable[[Mapping[str, Any]], bool]:
    """Whether a stored row comes from the replay of a file with this mark."""

    def wanted(row: Mapping[str, Any]) -> bool:
        names = ("customer_id", "category", "key", "order_id")
        return any(str(row[name]).startswith(mark) for name in names if row.get(name) is not None)

    return wanted
