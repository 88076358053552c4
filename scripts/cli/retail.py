"""Online Retail CSV as commands of the order domains: pure functions from rows to what is to be sent.

Columns: InvoiceNo, StockCode, Description, Quantity, InvoiceDate, UnitPrice, CustomerID, Country. One row is one
line of an invoice.

    digits only      lines with Quantity > 0 -> one PlaceOrder; each line with Quantity < 0 -> one WriteOffStock
    C…               one ReturnGoods, quantities made positive
    anything else    skipped, counted and listed

Rows with the same InvoiceNo anywhere in a file are one invoice, at the position and with the date, customer and
country of its first row. A row that cannot be read makes its whole invoice skipped; it never stops the replay.
Command ids are UUIDv5 of what a command is about, so that the same file sent again is the same commands again.
"""

from __future__ import annotations

import csv
import gzip
import io
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import ROUND_HALF_EVEN, Decimal, InvalidOperation
from pathlib import Path
from typing import Any, TypeAlias

COLUMNS = ("InvoiceNo", "StockCode", "Description", "Quantity", "InvoiceDate", "UnitPrice", "CustomerID", "Country")
CURRENCY = "GBP"
GUEST = "guest"
MAX_QUANTITY = 2**31
"""Beyond this a quantity is a typing error and not an order."""

_DIGITS = re.compile(r"[0-9]+")
_INTEGER = re.compile(r"[+-]?[0-9]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_CUSTOMER = re.compile(r"([0-9]+)(?:\.0*)?")


class UnreadableRowError(ValueError):
    """A row that does not say what its columns promise; the text says why."""


class UnreadableFileError(ValueError):
    """A file that is not Online Retail CSV at all; the text says why."""


@dataclass(frozen=True, slots=True)
class Line:
    """One readable row. `number` counts the rows of its invoice from 1; `unit_price` is in pence."""

    number: int
    stock_code: str
    description: str
    quantity: int
    unit_price: int


@dataclass(frozen=True, slots=True)
class Invoice:
    """All rows of one InvoiceNo. `unreadable` says why it must be skipped, where it must."""

    number: str
    customer_id: str
    country: str
    invoiced_at: str
    lines: tuple[Line, ...]
    unreadable: str = ""


@dataclass(frozen=True, slots=True)
class Planned:
    """One command to send. `lines` is how many rows of the file it stands for."""

    type: str
    id: str
    body: Mapping[str, Any]
    invoice: str = ""
    lines: int = 0


@dataclass(frozen=True, slots=True)
class Skipped:
    invoice: str
    reason: str


@dataclass
class Catalogue:
    """What the invoices speak of: products by code with name and price, and customers, in order of appearance."""

    names: dict[str, str] = field(default_factory=dict)
    prices: dict[str, int] = field(default_factory=dict)
    customers: dict[str, None] = field(default_factory=dict)


Row: TypeAlias = Sequence[str]


def read_file(path: Path) -> list[Invoice]:
    """The invoices of a `.csv` or `.csv.gz` file. Raises OSError, or UnreadableFileError for another kind of file."""
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
            content = file.read()
    except (gzip.BadGzipFile, EOFError) as error:
        raise UnreadableFileError(f"{path} is not a whole gzip file: {error}") from error
    # Bytes that are no UTF-8 become lone surrogates, by which their row is known to be unreadable.
    text = io.StringIO(content.decode("utf-8-sig", "surrogateescape"), newline="")
    try:
        return read_invoices(_rows(text))
    except UnreadableFileError as error:
        raise UnreadableFileError(f"{path}: {error}") from error


def read_invoices(rows: Iterable[Row]) -> list[Invoice]:
    """The invoices of CSV rows, the header first. Raises UnreadableFileError when the header lacks a column."""
    rows = iter(rows)
    header = next(rows, ())
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        raise UnreadableFileError(f"the first line does not name the column {missing[0]}")
    width = len(header)
    place = {name: header.index(name) for name in COLUMNS}
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row:  # an empty line is no row
            number = row[place["InvoiceNo"]] if len(row) > place["InvoiceNo"] else ""
            found.setdefault(number, []).append(row)
    return [_invoice(number, rows, place, width) for number, rows in found.items()]


def _rows(text: Iterable[str]) -> Iterator[Row]:
    reader = csv.reader(text)
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error:  # a field beyond the limit, say behind a quotation mark that nobody closed
            yield ("",)


def _invoice(number: str, rows: list[Row], place: Mapping[str, int], width: int) -> Invoice:
    lines = []
    customer_id = country = invoiced_at = unreadable = ""
    for position, row in enumerate(rows, start=1):
        try:
            if len(row) != width:
                raise UnreadableRowError(f"{len(row)} fields instead of {width}")
            if not all(map(_is_text, row)):
                raise UnreadableRowError("not UTF-8")
            named = {name: row[index] for name, index in place.items()}
            if position == 1:
                customer_id, country = customer_of(named["CustomerID"]), named["Country"]
                invoiced_at = date_of(named["InvoiceDate"])
            else:
                customer_of(named["CustomerID"])
                date_of(named["InvoiceDate"])
            lines.append(_line(position, named))
        except UnreadableRowError as error:
            unreadable = unreadable or f"line {position}: {error}"
    if not number:
        unreadable = unreadable or "line 1: no InvoiceNo"
    return Invoice(number, customer_id, country, invoiced_at, tuple(lines), unreadable)


def _line(number: int, row: Mapping[str, str]) -> Line:
    if not row["StockCode"]:
        raise UnreadableRowError("no StockCode")
    return Line(number, row["StockCode"], row["Description"], quantity_of(row["Quantity"]), pence_of(row["UnitPrice"]))


def _is_text(field: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" or character == "\0" for character in field)


def quantity_of(text: str) -> int:
    """The integer in `text`, which may be negative."""
    if not _INTEGER.fullmatch(text) or abs(int(text)) > MAX_QUANTITY:
        raise UnreadableRowError(f"Quantity {text[:40]!r} is not an integer of a sensible size")
    return int(text)


def pence_of(text: str) -> int:
    """A price in pounds as pence, rounded half-even: of two equally near integers the even one."""
    try:
        price = Decimal(text)
        if not price.is_finite() or abs(price) > 10**12:
            raise UnreadableRowError(f"UnitPrice {text[:40]!r} is not a number of a sensible size")
        return int((price * 100).quantize(Decimal(1), rounding=ROUND_HALF_EVEN))
    except InvalidOperation:
        raise UnreadableRowError(f"UnitPrice {text[:40]!r} is not a number") from None


def customer_of(text: str) -> str:
    """The integer part of a CustomerID (`17850.0` -> `17850`); an empty one is the guest."""
    if not text:
        return GUEST
    match = _CUSTOMER.fullmatch(text)
    if match is None:
        raise UnreadableRowError(f"CustomerID {text[:40]!r} is not a number")
    return match.group(1)


def date_of(text: str) -> str:
    """An InvoiceDate as ISO 8601; it carries no zone, being the shop's own time."""
    try:
        return datetime.fromisoformat(text).isoformat()
    except ValueError:
        raise UnreadableRowError(f"InvoiceDate {text[:40]!r} is not a date") from None


def one_line(description: str) -> str:
    """A description as commands take text: without control characters, not longer than 200; "" when nothing is left."""
    text = _CONTROL.sub(" ", description)[:200]
    return text if text.strip() else ""


def category_of(stock_code: str) -> str:
    return stock_code[:3]


def command_id(*parts: str) -> str:
    """The id of the replay's command about `parts`: the same for everybody who replays the same line."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, ":".join(("concord", *parts))))


def catalogue_of(invoices: Iterable[Invoice]) -> Catalogue:
    """Every product and customer that the invoices' readable rows name, skipped invoices included.

    A product is named by its first description that is not empty, else by its code; its list price is the first
    one above 0, else 0.
    """
    catalogue = Catalogue()
    for invoice in invoices:
        if invoice.customer_id:
            catalogue.customers.setdefault(invoice.customer_id)
        for line in invoice.lines:
            if not catalogue.names.setdefault(line.stock_code, ""):
                catalogue.names[line.stock_code] = one_line(line.description)
            if catalogue.prices.setdefault(line.stock_code, 0) == 0:
                catalogue.prices[line.stock_code] = max(0, line.unit_price)
    for code, name in catalogue.names.items():
        catalogue.names[code] = name or one_line(code)
    return catalogue


def register_products(catalogue: Catalogue, *, existing: set[tuple[str, str]], initial_stock: int) -> list[Planned]:
    """RegisterProduct for each product that is not among `existing` (category, product id)."""
    return [
        Planned(
            "RegisterProduct",
            command_id("product", code),
            {
                "category": category_of(code),
                "product_id": code,
                "name": name,
                "quantity": initial_stock,
                "unit_price": catalogue.prices[code],
                "currency": CURRENCY,
            },
        )
        for code, name in catalogue.names.items()
        if (category_of(code), code) not in existing
    ]


def open_wallets(catalogue: Catalogue, *, existing: set[str], initial_balance: int) -> list[Planned]:
    """OpenWallet for each customer who is not among `existing`. `initial_balance` is in pence."""
    return [
        Planned(
            "OpenWallet",
            command_id("wallet", customer),
            {"customer_id": customer, "initial_balance": initial_balance, "currency": CURRENCY},
        )
        for customer in catalogue.customers
        if customer not in existing
    ]


def commands_of(invoice: Invoice) -> list[Planned] | Skipped:
    """What an invoice asks for, in the order of its lines, or why it asks for nothing."""
    if invoice.unreadable:
        return Skipped(invoice.number, f"unreadable: {invoice.unreadable}")
    if _DIGITS.fullmatch(invoice.number):
        commands = _order(invoice)
    elif invoice.number.startswith("C"):
        commands = _return(invoice)
    else:
        return Skipped(invoice.number, "neither an ordinary invoice nor a cancellation")
    if isinstance(commands, Skipped) or commands:
        return commands
    return Skipped(invoice.number, "no line with a quantity")


def _order(invoice: Invoice) -> list[Planned] | Skipped:
    sold = [line for line in invoice.lines if line.quantity > 0]
    if any(line.unit_price < 0 for line in sold):
        return Skipped(invoice.number, "a negative price")
    commands = []
    if sold:
        body: dict[str, Any] = {
            "order_id": invoice.number,
            "customer_id": invoice.customer_id,
            "lines": [_order_line(line) for line in sold],
            "currency": CURRENCY,
            "shipping_address": {"region": invoice.country},
        }
        commands.append(
            Planned("PlaceOrder", command_id("place", invoice.number), body, invoice.number, lines=len(sold))
        )
    for line in invoice.lines:
        if line.quantity < 0:
            body = {
                "category": category_of(line.stock_code),
                "product_id": line.stock_code,
                "quantity": -line.quantity,
            }
            if reason := one_line(line.description):
                body["reason"] = reason
            number = str(line.number)
            commands.append(
                Planned("WriteOffStock", command_id("write-off", invoice.number, number), body, invoice.number, lines=1)
            )
    return commands


def _return(invoice: Invoice) -> list[Planned] | Skipped:
    returned = [line for line in invoice.lines if line.quantity != 0]
    if any(line.unit_price < 0 for line in returned):
        return Skipped(invoice.number, "a negative price")
    if not returned:
        return []
    body = {
        "return_id": invoice.number,
        "customer_id": invoice.customer_id,
        "lines": [_order_line(line) for line in returned],
        "currency": CURRENCY,
    }
    return [Planned("ReturnGoods", command_id("return", invoice.number), body, invoice.number, lines=len(returned))]


def _order_line(line: Line) -> dict[str, Any]:
    return {
        "category": category_of(line.stock_code),
        "product_id": line.stock_code,
        "quantity": abs(line.quantity),
        "unit_price": line.unit_price,
    }
